"""Sampling against transformers' own processors, and its statistics; batches that shrink; stop strings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import SessionError
from runtime.generate import generate, stream
from runtime.sampling import Chooser, Sampling, distribution, drawn, penalised
from runtime.text import TextStream

SETTINGS = [
    Sampling(0.7),
    Sampling(1.0, top_k=20),
    Sampling(1.3, top_p=0.8),
    Sampling(0.9, top_k=30, top_p=0.9, repetition_penalty=1.4),
    Sampling(1.0, top_k=5, top_p=0.05),
]


def processed(logits: Any, seen: list[int], s: Sampling) -> Any:
    """Probabilities by transformers' own processors, in the order in which generate() builds them."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM, LogitsProcessorList
    from transformers.models.llama import LlamaConfig

    config = LlamaConfig(
        vocab_size=len(logits), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    options = GenerationConfig(
        do_sample=True,
        temperature=s.temperature,
        top_k=s.top_k or None,
        top_p=s.top_p,
        repetition_penalty=s.repetition_penalty,
        eos_token_id=None,
    )
    processors: Any = LlamaForCausalLM(config)._get_logits_processor(options, logits_processor=LogitsProcessorList())
    scores = processors(torch.tensor([seen]), torch.tensor(logits)[None].float())
    return torch.softmax(scores.double(), -1)[0].numpy()


def ours(logits: Any, seen: list[int], s: Sampling) -> Any:
    mask = np.zeros((1, len(logits)), bool)
    mask[0, seen] = True
    ids, p = distribution(penalised(logits[None], mask, s.repetition_penalty)[0], s)
    whole = np.zeros(len(logits))
    whole[ids] = p
    return whole


@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_probabilities_are_those_of_transformers(s: Sampling) -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        logits = rng.normal(0, 3, 300).astype(np.float32)
        logits[7] = logits[8] = np.sort(logits)[-s.top_k or -1]  # a tie at top-k's edge
        seen = rng.integers(0, 300, 40).tolist()
        if s.top_p < 1:
            logits[7] -= 1.0  # ties at top-p's edge are anyone's choice
        theirs = processed(logits, seen, s)
        np.testing.assert_allclose(ours(logits, seen, s), theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("s", SETTINGS[:4], ids=str)
def test_draws_follow_the_probabilities_of_transformers(s: Sampling) -> None:
    """Chi-square over 20,000 draws from fixed logits; rare tokens share a bin. The seed is fixed: no chance failure."""
    from scipy.stats import chisquare

    n = 20_000
    logits = np.random.default_rng(5).normal(0, 2, 60).astype(np.float32)
    expected = processed(logits, [1, 2, 3], s) * n
    # One draw from each of n rows: their generators are independent ones.
    rows = Chooser(Sampling(s.temperature, s.top_k, s.top_p, s.repetition_penalty, seed=11), [[1, 2, 3]] * n, 60)
    found = np.bincount(rows(np.repeat(logits[None], n, axis=0)), minlength=60)
    assert found[expected == 0].sum() == 0
    common = expected >= 5
    bins = [found[common], expected[common]]
    if (rest := expected[~common].sum()) > 0:
        bins = [np.append(bins[0], found[~common].sum()), np.append(bins[1], rest)]
    assert chisquare(*bins).pvalue > 1e-3


def test_one_row_draws_the_same_whoever_is_beside_it(session: Any) -> None:
    prompts = [[5, 6, 7], [9, 8], [30, 31, 32, 33]]
    s = Sampling(0.8, top_k=40, seed=4)
    whole = generate(session, prompts, 30, sampling=s)
    again = generate(session, prompts, 30, sampling=s)
    assert whole.tokens == again.tokens
    other = generate(session, prompts, 30, sampling=Sampling(0.8, top_k=40, seed=5))
    assert other.tokens != whole.tokens
    stop = whole.tokens[1][3]  # row 1 ends here, and the others must not notice
    cut = generate(session, prompts, 30, eos=(stop,), sampling=s)
    for row, full in zip(cut.tokens, whole.tokens, strict=True):
        assert row == full[: len(row)]
    assert cut.reasons[1] == "eos"


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_batches_that_shrink_equal_transformers(
    session: Any, checkpoints: Callable[..., Path], penalty: float
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoints())
    rng = np.random.default_rng(8)
    prompts = [rng.integers(3, 331, n).tolist() for n in (20, 3, 11, 7)]
    s = Sampling(repetition_penalty=penalty)
    free = generate(session, prompts, 24, sampling=s)
    eos = (free.tokens[1][2], free.tokens[3][7])
    found = generate(session, prompts, 24, eos, sampling=s)
    assert len({len(row) for row in found.tokens}) > 1  # they did end at different times
    for prompt, row, why in zip(prompts, found.tokens, found.reasons, strict=True):
        options = {"do_sample": False, "repetition_penalty": penalty, "pad_token_id": 0, "eos_token_id": list(eos)}
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=24, **options)[0, len(prompt) :].tolist()
        assert list(row) == theirs
        assert why == ("eos" if row[-1] in eos else "length")


@pytest.mark.parametrize("kind", ["shared", "growing", "pytorch"])
def test_rows_that_are_kept_go_on_as_before(kind: str, exports: Callable[..., Path], checkpoints: Any) -> None:
    from runtime.loading import load
    from runtime.torch_session import TorchSession

    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 331, n).tolist() for n in (5, 30, 2, 17)]
    steps = rng.integers(0, 331, (6, 4))
    target = {} if kind == "shared" else {"spec": {"target": "tensorrt"}}
    opened: Any = TorchSession(checkpoints()) if kind == "pytorch" else load(exports(**target), threads=1)
    with opened as session:
        session.prefill(prompts, reserve=6)
        whole = [session.step(s.tolist()).copy() for s in steps]
        session.prefill(prompts, reserve=6)
        for n, rows in enumerate([[0, 1, 2, 3], [0, 2, 3], [0, 2, 3], [2, 3], [3], [3]]):
            if n in (1, 3, 4):
                session.keep({1: [0, 2, 3], 3: [1, 2], 4: [1]}[n])
            found = session.step(steps[n][rows].tolist())
            np.testing.assert_allclose(found, whole[n][rows], rtol=0, atol=2e-5)
        with pytest.raises(SessionError, match="cannot keep the rows"):
            session.keep([1])
        with pytest.raises(SessionError, match="2 ids for a batch of 1"):
            session.step([1, 2])
        # The buffers serve the next whole batch again.
        alone = session.prefill([prompts[3]])[0].copy()
        session.prefill(prompts, reserve=6)
        session.keep([0, 3])
        np.testing.assert_allclose(session.prefill(prompts, reserve=6)[3], alone, rtol=0, atol=2e-5)


