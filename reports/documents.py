"""What kind of document a file is: the field ``kind`` by which each of ours names itself.

``record`` (:class:`reports.record.RunRecord`), ``comparison`` and ``case`` (:mod:`reports.comparison`; a line of a JSON
Lines file) and ``validation`` (:mod:`reports.validation`).
Try: ``python -c "import pathlib, reports.documents as d; print(d.kind_of(d.first_document(pathlib.Path('FILE'))))"``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reports.base import read_text


def first_document(path: Path) -> Any:
    """A file's JSON document, of JSON Lines the first one; None where it does not begin with one.

    Raises:
        RecordError: cannot be read.
    """
    text = read_text(path)
    try:
        return json.JSONDecoder().raw_decode(text.lstrip())[0]
    except ValueError:
        return None


def kind_of(document: object) -> str | None:
    """Its ``kind``, or ``pytest-benchmark`` for that tool's JSON; None where it names none.

    Case records made by other tools need not name it.
    """
    if not isinstance(document, dict):
        return None
    if "kind" not in document and isinstance(document.get("benchmarks"), list):
        return "pytest-benchmark"
    kind = document.get("kind")
    return kind if isinstance(kind, str) else None
