"""``llama-onnx history add | list | export | import | check``: medians of past runs, and where their level changed.

Advisory: what moved between two nights may be the night. ``check`` returns 0 without a step in the last points, 3 with
one (look, then compare in pairs), never 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.cli.output import show, status
from bench.errors import BenchError

HELP = "medians of past runs on this machine, and where their level changed (advisory)"
RECENT = 5
"""A step among so many last points is news."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    add = parser.add_argument
    add(
        "action",
        choices=("add", "list", "export", "import", "check"),
        help="check looks for level changes; exit code 3 if one is recent",
    )
    add(
        "file",
        nargs="?",
        type=Path,
        help="add: a comparison.json, record.json or JSON Lines of cases; export, import: JSON Lines of points",
    )
    add("--label", default="", help="add: a name for the run, such as a commit")
    add("--run", dest="run_name", metavar="ID", help="add: a run is added once by its ID (default: from the file)")
    add("--any-machine", action="store_true", help="check: measurements of other machines too")
    add("--store", type=Path, metavar="FILE", help="another history file (default: in the user's data folder)")


def run(args: argparse.Namespace) -> int:
    """Do one action; 0, or 3 when ``check`` found a recent step."""
    from reports.store import Store, default_path

    if args.action in ("add", "import") and args.file is None:
        raise BenchError(f"history {args.action} needs a file")
    with Store(args.store or default_path()) as store:
        action = {"add": _add, "list": _list, "export": _export, "import": _import, "check": _check}[args.action]
        return action(args, store)


def _add(args: argparse.Namespace, store: Any) -> int:
    import datetime
    import hashlib

    from reports.base import first_document, kind_of
    from reports.case_files import read_any
    from reports.store import points_of

    records, document = read_any(args.file, side="candidate"), first_document(args.file)
    ours = kind_of(document) in ("record", "comparison")
    changed = datetime.datetime.fromtimestamp(args.file.stat().st_mtime, datetime.UTC)
    at = document["created_utc"] if ours else changed.isoformat(timespec="seconds")
    name = next((r.run for r in records if r.run), None) if kind_of(document) == "comparison" else None
    name = name or hashlib.sha256(args.file.read_bytes()).hexdigest()[:16]
    points = points_of(records, at, args.run_name or name, args.label)
    added = store.add(points)
    show(args, {"points": len(points), "added": added}, f"{added} of {len(points)} points were new in {store.path}")
    return 0


def _list(args: argparse.Namespace, store: Any) -> int:
    series: dict[tuple[str, str, str, str], list[Any]] = {}
    for p in store.points():
        series.setdefault((p.fingerprint, p.model, p.case_name, p.metric), []).append(p)
    names = ("fingerprint", "model", "case", "metric", "points", "last", "unit")
    rows = [(*key, len(ps), ps[-1].value, ps[-1].unit) for key, ps in series.items()]
    lines = ["{}  {}  {}  {}: {} points, last {:.4g} {}".format(*row) for row in rows]
    documents = [dict(zip(names, row, strict=True)) for row in rows]
    show(args, documents, "\n".join(lines) or f"{store.path} is empty; fill it with: llama-onnx history add FILE")
    return 0


def _export(args: argparse.Namespace, store: Any) -> int:
    lines = "".join(line + "\n" for line in store.export())
    if args.file:
        from reports.publish import write_atomically

        write_atomically(args.file, lines)
    else:
        sys.stdout.write(lines)
    return 0


def _import(args: argparse.Namespace, store: Any) -> int:
    from reports.base import read_text

    added = store.load(read_text(args.file).splitlines(), str(args.file))
    show(args, {"added": added}, f"{added} points were new in {store.path}")
    return 0


def _check(args: argparse.Namespace, store: Any) -> int:
    from bench.machine.environment import machine
    from reports.store import StoreError

    here = machine().fingerprint
    found, refused = [], []
    for model, case, metric in dict.fromkeys((p.model, p.case_name, p.metric) for p in store.points()):
        try:
            if history := store.history(case, metric, here, model, args.any_machine):
                found.append(history)
        except StoreError as e:
            refused.append(str(e))
    if refused and not found:
        raise StoreError(refused[0])
    recent = [(h, s) for h in found for s in h.steps if s.index >= len(h.points) - RECENT]
    lines = [
        f"{h.metric} of {h.case} stepped by {100 * (s.ratio - 1):+.1f} % at {h.points[s.index].at_utc} "
        f"{h.points[s.index].label} (p = {s.p:.2g}); advisory: compare in pairs"
        for h, s in recent
    ]
    if refused:
        status(f"{len(refused)} metrics left out; the first: {refused[0]}")
    show(args, [h.model_dump() for h in found], "\n".join(lines) or f"no step in the last {RECENT} points")
    return 3 if recent else 0
