"""What every form of a matrix says: its runtimes by name, the answer in sentences, the cells of its tables.

Ratios are row / reference: above 1 is slower.
Try: ``llama-onnx report matrix.json``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import quote

from reports.base import grouped
from reports.comparison import METRICS, Result
from reports.comparison_summary import importance
from reports.matrix import OUTCOMES, Bisection, Difference, Matrix, MatrixRow, OperatorTime
from reports.render import comparison_words as cw
from reports.render import words
from reports.render.words import Term
from reports.validation import CheckResult, Measurement
from reports.verdict import ANSWERS

FAMILY = "onnxruntime"
NAMED = 4
"""Runtimes that a sentence names before it counts the rest."""
SPEED = ("tpot", "ttft")
PARITY = {"mean_kld": "Mean KLD", "top1_agreement": "Top-1", "greedy": "Greedy equal"}
"""Measurements of the table, with the heads of their columns."""
UNAVAILABLE = "unavailable"
_PHRASES = {
    "same": "the same model under",
    "different": "another model under",
    "undecided": "parity undecided under",
    "not examined": "parity not examined under",
    "refused": "refused by",
    "crashed": "crashed under",
    "timeout": "took too long under",
    UNAVAILABLE: "not tried under",
}
"""How a sentence begins for each state of a row, in the order in which they are told."""

GLOSSARY = (
    Term(
        "Row",
        "One runtime and provider. A range such as 1.23.2 to 1.32.0 stands for the rows between; versions that were "
        "not tried are not in it.",
    ),
    Term(
        "Reference",
        "The runtime beside which each row's speed was measured, in interleaved pairs. "
        "Ratios are row / reference: above 1 is slower.",
    ),
    Term("Parity", "The gate's numeric and generation checks against PyTorch, under this runtime."),
    Term(
        "Difference",
        "The first operator that computes something else than under the reference, from the same inputs. The limit "
        "allows for rounding.",
    ),
    *(t for t in words.GLOSSARY if t.term in ("KLD", "Tolerance tier", "Bound")),
    *(t for t in cw.GLOSSARY if t.term not in ("Ratio", "New", "Pair", words.NULL_CONTROL.term)),
)


@dataclass(frozen=True)
class Overview:
    """A matrix with the names and sentences that more than one form needs."""

    matrix: Matrix

    @cached_property
    def plain(self) -> bool:
        """Whether its version alone names each runtime, the reference's twin aside."""
        return all(r.runtime.removesuffix(" (reference)") == f"{FAMILY} {r.version}" for r in self.matrix.rows)

    @cached_property
    def providers(self) -> list[str]:
        """In the order of the rows."""
        return list(dict.fromkeys(r.provider for r in self.matrix.rows))

    def short(self, row: MatrixRow) -> str:
        """The runtime as a cell of a table names it."""
        return words.shorten(row.runtime.removeprefix(f"{FAMILY} ") if self.plain else row.runtime, 60)

    def named(self, rows: Sequence[MatrixRow], family: bool = False) -> str:
        """Such as ``1.23.2 to 1.32.0``, after ``onnxruntime`` if asked; the provider where there are several."""
        parts = []
        for provider, own in grouped(rows, lambda r: r.provider).items():
            on = f" on {words.shorten(provider, 30)}" if len(self.providers) > 1 else ""
            parts.append(cw.joined(self._runs(own)) + on)
        return (f"{FAMILY} " if family and self.plain else "") + cw.joined(parts)

    def _runs(self, rows: Sequence[MatrixRow]) -> list[str]:
        """Names, of at least three that follow each other only the first and the last, at most ``NAMED`` in all."""
        every = [r for r in self.matrix.rows if r.provider == rows[0].provider]
        runs: list[list[MatrixRow]] = []
        for r in rows:
            follows = runs and every.index(r) == every.index(runs[-1][-1]) + 1
            if self.plain and follows and not _older(r.version, runs[-1][-1].version):
                runs[-1].append(r)
            else:
                runs.append([r])
        told = []
        for run in runs:
            ends = [self.short(r) for r in run]
            told += [f"{ends[0]} to {ends[-1]}"] if len(run) > 2 else ends
        return told if len(told) <= NAMED else [*told[: NAMED - 1], f"{len(told) - NAMED + 1} more"]

    @property
    def title(self) -> str:
        """Such as ``int4 under 6 runtimes``."""
        return f"{words.shorten(self.matrix.folder, 60)} under {self._tried} runtime{'s' * (self._tried != 1)}"

    @cached_property
    def _tried(self) -> int:
        """Runtimes, the reference and its twin counted once."""
        return len({r.version if self.plain else r.runtime for r in self.matrix.rows})

    @cached_property
    def states(self) -> dict[str, list[MatrixRow]]:
        """Rows by state, in the order of a sentence."""
        found = grouped(self.matrix.rows, state)
        return {s: found[s] for s in _PHRASES if s in found}

    @property
    def model_sentences(self) -> tuple[str, str]:
        """Under which runtimes is this still the model, and not the model: large; what else became of it: beside it."""
        rows, same = self.matrix.rows, self.states.get("same", [])
        if not rows:
            return "No runtime was tried.", ""
        if len(same) == len(rows):
            what = "runtimes" if len(self.providers) == 1 else "rows"
            tried = self._tried if len(self.providers) == 1 else len(rows)
            count = "both" if tried == 2 else f"all {tried}"
            every = f"{count} {what}, " if tried > 1 else ""
            return f"The same model under {every}{self.named(rows, family=True)}.", ""
        large = {s: found for s, found in self.states.items() if s in ("same", "different")}
        first = cw.joined(
            [f"{_PHRASES[s]} {self.named(found, family=not i)}" for i, (s, found) in enumerate(large.items())]
        )
        rest = cw.joined([f"{_PHRASES[s]} {self.named(found)}" for s, found in self.states.items() if s not in large])
        if not same:
            first = f"nowhere shown to be the same model{': ' if first else ''}{first}"
        return sentence(first), sentence(rest) if rest else ""

    @property
    def speed_sentence(self) -> str:
        """How fast is it there? Runtimes under which it is another model are left out."""
        rows = [row for row in self.matrix.rows if row.speed and state(row) != "different"]
        gating = [r for row in rows for r in row.speed if r.gating]
        if not gating:
            return "Speed was not measured."
        moved = [f"{cw.metric_name(m)} is {cw.joined(told)}" for m in metrics(gating) if (told := self._moved(rows, m))]
        open_ = sum(r.status in ("INCONCLUSIVE", "INVALID") for r in gating)
        lost = [row for row in rows if any(r.gating and r.status == "MISSING" for r in row.speed)]
        reference = words.shorten(self.matrix.reference, 60)
        told = [f"Against {reference}, {cw.joined(moved)}."] if moved else []
        if not moved and not open_ and not lost:
            told.append(f"As fast as under {reference}, within the margin.")
        if open_:
            told.append(f"{open_} of {len(gating)} speed results {'is' if open_ == 1 else 'are'} undecided.")
        if lost:
            told.append(f"Speed could not be measured under {self.named(lost)}.")
        return " ".join(told)

    def _moved(self, rows: Sequence[MatrixRow], metric: str) -> list[str]:
        """Such as ``12 to 25 % slower under 1.28.0 to 1.30.0``, slower before faster."""
        found = []
        for status in ("REGRESSION", "IMPROVED"):
            own = {i: _hits(row, metric, status) for i, row in enumerate(rows)}
            hits = [r for results in own.values() for r in results]
            if ratios := sorted((r.ratio for r in hits if r.ratio), key=lambda x: abs(math.log(x))):
                found.append(f"{cw.span(ratios, hits[0].unit)} under {self.named([rows[i] for i in own if own[i]])}")
        return found

    @property
    def change_sentence(self) -> str:
        """Which version broke it? "" without a bisection."""
        found = self.matrix.bisection
        return sentence(found.summary) if found else ""

    @property
    def headline(self) -> str:
        """All of it."""
        return " ".join(filter(None, (self.model_sentences[0], self.second)))

    @property
    def second(self) -> str:
        """All but the sentence that stands large."""
        return " ".join(filter(None, (self.model_sentences[1], self.speed_sentence, self.change_sentence)))

    @property
    def sure_line(self) -> str:
        """What parity and speed rest on."""
        m = self.matrix
        margins = {f"{r.margin * 100:g} %" for row in m.rows for r in row.speed if r.gating}
        margin = f", margin {words.shorten(', '.join(sorted(margins)), 40)}" if margins else ""
        pairs = f"{m.pairs} interleaved pair{'s' * (m.pairs != 1)} a case{margin}" if m.pairs else "speed not measured"
        return f"mode {words.shorten(m.mode, 30)}, tolerance tier {words.shorten(m.tier, 30)}; {pairs}"

    def leading(self, metric: str) -> tuple[MatrixRow, Result] | None:
        """The most pressing result of a metric, over the rows that are not another model."""
        found = [(row, r) for row in self.matrix.rows if state(row) != "different" for r in row.speed]
        of_metric = [(row, r) for row, r in found if r.metric == metric and r.ratio is not None]
        return min(of_metric, key=lambda pair: importance(pair[1]), default=None)

    def in_order(self, results: Sequence[Result]) -> list[Result]:
        """Results by case and metric as they were asked for, whatever order they were measured in."""
        cases, order = self.matrix.cases, list(METRICS)
        return sorted(
            results,
            key=lambda r: (
                cases.index(r.case) if r.case in cases else len(cases),
                order.index(r.metric) if r.metric in order else len(order),
            ),
        )

    @cached_property
    def with_speed(self) -> bool:
        """Whether speed was measured anywhere."""
        return any(row.speed for row in self.matrix.rows)

    def ratio(self, row: MatrixRow, metric: str) -> str:
        """The most pressing case of a metric as one cell."""
        return "reference" if row.reference and self.with_speed else pressing_ratio(row, metric)

    @cached_property
    def shared_notes(self) -> list[str]:
        """Notes that every row with results has: they are about all of them, and are told once."""
        rows = [r for r in self.matrix.rows if r.results]
        return [n for n in rows[0].notes if all(n in r.notes for r in rows)] if len(rows) > 1 else []

    def notes_of(self, row: MatrixRow) -> list[str]:
        """The row's own notes."""
        return [n for n in row.notes if n not in self.shared_notes]

    @property
    def notes(self) -> list[str]:
        """The matrix's notes, and those of all rows."""
        return list(dict.fromkeys([*self.matrix.notes, *self.shared_notes]))

    def neighbours(self, found: Bisection) -> list[MatrixRow]:
        """The rows of the last version before the change and of the first after it."""
        asked = [name for name in (found.before, found.after) if name]
        return [r for name in asked for r in self.matrix.rows if name in (r.version, r.text, r.runtime)]


