"""The script that trains a small LLaMA: what it writes can be exported, learns, and is the same twice."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.data.items import Dataset
from bench.data.loading import load_shipped
from export.errors import DestinationError, ExportError

PATH = Path(__file__).parent.parent / "scripts" / "train_small_llama.py"
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("train_small_llama", PATH)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(autouse=True)
def little_text(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth item: the losses over all of the text would take most of the time."""
    data = load_shipped()
    monkeypatch.setattr(script, "load_shipped", lambda: Dataset(data.name, data.sha256, data.items[::5]))


def tiny(script: Any, out: Path, steps: int = 3, **options: Any) -> Any:
    settings: dict[str, Any] = {"model": TINY, "vocabulary": 300, "window": 64, "evaluations": 1}
    return script.train(out, steps, **(settings | options))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_checkpoint_exports_and_runs(script: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from export.pipeline import export_model
    from export.source import resolve
    from export.spec import ExportSpec
    from runtime.loading import load
    from runtime.torch_session import TorchSession

    told: list[tuple[int, int, float, float | None]] = []
    result = tiny(script, tmp_path / "model", progress=lambda *what: told.append(what))
    assert [t[:2] for t in told] == [(1, 3), (2, 3), (3, 3)]
    assert [t[3] is None for t in told] == [True, True, False]
    assert result.folder == tmp_path / "model"
    assert result.prose.tokens > 0
    config = json.loads((result.folder / "config.json").read_text())
    assert (config["dtype"], config["vocab_size"], config["tie_word_embeddings"]) == ("float32", 300, False)
    assert resolve(str(result.folder)).origin == script.ORIGIN

    tokenizer = AutoTokenizer.from_pretrained(result.folder, local_files_only=True)
    text = "Où est l’été? A naïve 猫 sat.\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    message = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert chat == "<s>user\nHi</s>\n<s>assistant\n"

    export_model(ExportSpec(str(result.folder)), tmp_path / "onnx")
    with load(tmp_path / "onnx", threads=1) as ours, TorchSession(result.folder, threads=1) as baseline:
        np.testing.assert_allclose(ours.score(ids), baseline.score(ids), atol=1e-4, rtol=1e-4)


def test_it_learns(script: Any, tmp_path: Path) -> None:
    result = tiny(script, tmp_path / "model", 30)
    first, last = np.mean(result.batches[:3]), np.mean(result.batches[-3:])
    assert abs(first - math.log(300)) < 0.5  # as good as guessing
    assert last < first - 0.5
    assert result.validation.model < first - 0.5


def test_the_best_weights_are_kept(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "rate", lambda step, _steps: 1.0 if step < 20 else 300.0)  # learns, then spoils it
    seen: dict[int, float] = {}

    def note(done: int, _total: int, _loss: float, validation: float | None) -> None:
        assert validation is not None
        seen[done] = validation

    result = tiny(script, tmp_path / "model", 30, evaluations=30, progress=note)
    assert result.kept == min(seen, key=lambda k: seen[k]) < 30
    assert result.validation.model == pytest.approx(seen[result.kept], rel=1e-6)
    assert seen[30] > seen[result.kept] + 0.01


def test_a_seed_gives_the_same_weights(script: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (tiny(script, tmp_path / str(k), seed=seed) for k, seed in enumerate((7, 7, 8)))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.batches == two.batches != other.batches
    assert weights(one.folder) == weights(two.folder) != weights(other.folder)
    names = ("tokenizer.json", "config.json")
    assert [(one.folder / n).read_bytes() for n in names] == [(two.folder / n).read_bytes() for n in names]


def test_prose_and_validation_are_not_trained_on(script: Any) -> None:
    data = load_shipped()
    training, validation = script.split(data)
    for part in (training, validation):
        assert {i.task for i in part} == {"qa", "summarization", "translation", "rewriting"}
    assert len(training) + len(validation) == len(data.items) - len(data.prose())
    sources = [{i.fields.get("context", i.fields.get("text")) for i in part} for part in (training, validation)]
    assert not sources[0] & sources[1]
    assert not set(script.texts_of(training)) & set(data.prose())


def test_minutes_become_steps(script: Any, tmp_path: Path) -> None:
    class Slow:
        def step(self, share: float) -> None:
            script.time.sleep(0.02)

    assert 100 < script.steps_for(0.1, Slow) <= 300
    shares = [script.rate(k, 100) for k in range(100)]
    assert max(shares) == 1.0
    assert shares[0] == pytest.approx(0.2)
    assert shares.index(1.0) == 4
    assert script.FLOOR < shares[-1] < script.FLOOR + 0.01


def test_out_not_empty_is_refused(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("keep")
    with pytest.raises(DestinationError, match="not empty"):
        tiny(script, tmp_path / "model")
    assert script.main([str(tmp_path / "model")]) == 2
    assert "not empty; nothing was changed" in " ".join(capsys.readouterr().err.split())
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["model", "model/mine.txt"]


@pytest.mark.parametrize("error", [ExportError("diverged"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    with pytest.raises(type(error)):  # in the middle of the training
        tiny(script, tmp_path / "model", progress=fail)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(script, "train", fail)
    assert script.main([str(tmp_path / "model")]) == (2 if isinstance(error, ExportError) else 130)


def test_divergence_is_an_error(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "LEARNING_RATE", math.inf)
    with pytest.raises(ExportError, match="diverged"):
        tiny(script, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [["--minutes", "0"], ["--minutes", "nan"], ["--steps", "-1"], ["--threads", "x"]])
def test_senseless_numbers_are_refused(script: Any, tmp_path: Path, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main([str(tmp_path / "model"), *wrong])
    assert stop.value.code == 2
    assert list(tmp_path.iterdir()) == []
