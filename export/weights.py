"""The streaming writer: reads, makes and writes initialisers at the same time, hashing both ends.

Peak memory is that of the largest two neighbours in the checkpoint, whatever the size of the model: while one weight is
made into pieces of the file, the next is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from export.convert import TORCH_DTYPE, Conversion
from export.data_file import DataFile
from export.errors import BrokenCheckpointError, UnsupportedModelError
from export.manifest import Weight
from export.process import torch_threads
from export.quantize import Packed, pack, unpack

# A piece of the file in the making, small enough for a cache.
_PIECE = 1 << 21
# Read and hashed at once, so that the hash finds it in a cache.
_READ = 1 << 21
_HEADER = 8
_ALIGNED = 64
# A buffer above this goes back to the system when half of it is no longer needed.
_LARGE = 128 << 20
# The parts of a quantised weight that are made with its codes.
_AFTER_CODES = ("scales", "zero_points", "offsets", "scales_transposed")
# Columns of a piece are a multiple of this, so that no 4-bit code is cut off from the one it shares a byte with.
_EVEN = 16
_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BUFFERS = tuple(
    f".{layer}.{name}" for layer in ("attn", "attention") for name in ("bias", "masked_bias", "causal_mask")
)
"""How the names of tensors end that some checkpoints hold beside the weights."""


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read: ``model.safetensors``, else what the index names.

    Raises:
        BrokenCheckpointError: none, an index that cannot be read, or several files and nothing that says which.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
            raise BrokenCheckpointError(f"{index} is not a safetensors index ({e}); download it again") from None
        outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise BrokenCheckpointError(f"{index} names {outside[0]!r}, which is not a file beside it; refused")
        if names:
            return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BrokenCheckpointError(
            f"{folder} holds no *.safetensors; save the model with save_pretrained(..., safe_serialization=True)"
        )
    if len(files) > 1:
        raise BrokenCheckpointError(
            f"{folder} holds {', '.join(f.name for f in files[:3])}{', ...' * (len(files) > 3)} and neither "
            f"{single.name} nor {index.name}: which of them are the model? Remove the others, or add the index"
        )
    return files


class Checkpoint:
    """Tensors of a safetensors checkpoint, sharded or not, read one by one.

    A file is opened anew for each tensor: an open one keeps every page that it ever touched resident.

    Raises:
        BrokenCheckpointError: no safetensors files, a truncated one, or a shard that the index names and is not there.
        UnsupportedModelError: a weight that is no float, so a quantiser's code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = _weight_files(folder)
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[Path, dict[str, Any]] = {}
        for file in files:
            if file.exists() and not file.is_file():
                raise BrokenCheckpointError(f"{file} is no regular file; replace it by one")
            try:
                with safe_open(file, framework="pt") as f:
                    for name in f.keys():  # noqa: SIM118 (not a dict)
                        if name in self.where:
                            raise BrokenCheckpointError(
                                f"{name} is both in {self.where[name].name} and in {file.name}; "
                                "remove the file that does not belong to the model"
                            )
                        stored = f.get_slice(name)
                        if (dtype := stored.get_dtype()) not in (*_STORED, "BOOL") and not name.endswith(BUFFERS):
                            raise UnsupportedModelError(
                                f"{file}: {name} is stored as {dtype}, a quantiser's codes and not weights; pass the "
                                "unquantised checkpoint"
                            )
                        self.where[name] = file
                        self.shapes[name] = tuple(stored.get_shape())
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

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values, compared block by block; NaN is equal to nothing."""
        if self.shapes[one] != self.shapes[other]:
            return False
        rows = self.shapes[one][0]
        step = max(1, _READ // max(1, math.prod(self.shapes[one][1:])))
        with safe_open(self.where[one], framework="pt") as f, safe_open(self.where[other], framework="pt") as g:
            a, b = f.get_slice(one), g.get_slice(other)
            return all(torch.equal(a[i : i + step].double(), b[i : i + step].double()) for i in range(0, rows, step))

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in its file."""
        start, end = self._place(name)[0]["data_offsets"]
        return int(end - start)

    def load(self, name: str, memory: mmap.mmap, at: int, seen: Callable[[memoryview], None] | None = None) -> Tensor:
        """As :meth:`read`, but block by block into ``memory`` from byte ``at`` on; the tensor is a view of it.

        A mapped file costs a page fault for every few pages, and new memory as much again.

        Args:
            name: the tensor.
            memory: where :meth:`nbytes` bytes go.
            at: a multiple of the type's size.
            seen: called with each block of the tensor's bytes, in order.

        Raises:
            BrokenCheckpointError: the file became shorter.
        """
        entry, start = self._place(name)
        dtype, nbytes = _STORED.get(entry["dtype"]), self.nbytes(name)
        if dtype is None or not nbytes:
            tensor = self.read(name)
            if seen and nbytes:
                seen(_bytes_of(tensor.contiguous()))
            return tensor
        view = memoryview(memory)[at : at + nbytes]
        fd = os.open(self.where[name], os.O_RDONLY)
        try:
            done = 0
            while done < nbytes:
                n = os.preadv(fd, [view[done : done + _READ]], start + done)
                if not n:
                    raise BrokenCheckpointError(f"{self.where[name]} is cut short; copy or download it again")
                if seen:
                    seen(view[done : done + n])
                done += n
        finally:
            os.close(fd)
        count = nbytes // dtype.itemsize
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=at).reshape(self.shapes[name])

    def _place(self, name: str) -> tuple[dict[str, Any], int]:
        """A tensor's entry in its file's header, and where its bytes begin. safe_open has checked the header."""
        file = self.where[name]
        if file not in self._places:
            with file.open("rb") as f:
                length = int.from_bytes(f.read(_HEADER), "little")
                self._places[file] = {"": length + _HEADER, **json.loads(f.read(length))}
        entry = self._places[file][name]
        return entry, self._places[file][""] + entry["data_offsets"][0]


