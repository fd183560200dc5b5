"""The model that ONNX Runtime's TensorRT-RTX provider opens in place of a graph whose engine is compiled already.

One EPContext node (domain com.microsoft) with the graph's inputs and outputs and the engine's file name. Its attributes
are those that the provider's own source writes and reads (microsoft/onnxruntime, core/providers/nv_tensorrt_rtx/
onnx_ctx_model_helper.cc; NVIDIA/TensorRT-RTX-EP-ABI, src/onnx_ctx_model_helper). ``source`` is left out: the plugin
skips a node whose source is not the name that it was registered under. It was never opened on such a GPU.
Try: ``llama-onnx engine FOLDER --sm 89 --out /tmp/engines``.
"""

from __future__ import annotations

from pathlib import Path


def write_ep_context(graph: Path, engine: Path, sm: int, sdk_version: str) -> Path:
    """Write the wrapper beside the engine, whose name it takes with the ending ``.onnx``.

    Args:
        graph: the ONNX file that the engine was compiled from.
        engine: the engine's file.
        sm: compute capability times 10.
        sdk_version: of TensorRT-RTX.
    """
    import onnx
    from onnx import helper

    source = onnx.load(graph, load_external_data=False)
    inputs, outputs = list(source.graph.input), list(source.graph.output)
    node = helper.make_node(
        "EPContext",
        [v.name for v in inputs],
        [v.name for v in outputs],
        name=engine.stem,
        domain="com.microsoft",
        main_context=0,  # every node has an engine of its own
        embed_mode=0,  # ep_cache_context is a file beside the model, not the engine's bytes
        ep_cache_context=engine.name,
        hardware_architecture=str(sm),
        onnx_model_filename=graph.name,
        partition_name=engine.stem,
        ep_sdk_version=sdk_version,
    )
    opsets = [o for o in source.opset_import if o.domain in ("", "ai.onnx")] + [helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], source.graph.name, inputs, outputs),
        opset_imports=opsets,
        ir_version=source.ir_version,
    )
    path = engine.with_suffix(".onnx")
    onnx.save(model, path)
    return path
