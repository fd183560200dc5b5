"""The first version of onnxruntime that changed a folder's verdict, or its speed beyond the margin.

Both ends are measured whole, the first one being the reference. What changed between them is then looked for at the
versions that the package index has between, in as few as halving takes.

Try: ``llama-onnx matrix FOLDER --baseline demo --bisect 1.22.1..1.23.2``.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.errors import BenchError
from bench.latency.paired_run import case_key
from bench.latency.profile import profiled_run
from bench.matrix.rows import Rows, Side
from bench.runtimes.environments import Runtime, parse_runtimes, prepare, released
from reports.comparison import METRICS, Result
from reports.matrix import OUTCOMES, Bisection, MatrixRow, OperatorTime
from reports.render import comparison_words as cw
from reports.render.words import times_as

if TYPE_CHECKING:
    from bench.runtimes.environments import Say
    from reports.record import Case

FORM = "write --bisect 1.22.1..1.23.2 (or onnxruntime-gpu==1.27.0..1.28.0)"
PROFILED_RUNS = 5
PARITY = "parity"


def parse_range(text: str) -> tuple[Runtime, Runtime]:
    """``1.22.1..1.23.2`` as its two ends.

    Raises:
        BenchError: not such a range, or from a later version to an earlier one.
    """
    first, dots, last = text.partition("..")
    if not dots or "venv=" in text:
        raise BenchError(f"--bisect {text!r} is no range of versions; {FORM}")
    ends = parse_runtimes(f"{first},{last}", "--bisect", FORM)
    if len(ends) != 2 or ends[0].distribution != ends[1].distribution:
        raise BenchError(f"--bisect {text!r} needs one version at each end; {FORM}")
    if ends[0].key >= ends[1].key:
        raise BenchError(f"--bisect {text!r} goes from a later version to an earlier one; exchange the ends")
    return ends[0], ends[1]


@dataclass(frozen=True)
class Change:
    """What is another at the second end: parity, or a metric of a case (then the ratio second / first)."""

    case: str = ""
    metric: str = PARITY
    ratio: float = 1.0

    def __str__(self) -> str:
        return f"{self.metric} of {self.case}" if self.case else self.metric


def state_of(row: MatrixRow) -> str:
    """How the folder ended under a runtime, in a word."""
    return (row.parity if row.outcome == "ran" else None) or OUTCOMES[row.outcome]


def change_between(first: MatrixRow, last: MatrixRow) -> Change | None:
    """What changed most: parity before speed, of speed the largest change; None where nothing did."""
    if state_of(first) != state_of(last):
        return Change()
    moved = [r for r in last.speed if r.gating and r.status in ("REGRESSION", "IMPROVED") and r.ratio]
    if not moved:
        return None
    most = max(moved, key=lambda r: abs(math.log(r.ratio or 1.0)))
    return Change(most.case, most.metric, most.ratio or 1.0)


def changed(change: Change, first: MatrixRow, row: MatrixRow) -> bool:
    """Whether a version between is as the second end is.

    A speed that its pairs do not decide counts to the end that it is nearer to.
    """
    if not change.case:
        return state_of(row) != state_of(first)
    result = result_of(change, row)
    if result is None or not result.ratio:
        return True
    return math.log(result.ratio) / math.log(change.ratio) > 0.5


def result_of(change: Change, row: MatrixRow) -> Result | None:
    """The row's result that the change is about."""
    return next((r for r in row.speed if (r.case, r.metric) == (change.case, change.metric)), None)


