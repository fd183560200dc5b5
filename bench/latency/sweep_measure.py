"""What a sweep measures, on this machine or on every machine of a Ray cluster: processes, and their records on disk.

All processes of one point run on machines of one fingerprint where there is a choice, and every record names its own,
so medians are never mixed. An export is made on the machine that needs it. What is done is known from the records
alone: a sweep that was stopped goes on on whatever machines there are then.

Try: ``llama-onnx sweep FILE.yaml --ray``.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.latency.case_log import CaseLog
from bench.latency.paired_run import case_key, case_record, child_command
from bench.latency.sides import SideSpec
from bench.latency.sweep import Sweep, SweepError
from bench.machine.environment import machine
from bench.machine.state import Limits, Watch
from bench.process.child import run_child
from export.manifest import MANIFEST_NAME
from reports.comparison import CaseRecord
from reports.record import Case

Say = Callable[[str], None]


@dataclass(frozen=True)
class Process:
    """One process of one point: what is measured at once, on one machine."""

    model: str
    precision: str
    provider: str
    case: Case
    number: int
    source: str
    """The model as the measuring process finds it: a local folder's absolute path, or the name as it stands."""
    name: str
    """The model in the records: its last part, or as many as tell the sweep's models apart."""

    @property
    def label(self) -> str:
        """The point's name in the records."""
        return f"{self.name} {self.precision} {self.provider} {case_key(self.case)}"

    def __str__(self) -> str:
        return f"{self.label}, process {self.number + 1}"


def processes(sweep: Sweep) -> Iterator[Process]:
    """In the order of measuring: those of one point are spread over the sweep, so that a drift meets all points.

    An exported folder has the one precision that its manifest says, whatever the sweep asks of the others.
    """
    names, own = _names(sweep.models), {m: own_precision(m) for m in sweep.models}
    for number, point in itertools.product(range(sweep.processes), sweep.points()):
        model, precision, provider, batch, prompt = point
        if own[model] and precision != sweep.precisions[0]:
            continue
        precision = own[model] or precision
        case = Case(batch=batch, prompt=prompt, new_tokens=sweep.new_tokens)
        yield Process(model, precision, provider, case, number, str(_folder(model) or model), names[model])


def _names(models: Sequence[str]) -> dict[str, str]:
    parts = {m: Path(m).parts for m in models}
    for depth in range(1, max(map(len, parts.values())) + 1):
        found = {m: "/".join(p[-depth:]) for m, p in parts.items()}
        if len(set(found.values())) == len(models):
            return found
    return {m: m for m in models}


def _folder(model: str) -> Path | None:
    """A model that is a folder here by its absolute path: another machine's working folder is another."""
    folder = Path(model).expanduser()
    return folder.absolute() if folder.is_dir() else None


def own_precision(model: str) -> str | None:
    """The precision of a model that is an exported folder already, ours or a third party's; None of any other.

    Raises:
        ManifestError, SessionError: an exported folder that cannot be read.
    """
    from runtime.loading import read_folder

    folder = Path(model).expanduser()
    third_party = any(folder.glob("*.onnx")) and not any(folder.glob("*.safetensors"))
    return read_folder(folder, verify=False).precision if (folder / MANIFEST_NAME).is_file() or third_party else None


def _exported(process: Process) -> Path:
    """The model's export, made once and kept in the cache; an exported folder is taken as it is."""
    from bench.exported import exported_folder
    from export.source import resolve

    if own_precision(process.source):
        return Path(process.source)
    device = "cpu" if process.provider == "cpu" else "cuda"
    return exported_folder(resolve(process.source), process.source, process.precision, device)


def run_id(sweep: Sweep) -> str:
    """Digest of the sweep; part of every record."""
    return hashlib.sha256(repr(sweep).encode()).hexdigest()[:16]


def measure_process(sweep: Sweep, process: Process) -> CaseRecord:
    """Export the model where that is needed, then measure in a fresh process; on the machine where this is called."""
    folder = _exported(process)
    side = SideSpec("candidate", process.model, str(folder), process.provider, sweep.threads)
    command = child_command(side, process.case, rounds=sweep.rounds, seed=process.number)
    watch = Watch(Limits())
    ended = run_child(*command, sweep.limit_s)
    names = {"model": process.model, "precision": process.precision, "provider": process.provider}
    return case_record(
        ended,
        watch.before,
        watch.stop(),
        run=run_id(sweep),
        case=process.label,
        parameters={**names, **process.case.model_dump()},
        pair=process.number,
        fingerprint=machine().fingerprint,
    )


def measure_here(sweep: Sweep, log: CaseLog, say: Say) -> None:
    """What this machine has not measured yet, one process after another."""
    here, run = machine().fingerprint, run_id(sweep)
    done = {(r.run, r.fingerprint, r.case, r.pair) for r in log.records}
    todo = [p for p in processes(sweep) if (run, here, p.label, p.number) not in done]
    for process in {(p.source, p.precision, p.provider): p for p in todo}.values():
        _exported(process)  # what cannot be measured is told before the first hour of measuring
    for process in todo:
        record = measure_process(sweep, process)
        log.append([record])
        say(f"{process} of {sweep.processes}" + (f": {record.reason}" if record.reason else ""))


def _prepare(folders: Sequence[Path], sources: Sequence[str] = ()) -> str:
    """On a machine before it measures: its fingerprint, if it has the folders that the driver has, and the models."""
    for folder in folders:
        if not folder.is_dir():
            raise SweepError(
                f"there is no {folder}; a folder has to lie under the same path on every machine (a shared disk, or a "
                "copy), or give a model's name, which each machine fetches and exports for itself"
            )
    from export.pipeline import load_config
    from export.source import resolve

    for source in sources:
        if not own_precision(source):
            load_config(resolve(source))
    return machine().fingerprint


def measure_on_machines(sweep: Sweep, log: CaseLog, wait_s: float, say: Say) -> None:
    """What no machine has measured yet, one process at a time on every machine of the Ray cluster."""
    from bench.process.machines import spread
    from bench.process.workers import join_cluster, leave_cluster

    run = run_id(sweep)
    own = [r for r in log.records if r.run == run]
    done = {(r.case, r.pair) for r in own}
    todo = [p for p in processes(sweep) if (p.label, p.number) not in done]
    if not todo:
        return

    def answered(process: Process, record: CaseRecord, node: str, name: str) -> None:
        log.append([record.model_copy(update={"details": {**record.details, "ray_node": node}})])
        say(f"{process} of {sweep.processes}, on {name}" + (f": {record.reason}" if record.reason else ""))

    started = join_cluster()
    try:
        spread(
            todo,
            partial(measure_process, sweep),
            what="llama-onnx sweep --ray",
            group=lambda p: p.label,
            bound={r.case: r.fingerprint for r in reversed(own) if r.fingerprint},
            prepare=partial(
                _prepare, [f for m in sweep.models if (f := _folder(m))], list(dict.fromkeys(p.source for p in todo))
            ),
            done=answered,
            say=say,
            wait_s=wait_s,
        )
    finally:
        if started:
            leave_cluster()
