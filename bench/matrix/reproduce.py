"""One Python file to attach to a bug report: the smallest part of a graph over which two ONNX Runtimes differ.

It needs onnxruntime and numpy only, holds the cut-out model, its real inputs and what the right runtime makes of them,
and exits with 1 where the installed runtime makes something else. What is not needed is cut off: columns of a weight,
tokens, rows of a batch, heads, unused rows of tables. After each cut both runtimes are asked whether they differ still.
Try: ``python -m pytest tests/bench/matrix/test_reproduce.py``.
"""

from __future__ import annotations

import base64
import io
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bench.errors import BenchError
from bench.gate.localize import link_or_copy
from bench.matrix.differ import Difference, Runner, RunnerError, Values
from bench.matrix.rounding import SMALL, SPREAD, gap
from bench.matrix.scenarios import Scenario
from bench.matrix.subgraphs import hold

LIMIT_BYTES = 1_000_000
"""A larger file is not taken by most issue trackers."""
WIDTHS = (16, 64, 256, 1024)
"""Columns of a weight that are kept, the first of these that still differ; kernels work in blocks of such sizes."""
TOKENS = (1, 2, 8, 32, 128, 512)
MANTISSA = (10, 7)
"""Bits of fp32's 23 that are kept where the file is too large: what is 0 compresses."""
PLAIN = (1, 2, 3, 6, 7, 9, 10, 11)
"""ONNX types that numpy has as well, so that their data can be read in part."""


@dataclass(frozen=True)
class _State:
    """A part of a graph with its values; ``skeleton`` has no weights in it."""

    skeleton: Any
    weights: Values
    feeds: Values
    scenario: Scenario

    def model(self) -> Any:
        made = onnx.ModelProto()
        made.CopyFrom(self.skeleton)
        made.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in self.weights.items())
        return made

    @property
    def node(self) -> Any:
        """The last node: the one, but for what is constant in front of it."""
        return self.skeleton.graph.node[-1]

    def with_attributes(self, **values: int) -> Any:
        """The skeleton with other attributes of its node."""
        skeleton = onnx.ModelProto()
        skeleton.CopyFrom(self.skeleton)
        node = skeleton.graph.node[-1]
        kept = [a for a in node.attribute if a.name not in values]
        del node.attribute[:]
        node.attribute.extend([*kept, *(helper.make_attribute(n, v) for n, v in values.items())])
        return skeleton


@dataclass(frozen=True)
class _Worst:
    """The element of the outputs that differs most: its output, and where in it."""

    output: str
    place: tuple[int, ...]

    def at(self, axis: int) -> int:
        return self.place[axis] if len(self.place) > abs(axis) - (axis < 0) else 0


Cut = Callable[[_State, _Worst], Iterable[_State]]


