"""The KV cache of fixed length that TensorScatter writes into: in place, read through the mask alone, never overrun."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from export.errors import ExportError, UnsupportedModelError
from export.manifest import MANIFEST_NAME, read_manifest
from export.pipeline import export_model
from export.spec import ExportSpec
from runtime.errors import ContextOverflowError
from runtime.generate import generate
from runtime.graph import Graph
from runtime.kv_cache import SharedCache
from runtime.loading import load
from runtime.probe import GraphProbe
from runtime.sampling import Sampling
from runtime.torch_session import TorchSession

Get = Callable[..., Path]
TENSORRT = {"target": "tensorrt"}
ROWS = [np.random.default_rng(k).integers(3, 331, n).tolist() for k, n in enumerate((23, 4, 11))]


@pytest.fixture
def folder(exports: Get) -> Path:
    return exports(spec=TENSORRT)


class Raw:
    """The scoring graph over a cache of the caller's, one call a chunk."""

    def __init__(self, folder: Path, severity: int = 3) -> None:
        self.manifest = read_manifest(folder)
        options = ort.SessionOptions()
        options.log_severity_level = severity
        graph = folder / self.manifest.scoring_graph
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.slots = self.manifest.kv.cache_length or 0

    def feed(self, ids: Any, mask: Any, positions: Any, write: Any) -> dict[str, Any]:
        mask = np.asarray(mask)
        wide = np.pad(mask, ((0, 0), (0, self.slots - mask.shape[1])))
        rows = {"input_ids": ids, "attention_mask": wide, "position_ids": positions, "write_indices": write}
        return {k: np.ascontiguousarray(v, np.int64) for k, v in rows.items()}

    def cache(self, batch: int, value: float = 0) -> dict[str, Any]:
        kv = self.manifest.kv
        names = [n for n in self.manifest.inputs if n.startswith("past")]
        return {n: np.full((batch, kv.kv_heads, self.slots, kv.head_dim), value, np.float32) for n in names}

    def run(self, feed: dict[str, Any], cache: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        logits, *present = self.session.run(list(self.manifest.outputs), feed | cache)
        return logits, dict(zip(cache, present, strict=True))


def test_onnx_runtime_updates_in_place_and_is_silent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With a past and a present of their own it copies the whole cache and says so."""
    raw = Raw(folder, severity=2)
    feed = raw.feed([[5, 6]], np.ones((1, 2)), [[0, 1]], [0])
    kv = raw.manifest.kv
    logits = []
    for shared in (True, False):
        cache, other = (SharedCache(kv, 1, 2, 160, "cpu") for _ in range(2))
        binding: Any = raw.session.io_binding()
        cache.bind(binding)
        if not shared:
            for name, value in other._values.items():
                binding.bind_ortvalue_output(f"present.{name}", value)
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits")
        capfd.readouterr()
        raw.session.run_with_iobinding(binding)
        said = capfd.readouterr().err
        assert ("TensorScatter" in said) == (not shared), said
        written = cache if shared else other
        assert written._values["1.value"].numpy()[:, :, :2].any()
        assert not written._values["1.value"].numpy()[:, :, 2:].any()
        logits.append(binding.copy_outputs_to_cpu()[raw.manifest.outputs.index("logits")])
    np.testing.assert_array_equal(*logits)


def test_the_mask_alone_says_what_counts(folder: Path) -> None:
    """Whatever lies in slots that the mask leaves out, before and after a row's own, has no weight."""
    raw = Raw(folder)
    feed = raw.feed([[0, 0, 5, 6, 7]], [[0, 0, 1, 1, 1]], [[0, 0, 0, 1, 2]], [0])
    clean, _ = raw.run(feed, raw.cache(1))
    dirty, _ = raw.run(feed, raw.cache(1, 1e4))
    np.testing.assert_array_equal(clean[:, 2:], dirty[:, 2:])
    assert np.isfinite(dirty).all()


@pytest.mark.parametrize("left", [False, True])
def test_uneven_rows_in_chunks_over_the_past(left: bool, folder: Path, checkpoints: Get) -> None:
    """Left: padding in the first slots, rows written side by side. Right: each row goes on where it ended."""
    raw = Raw(folder)
    batch = len(ROWS)
    with TorchSession(checkpoints(), attention="eager", threads=1) as theirs:
        wanted = [theirs.score(row).copy() for row in ROWS]
    found: list[list[Any]] = [[] for _ in ROWS]
    cache = raw.cache(batch)
    width = max(map(len, ROWS))
    pads = [width - len(row) if left else 0 for row in ROWS]
    mask = np.zeros((batch, raw.slots), np.int64)
    for start, end in pairwise((0, 3, 4, 13, width)):
        ids, positions = (np.zeros((batch, end - start), np.int64) for _ in range(2))
        write = np.zeros(batch, np.int64)
        took = []
        for k, (row, pad) in enumerate(zip(ROWS, pads, strict=True)):
            a, b = (min(max(n - pad, 0), len(row)) for n in (start, end))  # tokens of this row in the chunk
            place = slice(end - start - (b - a), None) if left else slice(0, b - a)
            ids[k, place], positions[k, place] = row[a:b], np.arange(a, b)
            write[k] = start if left else a
            mask[k, pad : pad + b] = 1
            took.append(place)
        logits, cache = raw.run(raw.feed(ids, mask, positions, write), cache)
        for k, place in enumerate(took):
            found[k].append(logits[k, place])
    for mine, their in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.concatenate(mine), their, atol=3e-5 * np.abs(their).max())


