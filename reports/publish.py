"""Write a report: ``index.html``, ``report.md``, ``junit.xml`` and ``record.json``, all or none of them half.

Try: ``python -c "import pathlib, reports.record as r, reports.publish as p;
print(p.write_report(r.read_record(pathlib.Path('reports/out/record.json')), pathlib.Path('/tmp/page')))"``.
"""

from __future__ import annotations

import os
from pathlib import Path

from reports.record import RunRecord
from reports.render.html import render_html
from reports.render.junit import render_junit
from reports.render.markdown import render_markdown


def write_report(record: RunRecord, out: Path) -> Path:
    """Render everything, then write each file by a temporary file and a rename; returns the path of the page.

    A renderer that fails leaves the former report as it was. The folder is created.

    Raises:
        OSError: the folder cannot be written.
    """
    texts = {
        "record.json": record.to_json(),
        "junit.xml": render_junit(record),
        "report.md": render_markdown(record),
        "index.html": render_html(record),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(out / name, text)
    return out / "index.html"


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
