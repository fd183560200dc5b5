"""What really works here: execution providers by a run, the GPU and its libraries. Try: ``llama-onnx doctor``.

The list of available providers also names those whose libraries are missing, so nothing short of a run is believed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from export.manifest import first_line
from runtime.errors import CompilerMissingError, ProviderUnavailableError
from runtime.providers import (
    PROVIDERS,
    Provider,
    attach,
    library_trouble,
    packages,
    placement,
    provider_list,
    require,
    require_active,
)
from runtime.settings import cpu_name, usable_cores
from runtime.trt_compiler import version


@dataclass(frozen=True)
class Finding:
    """One provider: whether it ran, what was seen or is the matter, and how to install it if not."""

    provider: str
    loads: bool
    detail: str
    install: str = ""


@dataclass(frozen=True)
class Gpu:
    """What NVIDIA's management library says; ``missing`` says why it says nothing."""

    devices: tuple[dict[str, str | int | float], ...] = ()
    driver: str = ""
    cuda_driver: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that the doctor found.

    ``compiler`` is TensorRT-RTX's, which needs no GPU: its version, or how to install it.

    The caller adds ``bandwidth`` (bytes per second, None if not measured) and ``telemetry``, the environment variables
    by which libraries are told not to report their use.
    """

    providers: list[Finding]
    gpu: Gpu
    cpu: dict[str, str | int | float]
    packages: dict[str, str]
    bandwidth: dict[str, float | str] | None = None
    compiler: str = ""
    telemetry: dict[str, str] = field(default_factory=dict)


def _one_node() -> bytes:
    """A model that adds its input to itself."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "one", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())


def examine() -> list[Finding]:
    """Try every provider that this tool knows."""
    model = _one_node()
    return [_try(provider, model) for provider in PROVIDERS.values()]


def _try(provider: Provider, model: bytes) -> Finding:
    try:
        require(provider.name, None)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        attach(options, provider)
        session = ort.InferenceSession(model, sess_options=options, providers=provider_list(provider))
        require_active(session, provider)
        (y,) = session.run(None, {"x": np.ones(2, np.float32)})
        where = placement(session).nodes
        if where and provider.ort_name not in where:
            return Finding(provider.name, False, f"loads, but its node ran on {', '.join(where)}", provider.install)
        good = bool((y == 2).all())
        return Finding(provider.name, good, f"onnxruntime {ort.__version__}" if good else "gave a wrong result")
    except ProviderUnavailableError as e:
        return Finding(provider.name, False, str(e), provider.install)
    except Exception as e:  # onnxruntime raises its own C++-bound classes
        cause = library_trouble(provider) or first_line(e)
        return Finding(provider.name, False, f"{cause}. To get it: {provider.install}", provider.install)


def gpus() -> Gpu:
    """NVIDIA GPUs, clocks and driver, by nvidia-ml-py; says why where it cannot tell."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        why = "nvidia-ml-py is not installed: GPUs, driver and clocks are not known (pip install nvidia-ml-py)"
        return Gpu(missing=why)
    except Exception as e:  # nvml has an exception class for each code
        return Gpu(missing=f"no NVIDIA driver answers: {str(e)[:120]}")
    try:
        version = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        devices = tuple(_device(nvml, n) for n in range(nvml.nvmlDeviceGetCount()))
        return Gpu(devices, _text(nvml.nvmlSystemGetDriverVersion()), f"{version // 1000}.{version % 1000 // 10}")
    finally:
        nvml.nvmlShutdown()


def _device(nvml: Any, index: int) -> dict[str, str | int | float]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    found: dict[str, str | int | float] = {
        "name": _text(nvml.nvmlDeviceGetName(handle)),
        "memory_bytes": int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
    }
    for name, kind in (("sm", "NVML_CLOCK_SM"), ("memory", "NVML_CLOCK_MEM")):
        clock = getattr(nvml, kind)
        found[f"{name}_clock_mhz"] = int(nvml.nvmlDeviceGetClockInfo(handle, clock))
        found[f"{name}_clock_max_mhz"] = int(nvml.nvmlDeviceGetMaxClockInfo(handle, clock))
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def processor() -> dict[str, str | int | float]:
    """The CPU that this process may use, and its clock now where the system tells."""
    import cpuinfo
    import psutil

    flags = set(cpuinfo.get_cpu_info().get("flags") or ())
    found: dict[str, str | int | float] = {
        "name": cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    found["vector"] = next((f for f in ("amx_tile", "avx512f", "avx2", "asimd") if f in flags), "unknown")
    clock = psutil.cpu_freq()
    if clock is not None:
        found["clock_mhz"] = round(clock.current)
    return found


def compiler() -> str:
    """TensorRT-RTX's compiler in a line."""
    try:
        return f"TensorRT-RTX {version()}, needs no GPU (llama-onnx engine, tensorrt_compile)"
    except CompilerMissingError as e:
        return str(e)


def diagnose() -> Report:
    """Everything but the bandwidth, which takes memory and seconds and is the caller's choice."""
    return Report(examine(), gpus(), processor(), packages(), compiler=compiler())
