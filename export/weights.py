"""The streaming writer: one initialiser in memory at a time, hashed while it is written.

Peak memory is the largest initialiser (read once, transposed once), whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from export.convert import TORCH_DTYPE, Conversion, WeightRecipe
from export.errors import BrokenCheckpointError
from export.quantize import Packed

_PIECE = 1 << 24


class Checkpoint:
    """Tensors of a safetensors checkpoint, sharded or not, read one by one.

    A file is opened anew for each tensor: an open one keeps every page that it ever touched resident.

    Raises:
        BrokenCheckpointError: no safetensors files, a truncated one, or a shard that the index names and is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as e:
                raise BrokenCheckpointError(f"{index} is not a safetensors index ({e}); download it again") from None
            files = [folder / name for name in names]
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise BrokenCheckpointError(
                f"{folder} holds no *.safetensors; save the model with save_pretrained(..., safe_serialization=True)"
            )
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as f:
                    for name in f.keys():  # noqa: SIM118 (not a dict)
                        self.where[name] = file
                        self.shapes[name] = tuple(f.get_slice(name).get_shape())
            except FileNotFoundError:
                raise BrokenCheckpointError(
                    f"{file.name} is missing from {folder}, though the index names it; download it again"
                ) from None
            except SafetensorError as e:
                raise BrokenCheckpointError(
                    f"{file} is damaged or cut short ({e}); copy or download it again"
                ) from None

    def read(self, name: str) -> Tensor:
        """One tensor, in the type it is stored in."""
        with safe_open(self.where[name], framework="pt") as f:
            tensor: Tensor = f.get_tensor(name)
        return tensor


def match_names(
    recipes: Iterable[WeightRecipe], checkpoint: Checkpoint, tied: bool, shapes: dict[str, tuple[int, ...]]
) -> dict[str, str]:
    """Map each source of the recipes to a checkpoint tensor and check that nothing is missing, extra or misshapen.

    ``shapes`` is what the configuration demands of each source.

    Raises:
        BrokenCheckpointError: names the tensors concerned.
    """
    wanted = {s for r in recipes for s in r.sources}
    known = set(checkpoint.where)
    mapping = {s: s for s in wanted}
    if tied and "model.embed_tokens.weight" not in known and "lm_head.weight" in known:
        mapping["model.embed_tokens.weight"] = "lm_head.weight"
    missing = sorted(s for s, t in mapping.items() if t not in known)
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise BrokenCheckpointError(f"{checkpoint.folder} lacks the tensors {shown}; is the checkpoint whole?")
    ignored = ("rotary_emb.inv_freq",)
    extra = sorted(
        n for n in known - set(mapping.values()) if not n.endswith(ignored) and not (tied and n == "lm_head.weight")
    )
    if extra:
        shown = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
        raise BrokenCheckpointError(
            f"{checkpoint.folder} has tensors that a LLaMA of this config does not use: {shown}; "
            f"does config.json belong to these weights?"
        )
    for source in sorted(wanted):
        have = checkpoint.shapes[mapping[source]]
        if have != shapes[source]:
            raise BrokenCheckpointError(
                f"{checkpoint.folder}: {source} has shape {list(have)}, config.json demands {list(shapes[source])}; "
                f"does config.json belong to these weights?"
            )
    return mapping


Quantiser = Callable[[WeightRecipe, Tensor], Packed]
"""A recipe (its sources, bits) and its float weight ``[rows, columns]`` -> the packed weight."""


