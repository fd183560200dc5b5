"""Random small LLaMAs, their exports, and the demo model for tests marked `slow`."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import export  # noqa: F401 - switches telemetry off before a test file imports onnxruntime
from export.errors import MissingOptimumError
from export.newer_config import older

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Tests measure nothing that anybody relies on: two test runs on one machine must not refuse each other.
os.environ["LLAMA_ONNX_LOCK"] = str(Path(tempfile.gettempdir()) / f"llama-onnx-test-{os.getpid()}.lock")
os.environ["LLAMA_ONNX_HISTORY"] = str(Path(tempfile.gettempdir()) / f"llama-onnx-test-{os.getpid()}.sqlite")

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "in", "rain", "and", "it", "was", "big", "small", "why", "who"]
# Enough text for second moments of full rank: gptq calibrates on it.
CALIBRATION = (" ".join(WORDS[k * k % 7 * 3 % 16] + " " + WORDS[k * 5 % 16] for k in range(300)), "the cat sat " * 20)
TEMPLATE = "{% for m in messages %}<u> {{ m['content'] }} </u>{% endfor %}{% if add_generation_prompt %} <a>{% endif %}"


def tiny_config(model_type: str = "llama", **changes: Any) -> Any:
    from transformers import AutoConfig

    settings: dict[str, Any] = {
        "vocab_size": 331,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    changes = copy.deepcopy(settings | changes)  # transformers 5 writes into a given rope_scaling
    return AutoConfig.for_model(model_type, **changes)


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<u>", "</u>", "<a>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    in_older_words(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def in_older_words(path: Path, **changes: Any) -> None:
    """A file that transformers 5 wrote, as 4 writes it: both read that, and what tests change in it has one name."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw = older(raw) | changes
    raw.pop("rope_parameters", None)
    path.write_text(json.dumps(raw, indent=2), encoding="utf-8")


def make_checkpoint(folder: Path, seed: int = 0, shards: str = "5GB", **changes: Any) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough that a wrong operator shows, norms and biases away from their trivial values.
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.15)
    model.save_pretrained(folder, max_shard_size=shards)
    in_older_words(folder / "config.json")
    save_tokenizer(folder)
    return folder


NEEDS_OPTIMUM = ("--target plain", "optimum's", "ORTModelForCausalLM", "this test")
"""What may ask for optimum; the fused export may not."""


def skip_without_optimum(error: MissingOptimumError) -> None:
    """Skip the test, unless it asks for optimum where nothing should, or CI has to have it."""
    if str(error).startswith(NEEDS_OPTIMUM) and not os.environ.get("LLAMA_ONNX_REQUIRE_OPTIMUM"):
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """What needs optimum is skipped where there is none."""
    try:
        return (yield)
    except MissingOptimumError as e:
        skip_without_optimum(e)
        raise


pytest_runtest_setup = pytest_pyfunc_call  # fixtures ask for it as well


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: over tiny matrices several only wait for each other, and sums become reproducible."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def words() -> list[str]:
    """The words that the tiny tokenizer knows."""
    return WORDS


@pytest.fixture(scope="session")
def calibration() -> tuple[str, ...]:
    """Texts in those words; `exports` calibrates gptq on them."""
    return CALIBRATION


