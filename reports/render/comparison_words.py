"""The sentences of a comparison: the verdict that a reviewer acts on, changes, values with their unit.

A change is always the candidate's time (or size) against the base's: ``4.1 % slower`` is a ratio of 1.041.

Try: ``python -c "import reports.render.comparison_words as w; print(w.change(1.041, 's'))"``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reports.comparison import METRICS, UNITS, ChangeStatus, Comparison, History, HistoryStep, Result
from reports.comparison_summary import Digest, MetricGroup
from reports.render import parity, words
from reports.render.words import NULL_CONTROL, Term


@dataclass(frozen=True)
class Look:
    """How a status is shown: CSS class, glyph, mark of the forest plot, sign in Markdown, and what it means.

    Shapes, so that a status needs no colour: the glyphs point where the marks of the forest plot lie.
    """

    tone: str
    glyph: str
    shape: str
    sign: str
    meaning: str


LOOKS: dict[ChangeStatus, Look] = {
    "REGRESSION": Look("fail", "▶", "right", "🔺", "slower (or larger) beyond the margin, and surely not noise"),
    "MISSING": Look("fail", "−", "cross", "➖", "the base has it, the candidate could not be measured"),
    "INVALID": Look("open", "✕", "cross", "🚫", "the machine was disturbed, nothing can be said"),
    "INCONCLUSIVE": Look("open", "○", "ring", "❔", "the interval is too wide to decide"),
    "IMPROVED": Look("pass", "◀", "left", "🔽", "faster (or smaller) beyond the margin, and surely not noise"),
    "NEW": Look("plain", "+", "ring", "🆕", "the candidate has it, the base does not"),
    "EQUIVALENT": Look("plain", "●", "circle", "▫️", "shown to lie within the margin"),
}

GLOSSARY = (
    *(
        Term(status.capitalize(), f"{look.meaning.capitalize()}.", mark=look.glyph, tone=look.tone)
        for status, look in LOOKS.items()
    ),
    Term("Ratio", "The candidate against the base, the trimmed geometric mean over pairs. 1.041 is 4.1\u00a0% slower."),
    Term("Pair", "Base and candidate measured back to back, each in a fresh process; the order alternates."),
    Term("Margin", "A change smaller than this does not matter, fixed before measuring. It is the grey band."),
    Term(
        "Interval", "Where the true ratio lies with 95\u00a0% confidence, by a t-test on the logarithms of the pairs."
    ),
    Term(
        "p, Holm",
        "How likely so large a difference is if nothing changed, raised for the number of results that gate together. "
        "It is held against alpha.",
    ),
    Term("Gating", "Only these results decide the exit code. The others are measured beside them for reading."),
    NULL_CONTROL,
)

_PERCENT = "\u00a0%"
_NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")


def tone(status: ChangeStatus, digest: Digest) -> str:
    """CSS class of a status; a speed-up of another model is no success."""
    return "fail" if status == "IMPROVED" and digest.parity_fails else LOOKS[status].tone


def metric_name(metric: str) -> str:
    """Such as ``decode`` for ``tpot``; an unknown metric keeps its own name."""
    return METRICS[metric].name if metric in METRICS else words.shorten(metric, 60)


def metric_title(metric: str) -> str:
    """The name that heads a group of results."""
    return METRICS[metric].title if metric in METRICS else words.shorten(metric, 80)


def value(number: float | None, unit: str) -> str:
    """A median with its unit: seconds as milliseconds, bytes in decimal units, others as they come."""
    if number is None:
        return words.DASH
    kept, factor = UNITS.get(unit, (unit, 1.0))
    if kept == "s":
        return words.ms(number * factor)
    if kept == "B":
        return words.size(number * factor)
    return f"{words.fixed(number)} {words.shorten(unit, 20)}".strip()


def percent(fraction: float) -> str:
    """An unsigned share of a change: one decimal below 10 %."""
    size = abs(fraction) * 100
    return f"{size:.1f}\u00a0%" if size < 9.95 else f"{size:,.0f}\u00a0%"


def signed(ratio: float | None) -> str:
    """A ratio as a signed change, such as ``+4.1 %``, with a real minus sign; a dash where nothing was measured."""
    if ratio is None:
        return words.DASH
    text = percent(ratio - 1)
    if text.startswith("0.0"):
        return text
    return f"{'+' if ratio > 1 else '−'}{text}"


def signed_interval(result: Result) -> str:
    """Such as ``+3.0 to +5.2 %``; empty without an interval."""
    if result.low is None or result.high is None:
        return ""
    low, high = (signed(x).removesuffix("\u00a0%") for x in (result.low, result.high))
    return f"{low} to {high}\u00a0%"


def ratio_text(number: float | None) -> str:
    """A ratio with the digits that a 3 % margin needs: 1.041."""
    return words.DASH if number is None else f"{number:.3f}"


def ratio_interval(result: Result) -> str:
    """Such as ``[1.030, 1.052]``; empty without an interval."""
    return "" if result.low is None or result.high is None else f"[{result.low:.3f}, {result.high:.3f}]"


def p_text(p: float | None) -> str:
    """A p value: ``< 0.0001`` at the low end, two digits elsewhere."""
    if p is None:
        return words.DASH
    if p < 1e-4:
        return "<\u00a00.0001"
    return f"{p:.2f}" if p >= 0.1 else f"{p:.2g}"


def direction(ratio: float, unit: str) -> str:
    """``slower`` or ``faster``, ``larger`` or ``smaller``."""
    known = {"s": ("slower", "faster"), "B": ("larger", "smaller")}
    worse, better = known.get(UNITS.get(unit, (unit,))[0], ("higher", "lower"))
    return worse if ratio > 1 else better


def change(ratio: float, unit: str) -> str:
    """A change in words: ``4.1 % slower``, ``2.6 times as fast``; percentages are of the base's time or size."""
    timed = UNITS.get(unit, (unit,))[0] == "s"
    return words.times_as(ratio, timed) or f"{percent(ratio - 1)} {direction(ratio, unit)}"


