"""Checkpoints of a real LLaMA's shape with random weights, written shard by shard: for benchmarks of size and speed.

Try: ``llama-onnx random-model /tmp/llama-2-7b --config llama-2-7b --layers 1``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from export.cache import publish
from export.convert import TORCH_DTYPE
from export.errors import DestinationError, ExportError

_LLAMA2: dict[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        **_LLAMA2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-2-13b": {
        **_LLAMA2,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "llama-2-70b": {
        **_LLAMA2,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
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


def config_of(name: str, layers: int | None = None) -> LlamaConfig:
    """A published configuration, optionally with fewer layers.

    Raises:
        ExportError: unknown name, or a number of layers below 1.
    """
    if name not in CONFIGS:
        raise ExportError(f"unknown configuration {name!r}; choose one of {', '.join(CONFIGS)}")
    if layers is not None and layers < 1:
        raise ExportError(f"cannot make a model of {layers} layers; ask for at least 1")
    settings = dict(CONFIGS[name])
    settings["num_hidden_layers"] = layers or settings["num_hidden_layers"]
    return LlamaConfig(**settings)


def tensor_shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the checkpoint's tensors, in layer order."""
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        yield f"{prefix}self_attn.q_proj.weight", (config.num_attention_heads * config.head_dim, hidden)
        yield f"{prefix}self_attn.k_proj.weight", (kv, hidden)
        yield f"{prefix}self_attn.v_proj.weight", (kv, hidden)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, config.num_attention_heads * config.head_dim)
        yield f"{prefix}mlp.gate_proj.weight", (config.intermediate_size, hidden)
        yield f"{prefix}mlp.up_proj.weight", (config.intermediate_size, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, config.intermediate_size)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config.vocab_size, hidden)


def _values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
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
    """Write a checkpoint of :data:`CONFIGS` with random weights (normal, standard deviation 0.02; norms 1).

    One shard is in memory at a time. The tokenizer knows single bytes only.

    Raises:
        ExportError: unknown name or precision.
        DestinationError: OUT is not empty, or the disk is too small.
    """
    config = config_of(name, layers)
    if precision not in ("fp32", "fp16", "bf16"):
        raise ExportError(f"unknown precision {precision!r}; choose fp32, fp16 or bf16")
    dtype = TORCH_DTYPE[precision]
    out = out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DestinationError(f"{out} is there already and not empty; nothing was changed, choose another OUT")
    tensors = [(n, s, dtype.itemsize * torch.Size(s).numel()) for n, s in tensor_shapes(config)]
    total = sum(size for _, _, size in tensors)
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < total + (64 << 20):
        raise DestinationError(f"{name} needs {total / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free; make room")
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
                content[tensor] = _values(shape, dtype, generator)
                where[tensor] = file
                done += size
                progress(done, total)
            save_file(content, work / file, metadata={"format": "pt"})
            del content
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (work / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        settings = {
            **config.to_dict(),
            "architectures": ["LlamaForCausalLM"],
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
