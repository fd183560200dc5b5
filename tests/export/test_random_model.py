"""Random checkpoints in a real LLaMA's shape: what is written, what is refused, and (slow) the real shapes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import export.random_model
from bench.cli.main import main
from bench.cli.random_model import SHAPES
from export.convert import parameter_shapes
from export.errors import DestinationError, ExportError
from export.pipeline import export_model
from export.random_model import CONFIGS, config_of, make_random_model
from export.sizes import head_dim_of
from export.spec import ExportSpec
from export.spelling import rope_of
from runtime.loading import load
from runtime.torch_session import TorchSession

pytestmark = pytest.mark.usefixtures("one_thread")
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# As published with the models; grouped-query attention and the head of its own are in them.
PARAMETERS = {
    **{"llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192},
    **{"mistral-7b-v0.1": 7_241_732_096, "qwen2.5-7b": 7_615_616_512, "qwen3-8b": 8_190_735_360},
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a small configuration beside the published ones."""
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    return "tiny"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, through its index; each where the index says and nowhere else."""
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118 (not a dict)
                assert where[name] == file.name
                assert name not in out
                out[name] = f.get_tensor(name)
    assert set(out) == set(where)
    return out


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_checkpoint_is_one_of_transformers(tiny: str, precision: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    made = make_random_model(tiny, tmp_path / "out", precision)
    own = LlamaForCausalLM(config_of(tiny)).state_dict()
    found = tensors_of(tmp_path / "out")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert {n: tuple(t.shape) for n, t in found.items()} == {n: tuple(t.shape) for n, t in own.items()}
    assert {t.dtype for t in found.values()} == {dtype}
    assert made.parameters == sum(t.numel() for t in own.values())
    assert made.weight_bytes == made.parameters * dtype.itemsize
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == dtype
    for name, value in model.state_dict().items():
        assert torch.equal(value, found[name])
    assert {k: getattr(model.config, k) for k in TINY} == TINY


def test_weights_are_normal_and_norms_one(tiny: str, tmp_path: Path) -> None:
    make_random_model(tiny, tmp_path / "out", "fp32")
    found = tensors_of(tmp_path / "out")
    for name, tensor in found.items():
        if tensor.ndim == 1:
            assert bool((tensor == 1).all()), name
        else:
            # Six standard errors of each moment of so many numbers.
            n = tensor.numel()
            assert abs(float(tensor.mean())) < 6 * 0.02 / n**0.5, name
            assert abs(float(tensor.std()) / 0.02 - 1) < 6 / (2 * n) ** 0.5, name
    matrices = [t.flatten()[:2048] for t in found.values() if t.ndim == 2]
    for i, a in enumerate(matrices):
        assert all(not torch.equal(a, b) for b in matrices[:i])


def test_the_seed_decides_and_nothing_else(tiny: str, tmp_path: Path) -> None:
    folders = {k: tmp_path / k for k in ("a", "again", "other", "sharded")}
    make_random_model(tiny, folders["a"], seed=3)
    torch.manual_seed(99)  # not the global generator
    make_random_model(tiny, folders["again"], seed=3)
    make_random_model(tiny, folders["other"], seed=4)
    make_random_model(tiny, folders["sharded"], seed=3, shard_bytes=20_000)
    files = sorted(p.name for p in folders["a"].iterdir())
    assert files == sorted(p.name for p in folders["again"].iterdir())
    for name in files:
        assert (folders["a"] / name).read_bytes() == (folders["again"] / name).read_bytes()
    found = {k: tensors_of(f) for k, f in folders.items()}
    for name, tensor in found["a"].items():
        assert torch.equal(tensor, found["sharded"][name])
        assert torch.equal(tensor, found["other"][name]) == (tensor.ndim == 1)


def test_pieces_of_a_large_matrix_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are filled in pieces of 16 Mi numbers: each with new ones, none left out."""
    values = export.random_model._values("w", (40, 1 << 20), torch.bfloat16, torch.Generator().manual_seed(0))
    firsts = values[::16, :1000].float()
    assert not torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[1], firsts[2])
    assert float(values[-1].float().std()) == pytest.approx(0.02, rel=0.02)