def test_finished_rows_are_not_computed_any_more(session: Any) -> None:
    widths: list[int] = []
    prompts = [[5, 6], [7, 8], [9, 10]]
    free = generate(session, prompts, 12)
    eos = (free.tokens[0][1],)
    step = session.step
    session.step = lambda ids: widths.append(len(ids)) or step(ids)
    found = generate(session, prompts, 12, eos)
    assert widths[0] == 3
    for n, width in enumerate(widths):
        assert width == sum(len(row) > n + 1 or (row[-1] not in eos) for row in found.tokens)
    widths.clear()
    steps = list(stream(session, prompts, 12, eos, compact=False))
    assert set(widths) == {3}
    dropping = list(stream(session, prompts, 12, eos))
    assert [s.rows.tolist() for s in steps] == [s.rows.tolist() for s in dropping]
    assert [s.tokens.tolist() for s in steps] == [s.tokens.tolist() for s in dropping]  # and none was written over


def test_nothing_is_done_after_the_last_token(session: Any) -> None:
    prompts = [[5, 6], [7, 8], [9, 10]]
    eos = (generate(session, prompts, 4).tokens[1][3],)
    kept: list[Any] = []
    keep = session.keep
    session.keep = lambda rows: kept.append(rows) or keep(rows)
    found = generate(session, prompts, 4, eos)
    assert found.reasons[1] == "eos"
    assert [len(row) for row in found.tokens] == [4, 4, 4]
    assert kept == []  # the batch ends anyway


