"""The command: its exit codes, its one JSON document, and the verdict over the checks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.certificate.envelope import seal
from bench.certificate.statement import make_certificate
from bench.cli.main import main
from bench.data.loading import load_dataset
from bench.defects.in_graph import DEFECTS
from bench.defects.workshop import Workshop
from bench.deployment import Deployment
from bench.errors import BaselineError
from bench.gate.modes import MODES
from bench.gate.replay import incomplete, replay
from bench.gate.validate import make_subject, thinned, validate
from reports.validation import CheckResult, Finding, Validation, decide_verdict
from tests.synthetic import rejudged

Exports = Callable[..., Path]
EXACT = "files,manifest,config,graph,attributes,rotary_tables,weights,tokenizer,special_ids"


def test_exit_codes_and_one_document(
    exports: Exports, checkpoints: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["validate", str(exports()), "--baseline", str(checkpoints()), "--only", EXACT]
    assert main([*arguments, "--json", "--out", str(tmp_path / "out")]) == 0
    written = capsys.readouterr()
    document = Validation.model_validate(json.loads(written.out))
    assert document.verdict == "PASS"
    assert [r.name for r in document.results] == EXACT.split(",")
    assert "PASS" in written.err
    assert json.loads((tmp_path / "out" / "validation.json").read_text()) == json.loads(written.out)

    shop = Workshop(exports(), tmp_path / "bad", checkpoints())
    next(d for d in DEFECTS if d.name.startswith("norm epsilon")).change(shop)
    shop.reseal()
    assert main(["validate", str(shop.folder), "--baseline", str(checkpoints()), "--only", EXACT]) == 1
    text = capsys.readouterr().out
    assert "FAIL" in text
    assert "epsilon is 0.001" in text
    assert "layer 0" in text


def test_a_certificate_from_the_gate_itself(
    exports: Exports,
    checkpoints: Exports,
    tiny_dataset_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """validate signs, verify agrees; the second time the baseline's windows come from the cache."""
    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path / "cache"))
    key, certificate = tmp_path / "k", tmp_path / "certificate.json"
    assert main(["keygen", str(key)]) == 0
    asked = ["validate", str(exports()), "--baseline", str(checkpoints()), "--dataset", str(tiny_dataset_file)]
    signed = [*asked, "--threads", "1", "--certificate", str(certificate), "--key", f"{key}.pem"]
    code = main([*signed, "--out", str(tmp_path / "out")])
    assert code == 0, capsys.readouterr().out
    assert main(["verify", str(certificate), str(exports()), "--key", f"{key}.pub.pem"]) == 0
    shop = Workshop(exports(), tmp_path / "other", checkpoints())
    shop.reseal()
    config = shop.folder / "config.json"
    text = config.read_text()
    config.unlink()  # the workshop's files are links to the shared export's
    config.write_text(text + " ")
    assert main(["verify", str(certificate), str(shop.folder), "--key", f"{key}.pub.pem"]) == 1
    # A part of the gate is no ground for a certificate, whichever way it is asked for.
    assert main([*signed, "--only", "files"]) == 2
    document = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert replay(Validation.model_validate(document)) == []
    passed = [r for r in document["results"] if r["status"] == "PASS"]
    document |= {"results": passed[:3], "evidence": {}, "reasons": ["3 checks passed"]}
    (tmp_path / "part.json").write_text(json.dumps(document))
    arguments = ["certify", str(tmp_path / "part.json"), str(exports()), "--baseline", str(checkpoints())]
    data = ["--dataset", str(tiny_dataset_file), "--certificate", str(certificate)]
    capsys.readouterr()
    assert main([*arguments, *data]) == 2
    assert "23 of 26 checks were not run" in capsys.readouterr().err


