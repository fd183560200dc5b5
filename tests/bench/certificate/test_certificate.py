"""A certificate covers exactly these bytes, this result and this time; everything else is refused with its reason."""

from __future__ import annotations

import base64
import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("securesystemslib")
pytest.importorskip("in_toto_attestation")

from bench.certificate.envelope import keygen, read_public_key, seal
from bench.certificate.statement import (
    EXTENSION,
    CertificateError,
    make_certificate,
    read_result,
)
from bench.certificate.verify import Verified, verify_certificate
from bench.cli.main import main
from bench.data.loading import load_shipped
from bench.digests import baseline_digest, folder_digest, hash_baseline, hash_folder

NOW = datetime.datetime(2026, 11, 24, 12, 0, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)


def parity(status: str = "PASS") -> dict[str, Any]:
    check = {"name": "mean_kld", "status": status, "value": 1e-11, "bound": 2e-11, "limit": 1e-8}
    other = {"name": "top1_agreement", "status": "PASS", "value": 1.0, "bound": 0.999, "limit": 0.9995}
    task = {"task": "qa", "metric": "token F1", "status": "REPORTED", "candidate": 40.0, "baseline": 40.0}
    dataset = f"project (SHA-256 {load_shipped().sha256[:16]})"
    return {"tier": "fp32", "baseline": "pytorch-cpu", "dataset": dataset, "checks": [check, other], "tasks": [task]}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    keygen(folder / "ours")
    keygen(folder / "other")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "export"
    (made / "sub").mkdir(parents=True)
    (made / "model.onnx").write_bytes(b"graph" * 100)
    (made / "sub" / "weights.bin").write_bytes(bytes(range(256)))
    return made


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("baseline")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (made / name).write_text(json.dumps({"name": name}))
    return made


@pytest.fixture
def certificate(folder: Path, baseline: Path, keys: Path, tmp_path: Path) -> Path:
    statement = make_certificate(parity(), folder, baseline, load_shipped(), valid_days=30, now=NOW)
    path = tmp_path / "cert.json"
    path.write_text(json.dumps(seal(statement, keys / "ours.pem")))
    return path


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
    assert found.evidence.verdict == "PASS"
    assert found.evidence.margins["mean_kld"] == 1e-8


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
    assert predicate["passedTests"] == ["mean_kld", "top1_agreement"]
    assert predicate["result"] == "PASSED"
    assert predicate[EXTENSION]["checks"][0]["bound"] == 2e-11


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
        lambda s: s["predicate"][EXTENSION].update(tier="int4"),
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


@pytest.mark.parametrize(("status", "code"), [("FAIL", 1), ("INCONCLUSIVE", 3)])
def test_a_verdict_that_is_not_pass(
    status: str, code: int, folder: Path, baseline: Path, keys: Path, tmp_path: Path
) -> None:
    statement = make_certificate(parity(status), folder, baseline, load_shipped(), now=NOW)
    assert statement["predicate"]["result"] == "FAILED"
    path = tmp_path / "cert.json"
    path.write_text(json.dumps(seal(statement, keys / "ours.pem")))
    assert "mean_kld" in refused("not-passed", code, path, folder, keys)


def test_an_edited_verdict_is_found_without_any_signature(folder: Path, baseline: Path, tmp_path: Path) -> None:
    path = tmp_path / "cert.json"
    path.write_text(json.dumps(seal(make_certificate(parity("FAIL"), folder, baseline, None, now=NOW))))

    def paint(statement: dict[str, Any]) -> None:
        statement["predicate"].update(result="PASSED", failedTests=[])
        statement["predicate"][EXTENSION]["verdict"] = "PASS"

    reseal(path, paint)
    refused("contradiction", 1, path, folder)


def test_unsigned(certificate: Path, folder: Path, keys: Path) -> None:
    reseal(certificate, lambda s: None)
    assert verify(certificate, folder).signature == "unsigned"
    refused("unsigned", 1, certificate, folder, keys, require_signature=True)
    refused("no-key", 2, certificate, folder, require_signature=True)


def test_dates(certificate: Path, folder: Path, keys: Path) -> None:
    refused("expired", 1, certificate, folder, keys, now=NOW + 30 * DAY)
    refused("too-old", 1, certificate, folder, keys, now=NOW + 3 * DAY, max_age_days=2)
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
    reseal(certificate, lambda s: s["subject"].append(s["subject"][0]), keys / "ours.pem")
    refused("malformed", 2, certificate, folder, keys)


