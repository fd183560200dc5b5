"""Text <-> token ids for streaming: the folder's tokenizer, chat template, and pieces that are whole characters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.errors import SessionError


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of an exported folder.

    Raises:
        SessionError: the folder has none.
    """
    from transformers import AutoTokenizer

    path = Path(folder).expanduser()
    if path.is_dir() and not ((path / "tokenizer.json").is_file() or (path / "tokenizer.model").is_file()):
        raise SessionError(f"{path} has no tokenizer; export a checkpoint folder that holds tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as e:
        if (path / "tokenizer.json").is_file() and "does not exist" in str(e):
            return _without_its_class(path)
        first = str(e).splitlines()[0][:160]
        raise SessionError(f"the tokenizer of {path} cannot be loaded ({first}); export again") from None


def _without_its_class(path: Path) -> Any:
    """A tokenizer whose configuration names a class of a newer transformers; its tokenizer.json says all there is."""
    from transformers import PreTrainedTokenizerFast

    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {k: v for k, v in config.items() if k.endswith("_token") and isinstance(v, str)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), **special)
    if (path / "chat_template.jinja").is_file():
        tokenizer.chat_template = (path / "chat_template.jinja").read_text(encoding="utf-8")
    return tokenizer


def encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt, through the chat template when asked for.

    Raises:
        SessionError: a chat was asked for and the tokenizer has no template.
    """
    if not chat:
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    if not tokenizer.chat_template:
        raise SessionError("the model has no chat template; leave out --chat")
    message = [{"role": "user", "content": prompt}]
    templated: list[int] = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    return templated


class StreamDecoder:
    """Turns tokens into text as they come, holding back bytes of a character that is not complete yet."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._printed = ""

    def push(self, token: int) -> str:
        """The new text after one more token, perhaps none yet."""
        self._ids.append(token)
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        if text.endswith("\ufffd"):
            return ""
        piece = text[len(self._printed) :]
        self._printed = text
        return piece

    def finish(self) -> str:
        """What was held back."""
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True)) if self._ids else ""
        return text[len(self._printed) :]