class Letters:
    """A tokenizer whose tokens are pieces of bytes."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], skip_special_tokens: bool, **_: bool) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


def said(pieces: list[bytes], stops: list[str]) -> tuple[list[str], str, bool]:
    text = TextStream(Letters(*pieces), stops)
    out = [text.push(i) for i in range(len(pieces))]
    return out, text.finish(), text.stopped


def test_stop_strings_across_tokens() -> None:
    assert said([b"one ", b"#", b"#", b"# two"], ["###"]) == (["one ", "", "", ""], "", True)
    assert said([b"one #", b"# two"], ["###"]) == (["one ", "## two"], "", False)
    assert said([b"one #", b"#"], ["###"]) == (["one ", ""], "##", False)
    assert said([b"a###b"], ["b", "###"]) == (["a"], "", True)
    assert said([b"ab", b"ab", b"c"], ["abc"]) == (["", "ab", ""], "", True)  # the second ab may still become abc
    assert said([b"caf\xc3", b"\xa9", b"!"], ["é!"]) == (["caf", "", ""], "", True)
    assert said([b"x\xc3"], ["é"]) == (["x"], "\ufffd", False)
    assert said([b"stop\xf0\x9f", b"\x98\x80"], ["stop"])[0] == ["", ""]


def test_streamed_text_is_the_decoded_text() -> None:
    pieces = "Zwölf Boxkämpfer jagen 😀 über".encode()
    tokens = [pieces[k : k + 1] for k in range(len(pieces))]
    out, rest, _ = said(tokens, [])
    assert "".join(out) + rest == pieces.decode()
    assert all("\ufffd" not in piece for piece in out)


@pytest.mark.parametrize("legacy", [True, False])
def test_the_blank_between_prompt_and_text_stays(legacy: bool, sentencepiece_model: Path, session: Any) -> None:
    from transformers import LlamaTokenizerFast

    tokenizer = LlamaTokenizerFast.from_pretrained(sentencepiece_model.parent, legacy=legacy, add_bos_token=True)
    whole, prompt = tokenizer("the cat sat 🙂 on it")["input_ids"], tokenizer("the cat")["input_ids"]
    assert whole[: len(prompt)] == prompt
    cut = len(prompt)
    for start, words in ((cut, " sat 🙂 on it"), (1, "the cat sat 🙂 on it"), (whole.index(prompt[-1]), None)):
        text = TextStream(tokenizer, after=whole[:start])
        continued = "".join(text.push(i) for i in whole[start:]) + text.finish()
        assert tokenizer.decode(whole[:start], skip_special_tokens=True) + continued == "the cat sat 🙂 on it"
        assert words in (None, continued)
    emoji = next(k for k, t in enumerate(tokenizer.convert_ids_to_tokens(whole)) if t == "<0xF0>")
    text = TextStream(tokenizer, after=whole[: emoji + 2])  # the prompt ends inside a character
    assert "".join(text.push(i) for i in whole[emoji + 2 :]) == "🙂 on it"
    found = generate(session, [prompt, [5]], 4, tokenizer=tokenizer)
    for row, tokens, said in zip([prompt, [5]], found.tokens, found.texts, strict=True):
        before, first = (tokenizer.decode(r, skip_special_tokens=True) for r in (row, [*row, tokens[0]]))
        assert (before + said).startswith(first.rstrip("\ufffd"))


def test_generate_cuts_text_and_says_why(session: Any, exports: Callable[..., Path]) -> None:
    from runtime.text import load_tokenizer

    class Named(Letters):
        def decode(self, ids: list[int], skip_special_tokens: bool, **_: bool) -> str:
            return "".join(f"<{i}>" for i in ids)

    free = generate(session, [[5, 6], [7, 8]], 10, tokenizer=Named())
    assert free.reasons == ("length", "length")
    assert free.texts == tuple("".join(f"<{t}>" for t in row) for row in free.tokens)
    first, second = free.tokens[0][3], free.tokens[0][4]
    found = generate(session, [[5, 6], [7, 8]], 10, stop_strings=[f"{first}><{second}"], tokenizer=Named())
    assert found.reasons[0] == "stop_string"
    assert found.tokens[0] == free.tokens[0][:5]
    assert found.texts[0] == "".join(f"<{t}>" for t in free.tokens[0][:3]) + "<"
    assert found.texts[1] == "".join(f"<{t}>" for t in free.tokens[1])  # every token once
    assert generate(session, [[5, 6]], 10, stop_ids=[first], tokenizer=load_tokenizer(exports())).reasons == (
        "stop_id",
    )
    with pytest.raises(SessionError, match="need the tokenizer"):
        generate(session, [[5]], 2, stop_strings=["x"])
    with pytest.raises(SessionError, match="empty stop string"):
        generate(session, [[5]], 2, stop_strings=[""], tokenizer=Named())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"temperature": -1.0}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": 1.0, "top_k": -1}, "top-k -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top-p 0"),
        ({"repetition_penalty": 0.0}, "repetition penalty 0"),
        ({"seed": -1}, "seed -1"),
        ({"top_k": 5}, "give a temperature"),
    ],
)
def test_values_that_make_no_sense(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(SessionError, match=words):
        Sampling(**bad)


def test_an_unnamed_seed_becomes_known() -> None:
    assert Sampling(1.0).seeded().seed is not None
    assert Sampling(1.0).seeded() != Sampling(1.0).seeded()
    assert Sampling().seeded().seed is None


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-9])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = np.random.default_rng(2).normal(size=50).astype(np.float32) * 10
    assert {drawn(logits, n, Sampling(temperature)) for n in (0.0, 0.5, 0.999)} == {int(logits.argmax())}


class Cleaning:
    """A tokenizer that joins an apostrophe to what follows it when it cleans up, as LLaMA 3's does."""

    def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool = True) -> str:
        text = "".join([" '", " n", " '", " roll"][i] for i in ids)
        return text.replace(" ' ", "'").replace(" '", "'") if clean_up_tokenization_spaces else text


def test_streamed_text_loses_no_letters() -> None:
    text = TextStream(Cleaning(), ["n ' r"])
    said = "".join(text.push(i) for i in range(4)) + text.finish()
    assert text.stopped
    assert said == " ' "
