"""Kept results are the bits that were computed; a killed run goes on; damage is found; the bound holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bench.errors import BenchError
from bench.gate.store import ResultStore, baseline_key, bound_bytes
from runtime.session import Session

REQUEST = ["score", "fp32", [5, 6, 7, 8]]
MATRIX = np.random.default_rng(1).normal(size=(4, 11)).astype(np.float32)


def test_the_second_time_all_is_there_bit_by_bit(tmp_path: Path) -> None:
    first = ResultStore("k", tmp_path)
    first.keep_array(REQUEST, MATRIX)
    first.keep_value(REQUEST, {"nats": [k / 3 for k in range(50)] + [1e-300]})
    again = ResultStore("k", tmp_path)
    kept = again.array(REQUEST)
    assert kept is not None
    assert (kept.dtype, kept.tobytes()) == (np.float32, MATRIX.tobytes())
    assert again.value(REQUEST) == {"nats": [k / 3 for k in range(50)] + [1e-300]}


def test_other_requests_are_not_mixed_up(tmp_path: Path) -> None:
    store = ResultStore("k", tmp_path)
    store.keep_array(REQUEST, MATRIX)
    store.keep_value(REQUEST, 1)
    others = (["score", "fp32", [5, 6, 7]], ["score", "fp32", [5, 6, 7, 8, 9]], ["score", "eager", [5, 6, 7, 8]])
    assert [f(r) for r in others for f in (store.array, store.value)] == [None] * 6
    assert ResultStore("another", tmp_path).array(REQUEST) is None


@pytest.mark.parametrize("place", [0, 20, 45, 70, -1, None])
def test_a_damaged_or_cut_entry_is_said_and_gone(tmp_path: Path, place: int | None) -> None:
    ResultStore("k", tmp_path).keep_array(REQUEST, MATRIX)
    (path,) = (tmp_path / "k").glob("*.logits")
    content = bytearray(path.read_bytes())
    if place is None:
        del content[-4:]
    else:
        content[place] ^= 1
    path.write_bytes(content)
    said: list[str] = []
    again = ResultStore("k", tmp_path, say=said.append)
    assert again.array(REQUEST) is None
    assert again.array(REQUEST) is None
    (line,) = said
    assert "damaged" in line
    again.keep_array(REQUEST, MATRIX)
    assert np.array_equal(again.array(REQUEST), MATRIX)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damage", [lambda t: t[:-5], lambda t: t.replace("0.25", "0.75"), lambda _: "", lambda _: "[1]"]
)
def test_a_damaged_value_is_said_and_gone(tmp_path: Path, damage: Callable[[str], str]) -> None:
    ResultStore("k", tmp_path).keep_value(REQUEST, [0.25, 0.5])
    (path,) = (tmp_path / "k").glob("*.json")
    path.write_text(damage(path.read_text()))
    said: list[str] = []
    again = ResultStore("k", tmp_path, say=said.append)
    assert again.value(REQUEST) is None
    assert again.value(REQUEST) is None
    assert len(said) == 1


def test_the_bound_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    one = 64 + MATRIX.nbytes
    for k, name in enumerate(("old", "older", "recent")):
        ResultStore(name, tmp_path).keep_array(REQUEST, MATRIX)
        os.utime(tmp_path / name, (1000 - k if name != "recent" else 5000,) * 2)
    said: list[str] = []
    now = ResultStore("now", tmp_path, bound=3 * one + 10, say=said.append)
    now.keep_array(REQUEST, MATRIX)
    assert not (tmp_path / "older").exists()
    assert (tmp_path / "recent").exists()
    small = ResultStore("small", tmp_path, bound=2 * one + 10, say=said.append)
    for k in range(4):
        small.keep_array([k], MATRIX)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]
    assert [small.array([k]) is not None for k in range(4)] == [True, True, False, False]  # never its own entries
    assert len(said) == 1
    assert "LLAMA_ONNX_CACHE_GB" in said[0]


def test_the_bounds_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ONNX_CACHE_GB", "1.5")
    assert bound_bytes() == 1_500_000_000
    for text in ("lots", "-1", "nan"):
        monkeypatch.setenv("LLAMA_ONNX_CACHE_GB", text)
        with pytest.raises(BenchError, match="not a size in GB"):
            bound_bytes()


def test_the_key_follows_the_content(checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    key = baseline_key(checkpoints(), threads=1)
    assert baseline_key(checkpoints(), threads=1) == key
    others = [baseline_key(checkpoints(tie_word_embeddings=True), threads=1), baseline_key(checkpoints(), threads=2)]
    monkeypatch.setattr("bench.machine.environment.versions", lambda: {"torch": "0"})
    others.append(baseline_key(checkpoints(), threads=1))
    assert len({key, *others}) == 4


# -- a run that is killed ---------------------------------------------------------------------------------------------

WRITER = """
import sys, time
from pathlib import Path
from bench.gate.store import ResultStore
store = ResultStore("k", Path(sys.argv[1]), say=lambda m: print("said", m, flush=True))
for k in range(200):
    if store.value(["window", k]) is None:
        with open(sys.argv[2], "a") as f:
            f.write(f"{k}\\n")
        store.keep_value(["window", k], {"nll": [k / 3] * 50})
        time.sleep(0.005)
print("end", flush=True)
"""


def test_an_entry_is_there_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            ResultStore("k", tmp_path).keep_value(REQUEST, 1)
    said: list[str] = []
    assert ResultStore("k", tmp_path, say=said.append).value(REQUEST) is None
    assert said == []


def test_kill_9_loses_and_repeats_nothing(tmp_path: Path) -> None:
    root, computed = tmp_path / "root", tmp_path / "computed"
    command = [sys.executable, "-c", WRITER, str(root), str(computed)]

    def kept() -> int:
        return len(list(root.glob("k/*.json")))

    for _ in range(2):
        before = kept()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while kept() < before + 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 0 < kept() < 200
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout == "end\n"
    store = ResultStore("k", root)
    assert all(store.value(["window", k])["nll"] == [k / 3] * 50 for k in range(200))
    assert not list(root.glob("k/.partial-*"))
    done = [int(line) for line in computed.read_text().split()]
    # A unit may be computed twice only when the kill fell between its computation and its file: once a kill.
    assert len(done) <= 202
    assert set(done) == set(range(200))


def test_a_killed_evaluation_goes_on(
    exports: Callable[..., Path], checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring stops in its fourth window; the second run computes the rest and gives the digits of a whole run."""
    from bench.cli.perplexity import scored
    from bench.deployment import Deployment
    from bench.gate import word_perplexity
    from bench.gate.word_perplexity import Window

    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path))
    windows = [Window(0, tuple(range(k + 5, k + 15)), tuple(range(k + 6, k + 16))) for k in range(8)]
    opener = partial(Deployment(threads=1).open, exports())
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

    def never() -> Session:
        raise AssertionError("a session was opened")

    assert scored(never, windows, ["run"], 1, said.append, lambda: None) == whole
    with pytest.raises(AssertionError, match="was opened"):
        scored(never, windows, ["other settings"], 1, said.append, lambda: None)


def test_a_cache_that_cannot_be_made_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said: list[str] = []
    store = ResultStore("key", tmp_path / "file" / "cache", say=said.append)
    store.keep_array(REQUEST, MATRIX)
    store.keep_value(REQUEST, 1)
    assert (store.array(REQUEST), store.value(REQUEST)) == (None, None)
    store.forget([REQUEST])
    assert len(said) == 1
    assert "cannot be used" in said[0]
