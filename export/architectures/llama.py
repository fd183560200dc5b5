"""LLaMA 1 to 3.2, and what has its layers under its name (SmolLM2, TinyLlama, Yi, DeepSeek's dense ones, ...)."""

from __future__ import annotations

import transformers.models.llama.modeling_llama as modeling

from export.architectures.base import Architecture

LLAMA = Architecture(
    model_type="llama",
    name="LLaMA",
    modeling=modeling,
    model=modeling.LlamaForCausalLM,
    rotary=modeling.LlamaRotaryEmbedding,
)
