"""Ray actors that take units of work until all are done; one that is lost costs its unit a retry.

The one loop of :mod:`bench.process.workers` (any worker will do) and :mod:`bench.process.machines` (machines have
kinds): start members, give units, take answers in, replace who was lost, give up with an error that names it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.errors import BenchError
from bench.machine.lock import BusyError

RETRIES = 2
"""How often a unit may lose its member and be given to another one."""
POLL_S = 2.0
"""How often it is looked whether machines have joined."""
START_PAUSE_S = 1.0
"""After a member died during start-up: Ray starts others on a lost machine until it notices."""


class WorkerError(BenchError):
    """A unit that killed its worker again and again, or workers that cannot be started."""

    exit_code = 4


class Queue:
    """Which unit a free member takes next.

    The units of one group stay on members of one kind (machines of equal fingerprints), the kind that took its first
    unit: a median over processes is of one kind of machine. A unit that was lost goes to another member. Where no
    member is left that a rule would have, the rule gives way, so that nothing waits for ever.
    """

    def __init__(self, groups: Sequence[Hashable], bound: Mapping[Hashable, str]) -> None:
        self._groups, self._bound = list(groups), dict(bound)
        self.waiting = list(range(len(groups)))
        self._avoid: dict[int, set[str]] = {}

    def take(self, key: str, live: Mapping[str, str]) -> int | None:
        """The place of the unit for ``key``; None when all that wait are for others. ``live``: key -> its kind."""
        for place in self.waiting:
            allowed = {n: k for n, k in live.items() if n not in self._avoid.get(place, ())} or dict(live)
            wanted = self._bound.get(self._groups[place])
            if wanted in allowed.values():
                allowed = {n: k for n, k in allowed.items() if k == wanted}
            if key in allowed:
                self._bound.setdefault(self._groups[place], live[key])
                self.waiting.remove(place)
                return place
        return None

    def put_back(self, place: int, key: str) -> None:
        """``key`` lost the unit at ``place``; it is the next one to be taken."""
        self._avoid.setdefault(place, set()).add(key)
        self.waiting.insert(0, place)


@dataclass(frozen=True)
class Member:
    """An actor with the methods ``open()``, which gives its kind, and ``run(unit)``."""

    key: str
    name: str
    actor: Any
    since: float = field(default_factory=time.monotonic)


@dataclass
class Pool:
    """The loop. Where a member has to be, how it is started and what errors are called differs; see the fields."""

    units: Sequence[Any]
    queue: Queue
    places: Callable[[], Mapping[str, str]]
    """Asked again and again: key -> name of the members that there should be now."""
    start: Callable[[str], Any]
    """The actor for a key."""
    done: Callable[[int, Any, Member], None]
    """Told (place of the unit, answer, whose)."""
    say: Callable[[str], None]
    """Told in a line who takes part, was lost, has gone or is left out."""
    noun: str
    remedy: str
    """What to do when a unit or all members were lost."""
    deaths: int
    """A member that died so often in a row, without an answer, is left out."""
    start_s: float = math.inf
    """How long a member may take to open."""
    describe: Callable[[int], str] = str
    """The unit at a place."""
    wrap: Callable[[str, Exception], Exception] = lambda _name, error: error
    """What is raised for an error in opening or in the work of the member of that name."""

    def __post_init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._kinds: dict[str, str] = {}
        self._pending: dict[Any, tuple[Member, int | None]] = {}  # Ray's reference -> who, at which unit (None: opens)
        self._left_out: dict[str, str] = {}
        self._died: Counter[str] = Counter()
        self._lost: Counter[int] = Counter()

    def run(self) -> None:
        """Until every unit is done.

        Raises:
            WorkerError: a unit lost its member too often, or no member is left.
            Exception: of opening or of the work, through ``wrap``.
        """
        import ray

        try:
            while self.queue.waiting or any(place is not None for _, place in self._pending.values()):
                self._hire()
                self._give()
                if not self._pending:
                    reasons = "".join(f"; {why}" for why in self._left_out.values())
                    raise WorkerError(f"no {self.noun} of the Ray cluster is left{reasons}; {self.remedy}")
                ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=POLL_S)
                for reference in ready:
                    self._take_in(*self._pending.pop(reference), reference)
        finally:  # after an error the others would keep their CPUs
            for member in list(self._members.values()):
                self._dismiss(member)

    def _hire(self) -> None:
        """Start what is missing; forget idle members whose place is gone, leave out what does not open."""
        for reference, (member, place) in list(self._pending.items()):
            if place is None and time.monotonic() - member.since > self.start_s:
                del self._pending[reference]
                self._leave_out(member, "other work of Ray holds its CPUs or GPUs")
        places, busy = self.places(), {m.key for m, _ in self._pending.values()}
        for key in self._members.keys() - places.keys() - busy:
            self.say(f"{self._members[key].name} has gone")
            self._dismiss(self._members[key])
        for key in [k for k in places if k not in self._members and k not in self._left_out]:
            member = self._members[key] = Member(key, places[key], self.start(key))
            self._pending[member.actor.open.remote()] = (member, None)

    def _give(self) -> None:
        """A unit for every member that is free."""
        busy = {m.key for m, _ in self._pending.values()}
        for key in self._kinds:
            place = None if key in busy else self.queue.take(key, self._kinds)
            if place is not None:
                member = self._members[key]
                self._pending[member.actor.run.remote(self.units[place])] = (member, place)

    def _take_in(self, member: Member, place: int | None, reference: Any) -> None:
        """What came back from a member: an answer, an error, or its death."""
        import ray
        from ray.exceptions import RayTaskError

        try:
            answer = ray.get(reference)
        except RayTaskError as e:
            if not isinstance(e.cause, BusyError):
                raise self.wrap(member.name, e.cause) from None
            self._leave_out(member, str(e.cause))
        except _losses() as e:
            self._bury(member, place, str(e).strip().splitlines() or [type(e).__name__])
        else:
            if place is None:
                self._kinds[member.key] = answer
                if answer:
                    self.say(f"{member.name} takes part (fingerprint {answer[:8]})")
            else:
                del self._died[member.key]
                self.done(place, answer, member)

    def _bury(self, member: Member, place: int | None, why: list[str]) -> None:
        """Its unit is given to another one; where it was a new one is started."""
        self._dismiss(member)  # where only its answer was lost, or it cannot be reached for a while
        self._died[member.key] += 1
        if self._died[member.key] >= self.deaths:
            self._leave_out(member, f"died {self.deaths} times in a row ({why[-1].strip()[:160]})")
        if place is None:
            time.sleep(START_PAUSE_S)
            return
        self._lost[place] += 1
        times, unit = self._lost[place], self.describe(place)
        if times > RETRIES:
            raise WorkerError(f"{unit} lost its {self.noun} {times} times ({why[0][:160]}); {self.remedy}") from None
        self.queue.put_back(place, member.key)
        self.say(f"{member.name} was lost; {unit} is given to another {self.noun}")

    def _leave_out(self, member: Member, why: str) -> None:
        self._dismiss(member)
        self._left_out[member.key] = f"{member.name}: {why}"
        self.say(f"{member.name} is left out: {why}")

    def _dismiss(self, member: Member) -> None:
        import ray

        ray.kill(member.actor)
        self._members.pop(member.key, None)
        self._kinds.pop(member.key, None)


def _losses() -> tuple[type[Exception], ...]:
    """What Ray raises when an actor is gone, with its machine or by itself, or its answer with it."""
    from ray import exceptions as e

    gone = e.RayActorError, e.ActorUnschedulableError, e.NodeDiedError, e.OutOfMemoryError, e.WorkerCrashedError
    # An answer above 100 KB stays on its machine until it is fetched, so it can be lost after the unit was done.
    return (*gone, e.ObjectLostError)
