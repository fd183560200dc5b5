"""TensorRT-RTX's own parser and compiler, which need no GPU: what it makes of a graph, layer by layer, and engines.

The only importer of TensorRT-RTX. What it refuses is a :class:`Fault` that names the node; nothing is run. It prints to
standard error by itself and holds 1.7 to 2.1 times the weights in memory, so commands call it in a child process
(:mod:`bench.process.trt_compile`).
Try: ``llama-onnx engine FOLDER --sm 89 --out /tmp/engines``.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from export.manifest import first_line, standard
from runtime.errors import CompilerMissingError, SessionError

INSTALL = "pip install 'llama-onnx-bench[tensorrt-rtx]'"
SMS = (75, 80, 86, 89, 120, 121)
"""Compute capabilities that TensorRT-RTX 1.7 compiles for, times 10 (no Hopper)."""
UNFUSED_TYPE = "fp32"
"""Activations for which TensorRT has no fused attention: prefill does not build (a decode step alone does)."""
EXPECTED_WARNINGS = (
    # Ids, positions, mask and write indices are int64 in ONNX, and int64 is what the runtime binds.
    r"Make sure input \S+ has Int64 binding",
)
"""Warnings that say nothing about the graph."""
_UNREAD = re.compile(r"Unused Input: (\S+)|Input Tensor (\S+) is unused")
IGNORED_INPUTS = {"Attention": {6: "nonpad_kv_seqlen"}}
"""By operator, inputs that the parser takes and never reads, most often without a warning."""
DECOMPOSABLE = "TRT_decomposable"
"""An attribute of TensorRT's own, by which it may do without a fused kernel."""
Ranges = Mapping[str, Sequence[Sequence[int]]]
"""Least, expected and greatest shape of every input: one optimisation profile."""


@dataclass(frozen=True)
class Fault:
    """What the compiler refuses or would leave out: ``where`` is a node, an input or ``SM 89``."""

    where: str
    what: str


@dataclass(frozen=True)
class Layer:
    """One layer of the parsed network: its type in TensorRT, its name, the values that it reads and writes."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """An engine for one compute capability, of ``nbytes`` bytes; it may be used where it has no ``faults``."""

    sm: int
    seconds: float
    nbytes: int
    sha256: str
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a graph. Of a graph with ``faults`` no engine is built."""

    compiler: str
    faults: tuple[Fault, ...]
    layers: tuple[Layer, ...]
    warnings: tuple[str, ...]
    engines: tuple[Engine, ...]

    def kinds(self) -> dict[str, int]:
        """Layers by type, the most frequent first."""
        return dict(Counter(layer.kind for layer in self.layers).most_common())


def version() -> str:
    """Version of the compiler that is installed.

    Raises:
        CompilerMissingError: none is, or it does not load.
    """
    return str(_tensorrt().__version__)


def parse_sms(text: str) -> tuple[int, ...]:
    """``89,120`` as numbers.

    Raises:
        SessionError: the compiler knows no such GPU.
    """
    names = [part.strip().removeprefix("sm").replace(".", "") for part in text.lower().split(",") if part.strip()]
    strange = [n for n in names if n not in map(str, SMS)]
    if strange or not names:
        raise SessionError(
            f"--sm {text!r}: TensorRT-RTX compiles for {', '.join(map(str, SMS))} (compute capability times 10)"
        )
    return tuple(dict.fromkeys(map(int, names)))


def compile_graph(
    graph: Path, profiles: Sequence[Ranges] = (), sms: Sequence[int] = (), out: Path | None = None
) -> Compiled:
    """Parse a graph, and build one engine for each compute capability.

    Args:
        graph: the ONNX file; its external data are read from beside it as they are needed.
        profiles: optimisation profiles that every engine has, in this order.
        sms: of :data:`SMS`; none only parses.
        out: a folder for the engines, ``sm89.engine``; None throws them away.

    Raises:
        CompilerMissingError: see :func:`version`.
    """
    trt = _tensorrt()
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    layers: tuple[Layer, ...] = ()
    if parser.parse_from_file(str(graph)):
        layers = tuple(_layer(network.get_layer(k)) for k in range(network.num_layers))
        faults = _silent(graph)
    else:
        refused = [_refusal(parser.get_error(k)) for k in range(parser.num_errors)]
        faults = refused or [Fault(graph.name, "cannot be parsed: " + log.reasons()[-1])]
    engines = [_build(trt, builder, network, log, profiles, sm, out) for sm in sms if not faults]
    return Compiled(str(trt.__version__), tuple(faults), layers, log.strange(), tuple(engines))


def _tensorrt() -> Any:
    try:
        import tensorrt_rtx_libs  # noqa: F401, I001  (loads the libraries that the bindings link to)
        import tensorrt_rtx_bindings
    except (ImportError, OSError) as e:
        why = "is not installed" if isinstance(e, ModuleNotFoundError) else f"does not load ({first_line(e)})"
        raise CompilerMissingError(f"TensorRT-RTX's compiler {why}: {INSTALL}") from None
    return tensorrt_rtx_bindings