def check_names(conversion: Conversion, checkpoint: Checkpoint, class_name: str, tied: bool) -> None:
    """Check that of the recipes' sources nothing is missing, extra or misshapen in the checkpoint.

    Args:
        conversion: recipes, and the shape that the configuration demands of each source.
        checkpoint: of the model.
        class_name: of the model in transformers.
        tied: whether its head is the embedding.

    Raises:
        BrokenCheckpointError: names the tensors concerned.
    """

    def shown(names: list[str]) -> str:
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    shapes, wanted = conversion.shapes, {s for r in conversion.recipes for s in r.sources}
    known = set(checkpoint.where)
    missing = sorted(wanted - known)
    prefixes = {n.removesuffix(m) for m in missing for n in known if n.endswith(m)}
    if len(prefixes) == 1:
        raise BrokenCheckpointError(
            f"{checkpoint.folder}: names of tensors begin with {min(prefixes)!r}, which a wrapper around the model "
            f"left there; save the model inside it (unwrap or merge it first, then save_pretrained)"
        )
    if missing and all(m.removeprefix("model.") in known for m in missing if m.startswith("model.")):
        raise BrokenCheckpointError(
            f"{checkpoint.folder}: names of tensors lack 'model.', so this is a model saved without its head; "
            f"save the {class_name}"
        )
    if missing:
        raise BrokenCheckpointError(f"{checkpoint.folder} lacks the tensors {shown(missing)}; is the checkpoint whole?")
    ignored = ("rotary_emb.inv_freq",)
    extra = sorted(n for n in known - wanted if not n.endswith(ignored) and not (tied and n == "lm_head.weight"))
    if extra:
        raise BrokenCheckpointError(
            f"{checkpoint.folder} has tensors that a {class_name} of this config does not use: {shown(extra)}; "
            f"does config.json belong to these weights?"
        )
    for source in sorted(wanted):
        have = checkpoint.shapes[source]
        if have != shapes[source]:
            raise BrokenCheckpointError(
                f"{checkpoint.folder}: {source} has shape {list(have)}, config.json demands {list(shapes[source])}; "
                f"does config.json belong to these weights?"
            )


Quantiser = Callable[[Weight, Tensor], Packed]
"""A recipe (its sources, bits) and its float weight ``[rows, columns]`` -> the packed weight."""


