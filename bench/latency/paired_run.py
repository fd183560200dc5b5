"""Interleaved pairs in fresh processes, each appended to the log of cases as it ends, resumable.

What is run next follows from the plan and the records alone, so a run that was killed goes on where it was. A crash, a
lack of memory or a hang is a recorded outcome, a disturbed pair is repeated (both sides) within a cap.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from bench.errors import BenchError
from bench.latency.case_log import CaseLog
from bench.latency.sides import SideSpec, environment
from bench.machine.state import Disturbance, Limits, Watch
from bench.process.child import TIED, Ended, run_child, run_in_turn
from export.manifest import MANIFEST_NAME, read_manifest
from reports.compare import FAILED, Rules, needs_extension
from reports.comparison import CaseRecord, ComparedSide, MachineState, SideName
from reports.record import Case

CHILD = Path(__file__).resolve().parent / "measure_case.py"
PLAN = "plan.json"
Tick = Callable[[str], None]
Turns = Literal["rounds", "processes"]


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
    turns: Turns = "processes"
    """What alternates inside a pair: whole ``processes``, or their ``rounds`` while both are alive."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in ``plan.json``."""
        made = asdict(replace(self, cases=()))
        made["cases"] = [c.model_dump() for c in self.cases]
        made["rules"]["margins"] = dict(self.rules.margins)
        made["contents"] = self.contents
        return json.loads(json.dumps(made))  # type: ignore[no-any-return]

    @cached_property
    def contents(self) -> dict[str, str]:
        """What each side's folder holds, by side: a path alone would take other files for the measured ones."""
        return {s.name: content_of(Path(s.folder).expanduser()) for s in (self.base, self.candidate)}

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


def content_of(folder: Path) -> str:
    """Digest of what a folder holds: the hashes in its manifest; names, sizes and times of the files of one without.

    Raises:
        ManifestError: a manifest that cannot be read.
    """
    found: list[Any]
    if (folder / MANIFEST_NAME).exists():
        m = read_manifest(folder)
        found = [m.weights_sha256, m.spec_digest, *sorted((name, entry.sha256) for name, entry in m.files.items())]
    else:
        files = sorted(p for p in folder.iterdir() if p.is_file())
        found = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def case_key(case: Case) -> str:
    """Such as ``b1-p128-n32``."""
    return f"b{case.batch}-p{case.prompt}-n{case.new_tokens}"


def parse_case(text: str) -> Case:
    """``b1-p128-n32`` as a case.

    Raises:
        BenchError: another form, or a size below 1 (2 new tokens at least).
    """
    found = re.fullmatch(r"b(\d+)-p(\d+)-n(\d+)", text.strip())
    batch, prompt, new = map(int, found.groups()) if found else (0, 0, 0)
    if min(batch, prompt) < 1 or new < 2:
        raise BenchError(f"{text!r} is not a case; write batch, prompt and new tokens (2 or more) as b1-p128-n32")
    return Case(batch=batch, prompt=prompt, new_tokens=new)


class SideRefusedError(BenchError):
    """Nothing of a side can be measured: its first process ended with an error that is meant for the user."""

    def __init__(self, side: SideName, why: str) -> None:
        super().__init__(f"--{side}: {why}")
        self.side, self.why = side, why


