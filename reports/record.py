"""The schema of ``record.json``: everything that one run measured, raw. Every statistic is derived from it.

The JSON Schema beside this file (``record.schema.json``) is written from these classes by
``python -m reports.record`` and lets other tools write records that ``llama-onnx report`` reads.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from reports.base import Document, Frozen, Machine, Positive, Seconds, write_schema
from reports.validation import Validation


class ModelFacts(Frozen):
    """The model under test. ``random_weights`` marks made-up weights, whose outputs mean nothing."""

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


class Side(Frozen):
    """One contestant of the run; ``role`` says what it is there for."""

    label: str
    role: Literal["candidate", "baseline", "peer"]
    title: str
    details: dict[str, str | int | float | bool]


class Case(Frozen):
    """One workload: ``batch`` rows of ``prompt`` tokens, ``new_tokens`` generated for each."""

    batch: int = Field(ge=1)
    prompt: int = Field(ge=1)
    new_tokens: int = Field(ge=1)

    @property
    def label(self) -> str:
        """Such as ``batch 1, prompt 128``."""
        return f"batch {self.batch}, prompt {self.prompt}"

    @property
    def mean_context(self) -> float:
        """Mean context of the decode steps, tokens per row: step i of N - 1 attends to prompt + i tokens."""
        return self.prompt + self.new_tokens / 2


class Round(Frozen):
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


class Series(Frozen):
    """All rounds of one side on one case. Rounds of equal index on different sides were run back to back."""

    case: Case
    side: str
    warmup_rounds: int
    rounds: list[Round]


class Load(Frozen):
    """Times from nothing to the first token of a one-token prompt, files in the disk cache."""

    side: str
    samples_s: list[Seconds]


class Memory(Frozen):
    """Peak resident memory of a fresh process that loads a side and generates once.

    ``baseline_bytes`` is what the process held before it loaded the model (interpreter and libraries).
    """

    side: str
    peak_bytes: int
    baseline_bytes: int
    case: Case

    @property
    def own_bytes(self) -> int:
        """What the model, its cache and its buffers added to interpreter and libraries."""
        return self.peak_bytes - self.baseline_bytes


class Floor(Frozen):
    """The memory-bandwidth floor: a decode step cannot be faster than reading its bytes once.

    ``bandwidth_samples`` are bytes per second, one beside each round of the headline case (shared memory buses drift,
    so the floor is measured where and when the decode step is).
    """

    method: str
    bandwidth_samples: list[Positive] = Field(min_length=1)
    weight_bytes: int
    kv_bytes_per_token: int

    def step_bytes(self, case: Case) -> float:
        """Bytes that a decode step of a case reads at its mean context: the weights, and the cache of every row."""
        return self.weight_bytes + case.batch * case.mean_context * self.kv_bytes_per_token


class PrefillProducts(Frozen):
    """The matrix products of a prompt, as the model's configuration has them.

    ``layer_weights`` are the elements of all layers' matrices, each used once a token; ``head_weights`` those of the
    head, used once a row, for its last position (the embedding is looked up, it is no product). In attention each
    token meets itself and those before it, in each layer at most its window (``windows``, one a layer, None for all):
    a product with the keys and one with the values, ``attention_width`` (heads times head size) wide.
    """

    layer_weights: int = Field(ge=1)
    head_weights: int = Field(ge=1)
    attention_width: int = Field(ge=1)
    windows: list[int | None]

    def operations(self, case: Case) -> float:
        """Multiplications and additions of a prefill of that case."""
        weights = case.prompt * self.layer_weights + self.head_weights
        pairs = sum(_pairs(case.prompt, window) for window in self.windows)
        return 2.0 * case.batch * (weights + 2 * self.attention_width * pairs)


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs of a token and one that it attends to."""
    full = min(tokens, window or tokens)
    return full * (full + 1) // 2 + (tokens - full) * full


class ProductSamples(Frozen):
    """Seconds of one plain product ``[rows, inner] x [inner, outer]``, one sample beside each round of ``case``."""

    case: Case
    rows: int = Field(ge=1)
    inner: int = Field(ge=1)
    outer: int = Field(ge=1)
    samples_s: list[Positive] = Field(min_length=1)

    @property
    def rates(self) -> list[float]:
        """Operations per second of each sample."""
        return [2.0 * self.rows * self.inner * self.outer / s for s in self.samples_s]


class PrefillFloor(Frozen):
    """The matrix-product floor: a prefill's matrix products at the speed of one plain product on this machine.

    ``dtype`` is the product's type. Where ``products`` are not counted or nothing was measured, ``missing`` says why.
    """

    method: str
    dtype: str
    products: PrefillProducts | None
    measured: list[ProductSamples]
    missing: str = ""


class Outcome(Frozen):
    """How one test of the run ended."""

    test: str
    outcome: Literal["passed", "failed", "skipped", "error"]
    seconds: Seconds
    message: str


class RunRecord(Document):
    """One run, raw. See the classes of its parts.

    Records from before there was a ``prefill_floor`` lack it; their pages show no prefill by prompt length.
    """

    schema_version: Literal[1] = 1
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
    validation: Validation | None
    outcomes: list[Outcome]
    warnings: list[str]
    prefill_floor: PrefillFloor | None = None

    def side(self, role: str) -> Side | None:
        """The first side of that role."""
        return next((s for s in self.sides if s.role == role), None)

    def cases(self) -> list[Case]:
        """Distinct cases in the order in which they were measured."""
        return list(dict.fromkeys(s.case for s in self.series))

    def find(self, case: Case, side: str) -> Series | None:
        """The series of one side on one case."""
        return next((s for s in self.series if s.case == case and s.side == side), None)


if __name__ == "__main__":
    write_schema(RunRecord)
