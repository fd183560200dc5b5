"""What the pages tabulate, derived once, so that HTML, Markdown and the terminal cannot disagree.

Data only: formatting is in ``reports.render``.

Try: ``python -c "from reports.summary import latency_rows; help(latency_rows)"``.
"""

from __future__ import annotations

from dataclasses import dataclass

from reports.record import Case, Memory, RunRecord, Side
from reports.stats import (
    METRICS,
    Comparison,
    Estimate,
    Metric,
    compare,
    floor_multiples,
    median,
    percentile,
    prefill_floors,
    prefill_multiples,
    relative_spread,
    samples,
)


@dataclass(frozen=True)
class LatencyRow:
    """One side on one case: by metric the time in seconds and the speed-up over the baseline."""

    case: Case
    side: Side
    rounds: int
    times: dict[Metric, Estimate | None]
    gains: dict[Metric, Estimate | None]
    tokens_per_s: float | None
    spread: float | None


@dataclass(frozen=True)
class GapRow:
    """Token gaps of one side on one case, seconds; a percentile is ``None`` from too few gaps."""

    side: Side
    n: int
    median: Estimate
    p90: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True)
class FloorRow:
    """One side against the memory-bandwidth floor of a case: seconds per token, multiple of the floor."""

    side: Side
    tpot: Estimate
    multiple: Estimate


@dataclass(frozen=True)
class Prefill:
    """One side's prefill of one case: prompt tokens per second, and TTFT as a multiple of the matrix-product floor."""

    tokens_per_s: Estimate
    multiple: Estimate | None


def side_of(record: RunRecord, label: str) -> Side:
    """The side of that label; one that the record names nowhere else is shown as a peer under its label."""
    found = next((s for s in record.sides if s.label == label), None)
    return found or Side(label=label, role="peer", title=label, details={})


def ordered_sides(record: RunRecord) -> list[Side]:
    """Candidate, baseline, then peers; also those that only a series, a load time or a memory measurement names."""
    used = [s.side for s in record.series] + [x.side for x in record.loads] + [m.side for m in record.memory]
    labels = dict.fromkeys([*(s.label for s in record.sides), *used])
    rank = {"candidate": 0, "baseline": 1, "peer": 2}
    return sorted((side_of(record, label) for label in labels), key=lambda s: rank[s.role])


def measured_sides(record: RunRecord, case: Case) -> list[Side]:
    """The sides with at least one round on that case, in page order."""
    return [s for s in ordered_sides(record) if (found := record.find(case, s.label)) and found.rounds]


def headline_case(record: RunRecord) -> Case | None:
    """Smallest batch, then the prompt nearest 128; cases that both candidate and baseline ran, and that decode, come
    first."""
    candidate, baseline = record.side("candidate"), record.side("baseline")

    def rank(case: Case) -> tuple[int, bool, int, int, int, int]:
        labels = {s.label for s in measured_sides(record, case)}
        missing = sum(1 for s in (candidate, baseline) if s is None or s.label not in labels)
        return missing, case.new_tokens < 2, case.batch, abs(case.prompt - 128), case.prompt, -case.new_tokens

    return min((c for c in record.cases() if measured_sides(record, c)), key=rank, default=None)


def estimate(record: RunRecord, case: Case, side: str, metric: Metric) -> Estimate | None:
    """Median over the rounds of one side on one case, or ``None`` where nothing was measured."""
    values = samples(record.find(case, side), metric)
    return median(values) if values else None


def against_baseline(record: RunRecord, case: Case, side: str, metric: Metric) -> Comparison | None:
    """One side paired with the baseline; ``None`` for the baseline itself and where one was not measured."""
    baseline = record.side("baseline")
    if baseline is None or baseline.label == side:
        return None
    return compare(record, case, metric, side, baseline.label)


def series_spread(record: RunRecord, case: Case, side: str, metric: Metric) -> float | None:
    """Relative spread over the rounds of one side on one case, as a fraction."""
    return relative_spread(samples(record.find(case, side), metric))


