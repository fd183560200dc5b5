"""Every rule of runtime.trust against one deliberate attack; every honest kind of model passes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime import trust
from runtime.errors import SessionError
from runtime.trust import UntrustedModelError, check_folder, check_graph

OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("loc", 1)]
WEIGHT = np.arange(16, dtype=np.float32).reshape(4, 4)


def value(name: str, kind: int = TensorProto.FLOAT, shape: tuple[int, ...] = (1, 4)) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(nodes: list[Any], weights: list[Any] | None = None, functions: list[Any] | None = None) -> Any:
    graph = helper.make_graph(nodes, "g", [value("x")], [value("y")], weights or [])
    return helper.make_model(graph, functions=functions or [], opset_imports=OPSETS, ir_version=9)


def matmul(weight: Any = None) -> Any:
    weight = numpy_helper.from_array(WEIGHT, "w") if weight is None else weight
    return model_of([helper.make_node("MatMul", ["x", "w"], ["y"], name="first")], [weight])


def external(**entries: str) -> Any:
    """A 4x4 float tensor whose data are named only."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, text in ({"location": "w.data", "offset": "0", "length": "64"} | entries).items():
        if text:
            tensor.external_data.add(key=key, value=text)
    return tensor


def write(folder: Path, model: Any, name: str = "model.onnx") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(model.SerializeToString())
    (folder / "w.data").write_bytes(WEIGHT.tobytes())
    return folder / name


def refused(path: Path, *words: str, check: Callable[[Path], Any] = check_graph) -> None:
    with pytest.raises(UntrustedModelError) as caught:
        check(path)
    message = str(caught.value).replace(str(path.parent), "")  # pytest names folders after tests, which name the words
    assert all(w in message for w in (path.name, *words)), message
    # The thing, a semicolon, the remedy; on one line.
    assert ";" in message
    assert message.count("\n") == 0


def branch(node: Any, weights: list[Any] | None = None) -> Any:
    """``If`` around one node that makes ``b``."""
    graph = helper.make_graph([node], "then", [], [value("b")], weights or [])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["b"])], "else", [], [value("b")])
    return helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=other)


def condition() -> Any:
    return helper.make_tensor("c", TensorProto.BOOL, [], [True])


def function(name: str, nodes: list[Any], domain: str = "loc") -> Any:
    return helper.make_function(domain, name, ["x"], ["y"], nodes, OPSETS)


def call(name: str) -> Any:
    return helper.make_node(name, ["x"], ["y"], domain="loc")


# --- what has to pass ------------------------------------------------------------------------------------------------


def honest() -> dict[str, Any]:
    double = function("Twice", [helper.make_node("Add", ["x", "x"], ["y"])])
    norm = helper.make_node("SimplifiedLayerNormalization", ["x", "s"], ["y"], axis=-1)
    sparse = onnx.SparseTensorProto(
        values=numpy_helper.from_array(np.ones(1, np.float32), "s"),
        indices=numpy_helper.from_array(np.zeros(1, np.int64), "i"),
        dims=[4],
    )
    constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(WEIGHT, "k"))
    typed = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], WEIGHT.ravel())
    return {
        "embedded": matmul(),
        "embedded as numbers": matmul(typed),
        "external": matmul(external()),
        "external without length or offset": matmul(external(length="", offset="")),
        "external in ./": matmul(external(location="./w.data")),
        "external with a checksum": matmul(external(checksum="0" * 40)),
        "Constant": model_of([constant, helper.make_node("MatMul", ["x", "k"], ["y"])]),
        "If": model_of([branch(helper.make_node("Abs", ["x"], ["b"]))], [condition()]),
        "local function": model_of([call("Twice")], functions=[double]),
        "sparse": model_of(
            [helper.make_node("Constant", [], ["k"], sparse_value=sparse), helper.make_node("Add", ["x", "k"], ["y"])]
        ),
        "com.microsoft": model_of([helper.make_node("FastGelu", ["x"], ["y"], domain="com.microsoft")]),
        "ORT's own in ONNX's domain": model_of([norm], [numpy_helper.from_array(np.ones(4, np.float32), "s")]),
        "ai.onnx": model_of([helper.make_node("Neg", ["x"], ["y"], domain="ai.onnx")]),
    }


