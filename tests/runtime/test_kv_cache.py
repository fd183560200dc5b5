"""The KV buffers by themselves: how large, when they serve again, and what is where after rows have left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from export.manifest import KVLayout
from runtime.host_decode import HostDecoder
from runtime.kv_cache import BLOCK, GrowingCache, SharedCache

LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=4, dtype="fp32", shared_buffer=True)


def cache(batch: int, tokens: int) -> SharedCache:
    return SharedCache(LAYOUT, batch, tokens, 1000, "cpu")


@pytest.mark.parametrize(
    ("tokens", "capacity"), [(1, BLOCK), (BLOCK, BLOCK), (BLOCK + 1, 2 * BLOCK), (990, 1000), (1000, 1000)]
)
def test_whole_blocks_up_to_the_context(tokens: int, capacity: int) -> None:
    made = cache(3, tokens)
    assert made.capacity == capacity
    values = list(made._values.values())
    assert len(values) == 4
    assert all(v.shape() == [3, 2, capacity, 4] and not v.numpy().any() for v in values)


def test_when_buffers_serve_the_next_batch() -> None:
    made = cache(2, 4 * BLOCK)
    assert made.holds(2, 4 * BLOCK)
    assert not made.holds(2, 4 * BLOCK + 1)  # too small
    assert made.holds(2, 2 * BLOCK)
    assert not made.holds(2, 2 * BLOCK - 1)  # more than half of it wasted
    assert not made.holds(1, 4 * BLOCK)
    assert cache(2, 1).holds(2, 1)  # nothing smaller is made
    made.keep([1], 5)
    assert made.holds(2, 4 * BLOCK)  # for a whole batch, as it was made
    assert not made.holds(1, 4 * BLOCK)


def test_rows_move_up_and_the_memory_stays() -> None:
    made = cache(4, BLOCK)
    whole: dict[str, Any] = dict(made._values)
    for n, value in enumerate(whole.values()):
        value.numpy()[:] = 100 * n + np.arange(4)[:, None, None, None]
    first = {name: v.data_ptr() for name, v in whole.items()}
    for rows, held in (([0, 2, 3], [0, 2, 3]), ([1, 2], [2, 3]), ([1], [3])):
        made.keep(rows, BLOCK)
        assert made.batch == len(rows)
        for n, (name, value) in enumerate(made._values.items()):
            assert value.data_ptr() == first[name]
            assert value.numpy()[:, 0, 0, 0].tolist() == [100 * n + row for row in held]
            assert value.numpy()[:, 1, -1, 3].tolist() == [100 * n + row for row in held]
    made.restore()
    assert made.batch == 4
    assert made._values == whole
    made.keep([0], 1)
    made.restore()
    made.restore()
    assert made._values == whole


def test_rows_of_a_cache_that_grows() -> None:
    class Ran:
        def get_outputs(self) -> list[Any]:
            rows = np.arange(3, dtype=np.float32)[:, None, None, None] + np.zeros((3, 2, 7, 4), np.float32)
            return [ort.OrtValue.ortvalue_from_numpy(rows) for _ in range(5)]

    growing = GrowingCache(LAYOUT, 3, "cpu")
    assert [v.shape() for v in growing._values.values()] == [[3, 2, 0, 4]] * 4
    growing.taken(Ran())
    growing.keep([0, 2], 7)
    assert [v.numpy()[:, 1, 6, 3].tolist() for v in growing._values.values()] == [[0, 2]] * 4


def test_when_rows_are_prefilled_one_by_one() -> None:
    """Long rows of a batch on the CPU over a shared buffer; short ones read the weights once for all."""
    decoder: Any = object.__new__(HostDecoder)
    decoder._prefill, decoder._cache, decoder._chunk = SimpleNamespace(device="cpu"), object.__new__(SharedCache), 0
    decoder._manifest = SimpleNamespace(kv=SimpleNamespace(windows=()))
    assert [decoder._one_by_one(n) for n in ([16, 70], [15, 70], [70])] == [True, False, False]
    decoder._chunk = 64  # several tokens over a past go in a batch of 1 only
    assert [decoder._one_by_one(n) for n in ([15, 70], [70], [15, 64], [64])] == [True, True, False, False]
    decoder._cache = object.__new__(GrowingCache)
    assert not decoder._one_by_one([16, 70])
    decoder._prefill, decoder._cache = SimpleNamespace(device="cuda"), object.__new__(SharedCache)
    assert not decoder._one_by_one([16, 70])
    decoder._manifest.kv.windows = (24, None)  # such a cache takes no padding, on no provider
    assert [decoder._one_by_one(n) for n in ([3, 70], [3])] == [True, False]
