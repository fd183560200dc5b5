"""The schema of what ``llama-onnx validate`` finds, and the verdict over it.

One :class:`CheckResult` a named check; every figure with its bound, margin and null control is inside, so that the
document alone says why a folder passed. Try: ``llama-onnx validate FOLDER --baseline demo --mode quick --json``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from reports.record import Check, Example, Machine, Status, TaskMetric

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE", "REPORTED", "SUSPICIOUS", "SKIPPED"]
Kind = Literal["exact", "numeric", "generation"]
EXIT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
RANK: tuple[Outcome, ...] = ("FAIL", "INCONCLUSIVE", "SUSPICIOUS", "PASS", "REPORTED", "SKIPPED")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Finding(_Frozen):
    """One thing that is wrong: ``where`` names the file, node, tensor or key; ``layer`` the decoder layer, if one."""

    where: str
    what: str
    layer: int | None = None


class CheckResult(_Frozen):
    """One named check. ``figure`` is its one-line result; ``figures`` and ``tasks`` hold what was measured."""

    name: str
    kind: Kind
    status: Outcome
    figure: str
    seconds: float
    findings: list[Finding] = []
    figures: list[Check] = []
    tasks: list[TaskMetric] = []
    notes: list[str] = []


class Place(_Frozen):
    """Where the folder leaves the baseline: ``layer`` (-1: the embedding; the number of layers: the head), operator.

    ``deviation`` is the relative error of the residual stream behind that layer, ``before`` that in front of it.
    """

    layer: int
    operator: str
    deviation: float
    before: float
    detail: str


class Validation(_Frozen):
    """Everything of one run; ``verdict`` with its ``reasons`` decides the exit code.

    ``folder_sha256`` is over names and SHA-256 of every file of the folder, "" where it could not be read;
    ``baseline_sha256`` the same over the baseline's weights, configuration and tokenizer.
    """

    schema_version: Literal[1] = 1
    kind: Literal["validation"] = "validation"
    created_utc: str = ""
    folder: str
    folder_sha256: str
    baseline: str
    baseline_sha256: str = ""
    mode: str
    tier: str
    dataset: str
    settings: dict[str, str | int | float | bool | None]
    results: list[CheckResult]
    examples: list[Example]
    place: Place | None
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    reasons: list[str]
    seconds: float
    machine: Machine
    versions: dict[str, str]
    notes: list[str]

    @property
    def exit_code(self) -> int:
        """0 passed, 1 failed, 3 inconclusive."""
        return EXIT_CODES[self.verdict]

    def to_json(self) -> str:
        """Indented JSON, newline at the end."""
        return self.model_dump_json(indent=1) + "\n"


def worst(statuses: list[Status]) -> Outcome:
    """The status that decides among a check's figures; REPORTED when there is nothing to judge."""
    return min(statuses, key=RANK.index, default="REPORTED")


def decide_verdict(results: list[CheckResult]) -> tuple[Literal["PASS", "FAIL", "INCONCLUSIVE"], list[str]]:
    """The verdict over all checks, and why: the failed ones in order, else the undecided ones."""
    for status, verdict in (("FAIL", "FAIL"), ("INCONCLUSIVE", "INCONCLUSIVE")):
        chosen = [r for r in results if r.status == status]
        if chosen:
            return verdict, [f"{r.name}: {_why(r)}" for r in chosen]  # type: ignore[return-value]
    if not any(r.status in ("PASS", "SUSPICIOUS") for r in results):
        return "INCONCLUSIVE", ["no check could judge anything"]
    suspicious = [r.name for r in results if r.status == "SUSPICIOUS"]
    note = [f"suspicious though inside their margins: {', '.join(suspicious)}"] if suspicious else []
    return "PASS", [f"{sum(r.status in ('PASS', 'SUSPICIOUS') for r in results)} checks passed", *note]


def _why(result: CheckResult) -> str:
    if result.findings:
        first = result.findings[0]
        more = f" (and {len(result.findings) - 1} more)" if len(result.findings) > 1 else ""
        return f"{first.where}: {first.what}{more}"
    return result.figure
