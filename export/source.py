"""Model argument -> a local checkpoint folder (config.json, safetensors, tokenizer).

Accepts ``demo``, a folder, a GGUF file or a hub id. GGUF files are converted once into the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.cache import cache_dir, publish
from export.errors import BrokenCheckpointError, ModelNotFoundError, UnsupportedModelError
from export.manifest import SIDE_FILES, files_of, first_line, sha256_of
from export.newer_config import readable
from export.tied import with_embedding

DEMO = "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
PICKLES = "pytorch_model*.bin"
ADAPTER = "adapter_config.json"
Status = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine.

    ``name`` is what reports call it; ``origin`` says where the weights are from and whether they are real
    (trained) or random.
    """

    folder: Path
    name: str
    origin: str

    @property
    def content_key(self) -> str:
        """SHA-256 (hex) over names, sizes and times of the checkpoint's files: changes when any of them does."""
        files = files_of(self.folder, (*SIDE_FILES, *WEIGHT_FILES))
        facts = [f"{n}:{(status := (self.folder / n).stat()).st_size}:{status.st_mtime_ns}" for n in files]
        return hashlib.sha256("|".join(facts).encode()).hexdigest()


def add_option(add: Callable[..., Any]) -> None:
    """The option of every command that resolves a model; ``add`` is argparse's or pytest's."""
    add("--allow-pickle", action="store_true", help="read a checkpoint's pytorch_model.bin, whose maker you trust")


def resolve(
    model: str, revision: str | None = None, status: Status = lambda _: None, allow_pickle: bool = False
) -> Source:
    """Find or fetch a checkpoint.

    ``allow_pickle`` lets ``pytorch_model*.bin`` be read (by PyTorch's restricted unpickler) where there are no
    safetensors, and converted once into the cache; code of the checkpoint is never run.

    Raises:
        ModelNotFoundError: no such folder, file or hub id; or the hub cannot be reached.
        BrokenCheckpointError: a folder without config.json or safetensors, or a GGUF that cannot be read.
        UnsupportedModelError: quantised weights, an adapter, or a tied head that is not the embedding.
        DemoModelError: the demo model cannot be had.
    """
    if model == DEMO:
        from export.demo_model import FOLDER, ORIGIN, demo_model

        return Source(demo_model(status), FOLDER, ORIGIN)
    path = Path(model).expanduser()
    if path.is_dir():
        return _local(path, status, allow_pickle)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelNotFoundError(f"{path} is a file, but not a .gguf; pass the checkpoint's folder")
        return Source(gguf_checkpoint(path, status), path.stem, f"GGUF file {path.name}, dequantised to fp32")
    if path.is_absolute() or model.startswith((".", "~")) or not HUB_ID.fullmatch(model):
        raise ModelNotFoundError(
            f"no such model: {model!r} is neither a folder, a .gguf file nor a hub id (owner/name); "
            f"'demo' is the built-in demo model"
        )
    folder = _from_hub(model, revision, status, WEIGHT_FILES)
    if allow_pickle and not any(folder.glob("*.safetensors")):
        folder = _from_hub(model, revision, status, (PICKLES,))
    return _local(folder, status, allow_pickle, model, f"hub {model}" + (f" at {revision}" if revision else ""))


def _local(folder: Path, status: Status, allow_pickle: bool, name: str | None = None, origin: str = "") -> Source:
    """A checkpoint folder on this machine; ``name`` and ``origin`` where the folder's own do not say it."""
    if (folder / ADAPTER).is_file():
        raise UnsupportedModelError(
            f"{folder} holds an adapter ({ADAPTER}), which the exported weights would lack; merge it first (peft: "
            f"model.merge_and_unload().save_pretrained(FOLDER)) and pass that folder"
        )
    config = folder / "config.json"
    if not config.is_file():
        raise BrokenCheckpointError(f"{folder} has no config.json; pass a transformers checkpoint folder")
    try:
        raw = json.loads(config.read_text(encoding="utf-8"))
        origin = origin or str(raw.get("llama_onnx_origin", "local folder"))
    except (ValueError, AttributeError, RecursionError):
        raise BrokenCheckpointError(f"{config} is not a JSON object; copy or download it again") from None
    if raw.get("quantization_config") is not None:
        raise UnsupportedModelError(
            f"{config} has a quantization_config ({_method(raw['quantization_config'])}): the stored weights are "
            f"quantised; pass the checkpoint that they were made from (--precision int8 and int4 quantise here)"
        )
    name = name or folder.resolve().name
    pickles = sorted(folder.glob(PICKLES))
    if not any(folder.glob("*.safetensors")):
        if not allow_pickle and (pickles or origin.startswith("hub ")):
            seen = f"pickled weights only ({pickles[0].name})" if pickles else "no *.safetensors, pickles at most"
            raise BrokenCheckpointError(
                f"{folder} holds {seen}, and a pickle can run code when it is read; "
                f"save the model with safe_serialization=True, or pass --allow-pickle (to export, validate and every "
                f"command that takes a baseline) if you trust its maker"
            )
        if pickles:
            folder, origin = unpickled_checkpoint(folder, pickles, status), f"{origin}, unpickled"
    return Source(with_embedding(readable(folder)), name, origin)


