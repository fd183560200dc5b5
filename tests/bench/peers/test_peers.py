"""Peers: who takes part and why not, the generator in a process of its own, torch.compile, parity, the table."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from bench.errors import BenchError
from bench.peers import choice, genai, optimum_ort
from bench.peers.genai import GenaiSide
from bench.peers.parity import peer_parity, tokens_agree
from bench.peers.table import PARITY, print_peers
from reports.record import Case, Round, RunRecord, Series, Side
from reports.targets import OPTIMUM
from runtime.errors import SessionError
from runtime.generate import generate
from runtime.torch_session import TorchSession

Get = Callable[..., Path]
# A child that speaks the protocol of genai_server.py without onnxruntime-genai: it adds 1 to the last token.
CHILD = """
import json, os, sys
print("a library's own words", flush=True)
print(json.dumps({"version": f"fake {os.getpid()}"}), flush=True)
for line in sys.stdin:
    r = json.loads(line)
    if r["new_tokens"] > 9:
        raise SystemExit("no memory for so many")
    rows = [[p[-1] + 1 + k for k in range(r["new_tokens"])] for p in r["prompts"]]
    print(json.dumps({"tokens": rows, "at_s": [0.1 * (k + 1) for k in range(r["new_tokens"])]}), flush=True)
"""


def test_who_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "genai_python", lambda: None)
    monkeypatch.setattr(choice.shutil, "which", lambda _name: None)
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda _name: None)
    found = choice.choose("cpu", "GroupQueryAttention", None)
    assert found.labels == ()
    assert "C++ compiler" in found.skipped["pytorch-compile"]
    assert "scripts/peers" in found.skipped["onnxruntime-genai"]
    assert "llama-cpp-python is not installed" in found.skipped["llama.cpp"]
    monkeypatch.setattr(choice, "genai_python", lambda: Path("python"))
    monkeypatch.setattr(choice.shutil, "which", lambda name: name)
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda _name: object())
    assert choice.choose("cpu", "GroupQueryAttention", Path("x.gguf")).labels == tuple(choice.TITLES)
    assert "GGUF" in choice.choose("cpu", "GroupQueryAttention", None).skipped["llama.cpp"]
    assert "unfused" in choice.choose("cpu", "unfused", None).skipped["onnxruntime-genai"]


def test_the_child_process(session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "genai_server.py").write_text(CHILD)
    monkeypatch.setattr(genai, "__file__", str(tmp_path / "genai.py"))
    side = GenaiSide(Path(sys.executable), tmp_path, 1, session.info)
    version, pid = str(side.info.details["onnxruntime_genai"]).split()
    assert version == "fake"
    process = psutil.Process(int(pid))
    for _ in range(2):
        assert process.status() == psutil.STATUS_STOPPED  # its threads would slow whoever is measured next
        found = side.own_generate([[5], [9]], 3)
        assert found.tokens == ((6, 7, 8), (10, 11, 12))
        assert found.tpot_s == pytest.approx(0.1)
    with pytest.raises(SessionError, match="no logits"):
        side.prefill([[1]])
    side.close()
    assert not process.is_running()
    side.close()
    with pytest.raises(SessionError, match="closed"):
        side.own_generate([[5]], 1)
    side = GenaiSide(Path(sys.executable), tmp_path, 1, session.info)
    with pytest.raises(BenchError, match="no memory for so many"):
        side.own_generate([[5]], 10)
    with pytest.raises(SessionError, match="closed"):
        side.own_generate([[5]], 1)
    (tmp_path / "genai_server.py").write_text("raise SystemExit('no module of that name')")
    with pytest.raises(BenchError, match="no module of that name"):
        GenaiSide(Path(sys.executable), tmp_path, 1, session.info)


def test_genai_says_the_same_tokens(exports: Get, session: Any) -> None:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai is not installed in this environment")
    python = genai.genai_python()
    assert python is not None
    prompts = np.random.default_rng(0).integers(3, 331, (2, 20)).tolist()
    side = GenaiSide(python, exports(), 1, session.info)
    try:
        assert side.own_generate(prompts, 12).tokens == generate(session, prompts, 12).tokens
    finally:
        side.close()


@pytest.mark.slow
def test_torch_compile_is_the_same_model(checkpoints: Get) -> None:
    from bench.peers.torch_compile import CompiledSession

    if "pytorch-compile" in choice.choose("cpu", "GroupQueryAttention", None).skipped:
        pytest.skip("no C++ compiler")
    prompts = np.random.default_rng(0).integers(3, 331, (2, 20)).tolist()
    with CompiledSession(checkpoints(), threads=1) as peer, TorchSession(checkpoints(), threads=1) as baseline:
        found = peer_parity(peer, baseline, prompts, 10)
        assert found.agree == 1
        assert found.mean_kld is not None
        assert found.mean_kld < 1e-6
        again = peer_parity(peer, baseline, prompts[::-1], 10)  # the static cache was emptied
        assert again.agree == 1
        with pytest.raises(SessionError, match="even batches"):
            peer.prefill([[1], [1, 2]])


def test_parity_notices_another_model(session: Any, checkpoints: Get) -> None:
    prompts = np.random.default_rng(0).integers(3, 331, (2, 20)).tolist()
    with TorchSession(checkpoints(), threads=1) as same, TorchSession(checkpoints(seed=9), threads=1) as other:
        good, bad = peer_parity(session, same, prompts, 10), peer_parity(other, same, prompts, 10)
    assert (good.agree, good.tokens) == (1, 20)
    assert good.mean_kld is not None
    assert bad.mean_kld is not None
    assert good.mean_kld < 1e-9
    assert bad.mean_kld > 1e-2
    assert "top-1 100.0% of 20" in good.describe()
    assert tokens_agree([[1, 2, 3], [1, 9, 3]], [[1, 2, 3], [1, 2, 3]]) == pytest.approx(4 / 6)


def test_the_table_ties_ratios_to_parity() -> None:
    case = Case(batch=1, prompt=8, new_tokens=3)

    def series(side: str, firsts: Sequence[float], step: float) -> Series:
        rounds = [Round(order=i, at_s=[t, t + step, t + 2 * step]) for i, t in enumerate(firsts)]
        return Series(case=case, side=side, warmup_rounds=1, rounds=rounds)

    drift = [0.08, 0.08, 0.4]  # a neighbour slows the last round of both sides down
    record = RunRecord.model_construct(
        sides=[
            Side(label="a", role="candidate", title="our side", details={}),
            Side(label="b", role="peer", title="some side", details={PARITY: "KLD 1e-12, top-1 100% of 32"}),
            Side(label="c", role="peer", title="not measured", details={}),
        ],
        series=[series("a", drift, 0.016), series("b", [2.5 * t for t in drift], 0.02)],
    )
    out = io.StringIO()
    print_peers(record, {"llama.cpp": "not installed"}, Console(file=out, width=140))
    text = " ".join(out.getvalue().split())
    assert "our side 80.0 ms 1.00 16.00 ms 1.00 see the gate" in text
    assert "some side 200.0 ms 2.50 20.00 ms 1.25 KLD 1e-12, top-1 100% of 32" in text
    assert "llama.cpp skipped: not installed" in text
    assert "not measured" not in text


def test_the_target_names_optimums_side() -> None:
    assert optimum_ort.LABEL == OPTIMUM
