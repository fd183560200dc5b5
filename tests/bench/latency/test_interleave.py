"""Interleaving, replay, workloads: what was run in which order, and that samples arrive unchanged."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.data.items import chunked
from bench.errors import BenchError
from bench.latency.interleave import interleave, load_times
from bench.latency.measure_case import warm_up
from bench.latency.replay import CLOCK, ReplayClock, replay
from bench.latency.workload import choose_profile, latency_prompts
from reports.record import Case

CASE = Case(batch=2, prompt=4, new_tokens=3)


class Fake:
    info = SimpleNamespace(vocab_size=5)

    def __init__(self, label: str, log: list[tuple[str, Any]]) -> None:
        self.label, self.log = label, log

    def prefill(self, ids: Sequence[Sequence[int]], reserve: int = 1) -> Any:
        self.log.append((self.label, [list(r) for r in ids]))
        return np.zeros((len(ids), 5), np.float32)

    def step(self, ids: Sequence[int]) -> Any:
        return np.zeros((len(ids), 5), np.float32)

    def close(self) -> None:
        self.log.append((self.label, "closed"))


def test_sides_alternate_on_equal_prompts() -> None:
    log: list[tuple[str, Any]] = []
    sides: Any = {name: Fake(name, log) for name in "AB"}
    probes: list[int] = []
    series = interleave(sides, list(range(100)), CASE, 4, 1, probe=lambda: probes.append(len(log)))
    recorded = log[2:]  # one warm-up each
    assert [label for label, _ in recorded] == ["A", "B", "B", "A", "A", "B", "B", "A"]
    for k in range(0, 8, 2):
        assert recorded[k][1] == recorded[k + 1][1]
    assert recorded[0][1] != recorded[2][1]
    assert probes == [2, 4, 6, 8]
    a, b = series
    assert [r.order for r in a.rounds] == [0, 3, 4, 7]
    assert [r.order for r in b.rounds] == [1, 2, 5, 6]
    assert all(len(r.at_s) == 3 for s in series for r in s.rounds)


def test_warm_up_stops_when_steady_and_at_its_cap() -> None:
    class Done:
        def __init__(self, total: float) -> None:
            self.total_s = total

    for times, cap, want in (([9, 5, 4.9, 1], 4, (3, True)), ([9, 5, 3, 1], 4, (4, False)), ([1, 1], 1, (1, False))):
        assert warm_up(lambda n, times=times: Done(times[n]), cap) == want  # type: ignore[misc]


def test_load_times_close_every_session() -> None:
    log: list[tuple[str, Any]] = []
    openers: Any = {name: (lambda name=name: Fake(name, log)) for name in "AB"}
    loads = load_times(openers, 2)
    assert [x.side for x in loads] == ["A", "B"]
    assert all(len(x.samples_s) == 2 for x in loads)
    assert [label for label, what in log if what == "closed"] == ["A", "B", "B", "A"]


def test_replay_hands_samples_over_unchanged(benchmark: Any) -> None:
    replay(benchmark, [0.25, 0.5, 0.75], "group", side="x")
    assert benchmark.extra_info == {"side": "x"}


test_replay_hands_samples_over_unchanged.pytestmark = [pytest.mark.benchmark(timer=CLOCK)]  # type: ignore[attr-defined]


def test_replay_clock_moves_only_when_told() -> None:
    clock = ReplayClock()
    samples = iter([0.25, 0.5])
    readings = [clock()]
    for _ in range(3):
        clock.advance(samples)
        readings.append(clock())
    assert readings == [0.0, 0.25, 0.75, 0.75]


def test_prompts_are_equal_for_all_and_new_each_round() -> None:
    stream = list(range(5000))
    first, again, later = (latency_prompts(stream, CASE, k) for k in (0, 0, 1))
    assert first == again != later
    assert [len(r) for r in first] == [4, 4]
    assert first[0] != first[1]
    assert len(latency_prompts([1, 2], CASE, 3)[0]) == 4


def test_profiles_and_their_limits() -> None:
    assert [c.label for c in choose_profile("standard").cases()] == [
        "batch 1, prompt 128",
        "batch 1, prompt 512",
        "batch 1, prompt 1024",
        "batch 4, prompt 128",
        "batch 1, prompt 2048",
    ]
    # Beyond the prompts with decode, the prefill alone; not where the user chose the lengths.
    assert [c.new_tokens for c in choose_profile("standard").cases()] == [32, 32, 32, 32, 1]
    assert choose_profile("standard", prompt_lengths=[8]).cases() == [
        Case(batch=b, prompt=8, new_tokens=32) for b in (1, 4)
    ]
    assert choose_profile("standard", context=2049).prefill_lengths == (2048,)
    assert choose_profile("standard", context=2048).prefill_lengths == ()
    # Defaults shrink to a small context, what the user asked for does not.
    assert choose_profile("standard", context=700).prompt_lengths == (128, 512)
    for arguments, words in (
        ({"prompt_lengths": (650,), "context": 600}, "exceed the model's context of 600"),
        ({"batch_sizes": (0,)}, "batch size 0"),
        ({"new_tokens": 1}, "at least 2"),
    ):
        with pytest.raises(BenchError, match=words):
            choose_profile("standard", **arguments)  # type: ignore[arg-type]
    with pytest.raises(BenchError, match="unknown profile 'huge'"):
        choose_profile("huge")


def test_chunks_cover_the_text_once() -> None:
    pieces = chunked(range(100), 30, least=5)
    assert list(itertools.chain.from_iterable(pieces)) == list(range(100))
    assert [len(p) for p in chunked(range(100), 30, least=20)] == [30, 30, 30]
