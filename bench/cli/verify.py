"""``llama-onnx verify``: whether a certificate covers the folder that is here.

Try: ``llama-onnx verify cert.json FOLDER --key release.pub.pem``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.cli.certify import refuse_thinned
from bench.cli.output import show, write_json
from bench.progress import hashing
from export.source import add_option

HELP = "check offline that a certificate covers a folder: every file's hash, the signature, the verdict, the dates"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The certificate, the folder, and what to insist on."""
    add = parser.add_argument
    add("certificate", type=Path, help="the file that `certify` or `validate` wrote")
    add("folder", type=Path, help="the exported folder")
    add("--key", type=Path, metavar="FILE", help="the public key that must have signed it (PEM)")
    add("--require-signature", action="store_true", help="an error where no key is given")
    add("--max-age", type=float, metavar="DAYS", help="refuse results older than this")
    add("--policy", type=Path, metavar="FILE", help="your own demands, YAML or JSON (docs/trust.md)")
    add(
        "--baseline",
        metavar="MODEL",
        help="also hash this checkpoint's weights and tokenizer, and count the evidence that it and the data demand",
    )
    add_option(add)
    add("--dataset", help="with --baseline: the data that was measured on (default: the project's own)")


def run(args: argparse.Namespace) -> int:
    """Verify; a refusal is printed with its reason and returns its exit code."""
    from bench.certificate.envelope import read_public_key
    from bench.certificate.policy import read_policy
    from bench.certificate.statement import CertificateError
    from bench.certificate.verify import verify_certificate
    from bench.data.loading import load_dataset
    from bench.digests import DigestError

    if args.dataset and not args.baseline:
        raise CertificateError("no-baseline", "--dataset says what --baseline is counted on; give both", 2)
    folder, source = args.folder.expanduser(), None
    if args.baseline:
        from export.source import resolve

        source = resolve(args.baseline, allow_pickle=args.allow_pickle)
    baseline = source.folder if source else None
    try:
        with hashing(folder, *([baseline] if baseline else [])) as on_chunk:
            found = verify_certificate(
                args.certificate,
                folder,
                key=read_public_key(args.key) if args.key else None,
                require_signature=args.require_signature,
                max_age_days=args.max_age,
                policy=read_policy(args.policy) if args.policy else None,
                baseline=baseline,
                progress=on_chunk,
            )
        if source:
            data = load_dataset(args.dataset)
            if data.sha256 != found.validation.dataset_sha256:
                raise CertificateError(
                    "other-data", f"measured on other data than {data.name}; pass them: --dataset", 2
                )
            refuse_thinned(found.validation, folder, source, data, 1)
    except (CertificateError, DigestError) as e:
        if args.json:
            write_json({"valid": False, "reason": e.reason, "message": str(e)})
            return e.exit_code
        raise CertificateError(e.reason, f"refused ({e.reason}): {e}", e.exit_code) from None
    v, extension = found.validation, found.extension
    show(
        args,
        {
            "valid": True,
            "signature": found.signature,
            "files": found.files,
            "baseline_checked": found.baseline_checked,
            **v.model_dump(mode="json", include={"verdict", "tier", "mode", "session", "notes"}),
            "measured_utc": v.created_utc,
            **extension.model_dump(mode="json", include={"created_utc", "expires_utc"}),
        },
        f"valid: {v.verdict} in tier {v.tier}, mode {v.mode}, {found.files} files as certified, {found.signature}, "
        f"until {extension.expires_utc:%Y-%m-%d}" + "".join(f"\nnote: {n}" for n in v.notes),
    )
    return 0