def _joined(parts: list[Tensor]) -> Tensor:
    """Rows side by side; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=0)


def pieces(recipe: Weight, sources: list[Tensor]) -> Iterator[Tensor]:
    """Apply a recipe (cast, join, transpose) piece by piece, in file order.

    A piece is contiguous, in the recipe's type, and valid until the next one is asked for.

    Raises:
        BrokenCheckpointError: the sources do not give the recipe's shape.
    """
    rows, rest = sum(s.shape[0] for s in sources), tuple(sources[0].shape[1:])
    turned = recipe.transform in ("transpose", "concat_transpose")
    shape = (*rest, rows) if turned else (rows, *rest)
    if shape != recipe.shape or any(tuple(s.shape[1:]) != rest for s in sources):
        raise BrokenCheckpointError(
            f"{recipe.name}: the checkpoint gives shape {list(shape)}, config.json demands {list(recipe.shape)}"
        )
    dtype = TORCH_DTYPE[recipe.dtype]
    if not turned:
        step = _PIECE // dtype.itemsize
        for source in sources:
            flat = source.reshape(-1)
            for i in range(0, len(flat), step):
                yield flat[i : i + step].to(dtype)
        return
    columns = rest[0]
    step = max(1, min(columns, _PIECE // (rows * dtype.itemsize)))
    # PyTorch's fast transposition wants both sides contiguous: the columns are first brought together.
    gathered, made = torch.empty(rows * step, dtype=dtype), torch.empty(step * rows, dtype=dtype)
    for i in range(0, columns, step):
        width = min(step, columns - i)
        block = gathered[: rows * width].view(rows, width)
        top = 0
        for source in sources:
            block[top : top + len(source)] = source[:, i : i + width]
            top += len(source)
        yield made[: width * rows].view(width, rows).copy_(block.t())


def make_initialiser(recipe: Weight, sources: list[Tensor]) -> Tensor:
    """Apply a recipe as a whole; see :func:`pieces`."""
    made = torch.empty(math.prod(recipe.shape), dtype=TORCH_DTYPE[recipe.dtype])
    end = 0
    for piece in pieces(recipe, sources):
        made[end : end + piece.numel()] = piece.reshape(-1)
        end += piece.numel()
    return made.view(recipe.shape)


def write_data(
    conversion: Conversion,
    checkpoint: Checkpoint,
    path: Path,
    progress: Callable[[int, int], None],
    quantiser: Quantiser | None,
) -> tuple[str, str]:
    """Stream every initialiser to ``path``.

    Args:
        conversion: recipes in file order, and the rotary tables.
        checkpoint: where the tensors come from.
        path: the external-data file, written anew.
        progress: told (bytes written, bytes in all) after each piece.
        quantiser: needed when a recipe is a part of a quantised weight.

    Returns:
        SHA-256 (hex) of the file, and the identity of the weights: SHA-256 over name, type, shape and content of
        every checkpoint tensor, the same however the checkpoint is sharded.
    """
    contents: dict[str, str] = {}
    make = _Maker(conversion, quantiser)

    def write(file: DataFile, made: Iterator[Tensor]) -> None:
        for piece in made:  # no piece outlives the call
            file.write(_bytes_of(piece))
            progress(file.end, conversion.data_bytes)

    # Reading, making and hashing side by side keep the cores busy; only a quantiser has use for threads of its own.
    threads = contextlib.nullcontext() if quantiser else torch_threads(1)
    with DataFile(path, conversion.data_bytes) as file, threads:
        for recipe, sources in _read_ahead(conversion.recipes, checkpoint, contents):
            file.pad_to(recipe.offset)
            write(file, make(recipe, sources))
            sources.clear()  # the next weight is read over them
        digest = file.finish()
    return digest, identity_of(contents)


def identity_of(contents: dict[str, str]) -> str:
    """Identity of a checkpoint (SHA-256, hex) from those of its tensors by name."""
    return hashlib.sha256("\n".join(contents[n] for n in sorted(contents)).encode()).hexdigest()


def _read_ahead(
    recipes: Iterable[Weight], checkpoint: Checkpoint, contents: dict[str, str]
) -> Iterator[tuple[Weight, list[Tensor]]]:
    """Each recipe with its sources, read by a thread while the recipe before it is at work.

    ``contents`` collects the identity of each checkpoint tensor that was read.
    """

    # While a recipe is at work in one buffer, the next is read into the other.
    buffers = [_Buffer(), _Buffer()]

    def load(recipe: Weight, buffer: _Buffer) -> list[Tensor]:
        if recipe.transform in ("rope", *_AFTER_CODES):
            return []
        sizes = [-(-checkpoint.nbytes(name) // _ALIGNED) * _ALIGNED for name in recipe.sources]
        memory = buffer.of(sum(sizes))
        tensors = []
        for k, name in enumerate(recipe.sources):
            digest = None if name in contents else hashlib.sha256()
            tensors.append(checkpoint.load(name, memory, sum(sizes[:k]), digest.update if digest else None))
            if digest:
                contents[name] = tensor_identity(name, tensors[-1], digest.hexdigest())
        return tensors

    waiting = iter(recipes)
    with ThreadPoolExecutor(1, "read") as reader:
        recipe = next(waiting, None)
        future = reader.submit(load, recipe, buffers[0]) if recipe else None
        while recipe and future:
            sources = future.result()
            following = next(waiting, None)
            buffers.reverse()
            future = reader.submit(load, following, buffers[0]) if following else None
            yield recipe, sources
            recipe = following


class _Buffer:
    """Memory that is used again, so that its pages are made once."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def of(self, nbytes: int) -> mmap.mmap:
        """At least so many bytes. What was here before must be done with."""
        have = len(self._memory) if self._memory is not None else 0
        if self._memory is None or have < nbytes or (have > _LARGE and have > 2 * nbytes):
            self._memory = None  # freed before the new one is made, unless a tensor still looks at it
            self._memory = mmap.mmap(-1, max(nbytes, _ALIGNED))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without them
                    self._memory.madvise(mmap.MADV_HUGEPAGE)
        return self._memory


