"""The template environment that both pages share: autoescape, strict names, the filters for figures and statuses.

Try: ``python -c "from reports.render.environment import tone; print(tone('PASS'))"``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from reports.render import words
from reports.validation import Measurement

_TONES = {
    "pass": ("PASS", "PASSED", "MET"),
    "fail": ("FAIL", "FAILED", "MISSED", "ERROR"),
    "open": ("INCONCLUSIVE", "SUSPICIOUS"),
}
_MARKS = {"pass": "✓", "fail": "✕", "open": "?", "plain": "·"}


def tone(word: str) -> str:
    """CSS class of a status word."""
    return next((name for name, members in _TONES.items() if word in members), "plain")


def environment(**filters: Callable[..., Any]) -> Environment:
    """A jinja2 environment over the package's templates; ``filters`` are a page's own.

    Everything is escaped; only the plots of this package pass through ``svg`` as markup.
    """
    env = Environment(
        loader=PackageLoader("reports.render", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.globals["dash"] = words.DASH
    env.filters.update(
        ms=words.ms,
        bare_ms=words.bare_ms,
        ms_interval=words.ms_interval,
        times=words.times,
        times_interval=words.times_interval,
        fixed=words.fixed,
        size=words.size,
        share=words.share,
        score=words.score,
        difference=words.difference,
        limit=words.limit_text,
        short=words.shorten,
        when=words.when,
        measured=_measured,
        is_hash=lambda name: name.endswith("SHA-256") or name in ("Spec digest", "Fingerprint"),
        tone=tone,
        mark=lambda word: "!" if word == "SUSPICIOUS" else _MARKS[tone(word)],
        cap=lambda text: text[:1].upper() + text[1:],
        svg=Markup,
    )
    env.filters.update(filters)
    return env


def _measured(m: Measurement, name: str) -> str:
    return words.number(getattr(m, name), m.unit, m.limit)
