"""``llama-onnx doctor``: prints what :mod:`runtime.doctor` found, and the memory bandwidth measured here.

The last lines are commands to paste, one for each provider that does not load.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.cli.output import show
from bench.runtimes.environments import kept
from export import TELEMETRY_OFF
from runtime.settings import usable_cores

if TYPE_CHECKING:
    from runtime.doctor import Report

HELP = "which execution providers really load here, and how to install the others"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to leave out."""
    parser.add_argument(
        "--no-bandwidth", action="store_true", help="do not measure the memory bandwidth (takes 1 GiB and 2 s)"
    )


def measure_bandwidth(report: Report) -> dict[str, float | str]:
    """Bytes per second of the CPU's memory, and of the GPU's where PyTorch reaches one."""
    from bench.machine.bandwidth import CpuBandwidth, CudaBandwidth

    probe = CpuBandwidth(usable_cores())
    found: dict[str, float | str] = {"cpu_bytes_per_s": probe(), "cpu_method": probe.method}
    if any(f.loads and f.provider != "cpu" for f in report.providers):
        import torch

        if torch.cuda.is_available():
            gpu = CudaBandwidth()
            found |= {"gpu_bytes_per_s": gpu(), "gpu_method": gpu.method}
        else:
            found["gpu_method"] = "not measured: this PyTorch has no CUDA"
    return found


def run(args: argparse.Namespace) -> int:
    """Diagnose and print; always 0: what does not load is a finding, not a failure."""
    from runtime.doctor import diagnose

    report = replace(diagnose(), telemetry={name: os.environ.get(name, "") for name in TELEMETRY_OFF})
    if not args.no_bandwidth:
        report = replace(report, bandwidth=measure_bandwidth(report))
    environments = kept()
    document = asdict(report) | {"environments": environments}
    show(args, document, lambda console: render(report, environments, console))
    return 0


def render(report: Report, environments: Mapping[str, int | str], console: Console) -> None:
    """A page for a terminal."""
    facts = Table(title="Machine", title_justify="left", show_header=False)
    cpu = report.cpu
    clock = f", {cpu['clock_mhz']} MHz now" if "clock_mhz" in cpu else ", clock not known"
    facts.add_row("CPU", Text(f"{cpu['name']}, {cpu['cores']} cores, {cpu['vector']}{clock}"))
    facts.add_row("memory", Text(f"{float(cpu['memory_bytes']) / 2**30:.1f} GiB" + _rate(report, "cpu")))
    for gpu in report.gpu.devices:
        facts.add_row(
            "GPU",
            Text(
                f"{gpu['name']}, {float(gpu['memory_bytes']) / 2**30:.0f} GiB{_rate(report, 'gpu')}; clocks SM "
                f"{gpu['sm_clock_mhz']} of {gpu['sm_clock_max_mhz']} MHz, memory {gpu['memory_clock_mhz']} of "
                f"{gpu['memory_clock_max_mhz']} MHz"
            ),
        )
    driver = f"{report.gpu.driver}, up to CUDA {report.gpu.cuda_driver}" if report.gpu.driver else report.gpu.missing
    facts.add_row("driver", Text(driver))
    for title, part in (("CUDA", "cuda-runtime"), ("cuDNN", "cudnn"), ("TensorRT", "tensorrt")):
        found = [f"{name} {version}" for name, version in report.packages.items() if part in name]
        facts.add_row(title, Text(", ".join(found) or "no package of it installed"))
    facts.add_row("compiler", Text(report.compiler))
    others = [f"{n} {v}" for n, v in report.packages.items() if n.startswith(("onnxruntime", "torch"))]
    facts.add_row("runtimes", Text(", ".join(others)))
    if environments["count"]:
        size = f"{float(environments['bytes']) / 1e9:.1f} GB in {environments['folder']}"
        text = f"{environments['count']} for --runtime, {size}; remove them with: rm -r '{environments['folder']}'"
        facts.add_row("environments", Text(text))
    yours = [f"{name}={value}" for name, value in report.telemetry.items() if value != TELEMETRY_OFF[name]]
    facts.add_row("telemetry", Text(f"as you set it: {', '.join(yours)}" if yours else "off in every library"))
    console.print(facts)
    table = Table("provider", "loads", "what was seen", title="Execution providers", title_justify="left")
    for f in report.providers:
        table.add_row(f.provider, "yes" if f.loads else "no", Text(f.detail))  # no markup: [cuda,cudnn]
    console.print(table)
    lacking = [f for f in report.providers if not f.loads and f.install]
    if lacking:
        console.print("To install what is missing, paste:", highlight=False)
        for f in lacking:
            line = f.install.split(" (or:")[0].replace("pip uninstall ", "pip uninstall --yes ")
            console.print(f"{line}  # {f.provider}", highlight=False, markup=False, soft_wrap=True)


def _rate(report: Report, side: str) -> str:
    value = (report.bandwidth or {}).get(f"{side}_bytes_per_s")
    return f", reads {float(value) / 1e9:.1f} GB/s" if value else ", bandwidth not measured"
