"""TensorRT without a GPU: profiles, refusals, cache keys; and the two sessions with the CPU in TensorRT's place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import ort_session, tensorrt
from runtime.errors import SessionError
from runtime.generate import generate
from runtime.loading import load, read_folder
from runtime.providers import PROVIDERS
from runtime.tensorrt import (
    ShapeOutsideProfileError,
    Shapes,
    cache_key,
    engine_options,
    profile,
    profile_options,
    require_inside,
)

Get = Callable[..., Path]
SHAPES = Shapes((1, 2, 4), (1, 16, 40), 20)


@pytest.fixture
def manifest(exports: Get) -> Any:
    return read_folder(exports(spec={"target": "tensorrt"}), verify=False)


def test_profiles_follow_the_workload(manifest: Any) -> None:
    least, usual, most = profile(manifest, SHAPES, "prefill")
    assert (least["input_ids"], usual["input_ids"], most["input_ids"]) == ([1, 1], [2, 16], [4, 40])
    assert least["past_key_values.1.value"] == [1, 2, 160, 16]
    assert most["past_key_values.1.value"] == [4, 2, 160, 16]
    least, usual, most = profile(manifest, SHAPES, "decode")
    assert (least["input_ids"], most["input_ids"]) == ([1, 1], [4, 1])
    assert (least["past_key_values.0.key"][2], most["past_key_values.0.key"][2]) == (160, 160)
    assert most["attention_mask"] == [4, 160]
    assert most["write_indices"] == [4]
    assert set(most) == set(manifest.inputs)
    text = profile_options(manifest, SHAPES, "decode")["trt_profile_max_shapes"]
    assert "input_ids:4x1," in text + ","
    assert "past_key_values.0.key:4x2x160x16" in text
    assert set(profile_options(manifest, SHAPES, "score", "nv")) == {
        "nv_profile_min_shapes",
        "nv_profile_opt_shapes",
        "nv_profile_max_shapes",
    }


def test_profiles_of_a_cache_that_grows_follow_its_past(exports: Get) -> None:
    plain = read_folder(exports(spec={"target": "plain"}), verify=False)
    assert profile(plain, SHAPES, "prefill")[2]["past_key_values.1.value"] == [4, 2, 0, 16]
    least, _, most = profile(plain, SHAPES, "decode")
    assert (least["past_key_values.0.key"][2], most["past_key_values.0.key"][2]) == (1, 59)
    assert most["attention_mask"] == [4, 60]


def test_no_profile_asks_for_more_than_the_cache_holds(exports: Get) -> None:
    short = read_folder(exports(spec={"target": "tensorrt", "cache_length": 32}), verify=False)
    assert profile(short, SHAPES, "prefill")[2]["input_ids"] == [4, 32]
    assert profile(short, SHAPES, "score")[2]["attention_mask"] == [1, 32]


def test_shapes_of_a_workload() -> None:
    assert Shapes.of_workload((4, 1, 8), (128, 2048), 64, 4096) == Shapes((1, 4, 8), (1, 128, 2048), 64)
    assert Shapes.of_workload((1,), (2048,), 64, 2048).prompt == (1, 1984, 1984)
    for bad in ({"batch": (2, 1, 4)}, {"prompt": (0, 1, 2)}, {"new_tokens": 0}):
        with pytest.raises(SessionError, match=r"order|no sense"):
            Shapes(**bad)  # type: ignore[arg-type]


def test_the_key_changes_with_whatever_an_engine_depends_on(manifest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = cache_key(manifest, SHAPES, "decode", "GPU", "10.15")
    assert base == cache_key(manifest, SHAPES, "decode", "GPU", "10.15")
    others = {
        cache_key(replace(manifest, weights_sha256="0"), SHAPES, "decode", "GPU", "10.15"),
        cache_key(replace(manifest, spec_digest="0"), SHAPES, "decode", "GPU", "10.15"),
        cache_key(manifest, Shapes((1, 2, 4), (1, 16, 41), 20), "decode", "GPU", "10.15"),
        cache_key(manifest, SHAPES, "prefill", "GPU", "10.15"),
        cache_key(manifest, SHAPES, "decode", "other", "10.15"),
        cache_key(manifest, SHAPES, "decode", "GPU", "10.16"),
        cache_key(manifest, SHAPES, "decode", "GPU", "10.15", {"trt_fp16_enable": "1"}),
    }
    monkeypatch.setattr(tensorrt.ort, "__version__", "9.9")
    others.add(cache_key(manifest, SHAPES, "decode", "GPU", "10.15"))
    assert len(others | {base}) == 9


def test_the_cache_says_whether_an_engine_is_there(manifest: Any, tmp_path: Path) -> None:
    options, built = engine_options("tensorrt", manifest, SHAPES, "decode", tmp_path)
    assert not built
    assert options["trt_timing_cache_path"] == str(tmp_path / "engines")
    (Path(options["trt_engine_cache_path"]) / "decode.engine").write_bytes(b"x")
    assert engine_options("tensorrt", manifest, SHAPES, "decode", tmp_path)[1]
    assert not engine_options("tensorrt", manifest, SHAPES, "prefill", tmp_path)[1]
    assert "nv_runtime_cache_path" in engine_options("tensorrt-rtx", manifest, SHAPES, "decode", tmp_path)[0]
    own = {"trt_engine_cache_path": str(tmp_path / "own")}
    options, built = engine_options("tensorrt", manifest, SHAPES, "decode", tmp_path, own)
    assert (options["trt_engine_cache_path"], built) == (own["trt_engine_cache_path"], False)
    (tmp_path / "own" / "decode.engine").write_bytes(b"x")
    assert engine_options("tensorrt", manifest, SHAPES, "decode", tmp_path, own)[1]
    assert "trt_engine_cache_enable" not in engine_options("tensorrt", manifest, SHAPES, "decode", None)[0]


def test_a_past_outside_the_profile_is_refused(exports: Get) -> None:
    plain = read_folder(exports(spec={"target": "plain"}), verify=False)
    require_inside(plain, SHAPES, "decode", 4, 1, 59)
    with pytest.raises(ShapeOutsideProfileError, match="60 past in decode"):
        require_inside(plain, SHAPES, "decode", 4, 1, 60)


def test_two_sessions_and_no_shape_outside(exports: Get, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The CPU stands in for TensorRT's kernels; everything around them is what runs there."""
    stand_in = replace(PROVIDERS["cpu"], name="tensorrt")
    seen: list[dict[str, str]] = []
    folder = exports(spec={"target": "tensorrt"})
    prompts = [[5] * 30, [7, 8, 9]]
    with load(folder, threads=1) as plain:
        expected = generate(plain, prompts, 20).tokens
        last = plain.prefill(prompts, reserve=20).copy()
    monkeypatch.setattr(ort_session, "require", lambda *_: stand_in)
    monkeypatch.setattr(ort_session, "provider_list", lambda _p, o: seen.append(dict(o)) or [stand_in.ort_name])
    given = {"trt_layer_norm_fp32_fallback": "0", "trt_timing_cache_enable": "0"}
    with load(folder, "tensorrt", 1, shapes=SHAPES, engine_home=tmp_path, provider_options=given) as session:
        assert [o["trt_engine_cache_prefix"] for o in seen] == ["decode", "prefill"]
        assert all(given.items() <= o.items() for o in seen)
        assert all(o["trt_engine_cache_enable"] == "1" for o in seen)
        assert session._prefill is not session._decode
        assert float(session.info.details["engine_build_s"]) > 0
        np.testing.assert_array_equal(session.prefill(prompts, reserve=20), last)
        assert generate(session, prompts, 20).tokens == expected
        with pytest.raises(ShapeOutsideProfileError, match=r"41 new tokens in prefill lie outside .* 1 to 40"):
            session.prefill([[5] * 41])
        with pytest.raises(ShapeOutsideProfileError, match="5 rows in prefill"):
            session.prefill([[5]] * 5)
    pairs = replace(SHAPES, batch=(2, 2, 4))
    with load(folder, "tensorrt", 1, shapes=pairs) as session:
        session.prefill(prompts, reserve=2)
        with pytest.raises(ShapeOutsideProfileError, match="1 rows in decode"):
            session.keep([0])
