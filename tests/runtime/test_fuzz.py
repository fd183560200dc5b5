"""Damaged and hostile files: an error of ours or a valid model, never a crash, a hang or all of the memory.

What :func:`runtime.trust.check_graph` lets through is opened by ONNX Runtime in a second process with limits on memory
and time, so that its death is a failed example and not the end of the test run. Derandomised: CI sees the same bytes.
"""

from __future__ import annotations

import json
import random
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    FileEntry,
    KVLayout,
    Manifest,
    ManifestError,
    Quantisation,
    Weight,
    read_manifest,
)
from runtime.trust import UntrustedModelError, check_graph

FIXED = partial(
    settings,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
SECONDS_PER_FILE = 10.0
BYTES_PER_FILE = 3 << 30

# --- random edits of bytes -------------------------------------------------------------------------------------------

POSITION = st.floats(0, 1, exclude_max=True)
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), POSITION, st.integers(1, 255)),
        st.tuples(st.just("set"), POSITION, st.sampled_from([0, 1, 0x7F, 0x80, 0xFF])),
        st.tuples(st.just("insert"), POSITION, st.binary(min_size=1, max_size=12)),
        st.tuples(st.just("delete"), POSITION, st.integers(1, 12)),
        st.tuples(st.just("copy"), POSITION, POSITION),
        st.tuples(st.just("cut"), POSITION, st.none()),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, edits: list[tuple[str, float, Any]]) -> bytes:
    for kind, position, how in edits:
        at = int(position * len(data))
        if kind in ("flip", "set") and data:
            changed = data[at] ^ how if kind == "flip" else how
            data = data[:at] + bytes([changed]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + how + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + how :]
        elif kind == "copy":
            data = data[:at] + data[int(how * len(data)) :][:40] + data[at:]
        elif kind == "cut":
            data = data[:at]
    return data


# --- the manifest ----------------------------------------------------------------------------------------------------


def small_manifest() -> Manifest:
    digest = "0" * 64
    return Manifest(
        schema_version=SCHEMA_VERSION,
        created_utc="2025-01-01T00:00:00Z",
        spec={"precision": "fp32", "block_size": None},
        spec_digest=digest,
        model_name="tiny",
        model_type="llama",
        weights_sha256=digest,
        weights_origin="here",
        source_key="k",
        parameters=16,
        precision="int4",
        activations="fp32",
        quantisation=Quantisation("int4", "rtn", 32, 4, "integer", "none", "int8", "float"),
        target="ort",
        attention="GroupQueryAttention",
        padding="right",
        decode_logits="last",
        opset=18,
        vocab_size=4,
        context_length=8,
        eos_token_ids=(2,),
        decode_graph="model.onnx",
        scoring_graph="model_scoring.onnx",
        data_file="model.onnx.data",
        inputs=("input_ids",),
        outputs=("logits",),
        kv=KVLayout(1, 1, 4, "fp32", True),
        fused_ops={"GroupQueryAttention": 1},
        node_count=3,
        decode_weight_bytes=64,
        weights=(Weight("w", ("a", "b"), "concat", (4, 4), "fp32", 0, 64),),
        versions={"onnx": "1.20"},
        files={name: FileEntry(10, digest) for name in ("model.onnx", "model_scoring.onnx", "model.onnx.data")},
    )


