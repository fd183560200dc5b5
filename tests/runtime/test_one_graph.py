"""A session that holds one of its two graphs at a time, and a long past that is in memory once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.manifest import read_manifest
from runtime.errors import SessionError
from runtime.kv_cache import tiled
from runtime.loading import load
from runtime.probe import GraphProbe
from tests.open_sessions import Alive

Exports = Callable[..., Path]
TEXT = [5, 9, 11, 7, 30, 2, 8]


def test_the_graphs_are_never_open_at_once(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = Alive(monkeypatch)
    with load(exports(), threads=1) as both:
        wanted = [both.prefill([TEXT]).copy(), both.step([3]).copy(), both.score(TEXT).copy()]
    assert alive.most == 2  # what the setting is there to avoid
    alive.most = alive.opened = 0
    with load(exports(), threads=1, one_graph=True) as one:
        for _ in range(2):
            found = [one.prefill([TEXT]).copy(), one.step([3]).copy(), one.score(TEXT).copy()]
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(a, b)
        one.score(TEXT)
    assert alive.most == 1
    assert alive.opened == 4  # and none is opened again without need


def test_a_batch_ends_where_its_graph_goes(exports: Exports) -> None:
    with load(exports(), threads=1, one_graph=True) as session:
        session.prefill([TEXT], reserve=4)
        session.score(TEXT)
        with pytest.raises(SessionError, match="prefill"):
            session.step([3])
        assert session.prefill([TEXT]).shape == (1, 331)
    with pytest.raises(SessionError, match="closed"):
        session.prefill([TEXT])


def test_a_refused_score_leaves_the_batch(exports: Exports) -> None:
    with load(exports(), threads=1, one_graph=True) as session:
        session.prefill([TEXT], reserve=4)
        with pytest.raises(SessionError):
            session.score([331])
        assert session.step([3]).shape == (1, 331)


def test_no_profile_with_one_graph(exports: Exports, tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="one_graph"):
        load(exports(), one_graph=True, profile=tmp_path / "p")


def test_the_probe_gives_a_graph_up(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe over a session must not keep the scoring graph alive when decode takes its place."""
    alive = Alive(monkeypatch)
    with load(exports(), threads=1, one_graph=True) as session:
        probe = GraphProbe.of(session)
        first = probe.run(TEXT)["logits"]
        session.prefill([TEXT])
        np.testing.assert_array_equal(probe.run(TEXT)["logits"], first)
        probe.close()
        with pytest.raises(SessionError, match="closed"):
            probe.run(TEXT)
        session.prefill([TEXT])
    assert alive.most == 1


@pytest.mark.parametrize(
    ("precision", "spec"), [("fp32", None), ("fp16", None), ("int4", None), ("fp32", {"target": "tensorrt"})]
)
def test_a_long_past_in_shared_buffers_gives_the_bits_of_one_that_is_handed_over(
    precision: str, spec: dict[str, Any] | None, exports: Exports
) -> None:
    folder = exports(precision, spec)
    kv = read_manifest(folder).kv
    rng = np.random.default_rng(1)
    shape = (1, kv.kv_heads, 7, kv.head_dim)
    first = [tuple(rng.normal(0, 1, shape).astype(np.float32) for _ in range(2)) for _ in range(kv.layers)]
    with load(folder, threads=1) as session:
        probe = GraphProbe.of(session)
        for length in (3, 100, 153):
            whole = [(tiled(k, length), tiled(v, length)) for k, v in first]
            wanted = probe.run(TEXT, whole)["logits"][0]
            found = probe.after_past(TEXT, first, length)  # type: ignore[arg-type]
            assert found.shape == (len(TEXT), 331)
            np.testing.assert_array_equal(found, wanted)


def test_a_long_past_is_not_copied(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past and present are one buffer: the graph gets no past of its own."""
    manifest = read_manifest(exports())
    assert manifest.kv.shared_buffer
    first = [(np.ones((1, 2, 3, 16), np.float32),) * 2] * manifest.kv.layers
    with load(exports(), threads=1) as session:
        probe = GraphProbe.of(session)
        monkeypatch.setattr(GraphProbe, "run", lambda *_a, **_k: pytest.fail("the past was handed over"))
        assert np.isfinite(probe.after_past(TEXT, first, 90)).all()
