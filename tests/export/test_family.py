"""The LLaMA family on small random models, against the unpatched transformers model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.manifest import read_manifest
from runtime.errors import ContextOverflowError
from runtime.loading import load
from runtime.torch_session import TorchSession

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILY: dict[str, dict[str, Any]] = {
    "grouped-kv": {},
    "multi-head": {"num_key_value_heads": 4},
    "one-kv-head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "head-dim-not-hidden-over-heads": {"head_dim": 32},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
    "both-biases-tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "rope-linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "rope-llama3": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "rope-yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 80}},
    "rope-dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "eps-1e-5": {"rms_norm_eps": 1e-5},
    "eps-large": {"rms_norm_eps": 1e-2},
    "vocabulary-not-multiple-of-8": {"vocab_size": 1003},
    "sharded": {"shards": "60KB"},
    "one-layer": {"num_hidden_layers": 1},
}
STEPS = 32


def close(ours: Any, theirs: Any) -> None:
    scale = np.abs(theirs).max()
    # Against the same model in float64 each side is up to 3e-6 off on these weights; an epsilon of 2e-6 for 1e-6
    # gives 1e-4.
    np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
@pytest.mark.parametrize("name", FAMILY)
def test_prefill_and_decode_equal_pytorch(
    name: str, target: str, checkpoints: Callable[..., Path], exports: Callable[..., Path]
) -> None:
    changes = FAMILY[name]
    rng = np.random.default_rng(1)
    vocabulary = changes.get("vocab_size", 331)
    rows = [rng.integers(0, vocabulary, n).tolist() for n in (97, 5, 41)]
    folder = exports(spec={"target": target}, **changes)
    with load(folder, threads=1) as ours, TorchSession(checkpoints(**changes), attention="eager", threads=1) as theirs:
        for prompts in ([rows[0]], rows):
            close(ours.prefill(prompts, STEPS), theirs.prefill(prompts, STEPS))
            for _ in range(STEPS):
                token = rng.integers(0, vocabulary, len(prompts)).tolist()
                close(ours.step(token), theirs.step(token))
        close(ours.score(rows[0]), theirs.score(rows[0]))


def test_dynamic_rope_is_refused_beyond_its_original_context(exports: Callable[..., Path]) -> None:
    folder = exports(**FAMILY["rope-dynamic"])
    assert any("dynamic" in note for note in read_manifest(folder).notes)
    with load(folder, threads=1) as session, pytest.raises(ContextOverflowError, match="context of 160"):
        session.prefill([[5] * 160], reserve=1)


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_fp16_stays_close(target: str, checkpoints: Callable[..., Path], exports: Callable[..., Path]) -> None:
    row = np.random.default_rng(2).integers(0, 331, 60).tolist()
    with (
        load(exports("fp16", spec={"target": target}), threads=1) as ours,
        TorchSession(checkpoints(), threads=1) as theirs,
    ):
        assert ours.info.precision == "fp16"
        exact = theirs.score(row)
        difference = np.abs(ours.score(row) - exact).max() / np.abs(exact).max()
    assert 1e-6 < difference < 1e-2


def test_rope_beyond_the_original_context_matters(checkpoints: Callable[..., Path]) -> None:
    """The family test would not notice ignored scaling if scaling changed nothing."""
    row = np.random.default_rng(3).integers(0, 331, 120).tolist()
    scaled = TorchSession(checkpoints(rope_scaling=LLAMA3, rope_theta=500000.0)).score(row)
    plain = TorchSession(checkpoints(rope_theta=500000.0)).score(row)
    assert np.abs(scaled - plain).max() > 1e-2
