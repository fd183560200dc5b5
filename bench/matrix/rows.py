"""The rows of a matrix: one exported folder under one ONNX Runtime after the other, each beside the reference.

A row is the gate's numeric and generation checks over a session in that environment, then interleaved pairs of fresh
processes in both, judged as ``llama-onnx compare`` judges. A refusal or a crash is a row. Each row is on the disk when
it ends, and its pairs as each process ends, so a run that was killed goes on.

Try: ``llama-onnx matrix FOLDER --baseline demo --runtime onnxruntime==1.27.0,1.32.0``.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from bench.deployment import Deployment
from bench.errors import BenchError
from bench.gate.found import CheckSpec
from bench.gate.registry import CHECKS
from bench.gate.subject import Subject
from bench.gate.validate import Gate
from bench.latency.judged import judged_document
from bench.latency.paired_run import PairedRun, SideRefusedError, case_key
from bench.latency.paired_run import Plan as PairPlan
from bench.latency.sides import SideSpec
from bench.machine.environment import machine
from bench.machine.state import Limits
from bench.matrix.differ import differ
from bench.matrix.reproduce import write_reproduction
from bench.matrix.runner import RemoteRunner
from bench.runtimes.environments import Runtime, environment_name
from bench.runtimes.remote import RemoteSession, RuntimeDiedError
from export.manifest import release
from reports.compare import Rules, verdict_of
from reports.comparison import Comparison, SideName
from reports.matrix import OUTCOMES, Difference, MatrixRow, Outcome
from reports.publish import write_atomically, write_report
from reports.record import Case
from reports.validation import Validation, overall
from reports.validation import Verdict as Word
from runtime.errors import ProviderUnavailableError, SessionError
from runtime.ort_session import accuracy_level
from runtime.providers import PROVIDERS
from runtime.settings import SessionSettings

PLAN, ROW, REPRODUCTION = "plan.json", "row.json", "reproduce.py"
TEXT = 1000
"""Tokens of text that two runtimes are compared over."""
CHECKED: tuple[CheckSpec, ...] = tuple(c for c in CHECKS if c.kind != "exact")
"""What depends on the runtime: exact checks read files."""


@dataclass(frozen=True)
class Side:
    """A runtime and one of its execution providers."""

    runtime: Runtime
    provider: str

    @property
    def slug(self) -> str:
        """The name of the row's folder."""
        r = self.runtime
        name = f"{r.distribution or environment_name(r.venv)}-{r.version}"
        if r.venv:  # several may have one name
            name += f"-{hashlib.sha256(str(r.folder).encode()).hexdigest()[:8]}"
        return re.sub(r"[^\w.+-]+", "-", f"{name}-{self.provider}").strip("-")


@dataclass(frozen=True)
class Plan:
    """What decides the rows; ``cases`` empty leaves speed out."""

    reference: Side
    cases: tuple[Case, ...]
    rules: Rules
    seed: int
    rounds: int = 4
    warmup_cap: int = 3
    limits: Limits = field(default_factory=Limits)


def refuse_earlier(out: Path, resume: bool) -> None:
    """Nothing that was measured is overwritten.

    Raises:
        BenchError: rows without ``resume``.
    """
    if not resume and (out / "rows" / PLAN).is_file():
        raise BenchError(f"{out} holds an earlier run; add --resume to go on with it, or take another --out")


