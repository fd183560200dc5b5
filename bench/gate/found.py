"""What a check gives back, and how a named check is described."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reports.validation import Evidence, Example, Finding, Kind, Measurement, Status, TaskMetric

if TYPE_CHECKING:
    from bench.gate.modes import Terms
    from bench.gate.subject import Subject


@dataclass(frozen=True)
class Found:
    """The result of a check; ``summary`` is its line on the terminal, ``evidence`` what it was computed from."""

    status: Status
    summary: str
    findings: Sequence[Finding] = ()
    measurements: Sequence[Measurement] = ()
    tasks: Sequence[TaskMetric] = ()
    notes: Sequence[str] = ()
    examples: Sequence[Example] = ()
    evidence: Evidence = Evidence()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class CheckSpec:
    """One named check: what it looks at in one sentence, and what it catches (both stand in docs/gate.md).

    ``judge`` gives the same result from the evidence that ``run`` left, without a model; None for exact checks, whose
    result follows from their findings. ``may_abstain``: whether an exact check may leave a folder unjudged, as a
    third-party export whose graph or weights it cannot read. ``target``: the only one whose folders it concerns, "" for
    all; it does not stand in the results of other folders.
    """

    name: str
    kind: Kind
    looks_at: str
    catches: str
    run: Callable[[Subject], Found]
    judge: Callable[[Evidence, Terms], Found] | None = None
    may_abstain: bool = False
    target: str = ""


def exact(findings: Sequence[Finding], good: str, notes: Sequence[str] = ()) -> Found:
    """PASS with ``good``, or FAIL naming the first finding."""
    return (
        Found("FAIL", _first(findings), findings=findings, notes=notes)
        if findings
        else Found("PASS", good, notes=notes)
    )


def undecided(findings: Sequence[Finding], notes: Sequence[str] = ()) -> Found:
    """INCONCLUSIVE: what was found may be another tool's right way to do it, and cannot be told from a defect."""
    return Found("INCONCLUSIVE", _first(findings), findings=findings, notes=notes)


def _first(findings: Sequence[Finding]) -> str:
    more = f" (+{len(findings) - 1} more)" if len(findings) > 1 else ""
    return f"{findings[0].where}: {findings[0].what}{more}"


def first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Place of the first element that differs; the shorter one's length where none does."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def stopped(name: str, why: str) -> Found:
    """FAIL of a check that raised."""
    return Found("FAIL", f"stopped: {why}", [Finding(where=name, what=f"stopped: {why}")])
