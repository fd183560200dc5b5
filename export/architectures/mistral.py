"""Mistral: LLaMA with an attention window in every layer, or none (``sliding_window: null``, from 7B v0.2 on).

transformers reads a configuration of it that has ``layer_types`` as a Ministral.
"""

from __future__ import annotations

import transformers.models.mistral.modeling_mistral as modeling

from export.architectures.base import Architecture, every_layer

MISTRAL = Architecture(
    model_type="mistral",
    name="Mistral",
    modeling=modeling,
    model=modeling.MistralForCausalLM,
    rotary=modeling.MistralRotaryEmbedding,
    windows=lambda config: every_layer(config.sliding_window, config),
)
