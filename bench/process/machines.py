"""One measurement at a time on every machine of a Ray cluster, as many machines at once as have joined.

:mod:`bench.process.workers` may put several workers on one machine; two measurements there would measure each other.
So here a machine is one Ray node, gets one process of ours that asks for all of its CPUs and GPUs (Ray then starts
nothing beside it) and holds the lock of :mod:`bench.machine.lock` (so that two Ray nodes on one computer, another
cluster or somebody at its keyboard cannot measure there either). Machines may join and leave while it runs.

Try: ``ray start --head; llama-onnx sweep FILE.yaml --ray``.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from bench.errors import BenchError
from bench.machine.lock import BusyError, machine_lock
from bench.process.workers import RETRIES, WorkerError, losses

Unit = TypeVar("Unit")
Answer = TypeVar("Answer")
POLL_S = 2.0
"""How often it is looked whether machines have joined."""
START_S = 120.0
"""How long a machine may take to start our process there; after that other work of Ray holds its CPUs."""
DEATHS = 3
"""A machine on which our process died so often is left out."""


class MachineError(BenchError):
    """What went wrong on one machine, which it names; ends as the error itself would."""

    def __init__(self, machine: str, error: BaseException) -> None:
        super().__init__(f"on {machine}: {error}")
        self.exit_code = int(getattr(error, "exit_code", 4))


class Queue:
    """Which unit a free machine takes next.

    The units of one group stay on machines of one kind (equal fingerprints), the kind that took its first unit: a
    median over processes is of one kind of machine. A unit that was lost goes to another machine. Where no machine is
    left that a rule would have, the rule gives way, so that nothing waits for ever.
    """

    def __init__(self, groups: Sequence[Hashable], bound: Mapping[Hashable, str]) -> None:
        self._groups, self._bound = list(groups), dict(bound)
        self.waiting = list(range(len(groups)))
        self._avoid: dict[int, set[str]] = {}

    def take(self, node: str, live: Mapping[str, str]) -> int | None:
        """The place of the unit for ``node``; None when all that wait are for others. ``live``: node -> its kind."""
        for place in self.waiting:
            allowed = {n: k for n, k in live.items() if n not in self._avoid.get(place, ())} or dict(live)
            wanted = self._bound.get(self._groups[place])
            if wanted in allowed.values():
                allowed = {n: k for n, k in allowed.items() if k == wanted}
            if node in allowed:
                self._bound.setdefault(self._groups[place], live[node])
                self.waiting.remove(place)
                return place
        return None

    def put_back(self, place: int, node: str) -> None:
        """``node`` lost the unit at ``place``; it is the next one to be taken."""
        self._avoid.setdefault(place, set()).add(node)
        self.waiting.insert(0, place)


class _Station:
    """Our process on one machine."""

    def __init__(self, what: str, wait_s: float) -> None:
        self._what, self._wait_s, self._held = what, wait_s, ExitStack()

    def open(self, prepare: Callable[[], str]) -> str:
        """Take the machine's lock until this process ends, then ``prepare``; the machine's kind."""
        import psutil

        # Ray starts workers at a lower priority than its own; a measurement runs as it does without Ray.
        parent = psutil.Process().parent()
        with suppress(psutil.Error, OSError):
            if parent is not None:
                psutil.Process().nice(parent.nice())
        self._held.enter_context(machine_lock(self._what, self._wait_s))
        return prepare()

    def run(self, work: Callable[[Any], Any], unit: Any) -> Any:
        """One unit."""
        return work(unit)


@dataclass
class _Machine:
    """A node on which our process was started; ``kind`` is empty until it has opened."""

    node: str
    name: str
    actor: Any
    since: float = field(default_factory=time.monotonic)
    kind: str = ""


class Spread(Generic[Unit, Answer]):
    """Units of work given to machines; see :func:`spread`, which is its one use."""

    def __init__(
        self,
        units: Sequence[Unit],
        work: Callable[[Unit], Answer],
        queue: Queue,
        start: Callable[[Any, str], Any],
        prepare: Callable[[], str],
        done: Callable[[Unit, Answer, str, str], None],
        say: Callable[[str], None],
        wait_s: float,
        retries: int,
    ) -> None:
        self._units, self._work, self._queue, self._start = units, work, queue, start
        self._prepare, self._done, self._say = prepare, done, say
        self._wait_s, self._retries = wait_s, retries
        self._machines: dict[str, _Machine] = {}
        self._pending: dict[Any, tuple[_Machine, int | None]] = {}
        self._left_out: dict[str, str] = {}
        self._deaths: Counter[str] = Counter()
        self._lost: Counter[int] = Counter()

    def run(self) -> None:
        """Until every unit is done."""
        import ray

        try:
            while self._queue.waiting or any(place is not None for _, place in self._pending.values()):
                self._hire()
                self._give()
                if not self._pending:
                    reasons = "".join(f"; {name}: {why}" for name, why in self._left_out.items())
                    raise WorkerError(
                        f"no machine of the Ray cluster is left to measure on{reasons}. What is done is on the disk: "
                        "join machines (ray start --address=HEAD:6379) and go on with --resume"
                    )
                ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=POLL_S)
                for answer in ready:
                    self._take_in(answer)
                self._give_up_waiting()
        finally:
            for machine in self._machines.values():
                ray.kill(machine.actor)

    def _hire(self) -> None:
        """Start our process on every machine that has none yet; forget idle ones that are gone."""
        import ray

        nodes = ray.nodes()
        gone = {n["NodeID"] for n in nodes if not n["Alive"]} - {m.node for m, _ in self._pending.values()}
        for key in gone & set(self._machines):
            self._say(f"{self._machines.pop(key).name} has gone")
        for node in nodes:
            key, resources = node["NodeID"], node["Resources"]
            name = f"{node['NodeManagerHostname']} ({key[:8]})"
            usable = node["Alive"] and resources.get("CPU", 0) > 0  # a head started with --num-cpus=0 only leads
            if not usable or key in self._machines or name in self._left_out:
                continue
            machine = _Machine(key, name, self._start(node, key))
            self._machines[key] = machine
            self._pending[machine.actor.open.remote(self._prepare)] = (machine, None)

    def _give(self) -> None:
        """A unit for every machine that is free."""
        live = {m.node: m.kind for m in self._machines.values() if m.kind}
        busy = {m.node for m, _ in self._pending.values()}
        for node in live:
            place = None if node in busy else self._queue.take(node, live)
            if place is not None:
                machine = self._machines[node]
                self._pending[machine.actor.run.remote(self._work, self._units[place])] = (machine, place)

    def _take_in(self, ready: Any) -> None:
        """What came back from a machine: an answer, an error, or its death."""
        import ray
        from ray.exceptions import RayTaskError

        machine, place = self._pending.pop(ready)
        try:
            answer = ray.get(ready)
        except RayTaskError as e:
            if isinstance(e.cause, BusyError):
                self._leave_out(machine, str(e.cause))
                return
            raise MachineError(machine.name, e.cause) from None
        except losses() as e:
            self._bury(machine, place, e)
            return
        if place is None:
            machine.kind = answer
            self._say(f"{machine.name} takes part (fingerprint {answer[:8]})")
        else:
            self._done(self._units[place], answer, machine.node, machine.name)

    def _bury(self, machine: _Machine, place: int | None, error: BaseException) -> None:
        """Our process on that machine is gone; where the machine still is, a new one is started."""
        import ray

        ray.kill(machine.actor)
        del self._machines[machine.node]
        self._deaths[machine.node] += 1
        if self._deaths[machine.node] >= DEATHS:
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:160]
            self._left_out[machine.name] = f"our process died there {DEATHS} times ({last})"
            self._say(f"{machine.name} is left out: {self._left_out[machine.name]}")
        if place is None:
            return
        self._lost[place] += 1
        if self._lost[place] > self._retries:
            first = str(error).splitlines()[0][:160]
            raise WorkerError(
                f"{self._units[place]} lost its machine {self._lost[place]} times ({first}); what is done is on the "
                "disk: go on with --resume"
            )
        self._queue.put_back(place, machine.node)
        self._say(f"{machine.name} was lost; what it was measuring is given to another machine")

    def _leave_out(self, machine: _Machine, why: str) -> None:
        import ray

        ray.kill(machine.actor)
        del self._machines[machine.node]
        self._left_out[machine.name] = why
        self._say(f"{machine.name} is left out: {why}")

    def _give_up_waiting(self) -> None:
        for ready, (machine, place) in list(self._pending.items()):
            if place is None and time.monotonic() - machine.since > START_S + self._wait_s:
                del self._pending[ready]
                self._leave_out(machine, "other work of Ray holds its CPUs or GPUs")


def spread(
    units: Sequence[Unit],
    work: Callable[[Unit], Answer],
    *,
    what: str,
    group: Callable[[Unit], Hashable],
    bound: Mapping[Hashable, str],
    prepare: Callable[[], str],
    done: Callable[[Unit, Answer, str, str], None],
    say: Callable[[str], None] = lambda _: None,
    wait_s: float = 0.0,
    retries: int = RETRIES,
) -> None:
    """``work(unit)`` for every unit on some machine of the cluster that was joined, never two at once on one.

    Args:
        units: picklable; the earlier ones are given away first.
        work: runs on the machine, where this suite has to be installed; sent by cloudpickle.
        what: who measures, for the message that somebody else on that machine gets.
        group: units of equal groups stay on machines of one kind where there is a choice.
        bound: group -> the kind that has measured of it before.
        prepare: run once on each machine, gives its kind (its fingerprint); what it raises ends all.
        done: called here with (unit, answer, node's id, machine's name) as answers come in.
        say: told in a line who takes part, who does not, and who was lost.
        wait_s: how long a machine on which somebody measures is waited for; after that it is left out.
        retries: how often a unit may lose its machine.

    Raises:
        MachineError: ``prepare`` or ``work`` raised.
        WorkerError: no machine is left, or a unit lost its machine too often.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def start(node: Any, key: str) -> Any:
        have = node["Resources"]
        make = ray.remote(
            num_cpus=have["CPU"],
            num_gpus=have.get("GPU", 0),
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(key, soft=False),
        )(_Station)
        return make.remote(f"{what} of {os.uname().nodename}", wait_s)

    queue = Queue([group(u) for u in units], bound)
    Spread(units, work, queue, start, prepare, done, say, wait_s, retries).run()
