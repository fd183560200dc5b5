"""The evaluation data: five JSONL files that ship with the project, or the user's own.

Try: ``python -c "from bench.data.loading import load_shipped; print(len(load_shipped().items))"``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.errors import DatasetError

DATA = Path(__file__).parent
FIELDS: dict[str, tuple[str, ...]] = {
    "qa": ("context", "question"),
    "summarization": ("text",),
    "translation": ("text", "source_lang", "target_lang"),
    "rewriting": ("instruction", "text"),
    "perplexity": ("text",),
    "cnn_dailymail": ("text",),
}
LANGUAGES = {
    "en": "English",
    "fr": "French",
    "de": "German",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
    "cs": "Czech",
    "hi": "Hindi",
    "ru": "Russian",
}
NEW_TOKENS = {"qa": 24, "summarization": 64, "translation": 56, "rewriting": 48, "cnn_dailymail": 128}
"""Most tokens generated for an item of each task: about twice what the references need (CNN/DailyMail: MLPerf's)."""
SUMMARIES = ("summarization", "cnn_dailymail")
"""Tasks that summarise: the second is scored as MLPerf scores it (:func:`bench.gate.metrics.rouge_mlperf`)."""
QA_EXAMPLE = "Text: The market opens at nine on Sunday.\nQuestion: When does the market open?\nAnswer: at nine\n\n"


@dataclass(frozen=True)
class Item:
    """One line of a dataset. ``fields`` holds the task's own keys (see :data:`FIELDS`)."""

    id: str
    task: str
    fields: dict[str, str]
    references: tuple[str, ...]

    @property
    def group(self) -> str:
        """What is scored together: the task, for translation with its direction (``translation en-fr``)."""
        if self.task == "translation":
            return f"translation {self.fields['source_lang']}-{self.fields['target_lang']}"
        return self.task

    @property
    def instruction(self) -> str:
        """The request in plain words: a user message, for questions a text to complete with one worked example."""
        f = self.fields
        if self.task == "qa":
            return f"{QA_EXAMPLE}Text: {f['context']}\nQuestion: {f['question']}\nAnswer:"
        if self.task in SUMMARIES:
            return f"Summarize the following text in one or two sentences.\n\n{f['text']}"
        if self.task == "translation":
            target = LANGUAGES.get(f["target_lang"], f["target_lang"])
            return f"Translate the sentence into {target}. Reply with the translation only.\n\n{f['text']}"
        return f"{f['instruction']} Reply with the new sentence only.\n\n{f['text']}"


@dataclass(frozen=True)
class Dataset:
    """Items in file order; ``name`` and ``sha256`` (hex, over the files' bytes) identify them in records."""

    name: str
    sha256: str
    items: tuple[Item, ...]

    def prose(self) -> list[str]:
        """Texts over which perplexity is measured."""
        return [i.fields["text"] for i in self.items if i.task == "perplexity"]

    def calibration(self) -> list[str]:
        """Texts to calibrate quantisers on: the sources of questions and summaries, never the prose that is scored."""
        texts = [i.fields["context"] for i in self.items if i.task == "qa"]
        return list(dict.fromkeys(texts + [i.fields["text"] for i in self.items if i.task in SUMMARIES]))

    def sources(self, without: Collection[str] = ()) -> list[str]:
        """Texts of the tasks, where the prose has too few tokens: sources and references of each task, joined."""
        texts: dict[tuple[str, str], dict[str, None]] = {}
        for item in self.items:
            if item.task != "perplexity":
                source = item.fields.get("context") or item.fields["text"]
                texts.setdefault((item.task, "source"), {})[source] = None
                texts.setdefault((item.task, "reference"), {}).update(dict.fromkeys(item.references))
        return ["\n".join(t for t in found if t not in without) for found in texts.values()]

    def groups(self, limit: int | None = None) -> dict[str, list[Item]]:
        """Generation items by :attr:`Item.group`, at most ``limit`` of each, spread evenly over the file."""
        out: dict[str, list[Item]] = {}
        for item in self.items:
            if item.task != "perplexity":
                out.setdefault(item.group, []).append(item)
        if limit is not None:
            out = {g: [v[k * len(v) // min(limit, len(v))] for k in range(min(limit, len(v)))] for g, v in out.items()}
        return out


def _item(path: Path, number: int, raw: Any) -> Item:
    def fail(what: str) -> DatasetError:
        return DatasetError(f"{path}, line {number}: {what}; see bench/data/README.md for the form")

    if not isinstance(raw, dict):
        raise fail("not a JSON object")
    task = raw.get("task")
    if task not in FIELDS:
        raise fail(f"task {task!r} is none of {', '.join(FIELDS)}")
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
    """Several sets as one, in their order: more text where the first ones leave a figure undecided."""
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
        from bench.data.hub import load_hf

        return load_hf(text)
    return load_file(Path(text).expanduser())


def prompt_ids(item: Item, tokenizer: Any) -> list[int]:
    """Token ids of an item's request.

    Questions are completed as plain text behind one worked example, as evaluation harnesses do: small chat models
    answer in whole sentences otherwise, and exact match says nothing. The other tasks go through the chat template
    where there is one.
    """
    if item.task == "qa":
        completed: list[int] = tokenizer(item.instruction)["input_ids"]
        return completed
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": item.instruction}]
        ids: list[int] = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        return ids
    plain: list[int] = tokenizer(item.instruction + "\n\nAnswer:")["input_ids"]
    return plain


def chunked(ids: Sequence[int], window: int, least: int = 32) -> list[list[int]]:
    """Cut one text into windows; a tail shorter than ``least`` tokens is dropped."""
    pieces = [list(ids[k : k + window]) for k in range(0, len(ids), window)]
    return [p for p in pieces if len(p) >= min(least, window)]
