"""Mistral: LLaMA with an attention window in every layer, or none (``sliding_window: null``, from 7B v0.2 on)."""

from __future__ import annotations

import transformers.models.mistral.modeling_mistral as modeling
from transformers import PretrainedConfig

from export.architectures.base import Architecture, every_layer


def _refuse(config: PretrainedConfig) -> str | None:
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        return (
            "config.json has layer_types of several kinds, which transformers' MistralForCausalLM ignores; such a "
            "model is a 'ministral'"
        )
    return None


MISTRAL = Architecture(
    model_type="mistral",
    name="Mistral",
    modeling=modeling,
    model=modeling.MistralForCausalLM,
    rotary=modeling.MistralRotaryEmbedding,
    windows=lambda config: every_layer(config.sliding_window, config),
    refuse=_refuse,
)
