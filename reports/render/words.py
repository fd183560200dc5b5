"""Numbers and names as a reader meets them: units and digits.

One rule for ratios everywhere: ``2.79×`` is *times as fast as the baseline*, the
baseline's time divided by the side's.

Try: ``python -c "from reports.render.words import ms; print(ms(0.0248))"``.
"""

from __future__ import annotations

import datetime
import math
import re
from dataclasses import dataclass
from decimal import Decimal

from reports.base import Machine
from reports.record import RunRecord
from reports.stats import Estimate
from reports.targets import Target
from reports.validation import Finding

DASH = "–"
# C0 and C1 but tab and line ends, marks that turn the direction of text, and what XML 1.0 cannot hold as an entity.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
RATIO_NOTE = (
    "× means times as fast as the baseline: its time divided by this side's time, the median over "
    "rounds that ran back to back. Above 1 is faster. Brackets hold 95\u00a0% intervals."
)


@dataclass(frozen=True)
class Term:
    """A term of the glossary; ``long`` writes an abbreviation out, ``mark`` and ``tone`` are those of a status."""

    term: str
    text: str
    long: str = ""
    mark: str = ""
    tone: str = ""


NULL_CONTROL = Term(
    "Null control",
    "The same metric of PyTorch against itself with another attention kernel: what no change looks like.",
)
GLOSSARY = (
    Term(
        "TTFT", "From the call to the first new token: the whole prompt is read once (prefill).", "time to first token"
    ),
    Term(
        "TPOT",
        "Mean time of each token after the first (decode). 25 ms are 40 tokens per second for one row.",
        "time per output token",
    ),
    Term(
        "ITL",
        "The single gaps between tokens. Their tail is what a reader sees as stutter; TPOT is their mean.",
        "inter-token latency",
    ),
    Term(
        "KLD",
        "How far the candidate's odds for the next token stray from PyTorch's, in nats; 0 is identical.",
        "Kullback-Leibler divergence",
    ),
    Term(
        "Perplexity ratio",
        "How much more surprised the candidate is by real text than PyTorch; 1 is equally surprised.",
    ),
    Term(
        "Tolerance tier",
        "The limits that fit the precision: fp32 must agree almost bit by bit, int4 may differ visibly.",
    ),
    NULL_CONTROL,
    Term("Bound", "The one-sided 95\u00a0% end of a metric. It must lie within the limit, so that luck does not pass."),
    Term(
        "Memory floor",
        "One token cannot take less time than reading weights and cache once at the memory's measured speed.",
    ),
    Term("Spread", "How much rounds differ from each other (robust deviation / median). Above 2.5\u00a0% is noisy."),
)

PREFILL_FLOOR = Term(
    "Matrix-product floor",
    "The time of a prompt's matrix products at the speed of one plain product here. Only a faster kernel can beat it.",
)

_TONES = {
    "pass": ("PASS", "PASSED", "MET"),
    "fail": ("FAIL", "FAILED", "MISSED", "ERROR"),
    "open": ("INCONCLUSIVE", "SUSPICIOUS"),
}
UNITS = {"nat": "nats", "fraction": "", "ratio": "", "1": "", "percent": "%"}


def tone(word: str) -> str:
    """CSS class of a status word."""
    return next((name for name, members in _TONES.items() if word in members), "plain")


def fixed(value: float) -> str:
    """Three significant digits without an exponent: 0.00248, 2.48, 24.8, 248, 2,480."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == 0:
        return "0"
    decimals = min(max(2 - math.floor(math.log10(abs(value))), 0), 6)
    return f"{value:,.{decimals}f}"


def times_as(ratio: float, timed: bool) -> str:
    """``7.93 times as slow``, ``2.60 times as fast``, of sizes ``2.10 times as large``; "" below twice as much."""
    if ratio >= 2:
        return f"{fixed(ratio)} times as {'slow' if timed else 'large'}"
    return f"{fixed(1 / ratio)} times as fast" if timed and ratio <= 0.5 else ""


def ms(seconds: float | None) -> str:
    """Milliseconds with their unit; a dash where nothing was measured."""
    return DASH if seconds is None else f"{fixed(seconds * 1e3)} ms"


def bare_ms(seconds: float | None) -> str:
    """Milliseconds without the unit, for columns whose head names it."""
    return DASH if seconds is None else fixed(seconds * 1e3)


def median_ms(estimate: Estimate | None) -> str:
    """The same for the value of an estimate."""
    return bare_ms(estimate.value if estimate else None)


def times(estimate: Estimate | None) -> str:
    """Such as ``2.79×``."""
    return DASH if estimate is None else f"{fixed(estimate.value)}×"


def interval(estimate: Estimate | None, scale: float = 1.0) -> str:
    """Such as ``[2.71, 2.87]``, the ends times ``scale``; empty where no interval could be had."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"[{fixed(estimate.low * scale)}, {fixed(estimate.high * scale)}]"


def share(value: float | None) -> str:
    """A fraction in per cent."""
    return DASH if value is None else f"{value:.1%}".replace("%", "\u00a0%")


