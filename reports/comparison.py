"""The schema of a comparison: raw case records (JSON Lines) and the judged result (``comparison.json``).

A :class:`CaseRecord` is one case of one side, measured in one process of its own; a file of them can be written by any
tool (``reports/case.schema.json``, written by ``python -m reports.comparison``). A :class:`Comparison` is what the
judge made of them, with the raw records inside, so that a page needs no other file. Statuses and their meaning stand in
:mod:`reports.compare`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from reports.base import Document, Frozen, Machine, Positive, write_schema
from reports.validation import EXIT_CODES, Validation
from reports.validation import Verdict as Word

CASE_SCHEMA_VERSION = 1
Scalar = str | int | float | bool
SideName = Literal["base", "candidate"]
ChangeStatus = Literal["REGRESSION", "IMPROVED", "EQUIVALENT", "INCONCLUSIVE", "INVALID", "NEW", "MISSING"]
CaseOutcome = Literal["ok", "oom", "crash", "timeout", "invalid"]


class KnownMetric(NamedTuple):
    """A metric's short name, the title of its results and its unit."""

    name: str
    title: str
    unit: str


METRICS = {
    "tpot": KnownMetric("decode", "Decode, time per output token", "s"),
    "ttft": KnownMetric("prefill", "Prefill, time to first token", "s"),
    "total": KnownMetric("end to end", "End to end", "s"),
    "load": KnownMetric("loading", "Load time", "s"),
    "peak_memory": KnownMetric("peak memory", "Peak memory", "B"),
}
"""What this tool measures, in the order of a page; other tools' metrics keep their own names."""

UNITS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("s", 1.0)),
    **dict.fromkeys(("ms", "msec", "millisecond", "milliseconds"), ("s", 0.001)),
    **dict.fromkeys(("us", "\u00b5s", "\u03bcs", "usec", "microsecond", "microseconds"), ("s", 1e-06)),
    **dict.fromkeys(("ns", "nsec", "nanosecond", "nanoseconds"), ("s", 1e-09)),
    **dict.fromkeys(("min", "minute", "minutes"), ("s", 60.0)),
    **dict.fromkeys(("B", "byte", "bytes"), ("B", 1.0)),
    **{f"{letter}B": ("B", 1e3 ** (k + 1)) for k, letter in enumerate("kMGT")},
    **{f"{letter}iB": ("B", 1024.0 ** (k + 1)) for k, letter in enumerate("KMGT")},
}
"""Unit -> the one in which it is kept, and how many of that it is; a unit that is not here is kept as it stands."""


def in_kept_unit(metric: str, unit: str | None) -> tuple[str, float]:
    """The unit in which a metric is kept, and the factor into it; ``""`` where nobody said one.

    Raises:
        ValueError: a rate, or a unit that is not one of a known metric.
    """
    known = METRICS[metric].unit if metric in METRICS else None
    kept, factor = UNITS.get(unit, (unit, 1.0)) if unit is not None else (known or "", 1.0)
    if known and kept != known:
        raise ValueError(f"{metric} cannot be in {unit!r}; give it in {known}")
    if "/" in kept:
        raise ValueError(f"{metric} is a rate ({unit}), of which more is better; give the time or the size instead")
    return kept, factor


class GpuState(Frozen):
    """One GPU at one moment; ``throttle_reasons`` names what slows its clock now (empty: nothing)."""

    index: int
    name: str
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    throttle_reasons: list[str] = Field(default_factory=list)


class MachineState(Frozen):
    """The machine at one moment, just before or just after a case."""

    at_utc: str
    load_1m: float | None = None
    cpu_mhz: float | None = None
    available_memory_bytes: int | None = None
    gpus: list[GpuState] = Field(default_factory=list)


