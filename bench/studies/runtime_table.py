"""A model in several forms under several ONNX Runtimes: the tables of docs/measurements/runtimes-demo.md.

Each form is exported (kept in the cache) and goes through ``llama-onnx matrix``; what is done is kept in OUT, so a run
that was stopped goes on. Try: ``python -m bench.studies.runtime_table demo OUT --runtime 1.27,1.32 --only fp32 --mode
quick``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from bench.studies.tables import markdown
from export.manifest import release
from reports.matrix import OUTCOMES, Matrix, MatrixRow

FORMS = {
    "fp32": ("fp32", "ort"),
    "fp16": ("fp16", "ort"),
    "int8": ("int8", "ort"),
    "int4": ("int4", "ort"),
    "tensorrt fp16": ("fp16", "tensorrt"),
}
"""Name -> precision and target of the export."""
RUNTIMES = "1.20.1,1.21.1,1.22.1,1.23.2,1.24.4,1.25.1,1.26.0,1.27.0,1.28.0,1.29.0,1.30.0,1.31.1,1.32.0"


def measured(folder: Path, model: str, out: Path, options: Sequence[str]) -> Matrix:
    """The matrix of one folder, measured now or finished.

    Raises:
        SystemExit: it could not be measured.
    """
    command = [sys.executable, "-m", "bench.cli", "matrix", str(folder), "--baseline", model, *options]
    done = subprocess.run([*command, "--out", str(out), "--resume"])
    if done.returncode not in (0, 1, 3):
        raise SystemExit(done.returncode)
    return Matrix.read(out / "matrix.json")


def exports(model: str, names: Sequence[str]) -> dict[str, Path]:
    """The forms' folders by name."""
    from bench.exported import exported_folder
    from export.source import resolve

    source = resolve(model)
    return {n: exported_folder(source, model, FORMS[n][0], "cpu", FORMS[n][1]) for n in names}


def parity(row: MatrixRow) -> str:
    """Parity of a row in a cell."""
    if row.outcome != "ran":
        return OUTCOMES[row.outcome]
    numbers = {m.name: m.value for r in row.results for m in r.measurements}
    kld = f", {numbers['mean_kld']:.2g}" if "mean_kld" in numbers else ""
    failed = row.first_failed
    return f"{row.parity}{kld}" + (f", {failed.name}" if failed else "")


def ratio(row: MatrixRow, case: str, metric: str) -> str:
    """Speed of a row beside the reference in a cell: bold beyond the margin, with ``?`` where undecided."""
    if row.reference:
        return "1"
    found = next((r for r in row.speed if (r.case, r.metric) == (case, metric)), None)
    if found is None or found.ratio is None:
        return "-"
    told = f"{found.ratio:.3f}"
    told = {"REGRESSION": f"**{told}**", "IMPROVED": f"**{told}**", "EQUIVALENT": told}.get(found.status, f"{told}?")
    return told + (f" ({found.low:.2f} to {found.high:.2f})" if found.low and found.high else "")


def tables(made: Mapping[str, Matrix]) -> str:
    """Parity, then speed case by case, a row a runtime and a column a form; in Markdown."""
    found = {(form, r.runtime, r.provider): r for form, m in made.items() for r in m.rows}
    every = {(r.runtime, r.provider): r for r in found.values()}
    places = sorted(every, key=lambda place: (every[place].provider, release(every[place].version), place[0]))
    several = len({provider for _, provider in places}) > 1

    def table(cell: Callable[[MatrixRow], str]) -> str:
        lines = []
        for name, provider in places:
            rows = [found.get((form, name, provider)) for form in made]
            lines.append([f"{name}, {provider}" if several else name, *(cell(r) if r else "-" for r in rows)])
        return markdown(["runtime", *made], lines)

    text = "Parity, mean KL divergence (nats) against PyTorch, first check that failed:\n\n" + table(parity)
    cases = dict.fromkeys(c for m in made.values() for c in m.cases)
    for case in cases:
        for metric, title in (("ttft", "Prefill"), ("tpot", "Decode")):
            text += f"\n{title}, {case}, time over that under the reference (95 % interval):\n\n"
            text += table(partial(ratio, case=case, metric=metric))
    memory = table(lambda r: f"{r.peak_memory_bytes / 1e6:,.0f} MB" if r.peak_memory_bytes else "-")
    return text + "\nPeak memory:\n\n" + memory if cases else text


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see ``--help``. What it does not know goes to ``llama-onnx matrix``."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.runtime_table", description="forms x runtimes")
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--runtime", default=RUNTIMES)
    parser.add_argument("--only", nargs="*", choices=FORMS, default=list(FORMS))
    args, options = parser.parse_known_args(arguments)
    folders = exports(args.model, args.only)
    made = {}
    for name, folder in folders.items():
        out = args.out / name.replace(" ", "-")
        made[name] = measured(folder, args.model, out, ["--runtime", args.runtime, *options])
    text = tables(made)
    (args.out / "runtimes.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
