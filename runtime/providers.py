"""Execution providers by name, and what to do about one that is not there.

ONNX Runtime falls back to the CPU without an error when a provider fails to load, so every session is asked
afterwards which provider it really has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnxruntime as ort

from export.manifest import Manifest
from runtime.errors import ProviderUnavailableError, UnknownProviderError


@dataclass(frozen=True)
class Provider:
    """One execution provider: our name, ONNX Runtime's, the device its memory is on, how to install it.

    ``runs`` holds, by attention operator, the activation types that it has kernels for.
    """

    name: str
    ort_name: str
    device: str
    runs: Mapping[str, tuple[str, ...]]
    install: str


_STANDARD = {"Attention": ("fp32", "fp16", "bf16"), "unfused": ("fp32", "fp16", "bf16")}


PROVIDERS = {
    p.name: p
    for p in (
        Provider(
            "cpu",
            "CPUExecutionProvider",
            "cpu",
            {"GroupQueryAttention": ("fp32", "fp16"), "Attention": ("fp32", "fp16"), "unfused": ("fp32", "fp16")},
            "pip install onnxruntime",
        ),
        Provider(
            "cuda",
            "CUDAExecutionProvider",
            "cuda",
            {"GroupQueryAttention": ("fp16", "bf16"), **_STANDARD},
            "pip uninstall onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]' (or: make demo EXTRA=gpu)",
        ),
        Provider(
            "tensorrt",
            "TensorrtExecutionProvider",
            "cuda",
            _STANDARD,
            "pip uninstall onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]' 'tensorrt-cu13>=10.15,<11'",
        ),
    )
}


def auto_provider() -> str:
    """CUDA where this onnxruntime has it and a GPU is there, else the CPU."""
    if PROVIDERS["cuda"].ort_name in ort.get_available_providers():
        import torch

        if torch.cuda.is_available():
            return "cuda"
    return "cpu"


def require(name: str, manifest: Manifest | None) -> Provider:
    """The provider of that name, if this installation has it and it runs the folder's graph.

    ``manifest`` None leaves the graph out of account.

    Raises:
        UnknownProviderError: no such name.
        ProviderUnavailableError: this onnxruntime was built without it, or its operators do not cover the graph.
    """
    if name not in PROVIDERS:
        raise UnknownProviderError(f"unknown provider {name!r}; choose one of {', '.join(PROVIDERS)}")
    provider = PROVIDERS[name]
    if provider.ort_name not in ort.get_available_providers():
        have = ", ".join(p.name for p in PROVIDERS.values() if p.ort_name in ort.get_available_providers())
        raise ProviderUnavailableError(
            f"provider {name!r} is not installed: onnxruntime {ort.__version__} here has {have}. "
            f"To get it: {provider.install}"
        )
    if manifest is not None and manifest.activations not in provider.runs.get(manifest.attention, ()):
        runs = [f"{a} in {', '.join(types)}" for a, types in provider.runs.items()]
        raise ProviderUnavailableError(
            f"provider {name!r} has no {manifest.attention} for {manifest.activations}; it runs {'; '.join(runs)}. "
            + _remedy(provider, manifest)
        )
    return provider


def _remedy(provider: Provider, manifest: Manifest) -> str:
    """What to export instead."""
    types = provider.runs.get(manifest.attention, ())
    if provider.name == "cuda" and manifest.activations == "fp32":
        return "Export with --provider cuda (standard operators), or with --precision fp16"
    if types:
        quantised = manifest.quantisation is not None
        return f"Export with {'--activations' if quantised else '--precision'} {types[-1]}, or use another provider"
    return "Export with --target tensorrt, or use another provider"


def provider_list(provider: Provider) -> list[Any]:
    """What goes into ``InferenceSession(providers=...)``."""
    if provider.device == "cuda":
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        return [(provider.ort_name, {"arena_extend_strategy": "kSameAsRequested"}), "CPUExecutionProvider"]
    return [provider.ort_name]


def require_active(session: Any, provider: Provider) -> None:
    """Fail when a session silently fell back.

    Raises:
        ProviderUnavailableError: the provider that was asked for is not the session's first.
    """
    active = session.get_providers()
    if not active or active[0] != provider.ort_name:
        raise ProviderUnavailableError(
            f"provider {provider.name!r} was asked for, but the session runs on {', '.join(active) or 'nothing'}: "
            f"its libraries failed to load. To get it: {provider.install}"
        )
