"""What a deployment team signs: an in-toto statement that these bytes passed these checks, in a DSSE envelope.

The statement (https://in-toto.io/Statement/v1) carries the test-result predicate v0.1: its subjects are the SHA-256 of
every file of the folder, its ``configuration`` names what the result rests on (baseline weights, tokenizer, data), and
under :data:`EXTENSION` stands the gate's whole document with its evidence, so that who receives it can judge again.
``securesystemslib`` makes and checks the envelope and the Ed25519 signature, ``in-toto-attestation`` checks the form.
``model-signing`` was looked at and left: its predicate holds file hashes only, no result, margins or dependencies.

Try: ``llama-onnx certify validation.json FOLDER --baseline demo --certificate cert.json`` and
``llama-onnx verify cert.json FOLDER``.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime, ValidationError

from bench.data.items import Dataset
from bench.digests import Progress, baseline_digest, folder_digest, hash_baseline, hash_folder
from bench.errors import BenchError
from bench.gate.replay import incomplete, replay
from bench.machine.environment import versions
from reports.base import Frozen, first_problem, kind_of
from reports.validation import Validation

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://in-toto.io/attestation/test-result/v0.1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
EXTENSION = "llamaOnnxBench"
"""Key of the predicate under which everything stands that test-result v0.1 has no field for."""
VALID_DAYS = 180
CLOCK_SKEW = datetime.timedelta(minutes=5)
Hashes = Mapping[str, str]


class CertificateError(BenchError):
    """A certificate that cannot be made or is refused.

    ``reason`` is a fixed word for pipelines (``file-changed``, ``expired``, ...); ``exit_code`` is 1 where the
    certificate does not cover what is there, 2 for wrong input, 3 for an inconclusive verdict.
    """

    def __init__(self, reason: str, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.reason = reason
        self.exit_code = exit_code


class Extension(Frozen):
    """What stands under :data:`EXTENSION`: the gate's document and how long it may be relied on (times in UTC).

    ``statement_sha256`` is over everything else in the statement.
    """

    mode: str
    created_utc: AwareDatetime
    expires_utc: AwareDatetime
    validation: Validation
    statement_sha256: str = ""


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


def read_validation(document: Mapping[str, Any]) -> Validation:
    """The gate's document, or the one in a run record or a comparison.

    Raises:
        CertificateError: none of these, or one without a result of the gate.
    """
    kind = kind_of(document)
    found = document.get("validation") if kind in ("record", "comparison") else document
    if kind not in ("record", "comparison", "validation") or found is None:
        what = "names no kind" if kind is None else f"is a {kind}"
        raise _no_result(f"it {what} and holds no validation")
    try:
        return Validation.model_validate(found)
    except ValidationError as e:
        raise _no_result(first_problem(e)) from None


def _no_result(why: str) -> CertificateError:
    return CertificateError(
        "no-result", f"this is no result of the gate ({why}); pass validation.json, record.json or comparison.json", 2
    )


def listed(problems: Sequence[str], most: int) -> str:
    """The first of several problems, and how many more there are."""
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def check_result(validation: Validation, wrong_input: int) -> None:
    """A result has to follow from its evidence, and to be of every check.

    Args:
        validation: the gate's document.
        wrong_input: exit code where it is not so.

    Raises:
        CertificateError: it is not so; names at most three differences.
    """
    for reason, words, problems in (
        ("contradiction", "the result does not follow from its own evidence", replay),
        ("incomplete", "the result is no ground for a certificate", incomplete),
    ):
        if wrong := problems(validation):
            here = versions().get("llama-onnx-bench")
            other = f" (made by version {validation.tool_version}, this is {here})"
            hint = other if validation.tool_version != here else ""
            code = 3 if reason == "incomplete" and validation.verdict == "INCONCLUSIVE" else wrong_input
            raise CertificateError(reason, f"{words}: {listed(wrong, 3)}{hint}", code)


# -- making ---------------------------------------------------------------------------------------------------------


def make_certificate(
    validation: Validation,
    folder: Path,
    baseline_checkpoint: Path,
    dataset: Dataset,
    *,
    allow_quick: bool = False,
    valid_days: float = VALID_DAYS,
    now: datetime.datetime | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The statement about one folder and one result; a failed result gives a statement that says FAILED.

    Args:
        validation: what the gate found; judged again here.
        folder: the exported folder; every file in it becomes a subject.
        baseline_checkpoint: folder of the baseline's checkpoint.
        dataset: what was measured on.
        allow_quick: whether a result of mode ``quick`` is enough.
        valid_days: days until the certificate expires.
        now: time of making, UTC; None takes the clock.
        progress: called with the bytes of each chunk hashed.

    Raises:
        CertificateError: a result that does not follow from its evidence, of a part of the checks, undecided, or
            measured on another folder, against another checkpoint or on other data; days that are not a number.
        DigestError: nothing to hash in folder or checkpoint.
    """
    if not (math.isfinite(valid_days) and valid_days > 0):
        raise CertificateError("dates", f"a certificate cannot be valid for {valid_days:g} days; give more than 0", 2)
    if validation.mode == "quick" and not allow_quick:
        raise CertificateError("quick", "a quick run does not judge the tails; run standard, or pass --allow-quick", 2)
    check_result(validation, 2)
    files, roles = hash_folder(folder, progress), hash_baseline(baseline_checkpoint, progress)
    for what, measured, there, place in (
        ("folder", validation.folder_sha256, folder_digest(files), str(folder)),
        ("baseline", validation.baseline_sha256, baseline_digest(roles), str(baseline_checkpoint)),
        ("data", validation.dataset_sha256, dataset.sha256, f"{dataset.name}; pass its data with --dataset"),
    ):
        if measured != there:
            raise CertificateError(
                f"other-{what}",
                f"the result was measured on another {what} (SHA-256 {measured[:16]}, here {there[:16]}): {place}",
            )
    made = (now or datetime.datetime.now(datetime.UTC)).replace(microsecond=0)
    expires = made + datetime.timedelta(days=valid_days)
    roles["data"] = {validation.dataset: validation.dataset_sha256}
    statement = build_statement(validation, files, roles, made, expires)
    check_form(statement)
    return statement


