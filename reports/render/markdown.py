"""``report.md``: the verdict for a pull-request comment, in its first line, under the size that GitHub takes.

Everything from the record is escaped: it neither becomes markup, nor a link, nor a mention.

Try: ``python -c "import pathlib, reports.record as r, reports.render.markdown as m;
print(m.render_markdown(r.RunRecord.read(pathlib.Path('reports/out/record.json'))))"``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from reports.record import RunRecord
from reports.render import parity, words
from reports.stats import Estimate, Metric
from reports.summary import (
    LatencyRow,
    floor_rows,
    floor_s,
    headline_case,
    latency_rows,
    load_rows,
    memory_rows,
    prefill_cases,
    prefill_limit,
    prefill_rows,
)
from reports.targets import Target
from reports.validation import Validation
from reports.verdict import Verdict, judge, speed_sentence

LIMIT = 64_000
"""Characters; GitHub refuses a comment above 65,536."""

ROWS, LISTED, EXAMPLES, EXAMPLE_CHARS = 60, 20, 5, 600
EXAMPLES_ROOM = 16_000
SIGNS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "❔", "SUSPICIOUS": "⚠️", "REPORTED": "▫️", "SKIPPED": "▫️"}
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!~$])")


def escape(text: str, limit: int = 200) -> str:
    """Free text as one line of Markdown that shows exactly these characters, shortened to ``limit``."""
    line = words.shorten(" ".join(text.split()), limit)
    line = _SPECIAL.sub(r"\\\1", line)
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("@", "&#64;")):
        line = line.replace(character, entity)
    # An entity inside keeps GitHub from making a link of it.
    return line.replace("://", "&#58;//").replace("www.", "www&#46;")


def fenced(text: str) -> str:
    """Text in a code fence longer than any run of backticks in it."""
    text = words.clean(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def render_markdown(record: RunRecord) -> str:
    """The report as GitHub-flavoured Markdown, under 65,000 characters whatever the record holds."""
    verdict = judge(record)
    blocks = [
        f"**{SIGNS[verdict.outcome]} {verdict.word}: {escape(verdict.headline, 400)}**",
        *_answers(record, verdict),
        *bullets("Warnings", verdict.warnings, 500),
        *_latency(record),
        *_targets(verdict.targets),
        *parity_blocks(record.validation),
        *_memory(record),
        repeat(record.command),
    ]
    return with_examples(blocks, record.validation, "record.json")


def bullets(title: str, lines: Sequence[str], limit: int = 400) -> list[str]:
    """A section that lists sentences, and how many more there are; none without a sentence."""
    return listed(title, [escape(text, limit) for text in lines])


def listed(title: str, lines: Sequence[str]) -> list[str]:
    """The same for lines of Markdown."""
    told = [f"- {text}" for text in lines[:LISTED]]
    told += [f"- … {len(lines) - LISTED} more are in index.html."] * (len(lines) > LISTED)
    return [f"### {title}\n\n" + "\n".join(told)] if told else []


def repeat(command: Sequence[str]) -> str:
    """The section with the command."""
    return "### Repeat\n\n" + fenced(words.shorten(shlex.join(command), 2000))


def with_examples(blocks: Sequence[str], validation: Validation | None, source: str) -> str:
    """The report, and as many examples as there is room for."""
    text = within(blocks, LIMIT - EXAMPLES_ROOM)
    return "\n\n".join([text, *example_blocks(validation, LIMIT - len(text), source)]) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, most: int = ROWS) -> str:
    """A Markdown table of at most so many rows, first ``left`` columns to the left; cells are taken as they are."""
    rule = [":--" if i < left else "--:" for i in range(len(head))]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows[:most])]
    if len(rows) > most:
        lines.append(f"\n… {len(rows) - most:,} more rows are in index.html.")
    return "\n".join(lines)


def within(blocks: Sequence[str], limit: int) -> str:
    """As many whole blocks as fit, and a line that says how many did not."""
    kept: list[str] = []
    used = 0
    for i, block in enumerate(blocks):
        if used + len(block) + 200 > limit:
            kept.append(f"… cut here: {len(blocks) - i} more parts are in index.html.")
            break
        kept.append(block)
        used += len(block) + 2
    return "\n\n".join(kept)


def _answers(record: RunRecord, verdict: Verdict) -> list[str]:
    details = {r.title: r.reason for r in record.validation.results} if record.validation else {}

    def told(name: str) -> str:
        detail = details.get(name)
        return f"{escape(name)} ({escape(detail)})" if detail else escape(name)

    lines = [
        f"- **Model:** {escape(record.model.name)} ({escape(words.model_line(record))})",
        f"- **Speed:** {speed_sentence(verdict.speed)}",
        f"- **Parity:** {verdict.parity}; {verdict.passed} of {verdict.gated} checks pass",
        f"- **Machine:** {escape(words.machine_line(record.machine), 400)}",
        f"- **How sure:** {verdict.rounds} rounds a side, {verdict.tokens_scored or 0:,} tokens scored",
        f"- **Not examined:** {escape(', '.join(verdict.not_examined), 600) or words.DASH}",
    ]
    for title, names in (
        ("Failed", verdict.failed),
        ("Inconclusive", verdict.inconclusive),
        ("Suspicious", verdict.suspicious),
        ("Failed tests", verdict.failed_tests),
    ):
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            lines.append(f"- **{title}:** {'; '.join(told(n) for n in names[:LISTED])}{more}")
    if record.model.random_weights:
        note = "> **Random weights:** this model was never trained; its answers and task scores mean nothing."
        return [note, "\n".join(lines)]
    return ["\n".join(lines)]


def _timing(estimate: Estimate | None) -> str:
    return f"{words.median_ms(estimate)} {words.interval(estimate, 1e3)}".strip()


def _gain(row: LatencyRow, metric: Metric) -> str:
    if row.side.role == "baseline":
        return "baseline" if row.times[metric] else words.DASH
    return f"{words.times(row.gains[metric])} {words.interval(row.gains[metric])}".strip()


def _latency(record: RunRecord) -> list[str]:
    rows = latency_rows(record)
    if not rows:
        return ["### Latency\n\nLatency was not measured."]
    head = ["Case", "Side", "TTFT, ms", "Prefill", "TPOT, ms", "Decode", "Tokens/s", "Rounds"]
    cells = [
        [
            r.case.label,
            escape(r.side.title, 60),
            _timing(r.times["ttft"]),
            _gain(r, "ttft"),
            _timing(r.times["tpot"]),
            _gain(r, "tpot"),
            words.fixed(r.tokens_per_s) if r.tokens_per_s else words.DASH,
            str(r.rounds),
        ]
        for r in rows
    ]
    found = ["### Latency\n\n" + table(head, cells, 2), f"<sub>Medians. {words.RATIO_NOTE}</sub>"]
    case = headline_case(record)
    floor = floor_s(record, case) if case else None
    if case and floor:
        sides = ", ".join(f"{escape(r.side.title, 60)} {words.times(r.multiple)}" for r in floor_rows(record, case))
        found.append(f"Memory floor on {case.label}: {words.ms(floor)} per token; multiples of it: {sides}.")
    else:
        found.append("The memory floor was not measured.")
    return [*found, *_prefill(record)]


def _prefill(record: RunRecord) -> list[str]:
    rows, cases = prefill_rows(record), prefill_cases(record)
    if not rows:
        return []
    limits = [prefill_limit(record, c) for c in cases]
    cells = [
        [
            escape(side.title, 60),
            *(
                " ".join((words.fixed(e.tokens_per_s.value), f"({words.times(e.multiple)})" if e.multiple else ""))
                if e
                else words.DASH
                for e in found
            ),
        ]
        for side, found in rows
    ]
    if any(limits):
        cells.append(["Matrix-product floor", *(words.fixed(limit) if limit else words.DASH for limit in limits)])
    head = ["Prefill, tokens/s", *(f"prompt {c.prompt:,}" for c in cases)]
    told = " In brackets TTFT as a multiple of the matrix-product floor." if any(limits) else ""
    note = escape(" ".join(words.prefill_words(record)), 800)
    return [table(head, cells), f"<sub>Batch {cases[0].batch}; tokens of the prompt over TTFT.{told} {note}</sub>"]


def _targets(targets: Sequence[Target]) -> list[str]:
    if not targets:
        return []
    cells = [[t.name, words.target_limit(t), words.fixed(t.value), "✅ met" if t.met else "❌ missed"] for t in targets]
    return ["### Targets\n\n" + table(["Target", "Limit", "Measured", "Met"], cells)]


def parity_blocks(validation: Validation | None) -> list[str]:
    """Checks and task metrics as Markdown tables, or a line that says that nothing was examined."""
    if validation is None:
        return ["### Parity\n\nParity was not examined: this may or may not still be the same model."]
    v = validation
    where = f"Tolerance tier {escape(v.tier, 40)}, mode {escape(v.mode, 40)}, "
    where += f"against {escape(v.baseline)}, on {escape(v.dataset)}."
    if v.place:
        where += f"\n\n**Leaves the baseline at** {escape(v.place.detail, 300)}"
    cells = []
    for r in parity.ordered(v):
        m = r.measurements[0] if r.measurements else None
        told = [escape(words.number(x, m.unit, m.limit), 60) for x in (m.value, m.bound)] if m else []
        limit = escape(words.limit_text(m.limit, m.better, m.unit), 60) if m else words.DASH
        # What an exact check says stands in full where it failed, else its name is enough.
        said = told or [escape(r.summary, 200) if r.status == "FAIL" else words.DASH, words.DASH]
        samples = f"{m.samples:,}" if m else words.DASH
        cells.append([escape(r.title, 80), f"{SIGNS[r.status]} {r.status}", *said, limit, samples])
    found = [
        "### Parity\n\n" + where,
        table(["Check", "Status", "Value", "95\u00a0% bound", "Limit", "Samples"], cells, 2),
    ]
    if v.tasks:
        cells = [
            [
                f"{escape(t.task, 60)}, {escape(t.metric, 40)}",
                f"{SIGNS[t.status]} {t.status}",
                words.score(t.candidate),
                words.score(t.baseline),
                words.difference(t.difference_bound),
                words.difference(t.limit),
                f"{t.items:,}" + (f" ({t.would_decide})" if t.would_decide else ""),
            ]
            for t in v.tasks
        ]
        found.append(
            table(["Task", "Status", "Candidate", "Baseline", "Difference, bound", "Limit", "Items"], cells, 2)
        )
    else:
        found.append("Generation tasks were not examined.")
    return found


def example_blocks(validation: Validation | None, room: int, source: str) -> list[str]:
    """The first few examples as far as there is room, and a line that counts the rest."""
    every = validation.examples if validation else []
    found = []
    for e in every[:EXAMPLES]:
        parts = [
            f"{title}\n\n{fenced(words.shorten(text, EXAMPLE_CHARS))}"
            for title, text in (
                ("Prompt", e.prompt),
                ("Reference", e.reference),
                ("Candidate", e.candidate),
                ("Baseline", e.baseline),
            )
        ]
        summary = f"<summary>{escape(e.task, 60)}, {escape(e.item, 60)}</summary>"
        block = f"<details>{summary}\n\n" + "\n\n".join(parts) + "\n\n</details>"
        room -= len(block) + 2
        if room < 200:
            break
        found.append(block)
    if len(every) > len(found):
        found.append(f"… {len(found)} of {len(every):,} examples; the rest are in {source}.")
    return found


def _memory(record: RunRecord) -> list[str]:
    found = []
    if rows := memory_rows(record):
        cells = [[escape(side.title, 60), words.size(m.peak_bytes), words.size(m.own_bytes)] for side, m in rows]
        found.append("### Memory and load\n\n" + table(["Side", "Peak", "Added by the model"], cells))
    if loads := load_rows(record):
        cells = [[escape(side.title, 60), _timing(e), str(e.n)] for side, e in loads]
        found.append(table(["Side", "Load, ms", "Samples"], cells))
    return found
