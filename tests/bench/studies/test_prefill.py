"""The study of prompts by their length: its table, and one small run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.studies.prefill import SWITCH, TORCH, WHOLE, InChunks, Row, main, opened, ratio, table


def row(length: int, side: str, *ttft: float) -> Row:
    return Row(length, 1, side, list(ttft), [0.1] * len(ttft), [0.5, 0.6, 0.7])


def test_ratios_are_of_rounds_not_of_medians() -> None:
    rows = [row(128, WHOLE, 1.0, 2.0, 4.0), row(128, TORCH, 3.0, 2.0, 2.0), row(512, WHOLE, 5.0, 5.0, 5.0)]
    assert ratio(rows, 128, TORCH, WHOLE) == 1.0
    assert ratio(rows, 128, WHOLE, TORCH) == 1.0
    assert ratio(rows, 512, TORCH, WHOLE) is None


def test_the_table() -> None:
    rows = [row(n, side, t, t, t) for n, t in ((512, 2.0), (128, 1.0)) for side in (WHOLE, TORCH)]
    columns, lines = table(rows)
    assert columns == ("ms to the first token", "128 tokens", "512 tokens")
    assert lines[0] == (WHOLE, "1,000 (1.00)", "2,000 (1.00)")
    assert lines[-1][1:] == ("600", "600")


def test_the_switch_is_set_while_a_session_is_made_and_only_then(
    exports: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "mine")
    opened(exports(), "old kernel, ", 1).close()
    assert os.environ[SWITCH] == "mine"
    monkeypatch.delenv(SWITCH)
    opened(exports(), "", 1).close()
    assert SWITCH not in os.environ


def test_a_side_has_chunks_of_its_own(exports: Callable[..., Path]) -> None:
    session = opened(exports(), "", 1)
    whole, parts = InChunks(session, 0), InChunks(session, 8)
    ids = [list(range(3, 60))]
    first = whole.prefill(ids).copy()
    assert session._chunk == 0
    np.testing.assert_allclose(parts.prefill(ids), first, rtol=0, atol=2e-5)
    assert session._chunk == 8
    whole.close()


def test_a_run(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    asked = ["--lengths", "16", "48", "4000", "--chunks", "8", "--rounds", "2", "--threads", "1", "--no-peers"]
    assert main([str(checkpoints()), str(tmp_path), *asked]) == 0
    found = json.loads((tmp_path / "prefill.json").read_text())
    assert {(r["length"], r["side"]) for r in found["rows"]} == {
        (n, s) for n in (16, 48) for s in (WHOLE, "chunks of 8", f"old kernel, {WHOLE}", "old kernel, chunks of 8")
    }  # 4,000 tokens are beyond the context
    assert set(found["profile_us"]) == {f"{kernel}{n} tokens" for kernel in ("", "old kernel, ") for n in (16, 48)}
    assert set(found["peak_mb"]["48 tokens"]) == {"0", "8"}
    assert "GroupQueryAttention" in (tmp_path / "prefill.md").read_text()
