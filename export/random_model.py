"""Checkpoints of a real model's shape with random weights, written shard by shard: for benchmarks of size and speed.

Try: ``llama-onnx random-model /tmp/llama-2-7b --config llama-2-7b --layers 1``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from export.architectures import architecture_of
from export.cache import publish, require_space
from export.convert import TORCH_DTYPE, parameter_shapes
from export.errors import DestinationError, ExportError
from export.newer_config import older
from export.spec import FLOATS, one_of

_LLAMA2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_QWEN: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "tie_word_embeddings": False,
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _LLAMA2 | dict(zip(_SIZES, (4096, 11008, 32, 32, 32), strict=True)),
    "llama-2-13b": _LLAMA2 | dict(zip(_SIZES, (5120, 13824, 40, 40, 40), strict=True)),
    "llama-2-70b": _LLAMA2 | dict(zip(_SIZES, (8192, 28672, 80, 64, 8), strict=True)),
    "mistral-7b-v0.1": {
        **(_LLAMA2 | {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096}),
        **dict(zip(_SIZES, (4096, 14336, 32, 32, 8), strict=True)),
    },
    "qwen2.5-7b": {
        **(_QWEN | {"model_type": "qwen2", "vocab_size": 152064}),
        **dict(zip(_SIZES, (3584, 18944, 28, 28, 4), strict=True)),
    },
    "qwen3-8b": {
        **(_QWEN | {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960}),
        **dict(zip(_SIZES, (4096, 12288, 36, 32, 8), strict=True)),
    },
}
"""Published configurations, by the name that ``--config`` takes."""


@dataclass(frozen=True)
class RandomModel:
    """What was written: folder, parameters, bytes of the weights, shards."""

    folder: Path
    parameters: int
    weight_bytes: int
    shards: int


def config_of(name: str, layers: int | None = None) -> PretrainedConfig:
    """A published configuration, optionally with fewer layers.

    Raises:
        ExportError: unknown name, or a number of layers below 1.
    """
    one_of("configuration", name, tuple(CONFIGS))
    if layers is not None and layers < 1:
        raise ExportError(f"cannot make a model of {layers} layers; ask for at least 1")
    made: PretrainedConfig = AutoConfig.for_model(**CONFIGS[name] | ({"num_hidden_layers": layers} if layers else {}))
    return made


def _values(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.zeros(shape, dtype=dtype) if name.endswith(".bias") else torch.ones(shape, dtype=dtype)
    out = torch.empty(shape, dtype=dtype)
    rows = max(1, (1 << 24) // shape[1])
    for first in range(0, shape[0], rows):  # piece by piece: normal numbers are made in fp32
        part = out[first : first + rows]
        part.copy_(torch.empty(part.shape).normal_(0.0, 0.02, generator=generator))
    return out


def make_random_model(
    name: str,
    out: Path,
    precision: str = "fp16",
    layers: int | None = None,
    shard_bytes: int = 1 << 30,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> RandomModel:
    """Write a checkpoint of :data:`CONFIGS` with random weights (normal, standard deviation 0.02; norms 1, biases 0).

    One shard is in memory at a time. The tokenizer knows single bytes only.

    Raises:
        ExportError: unknown name or precision.
        DestinationError: OUT is not empty, or the disk is too small.
    """
    config = config_of(name, layers)
    one_of("precision", precision, FLOATS)
    dtype = TORCH_DTYPE[precision]
    out = out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DestinationError(f"{out} is there already and not empty; nothing was changed, choose another OUT")
    tensors = [(n, s, dtype.itemsize * torch.Size(s).numel()) for n, s in parameter_shapes(config).items()]
    total = sum(size for _, _, size in tensors)
    require_space(out, total, name)
    shards: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
    for item in tensors:
        if shards[-1] and sum(size for _, _, size in shards[-1]) + item[2] > shard_bytes:
            shards.append([])
        shards[-1].append(item)
    generator = torch.Generator().manual_seed(seed)
    where: dict[str, str] = {}
    done = 0
    with publish(out) as work:
        for k, shard in enumerate(shards):
            file = f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
            content: dict[str, Tensor] = {}
            for tensor, shape, size in shard:
                content[tensor] = _values(tensor, shape, dtype, generator)
                where[tensor] = file
                done += size
                progress(done, total)
            save_file(content, work / file, metadata={"format": "pt"})
            del content
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (work / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        settings = {
            **older(config.to_dict()),  # which transformers 4 reads as well
            "architectures": [architecture_of(config).class_name],
            "torch_dtype": str(dtype).removeprefix("torch."),
            "llama_onnx_origin": f"random weights in the shape of {name}"
            + (f", {config.num_hidden_layers} layers" if layers else ""),
        }
        (work / "config.json").write_text(json.dumps(settings, indent=1, default=str), encoding="utf-8")
        _byte_tokenizer().save_pretrained(work)
    return RandomModel(out, total // dtype.itemsize, total, len(shards))


def _byte_tokenizer() -> Any:
    """Every byte a token: nothing to learn, and any text becomes ids of the model's vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", "<s>", "</s>", *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
