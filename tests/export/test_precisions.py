"""int8, int4 and bf16 against PyTorch: the model that the weights on disk stand for, computed in another way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.gate.checks.weights import weights
from bench.gate.modes import MODES
from bench.gate.validate import make_subject
from export.calibrate import hessians_of
from export.check import check_graph
from export.convert import convert
from export.errors import BrokenCheckpointError, ExportError, GraphCheckError, UnsupportedModelError
from export.manifest import Manifest, Weight, read_manifest
from export.pipeline import export_model, load_config
from export.quantize import Packed, dequantize, pack, quantize
from export.source import resolve
from export.spec import ExportSpec
from runtime.loading import load
from runtime.torch_session import TorchSession
from tests.torch_graph import TorchGraphSession

Folders = Callable[..., Path]
PARTS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate": ("gate",), "up": ("up",), "down": ("down",)}
EMBEDDING = "model.embed_tokens.weight"
# precision, method, zero points: everything that can be asked for.
RECIPES = [
    *(("int8", method, zeros) for method in ("rtn", "hqq", "kquant", "gptq") for zeros in ("integer", "none")),
    *(("int4", method, zeros) for method in ("rtn", "hqq", "kquant", "gptq") for zeros in ("integer", "float", "none")),
]
STEPS = 8
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "uint8": torch.uint8}


pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(precision: str, method: str, zeros: str, **fields: Any) -> dict[str, Any]:
    """Fields of an ExportSpec that keep nothing in floats and compute in floats."""
    own = {"method": method, "zero_points": zeros, "keep_float": "none", "accuracy_level": 0}
    return {**own, **fields}


def groups(layers: int) -> dict[str, list[str]]:
    """The weights of linear layers by the name of the product that they are joined for."""
    out = {}
    for i in range(layers):
        for part, members in PARTS.items():
            block = "self_attn" if part in ("qkv", "o") else "mlp"
            prefix = f"model.layers.{i}.{block}."
            out[f"{prefix}{part}_proj"] = [f"{prefix}{m}_proj.weight" for m in members]
    return out


def packed_weights(
    folder: Path, spec: ExportSpec, calibration: Sequence[str], layers: int = 2, tied: bool = False
) -> dict[str, tuple[list[str], int, Packed]]:
    """What is to be on disk: product -> its sources, bits, and the packed weight. Everything quantised but norms."""
    tensors = load_file(folder / "model.safetensors")
    if tied:
        tensors["lm_head.weight"] = tensors[EMBEDDING]
    bits = {"int8": 8, "int4": 4}
    wanted = [(name, sources, bits[spec.precision]) for name, sources in groups(layers).items()]
    if spec.lm_head != "float":
        wanted.append(("lm_head", ["lm_head.weight"], bits[str(spec.lm_head)]))
    if spec.embedding != "float":
        wanted.append(("model.embed_tokens", [EMBEDDING], 8))
    hessians = hessians_of(folder, calibration) if spec.method == "gptq" else {}
    out = {}
    for name, sources, n in wanted:
        # The embedding is looked up, not multiplied; up_proj reads what gate_proj reads.
        method = "rtn" if sources == [EMBEDDING] and spec.method == "gptq" else str(spec.method)
        key = sources[0].replace("up_proj", "gate_proj")
        key = EMBEDDING if tied and name == "lm_head" else key
        out[name] = (
            sources,
            n,
            quantize(
                torch.cat([tensors[s] for s in sources]),
                n,
                spec.block,
                method,
                hessian=hessians[key] if method == "gptq" else None,
                scale_dtype=TYPES[spec.float_type],
                float_zero=spec.zero_points == "float" and n == 4,
                symmetric=spec.zero_points == "none",
                positive=spec.target == "tensorrt",
            ),
        )
    return out


def replaced(folder: Path, out: Path, packed: dict[str, tuple[list[str], int, Packed]], block: int) -> Path:
    """The checkpoint with what the packed weights stand for in place of its own; the head untied."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    parameters = dict(model.named_parameters())
    for sources, bits, weight in packed.values():
        columns = parameters[sources[0]].shape[1]
        values = dequantize(weight, bits, block, columns)
        for name, rows in zip(sources, values.split([len(parameters[s]) for s in sources]), strict=True):
            parameters[name].data.copy_(rows)
    model.save_pretrained(out)
    return out


