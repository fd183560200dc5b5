"""``llama-onnx certify``: what was measured of a folder becomes a statement that can be signed and checked later.

Try: ``llama-onnx certify validation.json FOLDER --baseline demo --certificate cert.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cli.output import show
from bench.progress import hashing
from export.source import add_option

if TYPE_CHECKING:
    from bench.data.items import Dataset
    from export.source import Source
    from reports.validation import Validation

HELP = "write a certificate that this folder got this result: an in-toto statement in a DSSE envelope"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The result, the folder, what it rests on, and the certificate."""
    add = parser.add_argument
    add("result", type=Path, help="validation.json, or a record or comparison that holds one")
    add("folder", type=Path, help="the exported folder that was measured")
    add("--baseline", metavar="MODEL", required=True, help="'demo', a checkpoint folder, a .gguf file or a hub id")
    add_option(add)
    add("--dataset", help="the data that was measured on (default: the project's own)")
    add_certificate(parser, required=True)
    add("--valid-days", type=float, default=180.0, metavar="DAYS", help="days until it expires (default 180)")


def add_certificate(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """The options of whatever writes a certificate."""
    add = parser.add_argument
    add("--certificate", type=Path, metavar="FILE", required=required, help="the file to write the certificate to")
    add("--key", type=Path, metavar="FILE", help="sign the certificate with this private key (PEM, see keygen)")
    add("--allow-quick", action="store_true", help="certify a run in mode quick; the certificate says so")


def _result(path: Path) -> dict[str, Any]:
    from bench.certificate.statement import CertificateError

    try:
        raw = json.loads(path.read_bytes())  # a record may hold NaN and Infinity; in the certificate they are text
    except (OSError, ValueError) as e:
        raise CertificateError("no-result", f"cannot read {path} ({e}); pass a result document", 2) from None
    if not isinstance(raw, dict):
        raise CertificateError("no-result", f"{path} is no JSON object; pass a result document", 2)
    return raw


def refuse_inside(certificate: Path, folder: Path) -> None:
    """CertificateError where a certificate would change the folder that it covers."""
    from bench.certificate.statement import CertificateError

    if certificate.absolute().resolve().is_relative_to(folder.resolve()):
        raise CertificateError(
            "inside", f"{certificate} would be one more file of the folder that it certifies; put it beside", 2
        )


def refuse_thinned(result: Validation, folder: Path, source: Source, dataset: Dataset, code: int) -> None:
    """CertificateError with this exit code where a result lacks evidence that folder, baseline and data demand."""
    from bench.certificate.statement import CertificateError, listed
    from bench.gate.validate import make_subject, mode_of, thinned

    if wrong := thinned(result, make_subject(folder, source, mode_of(result.mode), dataset)):
        raise CertificateError("incomplete", f"the evidence is not whole: {listed(wrong, 3)}", code)


def write_certificate(statement: dict[str, Any], args: argparse.Namespace) -> str:
    """Sign where ``--key`` is given, and write ``--certificate``; a line that says what it is."""
    from bench.certificate.envelope import seal, write_envelope

    write_envelope(args.certificate, seal(statement, args.key))
    predicate = statement["predicate"]
    mode = f"mode {predicate['llamaOnnxBench']['mode']}"
    signed = "signed" if args.key else "NOT signed (no --key)"
    return f"{args.certificate}: {predicate['result']}, {mode}, {len(statement['subject'])} files, {signed}"


def run(args: argparse.Namespace) -> int:
    """Certify; exit code 1 where the result is a FAIL."""
    from bench.certificate.statement import make_certificate, read_validation
    from bench.data.loading import load_dataset
    from export.source import resolve

    folder = args.folder.expanduser()
    refuse_inside(args.certificate, folder)
    source, dataset = resolve(args.baseline, allow_pickle=args.allow_pickle), load_dataset(args.dataset)
    result = read_validation(_result(args.result))
    with hashing(folder, source.folder) as on_chunk:
        statement = make_certificate(
            result,
            folder,
            source.folder,
            dataset,
            allow_quick=args.allow_quick,
            valid_days=args.valid_days,
            progress=on_chunk,
        )
    refuse_thinned(result, folder, source, dataset, 2)
    text = write_certificate(statement, args)
    show(args, {"certificate": str(args.certificate), "signed": bool(args.key), "statement": statement}, text)
    return int(statement["predicate"]["result"] == "FAILED")
