"""Execution providers by name, and what to do about one that is not there.

ONNX Runtime falls back to the CPU without an error when a provider fails to load, so every session is asked
afterwards which provider it really has.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import io
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_inference_collection

from export.manifest import ATTENTIONS, MATMULS, NORMS, Manifest, first_line
from runtime.errors import ProviderUnavailableError, UnknownProviderError
from runtime.provider_options import options_of

_FATAL = 4  # of the severities of onnxruntime's log, the highest
RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"
_OTHERS = ("Gemm", "FusedMatMul", "RotaryEmbedding", "Softmax", "QuickGelu", "TensorScatter", "DequantizeLinear")
WORK = frozenset((*ATTENTIONS, *NORMS, *MATMULS, *_OTHERS))
"""Operators that a GPU provider must not leave to the CPU."""


@dataclass(frozen=True)
class Provider:
    """One execution provider: our name, ONNX Runtime's, the device its memory is on, how to install it.

    ``runs`` holds, by attention operator, the activation types that it has kernels for; ``library`` the file of
    onnxruntime's own that holds the provider; ``plugin`` how the distribution starts that brings it instead.
    """

    name: str
    ort_name: str
    device: str
    runs: Mapping[str, tuple[str, ...]]
    install: str
    library: str = ""
    plugin: str = ""


_PARTS = r"(onnxruntime|tensorrt|torch$|nvidia-(cuda-runtime|cudnn|cublas|cufft|curand|ml-py))"
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
            "libonnxruntime_providers_cuda.so",
        ),
        Provider(
            "tensorrt",
            "TensorrtExecutionProvider",
            "cuda",
            _STANDARD,
            "pip uninstall onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]' 'tensorrt-cu13>=10.15,<11'",
            "libonnxruntime_providers_tensorrt.so",
        ),
        Provider(
            "tensorrt-rtx",
            "NvTensorRTRTXExecutionProvider",
            "cuda",
            {**_STANDARD, "Attention": ("fp16", "bf16")},  # its compiler has no fused attention in fp32
            "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13",
            plugin="onnxruntime-ep-nv-tensorrt-rtx",
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
    if provider.device != "cpu":
        _silence()
    if provider.plugin:
        register_plugin(provider)
    elif provider.ort_name not in ort.get_available_providers():
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


@cache
def _silence() -> None:
    """Once: what does not load is told by our errors in a line; onnxruntime says it in up to 30, on standard output as
    well, which is for a command's result.
    """
    ort.set_default_logger_severity(_FATAL)
    # All that this module prints is that a session falls back.
    vars(onnxruntime_inference_collection)["print"] = lambda *_: None


@cache
def _preload() -> None:
    """Once: load NVIDIA's libraries from their Python packages; :func:`library_trouble` tells what is missing."""
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def _remedy(provider: Provider, manifest: Manifest) -> str:
    """What to export instead."""
    types = provider.runs.get(manifest.attention, ())
    if provider.name == "cuda" and manifest.activations == "fp32":
        return "Export with --provider cuda (standard operators), or with --precision fp16"
    if types:
        quantised = manifest.quantisation is not None
        return f"Export with {'--activations' if quantised else '--precision'} {types[-1]}, or use another provider"
    return "Export with --target tensorrt, or use another provider"


def provider_list(provider: Provider, options: Mapping[str, str] | None = None) -> list[Any]:
    """What goes into ``InferenceSession(providers=...)``; empty for a plugin (see :func:`attach`)."""
    if provider.plugin:
        return []
    if provider.device == "cuda":
        _preload()
        mine = options_of(provider.name) if options is None else dict(options)
        if provider.name == "tensorrt":
            return [(provider.ort_name, mine), PROVIDERS["cuda"].ort_name, "CPUExecutionProvider"]
        return [(provider.ort_name, mine), "CPUExecutionProvider"]
    return [provider.ort_name]


def attach(session_options: Any, provider: Provider, options: Mapping[str, str] | None = None) -> None:
    """What a provider wants in the session's options: placement is recorded, a plugin's devices are named there."""
    session_options.add_session_config_entry(RECORD_PLACEMENT, "1")
    if provider.plugin:
        devices = [d for d in ort.get_ep_devices() if d.ep_name == provider.ort_name]
        mine = options_of(provider.name) if options is None else dict(options)
        session_options.add_provider_for_devices(devices, mine)


def register_plugin(provider: Provider) -> None:
    """Load the library of a provider that comes as a plugin; once in a process.

    Raises:
        ProviderUnavailableError: not installed, does not load, or finds no device.
    """
    if any(d.ep_name == provider.ort_name for d in ort.get_ep_devices()):
        return
    library = plugin_library(provider.plugin)
    if library is None:
        raise ProviderUnavailableError(
            f"provider {provider.name!r} is not installed: no distribution {provider.plugin}* here. "
            f"To get it: {provider.install}"
        )
    try:
        ort.register_execution_provider_library(provider.ort_name, str(library))
    except Exception as e:  # onnxruntime raises its own C++-bound classes
        raise ProviderUnavailableError(
            f"provider {provider.name!r} does not load: {first_line(e)}. {found_versions()} "
            f"To get it: {provider.install}"
        ) from None
    if not any(d.ep_name == provider.ort_name for d in ort.get_ep_devices()):
        raise ProviderUnavailableError(
            f"provider {provider.name!r} loads but finds no device; check the driver with nvidia-smi"
        )