def manifest_or_error(folder: Path, content: bytes) -> Manifest | None:
    """What reading gives; anything but a Manifest of the right types and a ManifestError fails the test."""
    (folder / MANIFEST_NAME).write_bytes(content)
    try:
        manifest = read_manifest(folder)
    except ManifestError:
        return None
    # Written and read again it is the same: nothing of a wrong type came through to_json unnoticed.
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    again = read_manifest(folder)
    assert again.to_json() == manifest.to_json()
    assert isinstance(manifest.kv.bytes_per_token(), int)
    assert all(type(d) is int for w in manifest.weights for d in (*w.shape, w.offset, w.nbytes, w.bits))
    assert all(type(s) is str for w in manifest.weights for s in (*w.sources, w.name, w.dtype))
    assert all(type(n) is str and type(f) is FileEntry and type(f.size) is int for n, f in manifest.files.items())
    assert all(type(s) is str for s in (*manifest.inputs, *manifest.outputs, *manifest.notes, manifest.data_file))
    hash(manifest.weights)
    return manifest


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([2**31, 2**64, -1, 10**400])
    | st.floats()
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def spots(item: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    pairs = list(item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ())
    for key, value in pairs:
        yield item, key
        yield from spots(value)


def test_the_manifest_unchanged_reads_back(tmp_path: Path) -> None:
    assert manifest_or_error(tmp_path, small_manifest().to_json().encode()) == small_manifest()


@FIXED(max_examples=400)
@given(edits=EDITS)
def test_manifest_bytes(edits: list[tuple[str, float, Any]], tmp_path: Path) -> None:
    manifest_or_error(tmp_path, edited(small_manifest().to_json().encode(), edits))


@FIXED(max_examples=600)
@given(where=st.integers(0, 10**6), value=JSON, how=st.sampled_from(["replace", "delete", "rename"]))
def test_manifest_fields(where: int, value: Any, how: str, tmp_path: Path) -> None:
    content = json.loads(small_manifest().to_json())
    everywhere = list(spots(content))
    container, key = everywhere[where % len(everywhere)]
    if how == "replace":
        container[key] = value
    else:
        old = container.pop(key)
        if how == "rename" and isinstance(container, dict):
            container[str(value)] = old
    manifest_or_error(tmp_path, json.dumps(content).encode())


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 10**6,
        b'{"schema_version": ' + b"9" * 5000 + b"}",
        b'{"schema_version": NaN}',
        b'{"schema_version": [2]}',
        b"null",
        b"\xef\xbb\xbf{}",
        b"\0",
        b"",
    ],
    ids=["deep", "digits", "NaN", "list", "null", "BOM", "NUL", "empty"],
)
def test_manifest_lures(content: bytes, tmp_path: Path) -> None:
    assert manifest_or_error(tmp_path, content) is None


def test_a_manifest_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"opset": True}, "opset: 'True' is no int"),
        ({"opset": 18.0}, "opset: '18.0' is no int"),
        ({"opset": -1}, "opset: '-1'"),
        ({"inputs": "input_ids"}, "inputs"),
        ({"inputs": [1]}, r"inputs\[0\]"),
        ({"weights": [{"name": "w"}]}, r"weights\[0\] lacks dtype"),
        ({"files": {"a": {"size": "10", "sha256": ""}}}, r"files\['a'\].size"),
        ({"files": {"a": {"size": 1, "sha256": "", "x": 0}}}, "unknown x"),
        ({"quantisation": []}, "quantisation"),
        ({"kv": {"layers": 1, "kv_heads": 1, "head_dim": 4, "dtype": "fp8", "shared_buffer": True}}, "kv.dtype"),
        ({"kv": {"layers": 1, "kv_heads": 1, "head_dim": 4, "dtype": "fp32", "shared_buffer": 1}}, "kv.shared_buffer"),
        ({"spec": None}, "spec"),
        ({"fused_ops": {"A": "1"}}, "fused_ops"),
    ],
)
def test_manifest_fields_of_the_wrong_type(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(json.loads(small_manifest().to_json()) | change))
    with pytest.raises(ManifestError, match=words):
        read_manifest(tmp_path)


# --- the graph -------------------------------------------------------------------------------------------------------

OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("loc", 1)]
WORKER = f"""
import os, resource, sys
import onnxruntime as ort
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # ONNX Runtime's Python prints to standard output
resource.setrlimit(resource.RLIMIT_AS, ({BYTES_PER_FILE}, {BYTES_PER_FILE}))
options = ort.SessionOptions()
options.log_severity_level = 4
options.intra_op_num_threads = 1
for line in sys.stdin:
    try:
        ort.InferenceSession(line.rstrip("\\n"), options, providers=["CPUExecutionProvider"])
        print("opened", file=answers)
    except Exception as e:
        print("error", type(e).__name__, file=answers)
"""