def step_text(history: History, step: HistoryStep) -> str:
    """How much a metric's level changed, and since when."""
    when = words.when(history.points[step.index].at_utc) if step.index < len(history.points) else f"run {step.index}"
    return f"{change(step.ratio, history.unit)} since {when}"


def tidy(sentence: str) -> str:
    """A sentence from a record with its per cent signs kept on the line of their number."""
    return sentence.replace(" %", _PERCENT)


def headline(digest: Digest) -> str:
    """The whole verdict in a few words: what moved, how sure, what did not, what is still open."""
    return " ".join(part for part in verdict_sentences(digest) if part)


def verdict_sentences(digest: Digest) -> tuple[str, str]:
    """The verdict as a page sets it: the sentence that stands large, and what is to be known beside it."""
    c = digest.comparison
    if not c.results:
        return "Nothing was compared: neither side holds a case.", ""
    first = _parity_part(digest)
    moved, rest = _moved(digest, gating=True), _rest(digest)
    if moved:
        sure = "as far as unpaired samples tell" if c.advisory else "we are sure"
        told = f"This change made {joined(moved)}; {sure}."
        # Another model stands large alone: how fast it is comes second.
        if digest.parity_fails:
            rest.insert(0, told)
        else:
            first.append(told)
    elif not first:
        first, rest = rest[:1], rest[1:]
    if (c.validation is None or c.validation.verdict == "PASS") and any(r.status == "IMPROVED" for r in c.results):
        # A speed-up never stands without its parity.
        rest.insert(0, f"{parity.short(c.validation).capitalize()}.")
    beside = _moved(digest, gating=False)
    if beside:
        rest.append(f"Outside the gate, {joined(beside)}.")
    return " ".join(first), " ".join(rest)


def case_text(result: Result) -> str:
    """The case as a reader says it: ``batch 1, prompt 128`` where the parameters are known, else its name."""
    p = result.parameters
    if "batch" in p and "prompt" in p:
        return f"batch {p['batch']}, prompt {p['prompt']}"
    return words.shorten(result.case, 80)


def sure_line(comparison: Comparison) -> str:
    """Family, alpha, margin and pairs in one line."""
    family = comparison.family
    measured = sorted({r.valid_pairs for r in comparison.results if r.valid_pairs})
    pairs = f"{measured[0]} to {measured[-1]}" if len(measured) > 1 else str(measured[0]) if measured else "no"
    kind = "valid pairs" if comparison.paired else "pairs (files, not interleaved)"
    size = f"{family.size} gating result{'s' * (family.size != 1)}"
    return f"{size}, α {family.alpha:g} (Holm), {margins_text(comparison)}, {pairs} {kind}"


def margins_text(comparison: Comparison) -> str:
    """Such as ``margin 3 %``, or one a metric where they differ."""
    margins = {m: v for m, v in comparison.family.margins.items() if m in comparison.family.gating_metrics}
    distinct = {f"{v * 100:g}\u00a0%" for v in margins.values()}
    if len(distinct) == 1:
        return f"margin {distinct.pop()}"
    told = [f"{metric_name(m)} {v * 100:g}\u00a0%" for m, v in list(margins.items())[:4]]
    return f"margins {', '.join(told)}" if told else "no margin"


