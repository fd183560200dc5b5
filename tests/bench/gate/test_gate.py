"""One gate for every entry: what it runs once, what it never lets pass, and where the candidate runs."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file as load_file_of_tensors
from safetensors.torch import save_file as save_tensors

from bench.cli.main import main
from bench.data.loading import load_file
from bench.deployment import Deployment
from bench.errors import BaselineError, MachineError
from bench.gate.found import Found
from bench.gate.judge import judge_tokens
from bench.gate.modes import MODES, Terms
from bench.gate.registry import BY_NAME, CHECKS
from bench.gate.statistics import TokenScores
from bench.gate.store import baseline_key
from bench.gate.validate import Gate, make_subject, validate
from bench.latency.workload import PROFILES
from export.manifest import UserError
from reports.validation import Evidence, overall
from runtime.errors import ProviderUnavailableError

Exports = Callable[..., Path]


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        ([], "INCONCLUSIVE"),
        (["REPORTED", "SKIPPED"], "INCONCLUSIVE"),
        (["REPORTED", "PASS"], "PASS"),
        (["SUSPICIOUS"], "PASS"),
        (["PASS", "INCONCLUSIVE"], "INCONCLUSIVE"),
        (["INCONCLUSIVE", "FAIL"], "FAIL"),
    ],
)
def test_nothing_judged_is_never_a_pass(statuses: list[str], verdict: str) -> None:
    assert overall(statuses) == verdict


def test_every_profile_has_its_mode() -> None:
    assert {p.name: p.mode for p in PROFILES.values()} == {"smoke": "quick", "standard": "standard", "full": "full"}
    assert {p.mode for p in PROFILES.values()} == set(MODES)


def test_each_check_runs_once_in_whatever_order(exports: Exports, subjects: Callable[..., Any]) -> None:
    subject = subjects(exports())
    told: list[str] = []
    gate = Gate(subject, lambda r: told.append(r.name))
    first = gate.result(BY_NAME["mean_kld"])
    gate.result(BY_NAME["files"])
    assert gate.result(BY_NAME["mean_kld"]) is first
    assert told == ["mean_kld", "files"]
    found = gate.validation()
    assert [r.name for r in found.results] == ["files", "mean_kld"]
    assert not found.complete
    subject.close()


def test_the_evidence_is_what_was_measured(exports: Exports, subjects: Callable[..., Any]) -> None:
    """Each statistical check, judged again from what the document holds, gives what the run gave."""
    subject = subjects(exports("fp16"))
    found = validate(subject)
    subject.close()
    assert found.complete
    assert found.session["provider"] == "cpu"
    read = type(found).model_validate_json(found.to_json())
    assert read == found
    again = 0
    for result in read.results:
        judged = BY_NAME[result.name].judge
        if judged is not None:
            made = judged(read.evidence, subject.terms)
            same = (result.status, result.summary, result.measurements, result.tasks)
            assert (made.status, made.summary, list(made.measurements), list(made.tasks)) == same
            again += 1
    assert again == sum(c.judge is not None for c in CHECKS) == 14
    assert read.tokens_scored == next(r for r in found.results if r.name == "mean_kld").measurements[0].samples
    assert read.evidence != Evidence()


def test_the_full_mode_takes_every_text_and_item(exports: Exports, checkpoints: Exports, tiny_dataset: Any) -> None:
    def asked(mode: str) -> tuple[int, int]:
        where = Deployment(threads=1)
        subject = make_subject(exports(), str(checkpoints()), MODES[mode], tiny_dataset, where)
        items = sum(map(len, tiny_dataset.groups(MODES[mode].items).values()))
        return sum(map(len, subject.windows)), items

    standard, full = asked("standard"), asked("full")
    assert full[0] > standard[0]
    assert full[1] == 8
    texts = tiny_dataset.sources()
    assert len(texts) == 4
    assert "cat" in texts[1]
    left_out = tiny_dataset.sources(without=tiny_dataset.calibration())
    assert not left_out[0]  # what gptq is calibrated on says nothing about it


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--provider", "npu"], 2, "unknown provider 'npu'"),
        (["--provider", "cuda"], 4, "pip install 'onnxruntime-gpu"),
        (["--provider", "tensorrt-rtx"], 4, "tensorrt-rtx"),
        (["--provider-option", "device_id"], 2, "KEY=VALUE"),
        (["--provider-option", "device_id=0"], 2, "the cpu provider has no options"),
        (["--session-option", "session.intra_op.allow_spinning"], 2, "KEY=VALUE"),
        (["--threads", "0"], 2, "threads"),
    ],
)
def test_where_it_runs_is_asked_for_by_name(
    options: list[str], code: int, words: str, exports: Exports, checkpoints: Exports, capsys: Any, tmp_path: Path
) -> None:
    """A provider that cannot run here is no verdict on the folder, and never the CPU in its place."""
    arguments = ["validate", str(exports()), "--baseline", str(checkpoints()), "--only", "files,determinism"]
    assert main([*arguments, "--no-cache", "--out", str(tmp_path / "out"), *options]) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_fallback_that_was_allowed_stands_in_the_result(
    exports: Exports, checkpoints: Exports, tiny_dataset: Any
) -> None:
    where = Deployment("cuda", 1, allow_fallback=True)
    subject = make_subject(exports(), str(checkpoints()), MODES["quick"], tiny_dataset, where)
    found = validate(subject, [BY_NAME["determinism"]])
    subject.close()
    if found.session["provider"] == "cuda":
        pytest.skip("there is a GPU")
    assert found.settings["provider"] == "cuda"
    assert found.session["provider"] == "cpu"
    assert any("not run on cuda" in n for n in found.notes)


def test_session_options_reach_the_candidate(exports: Exports, checkpoints: Exports, tiny_dataset: Any) -> None:
    where = Deployment(threads=1, session_options={"session.intra_op.allow_spinning": "0"})
    subject = make_subject(exports(), str(checkpoints()), MODES["quick"], tiny_dataset, where)
    found = validate(subject, [BY_NAME["determinism"]])
    subject.close()
    assert found.session["option session.intra_op.allow_spinning"] == "0"
    assert found.settings["session option session.intra_op.allow_spinning"] == "0"


def test_beside_a_candidate_on_a_gpu_the_baseline_runs_there_too(
    exports: Exports, checkpoints: Exports, tiny_dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PyTorch's ``meta`` device, which computes nothing: every tensor of a request has to be there."""
    monkeypatch.setattr(Deployment, "device", "meta")
    subject = make_subject(exports(), str(checkpoints()), MODES["quick"], tiny_dataset, Deployment("cuda", 1))
    baseline = subject.baseline
    assert baseline.recipe()().device == "meta"
    for ask in (
        lambda: baseline.score([1, 2, 3]),
        lambda: baseline.residuals([1, 2, 3]),
        lambda: baseline.continued([1, 2, 3], 7, [4, 5]),
        lambda: baseline.tokens([[1, 2, 3]], 2),
    ):
        with pytest.raises(BaselineError, match=r"copy out of meta|unsupported scalarType|on meta tensors"):
            ask()
    assert baseline_key(subject.baseline.checkpoint, "cuda", 1) != baseline_key(subject.baseline.checkpoint, "cpu", 1)


