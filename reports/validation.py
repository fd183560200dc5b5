"""The schema of what the gate finds, and the one rule that makes a verdict of statuses.

One :class:`CheckResult` a named check. :class:`Evidence` holds what the statistical checks were computed from (each
scored token, each generation, the per-item statistics of each task metric), so that every bound, status and the verdict
can be derived again without a model (:mod:`bench.gate.replay`).
Try: ``llama-onnx validate FOLDER --baseline demo --mode quick --json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import Field

from reports.base import Document, Frozen, Machine, write_schema

Status = Literal["PASS", "FAIL", "INCONCLUSIVE", "REPORTED", "SUSPICIOUS", "SKIPPED"]
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Kind = Literal["exact", "numeric", "generation"]
Scalar = str | int | float | bool | None
EXIT_CODES: dict[Verdict, Literal[0, 1, 3]] = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
RANK: tuple[Status, ...] = ("FAIL", "INCONCLUSIVE", "SUSPICIOUS", "PASS", "REPORTED", "SKIPPED")


def overall(statuses: Iterable[str]) -> Verdict:
    """The verdict over any set of statuses: FAIL if one fails, else INCONCLUSIVE if one is undecided or nothing passed.

    SUSPICIOUS lies inside its margin and has passed. REPORTED and SKIPPED decide nothing, so a set of these alone, or
    an empty one, is never a PASS.
    """
    found = set(statuses)
    if "FAIL" in found:
        return "FAIL"
    return "PASS" if "INCONCLUSIVE" not in found and found & {"PASS", "SUSPICIOUS"} else "INCONCLUSIVE"


def worst(statuses: Iterable[Status]) -> Status:
    """The status of a check with several measurements; REPORTED when there is nothing to judge."""
    return min(statuses, key=RANK.index, default="REPORTED")


class Finding(Frozen):
    """One thing that is wrong: ``where`` names the file, node, tensor or key; ``layer`` the decoder layer, if one."""

    where: str
    what: str
    layer: int | None = None


class Measurement(Frozen):
    """One measured quantity. ``bound`` is the one-sided 95 % bound that is held against ``limit``.

    ``better`` says on which side of the limit the value must lie; ``null_value`` is the same quantity of PyTorch
    against itself (with another attention kernel, or in the folder's precision).
    """

    name: str
    title: str
    status: Status
    value: float
    bound: float | None
    limit: float | None
    better: Literal["lower", "higher", "equal"]
    null_value: float | None
    samples: int
    unit: str
    detail: str


class TaskMetric(Frozen):
    """One generation metric on one task: candidate and baseline against the references, 0 to 100.

    ``difference_bound`` is the one-sided 95 % bound (paired bootstrap over items) of candidate minus baseline.
    ``items_needed``: where the items could not decide, so many of their kind would; 0 where no number would, since the
    score lies on the limit. None where they decided.
    """

    task: str
    metric: str
    candidate: float
    baseline: float
    candidate_vs_baseline: float | None
    difference_bound: float | None
    limit: float | None
    status: Status
    items: int
    settings: str
    items_needed: int | None = None

    @property
    def would_decide(self) -> str:
        """What would decide an undecided metric, in words; "" where it is decided."""
        if self.items_needed is None:
            return ""
        return f"about {self.items_needed:,} items would decide" if self.items_needed else "the score lies on the limit"


class Example(Frozen):
    """One generated pair for the reader's own judgement."""

    task: str
    item: str
    prompt: str
    reference: str
    candidate: str
    baseline: str


class CheckResult(Frozen):
    """One named check: what it looks at, its result in one line (``summary``), and what was measured."""

    name: str
    kind: Kind
    status: Status
    looks_at: str
    summary: str
    seconds: float
    findings: list[Finding] = Field(default_factory=list)
    measurements: list[Measurement] = Field(default_factory=list)
    tasks: list[TaskMetric] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    @property
    def title(self) -> str:
        """What was measured, else the name as words."""
        if self.measurements:
            return self.measurements[0].title
        return self.name.replace("_", " ").capitalize().replace("Tensorrt", "TensorRT")

    @property
    def reason(self) -> str:
        """Why it has this status, in one line."""
        if not self.findings:
            return self.summary
        more = f" (and {len(self.findings) - 1} more)" if len(self.findings) > 1 else ""
        return f"{self.findings[0].where}: {self.findings[0].what}{more}"


class Place(Frozen):
    """Where the folder leaves the baseline: ``layer`` (-1: the embedding; the number of layers: the head), operator.

    ``deviation`` is the relative error of the residual stream after that layer, ``before`` that in front of it.
    """

    layer: int
    operator: str
    deviation: float
    before: float
    detail: str


# -- what the statistics were computed from --------------------------------------------------------------------------


class ChunkScores(Frozen):
    """One chunk of text, scored by both sides on the same ids; every list has one entry a token.

    Negative log-likelihoods and KL divergences in nats; see :class:`bench.gate.statistics.TokenScores`.
    """

    nll_candidate: list[float]
    nll_baseline: list[float]
    kld: list[float]
    same_top1: list[bool]


class PlaceScore(Frozen):
    """KL divergence (nats) at one place that a behaviour check looked at."""

    place: str
    kld: float


class GeneratedItem(Frozen):
    """One greedy generation of both sides: tokens of each, tokens before the first that differs, and who ended."""

    item: str
    group: str
    candidate: int
    baseline: int
    equal: int
    candidate_ended: bool
    baseline_ended: bool


class TaskEvidence(Frozen):
    """One metric on one group of items: per-item statistics (see :class:`bench.gate.metrics.Scored`) of the candidate
    and the baseline against the references, and of the candidate against the baseline's outputs."""

    group: str
    metric: str
    settings: str
    items: list[str]
    candidate: list[list[float]]
    baseline: list[list[float]]
    cross: list[list[float]]
    same_outputs: bool


class Evidence(Frozen):
    """Everything that bounds and statuses of the statistical checks follow from.

    ``null`` is PyTorch against itself over the first chunks; ``own_loss`` its KL divergence over single further chunks
    (by number), where a token's own loss had to be known; ``places`` by check.
    """

    chunks: list[ChunkScores] = Field(default_factory=list)
    null: list[ChunkScores] = Field(default_factory=list)
    own_loss: dict[int, list[float]] = Field(default_factory=dict)
    places: dict[str, list[PlaceScore]] = Field(default_factory=dict)
    outputs: list[GeneratedItem] = Field(default_factory=list)
    tasks: list[TaskEvidence] = Field(default_factory=list)

    def joined(self, other: Evidence) -> Evidence:
        """Both parts; of what both hold, ``other``'s."""
        update = {n: v for n in ("chunks", "null", "outputs", "tasks") if (v := getattr(other, n))}
        more = {"own_loss": self.own_loss | other.own_loss, "places": self.places | other.places}
        return self.model_copy(update=update | more)


class Validation(Document):
    """Everything of one run; ``verdict`` with its ``reasons`` decides the exit code.

    ``folder_sha256`` is over names and SHA-256 of every file of the folder, "" where it could not be read;
    ``baseline_sha256`` the same over the baseline's weights, configuration and tokenizer, ``dataset_sha256`` over the
    data. ``tier`` is the tolerance tier, the precision whose margins hold; ``checks`` the names of the whole set, of
    which ``results`` may be a part. ``session`` says what ran: provider, placement, attention kernel, fallbacks.
    """

    kind: Literal["validation"] = "validation"
    schema_version: Literal[1] = 1
    tool_version: str
    created_utc: str
    command: list[str]
    folder: str
    folder_sha256: str
    baseline: str
    baseline_sha256: str
    mode: str
    tier: str
    activations: str
    kv_dtype: str
    dataset: str
    dataset_sha256: str
    settings: dict[str, Scalar]
    session: dict[str, Scalar]
    checks: list[str]
    results: list[CheckResult]
    evidence: Evidence
    examples: list[Example]
    place: Place | None
    verdict: Verdict
    reasons: list[str]
    seconds: float
    machine: Machine
    versions: dict[str, str]
    notes: list[str]

    @property
    def exit_code(self) -> Literal[0, 1, 3]:
        """0 passed, 1 failed, 3 inconclusive."""
        return EXIT_CODES[self.verdict]

    @property
    def complete(self) -> bool:
        """Whether every check of the set was run."""
        return [r.name for r in self.results] == self.checks

    def of(self, *statuses: Status) -> list[CheckResult]:
        """Results with one of these statuses, in order."""
        return [r for r in self.results if r.status in statuses]

    @property
    def tasks(self) -> list[TaskMetric]:
        """Task metrics of all checks."""
        return [t for r in self.results for t in r.tasks]

    @property
    def tokens_scored(self) -> int:
        """Tokens behind the teacher-forced checks."""
        return sum(len(c.kld) for c in self.evidence.chunks)

    def to_json(self) -> str:
        """Indented JSON, newline at the end; the long lists of the evidence in one line each."""
        raw = json.loads(self.model_dump_json(exclude={"evidence"}))
        text = json.dumps(raw, indent=1, ensure_ascii=False)
        return f'{text[:-2]},\n "evidence": {self.evidence.model_dump_json()}\n}}\n'


def decide_verdict(results: Sequence[CheckResult]) -> tuple[Verdict, list[str]]:
    """The verdict over all checks, and why: the failed ones in order, else the undecided ones."""
    verdict = overall(r.status for r in results)
    if verdict == "PASS":
        suspicious = [r.name for r in results if r.status == "SUSPICIOUS"]
        note = [f"suspicious though inside their margins: {', '.join(suspicious)}"] if suspicious else []
        return verdict, [f"{sum(r.status in ('PASS', 'SUSPICIOUS') for r in results)} checks passed", *note]
    return verdict, [f"{r.name}: {r.reason}" for r in results if r.status == verdict] or [
        "no check could judge anything"
    ]


if __name__ == "__main__":
    write_schema(Validation)
