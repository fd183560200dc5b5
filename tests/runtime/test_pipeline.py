"""A session as the model of transformers.pipeline, held against the PyTorch model in the same pipeline."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runtime
from runtime.errors import SessionError

Get = Callable[..., Path]
PROMPTS = ["the cat sat on the mat and", "why", "a big dog in the rain was"]


@pytest.fixture
def pipelines(exports: Get, checkpoints: Get) -> Any:
    from transformers import AutoTokenizer, LlamaForCausalLM, pipeline

    tokenizer = AutoTokenizer.from_pretrained(exports(), padding_side="left")
    tokenizer.pad_token = "</s>"
    theirs = LlamaForCausalLM.from_pretrained(checkpoints())
    with runtime.load(exports(), threads=1) as ours:
        yield tuple(pipeline("text-generation", model=m, tokenizer=tokenizer) for m in (ours, theirs))


def test_load_is_at_package_level_and_costs_nothing_before() -> None:
    code = (
        "import sys, runtime; runtime.load; print(sorted({'torch', 'onnxruntime', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "load" in dir(runtime)
    with pytest.raises(AttributeError, match="nothing"):
        _ = runtime.nothing


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("whole", [True, False])
def test_greedy_text_equals_the_pytorch_models(pipelines: Any, batch_size: int, whole: bool) -> None:
    """Batches are padded on the left by the pipeline."""
    ours, theirs = (
        p(PROMPTS, do_sample=False, max_new_tokens=20, return_full_text=whole, batch_size=batch_size) for p in pipelines
    )
    assert ours == theirs
    assert ours[0][0]["generated_text"].startswith(PROMPTS[0]) == whole


def test_options_reach_the_loop(pipelines: Any) -> None:
    ours, theirs = (p(PROMPTS[0], do_sample=False, repetition_penalty=1.5, max_new_tokens=30) for p in pipelines)
    assert ours == theirs
    plain = pipelines[0](PROMPTS[0], do_sample=False, max_new_tokens=30)
    assert plain != ours
    ours, theirs = (p(PROMPTS[0], do_sample=False, max_length=12, max_new_tokens=None) for p in pipelines)
    assert ours == theirs


def test_sampling_is_repeated_by_the_seed(pipelines: Any) -> None:
    from transformers import set_seed

    def draw(seed: int, **options: Any) -> Any:
        set_seed(seed)
        return pipelines[0](PROMPTS, do_sample=True, max_new_tokens=25, **options)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1, top_k=1) == draw(2, top_k=1) == pipelines[1](PROMPTS, do_sample=True, top_k=1, max_new_tokens=25)


def test_the_pipelines_defaults_are_the_same(pipelines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(p: Any) -> dict[str, Any]:
        said: dict[str, Any] = {}
        with monkeypatch.context() as m:
            m.setattr(p.model, "generate", lambda input_ids, **options: said.update(options) or input_ids)
            p(PROMPTS[0])
        config, _ = p.model._prepare_generation_config(said.pop("generation_config", None), **said)
        found: dict[str, Any] = config.to_dict()
        return found

    ours, theirs = (settings(p) for p in pipelines)
    for name in ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "eos_token_id"):
        a, b = ours[name], theirs[name]
        assert (a if isinstance(a, list) else [a]) == (b if isinstance(b, list) else [b]), name


def test_what_it_cannot_do_is_said(pipelines: Any) -> None:
    ours = pipelines[0]
    for options, words in (
        ({"num_beams": 2}, "num_beams=2 is not supported"),
        ({"prefix_allowed_tokens_fn": print}, "no option 'prefix_allowed_tokens_fn'"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"exponential_decay_length_penalty": (5, 1.5)}, "exponential_decay_length_penalty"),
        ({"do_smaple": True}, "do_smaple"),
        ({"max_new_tokens": 400}, "exceed the context of 160"),
    ):
        with pytest.raises((SessionError, TypeError), match=words):
            ours(PROMPTS[0], **options)


def test_no_error_is_logged_for_the_class(exports: Get, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer, logging, pipeline

    logging.set_verbosity_error()
    with runtime.load(exports(), threads=1) as model:
        pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(exports()))
    assert "not supported" not in capfd.readouterr().err


@pytest.mark.parametrize("length", [3, 19, 25])
def test_without_a_limit_as_many_as_transformers(length: int, exports: Get, checkpoints: Get) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import runtime

    ids = torch.arange(5, 5 + length)[None]
    theirs = AutoModelForCausalLM.from_pretrained(checkpoints()).eval()
    wanted = theirs.generate(ids, do_sample=False, eos_token_id=None)
    with runtime.load(exports(), threads=1) as ours:
        assert ours.generate(ids, do_sample=False, eos_token_id=None).tolist() == wanted.tolist()
        assert ours.generate(ids[:, :3], do_sample=False, eos_token_id=None, max_length=20).shape[1] == 20
