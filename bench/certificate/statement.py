"""What a deployment team signs: an in-toto statement that these bytes passed these checks, in a DSSE envelope.

The statement (https://in-toto.io/Statement/v1) carries the test-result predicate v0.1: its subjects are the SHA-256 of
every file of the folder, its ``configuration`` names what the result rests on (baseline weights, tokenizer, data), and
everything else (statistics, margins, versions, machine, expiry, verdict) stands under :data:`EXTENSION`.
``securesystemslib`` makes and checks the envelope and the Ed25519 signature, ``in-toto-attestation`` checks the form.
``model-signing`` was looked at and left: its predicate holds file hashes only, no result, margins or dependencies.

Try: ``llama-onnx certify record.json FOLDER --baseline demo --certificate cert.json`` and
``llama-onnx verify cert.json FOLDER``.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bench.data.loading import Dataset
from bench.digests import Progress, baseline_digest, folder_digest, hash_baseline, hash_folder
from bench.errors import BenchError
from bench.machine.environment import machine, versions
from export.manifest import MANIFEST_NAME, read_manifest

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://in-toto.io/attestation/test-result/v0.1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
EXTENSION = "llamaOnnxBench"
"""Key of the predicate under which everything stands that test-result v0.1 has no field for."""
VALID_DAYS = 180
CLOCK_SKEW = datetime.timedelta(minutes=5)
Answer = Literal["PASS", "FAIL", "INCONCLUSIVE"]


class CertificateError(BenchError):
    """A certificate that cannot be made or is refused.

    ``reason`` is a fixed word for pipelines (``file-changed``, ``expired``, ...); ``exit_code`` is 1 where the
    certificate does not cover what is there, 2 for wrong input, 3 for an inconclusive verdict.
    """

    def __init__(self, reason: str, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.reason = reason
        self.exit_code = exit_code


class Evidence(BaseModel):
    """What stands under :data:`EXTENSION`: the gate's result and how long it may be relied on (times in UTC)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verdict: Answer
    tier: str
    margins: dict[str, Any]
    checks: list[dict[str, Any]]
    tasks: list[dict[str, Any]]
    folder_sha256: str
    result_sha256: str
    measured_utc: str | None
    created_utc: datetime.datetime
    expires_utc: datetime.datetime
    versions: dict[str, str]
    machine: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class Result:
    """A result document in one form, whatever wrote it."""

    verdict: Answer
    tier: str
    checks: tuple[dict[str, Any], ...]
    tasks: tuple[dict[str, Any], ...]
    margins: dict[str, Any]
    dataset: str
    document: Mapping[str, Any]


@contextmanager
def require() -> Iterator[None]:
    """Name the remedy where the libraries are not installed."""
    try:
        yield
    except ImportError as e:
        raise CertificateError(
            "no-library",
            f"certificates need {e.name}; pip install securesystemslib cryptography in-toto-attestation",
            4,
        ) from None


# -- the result -----------------------------------------------------------------------------------------------------


def read_result(document: Mapping[str, Any]) -> Result:
    """A run record, a parity section or a gate's document (``verdict``, ``tier``, ``checks``, ``tasks``) -> Result.

    Raises:
        CertificateError: neither of these, nothing judged, or a verdict that its own checks contradict.
    """
    failed_tests: list[str] = []
    parity: Any = document
    if "schema_version" in document and "parity" in document:
        from reports.record import RunRecord

        try:
            record = RunRecord.model_validate(document)
        except ValidationError as e:
            place = ".".join(str(p) for p in e.errors()[0]["loc"])
            raise _no_result(f"{place}: {e.errors()[0]['msg']}") from None
        parity = document["parity"] or {}
        failed_tests = [o.test for o in record.outcomes if o.outcome in ("failed", "error")]
    if "results" in document and "mode" in document:  # reports.validation.Validation
        parity = {**document, "checks": document["results"]}
        _require_whole(document)
    checks, tasks = parity.get("checks"), parity.get("tasks", [])
    good = isinstance(checks, list) and isinstance(tasks, list)
    if not good or not all(isinstance(c, dict) and isinstance(c.get("status"), str) for c in [*checks, *tasks]):
        raise _no_result("it has no 'checks' with a status each")
    statuses = [c["status"] for c in [*checks, *tasks]]
    derived = derived_verdict(statuses, failed_tests)
    stated = document.get("verdict", derived)
    words = {"PASSED": "PASS", "FAILED": "FAIL"}
    answer: Any = words.get(stated, stated) if isinstance(stated, str) else stated
    # A gate may be stricter than its list of checks, never milder.
    if answer not in ("PASS", "FAIL", "INCONCLUSIVE") or (answer == "PASS" and derived != "PASS"):
        raise CertificateError(
            "contradiction", f"the result says {answer!r}, its checks say {derived}; certify what the gate wrote", 2
        )
    tier = str(parity.get("tier", document.get("tier", "unknown")))
    from bench.gate.statistics import TIERS

    margins = document.get("margins") or (asdict(TIERS[tier]) if tier in TIERS else {})
    return Result(answer, tier, tuple(checks), tuple(tasks), margins, str(parity.get("dataset", "")), document)


