"""Files of case records (JSON Lines), and adapters that read other documents as such.

A line is written, flushed and synced at once; what a kill or a full disk left half-written is dropped by
:func:`repair`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reports.base import first_document, kind_of, parse, read_text, validate
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


def read_any(path: Path, side: SideName) -> list[CaseRecord]:
    """Records of one side from any file that holds some: JSON Lines of cases, ``record.json``, ``comparison.json``,
    pytest-benchmark's JSON.

    Raises:
        RecordError: none of them, or a broken one.
    """
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
    own = [r for r in records if r.side in (None, side)] or records
    return [r.model_copy(update={"side": side}) for r in own]


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


def from_pytest_benchmark(raw: dict[str, Any], path: Path) -> list[CaseRecord]:
    """pytest-benchmark's ``--benchmark-json`` (any project's): one record a benchmark, metric ``time`` in seconds.

    Its raw rounds are there unless it was told ``--benchmark-compare`` style saving without data; then the median
    alone is used.

    Raises:
        RecordError: a benchmark without name or times.
    """
    machine = raw.get("machine_info") or {}
    cpu = machine.get("cpu") or {}
    ours = (machine.get("llama_onnx") or {}).get("fingerprint")
    identity = ours or "|".join(str(x) for x in (machine.get("node"), cpu.get("brand_raw"), machine.get("system")))
    made = []
    for k, one in enumerate(raw["benchmarks"]):
        stats = one.get("stats") or {}
        values = stats.get("data") or ([stats["median"]] if "median" in stats else [])
        name = one.get("fullname") or one.get("name")
        if not name or not values:
            raise RecordError(f"{path}: benchmark {k} has no name or no times; is this --benchmark-json output?")
        record = {
            "schema_version": 1,
            "case": str(name),
            "metrics": {"time": values},
            "units": {"time": "s"},
            "parameters": {p: v for p, v in (one.get("params") or {}).items() if isinstance(v, str | int | float)},
            "fingerprint": identity,
        }
        made.append(validate(record, CaseRecord, f"{path}: benchmark {name}"))
    return made