def _method(config: Any) -> str:
    """What quantised a checkpoint, as its configuration calls it."""
    said = config if isinstance(config, dict) else {}
    old = "bitsandbytes" if said.get("load_in_8bit") or said.get("load_in_4bit") else "unknown method"
    return str(said.get("quant_method") or old)[:40]


def _from_hub(model: str, revision: str | None, status: Status, weights: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status(f"fetching {model} from the hub")
    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=[*SIDE_FILES, ADAPTER, *weights],
            # The same weights in their maker's own form.
            ignore_patterns=["*/*.safetensors*", "*/*.bin", "consolidated*"],
        )
    except GatedRepoError:
        raise ModelNotFoundError(
            f"{model} is gated: accept its licence on its hub page, then run `huggingface-cli login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFoundError(f"{model} has no revision {revision!r} on the hub") from None
    except RepositoryNotFoundError:
        raise ModelNotFoundError(
            f"no such model: there is no folder and no hub repository {model!r} (or it is private: set HF_TOKEN)"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError):
        raise ModelNotFoundError(
            f"the hub cannot be reached and {model!r} is not cached; pass a local checkpoint folder instead, "
            f"or 'demo' for the built-in demo model"
        ) from None
    return Path(folder)


def unpickled_checkpoint(folder: Path, pickles: list[Path], status: Status) -> Path:
    """Convert pickled weights to a safetensors folder in the cache, once per content; returns the folder.

    Raises:
        BrokenCheckpointError: not a state dict, or it holds more than tensors.
    """
    import shutil

    import torch
    from safetensors.torch import save_file

    others = files_of(folder, SIDE_FILES)
    facts = "".join(f"{name} {sha256_of(folder / name)}\n" for name in [*(p.name for p in pickles), *others])
    target = cache_dir() / "unpickled" / hashlib.sha256(facts.encode()).hexdigest()[:16]
    if (target / "config.json").is_file():
        return target
    with publish(target, shared=True) as work:
        where: dict[str, str] = {}
        total = 0
        for k, path in enumerate(pickles):
            status(f"reading {path.name}")
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as e:  # whatever a damaged or hostile pickle raises
                raise BrokenCheckpointError(
                    f"{path} cannot be read without running code from it ({first_line(e)})"
                ) from None
            if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
                raise BrokenCheckpointError(f"{path} is not a dictionary of tensors; save the model again")
            name = f"model-{k + 1:05d}-of-{len(pickles):05d}.safetensors"
            tensors = {n: t.clone().contiguous() for n, t in state.items() if n not in where}
            save_file(tensors, work / name, metadata={"format": "pt"})
            where |= dict.fromkeys(tensors, name)
            total += sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (work / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        for name in others:
            (work / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, work / name)
    return target


def gguf_checkpoint(path: Path, status: Status = lambda _: None) -> Path:
    """Convert a GGUF file to a safetensors folder in the cache, once per content; returns the folder.

    Raises:
        BrokenCheckpointError: the file is damaged or incomplete, or of an architecture that transformers cannot read.
        UnsupportedModelError: it holds what would be lost.
    """
    from export.gguf_file import CONVERSION, convert_gguf

    target = cache_dir() / f"gguf-{CONVERSION}" / sha256_of(path)[:16]
    if not (target / "config.json").is_file():
        with publish(target, shared=True) as work:
            convert_gguf(path, work, status)
    return target