def state(row: MatrixRow) -> str:
    """How the folder ended, else the answer of its parity."""
    if row.outcome != "ran":
        return row.outcome
    return ANSWERS[row.parity] if row.parity else "not examined"


def parity_cell(row: MatrixRow) -> str:
    """Such as ``different: mean_kld``: the answer with the first check that failed, or is open."""
    if row.outcome != "ran":
        return row.outcome
    check = row.first_failed or next((r for r in row.results if r.status == "INCONCLUSIVE"), None)
    return f"{state(row)}: {words.shorten(check.name, 40)}" if check else state(row)


def measured(row: MatrixRow, name: str) -> Measurement | None:
    """A measurement of one of the row's checks."""
    return next((m for r in row.results for m in r.measurements if m.name == name), None)


def value_text(m: Measurement | None) -> str:
    """Its value with its unit; shares in per cent."""
    if m is None:
        return words.DASH
    return words.share(m.value) if m.name in ("top1_agreement", "greedy") else words.number(m.value, m.unit, m.limit)


def speed_of(row: MatrixRow, metric: str) -> list[Result]:
    """Results of a metric, the most pressing case first."""
    return sorted((r for r in row.speed if r.metric == metric), key=importance)


def ratio_cell(result: Result) -> str:
    """Such as ``▶ 1.250``: glyph of the status and ratio, or the status where there is none."""
    told = result.status.lower() if result.ratio is None else cw.ratio_text(result.ratio)
    return f"{cw.LOOKS[result.status].glyph} {told}"


