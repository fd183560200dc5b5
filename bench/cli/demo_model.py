"""``llama-onnx demo-model``: a real small LLaMA for trying everything else. Try: ``llama-onnx demo-model``."""

from __future__ import annotations

import argparse

from bench.cli.output import show, status
from bench.progress import progress

HELP = "download the built-in demo model into the cache and print its folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(args: argparse.Namespace) -> int:
    """Fetch it, or find it in the cache."""
    from export.demo_model import demo_model

    with progress("demo model", unit="bytes") as bar:
        folder = demo_model(status, bar.at)
    show(args, {"folder": str(folder)}, str(folder))
    return 0
