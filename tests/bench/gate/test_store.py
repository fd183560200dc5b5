"""Kept results are the bits that were computed; a killed run goes on; damage is found; the bound holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.errors import BenchError
from bench.gate.journal import Journal, JournalError
from bench.gate.store import (
    BaselineCache,
    CachedSession,
    baseline_key,
    bound_bytes,
    cached_baseline,
    generate_with,
)
from runtime.session import Session, SessionInfo

IDS = [5, 6, 7, 8]


class Fake:
    """A session whose logits follow from the ids, and that counts its calls."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.closed = 0

    @property
    def info(self) -> SessionInfo:
        return SessionInfo("pytorch", "cpu", "fp32", 100, 11, {"threads": 1})

    def score(self, ids: Sequence[int]) -> Any:
        self.calls.append(list(ids))
        return np.random.default_rng(list(ids)).normal(size=(len(ids), 11)).astype(np.float32)

    def prefill(self, ids: Any, reserve: int = 1) -> Any:
        self.calls.append([len(r) for r in ids])
        return np.eye(11, dtype=np.float32)[[len(r) % 11 for r in ids]]

    def step(self, ids: Sequence[int]) -> Any:
        return np.eye(11, dtype=np.float32)[[(t + 1) % 11 for t in ids]]

    def close(self) -> None:
        self.closed += 1


def never() -> Session:
    raise AssertionError("the real session was opened")


def test_second_time_nothing_is_opened(tmp_path: Path) -> None:
    fake = Fake()
    with_fake = CachedSession(lambda: fake, BaselineCache("k", tmp_path))
    assert isinstance(with_fake, Session)
    first = with_fake.score(IDS).copy()
    made = generate_with(with_fake, [IDS, IDS[:2]], 4, (3,))
    info = with_fake.info
    with_fake.close()
    assert fake.closed == 1
    again = CachedSession(never, BaselineCache("k", tmp_path))
    assert again.score(IDS).tobytes() == first.tobytes()
    assert again.score(IDS).dtype == np.float32
    assert again.generate([IDS, IDS[:2]], 4, (3,)) == made
    assert again.info == info
    assert not again.opened
    again.close()


def test_other_requests_are_not_mixed_up(tmp_path: Path) -> None:
    cached = CachedSession(Fake, BaselineCache("k", tmp_path))
    cached.score(IDS)
    cached.generate([IDS], 4, (3,))
    for ask in (
        lambda c: c.score(IDS[:-1]),
        lambda c: c.score([*IDS, 9]),
        lambda c: c.generate([IDS], 5, (3,)),
        lambda c: c.generate([IDS], 4, ()),
        lambda c: c.generate([IDS, IDS], 4, (3,)),
    ):
        with pytest.raises(AssertionError, match="was opened"):
            ask(CachedSession(never, BaselineCache("k", tmp_path)))
    with pytest.raises(AssertionError, match="was opened"):
        CachedSession(never, BaselineCache("another", tmp_path)).score(IDS)


@pytest.mark.parametrize("place", [0, 20, 45, 70, -1])
def test_a_damaged_entry_is_said_and_computed_again(tmp_path: Path, place: int) -> None:
    good = CachedSession(Fake, BaselineCache("k", tmp_path)).score(IDS)
    (path,) = (tmp_path / "k").glob("*.logits")
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    said: list[str] = []
    fake = Fake()
    again = CachedSession(lambda: fake, BaselineCache("k", tmp_path, say=said.append)).score(IDS)
    assert again.tobytes() == good.tobytes()
    assert fake.calls == [IDS]
    assert "damaged" in said[0]
    assert CachedSession(never, BaselineCache("k", tmp_path)).score(IDS).tobytes() == good.tobytes()


def test_a_cut_entry_and_a_damaged_generation(tmp_path: Path) -> None:
    cached = CachedSession(Fake, BaselineCache("k", tmp_path))
    cached.score(IDS)
    made = cached.generate([IDS], 4)
    (path,) = (tmp_path / "k").glob("*.logits")
    path.write_bytes(path.read_bytes()[:-4])
    for kept in (tmp_path / "k").glob("*.json"):
        raw = json.loads(kept.read_text())
        if isinstance(raw["value"], dict) and "tokens" in raw["value"]:
            raw["value"]["tokens"][0][0] += 1
            kept.write_text(json.dumps(raw))
    said: list[str] = []
    fake = Fake()
    again = CachedSession(lambda: fake, BaselineCache("k", tmp_path, say=said.append))
    again.score(IDS)
    assert again.generate([IDS], 4).tokens == made.tokens
    assert len(fake.calls) == 2
    assert len(said) == 2


def test_the_bound_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    one = 64 + 4 * len(IDS) * 11
    for k, name in enumerate(("old", "older", "recent")):
        CachedSession(Fake, BaselineCache(name, tmp_path)).score(IDS)
        os.utime(tmp_path / name, (1000 - k if name != "recent" else 5000,) * 2)
    total = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    said: list[str] = []
    now = CachedSession(Fake, BaselineCache("now", tmp_path, bound=total, say=said.append))
    now.score(IDS)
    assert not (tmp_path / "older").exists()
    assert (tmp_path / "recent").exists()
    small = BaselineCache("small", tmp_path, bound=2 * one + 10, say=said.append)
    for k in range(4):
        small.keep_logits([k], np.ones((4, 11), np.float32))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]
    assert [small.logits([k]) is not None for k in range(4)] == [True, True, False, False]  # never its own entries
    assert len(said) == 1
    assert "LLAMA_ONNX_CACHE_GB" in said[0]


