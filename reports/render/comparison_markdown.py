"""``report.md`` of a comparison: fit for a pull-request comment, the verdict in its first line, always cut cleanly.

Try: ``python -c "import pathlib, reports.comparison as c, reports.render.comparison_markdown as m;
print(m.render_comparison_markdown(c.Comparison.read(pathlib.Path('comparison.json'))))"``.
"""

from __future__ import annotations

from reports.comparison import Comparison, Result
from reports.comparison_summary import Digest
from reports.render import comparison_words as cw
from reports.render import parity, words
from reports.render.markdown import LIMIT, SIGNS, bullets, escape, listed, parity_blocks, repeat, table, within
from reports.verdict import WORDS

_OPEN_ROWS, _FOLDED_ROWS = 30, 60


def render_comparison_markdown(comparison: Comparison) -> str:
    """GitHub-flavoured Markdown under 65,000 characters, whatever the comparison holds."""
    c, digest = comparison, Digest(comparison)
    first, second = cw.verdict_sentences(digest)
    blocks = [f"**{SIGNS[c.verdict.outcome]} {WORDS[c.verdict.outcome]}: {escape(first, 600)}**"]
    if second:
        blocks.append(escape(second, 1200))
    if c.advisory:
        blocks.append(f"> **Advisory, nothing gates:** {escape(c.advisory_reason or 'not measured in pairs', 400)}")
    reasons = [*(c.verdict.reasons if c.verdict.exit_code else []), *c.warnings]
    blocks += [_counts(digest), _facts(digest), *bullets("Read this first", reasons), *_results(digest)]
    blocks += [*parity_blocks(c.validation), *_history(c), repeat(c.command)]
    return within(blocks, LIMIT) + "\n"


def _counts(digest: Digest) -> str:
    told = [f"{cw.LOOKS[s].sign} {n:,} {s.lower()}" for s, n in digest.counts.items() if n]
    return " · ".join(told) or "no results"


def _facts(digest: Digest) -> str:
    c = digest.comparison
    answer = f"{_parity_sign(c)} {parity.short(c.validation)}"
    check = parity.measurement_line(parity.leading(c.validation))
    lines = [
        f"- **Compared:** {escape(c.candidate.title)} against {escape(c.base.title)}",
        f"- **Same model:** {escape(answer)}{f' ({escape(check, 300)})' if check else ''}",
        f"- **How sure:** {escape(cw.sure_line(c), 400)}",
        f"- **Machine:** {escape(words.machine_line(c.machine), 400)}",
    ]
    if found := cw.differences(c):
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        lines.insert(1, f"- **Differs:** {'; '.join(escape(d, 120) for d in found[:8])}{more}")
    return "\n".join(lines)


def _parity_sign(c: Comparison) -> str:
    return SIGNS[c.validation.verdict] if c.validation else "❔"


def _results(digest: Digest) -> list[str]:
    """What needs attention open, what did not move folded away."""
    ordered = digest.by_importance
    pressing = [r for r in ordered if r.status not in ("EQUIVALENT", "NEW")]
    quiet = [r for r in ordered if r.status in ("EQUIVALENT", "NEW")]
    found = []
    if pressing:
        found.append("### What changed or is open\n\n" + _table(pressing, digest, _OPEN_ROWS))
    if quiet:
        summary = f"<summary>{len(quiet):,} result{'s' * (len(quiet) != 1)} that did not move or are new</summary>"
        found.append(f"<details>{summary}\n\n{_table(quiet, digest, _FOLDED_ROWS)}\n\n</details>")
    return found


def _table(results: list[Result], digest: Digest, rows: int) -> str:
    head = ["Case", "Metric", "Status", "Base", "Candidate", "Change", "95\u00a0% interval", "p, Holm", "Pairs"]
    return table(head, [_cells(r, digest) for r in results], 3, rows)


def _cells(r: Result, digest: Digest) -> list[str]:
    status = f"{cw.LOOKS[r.status].sign} {r.status}"
    if r.status == "IMPROVED":
        status += f", {escape(parity.short(digest.comparison.validation))} {_parity_sign(digest.comparison)}"
    if not r.gating:
        status += ", not gating"
    return [
        escape(r.case, 80),
        escape(cw.metric_name(r.metric), 40),
        status,
        escape(cw.value(r.base_median, r.unit), 40),
        escape(cw.value(r.candidate_median, r.unit), 40),
        cw.signed(r.ratio),
        cw.signed_interval(r) or words.DASH,
        cw.p_text(r.p_holm).replace("<", "&lt;"),
        f"{r.valid_pairs}, needs {r.pairs_needed}" if r.pairs_needed else str(r.valid_pairs),
    ]


def _history(c: Comparison) -> list[str]:
    lines = [
        f"{escape(h.case, 80)}, {escape(cw.metric_name(h.metric), 40)}: "
        f"{cw.step_text(h, s)} (p {cw.p_text(s.p)})".replace("<", "&lt;")
        for h in c.history
        for s in h.steps
    ]
    return listed("Steps in the history (advisory)", lines)
