"""What transformers 4 and 5 call or keep differently: the one place that knows both.

5 has the rotary settings in one dictionary, calls a model's KV cache ``cache`` (late versions), leaves a generation's
defaults to ``generate`` and GGUF weights packed. Asked of the object at hand, not of the version: architectures were
renamed one after another. Files in 5's words are :mod:`export.newer_config`'s.
Try: ``python -m pytest tests/export/test_spelling.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

CACHE = ("cache", "past_key_values")


def cache_keyword(forward: Callable[..., Any]) -> str:
    """The name under which a model's (or module's) ``forward`` takes its KV cache."""
    return CACHE[0] if CACHE[0] in inspect.signature(forward).parameters else CACHE[1]


def cache_in(given: Mapping[str, Any]) -> Any:
    """The KV cache among keyword arguments that transformers passes, or in what a model returns."""
    return next(given[name] for name in CACHE if name in given)


def embeddings_in(given: Mapping[str, Any]) -> Any:
    """The embedded tokens among what transformers passes to a function that makes masks."""
    return next(given[name] for name in ("inputs_embeds", "input_embeds") if name in given)


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers loads weights without the progress bar that 5 shows for every model."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def rope_of(config: Any) -> dict[str, Any]:
    """Rotary settings of transformers' configuration: ``rope_theta``, ``rope_type``, ``partial_rotary_factor`` (None
    where nothing is said) and what the scaling needs."""
    said = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope = {key: getattr(config, key, None) for key in ("rope_theta", "partial_rotary_factor")}
    rope |= {"rope_type": said.get("type", "default"), **said}
    rope.pop("type", None)
    return rope


def scale_rope(config: Any, scaling: Mapping[str, Any]) -> None:
    """Give transformers' configuration a rope scaling (``rope_type`` and its numbers, {} for none); the base
    stays."""
    if not scaling:
        return
    if getattr(config, "rope_parameters", None) is None:
        config.rope_scaling = dict(scaling)
    else:
        config.rope_parameters = {**config.rope_parameters, **scaling}


def unpacked_gguf() -> dict[str, Any]:
    """What makes transformers load a GGUF file's weights as floats: 4 always does, 5 keeps them packed if it can."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def fill_defaults(config: Any) -> Any:
    """A ``GenerationConfig`` with the values of its own that 5 leaves None until ``generate`` fills them in."""
    defaults: dict[str, Any] = getattr(config, "_get_default_generation_params", dict)()
    for name, value in defaults.items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    return config
