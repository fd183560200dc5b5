"""GGUF files, read through transformers, with what transformers leaves out put right or refused.

transformers takes weights and sizes from a GGUF file and drops the rest in silence: rope scaling (as metadata, or as
the ``rope_freqs`` tensor of LLaMA 3.1), biases, experts; a tensor that is missing becomes random numbers, and an end
token that is missing LLaMA's own. The tokenizer is built in :mod:`export.gguf_tokenizer`.
Try: ``llama-onnx export FILE.gguf OUT``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.errors import BrokenCheckpointError, ExportError, UnsupportedModelError
from export.manifest import first_line
from export.spelling import scale_rope, unpacked_gguf, without_bars

_TENSOR = (
    r"(token_embd|output|output_norm|rope_freqs)\.weight"
    r"|blk\.\d+\.(attn_norm|attn_q|attn_k|attn_v|attn_output|ffn_norm|ffn_gate|ffn_up|ffn_down)\.weight"
)
_TENSORS = {
    "llama": re.compile(_TENSOR),
    "qwen2": re.compile(rf"{_TENSOR}|blk\.\d+\.attn_[qkv]\.bias"),
    "qwen3": re.compile(rf"{_TENSOR}|blk\.\d+\.attn_[qk]_norm\.weight"),
}
"""What the files of an architecture hold, by llama.cpp's names; Mistral's are of the architecture "llama"."""
CONVERSION = 4
"""Part of the names under which conversions are kept: 1 lost rope scaling, 2 most of the tokenizer, 3 head sizes."""
_ROPE_FACTORS = "rope_freqs.weight"
# What every LLaMA 3.1 and 3.2 was trained with; only the factor differs (8 and 32).
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def convert_gguf(path: Path, out: Path, status: Callable[[str], None]) -> None:
    """Save a GGUF file's weights (fp32), configuration and tokenizer to the folder ``out``.

    Raises:
        BrokenCheckpointError: damaged, or a tensor is missing.
        UnsupportedModelError: it holds what would be lost.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
    from transformers.utils import logging as hf_logging

    from export.gguf_tokenizer import gguf_tokenizer

    hf_logging.set_verbosity_error()
    status(f"reading {path.name} (about a minute)")
    try:
        reader = GGUFReader(path)

        def value(key: str) -> Any:
            field = reader.get_field(key)
            return None if field is None else field.contents()

        _whole(path, value)
        changes = _lost_by_transformers(path, reader.tensors, value)
        read = gguf_tokenizer(path, value)
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        if config.model_type == "mistral":  # by the name alone; it is a LLaMA's file, and read as nothing else
            other = ("model_type", "sliding_window")
            config = LlamaConfig(**{k: v for k, v in config.to_dict().items() if k not in other})
        scale_rope(config, changes.pop("rope_scaling", {}))
        config.update(changes)
        with without_bars():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                **unpacked_gguf(),
                trust_remote_code=False,
            )
    except ExportError:
        raise
    except Exception as e:
        raise BrokenCheckpointError(
            f"{path} cannot be read as GGUF ({first_line(e)}); is it whole, and of an architecture that "
            "transformers reads?"
        ) from None
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise BrokenCheckpointError(
            f"{path} lacks {len(missing)} tensors, the first {missing[0]}; download or convert it again"
        )
    for settings in (model.config, model.generation_config):
        settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = read.bos, read.eos, read.pad
    if len(read.ends) > 1:
        model.generation_config.eos_token_id = list(read.ends)
    status("saving as safetensors")
    model.save_pretrained(out)
    read.tokenizer.save_pretrained(out)


def _whole(path: Path, value: Callable[[str], Any]) -> None:
    """Refuse one part of a model that was split over several files."""
    count = int(value("split.count") or 1)
    if count > 1:
        raise UnsupportedModelError(
            f"{path} is part {int(value('split.no') or 0) + 1} of {count} of a split GGUF; join them with "
            "llama.cpp's tool (llama-gguf-split --merge FIRST-PART OUT.gguf) and pass OUT.gguf"
        )


def _lost_by_transformers(path: Path, tensors: Any, value: Callable[[str], Any]) -> dict[str, Any]:
    """Settings of a file that transformers does not read; {} for an architecture that has no fused export.

    Raises:
        UnsupportedModelError: something that would be lost.
    """
    kind = str(value("general.architecture"))
    if kind not in _TENSORS:
        return {}
    strange = sorted(t.name for t in tensors if not _TENSORS[kind].fullmatch(t.name))
    if strange:
        raise UnsupportedModelError(
            f"{path} holds {len(strange)} tensors that no {kind} model has (the first: {strange[0]}) and that would be "
            "lost; export the original checkpoint folder instead"
        )
    window, context = value(f"{kind}.attention.sliding_window"), value(f"{kind}.context_length")
    if window and window < context:
        raise UnsupportedModelError(
            f"{path} has an attention window of {window} tokens, which is not read from GGUF; export the original "
            "checkpoint folder instead"
        )
    size = value(f"{kind}.attention.key_length")
    found: dict[str, Any] = {"head_dim": int(size)} if size else {}
    scaling = _rope_scaling(path, kind, tensors, value)
    return found | ({"rope_scaling": scaling} if scaling else {})


def _rope_scaling(path: Path, arch: str, tensors: Any, value: Callable[[str], Any]) -> dict[str, Any] | None:
    """transformers' ``rope_scaling``; None for no scaling."""
    kind, factor = value(f"{arch}.rope.scaling.type") or "none", value(f"{arch}.rope.scaling.factor")
    factors = next((t.data for t in tensors if t.name == _ROPE_FACTORS), None)
    if factors is not None:
        return _llama3(path, factors, float(value(f"{arch}.rope.freq_base") or 10000.0))
    if kind == "none" or (kind == "linear" and factor in (None, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    raise UnsupportedModelError(
        f"{path} scales its rotary embedding ({kind}), which is not read from GGUF; export the original checkpoint "
        "folder instead"
    )


def _llama3(path: Path, factors: Any, base: float) -> dict[str, Any]:
    """LLaMA 3's rope scaling, recognised by the factors that it divides the frequencies by, fp32 [head_dim / 2]."""
    import numpy as np
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = np.asarray(factors, dtype=np.float64).ravel()
    scaling = {"rope_type": "llama3", "factor": float(found.max()), **_LLAMA3}
    config = LlamaConfig(head_dim=2 * len(found), rope_theta=base, max_position_embeddings=131072)
    scale_rope(config, scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = base ** -(np.arange(len(found)) / len(found))
    if not np.allclose(plain / scaled.double().numpy(), found, rtol=1e-3):
        raise UnsupportedModelError(
            f"the rotary factors in {path} are not those of LLaMA 3.1 or 3.2, and their rule is not known; export the "
            "original checkpoint folder instead"
        )
    return scaling
