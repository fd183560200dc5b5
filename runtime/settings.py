"""How a folder is opened on ONNX Runtime, in one place: :func:`runtime.load` takes these by name.

Try: ``runtime.load(folder, threads=2, session_options={"session.intra_op.allow_spinning": "0"})``.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from runtime.errors import SessionError

if TYPE_CHECKING:
    from runtime.tensorrt import Shapes


def cpu_name() -> str:
    """The processor's model, as its maker prints it."""
    import cpuinfo

    return str(cpuinfo.get_cpu_info().get("brand_raw") or platform.processor() or platform.machine())


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


MOST_THREADS = 1024
"""More than any machine has cores; ONNX Runtime takes minutes to start a hundred thousand."""


PREFILL_CHUNK = 256
"""Tokens of a prompt that one run takes on the CPU: docs/measurements/prefill.md."""


@dataclass(frozen=True)
class SessionSettings:
    """What :class:`runtime.ort_session.OrtSession` is opened with.

    Args:
        provider: ``cpu``, ``cuda``, ``tensorrt`` or ``tensorrt-rtx``.
        threads: intra-op threads on the CPU; None takes every core this process may use.
        huge_pages: on the CPU, move the packed weights into 2 MiB pages (:mod:`runtime.huge_pages`); opening takes
            longer by about 2.5 s per GB, each decode step is shorter.
        provider_options: options of the execution provider by ONNX Runtime's names, over the defaults.
        allow_fallback: a provider that does not load or take every node is a line in ``info.details``, no error.
        cuda_graph: on CUDA, capture a decode step as a CUDA graph.
        choose_on_device: choose tokens where the logits are; None does so on a GPU.
        shapes: what TensorRT builds its engines for (rows, prompt and new tokens); None for :class:`Shapes`' own.
        engine_home: where engines are kept; None keeps none (each opening builds them again).
        session_options: ONNX Runtime session configuration entries, such as ``session.intra_op.allow_spinning``.
        profile: where ONNX Runtime writes its profile of the decode graph (beginning of the file's name); None for no
            profile. See :meth:`runtime.ort_session.OrtSession.end_profile`.
        log_severity: of what ONNX Runtime prints on standard error: 2 warnings, 3 errors.
        prefill_chunk: on the CPU, most tokens of a prompt that one run takes, the others follow over the KV cache; 0
            takes all, None is :data:`PREFILL_CHUNK`. Graphs whose cache grows by Concat take all.
        one_graph: hold the decode or the scoring graph, whichever was asked last, never both: each packs the weights
            anew. Going from one to the other opens it again.
        any_runtime: open the folder under an ONNX Runtime older than its manifest demands, to see what happens.

    Raises:
        SessionError: a number of threads below 1, a negative chunk, or a profile with ``one_graph``.
    """

    provider: str = "cpu"
    threads: int | None = None
    huge_pages: bool = True
    provider_options: Mapping[str, str] | None = None
    allow_fallback: bool = False
    cuda_graph: bool = True
    choose_on_device: bool | None = None
    shapes: Shapes | None = None
    engine_home: Path | None = None
    session_options: Mapping[str, str] | None = None
    profile: Path | None = None
    log_severity: int = 3
    prefill_chunk: int | None = None
    one_graph: bool = False
    any_runtime: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise SessionError(
                f"{self.threads} threads make no sense; give 1 to {MOST_THREADS}, or none for every core"
            )
        if self.prefill_chunk is not None and self.prefill_chunk < 0:
            raise SessionError(
                f"a prefill chunk of {self.prefill_chunk} tokens makes no sense; give 0 for the whole prompt"
            )
        if self.one_graph and self.profile is not None:
            raise SessionError("a profile is the decode graph's from opening to end; it cannot be made with one_graph")


class MoreSettings(TypedDict, total=False):
    """The same for the type checker, as keywords of a call; ``provider`` and ``threads`` also go by their place."""

    huge_pages: bool
    provider_options: Mapping[str, str] | None
    allow_fallback: bool
    cuda_graph: bool
    choose_on_device: bool | None
    shapes: Shapes | None
    engine_home: Path | None
    session_options: Mapping[str, str] | None
    profile: Path | None
    log_severity: int
    prefill_chunk: int | None
    one_graph: bool
    any_runtime: bool