def _joined(parts: list[Tensor]) -> Tensor:
    """Rows side by side; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=0)


def make_initialiser(recipe: WeightRecipe, sources: list[Tensor]) -> Tensor:
    """Apply a recipe: cast, join, transpose. The cast comes first, so that fp16 halves the working memory."""
    joined = _joined([s.to(TORCH_DTYPE[recipe.dtype]) for s in sources])
    if recipe.transform in ("transpose", "concat_transpose"):
        joined = joined.t()
    if tuple(joined.shape) != recipe.shape:
        raise BrokenCheckpointError(
            f"{recipe.name}: the checkpoint gives shape {list(joined.shape)}, config.json demands {list(recipe.shape)}"
        )
    return joined.contiguous()


def _write(fd: int, data: memoryview) -> None:
    """Write all of ``data``: a raw write may be short."""
    while data:
        data = data[os.write(fd, data) :]


def write_data(
    conversion: Conversion,
    checkpoint: Checkpoint,
    path: Path,
    tied: bool,
    progress: Callable[[int], None] | None = None,
    quantiser: Quantiser | None = None,
) -> tuple[str, str]:
    """Stream every initialiser to ``path``.

    Args:
        conversion: recipes in file order, and the rotary tables.
        checkpoint: where the tensors come from.
        path: the external-data file, written anew.
        tied: whether the head shares the embedding's tensor.
        progress: called with the bytes written by each piece.
        quantiser: needed when a recipe is a part of a quantised weight.

    Returns:
        SHA-256 (hex) of the file, and the identity of the weights: SHA-256 over name, type, shape and content of
        every checkpoint tensor, the same however the checkpoint is sharded.
    """
    mapping = match_names(conversion.recipes, checkpoint, tied, conversion.shapes)
    maker = _Maker(conversion, checkpoint, mapping, quantiser)
    file_hash = hashlib.sha256()
    position = 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def write(block: memoryview) -> None:
        for start in range(0, len(block), _PIECE):
            piece = block[start : start + _PIECE]
            _write(fd, piece)
            file_hash.update(piece)
            if progress:
                progress(len(piece))

    try:
        for recipe in conversion.recipes:
            write(memoryview(bytes(recipe.offset - position)))
            # Nothing here may keep the initialiser alive while the next one is made.
            write(_bytes_of(maker.make(recipe)))
            position = recipe.offset + recipe.nbytes
        os.fsync(fd)
    finally:
        os.close(fd)
    contents = maker.contents
    identity = hashlib.sha256("\n".join(contents[n] for n in sorted(contents)).encode()).hexdigest()
    return file_hash.hexdigest(), identity


class _Maker:
    """Makes initialisers in file order; ``contents`` collects the identity of each checkpoint tensor read."""

    def __init__(
        self, conversion: Conversion, checkpoint: Checkpoint, mapping: dict[str, str], quantiser: Quantiser | None
    ) -> None:
        self._conversion, self._checkpoint = conversion, checkpoint
        self._mapping, self._quantiser = mapping, quantiser
        self._packed: Packed | None = None
        self.contents: dict[str, str] = {}

    def make(self, recipe: WeightRecipe) -> Tensor:
        """One initialiser, in the shape and type that the graph declares."""
        if recipe.transform == "rope":
            return self._conversion.rope[recipe.name].to(TORCH_DTYPE[recipe.dtype]).contiguous()
        if recipe.transform in ("scales", "zero_points", "offsets"):
            assert self._packed is not None  # the codes came just before
            return _part(recipe, self._packed)
        self._packed = None  # freed before the next weight is read
        if recipe.transform == "codes":
            assert self._quantiser is not None
            self._packed = self._quantiser(recipe, _joined(self._read(recipe)))
            return _part(recipe, self._packed)
        return make_initialiser(recipe, self._read(recipe))

    def _read(self, recipe: WeightRecipe) -> list[Tensor]:
        sources = []
        for source in recipe.sources:
            name = self._mapping[source]
            tensor = self._checkpoint.read(name)
            if name not in self.contents:
                self.contents[name] = tensor_identity(name, tensor)
            sources.append(tensor)
        return sources


def _part(recipe: WeightRecipe, packed: Packed) -> Tensor:
    """Codes, scales or zero points, in the shape and type that the graph declares."""
    if recipe.transform == "offsets":
        assert packed.zero_points is not None
        part = ((8 - packed.zero_points.float()) * packed.scales.float()).t()
    else:
        part = getattr(packed, recipe.transform)
    return part.to(TORCH_DTYPE[recipe.dtype]).reshape(recipe.shape).contiguous()


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory, not copied."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def tensor_identity(name: str, tensor: Tensor) -> str:
    """One line that tells a tensor's name, type, shape and content (SHA-256, hex)."""
    raw = _bytes_of(tensor.contiguous())
    return f"{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"
