"""The generation loop: time stamps, end tokens, and equality with transformers' own generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.errors import SessionError
from runtime.generate import Generation, generate, stream


class Scripted:
    """A session that says what it was told to: one list of tokens a row."""

    info = SimpleNamespace(vocab_size=50)

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows, self.at, self.seen = rows, 0, []  # type: ignore[var-annotated]

    def _logits(self) -> Any:
        out = np.zeros((len(self.rows), 50), np.float32)
        for i, row in enumerate(self.rows):
            out[i, row[self.at]] = 1
        self.at += 1
        return out

    def prefill(self, ids: Any, reserve: int = 1) -> Any:
        self.reserve = reserve
        return self._logits()

    def step(self, ids: Sequence[int]) -> Any:
        self.seen.append(list(ids))
        return self._logits()


def test_times_of_a_generation() -> None:
    ticks = iter([10.0, 10.5, 10.6, 10.8])
    steps = list(stream(Scripted([[7, 8, 9]]), [[1]], 3, clock=lambda: next(ticks)))  # type: ignore[arg-type]
    assert [s.at_s for s in steps] == pytest.approx([0.5, 0.6, 0.8])
    done = Generation(((7, 8, 9),), tuple(s.at_s for s in steps), (False,))
    assert done.ttft_s == pytest.approx(0.5)
    assert done.tpot_s == pytest.approx(0.15)
    assert done.total_s == pytest.approx(0.8)


def test_one_token_has_no_tpot() -> None:
    assert Generation(((7,),), (0.5,), (False,)).tpot_s is None


def test_rows_end_by_themselves() -> None:
    session = Scripted([[5, 2, 9, 9], [6, 7, 8, 2]])
    found = generate(session, [[1], [1]], 10, eos=(2,))  # type: ignore[arg-type]
    assert found.tokens == ((5, 2), (6, 7, 8, 2))
    assert found.ended == (True, True)
    assert found.reasons == ("eos", "eos")
    assert session.seen == [[5, 6], [2, 7], [2, 8]]


def test_the_limit_ends_it_too() -> None:
    session = Scripted([[5, 6, 7]])
    found = generate(session, [[1]], 3, eos=(2,))  # type: ignore[arg-type]
    assert found.tokens == ((5, 6, 7),)
    assert found.ended == (False,)
    assert session.reserve == 3
    with pytest.raises(SessionError, match="at least 1"):
        generate(session, [[1]], 0)  # type: ignore[arg-type]


def test_greedy_equals_transformers_generate(session: Any, checkpoints: Callable[..., Path]) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoints())
    ids = np.random.default_rng(5).integers(3, 331, 40).tolist()
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False, pad_token_id=0)[0, 40:].tolist()
    ours = generate(session, [ids], 60, eos=(2,))
    assert list(ours.tokens[0]) == theirs


@pytest.mark.slow
def test_the_demo_model_knows_the_capital_of_france(demo_export: Path, demo_checkpoint: Path) -> None:
    from runtime.loading import load
    from runtime.text import encode, load_tokenizer
    from runtime.torch_session import TorchSession

    tokenizer = load_tokenizer(demo_export)
    ids = encode(tokenizer, "The capital of France is", chat=False)
    chat = encode(tokenizer, "Summarize: it rained all day, so the cat slept on the mat.", chat=True)
    with load(demo_export) as ours, TorchSession(demo_checkpoint) as theirs:
        a, b = generate(ours, [ids, chat], 40), generate(theirs, [ids, chat], 40)
    assert a.tokens == b.tokens
    assert tokenizer.decode(a.tokens[0]).strip().startswith("Paris")
