"""The tokenizer that a GGUF file describes, built from the file's own fields by llama.cpp's rules.

transformers reads tokens and merges and drops the rest in silence: it takes BOS for EOS, adds a BOS that the file rules
out, splits every text by GPT-2's rule and cuts user-defined tokens up.
Try: ``python -m pytest tests/export/test_gguf_tokenizer.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from export.errors import BrokenCheckpointError, UnsupportedModelError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_NUMBERS = r"\p{N}+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_ENDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _ENDS
_LLAMA3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _OTHERS
_QWEN2 = _CONTRACTIONS + _WORDS + r"\p{N}" + _OTHERS
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(suffix: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{suffix}|{start}{_UPPER}+{_LOWER}*{suffix}"
    return f"{words}|{digits}" + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _ENDS


@dataclass(frozen=True)
class _Rule:
    """How a byte-level tokenizer splits text before merging: by each expression in turn."""

    splits: tuple[str, ...]
    ignore_merges: bool = False
    """A piece that is a token as a whole is that token, whatever its merges say."""
    add_bos: bool = False


_LLAMA3_RULE = _Rule((_LLAMA3,), ignore_merges=True, add_bos=True)
_RULES: dict[str, _Rule] = {
    "default": _Rule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, _NUMBERS, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "mellum", "exaone4"), _Rule((_GPT2,))),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _Rule((r"\p{N}", _GPT2))
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA3_RULE),
    **dict.fromkeys(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), _Rule((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), _Rule((_QWEN2,))),
    "deepseek-coder": _Rule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "falcon": _Rule((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "tekken": _Rule((_cased("", r"\p{N}"),), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _Rule((_cased(_CONTRACTIONS + "?", r"\p{N}{1,3}"),))),
}
"""By ``tokenizer.ggml.pre``."""
_KEY = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Types of tokens that are matched in the text before it is split."""
_SPM_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""What a sentencepiece tokenizer's ids are where the file does not say."""


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer with the ids that the file names; ``ends`` are all that end a generation, EOS first."""

    tokenizer: Any
    bos: int | None
    eos: int | None
    pad: int | None
    ends: tuple[int, ...]


def gguf_tokenizer(path: Path, value: Callable[[str], Any]) -> GgufTokenizer:
    """Build the tokenizer of a GGUF file.

    Args:
        path: of the file, for messages.
        value: metadata by key; None where the file does not have it.

    Raises:
        BrokenCheckpointError: an id without a token, a token twice.
        UnsupportedModelError: no tokenizer, or one of a kind or with a pre-tokenizer that is not known.
    """
    kind, tokens = value(_KEY + "model"), value(_KEY + "tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise UnsupportedModelError(
            f"{path} has {f'a tokenizer of kind {kind!r}' if tokens else 'no tokenizer'}; only byte-level BPE ('gpt2') "
            "and sentencepiece ('llama') are read from GGUF: export the original checkpoint folder instead"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(t for i, t in enumerate(tokens) if vocab[t] != i)
        raise BrokenCheckpointError(f"{path} has the token {twice!r} twice; convert it again")

    def number(name: str) -> int | None:
        found = value(f"{_KEY}{name}_token_id")
        if found is None and kind == "llama":
            found = _SPM_IDS.get(name)
        if found is not None and not 0 <= int(found) < len(tokens):
            raise BrokenCheckpointError(
                f"{path} names {found} as its {name} token and has {len(tokens)} tokens; convert it again"
            )
        return None if found is None else int(found)

    bos, eos, unk, pad = (number(name) for name in ("bos", "eos", "unknown", "padding"))
    if kind == "gpt2":
        name = value(_KEY + "pre") or "default"
        if name not in _RULES:
            raise UnsupportedModelError(
                f"{path} splits text by the pre-tokenizer {name!r}, which is not known; export the original checkpoint "
                "folder instead"
            )
        add_bos = _RULES[name].add_bos
        made = _byte_level(vocab, value(_KEY + "merges") or [], _RULES[name])
    else:
        add_bos = True
        stored = value(_KEY + "scores") or []
        if len(stored) != len(tokens):
            raise BrokenCheckpointError(f"{path} has {len(stored)} scores for {len(tokens)} tokens; convert it again")
        scores = dict(zip(tokens, stored, strict=True))
        prefix = value(_KEY + "add_space_prefix") is not False
        made = _sentencepiece(vocab, scores, None if unk is None else tokens[unk], prefix)
    types = value(_KEY + "token_type") or []
    special = [t for t, k in zip(tokens, types, strict=False) if k in (_UNKNOWN, _CONTROL)]
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    own = [t for t, k in zip(tokens, types, strict=False) if k == _USER_DEFINED]
    made.add_tokens([AddedToken(t, normalized=False, special=False) for t in own])
    said = value(_KEY + "add_bos_token")
    around = [(bos, "BOS", add_bos if said is None else said), (eos, "EOS", bool(value(_KEY + "add_eos_token")))]
    for token, word, added in around:
        if added and token is None:
            raise BrokenCheckpointError(f"{path} adds {word} to every text and names no {word} token; convert it again")
    before, after = ([tokens[i]] if i is not None and added else [] for i, _, added in around)
    if before or after:
        made.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=[(t, vocab[t]) for t in {*before, *after}],
        )
    names = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        clean_up_tokenization_spaces=False,
        **{name: tokens[i] for name, i in names.items() if i is not None},
    )
    tokenizer.chat_template = _templates(value)
    ends = dict.fromkeys(i for i in (eos, number("eot"), number("eom")) if i is not None)
    return GgufTokenizer(tokenizer, bos, eos, pad, tuple(ends))


def _byte_level(vocab: dict[str, int], merges: list[str], rule: _Rule) -> Tokenizer:
    pairs = dict.fromkeys((m[:cut], m[cut + 1 :]) for m in merges if (cut := m.find(" ", 1)) > 0)
    made = Tokenizer(models.BPE(vocab, list(pairs), ignore_merges=rule.ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # onnxruntime-genai knows runs of digits in this form only.
            *(
                pre_tokenizers.Digits() if text == _NUMBERS else pre_tokenizers.Split(Regex(text), "isolated")
                for text in rule.splits
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(vocab: dict[str, int], scores: dict[str, float], unknown: str | None, prefix: bool) -> Tokenizer:
    """As transformers converts LLaMA's: the pair whose joined token has the best score is merged first."""
    merges = generate_merges(vocab, scores)
    made = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    blanks = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks] if prefix else [blanks])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return made


def _templates(value: Callable[[str], Any]) -> str | dict[str, str] | None:
    """The chat template; all of them by name where there are several."""
    default: str | None = value("tokenizer.chat_template")
    named = {name: value(f"tokenizer.chat_template.{name}") for name in value("tokenizer.chat_templates") or []}
    return {**({"default": default} if default else {}), **named} if named else default