class PairedRun:
    """One comparison being measured into a folder.

    Args:
        plan: what to measure.
        out: the folder; made when it is not there.
        resume: go on with what the folder holds.

    Raises:
        BenchError: records without ``resume``, or records of another plan or of other files.
    """

    def __init__(self, plan: Plan, out: Path, resume: bool = False, fingerprint: str | None = None) -> None:
        self.plan, self.out, self.fingerprint = plan, out, fingerprint
        self.log = CaseLog(out, resume)
        if any(r.run != plan.run_id for r in self.records):
            changed = self._changed_folders()
            why = f"before the files of {changed} changed" if changed else f"by another plan ({out / PLAN})"
            raise BenchError(f"{self.log.file} was measured {why}; take another --out")
        (out / PLAN).write_text(json.dumps(plan.to_json(), indent=1) + "\n", encoding="utf-8")

    def _changed_folders(self) -> str:
        """The folders that alone make this plan another one than the file's; empty where more differs."""
        try:
            kept = json.loads((self.out / PLAN).read_text(encoding="utf-8"))
            before = kept.pop("contents")
        except (OSError, ValueError, KeyError):
            return ""
        now = self.plan.to_json()
        contents = now.pop("contents")
        folders = [now[side]["folder"] for side in contents if contents[side] != before.get(side)]
        return " and ".join(dict.fromkeys(folders)) if kept == now else ""

    @property
    def records(self) -> list[CaseRecord]:
        """What is measured so far."""
        return self.log.records

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

    def _todo(self, case: str, pair: int) -> Iterator[tuple[int, list[SideName]]]:
        """(attempt, sides still to be measured in their order) for a pair; asks the records anew after each."""
        order: list[SideName] = ["base", "candidate"]
        if not self.plan.base_first(case, pair):
            order.reverse()
        for attempt in range(self.plan.repeats + 1):
            if self.plan.turns == "rounds" and not self._attempts(case, pair).get(attempt) and not self.given_up(case):
                yield attempt, order
            for side in order:
                if self.given_up(case):
                    return
                if side not in self._attempts(case, pair).get(attempt, {}):
                    yield attempt, [side]
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
            for attempt, sides in self._todo(key, pair):
                for record in self.log.append(self._measure(case, pair, attempt, sides)):
                    tick(f"{key}, pair {pair + 1}, {record.side}" + (f": {record.reason}" if record.reason else ""))

    # -- one process, or two in turn --------------------------------------------------------------------------------

    def _measure(self, case: Case, pair: int, attempt: int, sides: list[SideName]) -> list[CaseRecord]:
        """The records of one process, or of a pair's two processes that took their rounds in turn."""
        key, in_turn = case_key(case), len(sides) > 1
        seed = random.Random(f"{self.plan.seed}:{key}:{pair}").randrange(1 << 31)
        how = {"rounds": self.plan.rounds, "warmup_cap": self.plan.warmup_cap, "seed": seed, "in_turn": in_turn}
        specs = {"base": self.plan.base, "candidate": self.plan.candidate}
        commands = {side: child_command(specs[side], case, tied=in_turn, **how) for side in sides}
        watch = Watch(self.plan.limits)
        if in_turn:
            ends = run_in_turn(commands, self.plan.rounds, self.plan.limit_s)
        else:
            ends = {side: run_child(*commands[side], self.plan.limit_s) for side in sides}
        stopped = watch.stop()
        made: list[CaseRecord] = []
        for side, ended in ends.items():
            if ended.refusal and not any(r.side == side for r in self.records):
                raise SideRefusedError(side, ended.refusal)
            made.append(
                case_record(
                    ended,
                    watch.before,
                    stopped,
                    run=self.plan.run_id,
                    side=side,
                    case=key,
                    parameters=dict(case.model_dump()),
                    pair=pair,
                    attempt=attempt,
                    position=int((side == "base") != self.plan.base_first(key, pair)),
                    in_turn=True if in_turn else None,
                    seed=seed,
                    warmup_rounds=ended.found.get("warmup_rounds"),
                    steady=ended.found.get("steady"),
                    fingerprint=self.fingerprint,
                )
            )
        return made


def child_command(side: SideSpec, case: Case, *, tied: bool = True, **how: Any) -> tuple[list[str], dict[str, str]]:
    """Command and environment that measure a case of a side; ``tied`` to this process, with whose end they end."""
    command = [side.python(), "-P", str(CHILD), json.dumps({**side.arguments(), **case.model_dump(), **how})]
    return [side.python(), "-P", str(TIED), *command] if tied else command, environment(side)


def case_record(
    ended: Ended, before: MachineState, stopped: tuple[MachineState, Disturbance], **own: Any
) -> CaseRecord:
    """The record of a process that ended; of one that ended well on a disturbed machine, an invalid one.

    Args:
        ended: the process.
        before: the machine before it.
        stopped: the machine after it, and what disturbed it meanwhile (:meth:`bench.machine.state.Watch.stop`).
        own: the record's other fields: which case of which run this is.
    """
    after, seen = stopped
    disturbed = ended.outcome == "ok" and bool(seen.reason)
    metrics = ended.found.get("metrics", {})
    return CaseRecord(
        schema_version=1,
        metrics=metrics,
        units={m: "B" if m == "peak_memory" else "s" for m in metrics},
        outcome="invalid" if disturbed else ended.outcome,
        reason=seen.reason if disturbed else ended.reason,
        last_lines=ended.last_lines,
        exit_code=ended.exit_code,
        duration_s=ended.seconds,
        before=before,
        after=after,
        steal_fraction=seen.steal,
        others_fraction=seen.others,
        versions=ended.found.get("versions", {}),
        details={**ended.found.get("details", {}), **ended.found.get("model", {})},
        **own,
    )


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