def test_data_without_prose_says_nothing_against_a_folder(
    exports: Exports, checkpoints: Exports, words: list[str], tmp_path: Path
) -> None:
    items = [{"task": "qa", "context": " ".join(words), "question": "who", "references": ["cat"]}] * 2
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, items)))
    subject = make_subject(
        exports(), str(checkpoints()), MODES["quick"], load_file(tmp_path / "qa.jsonl"), Deployment(threads=1)
    )
    found = validate(subject)
    subject.close()
    assert found.verdict == "PASS", found.reasons
    statuses = {r.name: r.status for r in found.results}
    assert (statuses["mean_kld"], statuses["decode_steps"]) == ("SKIPPED", "PASS")


def test_one_chunk_of_text_decides_nothing() -> None:
    chunk = TokenScores(*(np.full(50, v) for v in (2.0, 2.0, 0.0)), np.ones(50, bool))
    terms = Terms("fp32", "fp32", "fp32", MODES["standard"])
    for name in ("perplexity_ratio", "mean_kld"):
        assert judge_tokens(name, [chunk], [chunk], lambda _k: chunk.kld, terms).status == "INCONCLUSIVE"
        assert judge_tokens(name, [chunk] * 2, [chunk], lambda _k: chunk.kld, terms).status == "PASS"