@pytest.mark.parametrize("kind", honest())
def test_an_honest_model_passes_and_opens(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, honest()[kind])
    (tmp_path / "config.json").write_text('{"vocab_size": 4, "custom_ops_library": null}')
    (tmp_path / "tokenizer.json").write_text('{"vocab": {".dll": 1}, "merges": ["a .dll"]}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"not this module's business")
    check_folder(tmp_path)
    assert [n.op_type for n in check_graph(path).graph.node] == [n.op_type for n in honest()[kind].graph.node]
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones((1, 4), np.float32)})[0].shape == (1, 4)


def arrays() -> Iterator[tuple[str, Any]]:
    """A tensor of every element type, 5 elements, so that 4 and 2 bits do not come out even."""
    for kind, name in enumerate(TensorProto.DataType.keys()):
        if name not in ("UNDEFINED", "STRING") and name in trust._TYPES:
            yield name, helper.make_tensor("t", kind, [5], np.ones(5), raw=False)
            dtype = helper.tensor_dtype_to_np_dtype(kind)
            yield f"{name} raw", numpy_helper.from_array(np.ones(5).astype(dtype), "t")


@pytest.mark.parametrize(("name", "tensor"), list(arrays()))
def test_sizes_agree_with_what_onnx_writes(name: str, tensor: Any, tmp_path: Path) -> None:
    path = write(tmp_path, model_of([helper.make_node("Neg", ["x"], ["y"])], [tensor]))
    check_graph(path)
    tensor.dims[:] = [9]
    refused(write(tmp_path, model_of([helper.make_node("Neg", ["x"], ["y"])], [tensor])), "'t'", "demand")


def test_strings_may_be_embedded(tmp_path: Path) -> None:
    strings = helper.make_tensor("t", TensorProto.STRING, [2], [b"a", b"b"])
    check_graph(write(tmp_path, model_of([helper.make_node("Neg", ["x"], ["y"])], [strings])))
    strings.string_data.append(b"c")
    refused(write(tmp_path, model_of([helper.make_node("Neg", ["x"], ["y"])], [strings])), "3 entries")


def test_tied_weights_share_their_place(tmp_path: Path) -> None:
    tied = external()
    tied.name = "v"
    check_graph(write(tmp_path, model_of([helper.make_node("Neg", ["x"], ["y"])], [external(), tied])))


def test_a_link_within_the_folder_and_a_folder_that_is_a_link(tmp_path: Path) -> None:
    path = write(tmp_path / "real", matmul(external()))
    (path.parent / "w.data").rename(path.parent / "real.data")
    (path.parent / "w.data").symlink_to("real.data")
    (tmp_path / "link").symlink_to("real")
    check_folder(tmp_path / "real")
    check_folder(tmp_path / "link")


def hub_cache(root: Path) -> Path:
    """A snapshot whose files are links to blobs, as huggingface_hub lays them out."""
    repository = root / "models--a--b"
    path = write(repository / "snapshots" / "abc" / "onnx", matmul(external()))
    (repository / "blobs").mkdir()
    for file, digest in ((path, "1" * 40), (path.parent / "w.data", "2" * 64)):
        file.rename(repository / "blobs" / digest)
        file.symlink_to(f"../../../blobs/{digest}")
    return path


def test_a_hub_cache_passes(tmp_path: Path) -> None:
    path = hub_cache(tmp_path)
    check_folder(path.parent.parent)
    ort.InferenceSession(path, providers=["CPUExecutionProvider"])


# --- external data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        *("", "/etc/passwd", "../w.data", "sub/../../w.data", "a//b", "w.data/"),
        *("w.da\0ta", "..\\w.data", "C:w.data", "w.data:stream", "w\n.data"),
    ],
)
def test_a_location_that_is_not_a_plain_path(location: str, tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(WEIGHT.tobytes())
    path = write(tmp_path / "m", matmul(external(location=location)))
    refused(path, "'w'", "not a plain path inside the folder")


def test_onnxruntime_s_memory_address(tmp_path: Path) -> None:
    path = write(tmp_path, matmul(external(location="*/_ORT_MEM_ADDR_/*", offset="4096")))
    trap = tmp_path / "*" / "_ORT_MEM_ADDR_" / "*"
    trap.parent.mkdir(parents=True)
    trap.write_bytes(bytes(8192))
    refused(path, "not a plain path")


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(WEIGHT.tobytes())
    path = write(tmp_path / "m", matmul(external()))
    (path.parent / "w.data").unlink()
    (path.parent / "w.data").symlink_to(secret)
    refused(path, "leads out of", "secret")
    (path.parent / "w.data").unlink()
    (path.parent / "w.data").symlink_to("w.data")
    refused(path, "cannot be opened")
    (path.parent / "w.data").unlink()
    refused(path, "cannot be opened", "No such file")
    # A folder on the way.
    (path.parent / "sub").symlink_to(tmp_path)
    refused(write(path.parent, matmul(external(location="sub/secret"))), "leads out of")
    # The graph itself.
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "model.onnx").symlink_to(path)
    refused(tmp_path / "n" / "model.onnx", "leads out of")


