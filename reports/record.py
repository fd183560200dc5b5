"""The schema of ``record.json``: everything that one run measured, raw. Every statistic is derived from it.

The JSON Schema beside this file (``record.schema.json``) is written from these classes by
``python -m reports.record`` and lets other tools write records that ``llama-onnx report`` reads.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reports.errors import ReportError

SCHEMA_VERSION = 1
Status = Literal["PASS", "FAIL", "INCONCLUSIVE", "REPORTED", "SUSPICIOUS"]
Seconds = Annotated[float, Field(ge=0)]


class RecordError(ReportError):
    """A file that is not a record, or not of this schema; names the place."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class ModelFacts(_Frozen):
    """The model under test. ``random_weights`` marks made-up weights, whose outputs mean nothing.

    ``folder_sha256`` is over names and SHA-256 of every file of the exported folder, ``baseline_sha256`` the same over
    the baseline's weights, configuration and tokenizer; "" where it was not taken.
    """

    name: str
    origin: str
    random_weights: bool
    parameters: int
    precision: str
    target: str
    context_length: int
    weights_sha256: str
    folder_bytes: int
    node_count: int
    fused_ops: dict[str, int]
    spec_digest: str
    folder_sha256: str = ""
    baseline_sha256: str = ""


class Machine(_Frozen):
    """Where it ran. ``fingerprint`` is equal for machines whose figures may be compared."""

    fingerprint: str
    cpu: str
    cores: int
    memory_bytes: int
    os: str
    python: str
    gpu: str | None
    load_average_1m: float | None


class Side(_Frozen):
    """One contestant of the run; ``role`` says what it is there for."""

    label: str
    role: Literal["candidate", "baseline", "peer"]
    title: str
    details: dict[str, str | int | float | bool]


class Case(_Frozen):
    """One workload: ``batch`` rows of ``prompt`` tokens, ``new_tokens`` generated for each."""

    batch: int = Field(ge=1)
    prompt: int = Field(ge=1)
    new_tokens: int = Field(ge=1)

    @property
    def label(self) -> str:
        """Such as ``batch 1, prompt 128``."""
        return f"batch {self.batch}, prompt {self.prompt}"


