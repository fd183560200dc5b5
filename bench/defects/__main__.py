"""The catalogue as a table: every defect must fail, by the right check first; every harmless change must pass.

Try: ``python -m bench.defects --list`` and
``python -m bench.defects --mode quick --precision fp32 --out docs/gate-catalogue.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from bench.data.loading import load_file
from bench.defects.harmless import HARMLESS
from bench.defects.in_family import DEFECTS as IN_FAMILY
from bench.defects.in_files import DEFECTS as IN_FILES
from bench.defects.in_graph import DEFECTS as IN_GRAPH
from bench.defects.workshop import Defect, Harmless, NotApplicableError, Workshop
from bench.gate.found import CheckSpec
from bench.gate.modes import MODES
from bench.gate.registry import CHECKS
from bench.gate.subject import Subject
from bench.gate.validate import make_subject, validate
from reports.validation import Validation

DEFECTS: tuple[Defect, ...] = (*IN_GRAPH, *IN_FAMILY, *IN_FILES)
MEMO_BYTES = 3 << 30
NOT_APPLICABLE = "not applicable"
"""Verdict of a change that the folder has no place for."""


@dataclass(frozen=True)
class Row:
    """What the gate made of one folder. ``layer_found`` is the localisation's; None where there was none."""

    name: str
    harmless: bool
    verdict: str
    wanted_first: str
    first: str
    failed: list[str]
    seen: list[str]
    layer: int | None
    layer_found: int | None
    seconds: float
    reason: str

    @property
    def good(self) -> bool:
        """As it should be, or a change that there is no place for."""
        if self.verdict == NOT_APPLICABLE:
            return True
        return self.verdict == "PASS" if self.harmless else self.verdict == "FAIL"


def row_of(name: str, found: Validation, wanted: str, layer: int | None, harmless: bool) -> Row:
    """One line of the table from a validation."""
    failed = [r.name for r in found.results if r.status == "FAIL"]
    return Row(
        name=name,
        harmless=harmless,
        verdict=found.verdict,
        wanted_first=wanted,
        first=failed[0] if failed else "",
        failed=failed,
        seen=[r.name for r in found.results if r.status == "FAIL" and r.kind != "exact"],
        layer=layer,
        layer_found=found.place.layer if found.place else None,
        seconds=found.seconds,
        reason=found.reasons[0] if found.reasons else "",
    )


def run_change(
    change: Defect | Harmless, subject: Subject, good: Path, work: Path, specs: Sequence[CheckSpec] = CHECKS
) -> Row:
    """Make a defect or a harmless change, run the gate over it, remove it."""
    shop = Workshop(good, work / "changed", subject.baseline.checkpoint)
    changed = subject.at(shop.folder)
    try:
        if isinstance(change, Harmless) and change.target not in ("", target := shop.manifest.target):
            raise NotApplicableError(f"--target {target} does not take it")
        change.change(shop)
        if isinstance(change, Harmless) or change.sealed:
            shop.reseal()
        if isinstance(change, Defect):
            layer = change.layer(shop) if change.in_layer else None
            return row_of(change.name, validate(changed, specs), change.first, layer, False)
        if change.threads:
            changed.deployment = replace(changed.deployment, threads=change.threads)
        with change.around() if change.around else contextlib.nullcontext():
            return row_of(change.name, validate(changed, specs), "", None, True)
    except NotApplicableError as e:
        return Row(change.name, isinstance(change, Harmless), NOT_APPLICABLE, "", "", [], [], None, None, 0.0, str(e))
    finally:
        changed.close()
        shop.close()