def test_a_row_longer_than_the_cache_is_refused_before_it_runs(exports: Get, checkpoints: Get, tmp_path: Path) -> None:
    short = exports(spec=TENSORRT | {"cache_length": 12})
    assert read_manifest(short).longest_row == 12
    assert read_manifest(short).context_length == 160
    with load(short, threads=1) as session, TorchSession(checkpoints(), threads=1) as theirs:
        session.prefill([ROWS[1]], reserve=2)
        before = session.step([8]).copy()
        with pytest.raises(
            ContextOverflowError, match=r"KV cache of 12 slots; .* at most 8 new .*--cache-length .* 160"
        ):
            session.prefill([ROWS[1]], reserve=9)
        with pytest.raises(ContextOverflowError, match="--cache-length"):
            session.score(ROWS[0])
        assert session.step([9]).shape == before.shape  # the open batch was not touched
        rows = [ROWS[1], ROWS[1][:2]]
        np.testing.assert_array_equal(
            [t for row in generate(session, rows, 8).tokens for t in row],
            [t for row in generate(theirs, rows, 8).tokens for t in row],
        )
    with pytest.raises(ExportError, match=r"--cache-length belongs to --target tensorrt"):
        ExportSpec("m", cache_length=12)
    with pytest.raises(ExportError, match=r"--cache-length 1 "):
        ExportSpec("m", target="tensorrt", cache_length=1)
    out = tmp_path / "out"
    with pytest.raises(UnsupportedModelError, match=r"--cache-length 161 exceeds the model's context of 160"):
        export_model(ExportSpec(str(checkpoints()), target="tensorrt", cache_length=161), out)
    assert not out.exists()


@pytest.mark.parametrize("slots", [2, 12])
def test_the_last_slot_of_a_single_row_counts(slots: int, exports: Get) -> None:
    row = ROWS[0][:slots]
    with load(exports(spec=TENSORRT | {"cache_length": slots}), threads=1) as session:
        wanted = session.score(row).copy()
        session.prefill([row[:1]], reserve=slots - 1)
        found = [session.step([token])[0].copy() for token in row[1:]]
    np.testing.assert_allclose(found, wanted[1:], rtol=1e-4, atol=1e-4)


def test_the_default_is_the_context_but_at_most_4096(exports: Get) -> None:
    assert read_manifest(exports(spec=TENSORRT)).kv.cache_length == 160
    assert read_manifest(exports(spec=TENSORRT, max_position_embeddings=5000)).kv.cache_length == 4096
    assert read_manifest(exports()).kv.cache_length is None


