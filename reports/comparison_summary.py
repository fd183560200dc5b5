"""What the pages of a comparison tabulate, derived once, so that HTML, Markdown, JUnit and terminal cannot disagree.

Data only: formatting is in ``reports.render``.

Try: ``python -c "from reports.comparison_summary import Digest; help(Digest)"``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from reports.base import grouped
from reports.comparison import METRICS, CaseRecord, ChangeStatus, Comparison, Result, SideName

STATUS_ORDER: tuple[ChangeStatus, ...] = (
    "REGRESSION",
    "MISSING",
    "INVALID",
    "INCONCLUSIVE",
    "IMPROVED",
    "NEW",
    "EQUIVALENT",
)
"""What a reviewer has to look at first stands first."""


@dataclass(frozen=True)
class MetricGroup:
    """All results of one metric, in the order in which the comparison holds them."""

    metric: str
    results: tuple[Result, ...]

    @property
    def gating(self) -> bool:
        """Whether any of them gates."""
        return any(r.gating for r in self.results)

    def of(self, status: ChangeStatus, gating: bool) -> list[Result]:
        """Those of one status, the gating or the other ones."""
        return [r for r in self.results if r.status == status and r.gating == gating]

    @property
    def leading(self) -> Result | None:
        """The one to show large, of those that were measured: the most pressing status, of these the largest change."""
        return min((r for r in self.results if r.ratio is not None), key=importance, default=None)


@dataclass(frozen=True)
class CaseGroup:
    """One case: its results and the raw records behind them."""

    case: str
    index: int
    results: tuple[Result, ...]
    records: tuple[CaseRecord, ...]

    @property
    def pressing(self) -> bool:
        """Whether anything moved or is undecided here."""
        return any(r.status not in ("EQUIVALENT", "NEW") for r in self.results)

    @property
    def troubles(self) -> list[CaseRecord]:
        """Records that were not measured well: out of memory, crashed, hung, disturbed."""
        return [r for r in self.records if r.outcome != "ok"]


@dataclass(frozen=True)
class Digest:
    """A comparison with everything that more than one renderer needs."""

    comparison: Comparison

    @cached_property
    def counts(self) -> dict[ChangeStatus, int]:
        """Results by status, zeros included, in the order of ``STATUS_ORDER``."""
        found = Counter(r.status for r in self.comparison.results)
        return {status: found[status] for status in STATUS_ORDER}

    @cached_property
    def by_importance(self) -> list[Result]:
        """All results, the most pressing first; equal ones keep their order."""
        return sorted(self.comparison.results, key=importance)

    @cached_property
    def metrics(self) -> list[MetricGroup]:
        """Results by metric: gating ones first, decode before prefill before the rest."""
        found = grouped(self.comparison.results, lambda r: r.metric)
        groups = [MetricGroup(metric, tuple(results)) for metric, results in found.items()]
        return sorted(groups, key=lambda g: (not g.gating, _metric_rank(g.metric)))

    @cached_property
    def cases(self) -> list[CaseGroup]:
        """Results and records by case, the most pressing case first; ``index`` is the case's place in the file."""
        results = grouped(self.comparison.results, lambda r: r.case)
        records = grouped(self.comparison.records, lambda r: r.case)
        groups = [
            CaseGroup(case, i, tuple(sorted(found, key=lambda r: _metric_rank(r.metric))), tuple(records.get(case, ())))
            for i, (case, found) in enumerate(results.items())
        ]
        return sorted(groups, key=lambda g: min(importance(r) for r in g.results))

    @property
    def parity_fails(self) -> bool:
        """Whether the candidate was shown to be another model: then no speed-up counts."""
        v = self.comparison.validation
        return v is not None and v.verdict == "FAIL"

    @property
    def more_pairs(self) -> int | None:
        """Pairs that would decide every undecided gating result beyond those measured; ``None``: nothing to say."""
        wanted = [
            r.pairs_needed - r.valid_pairs
            for r in self.comparison.results
            if r.gating and r.status == "INCONCLUSIVE" and r.pairs_needed
        ]
        return max(1, *wanted) if wanted else None


def importance(result: Result) -> tuple[int, bool, float]:
    """Sort key: pressing statuses first, gating before not gating, larger changes before smaller ones."""
    size = abs(result.ratio - 1) if result.ratio is not None else 0.0
    return STATUS_ORDER.index(result.status), not result.gating, -size


def samples_by_side(records: Iterable[CaseRecord], metric: str) -> dict[SideName, list[float]]:
    """Raw samples of a metric on each side, of the records that count (outcome ``ok``)."""
    found: dict[SideName, list[float]] = {}
    for record in records:
        if record.side is not None and record.outcome == "ok":
            found.setdefault(record.side, []).extend(record.metrics.get(metric, []))
    return {side: values for side, values in found.items() if values}


def _metric_rank(metric: str) -> tuple[int, str]:
    return (list(METRICS).index(metric) if metric in METRICS else len(METRICS), metric)
