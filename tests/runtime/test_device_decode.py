"""Greedy tokens that never leave the device, tested on the CPU: the same graphs, bindings and addresses."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.device_decode import MOST_CAPTURES, NO_GRAPH, Captures
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


class Releasing:
    """A session that notes which captured graphs it is told to release."""

    def __init__(self) -> None:
        self.released: list[int] = []

    def release_captured_graph(self, graph_id: int) -> None:
        self.released.append(graph_id)
        if graph_id == 2:
            raise RuntimeError("nothing was captured as 2")


def test_one_captured_graph_at_a_time() -> None:
    session = Releasing()
    captures = Captures(session, True)
    assert [captures.new(), captures.new(), captures.new()] == [1, 2, 3]
    assert session.released == [1, 2]
    captures.release()
    captures.release()
    assert session.released == [1, 2, 3]
    assert [captures.new() for _ in range(MOST_CAPTURES)] == [*range(4, MOST_CAPTURES + 1), *[NO_GRAPH] * 3]
    assert session.released == [*range(1, MOST_CAPTURES + 1)]  # and then nothing is captured any more
    assert Captures(session, False).new() == NO_GRAPH
    old = Captures(object(), True)  # ONNX Runtime 1.31 cannot release
    assert [old.new(), old.new()] == [1, 2]


def test_graphs_and_bindings_of_other_batch_sizes_are_given_up(exports: Get) -> None:
    prompts = [[5, 6, 7], [8, 9], [3, 4]]
    with load(exports(), threads=1, choose_on_device=True) as session:
        spy = Releasing()
        session._captures = Captures(spy, True)
        free = generate(session, prompts, 12).tokens
        decoder: Any = session._whole
        assert decoder.graph_id == 1
        eos = (free[1][3],)  # one row ends; the others go on uncaptured
        for _ in range(3):
            shrunk = generate(session, prompts, 12, eos)
            assert len(shrunk.tokens[1]) == 4
            assert (session._device.batch, session._device.graph_id) == (2, NO_GRAPH)
        assert session._whole is decoder  # one capture serves them all
        assert (session._captures.made, spy.released) == (1, [])
        buffers = [weakref.ref(v) for v in (decoder, decoder._step, decoder._logits, decoder.kv)]
        del decoder
        generate(session, prompts[:2], 12)
        assert session._whole.graph_id == 2
        assert spy.released == [1]
        gc.collect()
        assert [b() for b in buffers] == [None] * 4
        generate(session, prompts[:2], 120)  # a larger buffer has other addresses
        assert session._whole.graph_id == 3
        assert spy.released == [1, 2]
        assert "cuda_graphs_used_up" not in session.info.details
        session._captures.made = MOST_CAPTURES
        generate(session, prompts, 12)
        assert session._whole.graph_id == NO_GRAPH
        assert session.info.details["cuda_graphs_used_up"] == MOST_CAPTURES
    assert spy.released == [1, 2, 3]


def test_closing_releases_what_was_captured(exports: Get) -> None:
    spy = Releasing()
    with load(exports(), threads=1, choose_on_device=True) as session:
        session._captures = Captures(spy, True)
        generate(session, [[5, 6, 7]], 3)
        assert spy.released == []
    assert spy.released == [1]


def test_refusals(exports: Get) -> None:
    with load(exports(), threads=1, choose_on_device=True) as session:
        with pytest.raises(SessionError, match="call prefill first"):
            session.step_token()
        session.prefill([[1, 2]], reserve=3)
        with pytest.raises(SessionError, match="logits on the host"):
            session.step_token()
        session.prefill_token([[1, 2]], reserve=1)
        with pytest.raises(SessionError, match="logits on the device"):
            session.step([3])
        session.step_token()
        with pytest.raises(ContextOverflowError, match="larger reserve"):
            session.step_token()
    growing = load(exports(spec={"target": "plain"}), threads=1, choose_on_device=True)
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


@pytest.mark.parametrize("asked", [False, True])
def test_a_capture_that_onnx_runtime_refuses_is_left_out_and_said(
    asked: bool, exports: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX Runtime 1.31 does on an H200, where sizes that a graph computes on the host meet values of the device."""
    from dataclasses import replace

    from runtime import ort_session
    from runtime.providers import PROVIDERS

    stand_in = replace(PROVIDERS["cpu"], name="cuda")

    def provider_list(_provider: Any, options: dict[str, str]) -> list[str]:
        if options.get("enable_cuda_graph") == "1":
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
        return [stand_in.ort_name]

    monkeypatch.setattr(ort_session, "require", lambda *_: stand_in)
    monkeypatch.setattr(ort_session, "provider_list", provider_list)
    options = {"enable_cuda_graph": "1"} if asked else None
    if asked:
        with pytest.raises(SessionError, match="cannot use the graph capture"):
            load(exports(), "cuda", 1, choose_on_device=True, provider_options=options)
        return
    with load(exports(), "cuda", 1, choose_on_device=True) as session, load(exports(), threads=1) as plain:
        assert session.info.details["cuda_graph"] is False
        assert "graph capture" in str(session.info.details["cuda_graph_refused"])
        assert generate(session, [[5, 6, 7]], 4).tokens == generate(plain, [[5, 6, 7]], 4).tokens