def installed(names: str) -> dict[str, importlib.metadata.Distribution]:
    """Installed distributions by name (lower case, hyphens), those whose name begins with the pattern ``names``."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        name = str(distribution.metadata["Name"] or "").lower().replace("_", "-")
        if re.match(names, name):
            found.setdefault(name, distribution)  # the first one on the path is the one that is imported
    return dict(sorted(found.items()))


def plugin_library(prefix: str) -> Path | None:
    """The shared library in the installed distribution whose name starts with ``prefix``, None without one."""
    for distribution in installed(re.escape(prefix)).values():
        for file in distribution.files or ():
            if re.search(r"onnxruntime_providers_\w+\.(so|dll)$", file.name):
                return Path(str(distribution.locate_file(file)))
    return None


def require_active(session: Any, provider: Provider, allow_fallback: bool = False) -> str | None:
    """Fail when a session silently fell back; with ``allow_fallback`` say so instead.

    Raises:
        ProviderUnavailableError: the provider that was asked for is not the session's first; names the library.
    """
    active = session.get_providers()
    if active and active[0] == provider.ort_name:
        return None
    where = ", ".join(active) or "nothing"
    cause = library_trouble(provider) or "its libraries failed to load"
    if allow_fallback:
        return f"{provider.name} was asked for, runs on {where}: {cause}"
    raise ProviderUnavailableError(
        f"provider {provider.name!r} was asked for, but the session runs on {where}: {cause}. {found_versions()} "
        f"To get it: {provider.install}"
    )


def library_trouble(provider: Provider) -> str | None:
    """What the system's loader says about the provider's library, such as the library that this one lacks."""
    if not provider.library:
        return None
    path = Path(ort.__file__).parent / "capi" / provider.library
    if not path.is_file():
        return f"this onnxruntime has no {provider.library}"
    try:
        ctypes.CDLL(str(path))
    except OSError as e:
        lacking = re.match(r"(\S+): cannot open shared object file", str(e))
        if lacking and lacking.group(1) != str(path):
            return f"{provider.library} needs {lacking.group(1)}, which is not there"
        return str(e)[:200]
    return None


def packages() -> dict[str, str]:
    """Versions of the installed distributions that the providers are made of: ONNX Runtime, CUDA, cuDNN, TensorRT."""
    return {name: d.version for name, d in installed(_PARTS).items()}


def found_versions() -> str:
    """The same as a sentence."""
    return f"Found here: {', '.join(f'{n} {v}' for n, v in packages().items()) or 'none of its packages'}."


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a session run: nodes by execution provider, and by provider the attention operators.

    ``work_on_cpu`` names the operators with real work there; shapes and scalars may be on the CPU.
    """

    nodes: Mapping[str, int]
    attention: Mapping[str, str]
    work_on_cpu: frozenset[str] = frozenset()

    def describe(self) -> str:
        """For the record, such as ``346 on CPUExecutionProvider``."""
        return ", ".join(f"{n} on {name}" for name, n in self.nodes.items()) or "not recorded"


def placement(session: Any) -> Placement:
    """What ONNX Runtime assigned to whom; empty where this version cannot tell."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return Placement({}, {})
    nodes: Counter[str] = Counter()
    attention: dict[str, str] = {}
    work: set[str] = set()
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            nodes[part.ep_name] += 1
            if node.op_type in ATTENTIONS:
                attention[part.ep_name] = node.op_type
            if node.op_type in WORK and part.ep_name == "CPUExecutionProvider":
                work.add(node.op_type)
    return Placement(dict(nodes.most_common()), attention, frozenset(work))


def require_placed(found: Placement, provider: Provider, allow_fallback: bool) -> str | None:
    """Fail when nodes that do the work landed on another provider than was asked for.

    Args:
        found: from :func:`placement`.
        provider: what was asked for.
        allow_fallback: say it instead.

    Raises:
        ProviderUnavailableError: such nodes, named.
    """
    others = {name: n for name, n in found.nodes.items() if name not in (provider.ort_name, "CPUExecutionProvider")}
    if provider.name == "tensorrt":
        others.pop(PROVIDERS["cuda"].ort_name, None)  # its own fallback for what the parser leaves
    strays = () if provider.device == "cpu" else sorted(found.work_on_cpu)
    if not others and not strays:
        return None
    names = [f"{n} nodes on {name}" for name, n in others.items()]
    names += [f"{', '.join(strays)} on the CPU"] if strays else []
    if allow_fallback:
        return f"not everything runs on {provider.name}: {'; '.join(names)}"
    raise ProviderUnavailableError(
        f"not everything runs on {provider.name!r}: {'; '.join(names)}. Export for it (--target, --precision), "
        f"or accept it with --allow-fallback"
    )
