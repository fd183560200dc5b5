"""Qwen2 and Qwen2.5: biases in the QKV projections; layers from ``max_window_layers`` on may have a window."""

from __future__ import annotations

import transformers.models.qwen2.modeling_qwen2 as modeling

from export.architectures.base import Architecture, by_layer_types

QWEN2 = Architecture(
    model_type="qwen2",
    name="Qwen2",
    modeling=modeling,
    model=modeling.Qwen2ForCausalLM,
    rotary=modeling.Qwen2RotaryEmbedding,
    windows=by_layer_types,
)
