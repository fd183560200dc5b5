"""What the fused export takes from optimum, and a small equivalent of it where optimum cannot be imported.

optimum-onnx 0.1.0 needs transformers below 4.58 and fails to import under 5. The fused export needs two of its classes
only, an export configuration and a model patcher; what they do for a graph without any of PyTorch's own attention is
little: the model takes and returns its KV cache as pairs of tensors. Both ways give the same graph.
Try: ``python -m pytest tests/export/test_optimum_adapter.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from export.errors import MissingOptimumError
from export.spelling import cache_in, cache_keyword

_REMEDY = "use an environment with transformers<4.58 and optimum-onnx (pip install 'llama-onnx-bench[optimum]')"


class OwnOnnxConfig:
    """Stands in for optimum's ``OnnxConfig``: names and axes come from the subclass."""

    _MODEL_PATCHER: type[OwnModelPatcher]

    def __init__(self, config: Any, **_: Any) -> None:
        self._config = config

    def patch_model_for_export(self, model: Any) -> OwnModelPatcher:
        """A context manager in which ``model`` is traced."""
        return self._MODEL_PATCHER(self, model)


class OwnModelPatcher:
    """Stands in for optimum's ``ModelPatcher``: inside ``with``, caches are pairs of key and value."""

    def __init__(self, config: Any, model: Any, model_kwargs: dict[str, Any] | None = None) -> None:
        self.real_config, self._model, self._kwargs = config, model, model_kwargs or {}

    def __enter__(self) -> None:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        forward = self._model.forward
        keyword = cache_keyword(forward)

        def with_pairs(
            input_ids: Tensor,
            attention_mask: Tensor,
            position_ids: Tensor | None = None,
            past_key_values: Sequence[tuple[Tensor, Tensor]] = (),
            logits_to_keep: int = 0,
        ) -> dict[str, Any]:
            cache = DynamicCache()
            for key, value in past_key_values:  # not by update(), which would be traced
                layer = DynamicLayer()
                layer.keys, layer.values = key, value
                layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
                cache.layers.append(layer)
            inputs = {"attention_mask": attention_mask, "position_ids": position_ids, keyword: cache}
            made = forward(input_ids=input_ids, **inputs, use_cache=True, return_dict=True, **self._kwargs)
            presents = [(layer.keys, layer.values) for layer in cache_in(made).layers]
            return {"logits": made.logits, "past_key_values": presents}

        self._model.forward = with_pairs

    def __exit__(self, *_: Any) -> None:
        del self._model.forward


def _optimum() -> tuple[Any, Any, str]:
    """optimum's two classes and "", or ours and why."""
    try:
        from optimum.exporters.onnx.model_configs import LlamaOnnxConfig
        from optimum.exporters.onnx.model_patcher import ModelPatcher
    except ImportError as e:
        return OwnOnnxConfig, OwnModelPatcher, str(e).splitlines()[0]
    return LlamaOnnxConfig, ModelPatcher, ""


OnnxConfig, ModelPatcher, IMPORT_ERROR = _optimum()


def missing_optimum(who: str) -> str:
    """Why what only optimum does cannot be done here, and the remedy; "" where it can."""
    if not IMPORT_ERROR:
        return ""
    return f"{who} needs optimum, which cannot be imported ({IMPORT_ERROR}); {_REMEDY}"


def require_optimum(who: str) -> None:
    """Refuse what only optimum can do.

    Raises:
        MissingOptimumError: it cannot be imported; says why and what to do.
    """
    if why := missing_optimum(who):
        raise MissingOptimumError(why)