def test_evidence_that_was_cut_out(
    exports: Exports, checkpoints: Exports, tiny_dataset_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every bound and status follows from the rest, so that only folder, baseline and data say what is missing."""
    dataset, certificate, part = load_dataset(str(tiny_dataset_file)), tmp_path / "cert.json", tmp_path / "part.json"
    subject = make_subject(exports(), str(checkpoints()), MODES["standard"], dataset, Deployment(threads=1))
    whole = validate(subject)
    subject.close()
    assert whole.verdict == "PASS"
    assert thinned(whole, subject) == []
    e = whole.evidence
    cut = {
        "chunks, the data have": {"chunks": e.chunks[:-1]},
        "generations are not those of the": {"outputs": e.outputs[:-1], "tasks": []},
        "decode_steps looked at 59 places, not 60": {
            "places": e.places | {"decode_steps": e.places["decode_steps"][:-1]}
        },
        "long_context looked at 1 places, not 2": {"places": e.places | {"long_context": e.places["long_context"][1:]}},
    }
    common = [str(exports()), "--baseline", str(checkpoints()), "--dataset", str(tiny_dataset_file)]
    changed = [(words, rejudged(whole, evidence=e.model_copy(update=change))) for words, change in cut.items()]
    changed.append(("kv_dtype: says fp16, the folder is fp32", rejudged(whole, kv_dtype="fp16")))
    for words, result in changed:
        if result.evidence.tasks:  # without them the result is incomplete in any case
            assert replay(result) == incomplete(result) == []
            part.write_text(result.to_json())
            assert main(["certify", str(part), *common, "--certificate", str(certificate)]) == 2
            assert words in capsys.readouterr().err
            assert not certificate.exists()
        assert words in " ".join(thinned(result, subject))
        certificate.unlink(missing_ok=True)
    part.write_text(whole.to_json())
    assert main(["certify", str(part), *common, "--certificate", str(certificate)]) == 0
    assert main(["verify", str(certificate), *common]) == 0
    # Somebody who signs what he likes: the recipient who has the baseline counts as well.
    statement = make_certificate(changed[0][1], exports(), checkpoints(), dataset)
    certificate.write_text(json.dumps(seal(statement)))
    assert main(["verify", str(certificate), str(exports())]) == 0
    assert main(["verify", str(certificate), *common]) == 1
    assert "refused (incomplete): the evidence is not whole" in capsys.readouterr().err
    assert main(["verify", str(certificate), *common[:3]]) == 2
    assert "--dataset" in capsys.readouterr().err
    assert main(["verify", str(certificate), str(exports()), *common[3:]]) == 2
    assert "--baseline" in capsys.readouterr().err


def test_workers_that_may_fall_back_are_refused(
    exports: Exports, checkpoints: Exports, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["validate", "--baseline", str(checkpoints())], ["perplexity"]):
        asked = [command[0], str(exports()), *command[1:], "--allow-fallback"]
        assert main([*asked, "--workers", "2"]) == 2
        assert "--allow-fallback with --workers" in capsys.readouterr().err


def test_kept_results_need_no_pytorch(checkpoints: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gate.baseline import Baseline
    from export.source import resolve

    ids = [5, 9, 12, 7, 8]

    def opened(seed: int = 0, keep: bool = True) -> Baseline:
        changes = {"seed": seed} if seed else {}
        return Baseline(resolve(str(checkpoints(**changes))), 1, keep=keep, root=tmp_path)

    first = opened()
    scored = {kind: first.null_score(kind, ids).copy() for kind in ("fp32", "eager", "fp16")}
    tokens = first.tokens([ids, ids[:2]], 4)
    past, after = first.continued(ids, 12, ids[:2])
    first.close()
    plain = opened(keep=False)
    assert plain.key == ""
    assert {kind: plain.null_score(kind, ids).tobytes() for kind in scored} == {
        k: v.tobytes() for k, v in scored.items()
    }
    assert plain.tokens([ids, ids[:2]], 4) == tokens
    plain.close()
    assert scored["fp32"].tobytes() != scored["fp16"].tobytes()
    monkeypatch.setattr("bench.gate.baseline.TorchSession", None)
    again = opened()
    assert {kind: again.null_score(kind, ids).tobytes() for kind in scored} == {
        k: v.tobytes() for k, v in scored.items()
    }
    assert again.tokens([ids, ids[:2]], 4) == tokens
    kept, logits = again.continued(ids, 12, ids[:2])
    assert logits.tobytes() == after.tobytes()
    assert [t.tobytes() for pair in kept for t in pair] == [t.tobytes() for pair in past for t in pair]
    with pytest.raises(BaselineError):  # another checkpoint has to be computed
        opened(seed=1).score(ids)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["validate"], "--baseline"),
        (["validate", "nowhere", "--baseline", "demo", "--only", "nonsense"], "--list-checks"),
        (["validate", "nowhere", "--baseline", "demo", "--mode", "slow"], "quick, standard"),
    ],
)
def test_wrong_input_is_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_what_this_machine_cannot_run_is_no_verdict_on_the_folder(
    exports: Exports, checkpoints: Exports, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime's CPU provider has no bf16: exit code 4, and the exact checks still are there to be run."""
    arguments = ["validate", str(exports("bf16")), "--baseline", str(checkpoints())]
    assert main([*arguments, "--only", "files,weights"]) == 0
    assert main([*arguments, "--only", "files,prefill_logits"]) == 4
    assert "bf16" in capsys.readouterr().err


def test_a_missing_folder_is_wrong_input(checkpoints: Exports, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "nowhere", "--baseline", str(checkpoints())]) == 2
    assert "llama-onnx export" in capsys.readouterr().err


def test_the_list_names_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--list-checks", "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert rows[0]["name"] == "files"
    documented = (Path(__file__).parents[3] / "docs" / "gate.md").read_text(encoding="utf-8")
    assert [r["name"] for r in rows if f"| `{r['name']}` |" not in documented] == []


def result(name: str, status: Any) -> CheckResult:
    findings = [Finding(where="node x", what="is wrong")] if status == "FAIL" else []
    return CheckResult(
        name=name, kind="exact", status=status, looks_at="l", summary="s", seconds=0.0, findings=findings
    )


@pytest.mark.parametrize(
    ("statuses", "verdict", "code"),
    [
        (["PASS", "PASS"], "PASS", 0),
        (["PASS", "SUSPICIOUS", "REPORTED", "SKIPPED"], "PASS", 0),
        (["PASS", "INCONCLUSIVE"], "INCONCLUSIVE", 3),
        (["INCONCLUSIVE", "FAIL", "PASS"], "FAIL", 1),
        (["REPORTED", "SKIPPED"], "INCONCLUSIVE", 3),
        ([], "INCONCLUSIVE", 3),
    ],
)
def test_the_verdict(statuses: list[Any], verdict: str, code: int) -> None:
    found, reasons = decide_verdict([result(f"c{k}", s) for k, s in enumerate(statuses)])
    assert found == verdict
    assert reasons
    if verdict == "FAIL":
        assert "node x" in reasons[0]