def latency_rows(record: RunRecord) -> list[LatencyRow]:
    """One row for every case and every side that was measured on it."""
    rows = []
    for case in record.cases():
        for side in measured_sides(record, case):
            pairs = {m: against_baseline(record, case, side.label, m) for m in METRICS}
            spreads = [series_spread(record, case, side.label, m) for m in ("ttft", "tpot")]
            tpot = estimate(record, case, side.label, "tpot")
            rows.append(
                LatencyRow(
                    case=case,
                    side=side,
                    rounds=len(samples(record.find(case, side.label), "total")),
                    times={m: estimate(record, case, side.label, m) for m in METRICS},
                    gains={m: pair.speedup if pair else None for m, pair in pairs.items()},
                    tokens_per_s=case.batch / tpot.value if tpot and tpot.value > 0 else None,
                    spread=max((s for s in spreads if s is not None), default=None),
                )
            )
    return rows


def gaps(record: RunRecord, case: Case, side: str) -> list[float]:
    """All token gaps of one side on one case, seconds, rounds in order."""
    series = record.find(case, side)
    return [g for r in series.rounds for g in r.gaps_s] if series else []


def gap_rows(record: RunRecord, case: Case) -> list[GapRow]:
    """Token gaps (ITL) of every side on one case."""
    rows = []
    for side in measured_sides(record, case):
        values = gaps(record, case, side.label)
        if values:
            p90, p95, p99 = (percentile(values, q) for q in (90, 95, 99))
            rows.append(GapRow(side, len(values), median(values), p90, p95, p99))
    return rows


def floor_s(record: RunRecord, case: Case) -> float | None:
    """Least seconds per decode step of a case at the median bandwidth; ``None`` without a floor."""
    return record.floor.step_bytes(case) / median(record.floor.bandwidth_samples).value if record.floor else None


def floor_rows(record: RunRecord, case: Case) -> list[FloorRow]:
    """Every side with a TPOT on that case, as a multiple of the floor; empty without a floor."""
    if record.floor is None:
        return []
    found = ((s, samples(record.find(case, s.label), "tpot")) for s in measured_sides(record, case))
    return [
        FloorRow(side, median(tpots), median(floor_multiples(record.floor, case, tpots)))
        for side, tpots in found
        if tpots
    ]


def smallest_batch(record: RunRecord) -> int:
    """The batch size at which prompts of different lengths are compared."""
    return min((c.batch for c in record.cases()), default=1)


def prefill_cases(record: RunRecord) -> list[Case]:
    """The cases of the smallest batch by prompt length, one each; none where the record has no ``prefill_floor``."""
    if record.prefill_floor is None:
        return []
    batch = smallest_batch(record)
    found: dict[int, Case] = {}
    for case in record.cases():
        if case.batch == batch and measured_sides(record, case):
            found.setdefault(case.prompt, case)
    return [found[prompt] for prompt in sorted(found)]


def prefill_of(record: RunRecord, case: Case, side: str) -> Prefill | None:
    """One side on one case; ``None`` where it was not measured, or its clock was broken."""
    ttfts = samples(record.find(case, side), "ttft")
    if record.prefill_floor is None or not ttfts or min(ttfts) <= 0:
        return None
    multiples = prefill_multiples(record.prefill_floor, case, ttfts)
    speed = median(ttfts).inverse().times(case.batch * case.prompt)
    return Prefill(speed, median(multiples) if multiples else None)


def prefill_rows(record: RunRecord) -> list[tuple[Side, list[Prefill | None]]]:
    """Every side with a prefill, in page order, on each of :func:`prefill_cases`."""
    cases = prefill_cases(record)
    rows = [(s, [prefill_of(record, c, s.label) for c in cases]) for s in ordered_sides(record)]
    return [(side, cells) for side, cells in rows if any(cells)]


def prefill_limit(record: RunRecord, case: Case) -> float | None:
    """Prompt tokens per second at the matrix-product floor; ``None`` without one."""
    floors = prefill_floors(record.prefill_floor, case) if record.prefill_floor else []
    return case.batch * case.prompt / median(floors).value if floors else None


def memory_rows(record: RunRecord) -> list[tuple[Side, Memory]]:
    """Peak memory of each side, in page order."""
    return [(s, m) for s in ordered_sides(record) for m in record.memory if m.side == s.label]


def load_rows(record: RunRecord) -> list[tuple[Side, Estimate]]:
    """Median load time of each side, seconds, in page order."""
    return [
        (s, median(load.samples_s))
        for s in ordered_sides(record)
        for load in record.loads
        if load.side == s.label and load.samples_s
    ]
