"""Interleaved pairs in fresh processes, every case appended to ``cases.jsonl`` as it ends, resumable.

What is run next follows from the plan and the records alone, so a run that was killed goes on where it was. A crash, a
lack of memory or a hang is a recorded outcome, a disturbed pair is repeated (both sides) within a cap.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.machine_state import Limits, Watch
from bench.sides import SideSpec, environment
from reports.case_files import append_record, read_records, repair
from reports.compare import FAILED, Rules, needs_extension
from reports.comparison import CaseOutcome, CaseRecord, ComparedSide, SideName
from reports.record import Case

CHILD = Path(__file__).resolve().parent / "measure_case.py"
RECORDS, PLAN = "cases.jsonl", "plan.json"
LAST_LINES = 12
MEMORY_WORDS = ("bad_alloc", "out of memory", "memoryerror", "failed to allocate memory", "cannot allocate memory")
Tick = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is measured, and in which order; its digest names the run."""

    base: SideSpec
    candidate: SideSpec
    cases: tuple[Case, ...]
    seed: int
    rules: Rules = field(default_factory=Rules)
    rounds: int = 7
    warmup_cap: int = 6
    limit_s: float = 600.0
    repeats: int = 2
    """How often a disturbed pair is repeated."""
    give_up: int = 2
    """Failures of one side on one case after which that case is not tried again."""
    limits: Limits = field(default_factory=Limits)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in ``plan.json``."""
        from dataclasses import asdict

        made = asdict(replace(self, cases=()))
        made["cases"] = [c.model_dump() for c in self.cases]
        made["rules"]["margins"] = dict(self.rules.margins)
        return json.loads(json.dumps(made))  # type: ignore[no-any-return]

    @cached_property
    def run_id(self) -> str:
        """Digest of the plan."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def base_first(self, case: str, pair: int) -> bool:
        """A B B A or B A A B, drawn by the seed for each case and two pairs."""
        flip = random.Random(f"{self.seed}:{case}:{pair // 2}").random() < 0.5
        return flip == (pair % 2 == 0)

    def cases_of(self, pair: int) -> list[Case]:
        """The cases in the order of one pair's turn."""
        cases = list(self.cases)
        random.Random(f"{self.seed}:order:{pair}").shuffle(cases)
        return cases


def case_key(case: Case) -> str:
    """Such as ``b1-p128-n32``."""
    return f"b{case.batch}-p{case.prompt}-n{case.new_tokens}"


def parse_case(text: str) -> Case:
    """``b1-p128-n32`` as a case.

    Raises:
        BenchError: another form, or a size below 1 (2 new tokens at least).
    """
    parts = text.strip().split("-")
    try:
        if [p[:1] for p in parts] != ["b", "p", "n"]:
            raise ValueError
        batch, prompt, new = (int(p[1:]) for p in parts)
        if min(batch, prompt) < 1 or new < 2:
            raise ValueError
    except ValueError:
        raise BenchError(
            f"{text!r} is not a case; write batch, prompt and new tokens (2 or more) as b1-p128-n32"
        ) from None
    return Case(batch=batch, prompt=prompt, new_tokens=new)