class Rows:
    """Rows being measured into a folder.

    Args:
        subject: folder, baseline, mode and data; its deployment gives threads and options.
        plan: what to measure.
        out: the folder; made when it is not there.
        resume: go on with what it holds.
        tick: told what is being done.
        on_row: told each row as it ends.
        command: how to repeat it.

    Raises:
        BenchError: rows without ``resume``, or of another plan, folder or baseline; a case that the folder cannot hold.
    """

    def __init__(
        self,
        subject: Subject,
        plan: Plan,
        out: Path,
        *,
        resume: bool = False,
        tick: Callable[[str], None] = lambda _: None,
        on_row: Callable[[MatrixRow], None] = lambda _: None,
        command: tuple[str, ...] = (),
    ) -> None:
        refuse_earlier(out, resume)
        if long := [c for c in plan.cases if c.prompt + c.new_tokens > subject.manifest.longest_row]:
            raise BenchError(
                f"--cases {case_key(long[0])} is longer than the {subject.manifest.longest_row:,} tokens that "
                f"{subject.folder} holds; take a shorter one"
            )
        self.subject, self.plan, self.out = subject, plan, out
        self._tick, self._on_row, self._command = tick, on_row, list(command)
        self.made: dict[Side, MatrixRow] = {}
        self._here = machine()
        file = out / "rows" / PLAN
        if file.is_file() and file.read_text(encoding="utf-8") != self.identity:
            raise BenchError(f"{out} was measured by another plan, or of other files; take another --out")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, self.identity)

    @cached_property
    def identity(self) -> str:
        """Everything that decides a row, as text."""
        s = self.subject
        plan = asdict(replace(self.plan, cases=(), rules=replace(self.plan.rules, margins={})))
        plan["cases"] = [case_key(c) for c in self.plan.cases]
        plan["margins"] = dict(self.plan.rules.margins)
        files = [s.digest, s.baseline.digest, s.dataset.sha256]
        facts = [*files, s.settings(), s.deployment.limit_s, plan, self._here.fingerprint]
        return json.dumps(facts, sort_keys=True, indent=1, default=str) + "\n"

    def row(self, side: Side, parity: bool = True, speed: bool = True) -> MatrixRow:
        """One row: measured now, or as an earlier run left it. The reference's has to be the first.

        Args:
            side: runtime and provider.
            parity: whether the gate is run.
            speed: whether pairs are measured, unless it is the reference or the plan has no cases.
        """
        reference = side == self.plan.reference
        speed = speed and bool(self.plan.cases) and not reference and self.made[self.plan.reference].outcome == "ran"
        kept = self.made.get(side) or self._kept(side)
        if kept is not None and (kept.outcome != "ran" or ((kept.parity or not parity) and (kept.speed or not speed))):
            self.made[side] = kept
            return kept
        self._tick(f"{side.runtime.label}, {side.provider}")
        made = self._measure(side, parity, speed, reference)
        write_atomically(self._home(side) / ROW, made.model_dump_json(indent=1) + "\n")
        self.made[side] = made
        self._on_row(made)
        return made

    def complete_reference(self) -> None:
        """Load time and peak memory of the reference, as the other rows' pairs measured it."""
        at = self.plan.reference
        found: dict[str, list[float]] = {}
        for result in (r for row in self.made.values() for r in row.speed):
            found.setdefault(result.metric, []).extend([result.base_median] if result.base_median else [])
        update = {
            field: statistics.median(found[metric])
            for field, metric in (("load_s", "load"), ("peak_memory_bytes", "peak_memory"))
            if found.get(metric)
        }
        self.made[at] = self.made[at].model_copy(update=update)

    def deployment(self, side: Side) -> Deployment:
        """How the folder runs on a side."""
        return replace(self.subject.deployment, runtime=side.runtime, provider=side.provider)

    def _home(self, side: Side) -> Path:
        home = self.out / "rows" / side.slug
        home.mkdir(parents=True, exist_ok=True)
        return home

    def _kept(self, side: Side) -> MatrixRow | None:
        try:
            return MatrixRow.model_validate_json((self._home(side) / ROW).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _measure(self, side: Side, parity: bool, speed: bool, reference: bool) -> MatrixRow:
        started = time.perf_counter()
        subject = replace(self.subject, deployment=self.deployment(side))
        subject.tick = lambda message: self._tick(f"{side.runtime.label}: {message}")
        gated = self._gate(subject, parity)
        subject.finish()
        compared = None
        if speed and gated.outcome == "ran":
            self.subject.baseline.close()  # PyTorch's weights are not kept beside two processes that are measured
            try:
                compared = self._compare(side, gated)
            except SideRefusedError as error:
                if error.side == "base":
                    raise BenchError(f"speed under {self.plan.reference.runtime.label}: {error.why}") from None
                gated = replace(gated, outcome="refused", reason=self._said(error.why))
        page = self._write(side, gated.validation, compared)
        difference, notes = None, list(compared.warnings) if compared else []
        if not reference and gated.differs and self.made[self.plan.reference].outcome == "ran":
            difference = self.difference(self.plan.reference, side, notes)
        verdict, reasons = gated.with_speed(compared)
        measured = [r for r in compared.records if r.side == "candidate" and r.outcome == "ok"] if compared else []

        def median(metric: str) -> float | None:
            values = [v for r in measured for v in r.metrics.get(metric, ())]
            return statistics.median(values) if values else None

        return MatrixRow(
            runtime=side.runtime.label,
            text=side.runtime.text,
            version=side.runtime.version,
            provider=side.provider,
            reference=reference,
            outcome=gated.outcome,
            reason=gated.reason,
            parity=gated.validation.verdict if gated.validation else None,
            results=gated.validation.results if gated.validation else [],
            speed=compared.results if compared else [],
            verdict=verdict,
            reasons=reasons,
            difference=difference,
            load_s=median("load") or gated.load_s,  # without pairs that of the one session
            peak_memory_bytes=median("peak_memory"),
            warnings=gated.warnings,
            session=subject.session,
            notes=notes,
            page=page,
            seconds=time.perf_counter() - started,
        )

    def difference(self, reference: Side, side: Side, notes: list[str]) -> Difference | None:
        """Where two runtimes differ over the folder, with a reproduction beside the row's page; None: no run shows it.

        Both are asked for each part of the graph with what the reference computed in front of it. ``notes`` gets a line
        where that could not be done.
        """
        s, where = self.subject, self.subject.deployment
        self._tick(f"where {side.runtime.label} differs")
        options = accuracy_level(s.manifest) | dict(where.session_options)
        runners = [
            RemoteRunner(
                of.runtime,
                SessionSettings(
                    of.provider, where.threads, provider_options=where.provider_options, session_options=options
                ),
                where.limit_s,
            )
            for of in (reference, side)
        ]
        ids = [i for w in s.windows for i in w][:TEXT] or list(range(1, 200))
        try:
            try:
                found = differ(s.folder, s.manifest, runners[0], runners[1], ids)
            except BenchError as error:
                notes.append(f"where it differs was not looked for: {self._said(error)}")
                return None
            if found is None:
                return None
            file, size = self._home(side) / REPRODUCTION, 0
            try:
                size = write_reproduction(found, file, runners[0], runners[1], PROVIDERS[side.provider].ort_name)
            except BenchError as error:
                notes.append(f"no reproduction: {self._said(error)}")
        finally:
            for runner in runners:
                runner.close()
        return Difference(
            layer=found.layer,
            node=found.node,
            operator=found.op_type,
            scenario=found.scenario,
            what=self._said(found.what),
            deviation=found.deviation,
            expected=found.case.limit if found.case else 0.0,
            reproduction=str(file.relative_to(self.out)) if size else "",
            reproduction_bytes=size,
        )

    def _gate(self, subject: Subject, parity: bool) -> Gated:
        """Open the folder there and run the checks; every end is a result."""
        session: RemoteSession | None = None
        gate = Gate(subject)
        try:
            opened = subject.candidate
            assert isinstance(opened, RemoteSession)
            session = opened
            if parity:
                gate.run(CHECKED)
        except SessionError as error:  # while it was opened; in a check it is that check's FAIL
            outcome: Outcome = "unavailable" if isinstance(error, ProviderUnavailableError) else "refused"
            if isinstance(error, RuntimeDiedError):
                outcome = error.outcome
            return Gated(outcome, self._said(error), warnings=[self._said(w) for w in error.warnings])
        finally:
            if session is not None:
                ended, warnings = session.child.ended, [self._said(w) for w in session.child.warnings()]
            subject.observe()
            subject.close()
        validation = gate.validation(place=False, command=self._command) if parity else None
        return Gated(ended.outcome if ended else "ran", self._said(ended or ""), validation, warnings, session.load_s)

    def _said(self, text: object) -> str:
        """What a runtime said, without the folder's place on this machine."""
        return str(text).replace(f"{self.subject.folder.absolute()}/", "")

    def _compare(self, side: Side, gated: Gated) -> Comparison:
        """Interleaved pairs of the reference and this side."""
        plan, where = self.plan, self.subject.deployment
        options = {**where.session_options, **where.provider_options}

        def spec(name: SideName, of: Side) -> SideSpec:
            folder, venv = str(self.subject.folder), str(of.runtime.folder)
            text = f"{folder},runtime={of.runtime.text}"
            return SideSpec(name, text, folder, of.provider, where.threads, dict(options), venv, any_runtime=True)

        pairs = PairPlan(
            base=spec("base", plan.reference),
            candidate=spec("candidate", side),
            cases=plan.cases,
            seed=plan.seed,
            rules=plan.rules,
            rounds=plan.rounds,
            warmup_cap=plan.warmup_cap,
            limit_s=where.limit_s,
            limits=plan.limits,
            turns="rounds" if side.provider == plan.reference.provider == "cpu" else "processes",
        )
        run = PairedRun(pairs, self._home(side) / "speed", resume=True, fingerprint=self._here.fingerprint)
        records = run.measure(lambda message: self._tick(f"{side.runtime.label}: {message}"))
        return judged_document(
            pairs,
            records,
            command=self._command,
            machine=self._here,
            duration_s=sum(r.duration_s or 0.0 for r in records),
            validation=gated.validation,
        )

    def _write(self, side: Side, validation: Validation | None, compared: Comparison | None) -> str:
        """The row's own page, relative to the matrix's; "" where nothing was measured."""
        subject = compared or validation
        if subject is None:
            return ""
        return str(write_report(subject, self._home(side)).relative_to(self.out))


@dataclass(frozen=True)
class Gated:
    """How the gate ended under a runtime."""

    outcome: Outcome
    reason: str = ""
    validation: Validation | None = None
    warnings: list[str] = field(default_factory=list)
    load_s: float | None = None

    @property
    def differs(self) -> bool:
        """Whether it is worth looking where."""
        failed = self.validation is not None and self.validation.verdict == "FAIL"
        return failed or self.outcome in ("refused", "crashed")

    @property
    def verdict(self) -> tuple[Word, list[str]]:
        """Verdict and reasons of a row without speed."""
        if self.outcome == "unavailable":
            return "INCONCLUSIVE", [self.reason]
        if self.outcome != "ran":
            return "FAIL", [f"{OUTCOMES[self.outcome]}: {self.reason}"]
        if self.validation is None:
            return "INCONCLUSIVE", ["no check was asked for"]
        return self.validation.verdict, self.validation.reasons

    def with_speed(self, compared: Comparison | None) -> tuple[Word, list[str]]:
        """Verdict and reasons of a row beside what its pairs say, where there are any."""
        if compared is None:
            return self.verdict
        told = verdict_of(compared.results, compared.records)
        judged = [*([self.verdict] if self.validation else []), (told.outcome, told.reasons)]
        reasons = [r for v, rs in judged if v != "PASS" for r in rs]
        return overall(v for v, _ in judged), reasons or told.reasons


def against_manifest(rows: Sequence[MatrixRow], oldest: str) -> list[str]:
    """Where rows and the manifest's oldest onnxruntime do not agree, a sentence each.

    A folder that is right nowhere is itself at fault: it says nothing about versions.

    Args:
        rows: measured; those of a machine that cannot run them say nothing.
        oldest: ``Manifest.oldest_runtime``; "" where it names none.
    """
    if not oldest or not any(row.parity == "PASS" for row in rows):
        return []
    told = []
    for row in rows:
        older = release(row.version) < release(oldest)
        right = row.outcome == "ran" and row.parity == "PASS"
        if not older and (row.outcome in ("refused", "crashed") or row.parity == "FAIL"):
            told.append(f"the manifest says that {oldest} and later are right for this folder; {row.name} is not")
        elif older and right:
            told.append(f"the manifest says that nothing older than {oldest} is right; {row.name} is, on this machine")
    return told