def build_statement(
    validation: Validation,
    files: Hashes,
    roles: Mapping[str, Hashes],
    created: datetime.datetime,
    expires: datetime.datetime,
) -> dict[str, Any]:
    """The statement that follows from a result, SHA-256 by file, and by role and name, and the two dates."""
    names: dict[str, list[str]] = {"PASS": [], "SUSPICIOUS": [], "FAIL": [], "INCONCLUSIVE": []}
    rows = [(r.name, r.status) for r in validation.results]
    for name, status in [*rows, *((f"{t.task}: {t.metric}", t.status) for t in validation.tasks)]:
        names.get(status, []).append(name)
    passed = "WARNED" if names["SUSPICIOUS"] else "PASSED"
    extension = Extension(mode=validation.mode, created_utc=created, expires_utc=expires, validation=validation)
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in files.items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "result": passed if validation.verdict == "PASS" else "FAILED",
            "configuration": [
                {"name": f"{role}/{name}", "digest": {"sha256": digest}}
                for role, members in roles.items()
                for name, digest in members.items()
            ],
            "passedTests": names["PASS"],
            "warnedTests": names["SUSPICIOUS"],
            "failedTests": [*names["FAIL"], *names["INCONCLUSIVE"]],
            EXTENSION: json.loads(extension.model_dump_json()),
        },
    }
    statement["predicate"][EXTENSION]["statement_sha256"] = statement_digest(statement)  # type: ignore[index]
    return statement


def statement_digest(statement: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of a statement without this very digest.

    Raises:
        CertificateError: a number in it is not finite.
    """
    predicate = dict(statement["predicate"])
    predicate[EXTENSION] = {k: v for k, v in predicate[EXTENSION].items() if k != "statement_sha256"}
    return hashlib.sha256(canonical({**statement, "predicate": predicate})).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON in one form only: names sorted, no blanks, floats in the fewest digits that give them back.

    Raises:
        CertificateError: a number in it is not finite, for which JSON has no form.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except ValueError:
        raise CertificateError(
            "not-finite", "the result holds infinity or NaN, which no certificate can hold"
        ) from None


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
        # The schemas say nothing about our extension, and reading it twice would take seconds.
        if not isinstance(statement["predicate"], dict):
            raise TypeError("its predicate is no object")
        predicate = {k: v for k, v in statement["predicate"].items() if k != EXTENSION}
        Statement.copy_from_pb(json_format.ParseDict({**statement, "predicate": predicate}, Message())).validate()
        if statement["predicateType"] != PREDICATE_TYPE:
            raise CertificateError(
                "wrong-predicate", f"the statement is a {statement['predicateType']!r}, wanted {PREDICATE_TYPE}", 2
            )
        json_format.ParseDict(predicate, TestResult())
    except (json_format.ParseError, ValueError, TypeError, KeyError) as e:
        first = str(e).splitlines()[0][:160]
        raise CertificateError("malformed", f"the payload is no in-toto statement v1 ({first})", 2) from None