def write_reproduction(
    difference: Difference, path: Path, reference: Runner, other: Runner, provider: str = "CPUExecutionProvider"
) -> int:
    """Write the file.

    Args:
        difference: of :func:`bench.matrix.differ.differ`, with a ``case``.
        path: of the file.
        reference, other: the same runtimes.
        provider: ONNX Runtime's name of it.

    Returns:
        its size in bytes; above :data:`LIMIT_BYTES` where nothing smaller differs.

    Raises:
        BenchError: no part of the graph differs, only the whole.
    """
    case = difference.case
    if case is None:
        raise BenchError("only the whole graph differs: attach the folder itself, no part of it shows the difference")
    with tempfile.TemporaryDirectory() as work:
        graph = Path(work) / "cut.onnx"

        def compare(model: Any, feeds: Values, scenario: Scenario) -> tuple[Values, Values, str] | None:
            """Both sides' outputs and the other's error, None where they agree or the reference refuses."""
            onnx.save_model(model, graph)
            names = [o.name for o in model.graph.output]
            try:
                theirs = reference.run(graph, feeds, names)
            except RunnerError:
                return None
            try:
                ours = other.run(graph, feeds, names)
            except RunnerError as e:
                return (theirs, {}, str(e).replace(f"{work}/", "")) if difference.error else None
            worst = max(gap(scenario.counted(ours[n]), scenario.counted(theirs[n])) for n in names)
            return (theirs, ours, "") if worst > case.limit and not difference.error else None

        for name in {e.value for t in case.model.graph.initializer for e in t.external_data if e.key == "location"}:
            (Path(work) / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy((case.folder / name).resolve(), Path(work) / name)
        state = _state(case.model, case.feeds, case.scenario, Path(work))
        found = compare(case.model, case.feeds, case.scenario)
        if found is None:
            raise BenchError(f"{difference.what}: it did not differ again; the difference comes and goes")
        theirs, ours, error = found
        worst = _worst(ours, theirs, state.scenario)
        for cut in CUTS:
            for smaller in cut(state, worst):
                if (found := compare(smaller.model(), smaller.feeds, smaller.scenario)) is not None:
                    state, (theirs, ours, error) = smaller, found
                    worst = _worst(ours, theirs, state.scenario)
                    break
        labels = (reference.label, other.label, provider)
        text = _script(difference, state, theirs, error, *labels)
        for bits in MANTISSA:
            if len(text) < LIMIT_BYTES:
                break
            shorter = _rounded(state, bits)
            if (found := compare(shorter.model(), shorter.feeds, shorter.scenario)) is not None:
                text = _script(difference, shorter, found[0], found[2], *labels)
    path.write_text(text, encoding="utf-8")
    return path.stat().st_size


def _state(model: Any, feeds: Values, scenario: Scenario, folder: Path) -> _State:
    """The model taken apart; weights outside of it are mapped, not read."""
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model)
    weights: Values = {}
    for tensor in skeleton.graph.initializer:
        place = {e.key: e.value for e in tensor.external_data}
        if place and tensor.data_type in PLAIN:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            start, shape = int(place.get("offset", 0)), tuple(tensor.dims)
            weights[tensor.name] = np.memmap(folder / place["location"], dtype, "r", start, shape)
        else:
            hold(tensor, folder)
            weights[tensor.name] = numpy_helper.to_array(tensor)
    del skeleton.graph.initializer[:]
    return _State(skeleton, weights, feeds, scenario)


def _worst(ours: Values, theirs: Values, scenario: Scenario) -> _Worst:
    gaps = {n: gap(scenario.counted(ours[n]), scenario.counted(v)) for n, v in theirs.items() if n in ours}
    name = max(gaps, key=lambda n: gaps[n], default=next(iter(theirs)))
    value = theirs[name]
    if name not in ours or ours[name].shape != value.shape or not value.ndim or not value.size:
        return _Worst(name, tuple(n - 1 for n in value.shape))
    kept = _mask(scenario, value)
    error = np.abs(ours[name].astype(np.float64) - value.astype(np.float64))
    error = np.where(kept, np.nan_to_num(error, nan=np.inf), -1)
    usual = np.sqrt((value.astype(np.float64) ** 2).mean(axis=-1, keepdims=True))
    place = np.unravel_index(int((error / np.maximum(usual + np.abs(value), 1e-30)).argmax()), value.shape)
    return _Worst(name, tuple(int(k) for k in place))


def _mask(scenario: Scenario, value: NDArray[Any]) -> NDArray[np.bool_]:
    """Which elements count."""
    numbers = np.arange(value.size).reshape(value.shape)
    kept = np.zeros(value.size, bool)
    kept[scenario.counted(numbers).reshape(-1)] = True
    return kept.reshape(value.shape)


# -- cuts: each gives smaller states, the smallest first ------------------------------------------------------------


def _batch_row(s: _State, worst: _Worst) -> Iterator[_State]:
    """One row of the batch, or two."""
    batch = len(s.scenario.new)
    for size in (1, 2):
        if size < batch:
            first = min(worst.at(0), batch - size)
            rows = slice(first, first + size)
            feeds = {n: v[rows] if v.ndim and len(v) == batch else v for n, v in s.feeds.items()}
            scenario = replace(s.scenario, new=s.scenario.new[rows], slots=s.scenario.slots[rows])
            yield replace(s, feeds=feeds, scenario=scenario)


