"""Judge a document again from its own evidence: every bound, status and the verdict, without a model.

Who receives a result need not believe its numbers: statistical checks are judged by the functions that judged them in
the run (:mod:`bench.gate.judge`), exact ones have to agree with their findings. Neither torch nor ONNX Runtime is
imported.
Try: ``python -m pytest tests/bench/gate/test_replay.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from bench.data.items import NEW_TOKENS, Dataset
from bench.data.loading import load_shipped
from bench.gate.checks.numeric import PLACES
from bench.gate.found import CheckSpec, Found, stopped
from bench.gate.judge import NOT_APPLICABLE
from bench.gate.metrics import score_task
from bench.gate.modes import MODES, Terms
from bench.gate.registry import BY_NAME, CHECKS, checks_of
from bench.gate.statistics import TIERS
from bench.machine.environment import versions
from reports.validation import CheckResult, ChunkScores, Evidence, GeneratedItem, Validation, decide_verdict

NUMERIC = ("numpy", "scipy", "sacrebleu")
"""Libraries whose version may move a last digit; with another one :data:`SLACK` is allowed."""
SLACK = 1e-9
LEAST = -1e-9
"""Divergences and losses are not negative; rounding in float64 may leave so much."""
TOKENS = ("perplexity_ratio", "mean_kld", "tail_kld", "top1_agreement", "null_ratio")
SETS = [[c.name for c in checks_of(target)] for target in sorted({c.target for c in CHECKS})]
"""The whole set, by the targets that make a difference."""
OUTPUTS = ("greedy", "length_band", "end_token")


class _Asked(dict[int, list[float]]):
    """Remembers which chunks' own loss the judges wanted to know."""

    def __init__(self, values: dict[int, list[float]]) -> None:
        super().__init__(values)
        self.keys_asked: set[int] = set()

    def __getitem__(self, key: int) -> list[float]:
        self.keys_asked.add(key)
        return super().__getitem__(key)


def replay(document: Validation) -> list[str]:
    """In what a document differs from what its evidence gives, one sentence each; empty where it holds.

    Numbers have to be equal to the last digit; where numpy, scipy or sacrebleu are of another version than in the run,
    to :data:`SLACK`.
    """
    wrong = [*_header(document)]
    if document.mode not in MODES or document.tier not in TIERS:
        return wrong
    terms = Terms(document.tier, document.activations, document.kv_dtype, MODES[document.mode])
    wrong += [f"evidence: {what}" for what in _impossible(document.evidence, terms)]
    if wrong:
        return wrong  # no judge has to make sense of that
    here = versions()
    slack = 0.0 if all(document.versions.get(n) == here.get(n) for n in NUMERIC) else SLACK
    asked = _Asked(document.evidence.own_loss)
    evidence = document.evidence.model_copy(update={"own_loss": asked})
    for result in document.results:
        wrong += _result(result, BY_NAME[result.name], evidence, terms, slack)
    wrong += [f"evidence: {what}" for what in _unaccounted(document, asked)]
    verdict, reasons = decide_verdict(document.results)
    wrong += _differences("verdict", document.verdict, verdict, 0.0)
    return [*wrong, *_differences("reasons", document.reasons, reasons, 0.0)]


def incomplete(document: Validation) -> list[str]:
    """Why a document that holds is no ground for a certificate, one sentence each; empty where it is.

    Asked for are the digests of folder, baseline and data, a result of every check, and a decision. A PASS needs text
    and items as well: a statistical check may be skipped only where it does not apply to the folder's precision. Of the
    project's own data all items of the mode have to be there.
    """
    digests = ("folder_sha256", "baseline_sha256", "dataset_sha256")
    wrong = [f"{n} is missing" for n in digests if not re.fullmatch("[0-9a-f]{64}", getattr(document, n))]
    ran = {r.name for r in document.results}
    missing = [name for name in document.checks if name not in ran]
    wrong += [f"{len(missing)} of {len(document.checks)} checks were not run: {_few(missing)}"] if missing else []
    if document.verdict != "PASS":
        undecided = [r.name for r in document.of("INCONCLUSIVE")]
        return wrong + ([f"undecided: {_few(undecided)}"] if document.verdict == "INCONCLUSIVE" else [])
    wrong += [
        f"{r.name} was skipped: {r.summary}"
        for r in document.of("SKIPPED")
        if BY_NAME[r.name].judge and r.summary not in NOT_APPLICABLE
    ]
    own = load_shipped()
    return wrong + (other_items(document, own) if document.dataset_sha256 == own.sha256 else [])


