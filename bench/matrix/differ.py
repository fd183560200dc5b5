"""Where two ONNX Runtimes differ over the same folder: the layer, the node, and the run that shows it.

Both run the same file, so nodes correspond one to one. In the first run whose logits or cache differ beyond rounding,
each node is cut out and given what the *reference* computed in front of it, many of them in one model; the first one
that is out of line is confirmed alone on both sides. Inputs are equal, so no error travels and limits are tight
(:mod:`bench.matrix.rounding`). Over long prompts, stretches between two places in the residual stream come first. A
crash or refusal is found in the same way, and so is what only several nodes together get wrong.
Try: ``python -m pytest tests/bench/matrix/test_differ.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bench.errors import BenchError
from bench.matrix.rounding import gap, limit_of_graph, limit_of_node
from bench.matrix.scenarios import Scenario, scenarios
from bench.matrix.subgraphs import ALONE, Subgraphs, Unit
from export.manifest import Manifest
from runtime.ort_session import accuracy_level

BUDGET = 512 << 20
"""Bytes of inner values that are held at a time, about."""
ALL_NODES = 512
"""New tokens up to which the values of all nodes are looked at; beyond, those of a stretch that is out of line."""
FIRST = 8
"""Units of a long run that are looked at before it is known how large their values are."""
Values = dict[str, NDArray[Any]]


class RunnerError(BenchError):
    """A runtime refused a model, crashed over it or did not come back; the first line of what it said."""


class Runner(Protocol):
    """One ONNX Runtime, opened with the session options of the folder that is compared."""

    @property
    def label(self) -> str:
        """Such as ``onnxruntime 1.23.2``."""

    def run(
        self, graph: Path, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str], *, optimise: bool = True
    ) -> dict[str, NDArray[Any]]:
        """Open the file, run it once and close it; feeds that the graph does not have are left out.

        Raises:
            RunnerError: the runtime refuses, crashes or hangs.
        """


@dataclass(frozen=True)
class Case:
    """What differs, on its own.

    Attributes:
        model: ``onnx.ModelProto``; larger weights are in the data files of ``folder``.
        feeds: its inputs.
        expected: the reference's outputs.
        limit: relative error up to which they would be right.
        scenario: says which rows count.
        session_options: that both sides were opened with.
    """

    model: Any
    folder: Path
    feeds: Values
    expected: Values
    limit: float
    scenario: Scenario
    session_options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """Where two runtimes differ.

    Attributes:
        layer: decoder layer, None for what is in no layer.
        node: its name, "" where no single one is at fault.
        op_type: of the node, or of several: ``MatMul + Add``.
        what: in words.
        scenario: the run that showed it.
        deviation: relative error over equal inputs; inf for NaN, another shape or a crash.
        before: relative error of what went in: 0, unless only the whole graph differs.
        error: what the other runtime said where it refused or crashed, else "".
        case: None where nothing smaller than the whole graph differs.
    """

    layer: int | None
    node: str
    op_type: str
    what: str
    scenario: str
    deviation: float
    before: float
    error: str
    case: Case | None


@dataclass(frozen=True)
class _Hit:
    """Nodes whose outputs differ over the reference's inputs ``given``."""

    unit: Unit
    given: Values
    deviation: float
    error: str = ""


def differ(folder: Path, manifest: Manifest, reference: Runner, other: Runner, ids: Sequence[int]) -> Difference | None:
    """The first place at which ``other`` differs from ``reference``, None where no run shows one.

    Args:
        folder: the exported folder, ours or third-party.
        manifest: its own, or the one that :func:`runtime.loading.read_folder` derives.
        reference: the runtime that is right.
        other: the one in question.
        ids: tokens of a text; 1,000 allow every run.

    Raises:
        RunnerError: the reference cannot run the folder.
        BenchError: a bf16 cache, or too few tokens.
    """
    kept: dict[str, Values] = {}
    quantised = manifest.quantisation is not None
    with ExitStack() as stack:
        opened: dict[str, Subgraphs] = {}

        def run(s: Scenario, outputs: Sequence[str]) -> Values | None:
            return {name: kept[s.name][name] for name in outputs} if s.name in kept else None

        for k, s in enumerate(scenarios(manifest, ids, run)):
            try:
                theirs = reference.run(folder / s.graph, s.feeds, manifest.outputs)
            except RunnerError:
                if k == 0:
                    raise
                continue  # an operator that does not allow it: that is no difference
            kept[s.name] = {name: value for name, value in theirs.items() if name.startswith("present.")}
            deviation, beyond, error = 0.0, False, ""
            try:
                ours = other.run(folder / s.graph, s.feeds, manifest.outputs)
            except RunnerError as e:
                deviation, beyond, error = float("inf"), True, str(e).replace(f"{folder}/", "")
            else:
                for name, value in theirs.items():
                    found = gap(s.counted(ours[name]), s.counted(value))
                    deviation = max(deviation, found)
                    beyond = beyond or found > limit_of_graph(value.dtype, quantised)
            small = deviation <= limit_of_graph(np.dtype(np.float32), False) or s.new.size > ALL_NODES
            if small and not beyond:
                continue
            if s.graph not in opened:
                opened[s.graph] = stack.enter_context(Subgraphs(folder / s.graph))
            search = _Search(folder, manifest, opened[s.graph], reference, other, s)
            place = (search.nothing(error) if error else None) or search.part()
            if place is None and beyond:
                place = search.whole(deviation, error)
            if place is not None:
                return place
    return None


