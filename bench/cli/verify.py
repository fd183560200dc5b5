"""``llama-onnx verify``: whether a certificate covers the folder that is here.

Try: ``llama-onnx verify cert.json FOLDER --key release.pub.pem``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.cli.output import show, write_json
from bench.progress import hashing

HELP = "check offline that a certificate covers a folder: every file's hash, the signature, the verdict, the dates"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The certificate, the folder, and what to insist on."""
    parser.add_argument("certificate", type=Path, help="the file that `certify` or `validate` wrote")
    parser.add_argument("folder", type=Path, help="the exported folder")
    parser.add_argument("--key", type=Path, metavar="FILE", help="the public key that must have signed it (PEM)")
    parser.add_argument("--require-signature", action="store_true", help="an error where --key is missing")
    parser.add_argument("--max-age", type=float, metavar="DAYS", help="refuse certificates older than this")
    parser.add_argument("--baseline", metavar="MODEL", help="also hash this checkpoint's weights and tokenizer again")


def run(args: argparse.Namespace) -> int:
    """Verify; a refusal is printed with its reason and returns its exit code."""
    from bench.certificate.envelope import read_public_key
    from bench.certificate.statement import CertificateError
    from bench.certificate.verify import verify_certificate

    folder, baseline = args.folder.expanduser(), None
    if args.baseline:
        from export.source import resolve

        baseline = resolve(args.baseline).folder
    try:
        with hashing(folder, *([baseline] if baseline else [])) as on_chunk:
            found = verify_certificate(
                args.certificate,
                folder,
                key=read_public_key(args.key) if args.key else None,
                require_signature=args.require_signature,
                max_age_days=args.max_age,
                baseline=baseline,
                progress=on_chunk,
            )
    except CertificateError as e:
        if args.json:
            write_json({"valid": False, "reason": e.reason, "message": str(e)})
            return e.exit_code
        raise CertificateError(e.reason, f"refused ({e.reason}): {e}", e.exit_code) from None
    evidence = found.evidence
    show(
        args,
        {
            "valid": True,
            "signature": found.signature,
            "files": found.files,
            "baseline_checked": found.baseline_checked,
            **evidence.model_dump(mode="json", include={"verdict", "tier", "created_utc", "expires_utc", "notes"}),
        },
        f"valid: {evidence.verdict} in tier {evidence.tier}, {found.files} files as certified, {found.signature}, "
        f"until {evidence.expires_utc:%Y-%m-%d}" + "".join(f"\nnote: {n}" for n in evidence.notes),
    )
    return 0
