"""Sessions in several threads, closed at any moment, interrupted at any line: whole or gone, never half."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from runtime.errors import SessionBusyError, SessionError
from runtime.generate import generate, stream
from runtime.loading import load
from runtime.sampling import Sampling
from runtime.torch_session import TorchSession
from runtime.turns import Guarded, guarded

Get = Callable[..., Path]
KINDS = ["host", "device", "static", "growing", "pytorch"]
PROMPTS = [[5, 6, 7], [8, 9], [30, 31, 32, 33]]
RUNTIME = str(Path(runtime.__file__).parent)


@pytest.fixture(params=KINDS)
def any_session(request: pytest.FixtureRequest, exports: Get, checkpoints: Get, one_thread: None) -> Iterator[Any]:
    kind = request.param
    if kind == "pytorch":
        opened: Any = TorchSession(checkpoints(), threads=1)
    else:
        spec = {"static": {"target": "tensorrt"}, "growing": {"target": "plain"}}.get(kind)
        opened = load(exports(spec=spec), threads=1, choose_on_device=kind == "device")
    with opened as session:
        yield session


class Gate:
    """Holds a session inside a call: what computes waits until it is told to go on."""

    def __init__(self, session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()
        owner, name = (session, "_forward") if isinstance(session, TorchSession) else (session._decode, "run")
        compute = getattr(owner, name)

        def waiting(*args: Any, **options: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                self.inside.set()
                assert self.go_on.wait(60)
            return compute(*args, **options)

        monkeypatch.setattr(owner, name, waiting)

    @contextmanager
    def held(self, work: Callable[[], Any], found: list[Any]) -> Iterator[None]:
        thread = threading.Thread(target=lambda: found.append(work()))
        thread.start()
        assert self.inside.wait(60)
        try:
            yield
        finally:
            self.go_on.set()
            thread.join(60)


def test_a_second_thread_is_refused_and_disturbs_nothing(any_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = any_session
    session.prefill(PROMPTS, reserve=4)
    expected = [session.step([1, 2, 3]).copy(), session.step([4, 5, 6]).copy()]
    session.prefill(PROMPTS, reserve=4)
    found: list[Any] = []
    calls: list[Callable[[], Any]] = [
        lambda: session.prefill([[1]]),
        lambda: session.step([1, 2, 3]),
        lambda: session.keep([0]),
        lambda: session.score([1, 2]),
        lambda: generate(session, [[1]], 3),
    ]
    if hasattr(session, "step_token"):
        calls += [lambda: session.prefill_token([[1]]), session.step_token]
    with Gate(session, monkeypatch).held(lambda: session.step([1, 2, 3]).copy(), found):
        for call in calls:
            with pytest.raises(SessionBusyError, match=r"one session per thread: open another with runtime\.load"):
                call()
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(session.step([4, 5, 6]), expected[1])


def test_closed_while_another_thread_computes(any_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call ends as if nothing had happened; then everything is freed."""
    session = any_session
    session.prefill(PROMPTS, reserve=4)
    expected = session.step([1, 2, 3]).copy()
    session.prefill(PROMPTS, reserve=4)
    found: list[Any] = []
    with Gate(session, monkeypatch).held(lambda: session.step([1, 2, 3]).copy(), found):
        session.close()
        session.close()
        with pytest.raises(SessionBusyError):
            session.step([1, 2, 3])
    np.testing.assert_array_equal(found[0], expected)
    model = session._model if isinstance(session, TorchSession) else session._decode
    assert model is None
    assert getattr(session, "_cache", None) is None
    session.close()
    for call in (lambda: session.step([1, 2, 3]), lambda: session.prefill([[1]]), lambda: session.keep([0])):
        with pytest.raises(SessionError, match="closed"):
            call()