def table(rows: Sequence[Row], title: str) -> str:
    """The rows as Markdown, with the counts in front."""
    made = [r for r in rows if r.verdict != NOT_APPLICABLE]
    defects, fine = [r for r in made if not r.harmless], [r for r in made if r.harmless]
    layered = [r for r in defects if r.layer is not None]
    numeric = [r for r in layered if r.seen]
    placed = sum(r.layer == r.layer_found for r in numeric)
    out = [f"## {title}", ""]
    if defects:
        out += [
            f"{sum(r.good for r in defects)} of {len(defects)} defects failed, "
            f"{sum(r.first == r.wanted_first for r in defects)} by the expected check first; with the exact checks off "
            f"the numbers alone fail {sum(bool(r.seen) for r in defects)}. Of {len(numeric)} defects in one layer "
            f"that the numbers fail, localisation names the right layer for {placed}.",
            "",
            "| defect | verdict | first | other exact checks | numbers, exact checks aside | layer: is / found | s |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for r in defects:
            rest = ", ".join(n for n in r.failed[1:] if n not in r.seen) or "-"
            place = "-" if r.layer is None else f"{r.layer} / {'-' if r.layer_found is None else r.layer_found}"
            first = r.first if r.first == r.wanted_first else f"{r.first} (expected {r.wanted_first})"
            seen = ", ".join(r.seen) or "none"
            out.append(f"| {r.name} | {r.verdict} | {first} | {rest} | {seen} | {place} | {r.seconds:.0f} |")
        out.append("")
    if fine:
        out += [
            f"{sum(r.good for r in fine)} of {len(fine)} harmless changes passed.",
            "",
            "| harmless change | verdict | why, where not PASS | s |",
            "| --- | --- | --- | --- |",
        ]
        out += [f"| {r.name} | {r.verdict} | {'' if r.good else r.reason[:160]} | {r.seconds:.0f} |" for r in fine]
        out.append("")
    if none := [f"{r.name} ({r.reason})" for r in rows if r.verdict == NOT_APPLICABLE]:
        out += [f"Not applicable to this folder: {'; '.join(none)}.", ""]
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the catalogue; 0 when every row is as it should be, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.defects", description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--folder", type=Path, help="a good export (default: one is made)")
    parser.add_argument("--mode", default="quick", choices=list(MODES))
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--dataset", type=Path, help="texts, JSONL (default: the project's own)")
    parser.add_argument("--only", help="part of a name")
    parser.add_argument("--list", action="store_true", help="names only")
    parser.add_argument("--out", type=Path, help="Markdown file that the table is written to (rows beside it as JSON)")
    parser.add_argument("--resume", action="store_true", help="keep the rows beside --out and run the others")
    args = parser.parse_args(argv)
    if args.resume and not args.out:
        parser.error("--resume goes on with what lies beside --out; give --out FILE")
    everything: tuple[Defect | Harmless, ...] = (*DEFECTS, *HARMLESS)
    chosen = [d for d in everything if not args.only or args.only.lower() in d.name.lower()]
    if args.list:
        print("\n".join(d.name for d in chosen))
        return 0
    err = Console(stderr=True)
    kept = args.out.with_suffix(".json") if args.resume else None
    rows = [Row(**r) for r in json.loads(kept.read_text(encoding="utf-8"))] if kept and kept.is_file() else []
    done = {r.name for r in rows}
    chosen = [d for d in chosen if d.name not in done]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        good = args.folder or work / "good"
        if args.folder is None:
            from export.pipeline import export_model
            from export.spec import ExportSpec

            export_model(ExportSpec(args.model, args.precision), good)
        dataset = load_file(args.dataset) if args.dataset else None
        subject = make_subject(good, args.model, MODES[args.mode], dataset, memo_bytes=MEMO_BYTES)
        started = time.perf_counter()
        for d in chosen:
            row = run_change(d, subject, good, work)
            rows.append(row)
            mark = "" if row.good else "!!! "
            shown = f"{row.verdict:<12} {mark}{row.name}: {row.reason[:140]} ({row.seconds:.0f} s)"
            err.print(shown, markup=False, highlight=False, soft_wrap=True)
            if args.out:
                _write(args.out, rows, f"{subject.baseline.source.name}, {args.precision}, mode {args.mode}")
        subject.baseline.close()
        err.print(f"{len(rows)} folders in {time.perf_counter() - started:.0f} s")
    return 0 if all(r.good for r in rows) else 1


def _write(out: Path, rows: Sequence[Row], title: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(table(rows, title), encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
