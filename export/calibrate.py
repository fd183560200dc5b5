"""Second moments of every linear layer's input, for GPTQ: the checkpoint runs once over the project's own text.

This holds the model in memory, unlike everything else here; a model that does not fit is refused, with the size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from export.errors import ExportError
from export.sizes import context_length
from export.spelling import without_bars

WINDOW = 512
SHARED_INPUT = ("k_proj", "v_proj", "up_proj")
"""Layers that read what ``q_proj`` or ``gate_proj`` reads."""


def hessians_of(
    folder: Path, texts: Sequence[str], status: Callable[[str], None] = lambda _: None
) -> dict[str, Tensor]:
    """``2/n X^T X`` ``[columns, columns]`` fp32 over ``n`` tokens, by the name of the first weight that reads ``X``.

    Args:
        folder: the checkpoint, with its tokenizer.
        texts: joined and cut into windows of :data:`WINDOW` tokens.
        status: told what is being done.

    Raises:
        ExportError: no text, no tokenizer, or not enough memory.
    """
    if not any(texts):
        raise ExportError("gptq needs text to calibrate on; pass some, or choose --method hqq")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    weights = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    wide = 3 * config.hidden_size**2 + config.intermediate_size**2
    needed = 2 * weights + 4 * wide * config.num_hidden_layers
    free = psutil.virtual_memory().available
    if needed > free:
        raise ExportError(
            f"gptq calibrates in memory and needs about {needed / 1e9:.0f} GB here, {free / 1e9:.0f} GB are free; "
            f"choose --method hqq or kquant, which stream"
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # transformers raises whatever its converters stumble over
        raise ExportError(f"{folder} has no tokenizer, which gptq needs to calibrate; choose --method hqq") from None
    status("calibrating")
    ids = tokenizer("\n\n".join(texts))["input_ids"]
    if not ids:
        raise ExportError("gptq needs text to calibrate on, and this is blank; choose --method hqq")
    window = min(WINDOW, context_length(config))
    with without_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()
    moments: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Linear) -> None:
        moments[name] = torch.zeros(layer.in_features, layer.in_features)

        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, layer.in_features).float()
            moments[name].addmm_(rows.t(), rows)

        layer.register_forward_pre_hook(add)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(SHARED_INPUT):
            watch(f"{name}.weight", module)
    with torch.inference_mode():
        for start in range(0, len(ids), window):
            model(input_ids=torch.tensor([ids[start : start + window]]))
    if config.tie_word_embeddings:
        moments["model.embed_tokens.weight"] = moments["lm_head.weight"]
    for moment in {id(m): m for m in moments.values()}.values():
        moment.mul_(2 / len(ids))
    for name in list(moments):
        if name.endswith("gate_proj.weight"):
            moments[name.replace("gate_proj", "up_proj")] = moments[name]
    return moments