def pressing_ratio(row: MatrixRow, metric: str) -> str:
    """The most pressing case of a metric as one cell."""
    found = speed_of(row, metric)
    return ratio_cell(found[0]) if found else words.DASH


def load_text(row: MatrixRow) -> str:
    """Load time."""
    return words.DASH if row.load_s is None else f"{words.fixed(row.load_s)} s"


def peak_text(row: MatrixRow) -> str:
    """Peak memory in MB."""
    return words.DASH if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:,.0f} MB"


def row_reasons(row: MatrixRow) -> list[str]:
    """Why the row has its verdict, each sentence once; the outcome's reason first."""
    first = f"{OUTCOMES[row.outcome]}: {row.reason}" if row.outcome != "ran" and row.reason else row.reason
    told = [r for r in row.reasons if not (row.reason and row.reason in r)] if row.verdict != "PASS" else []
    return list(dict.fromkeys(filter(None, (first, *told))))


def difference_line(found: Difference) -> str:
    """Where it leaves the reference, in which run, by how much, and what rounding would explain."""
    scenario = f" in {words.shorten(found.scenario, 80)}" if found.scenario else ""
    explained = found.expected > 0 and math.isfinite(found.deviation)  # not a refusal, a crash or NaN
    limit = f" (rounding explains up to {found.expected:.2g})" if explained else ""
    return f"differs from the reference{scenario}: {words.shorten(found.what, 600)}{limit}"


