"""A validation as lines on a terminal, as a page, as Markdown for a pull request and as JUnit.

Try: ``llama-onnx validate FOLDER --baseline demo --mode quick --out /tmp/validated``.
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from reports.render import parity, words
from reports.render.environment import render
from reports.render.junit import document, parity_cases
from reports.render.markdown import SIGNS, bullets, escape, parity_blocks, repeat, with_examples
from reports.render.terminal import style
from reports.validation import CheckResult, Validation
from reports.verdict import PARITY_WORDS, WORDS, parity_answer, unexamined

SOURCE = "validation.json"
SECTIONS = (("parity", "Checks"), ("reproduce", "Reproduce"), ("glossary", "Glossary"))
TERMS = ("KLD", "Perplexity ratio", "Tolerance tier", "Null control", "Bound")
_NAME = 18


def print_check(result: CheckResult, console: Console) -> None:
    """Name, status, summary and seconds; up to three findings below a failed one."""
    line = Text(f"{words.clean(result.name):<{_NAME}} ")
    line.append(f"{result.status:<12} ", style=style(result.status))
    line.append(f"{result.seconds:6.1f} s  ", style="dim")
    line.append(words.clean(result.summary))
    console.print(line, soft_wrap=True)
    for finding in result.findings[1:4]:
        console.print(Text(words.clean(f"{'':<{_NAME}} also {words.finding(finding)}"), style="dim"), soft_wrap=True)


def print_verdict(found: Validation, console: Console) -> None:
    """The verdict, the place, and the reasons."""
    head = Text(f"\n{found.verdict}", style=style(found.verdict))
    told = (
        f"  {found.folder} against {found.baseline}, tolerance tier {found.tier}, mode {found.mode}, "
        f"{found.seconds:.0f} s"
    )
    head.append(words.clean(told), style="")
    console.print(head, soft_wrap=True)
    for reason in found.reasons:
        console.print(Text(f"  {words.clean(reason)}"), soft_wrap=True)
    if found.place:
        console.print(Text(f"  leaves the baseline at {words.clean(found.place.detail)}"), soft_wrap=True)
    for note in found.notes:
        console.print(Text(f"  note: {words.clean(note)}", style="dim"), soft_wrap=True)


def print_validation(found: Validation, console: Console) -> None:
    """Every check, then the verdict."""
    for result in found.results:
        print_check(result, console)
    print_verdict(found, console)


def headline(v: Validation) -> str:
    """The answer in one sentence."""
    first = v.reasons[0] if v.verdict != "PASS" and v.reasons else parity.line(v)
    return f"{PARITY_WORDS[parity_answer(v)]}: {words.shorten(first, 220)}."


def _ran_on(v: Validation) -> str:
    asked = str(v.settings.get("provider", "cpu"))
    if not v.session:
        return f"{asked} (nothing was run)"
    details = [f"{name} {v.session[name]}" for name in ("onnxruntime", "attention") if name in v.session]
    ran = str(v.session.get("provider", asked))
    more = f", asked for {asked}" if ran != asked else ""
    return ", ".join([ran + more, *details])


def _sure(v: Validation) -> str:
    return f"{v.tokens_scored:,} tokens scored, {len(v.evidence.outputs):,} answers compared"


def render_validation(v: Validation) -> str:
    """The page; equal validations give equal bytes."""
    context = {
        "word": WORDS[v.verdict],
        "sections": SECTIONS,
        "headline": headline(v),
        "counts": parity.counts(v),
        "ran_on": _ran_on(v),
        "sure_line": _sure(v),
        "not_examined": unexamined(v),
        "facts": [
            *parity.facts(v),
            ("Machine", words.machine_facts(v.machine)),
            ("Versions", list(v.versions.items())),
        ],
        "glossary": [t for t in words.GLOSSARY if t.term in TERMS],
        "source": SOURCE,
    }
    return render("validation.html.j2", v, parity.context(v) | context, {})


def render_validation_markdown(v: Validation) -> str:
    """GitHub-flavoured Markdown under 65,000 characters."""
    lines = [
        f"- **Folder:** {escape(v.folder)}, against {escape(v.baseline)}",
        f"- **Ran on:** {escape(_ran_on(v))}",
        f"- **How sure:** {_sure(v)}",
        f"- **Not examined:** {escape(', '.join(unexamined(v)), 600) or words.DASH}",
    ]
    blocks = [f"**{SIGNS[v.verdict]} {WORDS[v.verdict]}: {escape(headline(v), 400)}**", "\n".join(lines)]
    told = [*(v.reasons if v.verdict != "PASS" else []), *v.notes]
    blocks += [*bullets("Read this first", told), *parity_blocks(v), repeat(v.command)]
    return with_examples(blocks, v, SOURCE)


def render_validation_junit(v: Validation) -> str:
    """JUnit XML: one test case a check and a task metric."""
    return document("llama-onnx-bench validate", {"parity": parity_cases(v)}, v.created_utc, v.seconds)
