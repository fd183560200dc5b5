"""The tokenizer does what the GGUF file says; the tokenizers that such files are made of are the oracle."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.errors import BrokenCheckpointError, UnsupportedModelError
from export.gguf_tokenizer import GgufTokenizer, gguf_tokenizer

LEARNT = ["the cat sat on 12345 mats in 2024, the dog didn't  see 1000000", "It's RAINING; they'll say 777", "a\n\nb"]
TEXTS = [
    "the cat sat on 12345 mats, 1000000 x2024",
    "I'LL don't  see\n\n\n the   rain\r\n end ",
    "naïve 你好 🙂 １２３ ²",
    "<s>the<|own|>cat</s>",
    "",
    "  the",
]
DIGIT = r"\p{N}"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(split: Callable[[Any], Any]) -> Any:
    """A byte-level tokenizer of 400 tokens that splits text as published tokenizers do."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = split(pre_tokenizers)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator(LEARNT * 3, trainer)
    made.add_tokens([AddedToken("<|own|>", normalized=False)])
    return made


def fields(made: Any, **changes: Any) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for it."""
    raw = json.loads(made.to_str())
    vocab = made.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=lambda t: vocab[t])
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, "<|own|>": 4}
    said = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": [kinds.get(t, 1) for t in tokens],
        "merges": [" ".join(m) for m in raw["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    return {k if k.startswith("tokenizer.") else f"tokenizer.ggml.{k}": v for k, v in said.items() if v is not None}


def read(said: dict[str, Any]) -> GgufTokenizer:
    return gguf_tokenizer(Path("a.gguf"), said.get)


def byte_level(*splits: str, regex: bool = False) -> Callable[[Any], Any]:
    def make(p: Any) -> Any:
        from tokenizers import Regex

        parts = [p.Split(Regex(s), "isolated") for s in splits]
        return p.Sequence([*parts, p.ByteLevel(add_prefix_space=False, use_regex=regex)])

    return make


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("gpt-2", byte_level(regex=True)),
        ("smollm", byte_level(DIGIT, regex=True)),
        ("llama-bpe", byte_level(LLAMA3)),
        ("smaug-bpe", byte_level(LLAMA3)),
        ("qwen2", byte_level(LLAMA3.replace("{1,3}", ""))),
    ],
)
def test_text_is_split_as_the_file_says(name: str, original: Callable[[Any], Any]) -> None:
    made = trained(original)
    ours = read(fields(made, pre=name, add_bos_token=False)).tokenizer
    for text in [*TEXTS, *LEARNT]:
        ids = ours(text)["input_ids"]
        assert ids == made.encode(text).ids, text
        assert ours.decode(ids) == text


def test_llama_3_takes_three_digits_at_a_time_and_whole_tokens_first() -> None:
    made = trained(byte_level(LLAMA3))
    said = fields(made, pre="llama-bpe")
    for word in ("999", "Ġzebra"):  # tokens that no merge leads to
        said["tokenizer.ggml.tokens"].append(word)
        said["tokenizer.ggml.token_type"].append(1)
    ours = read(said).tokenizer
    assert ours.tokenize("99912 zebra")[0] == "999"
    assert ours.tokenize("99912 zebra")[-1] == "Ġzebra"
    assert ours("the")["input_ids"][0] == 1  # BOS is LLaMA 3's default
    assert "Ġzebra" not in read({**said, "tokenizer.ggml.pre": "smaug-bpe"}).tokenizer.tokenize("99912 zebra")


def test_ids_are_the_files() -> None:
    made = trained(byte_level(regex=True))
    said = fields(made, pre="gpt-2", padding_token_id=3, eot_token_id=4)
    found = read(said)
    tokenizer = found.tokenizer
    assert (found.bos, found.eos, found.pad, found.ends) == (1, 2, 3, (2, 4))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.pad_token_id == 3
    (own,) = tokenizer("<|own|>")["input_ids"]  # one id, not its letters
    assert tokenizer.decode([own], skip_special_tokens=True) == "<|own|>"
    assert tokenizer.decode([2], skip_special_tokens=True) == ""
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<s>x</s>"
    nothing = read(fields(made, pre="gpt-2", eos_token_id=None, bos_token_id=None, unknown_token_id=None))
    assert (nothing.bos, nothing.eos, nothing.ends, nothing.tokenizer.eos_token) == (None, None, (), None)


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("eos", [None, True, False])
def test_what_is_added_around_a_text(bos: bool | None, eos: bool | None) -> None:
    made = trained(byte_level(regex=True))
    ours = read(fields(made, pre="gpt-2", add_bos_token=bos, add_eos_token=eos)).tokenizer
    plain = made.encode("the cat").ids
    assert ours("the cat")["input_ids"] == [*([1] if bos else []), *plain, *([2] if eos else [])]
    assert ours("the cat", add_special_tokens=False)["input_ids"] == plain


def test_several_templates() -> None:
    made = trained(byte_level(regex=True))
    one = fields(made, **{"tokenizer.chat_template": "a"})
    assert read(one).tokenizer.chat_template == "a"
    several = {**one, "tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "b"}
    assert read(several).tokenizer.chat_template == {"default": "a", "tool_use": "b"}
    assert read(fields(made)).tokenizer.chat_template is None


@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece(prefix: bool | None, sentencepiece_model: Path) -> None:
    """Against the library itself (transformers 5 adds no blank to a text that begins with one); it has no option
    for texts without a blank before them, there against transformers."""
    import sentencepiece
    from transformers import LlamaTokenizerFast

    given = {} if prefix is not False else {"add_prefix_space": False}
    theirs = LlamaTokenizerFast.from_pretrained(sentencepiece_model.parent, legacy=True, add_bos_token=True, **given)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    n = pieces.get_piece_size()
    kind = {pieces.is_unknown: 2, pieces.is_control: 3, pieces.is_byte: 6}
    said = {
        "model": "llama",
        "tokens": [pieces.id_to_piece(i) for i in range(n)],
        "scores": [pieces.get_score(i) for i in range(n)],
        "token_type": [next((k for test, k in kind.items() if test(i)), 1) for i in range(n)],
        "add_space_prefix": prefix,
        "eos_token_id": 2,
    }
    found = read({f"tokenizer.ggml.{k}": v for k, v in said.items() if v is not None})
    assert (found.bos, found.eos, found.tokenizer.unk_token_id) == (1, 2, 0)
    for text in [*TEXTS[:3], *TEXTS[4:], *LEARNT, "a<s>b</s> c"]:
        ids = theirs(text)["input_ids"]
        if prefix is not False:
            parts = [{"<s>": [1], "</s>": [2]}.get(part) or pieces.encode(part) for part in re.split("(</?s>)", text)]
            ids = [1, *itertools.chain(*parts)]
        assert found.tokenizer(text)["input_ids"] == ids, text
        assert found.tokenizer.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"pre": "klingon"}, UnsupportedModelError, "pre-tokenizer 'klingon', which is not known"),
        ({"model": "bert"}, UnsupportedModelError, "a tokenizer of kind 'bert'"),
        ({"tokens": None}, UnsupportedModelError, "has no tokenizer"),
        ({"eos_token_id": 5000}, BrokenCheckpointError, "names 5000 as its eos token and has 3"),
        ({"add_eos_token": True, "eos_token_id": None}, BrokenCheckpointError, "names no EOS token"),
        ({"tokens": ["a", "b", "a"]}, BrokenCheckpointError, "the token 'a' twice"),
    ],
)
def test_what_cannot_be_represented(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read(fields(trained(byte_level(regex=True)), **changes))