def test_decoding_that_stays_on_the_device_and_batches_that_shrink(folder: Path) -> None:
    """One engine for the prompts and one for the steps, as TensorRT has them; rows end at different steps."""
    with load(folder, threads=1) as host, load(folder, threads=1, choose_on_device=True) as device:
        device._prefill = device._graph(device.manifest.decode_graph)
        device._decode.run = lambda _: pytest.fail("the host decoded")  # type: ignore[method-assign]
        assert device.choose_on_device
        for sampling in (Sampling(), Sampling(temperature=1.5, seed=3)):
            ends = (generate(host, ROWS, 20, sampling=sampling).tokens[1][4],)
            wanted = generate(host, ROWS, 20, eos=ends, sampling=sampling).tokens
            assert len({len(row) for row in wanted}) > 1
            assert generate(device, ROWS, 20, eos=ends, sampling=sampling).tokens == wanted


def test_rows_that_stay_on_the_device_keep_their_places(folder: Path) -> None:
    """The graph reads its positions and slots from what the batch before the cut left on the device."""
    with load(folder, threads=1) as host, load(folder, threads=1, choose_on_device=True) as device:
        tokens = host.prefill(ROWS, 20).argmax(1)
        assert device.prefill_token(ROWS, 20).tolist() == tokens.tolist()
        for k in range(10):
            if k == 3:
                tokens = tokens[[0, 2]]
                for session in (host, device):
                    session.keep([0, 2])
            tokens = host.step(tokens.tolist()).argmax(1)
            assert device.step_token().tolist() == tokens.tolist()
        assert host._cache is not None
        assert device._cache is not None
        for name, value in host._cache._values.items():
            np.testing.assert_allclose(value.numpy(), device._cache._values[name].numpy(), atol=1e-4)


def test_rows_prefilled_one_by_one_give_what_each_gives_alone(folder: Path) -> None:
    rows = [ROWS[0], ROWS[2] * 2, ROWS[0][:17]]
    with load(folder, threads=1) as session:
        alone = [session.prefill([row]).copy() for row in rows]
        np.testing.assert_allclose(session.prefill(rows), np.concatenate(alone), rtol=1e-4, atol=1e-5)


def test_a_probe_hands_over_as_much_past_as_there_is(folder: Path) -> None:
    text = ROWS[0]
    with load(folder, threads=1) as session:
        probe = GraphProbe.of(session)
        whole = probe.run(text)["logits"][0]
        past, found = None, []
        for a, b in ((0, 9), (9, 10), (10, 23)):
            made = probe.run(text[a:b], past, ["logits", *probe.present_names])
            past = probe.presents(made)
            assert past[0][0].shape[2] == b
            found.append(made["logits"][0])
        np.testing.assert_allclose(np.concatenate(found), whole, atol=3e-5 * np.abs(whole).max())


def test_our_folder_without_its_manifest_is_still_driven(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != MANIFEST_NAME:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with load(tmp_path, threads=1) as theirs, load(folder, threads=1) as ours:
        assert theirs.manifest.kv == ours.manifest.kv
        assert generate(theirs, ROWS, 5).tokens == generate(ours, ROWS, 5).tokens


@pytest.mark.parametrize("spec", [None, TENSORRT])
def test_what_comes_from_the_host_is_bound_at_every_step(
    spec: Any, exports: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU provider copies an input when it is bound; on an H200 every step got the first one's token."""
    folder, kept = exports(spec=spec), []

    def copied(binding: Any, name: str, array: Any) -> None:
        kept.append(array.copy())
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, kept[-1].ctypes.data)

    with load(folder, threads=1) as session:
        wanted = [session.prefill(ROWS, 4).copy(), *(session.step([7 + k] * 3).copy() for k in range(4))]
        monkeypatch.setattr(Graph, "bind_input", staticmethod(copied))
        found = [session.prefill(ROWS, 4).copy(), *(session.step([7 + k] * 3).copy() for k in range(4))]
    np.testing.assert_array_equal(found, wanted)