def test_a_hub_cache_s_links_lead_to_its_own_blobs_only(tmp_path: Path) -> None:
    path = hub_cache(tmp_path)
    data = path.parent / "w.data"
    blob = Path(os.path.realpath(data))
    for target in (
        tmp_path / "models--c--d" / "blobs" / blob.name,  # another repository
        tmp_path / "models--a--b" / "refs" / blob.name,  # not a blob
        tmp_path / "models--a--b" / "blobs" / "passwd",  # not a hash
        tmp_path / "blobs" / blob.name,  # not where a repository has them
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(blob, target)
        data.unlink()
        data.symlink_to(target)
        refused(path, "leads out of")
    # The blobs through a linked folder, where no file is a link.
    (path.parent / "sub").symlink_to("../../../blobs")
    Path(os.path.realpath(path)).write_bytes(matmul(external(location=f"sub/{blob.name}")).SerializeToString())
    refused(path, "leads out of")
    Path(os.path.realpath(path)).write_bytes(matmul(external()).SerializeToString())
    # A blob that is a link itself.
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    blob.unlink()
    blob.symlink_to(tmp_path / "secret")
    data.unlink()
    data.symlink_to(blob)
    refused(path, "leads out of", "secret")


def test_external_data_in_a_pipe_or_a_folder(tmp_path: Path) -> None:
    path = write(tmp_path, matmul(external()))
    (tmp_path / "w.data").unlink()
    os.mkfifo(tmp_path / "w.data")
    refused(path, "not a regular file")
    (tmp_path / "w.data").unlink()
    (tmp_path / "w.data").mkdir()
    refused(path, "not a regular file")


@pytest.mark.parametrize("text", ["-1", "+0", "1_0", "0x10", "1e3", " 0", "٣", "9" * 30, "1.0"])
@pytest.mark.parametrize("key", ["offset", "length"])
def test_numbers_that_are_not_plain(key: str, text: str, tmp_path: Path) -> None:
    refused(write(tmp_path, matmul(external(**{key: text}))), key, "not a number of bytes")


def test_data_beyond_the_file(tmp_path: Path) -> None:
    refused(write(tmp_path, matmul(external(offset="1"))), "ends at byte 65 of a file of 64")
    refused(write(tmp_path, matmul(external(offset=str(10**17)))), "of a file of 64")
    # Without a length the shape decides.
    refused(write(tmp_path, matmul(external(offset="4", length=""))), "ends at byte 68")
    wide = external(length="")
    wide.dims[:] = [4, 5]
    refused(write(tmp_path, matmul(wide)), "ends at byte 80")


def test_a_length_that_the_shape_does_not_demand(tmp_path: Path) -> None:
    refused(write(tmp_path, matmul(external(length="60"))), "demand 64 bytes", "60 bytes")
    refused(write(tmp_path, matmul(external(length="0"))), "demand 64 bytes")


def test_external_strings(tmp_path: Path) -> None:
    tensor = external()
    tensor.data_type = TensorProto.STRING
    tensor.external_data[2].value = "0"
    refused(write(tmp_path, matmul(tensor)), "of strings as raw or external data")


def test_external_keys_twice_or_unknown(tmp_path: Path) -> None:
    twice = external()
    twice.external_data.add(key="location", value="/etc/passwd")
    refused(write(tmp_path, matmul(twice)), "'location'", "twice")
    refused(write(tmp_path, matmul(external(prepacked_0="w|0;64;64"))), "'prepacked_0'")


def test_data_in_two_places(tmp_path: Path) -> None:
    both = external()
    both.raw_data = WEIGHT.tobytes()
    refused(write(tmp_path, matmul(both)), "two places")
    hidden = external()
    hidden.data_location = TensorProto.DEFAULT
    refused(write(tmp_path, matmul(hidden)), "two places")
    part = numpy_helper.from_array(WEIGHT, "w")
    part.segment.begin = 8
    refused(write(tmp_path, matmul(part)), "two places")
    none = external(location="", offset="", length="")
    refused(write(tmp_path, matmul(none)), "in none")


def test_one_file_as_a_thousand_weights(tmp_path: Path) -> None:
    weights = []
    for i in range(1000):
        weights.append(external())
        weights[-1].name = f"w{i}"
    refused(write(tmp_path, model_of([helper.make_node("Neg", ["x"], ["y"])], weights)), "64 bytes as 64000 bytes")


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dims",
    [[2**62], [-1], [-4, -4], [2**32, 2**32], [2**62, 4], [2**62, 2**62, 0], [1] * 65, [2**63 - 1] * 3],
    ids=lambda d: f"{d[0]}x{len(d)}",
)
@pytest.mark.parametrize("where", ["embedded", "external", "sparse"])
def test_impossible_shapes(dims: list[int], where: str, tmp_path: Path) -> None:
    tensor = external(length="") if where == "external" else numpy_helper.from_array(WEIGHT, "w")
    tensor.dims[:] = dims
    model = matmul(tensor)
    if where == "sparse":
        del model.graph.initializer[:]
        sparse = model.graph.sparse_initializer.add(dims=dims)
        sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "w"))
        sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "i"))
    refused(write(tmp_path, model), "'w'", "impossible shape")