class CaseRecord(Frozen):
    """One case of one side in one process: raw samples, and what the machine did meanwhile.

    Only ``schema_version``, ``case`` and ``metrics`` are needed in a file made elsewhere; ``run`` and ``pair`` tell
    that records of two sides were measured in interleaved pairs. ``steal_fraction`` and ``others_fraction`` are shares
    of all the cores' time during the case, taken by the hypervisor and by other processes.
    """

    schema_version: Literal[1]
    kind: Literal["case"] = "case"
    case: str
    metrics: dict[str, list[Positive]]
    """Metric -> raw samples, one a round, warm-up left out: ``ttft``, ``tpot``, ``total``, ``load`` in seconds and
    ``peak_memory`` in bytes where ``units`` says nothing else. More is worse: a rate is refused."""
    units: dict[str, str] = Field(default_factory=dict)
    """Metric -> unit. Times are kept in ``s`` and sizes in ``B``, whatever they were written in (``ms``, ``MiB``)."""
    parameters: dict[str, Scalar] = Field(default_factory=dict)
    side: SideName | None = None
    run: str | None = None
    pair: int | None = None
    position: int | None = None
    """Place in its pair: 0 ran first, 1 second."""
    in_turn: bool | None = None
    """Both processes of the pair were alive and took their rounds in turn: round k of one belongs to round k of the
    other."""
    attempt: int = 0
    """0, or how many times this pair had been repeated before."""
    sequence: int | None = None
    """Place in the whole run, over all sides and cases."""
    outcome: CaseOutcome = "ok"
    reason: str = ""
    """Why the outcome is not ``ok``; also why the pair was disturbed."""
    last_lines: list[str] = Field(default_factory=list)
    exit_code: int | None = None
    duration_s: float | None = None
    seed: int | None = None
    warmup_rounds: int | None = None
    steady: bool | None = None
    """Whether warm-up ended because rounds agreed (False: it reached its cap)."""
    before: MachineState | None = None
    after: MachineState | None = None
    steal_fraction: float | None = None
    others_fraction: float | None = None
    fingerprint: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    details: dict[str, Scalar] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _keep_one_unit(self) -> Self:
        for metric, values in self.metrics.items():
            kept, factor = in_kept_unit(metric, self.units.get(metric))
            if factor != 1:
                values[:] = [v * factor for v in values]
            if not all(0 < v < math.inf for v in values):
                raise ValueError(f"{metric} is out of range in {kept}")
            if metric in self.units:
                self.units[metric] = kept
        return self

    @property
    def place(self) -> tuple[str, str, str, int | None, int, str]:
        """What this record is of, by its own account: only one record of a side can be there."""
        return self.run or "", self.fingerprint or "", self.case, self.pair, self.attempt, self.side or ""

    @property
    def disturbed(self) -> bool:
        """Measured, but not to be trusted: throttled, or the machine was taken away meanwhile."""
        return self.outcome == "invalid"


class ComparedSide(Frozen):
    """One of the two sides: ``text`` is what was typed, ``details`` what it came to (provider, threads, options).

    Folder and environment stand here by their names; their places are in the command of the comparison alone.
    """

    name: SideName
    label: str
    text: str
    folder: str | None = None
    provider: str | None = None
    venv: str | None = None
    revision: str | None = None
    options: dict[str, Scalar] = Field(default_factory=dict)
    model: str | None = None
    precision: str | None = None
    weights_sha256: str | None = None
    spec_digest: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    details: dict[str, Scalar] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        """The label, with the beginning of the weights' SHA-256 where it is known."""
        return f"{self.label} (weights {self.weights_sha256[:12]})" if self.weights_sha256 else self.label


class Family(Frozen):
    """What was tested together, and by which rules fixed beforehand.

    ``size`` results gate, at a family-wise ``alpha`` (Holm over them and Bonferroni over the looks). ``margins`` are
    relative: 0.03 is 3 %. ``prior_df`` and ``prior_sd`` are the variance prior shared by a metric's cases (moderated t;
    absent where every case stands for itself).
    """

    size: int
    alpha: float
    margins: dict[str, float]
    gating_metrics: list[str]
    planned_pairs: int
    most_pairs: int
    method: str
    extension_rule: str
    prior_df: dict[str, float] = Field(default_factory=dict)
    prior_sd: dict[str, float] = Field(default_factory=dict)


