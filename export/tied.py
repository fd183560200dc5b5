"""Checkpoints whose head is the embedding (``tie_word_embeddings``): one tensor under one of two names.

transformers 4 drops a stored head whatever it holds, 5 keeps it; and where the head alone is stored, 4 leaves the
embedding without values. Here both have to be equal, and the embedding is always there, for every loader alike.
Try: ``python -m pytest tests/export/test_tied.py``.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from export.errors import BrokenCheckpointError
from export.newer_config import linked

_HEADS = ("lm_head.weight", "embed_out.weight")
_INDEX, _SINGLE, _ADDED = "model.safetensors.index.json", "model.safetensors", "model-embedding.safetensors"


def with_embedding(folder: Path) -> Path:
    """The folder itself, or one in the cache that has a tied head under the embedding's name as well.

    Raises:
        BrokenCheckpointError: head and embedding are tied and stored, and differ; or as :class:`Checkpoint`.
        UnsupportedModelError: as :class:`Checkpoint`.
    """
    from safetensors.torch import save_file  # torch

    from export.weights import Checkpoint

    checkpoint = Checkpoint(folder)
    if not any(name.endswith(_HEADS) for name in checkpoint.where):
        return folder
    pair = _tied_pair(folder)
    if pair is None or pair[1] not in checkpoint.where:
        return folder
    embedding, head = pair
    bare = embedding.partition(".")[2]  # as a model without head is saved
    stored = next((name for name in (embedding, bare) if name in checkpoint.where), None)
    if stored is not None:
        if not checkpoint.equal(stored, head):
            raise BrokenCheckpointError(
                f"{folder}: {head} differs from {stored}, though config.json ties them (tie_word_embeddings), and "
                f"programs disagree on which is the head; remove the one that is not the model's, or untie them"
            )
        return folder
    renamed = {_SINGLE: "model-head.safetensors"}
    where = {name: renamed.get(file.name, file.name) for name, file in checkpoint.where.items()}
    index = json.dumps({"metadata": {}, "weight_map": where | {embedding: _ADDED}})

    def add(work: Path) -> None:
        save_file({embedding: checkpoint.read(head)}, work / _ADDED, metadata={"format": "pt"})

    return linked(folder, "tied", {_INDEX: index}, renamed, add)


def _tied_pair(folder: Path) -> tuple[str, str] | None:
    """Names of the embedding and of the head that the configuration ties to it; None where it ties none."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not config.tie_word_embeddings:
            return None
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # whatever its classes stumble over: who reads the configuration says what is wrong with it
        return None
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return (names[embedding], names[head]) if head is not None else None