class Opener:
    """A process that opens one file after another, and is replaced when it dies or hangs."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.answers: list[str] = []

    def open(self, path: Path) -> str:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
        except BrokenPipeError:
            status = process.wait()
            self.close()
            raise AssertionError(f"it died after its last answer, status {status}") from None
        ready, _, _ = select.select([process.stdout], [], [], SECONDS_PER_FILE)
        answer = process.stdout.readline() if ready else ""
        if not answer:
            hung = not ready
            self.close()
            raise AssertionError(
                f"ONNX Runtime needs over {SECONDS_PER_FILE} s" if hung else f"it died, status {process.returncode}"
            )
        self.answers.append(answer.strip())
        return self.answers[-1]

    def close(self) -> None:
        if self.process is not None:
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def opener() -> Iterator[Opener]:
    pytest.importorskip("resource")
    opener = Opener()
    opener.open(Path("/nonexistent"))  # the import is not part of an example's time
    yield opener
    opener.close()


def check_then_open(path: Path, opener: Opener) -> str:
    """``refused``, or what ONNX Runtime says about a file that passed."""
    try:
        check_graph(path)
    except UntrustedModelError:
        return "refused"
    return opener.open(path)


def base_model() -> Any:
    """Everything that a header can hold, small: external, embedded and constant weights, a branch, a function."""
    made = numpy_helper.from_array
    constant, node = TensorProto(name="ext", data_type=TensorProto.FLOAT, dims=[4, 4]), helper.make_node
    constant.data_location = TensorProto.EXTERNAL
    for key, text in {"location": "w.data", "offset": "16", "length": "64"}.items():
        constant.external_data.add(key=key, value=text)
    then = helper.make_graph(
        [node("MatMul", ["h0", "ext"], ["b"])], "then", [], [helper.make_tensor_value_info("b", 1, [1, 4])]
    )
    other = helper.make_graph(
        [node("Twice", ["h0"], ["b"], domain="loc")], "else", [], [helper.make_tensor_value_info("b", 1, [1, 4])]
    )
    nodes = [
        node("SimplifiedLayerNormalization", ["x", "scale"], ["h0"], axis=-1, epsilon=1e-5),
        node("If", ["c"], ["h1"], then_branch=then, else_branch=other),
        node("MatMulNBits", ["h1", "q", "s"], ["h2"], domain="com.microsoft", K=4, N=4, bits=4, block_size=16),
        node("Constant", [], ["k"], value=made(np.eye(4, dtype=np.float32), "k")),
        node("Gemm", ["h2", "k"], ["h3"], transB=1),
        node("Shape", ["h3"], ["shape"]),
        node("ConstantOfShape", ["two"], ["zero"], value=made(np.zeros(1, np.float32), "z")),
        node("Slice", ["zero", "two", "two"], ["nothing"]),
        node("Reshape", ["h3", "shape"], ["h4"], allowzero=0),
        node("Gather", ["ext", "two"], ["rows"], axis=0),
        node("ReduceSum", ["rows", "axes"], ["sum"], keepdims=1),
        node("Add", ["h4", "sum"], ["y"]),
    ]
    weights = [
        constant,
        made(np.ones(4, np.float32), "scale"),
        made(np.zeros((4, 1, 8), np.uint8), "q"),
        made(np.ones((4, 1), np.float32), "s"),
        helper.make_tensor("c", TensorProto.BOOL, [], [True]),
        helper.make_tensor("two", TensorProto.INT64, [2], [1, 2]),
        helper.make_tensor("axes", TensorProto.INT64, [1], [0]),
    ]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y", "h1")]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:2], weights, value_info=infos[2:])
    twice = helper.make_function("loc", "Twice", ["x"], ["y"], [node("Add", ["x", "x"], ["y"])], OPSETS)
    return helper.make_model(graph, functions=[twice], opset_imports=OPSETS, ir_version=9)


def write(folder: Path, content: bytes) -> Path:
    (folder / "w.data").write_bytes(bytes(range(16)) + np.eye(4, dtype=np.float32).tobytes())
    (folder / "model.onnx").write_bytes(content)
    return folder / "model.onnx"


BASE = base_model().SerializeToString()


def test_the_model_unchanged_opens(tmp_path: Path, opener: Opener) -> None:
    assert check_then_open(write(tmp_path, BASE), opener) == "opened"


def test_the_opener_tells_death_and_hanging_from_errors(
    tmp_path: Path, opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests below would prove nothing."""
    assert opener.open(tmp_path / "none.onnx").startswith("error")
    lazy = Opener()
    monkeypatch.setattr(f"{__name__}.WORKER", "import sys, time; sys.stdin.readline(); time.sleep(60)", raising=True)
    monkeypatch.setattr(f"{__name__}.SECONDS_PER_FILE", 0.5)
    with pytest.raises(AssertionError, match="needs over"):
        lazy.open(tmp_path)
    monkeypatch.setattr(f"{__name__}.WORKER", "import os, sys; sys.stdin.readline(); os.abort()")
    monkeypatch.setattr(f"{__name__}.SECONDS_PER_FILE", 10.0)
    with pytest.raises(AssertionError, match="it died, status -6"):
        lazy.open(tmp_path)


