"""Greedy tokens that never leave the device, tested on the CPU: the same graphs, bindings and addresses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import ContextOverflowError, SessionError
from runtime.generate import generate
from runtime.loading import load

Get = Callable[..., Path]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tokens_equal_those_of_the_host_path(exports: Get, precision: str) -> None:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 331, n).tolist() for n in (30, 4, 17)]
    with load(exports(precision), threads=1) as host, load(exports(precision), threads=1, choose_on_device=True) as dev:
        assert (host.choose_on_device, dev.choose_on_device) == (False, True)
        free = generate(host, prompts, 40)
        assert generate(dev, prompts, 40).tokens == free.tokens
        eos = (free.tokens[0][5], free.tokens[2][9])  # rows end at different times
        assert generate(dev, prompts, 40, eos).tokens == generate(host, prompts, 40, eos).tokens
        assert generate(dev, prompts[:1], 100).tokens == generate(host, prompts[:1], 100).tokens
        assert dev.info.details["next_token"] == "chosen on the device"


def test_every_step_has_the_same_addresses_and_shapes(exports: Get) -> None:
    """What a CUDA graph needs: nothing that a step reads or writes moves or grows."""
    with load(exports(), threads=1, choose_on_device=True) as session:

        def addresses() -> list[tuple[int, tuple[int, ...]]]:
            d: Any = session._device
            values = [d._ids, d._mask, d._lengths, d._next_lengths, d._logits, *session._cache._values.values()]
            return [(v.data_ptr(), tuple(v.shape())) for v in values]

        session.prefill_token([[5, 6, 7], [8, 9]], reserve=20)
        first, decoder = addresses(), session._device
        for _ in range(20):
            session.step_token()
            assert addresses() == first
        session.prefill_token([[9, 9], [1, 2]], reserve=20)
        assert session._device is decoder  # one capture serves every batch of this size
        assert decoder.graph_id == -1  # no CUDA graph on the CPU
        session.prefill_token([[9, 9]], reserve=20)
        assert session._device is not decoder


def test_refusals(exports: Get) -> None:
    with load(exports(), threads=1, choose_on_device=True) as session:
        with pytest.raises(SessionError, match="call prefill first"):
            session.step_token()
        session.prefill([[1, 2]], reserve=3)
        with pytest.raises(SessionError, match="logits on the host"):
            session.step_token()
        session.prefill_token([[1, 2]], reserve=1)
        session.step_token()
        with pytest.raises(ContextOverflowError, match="larger reserve"):
            session.step_token()
    growing = load(exports(spec={"target": "tensorrt"}), threads=1, choose_on_device=True)
    assert not growing.choose_on_device  # its past is joined by Concat: nothing has a fixed address
    growing.close()


def test_bfloat16_logits_come_as_fp32() -> None:
    import onnxruntime as ort

    from runtime.kv_cache import BFLOAT16, to_fp32

    wide = np.array([[[1.0, -2.5, 3e38, 0.15625]]], np.float32)
    bits = (wide.view(np.uint32) >> 16).astype(np.uint16)
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16)
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(to_fp32(value, "cpu"), expected)
