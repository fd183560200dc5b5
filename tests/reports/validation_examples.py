"""A made-up validation with results of every kind; ``example_validation(...)`` has knobs for what can be wrong with it.

Verdict and reasons follow from its results as the gate's do, so that the document is consistent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from reports.base import Machine
from reports.validation import CheckResult, Validation, decide_verdict

HOSTILE = '<script>alert(1)</script>|`$x_{$ & "q" *b* @team [a](http://evil.example)'
MACHINE = Machine(
    fingerprint="c0ffee1234",
    cpu="AMD EPYC 7B13",
    cores=2,
    memory_bytes=8_300_000_000,
    os="Linux 6.1 x86_64",
    python="3.11.9",
    gpu=None,
    load_average_1m=0.31,
)
EXACT = (
    ("files", "size and SHA-256 of every file, paths, operators that may not be trusted", "10 files as published"),
    ("manifest", "the manifest's claims against the baseline's configuration", "15 claims agree with the baseline's"),
    ("config", "config.json against the baseline's", "config.json describes the baseline"),
    ("graph", "both graphs, node by node, against what the export makes of the configuration", "691 nodes in 2 graphs"),
    ("attributes", "heads, scale, rotary flags and epsilon of every node", "722 attributes as demanded"),
    ("weights", "every checkpoint tensor where the graph reads it, bit for bit after the cast", "272 tensors equal"),
    ("tokenizer", "its parts and settings, added tokens, the ids of many texts", "540 texts give the same ids"),
    ("special_ids", "bos, eos, pad, unk, added tokens", "ids agree with the baseline's"),
)
WRONG_WEIGHTS = [
    {"where": f"model.layers.{k}.mlp.up_proj.weight", "what": f"{9 - k} of 884,736 values differ", "layer": k}
    for k in (3, 4, 5, 6, 7)
]


def _measured(
    name: str, looks_at: str, title: str, value: float, bound: float | None, limit: float | None, **more: Any
) -> dict[str, Any]:
    of_check = {"kind": more.pop("kind", "numeric"), "notes": more.pop("notes", [])}
    m = {"status": "PASS", "better": "lower", "null_value": None, "samples": 2040, "unit": ""}
    m |= {"name": name, "title": title, "value": value, "bound": bound, "limit": limit}
    m |= {"detail": "2040 tokens in 8 chunks"} | more
    summary = f"{value:.6g}, limit {limit} ({m['detail']})"
    return _result(name, looks_at, summary, status=m["status"], measurements=[m], **of_check)


def _result(name: str, looks_at: str, summary: str, **more: Any) -> dict[str, Any]:
    base = {"kind": "exact", "status": "PASS", "seconds": 1.5}
    return base | {"name": name, "looks_at": looks_at, "summary": summary} | more


def _results() -> list[dict[str, Any]]:
    nats, outputs = {"unit": "nats"}, {"kind": "generation", "samples": 360}
    return [
        *(_result(*e) for e in EXACT),
        _measured("decode_steps", "steps over the cache against one pass of the baseline", "Step-by-step decode",
                  2.1e-11, None, 1e-6, samples=36, detail="36 decode steps; largest at step 31", **nats),
        _measured("batch_rows", "every row of uneven batches", "Uneven batches", 1.9e-11, None, 1e-6,
                  samples=24, detail="rows of uneven batches; largest at row 2", **nats),
        _measured("perplexity_ratio", "teacher-forced perplexity over the baseline's", "Perplexity ratio",
                  1.0000002, 1.0000009, 1.00001, null_value=1.0000001),
        _measured("mean_kld", "mean KL divergence of next-token distributions", "Mean KL divergence",
                  1.6e-11, 2.1e-11, 1e-8, null_value=8e-12, **nats),
        _measured("tail_kld", "99.9 % quantile of the KL divergence", "99.9 % KL divergence", 1.1e-10, 1.6e-10, 1e-6,
                  null_value=6e-12, status="SUSPICIOUS", detail="2040 tokens in 8 chunks; largest 3.1e-10", **nats),
        _measured("top1_agreement", "share of tokens where both sides put the same one first", "Top-1 agreement",
                  1.0, 0.9985, 0.998, better="higher", null_value=1.0, detail="0 of 2040 tokens differ"),
        _result("null_ratio", "loss over what PyTorch itself loses in fp16 or bf16", "judged for fp16 and bf16 only",
                kind="numeric", status="SKIPPED"),
        _measured("greedy", "greedy generations equal token for token", "Equal greedy generations", 1.0, None, 0.95,
                  better="higher", detail="360 of 360 generations equal token for token", **outputs),
        _measured("length_band", "length of the outputs over the baseline's", "Length of the outputs", 1.0, None, 1.0,
                  better="equal", detail="tokens of the candidate over the baseline's, allowed 0.9 to 1.1", **outputs),
        _result("tasks", "BLEU, ROUGE, exact match and F1 on four tasks", "4 scores largest loss, 0.03 points",
                kind="generation", tasks=_tasks()),
    ]  # fmt: skip


def _tasks() -> list[dict[str, Any]]:
    base = {"limit": -0.027, "items": 120, "settings": "tok:13a|version:2.5.1"}
    names = ("task", "metric", "candidate", "baseline", "candidate_vs_baseline", "difference_bound", "status")
    return [
        dict(zip(names, row, strict=True)) | base
        for row in (
            ("Summaries", "ROUGE-L", 27.41, 27.38, 98.9, -0.014, "PASS"),
            ("Summaries", "BLEU", 8.12, 8.15, 98.2, -0.021, "PASS"),
            ("Questions", "Token F1", 41.7, 41.7, 99.6, 0.0, "PASS"),
            ("Translation", "BLEU", 0.4, 0.4, 97.1, None, "REPORTED"),
        )
    ]


def _evidence() -> dict[str, Any]:
    n = 255
    chunk = {"nll_candidate": [2.5] * n, "nll_baseline": [2.5] * n, "kld": [1.6e-11] * n, "same_top1": [True] * n}
    item = {"group": "Summaries", "candidate": 24, "baseline": 24, "equal": 24}
    ended = {"candidate_ended": True, "baseline_ended": True}
    return {
        "chunks": [chunk] * 8,
        "null": [chunk | {"kld": [8e-12] * n}] * 2,
        "own_loss": {3: [8e-12] * n},
        "places": {"decode_steps": [{"place": "step 31", "kld": 2.1e-11}, {"place": "step 2", "kld": math.inf}]},
        "outputs": [item | ended | {"item": f"item {i}"} for i in range(360)],
        "tasks": [
            {
                "group": "Summaries",
                "metric": "ROUGE-L",
                "settings": "rouge",
                "items": ["item 0", "item 1"],
                "candidate": [[27.4], [27.4]],
                "baseline": [[27.4], [27.4]],
                "cross": [[98.9], [98.9]],
                "same_outputs": False,
            }
        ],
    }


def _rename(raw: dict[str, Any], text: str) -> None:
    """Put ``text`` wherever a validation holds free text that reaches a page; ids of tests need their names."""
    names = ("tier", "dataset", "baseline", "folder", "mode", "activations", "kv_dtype")
    raw.update(dict.fromkeys(names, text), settings={text: text}, session={"provider": text}, notes=[text])
    raw.update(command=[text], versions={text: text}, machine=raw["machine"] | {"cpu": text, "gpu": text})
    raw["place"] = raw["place"] and raw["place"] | {"detail": text, "operator": text}
    for r in raw["results"]:
        r.update(name=text, looks_at=text, summary=text, notes=[text])
        r["findings"] = [f | {"where": text, "what": text} for f in r.get("findings", [])]
        for m in r.get("measurements", []):
            m.update(title=text, detail=text, unit=text)
        for t in r.get("tasks", []):
            t.update(task=text, metric=text, settings=text)
    for e in raw["examples"]:
        e.update(dict.fromkeys(e, text))


def example_validation(
    *,
    failing: str = "",
    statuses: Sequence[str] | None = None,
    examples: int = 3,
    hostile: str = "",
    left_out: int = 0,
    **top: Any,
) -> Validation:
    """A validation in fp32 that passes with one suspicious check.

    Args:
        failing: ``mean_kld`` (with the place where it begins) or ``weights`` (with five findings).
        statuses: these alone, a check each, and no task.
        examples: how many.
        hostile: stands in every name.
        left_out: so many of the checks, the last ones, were not run.
        **top: replaces fields.
    """
    results = _results()
    found = {r["name"]: r for r in results}
    place = None
    if failing == "mean_kld":
        found["mean_kld"].update(status="FAIL", summary="0.0032, limit 1e-08 (2040 tokens in 8 chunks)")
        found["mean_kld"]["measurements"][0].update(status="FAIL", value=3.2e-3, bound=3.9e-3)
        place = {"layer": 3, "operator": "GroupQueryAttention", "deviation": 0.004, "before": 1e-7}
        place |= {"detail": "layer 3, attention (GroupQueryAttention): relative error 0.004 where 1e-07 went in"}
    elif failing:
        first = WRONG_WEIGHTS[0]
        summary = f"{first['where']}: {first['what']} (+{len(WRONG_WEIGHTS) - 1} more)"
        found["weights"].update(status="FAIL", summary=summary, findings=WRONG_WEIGHTS)
    if statuses is not None:
        results = [results[0] | {"name": f"c{i}", "status": s} for i, s in enumerate(statuses)]
    raw: dict[str, Any] = {
        "tool_version": "0.1.0",
        "created_utc": "2025-01-02T03:04:05Z",
        "command": ["llama-onnx", "validate", "exports/smollm2", "--baseline", "demo", "--out", "my report"],
        "folder": "exports/smollm2",
        "folder_sha256": "9f2c" * 16,
        "baseline": "PyTorch fp32, sdpa",
        "baseline_sha256": "77ab" * 16,
        "mode": "standard",
        "tier": "fp32",
        "activations": "fp32",
        "kv_dtype": "fp32",
        "dataset": "technical English, 2,040 tokens, context 256-511",
        "dataset_sha256": "31cd" * 16,
        "settings": {"provider": "cpu", "threads": 2, "expect": None},
        "session": {
            "runtime": "onnxruntime",
            "provider": "cpu",
            "attention": "GroupQueryAttention on CPUExecutionProvider",
        },
        "checks": [r["name"] for r in results],
        "results": results[: len(results) - left_out],
        "evidence": _evidence(),
        "examples": [
            {
                "task": "Summaries",
                "item": f"item {i}",
                "prompt": "Summarise: The cache holds the keys and values of all tokens read so far.",
                "reference": "The cache keeps keys and values of past tokens.",
                "candidate": "The cache stores the keys and values of the tokens that were read.",
                "baseline": "The cache stores the keys and values of the tokens that were read.",
            }
            for i in range(examples)
        ],
        "place": place,
        "seconds": 183.0,
        "machine": MACHINE.model_dump(),
        "versions": {"onnxruntime": "1.32.0", "torch": "2.13.0"},
        "notes": ["the baseline's logits came from the cache"],
    }
    if hostile:
        _rename(raw, hostile)
    verdict, reasons = decide_verdict([CheckResult.model_validate(r) for r in raw["results"]])
    return Validation.model_validate(raw | {"verdict": verdict, "reasons": reasons} | top)