def size(count: float) -> str:
    """Bytes in decimal units (1 MB is 10^6 bytes)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale:
            return f"{fixed(count / scale)} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Such as ``4 min 12 s``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def when(stamp: str) -> str:
    """An ISO time in UTC as a reader writes it, such as ``24 Nov 2026, 02:39 UTC``; other text stays as it is."""
    try:
        at = datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00"))
    except ValueError:
        return shorten(stamp, 40)
    if at.tzinfo is not None:
        at = at.astimezone(datetime.UTC)
    return f"{at.day} {_MONTHS[at.month - 1]} {at.year}, {at:%H:%M}{' UTC' if at.tzinfo else ''}"


def number(value: float | None, unit: str = "", limit: float | None = None) -> str:
    """A parity metric with just more digits than its limit has, so that the two can be told apart."""
    if value is None:
        return DASH
    suffix = UNITS.get(unit, unit)
    tail = f" {suffix}" if suffix else ""
    if not math.isfinite(value):
        return fixed(value) + tail
    if value == int(value) and abs(value) < 1e9 and limit is None:
        return f"{int(value):,}{tail}"
    if value != 0 and abs(value) < 1e-3:
        return f"{_short_exponent(value)}{tail}"
    decimals = 4 if limit is None else _decimals(limit) + (2 if _decimals(limit) > 4 else 1)
    if limit is not None and abs(limit) < 1e-3:
        return f"{value:.3g}{tail}"
    return f"{value:,.{min(decimals, 8)}f}{tail}"


def score(value: float | None) -> str:
    """A task score from 0 to 100."""
    return DASH if value is None else f"{value:.2f}"


def difference(value: float | None) -> str:
    """A difference of two task scores, or the margin for it: small, so one more digit than a score."""
    return DASH if value is None else f"{value:+.3f}"


def limit_text(limit: float | None, better: str, unit: str = "") -> str:
    """Such as ``≤ 1e-8``: the side on which the value must lie and the limit itself, all its digits."""
    if limit is None:
        return DASH
    sign = {"lower": "≤", "higher": "≥", "equal": "≈"}[better]
    text = _short_exponent(limit) if limit and abs(limit) < 1e-3 else f"{limit:,.8g}"
    suffix = UNITS.get(unit, unit)
    return f"{sign} {text}{' ' + suffix if suffix else ''}"


def prefill_words(record: RunRecord) -> list[str]:
    """What the matrix-product floor is made of and what it does not bound, in sentences; none without a record of it.

    Everything but the reason why there is none is text of ours.
    """
    floor = record.prefill_floor
    if floor is None:
        return []
    if floor.missing or floor.products is None or not floor.measured:
        return [f"There is no matrix-product floor: {floor.missing or 'it was not measured'}."]
    said = [
        f"The matrix-product floor is the time of the prompt's own matrix products (the layers' matrices, attention of "
        f"each token to itself and those before it, the head for the last position) at the speed of {floor.method}.",
        "A side whose kernels are faster than this product can take less than the floor.",
    ]
    if record.model.precision != floor.dtype:
        said.append(
            f"The weights are {record.model.precision} and have a kernel of their own: next to it a product in "
            f"{floor.dtype} is a yardstick, not a bound."
        )
    return said


def target_limit(target: Target) -> str:
    """The limit of one of the project's targets."""
    return f"{limit_text(target.limit, target.better)} {target.unit}"


def _short_exponent(value: float) -> str:
    return re.sub(r"e([+-])0+", r"e\1", f"{value:.2g}")


def _decimals(value: float) -> int:
    exponent = Decimal(f"{value:.8g}").normalize().as_tuple().exponent
    return max(-exponent, 0) if isinstance(exponent, int) else 2


def clean(text: str) -> str:
    """Text without control characters, which no page shows and a terminal obeys; each becomes U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters, none of them a control character, with an ellipsis where something was cut."""
    text = clean(text)
    return text if len(text) <= limit else text[: max(limit - 1, 0)].rstrip() + "…"


def finding(found: Finding) -> str:
    """Where, what, and the decoder layer if it is known."""
    layer = "" if found.layer is None else f" (layer {found.layer})"
    return f"{found.where}: {found.what}{layer}"


def capitalised(text: str) -> str:
    """With a capital first letter, unless it begins with the name of a file or a key."""
    first = text.partition(" ")[0].rstrip(",;:.")
    return text[:1].upper() + text[1:] if first.replace("-", "").isalpha() else text


def plain(value: object) -> str:
    """A setting or an option: yes and no, lists without brackets."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(str(v) for v in value) if isinstance(value, list) else str(value)


def machine_line(machine: Machine | None) -> str:
    """The machine in one line."""
    if machine is None:
        return "not recorded"
    cores = f"{machine.cores} core{'s' * (machine.cores != 1)}"
    parts = [machine.gpu, machine.cpu, cores, size(machine.memory_bytes), machine.os]
    return " · ".join(part for part in parts if part)


def machine_facts(machine: Machine) -> list[tuple[str, str]]:
    """The machine as pairs of name and value."""
    load = machine.load_average_1m
    return [
        ("CPU", machine.cpu),
        ("Cores", str(machine.cores)),
        ("GPU", machine.gpu or "none"),
        ("Memory", size(machine.memory_bytes)),
        ("System", machine.os),
        ("Python", machine.python),
        ("Load average, 1 min", DASH if load is None else f"{load:.2f}"),
        ("Fingerprint", machine.fingerprint),
    ]


def model_line(record: RunRecord) -> str:
    """The model in one line, without its name."""
    m = record.model
    billions = m.parameters / 1e9
    count = f"{fixed(billions)} B" if billions >= 1 else f"{fixed(m.parameters / 1e6)} M"
    return f"{m.precision} · {m.target} · {count} parameters"
