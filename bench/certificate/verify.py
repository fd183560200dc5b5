"""Does a certificate cover this folder, today? Offline: it reads the certificate, the folder and nothing else.

The certified result is judged again from its own evidence (:mod:`bench.gate.replay`), and the statement is built again
from that result: nothing in it is believed because it stands there. What no evidence can show (the exact checks, and
that the evidence was measured) rests on the signature.
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

from bench.certificate.envelope import check_signature, read_envelope, read_public_key, strict_json
from bench.certificate.policy import Policy
from bench.certificate.statement import (
    CLOCK_SKEW,
    EXTENSION,
    CertificateError,
    Extension,
    build_statement,
    canonical,
    check_form,
    check_result,
    listed,
    statement_digest,
)
from bench.digests import Progress, baseline_digest, folder_digest, hash_baseline, hash_folder
from reports.base import first_problem
from reports.validation import Validation

if TYPE_CHECKING:
    from securesystemslib.signer import Key


@dataclass(frozen=True)
class Verified:
    """A certificate that holds: how it is signed, what it says, and how many files were hashed."""

    signature: str
    extension: Extension
    files: int
    baseline_checked: bool

    @property
    def validation(self) -> Validation:
        """The certified result."""
        return self.extension.validation


def verify_certificate(
    certificate: Path,
    folder: Path,
    *,
    key: Key | None = None,
    require_signature: bool = False,
    max_age_days: float | None = None,
    policy: Policy | None = None,
    baseline: Path | None = None,
    now: datetime.datetime | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Check, in this order: envelope, signature, form, digest of the statement, the result by its evidence, that every
    field follows from it, verdict, policy, dates, every file, and the baseline if given.

    ``policy`` adds to the other demands: with two keys both have to have signed, of two ages the smaller counts.

    Raises:
        CertificateError: refused; ``reason`` says why.
        DigestError: nothing to hash in folder or checkpoint.
    """
    policy = policy or Policy()
    keys = {"--key": key} if key else {}
    if policy.key:
        keys["the policy's key"] = read_public_key(Path(policy.key))
    demands = {"--require-signature": require_signature, "the policy's require_signature": policy.require_signature}
    envelope = read_envelope(certificate)
    signature = check_signature(envelope, keys, [name for name, wanted in demands.items() if wanted])
    try:
        statement = strict_json(envelope.payload)
    except ValueError as e:
        raise CertificateError("malformed", f"the payload of {certificate} is no valid JSON ({e})", 2) from None
    if not isinstance(statement, dict):
        raise CertificateError("malformed", f"the payload of {certificate} is no in-toto statement", 2)
    check_form(statement)
    extension = _extension(statement)
    stated = _digests(statement["subject"], "subject")
    roles = _roles(statement["predicate"])
    check_result(extension.validation, 1)
    _check_fields(statement, extension, stated, roles)
    if extension.validation.verdict != "PASS":
        failed = ", ".join(statement["predicate"]["failedTests"])
        raise CertificateError(
            "not-passed", f"the certified verdict is FAIL ({failed}): this folder may not be shipped"
        )
    policy.check(extension.validation)
    ages = {"--max-age": max_age_days, "the policy's max_age_days": policy.max_age_days}
    _check_dates(extension, ages, now or datetime.datetime.now(datetime.UTC))
    files = hash_folder(folder, progress)
    _compare(stated, files, str(folder))
    if baseline is not None:
        _compare(_by_role(roles), _by_role(hash_baseline(baseline, progress)), str(baseline), "baseline-")
    return Verified(signature, extension, len(files), baseline is not None)


def _extension(statement: Mapping[str, Any]) -> Extension:
    """What stands under our key, if the statement still has the digest with which it was made."""
    try:
        extension = Extension.model_validate_json(canonical(statement["predicate"].get(EXTENSION)), strict=True)
    except ValidationError as e:
        raise CertificateError(
            "malformed", f"the certificate's {EXTENSION}.{first_problem(e)}; made by another version?", 2
        ) from None
    if statement_digest(statement) != extension.statement_sha256:
        raise CertificateError(
            "contradiction", "the certificate does not have the SHA-256 that it names for itself: it was edited"
        )
    return extension


def _check_fields(
    statement: Mapping[str, Any], extension: Extension, files: Mapping[str, str], roles: Mapping[str, Mapping[str, str]]
) -> None:
    """The statement has to be the one that its result gives, and the result to be of the files that it names."""
    v = extension.validation
    found = {
        "subject": folder_digest(files) == v.folder_sha256,
        "configuration": baseline_digest(roles) == v.baseline_sha256 and roles["data"] == {v.dataset: v.dataset_sha256},
    }
    built = build_statement(v, files, roles, extension.created_utc, extension.expires_utc)
    parts = [*((n, statement.get(n), built[n]) for n in built if n != "predicate")]
    parts += [(n, statement["predicate"].get(n), value) for n, value in built["predicate"].items()]
    wrong = [n for n, good in found.items() if not good]
    wrong += [n for n, have, wanted in parts if canonical(have) != canonical(wanted) and n not in wrong]
    if wrong or canonical(statement) != canonical(built):
        what = ", ".join(wrong) or "a field that test results do not have"
        raise CertificateError(
            "contradiction", f"the certificate does not fit the result in it ({what}): it was edited"
        )


def _check_dates(extension: Extension, ages: Mapping[str, float | None], now: datetime.datetime) -> None:
    """A certificate's age is that of its measurement: certifying an old result anew makes it no younger."""
    created, expires = extension.created_utc, extension.expires_utc
    try:
        measured = datetime.datetime.fromisoformat(extension.validation.created_utc)
        early = measured <= created + CLOCK_SKEW
    except (ValueError, TypeError):
        raise CertificateError("malformed", "the certified result has no date with a time zone", 2) from None
    if not early or created > now + CLOCK_SKEW:
        raise CertificateError(
            "not-yet-valid",
            f"the certificate or its result is from the future ({max(created, measured):%Y-%m-%d %H:%M} UTC)",
        )
    if now >= expires:
        raise CertificateError("expired", f"the certificate expired on {expires:%Y-%m-%d %H:%M} UTC")
    age = (now - measured).total_seconds() / 86400
    for name, most in ages.items():
        if most is not None and not most >= 0:
            raise CertificateError("dates", f"{name} {most:g} must be a number of days, 0 or more", 2)
        if most is not None and age > most:
            raise CertificateError("too-old", f"the result is {age:.2f} days old, {name} allows {most:g}")


def _digests(descriptors: Any, what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for d in descriptors:
        name, digest = d.get("name"), (d.get("digest") or {}).get("sha256")
        if not name or not digest or name in found:
            raise CertificateError("malformed", f"a {what} without name or SHA-256, or named twice: {name!r}", 2)
        found[name] = digest
    return found


def _roles(predicate: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """``configuration`` by role: baseline, tokenizer, data."""
    roles: dict[str, dict[str, str]] = {"baseline": {}, "tokenizer": {}, "data": {}}
    for name, digest in _digests(predicate.get("configuration") or [], "dependency").items():
        role, _, rest = name.partition("/")
        if role not in roles:
            raise CertificateError("malformed", f"a dependency of no role: {name!r}", 2)
        roles[role][rest] = digest
    return roles


def _by_role(roles: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {f"{role}/{name}": digest for role in ("baseline", "tokenizer") for name, digest in roles[role].items()}


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
        raise CertificateError(f"{prefix}file-{reason}", f"{where}: {listed(found, 4)}")