@FIXED(max_examples=400)
@given(edits=EDITS)
def test_graph_bytes(edits: list[tuple[str, float, Any]], tmp_path: Path, opener: Opener) -> None:
    check_then_open(write(tmp_path, edited(BASE, edits)), opener)


LURES: dict[str, tuple[Any, ...]] = {
    "int": (0, 1, -1, 2, 3, 16, 64, 127, 2**31 - 1, -(2**31)),
    "long": (0, 1, -1, 2, 3, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63)),
    "float": (0.0, -1.0, float("nan"), float("inf"), 1e38),
    "text": ("", "x", "y", "h1", "ext", "loc", "Twice", "com.microsoft", "Loop", "Scan", "If", "Identity", "../w.data"),
    "number": ("0", "1", "16", "64", "-1", "18446744073709551615", "9223372036854775807", ""),
}


def messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type:
            for inner in value if field.is_repeated else [value]:
                yield from messages(inner)


def bend(message: Any, dice: random.Random) -> None:
    """Change one field of one message to something that parses and does not belong there."""
    found = dice.choice(list(messages(message)))
    field = dice.choice(found.DESCRIPTOR.fields)
    repeated = getattr(found, field.name) if field.is_repeated else None
    if repeated is not None and len(repeated) and dice.random() < 0.3:
        del repeated[dice.randrange(len(repeated))]
        return
    if field.message_type:
        if repeated is not None and len(repeated):
            repeated.append(dice.choice(repeated))  # twice the same
        elif repeated is not None:
            repeated.add()
        else:
            getattr(found, field.name).SetInParent()
        return
    if field.type == field.TYPE_BYTES:
        value: Any = dice.randbytes(dice.choice((0, 1, 8, 64)))
    elif field.type == field.TYPE_STRING:
        value = dice.choice(LURES["number" if found.DESCRIPTOR.name == "StringStringEntryProto" else "text"])
    elif field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        value = dice.choice(LURES["float"])
    elif field.type == field.TYPE_ENUM:
        value = dice.choice([v.number for v in field.enum_type.values])
    elif field.type == field.TYPE_UINT64:
        value = abs(dice.choice(LURES["long"][:-1]))
    else:
        value = dice.choice(LURES["long" if field.type == field.TYPE_INT64 else "int"])
    if repeated is None:
        setattr(found, field.name, value)
    elif len(repeated) and dice.random() < 0.7:
        repeated[dice.randrange(len(repeated))] = value
    else:
        repeated.append(value)