class Round(_Frozen):
    """One generation: its place in the interleaved order and the time stamp of each token, seconds since the call.

    The first time stamp is the TTFT; N tokens have N - 1 decode gaps.
    """

    order: int
    at_s: list[Seconds] = Field(min_length=1)

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.at_s[0]

    @property
    def gaps_s(self) -> list[float]:
        """Times between tokens (ITL)."""
        return [b - a for a, b in zip(self.at_s, self.at_s[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first."""
        return (self.at_s[-1] - self.at_s[0]) / (len(self.at_s) - 1) if len(self.at_s) > 1 else None

    @property
    def total_s(self) -> float:
        """End to end."""
        return self.at_s[-1]


class Series(_Frozen):
    """All rounds of one side on one case. Rounds of equal index on different sides were run back to back."""

    case: Case
    side: str
    warmup_rounds: int
    rounds: list[Round]


class Load(_Frozen):
    """Times from nothing to the first token of a one-token prompt, files in the disk cache."""

    side: str
    samples_s: list[Seconds]


class Memory(_Frozen):
    """Peak resident memory of a fresh process that loads a side and generates once.

    ``baseline_bytes`` is what the process held before it loaded the model (interpreter and libraries).
    """

    side: str
    peak_bytes: int
    baseline_bytes: int
    case: Case


class Floor(_Frozen):
    """The memory-bandwidth floor: a decode step cannot be faster than reading its bytes once.

    ``bandwidth_samples`` are bytes per second, one beside each round of the headline case (shared memory buses drift,
    so the floor is measured where and when the decode step is); the floor uses their median.
    """

    method: str
    bandwidth_samples: list[float] = Field(min_length=1)
    weight_bytes: int
    kv_bytes_per_token: int

    def step_s(self, context: float, batch: int = 1) -> float:
        """Least time of one decode step at a context of that many tokens per row, seconds."""
        return (self.weight_bytes + batch * context * self.kv_bytes_per_token) / statistics.median(
            self.bandwidth_samples
        )


class Check(_Frozen):
    """One parity figure. ``bound`` is the one-sided 95 % bound that is held against ``limit``.

    ``better`` says on which side of the limit the figure must lie; ``null_value`` is the same figure of PyTorch
    against itself with another attention kernel.
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


class TaskMetric(_Frozen):
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


class Example(_Frozen):
    """One generated pair for the reader's own judgement."""

    task: str
    item: str
    prompt: str
    reference: str
    candidate: str
    baseline: str


class Parity(_Frozen):
    """Whether the candidate is still the baseline's model."""

    tier: str
    baseline: str
    dataset: str
    checks: list[Check]
    tasks: list[TaskMetric]
    examples: list[Example]


class Figure(_Frozen):
    """A target of the project and what this run measured; ``better`` names the side on which it must lie."""

    name: str
    value: float
    limit: float
    unit: str
    better: Literal["lower", "higher"]

    @property
    def met(self) -> bool:
        """Whether the measured value lies on the right side of the limit."""
        return self.value <= self.limit if self.better == "lower" else self.value >= self.limit


class Outcome(_Frozen):
    """How one test of the run ended."""

    test: str
    outcome: Literal["passed", "failed", "skipped", "error"]
    seconds: Seconds
    message: str


class RunRecord(_Frozen):
    """One run, raw. See the classes of its parts."""

    schema_version: Literal[1]
    kind: Literal["record"] = "record"
    tool_version: str
    created_utc: str
    duration_s: Seconds
    command: list[str]
    profile: str
    seed: int
    settings: dict[str, str | int | float | bool | list[int]]
    model: ModelFacts
    machine: Machine
    versions: dict[str, str]
    sides: list[Side]
    series: list[Series]
    loads: list[Load]
    memory: list[Memory]
    floor: Floor | None
    parity: Parity | None
    figures: list[Figure]
    outcomes: list[Outcome]
    warnings: list[str]

    def side(self, role: str) -> Side | None:
        """The first side of that role."""
        return next((s for s in self.sides if s.role == role), None)

    def cases(self) -> list[Case]:
        """Distinct cases in the order in which they were measured."""
        return list(dict.fromkeys(s.case for s in self.series))

    def find(self, case: Case, side: str) -> Series | None:
        """The series of one side on one case."""
        return next((s for s in self.series if s.case == case and s.side == side), None)

    def to_json(self) -> str:
        """Indented JSON, newline at the end."""
        return self.model_dump_json(indent=1) + "\n"


def read_record(path: Path) -> RunRecord:
    """Read and validate a ``record.json``.

    Raises:
        RecordError: no such file, not JSON, another schema version, or a field of the wrong form (its place is named).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise RecordError(f"cannot read {path}: {e}; pass a record.json written by `pytest bench/`") from None
    try:
        raw = json.loads(text)
    except ValueError as e:
        raise RecordError(f"{path} is not valid JSON ({e})") from None
    found = raw.get("schema_version") if isinstance(raw, dict) else None
    if found != SCHEMA_VERSION:
        raise RecordError(f"{path} has record schema version {found!r}, this tool reads {SCHEMA_VERSION}")
    try:
        return RunRecord.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise RecordError(f"{path}: {place}: {first['msg']} ({e.error_count()} problem(s) in all)") from None


def json_schema() -> str:
    """The JSON Schema (draft 2020-12) of a record, as it stands in ``reports/record.schema.json``."""
    schema = RunRecord.model_json_schema(mode="serialization")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "llama-onnx-bench record, version 1"
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "record.schema.json").write_text(json_schema(), encoding="utf-8")
