"""The soak in small, and that it notices what it is there to notice."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.studies.soak import Soak, jobs, soak
from runtime.errors import SessionError
from runtime.generate import generate
from runtime.loading import load

Get = Callable[..., Path]


def test_a_short_soak(exports: Get) -> None:
    todo = jobs(160, 331, 40, 4, 12, seed=1)
    assert {len(j.prompts) for j in todo} == {1, 2, 3, 4}
    found = soak(lambda: load(exports(), threads=1, verify=False), todo, samples=12, interrupts=20, tick=lambda: None)
    assert found.generations == len(found.rss_bytes) == 160
    assert found.compared >= 12
    assert (found.differing, found.threads_differing, found.after_interrupt_differing) == (0, 0, 0)


def test_growth_is_a_failure() -> None:
    flat = Soak(200, 1.0, 1, [1000] * 200, 1, 0, 0, 0, 0)
    assert flat.passed
    assert flat.growth == 0
    assert not replace(flat, rss_bytes=[1000] * 150 + [1021] * 50).passed
    assert replace(flat, rss_bytes=[500] * 50 + [1000] * 150).passed  # before the first hundred it may
    for name in ("differing", "threads_differing", "after_interrupt_differing"):
        assert not replace(flat, **{name: 1}).passed


@pytest.mark.parametrize("where", ["prefill", "step", "after", "keep"])
def test_an_interrupt_leaves_no_half_a_batch(session: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(session, [[5, 6, 7], [8, 9]], 20).tokens
    model = session._decode.session

    class Interrupting:
        armed = False

        def run_with_iobinding(self, *given: Any) -> None:
            if self.armed and where == "after":
                model.run_with_iobinding(*given)
            if self.armed:
                raise KeyboardInterrupt
            model.run_with_iobinding(*given)

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

    session._decode.session = trap = Interrupting()
    if where != "prefill":
        session.prefill([[5, 6, 7], [8, 9]], reserve=20)
        session.step([1, 2])
    trap.armed = where != "keep"
    with monkeypatch.context() as m:
        if where == "keep":
            m.setattr(type(session._cache), "keep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            session.prefill([[1, 2]]) if where == "prefill" else (
                session.keep([1]) if where == "keep" else session.step([1, 2])
            )
    trap.armed = False
    with pytest.raises(SessionError, match="call prefill first"):
        session.step([1, 2])
    assert session._cache is None
    assert generate(session, [[5, 6, 7], [8, 9]], 20).tokens == expected


def test_two_sessions_in_two_threads(exports: Get) -> None:
    prompts = np.random.default_rng(0).integers(3, 331, (3, 20)).tolist()
    with load(exports(), threads=1) as one:
        expected = generate(one, prompts, 30).tokens
    found: list[Any] = []

    def work() -> None:
        with load(exports(), threads=1) as mine:
            found.extend(generate(mine, prompts, 30).tokens for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert found == [expected] * 10
