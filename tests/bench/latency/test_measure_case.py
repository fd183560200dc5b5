"""How the child of ``compare`` opens its side."""

from __future__ import annotations

from typing import Any

import pytest

import runtime.loading
from bench.latency import measure_case
from export.cache import cache_dir
from runtime.tensorrt import Shapes


def test_tensorrt_builds_engines_for_the_case_and_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a place for them every process of a comparison would build them again, and for other sizes."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(runtime.loading, "load", lambda *_a, **more: seen.append(more))
    case = {"folder": "f", "batch": 4, "prompt": 2048, "new_tokens": 32}
    measure_case._open(case | {"provider": "tensorrt", "options": {"trt_fp16_enable": "1"}})
    measure_case._open(case | {"provider": "cuda"})
    assert seen[0]["shapes"] == Shapes((4, 4, 4), (1, 2048, 2048), 32)
    assert seen[0]["engine_home"] == cache_dir()
    assert seen[0]["provider_options"] == {"trt_fp16_enable": "1"}
    assert seen[1] == {"verify": False}