def test_one_session_handed_from_thread_to_thread(session: Any) -> None:
    """One at a time is all that is asked: no thread owns a session."""
    expected = generate(session, PROMPTS, 10).tokens
    found: list[Any] = []
    for _ in range(3):
        worker = threading.Thread(target=lambda: found.append(generate(session, PROMPTS, 10).tokens))
        worker.start()
        worker.join()
    assert [*found, generate(session, PROMPTS, 10).tokens] == [expected] * 4


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=40, seed=3)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("on_device", [False, True])
def test_two_sessions_in_two_threads_say_what_one_says(exports: Get, on_device: bool, sampling: Sampling) -> None:
    """The helper graphs are shared by all sessions of a process, which must not show."""
    jobs = [np.random.default_rng(n).integers(3, 331, (3, 5 + n)).tolist() for n in range(6)]

    def run(session: Any, order: int) -> list[Any]:
        return [generate(session, job, 15, sampling=sampling).tokens for job in jobs[::order]][::order]

    with load(exports(), threads=1, choose_on_device=on_device) as one:
        expected = run(one, 1)
    found: dict[int, Any] = {}

    def work(order: int) -> None:
        with load(exports(), threads=1, choose_on_device=on_device) as mine:
            found[order] = run(mine, order)

    workers = [threading.Thread(target=work, args=(order,)) for order in (1, -1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == {1: expected, -1: expected}


class Interrupt:
    """Raises KeyboardInterrupt at chosen lines of the runtime, counted from 0; ``lines`` counts them all.

    Not in :func:`runtime.turns.guarded`'s outermost part: there Python lets no signal handler in between the lines, and
    a trace function would.
    """

    def __init__(self, *at: int) -> None:
        self.at, self.lines = set(at), 0

    def _trace(self, frame: Any, event: str, _arg: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(RUNTIME) or code.co_qualname in (
            "guarded.<locals>.run",
            "Guarded._free_between_calls",
        ):
            return None
        if event == "line":
            self.lines += 1
            if self.lines - 1 in self.at:
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self) -> Interrupt:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


def points(lines: int, most: int) -> range:
    return range(0, lines, max(1, lines // most))


@pytest.mark.parametrize("call", ["prefill", "step", "keep", "score"])
def test_interrupted_at_any_line(any_session: Any, call: str) -> None:
    session = any_session
    session.prefill(PROMPTS, reserve=9)
    expected = [session.step([1, 2, 3]).copy(), session.step([4, 5, 6]).copy()]
    calls: dict[str, Callable[[], Any]] = {
        "prefill": lambda: session.prefill([[1, 2], [3]], reserve=9),
        "step": lambda: session.step([7, 8, 9]),
        "keep": lambda: session.keep([0, 2]),
        "score": lambda: session.score([1, 2, 3]),
    }
    session.score([1])  # opens its graph, once
    session.prefill(PROMPTS, reserve=9)
    with Interrupt() as whole:
        calls[call]()
    gone = 0
    for n in points(whole.lines, 40):
        session.prefill(PROMPTS, reserve=9)
        with Interrupt(n), pytest.raises(KeyboardInterrupt):
            calls[call]()
        if session._batch:  # nothing had begun, or everything had ended
            assert session._batch in ((3,) if call == "step" else (3, 2))
        else:
            gone += 1
            with pytest.raises(SessionError, match="call prefill first"):
                session.step([1, 2, 3])
            assert getattr(session, "_cache", None) is None
        session.prefill(PROMPTS, reserve=9)
        for tokens, logits in zip(([1, 2, 3], [4, 5, 6]), expected, strict=True):
            np.testing.assert_array_equal(session.step(tokens), logits)
    assert gone > 0.5 * len(points(whole.lines, 40))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_p=0.9, seed=2)], ids=["greedy", "drawn"])
def test_generations_interrupted_at_any_line(any_session: Any, sampling: Sampling) -> None:
    """Rows end at different times, so that some interrupts hit a batch whose finished rows are being dropped."""
    session = any_session
    free = generate(session, PROMPTS, 8, sampling=sampling).tokens
    eos = (free[0][2], free[2][4])
    expected = generate(session, PROMPTS, 8, eos, sampling=sampling).tokens
    assert len({len(row) for row in expected}) > 1
    with Interrupt() as whole:
        generate(session, PROMPTS, 8, eos, sampling=sampling)
    for n in points(whole.lines, 60):
        # The second one comes while the first is being cleared up.
        with Interrupt(n, n + 2), pytest.raises(KeyboardInterrupt):
            generate(session, PROMPTS, 8, eos, sampling=sampling)
        assert generate(session, PROMPTS, 8, eos, sampling=sampling).tokens == expected


def test_a_stream_left_in_the_middle(any_session: Any) -> None:
    """Whoever reads a stream may be interrupted between two tokens: the batch is whole and can be gone on with."""
    session = any_session
    expected = [s.tokens.tolist() for s in stream(session, PROMPTS, 8)]
    seen: list[list[int]] = []
    steps = stream(session, PROMPTS, 8)
    with suppress(KeyboardInterrupt):
        for step in steps:
            seen.append(step.tokens.tolist())
            if len(seen) == 3:
                raise KeyboardInterrupt
    assert [s.tokens.tolist() for s in steps] == expected[3:]  # the stream itself was not hit
    assert seen == expected[:3]
    abandoned = stream(session, PROMPTS, 8)
    next(abandoned)
    del abandoned
    assert [s.tokens.tolist() for s in stream(session, PROMPTS, 8)] == expected
    hit = stream(session, PROMPTS, 8, ends=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    next(hit)
    with pytest.raises(KeyboardInterrupt):
        next(hit)
    assert [s.tokens.tolist() for s in stream(session, PROMPTS, 8)] == expected


def test_memory_that_runs_out_leaves_no_batch(any_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = any_session
    expected = generate(session, PROMPTS, 6).tokens
    session.prefill(PROMPTS, reserve=4)
    owner, name = (session, "_forward") if isinstance(session, TorchSession) else (session._decode, "run")
    with monkeypatch.context() as m:
        m.setattr(owner, name, lambda *_, **__: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError, match="no room"):
            session.step([1, 2, 3])
    with pytest.raises(SessionError, match="call prefill first"):
        session.step([1, 2, 3])
    assert generate(session, PROMPTS, 6).tokens == expected


class Counter(Guarded):
    """As little as a session can be."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped = self.freed = 0

    def _drop(self) -> None:
        self.dropped += 1

    def _free(self) -> None:
        self.freed += 1

    @guarded
    def run(self, work: Callable[[], Any]) -> Any:
        """The docstring stays."""
        return work()


def test_what_guards_a_call() -> None:
    counter = Counter()
    assert counter.run(lambda: 5) == 5
    assert counter.run.__doc__ == "The docstring stays."
    with pytest.raises(SessionBusyError, match=r"run\(\) while another call"):
        counter.run(lambda: counter.run(lambda: 1))  # a signal handler that calls the session it interrupted
    assert (counter.dropped, counter.run(lambda: 6)) == (0, 6)  # a refusal costs no batch
    with pytest.raises(ZeroDivisionError):
        counter.run(lambda: 1 // 0)
    assert (counter.dropped, counter.freed) == (1, 0)
    assert counter.run(counter.close) is None  # closed from within: freed when the call is over
    assert counter.freed == 1
    with pytest.raises(SessionError, match="closed"):
        counter.run(lambda: 7)


def test_a_second_interrupt_while_the_first_is_cleared_up(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter()

    def again() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(counter, "_drop", again)
        with pytest.raises(KeyboardInterrupt):
            counter.run(lambda: 1 // 0)
    seen: list[int] = []
    counter.run(lambda: seen.append(counter.dropped))
    counter.run(lambda: seen.append(counter.dropped))
    assert seen == [1, 1]  # what was left over went before the next call, once


def test_threads_that_race_never_run_together() -> None:
    counter = Counter()
    inside, most, done = [0], [0], [0]

    def work() -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        for _ in range(50):
            pass
        inside[0] -= 1
        done[0] += 1

    def hammer() -> None:
        for _ in range(2000):
            with suppress(SessionBusyError):
                counter.run(work)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=hammer) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(before)
    assert most == [1]
    assert done[0] > 0
    assert counter.run(lambda: 1) == 1
    assert counter.dropped == 0
