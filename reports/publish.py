"""Write a report: ``index.html``, ``report.md``, ``junit.xml`` and the JSON, all or none of them half.

A run's JSON is ``record.json``, a comparison's ``comparison.json``.

Try: ``python -c "import pathlib, reports.record as r, reports.publish as p;
print(p.write_report(r.read_record(pathlib.Path('reports/out/record.json')), pathlib.Path('/tmp/page')))"``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from reports.comparison import Comparison, read_comparison
from reports.documents import first_document, kind_of
from reports.errors import RecordError
from reports.record import RunRecord, read_record
from reports.render.html import render_html
from reports.render.junit import render_junit
from reports.render.markdown import render_markdown
from reports.validation import Validation, read_validation


def write_report(record: RunRecord, out: Path) -> Path:
    """Render everything, then write each file by a temporary file and a rename; returns the path of the page.

    A renderer that fails leaves the former report as it was. The folder is created.

    Raises:
        OSError: the folder cannot be written.
    """
    return _write(
        out,
        {
            "record.json": record.to_json(),
            "junit.xml": render_junit(record),
            "report.md": render_markdown(record),
            "index.html": render_html(record),
        },
    )


def write_comparison(comparison: Comparison, out: Path) -> Path:
    """The same for a comparison, whose JSON is ``comparison.json``.

    Raises:
        OSError: the folder cannot be written.
    """
    from reports.render.comparison_html import render_comparison
    from reports.render.comparison_junit import render_comparison_junit
    from reports.render.comparison_markdown import render_comparison_markdown

    return _write(
        out,
        {
            "comparison.json": comparison.to_json(),
            "junit.xml": render_comparison_junit(comparison),
            "report.md": render_comparison_markdown(comparison),
            "index.html": render_comparison(comparison),
        },
    )


def write_validation(validation: Validation, out: Path) -> Path:
    """The same for a validation, whose JSON is ``validation.json``.

    Raises:
        OSError: the folder cannot be written.
    """
    from reports.render import validation as render

    return _write(
        out,
        {
            render.SOURCE: validation.to_json(),
            "junit.xml": render.render_validation_junit(validation),
            "report.md": render.render_validation_markdown(validation),
            "index.html": render.render_validation(validation),
        },
    )


READERS: dict[str | None, Callable[[Path], RunRecord | Comparison | Validation]] = {
    "record": read_record,
    "comparison": read_comparison,
    "validation": read_validation,
}


def read_any(path: Path) -> RunRecord | Comparison | Validation:
    """A run's record, a comparison or a validation, whichever the file says it is (:mod:`reports.documents`).

    Raises:
        RecordError: the file cannot be read, or is no such document; names the place of the first defect.
    """
    kind = kind_of(first_document(path))
    if kind not in READERS:
        what = f"is of kind {kind!r}" if kind else "does not name its kind"
        raise RecordError(f"{path} {what}; pass a record.json, a comparison.json or a validation.json")
    return READERS[kind](path)


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
    if isinstance(found, Validation):
        from reports.render.validation import print_validation

        return Published(write_validation(found, out), found.exit_code, partial(print_validation, found))
    if isinstance(found, Comparison):
        from reports.render.comparison_terminal import print_comparison

        return Published(write_comparison(found, out), found.verdict.exit_code, partial(print_comparison, found))
    from reports.render.terminal import print_summary
    from reports.verdict import judge

    return Published(write_report(found, out), judge(found).exit_code, partial(print_summary, found))


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(out: Path, texts: dict[str, str]) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(out / name, text)
    return out / "index.html"
