"""Checkpoints in other spellings and containers are read as what they are, or refused; nothing is lost in silence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.cache import publish
from export.errors import BrokenCheckpointError, UnsupportedModelError
from export.newer_config import older
from export.pipeline import export_model
from export.source import resolve
from export.spec import ExportSpec
from runtime.loading import load
from runtime.torch_session import TorchSession

Checkpoints = Callable[..., Path]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROW = [int(i) for i in np.random.default_rng(1).integers(0, 300, 60)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path / "cache"))


def edited(folder: Path, name: str, drop: tuple[str, ...] = (), **changes: Any) -> None:
    path = folder / name
    raw = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps(raw | changes))


def scores(folder: Path) -> np.ndarray[Any, Any]:
    with load(folder, threads=1) as session:
        return session.score(ROW).copy()


def baseline(folder: Path) -> np.ndarray[Any, Any]:
    with TorchSession(folder, threads=1) as session:
        return session.score(ROW).copy()


# --- transformers 5 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["plain", "llama3"])
@pytest.mark.parametrize("target", ["ort", "plain"])
def test_rope_parameters_of_transformers_5(
    scaling: dict[str, Any] | None, target: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    changes = {"rope_theta": 500.0, "rope_scaling": scaling}
    right = checkpoints(**changes)
    newer = shutil.copytree(right, tmp_path / "newer")
    said = {**(scaling or {"rope_type": "default"}), "rope_theta": 500.0}
    edited(newer, "config.json", ("rope_theta", "rope_scaling"), rope_parameters=said)
    edited(newer, "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    source = resolve(str(newer))
    assert source.name == "newer"
    manifest, _ = export_model(ExportSpec(str(newer), target=target), tmp_path / "out")
    expected = baseline(right)
    assert np.abs(scores(tmp_path / "out") - expected).max() < 1e-4
    assert np.array_equal(baseline(source.folder), expected)  # the gate's other side
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_theta"] == 500.0
    # Exported before: found again; another file in the checkpoint: not taken for the same.
    again, written = export_model(ExportSpec(str(newer), target=target), tmp_path / "out")
    assert (again.weights_sha256, written) == (manifest.weights_sha256, False)
    (newer / "added_tokens.json").write_text("{}")
    assert (resolve(str(newer)).folder / "added_tokens.json").is_file()


def test_two_spellings_that_contradict() -> None:
    new = {"rope_theta": 5.0, "rope_type": "default"}
    assert older({"rope_theta": 5.0, "rope_scaling": None, "rope_parameters": new})["rope_theta"] == 5.0
    assert older({"a": 1}) == {"a": 1}
    with pytest.raises(BrokenCheckpointError, match=r"rope_theta 7\.0, its rope_parameters say 5\.0"):
        older({"rope_theta": 7.0, "rope_parameters": new})
    with pytest.raises(BrokenCheckpointError, match="not an object"):
        older({"rope_parameters": 3})
    with pytest.raises(UnsupportedModelError, match="each type of layer"):
        older({"rope_parameters": {"full_attention": new}})


# --- GGUF -------------------------------------------------------------------------------------------------------------

LAYERS, HIDDEN, INNER, HEADS, KV, DIM, VOCAB = 2, 64, 96, 4, 2, 16, 300


def gguf_file(
    path: Path,
    drop: str = "",
    extra: Mapping[str, np.ndarray[Any, Any]] = {},
    scaling: str = "",
    base: float = 10000.0,
    eos: int | None = 2,
    more: Callable[[Any], Any] = lambda _: None,
    kind: str = "llama",
    dim: int = DIM,
) -> Path:
    """A random LLaMA (or ``kind``), fp32; ``more`` gets the writer."""
    import gguf
    from tokenizers import pre_tokenizers

    w = gguf.GGUFWriter(path, kind)
    w.add_context_length(160)
    w.add_block_count(LAYERS)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(INNER)
    w.add_rope_dimension_count(dim)
    w.add_rope_freq_base(base)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(VOCAB)
    if scaling:
        w.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        w.add_rope_scaling_factor(4.0)
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "ab",
        "cd",
        *(f"t{i}" for i in range(VOCAB)),
    ]
    w.add_tokenizer_model("gpt2")
    w.add_token_list(tokens[:VOCAB])
    w.add_token_types([3] * 3 + [1] * (VOCAB - 3))
    w.add_token_merges(["a b", "c d"])
    w.add_bos_token_id(1)
    if eos is not None:
        w.add_eos_token_id(eos)
    more(w)
    w.add_unk_token_id(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN)}
    shapes["output_norm"] = (HIDDEN,)
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (HIDDEN,),
            f"blk.{i}.attn_q": (HEADS * dim, HIDDEN),
            f"blk.{i}.attn_k": (KV * dim, HIDDEN),
            f"blk.{i}.attn_v": (KV * dim, HIDDEN),
            f"blk.{i}.attn_output": (HIDDEN, HEADS * dim),
            f"blk.{i}.ffn_norm": (HIDDEN,),
            f"blk.{i}.ffn_gate": (INNER, HIDDEN),
            f"blk.{i}.ffn_up": (INNER, HIDDEN),
            f"blk.{i}.ffn_down": (HIDDEN, INNER),
        }
    rng = np.random.default_rng(0)
    tensors = {f"{n}.weight": rng.normal(0, 0.15, s).astype(np.float32) for n, s in shapes.items()}
    for name, value in (tensors | dict(extra)).items():
        if name != drop:
            w.add_tensor(name, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def config_of(path: Path) -> dict[str, Any]:
    return older(json.loads((resolve(str(path)).folder / "config.json").read_text()))


def llama3_factors(base: float, factor: float) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter writes for LLaMA 3.1: its published rule, not transformers' code."""
    frequencies = base ** -(np.arange(0, DIM, 2) / DIM)
    factors = []
    for wavelength in 2 * np.pi / frequencies:
        smooth = (8192 / wavelength - 1) / (4 - 1)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def own_tensors(kind: str, dim: int) -> dict[str, np.ndarray[Any, Any]]:
    """What the layers of an architecture have beside LLaMA's."""
    rng = np.random.default_rng(1)
    shapes = {
        "qwen2": {"attn_q.bias": HEADS * dim, "attn_k.bias": KV * dim, "attn_v.bias": KV * dim},
        "qwen3": {"attn_q_norm.weight": dim, "attn_k_norm.weight": dim},
    }[kind]
    return {f"blk.{i}.{n}": rng.normal(1, 0.3, s).astype(np.float32) for i in range(LAYERS) for n, s in shapes.items()}


