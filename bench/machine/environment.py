"""Facts about this machine and its software, and the fingerprint that says whose measurements may be compared."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from contextlib import suppress

import psutil

from reports.base import Machine
from runtime.settings import cpu_name, usable_cores

PACKAGES = (
    "llama-onnx-bench",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "transformers",
    "optimum",
    "optimum-onnx",
    "onnx",
    "numpy",
    "scipy",
    "pytest",
    "pytest-benchmark",
    "sacrebleu",
    "rouge-score",
)


def versions() -> dict[str, str]:
    """Versions of what took part; what is not installed is left out."""
    found = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _gpu() -> str | None:
    try:
        import torch

        return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None
    except (ImportError, RuntimeError):
        return None


def machine() -> Machine:
    """This machine. The fingerprint covers processor, cores, memory (in GiB), GPU and operating system."""
    cpu = cpu_name()
    cores = usable_cores()
    memory = psutil.virtual_memory().total
    gpu = _gpu()
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    key = "|".join([cpu, str(cores), str(round(memory / 2**30)), gpu or "", platform.system(), platform.machine()])
    return Machine(
        fingerprint=hashlib.sha256(key.encode()).hexdigest()[:16],
        cpu=cpu,
        cores=cores,
        memory_bytes=memory,
        os=system,
        python=platform.python_version(),
        gpu=gpu,
        load_average_1m=os.getloadavg()[0],
    )