def test_quick_reports_what_its_few_chunks_leave_open() -> None:
    """A right fp16 export may lose 1.6e-4 nats over six short chunks and 5e-5 over thirty."""
    rng = np.random.default_rng(1)
    rows = [np.abs(rng.normal(0, 1e-4, 100)) * rng.exponential() for _ in range(6)]
    chunks = [TokenScores(np.full(100, 2.0), np.full(100, 2.0), kld, np.ones(100, bool)) for kld in rows]
    modes = {name: Terms("fp16", "fp16", "fp16", MODES[name]) for name in ("quick", "standard")}
    judged = {n: judge_tokens("mean_kld", chunks, chunks[:1], lambda k: rows[k], t).status for n, t in modes.items()}
    assert judged == {"quick": "REPORTED", "standard": "INCONCLUSIVE"}
    worse = [TokenScores(c.nll_candidate, c.nll_baseline, c.kld * 100, c.same_top1) for c in chunks]
    assert judge_tokens("mean_kld", worse, chunks[:1], lambda k: rows[k], modes["quick"]).status == "FAIL"


def test_a_folder_that_cannot_be_read_fails_whatever_was_asked(
    exports: Exports, checkpoints: Exports, tiny_dataset: Any, tmp_path: Path
) -> None:
    broken = shutil.copytree(exports(), tmp_path / "broken")
    (broken / "manifest.json").write_text("{")
    where = Deployment(threads=1)
    subject = make_subject(broken, str(checkpoints()), MODES["quick"], tiny_dataset, where)
    found = validate(subject, [BY_NAME["tokenizer"], BY_NAME["chat_template"]])
    assert found.verdict == "FAIL"


def test_what_failed_before_the_machine_gave_up_stands(
    exports: Exports, checkpoints: Exports, tiny_dataset: Any
) -> None:
    def gives_up(_s: Any) -> Found:
        raise ProviderUnavailableError("no GPU")

    where = Deployment(threads=1)
    subject = make_subject(exports(), str(checkpoints()), MODES["quick"], tiny_dataset, where)
    bad = replace(BY_NAME["files"], run=lambda _s: Found("FAIL", "broken"))
    last = replace(BY_NAME["determinism"], run=gives_up)
    found = validate(subject, [bad, last])
    assert (found.verdict, [r.name for r in found.results]) == ("FAIL", ["files"])
    assert any("stopped at determinism: no GPU" in n for n in found.notes)
    with pytest.raises(ProviderUnavailableError):
        validate(subject, [last])


@pytest.mark.parametrize("fault", ["no tokenizer", "no weights", "other weights", "configuration"])
def test_what_is_the_baselines_fault_is_no_verdict_on_the_folder(
    exports: Exports, checkpoints: Exports, tiny_dataset: Any, tmp_path: Path, fault: str
) -> None:
    checkpoint = shutil.copytree(checkpoints(), tmp_path / "checkpoint")
    if fault == "no tokenizer":
        for path in [*checkpoint.glob("tokenizer*"), *checkpoint.glob("*.jinja"), *checkpoint.glob("special*")]:
            path.unlink()
    elif fault == "configuration":
        (checkpoint / "config.json").write_text("{")
    else:
        weights = load_file_of_tensors(checkpoint / "model.safetensors")
        weights.pop("model.norm.weight")
        save_tensors(weights if fault == "other weights" else {}, checkpoint / "model.safetensors")

    def judged() -> None:
        validate(make_subject(exports(), str(checkpoint), MODES["quick"], tiny_dataset, Deployment(threads=1)))

    with pytest.raises(UserError, match="checkpoint") as raised:
        judged()
    assert raised.value.exit_code == 2
    assert "FAIL" not in str(raised.value)


def test_a_full_disk_is_the_machines_fault(exports: Exports, checkpoints: Exports, tiny_dataset: Any) -> None:
    def full(_s: Any) -> Found:
        raise OSError(errno.ENOSPC, "No space left on device")

    subject = make_subject(exports(), str(checkpoints()), MODES["quick"], tiny_dataset, Deployment(threads=1))
    with pytest.raises(MachineError, match="determinism could not be run: No space left") as raised:
        validate(subject, [replace(BY_NAME["determinism"], run=full)])
    assert raised.value.exit_code == 4


def test_items_longer_than_the_context_are_left_out_and_counted(
    exports: Exports, checkpoints: Exports, words: list[str], tmp_path: Path
) -> None:
    lines = [
        {"id": "long", "task": "summarization", "text": " ".join(words * 12), "references": ["the cat"]},
        {"id": "short", "task": "summarization", "text": " ".join(words), "references": ["the cat"]},
    ]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = load_file(tmp_path / "some.jsonl")
    subject = make_subject(exports(), str(checkpoints()), MODES["quick"], data, Deployment(threads=1))
    subject.mode = replace(subject.mode, items=None)
    found = validate(subject, [BY_NAME["greedy"]])
    subject.close()
    assert [o.item for o in found.evidence.outputs] == ["short"]
    assert "items left out, too long for the baseline's context: 1" in found.notes
