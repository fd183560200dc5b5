"""Streamed weights against a plain in-memory export of the real model, and what streaming promises about memory."""

from __future__ import annotations

import copy
import gc
import hashlib
import itertools
import mmap
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from transformers import LlamaConfig

import export.weights
from export.convert import TORCH_DTYPE, convert
from export.errors import BrokenCheckpointError
from export.fused import MARKER_DOMAIN, MS, FusedOnnxConfig
from export.manifest import Weight, read_manifest
from export.pipeline import export_model
from export.spec import ExportSpec
from export.weights import Checkpoint

Folders = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("one_thread")
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "biased-tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
}
ROPE = ("model.rope_cos", "model.rope_sin")
Sources = tuple[str, ...]


def traced(folder: Path, target: str, last_logits: bool) -> onnx.ModelProto:
    """torch.onnx.export of the loaded model, weights in the file, markers for linear layers still in it."""
    from transformers import AutoConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = AutoConfig.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    half = config.hidden_size // config.num_attention_heads // 2
    everywhere = torch.arange(config.max_position_embeddings)[None]
    for name, table in zip(
        ("rope_cos", "rope_sin"), LlamaRotaryEmbedding(config)(torch.zeros(1), everywhere), strict=True
    ):
        model.model.register_buffer(name, table[0, :, :half].contiguous())
    onnx_config = FusedOnnxConfig(config, task="text-generation", use_past=True, use_past_in_inputs=True)
    onnx_config.last_logits = last_logits
    onnx_config.attention = "Attention" if target == "tensorrt" else "GroupQueryAttention"
    onnx_config.cache_length = length = config.max_position_embeddings if target == "tensorrt" else 1
    past = torch.zeros(1, config.num_key_value_heads, length, 2 * half)
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros((1, 2), dtype=torch.int64),
        "attention_mask": torch.ones((1, length if target == "tensorrt" else 3), dtype=torch.int64),
    }
    if target == "tensorrt":
        inputs["position_ids"] = torch.ones((1, 2), dtype=torch.int64)
        inputs["write_indices"] = torch.ones(1, dtype=torch.int64)
    inputs["past_key_values"] = [(past.clone(), past.clone()) for _ in range(config.num_hidden_layers)]
    file = folder.parent / "in-memory.onnx"
    with onnx_config.patch_model_for_export(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (),
            file,
            kwargs=inputs,
            input_names=list(onnx_config.inputs),
            output_names=list(onnx_config.outputs),
            dynamic_axes={**onnx_config.inputs, **onnx_config.outputs},
            opset_version=18,
            export_params=True,
            do_constant_folding=False,
            custom_opsets={MARKER_DOMAIN: 1, **({MS: 1} if target == "ort" else {})},
            dynamo=False,
        )
    return onnx.load(file)


def lowered(model: onnx.ModelProto, target: str) -> tuple[onnx.ModelProto, dict[Sources, NDArray[Any]]]:
    """Markers -> MatMul (and Add) over numpy arrays. Also: every initialiser as it is stored, by its sources."""
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    read: dict[Sources, NDArray[Any]] = {}
    nodes, made = [], {}
    for k, node in enumerate(model.graph.node):
        if node.domain != MARKER_DOMAIN:
            nodes.append(node)
            for name in node.input:
                if name in tensors:
                    made[name] = tensors[name]
                    read[() if name in ROPE else (name,)] = tensors[name]
            continue
        n = node.attribute[0].i
        weights, biases = tuple(node.input[1 : 1 + n]), tuple(node.input[1 + n :])
        made[f"w{k}"] = np.ascontiguousarray(np.concatenate([tensors[w] for w in weights]).T)
        read[weights, "transposed"] = made[f"w{k}"]  # type: ignore[index]
        nodes.append(helper.make_node("MatMul", [node.input[0], f"w{k}"], [f"p{k}" if biases else node.output[0]]))
        if biases:
            made[f"b{k}"] = np.concatenate([tensors[b] for b in biases])
            read[biases] = made[f"b{k}"]
            nodes.append(helper.make_node("Add", [f"p{k}", f"b{k}"], [node.output[0]]))
    for name in ROPE:
        read[(name,)] = tensors[name]
    read.pop((), None)
    del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:], model.opset_import[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in made.items())
    opsets = {"": 24} if target == "tensorrt" else {"": 18, MS: 1}
    model.opset_import.extend(helper.make_opsetid(d, v) for d, v in opsets.items())
    model.ir_version = 11 if target == "tensorrt" else 8
    return model, read