class PairResult(Frozen):
    """One interleaved pair of one metric: medians of both processes. ``valid`` pairs count; others say why not.

    ``ratio`` is candidate / base of the medians, or, where the processes took their rounds in turn, the mean of the
    rounds' log ratios without the largest and smallest tenth: what both met in the same seconds cancels.
    """

    index: int
    attempt: int = 0
    base_first: bool | None = None
    base: float | None = None
    candidate: float | None = None
    ratio: float | None = None
    valid: bool = True
    reason: str = ""


class Result(Frozen):
    """One metric of one case, judged. ``ratio`` is candidate / base: above 1 is slower (or larger).

    ``low`` and ``high`` are the ends of the ratio's 95 % interval; ``p`` is two-sided against no change, ``p_holm`` the
    same after Holm and both looks, to be held against the family's alpha. ``pairs_needed`` is the estimated total
    number of pairs that would decide an INCONCLUSIVE result (None: decided, or more than is worth measuring).
    """

    case: str
    metric: str
    unit: str
    gating: bool
    status: ChangeStatus
    reason: str
    """One plain sentence."""
    margin: float
    parameters: dict[str, Scalar] = Field(default_factory=dict)
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    df: float | None = None
    sd_log: float | None = None
    look: int = 1
    """1: decided with the planned pairs, 2: after the extension."""
    base_median: float | None = None
    candidate_median: float | None = None
    pairs: list[PairResult] = Field(default_factory=list)
    pairs_needed: int | None = None

    @property
    def valid_pairs(self) -> int:
        """Pairs behind the estimate."""
        return sum(1 for p in self.pairs if p.valid)


class HistoryPoint(Frozen):
    """One earlier measurement of a metric (or this run's, the last): the median of one run."""

    at_utc: str
    value: float
    label: str = ""
    run: str = ""


class HistoryStep(Frozen):
    """A level change in a metric's past: the first point of the new level, by how much, and how sure."""

    index: int
    ratio: float
    p: float


class History(Frozen):
    """A metric's past on machines of one fingerprint; advisory, never gating."""

    case: str
    metric: str
    unit: str
    fingerprint: str
    points: list[HistoryPoint]
    steps: list[HistoryStep] = Field(default_factory=list)


class Verdict(Frozen):
    """What the pipeline obeys: 0 passed, 1 failed, 3 inconclusive; ``reasons`` are plain sentences, the worst first."""

    outcome: Word
    reasons: list[str]

    @property
    def exit_code(self) -> Literal[0, 1, 3]:
        """What the command returns."""
        return EXIT_CODES[self.outcome]


class Comparison(Document):
    """Two sides, judged. ``advisory`` comparisons (files that were not measured in pairs, history) never gate."""

    schema_version: Literal[1] = 1
    kind: Literal["comparison"] = "comparison"
    tool_version: str
    created_utc: str
    duration_s: float
    command: list[str]
    seed: int | None
    paired: bool
    advisory: bool
    advisory_reason: str = ""
    base: ComparedSide
    candidate: ComparedSide
    family: Family
    verdict: Verdict
    results: list[Result]
    validation: Validation | None = None
    """The candidate against its PyTorch model, by the gate."""
    machine: Machine | None = None
    history: list[History] = Field(default_factory=list)
    records: list[CaseRecord] = Field(default_factory=list)
    """Every raw record of the run, also of repeated pairs and failed cases, in the order in which they ran."""
    versions: dict[str, str] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)


if __name__ == "__main__":
    write_schema(CaseRecord, "validation")
    write_schema(Comparison)
