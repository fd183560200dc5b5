"""What each execution provider is told: typed settings with defaults for LLaMA decoding, and every option besides.

``--provider-option KEY=VALUE`` reaches every option of a provider under ONNX Runtime's own name; what the provider
does not know it rejects, and that is an error. The names are those of ONNX Runtime's provider documentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from runtime.errors import SessionError


@dataclass(frozen=True)
class CudaOptions:
    """ONNX Runtime's CUDA provider. Defaults: memory as needed (weights are taken once), TF32 off (parity in fp32),
    cuDNN's algorithm search off (a LLaMA has no convolution), CUDA graphs as the session decides."""

    device_id: int = 0
    arena_extend_strategy: str = "kSameAsRequested"
    gpu_mem_limit: int | None = None
    cudnn_conv_algo_search: str = "HEURISTIC"
    do_copy_in_default_stream: bool = True
    use_tf32: bool = False
    enable_cuda_graph: bool = False


@dataclass(frozen=True)
class TensorrtOptions:
    """ONNX Runtime's TensorRT provider. Defaults: engines and timings cached, fp16 as the graph has it, norms fp32."""

    device_id: int = 0
    trt_max_workspace_size: int | None = None
    trt_engine_cache_enable: bool = True
    trt_engine_cache_path: Path | None = None
    trt_engine_cache_prefix: str | None = None
    trt_timing_cache_enable: bool = True
    trt_timing_cache_path: Path | None = None
    trt_fp16_enable: bool = False
    trt_layer_norm_fp32_fallback: bool = True
    trt_builder_optimization_level: int = 3
    trt_cuda_graph_enable: bool = False
    trt_profile_min_shapes: str | None = None
    trt_profile_opt_shapes: str | None = None
    trt_profile_max_shapes: str | None = None


@dataclass(frozen=True)
class TensorrtRtxOptions:
    """The TensorRT-RTX plugin. Defaults: compiled kernels cached; it takes its types from the graph."""

    device_id: int = 0
    enable_cuda_graph: bool = False
    nv_runtime_cache_path: Path | None = None
    nv_profile_min_shapes: str | None = None
    nv_profile_opt_shapes: str | None = None
    nv_profile_max_shapes: str | None = None


@dataclass(frozen=True)
class CpuOptions:
    """The CPU provider has none; threads and the like are the session's."""


ProviderOptions = CpuOptions | CudaOptions | TensorrtOptions | TensorrtRtxOptions
DEFAULTS: dict[str, ProviderOptions] = {
    "cpu": CpuOptions(),
    "cuda": CudaOptions(),
    "tensorrt": TensorrtOptions(),
    "tensorrt-rtx": TensorrtRtxOptions(),
}


def as_text(options: ProviderOptions, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """ONNX Runtime's form: names and values as text, what is None left out, ``more`` on top.

    Raises:
        SessionError: an option for the CPU, which has none and would ignore it.
    """
    found = {f.name: _text(v) for f in fields(options) if (v := getattr(options, f.name)) is not None}
    if more and isinstance(options, CpuOptions):
        raise SessionError(
            f"the cpu provider has no options and would ignore {', '.join(more)}; leave out --provider-option"
        )
    return found | dict(more or {})


def _text(value: object) -> str:
    return ("1" if value else "0") if isinstance(value, bool) else str(value)


def parse_options(pairs: Sequence[str]) -> dict[str, str]:
    """``KEY=VALUE`` texts of the command line.

    Raises:
        SessionError: another form, or a key twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise SessionError(f"provider option {pair!r} is not of the form KEY=VALUE")
        if key in found:
            raise SessionError(f"provider option {key!r} is given twice; give it once")
        found[key] = value
    return found