def test_a_sparse_tensor_that_swells(tmp_path: Path) -> None:
    model = matmul()
    sparse = model.graph.sparse_initializer.add(dims=[2**40])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "s"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "i"))
    refused(write(tmp_path, model), "'s'", "when dense")


def test_embedded_data_of_another_size(tmp_path: Path) -> None:
    short = numpy_helper.from_array(WEIGHT, "w")
    short.raw_data = short.raw_data[:-1]
    refused(write(tmp_path, matmul(short)), "63 bytes in the graph")
    empty = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4])
    refused(write(tmp_path, matmul(empty)), "0 entries in float_data, not 16")
    elsewhere = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], int32_data=[0] * 16)
    refused(write(tmp_path, matmul(elsewhere)), "0 entries in float_data")


@pytest.mark.parametrize("code", [0, 29, 2**31 - 1, -1])
def test_an_unknown_element_type(code: int, tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(WEIGHT, "w")
    tensor.data_type = code
    refused(write(tmp_path, matmul(tensor)), f"unknown type {code}")


# --- every place that can carry a tensor or an operator --------------------------------------------------------------


def places(tensor: Any, node: Any) -> Iterator[tuple[str, Any]]:
    """A model per place, with the tensor in it, or the node where only nodes fit."""
    neg = helper.make_node("Neg", ["x"], ["y"])
    sparse = onnx.SparseTensorProto(
        values=tensor, indices=numpy_helper.from_array(np.zeros(16, np.int64), "i"), dims=[16]
    )

    def with_attribute(**given: Any) -> Any:
        carrier = helper.make_node("Neg", ["x"], ["y"])
        # A type that lies about what is in it.
        carrier.attribute.append(onnx.AttributeProto(name="a", type=onnx.AttributeProto.INT, **given))
        return carrier

    inside = helper.make_graph([node], "sub", [], [value("b")])
    weighted = helper.make_graph([neg], "sub", [], [value("b")], [tensor])
    yield "initializer", model_of([neg], [tensor])
    for field in ("values", "indices"):
        model = model_of([neg])
        plain = model.graph.sparse_initializer.add(dims=[16])
        plain.values.CopyFrom(numpy_helper.from_array(np.zeros(16, np.int64), "v"))
        plain.indices.CopyFrom(numpy_helper.from_array(np.zeros(16, np.int64), "i"))
        getattr(plain, field).CopyFrom(tensor)
        yield f"sparse_initializer.{field}", model
    for name, given in {
        "t": {"t": tensor},
        "tensors": {"tensors": [tensor]},
        "sparse_tensor": {"sparse_tensor": sparse},
        "sparse_tensors": {"sparse_tensors": [sparse]},
        "g": {"g": weighted},
        "graphs": {"graphs": [weighted]},
        "g.node": {"g": inside},
        "graphs.node": {"graphs": [inside]},
    }.items():
        carrier = with_attribute(**given)
        yield name, model_of([carrier])
        yield f"function: {name}", model_of([neg], functions=[function("F", [carrier])])
    default = function("F", [neg])
    default.attribute_proto.append(onnx.AttributeProto(name="a", type=onnx.AttributeProto.TENSOR, t=tensor))
    yield "function default", model_of([neg], functions=[default])
    yield "function node", model_of([neg], functions=[function("F", [node])])
    for field in ("initialization", "algorithm"):
        model = model_of([neg])
        getattr(model.training_info.add(), field).CopyFrom(weighted)
        yield f"training {field}", model
    deep = branch(helper.make_node("Abs", ["x"], ["b"]), [tensor])
    for _ in range(3):
        deep.output[0] = "b"
        deep = branch(deep)
    yield "four branches down", model_of([deep], [condition()])
    yield "node", model_of([node])


EVIL_TENSOR = external(location="/etc/passwd")
EVIL_NODE = helper.make_node("Run", ["x"], ["b"], domain="evil.ops", name="bad")


@pytest.mark.parametrize(
    ("place", "model"), list(places(EVIL_TENSOR, EVIL_NODE)), ids=lambda p: p if isinstance(p, str) else ""
)
def test_nothing_hides(place: str, model: Any, tmp_path: Path) -> None:
    path = write(tmp_path, model)
    with pytest.raises(UntrustedModelError, match=r"/etc/passwd|evil\.ops"):
        check_graph(path)


@pytest.mark.parametrize(
    ("place", "model"),
    list(places(numpy_helper.from_array(np.zeros(16, np.int64), "w"), helper.make_node("Neg", ["x"], ["b"]))),
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_the_same_places_with_honest_content_pass(place: str, model: Any, tmp_path: Path) -> None:
    check_graph(write(tmp_path, model))


def test_onnx_has_no_place_that_the_walk_does_not_know() -> None:
    """A new version of ONNX that lets another message carry tensors or nodes makes this fail."""
    carriers = {"TensorProto", "SparseTensorProto", "NodeProto", "GraphProto", "FunctionProto", "AttributeProto"}
    seen, todo, found = set(), [onnx.ModelProto.DESCRIPTOR], set()
    while todo:
        message = todo.pop()
        if message.name in seen:
            continue
        seen.add(message.name)
        for field in message.fields:
            if field.message_type:
                todo.append(field.message_type)
                if field.message_type.name in carriers | {"TrainingInfoProto"}:
                    found.add(f"{message.name}.{field.name}")
    attribute = {f"AttributeProto.{f}" for f in ("t", "tensors", "sparse_tensor", "sparse_tensors", "g", "graphs")}
    assert found == attribute | {
        "ModelProto.graph",
        "ModelProto.functions",
        "ModelProto.training_info",
        "TrainingInfoProto.initialization",
        "TrainingInfoProto.algorithm",
        "GraphProto.node",
        "GraphProto.initializer",
        "GraphProto.sparse_initializer",
        "FunctionProto.node",
        "FunctionProto.attribute_proto",
        "NodeProto.attribute",
        "SparseTensorProto.values",
        "SparseTensorProto.indices",
    }


# --- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["evil.ops", "ai.onnx.ml", "com.microsoft.nchwc", "ai.onnx.preview.training", " "])
def test_domains(domain: str, tmp_path: Path) -> None:
    node = helper.make_node("Run", ["x"], ["y"], domain=domain, name="bad")
    refused(write(tmp_path, model_of([node])), "'bad'", f"{domain}::Run", "custom-op library")


def test_a_function_of_another_name_is_no_excuse(tmp_path: Path) -> None:
    honest = function("Twice", [helper.make_node("Add", ["x", "x"], ["y"])])
    refused(write(tmp_path, model_of([call("Thrice")], functions=[honest])), "loc::Thrice")


def test_operators_that_run_code(tmp_path: Path) -> None:
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="/tmp/a.engine")
    refused(write(tmp_path, model_of([node])), "EPContext", "compiled code")


def test_operators_that_onnx_does_not_have(tmp_path: Path) -> None:
    refused(write(tmp_path, model_of([helper.make_node("System", ["x"], ["y"])])), "System", "opset 18")
    # RMSNormalization came with 23.
    norm = model_of([helper.make_node("RMSNormalization", ["x", "x"], ["y"])])
    refused(write(tmp_path, norm), "RMSNormalization", "opset 18")
    norm.opset_import[0].version = 23
    check_graph(write(tmp_path, norm))


@pytest.mark.parametrize("version", [0, -1, 10**6, 2**62])
def test_an_opset_that_nobody_knows(version: int, tmp_path: Path) -> None:
    model = matmul()
    model.opset_import[0].version = version
    refused(write(tmp_path, model), f"opset {version}")


def test_opsets_missing_or_contradictory(tmp_path: Path) -> None:
    model = matmul()
    model.opset_import.append(helper.make_opsetid("ai.onnx", 17))
    refused(write(tmp_path, model), "two versions")
    del model.opset_import[:]
    refused(write(tmp_path, model), "imports no ONNX operator set")


def test_functions_defined_twice(tmp_path: Path) -> None:
    one = function("F", [helper.make_node("Neg", ["x"], ["y"])])
    refused(write(tmp_path, model_of([call("F")], functions=[one, one])), "'F'", "twice")


def test_functions_that_call_themselves(tmp_path: Path) -> None:
    pair = [function("A", [call("B")]), function("B", [call("A")])]
    refused(write(tmp_path, model_of([call("A")], functions=pair)), "call themselves")
    # Also where nobody calls them.
    refused(write(tmp_path, model_of([helper.make_node("Neg", ["x"], ["y"])], functions=pair)), "call themselves")


@pytest.mark.parametrize("step", [1, -1])
def test_functions_nested_too_deep(step: int, tmp_path: Path) -> None:
    chain = [function("F0", [helper.make_node("Neg", ["x"], ["y"])])]
    chain += [function(f"F{i}", [call(f"F{i - 1}")]) for i in range(1, 33)]
    refused(write(tmp_path, model_of([call("F32")], functions=chain[::step])), "nest deeper than 32")
    check_graph(write(tmp_path, model_of([call("F31")], functions=chain[:-1][::step])))


def test_functions_that_unfold_into_a_billion_nodes(tmp_path: Path) -> None:
    chain = [function("F0", [helper.make_node("Neg", ["x"], ["y"])])]
    chain += [function(f"F{i}", [call(f"F{i - 1}")] * 10) for i in range(1, 10)]
    refused(write(tmp_path, model_of([call("F9")], functions=chain)), "unfolds into")
    check_graph(write(tmp_path, model_of([call("F3")], functions=chain[:4])))


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def test_subgraphs_nested_too_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nested(levels: int) -> Any:
        node = helper.make_node("Abs", ["x"], ["b"])
        for _ in range(levels):
            node = branch(node)
            node.output[0] = "b"
        return model_of([node], [condition()])

    check_graph(write(tmp_path, nested(20)))
    # Here protobuf gives up, at 100 messages. It does not write them either, so the lengths are put on by hand.
    graph = b""
    for _ in range(60):
        for tag in (0x32, 0x2A, 0x0A):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            graph = bytes([tag]) + varint(len(graph)) + graph
    (tmp_path / "model.onnx").write_bytes(b"\x3a" + varint(len(graph)) + graph)
    refused(tmp_path / "model.onnx", "not an ONNX file or damaged")
    monkeypatch.setattr(trust, "DEPTH_LIMIT", 5)
    refused(write(tmp_path, nested(6)), "deeper than 5")
    check_graph(write(tmp_path, nested(5)))


# --- the file itself -------------------------------------------------------------------------------------------------


def test_a_graph_that_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    refused(tmp_path / "pipe.onnx", "not a regular file")
    (tmp_path / "folder.onnx").mkdir()
    refused(tmp_path / "folder.onnx", "not a regular file")
    refused(tmp_path / "none.onnx", "No such file")
    with pytest.raises(UntrustedModelError, match="not a regular file"):
        check_graph(Path("/dev/zero"))


@pytest.mark.parametrize("name", ["com.microsoft", "w.data", "length", "MatMul", "loc", "Twice"])
def test_names_that_are_not_utf8(name: str, tmp_path: Path) -> None:
    model = matmul(external())
    model.functions.append(function("Twice", [helper.make_node("Add", ["x", "x"], ["y"])]))
    path = write(tmp_path, model)
    check_graph(path)
    path.write_bytes(path.read_bytes().replace(name.encode(), b"\xff" + name.encode()[1:]))
    refused(path, "not UTF-8")


def test_a_graph_beyond_two_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.onnx"
    with path.open("wb") as f:
        f.truncate(2**31)  # a hole, no disk
    refused(path, "2147483648 bytes", "external data")


def test_a_graph_that_is_no_onnx(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"#!/bin/sh\necho hi\n")
    refused(path, "not an ONNX file")
    path.write_bytes(b"")
    refused(path, "holds no graph")
    write(tmp_path, matmul())
    path.rename(tmp_path / "model.ort")
    refused(tmp_path / "model.ort", "its own format")


# --- the folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [".", "onnx"])
@pytest.mark.parametrize("name", ["evil.so", "evil.so.1.2", "EVIL.DLL", "evil.dylib"])
def test_shared_libraries(name: str, level: str, tmp_path: Path) -> None:
    write(tmp_path / level, matmul())
    (tmp_path / level / name).write_bytes(b"")
    with pytest.raises(UntrustedModelError, match="is a shared library"):
        check_folder(tmp_path)


@pytest.mark.parametrize("key", ["custom_ops_library", "custom_op_library", "custom_ops_libraries", "CustomOpsLibrary"])
@pytest.mark.parametrize("file", ["genai_config.json", "other.json"])
def test_configurations_that_name_a_library(file: str, key: str, tmp_path: Path) -> None:
    write(tmp_path, matmul())
    content: dict[str, Any] = {"model": {"decoder": [{"session_options": {key: "evil"}}]}}
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UntrustedModelError, match=f"{file}: '{key}' names a custom-op library"):
        check_folder(tmp_path)
    # An escape is no disguise.
    (tmp_path / file).write_text(json.dumps(content).replace("u", "\\u0075").replace("U", "\\u0055"))
    with pytest.raises(UntrustedModelError, match="custom-op library"):
        check_folder(tmp_path)


