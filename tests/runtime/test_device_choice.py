"""Draws where the logits are: equal to the host's for the same random numbers, alone and through a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.device_choice import choice_session
from runtime.errors import SessionError
from runtime.generate import generate, stream
from runtime.loading import load
from runtime.sampling import Draws, Sampling, drawn

Get = Callable[..., Path]
SETTINGS = [
    Sampling(0.7, seed=1),
    Sampling(1.0, top_k=20, seed=2),
    Sampling(1.3, top_p=0.8, seed=3),
    Sampling(0.9, top_k=30, top_p=0.9, seed=4),
    Sampling(1.0, top_k=5, top_p=0.05, seed=5),
    Sampling(1.0, top_k=1, seed=6),
]


def chosen(logits: Any, numbers: Any, s: Sampling) -> list[int]:
    """Tokens ``[b]`` by the graph alone; every graph output is checked for its shape."""
    session = choice_session(
        "tensor(float)" if logits.dtype == np.float32 else "tensor(float16)", "cpu", True, s.top_k > 0, s.top_p < 1
    )
    feeds = {
        "logits": logits[:, None],
        "lengths": np.full((len(logits), 1), 3, np.int64),
        "places": np.arange(6)[None],
        "numbers": numbers[:, None],
        "temperature": np.array([s.temperature]),
        "top_k": np.array([s.top_k], np.int64),
        "top_p": np.array([s.top_p]),
    }
    wanted = {i.name for i in session.get_inputs()}
    ids, mask, longer = session.run(None, {k: v for k, v in feeds.items() if k in wanted})
    assert ids.shape == longer.shape == (len(logits), 1)
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0]] * len(logits)
    assert set(longer.ravel().tolist()) == {4}
    found: list[int] = ids[:, 0].tolist()
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("s", SETTINGS, ids=str)
def test_the_graph_draws_what_the_host_draws(s: Sampling, dtype: Any) -> None:
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 3, (400, 97)).astype(dtype)
    logits[:200, 7] = logits[:200, 8] = np.sort(logits[:200], axis=1)[:, -s.top_k or -1]  # ties, at top-k's edge too
    numbers = rng.random(400)
    numbers[:4] = 0, 1e-12, 0.5, np.nextafter(1, 0)
    host = [drawn(row.astype(np.float32), number, s) for row, number in zip(logits, numbers, strict=True)]
    assert chosen(logits, numbers, s) == host
    assert s.top_k == 1 or len(set(host)) > 10 or s.top_p < 0.1


def test_the_largest_number_takes_a_token_that_may_be_drawn() -> None:
    """1 - 2**-53 is the largest that a generator gives; 1 itself must not lead beyond the row either."""
    logits = np.full((50, 40), -1e4, np.float32)
    rng = np.random.default_rng(0)
    logits[:, 3:9] = rng.normal(0, 1, (50, 6))
    for s in (Sampling(1.0), Sampling(1.0, top_p=0.99), Sampling(1.0, top_k=4)):
        for number in (np.nextafter(1, 0), 1.0):
            assert set(chosen(logits, np.full(50, number), s)) <= set(range(3, 9))


@pytest.mark.parametrize("s", SETTINGS[:4], ids=str)
def test_a_session_that_draws_on_the_device_says_what_the_host_says(exports: Get, s: Sampling) -> None:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 331, n).tolist() for n in (30, 4, 17)]
    with load(exports(), threads=1) as host, load(exports(), threads=1, choose_on_device=True) as dev:
        free = generate(host, prompts, 30, sampling=s)
        on_host = dev.prefill  # nothing may go there
        dev.prefill = None  # type: ignore[assignment, method-assign]
        assert generate(dev, prompts, 30, sampling=s).tokens == free.tokens
        eos = (free.tokens[0][5], free.tokens[2][9])  # rows end at different times
        expected = generate(host, prompts, 30, eos, sampling=s)
        assert len({len(row) for row in expected.tokens}) > 1
        assert generate(dev, prompts, 30, eos, sampling=s).tokens == expected.tokens
        steps = [x.tokens.tolist() for x in stream(dev, prompts, 30, eos, sampling=s, compact=False)]
        assert steps == [x.tokens.tolist() for x in stream(host, prompts, 30, eos, sampling=s)]
        dev.prefill = on_host  # type: ignore[method-assign]
        penalised = Sampling(0.8, repetition_penalty=1.3, seed=9)
        assert (
            generate(dev, prompts, 9, sampling=penalised).tokens
            == generate(host, prompts, 9, sampling=penalised).tokens
        )


def test_settings_may_change_from_batch_to_batch(exports: Get) -> None:
    prompts = [[5, 6, 7], [8, 9]]
    with load(exports(), threads=1) as host, load(exports(), threads=1, choose_on_device=True) as dev:
        for s in (
            SETTINGS[0],
            Sampling(),
            Sampling(0.2, seed=1),
            SETTINGS[3],
            Sampling(0.9, top_k=3, seed=4),
            Sampling(0.9, top_k=5000, seed=4),
        ):
            assert generate(dev, prompts, 12, sampling=s).tokens == generate(host, prompts, 12, sampling=s).tokens
        decoder = dev._whole
        generate(dev, prompts, 5, sampling=Sampling())
        assert dev._whole is decoder  # what was captured serves every way of choosing


def test_a_draw_without_its_numbers_is_refused(exports: Get) -> None:
    s = Sampling(0.8, seed=1)
    with load(exports(), threads=1, choose_on_device=True) as session:
        with pytest.raises(SessionError, match=r"one random number a row, shape \[2\], not none"):
            session.prefill_token([[5], [6]], 4, s)
        session.prefill_token([[5], [6]], 4, s, Draws(s, 2)())
        with pytest.raises(SessionError, match=r"not shape \[1\]"):
            session.step_token(np.zeros(1))
        with pytest.raises(SessionError, match="repetition penalty"):
            session.prefill_token([[5]], 4, Sampling(repetition_penalty=1.2))
        assert session.step_token(np.zeros(2)).shape == (2,)  # the batch goes on
        with pytest.raises(SessionError, match="logits on the device"):
            session.step([1, 2])
