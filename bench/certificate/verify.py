"""Does a certificate cover this folder, today? Offline: it reads the certificate, the folder and nothing else.

Every refusal has a word of its own (:attr:`bench.certificate.statement.CertificateError.reason`). Try:
``llama-onnx verify cert.json FOLDER --key mykey.pub.pem --require-signature``.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from bench.certificate.envelope import check_signature, read_envelope, strict_json
from bench.certificate.statement import (
    CLOCK_SKEW,
    EXTENSION,
    CertificateError,
    Evidence,
    check_form,
    derived_verdict,
)
from bench.digests import Progress, folder_digest, hash_baseline, hash_folder

if TYPE_CHECKING:
    from securesystemslib.signer import Key


@dataclass(frozen=True)
class Verified:
    """A certificate that holds: how it is signed, what it says, and how many files were hashed."""

    signature: str
    evidence: Evidence
    files: int
    baseline_checked: bool


def verify_certificate(
    certificate: Path,
    folder: Path,
    *,
    key: Key | None = None,
    require_signature: bool = False,
    max_age_days: float | None = None,
    baseline: Path | None = None,
    now: datetime.datetime | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Check, in this order: envelope, signature, form, verdict, dates, every file, and the baseline if given.

    Raises:
        CertificateError: refused; ``reason`` says why.
    """
    envelope = read_envelope(certificate)
    signature = check_signature(envelope, key, require_signature)
    try:
        statement = strict_json(envelope.payload)
    except ValueError as e:
        raise CertificateError("malformed", f"the payload of {certificate} is no valid JSON ({e})", 2) from None
    if not isinstance(statement, dict):
        raise CertificateError("malformed", f"the payload of {certificate} is no in-toto statement", 2)
    check_form(statement)
    evidence = _evidence(statement["predicate"])
    _check_verdict(statement["predicate"], evidence)
    _check_dates(evidence, max_age_days, now or datetime.datetime.now(datetime.UTC))
    stated = _digests(statement["subject"], "subject")
    if folder_digest(stated) != evidence.folder_sha256:
        raise CertificateError("contradiction", "the certificate's list of files does not fit its own digest")
    files = hash_folder(folder, progress)
    _compare(stated, files, str(folder))
    if baseline is not None:
        _check_baseline(statement["predicate"], baseline, progress)
    return Verified(signature, evidence, len(files), baseline is not None)


def _evidence(predicate: Mapping[str, Any]) -> Evidence:
    try:
        evidence = Evidence.model_validate(predicate.get(EXTENSION))
        if evidence.created_utc.tzinfo is None or evidence.expires_utc.tzinfo is None:
            raise CertificateError("malformed", "the certificate's times have no time zone", 2)
        return evidence
    except ValidationError as e:
        place = ".".join(str(p) for p in e.errors()[0]["loc"])
        raise CertificateError(
            "malformed", f"the certificate's {EXTENSION}.{place}: {e.errors()[0]['msg']}; made by another version?", 2
        ) from None


def _check_verdict(predicate: Mapping[str, Any], evidence: Evidence) -> None:
    """The verdict has to be PASS, and the predicate, the verdict and the checks have to say the same."""
    statuses = [str(c.get("status")) for c in [*evidence.checks, *evidence.tasks]]
    says_passed = predicate.get("result") in ("PASSED", "WARNED") and not predicate.get("failedTests")
    if says_passed != (evidence.verdict == "PASS") or (
        evidence.verdict == "PASS" and derived_verdict(statuses) != "PASS"
    ):
        raise CertificateError(
            "contradiction", "the certificate's verdict, result and checks contradict each other: it was edited"
        )
    if evidence.verdict == "PASS":
        return
    failed = ", ".join(str(n) for n in predicate.get("failedTests", [])) or "no check named"
    raise CertificateError(
        "not-passed",
        f"the certified verdict is {evidence.verdict} ({failed}): this folder may not be shipped",
        1 if evidence.verdict == "FAIL" else 3,
    )


def _check_dates(evidence: Evidence, max_age_days: float | None, now: datetime.datetime) -> None:
    if evidence.created_utc > now + CLOCK_SKEW:
        raise CertificateError(
            "not-yet-valid", f"the certificate is from the future ({evidence.created_utc:%Y-%m-%d %H:%M} UTC)"
        )
    if now >= evidence.expires_utc:
        raise CertificateError("expired", f"the certificate expired on {evidence.expires_utc:%Y-%m-%d %H:%M} UTC")
    if max_age_days is not None and not max_age_days >= 0:
        raise CertificateError("dates", f"--max-age {max_age_days:g} is no number of days", 2)
    age = (now - evidence.created_utc).total_seconds() / 86400
    if max_age_days is not None and age > max_age_days:
        raise CertificateError("too-old", f"the certificate is {age:.1f} days old, --max-age allows {max_age_days:g}")


def _digests(descriptors: list[dict[str, Any]], what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for d in descriptors:
        name, digest = d.get("name"), d.get("digest", {}).get("sha256")
        if not name or not digest or name in found:
            raise CertificateError("malformed", f"a {what} without name or SHA-256, or named twice: {name!r}", 2)
        found[name] = digest
    return found


def _compare(stated: Mapping[str, str], there: Mapping[str, str], where: str, prefix: str = "") -> None:
    """Equal names and digests, or a refusal that names them."""
    kinds = {
        "missing": [n for n in stated if n not in there],
        "extra": [n for n in there if n not in stated],
        "changed": [n for n in stated if n in there and stated[n] != there[n]],
    }
    words = {
        "missing": "is certified and not there",
        "extra": "is there and not certified",
        "changed": "is not the certified file (SHA-256 differs)",
    }
    found = [f"{n} {words[kind]}" for kind, names in kinds.items() for n in names]
    if found:
        reason = next(kind for kind in ("changed", "missing", "extra") if kinds[kind])
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise CertificateError(f"{prefix}file-{reason}", f"{where}: {'; '.join(found[:4])}{more}")


def _check_baseline(predicate: Mapping[str, Any], checkpoint: Path, progress: Progress | None) -> None:
    stated = _digests(predicate.get("configuration", []), "dependency")
    roles = hash_baseline(checkpoint, progress)
    there = {f"{role}/{name}": digest for role, members in roles.items() for name, digest in members.items()}
    _compare({n: d for n, d in stated.items() if not n.startswith("data/")}, there, str(checkpoint), "baseline-")