def test_a_result_whose_verdict_its_checks_contradict(folder: Path, baseline: Path) -> None:
    with pytest.raises(CertificateError, match="checks say FAIL"):
        read_result({**parity("FAIL"), "verdict": "PASS"})
    assert read_result({**parity(), "verdict": "FAIL"}).verdict == "FAIL"  # a gate may be stricter than its list
    with pytest.raises(CertificateError, match="no result document"):
        read_result({"hello": 1})
    assert read_result({**parity(), "checks": [], "tasks": []}).verdict == "INCONCLUSIVE"


def test_a_result_of_another_folder_or_other_data(folder: Path, baseline: Path) -> None:
    with pytest.raises(CertificateError) as e:
        make_certificate({**parity(), "folder_sha256": "0" * 64}, folder, baseline, None)
    assert e.value.reason == "other-folder"
    with pytest.raises(CertificateError) as e:
        make_certificate({**parity(), "dataset": "others"}, folder, baseline, load_shipped())
    assert e.value.reason == "other-data"


def test_a_result_measured_against_another_checkpoint(folder: Path, baseline: Path) -> None:
    with pytest.raises(CertificateError) as e:
        make_certificate({**parity(), "baseline_sha256": "0" * 64}, folder, baseline, None)
    assert (e.value.reason, e.value.exit_code) == ("other-baseline", 1)
    right = baseline_digest(hash_baseline(baseline))
    bound = make_certificate({**parity(), "baseline_sha256": right}, folder, baseline, None)
    unbound = make_certificate(parity(), folder, baseline, None)
    note = "the result does not say by digest which checkpoint it was measured against"
    assert note not in bound["predicate"][EXTENSION]["notes"]
    assert note in unbound["predicate"][EXTENSION]["notes"]


@pytest.mark.parametrize("key", ["folder_sha256", "baseline_sha256"])
def test_a_record_names_folder_and_baseline_by_their_bytes(key: str, folder: Path, baseline: Path) -> None:
    facts = {
        "folder_sha256": folder_digest(hash_folder(folder)),
        "baseline_sha256": baseline_digest(hash_baseline(baseline)),
    }
    assert make_certificate({**parity(), "model": facts}, folder, baseline, None)
    with pytest.raises(CertificateError, match="measured"):
        make_certificate({**parity(), "model": {**facts, key: "0" * 64}}, folder, baseline, None)


def test_names_cannot_be_written_so_that_two_folders_look_alike() -> None:
    one = {"a": "1" * 64, "b": "2" * 64}
    assert folder_digest({f"a\n{'2' * 64}  b": "1" * 64}) != folder_digest(one)


@pytest.mark.parametrize("days", [float("nan"), float("inf"), 0.0, -1.0])
def test_days_are_a_number(days: float, certificate: Path, folder: Path, baseline: Path) -> None:
    with pytest.raises(CertificateError) as e:
        make_certificate(parity(), folder, baseline, None, valid_days=days)
    assert (e.value.reason, e.value.exit_code) == ("dates", 2)
    if not days >= 0:
        refused("dates", 2, certificate, folder, max_age_days=days)


def test_a_record_of_another_export(exports: Callable[..., Path], checkpoints: Callable[..., Path]) -> None:
    record = json.loads(Path("reports/gallery/demo-cpu/record.json").read_text())
    with pytest.raises(CertificateError) as e:
        make_certificate(record, exports(), checkpoints(), None)
    assert e.value.reason == "other-folder"


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


def test_the_commands(folder: Path, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, certificate = tmp_path / "result.json", tmp_path / "cert.json"
    result.write_text(json.dumps(parity()))
    assert main(["keygen", str(tmp_path / "k")]) == 0
    inside = ["--baseline", str(baseline), "--certificate", str(folder / "cert.json")]
    assert main(["certify", str(result), str(folder), *inside]) == 2
    common = [str(folder), "--baseline", str(baseline)]
    key, public = str(tmp_path / "k.pem"), str(tmp_path / "k.pub.pem")
    assert main(["certify", str(result), *common, "--certificate", str(certificate), "--key", key]) == 0
    assert main(["verify", str(certificate), *common, "--key", public, "--require-signature"]) == 0
    assert "valid: PASS in tier fp32, 2 files" in capsys.readouterr().out
    (folder / "model.onnx").write_bytes(b"another")
    assert main(["verify", str(certificate), str(folder), "--key", public, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["reason"] == "file-changed"
    assert main(["verify", str(certificate), str(folder)]) == 1
    assert "refused (file-changed)" in capsys.readouterr().err
