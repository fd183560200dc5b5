"""One batch whose logits come to the host: prefill in one run, or row by row in chunks, and the step that everything is
bound for.

What a decode step does: write one id per row, extend the mask, run the bound graph. KV and logits buffers are bound
once per batch; what comes from the host is bound at each step, since a GPU provider copies it when it is bound.
:mod:`runtime.device_decode` is its counterpart that stays on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from runtime.graph import Graph, fp32
from runtime.kv_cache import GrowingCache, SharedCache
from runtime.session import Ids, Logits, left_pad, right_pad
from runtime.tensorrt import Shapes, require_inside

_ROW_TOKENS = 16
"""Shortest prompt of a CPU batch whose rows are prefilled one by one."""


def spans(length: int, chunk: int) -> list[tuple[int, int]]:
    """Where the fewest chunks of at most ``chunk`` tokens (0: any number) begin and end; about equally long."""
    parts = -(-length // chunk) if chunk else 1
    return [(k * length // parts, (k + 1) * length // parts) for k in range(parts)]


class HostDecoder:
    """One batch over one KV cache.

    Args:
        prefill: the graph that takes the prompts.
        decode: the graph that takes one token a row; may be the same.
        cache: of this batch.
        shapes: what TensorRT's engines were built for; None elsewhere.
        chunk: most tokens of a prompt that one run takes on the CPU; 0 for all.
    """

    def __init__(
        self, prefill: Graph, decode: Graph, cache: SharedCache | GrowingCache, shapes: Shapes | None, chunk: int = 0
    ) -> None:
        self._prefill, self._decode, self._cache, self._shapes = prefill, decode, cache, shapes
        self._chunk = chunk
        self._manifest = decode.manifest
        self._last_only = self._manifest.decode_logits == "last"
        self._mask: NDArray[np.int64]

    def prefill(self, ids: Ids, lengths: Sequence[int], reserve: int) -> Logits:
        """Run the prompts; returns the logits of each row's last token, ``[batch, vocab]``."""
        # A cache that grows by Concat has each row's new tokens right after its old ones only when padded on the left;
        # graphs that attend to a window of the cache (GPT-Neo) count its columns.
        shared = isinstance(self._cache, SharedCache)
        padded, mask = right_pad(ids) if shared else left_pad(ids)
        if self._one_by_one(lengths):
            last = self._prefill_rows(padded, lengths)
        else:
            ends = np.asarray(lengths) if shared else np.full(len(ids), max(lengths))
            last = self._prefill_batch(padded, mask, ends - 1)
        self._batch, self._end = len(ids), max(lengths) + reserve
        self._ids = np.zeros((self._batch, 1), np.int64)
        if shared:
            self._bind_steps()
        else:
            self._mask = np.ones((self._batch, self._end), np.int64)
            self._mask[:, : mask.shape[1]] = mask
            self._width = mask.shape[1]
        return last

    def _one_by_one(self, lengths: Sequence[int]) -> bool:
        """Whether rows are prefilled one after another.

        On the CPU one row keeps every core busy, a batch only outgrows the caches and computes its padding; below
        :data:`_ROW_TOKENS` reading the weights is what takes the time, and a batch reads them once. In chunks it has to
        be: the CPU's GroupQueryAttention takes several new tokens on a past in a batch of 1 only. A cache that drops
        what no window reaches takes no padding on any provider.
        """
        if not isinstance(self._cache, SharedCache):
            return False
        on_cpu = self._prefill.device == "cpu"
        if on_cpu and 0 < self._chunk < max(lengths):
            return True
        return len(lengths) > 1 and (bool(self._manifest.kv.windows) or (on_cpu and min(lengths) >= _ROW_TOKENS))

    def _prefill_batch(self, padded: NDArray[np.int64], mask: NDArray[np.int64], last: NDArray[np.int64]) -> Logits:
        """All rows in one run; ``last`` is each row's last valid column."""
        wanted = 1 if self._last_only else padded.shape[1]
        logits, binding = self._prefill.once(padded, mask, self._cache.bind, wanted)
        self._cache.taken(binding)
        return fp32(logits[:, 0] if self._last_only else logits[np.arange(len(padded)), last])

    def _prefill_rows(self, padded: NDArray[np.int64], lengths: Sequence[int]) -> Logits:
        """Each row alone, chunk by chunk, into its place in the shared cache."""
        assert isinstance(self._cache, SharedCache)
        out = np.empty((len(padded), self._manifest.vocab_size), np.float32)
        for row, length in enumerate(lengths):
            bind_row = partial(self._cache.bind_row, row=row)
            for start, stop in spans(length, self._chunk):
                ids, mask = padded[row : row + 1, start:stop].copy(), np.ones((1, stop), np.int64)
                wanted = 1 if self._last_only else stop - start
                logits, _ = self._prefill.once(ids, mask, bind_row, wanted, start=start)
            out[row] = logits[0, -1]
        return out

    def _bind_steps(self) -> None:
        """Bind once what every step of this batch uses."""
        self._mask = np.ones(self._batch * (self._manifest.kv.cache_length or self._end), np.int64)
        self._binding = self._decode.bind({}, self._cache.bind)
        self._logits = self._decode.bind_logits(self._binding, 1, self._batch)

    def step(self, ids: Sequence[int], lengths: NDArray[np.int64]) -> Logits:
        """Append one token per row; ``lengths`` ``[batch]`` counts them already. Returns ``[batch, vocab]``.

        Raises:
            ShapeOutsideProfileError: TensorRT's engine takes no cache of that length; nothing has run.
        """
        if not isinstance(self._cache, SharedCache):
            return self._growing_step(ids, lengths)
        self._ids[:, 0] = ids
        # GroupQueryAttention reads the mask's row sums (lengths) and its width (the longest row), nothing else; a cache
        # of fixed length has a mask over all of its slots.
        fixed = self._manifest.kv.cache_length
        total = fixed or int(lengths.max())
        mask = self._mask[: self._batch * total].reshape(self._batch, total)
        if self._batch > 1 or fixed:  # else it is all ones
            np.less(np.arange(total), lengths[:, None], out=mask, casting="unsafe")
        self._decode.bind_input(self._binding, "input_ids", self._ids)
        self._decode.bind_input(self._binding, "attention_mask", mask)
        if "position_ids" in self._manifest.inputs:
            self._position = lengths[:, None] - 1
            self._decode.bind_input(self._binding, "position_ids", self._position)
            if "write_indices" in self._manifest.inputs:
                self._decode.bind_input(self._binding, "write_indices", self._position.reshape(-1))  # the same memory
        self._decode.run(self._binding)
        return fp32(self._logits()[:, 0])

    def _growing_step(self, ids: Sequence[int], lengths: NDArray[np.int64]) -> Logits:
        if self._shapes:
            require_inside(self._manifest, self._shapes, "decode", self._batch, 1, self._width)
        self._ids[:, 0] = ids
        self._width += 1
        mask = np.ascontiguousarray(self._mask[:, : self._width])
        logits, binding = self._decode.once(self._ids, mask, self._cache.bind, 1, lengths[:, None] - 1)
        self._cache.taken(binding)
        return fp32(logits[:, 0])

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only; the cache was cut down already."""
        self._batch = len(rows)
        self._ids = np.zeros((self._batch, 1), np.int64)
        if isinstance(self._cache, SharedCache):
            self._bind_steps()
        else:
            self._mask = self._mask[list(rows)]
