"""Both spellings, whichever transformers is installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.newer_config import readable
from export.spelling import cache_in, cache_keyword, embeddings_in, fill_defaults, rope_of, scale_rope

YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"rope_theta": 5.0, "rope_scaling": None}, {"rope_theta": 5.0, "rope_type": "default"}),
        ({"rope_theta": 5.0, "rope_scaling": YARN}, {"rope_theta": 5.0, **YARN}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, {"rope_theta": 5.0, "rope_type": "default"}),
        ({"rope_parameters": {"rope_theta": 5.0, **YARN}}, {"rope_theta": 5.0, **YARN}),
        ({"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.5, "rope_type": "default"}),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            {"partial_rotary_factor": 0.5, "rope_type": "default"},
        ),
        ({}, {"rope_type": "default"}),
    ],
)
def test_rotary_settings(said: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert rope_of(SimpleNamespace(**said)) == {"rope_theta": None, "partial_rotary_factor": None, **wanted}


@pytest.mark.parametrize("scaling", [{}, YARN])
def test_a_scaling_leaves_the_base(scaling: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(rope_theta=77.0)
    scale_rope(config, scaling)
    wanted = {"rope_theta": 77.0, "partial_rotary_factor": None, "rope_type": "default", **scaling}
    assert rope_of(config) == wanted
    assert rope_of(LlamaConfig.from_dict(config.to_dict())).items() >= wanted.items()


def test_the_cache_by_either_name() -> None:
    from transformers import DynamicCache, LlamaForCausalLM

    def new(input_ids: int, cache: int) -> None: ...
    def old(input_ids: int, past_key_values: int) -> None: ...

    assert (cache_keyword(new), cache_keyword(old)) == ("cache", "past_key_values")
    assert cache_in({"cache": 1}) == cache_in({"past_key_values": 1, "x": 2}) == 1
    assert embeddings_in({"inputs_embeds": 1}) == embeddings_in({"input_embeds": 1}) == 1
    assert cache_keyword(LlamaForCausalLM.forward) in ("cache", "past_key_values")
    assert DynamicCache  # both have it


def test_defaults_of_a_generation_fill_what_nobody_said() -> None:
    from transformers import GenerationConfig

    found = fill_defaults(GenerationConfig(temperature=0.5))
    assert (found.temperature, found.top_k, found.top_p, found.do_sample, found.max_length) == (0.5, 50, 1.0, False, 20)


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "LlamaTokenizer"}, {"add_bos_token": False}], ids=str)
def test_a_sentencepiece_model_alone_is_read_as_the_library_reads_it(
    settings: dict[str, Any] | None,
    checkpoints: Callable[..., Path],
    sentencepiece_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers 5 begins a text with <s> only where the settings say so."""
    import sentencepiece
    from transformers import AutoTokenizer

    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "llama-2"
    folder.mkdir()
    for path in (checkpoints() / "config.json", sentencepiece_model):
        shutil.copyfile(path, folder / path.name)
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    begin = [] if settings and "add_bos_token" in settings else [1]
    tokenizer = AutoTokenizer.from_pretrained(readable(folder))
    for text in ("the cat sat on 12 mats", "naïve 🙂", "why  big\n dogs"):
        assert tokenizer(text)["input_ids"] == begin + pieces.encode(text), text


def test_other_tokenizers_are_left_alone(sentencepiece_model: Path, tmp_path: Path) -> None:
    shutil.copyfile(sentencepiece_model, tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    assert readable(tmp_path) == tmp_path
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    assert readable(tmp_path) == tmp_path
