"""``llama-onnx keygen``: the keys that certificates are signed and checked with. Try: ``llama-onnx keygen release``."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.cli.output import show

HELP = "make an Ed25519 key pair for certificates: NAME.pem (private) and NAME.pub.pem (public)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files' common name."""
    parser.add_argument("name", type=Path, help="path of the two files, without .pem")


def run(args: argparse.Namespace) -> int:
    """Write both; a key that is there is never overwritten."""
    from bench.certificate.envelope import keygen

    private, public = keygen(args.name)
    show(
        args,
        {"private": str(private), "public": str(public)},
        f"private key (not encrypted, keep it secret): {private}\npublic key: {public}",
    )
    return 0
