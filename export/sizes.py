"""What a configuration says about a decoder's sizes, whatever its architecture calls them. Standard library only.

Each takes transformers' configuration, or the object in a config.json. Try: ``llama-onnx inspect FOLDER``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ASSUMED_CONTEXT = 2048
"""Where nothing is said: ALiBi (Bloom) has no table of positions, so any length runs."""
NO_CONTEXT = f"no configuration names the context length: {ASSUMED_CONTEXT:,} is assumed"
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


def _said(config: Any, *names: str) -> Any:
    """The first of these that is there and is not null."""
    values = (config.get(n) if isinstance(config, Mapping) else getattr(config, n, None) for n in names)
    return next((v for v in values if v is not None), None)


def _number(config: Any, *names: str) -> int:
    value = _said(config, *names)
    return value if type(value) is int and value > 0 else 0


def stated_context(config: Any) -> int:
    """Tokens of the context, 0 where the configuration does not say."""
    return _number(config, *_CONTEXT)


def context_length(config: Any) -> int:
    """Tokens of the context, :data:`ASSUMED_CONTEXT` where the configuration does not say."""
    return stated_context(config) or ASSUMED_CONTEXT


def head_dim_of(config: Any) -> int:
    """Size of one attention head, not always ``hidden_size / heads``; 0 where the configuration does not say."""
    heads = _number(config, *_HEADS)
    return _number(config, "head_dim") or (_number(config, *_HIDDEN) // heads if heads else 0)


def kv_heads_of(config: Any) -> int:
    """Heads of the KV cache."""
    # Falcon's newer architecture copies its keys to every head before they are kept.
    if _said(config, "multi_query") and not _said(config, "new_decoder_architecture"):
        return 1
    return _number(config, "num_key_value_heads") or _number(config, *_HEADS)
