"""``llama-onnx generate``: sampling, stops, providers, and one JSON document."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from bench.cli.main import main
from bench.cli.output import ERR

Get = Callable[..., Path]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    code = main(["generate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out.startswith("{") else captured.out, captured.err


def test_greedy_sampled_stopped(capsys: pytest.CaptureFixture[str], exports: Get) -> None:
    start = (exports(), "the cat sat", "--json", "--threads", 1, "--max-new-tokens", 40, "--ignore-eos")
    code, plain, _ = run(capsys, *start, "--session-option", "session.intra_op.allow_spinning=0")
    assert code == 0
    assert plain["session"]["option session.intra_op.allow_spinning"] == "0"
    assert (plain["end_reason"], plain["new_tokens"], plain["seed"]) == ("length", 40, None)
    _, stopped, _ = run(capsys, *start, "--stop-id", plain["tokens"][5])
    assert stopped["end_reason"] == "stop_id"
    assert stopped["tokens"] == plain["tokens"][: plain["tokens"].index(plain["tokens"][5]) + 1]
    draws = ("--temperature", 1, "--top-p", 0.9, "--top-k", 200, "--repetition-penalty", 1.1)
    _, first, err = run(capsys, *start, *draws)
    assert f"seed {first['seed']}" in err
    _, again, _ = run(capsys, *start, *draws, "--seed", first["seed"])
    assert again["tokens"] == first["tokens"] != plain["tokens"]
    words = first["text"].split()
    if len(words) > 3:  # most of the tiny vocabulary is no word
        _, cut, _ = run(capsys, *start, *draws, "--seed", first["seed"], "--stop", f"{words[1]} {words[2]}")
        assert cut["end_reason"] == "stop_string"
        assert first["text"].startswith(cut["text"])
        assert f"{words[1]} {words[2]}" not in cut["text"]
    assert plain["session"]["attention"] == "GroupQueryAttention on CPUExecutionProvider"


def test_the_last_line_is_one_line_in_a_pipe(
    capsys: pytest.CaptureFixture[str], exports: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ERR, "_width", 40)  # a pipe has 80, the line with a seed more
    code, _, err = run(capsys, exports(), "the cat sat", "--max-new-tokens", 3, "--temperature", 1)
    assert code == 0
    assert err.splitlines()[-1].startswith("prompt ")
    assert ", seed " in err.splitlines()[-1]


def test_bad_options_are_exit_code_2(capsys: pytest.CaptureFixture[str], exports: Get) -> None:
    for options, words in (
        (("--temperature", -1), "temperature -1"),
        (("--top-k", 3), "give a temperature"),
        (("--stop", ""), "empty stop string"),
        (("--provider-option", "x"), "KEY=VALUE"),
        (("--provider-option", "x=1"), "would ignore x"),
    ):
        code, out, err = run(capsys, exports(), "the cat", *options)
        assert (code, out) == (2, ""), options
        assert words in err


def test_a_fallback_is_an_error_or_a_line(capsys: pytest.CaptureFixture[str], exports: Get) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("CUDA is here: nothing to fall back from")
    asked = (exports(), "the cat", "--provider", "cuda", "--max-new-tokens", 3, "--json")
    code, out, err = run(capsys, *asked)
    assert (code, out) == (4, "")
    assert "pip install 'onnxruntime-gpu" in err
    code, found, err = run(capsys, *asked, "--allow-fallback")
    assert code == 0
    assert found["session"]["provider"] == "cpu"
    assert "not installed" in found["session"]["fallback"]
    assert "warning: " in err
