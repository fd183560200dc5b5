"""The evaluation data: five JSONL files that ship with the project, or the user's own.

Try: ``python -c "from bench.data.loading import load_shipped; print(len(load_shipped().items))"``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.data.hub import load_hf
from bench.data.items import FIELDS, Dataset, Item
from bench.errors import DatasetError

DATA = Path(__file__).parent


def _item(path: Path, number: int, raw: Any) -> Item:
    def fail(what: str) -> DatasetError:
        return DatasetError(f"{path}, line {number}: {what}; see bench/data/README.md for the form")

    if not isinstance(raw, dict):
        raise fail("not a JSON object")
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        half = ascii(e.object[e.start])[1:-1]
        raise fail(f"holds half of a character ({half} alone); write the whole character") from None
    task = raw.get("task")
    if task not in FIELDS:
        raise fail(f"task {task!r} must be one of {', '.join(FIELDS)}")
    wanted = FIELDS[task]
    for key in wanted:
        if not isinstance(raw.get(key), str) or not raw[key].strip():
            raise fail(f"{key!r} is missing or not a text")
    references = raw.get("references", [])
    if task != "perplexity":
        good = isinstance(references, list) and references and all(isinstance(r, str) and r.strip() for r in references)
        if not good:
            raise fail("'references' must be a list of at least one text")
    item_id = raw.get("id", f"line-{number}")
    return Item(str(item_id), task, {k: raw[k] for k in wanted}, tuple(references))


def _read(path: Path) -> tuple[list[Item], bytes]:
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as e:
        raise DatasetError(f"cannot read the dataset {path}: {e.strerror}; pass a .jsonl file") from None
    except UnicodeDecodeError as e:
        raise DatasetError(f"{path} is not UTF-8 (byte {e.start}); save it as UTF-8") from None
    items: list[Item] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except ValueError as e:
            raise DatasetError(f"{path}, line {number}: not valid JSON ({e}); one object a line") from None
        if number == 1 and isinstance(raw, dict) and "dataset" in raw:
            continue
        items.append(_item(path, number, raw))
    if not items:
        raise DatasetError(f"the dataset {path} is empty; give at least one item (see bench/data/README.md)")
    return items, content


def load_file(path: Path) -> Dataset:
    """The user's own JSONL file.

    Raises:
        DatasetError: unreadable, empty, or a malformed line (named by its number).
    """
    items, content = _read(path)
    return Dataset(path.name, hashlib.sha256(content).hexdigest(), tuple(items))


def load_shipped() -> Dataset:
    """The five files of this project."""
    items: list[Item] = []
    digest = hashlib.sha256()
    for name in ("qa", "summarization", "translation", "rewriting", "prose"):
        more, content = _read(DATA / f"{name}.jsonl")
        items += more
        digest.update(content)
    return Dataset("llama-onnx-bench data", digest.hexdigest(), tuple(items))


OWN = "own"
"""The project's data, where ``--dataset`` joins it with others."""


def joined(parts: Sequence[Dataset]) -> Dataset:
    """Several sets as one, in their order: more text where the first ones leave a metric undecided."""
    if len(parts) == 1:
        return parts[0]
    digest = hashlib.sha256("".join(p.sha256 for p in parts).encode()).hexdigest()
    # Ids are found by again, and every file may have its line-1.
    items = tuple(replace(i, id=f"{k}/{i.id}" if k else i.id) for k, p in enumerate(parts) for i in p.items)
    return Dataset(" + ".join(p.name for p in parts), digest, items)


def load_dataset(text: str | Path | None) -> Dataset:
    """What ``--dataset`` names: nothing or ``own`` (the project's data), a JSONL file, or ``hf:...``
    (:mod:`bench.data.hub`); several of these with ``+`` between them are one, as in ``own+mine.jsonl``.

    Raises:
        DatasetError: see :func:`load_file` and :func:`bench.data.hub.load_hf`; a set that is named twice.
    """
    parts = _parts(OWN if text is None else str(text))
    if len(set(parts)) < len(parts):
        raise DatasetError(f"{text} names a set twice, and the same text twice is no more evidence; name each once")
    return joined([_load_one(part) for part in parts])


def _parts(text: str) -> list[str]:
    """Parts between ``+`` signs, unless a file has such a name."""
    whole = Path(text).expanduser()
    return [text] if "+" not in text or whole.exists() else text.split("+")


def _load_one(text: str) -> Dataset:
    if text == OWN:
        return load_shipped()
    if text.startswith("hf:"):
        return load_hf(text)
    return load_file(Path(text).expanduser())