def other_items(document: Validation, dataset: Dataset) -> list[str]:
    """A sentence where the generations are not those of the mode's items, else nothing."""
    groups = dataset.groups(MODES[document.mode].items)
    wanted = [(item.id, item.group) for items in groups.values() for item in items]
    if [(o.item, o.group) for o in document.evidence.outputs] == wanted:
        return []
    return [f"the generations are not those of the {len(wanted)} items of mode {document.mode}"]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _header(document: Validation) -> Iterator[str]:
    """What has to be right before anything can be judged."""
    if document.checks not in SETS:
        yield "checks: not the list of this version's checks"
    names = [r.name for r in document.results]
    if names != [name for name in document.checks if name in names]:
        yield "results: a check that is not known, stands twice or in another order"
    for field, known in (("mode", MODES), ("tier", TIERS)):
        if getattr(document, field) not in known:
            yield f"{field}: {getattr(document, field)!r} must be one of {', '.join(known)}"
    mode = MODES.get(document.mode)
    if mode:
        asked = {"window": mode.window, "windows": mode.windows, "items": mode.items}
        yield from _differences("settings", {k: document.settings.get(k) for k in asked}, asked, 0.0)


def _result(r: CheckResult, spec: CheckSpec, evidence: Evidence, terms: Terms, slack: float) -> Iterator[str]:
    """One result against the registry and its judge."""
    found = Found(r.status, r.summary, r.findings, notes=r.notes)
    if r.summary.startswith("stopped: "):
        found = stopped(r.name, r.summary.removeprefix("stopped: "))
    elif spec.judge is not None:
        try:
            found = spec.judge(evidence, terms)
        except Exception as e:  # whatever a forged document makes it stumble over
            yield f"{r.name}: cannot be judged from this evidence ({type(e).__name__}: {e})"
            return
    elif (r.status in ("FAIL", "INCONCLUSIVE")) != bool(r.findings) or r.status == "SUSPICIOUS":
        yield f"{r.name}.status: says {r.status} with {len(r.findings)} findings"
    elif r.status in ("REPORTED", "SKIPPED", "INCONCLUSIVE") and not spec.may_abstain:
        yield f"{r.name}.status: says {r.status}, this check always decides"
    wanted = {
        "kind": spec.kind,
        "looks_at": spec.looks_at,
        "status": found.status,
        "summary": found.summary,
        "findings": [f.model_dump() for f in found.findings],
        "measurements": [m.model_dump() for m in found.measurements],
        "tasks": [t.model_dump() for t in found.tasks],
        "notes": list(found.notes),
    }
    yield from _differences(r.name, r.model_dump(include=set(wanted)), wanted, slack)


def _differences(place: str, have: Any, wanted: Any, slack: float) -> Iterator[str]:
    """Leaves that are not equal, by their place."""
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            yield from _differences(f"{place}.{key}", have[key], value, slack)
    elif isinstance(wanted, list) and len(have) == len(wanted):
        for k, (a, b) in enumerate(zip(have, wanted, strict=True)):
            yield from _differences(f"{place}[{k}]", a, b, slack)
    elif have != wanted:
        numbers = isinstance(have, float) and isinstance(wanted, float)
        if not (numbers and slack and math.isclose(have, wanted, rel_tol=slack)):
            yield f"{place}: says {have!r}, the evidence gives {wanted!r}"


# -- evidence that no run can leave ----------------------------------------------------------------------------------


def _impossible(e: Evidence, terms: Terms) -> Iterator[str]:
    mode = terms.mode
    if mode.windows is not None and len(e.chunks) > mode.windows:
        yield f"{len(e.chunks)} chunks, mode {mode.name} has {mode.windows}"
    for name, chunks in (("chunk", e.chunks), ("null chunk", e.null)):
        for k, c in enumerate(chunks):
            yield from (f"{name} {k} {what}" for what in _chunk(c, mode.window))
    if [len(c.kld) for c in e.null] != [len(c.kld) for c in e.chunks[: mode.null_windows]]:
        yield f"the null control is not over the first {mode.null_windows} chunks"
    for k, loss in e.own_loss.items():
        if not len(e.null) <= k < len(e.chunks) or len(loss) != len(e.chunks[k].kld) or not _plausible(loss):
            yield f"own_loss of chunk {k} does not belong to it"
    for name, rows in e.places.items():
        if len({r.place for r in rows}) != len(rows):
            yield f"{name} looks at a place twice"
        if not all(r.kld >= LEAST for r in rows):
            yield f"{name} has a divergence that is negative or no number"
    if len({o.item for o in e.outputs}) != len(e.outputs):
        yield "an item was generated twice"
    for o in e.outputs:
        same = o.candidate == o.baseline == o.equal
        ended = (o.candidate_ended and not o.candidate) or (o.baseline_ended and not o.baseline)
        if not 0 <= o.equal <= min(o.candidate, o.baseline) or ended:
            yield f"item {o.item}: {o.equal} of {o.candidate} and {o.baseline} tokens cannot be equal, or end so"
        if same and o.candidate_ended != o.baseline_ended:
            yield f"item {o.item}: equal outputs of which one ends"
    yield from _tasks(e)


