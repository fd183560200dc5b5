"""The wrapper model: ONNX Runtime reads it, and misses nothing but the provider that has a kernel for its node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from export.manifest import DECODE_GRAPH
from runtime.ep_context import write_ep_context


def test_the_wrapper_names_engine_gpu_and_source(exports: Callable[..., Path], tmp_path: Path) -> None:
    folder = exports("fp16", {"target": "tensorrt"})
    path = write_ep_context(folder / DECODE_GRAPH, tmp_path / "sm89.engine", 89, "1.7.1.116")
    made, source = onnx.load(path), onnx.load(folder / DECODE_GRAPH, load_external_data=False)
    assert path.name == "sm89.onnx"
    (node,) = made.graph.node
    assert (node.op_type, node.domain) == ("EPContext", "com.microsoft")
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert values == {
        "main_context": 0,
        "embed_mode": 0,
        "ep_cache_context": b"sm89.engine",
        "hardware_architecture": b"89",
        "onnx_model_filename": DECODE_GRAPH.encode(),
        "partition_name": b"sm89",
        "ep_sdk_version": b"1.7.1.116",
    }
    assert list(node.input) == [v.name for v in source.graph.input]
    assert list(node.output) == [v.name for v in source.graph.output]
    assert list(made.graph.input) == list(source.graph.input)
    with pytest.raises(Exception, match=r"Failed to find kernel for com\.microsoft\.EPContext"):
        ort.InferenceSession(path, providers=["CPUExecutionProvider"])
