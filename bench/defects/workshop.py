"""A copy of a good folder that can be edited: cheap to make, and resealed so that no hash gives the edit away.

Files are hard links until one is opened for editing, so forty copies of a model cost nothing.
Try: ``python -m pytest tests/bench/defects/test_defects.py -k workshop``.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.errors import BenchError
from bench.gate.localize import link_or_copy
from export.manifest import MANIFEST_NAME, Manifest, read_manifest, sha256_of
from export.quantize import pack, unpack


class NotApplicableError(BenchError):
    """A change that does not apply to this folder, and why: the model has no attention window, say."""


NUMPY = {"fp32": np.float32, "fp16": np.float16, "uint8": np.uint8, "int8": np.int8}


class Workshop:
    """One editable copy.

    Args:
        good: the folder to copy; it is never changed.
        folder: where the copy appears.
        checkpoint: the baseline's checkpoint, for defects that need its configuration.
    """

    def __init__(self, good: Path, folder: Path, checkpoint: Path) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        folder.mkdir(parents=True)
        self._known = {}
        for path in filter(Path.is_file, good.rglob("*")):
            name = path.relative_to(good)
            self._known[name.as_posix()] = path.stat().st_ino
            (folder / name).parent.mkdir(exist_ok=True)
            link_or_copy(path.resolve(), folder / name)

    @property
    def manifest(self) -> Manifest:
        """The copy's manifest as it stands."""
        return read_manifest(self.folder)

    @cached_property
    def config(self) -> Any:
        """transformers' configuration of the checkpoint."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.checkpoint, local_files_only=True, trust_remote_code=False)

    def own(self, name: str) -> Path:
        """A file of the copy's own, safe to write to."""
        path = self.folder / name
        if path.exists() and path.stat().st_nlink > 1:
            spare = path.with_name(name + ".copy")
            shutil.copyfile(path, spare)
            spare.replace(path)
        return path

    def graphs(self, change: Callable[[Any], None], roles: tuple[str, ...] = ("decode", "scoring")) -> None:
        """Edit the ``onnx.ModelProto`` of some graphs."""
        import onnx

        m = self.manifest
        names = {"decode": m.decode_graph, "scoring": m.scoring_graph}
        for name in dict.fromkeys(names[r] for r in roles):
            model = onnx.load(self.folder / name, load_external_data=False)
            change(model)
            onnx.save(model, self.own(name))

    @contextmanager
    def weight(self, name: str) -> Iterator[NDArray[Any]]:
        """A stored weight as a writable array, in the shape and type of the manifest; 4-bit codes as int8."""
        m = self.manifest
        found = first((w for w in m.weights if w.name == name), f"stored weight {name}")
        if found.dtype not in (*NUMPY, "int4"):
            raise NotApplicableError(f"{name} is stored as {found.dtype}, which numpy does not have")
        if found.dtype == "int4":
            data = np.memmap(self.own(m.data_file), np.uint8, "r+", offset=found.offset, shape=(1, found.nbytes))
            signed = unpack(torch.from_numpy(data), 4, math.prod(found.shape)).to(torch.int8)
            codes = torch.where(signed > 7, signed - 16, signed)
            yield codes.view(found.shape).numpy()
            data[:] = pack((codes & 15).to(torch.uint8), 4).numpy()
            data.flush()
            return
        array = np.memmap(self.own(m.data_file), NUMPY[found.dtype], "r+", offset=found.offset, shape=found.shape)
        yield array
        array.flush()

    def json(self, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Edit a JSON object of the folder."""
        if not (self.folder / name).is_file():
            raise NotApplicableError(f"the folder has no {name}")
        path = self.own(name)
        raw = json.loads(path.read_text(encoding="utf-8"))
        change(raw)
        path.write_text(json.dumps(raw, indent=1, ensure_ascii=False), encoding="utf-8")

    def template(self, change: Callable[[str], str]) -> None:
        """Edit the chat template, wherever it stands."""
        if (self.folder / "chat_template.jinja").is_file():
            path = self.own("chat_template.jinja")
            path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            self.json(
                "tokenizer_config.json", lambda raw: raw.update(chat_template=change(raw.get("chat_template", "")))
            )

    def reseal(self) -> None:
        """Write sizes and hashes of the files as they are now: only a real look finds the edit."""

        def change(raw: dict[str, Any]) -> None:
            files = {k: v for k, v in raw["files"].items() if (self.folder / k).is_file()}
            for path in sorted(p for p in self.folder.rglob("*") if p.is_file() and p.name != MANIFEST_NAME):
                now, name = path.stat(), path.relative_to(self.folder).as_posix()
                if self._known.get(name) != now.st_ino or name not in files:
                    files[name] = {"size": now.st_size, "sha256": sha256_of(path)}
            raw["files"] = files

        self.json(MANIFEST_NAME, change)

    def close(self) -> None:
        """Remove the copy."""
        shutil.rmtree(self.folder, ignore_errors=True)


def layer_at(layers: int) -> int:
    """The layer that single-layer defects sit in: past the first third, so that layers precede and follow it."""
    return layers // 3


def first(found: Iterable[Any], what: str) -> Any:
    """The first of what a change looks for.

    Raises:
        NotApplicableError: there is none.
    """
    for one in found:
        return one
    raise NotApplicableError(f"no {what}")


def usual_layer(w: Workshop) -> int:
    """:func:`layer_at` of a folder."""
    return layer_at(w.manifest.kv.layers)


@dataclass(frozen=True)
class Defect:
    """One deliberate defect.

    ``change`` raises :class:`NotApplicableError` where the folder has no place for it. ``first`` is the check that has
    to name it first; ``in_layer`` says that it sits in one layer alone, which ``layer`` tells; ``sealed`` False leaves
    the manifest's hashes as they were.
    """

    name: str
    change: Callable[[Workshop], None]
    first: str
    in_layer: bool = False
    sealed: bool = True
    layer: Callable[[Workshop], int] = usual_layer


@dataclass(frozen=True)
class Harmless:
    """A change that must pass. ``around`` is a context that the gate runs in, for changes of the runtime's settings;
    ``target`` is the only one whose folders it leaves as good as they were, "" for all."""

    name: str
    change: Callable[[Workshop], None] = lambda _w: None
    around: Callable[[], Any] | None = None
    threads: int | None = None
    target: str = ""
