"""The project's own targets: how fast the fused export has to be in fp32 on the CPU, and what a run measured.

A target that is missed is shown and does not fail a run: a limit on a time cries wolf on a noisy machine.

Try: ``python -c "import pathlib, reports.record as r, reports.targets as t;
print(t.targets_of(r.RunRecord.read(pathlib.Path('reports/out/record.json'))))"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reports.record import RunRecord
from reports.stats import Metric, compare
from reports.summary import floor_rows, headline_case

OPTIMUM = "optimum-ort"
"""Label of the side that runs optimum's plain export."""

FLOOR_LIMIT = 1.35
"""A decode step may take so many times what reading its bytes once takes."""


@dataclass(frozen=True)
class Target:
    """A target and what this run measured; ``better`` names the side of the limit on which it must lie."""

    name: str
    value: float
    limit: float
    unit: str = "x"
    better: Literal["lower", "higher"] = "lower"

    @property
    def met(self) -> bool:
        """Whether the measured value lies on the right side of the limit."""
        return self.value <= self.limit if self.better == "lower" else self.value >= self.limit


def targets_of(record: RunRecord) -> tuple[Target, ...]:
    """The targets on the headline case, as far as the run measured them; none where they are not about the run."""
    case, candidate, baseline = headline_case(record), record.side("candidate"), record.side("baseline")
    on_cpu = record.settings.get("provider") == "cpu"
    if not (on_cpu and record.model.precision == "fp32" and record.model.fused_ops.get("GroupQueryAttention")):
        return ()
    if case is None or candidate is None:
        return ()

    def against(name: str, metric: Metric, other: str | None, limit: float) -> list[Target]:
        found = compare(record, case, metric, candidate.label, other) if other else None
        return [Target(name, found.ratio.value, limit)] if found else []

    pytorch = baseline.label if baseline else None
    multiples = [r.multiple.value for r in floor_rows(record, case) if r.side == candidate]
    return (
        *against("decode against PyTorch eager", "tpot", pytorch, 0.45),
        *against("decode against optimum", "tpot", OPTIMUM, 0.80),
        *(Target("decode over the memory floor", value, FLOOR_LIMIT) for value in multiples),
        *against("prefill against PyTorch eager", "ttft", pytorch, 0.75),
    )