def bisect(rows: Rows, first: Runtime, last: Runtime, provider: str, say: Say) -> Bisection:
    """Find the first version that changed it.

    Args:
        rows: measures a row; its reference is the first end.
        first, last: the ends, made.
        provider: under which the folder runs.
        say: told which versions are made.
    """
    started = time.perf_counter()
    versions = released(first.distribution, first.key, last.key)
    sides = [Side(r, provider) for r in _with_ends(versions, first, last)]
    ends = rows.row(sides[0]), rows.row(sides[-1])
    tried = [first.version, last.version]
    change = change_between(*ends)
    if change is None:
        said = f"{last.label} is as {first.label}: the same verdict ({state_of(ends[0])}), no speed beyond the margin"
        return Bisection(
            first=first.version,
            last=last.version,
            changed="",
            tried=tried,
            between=len(sides),
            summary=said,
            seconds=time.perf_counter() - started,
        )
    low, high = 0, len(sides) - 1
    while high - low > 1:
        middle = (low + high) // 2
        prepare(sides[middle].runtime, say)
        row = rows.row(sides[middle], parity=not change.case, speed=bool(change.case))
        tried.append(sides[middle].runtime.version)
        low, high = (low, middle) if changed(change, ends[0], row) else (middle, high)
    before, after = (rows.row(sides[k]) for k in (low, high))
    profile: list[OperatorTime] = []
    what, difference, notes = "", None, list[str]()
    if not change.case:  # the one that is right tells what the other should have computed
        right, wrong = (low, high) if before.parity == "PASS" else (high, low)
        if "PASS" in (before.parity, after.parity):
            difference = rows.difference(sides[right], sides[wrong], notes)
    else:
        case = next(c for c in rows.plan.cases if case_key(c) == change.case)
        profile, what = profiled(rows, sides[low], sides[high], case, change.metric)
    return Bisection(
        first=first.version,
        last=last.version,
        changed=str(change),
        before=sides[low].runtime.version,
        after=sides[high].runtime.version,
        tried=tried,
        between=len(sides),
        difference=difference,
        profile=profile,
        profiled=what,
        summary="; ".join([_summary(change, ends[0], before, after, profile), *notes]),
        seconds=time.perf_counter() - started,
    )


def _with_ends(versions: Sequence[Runtime], first: Runtime, last: Runtime) -> list[Runtime]:
    """The versions with both ends, which may be none that the index lists."""
    return [first, *(v for v in versions if v not in (first, last)), last]


def _summary(
    change: Change, first: MatrixRow, before: MatrixRow, after: MatrixRow, profile: Sequence[OperatorTime]
) -> str:
    """One sentence; ``first`` is what speed was measured beside."""
    if not change.case:
        why = after.reasons[0] if after.reasons else after.reason
        return (
            f"{after.runtime} is the first where parity is another: {state_of(before)}, then {state_of(after)} ({why})"
        )
    result = result_of(change, after)
    by = "of unknown speed, not measured"
    if result and result.ratio:
        word = "as" if times_as(result.ratio, timed=True) else "than"
        by = f"{cw.change(result.ratio, 's')} {word} under {first.runtime}".replace("\u00a0", " ")
    title = METRICS[change.metric].name if change.metric in METRICS else change.metric
    said = f"{after.runtime} is the first where {title} of {change.case} is {by}"
    if profile:
        top = profile[0]
        said += f"; {top.operator} takes {top.after_us / 1e3:.1f} ms a run where it took {top.before_us / 1e3:.1f} ms"
    return said


def profiled(rows: Rows, before: Side, after: Side, case: Case, metric: str) -> tuple[list[OperatorTime], str]:
    """Time by operator under both runtimes, the largest change first, and what was run."""
    times = [_times(rows, side, case, prefill=metric != "tpot") for side in (before, after)]
    names = dict.fromkeys(n for t in times for n in t)
    found = [OperatorTime(operator=n, before_us=times[0].get(n, 0.0), after_us=times[1].get(n, 0.0)) for n in names]
    found = sorted((f for f in found if f.operator != "whole"), key=lambda f: -abs(f.after_us - f.before_us))
    rows_ = f"batch {case.batch}, " if case.batch > 1 else ""
    what = "a decode step after" if metric == "tpot" else "prefill of"
    return found, f"{rows_}{what} {case.prompt:,} tokens"


def _times(rows: Rows, side: Side, case: Case, prefill: bool) -> dict[str, float]:
    """Microseconds by operator of one run: medians over sessions, so that one disturbed second does not name it."""
    ids = rows.subject.manifest.vocab_size
    prompts = np.random.default_rng(rows.plan.seed).integers(0, ids, (case.batch, case.prompt)).tolist()
    sessions: list[dict[str, float]] = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as work:
            where = rows.deployment(side)
            with where.open(rows.subject.folder, profile=Path(work) / "decode") as session:
                times = profiled_run(session, prompts, PROFILED_RUNS + 1, PROFILED_RUNS, prefill)
                sessions.append({name: time for name, (time, _) in times.items()})
    return {n: statistics.median(s.get(n, 0.0) for s in sessions) for s in sessions for n in s}