@pytest.mark.parametrize(("kind", "dim"), [("qwen2", DIM), ("qwen3", 32)])
def test_gguf_of_qwen(kind: str, dim: int, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    own = own_tensors(kind, dim)
    path = gguf_file(tmp_path / "a.gguf", kind=kind, dim=dim, extra=own, more=lambda w: w.add_key_length(dim))
    folder = resolve(str(path)).folder
    config = config_of(path)
    assert (config["model_type"], config["head_dim"], config["rope_scaling"]) == (kind, dim, None)
    assert config["sliding_window"] is None
    written = load_file(folder / "model.safetensors")
    names = {"attn_q.bias": "q_proj.bias", "attn_k_norm.weight": "k_norm.weight", "attn_q_norm.weight": "q_norm.weight"}
    for gguf_name, name in names.items():
        if f"blk.1.{gguf_name}" in own:
            assert np.array_equal(written[f"model.layers.1.self_attn.{name}"], own[f"blk.1.{gguf_name}"])
    export_model(ExportSpec(str(path)), tmp_path / "out")
    assert np.abs(scores(tmp_path / "out") - baseline(folder)).max() < 1e-4


def test_gguf_of_mistral_has_the_window_that_it_says(tmp_path: Path) -> None:
    """llama.cpp's converter calls it a LLaMA and writes no window; transformers would take 4,096 for the name alone."""
    path = gguf_file(tmp_path / "a.gguf", more=lambda w: w.add_name("mistral"))
    assert config_of(path).get("sliding_window") is None
    export_model(ExportSpec(str(path)), tmp_path / "out")
    assert np.abs(scores(tmp_path / "out") - baseline(resolve(str(path)).folder)).max() < 1e-4
    plain = resolve(str(gguf_file(tmp_path / "b.gguf"))).folder
    assert np.array_equal(baseline(resolve(str(path)).folder), baseline(plain))


def test_gguf_as_it_is(tmp_path: Path) -> None:
    assert config_of(gguf_file(tmp_path / "a.gguf"))["rope_scaling"] is None
    assert config_of(gguf_file(tmp_path / "b.gguf", scaling="none"))["rope_scaling"] is None


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_of_llama_3_1_keeps_its_rope_scaling(factor: float, tmp_path: Path) -> None:
    factors = llama3_factors(500000.0, factor)
    assert len(set(factors.tolist())) > 1
    path = gguf_file(tmp_path / "a.gguf", extra={"rope_freqs.weight": factors}, base=500000.0)
    assert config_of(path)["rope_scaling"] == {**LLAMA3, "factor": factor, "original_max_position_embeddings": 8192}


def test_gguf_with_linear_scaling(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "a.gguf", scaling="linear")
    assert config_of(path)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    export_model(ExportSpec(str(path)), tmp_path / "linear")
    export_model(ExportSpec(str(gguf_file(tmp_path / "b.gguf"))), tmp_path / "without")
    assert np.abs(scores(tmp_path / "linear") - scores(tmp_path / "without")).max() > 1e-2


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"scaling": "yarn"}, UnsupportedModelError, r"scales its rotary embedding \(yarn\)"),
        (
            {"extra": {"rope_freqs.weight": np.linspace(1, 8, DIM // 2, dtype=np.float32)}},
            UnsupportedModelError,
            "rotary factors",
        ),
        ({"extra": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, UnsupportedModelError, r"blk\.0\.attn_q\.bias"),
        ({"more": lambda w: w.add_sliding_window(64)}, UnsupportedModelError, "attention window of 64 tokens"),
        (
            {"kind": "qwen2", "scaling": "yarn", "extra": own_tensors("qwen2", DIM)},
            UnsupportedModelError,
            r"scales its rotary embedding \(yarn\)",
        ),
        (
            {"more": lambda w: (w.add_uint16("split.count", 3), w.add_uint16("split.no", 0))},
            UnsupportedModelError,
            "is part 1 of 3 of a split GGUF; join them",
        ),
        ({"more": lambda w: w.add_tokenizer_pre("klingon")}, UnsupportedModelError, "pre-tokenizer 'klingon'"),
        ({"drop": "blk.1.ffn_down.weight"}, BrokenCheckpointError, r"model\.layers\.1\.mlp\.down_proj\.weight"),
        ({"drop": "output_norm.weight"}, BrokenCheckpointError, r"lacks 1 tensors, the first model\.norm\.weight"),
    ],
)
def test_gguf_that_would_lose_something(
    fields: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        resolve(str(gguf_file(tmp_path / "a.gguf", **fields)))
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_gguf_keeps_its_end_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = gguf_file(tmp_path / "a.gguf", eos=7, more=lambda w: w.add_eot_token_id(9))
    manifest, _ = export_model(ExportSpec(str(path)), tmp_path / "out")
    assert manifest.eos_token_ids == (7, 9)
    assert (config_of(path)["bos_token_id"], config_of(path)["eos_token_id"]) == (1, 7)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 7, 0)
    assert tokenizer("ab")["input_ids"] == [tokenizer.convert_tokens_to_ids("ab")]
    without = gguf_file(tmp_path / "b.gguf", eos=None)
    assert export_model(ExportSpec(str(without)), tmp_path / "none")[0].eos_token_ids == ()


# --- which files are the weights --------------------------------------------------------------------------------------


def test_a_stray_file_is_not_merged(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints(), tmp_path / "c")
    shutil.copyfile(checkpoints(seed=9) / "model.safetensors", folder / "model_before.safetensors")
    export_model(ExportSpec(str(folder)), tmp_path / "out")
    assert np.abs(scores(tmp_path / "out") - baseline(checkpoints())).max() < 1e-4


def test_a_stale_index_gives_way(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints(), tmp_path / "c")
    other = shutil.copytree(checkpoints(seed=9, shards="100KB"), tmp_path / "other")
    for file in other.glob("model*"):
        shutil.copyfile(file, folder / file.name)
    export_model(ExportSpec(str(folder)), tmp_path / "out")
    assert np.abs(scores(tmp_path / "out") - baseline(checkpoints())).max() < 1e-4


def test_several_files_and_no_index(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints(), tmp_path / "c")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    assert export_model(ExportSpec(str(folder)), tmp_path / "one")[1]  # one file of any name is the model
    assert np.array_equal(baseline(resolve(str(folder)).folder), baseline(checkpoints()))  # for the gate as well
    assert not (folder / "model.safetensors").exists()
    shutil.copyfile(checkpoints(seed=9) / "model.safetensors", folder / "b.safetensors")
    with pytest.raises(BrokenCheckpointError, match=r"a\.safetensors, b\.safetensors and neither .* which of them"):
        export_model(ExportSpec(str(folder)), tmp_path / "out")


def test_an_index_stays_inside_and_names_a_tensor_once(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints(shards="100KB"), tmp_path / "c")
    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    shutil.copyfile(folder / names[0], folder / "twice.safetensors")
    index.write_text(json.dumps({"weight_map": {str(k): n for k, n in enumerate([*names, "twice.safetensors"])}}))
    with pytest.raises(BrokenCheckpointError, match="is both in"):
        export_model(ExportSpec(str(folder)), tmp_path / "out")
    index.write_text(json.dumps({"weight_map": {"w": "../elsewhere.safetensors"}}))
    with pytest.raises(BrokenCheckpointError, match="not a file beside it"):
        export_model(ExportSpec(str(folder)), tmp_path / "out")


def test_unpickled_weights_go_with_their_configuration(checkpoints: Checkpoints, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = shutil.copytree(checkpoints(), tmp_path / "c")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    first = resolve(str(folder), allow_pickle=True)
    edited(folder, "config.json", rope_theta=77.0)
    second = resolve(str(folder), allow_pickle=True)
    assert json.loads((second.folder / "config.json").read_text())["rope_theta"] == 77.0
    assert first.content_key != second.content_key


# --- replacing an export ----------------------------------------------------------------------------------------------


def test_force_keeps_the_old_export_until_the_new_one_is_there(checkpoints: Checkpoints, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(ExportSpec(str(checkpoints())), out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    broken = shutil.copytree(checkpoints(seed=1), tmp_path / "broken")
    edited(broken, "config.json", hidden_act="gelu")
    with pytest.raises(UnsupportedModelError):
        export_model(ExportSpec(str(broken)), out, force=True)
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(BrokenCheckpointError):
        export_model(ExportSpec(str(broken)), out, force=True)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    link = tmp_path / "link"
    link.symlink_to(out)
    made, _ = export_model(ExportSpec(str(checkpoints(seed=1))), link, force=True)
    assert link.is_symlink()
    assert json.loads((out / "manifest.json").read_text())["weights_sha256"] == made.weights_sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "link", "out"]


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    """The next one finds the old folder put aside, and puts it back first."""
    target = tmp_path / "t"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    aside = tmp_path / f".t.replaced-{ended.pid}"
    aside.mkdir()
    (aside / "old").touch()
    with pytest.raises(RuntimeError), publish(target, replace=True):
        raise RuntimeError("the new one fails")
    assert [p.name for p in target.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


# --- code in the folder -----------------------------------------------------------------------------------------------

EVIL = """
open({mark!r}, "w").write("ran")
from transformers import LlamaConfig, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "evil"
class Words(PreTrainedTokenizerFast):
    pass
"""


def test_code_of_a_checkpoint_is_not_even_offered(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.text import load_tokenizer

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked whether to run it"))
    folder = shutil.copytree(checkpoints(), tmp_path / "c")
    (folder / "evil.py").write_text(EVIL.format(mark=str(tmp_path / "mark")))
    edited(folder, "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(UnsupportedModelError, match="Python code of its own, which is never run"):
        export_model(ExportSpec(str(folder)), tmp_path / "out")
    edited(folder, "tokenizer_config.json", tokenizer_class="Words", auto_map={"AutoTokenizer": [None, "evil.Words"]})
    with pytest.raises(Exception, match="Python code of its own, which is never run"):
        load_tokenizer(folder)
    assert not (tmp_path / "mark").exists()


# --- odd values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not a whole number above 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, not a divisor of 4 heads"),
        ({"vocab_size": "331"}, r"vocab_size.*\b331\b"),
        ({"max_position_embeddings": 160.0}, r"max_position_embeddings.*\b160\.0"),
        ({"head_dim": "16"}, r"head_dim.*\b16\b"),
        ({"pad_token_id": 331}, r"pad_token_id is 331, which no row of the embedding has \(vocab_size 331\)"),
        ({"pad_token_id": -332}, "pad_token_id is -332, which no row"),
        ({"rms_norm_eps": None}, "rms_norm_eps.* None"),
        ({"rope_theta": "10000"}, "rope_theta is 10000, not a number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling is"),
        ({"rope_scaling": "linear"}, "cannot be used"),
        ({"quantization_config": "x"}, "unknown method"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor rotates part of a head"),
        ({"eos_token_id": -1}, "eos_token_id is -1, not token ids"),
        ({"eos_token_id": [2, None]}, "eos_token_id.*None"),
    ],
    ids=str,
)
def test_odd_numbers_in_the_configuration(
    changes: dict[str, Any], words: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints(), tmp_path / "c")
    (folder / "generation_config.json").unlink(missing_ok=True)
    edited(folder, "config.json", **changes)
    with pytest.raises((BrokenCheckpointError, UnsupportedModelError), match=words):
        export_model(ExportSpec(str(folder)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_how_a_program_wants_its_outputs_does_not_matter(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints(), tmp_path / "c")
    edited(folder, "config.json", return_dict=False)
    export_model(ExportSpec(str(folder)), tmp_path / "out")
    assert np.abs(scores(tmp_path / "out") - baseline(checkpoints())).max() < 1e-4


@pytest.mark.parametrize("name", ["generation_config.json", "added_tokens.json", "model.safetensors.index.json"])
def test_files_beside_that_are_no_json_objects(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints(shards="100KB"), tmp_path / "c")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/etc/passwd")
    with pytest.raises(BrokenCheckpointError, match=name):
        export_model(ExportSpec(str(folder)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_never_end(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints(), tmp_path / "c")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(BrokenCheckpointError, match="no regular file"):
        export_model(ExportSpec(str(folder)), tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "precision", "refused"),
    [
        (float("nan"), "fp32", True),
        (float("-inf"), "fp32", True),
        (float("nan"), "bf16", True),
        (float("nan"), "int8", True),
        (1e5, "fp16", True),
        (1e5, "bf16", False),
        (65000.0, "fp16", False),
        (3e38, "fp32", False),
    ],
)
@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_values_that_are_no_numbers_in_that_type(
    value: float, precision: str, refused: bool, name: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoints(), tmp_path / "c")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    spec = ExportSpec(str(folder), precision, **({"keep_float": "none"} if precision == "int8" else {}))
    if refused:
        with pytest.raises(BrokenCheckpointError):
            export_model(spec, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        assert export_model(spec, tmp_path / "out")[1]