class PairedRun:
    """One comparison being measured into a folder.

    Args:
        plan: what to measure.
        out: the folder; made when it is not there.
        resume: go on with what the folder holds.

    Raises:
        BenchError: records without ``resume``, or another plan's records.
    """

    def __init__(self, plan: Plan, out: Path, resume: bool = False, fingerprint: str | None = None) -> None:
        self.plan, self.out, self.fingerprint = plan, out, fingerprint
        self.file = out / RECORDS
        out.mkdir(parents=True, exist_ok=True)
        self.records: list[CaseRecord] = []
        if self.file.exists() and self.file.stat().st_size:
            if not resume:
                raise BenchError(
                    f"{self.file} holds an earlier run; add --resume to go on with it, or take another --out"
                )
            repair(self.file)
            self.records = read_records(self.file)
            if any(r.run != plan.run_id for r in self.records):
                raise BenchError(f"{self.file} was measured by another plan ({out / PLAN}); take another --out")
        (out / PLAN).write_text(json.dumps(plan.to_json(), indent=1) + "\n", encoding="utf-8")

    # -- what is to be done -----------------------------------------------------------------------------------------

    def _attempts(self, case: str, pair: int) -> dict[int, dict[SideName, CaseRecord]]:
        found: dict[int, dict[SideName, CaseRecord]] = {}
        for r in self.records:
            if r.case == case and r.pair == pair and r.side:
                found.setdefault(r.attempt, {})[r.side] = r
        return found

    def given_up(self, case: str) -> bool:
        """Whether one side failed so often on this case that it is not tried again."""
        failures = [r.side for r in self.records if r.case == case and r.outcome in FAILED]
        return any(failures.count(side) >= self.plan.give_up for side in ("base", "candidate"))

    def _todo(self, case: str, pair: int) -> Iterator[tuple[int, int, SideName]]:
        """(attempt, position, side) still to be measured for a pair; asks the records anew after each."""
        order: list[SideName] = ["base", "candidate"]
        if not self.plan.base_first(case, pair):
            order.reverse()
        for attempt in range(self.plan.repeats + 1):
            for position, side in enumerate(order):
                if self.given_up(case):
                    return
                if side not in self._attempts(case, pair).get(attempt, {}):
                    yield attempt, position, side
            if not any(r.disturbed for r in self._attempts(case, pair)[attempt].values()):
                return

    def measure(self, tick: Tick = lambda _: None) -> list[CaseRecord]:
        """Measure what the plan still lacks: the planned pairs, then the extension; returns all the records."""
        rules = self.plan.rules
        for pair in range(rules.planned):
            self._turn(pair, self.plan.cases_of(pair), tick)
        # The rule looks at the planned pairs only, so that a resumed run decides as the first one did.
        first = [r for r in self.records if (r.pair or 0) < rules.planned]
        more = set(needs_extension(first, rules)) if rules.most > rules.planned else set()
        for pair in range(rules.planned, rules.most):
            self._turn(pair, [c for c in self.plan.cases_of(pair) if case_key(c) in more], tick)
        return self.records

    def _turn(self, pair: int, cases: list[Case], tick: Tick) -> None:
        for case in cases:
            key = case_key(case)
            for attempt, position, side in self._todo(key, pair):
                record = self._measure(case, pair, attempt, position, side)
                append_record(self.file, record)
                self.records.append(record)
                tick(f"{key}, pair {pair + 1}, {side}" + (f": {record.reason}" if record.reason else ""))

    # -- one process ------------------------------------------------------------------------------------------------

    def _measure(self, case: Case, pair: int, attempt: int, position: int, side: SideName) -> CaseRecord:
        spec = self.plan.base if side == "base" else self.plan.candidate
        seed = random.Random(f"{self.plan.seed}:{case_key(case)}:{pair}").randrange(1 << 31)
        asked = {
            **spec.arguments(),
            **case.model_dump(),
            "rounds": self.plan.rounds,
            "warmup_cap": self.plan.warmup_cap,
            "seed": seed,
        }
        watch = Watch(self.plan.limits)
        started = time.perf_counter()
        ended = run_child([spec.python(), "-P", str(CHILD), json.dumps(asked)], environment(spec), self.plan.limit_s)
        seconds = time.perf_counter() - started
        after, machine = watch.stop()
        if ended.refusal and not any(r.side == side for r in self.records):
            raise BenchError(f"--{side}: {ended.refusal}")  # nothing of this side can be measured
        outcome, reason = ended.outcome, ended.reason
        if outcome == "ok" and machine.reason:
            outcome, reason = "invalid", machine.reason
        found = ended.found
        return CaseRecord(
            schema_version=1,
            run=self.plan.run_id,
            side=side,
            case=case_key(case),
            parameters=dict(case.model_dump()),
            pair=pair,
            attempt=attempt,
            position=position,
            sequence=len(self.records),
            metrics=found.get("metrics", {}),
            units={m: "B" if m == "peak_memory" else "s" for m in found.get("metrics", {})},
            outcome=outcome,
            reason=reason,
            last_lines=ended.last_lines,
            exit_code=ended.exit_code,
            duration_s=seconds,
            seed=seed,
            warmup_rounds=found.get("warmup_rounds"),
            steady=found.get("steady"),
            before=watch.before,
            after=after,
            steal_fraction=machine.steal,
            others_fraction=machine.others,
            fingerprint=self.fingerprint,
            versions=found.get("versions", {}),
            details={**found.get("details", {}), **found.get("model", {})},
        )


@dataclass(frozen=True)
class Ended:
    """How a child ended: its JSON when all is well, else what went wrong with its last lines of output."""

    outcome: CaseOutcome
    reason: str
    exit_code: int | None
    last_lines: list[str]
    found: dict[str, Any]
    refusal: str = ""
    """An error of ours, meant for the user: wrong input, a provider that is not there."""


def _last_lines(out: str, err: str) -> list[str]:
    lines = [line for line in (err + "\n" + out).splitlines() if line.strip()]
    return [line[:500] for line in lines[-LAST_LINES:]]


def run_child(command: list[str], env: dict[str, str], limit_s: float) -> Ended:
    """Run one child to its end, or kill it with all its own children at the limit."""
    child = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        _kill(child)
        out, err = child.communicate()
        return Ended("timeout", f"no end after {limit_s:g} s", None, _last_lines(out, err), {})
    except BaseException:
        _kill(child)
        child.communicate()
        raise
    if child.returncode == 0:
        try:
            return Ended("ok", "", 0, [], json.loads(out.strip().splitlines()[-1]))
        except (ValueError, IndexError):
            return Ended("crash", "ended well without a result", 0, _last_lines(out, err), {})
    lines = _last_lines(out, err)
    said = err.lower()
    if child.returncode in (-signal.SIGKILL, 137) or any(w in said for w in MEMORY_WORDS):
        return Ended("oom", "out of memory", child.returncode, lines, {})
    if child.returncode in (2, 4) and lines and lines[-1].startswith("error: "):
        message = lines[-1].removeprefix("error: ")
        return Ended("crash", message, child.returncode, lines, {}, refusal=message)
    how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
    return Ended("crash", how, child.returncode, lines, {})


def _kill(child: subprocess.Popen[str]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        child.kill()


def learned(side: ComparedSide, records: list[CaseRecord]) -> ComparedSide:
    """The side with what its processes told: versions, model, settings that really ran."""
    own = next((r for r in records if r.side == side.name and r.versions), None)
    if own is None:
        return side
    facts = dict(own.details)
    update: dict[str, Any] = {"versions": own.versions, "details": facts}
    for key in ("model", "precision", "weights_sha256", "spec_digest"):
        if key in facts:
            update[key] = str(facts.pop(key))
    return side.model_copy(update=update)
