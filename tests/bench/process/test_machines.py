"""Several machines, here Ray nodes on one: a sweep spread over them, and the gate's units; one of them dies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench.cli.main import main
from bench.deployment import Deployment
from bench.gate import units
from bench.gate.modes import Mode
from bench.gate.registry import BY_NAME
from bench.gate.validate import make_subject, validate
from bench.latency import sweep_measure
from bench.latency.case_log import CaseLog
from bench.latency.sweep import Sweep
from bench.latency.sweep_measure import processes
from bench.machine.lock import BusyError
from bench.process import pool, workers
from bench.process.child import TIED
from bench.process.machines import MachineError, spread
from bench.process.pool import Queue, WorkerError
from bench.process.workers import cluster, run_units
from reports.case_files import read_records
from reports.comparison import CaseRecord

Exports = Callable[..., Path]

# --- which machine takes what ----------------------------------------------------------------------------------------


def test_a_group_stays_on_one_kind() -> None:
    queue = Queue(["a", "b", "a", "b"], {})
    live = {"n1": "small", "n2": "large"}
    assert queue.take("n1", live) == 0
    assert queue.take("n2", live) == 1  # b is the large machine's now
    assert queue.take("n2", live) == 3
    assert queue.take("n2", live) is None  # what is left is the small one's
    assert queue.take("n1", live) == 2
    assert queue.waiting == []


def test_equal_machines_share_a_group() -> None:
    queue = Queue(["a", "a"], {})
    live = {"n1": "small", "n2": "small"}
    assert [queue.take("n2", live), queue.take("n1", live)] == [0, 1]


def test_what_was_measured_before_binds() -> None:
    queue = Queue(["a"], {"a": "large"})
    live = {"n1": "small", "n2": "large"}
    assert queue.take("n1", live) is None
    assert queue.take("n1", {"n1": "small"}) == 0  # no such machine is left


def test_a_lost_unit_goes_to_another_machine_first_of_all() -> None:
    queue = Queue(["a", "b", "c"], {})
    live = {"n1": "small", "n2": "small"}
    assert queue.take("n1", live) == 0
    queue.put_back(0, "n1")
    assert queue.take("n1", live) == 1
    assert queue.take("n2", live) == 0
    queue.put_back(0, "n2")
    assert queue.take("n2", live) == 0  # both lost it: no rule is left
    assert Queue(["a"], {}).take("n1", {"n1": "small"}) == 0


def test_a_lost_unit_stays_with_its_kind_where_it_can() -> None:
    queue = Queue(["a"], {"a": "small"})
    live = {"n1": "small", "n2": "large", "n3": "small"}
    assert queue.take("n1", live) == 0
    queue.put_back(0, "n1")
    assert queue.take("n2", live) is None
    assert queue.take("n3", live) == 0
    queue.put_back(0, "n3")
    assert queue.take("n2", live) == 0  # the only one that has not lost it


def test_models_of_one_name_are_told_apart() -> None:
    made = Sweep(models=("x/out", "y/out", "z/other"), processes=2, prompt_lengths=(8,))
    labels = [p.label for p in processes(made)]
    assert labels[:3] == [f"{n} fp32 cpu b1-p8-n32" for n in ("x/out", "y/out", "z/other")]
    assert labels[3:] == labels[:3]  # one process of each point, then the next
    assert next(processes(Sweep(models=("x/out",)))).label.startswith("out fp32")


def test_a_sweep_over_machines_without_ray(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "find_spec", lambda name: None)
    (tmp_path / "s.yaml").write_text("models: [demo]\n")
    assert main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--ray"]) == 2
    assert "pip install ray" in capsys.readouterr().err


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-P", sys.argv[1], sys.executable, "-c", "print('up', flush=True); input()"])
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux")
def test_a_measurement_ends_with_who_waits_for_it() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(TIED)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdin is not None  # held by the child as well: no end of input ends it
    said = {parent.stdout.readline().strip() for _ in range(2)}
    (child,) = (int(x) for x in said - {"up"})
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)
    parent.stdin.close()
    parent.stdout.close()


def test_rays_own_lines_stay_off_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    out: Any = workers._WithoutRay(sys.stdout)
    print("ours", file=out, flush=True)
    thread = threading.Thread(target=print, args=("a node died",), kwargs={"file": out}, name="ray_listen")
    thread.start()
    thread.join()
    assert capsys.readouterr() == ("ours\n", "a node died\n")


# --- a cluster -------------------------------------------------------------------------------------------------------


class Nodes:
    """A head that only leads and two machines, each with a lock of its own as real ones have."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self._folder, self._made = folder, list[Any]()
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            self.add()

    def add(self, lock: str = "") -> Any:
        """Another machine; with ``lock``, one that shares it."""
        env = {"LLAMA_ONNX_LOCK": str(self._folder / (lock or f"lock{len(self._made) + 1}"))}
        # Three CPUs: Ray by itself would put two workers on one of them.
        self._made.append(self.cluster.add_node(num_cpus=3, env_vars=env))
        return self._made[-1]

    @property
    def ids(self) -> list[str]:
        """Of the machines, in the order in which they were added (the cluster's own is a set, which has none)."""
        return [n.node_id for n in self._made if n in self.cluster.worker_nodes]

    def kill(self, node_id: str) -> None:
        """As if its plug was pulled."""
        import psutil

        node = next(n for n in self.cluster.worker_nodes if n.node_id == node_id)
        (raylet,) = node.all_processes["raylet"]
        workers_there = psutil.Process(raylet.process.pid).children()
        self.cluster.remove_node(node, allow_graceful=False)
        for process in workers_there:  # they would end by themselves, but only after what they are at
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def noticed(self, node_id: str) -> None:
        """Wait until Ray itself takes that machine for lost; until then it starts workers there."""
        deadline = time.monotonic() + 60
        while any(n["Alive"] for n in self.cluster.global_state.node_table() if n["NodeID"] == node_id):
            assert time.monotonic() < deadline, "Ray does not notice that a machine is gone"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Nodes]:
    """The cluster that ``RAY_ADDRESS`` names; a test that takes a machine away puts another one in its place."""
    ray = pytest.importorskip("ray")
    module = sys.modules[request.module.__name__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for name, value in {"period_ms": "500", "failure_threshold": "3", "initial_delay_ms": "1000"}.items():
            patch.setenv(f"RAY_health_check_{name}", value)  # how soon a lost machine is noticed
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))  # the machines' workers import this suite
        made = Nodes(tmp_path_factory.mktemp("locks"))
        patch.setenv("RAY_ADDRESS", made.cluster.address)
        ray.cloudpickle.register_pickle_by_value(module)  # they cannot import a test file
        yield made
        ray.cloudpickle.unregister_pickle_by_value(module)
        ray.shutdown()
        made.cluster.shutdown()


