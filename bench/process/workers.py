"""One long evaluation on several processes, GPUs or machines, through Ray.

Units of work (a window, a batch) are the same whatever the number of workers, each is computed by itself, and results
are put in the units' order: so N workers give the digits of one. A worker that dies costs its unit a retry; one that
dies during start-up costs none (Ray starts workers on a lost machine until it notices); an error *in* the work is not
retried, it would come again. Without Ray, or with one worker, all runs here in a plain loop.
Machines that should take part are joined with Ray's own ``ray start``; ``RAY_ADDRESS`` then names the cluster.

Try: ``llama-onnx perplexity FOLDER --dataset hf:wikitext --workers 2``.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any, Protocol, TextIO, TypeVar, cast

from bench.errors import BenchError
from bench.process.pool import Member, Pool, Queue, WorkerError
from export.manifest import first_line


class Closes(Protocol):
    """What a worker has open: a session, or both sides of a comparison."""

    def close(self) -> None:
        """Free it."""


Opened = TypeVar("Opened", bound=Closes)
Unit = TypeVar("Unit")
Answer = TypeVar("Answer")
DEATHS = 20
"""Of one worker in a row: at a second each, longer for two workers than Ray takes to notice a lost machine."""


def able(workers: int, units: int, say: Callable[[str], None] = lambda _: None) -> int:
    """How many processes can share so many units here; without Ray one, and a line says so.

    Raises:
        BenchError: fewer than one worker asked for.
    """
    if workers < 1:
        raise BenchError(f"{workers} workers cannot do anything; give --workers 1 or more")
    workers = min(workers, units)
    if workers > 1 and find_spec("ray") is None:
        say("Ray is not installed, so one process does all; pip install ray for more workers")
        return 1
    return workers


@contextmanager
def cluster(workers: int) -> Iterator[None]:
    """Ray for several :func:`run_units`, started once; nothing for one worker or without Ray."""
    started = able(workers, workers) > 1 and _start_ray(workers)
    try:
        yield
    finally:
        if started:
            leave_cluster()


def run_units(
    opener: Callable[[], Opened],
    work: Callable[[Opened, Unit], Answer],
    units: Sequence[Unit],
    *,
    workers: int = 1,
    gpus_per_worker: float = 0,
    say: Callable[[str], None] = lambda _: None,
    done: Callable[[int, Answer], None] = lambda _i, _a: None,
) -> list[Answer]:
    """``work(session, unit)`` for every unit, in their order.

    Args:
        opener: loads a session; called once in each worker. Give it a fixed number of threads: digits depend on it.
        work: must not depend on earlier units; sent to workers by cloudpickle, as ``opener`` is.
        units: picklable.
        workers: processes; more than there are units are not started.
        gpus_per_worker: GPUs that Ray sets aside for each, where its cluster has any.
        say: told in a line when Ray is missing and when a worker died.
        done: called here with (place, answer) as answers come in, in any order; for what is kept and progress bars.

    Raises:
        WorkerError: a unit lost its worker too often, or no worker can start.
        BenchError: fewer than one worker asked for.
        Exception: what ``work`` raised.
    """
    workers = able(workers, len(units), say)
    answers: dict[int, Answer] = {}

    def took(place: int, answer: Answer, _: Member | None = None) -> None:
        answers[place] = answer
        done(place, answer)

    if workers > 1:
        import ray

        remedy = f"not enough memory for {workers} workers, or is this suite not on every machine of the cluster?"
        with cluster(workers):
            if not ray.cluster_resources().get("GPU"):
                gpus_per_worker = 0  # nothing could be scheduled; the session says whether it runs without one
            # Over all machines: Ray's own choice fills the first one before it takes the next.
            options = {"num_cpus": 1, "num_gpus": gpus_per_worker, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
            make = ray.remote(**options)(_Worker)
            names = {str(k): f"worker {k + 1}" for k in range(workers)}
            Pool(
                units,
                Queue([None] * len(units), {}),
                places=lambda: names,
                start=lambda _: make.remote(opener, work),
                done=took,
                say=say,
                noun="worker",
                remedy=remedy,
                deaths=DEATHS,
                describe=lambda place: f"unit {place + 1} of {len(units)}",
            ).run()
    elif units:
        with closing(opener()) as session:
            for k, unit in enumerate(units):
                took(k, work(session, unit))
    return [answers[k] for k in range(len(units))]


class _Worker:
    """What runs in a worker: one session, one unit at a time."""

    def __init__(self, opener: Callable[[], Any], work: Callable[[Any, Any], Any]) -> None:
        self._opener, self._work = opener, work
        self._session: Any = None

    def open(self) -> str:
        """Answered once this process runs; all workers are of one kind."""
        return ""

    def run(self, unit: Any) -> Any:
        """One unit. The session is opened here, so that an error in opening comes back as what it is."""
        if self._session is None:
            self._session = self._opener()
        return self._work(self._session, unit)


def _start_ray(workers: int) -> bool:
    """Start Ray on this machine, or join the cluster of ``RAY_ADDRESS``; False when it runs already."""
    own = {"num_cpus": workers, "object_store_memory": 256 * 2**20, "include_dashboard": False}
    joining = bool(os.environ.get("RAY_ADDRESS"))
    return _init_ray("leave --workers out", **({} if joining else {"address": "local", **own}))


def join_cluster() -> bool:
    """Join the cluster of ``RAY_ADDRESS``, or the one that runs on this machine; False when it was joined already.

    Raises:
        BenchError: Ray is not installed.
        WorkerError: there is no cluster.
    """
    if find_spec("ray") is None:
        raise BenchError("Ray is not installed, and it is what gives work to other machines: pip install ray")
    return _init_ray(
        "start it with `ray start --head` here, `ray start --address=HEAD:6379` on the other machines, and name it: "
        "export RAY_ADDRESS=HEAD:6379",
        address="auto",
    )


def _init_ray(remedy: str, **options: Any) -> bool:
    import ray

    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(log_to_driver=False, configure_logging=False, **options)
    except (RuntimeError, OSError, ConnectionError, ValueError) as e:
        raise WorkerError(f"Ray cannot start ({first_line(e)}); {remedy}") from None
    sys.stdout = cast(TextIO, _WithoutRay(sys.stdout))
    return True


def leave_cluster() -> None:
    """The end of what :func:`join_cluster` began."""
    import ray

    if isinstance(sys.stdout, _WithoutRay):
        sys.stdout = sys.stdout.inner
    with redirect_stdout(sys.stderr):  # what its threads still held back is printed by this one
        ray.shutdown()


class _WithoutRay:
    """Standard output without the lines of Ray's own threads: they tell of lost machines in the midst of our JSON."""

    def __init__(self, inner: TextIO) -> None:
        self.inner = inner

    def write(self, text: str) -> int:
        """To standard error where one of Ray's threads calls."""
        ours = not threading.current_thread().name.startswith("ray_")
        return (self.inner if ours else sys.stderr).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
