"""Ministral: Mistral with an attention window in some layers only (``layer_types``)."""

from __future__ import annotations

import transformers.models.ministral.modeling_ministral as modeling

from export.architectures.base import Architecture, by_layer_types

MINISTRAL = Architecture(
    model_type="ministral",
    name="Ministral",
    modeling=modeling,
    model=modeling.MinistralForCausalLM,
    rotary=modeling.MinistralRotaryEmbedding,
    windows=by_layer_types,
)
