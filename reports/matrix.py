"""The schema of a matrix: one exported folder under several ONNX Runtimes, a row each, and the version that changed it.

A row is what the gate found under that runtime, and its speed beside the reference runtime in interleaved pairs, judged
as :mod:`reports.compare` judges them. Raw samples and evidence stay in the pages of the rows.
Try: ``llama-onnx matrix FOLDER --baseline demo --runtime onnxruntime==1.27.0,1.32.0``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from reports.base import Document, Frozen, Machine, write_schema
from reports.comparison import Result, Scalar, Verdict
from reports.validation import EXIT_CODES, CheckResult, overall
from reports.validation import Verdict as Word

Outcome = Literal["ran", "refused", "crashed", "timeout", "unavailable"]
OUTCOMES: dict[Outcome, str] = {
    "ran": "ran",
    "refused": "refuses the folder",
    "crashed": "crashed",
    "timeout": "took too long",
    "unavailable": "cannot run on this machine",
}
"""How a folder ended under a runtime; all but ``ran`` with a reason. ``unavailable`` says nothing about the folder."""


class Difference(Frozen):
    """Where a folder leaves what it computes under the reference runtime: both got the same inputs.

    ``layer`` is the decoder layer (None: outside of the layers, or not known), ``node`` and ``operator`` the graph's,
    ``scenario`` the run that shows it (such as a decode step of a batch). ``deviation`` is the operator's relative
    error when it runs alone, ``expected`` what rounding may make of it. ``reproduction`` names the file that shows it
    with onnxruntime and numpy alone; "" where none could be made.
    """

    layer: int | None
    node: str
    operator: str
    scenario: str
    what: str
    """One plain sentence."""
    deviation: float
    expected: float
    reproduction: str = ""
    reproduction_bytes: int = 0


class MatrixRow(Frozen):
    """One runtime and provider.

    ``parity`` is the verdict over the gate's numeric and generation checks, ``results`` these (with no evidence);
    ``speed`` the judged metrics beside the reference (empty for the reference itself), all ``ratio`` row / reference.
    ``page`` is the row's own page, relative to the matrix's.
    """

    runtime: str
    """For a reader: ``onnxruntime 1.23.2``."""
    text: str
    """As ``--runtime`` takes it; of an environment its name."""
    version: str
    provider: str
    reference: bool = False
    outcome: Outcome
    reason: str = ""
    parity: Word | None = None
    results: list[CheckResult] = Field(default_factory=list)
    speed: list[Result] = Field(default_factory=list)
    verdict: Word
    reasons: list[str]
    difference: Difference | None = None
    load_s: float | None = None
    """Median time to open the decode graph."""
    peak_memory_bytes: float | None = None
    """Median of the measured processes' peaks."""
    warnings: list[str] = Field(default_factory=list)
    """What the runtime printed, each line once."""
    session: dict[str, Scalar | None] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    page: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """Runtime and provider."""
        return f"{self.runtime}, {self.provider}"

    @property
    def first_failed(self) -> CheckResult | None:
        """The first check that failed, in the order of the set."""
        return next((r for r in self.results if r.status == "FAIL"), None)


class OperatorTime(Frozen):
    """Time of all nodes of one operator in one run, by ONNX Runtime's profile; microseconds, 0 where it has none."""

    operator: str
    before_us: float
    after_us: float


class Bisection(Frozen):
    """Which version changed it: ``before`` is the last that is as the first one, ``after`` the first that is not.

    ``changed`` is ``parity`` or a metric with its case, such as ``ttft of b1-p1024-n2``; "" where nothing changed
    between the ends. ``tried`` holds the versions measured, in order; ``between`` counts all that the index has from
    end to end.
    """

    first: str
    last: str
    changed: str
    before: str = ""
    after: str = ""
    tried: list[str]
    between: int
    difference: Difference | None = None
    profile: list[OperatorTime] = Field(default_factory=list)
    """Of both neighbours, the largest change first; only where speed changed."""
    profiled: str = ""
    """What the profile is of, such as ``prefill of 1,024 tokens``."""
    summary: str
    """One plain sentence."""
    seconds: float


class Matrix(Document):
    """One folder under several runtimes. Metrics of speed are relative to ``reference``."""

    kind: Literal["matrix"] = "matrix"
    schema_version: Literal[1] = 1
    tool_version: str
    created_utc: str
    duration_s: float
    command: list[str]
    folder: str
    folder_sha256: str
    oldest_runtime: str
    """The oldest onnxruntime that the manifest allows; "" where it names none."""
    baseline: str
    baseline_sha256: str
    mode: str
    tier: str
    dataset: str
    reference: str
    cases: list[str]
    pairs: int
    """Planned pairs a case; 0: speed was not measured."""
    seed: int
    rows: list[MatrixRow]
    bisection: Bisection | None = None
    verdict: Verdict
    machine: Machine
    versions: dict[str, str]
    notes: list[str] = Field(default_factory=list)

    @property
    def exit_code(self) -> Literal[0, 1, 3]:
        """0 every row passed, 1 one failed, 3 undecided."""
        return EXIT_CODES[self.verdict.outcome]


def matrix_verdict(rows: Sequence[MatrixRow]) -> Verdict:
    """One verdict over all rows; its reasons name the rows that decide it."""
    outcome = overall(r.verdict for r in rows)
    if outcome == "PASS":
        return Verdict(outcome=outcome, reasons=[f"the same model, and no slower, under {len(rows)} of {len(rows)}"])
    told = [f"{r.name}: {r.reasons[0] if r.reasons else r.verdict}" for r in rows if r.verdict == outcome]
    return Verdict(outcome=outcome, reasons=told or ["nothing was measured"])


if __name__ == "__main__":
    write_schema(Matrix)