def _columns(s: _State, worst: _Worst) -> Iterator[_State]:
    """A few columns of the one weight of a product."""
    node, attributes = s.node, {a.name: helper.get_attribute_value(a) for a in s.node.attribute}
    if node.op_type not in ("MatMul", "Gemm", "MatMulNBits") or any(i in s.feeds for i in node.input[1:]):
        return
    if node.op_type == "MatMulNBits":
        columns = attributes["N"]
        own = {n for k, n in enumerate(node.input) if n and k in (1, 2, 3, 5)}
    else:
        transposed = bool(attributes.get("transB", 0))
        own = set(s.weights)
        sizes = [v.shape[0 if transposed else -1] for v in s.weights.values() if v.ndim > 1]
        if len(set(sizes)) != 1:
            return
        columns = sizes[0]
    for width in WIDTHS:
        if width >= columns:
            return
        first = worst.at(-1) // width * width
        part = slice(first, first + width)
        weights = dict(s.weights)
        for name in own:
            value = s.weights[name]
            if node.op_type == "MatMulNBits":
                kept = np.asarray(value).reshape(columns, -1)[part]
                weights[name] = kept.reshape(len(kept), *value.shape[1:]) if value.ndim > 1 else kept.reshape(-1)
            elif value.ndim > 1 and transposed:
                weights[name] = value[part]
            elif value.ndim and value.shape[-1] == columns:
                weights[name] = value[..., part]
        narrow = len(range(*part.indices(columns)))
        skeleton = s.with_attributes(N=narrow) if node.op_type == "MatMulNBits" else s.skeleton
        yield replace(s, skeleton=skeleton, weights=weights)


