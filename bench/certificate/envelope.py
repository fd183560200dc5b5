"""The envelope around a certificate: DSSE with Ed25519, by ``securesystemslib``; keys are PEM files.

DSSE signs the payload's bytes together with their type, so nothing has to be brought into a canonical form, and a
signature over one type of document is worth nothing for another. Try: ``llama-onnx keygen mykey``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.certificate.statement import PAYLOAD_TYPE, CertificateError, canonical, require

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import Key


def keygen(stem: Path) -> tuple[Path, Path]:
    """Write a new Ed25519 key: ``STEM.pem`` (private, PKCS 8, readable by its owner only) and ``STEM.pub.pem``.

    Raises:
        CertificateError: one of the two is there already; a key is never overwritten.
    """
    with require():
        from cryptography.hazmat.primitives import serialization as ser
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.PKCS8, ser.NoEncryption())
    public = key.public_key().public_bytes(ser.Encoding.PEM, ser.PublicFormat.SubjectPublicKeyInfo)
    paths = stem.with_name(f"{stem.name}.pem"), stem.with_name(f"{stem.name}.pub.pem")
    for path in paths:
        if path.exists():
            raise CertificateError("key-exists", f"{path} is there already; keys are never overwritten", 2)
    try:
        for path, content, mode in zip(paths, (private, public), (0o600, 0o644), strict=True):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as f:
                f.write(content)
    except OSError as e:
        raise CertificateError("key-unwritable", f"cannot write {path}: {e.strerror}; name another place", 2) from None
    return paths


def _pem(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise CertificateError(
            "bad-key", f"cannot read the {what} key {path}: {e.strerror}; make one with: llama-onnx keygen NAME", 2
        ) from None


def _bad_key(path: Path, what: str) -> CertificateError:
    return CertificateError(
        "bad-key", f"{path} is no Ed25519 {what} key in PEM (unencrypted); see llama-onnx keygen", 2
    )


def read_public_key(path: Path) -> Key:
    """An Ed25519 public key (PEM, SubjectPublicKeyInfo).

    Raises:
        CertificateError: unreadable, another kind of key, or a private one.
    """
    with require():
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
        from securesystemslib.signer import SSlibKey
    try:
        key = load_pem_public_key(_pem(path, "public"))
    except (ValueError, UnsupportedAlgorithm):
        raise _bad_key(path, "public") from None
    if not isinstance(key, Ed25519PublicKey):
        raise _bad_key(path, "public")
    return SSlibKey.from_crypto(key)


def seal(statement: Mapping[str, Any], key: Path | None = None) -> dict[str, Any]:
    """The statement in a DSSE envelope, signed when a private key is given (else its signatures are empty).

    Raises:
        CertificateError: unreadable or no Ed25519 private key.
    """
    with require():
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
        from securesystemslib.dsse import Envelope
        from securesystemslib.signer import CryptoSigner
    envelope = Envelope(canonical(statement), PAYLOAD_TYPE, {})
    if key is not None:
        try:
            private = load_pem_private_key(_pem(key, "private"), None)
        except (ValueError, TypeError):
            raise _bad_key(key, "private") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise _bad_key(key, "private")
        envelope.sign(CryptoSigner(private))
    found: dict[str, Any] = envelope.to_dict()
    return found


def write_envelope(path: Path, envelope: Mapping[str, Any]) -> None:
    """Write an envelope file.

    Raises:
        CertificateError: the place cannot be written.
    """
    try:
        path.write_text(json.dumps(envelope, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise CertificateError("unwritable", f"cannot write {path}: {e.strerror}; name another place", 2) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; two values under one name could be read differently by two readers."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def strict_json(content: bytes | str) -> Any:
    """JSON without duplicate names, NaN or infinity; ValueError says what is wrong."""
    try:
        return json.loads(content, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_envelope(path: Path) -> Envelope:
    """A DSSE envelope file, its form and payload type checked, its signature not.

    Raises:
        CertificateError: unreadable, no envelope, or one around another type of payload.
    """
    with require():
        from securesystemslib.dsse import Envelope
        from securesystemslib.exceptions import FormatError
    try:
        raw = strict_json(path.read_bytes())
    except OSError as e:
        raise CertificateError("no-certificate", f"cannot read {path}: {e.strerror}; pass a certificate", 2) from None
    except ValueError as e:
        raise CertificateError("malformed", f"{path} is no valid JSON ({e}); get the certificate again", 2) from None
    if not isinstance(raw, dict) or not isinstance(raw.get("signatures"), list):
        raise CertificateError("malformed", f"{path} is no DSSE envelope; get the certificate again", 2)
    try:
        envelope = Envelope.from_dict(raw)
    except (KeyError, ValueError, TypeError, AttributeError, FormatError) as e:
        raise CertificateError(
            "malformed", f"{path} is no DSSE envelope ({e!r}); get the certificate again", 2
        ) from None
    if envelope.payload_type != PAYLOAD_TYPE:
        raise CertificateError(
            "wrong-payload-type",
            f"{path} holds {envelope.payload_type!r}, wanted {PAYLOAD_TYPE}; is it another file?",
            2,
        )
    return envelope


def check_signature(envelope: Envelope, keys: Mapping[str, Key], required: Sequence[str] = ()) -> str:
    """What is known about the envelope's signature, in words for the reader.

    Args:
        envelope: what :func:`read_envelope` gave.
        keys: public keys that must have signed, by who asks for each (``--key``, ...).
        required: who asks for a signature.

    Raises:
        CertificateError: unsigned where a signature is demanded, signed by another key, or the payload was edited.
    """
    if not keys:
        if required:
            raise CertificateError(
                "no-key", f"{required[0]} needs a key to check by: a signature by just anybody proves nothing", 2
            )
        return "signed, but not checked: no --key given" if envelope.signatures else "unsigned"
    from securesystemslib.exceptions import VerificationError

    for name, key in keys.items():
        if not envelope.signatures:
            raise CertificateError(
                "unsigned",
                f"the certificate is not signed, {name} asks for key {key.keyid[:16]}; certify it with --key",
            )
        if key.keyid not in envelope.signatures:
            theirs = ", ".join(k[:16] for k in envelope.signatures)
            raise CertificateError(
                "other-key", f"the certificate is signed by key {theirs}, {name} is {key.keyid[:16]}"
            )
        try:
            envelope.verify([key], 1)
        except VerificationError:
            raise CertificateError(
                "bad-signature", "the signature does not fit the payload: the certificate was edited after signing"
            ) from None
    return f"signed by key {', '.join(k.keyid[:16] for k in keys.values())}"