def opened(graph: str | bytes) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def outputs(session: Any, rows: Sequence[Sequence[int]], steps: int) -> Iterator[NDArray[Any]]:
    """Logits and cache of a right-padded batch's first run and of ``steps`` single tokens."""
    names = [i.name for i in session.get_inputs()]
    width, reserve = max(map(len, rows)), steps
    lengths = np.array([len(r) for r in rows])
    ids = np.array([[*r, *[0] * (width - len(r))] for r in rows], np.int64)
    valid, written = lengths, np.zeros_like(lengths)
    shape = next(i.shape for i in session.get_inputs() if i.name.startswith("past"))
    slots = shape[2] if isinstance(shape[2], int) else width + reserve
    past = {n: np.zeros((len(rows), shape[1], slots, shape[3]), np.float32) for n in names if n.startswith("past")}
    rng = np.random.default_rng(3)
    for _ in range(steps + 1):
        mask_width = slots if "write_indices" in names else valid.max()
        feed = {
            "input_ids": ids,
            "attention_mask": (np.arange(mask_width) < valid[:, None]).astype(np.int64),
            "position_ids": written[:, None] + np.arange(ids.shape[1]),
            "write_indices": written,
        }
        found = session.run(None, {n: feed[n] for n in names if n in feed} | past)
        found = dict(zip((o.name for o in session.get_outputs()), found, strict=True))
        yield from found.values()
        past = {n.replace("present", "past_key_values"): v for n, v in found.items() if n != "logits"}
        ids, written, valid = rng.integers(0, 331, (len(rows), 1)), valid, valid + 1


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
@pytest.mark.parametrize("name", VARIANTS)
def test_streamed_export_is_the_in_memory_export(
    name: str, target: str, checkpoints: Folders, exports: Folders
) -> None:
    folder = exports(spec={"target": target}, **VARIANTS[name])
    manifest = read_manifest(folder)
    data = (folder / manifest.data_file).read_bytes()
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, 331, n).tolist() for n in (19, 3, 11)]
    for file, last in ((manifest.decode_graph, True), (manifest.scoring_graph, False)):
        model, wanted = lowered(traced(checkpoints(**VARIANTS[name]), target, last), target)
        have: dict[Any, NDArray[Any]] = {}
        for w in manifest.weights:
            key: Any = w.sources or (w.name,)
            key = (key, "transposed") if "transpose" in w.transform else key
            assert key not in have, "stored twice"
            have[key] = np.frombuffer(data, np.float32, int(np.prod(w.shape)), w.offset).reshape(w.shape)
        if "tie_word_embeddings" in VARIANTS[name]:
            # The exporter may call the shared tensor by either of its names.
            wanted = {_tied(k): v for k, v in wanted.items()}
        assert set(have) == set(wanted)
        for key, tensor in wanted.items():
            assert have[key].shape == tensor.shape
            assert have[key].tobytes() == tensor.tobytes(), key
        ours, theirs = opened(str(folder / file)), opened(model.SerializeToString())
        for a, b in zip(outputs(ours, rows, 4), outputs(theirs, rows, 4), strict=True):
            assert np.abs(b).max() > 0.1
            assert a.shape == b.shape
            assert a.tobytes() == b.tobytes()


def _tied(key: Any) -> Any:
    if isinstance(key, tuple):
        return tuple(_tied(k) for k in key)
    return key.replace("lm_head.weight", "model.embed_tokens.weight")


@pytest.fixture
def live_bytes() -> Iterator[Callable[[], int]]:
    """Bytes of every tensor that Python holds and that is younger than the test, each storage once."""

    def count() -> int:
        storages = {}
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    gc.collect()
    gc.freeze()  # what is there already is not looked through at each call
    yield count
    gc.unfreeze()


