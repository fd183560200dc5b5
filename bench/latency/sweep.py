"""``llama-onnx sweep FILE.yaml``: models x precisions x providers x batch x prompt, one process each, into one file.

The file is checked by ``bench/latency/sweep.schema.json`` and an error names its line. Every process is a line of
``cases.jsonl`` as soon as it ends, so ``--resume`` goes on. ``--ray`` measures on every machine of a Ray cluster at
once; files of machines that share no cluster are merged by ``--merge``, a machine's fingerprint being part of what
makes a record unique. Measuring itself is :mod:`bench.latency.sweep_measure`'s.

Try: ``echo "models: [demo]" > s.yaml; llama-onnx sweep s.yaml --out /tmp/s``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError

if TYPE_CHECKING:
    from reports.comparison import CaseRecord

SCHEMA = Path(__file__).resolve().parent / "sweep.schema.json"


class SweepError(BenchError):
    """A sweep file that cannot be read or breaks the schema; names file, line and column."""


@dataclass(frozen=True)
class Sweep:
    """A checked sweep."""

    models: tuple[str, ...]
    precisions: tuple[str, ...] = ("fp32",)
    providers: tuple[str, ...] = ("cpu",)
    batch_sizes: tuple[int, ...] = (1,)
    prompt_lengths: tuple[int, ...] = (128,)
    new_tokens: int = 32
    rounds: int = 7
    processes: int = 3
    threads: int | None = None
    limit_s: float = 600.0

    def points(self) -> Iterator[tuple[str, str, str, int, int]]:
        """(model, precision, provider, batch, prompt) in the order in which they are measured."""
        return itertools.product(self.models, self.precisions, self.providers, self.batch_sizes, self.prompt_lengths)


def _mark(node: Any, path: Sequence[str | int]) -> Any:
    """The mark of the value at ``path`` (of its key where it is a mapping's); the nearest parent's if it has none."""
    import yaml

    mark = node.start_mark
    for step in path:
        if isinstance(node, yaml.MappingNode):
            pairs = {key.value: (key, value) for key, value in node.value}
            if step not in pairs:
                break
            key, node = pairs[str(step)]
            mark = key.start_mark
        elif isinstance(node, yaml.SequenceNode):
            node = node.value[int(step)]
            mark = node.start_mark
    return mark


def parse_sweep(text: str, name: str) -> Sweep:
    """Read a sweep.

    Raises:
        SweepError: no YAML, a key twice, or not what the schema asks for; line and column are named.
    """
    import jsonschema
    import yaml

    try:
        if any(isinstance(t, yaml.AliasToken) for t in yaml.scan(text, Loader=yaml.SafeLoader)):
            raise SweepError(f"{name} repeats a part by an alias (*name); write the part out")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise SweepError(f"{name}, {place}: {e.problem or 'not YAML'}") from None
    except yaml.YAMLError as e:
        raise SweepError(f"{name} is not YAML: {str(e).splitlines()[0]}") from None
    if root is None:
        raise SweepError(f"{name} is empty; write at least: models: [demo]")
    if isinstance(root, yaml.MappingNode):
        seen: set[str] = set()
        for key, _ in root.value:
            if key.value in seen:
                raise SweepError(f"{name}, line {key.start_mark.line + 1}: {key.value} stands twice")
            seen.add(key.value)
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    problems = sorted(validator.iter_errors(raw), key=lambda e: list(map(str, e.absolute_path)))
    if problems:
        first = problems[0]
        path = list(first.absolute_path)
        if first.validator == "additionalProperties":  # the unknown key itself, not the mapping around it
            path += [k for k in raw if k not in first.schema["properties"]][:1]
        mark = _mark(root, path)
        raise SweepError(f"{name}, line {mark.line + 1}, column {mark.column + 1}: {first.message}")
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return Sweep(**fields)


def merge(parts: Iterable[Sequence[CaseRecord]]) -> list[CaseRecord]:
    """Records of several machines in one list, sorted; the same process (machine, case, place) counts once."""
    found: dict[tuple[str, str, str, int, int], CaseRecord] = {}
    for records in parts:
        for r in records:
            found.setdefault((r.fingerprint or "", r.run or "", r.case, r.pair or 0, r.attempt), r)
    return [found[k] for k in sorted(found)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("file", type=Path, help="the sweep (YAML; bench/latency/sweep.schema.json)")
    parser.add_argument("--out", type=Path, default=Path("reports/out/sweep"), help="folder of cases.jsonl")
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds")
    parser.add_argument("--ray", action="store_true", help="on every machine of the Ray cluster (RAY_ADDRESS) at once")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for another measurement here")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], metavar="JSONL", help="records of other machines")


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, merge, print a table; 0, or 1 when a process failed."""
    from bench.latency.case_log import RECORDS, CaseLog
    from bench.latency.sweep_measure import measure_here, measure_on_machines
    from bench.machine.lock import machine_lock
    from reports.case_files import read_records
    from reports.publish import write_atomically

    try:
        text = args.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise SweepError(f"cannot read {args.file}: {e}") from None
    sweep = parse_sweep(text, str(args.file))
    say = lambda text: print(text, file=sys.stderr)  # noqa: E731
    log = CaseLog(args.out, args.resume)
    if args.ray:
        measure_on_machines(sweep, log, args.wait, say)
    else:
        with machine_lock("llama-onnx sweep", args.wait, say):
            measure_here(sweep, log, say)
    records = merge([log.records, *(read_records(p) for p in args.merge)])
    if args.merge:
        write_atomically(args.out / "merged.jsonl", "".join(r.model_dump_json() + "\n" for r in records))
    failed = [r for r in records if r.outcome not in ("ok", "invalid")]
    if args.json:
        sys.stdout.write(json.dumps([r.model_dump() for r in records], indent=1) + "\n")
    else:
        _print(records)
        print(f"records: {(args.out / ('merged.jsonl' if args.merge else RECORDS)).resolve()}")
    return 1 if failed else 0


def _print(records: Sequence[CaseRecord]) -> None:
    import statistics

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Medians over processes", title_justify="left")
    for column in ("machine", "case", "processes", "TTFT ms", "TPOT ms", "not counted"):
        table.add_column(column)
    keys = dict.fromkeys((r.fingerprint or "", r.case) for r in records)
    for fingerprint, case in keys:
        own = [r for r in records if (r.fingerprint or "", r.case) == (fingerprint, case)]
        ok = [r for r in own if r.outcome == "ok"]
        cells = [fingerprint[:8], case, f"{len(ok)} of {len(own)}"]
        for metric in ("ttft", "tpot"):
            values = [statistics.median(r.metrics[metric]) for r in ok if metric in r.metrics]
            cells.append(f"{1e3 * statistics.median(values):.2f}" if values else "")
        cells.append("; ".join(dict.fromkeys(r.reason for r in own if r.reason)))
        table.add_row(*(Text(c) for c in cells))
    Console().print(table)