def _require_whole(document: Mapping[str, Any]) -> None:
    """Refuse a part of the gate: what was not run proves nothing."""
    from bench.gate.registry import CHECKS

    ran = {c.get("name") for c in document["results"] if isinstance(c, dict)}
    lacking = [c.name for c in CHECKS if c.name not in ran]
    if document["mode"] != "standard" or (lacking and document.get("verdict") == "PASS"):
        what = f"lacks {', '.join(lacking[:3])}" if lacking else f"mode {document['mode']!r}"
        raise CertificateError("partial", f"the result is of a part of the gate ({what}); certify a standard run", 2)


def _no_result(why: str) -> CertificateError:
    return CertificateError(
        "no-result", f"this is no result document ({why}); pass record.json of `pytest bench/` or the gate's JSON", 2
    )


def derived_verdict(statuses: Sequence[str], failed_tests: Sequence[str] = ()) -> Answer:
    """The verdict that statuses allow; suspicious figures lie inside their margin, reported ones decide nothing."""
    if "FAIL" in statuses or failed_tests:
        return "FAIL"
    if "INCONCLUSIVE" in statuses or not any(s in ("PASS", "SUSPICIOUS") for s in statuses):
        return "INCONCLUSIVE"
    return "PASS"


def _name(check: Mapping[str, Any]) -> str:
    return str(check["name"]) if "name" in check else f"{check.get('task', '?')}: {check.get('metric', '?')}"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


# -- making ---------------------------------------------------------------------------------------------------------