@pytest.mark.parametrize(
    ("precision", "fields"),
    [("fp32", {}), ("fp16", {}), ("int4", {"method": "rtn", "lm_head": "int8"}), ("fp32", {"target": "tensorrt"})],
)
def test_two_weights_are_in_memory_at_most(
    precision: str,
    fields: dict[str, str],
    checkpoints: Folders,
    live_bytes: Callable[[], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one at work and the one that is being read, each with what it is joined with."""
    alive: dict[str, weakref.ref[Tensor]] = {}
    order: list[tuple[str, frozenset[str]]] = []
    held: list[int] = []
    lock = threading.RLock()
    own = {"load": Checkpoint.load, "pieces": export.weights.pieces, "joined": export.weights._joined}

    def names() -> frozenset[str]:
        return frozenset(n for n, ref in alive.items() if ref() is not None)

    def load(self: Checkpoint, name: str, *arguments: Any) -> Tensor:
        with lock:
            order.append((name, names()))
            tensor = own["load"](self, name, *arguments)
            alive[name] = weakref.ref(tensor)
            return tensor

    def count() -> None:
        with lock:
            held.append(live_bytes() - sum(alive[n]().nbytes for n in names()))  # type: ignore[union-attr]

    def pieces(recipe: Weight, sources: list[Tensor]) -> Iterator[Tensor]:
        count()
        return own["pieces"](recipe, sources)

    def joined(parts: list[Tensor]) -> Tensor:
        count()
        return own["joined"](parts)

    monkeypatch.setattr(Checkpoint, "load", load)
    monkeypatch.setattr(export.weights, "pieces", pieces)
    monkeypatch.setattr(export.weights, "_joined", joined)
    source = checkpoints()
    manifest, _ = export_model(ExportSpec(str(source), precision, **fields), tmp_path / "out")
    groups = [set(w.sources) for w in manifest.weights]
    assert {name for name, _ in order} == set().union(*groups)
    allowed = [a | b for a, b in itertools.pairwise(groups)]
    strangers = [(n, set(others)) for n, others in order if not any({n, *others} <= pair for pair in allowed)]
    assert strangers == []
    # Transposed or joined copies, codes and scales: nothing of a weight outlives its writing. 1 kB of small constants.
    assert max(held) - held[0] < 1000, [h - held[0] for h in held]
    assert names() == frozenset()


def test_a_weight_that_is_kept_would_be_noticed(
    checkpoints: Folders, live_bytes: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measurement of the test above sees tensors that are held anywhere."""
    kept: list[Tensor] = []
    own = export.weights.pieces

    def pieces(*arguments: Any) -> Iterator[Tensor]:
        for piece in own(*arguments):
            kept.append(piece.clone())
            yield piece

    monkeypatch.setattr(export.weights, "pieces", pieces)
    before = live_bytes()
    export_model(ExportSpec(str(checkpoints())), tmp_path / "out")
    assert len(kept) > 10
    assert live_bytes() - before >= sum(t.nbytes for t in kept)


@pytest.mark.parametrize("piece", [4, 200, 1 << 21])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("transform", ["copy", "concat", "transpose", "concat_transpose"])
def test_pieces_are_the_whole(transform: str, dtype: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the pieces: cast, joined and transposed as one operation on the whole would."""
    monkeypatch.setattr(export.weights, "_PIECE", piece)
    generator = torch.Generator().manual_seed(5)
    one = transform in ("copy", "transpose")
    sources = [torch.randn(n, 13, generator=generator) for n in ((7,) if one else (7, 5, 1))]
    whole = torch.cat(sources).to(TORCH_DTYPE[dtype])
    whole = whole.t() if "transpose" in transform else whole
    recipe = Weight("w", ("a", "b", "c")[: len(sources)], transform, tuple(whole.shape), dtype, 0, whole.nbytes)
    got = [p.clone() for p in export.weights.pieces(recipe, sources)]
    assert all(p.is_contiguous() and p.dtype == whole.dtype for p in got)
    assert len(got) > 1 or piece > 4
    assert torch.equal(torch.cat([p.reshape(-1) for p in got]), whole.reshape(-1))
    assert torch.equal(export.weights.make_initialiser(recipe, sources), whole)


def test_sources_of_another_shape_are_refused() -> None:
    recipe = Weight("w", ("a", "b"), "concat", (4, 3), "fp32", 0, 48)
    with pytest.raises(BrokenCheckpointError, match=r"w: .* \[5, 3\].* \[4, 3\]"):
        list(export.weights.pieces(recipe, [torch.zeros(2, 3), torch.zeros(3, 3)]))
    with pytest.raises(BrokenCheckpointError, match="w: "):
        list(export.weights.pieces(recipe, [torch.zeros(2, 3), torch.zeros(2, 4)]))


@pytest.mark.parametrize(("precision", "expected"), [("fp16", 1), ("int4", 2)])
def test_threads_are_one_while_floats_are_written_and_as_before_afterwards(
    precision: str, expected: int, checkpoints: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantiser computes and may use them all."""
    seen: set[int] = set()
    own = export.weights.pieces

    def pieces(*arguments: Any) -> Iterator[Tensor]:
        seen.add(torch.get_num_threads())
        return own(*arguments)

    monkeypatch.setattr(export.weights, "pieces", pieces)
    torch.set_num_threads(2)  # the fixture of this module gives back what was
    spec = {"method": "rtn", "keep_float": "none"} if precision == "int4" else {}
    export_model(ExportSpec(str(checkpoints()), precision, **spec), tmp_path / "out")
    assert seen == {expected}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_the_trace_holds_no_matrix(target: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter writes out every parameter that it is given, for a model of 7B 13 GB of them."""
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=64,
        intermediate_size=3000,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=3,  # an embedding keeps its row in mind
        max_position_embeddings=16,
    )
    sizes: list[int] = []
    own = torch.onnx.export

    def onnx_export(model: Any, *arguments: Any, **options: Any) -> Any:
        sizes.append(sum(p.numel() for p in model.parameters()))
        return own(model, *arguments, **options)

    monkeypatch.setattr(torch.onnx, "export", onnx_export)
    made = convert(config, ExportSpec("x", target=target), "data")
    assert len(sizes) == 2
    assert max(sizes) < 2000
    assert made.shapes["model.embed_tokens.weight"] == (4000, 64)
    assert made.data_bytes > 4 * 2 * 3 * 64 * 3000


def raw_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


class TestLoad:
    def test_reads_what_safetensors_reads(self, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(1)
        types = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool)
        tensors = {str(t): (torch.randn(300, 900, generator=generator) * 9).to(t) for t in types}
        tensors |= {"none": torch.zeros(0, 3), "one": torch.tensor(2.0)}
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
        checkpoint = Checkpoint(tmp_path)
        memory = mmap.mmap(-1, 6_000_000)
        for name in tensors:
            digest = hashlib.sha256()
            got = checkpoint.load(name, memory, 64, digest.update)
            expected = checkpoint.read(name)
            assert got.dtype == expected.dtype
            assert got.shape == expected.shape
            assert torch.equal(got, expected)
            assert checkpoint.nbytes(name) == expected.nbytes
            assert digest.hexdigest() == hashlib.sha256(raw_bytes(expected)).hexdigest()

    def test_a_file_that_became_shorter_is_named(self, tmp_path: Path) -> None:
        file = tmp_path / "model.safetensors"
        safetensors.torch.save_file({"w": torch.zeros(10_000)}, file)
        checkpoint = Checkpoint(tmp_path)
        file.write_bytes(file.read_bytes()[:-4])
        with pytest.raises(BrokenCheckpointError, match=r"model\.safetensors is cut short"):
            checkpoint.load("w", mmap.mmap(-1, 40_000), 0)

    def test_memory_is_used_again_and_a_large_one_goes_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(export.weights, "_LARGE", 10_000)
        buffer = export.weights._Buffer()
        first = buffer.of(9000)
        assert buffer.of(100) is first
        large = buffer.of(30_000)
        assert len(large) >= 30_000
        assert buffer.of(15_000) is large
        assert len(buffer.of(14_000)) < 30_000


@pytest.mark.parametrize(
    ("precision", "fields"), [("fp32", {}), ("fp16", {}), ("int4", {}), ("int8", {"keep_float": "qkv"})]
)
def test_shards_change_no_byte(precision: str, fields: dict[str, str], exports: Folders, checkpoints: Folders) -> None:
    assert len(list(checkpoints(shards="60KB").glob("*.safetensors"))) > 3
    whole, sharded = exports(precision, spec=fields), exports(precision, spec=fields, shards="60KB")
    for name in ("model.onnx.data", "model.onnx", "model_scoring.onnx"):
        assert (whole / name).read_bytes() == (sharded / name).read_bytes()
    assert read_manifest(whole).weights == read_manifest(sharded).weights


def test_files_that_the_index_does_not_name_are_not_read(
    checkpoints: Folders, exports: Folders, tmp_path: Path
) -> None:
    """A consolidated copy beside the shards, as some hubs have it, is not mixed in."""
    import shutil

    folder = shutil.copytree(checkpoints(shards="60KB"), tmp_path / "checkpoint")
    shutil.copyfile(checkpoints(seed=1) / "model.safetensors", folder / "consolidated.safetensors")
    manifest, _ = export_model(ExportSpec(str(folder)), tmp_path / "out")
    assert manifest.files["model.onnx.data"] == read_manifest(exports()).files["model.onnx.data"]


def test_the_patched_model_is_whole_again(checkpoints: Folders) -> None:
    """What the oracle above borrows is given back: the model computes after the block what it did before."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoints(), attn_implementation="eager").eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        before = model(ids).logits.clone()
        config = FusedOnnxConfig(
            copy.deepcopy(model.config), task="text-generation", use_past=True, use_past_in_inputs=True
        )
        with config.patch_model_for_export(model):
            pass
        assert torch.equal(model(ids).logits, before)


def test_in_memory_oracle_has_no_external_data(checkpoints: Folders) -> None:
    """Else equality with the streamed file would be equality with itself."""
    model = traced(checkpoints(), "ort", True)
    assert all(t.data_location == TensorProto.DEFAULT for t in model.graph.initializer)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_progress_ends_at_the_size_of_the_file(precision: str, checkpoints: Folders, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    export_model(
        ExportSpec(str(checkpoints()), precision, **({"keep_float": "none"} if precision == "int8" else {})),
        tmp_path / "out",
        progress=lambda done, total: told.append((done, total)),
    )
    size = (tmp_path / "out" / "model.onnx.data").stat().st_size
    assert told[-1] == (size, size)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