class _Maker:
    """Recipe and sources -> pieces of the initialiser."""

    def __init__(self, conversion: Conversion, quantiser: Quantiser | None) -> None:
        self._rope, self._quantiser = conversion.rope, quantiser
        self._packed: Packed | None = None

    def __call__(self, recipe: Weight, sources: list[Tensor]) -> Iterator[Tensor]:
        """One initialiser, in the shape and type that the graph declares."""
        if recipe.transform == "rope":
            return iter([self._rope[recipe.name].to(TORCH_DTYPE[recipe.dtype]).contiguous()])
        if recipe.transform in _AFTER_CODES:
            assert self._packed is not None  # the codes came just before
            return iter([_part(recipe, self._packed)])
        self._packed = None  # freed before the next weight is made
        if recipe.transform in ("codes", "codes_transposed"):
            assert self._quantiser is not None
            self._packed = self._quantiser(recipe, _joined(sources))
            turned = recipe.transform == "codes_transposed"
            return _turned_codes(recipe, self._packed) if turned else iter([_part(recipe, self._packed)])
        return _finite(recipe, pieces(recipe, sources))


_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float16: (torch.int16, 0x7C00)}
_EXPONENT[torch.bfloat16] = (torch.int16, 0x7F80)


def _finite(recipe: Weight, made: Iterable[Tensor]) -> Iterator[Tensor]:
    """The pieces, unless one holds NaN or infinity: the model would answer nonsense without a word.

    Raises:
        BrokenCheckpointError: names the weight, and the type where the checkpoint's value is too large for it.
    """
    kind, exponent = _EXPONENT[TORCH_DTYPE[recipe.dtype]]
    for piece in made:
        # Two passes over a piece that lies in a cache; isfinite() takes several times as long.
        if piece.numel() and int((piece.view(kind) & exponent).max()) == exponent:
            raise BrokenCheckpointError(
                f"{' + '.join(recipe.sources)}: NaN, infinity, or a value that {recipe.dtype} cannot hold; download "
                "the checkpoint again, or choose bf16 or fp32"
            )
        yield piece


def _part(recipe: Weight, packed: Packed) -> Tensor:
    """Codes, scales or zero points, in the shape and type that the graph declares."""
    if recipe.transform == "offsets":
        assert packed.zero_points is not None
        part = ((8 - packed.zero_points.float()) * packed.scales.float()).t()
    elif recipe.transform == "scales_transposed":
        part = packed.scales.t()
    else:
        part = getattr(packed, recipe.transform)
    if recipe.transform == "codes" and len(recipe.shape) == 2:
        part = part.flatten(1)[:, : recipe.shape[1]]  # the last block as long as it is
    return part.to(TORCH_DTYPE[recipe.dtype]).reshape(recipe.shape).contiguous()


def _turned_codes(recipe: Weight, packed: Packed) -> Iterator[Tensor]:
    """Symmetric codes as DequantizeLinear reads them, signed and ``[columns, rows]``, in pieces of whole columns."""
    columns, rows = recipe.shape
    bits = recipe.bits
    codes = packed.codes.view(rows, -1)
    step = max(_EVEN, _PIECE // rows // _EVEN * _EVEN)
    with torch_threads(1):  # the pieces are too small to be split
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            piece = unpack(codes[:, start * bits // 8 : -(-stop * bits // 8)], bits, stop - start)
            # The middle code becomes 0: in two's complement that is the highest bit flipped.
            signed = piece.t().contiguous() ^ (1 << (bits - 1))
            yield pack(signed.view(1, -1), bits)


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory, not copied."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def tensor_identity(name: str, tensor: Tensor, digest: str | None = None) -> str:
    """One line that tells a tensor's name, type, shape and content, whose SHA-256 (hex) may be known already."""
    digest = digest or hashlib.sha256(_bytes_of(tensor.contiguous())).hexdigest()
    return f"{name} {tensor.dtype} {list(tensor.shape)} {digest}"
