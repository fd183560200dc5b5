"""What a configuration says, under whatever names: the same as the cache of the unpatched model shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, FalconConfig, GPTBigCodeConfig, PretrainedConfig

from export.sizes import ASSUMED_CONTEXT, context_length, head_dim_of, kv_heads_of, stated_context
from export.spelling import cache_keyword
from tests.conftest import other_config, tiny_config

FALCON: dict[str, Any] = {"vocab_size": 331, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
CONFIGS: dict[str, PretrainedConfig] = {
    name: other_config(name) for name in ("gpt_neo", "gpt2", "gptj", "qwen2", "gemma2", "bloom", "mpt", "falcon")
} | {
    "llama": tiny_config(),
    "llama, own head size": tiny_config(head_dim=32),
    "falcon, new": FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon, each head": FalconConfig(**FALCON, multi_query=False),
    "bigcode": GPTBigCodeConfig(vocab_size=331, n_embd=64, n_layer=1, n_head=4, n_positions=160),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_is_as_they_say(name: str) -> None:
    config = CONFIGS[name]
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 5, 7]]), **{cache_keyword(model.forward): cache}, use_cache=True)
    assert cache.layers[0].keys.shape == (1, kv_heads_of(config), 3, head_dim_of(config))
    # A config.json says the same.
    raw = config.to_dict()
    assert (kv_heads_of(raw), head_dim_of(raw)) == (kv_heads_of(config), head_dim_of(config))
    assert context_length(raw) == context_length(config)


@pytest.mark.parametrize(("name", "length"), [("mpt", 160), ("gpt2", 160), ("llama", 160), ("bloom", 0)])
def test_the_context(name: str, length: int) -> None:
    assert stated_context(CONFIGS[name]) == length
    assert context_length(CONFIGS[name]) == (length or ASSUMED_CONTEXT)