@FIXED(max_examples=600)
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 3))
def test_graph_fields(seed: int, changes: int, tmp_path: Path, opener: Opener) -> None:
    model, dice = onnx.ModelProto.FromString(BASE), random.Random(seed)
    for _ in range(changes):
        bend(model, dice)
    check_then_open(write(tmp_path, model.SerializeToString()), opener)


def test_both_outcomes_were_seen(opener: Opener) -> None:
    """A check that refused everything would pass the tests above."""
    assert sum(a == "opened" for a in opener.answers) > 50
    assert sum(a.startswith("error") for a in opener.answers) > 50


# --- lures -----------------------------------------------------------------------------------------------------------


def nested_branches(depth: int) -> Any:
    """``If`` in ``If``; 30 levels is what protobuf still reads."""
    info = [helper.make_tensor_value_info("b", 1, [1, 4])]
    node = helper.make_node("Neg", ["x"], ["b"])
    for _ in range(depth):
        graph = helper.make_graph([node], "sub", [], info)
        leaf = helper.make_graph([helper.make_node("Abs", ["x"], ["b"])], "leaf", [], info)
        node = helper.make_node("If", ["c"], ["b"], then_branch=graph, else_branch=leaf)
    flag = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", 1, [1, 4])], info, [flag])
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=9)


def function_tree(width: int, levels: int, loop: bool = False) -> Any:
    """Each function calls the one below ``width`` times; with ``loop`` the lowest calls the highest."""
    functions = []
    for i in range(levels):
        domain, below = ("loc", f"F{i - 1}") if i else ("loc", f"F{levels - 1}") if loop else ("", "Neg")
        names = ["x", *(f"t{j}" for j in range(width - 1)), "y"]
        nodes = [helper.make_node(below, [a], [b], domain=domain) for a, b in pairwise(names)]
        functions.append(helper.make_function("loc", f"F{i}", ["x"], ["y"], nodes, OPSETS))
    infos = [helper.make_tensor_value_info(n, 1, [1]) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node(f"F{levels - 1}", ["x"], ["y"], domain="loc")], "g", infos[:1], infos[1:]
    )
    return helper.make_model(graph, functions=functions, opset_imports=OPSETS, ir_version=9)


def with_dims(*dims: int) -> Any:
    model = onnx.ModelProto.FromString(BASE)
    model.graph.initializer[0].dims[:] = dims
    del model.graph.initializer[0].external_data[2]
    return model


def many_inputs() -> Any:
    model = onnx.ModelProto.FromString(BASE)
    model.graph.node[-1].input.extend(["x"] * 100_000)
    return model


def with_input_dims() -> Any:
    model = onnx.ModelProto.FromString(BASE)
    for dim in model.graph.input[0].type.tensor_type.shape.dim:
        dim.dim_value = 2**62
    return model


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: with_dims(2**62), "refused"),
        (lambda: with_dims(2**32, 2**32), "refused"),
        (lambda: with_dims(-1, -16), "refused"),
        (lambda: with_dims(2**62, 2**62, 0), "refused"),
        (lambda: with_dims(*[1] * 10_000), "refused"),
        (lambda: function_tree(1, 2, loop=True), "refused"),
        (lambda: function_tree(10, 12), "refused"),
        (lambda: function_tree(1, 500), "refused"),
        (lambda: function_tree(10, 3), "opened"),
        (lambda: nested_branches(25), "opened"),
        (many_inputs, "error"),
        (with_input_dims, "error"),
    ],
    ids=[
        *("2**62", "2**32 twice", "negative", "with a zero", "rank", "recursive", "a trillion nodes"),
        *("deep functions", "functions", "branches", "inputs", "input shape"),
    ],
)
def test_lures(make: Callable[[], Any], expected: str, tmp_path: Path, opener: Opener) -> None:
    assert check_then_open(write(tmp_path, make().SerializeToString()), opener).startswith(expected)
