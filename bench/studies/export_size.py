"""Time and memory of exporting a large checkpoint, beside ``cp`` of the same files, in one run.

Each export runs in a process of its own and is deleted after it was measured; ``cp`` is run before and after them,
flushed to the disk as the exports are. Try: ``llama-onnx random-model /tmp/7b`` and then
``python -m bench.studies.export_size /tmp/7b --scratch /tmp``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.studies.export_table import OURS, export_apart

SPECS = {
    name.replace(",", "").replace(" ", "-"): fields for name, fields in {**OURS, "bf16": {"precision": "bf16"}}.items()
}
"""By the names of ``--only``; see :data:`bench.studies.export_table.OURS`."""


def copy_seconds(source: Path, target: Path) -> float:
    """Seconds of ``cp -r`` and the flush of what it wrote."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for file in target.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    elapsed = time.perf_counter() - started
    shutil.rmtree(target)
    return elapsed


def measure(checkpoint: Path, scratch: Path, names: Sequence[str]) -> dict[str, Any]:
    """Run everything; seconds, bytes and peak resident bytes by name."""
    log = Console(stderr=True)
    read = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    copies = [copy_seconds(checkpoint, scratch / "size-copy")]
    log.print(f"cp: {copies[0]:.1f} s for {read / 1e9:.2f} GB", style="dim")
    found: dict[str, Any] = {}
    for name in names:
        out = scratch / f"size-{name}"
        result = export_apart("ours", checkpoint, out, SPECS[name])
        result["bytes"] = sum(f.stat().st_size for f in out.iterdir())
        result["files"] = sorted(f.name for f in out.iterdir())
        shutil.rmtree(out)
        found[name] = result
        log.print(f"{name}: {result['seconds']:.1f} s, peak {result['peak_bytes'] / 1e9:.2f} GB", style="dim")
    copies.append(copy_seconds(checkpoint, scratch / "size-copy"))
    log.print(f"cp: {copies[1]:.1f} s", style="dim")
    return {"checkpoint_bytes": read, "copy_seconds": copies, "exports": found}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.export_size", description="export beside cp")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder on the disk to measure")
    parser.add_argument("--only", nargs="*", choices=SPECS, default=["fp16", "int4-rtn", "int4-hqq"])
    args = parser.parse_args(arguments)
    print(json.dumps(measure(args.checkpoint, args.scratch, args.only), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
