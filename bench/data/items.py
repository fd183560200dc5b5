"""What an evaluation set is made of: items with their request in words, and how texts are cut into chunks.

Try: ``python -c "from bench.data.loading import load_shipped; print(load_shipped().items[0].instruction)"``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import SessionError
from runtime.text import encode

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

    def texts(self) -> list[str]:
        """Every text of every item."""
        return self.prose() + self.sources()

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


def prompt_ids(item: Item, tokenizer: Any) -> list[int]:
    """Token ids of an item's request.

    Questions are completed as plain text behind one worked example, as evaluation harnesses do: small chat models
    answer in whole sentences otherwise, and exact match says nothing. The other tasks go through the chat template
    where there is one that takes a single message of the user's.
    """
    if item.task == "qa":
        return encode(tokenizer, item.instruction, chat=False)
    try:
        return encode(tokenizer, item.instruction, chat=True)
    except SessionError:
        return encode(tokenizer, f"{item.instruction}\n\nAnswer:", chat=False)


def chunked(ids: Sequence[int], window: int, least: int = 32) -> list[list[int]]:
    """Cut one text into windows; a tail shorter than ``least`` tokens is dropped."""
    pieces = [list(ids[k : k + window]) for k in range(0, len(ids), window)]
    return [p for p in pieces if len(p) >= min(least, window)]
