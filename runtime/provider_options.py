"""What each execution provider is told: defaults for LLaMA decoding, and every option that the user gives.

``--provider-option KEY=VALUE`` reaches every option of a provider under ONNX Runtime's own name; what the provider
does not know it rejects, and that is an error. The names are those of ONNX Runtime's provider documentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtime.errors import SessionError

DEFAULTS: dict[str, dict[str, str]] = {
    # None exist; threads and the like are the session's.
    "cpu": {},
    # Memory as needed (weights are taken once), TF32 off (parity in fp32), cuDNN's algorithm search off (a LLaMA has no
    # convolution), CUDA graphs as the session decides.
    "cuda": {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "do_copy_in_default_stream": "1",
        "use_tf32": "0",
        "enable_cuda_graph": "0",
    },
    # fp16 as the graph has it, norms fp32; runtime.tensorrt adds profiles and caches.
    "tensorrt": {
        "device_id": "0",
        "trt_fp16_enable": "0",
        "trt_layer_norm_fp32_fallback": "1",
        "trt_builder_optimization_level": "3",
        "trt_cuda_graph_enable": "0",
    },
    # It takes its types from the graph.
    "tensorrt-rtx": {"device_id": "0", "enable_cuda_graph": "0"},
}


def options_of(provider: str, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """A provider's options, ``more`` over the defaults.

    Raises:
        SessionError: an option for the CPU, which has none and would ignore it.
    """
    if more and not DEFAULTS[provider]:
        raise SessionError(
            f"the {provider} provider has no options and would ignore {', '.join(more)}; leave out --provider-option"
        )
    return DEFAULTS[provider] | dict(more or {})


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