def overlaps(records: Sequence[CaseRecord]) -> list[tuple[str, str]]:
    """Pairs of records of one node whose times overlap."""
    found = []
    for node in {r.details["ray_node"] for r in records}:
        spans = []
        for r in records:
            if r.details["ray_node"] == node and r.before is not None and r.after is not None:
                spans.append((datetime.fromisoformat(r.before.at_utc), datetime.fromisoformat(r.after.at_utc), r.case))
        spans.sort()
        found += [(a[2], b[2]) for a, b in pairwise(spans) if b[0] < a[1]]
    return found


@pytest.fixture
def joined(nodes: Nodes) -> Iterator[Nodes]:
    """This process in the cluster."""
    before = sys.stdout
    assert workers.join_cluster()
    assert not workers.join_cluster()
    yield nodes
    workers.leave_cluster()
    assert sys.stdout is before


def one(number: int) -> int:
    """A unit's work."""
    return number + 1


def nothing() -> Any:
    """An opener."""
    return ExitStack()


def times_ten(_: Any, number: int) -> int:
    """A unit's work for a worker."""
    return number * 10


def busy() -> str:
    """A machine on which somebody measures."""
    raise BusyError("somebody measures there")


def without_folder() -> str:
    """A machine that lacks what it needs."""
    return sweep_measure._prepare([Path("/no/such/folder")])