def _heads(s: _State, worst: _Worst) -> Iterator[_State]:
    """One key-value head of a GroupQueryAttention, with the query heads that read it."""
    node, attributes = s.node, {a.name: helper.get_attribute_value(a) for a in s.node.attribute}
    if node.op_type != "GroupQueryAttention" or any(node.input[9:]):
        return
    heads, kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
    past = s.feeds.get(node.input[3])
    if kv_heads < 2 or past is None:
        return
    size, group = past.shape[3], heads // kv_heads
    present = worst.output in list(node.output)[1:]
    one = worst.at(1) if present else worst.at(-1) // size // group
    feeds, shares = dict(s.feeds), {node.input[0]: heads, node.input[1]: kv_heads, node.input[2]: kv_heads}
    packed = not node.input[1]

    def columns(value: NDArray[Any], first: int, count: int) -> NDArray[Any]:
        return value[..., first * size : (first + count) * size]

    for name, number in shares.items():
        if not name:
            continue
        if name not in feeds:
            return
        value = feeds[name]
        if packed:
            q = columns(value, one * group, group)
            k, v = (columns(value, heads + part * kv_heads + one, 1) for part in range(2))
            feeds[name] = np.concatenate([q, k, v], axis=-1)
        else:
            feeds[name] = columns(value, one * (number // kv_heads), number // kv_heads)
    for name in node.input[3:5]:
        feeds[name] = feeds[name][:, one : one + 1]
    yield replace(s, skeleton=s.with_attributes(num_heads=group, kv_num_heads=1), feeds=feeds)


def _shortened(s: _State, feeds: Values, past: int, new: int) -> _State | None:
    """A GroupQueryAttention that is told of so many tokens; None where its lengths are no inputs."""
    lengths, total = s.node.input[5:7]
    if lengths not in feeds or total not in feeds:
        return None
    ends = np.minimum(feeds[lengths], past + new - 1).astype(np.int32)
    feeds = {**feeds, lengths: ends, total: np.full_like(feeds[total], past + new)}
    counted = replace(s.scenario, new=s.scenario.new[:, :new], slots=np.arange(past + new)[None] <= ends.reshape(-1, 1))
    return replace(s, feeds=feeds, scenario=counted)


def _past(s: _State, _worst: _Worst) -> Iterator[_State]:
    """The beginning of the past that a GroupQueryAttention reads."""
    node, (new, total) = s.node, (s.scenario.new.shape[1], s.scenario.slots.shape[1])
    if node.op_type != "GroupQueryAttention" or node.input[3] not in s.feeds:
        return
    for kept in TOKENS:
        if kept < total - new:
            feeds = {**s.feeds, **{n: s.feeds[n][:, :, :kept] for n in node.input[3:5]}}
            if (shorter := _shortened(s, feeds, kept, new)) is not None:
                yield shorter


def _tokens(s: _State, worst: _Worst) -> Iterator[_State]:
    """The worst token alone, or the first ones."""
    new, total = s.scenario.new.shape[1], s.scenario.slots.shape[1]
    attention = s.node.op_type == "GroupQueryAttention"
    for first, count in [*([] if attention else [(worst.at(1), 1)]), *((0, n) for n in TOKENS)]:
        if count >= new:
            return
        part = slice(first, first + count)
        feeds: Values = {n: _of_tokens(v, new, part) for n, v in s.feeds.items()}
        if attention:
            feeds |= {n: s.feeds[n] for n in s.node.input[3:5] if n in s.feeds}
            if (shorter := _shortened(s, feeds, total - new, count)) is not None:
                yield shorter
            continue
        slots = s.scenario.slots[:, : total - new + count]
        yield replace(s, feeds=feeds, scenario=replace(s.scenario, new=s.scenario.new[:, part], slots=slots))


def _of_tokens(value: NDArray[Any], new: int, part: slice) -> NDArray[Any]:
    """Those of the new tokens, where a value has an axis for them."""
    if value.ndim in (2, 3) and value.shape[1] == new:
        return value[:, part]
    return value[:, :, part] if value.ndim == 4 and value.shape[2] == new else value


def _tables(s: _State, _worst: _Worst) -> Iterator[_State]:
    """Of embeddings and of rotary tables, the rows that are read."""
    node, weights = s.node, dict(s.weights)
    rotary = {"GroupQueryAttention": node.input[7:9], "RotaryEmbedding": node.input[1:3]}.get(node.op_type, ())
    positions = [int(v.max()) + 1 for v in s.feeds.values() if v.dtype == np.int64 and v.size]
    used = max([s.scenario.slots.shape[1], *positions])
    for rows in (used, used + 1, used + 32) if rotary else ():  # a kernel may wrongly read a later one
        yield replace(s, weights={n: v[:rows] if n in rotary else v for n, v in weights.items()})
    if node.op_type in ("Gather", "GatherBlockQuantized") and node.input[1] in s.feeds:
        ids = s.feeds[node.input[1]]
        read, places = np.unique(ids, return_inverse=True)
        tables = [n for n in (node.input[0], *node.input[2:]) if n in weights]
        feeds = {**s.feeds, node.input[1]: places.reshape(ids.shape).astype(ids.dtype)}
        yield replace(s, weights={n: weights[n][read] if n in tables else v for n, v in weights.items()}, feeds=feeds)
        for name in tables:  # where the id itself matters: rows that are not read become 0, which compresses
            whole = np.zeros((int(read.max()) + 1, *weights[name].shape[1:]), weights[name].dtype)
            whole[read] = weights[name][read]
            weights[name] = whole
        yield replace(s, weights=weights)


def _rounded(s: _State, bits: int) -> _State:
    """Every fp32 number with so many bits of its mantissa."""

    def of(values: Mapping[str, NDArray[Any]]) -> Values:
        keep = np.uint32((0xFFFFFFFF << (23 - bits)) & 0xFFFFFFFF)
        return {
            n: (np.ascontiguousarray(v).view(np.uint32) & keep).view(np.float32) if v.dtype == np.float32 else v
            for n, v in values.items()
        }

    return replace(s, weights=of(s.weights), feeds=of(s.feeds))


CUTS: tuple[Cut, ...] = (_batch_row, _columns, _heads, _past, _tokens, _tables)


# -- the file -------------------------------------------------------------------------------------------------------


def _script(d: Difference, s: _State, theirs: Values, error: str, good: str, bad: str, provider: str) -> str:
    assert d.case is not None
    model = s.model()
    expected = {
        n: np.where(_mask(s.scenario, v), v, np.asarray(np.nan, v.dtype)) if v.dtype.kind == "f" else v
        for n, v in theirs.items()
    }
    arrays = {f"input{k}": v for k, v in enumerate(s.feeds.values())}
    arrays |= {f"output{k}": v for k, v in enumerate(expected.values())}
    arrays["model"] = np.frombuffer(model.SerializeToString(), np.uint8)
    blob = io.BytesIO()
    np.savez_compressed(blob, **arrays)  # type: ignore[arg-type]
    said = f"{bad} stops: {error}" if error else f"{bad} differs from {good}"
    lines = [said, "", *textwrap.wrap(d.what, 110), f"Seen in: {d.scenario}.", ""]
    for node in model.graph.node:
        lines += _described(node, model, s.feeds, theirs)
    opsets = ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import)
    lines += [f"Opsets: {opsets}. IR version {model.ir_version}.", ""]
    lines += [f"Expected outputs are {good}'s. Inputs and weights are real ones, cut as far as the difference stays."]
    lines += ["Run: python THIS_FILE [PROVIDER]; exit code 1 where the installed onnxruntime differs, else 0."]
    text = base64.b64encode(blob.getvalue()).decode()
    if len(text) > LIMIT_BYTES:
        lines.append(f"This file is larger than {LIMIT_BYTES:,} bytes: nothing smaller was found that differs.")
    return _TEMPLATE.format(
        header="\n".join(f"# {part}".rstrip() for line in lines for part in line.splitlines() or [""]),
        provider=provider,
        inputs=list(s.feeds),
        outputs=list(theirs),
        limit=d.case.limit,
        options=dict(d.case.session_options),
        small=SMALL,
        spread=SPREAD,
        data="\n".join(text[k : k + 116] for k in range(0, len(text), 116)),
    )


def _described(node: Any, model: Any, feeds: Values, outputs: Values) -> list[str]:
    """Operator, attributes, and shapes of inputs and outputs."""
    stored = {t.name: t for t in model.graph.initializer}
    lines = [f"{node.domain or 'ai.onnx'}::{node.op_type} ({node.name})"]
    lines += [f"  {a.name} = {helper.get_attribute_value(a)!r}" for a in node.attribute]
    for kind, names in (("input", node.input), ("output", node.output)):
        for k, name in enumerate(names):
            if name in stored:
                t = stored[name]
                lines.append(f"  {kind} {k}: {list(t.dims)} {onnx.TensorProto.DataType.Name(t.data_type)}, a weight")
            elif (value := feeds.get(name, outputs.get(name))) is not None:
                lines.append(f"  {kind} {k}: {list(value.shape)} {value.dtype}")
    return lines


_TEMPLATE = '''{header}

import base64
import io
import sys

import numpy as np
import onnxruntime as ort

INPUTS = {inputs}
OUTPUTS = {outputs}
LIMIT = {limit!r}  # relative error that rounding explains
SESSION_OPTIONS = {options}


def relative_error(found, expected):
    """Largest error of a row by norm, or of one element by {spread:g}; rows of padding are NaN in what is expected."""
    if found.shape != expected.shape:
        return float("inf")
    if expected.dtype.kind != "f":
        return 0.0 if np.array_equal(found, expected) else float("inf")
    width = expected.shape[-1] if expected.ndim else 1
    a, b = found.astype(np.float64).reshape(-1, width), expected.astype(np.float64).reshape(-1, width)
    counted = np.isfinite(b).all(axis=-1)
    a, b = a[counted], b[counted]
    if not np.isfinite(a).all():
        return float("inf")
    if not b.size:
        return 0.0
    norms = np.linalg.norm(b, axis=-1)
    norms = np.maximum(norms, max({small} * np.median(norms), 1e-30))
    error = np.abs(a - b)
    usual = norms[:, None] / np.sqrt(width)
    return float(max((np.linalg.norm(error, axis=-1) / norms).max(), (error / (usual + np.abs(b))).max() / {spread}))


def main():
    provider = sys.argv[1] if len(sys.argv) > 1 else {provider!r}
    data = np.load(io.BytesIO(base64.b64decode(DATA)))
    print("onnxruntime", ort.__version__, provider)
    options = ort.SessionOptions()
    for key, value in SESSION_OPTIONS.items():
        options.add_session_config_entry(key, value)
    try:
        session = ort.InferenceSession(data["model"].tobytes(), options, providers=[provider])
        found = session.run(OUTPUTS, {{name: data[f"input{{k}}"] for k, name in enumerate(INPUTS)}})
    except Exception as error:
        print("stops:", str(error).splitlines()[0])
        return 1
    errors = [relative_error(value, data[f"output{{k}}"]) for k, value in enumerate(found)]
    for name, error in zip(OUTPUTS, errors):
        print(f"{{name}}: relative error {{error:.3g}}")
    differs = max(errors) > LIMIT
    print(f"largest relative error {{max(errors):.3g}}, limit {{LIMIT:.3g}}:", "DIFFERS" if differs else "as expected")
    return int(differs)


DATA = """
{data}
"""

if __name__ == "__main__":
    sys.exit(main())
'''