def make_certificate(
    verdict_document: Mapping[str, Any],
    folder: Path,
    baseline_checkpoint: Path,
    dataset: Dataset | None,
    *,
    valid_days: float = VALID_DAYS,
    now: datetime.datetime | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The statement about one folder and one result; a failed result gives a statement that says FAILED.

    Args:
        verdict_document: see :func:`read_result`.
        folder: the exported folder; every file in it becomes a subject.
        baseline_checkpoint: folder of the baseline's checkpoint.
        dataset: what was measured on; None leaves the data out and a note says so.
        valid_days: days until the certificate expires.
        now: time of making, UTC; None takes the clock.
        progress: called with the bytes of each chunk hashed.

    Raises:
        CertificateError: no result in the document, or one that was measured on another folder, against another
            checkpoint or on other data; days that are not a number.
    """
    if not (math.isfinite(valid_days) and valid_days > 0):
        raise CertificateError("dates", f"a certificate cannot be valid for {valid_days:g} days; give more than 0", 2)
    result = read_result(verdict_document)
    files = hash_folder(folder, progress)
    roles = hash_baseline(baseline_checkpoint, progress)
    notes = _binding(result, folder, files, dataset)
    notes += _baseline_binding(result, baseline_checkpoint, roles)
    if dataset is not None:
        roles["data"] = {dataset.name: dataset.sha256}
    made = (now or datetime.datetime.now(datetime.UTC)).replace(microsecond=0)
    canonical = json.dumps(_finite(result.document), sort_keys=True, separators=(",", ":")).encode()
    evidence = Evidence(
        verdict=result.verdict,
        tier=result.tier,
        margins=_finite(result.margins),
        checks=_finite(result.checks),
        tasks=_finite(result.tasks),
        folder_sha256=folder_digest(files),
        result_sha256=hashlib.sha256(canonical).hexdigest(),
        measured_utc=result.document.get("created_utc"),
        created_utc=made,
        expires_utc=made + datetime.timedelta(days=valid_days),
        versions=result.document.get("versions") or versions(),
        machine=_finite(result.document.get("machine") or machine().model_dump()),
        notes=notes,
    )
    names: dict[str, list[str]] = {"PASS": [], "SUSPICIOUS": [], "FAIL": []}
    for check in [*result.checks, *result.tasks]:
        status = "FAIL" if check["status"] == "INCONCLUSIVE" else check["status"]
        names.get(status, []).append(_name(check))
    passed = "WARNED" if names["SUSPICIOUS"] else "PASSED"
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in files.items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "result": passed if result.verdict == "PASS" else "FAILED",
            "configuration": [
                {"name": f"{role}/{name}", "digest": {"sha256": digest}}
                for role, members in roles.items()
                for name, digest in members.items()
            ],
            "passedTests": names["PASS"],
            "warnedTests": names["SUSPICIOUS"],
            "failedTests": names["FAIL"],
            EXTENSION: evidence.model_dump(mode="json"),
        },
    }
    check_form(statement)
    return statement


def _stated(document: Mapping[str, Any], key: str) -> Any:
    """A digest that the gate's document gives at its top, a record among the model's facts."""
    facts = document.get("model")
    return document.get(key) or (facts.get(key) if isinstance(facts, dict) else None)


def _baseline_binding(result: Result, checkpoint: Path, roles: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Refuse a result measured against another checkpoint; a note where the document does not say."""
    measured = _stated(result.document, "baseline_sha256")
    if not measured:
        return ["the result does not say by digest which checkpoint it was measured against"]
    if measured != baseline_digest(roles):
        raise CertificateError(
            "other-baseline", f"the result was measured against another checkpoint than {checkpoint}", 1
        )
    return []


def _binding(result: Result, folder: Path, files: Mapping[str, str], dataset: Dataset | None) -> list[str]:
    """Refuse a result of another folder or other data; notes for what the document does not let us compare."""
    notes: list[str] = []
    document = result.document
    model = document.get("model")
    measured = _stated(document, "folder_sha256")
    if "results" not in document and "schema_version" not in document:
        notes.append("a bare list of checks: whether the whole gate ran is not known")
    if measured:
        if measured != folder_digest(files):
            raise CertificateError("other-folder", f"the result was measured on another folder than {folder}", 1)
    elif isinstance(model, dict) and MANIFEST_NAME in files:
        manifest = read_manifest(folder)
        there = {"weights_sha256": manifest.weights_sha256, "spec_digest": manifest.spec_digest}
        for key, value in there.items():
            if model.get(key) != value:
                raise CertificateError(
                    "other-folder", f"the result was measured on another folder than {folder} ({key} differs)", 1
                )
        notes.append("the record names the folder by its manifest's claims, not by the SHA-256 of its files")
    else:
        notes.append("the result does not say which folder it was measured on")
    if dataset is None:
        notes.append("data not given: their digest is not among the dependencies")
    elif dataset.sha256[:16] not in result.dataset:
        raise CertificateError(
            "other-data",
            f"the result was measured on {result.dataset or 'unnamed data'}, not on {dataset.name} "
            f"(SHA-256 {dataset.sha256[:16]}); pass its data with --dataset",
            1,
        )
    return notes


def check_form(statement: Mapping[str, Any]) -> None:
    """Hold a statement against the in-toto schemas (protobuf definitions of ``in-toto-attestation``).

    Raises:
        CertificateError: not of that form; names what is wrong.
    """
    with require():
        from google.protobuf import json_format
        from in_toto_attestation.predicates.test_result.v0.test_result_pb2 import TestResult
        from in_toto_attestation.v1.statement import Statement
        from in_toto_attestation.v1.statement_pb2 import Statement as Message
    try:
        raw = json.loads(json.dumps(statement))
        Statement.copy_from_pb(json_format.ParseDict(raw, Message())).validate()
        if raw["predicateType"] != PREDICATE_TYPE:
            raise CertificateError(
                "wrong-predicate", f"the statement is a {raw['predicateType']!r}, wanted {PREDICATE_TYPE}", 2
            )
        json_format.ParseDict(raw["predicate"], TestResult(), ignore_unknown_fields=True)
    except (json_format.ParseError, ValueError, TypeError, KeyError) as e:
        first = str(e).splitlines()[0][:160]
        raise CertificateError("malformed", f"the payload is no in-toto statement v1 ({first})", 2) from None