def test_the_bounds_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ONNX_CACHE_GB", "1.5")
    assert bound_bytes() == 1_500_000_000
    for text in ("lots", "-1", "nan"):
        monkeypatch.setenv("LLAMA_ONNX_CACHE_GB", text)
        with pytest.raises(BenchError, match="not a size in GB"):
            bound_bytes()


def test_the_key_follows_the_content(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    key = baseline_key(checkpoints(), threads=1)
    assert baseline_key(checkpoints(), threads=1) == key
    others = [
        baseline_key(checkpoints(tie_word_embeddings=True), threads=1),
        baseline_key(checkpoints(), threads=2),
        baseline_key(checkpoints(), "fp16", threads=1),
        baseline_key(checkpoints(), attention="eager", threads=1),
        replace(key, torch="0"),
    ]
    assert len({k.digest for k in [key, *others]}) == 6


def test_real_baseline_bits(
    checkpoints: Callable[..., Path], one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.torch_session import TorchSession

    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path))
    direct = TorchSession(checkpoints(), threads=1)
    for _ in range(2):
        cached = cached_baseline(checkpoints(), threads=1)
        assert cached.score(IDS).tobytes() == direct.score(IDS).tobytes()
        assert cached.info == direct.info
    assert not cached.opened


def test_torch_is_not_loaded_when_all_is_kept(
    checkpoints: Callable[..., Path], one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path))
    cached = cached_baseline(checkpoints(), threads=1)
    cached.score(IDS)
    cached.generate([IDS], 3)
    code = (
        "import sys; from pathlib import Path; from bench.gate.store import cached_baseline; "
        f"c = cached_baseline(Path({str(checkpoints())!r}), threads=1); c.score({IDS}); c.generate([{IDS}], 3); "
        "c.info; "
        "print(c.opened, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False", "False"]


# -- journal ----------------------------------------------------------------------------------------------------------

WRITER = """
import sys, time
from pathlib import Path
from bench.gate.journal import Journal
with Journal(Path(sys.argv[1]), lambda m: print("said", m, flush=True)) as journal:
    for k in range(200):
        name = f"window-{k}"
        if name not in journal:
            with open(sys.argv[2], "a") as f:
                f.write(f"{k}\\n")
            journal.put(name, {"nll": [k / 3] * 50})
            time.sleep(0.005)
print("end", flush=True)
"""


def test_kill_9_loses_and_repeats_nothing(tmp_path: Path) -> None:
    path, computed = tmp_path / "j.jsonl", tmp_path / "computed"
    command = [sys.executable, "-c", WRITER, str(path), str(computed)]
    for _ in range(2):
        before = path.stat().st_size if path.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while (path.stat().st_size if path.exists() else 0) < before + 3000 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    kept = path.read_bytes().count(b"\n")
    assert 0 < kept < 200
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.endswith("end\n")
    with Journal(path) as journal:
        assert len(journal) == 200
        assert all(journal.get(f"window-{k}")["nll"] == [k / 3] * 50 for k in range(200))
    done = [int(line) for line in computed.read_text().split()]
    # A unit may be computed twice only when the kill fell between its computation and its line: once a kill.
    assert len(done) <= 202
    assert set(done) == set(range(200))


def test_half_a_line_and_a_flipped_byte(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        for k in range(3):
            journal.put(str(k), k / 7)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    said: list[str] = []
    with Journal(path, said.append) as journal:
        assert len(journal) == 2
        journal.put("2", 2 / 7)
    assert "damaged or half-written" in said[0]
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b'["1"', b'["9"'))
    with Journal(path) as journal:
        assert ("0" in journal, "1" in journal, "9" in journal) == (True, False, False)


def test_remember_computes_once(tmp_path: Path) -> None:
    calls: list[int] = []
    for _ in range(2):
        with Journal(tmp_path / "j") as journal:
            assert journal.remember("x", lambda: calls.append(1) or [0.1, 1e-300]) == [0.1, 1e-300]
    assert calls == [1]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path / "j"), pytest.raises(JournalError, match="another process"):
        Journal(tmp_path / "j")
    Journal(tmp_path / "j").close()


def test_a_killed_evaluation_goes_on(
    exports: Callable[..., Path], checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring stops in its fourth window; the second run computes the rest and gives the digits of a whole run."""
    from functools import partial

    from bench.cli.perplexity import open_candidate, scored
    from bench.gate import word_perplexity
    from bench.gate.word_perplexity import Window

    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path))
    windows = [Window(0, tuple(range(k + 5, k + 15)), tuple(range(k + 6, k + 16))) for k in range(8)]
    opener = partial(open_candidate, exports(), "cpu", 1)
    whole = scored(opener, windows, ["whole"], 1, print, lambda: None)
    real, calls = word_perplexity.window_nats, []

    def counted(session: Session, window: Window) -> float:
        calls.append(window)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(session, window)

    monkeypatch.setattr(word_perplexity, "window_nats", counted)
    with pytest.raises(KeyboardInterrupt):
        scored(opener, windows, ["run"], 1, print, lambda: None)
    said: list[str] = []
    assert scored(opener, windows, ["run"], 1, said.append, lambda: None) == whole
    assert said == ["3 of 8 windows were scored before"]
    assert len(calls) == 4 + 5


def test_a_cache_that_cannot_be_made_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said: list[str] = []
    cache = BaselineCache("key", tmp_path / "file" / "cache", say=said.append)
    session = Fake()
    kept = CachedSession(lambda: session, cache)  # type: ignore[arg-type, return-value]
    for _ in range(2):
        assert np.array_equal(kept.score(IDS), session.score(IDS))
        assert kept.info.runtime == "pytorch"
    cache.forget(["anything"])
    assert len(said) == 1
    assert "cannot be used" in said[0]
