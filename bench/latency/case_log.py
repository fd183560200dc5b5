"""``cases.jsonl``: the records of a paired run or a sweep, each on the disk as soon as its process has ended.

What is still to be measured follows from these records alone, so a run that was killed goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.errors import BenchError
from reports.case_files import append_records, read_records, repair
from reports.comparison import CaseRecord

RECORDS = "cases.jsonl"


class CaseLog:
    """The records in a folder, in the order in which they were measured; one that was half-written is cut off.

    Args:
        out: the folder; made when it is not there.
        resume: go on with what it holds.

    Raises:
        BenchError: records without ``resume``.
        RecordError: records that cannot be read.
    """

    def __init__(self, out: Path, resume: bool) -> None:
        self.file = out / RECORDS
        out.mkdir(parents=True, exist_ok=True)
        self.records: list[CaseRecord] = []
        if self.file.is_file() and self.file.stat().st_size:
            if not resume:
                raise BenchError(
                    f"{self.file} holds an earlier run; add --resume to go on with it, or take another --out"
                )
            repair(self.file)
            self.records = read_records(self.file)

    def append(self, records: Sequence[CaseRecord]) -> list[CaseRecord]:
        """Number the records and append them in one write; returns them as they stand in the file.

        Raises:
            StorageError: see :func:`reports.case_files.append_records`; the file is as it was.
        """
        made = [r.model_copy(update={"sequence": k}) for k, r in enumerate(records, len(self.records))]
        append_records(self.file, made)
        self.records += made
        return made
