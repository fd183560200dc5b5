"""Text <-> token ids for streaming: the folder's tokenizer, chat template, and pieces that are whole characters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.manifest import VOCABULARIES, files_of, first_line
from runtime.errors import SessionError


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of an exported folder.

    Raises:
        SessionError: the folder has none.
    """
    from transformers import AutoTokenizer

    path = Path(folder).expanduser()
    if path.is_dir() and not files_of(path, VOCABULARIES):
        raise SessionError(f"{path} has no tokenizer; export a checkpoint folder that holds tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as e:
        if (path / "tokenizer.json").is_file() and "does not exist" in str(e):
            return _without_its_class(path)
        if "trust_remote_code" in str(e):
            raise SessionError(f"the tokenizer of {path} brings Python code of its own, which is never run") from None
        raise SessionError(f"the tokenizer of {path} cannot be loaded ({first_line(e)}); export again") from None


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
        SessionError: a chat was asked for and the tokenizer has no template, or one that raises.
    """
    ids: list[int]
    if not chat:
        ids = tokenizer(prompt)["input_ids"]
        return ids
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise SessionError("the model has no chat template; leave out --chat")
    if isinstance(template, dict) and "default" not in template:
        raise SessionError(
            f"the model has chat templates for {', '.join(template)} only and no default one; leave out --chat"
        )
    message = [{"role": "user", "content": prompt}]
    try:
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    except Exception as e:  # a template is a program of the model's maker: it raises what it likes
        raise SessionError(
            f"the model's chat template refuses this prompt ({first_line(e)}); leave out --chat"
        ) from None
    return ids


class StreamDecoder:
    """Turns tokens into text as they come, holding back bytes of a character that is not complete yet.

    Only the tokens since the last whole piece (and that piece, for what the two join to) are decoded again. ``after``
    are the tokens before the first: a sentencepiece tokenizer takes the blank off a text that begins with none.
    """

    def __init__(self, tokenizer: Any, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = list(after)
        self._shown = len(self._ids)
        self._said = self._text().rstrip("\ufffd")

    def push(self, token: int) -> str:
        """The new text after one more token, perhaps none yet."""
        self._ids.append(token)
        text = self._text()
        whole = text.rstrip("\ufffd")  # a character whose bytes are not all there yet
        piece = whole[len(self._said) :]
        if not piece:
            return ""
        self._said = whole
        if whole == text:
            # The next window starts with the last piece: what stands between two pieces (a blank) needs both.
            self._ids = self._ids[self._shown :]
            self._shown = len(self._ids)
            self._said = self._text()
        return piece

    def finish(self) -> str:
        """What was held back."""
        return self._text()[len(self._said) :]

    def _text(self) -> str:
        if not self._ids:
            return ""
        # Cleaning up joins what was said already to what comes ("' n" to "'n").
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TextStream:
    """A row's text as its tokens come, up to the first stop string.

    Text that may still become a stop string is held back; what follows one is dropped, it included.

    Args:
        tokenizer: of the folder.
        stops: strings, none empty.
        silent: tokens that are not text (the end tokens).
        after: the prompt, which the text continues.

    Raises:
        SessionError: an empty stop string.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), silent: Sequence[int] = (), after: Sequence[int] = ()
    ) -> None:
        if not all(stops):
            raise SessionError("an empty stop string would end every text at once; leave it out")
        self._decoder = StreamDecoder(tokenizer, after)
        self._stops, self._silent = tuple(stops), frozenset(silent)
        self._held = ""
        self.stopped = False
        self.pushed = 0

    def push(self, token: int) -> str:
        """The new text that is certain after one more token; none once :attr:`stopped`."""
        self.pushed += 1
        if self.stopped or token in self._silent:
            return ""
        return self._take(self._decoder.push(token))

    def _take(self, piece: str) -> str:
        if not self._stops:
            return piece
        self._held += piece
        places = [p for p in (self._held.find(stop) for stop in self._stops) if p >= 0]
        if places:
            self.stopped = True
            sure, self._held = self._held[: min(places)], ""
            return sure
        most = max(map(len, self._stops)) - 1
        tails = (self._held[-n:] for n in range(min(most, len(self._held)), 0, -1))
        held = next((tail for tail in tails if any(stop.startswith(tail) for stop in self._stops)), "")
        cut = len(self._held) - len(held)
        sure, self._held = self._held[:cut], self._held[cut:]
        return sure

    def finish(self) -> str:
        """What was held back, once no token follows."""
        if self.stopped:
            return ""
        rest = self._take(self._decoder.finish())
        rest, self._held = rest + self._held, ""
        return rest