def test_a_provider_option_that_is_a_library(tmp_path: Path) -> None:
    write(tmp_path, matmul())
    options = {"model": {"provider_options": [{"qnn": {"backend_path": "../evil.so.2"}}]}}
    (tmp_path / "genai_config.json").write_text(json.dumps(options))
    with pytest.raises(UntrustedModelError, match=r"names the shared library '\.\./evil\.so\.2'"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b"", b"[" * 100_000, b"1" * 10_000], ids=["cut", "utf-8", "empty", "deep", "digits"]
)
def test_unreadable_json(content: bytes, tmp_path: Path) -> None:
    write(tmp_path, matmul())
    (tmp_path / "genai_config.json").write_bytes(content)
    refused(tmp_path, "genai_config.json", "not readable JSON", check=check_folder)


def test_json_that_is_a_pipe_or_leads_out_or_is_huge(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", matmul()).parent
    os.mkfifo(folder / "a.json")
    refused(folder, "a.json", "not a regular file", check=check_folder)
    (folder / "a.json").unlink()
    (tmp_path / "secret.json").write_text("{}")
    (folder / "a.json").symlink_to(tmp_path / "secret.json")
    refused(folder, "a.json", "leads out of", check=check_folder)
    (folder / "a.json").unlink()
    with (folder / "a.json").open("wb") as f:
        f.truncate(trust.JSON_BYTES_LIMIT + 1)
    refused(folder, "a.json", "the limit is", check=check_folder)


def test_every_graph_of_the_folder_is_checked(tmp_path: Path) -> None:
    evil = model_of([EVIL_NODE])
    for place in (tmp_path / "a" / "second.onnx", tmp_path / "b" / "onnx" / "model.onnx", tmp_path / "c" / "B.ONNX"):
        top = tmp_path / place.relative_to(tmp_path).parts[0]
        write(top, matmul())
        check_folder(top)
        write(place.parent, evil, place.name)
        refused(top, place.name, "evil.ops", check=check_folder)


def test_a_folder_without_graphs_or_with_a_linked_inner_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no folder at", check=check_folder)
    refused(tmp_path, "no .onnx file", check=check_folder)
    write(tmp_path / "elsewhere", matmul())
    folder = write(tmp_path / "m", matmul()).parent
    (folder / "onnx").symlink_to(tmp_path / "elsewhere")
    refused(folder, "link out of the folder", check=check_folder)


def test_the_error_is_one_that_the_command_line_returns_two_for() -> None:
    assert issubclass(UntrustedModelError, SessionError)
    assert UntrustedModelError.exit_code == 2


def test_importing_what_opens_folders_imports_no_onnx() -> None:
    code = "import sys, runtime.loading; print([m for m in ('onnx', 'numpy', 'onnxruntime') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
