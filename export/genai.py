"""``genai_config.json``: what onnxruntime-genai needs to open an exported folder.

Try: ``llama-onnx export demo OUT`` and then ``onnxruntime_genai.Model("OUT")``.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from export.sizes import head_dim_of

_TYPES = {"ministral": "mistral"}
"""Types that onnxruntime-genai does not know, and what runs their graphs alike."""


def genai_config(config: PretrainedConfig, graph: str, eos: tuple[int, ...], oldest: str) -> dict[str, Any]:
    """What describes a GroupQueryAttention graph: greedy search, past and present in one buffer.

    ``oldest``, the oldest ONNX Runtime, is there for people: onnxruntime-genai takes the key and does not read it.
    """
    ids: list[int] = list(eos) or [0]
    model: dict[str, Any] = {
        "type": _TYPES.get(config.model_type, config.model_type),
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id if config.bos_token_id is not None else ids[0],
        "eos_token_id": ids,
        "pad_token_id": config.pad_token_id if config.pad_token_id is not None else ids[0],
        "decoder": {
            "session_options": {"provider_options": []},
            "filename": graph,
            "head_size": head_dim_of(config),
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    search = {
        "do_sample": False,
        "num_beams": 1,
        "max_length": config.max_position_embeddings,
        "past_present_share_buffer": True,
    }
    return {"model": model, "search": search} | ({"oldest_onnxruntime": oldest} if oldest else {})
