"""Checks of what a user reads: greedy generations on both sides and the scores of four tasks.

Try: ``llama-onnx validate FOLDER --baseline demo --only greedy,tasks``.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.gate.checks.numeric import of_figures
from bench.gate.generations import Outputs, batches_of, outputs_in_order
from bench.gate.old_gate import examples, greedy_checks, task_metrics
from bench.gate.subject import SEED, Found, Subject
from bench.gate.units import Batch, generate_batches
from reports.record import Check, TaskMetric
from reports.validation import worst


def outputs_of(s: Subject) -> list[Outputs]:
    """Both sides' generations, made once for a subject."""
    cached = s.__dict__.get("_outputs")
    if cached is None:
        groups = s.dataset.groups(s.mode.items)
        items = [item for members in groups.values() for item in members]
        batches = batches_of(items, s.tokenizer, s.manifest.context_length, s.mode.new_tokens)
        eos = tuple(s.manifest.eos_token_ids)
        made = generate_batches(s, [Batch(b.prompts, b.limit, eos) for b in batches])
        cached = outputs_in_order(items, batches, made)
        s.__dict__["_outputs"] = cached
    found: list[Outputs] = cached
    return found


def _figure(s: Subject, name: str) -> Found:
    found = outputs_of(s)
    if not found:
        return Found("SKIPPED", "the dataset has nothing to generate from")
    check = next(c for c in greedy_checks(found, s.tier) if c.name == name)
    result = of_figures([check])
    return Found(result.status, f"{check.value:.4g} ({check.detail})", figures=[check])


def greedy(s: Subject) -> Found:
    """Share of greedy generations equal token for token, and where the first one parts."""
    return _figure(s, "greedy_tokens")


def length_band(s: Subject) -> Found:
    """Length of the outputs over the baseline's, 0.9 to 1.1 both ways."""
    return _figure(s, "length_band")


def end_token(s: Subject) -> Found:
    """As many generations end by themselves as the baseline's do."""
    found = outputs_of(s)
    if not found:
        return Found("SKIPPED", "the dataset has nothing to generate from")
    ends = set(s.baseline.eos)
    ours, theirs = (
        sum(bool(t) and t[-1] in ends for t in side)
        for side in zip(*((o.candidate, o.baseline) for o in found), strict=True)
    )
    # Rounding flips a few tokens in lossy tiers: as many generations may end otherwise as may differ at all.
    allowed = max(1, round((1 - s.tier.greedy) * len(found)))
    check = Check(
        name="end_token",
        title="Generations that end by themselves",
        status="PASS" if abs(ours - theirs) <= allowed else "FAIL",
        value=float(ours),
        bound=None,
        limit=float(theirs),
        better="equal",
        null_value=None,
        samples=len(found),
        unit="",
        detail=f"{ours} of {len(found)} end with an end token, the baseline's {theirs}; {allowed} may differ",
    )
    return Found(check.status, check.detail, figures=[check])


def tasks(s: Subject) -> Found:
    """BLEU, ROUGE, exact match and F1 against the references and against the baseline's own outputs."""
    found = outputs_of(s)
    if not found:
        return Found("SKIPPED", "the dataset has nothing to generate from")
    metrics = task_metrics(found, s.tokenizer, s.tier, SEED)
    status = worst([m.status for m in metrics])
    if status == "INCONCLUSIVE" and not s.mode.judges_tails:
        status = "REPORTED"
    return Found(status, _tasks_line(metrics), tasks=metrics, examples=examples(found, s.tokenizer))


def _tasks_line(metrics: Sequence[TaskMetric]) -> str:
    """The score that decides the status: one that failed, the undecided one that needs most, or the largest loss."""
    bad = [m for m in metrics if m.status == "FAIL"]
    undecided = sorted((m for m in metrics if m.status == "INCONCLUSIVE"), key=lambda m: -(m.items_needed or 0))
    shown = (bad or undecided or [min(metrics, key=lambda m: m.candidate - m.baseline)])[0]
    what = "undecided" if undecided and not bad else "largest loss"
    needs = f"; {shown.would_decide}" if shown.would_decide else ""
    count = f"{len(undecided)} of {len(metrics)}" if what == "undecided" else f"{len(metrics)}"
    scores = f"{shown.candidate:.2f} against {shown.baseline:.2f}, {shown.items} items{needs}"
    loss = shown.baseline - shown.candidate
    return f"{count} scores {what}, {loss:.2f} points ({shown.metric} on {shown.task}: {scores})"