def distances(ours: Any, theirs: Any, seed: int = 1, steps: int = STEPS) -> list[float]:
    """Largest difference over largest logit: of an uneven batch's prefill, its steps, and a sequence's score."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 331, n).tolist() for n in (37, 5, 21)]
    pairs = [(ours.prefill(rows, steps).copy(), theirs.prefill(rows, steps).copy())]
    for _ in range(steps):
        token = rng.integers(0, 331, 3).tolist()
        pairs.append((ours.step(token).copy(), theirs.step(token).copy()))
    pairs.append((ours.score(rows[0]).copy(), theirs.score(rows[0]).copy()))
    assert all(a.shape == b.shape for a, b in pairs)
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]


def stored(folder: Path, manifest: Manifest, weight: Weight) -> Tensor:
    """A part of the data file, read at its offset."""
    with (folder / manifest.data_file).open("rb") as f:
        f.seek(weight.offset)
        raw = bytearray(f.read(weight.nbytes))
    return torch.frombuffer(raw, dtype=TYPES[weight.dtype]).reshape(weight.shape)


def same_bits(have: Tensor, want: Tensor) -> None:
    assert have.dtype == want.dtype
    assert have.shape == want.shape
    assert torch.equal(have.view(torch.uint8), want.contiguous().view(torch.uint8))


def check_on_disk(folder: Path, packed: dict[str, tuple[list[str], int, Packed]]) -> None:
    """Codes, scales and zero points (or offsets, or none) of every packed weight, bit for bit; and no others."""
    manifest = read_manifest(folder)
    weights = {w.name: w for w in manifest.weights}
    seen = set()
    for product, (sources, bits, want) in packed.items():
        codes = weights[f"{product}.weight.codes"]
        assert codes.bits == bits
        sources = [s if s in codes.sources else EMBEDDING for s in sources]  # a tied head
        assert list(codes.sources) == sources
        same_bits(stored(folder, manifest, codes).reshape(want.codes.shape), want.codes)
        scales = weights[f"{product}.weight.scales"]
        same_bits(stored(folder, manifest, scales), want.scales)
        seen |= {codes.name, scales.name}
        if want.zero_points is None:
            continue
        last = f"{product}.weight.offsets"
        if last in weights:
            offsets = ((8 - want.zero_points.float()) * want.scales.float()).t().to(want.scales.dtype)
            same_bits(stored(folder, manifest, weights[last]), offsets)
        else:
            last = f"{product}.weight.zero_points"
            same_bits(stored(folder, manifest, weights[last]), want.zero_points)
        seen.add(last)
    assert seen == {w.name for w in manifest.weights if w.bits}


@pytest.mark.parametrize(("precision", "method", "zeros"), RECIPES)
def test_quantised_graph_is_the_dequantised_model(
    precision: str,
    method: str,
    zeros: str,
    checkpoints: Folders,
    exports: Folders,
    calibration: Sequence[str],
    tmp_path: Path,
) -> None:
    fields = recipe(precision, method, zeros)
    spec = ExportSpec(str(checkpoints()), precision, **fields)
    packed = packed_weights(checkpoints(), spec, calibration)
    folder = exports(precision, spec=fields)
    check_on_disk(folder, packed)
    oracle = replaced(checkpoints(), tmp_path / "oracle", packed, spec.block)
    with load(folder, threads=1) as ours, TorchSession(oracle, attention="eager", threads=1) as theirs:
        assert max(distances(ours, theirs)) < 1e-5
        with TorchSession(checkpoints(), attention="eager", threads=1) as exact:
            # The oracle is not simply the checkpoint.
            assert max(distances(theirs, exact, steps=0)) > (1e-3 if precision == "int8" else 1e-2)


@pytest.mark.parametrize(("precision", "zeros"), [("int8", "integer"), ("int4", "integer"), ("int4", "float")])
def test_accuracy_level_4_is_a_few_percent_away(
    precision: str, zeros: str, checkpoints: Folders, exports: Folders, tmp_path: Path
) -> None:
    fields = recipe(precision, "rtn", zeros, accuracy_level=4)
    spec = ExportSpec(str(checkpoints()), precision, **fields)
    oracle = replaced(checkpoints(), tmp_path / "oracle", packed_weights(checkpoints(), spec, ()), spec.block)
    folder = exports(precision, spec=fields)
    levels = {
        a.i
        for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node
        if node.op_type == "MatMulNBits"
        for a in node.attribute
        if a.name == "accuracy_level"
    }
    assert levels == {4}
    with load(folder, threads=1) as ours, TorchSession(oracle, attention="eager", threads=1) as theirs:
        found = distances(ours, theirs)
        # Inputs rounded to 8 bits, on random weights that enlarge it: 3 % on average.
        assert 1e-3 < float(np.mean(found)) < 5e-2, found
        assert max(found) < 0.1


@pytest.mark.parametrize("zeros", ["integer", "float", "none"])
def test_a_row_that_blocks_do_not_divide(zeros: str, checkpoints: Folders, exports: Folders, tmp_path: Path) -> None:
    """88 inputs of down_proj are 2.75 blocks: no sums of whole blocks, so real zero points go to MatMulNBits itself."""
    fields = recipe("int4", "rtn", zeros)
    changes = {"intermediate_size": 88}
    folder = exports("int4", spec=fields, **changes)
    spec = ExportSpec(str(checkpoints(**changes)), "int4", **fields)
    packed = packed_weights(checkpoints(**changes), spec, ())
    check_on_disk(folder, packed)
    parts = {w.name: (w.transform, w.dtype) for w in read_manifest(folder).weights if "layers.0.mlp" in w.name}
    down, up = (f"model.layers.0.mlp.{p}_proj.weight" for p in ("down", "up"))
    if zeros == "float":
        assert parts[f"{down}.zero_points"] == ("zero_points", "fp32")
        assert parts[f"{up}.offsets"] == ("offsets", "fp32")
        assert f"{down}.offsets" not in parts
        assert f"{up}.zero_points" not in parts
    elif zeros == "none":
        assert {t for t, _ in parts.values()} == {"codes", "scales"}
    else:
        assert parts[f"{down}.zero_points"] == parts[f"{up}.zero_points"] == ("zero_points", "uint8")
    oracle = replaced(checkpoints(**changes), tmp_path / "oracle", packed, spec.block)
    with load(folder, threads=1) as ours, TorchSession(oracle, attention="eager", threads=1) as theirs:
        assert max(distances(ours, theirs)) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("precision", "method", "zeros", "lm_head", "embedding"),
    [
        ("int8", "rtn", "integer", "int8", "float"),
        ("int8", "gptq", "integer", "int8", "int8"),
        ("int8", "rtn", "none", "int8", "int8"),
        ("int4", "hqq", "float", "int4", "float"),
        ("int4", "rtn", "float", "float", "int8"),
        ("int4", "rtn", "none", "int4", "int8"),
    ],
)
def test_head_and_embedding_follow_their_own_policy(
    precision: str,
    method: str,
    zeros: str,
    lm_head: str,
    embedding: str,
    tied: bool,
    checkpoints: Folders,
    exports: Folders,
    calibration: Sequence[str],
    tmp_path: Path,
) -> None:
    fields = recipe(precision, method, zeros, lm_head=lm_head, embedding=embedding)
    changes = {"tie_word_embeddings": tied}
    source = checkpoints(**changes)
    folder = exports(precision, spec=fields, **changes)
    spec = ExportSpec(str(source), precision, **fields)
    packed = packed_weights(source, spec, calibration, tied=tied)
    check_on_disk(folder, packed)
    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    lookup = next(n for n in nodes if "input_ids" in n.input and n.input[1] == "input_ids")
    assert lookup.op_type == ("GatherBlockQuantized" if embedding == "int8" else "Gather")
    head = next(n for n in nodes if "logits" in n.output)
    wanted = {"float": "MatMul", "int8": "MatMulNBits", "int4": "Add" if zeros == "float" else "MatMulNBits"}
    assert head.op_type == wanted[lm_head]
    manifest = read_manifest(folder)
    if embedding == "float":
        # The head's codes are no reason to round what is looked up.
        (kept,) = (w for w in manifest.weights if w.name == EMBEDDING)
        same_bits(stored(folder, manifest, kept), load_file(source / "model.safetensors")[EMBEDDING])
    if tied and embedding == "int8":
        # The head is float or int8 of its own: it does not read the embedding's codes.
        assert {w.name for w in manifest.weights if EMBEDDING in w.sources} > {f"{EMBEDDING}.codes"}
    oracle = replaced(source, tmp_path / "oracle", packed, spec.block)
    with load(folder, threads=1) as ours, TorchSession(oracle, attention="eager", threads=1) as theirs:
        assert max(distances(ours, theirs)) < 1e-5


@pytest.mark.parametrize(("precision", "block"), [("int4", 32), ("int8", 128)])
@pytest.mark.parametrize("zeros", ["integer", "none"])
def test_rows_that_blocks_do_not_divide_are_looked_up_as_long_as_they_are(
    precision: str, block: int, zeros: str, checkpoints: Folders, exports: Folders, tmp_path: Path
) -> None:
    fields = recipe(precision, "rtn", zeros, embedding="int8", block_size=block)
    changes = {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5}
    source, folder = checkpoints(**changes), exports(precision, spec=fields, **changes)
    packed = packed_weights(source, ExportSpec(str(source), precision, **fields), ())
    oracle = replaced(source, tmp_path / "oracle", packed, block)
    with load(folder, threads=1) as ours, TorchSession(oracle, attention="eager", threads=1) as theirs:
        assert max(distances(ours, theirs)) < 1e-5
    # The gate finds every weight of it, with the manifest and without.
    assert weights(make_subject(folder, str(source), MODES["quick"])).status == "PASS"
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "manifest.json").unlink()
    assert weights(make_subject(bare, str(source), MODES["quick"])).status == "PASS"


def float_products(folder: Path) -> set[str]:
    """Products that are MatMul nodes in both graphs, by name; every other one must be a MatMulNBits."""
    found = []
    for file in ("model.onnx", "model_scoring.onnx"):
        kinds: dict[str, str] = {}
        for node in onnx.load(folder / file, load_external_data=False).graph.node:
            if node.op_type in ("MatMul", "MatMulNBits") and not node.name.endswith(".offsets.MatMul"):
                product, _, kind = node.name.rpartition(".")
                assert kind == node.op_type
                assert product not in kinds
                kinds[product] = kind
        assert set(kinds) == {*groups(2), "lm_head"}
        found.append({product for product, kind in kinds.items() if kind == "MatMul"})
    assert found[0] == found[1]
    return found[0]


def of(*keys: str) -> set[str]:
    """Products whose layer and part are named, as ``0.qkv``."""
    return {g for g in groups(2) if ".".join((g.split(".")[2], g.rpartition(".")[2].removesuffix("_proj"))) in keys}


FIRST = of("0.qkv", "0.o", "0.gate", "0.up", "0.down")
LAST = of("1.qkv", "1.o", "1.gate", "1.up", "1.down")


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("none", set()),
        ("qkv", of("0.qkv", "1.qkv")),
        ("down", of("0.down", "1.down")),
        ("o,gate,up", of("0.o", "1.o", "0.gate", "1.gate", "0.up", "1.up")),
        ("first:1", FIRST),
        ("last:1", LAST),
        ("qkv,last:1", {*LAST, *of("0.qkv")}),
    ],
)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_keep_float_keeps_these_and_no_others(precision: str, keep: str, kept: set[str], exports: Folders) -> None:
    folder = exports(precision, spec={"method": "rtn", "keep_float": keep})
    # The head has a policy of its own: float by default with int8, 8 bits with int4.
    assert float_products(folder) == kept | ({"lm_head"} if precision == "int8" else set())
    counts = read_manifest(folder).fused_ops
    assert counts["MatMulNBits"] == 10 - len(kept) + (precision == "int4")


def test_kept_floats_are_the_checkpoint_s_and_the_rest_is_not(
    checkpoints: Folders, exports: Folders, tmp_path: Path
) -> None:
    fields = {"method": "rtn", "keep_float": "qkv,last:1", "accuracy_level": 0}
    spec = ExportSpec(str(checkpoints()), "int8", **fields)
    packed = packed_weights(checkpoints(), spec, ())
    packed = {name: packed[name] for name in of("0.o", "0.gate", "0.up", "0.down")}
    folder = exports("int8", spec=fields)
    check_on_disk(folder, packed)
    oracle = replaced(checkpoints(), tmp_path / "oracle", packed, spec.block)
    with load(folder, threads=1) as ours, TorchSession(oracle, attention="eager", threads=1) as theirs:
        assert max(distances(ours, theirs)) < 1e-5


def test_a_policy_that_leaves_nothing_to_quantise_is_refused(checkpoints: Folders, tmp_path: Path) -> None:
    """int8's default keeps the first two layers and the last one: all that a model of two layers has."""
    with pytest.raises(UnsupportedModelError, match="--keep-float"):
        export_model(ExportSpec(str(checkpoints()), "int8"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    manifest, _ = export_model(ExportSpec(str(checkpoints(num_hidden_layers=4)), "int8"), tmp_path / "out")
    assert manifest.quantisation is not None
    assert manifest.quantisation.keep_float == "qkv,down,first:2,last:1"
    quantised = {w.name.removesuffix(".codes") for w in manifest.weights if w.transform == "codes"}
    assert quantised == {f"model.layers.2.{p}_proj.weight" for p in ("self_attn.o", "mlp.gate", "mlp.up")}


@pytest.mark.parametrize("zeros", ["integer", "float"])
def test_one_quantised_product_too_few_is_found(zeros: str, checkpoints: Folders) -> None:
    config = load_config(resolve(str(checkpoints())))
    spec = ExportSpec(str(checkpoints()), "int4", zero_points=zeros)
    model = convert(config, spec, "data").decode
    assert check_graph(model, config, spec)["MatMulNBits"] == 11
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits")
    lost = onnx.ModelProto()
    lost.CopyFrom(model)
    lost.graph.node.remove(node)
    with pytest.raises(GraphCheckError, match="10 MatMulNBits where the config demands 11"):
        check_graph(lost, config, spec)
    # A float product in its place, as a policy that is ignored would leave.
    swapped = onnx.ModelProto()
    swapped.CopyFrom(model)
    other = next(n for n in swapped.graph.node if n.name == node.name)
    other.op_type, other.domain = "MatMul", ""
    with pytest.raises(GraphCheckError, match="10 MatMulNBits where the config demands 11"):
        check_graph(swapped, config, spec)


def test_a_lost_offset_is_found(checkpoints: Folders) -> None:
    config = load_config(resolve(str(checkpoints())))
    spec = ExportSpec(str(checkpoints()), "int4")
    model = convert(config, spec, "data").decode
    node = next(n for n in model.graph.node if n.name.endswith("up_proj.offsets.MatMul"))
    model.graph.node.remove(node)
    with pytest.raises(GraphCheckError, match="9 MatMul where the config demands 10"):
        check_graph(model, config, spec)


@pytest.mark.parametrize("zeros", ["integer", "float"])
def test_int4_with_fp16_activations_stays_near(
    zeros: str, checkpoints: Folders, exports: Folders, tmp_path: Path
) -> None:
    fields = recipe("int4", "hqq", zeros, activations="fp16")
    folder = exports("int4", spec=fields)
    manifest = read_manifest(folder)
    assert (manifest.precision, manifest.activations, manifest.kv.dtype) == ("int4", "fp16", "fp16")
    spec = ExportSpec(str(checkpoints()), "int4", **fields)
    packed = packed_weights(checkpoints(), spec, ())
    assert {p.scales.dtype for _, _, p in packed.values()} == {torch.float16}
    check_on_disk(folder, packed)
    oracle = replaced(checkpoints(), tmp_path / "oracle", packed, spec.block)
    with load(folder, threads=1) as ours, TorchSession(oracle, attention="eager", threads=1) as theirs:
        assert 1e-6 < max(distances(ours, theirs)) < 1e-2


@pytest.mark.parametrize("texts", [(), ("",), ("  ", "\n")])
def test_gptq_without_text_is_refused(texts: Sequence[str], checkpoints: Folders, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="needs text"):
        export_model(ExportSpec(str(checkpoints()), "int4", method="gptq"), tmp_path / "out", calibration=texts)
    assert list(tmp_path.iterdir()) == []


def test_gptq_without_tokenizer_is_refused(checkpoints: Folders, calibration: Sequence[str], tmp_path: Path) -> None:
    bare = shutil.copytree(checkpoints(), tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (bare / name).unlink(missing_ok=True)
    with pytest.raises(ExportError, match="has no tokenizer"):
        export_model(ExportSpec(str(bare), "int4", method="gptq"), tmp_path / "out", calibration=calibration)
    assert not (tmp_path / "out").exists()


def test_gptq_does_not_start_a_model_that_does_not_fit(
    checkpoints: Folders, calibration: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    with pytest.raises(ExportError, match="calibrates in memory"):
        hessians_of(checkpoints(), calibration)


def test_second_moments_are_those_of_each_layer_s_own_input(checkpoints: Folders, calibration: Sequence[str]) -> None:
    """By hand: each layer's forward is wrapped and its inputs kept, the product is formed in fp64 at the end."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    found = hessians_of(checkpoints(), calibration)
    model = LlamaForCausalLM.from_pretrained(checkpoints()).eval()
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            kept = seen.setdefault(f"{name}.weight", [])

            def forward(x: Tensor, kept: list[Tensor] = kept, own: Any = module.forward) -> Tensor:
                kept.append(x.detach().double().flatten(0, 1))
                return own(x)

            module.forward = forward
    ids = AutoTokenizer.from_pretrained(checkpoints())("\n\n".join(calibration))["input_ids"]
    assert len(ids) > 4 * 160  # several windows of the model's context, the last one short
    assert len(ids) % 160
    with torch.no_grad():
        for piece in torch.tensor(ids).split(160):
            model(piece[None])
    tokens = len(ids)
    checked = 0
    for name, inputs in seen.items():
        x = torch.cat(inputs)
        assert len(x) == tokens
        want = 2 / tokens * x.t() @ x
        if name in found:
            assert float((found[name].double() - want).abs().max() / want.abs().max()) < 1e-5
            checked += 1
        else:  # q_proj stands for k_proj and v_proj, which are joined with it
            q = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
            assert torch.equal(torch.cat(seen[q]), x)
            assert q in found
    # Per layer q, o, gate, up and down; and the head.
    assert checked == len(found) == 11
    for i in range(2):
        prefix = f"model.layers.{i}.mlp."
        assert found[f"{prefix}gate_proj.weight"] is found[f"{prefix}up_proj.weight"]
    distinct = [found[n] for n in found if "up_proj" not in n and found[n].shape == (64, 64)]
    for i, a in enumerate(distinct):
        assert all(not torch.allclose(a, b, rtol=1e-2) for b in distinct[:i])


def test_a_tied_head_is_calibrated_as_a_head(checkpoints: Folders, calibration: Sequence[str]) -> None:
    found = hessians_of(checkpoints(tie_word_embeddings=True), calibration)
    assert found[EMBEDDING] is found["lm_head.weight"]
    # The head reads the final norm's output, of second moment about 1; embeddings themselves are much smaller.
    assert float(found[EMBEDDING].diagonal().mean()) > 0.5


def test_gptq_is_better_than_rounding_on_its_own_text(
    checkpoints: Folders, exports: Folders, calibration: Sequence[str]
) -> None:
    """A Hessian of the wrong layer would still give a valid model: only the error tells."""
    tensors = load_file(checkpoints() / "model.safetensors")
    hessians = hessians_of(checkpoints(), calibration)
    loss = {}
    for method in ("rtn", "gptq"):
        folder = exports("int4", spec=recipe("int4", method, "integer"))
        manifest = read_manifest(folder)
        weights = {w.name: w for w in manifest.weights}
        for product, sources in groups(2).items():
            parts = [
                stored(folder, manifest, weights[f"{product}.weight.{p}"]) for p in ("codes", "scales", "zero_points")
            ]
            want = torch.cat([tensors[s] for s in sources])
            error = dequantize(Packed(parts[0], parts[1], parts[2]), 4, 32, want.shape[1]) - want
            loss[product, method] = float((error @ hessians[sources[0]] * error).sum())
    for product in groups(2):
        assert loss[product, "gptq"] < 0.8 * loss[product, "rtn"], product


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"rms_norm_eps": 1e-2}])
@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_the_interpreter_equals_onnxruntime(target: str, changes: dict[str, Any], exports: Folders) -> None:
    """Without this, agreement on bf16 would say little."""
    folder = exports(spec={"target": target}, **changes)
    with load(folder, threads=1) as theirs:
        assert max(distances(TorchGraphSession(folder), theirs)) < 1e-5


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_bf16_is_transformers_bf16_to_rounding(target: str, checkpoints: Folders, exports: Folders) -> None:
    ours = TorchGraphSession(exports("bf16", spec={"target": target}))
    rng = np.random.default_rng(5)
    rows = [rng.integers(0, 331, n).tolist() for n in (37, 5, 21)]
    tokens = rng.integers(0, 331, (STEPS, 3)).tolist()

    def logits(session: Any) -> Any:
        parts = [session.prefill(rows, STEPS).copy(), *(session.step(t).copy() for t in tokens)]
        return np.concatenate([*parts, session.score(rows[0])])

    mine = logits(ours)
    with TorchSession(checkpoints(), attention="eager", threads=1) as session:
        exact = logits(session)
    with TorchSession(checkpoints(), "bf16", attention="eager", threads=1) as session:
        theirs = logits(session)

    def rms(x: Any) -> float:
        return float(np.sqrt(np.mean(np.square(x))))

    scale = rms(exact)
    # As far from the truth as PyTorch's own bf16 is, in about the same direction's size; not as near as fp32 or fp16.
    assert 1e-3 < rms(mine - exact) / scale < 1.5 * rms(theirs - exact) / scale
    assert rms(mine - theirs) < 1.5 * rms(theirs - exact)
    assert np.abs(mine - exact).max() / np.abs(exact).max() < 5e-2
    assert (mine.argmax(-1) == exact.argmax(-1)).mean() > 0.9


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_bf16_leaves_the_graph_as_fp32_and_the_cache_stays_bf16(target: str, exports: Folders) -> None:
    folder = exports("bf16", spec={"target": target})
    for file in ("model.onnx", "model_scoring.onnx"):
        graph = onnx.load(folder / file, load_external_data=False).graph
        types = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.output]}
        assert types.pop("logits") == onnx.TensorProto.FLOAT
        cache = {t for name, t in types.items() if name.startswith(("past", "present"))}
        assert cache == {onnx.TensorProto.BFLOAT16}
        last = next(n for n in graph.node if "logits" in n.output)
        assert last.op_type == "Cast"
        assert [n.op_type for n in graph.node if last.input[0] in n.output] == ["MatMul"]
        floats = {t.data_type for t in graph.initializer} - {onnx.TensorProto.INT64, onnx.TensorProto.INT32}
        assert floats == {onnx.TensorProto.BFLOAT16}
    session = TorchGraphSession(folder)
    session.prefill([[3, 4, 5]], 1)
    assert session.last["logits"].dtype == torch.float32
    kinds = {v.dtype for name, v in session.last.items() if name.startswith("present")}
    assert kinds == {torch.bfloat16}
    # What comes out has bf16's eight bits of mantissa: the head's product was rounded, then widened.
    assert torch.equal(session.last["logits"], session.last["logits"].bfloat16().float())


def test_bf16_of_a_deep_model_keeps_every_parameter_apart(checkpoints: Folders) -> None:
    """A Llama-2-7B has 291 parameters, more than bf16 has small integers: the exporter merged the last ones."""
    config = load_config(resolve(str(checkpoints())))
    config.num_hidden_layers = 32
    found = convert(config, ExportSpec("x", precision="bf16"), "model.onnx.data")
    sources = [s for r in found.recipes for s in r.sources]
    assert len(sources) == len(set(sources)) == 291
    names = {i.name for i in found.decode.graph.initializer}
    assert {"model.norm.weight", "model.layers.31.post_attention_layernorm.weight"} <= names


@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_bf16_data_is_the_checkpoint_rounded(target: str, checkpoints: Folders, exports: Folders) -> None:
    folder = exports("bf16", spec={"target": target})
    manifest = read_manifest(folder)
    tensors = load_file(checkpoints() / "model.safetensors")
    seen: set[str] = set()
    for weight in manifest.weights:
        assert weight.dtype == "bf16"
        if not weight.sources:
            continue
        want = torch.cat([tensors[s] for s in weight.sources]).to(torch.bfloat16)
        same_bits(stored(folder, manifest, weight), want.t() if "transpose" in weight.transform else want)
        seen.update(weight.sources)
    assert seen == set(tensors)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("rows", [{"k": 16}, {"k": 16, "v": 48}])
def test_joined_weights_of_other_shapes_are_refused(
    precision: str, rows: dict[str, int], checkpoints: Folders, tmp_path: Path
) -> None:
    """q, k and v are stored as one weight: too few rows of one must not be made up for by another's."""
    broken = shutil.copytree(checkpoints(), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    for part, n in rows.items():
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        tensors[name] = tensors[name].repeat(2, 1)[:n].clone()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BrokenCheckpointError, match=r"config\.json"):
        export_model(ExportSpec(str(broken), precision), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_packing_of_an_odd_row_of_zero_points_is_read_right(checkpoints: Folders, exports: Folders) -> None:
    """96 inputs are 3 blocks of 32: two zero points share a byte, the third has one to itself."""
    fields = recipe("int4", "rtn", "integer")
    folder = exports("int4", spec=fields)
    manifest = read_manifest(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = next(w for w in manifest.weights if w.name == f"{name}.zero_points")
    assert weight.shape == (64, 2)
    values = load_file(checkpoints() / "model.safetensors")[name].view(64, 3, 32)
    low, high = values.amin(2).clamp(max=0).double(), values.amax(2).clamp(min=0).double()
    zeros = (-low / ((high - low) / 15).float()).round().to(torch.uint8)
    same_bits(stored(folder, manifest, weight), pack(zeros, 4))
