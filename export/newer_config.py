"""Checkpoints saved by transformers 5, made readable for the transformers 4 that optimum exports with.

Version 5 writes ``rope_parameters`` where 4 reads ``rope_theta`` and ``rope_scaling``; 4 ignores the new key in silence
and would take a base of 10,000 without scaling.
Try: ``python -m pytest tests/export/test_checkpoint_files.py -k rope_parameters``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from export.cache import cache_dir, publish
from export.errors import BrokenCheckpointError, UnsupportedModelError
from export.manifest import SIDE_FILES, files_of

_TOKENIZER = "tokenizer_config.json"
_WEIGHTS = "model.safetensors"
_NEW_CLASS = "TokenizersBackend"
_LLAMA_2 = ("LlamaTokenizer", "LlamaTokenizerFast")


def older(raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration with ``rope_theta`` and ``rope_scaling`` for its ``rope_parameters``; others as they are.

    Raises:
        BrokenCheckpointError: both spellings are there and contradict each other, or the new one is not an object.
        UnsupportedModelError: parameters by layer type, which the old spelling cannot say.
    """
    if raw.get("rope_parameters") is None:
        return raw
    new = raw["rope_parameters"]
    if not isinstance(new, dict):
        raise BrokenCheckpointError(f"config.json: rope_parameters is {new!r}, not an object; download it again")
    if any(isinstance(v, dict) for v in new.values()):
        raise UnsupportedModelError(
            "config.json has rope_parameters for each type of layer, which transformers 4 cannot read; use version 5"
        )
    scaling: dict[str, Any] | None = {k: v for k, v in new.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if scaling is not None and scaling.get("rope_type", "default") == "default":
        scaling = None
    said = {"rope_scaling": scaling}
    said |= {k: new[k] for k in ("rope_theta", "partial_rotary_factor") if k in new}
    for key, value in said.items():
        if raw.get(key) not in (None, value):
            raise BrokenCheckpointError(
                f"config.json says {key} {raw[key]!r}, its rope_parameters say {value!r}; remove the wrong one"
            )
    return {**raw, **said}


def readable(folder: Path) -> Path:
    """The folder itself, or one in the cache that links to its files, has the older spelling, and the weights under the
    one name by which transformers finds them.

    Raises:
        BrokenCheckpointError: as :func:`older`, or a configuration that is not JSON.
        UnsupportedModelError: as :func:`older`.
    """
    texts = {}
    for name, change in (("config.json", older), (_TOKENIZER, partial(_known_tokenizer, folder))):
        path = folder / name
        if not path.is_file() and name != _TOKENIZER:
            continue
        try:
            raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (ValueError, RecursionError) as e:
            raise BrokenCheckpointError(f"{path} is not valid JSON ({e}); copy or download it again") from None
        if isinstance(raw, dict) and (changed := change(raw)) != raw:
            texts[name] = json.dumps(changed, indent=2) + "\n"
    renamed = _weights_as_transformers_names_them(folder)
    return linked(folder, "readable", texts, renamed) if texts or renamed else folder


def linked(
    folder: Path,
    kind: str,
    texts: dict[str, str],
    renamed: Mapping[str, str] = MappingProxyType({}),
    add: Callable[[Path], None] = lambda _work: None,
) -> Path:
    """A folder in the cache, one per content, with links to a checkpoint's files and files of its own.

    Args:
        folder: the checkpoint.
        kind: of the change, a folder in the cache.
        texts: files that are written in place of the checkpoint's.
        renamed: other names for some of its files.
        add: writes more files to the folder in the making.
    """
    files = {p.name for p in folder.iterdir() if p.is_file()} | set(files_of(folder, SIDE_FILES))
    names = sorted(files - texts.keys())
    facts = [str(folder.resolve()), *texts.values(), *renamed]
    facts += [f"{n}:{(status := (folder / n).stat()).st_size}:{status.st_mtime_ns}" for n in names]
    digest = hashlib.sha256("|".join(facts).encode()).hexdigest()[:16]
    target = cache_dir() / kind / digest / folder.resolve().name
    if not (target / "config.json").is_file():
        with publish(target, shared=True) as work:
            for name in names:
                link = work / renamed.get(name, name)
                link.parent.mkdir(exist_ok=True)
                link.symlink_to((folder / name).resolve())
            for name, text in texts.items():
                (work / name).write_text(text, encoding="utf-8")
            add(work)
    return target


def _weights_as_transformers_names_them(folder: Path) -> dict[str, str]:
    """The name that a single file of weights has to have; empty where it has it, or an index names the files."""
    files = [p.name for p in folder.glob("*.safetensors")]
    if len(files) != 1 or files[0] == _WEIGHTS or (folder / f"{_WEIGHTS}.index.json").is_file():
        return {}
    return {files[0]: _WEIGHTS}


def _class_by_type(folder: Path) -> str:
    """The tokenizer's class where only the model's type says it, of the types that have LLaMA 2's; else ""."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, TypeError, KeyError):  # said elsewhere
        return ""
    return _LLAMA_2[0] if kind in ("llama", "mistral") else ""


def _known_tokenizer(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Settings of a tokenizer that 4 and 5 understand alike."""
    if raw.get("tokenizer_class") == _NEW_CLASS:
        return {**raw, "tokenizer_class": "PreTrainedTokenizerFast"}
    alone = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if alone and (raw.get("tokenizer_class") or _class_by_type(folder)) in _LLAMA_2:
        # 4's defaults, as LLaMA 2 was trained; 5 begins no text with <s> unless the file says so.
        return {"tokenizer_class": _LLAMA_2[0], "add_bos_token": True, "add_eos_token": False, "legacy": True} | {
            k: v for k, v in raw.items() if v is not None
        }
    return raw
