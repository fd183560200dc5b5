"""A sweep file: models x precisions x providers x batch x prompt, and the merging of what machines measured of it.

The file is checked by ``bench/latency/sweep.schema.json`` and an error names its line. Measuring is
:mod:`bench.latency.sweep_measure`'s, the command :mod:`bench.cli.sweep`'s.
Try: ``python -c "from bench.latency.sweep import parse_sweep; print(parse_sweep('models: [demo]', 'here'))"``.
"""

from __future__ import annotations

import itertools
import json
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


def _mark(root: Any, path: Sequence[str | int]) -> Any:
    """The mark of a key, or of an item of its list; the document's where ``path`` names none."""
    key, value = next((pair for pair in root.value if path and pair[0].value == str(path[0])), (root, None))
    return value.value[path[1]].start_mark if value and path[1:] else key.start_mark


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
