"""What a chat template of the model's maker makes of a prompt, or why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import SessionError
from runtime.text import encode, load_tokenizer

ASKS = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def tokenizer(exports: Callable[..., Path]) -> Any:
    return load_tokenizer(exports())


def test_a_default_among_named_templates_is_taken(tokenizer: Any) -> None:
    tokenizer.chat_template = {"tool_use": "{{ 1 + none }}", "default": ASKS}
    assert encode(tokenizer, "the cat", chat=True) == tokenizer("the cat", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"rag": ASKS, "tool_use": ASKS}, "templates for rag, tool_use only and no default one; leave out --chat"),
        ("{{ messages[0].content + 1 }}", r"refuses this prompt \(can only concatenate str .*\); leave out --chat"),
        ("{{ messages[5].content }}", "refuses this prompt"),
        ("{{ 1 / 0 }}", r"refuses this prompt \(division by zero\)"),
        ("{% for %}", "refuses this prompt"),
        ("", "has no chat template"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(tokenizer: Any, template: object, words: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(SessionError, match=words):
        encode(tokenizer, "the cat", chat=True)
