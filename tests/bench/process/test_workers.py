"""Several workers give the digits of one; a worker that dies costs a retry and nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.deployment import Deployment
from bench.errors import BenchError
from bench.gate.word_perplexity import Window, window_nats
from bench.process import pool, workers
from bench.process.pool import WorkerError
from bench.process.workers import run_units
from runtime.errors import SessionError
from runtime.generate import generate
from runtime.session import Session

WINDOWS = [Window(0, tuple(range(k + 5, k + 30)), tuple(range(k + 6, k + 31))) for k in range(6)]


class Nothing:
    """A session that does nothing."""

    def close(self) -> None:
        """Nothing to free."""


def test_one_process_in_order() -> None:
    seen: list[tuple[int, int]] = []
    opened: list[Nothing] = []

    def opener() -> Any:
        opened.append(Nothing())
        return opened[-1]

    found = run_units(opener, lambda _, n: n * n, [3, 1, 2], done=lambda k, a: seen.append((k, a)))
    assert found == [9, 1, 4]
    assert seen == [(0, 9), (1, 1), (2, 4)]
    assert len(opened) == 1
    assert run_units(opener, lambda _, n: n, []) == []
    assert len(opened) == 1
    with pytest.raises(BenchError, match="--workers 1 or more"):
        run_units(opener, lambda _, n: n, [1], workers=0)


def test_without_ray_one_process_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "find_spec", lambda name: None)
    said: list[str] = []
    assert run_units(Nothing, lambda _, n: n + 1, [1, 2], workers=4, say=said.append) == [2, 3]  # type: ignore[arg-type]
    assert "Ray is not installed" in said[0]


def test_two_workers_give_the_digits_of_one(ray: Any, exports: Callable[..., Path]) -> None:
    opener = partial(Deployment(threads=1).open, exports())
    alone = run_units(opener, window_nats, WINDOWS)
    seen: dict[int, float] = {}
    shared = run_units(opener, window_nats, WINDOWS, workers=2, done=lambda k, a: seen.__setitem__(k, a))
    assert shared == alone  # to the last digit, in the windows' order
    assert [seen[k] for k in range(len(WINDOWS))] == alone


@pytest.mark.timeout(120)
def test_a_provider_that_falls_back_is_scheduled_without_a_gpu(ray: Any, exports: Callable[..., Path]) -> None:
    opener = partial(Deployment("cuda", 1, allow_fallback=True).open, exports())
    alone = run_units(opener, window_nats, WINDOWS[:2])
    assert run_units(opener, window_nats, WINDOWS[:2], workers=2, gpus_per_worker=1) == alone


def first_tokens(session: Session, prompts: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    """Greedy tokens of one batch."""
    return generate(session, prompts, 6).tokens


def test_generations_too(ray: Any, exports: Callable[..., Path]) -> None:
    batches = [[[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14, 15]], [[3]]]
    opener = partial(Deployment(threads=1).open, exports())
    assert run_units(opener, first_tokens, batches, workers=2) == run_units(opener, first_tokens, batches)


def nothing() -> Any:
    """An opener."""
    return Nothing()


def die_once(marker: str, _: Any, n: int) -> int:
    """Unit 2 kills its worker the first time."""
    if n == 2 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), 9)
    return n * 10


def always_die(_: Any, n: int) -> int:
    """Unit 1 kills every worker."""
    if n == 1:
        os.kill(os.getpid(), 9)
    return n


def fail(_: Any, n: int) -> int:
    """An error in the work itself."""
    raise ValueError(f"unit {n} is bad")


def test_a_dead_worker_costs_its_unit_a_retry(ray: Any, tmp_path: Path) -> None:
    said: list[str] = []
    answers: list[int] = []
    found = run_units(
        nothing,
        partial(die_once, str(tmp_path / "marker")),
        list(range(5)),
        workers=2,
        say=said.append,
        done=lambda k, _: answers.append(k),
    )
    assert found == [0, 10, 20, 30, 40]
    assert sorted(answers) == [0, 1, 2, 3, 4]  # each once: nothing else was done again
    (line,) = said
    assert re.fullmatch(r"worker [12] was lost; unit 3 of 5 is given to another worker", line)


class DiesAtBirth(workers._Worker):
    """On a machine that is gone, which Ray has not noticed: as often as ``opener``'s first argument says."""

    def __init__(self, opener: Any, work: Any) -> None:
        super().__init__(opener, work)
        deaths, folder = opener.args
        if len(list(Path(folder).iterdir())) < deaths:
            (Path(folder) / str(os.getpid())).touch()
            os.kill(os.getpid(), 9)


def nothing_more(deaths: int, folder: str) -> Any:
    """An opener for :class:`DiesAtBirth`."""
    return Nothing()


def test_a_worker_that_dies_during_start_up_costs_no_retry(
    ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_Worker", DiesAtBirth)
    monkeypatch.setattr(pool, "START_PAUSE_S", 0)
    monkeypatch.setattr(pool, "RETRIES", 0)
    said: list[str] = []
    found = run_units(
        partial(nothing_more, 3, str(tmp_path)), lambda _, n: n + 1, [1, 2, 3], workers=2, say=said.append
    )
    assert found == [2, 3, 4]
    assert said == []
    assert len(list(tmp_path.iterdir())) >= 3


def test_workers_that_never_stand_end_the_run(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_Worker", DiesAtBirth)
    monkeypatch.setattr(pool, "START_PAUSE_S", 0)
    monkeypatch.setattr(workers, "DEATHS", 3)
    with pytest.raises(WorkerError, match=r"no worker .* is left; worker \d: died 3 times in a row \("):
        run_units(partial(nothing_more, 99, str(tmp_path)), lambda _, n: n, [1, 2], workers=2)


def test_a_unit_that_always_kills_ends_the_run(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "RETRIES", 1)
    with pytest.raises(WorkerError, match="unit 2 of 3 lost its worker 2 times"):
        run_units(nothing, always_die, [0, 1, 2], workers=2)


def test_an_error_in_the_work_is_not_retried(ray: Any) -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match="is bad"):
        run_units(nothing, fail, [1, 2, 3], workers=2, say=said.append)
    assert said == []


def cannot_open() -> Any:
    """An opener that fails."""
    raise SessionError("no such folder")


def test_a_session_that_cannot_be_opened_is_said_as_it_is(ray: Any) -> None:
    with pytest.raises(SessionError, match="no such folder"):
        run_units(cannot_open, lambda _, n: n, [1, 2], workers=2)


def test_logits_travel_whole(ray: Any) -> None:
    found = run_units(nothing, lambda _, n: np.full((3, 4), n / 3, np.float32), [1, 2], workers=2)
    assert [f.tobytes() for f in found] == [np.full((3, 4), n / 3, np.float32).tobytes() for n in (1, 2)]
