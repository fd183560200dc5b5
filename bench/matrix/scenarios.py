"""The runs in which two runtimes are compared: a kernel may be wrong in one of them only.

Prompts of three lengths, a decode step, several new tokens on a past, an uneven batch and its decode step. Each is what
:mod:`runtime.host_decode` would feed, and the past is the reference's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.errors import BenchError
from export.manifest import Manifest
from runtime.graph import placed, positions
from runtime.kv_cache import NUMPY_DTYPE
from runtime.session import left_pad, right_pad

LENGTHS = (24, 96, 1000)
"""Tokens of the prompts: below every block size, several blocks, and long."""
CHUNK = 8
ROWS = (1.0, 0.7, 0.4)
"""Rows of the uneven batch, as parts of the middle length."""
Past = Mapping[str, NDArray[Any]]
Run = Callable[["Scenario", Sequence[str]], Mapping[str, NDArray[Any]] | None]


@dataclass(frozen=True)
class Scenario:
    """One run.

    Attributes:
        name: in words.
        graph: file name in the folder.
        feeds: every input that the graph may have.
        new: which of the new tokens are no padding, ``[batch, new]``.
        slots: which slots of the cache hold tokens afterwards, ``[batch, tokens so far]``.
    """

    name: str
    graph: str
    feeds: dict[str, NDArray[Any]]
    new: NDArray[np.bool_]
    slots: NDArray[np.bool_]

    def counted(self, value: NDArray[Any]) -> NDArray[Any]:
        """The rows ``[n, width]`` of a value that stand for tokens, padding and empty slots of the cache left out."""
        (batch, new), total = self.new.shape, self.slots.shape[1]
        shape = value.shape
        if value.ndim == 4 and shape[0] == batch and shape[2] >= total and shape[2] != new:
            value = value[:, :, :total].transpose(0, 2, 1, 3)[self.slots]
        elif value.ndim >= 3 and shape[0] == batch and not self.new.all():
            if shape[1] == new:
                value = value[self.new]
            elif value.ndim == 4 and shape[2] == new:
                value = value.transpose(0, 2, 1, 3)[self.new]
        width = value.shape[-1] if value.ndim else 1
        return value.reshape(-1, width) if width else value.reshape(0, 1)


def scenarios(manifest: Manifest, ids: Sequence[int], reference: Run) -> Iterator[Scenario]:
    """All that the graph, the context and the text allow, in the order in which they are tried.

    Args:
        manifest: of the folder.
        ids: of a text; a longer one allows longer prompts.
        reference: runs a scenario for these outputs; asked only when a later scenario needs its cache. None: it cannot,
            and what goes on from there is left out.

    Raises:
        BenchError: a cache of a type that numpy lacks, or no text.
    """
    kv = manifest.kv
    if kv.dtype not in NUMPY_DTYPE:
        raise BenchError(f"two runtimes cannot be compared over a {kv.dtype} cache: numpy has no such type")
    if len(ids) < 2 * CHUNK:
        raise BenchError(f"{len(ids)} tokens are too few to compare runtimes over; give a text of {2 * CHUNK} or more")
    room = min(manifest.longest_row, len(ids)) - CHUNK
    lengths = sorted({min(n, room) for n in LENGTHS})
    names = [f"{p}.{kind}" for p in map(str, range(kv.layers)) for kind in ("key", "value")]
    presents = [f"present.{n}" for n in names]

    def make(name: str, graph: str, rows: Sequence[Sequence[int]], past: Past | None, used: Sequence[int]) -> Scenario:
        pad = right_pad if kv.shared_buffer else left_pad
        new_ids, mask = pad(rows)
        start = int(max(used)) if past else 0
        if past and len(rows) > 1:
            total = start + new_ids.shape[1]
            ends = np.asarray(used)[:, None] + new_ids.shape[1]
            columns = np.arange(total)[None]
            slots = columns < ends if kv.shared_buffer else columns >= total - ends
            new, places, write = np.ones(new_ids.shape, bool), ends - 1, np.asarray(used, np.int64)
        else:
            slots = np.concatenate([np.ones((len(rows), start), np.int64), mask], axis=1).astype(bool)
            new, places = mask.astype(bool), positions(slots.astype(np.int64))[:, start:]
            write = np.full(len(rows), start, np.int64)
        cache = dict[str, NDArray[Any]]()
        for n in names:
            held = kv.cache_length or (start if past else 0)
            buffer = np.zeros((len(rows), kv.kv_heads, held, kv.head_dim), NUMPY_DTYPE[kv.dtype])
            if past:
                buffer[:, :, :start] = past[f"present.{n}"][:, :, :start]
            cache[f"past_key_values.{n}"] = buffer
        where = placed(kv, slots.astype(np.int64), 0) | {"write_indices": write}
        return Scenario(name, graph, {"input_ids": new_ids, "position_ids": places, **where, **cache}, new, slots)

    scoring = manifest.scoring_graph
    decode = scoring if kv.windows else manifest.decode_graph  # a cache that drops tokens has another layout
    graphs = [scoring] * (len(lengths) - 1) + [decode]  # the long one without the logits of every position
    prompts = [make(f"a prompt of {n} tokens", g, [ids[:n]], None, ()) for n, g in zip(lengths, graphs, strict=True)]
    yield from prompts
    pasts = [(s.new.shape[1], past) for s in prompts[1:] or prompts if (past := reference(s, presents)) is not None]
    for n, past in pasts:
        yield make(f"a decode step after {n} tokens", decode, [ids[n : n + 1]], past, [n])
    for n, past in pasts[:1]:
        yield make(f"{CHUNK} new tokens after {n}", scoring, [ids[n : n + CHUNK]], past, [n])
    del pasts
    n = (prompts[1:] or prompts)[0].new.shape[1]
    rows = [max(2, int(part * n)) for part in ROWS]
    batch = make(
        f"an uneven batch of {len(rows)} rows, {min(rows)} to {max(rows)} tokens",
        decode,
        [ids[k : k + length] for k, length in enumerate(rows)],
        None,
        (),
    )
    yield batch
    step = [ids[k + length : k + length + 1] for k, length in enumerate(rows)]
    if (held := reference(batch, presents)) is not None:
        yield make(f"a decode step of that batch of {len(rows)}", decode, step, held, rows)