def differences(comparison: Comparison) -> list[str]:
    """What is not the same on the two sides: weights, precision, provider, options, versions."""
    found = []
    sides = [
        {
            "model": s.model,
            "precision": s.precision,
            "weights": s.weights_sha256 and s.weights_sha256[:8],
            "spec": s.spec_digest and s.spec_digest[:8],
            "provider": s.provider,
            "revision": s.revision,
            **s.options,
            **s.details,
            **s.versions,
        }
        for s in (comparison.base, comparison.candidate)
    ]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        a, b = (side.get(name) for side in sides)
        if a != b:
            told = [words.DASH if x is None else words.shorten(str(x), 40) for x in (a, b)]
            found.append(f"{words.shorten(name, 40)} {told[0]} → {told[1]}")
    return found


def _parity_part(digest: Digest) -> list[str]:
    v = digest.comparison.validation
    if v is None or v.verdict == "PASS":
        return []
    if v.verdict == "INCONCLUSIVE":
        return ["Parity is undecided."]
    lost = ", so no speed-up counts" * any(r.status == "IMPROVED" for r in digest.comparison.results)
    return [f"Not the same model: parity fails at tier {words.shorten(v.tier, 20)}{lost}."]


def _moved(digest: Digest, gating: bool) -> list[str]:
    """What got slower and what got faster, one phrase a metric, regressions first."""
    return [
        _phrase(group, hit, gating)
        for status in ("REGRESSION", "IMPROVED")
        for group in digest.metrics
        if (hit := group.of(status, gating))
    ]


def _phrase(group: MetricGroup, hit: Sequence[Result], gating: bool) -> str:
    name = metric_name(group.metric) + ("" if gating else " was")
    ratios = sorted((r.ratio for r in hit if r.ratio is not None), key=lambda x: abs(math.log(x)))
    size = span(ratios, hit[0].unit) if ratios else hit[0].status.lower()
    tested = sum(r.gating == gating for r in group.results)
    if tested == 1:
        return f"{name} {size}"
    if len(hit) == 1:
        return f"{name} {size} ({case_text(hit[0])})"
    return f"{name} {size} in {f'all {tested}' if len(hit) == tested else f'{len(hit)} of {tested}'} cases"


def span(ratios: Sequence[float], unit: str) -> str:
    """One change, or the span of several, smallest first: ``3.8 to 5.1 % slower``, ``3.46 to 7.93 times as slow``."""
    small, large = change(ratios[0], unit), change(ratios[-1], unit)
    if small == large:
        return large
    if "times" in large:  # both ends in one unit
        return f"{words.fixed(max(ratios[0], 1 / ratios[0]))} to {large}"
    return f"{percent(ratios[0] - 1).removesuffix(_PERCENT)} to {large}"


def _rest(digest: Digest) -> list[str]:
    """What did not move, what is undecided, and what could not be measured; gating results only."""
    of = {s: sum(r.status == s and r.gating for r in digest.comparison.results) for s in digest.counts}
    same, open_ = of["EQUIVALENT"], of["INCONCLUSIVE"]
    others = {s: n for s, n in of.items() if n and s != "EQUIVALENT"}
    parts = []
    if same and not others:
        every = f"all {same} results are" if same > 1 else "the one result is"
        parts.append(f"Nothing moved: {every} within {_within_text(digest.comparison)}.")
    elif same and set(others) <= {"REGRESSION", "IMPROVED"}:
        parts.append("Nothing else moved.")
    elif same:
        parts.append(f"{_counted(same)} did not move.")
    if open_:
        more = digest.more_pairs
        need = f" and need{'s' * (open_ == 1)} {more} more pair{'s' * (more != 1)}" if more else ""
        parts.append(f"{_counted(open_)} could not be decided{need}.")
    if count := of["INVALID"]:
        parts.append(f"{_counted(count)} {'was' if count == 1 else 'were'} disturbed and cannot be judged.")
    if count := of["MISSING"]:
        parts.append(f"{_counted(count)} could not be measured for the candidate.")
    if count := of["NEW"]:
        parts.append(f"{_counted(count)} {'is' if count == 1 else 'are'} new.")
    return parts or ["Nothing gates here: the results are for reading only."] * (not any(of.values()))


def _within_text(comparison: Comparison) -> str:
    text = margins_text(comparison)
    return f"{text.removeprefix('margin ')} of the base" if text.startswith("margin ") else f"their {text}"


def _counted(count: int) -> str:
    """A number that begins a sentence; a small one as a word."""
    return _NUMBERS[count] if count < len(_NUMBERS) else f"{count:,}"


def joined(parts: Sequence[str]) -> str:
    """Such as ``a, b and c``."""
    return "".join(parts) if len(parts) < 2 else ", ".join(parts[:-1]) + " and " + parts[-1]
