"""A gate's document out of random evidence: as long as a real one, judged by the gate's own judges, without a model."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.data.items import Item
from bench.data.loading import load_shipped
from bench.gate.found import Found
from bench.gate.metrics import score_task
from bench.gate.modes import MODES, Terms
from bench.gate.registry import checks_of
from bench.machine.environment import machine, versions
from reports.validation import (
    CheckResult,
    ChunkScores,
    Evidence,
    GeneratedItem,
    PlaceScore,
    TaskEvidence,
    Validation,
    decide_verdict,
)

CHUNKS = 30
PLACES = {"prefill_logits": 5, "decode_steps": 36, "batch_rows": 45, "chunked_prefill": 3, "long_context": 2}
UNEXPLAINED = 14
"""Chunk with more losses above fp16's tail than may be; PyTorch loses as much there, so that it is asked."""


def chunk(rng: np.random.Generator, tokens: int, loss: float) -> ChunkScores:
    """Random scores with that mean KL divergence, nats."""
    nll = rng.exponential(2.5, tokens)
    return ChunkScores(
        nll_candidate=np.abs(nll + rng.normal(0, loss, tokens)).tolist(),
        nll_baseline=nll.tolist(),
        kld=(loss * rng.exponential(1, tokens)).tolist(),
        same_top1=(rng.random(tokens) > 0.001).tolist(),
    )


def generated(rng: np.random.Generator, item: Item) -> GeneratedItem:
    """One generation; every eighth diverges."""
    length = int(rng.integers(8, 24))
    differs = rng.random() < 1 / 8
    return GeneratedItem(
        item=item.id,
        group=item.group,
        candidate=length + int(differs),
        baseline=length,
        equal=length - 3 if differs else length,
        candidate_ended=True,
        baseline_ended=True,
    )


def task_evidence(rng: np.random.Generator, group: str, items: list[Item], made: list[GeneratedItem]) -> Any:
    """Every metric of a group, from random words."""
    words = ["the", "a", "cat", "dog", "sat", "on", "mat", "in", "rain", "and", "it", "was", "big", "small", "why"]
    references = [[" ".join(rng.choice(words, 9))] for _ in items]
    theirs = [f"{r[0]} {rng.choice(words)}" for r in references]
    ours = [
        t if o.candidate == o.baseline == o.equal else r[0] for t, o, r in zip(theirs, made, references, strict=True)
    ]
    sides = ((ours, references), (theirs, references), (ours, [[t] for t in theirs]))
    for scored in zip(*(score_task(items[0].task, a, b) for a, b in sides), strict=True):
        candidate, baseline, cross = (s.statistics.tolist() for s in scored)
        yield TaskEvidence(
            group=group,
            metric=scored[0].metric,
            settings=scored[0].settings,
            items=[i.id for i in items],
            candidate=candidate,
            baseline=baseline,
            cross=cross,
            same_outputs=ours == theirs,
        )


def random_evidence(terms: Terms, tokens: int, seed: int = 0) -> Evidence:
    """Evidence of a folder that passes, over the items of the project's own data."""
    rng = np.random.default_rng(seed)
    loss = terms.tier.mean_kld / 5
    chunks = [chunk(rng, tokens, loss) for _ in range(CHUNKS)][: terms.mode.windows]
    null = [chunk(rng, tokens, loss) for _ in chunks[: terms.mode.null_windows]]
    own_loss = {}
    if terms.short_floats and len(chunks) > UNEXPLAINED:
        limit = terms.tail_limit
        kld = [*chunks[UNEXPLAINED].kld[15:], *[1.2 * limit] * 15]
        chunks[UNEXPLAINED] = chunks[UNEXPLAINED].model_copy(update={"kld": kld})
        own_loss = {UNEXPLAINED: [1.1 * v for v in kld]}
    places = {
        name: [PlaceScore(place=f"place {k}", kld=float(loss * rng.exponential())) for k in range(n)]
        for name, n in PLACES.items()
        if terms.kv_dtype != "bf16" or name not in ("chunked_prefill", "long_context")
    }
    groups = load_shipped().groups(terms.mode.items)
    outputs = {group: [generated(rng, item) for item in items] for group, items in groups.items()}
    tasks = [t for group in sorted(groups) for t in task_evidence(rng, group, groups[group], outputs[group])]
    made = [o for members in outputs.values() for o in members]
    return Evidence(chunks=chunks, null=null, own_loss=own_loss, places=places, outputs=made, tasks=tasks)


def judged(evidence: Evidence, terms: Terms) -> list[CheckResult]:
    """Every check's result: statistical ones by their judges, exact ones passed."""
    results = []
    for spec in checks_of("ort"):
        found = spec.judge(evidence, terms) if spec.judge else Found("PASS", "as it should be")
        results.append(
            CheckResult(
                name=spec.name,
                kind=spec.kind,
                status=found.status,
                looks_at=spec.looks_at,
                summary=found.summary,
                seconds=1.5,
                findings=list(found.findings),
                measurements=list(found.measurements),
                tasks=list(found.tasks),
                notes=list(found.notes),
            )
        )
    return results


def rejudged(result: Validation, **changes: Any) -> Validation:
    """A result with other evidence, mode or tier, all that follows from them made to fit."""
    changed = result.model_copy(update=changes)
    mode = MODES[changed.mode]
    results = judged(changed.evidence, Terms(changed.tier, changed.activations, changed.kv_dtype, mode))
    results = [old if old.kind == "exact" else new for old, new in zip(result.results, results, strict=True)]
    verdict, reasons = decide_verdict(results)
    settings = changed.settings | {"window": mode.window, "windows": mode.windows, "items": mode.items}
    fits = {"results": results, "verdict": verdict, "reasons": reasons, "settings": settings}
    return changed.model_copy(update=fits)


def synthetic(precision: str = "fp16", mode: str = "standard", tokens: int = 340, **changes: Any) -> Validation:
    """A document of the project's own data; ``changes`` replace fields of it."""
    floats = precision if precision in ("fp16", "bf16") else "fp32"
    terms = Terms(precision, floats, floats, MODES[mode])
    evidence = random_evidence(terms, min(tokens, terms.mode.window - 1))
    results = judged(evidence, terms)
    verdict, reasons = decide_verdict(results)
    own = load_shipped()
    fields: dict[str, Any] = {
        "tool_version": versions()["llama-onnx-bench"],
        "created_utc": "2026-11-24T11:00:00+00:00",
        "command": ["llama-onnx", "validate", "FOLDER", "--baseline", "demo"],
        "folder": "export",
        "folder_sha256": "1" * 64,
        "baseline": "demo (built in), PyTorch fp32",
        "baseline_sha256": "2" * 64,
        "mode": mode,
        "tier": precision,
        "activations": floats,
        "kv_dtype": floats,
        "dataset": own.name,
        "dataset_sha256": own.sha256,
        "settings": {
            "threads": 2,
            "window": terms.mode.window,
            "windows": terms.mode.windows,
            "items": terms.mode.items,
        },
        "session": {"runtime": "onnxruntime 1.32.0", "provider": "cpu"},
        "checks": [c.name for c in checks_of("ort")],
        "results": results,
        "evidence": evidence,
        "examples": [],
        "place": None,
        "verdict": verdict,
        "reasons": reasons,
        "seconds": 200.0,
        "machine": machine(),
        "versions": versions(),
        "notes": ["a note"],
    }
    return Validation(**(fields | changes))
