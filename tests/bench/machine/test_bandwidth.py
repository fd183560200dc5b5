"""Floors of the machine: plausible, read by the threads that were asked for, growing with the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from bench.machine.bandwidth import CpuBandwidth, GemmFloor


def test_bandwidth_is_plausible() -> None:
    assert 1e8 < CpuBandwidth(1, megabytes=64, passes=2)() < 1e13


def test_memory_is_read_by_the_threads_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.get_num_threads()
    seen: list[int] = []

    def timed(_kernel: Any, _passes: int) -> float:
        seen.append(torch.get_num_threads())
        return 1.0

    monkeypatch.setattr("bench.machine.bandwidth.median_time", timed)
    probe = CpuBandwidth(before + 1, megabytes=1, passes=1)
    seen.clear()
    probe()
    assert seen == [before + 1] * 2
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("one_thread")
def test_the_gemm_floor_grows_with_the_model() -> None:
    """Ten times the layers are about ten times the products; a factor of two would be a defect, noise is not."""
    small: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 64}
    one = np.median([GemmFloor(LlamaConfig(**small, num_hidden_layers=2), 64)() for _ in range(3)])
    ten = np.median([GemmFloor(LlamaConfig(**small, num_hidden_layers=40), 64)() for _ in range(3)])
    assert ten > 3 * one
