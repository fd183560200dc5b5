"""One measurement at a time on every machine of a Ray cluster, as many machines at once as have joined.

:mod:`bench.process.workers` may put several workers on one machine; two measurements there would measure each other.
So here a machine is one Ray node, gets one process of ours that asks for all of its CPUs and GPUs (Ray then starts
nothing beside it) and holds the lock of :mod:`bench.machine.lock` (so that two Ray nodes on one computer, another
cluster or somebody at its keyboard cannot measure there either). Machines may join and leave while it runs.

Try: ``ray start --head; llama-onnx sweep FILE.yaml --ray``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

from bench.errors import BenchError, user_error
from bench.machine.lock import machine_lock
from bench.process.pool import Pool, Queue

Unit = TypeVar("Unit")
Answer = TypeVar("Answer")
START_S = 120.0
"""How long a machine may take to start our process there; after that other work of Ray holds its CPUs."""
DEATHS = 3
"""A machine on which our process died so often in a row is left out."""


class MachineError(BenchError):
    """What went wrong on one machine, which it names; ends as the error itself would."""

    def __init__(self, machine: str, error: BaseException) -> None:
        super().__init__(f"on {machine}: {error}")
        told = user_error(error)
        self.exit_code = told[1] if told else 4


class _Station:
    """Our process on one machine."""

    def __init__(self, what: str, wait_s: float, prepare: Callable[[], str], work: Callable[[Any], Any]) -> None:
        self._what, self._wait_s, self._held = what, wait_s, ExitStack()
        self._prepare, self._work = prepare, work

    def open(self) -> str:
        """Take the machine's lock until this process ends, then ``prepare``; the machine's kind."""
        import psutil

        # Ray starts workers at a lower priority than its own; a measurement runs as it does without Ray.
        parent = psutil.Process().parent()
        with suppress(psutil.Error, OSError):
            if parent is not None:
                psutil.Process().nice(parent.nice())
        self._held.enter_context(machine_lock(self._what, self._wait_s))
        return self._prepare()

    def run(self, unit: Any) -> Any:
        """One unit."""
        return self._work(unit)


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

    Raises:
        MachineError: ``prepare`` or ``work`` raised.
        WorkerError: no machine is left, or a unit lost its machine too often.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def places() -> dict[str, str]:
        # A head started with --num-cpus=0 only leads.
        usable = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
        return {n["NodeID"]: f"{n['NodeManagerHostname']} ({n['NodeID'][:8]})" for n in usable}

    def start(key: str) -> Any:
        have = next(n["Resources"] for n in ray.nodes() if n["NodeID"] == key)
        make = ray.remote(
            num_cpus=have["CPU"],
            num_gpus=have.get("GPU", 0),
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(key, soft=False),
        )(_Station)
        return make.remote(f"{what} of {os.uname().nodename}", wait_s, prepare, work)

    Pool(
        units,
        Queue([group(u) for u in units], bound),
        places=places,
        start=start,
        done=lambda place, answer, member: done(units[place], answer, member.key, member.name),
        say=say,
        noun="machine",
        remedy="what is done is on the disk: join machines (ray start --address=HEAD:6379) and go on with --resume",
        deaths=DEATHS,
        start_s=START_S + wait_s,
        describe=lambda place: str(units[place]),
        wrap=MachineError,
    ).run()