def test_shards_hold_what_was_asked_for(tiny: str, tmp_path: Path) -> None:
    limit = 30_000
    made = make_random_model(tiny, tmp_path / "out", shard_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{k + 1:05d}-of-{made.shards:05d}.safetensors" for k in range(made.shards)
    ]
    assert made.shards > 3
    sizes = []
    for file in files:
        with safe_open(file, framework="pt") as f:
            parts = [f.get_tensor(n).nbytes for n in f.keys()]  # noqa: SIM118 (not a dict)
        # A tensor larger than the limit has a shard of its own.
        assert sum(parts) <= limit or len(parts) == 1
        sizes.append(sum(parts))
    assert max(sizes) > limit  # the embedding: the exception was met
    assert sum(sizes) == made.weight_bytes
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == made.weight_bytes
    assert set(index["weight_map"].values()) == {f.name for f in files}
    assert list(index["weight_map"]) == list(parameter_shapes(config_of(tiny)))


def test_one_shard_is_in_memory_at_a_time(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = export.random_model.save_file
    saved: list[int] = []

    def save(tensors: dict[str, Tensor], *arguments: Any, **more: Any) -> None:
        saved.append(sum(t.nbytes for t in tensors.values()))
        own(tensors, *arguments, **more)

    monkeypatch.setattr(export.random_model, "save_file", save)
    told: list[tuple[int, int]] = []
    made = make_random_model(
        tiny, tmp_path / "out", shard_bytes=50_000, progress=lambda done, total: told.append((done, total))
    )
    assert len(saved) == made.shards
    assert max(saved) <= 50_000
    assert told[-1] == (made.weight_bytes, made.weight_bytes)
    assert [d for d, _ in told] == sorted(d for d, _ in told)
    assert {t for _, t in told} == {made.weight_bytes}


def test_fewer_layers_are_the_same_model_cut_short(tiny: str, tmp_path: Path) -> None:
    made = make_random_model(tiny, tmp_path / "out", layers=1)
    found = tensors_of(tmp_path / "out")
    assert {n.split(".")[2] for n in found if ".layers." in n} == {"0"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert "1 layers" in config["llama_onnx_origin"]
    assert "random weights" in config["llama_onnx_origin"]
    assert made.parameters == sum(t.numel() for t in found.values())


def test_any_text_becomes_ids_and_back(tiny: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_random_model(tiny, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Paris is in Frankreich: 7 × 6 = 42 — 語\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert max(ids) < TINY["vocab_size"]
    assert tokenizer.decode(ids) == text


def test_it_exports_and_the_record_says_that_weights_are_random(tiny: str, tmp_path: Path) -> None:
    make_random_model(tiny, tmp_path / "model", "fp32", shard_bytes=40_000)
    manifest, _ = export_model(ExportSpec(str(tmp_path / "model")), tmp_path / "out")
    assert "random weights" in manifest.weights_origin
    rows = [[5, 6, 7, 8, 9], [40, 41]]
    with load(tmp_path / "out", threads=1) as ours, TorchSession(tmp_path / "model", threads=1) as theirs:
        a, b = ours.prefill(rows), theirs.prefill(rows)
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()


def refused(folder: Path, match: str, kind: type[ExportError] = ExportError, **fields: Any) -> None:
    """Such a request fails with these words and leaves nothing new beside ``folder``."""
    parent = next(p for p in folder.parents if p.exists())
    before = sorted(parent.iterdir())
    with pytest.raises(kind, match=match):
        make_random_model(**{"name": "tiny", "out": folder, **fields})
    assert sorted(parent.iterdir()) == before


def test_requests_that_make_no_sense(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(out, "unknown configuration 'llama-3'.*llama-2-70b", name="llama-3")
    refused(out, "0 layers.*at least 1", layers=0)
    refused(out, "-2 layers", layers=-2)
    refused(out, "unknown precision 'int4'", precision="int4")


def test_what_is_there_already_is_left_alone(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(tmp_path / "mine", "not empty", DestinationError)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "not empty", DestinationError)
    assert (tmp_path / "file").read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert make_random_model(tiny, tmp_path / "empty").folder == tmp_path / "empty"
    assert tensors_of(tmp_path / "empty")


def test_a_disk_too_small_is_noticed_before_anything_is_written(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = make_random_model(tiny, tmp_path / "measure").weight_bytes + (64 << 20)
    for free in (need - 1, 1000):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(10**9, 0, free))  # type: ignore[attr-defined]
        refused(tmp_path / "deep" / "er" / "out", "make room", DestinationError)
        refused(tmp_path / "out", "tiny needs 0.07 GB.*make room", DestinationError)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, need))  # type: ignore[attr-defined]
    make_random_model(tiny, tmp_path / "deep" / "er" / "out")
    assert (tmp_path / "deep" / "er" / "out" / "config.json").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_leaves_nothing(tiny: str, error: BaseException, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:  # whole shards are on the disk by then
            assert list(tmp_path.glob(".out.partial-*/*.safetensors"))
            raise error

    with pytest.raises(type(error)):
        make_random_model(tiny, tmp_path / "out", shard_bytes=20_000, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameter_counts(name: str) -> None:
    config = config_of(name)
    assert sum(int(np.prod(shape)) for shape in parameter_shapes(config).values()) == PARAMETERS[name]
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        own = AutoModelForCausalLM.from_config(config_of(name, 2)).state_dict()
    assert {n: tuple(t.shape) for n, t in own.items()} == parameter_shapes(config_of(name, 2))
    assert config_of(name, 2).num_hidden_layers == 2
    assert config_of(name).num_hidden_layers == CONFIGS[name]["num_hidden_layers"]  # not changed by the line before
    said = config.to_dict() | rope_of(config)
    assert {k: said[k] for k in CONFIGS[name] if k != "sliding_window"} == {
        k: v for k, v in CONFIGS[name].items() if k != "sliding_window"
    }
    assert head_dim_of(config) == 128


def test_the_help_names_every_shape() -> None:
    assert set(SHAPES) == CONFIGS.keys()


def test_command_line(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CONFIGS, "llama-2-7b", TINY)  # the default

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["random-model", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    code, said, _ = run(tmp_path / "a", "--json")
    assert code == 0
    assert json.loads(said) == {
        "folder": str(tmp_path / "a"),
        "parameters": sum(t.numel() for t in tensors_of(tmp_path / "a").values()),
        "weight_bytes": sum(t.nbytes for t in tensors_of(tmp_path / "a").values()),
        "shards": 1,
    }
    code, said, _ = run(tmp_path / "b", "--config", tiny, "--layers", 1, "--precision", "bf16", "--seed", 7)
    assert code == 0
    found = tensors_of(tmp_path / "b")
    count = sum(t.numel() for t in found.values())
    assert said == f"{tmp_path / 'b'}: tiny with random weights, {count:,} parameters, 0.00 GB in 1 shards\n"
    assert found["lm_head.weight"].dtype == torch.bfloat16
    assert not any(".layers.1." in n for n in found)
    make_random_model(tiny, tmp_path / "c", "bf16", layers=1, seed=7)
    assert torch.equal(found["lm_head.weight"], tensors_of(tmp_path / "c")["lm_head.weight"])
    for arguments, named in (
        ((tmp_path / "b",), "not empty"),
        ((tmp_path / "d", "--config", "gpt-5"), "unknown configuration"),
        ((tmp_path / "d", "--layers", 0), "at least 1"),
        ((tmp_path / "d", "--precision", "int8"), "unknown precision"),
    ):
        code, said, err = run(*arguments)
        assert (code, said) == (2, "")
        assert named in " ".join(err.split())
        assert not (tmp_path / "d").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-2-7b", "llama-2-70b", "qwen2.5-7b", "qwen3-8b"])
def test_the_real_shapes_equal_pytorch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of each published configuration, in fp16, against unpatched PyTorch over the same weights.

    With LLaMA's vocabulary: Qwen's, five times as large, is most of the time and no part of a layer.
    """
    monkeypatch.setitem(CONFIGS, name, CONFIGS[name] | {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2})
    model, out = tmp_path / "model", tmp_path / "out"
    rng = np.random.default_rng(7)
    rows = [rng.integers(0, 32000, n).tolist() for n in (17, 6)]
    tokens = rng.integers(0, 32000, (2, 2)).tolist()

    def logits(session: Any) -> list[Any]:
        return [session.prefill(rows, 2).copy(), *(session.step(t).copy() for t in tokens)]

    try:
        make_random_model(name, model, layers=1)
        manifest, _ = export_model(ExportSpec(str(model), "fp16"), out)
        assert manifest.kv.head_dim == 128
        assert manifest.parameters == sum(int(np.prod(s)) for s in parameter_shapes(config_of(name, 1)).values())
        with load(out, verify=False, threads=1, huge_pages=False) as session:
            ours = logits(session)
        shutil.rmtree(out)
        with TorchSession(model, attention="eager", threads=1) as session:
            theirs = logits(session)
    finally:
        shutil.rmtree(model, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    apart = 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape == (2, 32000)
        difference = np.abs(a - b).max()
        assert difference < 1e-2 * np.abs(b).max()
        best = np.sort(b, axis=-1)[:, -2:]
        clear = best[:, 1] - best[:, 0] > 2 * difference
        assert (a.argmax(-1) == b.argmax(-1))[clear].all()
        apart += int(clear.sum())
    assert apart >= 3  # of six: the comparison of the best token is not empty