@pytest.mark.slow
def test_machines_that_cannot(joined: Nodes) -> None:
    """All are busy: an error that says so; one lacks the folder: named, with the remedy and the error's own code."""
    said: list[str] = []
    ask = partial(spread, [1, 2], one, what="a test", group=str, bound={}, done=print, say=said.append)
    with pytest.raises(WorkerError, match=r"no machine of the Ray cluster is left.*somebody measures there"):
        ask(prepare=busy)
    assert sorted(line.split(" is left out")[0][-9:-1] for line in said) == sorted(n[:8] for n in joined.ids)
    with pytest.raises(MachineError, match=r"on .* \(\w{8}\): there is no /no/such/folder; .*same path") as caught:
        ask(prepare=without_folder)
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_a_sweep_over_two_machines_one_of_which_dies(
    nodes: Nodes, exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "s.yaml", tmp_path / "out"
    file.write_text(
        f"models: ['{exports()}']\nbatch_sizes: [1, 2]\nprompt_lengths: [8]\n"
        "new_tokens: 4\nrounds: 2\nprocesses: 4\nthreads: 1\n"
    )
    points = [(b, p) for b in (1, 2) for p in range(4)]
    first, second = nodes.ids
    twin = nodes.add("lock1").node_id  # another Ray node on the first machine
    append, seen = CaseLog.append, list[str]()

    def append_and_kill(self: CaseLog, records: Sequence[CaseRecord]) -> list[CaseRecord]:
        made = append(self, records)
        seen.append(str(made[0].details["ray_node"]))
        if len(set(seen)) == 2 and seen[-1] != second and second in nodes.ids:  # it is measuring its second one
            nodes.kill(second)
        return made

    monkeypatch.setattr(CaseLog, "append", append_and_kill)
    assert main(["sweep", str(file), "--out", str(out), "--ray", "--json"]) == 0
    told = capsys.readouterr()
    records = read_records(out / "cases.jsonl")
    assert [json.loads(r.model_dump_json()) for r in records] == sorted(
        json.loads(told.out), key=lambda r: r["sequence"]
    )
    assert sorted((r.parameters["batch"], r.pair) for r in records) == points
    assert [r.sequence for r in records] == list(range(8))
    assert all(r.outcome in ("ok", "invalid") and r.metrics["tpot"] for r in records)
    by_node = [r.details["ray_node"] for r in records]
    living = first if first in by_node else twin
    assert set(by_node) == {living, second}
    assert by_node[-1] == living
    assert overlaps(records) == []
    assert told.err.count("two at once would measure each other") == 1  # the twin's
    assert told.err.count("is given to another machine") == 1
    # Going on loses and repeats nothing; what was half-written is measured again, on whatever machine there is.
    lines = (out / "cases.jsonl").read_text().splitlines(keepends=True)
    (out / "cases.jsonl").write_text("".join(lines[:6]) + lines[6][:50])
    nodes.add()
    assert main(["sweep", str(file), "--out", str(out), "--ray", "--resume", "--json"]) == 0
    again = (out / "cases.jsonl").read_text().splitlines(keepends=True)
    assert again[:6] == lines[:6]
    assert sorted((r.parameters["batch"], r.pair) for r in read_records(out / "cases.jsonl")) == points
    nodes.kill(twin)
    nodes.noticed(twin)


# --- the gate over machines ------------------------------------------------------------------------------------------


def noted(folder: str, doomed: str, work: Any, sides: Any, unit: Any) -> Any:
    """The unit's work; which node did it is noted. The doomed one waits with its second unit for its end, the other one
    until it is there: it might do all by itself.
    """
    import ray

    node = ray.get_runtime_context().get_node_id()
    place = Path(folder) / node
    place.mkdir(exist_ok=True)
    now, deadline = Path(folder) / "now", time.monotonic() + 60
    if node == doomed and list(place.iterdir()):
        now.touch()
        time.sleep(120)
    while node != doomed and not now.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    answer = work(sides, unit)
    (place / str(time.time_ns())).touch()
    return answer


@pytest.mark.slow
def test_the_gate_over_two_machines_one_of_which_dies(
    nodes: Nodes,
    exports: Exports,
    checkpoints: Exports,
    tiny_dataset: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Units land on both, and the document is that of one worker to the last digit."""

    def document(name: str, count: int, **more: Any) -> list[Any]:
        monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path / name))
        mode = Mode("tiny", 64, 6, 2, 3, True, new_tokens=6)
        subject = make_subject(
            exports(), str(checkpoints()), mode, tiny_dataset, Deployment(threads=1), keep=True, workers=count, **more
        )
        with cluster(count):
            found = validate(subject, [BY_NAME["mean_kld"]])
        return [r.model_dump(exclude={"seconds"}) for r in found.results]

    alone = document("one", 1)
    survivor, doomed = nodes.ids
    notes, said = tmp_path / "notes", list[str]()
    notes.mkdir()
    monkeypatch.setattr(units, "window_scores", partial(noted, str(notes), doomed, units.window_scores))

    def pull_the_plug() -> None:
        deadline = time.monotonic() + 120
        while not (notes / "now").exists():
            if time.monotonic() > deadline:
                return  # it got no second unit, which the counts below tell
            time.sleep(0.05)
        nodes.kill(doomed)

    killer = threading.Thread(target=pull_the_plug, daemon=True)
    killer.start()
    assert document("two", 2, status=said.append) == alone
    killer.join()
    nodes.noticed(doomed)
    nodes.add()
    done = {n: len(list((notes / n).iterdir())) for n in (survivor, doomed)}
    assert done == {doomed: 1, survivor: 5 + 2}  # with the null control's two, which came later
    assert sum("is given to another worker" in line for line in said) == 1


@pytest.mark.slow
def test_a_machine_lost_before_ray_notices_costs_no_retry(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right after a machine is gone Ray still starts workers there: no unit pays for those."""
    monkeypatch.setattr(pool, "RETRIES", 0)
    ghost = nodes.add().node_id
    nodes.kill(ghost)
    with cluster(2):
        said: list[str] = []
        found = run_units(nothing, times_ten, list(range(8)), workers=4, say=said.append)
    assert found == [10 * n for n in range(8)]
    assert said == []
    nodes.noticed(ghost)
