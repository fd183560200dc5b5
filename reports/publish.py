"""Write a report: ``index.html``, ``report.md``, ``junit.xml`` and the JSON, all or none of them half.

The JSON is ``record.json``, ``comparison.json``, ``validation.json`` or ``matrix.json``.

Try: ``python -c "import pathlib, reports.record as r, reports.publish as p;
print(p.write_report(r.RunRecord.read(pathlib.Path('reports/out/record.json')), pathlib.Path('/tmp/page')))"``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from reports.base import first_document, kind_of
from reports.comparison import Comparison
from reports.errors import RecordError
from reports.matrix import Matrix
from reports.record import RunRecord
from reports.render.comparison_html import render_comparison
from reports.render.comparison_junit import render_comparison_junit
from reports.render.comparison_markdown import render_comparison_markdown
from reports.render.comparison_terminal import print_comparison
from reports.render.html import render_html
from reports.render.junit import render_junit
from reports.render.markdown import render_markdown
from reports.render.matrix import render_matrix, render_matrix_junit, render_matrix_markdown
from reports.render.matrix_terminal import print_matrix
from reports.render.terminal import print_summary
from reports.render.validation import (
    print_validation,
    render_validation,
    render_validation_junit,
    render_validation_markdown,
)
from reports.validation import Validation
from reports.verdict import judge

Subject = RunRecord | Comparison | Validation | Matrix
SUBJECTS: dict[str | None, type[Subject]] = {
    "record": RunRecord,
    "comparison": Comparison,
    "validation": Validation,
    "matrix": Matrix,
}
RENDERERS: dict[type[Subject], tuple[Callable[[Any], str], ...]] = {
    RunRecord: (render_junit, render_markdown, render_html),
    Comparison: (render_comparison_junit, render_comparison_markdown, render_comparison),
    Validation: (render_validation_junit, render_validation_markdown, render_validation),
    Matrix: (render_matrix_junit, render_matrix_markdown, render_matrix),
}
"""What writes ``junit.xml``, ``report.md`` and ``index.html`` of each."""


def write_report(subject: Subject, out: Path) -> Path:
    """Render everything, then write each file by a temporary file and a rename; returns the path of the page.

    A renderer that fails leaves the former report as it was. The folder is created.

    Raises:
        OSError: the folder cannot be written.
    """
    texts = {f"{subject.kind}.json": subject.to_json()}
    for name, render in zip(("junit.xml", "report.md", "index.html"), RENDERERS[type(subject)], strict=True):
        texts[name] = render(subject)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(out / name, text)
    return out / "index.html"


def read_any(path: Path) -> Subject:
    """A record, a comparison, a validation or a matrix, whichever the file says it is (:func:`reports.base.kind_of`).

    Raises:
        RecordError: the file cannot be read, or is no such document; names the place of the first defect.
    """
    kind = kind_of(first_document(path))
    if kind not in SUBJECTS:
        what = f"is of kind {kind!r}" if kind else "does not name its kind"
        raise RecordError(f"{path} {what}; pass a record.json, comparison.json, validation.json or matrix.json")
    return SUBJECTS[kind].read(path)


@dataclass(frozen=True)
class Published:
    """A page that was written, what its verdict makes of the exit code, and how to show it in a terminal."""

    page: Path
    exit_code: int
    show: Callable[[Console], None]


def publish(path: Path, out: Path) -> Published:
    """Read a document and write its report into ``out``.

    Raises:
        RecordError: the file is no such document; OSError: the folder cannot be written.
    """
    found = read_any(path)
    page = write_report(found, out)
    if isinstance(found, Validation):
        return Published(page, found.exit_code, partial(print_validation, found))
    if isinstance(found, Matrix):
        return Published(page, found.exit_code, partial(print_matrix, found))
    if isinstance(found, Comparison):
        return Published(page, found.verdict.exit_code, partial(print_comparison, found))
    return Published(page, judge(found).exit_code, partial(print_summary, found))


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
