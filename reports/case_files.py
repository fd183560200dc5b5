"""Files of case records (JSON Lines), and adapters that read other documents as such.

A line is written, flushed and synced at once; what a kill or a full disk left half-written is dropped by
:func:`repair`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from reports.base import Frozen, first_document, kind_of, parse, read_text, validate
from reports.comparison import CASE_SCHEMA_VERSION, CaseRecord, Comparison, SideName
from reports.errors import RecordError, ReportError
from reports.record import RunRecord
from reports.stats import METRICS, samples


class StorageError(ReportError):
    """A record could not be stored; names the file and how to go on."""

    exit_code = 4


def append_records(path: Path, records: Sequence[CaseRecord]) -> None:
    """Append one line each, all in one write; they are on the disk when this returns, or the file is as it was.

    Raises:
        StorageError: a full disk, a folder that cannot be written.
    """
    lines = "".join(record.model_dump_json() + "\n" for record in records).encode()
    try:
        with path.open("ab") as f:
            before = f.tell()
            try:
                f.write(lines)
                f.flush()
                os.fsync(f.fileno())
            except OSError:
                os.truncate(path, before)
                raise
    except OSError as e:
        raise StorageError(f"cannot write {path}: {e.strerror}; make room and run again with --resume") from None


def repair(path: Path) -> bool:
    """Cut a torn last line off; whether there was one."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole == len(data):
        return False
    os.truncate(path, whole)
    return True


def _line(path: Path, number: int, text: str) -> CaseRecord:
    where = f"{path}, line {number}"
    raw = parse(text, where)
    found = raw.get("schema_version") if isinstance(raw, dict) else None
    if found != CASE_SCHEMA_VERSION:
        raise RecordError(
            f"{where} has case schema version {found!r}, this tool reads {CASE_SCHEMA_VERSION} "
            "(reports/case.schema.json)"
        )
    return validate(raw, CaseRecord, where)


def read_records(path: Path) -> list[CaseRecord]:
    """Every record of a JSON Lines file.

    Raises:
        RecordError: cannot be read, or a line that is no record of this schema (it is named).
    """
    lines = enumerate(read_text(path).splitlines(), 1)
    return [_line(path, k, line) for k, line in lines if line.strip()]


def read_any(*paths: Path, side: SideName) -> list[CaseRecord]:
    """Records of one side from files that hold some: JSON Lines of cases, ``record.json``, ``comparison.json``,
    pytest-benchmark's JSON.

    Raises:
        RecordError: none of them, a broken one, records of the other side alone, or one record twice.
    """
    found: dict[tuple[Any, ...] | str, str] = {}
    records = []
    for path in paths:
        for number, record in enumerate(_own(path, side), 1):
            where = f"{path}, record {number}"
            key = record.model_dump_json() if record.pair is None else record.place
            if key in found:
                what = "the same record as" if record.pair is None else "of the same case, pair and attempt as"
                raise RecordError(
                    f"{where} ({record.case}) is {what} {found[key]}, and a process counts once; take one out, or give "
                    "each process a `pair` of its own"
                )
            found[key] = where
            records.append(record)
    return records


def _own(path: Path, side: SideName) -> list[CaseRecord]:
    """The records of a file that are of this side, or do not say of which they are."""
    document = first_document(path)
    kind = kind_of(document)
    if kind == "pytest-benchmark":
        records = from_pytest_benchmark(document, path)
    elif kind == "record":
        records = from_run_record(RunRecord.read(path))
    elif kind == "comparison":
        records = Comparison.read(path).records
    elif kind in ("case", None):
        records = read_records(path)
    else:
        raise RecordError(f"{path} is of kind {kind!r}, which holds no latencies; pass a record.json or a cases.jsonl")
    if not records:
        raise RecordError(f"{path} holds no record")
    own = [r for r in records if r.side in (None, side)]
    if not own:
        other = records[0].side
        raise RecordError(f"{path} holds records of the {other} alone and is passed as the {side}; exchange the files")
    return own


def from_run_record(record: RunRecord) -> list[CaseRecord]:
    """The candidate's series of a ``record.json``: one record a case, one sample a round, all of one process."""
    candidate = record.side("candidate")
    made = []
    for series in record.series:
        if candidate is None or series.side != candidate.label or not series.rounds:
            continue
        c = series.case
        values = {m: [v for v in samples(series, m) if v > 0] for m in METRICS}
        made.append(
            CaseRecord(
                schema_version=1,
                case=f"b{c.batch}-p{c.prompt}-n{c.new_tokens}",
                metrics={m: v for m, v in values.items() if v},
                units=dict.fromkeys(METRICS, "s"),
                parameters=dict(c.model_dump()),
                warmup_rounds=series.warmup_rounds,
                fingerprint=record.machine.fingerprint,
                versions=record.versions,
                details={"model": record.model.name, "weights_sha256": record.model.weights_sha256},
            )
        )
    return made


class _Foreign(Frozen):
    """A part of another tool's document, of which only some fields are read."""

    model_config = ConfigDict(extra="ignore")


class _Cpu(_Foreign):
    brand_raw: str | None = None


class _Ours(_Foreign):
    fingerprint: str | None = None


class _MachineInfo(_Foreign):
    node: str | None = None
    cpu: _Cpu | str | None = None
    system: str | None = None
    llama_onnx: _Ours | None = None

    @property
    def identity(self) -> str | None:
        """What tells this machine from another; None where nothing is said."""
        if self.llama_onnx and self.llama_onnx.fingerprint:
            return self.llama_onnx.fingerprint
        cpu = self.cpu.brand_raw if isinstance(self.cpu, _Cpu) else self.cpu
        return "|".join(filter(None, (self.node, cpu, self.system))) or None


class _Stats(_Foreign):
    data: list[Any] | None = None
    median: Any = None


class _Benchmark(_Foreign):
    name: str | None = None
    fullname: str | None = None
    params: dict[str, Any] | None = None
    stats: _Stats | None = None


class _PytestBenchmark(_Foreign):
    machine_info: _MachineInfo | None = None
    benchmarks: list[_Benchmark]


def from_pytest_benchmark(raw: object, path: Path) -> list[CaseRecord]:
    """pytest-benchmark's ``--benchmark-json`` (any project's): one record a benchmark, metric ``time`` in seconds.

    Its raw rounds are there unless it was told ``--benchmark-compare`` style saving without data; then the median
    alone is used. A file is one process.

    Raises:
        RecordError: not of this form, a benchmark without name or times, or one name twice.
    """
    document = validate(raw, _PytestBenchmark, path)
    identity = document.machine_info and document.machine_info.identity
    made: dict[str, CaseRecord] = {}
    for k, one in enumerate(document.benchmarks):
        stats = one.stats or _Stats()
        values = stats.data or ([] if stats.median is None else [stats.median])
        name = one.fullname or one.name
        if not name or not values:
            raise RecordError(f"{path}: benchmark {k} has no name or no times; is this --benchmark-json output?")
        if name in made:
            raise RecordError(
                f"{path} holds {name} twice, and a file is one process; give each process's file by itself, several a "
                "side with --base-files and --candidate-files"
            )
        record = {
            "schema_version": 1,
            "case": name,
            "metrics": {"time": values},
            "units": {"time": "s"},
            "parameters": {p: v for p, v in (one.params or {}).items() if isinstance(v, str | int | float)},
            "fingerprint": identity,
        }
        made[name] = validate(record, CaseRecord, f"{path}: benchmark {name}")
    return list(made.values())