def reproduction(found: Difference) -> str:
    """File and size; "" where there is none."""
    if not found.reproduction:
        return ""
    size = f" ({words.size(found.reproduction_bytes)})" if found.reproduction_bytes else ""
    return f"{words.clean(found.reproduction)}{size}"


def difference_lines(found: Difference) -> list[str]:
    """The same, and the file that shows it."""
    file = reproduction(found)
    return [difference_line(found), *([f"reproduction: {file}"] if file else [])]


def warned(row: MatrixRow) -> str:
    """How many warnings the runtime printed; "" without one."""
    count = len(row.warnings)
    return f"{count} warning{'s' * (count != 1)} printed by the runtime" if count else ""


def bisection_line(found: Bisection) -> str:
    """What was searched, and with how many measurements."""
    changed = f"{words.shorten(found.changed, 80)} changed" if found.changed else "nothing changed"
    count = len(found.tried)
    return (
        f"{words.shorten(found.first, 40)} to {words.shorten(found.last, 40)}: {changed}; {count} of {found.between} "
        f"versions measured, {words.duration(found.seconds)}"
    )


def operator_cells(t: OperatorTime) -> tuple[str, str, str, str, str]:
    """Operator, time before and after, difference, ratio."""
    before, after = (words.ms(us / 1e6) if us else words.DASH for us in (t.before_us, t.after_us))
    moved = t.after_us - t.before_us
    sign = "+" if moved > 0 else "−" if moved < 0 else ""
    ratio = cw.ratio_text(t.after_us / t.before_us) if t.before_us and t.after_us else words.DASH
    return words.shorten(t.operator, 60), before, after, f"{sign}{words.ms(abs(moved) / 1e6)}", ratio


def failed_first(results: Sequence[CheckResult]) -> list[CheckResult]:
    """Failed checks, then open ones, then the others in their order."""
    rank = {"FAIL": 0, "INCONCLUSIVE": 1}
    return sorted(results, key=lambda r: rank.get(r.status, 2))


def sentence(text: str) -> str:
    """With a capital and one full stop."""
    text = cw.tidy(words.shorten(text.strip(), 600))
    text = text if text.startswith(FAMILY) else words.capitalised(text)
    return text if text.endswith((".", "…", "!", "?")) else f"{text}."


def link(path: str) -> str:
    """A file beside the page as the target of a link; "" for what lies elsewhere."""
    return "" if not path or path.startswith(("/", "\\")) or ".." in path.split("/") else quote(words.clean(path))


def metrics(results: Sequence[Result]) -> list[str]:
    """Metrics of some results, this tool's own first and in its order."""
    own = dict.fromkeys(r.metric for r in results)
    return [*(m for m in METRICS if m in own), *(m for m in own if m not in METRICS)]


def _hits(row: MatrixRow, metric: str, status: str) -> list[Result]:
    return [r for r in row.speed if r.gating and r.metric == metric and r.status == status]


def _older(one: str, other: str) -> bool:
    numbers = [[int(n) for n in re.findall(r"[0-9]{1,9}", version)] for version in (one, other)]
    return numbers[0] < numbers[1]