def _logger(trt: Any) -> Any:
    """Collects warnings and errors; TensorRT's own logger would print them."""

    class Log(trt.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.warnings: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.Logger.WARNING:
                self.warnings.append(message.strip())
            elif severity < trt.Logger.WARNING:
                self.errors.append(message.strip())

        def reasons(self) -> list[str]:
            said = filter(None, map(_plain, self.errors))
            return list(dict.fromkeys(said)) or ["no reason given"]

        def unread(self) -> list[str]:
            found = (m for w in self.warnings for m in _UNREAD.finditer(w))
            return list(dict.fromkeys(m[1] or m[2] for m in found))

        def strange(self) -> tuple[str, ...]:
            usual = (*EXPECTED_WARNINGS, _UNREAD.pattern)
            return tuple(dict.fromkeys(w for w in self.warnings if not any(re.search(u, w) for u in usual)))

    return Log()


_NOISE = re.compile(
    r"\[?\w+(\.\w+)?:\d+:( \w+\])? |\[[\w.:]+\] |\w+::\w+: |Error Code \d+: |API Usage Error |Myelin |"
    r"MyelinCheckException: |CHECK\([^ ]*\) failed\. |\.? In \S+ at \S+:\d+| \(See [^)]*\)"
)


def _plain(message: str) -> str:
    """An error of TensorRT's without where in its own source it was raised."""
    # Without a GPU every error is followed by one that says so.
    lines = [line for line in message.splitlines() if "cudaError" not in line]
    return _NOISE.sub("", " ".join(" ".join(lines).split())).strip(" ()")[:300]


def _layer(layer: Any) -> Layer:
    inputs = [layer.get_input(k) for k in range(layer.num_inputs)]
    outputs = [layer.get_output(k) for k in range(layer.num_outputs)]
    kind = str(layer.type).rpartition(".")[2]
    return Layer(kind, layer.name, *(tuple(t.name for t in ts if t is not None) for ts in (inputs, outputs)))


def _refusal(error: Any) -> Fault:
    """A parser's error; many say no more than the condition that did not hold."""
    said = _plain(error.desc())
    if error.node() < 0:
        return Fault("graph", f"cannot be parsed: {said}")
    what = "is not supported" if said in ("", "false") else f"is refused: {said}"
    return Fault(error.node_name() or f"node {error.node()}", f"operator {error.node_operator()} {what}")


def _silent(graph: Path) -> list[Fault]:
    """What TensorRT takes without a word: inputs of nodes that it never reads, leave to pull an attention apart."""
    import onnx

    found = []
    for node in onnx.load(graph, load_external_data=False).graph.node:
        where = node.name or node.output[0]
        for k, name in IGNORED_INPUTS.get(node.op_type if not standard(node.domain) else "", {}).items():
            if len(node.input) > k and node.input[k]:
                what = f"TensorRT ignores {name} of {node.op_type} without an error; the mask has to say it"
                found.append(Fault(where, what))
        if any(a.name == DECOMPOSABLE and a.i for a in node.attribute):
            found.append(
                Fault(where, f"{DECOMPOSABLE} lets TensorRT pull {node.op_type} apart into MatMul and Softmax")
            )
    return found


class _Writer:
    """Counts, hashes and keeps an engine's bytes as they come: a second copy of a 13 GB engine is not needed."""

    def __init__(self, file: BinaryIO | None) -> None:
        self.file, self.nbytes, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.nbytes += len(data)
        if self.file is not None:
            self.file.write(data)
        return len(data)


@contextmanager
def _opened(out: Path | None, sm: int) -> Iterator[BinaryIO | None]:
    if out is None:
        yield None
    else:
        with engine_file(out, sm).open("wb") as f:
            yield f


def engine_file(folder: Path, sm: int) -> Path:
    """Where the engine for a compute capability is kept."""
    return folder / f"sm{sm}.engine"


def _build(
    trt: Any, builder: Any, network: Any, log: Any, profiles: Sequence[Ranges], sm: int, out: Path | None
) -> Engine:
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, *map(tuple, shapes))
        config.add_optimization_profile(profile)
    log.errors.clear()
    started = time.perf_counter()
    with _opened(out, sm) as file:
        kept = _Writer(file)
        stream = type("Stream", (trt.IStreamWriter,), {"write": lambda _self, data: kept.write(data)})()
        good = builder.build_serialized_network_to_stream(network, config, stream)
    seconds = time.perf_counter() - started
    faults = [Fault(name, "is an input that TensorRT never reads") for name in log.unread()]
    faults += [] if good else [Fault(f"SM {sm}", f"no engine: {why}") for why in log.reasons()]
    return Engine(sm, seconds, kept.nbytes, kept.digest.hexdigest(), tuple(faults))
