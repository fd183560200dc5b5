"""A certificate covers exactly these bytes, this result and this time; everything else is refused with its reason."""

from __future__ import annotations

import base64
import datetime
import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("securesystemslib")
pytest.importorskip("in_toto_attestation")

from bench.certificate.envelope import keygen, read_public_key, seal
from bench.certificate.policy import Policy, read_policy
from bench.certificate.statement import (
    EXTENSION,
    CertificateError,
    build_statement,
    make_certificate,
    read_validation,
    statement_digest,
)
from bench.certificate.verify import Verified, verify_certificate
from bench.cli.main import main
from bench.data.loading import load_shipped
from bench.digests import DigestError, folder_digest, hash_baseline, hash_folder
from bench.gate.modes import MODES
from bench.gate.statistics import TIERS
from reports.validation import Finding, Validation, decide_verdict
from tests.synthetic import rejudged, synthetic

NOW = datetime.datetime(2026, 11, 24, 12, 0, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
Results = Callable[..., Validation]
pytestmark = pytest.mark.usefixtures("kept_tasks")


@pytest.fixture
def certificate(folder: Path, baseline: Path, keys: Path, tmp_path: Path, result_of: Results) -> Path:
    statement = make_certificate(result_of(folder, baseline), folder, baseline, load_shipped(), valid_days=30, now=NOW)
    path = tmp_path / "cert.json"
    path.write_text(json.dumps(seal(statement, keys / "ours.pem")))
    return path


def failed(result: Validation) -> Validation:
    """The same with an exact check that failed."""
    found = [Finding(where="model.layers.0", what="is not the checkpoint's")]
    results = [
        r.model_copy(update={"status": "FAIL", "findings": found}) if r.name == "weights" else r for r in result.results
    ]
    verdict, reasons = decide_verdict(results)
    return result.model_copy(update={"results": results, "verdict": verdict, "reasons": reasons})


def verify(certificate: Path, folder: Path, keys: Path | None = None, **options: Any) -> Verified:
    key = read_public_key(keys / "ours.pub.pem") if keys else None
    return verify_certificate(certificate, folder, **{"key": key, "now": NOW + DAY, **options})


def payload(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(base64.b64decode(json.loads(path.read_text())["payload"]))
    return found


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the payload and leave the signature as it is."""
    envelope, statement = json.loads(path.read_text()), payload(path)
    change(statement)
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    path.write_text(json.dumps(envelope))


def reseal(path: Path, change: Callable[[dict[str, Any]], Any], key: Path | None = None) -> None:
    statement = payload(path)
    change(statement)
    path.write_text(json.dumps(seal(statement, key)))


def redigest(path: Path, change: Callable[[dict[str, Any]], Any], key: Path | None = None) -> None:
    """As :func:`reseal`, by somebody who makes the statement's own digest fit as well."""

    def both(statement: dict[str, Any]) -> None:
        change(statement)
        statement["predicate"][EXTENSION]["statement_sha256"] = statement_digest(statement)

    reseal(path, both, key)


def forge(path: Path, result: Validation, folder: Path, baseline: Path, keys: Path) -> None:
    """A certificate over any result, made past all checks and signed by our key."""
    roles = {**hash_baseline(baseline), "data": {result.dataset: result.dataset_sha256}}
    statement = build_statement(result, hash_folder(folder), roles, NOW, NOW + 30 * DAY)
    path.write_text(json.dumps(seal(statement, keys / "ours.pem")))


def refused(reason: str, code: int, *args: Any, **options: Any) -> str:
    with pytest.raises((CertificateError, DigestError)) as e:
        verify(*args, **options)
    assert (e.value.reason, e.value.exit_code) == (reason, code)
    return str(e.value)


def test_holds_for_what_was_certified(certificate: Path, folder: Path, baseline: Path, keys: Path) -> None:
    found = verify(certificate, folder, keys, require_signature=True, baseline=baseline, max_age_days=2)
    assert found.files == 2
    assert found.signature.startswith("signed by key")
    assert found.baseline_checked
    assert found.validation.verdict == "PASS"
    assert found.extension.mode == "standard"


def test_says_what_it_rests_on(certificate: Path, baseline: Path) -> None:
    statement = payload(certificate)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert {s["name"] for s in statement["subject"]} == {"model.onnx", "sub/weights.bin"}
    predicate = statement["predicate"]
    names = {c["name"].split("/")[0]: c["digest"]["sha256"] for c in predicate["configuration"]}
    assert set(names) == {"baseline", "tokenizer", "data"}
    assert names["data"] == load_shipped().sha256
    assert names["tokenizer"] == hash_folder(baseline)["tokenizer.json"]
    assert predicate["passedTests"][0] == "files"
    assert "qa: token F1" in predicate["passedTests"]
    assert predicate["result"] == "PASSED"
    assert predicate[EXTENSION]["validation"]["tier"] == "int4"


def test_one_byte(certificate: Path, folder: Path, keys: Path) -> None:
    content = bytearray((folder / "sub" / "weights.bin").read_bytes())
    content[17] ^= 1
    (folder / "sub" / "weights.bin").write_bytes(content)
    assert "sub/weights.bin" in refused("file-changed", 1, certificate, folder, keys)


def test_missing_and_extra_file(certificate: Path, folder: Path, keys: Path) -> None:
    (folder / "custom_op.so").write_bytes(b"")
    assert "custom_op.so" in refused("file-extra", 1, certificate, folder, keys)
    (folder / "custom_op.so").unlink()
    (folder / "model.onnx").unlink()
    assert "model.onnx" in refused("file-missing", 1, certificate, folder, keys)


def test_links_are_refused(certificate: Path, folder: Path, keys: Path, tmp_path: Path) -> None:
    shutil.move(folder / "model.onnx", tmp_path / "elsewhere")
    (folder / "model.onnx").symlink_to(tmp_path / "elsewhere")
    refused("not-a-file", 2, certificate, folder, keys)


def test_another_key(certificate: Path, folder: Path, keys: Path) -> None:
    other = read_public_key(keys / "other.pub.pem")
    refused("other-key", 1, certificate, folder, keys, key=other)


def test_a_signature_under_our_key_id_by_another_key(certificate: Path, folder: Path, keys: Path) -> None:
    ours = json.loads(certificate.read_text())["signatures"][0]["keyid"]
    reseal(certificate, lambda s: None, keys / "other.pem")
    envelope = json.loads(certificate.read_text())
    envelope["signatures"][0]["keyid"] = ours
    certificate.write_text(json.dumps(envelope))
    refused("bad-signature", 1, certificate, folder, keys)


@pytest.mark.parametrize(
    "edit",
    [
        lambda s: s["predicate"][EXTENSION].update(mode="full"),
        lambda s: s["predicate"].update(passedTests=[]),
        lambda s: s["subject"].pop(),
        lambda s: s["predicate"][EXTENSION].update(expires_utc="2099-01-01T00:00:00Z"),
    ],
)
def test_an_edited_payload(certificate: Path, folder: Path, keys: Path, edit: Callable[..., Any]) -> None:
    rewrite(certificate, edit)
    refused("bad-signature", 1, certificate, folder, keys)


def test_the_payload_type_is_signed_too(certificate: Path, folder: Path, keys: Path) -> None:
    envelope = json.loads(certificate.read_text())
    envelope["payloadType"] = "application/json"
    certificate.write_text(json.dumps(envelope))
    refused("wrong-payload-type", 2, certificate, folder, keys)


def test_a_verdict_that_is_not_pass(
    folder: Path, baseline: Path, keys: Path, certificate: Path, result_of: Results
) -> None:
    result = failed(result_of(folder, baseline))
    statement = make_certificate(result, folder, baseline, load_shipped(), now=NOW)
    assert statement["predicate"]["result"] == "FAILED"
    assert statement["predicate"]["failedTests"] == ["weights"]
    certificate.write_text(json.dumps(seal(statement, keys / "ours.pem")))
    assert "weights" in refused("not-passed", 1, certificate, folder, keys)
    reseal(certificate, lambda s: s["predicate"].update(result="PASSED", failedTests=[]))
    assert "SHA-256" in refused("contradiction", 1, certificate, folder)
    redigest(certificate, lambda s: None)
    assert "result, failedTests" in refused("contradiction", 1, certificate, folder)


def test_an_undecided_result_makes_no_certificate(
    folder: Path, baseline: Path, keys: Path, certificate: Path, result_of: Results
) -> None:
    result = result_of(folder, baseline)
    evidence = result.evidence.model_copy(
        update={"chunks": result.evidence.chunks[:2], "null": result.evidence.null[:2]}
    )
    result = rejudged(result, evidence=evidence)
    assert result.verdict == "INCONCLUSIVE"
    with pytest.raises(CertificateError, match="undecided: top1_agreement") as e:
        make_certificate(result, folder, baseline, load_shipped())
    assert (e.value.reason, e.value.exit_code) == ("incomplete", 3)
    forge(certificate, result, folder, baseline, keys)
    refused("incomplete", 3, certificate, folder, keys)


def test_unsigned(certificate: Path, folder: Path, keys: Path) -> None:
    reseal(certificate, lambda s: None)
    assert verify(certificate, folder).signature == "unsigned"
    refused("unsigned", 1, certificate, folder, keys, require_signature=True)
    refused("no-key", 2, certificate, folder, require_signature=True)


def test_dates(certificate: Path, folder: Path, keys: Path) -> None:
    refused("expired", 1, certificate, folder, keys, now=NOW + 30 * DAY)
    assert "2.04 days old" in refused("too-old", 1, certificate, folder, keys, now=NOW + 2 * DAY, max_age_days=2)
    refused("not-yet-valid", 1, certificate, folder, keys, now=NOW - DAY)
    assert verify(certificate, folder, keys, now=NOW + 29 * DAY).files == 2


def test_another_baseline(certificate: Path, folder: Path, keys: Path, baseline: Path, tmp_path: Path) -> None:
    other = shutil.copytree(baseline, tmp_path / "other")
    (other / "tokenizer.json").write_text("another merge")
    assert "tokenizer/tokenizer.json" in refused("baseline-file-changed", 1, certificate, folder, keys, baseline=other)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{" * 100_000,
        '{"payload": "!", "payloadType": "application/vnd.in-toto+json", "signatures": [1]}',
        '{"payload": 3, "payloadType": "application/vnd.in-toto+json", "signatures": []}',
        '{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": []}',
        '{"payload": "W10=", "payloadType": "application/vnd.in-toto+json", "signatures": []}',
        '{"payload": "e30=", "payload": "e30=", "payloadType": "x", "signatures": []}',
    ],
)
def test_malformed(text: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cert.json"
    path.write_text(text)
    refused("malformed", 2, path, folder)


def test_another_predicate(certificate: Path, folder: Path, keys: Path) -> None:
    reseal(certificate, lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"), keys / "ours.pem")
    refused("wrong-predicate", 2, certificate, folder, keys)


def test_a_file_named_twice(certificate: Path, folder: Path, keys: Path) -> None:
    redigest(certificate, lambda s: s["subject"].append(s["subject"][0]), keys / "ours.pem")
    refused("malformed", 2, certificate, folder, keys)


def test_a_result_that_does_not_follow_from_its_evidence(folder: Path, baseline: Path, result_of: Results) -> None:
    result = failed(result_of(folder, baseline)).model_copy(update={"verdict": "PASS"})
    with pytest.raises(CertificateError, match="verdict: says 'PASS', the evidence gives 'FAIL'") as e:
        make_certificate(result, folder, baseline, load_shipped())
    assert (e.value.reason, e.value.exit_code) == ("contradiction", 2)
    old = result_of(folder, baseline, tool_version="0.0.1", checks=["files"])
    with pytest.raises(CertificateError, match=r"made by version 0\.0\.1, this is"):
        make_certificate(old, folder, baseline, load_shipped())


@pytest.mark.parametrize(
    ("key", "reason"),
    [("folder_sha256", "other-folder"), ("baseline_sha256", "other-baseline"), ("dataset_sha256", "other-data")],
)
def test_a_result_of_something_else(key: str, reason: str, folder: Path, baseline: Path, result_of: Results) -> None:
    with pytest.raises(CertificateError) as e:
        make_certificate(result_of(folder, baseline, **{key: "0" * 64}), folder, baseline, load_shipped())
    assert (e.value.reason, e.value.exit_code) == (reason, 1)
    with pytest.raises(CertificateError, match=f"{key} is missing") as e:
        make_certificate(result_of(folder, baseline, **{key: ""}), folder, baseline, load_shipped())
    assert (e.value.reason, e.value.exit_code) == ("incomplete", 2)


def test_what_documents_are_read(folder: Path, baseline: Path, result_of: Results) -> None:
    result = result_of(folder, baseline)
    document = json.loads(result.to_json())
    assert read_validation(document) == result
    assert read_validation({"kind": "record", "validation": document}) == result
    assert read_validation({"kind": "comparison", "validation": document}) == result
    for wrong, words in (
        ({"checks": [], "verdict": "PASS"}, "names no kind"),
        ({"kind": "record", "validation": None}, "is a record and holds no validation"),
        ({"kind": "case", "validation": document}, "is a case"),
        ({**document, "verdict": "GREAT"}, "verdict"),
    ):
        with pytest.raises(CertificateError, match=words) as e:
            read_validation(wrong)
        assert (e.value.reason, e.value.exit_code) == ("no-result", 2)


# -- the two cases that were accepted once ---------------------------------------------------------------------------


def test_a_quick_run_relabelled_standard(
    folder: Path, baseline: Path, keys: Path, certificate: Path, result_of: Results
) -> None:
    quick = result_of(folder, baseline, mode="quick")
    with pytest.raises(CertificateError, match="--allow-quick") as e:
        make_certificate(quick, folder, baseline, load_shipped())
    assert (e.value.reason, e.value.exit_code) == ("quick", 2)
    label = quick.model_copy(update={"mode": "standard"})
    evidence = quick.evidence.model_copy(update={"null": quick.evidence.chunks})
    thorough = rejudged(quick, mode="standard", evidence=evidence)
    for result, reason in ((label, "contradiction"), (thorough, "incomplete")):
        forge(certificate, result, folder, baseline, keys)
        refused(reason, 1, certificate, folder, keys)
    statement = make_certificate(quick, folder, baseline, load_shipped(), allow_quick=True, now=NOW)
    assert statement["predicate"][EXTENSION]["mode"] == "quick"
    certificate.write_text(json.dumps(seal(statement, keys / "ours.pem")))
    assert verify(certificate, folder, keys).extension.mode == "quick"
    redigest(certificate, lambda s: s["predicate"][EXTENSION].update(mode="standard"), keys / "ours.pem")
    refused("contradiction", 1, certificate, folder, keys)


def test_a_result_cut_down_to_one_check_and_no_task(
    folder: Path, baseline: Path, keys: Path, certificate: Path, result_of: Results
) -> None:
    result = result_of(folder, baseline)
    kept = [r for r in result.results if r.name == "mean_kld"]
    verdict, reasons = decide_verdict(kept)
    fields = {"results": kept, "verdict": verdict, "reasons": reasons}
    evidence = {"places": {}, "outputs": [], "tasks": []}
    cut = result.model_copy(update=fields | {"evidence": result.evidence.model_copy(update=evidence)})
    assert cut.verdict == "PASS"
    forge(certificate, cut, folder, baseline, keys)
    assert "25 of 26 checks were not run" in refused("incomplete", 1, certificate, folder, keys)
    forge(certificate, cut.model_copy(update={"checks": ["mean_kld"]}), folder, baseline, keys)
    refused("contradiction", 1, certificate, folder, keys)
    forge(certificate, result.model_copy(update=fields), folder, baseline, keys)  # evidence is left over
    refused("contradiction", 1, certificate, folder, keys)


@pytest.mark.parametrize("what", ["chunks", "outputs"])
def test_a_pass_without_text_or_items(
    what: str, folder: Path, baseline: Path, keys: Path, certificate: Path, result_of: Results
) -> None:
    """Checks that had nothing to judge are skipped, which is enough for a run and not for a certificate."""
    result = result_of(folder, baseline, dataset_sha256="3" * 64)
    gone = {"chunks": [], "null": []} if what == "chunks" else {"outputs": [], "tasks": []}
    result = rejudged(result, evidence=result.evidence.model_copy(update=gone))
    assert result.verdict == "PASS"
    forge(certificate, result, folder, baseline, keys)
    assert "was skipped: the dataset has no" in refused("incomplete", 1, certificate, folder, keys)


def test_evidence_of_fewer_items_than_the_mode_has(
    folder: Path, baseline: Path, keys: Path, certificate: Path, result_of: Results
) -> None:
    result = result_of(folder, baseline)
    e = result.evidence
    fewer = {
        "outputs": [o for o in e.outputs if o.group != "qa"],
        "tasks": [t for t in e.tasks if t.group != "qa"],
    }
    result = rejudged(result, evidence=e.model_copy(update=fewer))
    assert result.verdict == "PASS"
    forge(certificate, result, folder, baseline, keys)
    assert "80 items of mode standard" in refused("incomplete", 1, certificate, folder, keys)


def test_a_certificate_of_the_usual_size(
    folder: Path, baseline: Path, keys: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,200 tokens in 30 chunks, 8 null chunks, 80 items: at most 10 s and 5 MB."""
    monkeypatch.undo()  # nothing of it may have been computed before
    digests = {"folder_sha256": folder_digest(hash_folder(folder))}
    result = synthetic("fp16", "standard", 340, **digests)
    assert (result.tokens_scored, len(result.evidence.null), len(result.evidence.outputs)) == (10_200, 8, 80)
    assert result.evidence.own_loss
    fits = folder_digest({f"{r}/{n}": d for r, m in hash_baseline(baseline).items() for n, d in m.items()})
    result = result.model_copy(update={"baseline_sha256": fits})
    statement = make_certificate(result, folder, baseline, load_shipped(), now=NOW)
    certificate.write_text(json.dumps(seal(statement, keys / "ours.pem"), indent=1))
    started = time.process_time()
    assert verify(certificate, folder, keys).files == 2
    seconds = time.process_time() - started
    assert seconds < 10
    assert certificate.stat().st_size < 5e6
    print(f"verified in {seconds:.2f} s, {certificate.stat().st_size / 1e6:.2f} MB")


# -- what the recipient demands --------------------------------------------------------------------------------------


def policy_of(path: Path, **demands: Any) -> Policy:
    path.write_text(json.dumps(demands))
    return read_policy(path)


@pytest.mark.parametrize(
    ("demands", "reason", "words"),
    [
        ({"baseline_sha256": "0" * 64}, "policy", f"baseline_sha256 is {'0' * 64}, the certificate says "),
        ({"precision": "fp16"}, "policy", "precision is fp16, the certificate says int4"),
        ({"provider": "cuda"}, "policy", "provider is cuda, the certificate says cpu"),
        ({"mode": "full"}, "policy", "mode is at least full, the certificate says standard"),
        ({"max_age_days": 1}, "too-old", "1.04 days old, the policy's max_age_days allows 1"),
        ({"require_signature": True}, "no-key", "the policy's require_signature"),
        ({"key": "other.pub.pem"}, "other-key", "the policy's key is "),
    ],
)
def test_a_policy_that_is_not_met(
    demands: dict[str, Any], reason: str, words: str, certificate: Path, folder: Path, keys: Path
) -> None:
    policy = policy_of(keys / "policy.json", **demands)
    code = 2 if reason == "no-key" else 1
    assert words in refused(reason, code, certificate, folder, policy=policy)


def test_a_policy_of_a_provider_that_ran_a_part_only(
    folder: Path, baseline: Path, keys: Path, certificate: Path, result_of: Results
) -> None:
    session = {"provider": "cpu", "partly_elsewhere": "MatMul runs elsewhere"}
    forge(certificate, result_of(folder, baseline, session=session), folder, baseline, keys)
    policy = policy_of(keys / "policy.json", provider="cpu")
    assert "MatMul runs elsewhere" in refused("policy", 1, certificate, folder, policy=policy)


def test_a_policy_that_is_met(
    certificate: Path, folder: Path, keys: Path, baseline: Path, result_of: Results, tmp_path: Path
) -> None:
    digest = result_of(folder, baseline).baseline_sha256
    demands = {"baseline_sha256": digest, "precision": "int4", "provider": "cpu", "mode": "standard"}
    policy = policy_of(keys / "policy.json", **demands, max_age_days=2, require_signature=True, key="ours.pub.pem")
    assert verify(certificate, folder, policy=policy).signature.startswith("signed by key")
    assert verify(certificate, folder, policy=policy_of(tmp_path / "p.json", mode="quick")).files == 2
    # Both sets of demands count, the stricter one of each.
    assert "--max-age" in refused("too-old", 1, certificate, folder, policy=policy, max_age_days=1)
    other = read_public_key(keys / "other.pub.pem")
    refused("other-key", 1, certificate, folder, policy=policy, key=other)
    reseal(certificate, lambda s: None)
    refused("unsigned", 1, certificate, folder, policy=policy)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no mapping"),
        ("[1]", "no mapping"),
        ("a: [", "no YAML"),
        ("mode: standard\nmode: quick\n", "stands twice"),
        ("modes: standard", "modes: Extra inputs"),
        ("mode: slow", "mode: Input should be 'quick', 'standard' or 'full'"),
        ("max_age_days: -1", "max_age_days"),
        ("max_age_days: .nan", "max_age_days"),
        ("require_signature: 'no'", "require_signature"),
        ("baseline_sha256: abc", "baseline_sha256"),
    ],
)
def test_a_policy_that_says_nothing_clear(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(CertificateError, match=words) as e:
        read_policy(path)
    assert (e.value.reason, e.value.exit_code) == ("bad-policy", 2)
    assert "known keys: baseline_sha256, precision" in str(e.value)


def test_a_policy_knows_every_mode_and_tier(tmp_path: Path) -> None:
    for mode, precision in itertools.product(MODES, TIERS):
        assert policy_of(tmp_path / "p.json", mode=mode, precision=precision)


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    text = Path("docs/trust.md").read_text().split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    policy = read_policy(path)
    assert set(Policy.model_fields) == policy.model_fields_set
    assert policy.key == str(tmp_path / "release.pub.pem")


def test_names_cannot_be_written_so_that_two_folders_look_alike() -> None:
    one = {"a": "1" * 64, "b": "2" * 64}
    assert folder_digest({f"a\n{'2' * 64}  b": "1" * 64}) != folder_digest(one)


@pytest.mark.parametrize("days", [float("nan"), float("inf"), 0.0, -1.0])
def test_days_are_a_number(days: float, certificate: Path, folder: Path, baseline: Path, result_of: Results) -> None:
    with pytest.raises(CertificateError) as e:
        make_certificate(result_of(folder, baseline), folder, baseline, load_shipped(), valid_days=days)
    assert (e.value.reason, e.value.exit_code) == ("dates", 2)
    if not days >= 0:
        refused("dates", 2, certificate, folder, max_age_days=days)


def test_keys(tmp_path: Path) -> None:
    private, public = keygen(tmp_path / "mine")
    assert private.stat().st_mode & 0o077 == 0
    with pytest.raises(CertificateError, match="never overwritten"):
        keygen(tmp_path / "mine")
    with pytest.raises(CertificateError, match="public key"):
        read_public_key(private)
    with pytest.raises(CertificateError, match="private key"):
        seal({}, public)
    with pytest.raises(CertificateError, match="llama-onnx keygen"):
        read_public_key(tmp_path / "none.pem")


def test_the_commands(
    folder: Path,
    baseline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    result_of: Results,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # These files are no model; what it counts in a real folder is tested with the gate's own certificate.
    for command in ("certify", "verify"):
        monkeypatch.setattr(f"bench.cli.{command}.refuse_thinned", lambda *_: None)
    result, certificate = tmp_path / "result.json", tmp_path / "cert.json"
    today = datetime.datetime.now(datetime.UTC).isoformat()
    quick = result_of(folder, baseline, mode="quick", created_utc=today)
    result.write_text(quick.to_json())
    assert main(["keygen", str(tmp_path / "k")]) == 0
    inside = ["--baseline", str(baseline), "--certificate", str(folder / "cert.json")]
    assert main(["certify", str(result), str(folder), *inside]) == 2
    common = [str(folder), "--baseline", str(baseline)]
    key, public = str(tmp_path / "k.pem"), str(tmp_path / "k.pub.pem")
    assert main(["certify", str(result), *common, "--certificate", str(certificate), "--key", key]) == 2
    assert "--allow-quick" in capsys.readouterr().err
    arguments = ["certify", str(result), *common, "--certificate", str(certificate), "--key", key]
    assert main([*arguments, "--allow-quick"]) == 0
    assert "PASSED, mode quick, 2 files, signed" in capsys.readouterr().out
    assert main(["verify", str(certificate), *common, "--key", public, "--require-signature"]) == 0
    assert "valid: PASS in tier int4, mode quick, 2 files" in capsys.readouterr().out
    (tmp_path / "policy.yaml").write_text("mode: standard")
    demanded = ["--policy", str(tmp_path / "policy.yaml")]
    assert main(["verify", str(certificate), str(folder), *demanded]) == 1
    assert "refused (policy)" in capsys.readouterr().err
    (folder / "model.onnx").write_bytes(b"another")
    assert main(["verify", str(certificate), str(folder), "--key", public, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["reason"] == "file-changed"
    assert main(["verify", str(certificate), str(folder)]) == 1
    assert "refused (file-changed)" in capsys.readouterr().err
