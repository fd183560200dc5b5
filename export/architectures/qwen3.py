"""Qwen3: QK norm (an RMSNorm over each head of queries and keys); head_dim differs from hidden_size / heads."""

from __future__ import annotations

import transformers.models.qwen3.modeling_qwen3 as modeling

from export.architectures.base import Architecture, by_layer_types

QWEN3 = Architecture(
    model_type="qwen3",
    name="Qwen3",
    modeling=modeling,
    model=modeling.Qwen3ForCausalLM,
    rotary=modeling.Qwen3RotaryEmbedding,
    windows=by_layer_types,
    head_norms=True,
)
