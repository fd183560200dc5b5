"""Bodies of ``llama-onnx keygen | certify | verify``; libraries are imported by the command that needs them.

Try: ``llama-onnx keygen release && llama-onnx verify cert.json FOLDER --key release.pub.pem``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Opens a progress bar over bytes: called with (done, total)."""


def add_commands(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Options of the three commands; ``add(name, help)`` makes a sub-parser."""
    key = add("keygen", "make an Ed25519 key pair for certificates: NAME.pem and NAME.pub.pem")
    key.add_argument("name", type=Path, help="path without ending")

    certify = add("certify", "certify a folder by a result: in-toto statement in a DSSE envelope")
    certify.add_argument("result", type=Path, help="validation.json, or a record or comparison that holds one")
    certify.add_argument("folder", type=Path, help="the exported folder that was measured")
    certify.add_argument("--baseline", required=True, help="'demo', a checkpoint folder, a .gguf file or a hub id")
    certify.add_argument("--dataset", help="the data measured on, as for the gate (default: the project's own)")
    certify.add_argument("--certificate", type=Path, required=True, help="the file to write")
    certify.add_argument("--key", type=Path, help="sign with this private key (PEM, see keygen)")
    certify.add_argument(
        "--allow-quick", action="store_true", help="accept a run in mode quick; the certificate says so"
    )
    certify.add_argument("--valid-days", type=float, default=180.0, help="days until it expires (default 180)")

    verify = add("verify", "check offline that a certificate covers a folder: every byte, key, verdict, dates")
    verify.add_argument("certificate", type=Path)
    verify.add_argument("folder", type=Path)
    verify.add_argument("--key", type=Path, help="the public key that must have signed it (PEM)")
    verify.add_argument("--require-signature", action="store_true", help="refuse to go on without --key")
    verify.add_argument("--max-age", type=float, metavar="DAYS", help="refuse results older than this")
    verify.add_argument("--policy", type=Path, metavar="FILE", help="your own demands, YAML or JSON (docs/trust.md)")
    verify.add_argument("--baseline", help="also re-hash this checkpoint's weights and tokenizer")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def run_keygen(args: argparse.Namespace, _bar: Bar) -> int:
    """``llama-onnx keygen NAME``."""
    from bench.certificate.envelope import keygen

    private, public = keygen(args.name)
    if args.json:
        _print_json({"private": str(private), "public": str(public)})
    else:
        print(f"private key (not encrypted, keep it secret): {private}\npublic key: {public}")
    return 0


def _result(path: Path) -> dict[str, Any]:
    from bench.certificate.statement import CertificateError

    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise CertificateError("no-result", f"cannot read {path} ({e}); pass a result document", 2) from None
    if not isinstance(raw, dict):
        raise CertificateError("no-result", f"{path} is no JSON object; pass a result document", 2)
    return raw


def run_certify(args: argparse.Namespace, bar: Bar) -> int:
    """``llama-onnx certify RESULT FOLDER --baseline MODEL --certificate FILE``; exit code 1 for a FAIL."""
    from bench.certificate.envelope import seal
    from bench.certificate.statement import CertificateError, make_certificate, read_validation
    from bench.data.loading import load_dataset
    from export.source import resolve

    if args.certificate.absolute().resolve().is_relative_to(args.folder.expanduser().resolve()):
        raise CertificateError(
            "inside", f"{args.certificate} would be one more file of the folder that it certifies; put it beside", 2
        )
    checkpoint = resolve(args.baseline).folder
    with bar("hashing") as progress:
        statement = make_certificate(
            read_validation(_result(args.result)),
            args.folder.expanduser(),
            checkpoint,
            load_dataset(args.dataset),
            allow_quick=args.allow_quick,
            valid_days=args.valid_days,
            progress=counter(progress, args.folder, checkpoint),
        )
    envelope = seal(statement, args.key)
    write_certificate(args.certificate, envelope)
    predicate = statement["predicate"]
    signed = "signed" if args.key else "NOT signed (no --key)"
    if args.json:
        _print_json({"certificate": str(args.certificate), "signed": bool(args.key), "statement": statement})
    else:
        mode = f"mode {predicate['llamaOnnxBench']['mode']}"
        print(f"{args.certificate}: {predicate['result']}, {mode}, {len(statement['subject'])} files, {signed}")
    return int(predicate["result"] == "FAILED")


def write_certificate(path: Path, envelope: dict[str, Any]) -> None:
    """Write an envelope; CertificateError where that is not possible."""
    from bench.certificate.statement import CertificateError

    try:
        path.write_text(json.dumps(envelope, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise CertificateError("unwritable", f"cannot write {path}: {e.strerror}; name another place", 2) from None


def counter(progress: Callable[[int, int], None], *folders: Path) -> Callable[[int], None]:
    """Bytes of each chunk -> (done, total) over all files of the folders."""
    total = sum(p.stat().st_size for f in folders if f.is_dir() for p in f.rglob("*") if p.is_file())
    done = 0

    def on_chunk(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    return on_chunk


def run_verify(args: argparse.Namespace, bar: Bar) -> int:
    """``llama-onnx verify CERT FOLDER``; a refusal is printed with its reason and returns its exit code."""
    from bench.certificate.envelope import read_public_key
    from bench.certificate.policy import read_policy
    from bench.certificate.statement import CertificateError
    from bench.certificate.verify import verify_certificate
    from bench.digests import DigestError

    baseline = None
    if args.baseline:
        from export.source import resolve

        baseline = resolve(args.baseline).folder
    try:
        with bar("hashing") as progress:
            found = verify_certificate(
                args.certificate,
                args.folder.expanduser(),
                key=read_public_key(args.key) if args.key else None,
                require_signature=args.require_signature,
                max_age_days=args.max_age,
                policy=read_policy(args.policy) if args.policy else None,
                baseline=baseline,
                progress=counter(progress, args.folder, *([baseline] if baseline else [])),
            )
    except (CertificateError, DigestError) as e:
        if args.json:
            _print_json({"valid": False, "reason": e.reason, "message": str(e)})
            return e.exit_code
        raise CertificateError(e.reason, f"refused ({e.reason}): {e}", e.exit_code) from None
    v, expires = found.validation, found.extension.expires_utc
    if args.json:
        _print_json(
            {
                "valid": True,
                "signature": found.signature,
                "files": found.files,
                "baseline_checked": found.baseline_checked,
                **v.model_dump(mode="json", include={"verdict", "tier", "mode", "session", "notes"}),
                "measured_utc": v.created_utc,
                **found.extension.model_dump(mode="json", include={"created_utc", "expires_utc"}),
            }
        )
    else:
        print(
            f"valid: {v.verdict} in tier {v.tier}, mode {v.mode}, {found.files} files as certified, {found.signature}, "
            f"until {expires:%Y-%m-%d}" + "".join(f"\nnote: {n}" for n in v.notes)
        )
    return 0