class _Search:
    """The search through one graph in one run."""

    def __init__(
        self, folder: Path, manifest: Manifest, parts: Subgraphs, reference: Runner, other: Runner, scenario: Scenario
    ) -> None:
        self.folder, self.parts, self.reference, self.other, self.scenario = folder, parts, reference, other, scenario
        self.options = accuracy_level(manifest)
        self.level = int(next(iter(self.options.values()), "0"))
        self.quantised = manifest.quantisation is not None

    def nothing(self, error: str) -> Difference | None:
        """Whether the other runtime opens no model of this version at all."""
        try:
            self.other.run(self.parts.write(self.parts.empty), {"x": np.zeros(1, np.float32)}, ["y"])
            return None
        except RunnerError:
            what = f"{self.other.label} opens no model of this opset or IR version: {error}"
            return Difference(None, "", "", what, self.scenario.name, float("inf"), 0.0, error, None)

    def part(self) -> Difference | None:
        """The node that differs over the reference's inputs; None where none does alone."""
        if self.scenario.new.size <= ALL_NODES:
            hits = self._sweep(self.parts.units, self.scenario.feeds)
        else:
            hits = self._nodes_of_segments()
        return next((found for hit in hits if (found := self._difference(hit.unit, hit.given))), None)

    def whole(self, deviation: float, error: str) -> Difference:
        """The smallest part that differs, where no node does alone."""
        for hit in self._sweep(self.parts.segments, self.scenario.feeds):
            if self._difference(hit.unit, hit.given):
                return self._smallest([(k,) for k in hit.unit], hit.given, deviation, error)
        return self._smallest(self.parts.segments, self.scenario.feeds, deviation, error)

    def _nodes_of_segments(self) -> Iterator[_Hit]:
        for hit in self._sweep(self.parts.segments, self.scenario.feeds):
            yield from self._sweep([(k,) for k in hit.unit], hit.given)

    # -- parts on the reference's values -----------------------------------------------------------------------------

    def _sweep(self, units: Sequence[Unit], known: Mapping[str, NDArray[Any]]) -> Iterator[_Hit]:
        """The units that differ, in order; as many at a time as :data:`BUDGET` holds the values of."""
        values, at = dict(known), 0
        size = FIRST if self.scenario.new.size > ALL_NODES else 8 * FIRST
        while at < len(units):
            stretch = units[at : at + size]
            try:
                values |= self._reference_values(stretch, values)
            except RunnerError:
                if len(stretch) == 1:
                    return  # the reference cannot run it alone: what follows has no inputs
                size = 1
                continue
            yield from self._compared(stretch, values)
            at += len(stretch)
            used = sum(v.nbytes for v in values.values())
            last = max(stretch[-1])
            values = {n: v for n, v in values.items() if self.parts.read_after(n, last)}
            size = max(1, min(8 * size, size * BUDGET // max(used, 1)))

    def _reference_values(self, stretch: Sequence[Unit], values: Values) -> Values:
        """What the units make, computed by the reference in one piece."""
        whole = tuple(sorted(k for unit in stretch for k in unit))
        shown = list(dict.fromkeys(name for unit in stretch for name in self.parts.made(unit)))
        return self._run(self.reference, [whole], values, shown) if shown else {}

    def _run(
        self, runner: Runner, units: Sequence[Unit], values: Values, outputs: Sequence[str], optimise: bool = True
    ) -> Values:
        given = {name: values[name] for unit in units for name in self.parts.given(unit)}
        own = ALONE if len(units) > 1 else ""
        graph = self.parts.write(self.parts.cut(units, given, outputs))
        found = runner.run(graph, given, [name + own for name in outputs], optimise=optimise)
        return {name: found[name + own] for name in outputs}

    def _compared(self, units: Sequence[Unit], values: Values) -> Iterator[_Hit]:
        """Those of the units that differ where each is given the reference's values."""
        shown = [name for unit in units for name in self.parts.made(unit)]
        if not shown:
            return
        try:
            ours = self._run(self.other, units, values, shown)
        except RunnerError as e:
            if len(units) == 1:
                given = {name: values[name] for name in self.parts.given(units[0])}
                yield _Hit(units[0], given, float("inf"), str(e))
            else:
                half = len(units) // 2
                yield from self._compared(units[:half], values)
                yield from self._compared(units[half:], values)
            return
        for unit in units:
            made = self.parts.made(unit)
            deviation = self._gap(ours, values, made)[0]
            if deviation > self._limit(unit, values):
                yield _Hit(unit, {name: values[name] for name in self.parts.given(unit)}, deviation)

    def _gap(self, ours: Values, theirs: Values, names: Sequence[str]) -> tuple[float, str]:
        """The largest deviation and whose it is."""
        found = ((gap(self.scenario.counted(ours[n]), self.scenario.counted(theirs[n])), n) for n in names)
        return max(found, default=(0.0, ""))

    def _limit(self, unit: Unit, values: Values) -> float:
        """The sum of its nodes' limits: each may add its own rounding."""
        made = [values[n].dtype for n in self.parts.made(unit) if values[n].dtype.kind == "f"]
        dtype = min(made, key=lambda d: d.itemsize, default="")
        widths = [v.shape[-1] for n in self.parts.given(unit) if (v := values[n]).ndim]
        total = 0.0
        for k in unit:
            node = self.parts.nodes[k]
            level, terms = self.parts.product(k)
            terms = max([terms, self.scenario.slots.shape[1], *widths])
            total += limit_of_node(node.op_type, self.level if level is None else level, dtype, terms)
        return total

    # -- what is reported --------------------------------------------------------------------------------------------

    def _difference(self, unit: Unit, values: Values) -> Difference | None:
        """A unit alone on both sides, over the same values; None where it does not differ there."""
        parts = self.parts
        names = parts.made(unit)
        given = {name: values[name] for name in parts.given(unit)}
        try:
            theirs = self._run(self.reference, [unit], given, names)
        except RunnerError:
            return None
        limit = self._limit(unit, given | theirs)
        error, worst, only = "", "", ""
        try:
            deviation, worst = self._gap(self._run(self.other, [unit], given, names), theirs, names)
        except RunnerError as e:
            deviation, error = float("inf"), str(e).replace(f"{parts.folder}/", "")
        if deviation <= limit:
            return None
        try:
            plain = self._run(self.other, [unit], given, names, optimise=False)
            if self._gap(plain, theirs, names)[0] <= limit:
                only = ", only after graph optimisation"
        except RunnerError:
            pass
        nodes = [parts.nodes[k] for k in unit]
        layer = parts.layer(unit[0])
        kinds = " + ".join(dict.fromkeys(n.op_type for n in nodes))
        where = "outside of the layers" if layer is None else f"layer {layer}"
        which = f"{kinds} ({nodes[0].name})"
        if len(nodes) > 1:
            which = (
                f"{len(nodes)} nodes from {nodes[0].name} to {nodes[-1].name} together ({kinds}), each alone is right"
            )
        cache = ", in what it writes into the cache" if worst.startswith("present.") else ""
        said = f": {error}" if error else f": relative error {deviation:.2g} over equal inputs"
        case = Case(
            parts.kept(parts.cut([unit], given, names)), self.folder, given, theirs, limit, self.scenario, self.options
        )
        return Difference(
            layer=layer,
            node=nodes[0].name if len(nodes) == 1 else "",
            op_type=kinds,
            what=f"{where}, {which}{cache}{only}{said}",
            scenario=self.scenario.name,
            deviation=deviation,
            before=0.0,
            error=error,
            case=case,
        )

    def _smallest(self, units: Sequence[Unit], known: Values, deviation: float, error: str) -> Difference:
        """The shortest stretch of units that differs in one piece, by cutting off ends while it still does."""
        try:
            values = known | self._reference_values(units, known)
        except RunnerError:
            values = known

        def of(part: Sequence[Unit]) -> Difference | None:
            return self._difference(tuple(sorted(k for unit in part for k in unit)), values)

        found, left = of(units), list(units)
        if found is None:
            what = "the whole graph, and no part of it that was cut out"
            if not error and self._right_unoptimised():
                what += ", only after graph optimisation"
            said = f": {error}" if error else f": relative error {deviation:.2g}"
            return Difference(None, "", "", what + said, self.scenario.name, deviation, 0.0, error, None)
        for keep in (_without_last, _without_first):
            step = len(left) // 2
            while step:
                smaller = of(keep(left, step))
                if smaller is None:
                    step //= 2
                else:
                    left, found = keep(left, step), smaller
                    step = min(step, len(left) // 2)
        return found

    def _right_unoptimised(self) -> bool:
        graph, s = self.folder / self.scenario.graph, self.scenario
        names = list(self.parts.outputs)
        try:
            theirs = self.reference.run(graph, s.feeds, names)
            ours = self.other.run(graph, s.feeds, names, optimise=False)
        except RunnerError:
            return False
        return all(
            gap(s.counted(ours[n]), s.counted(theirs[n])) <= limit_of_graph(theirs[n].dtype, self.quantised)
            for n in names
        )


def _without_last(units: list[Unit], n: int) -> list[Unit]:
    return units[:-n]


def _without_first(units: list[Unit], n: int) -> list[Unit]:
    return units[n:]