def _plausible(values: Sequence[float]) -> bool:
    array = np.asarray(values, np.float64)
    return bool(np.isfinite(array).all() and (array >= LEAST).all())


def _chunk(c: ChunkScores, window: int) -> Iterator[str]:
    tokens = len(c.kld)
    if {len(c.nll_candidate), len(c.nll_baseline), len(c.same_top1)} != {tokens}:
        yield "has lists of different lengths"
    if not 0 < tokens < window:
        yield f"has {tokens} tokens, a window of {window} has at most {window - 1}"
    if not all(map(_plausible, (c.nll_candidate, c.nll_baseline, c.kld))):
        yield "holds a value that is negative or not finite"


@cache
def _metrics(task: str) -> dict[str, int]:
    """Metrics of a task and the number of statistics that each keeps of an item."""
    return {m.metric: m.statistics.shape[1] for m in score_task(task, ["word"], [["word"]])}


def _tasks(e: Evidence) -> Iterator[str]:
    """Every metric of every group, each over the group's items; what a metric's statistics can be."""
    groups: dict[str, list[GeneratedItem]] = {}
    for o in e.outputs:
        groups.setdefault(o.group, []).append(o)
    strange = {g for g in [*groups, *(t.group for t in e.tasks)] if g.split(" ")[0] not in NEW_TOKENS}
    if strange:
        yield f"no task makes the group {min(strange)!r}"
        return
    wanted = [(g, metric) for g in sorted(groups) for metric in _metrics(g.split(" ")[0])]
    if groups and e.tasks and [(t.group, t.metric) for t in e.tasks] != wanted:
        yield "tasks are not every metric of every group once"
    for t in e.tasks:
        made = groups.get(t.group, [])
        where, width = f"{t.metric} on {t.group}", _metrics(t.group.split(" ")[0]).get(t.metric, 0)
        sides = (t.candidate, t.baseline, t.cross)
        if len(set(t.items)) != len(t.items) or (made and t.items != [o.item for o in made]):
            yield f"{where} is not over the items that were generated"
        if not all(len(side) == len(t.items) for side in sides) or not t.items:
            yield f"{where} has another number of rows than items"
        elif not all(_statistics(row, t.metric, width) for side in sides for row in side):
            yield f"{where} has statistics that no output gives"
        elif t.same_outputs and t.candidate != t.baseline:
            yield f"{where} has equal outputs that score differently"
        else:
            same = [o.candidate == o.baseline == o.equal for o in made]
            if any(s and a != b for s, a, b in zip(same, t.candidate, t.baseline, strict=False)):
                yield f"{where} scores equal tokens differently"
            if made and all(same) and not t.same_outputs:
                yield f"{where} calls equal tokens different outputs"


def _statistics(row: Sequence[float], metric: str, width: int) -> bool:
    """Whether an item can have these: BLEU's are counts, every other metric's a value from 0 to 1 and a 1."""
    if len(row) != width:
        return False
    if metric == "BLEU":
        return all(v >= 0 and float(v).is_integer() for v in row)
    return 0 <= row[0] <= 1 - LEAST and row[1] == 1


def _unaccounted(document: Validation, asked: _Asked) -> Iterator[str]:
    """Evidence that no result follows from."""
    e, ran = document.evidence, {r.name: r for r in document.results}
    for what, there, checks in (
        ("chunks", e.chunks or e.null, TOKENS),
        ("generations", e.outputs, OUTPUTS),
        ("task scores", e.tasks, ("tasks",)),
    ):
        if there and not ran.keys() & set(checks):
            yield f"{what} that no check of the document looks at"
    for name, rows in e.places.items():
        if name not in PLACES or name not in ran or (rows and ran[name].status == "SKIPPED"):
            yield f"places of {name}, which no check of the document looks at"
    yield from (f"own_loss of chunk {k}, which no check asks for" for k in sorted(e.own_loss.keys() - asked.keys_asked))
