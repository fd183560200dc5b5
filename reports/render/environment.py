"""What all pages share: the template environment, filters for numbers and statuses, machine and command.

Used by ``llama-onnx report record.json --out /tmp/page``.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from reports.comparison import Comparison
from reports.matrix import Matrix
from reports.record import RunRecord
from reports.render import svg, words
from reports.validation import Validation

_FILTERS = (
    *(words.ms, words.bare_ms, words.median_ms, words.times, words.interval, words.fixed, words.size, words.share),
    *(words.score, words.difference, words.limit_text, words.target_limit, words.when),
    *(words.shorten, words.capitalised, words.tone, words.finding),
)
_MARKS = {"pass": "✓", "fail": "✕", "open": "?", "plain": "·"}


def by_name(functions: Iterable[Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Functions as the filters of a template, each under its own name."""
    return {f.__name__: f for f in functions}


def render(
    template: str,
    subject: RunRecord | Comparison | Validation | Matrix,
    context: dict[str, Any],
    filters: dict[str, Callable[..., Any]],
) -> str:
    """A page; ``context`` and ``filters`` are its own, beside what all pages share.

    Everything is escaped, and control characters are replaced; only the plots of this package pass through ``svg`` as
    markup.
    """
    env = Environment(
        loader=PackageLoader("reports.render", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        by_name(_FILTERS),
        measured=lambda m, name: words.number(getattr(m, name), m.unit, m.limit),
        is_hash=lambda name: name.endswith("SHA-256") or name in ("Spec digest", "Fingerprint"),
        mark=lambda word: "!" if word == "SUSPICIOUS" else _MARKS[words.tone(word)],
        svg=Markup,
        **filters,
    )
    env.globals.update(
        dash=words.DASH,
        differences=[],
        shapes=svg.shapes(),
        tool_version=subject.tool_version,
        machine=subject.machine,
        machine_line=words.machine_line(subject.machine),
        command=shlex.join(subject.command),
    )
    return words.clean(env.get_template(template).render(context))