@pytest.fixture(scope="session")
def tokenizer_in() -> Callable[[Path], None]:
    """Saves the tiny tokenizer in a folder."""
    return save_tokenizer


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model as LLaMA 2 has one, of 331 pieces, with nothing beside it."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = [" ".join(w + ending for w in WORDS[k:]) for k in range(9) for ending in ("", "s")]
    (folder / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=331,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    for name in ("text", "tokenizer.vocab"):
        (folder / name).unlink()
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Random checkpoints by their configuration, each made once."""
    made: dict[str, Path] = {}

    def get(**changes: Any) -> Path:
        key = repr(sorted(changes.items(), key=str))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), **changes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def exports(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exported folders of random checkpoints, each made once; treat as read-only."""
    from export.pipeline import export_model
    from export.spec import ExportSpec

    made: dict[str, Path] = {}

    def get(precision: str = "fp32", spec: dict[str, Any] | None = None, **changes: Any) -> Path:
        key = precision + repr(sorted((spec or {}).items())) + repr(sorted(changes.items(), key=str))
        if key not in made:
            out = tmp_path_factory.mktemp("export") / "folder"
            asked = ExportSpec(str(checkpoints(**changes)), precision, **(spec or {}))
            export_model(asked, out, calibration=CALIBRATION if asked.method == "gptq" else ())
            made[key] = out
        return made[key]

    return get


def other_config(name: str) -> Any:
    import transformers as t

    common = {"vocab_size": 331, "bos_token_id": 1, "eos_token_id": 2}
    sizes = common | {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 160}
    usual = sizes | {"num_hidden_layers": 2, "num_attention_heads": 4}
    grouped = usual | {"num_key_value_heads": 2}
    gpt = common | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 160}
    local = {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8}
    makers: dict[str, Callable[[], Any]] = {
        "gpt_neo": lambda: t.GPTNeoConfig(**sizes, **local),
        "gpt2": lambda: t.GPT2Config(**gpt),
        "gptj": lambda: t.GPTJConfig(**gpt, rotary_dim=8),
        "qwen2": lambda: t.Qwen2Config(**grouped),
        "qwen2-windows": lambda: t.Qwen2Config(
            **grouped, use_sliding_window=True, sliding_window=16, max_window_layers=1
        ),
        "gemma2": lambda: t.Gemma2Config(**grouped, head_dim=16, sliding_window=16, query_pre_attn_scalar=16),
        "bloom": lambda: t.BloomConfig(**common, hidden_size=64, n_layer=2, n_head=4),
        "mpt": lambda: t.MptConfig(**common, d_model=64, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=160),
        "falcon": lambda: t.FalconConfig(**usual, ffn_hidden_size=96),
    }
    return makers[name]()


@pytest.fixture(scope="session")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(checkpoint, plain export) of a small random decoder that is no LLaMA, of :func:`other_config`."""
    import torch
    from transformers import AutoModelForCausalLM

    from export.pipeline import export_model
    from export.spec import ExportSpec

    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(other_config(name))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(0, 0.15) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder / "checkpoint")
            save_tokenizer(folder / "checkpoint")
            export_model(ExportSpec(str(folder / "checkpoint"), target="plain"), folder / "onnx")
            made[name] = (folder / "checkpoint", folder / "onnx")
        return made[name]

    return get


@pytest.fixture
def session(exports: Callable[..., Path]) -> Any:
    """The tiny export on ONNX Runtime, one thread."""
    from runtime.loading import load

    with load(exports(), threads=1) as opened:
        yield opened


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The demo model; skips where it cannot be had, fails in CI."""
    from export.demo_model import DemoModelError, demo_model

    try:
        return demo_model()
    except DemoModelError as e:
        if os.environ.get("LLAMA_ONNX_REQUIRE_DEMO"):
            pytest.fail(f"CI must have the demo model: {e}")
        pytest.skip(f"the demo model cannot be had: {e}")


@pytest.fixture(scope="session")
def tensorrt_rtx() -> str:
    """Version of TensorRT-RTX's compiler; skips where it is not installed, fails in CI."""
    from runtime.errors import CompilerMissingError
    from runtime.trt_compiler import version

    try:
        return version()
    except CompilerMissingError as e:
        if os.environ.get("LLAMA_ONNX_REQUIRE_TENSORRT_RTX"):
            pytest.fail(f"CI must have the compiler: {e}")
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def demo_export(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, exported anew."""
    from export.pipeline import export_model
    from export.spec import ExportSpec

    out = tmp_path_factory.mktemp("demo") / "folder"
    export_model(ExportSpec("demo"), out)
    return out
