"""Text in and out of our folders with the real onnxruntime-genai; transformers is the oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.gguf_tokenizer import gguf_tokenizer
from export.manifest import TOKENIZER_FILES, files_of
from export.pipeline import export_model
from export.spec import ExportSpec

og = pytest.importorskip("onnxruntime_genai")
Checkpoints = Callable[..., Path]
TEXTS = ["Hello world", "12345 a  b\n\nc", "naïve 你好 🙂", "don't I'LL  x ", "\n\nthe cat</s>"]


def byte_level_file(pre: str) -> dict[str, Any]:
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "l l", "ll o", "Ġ w", "1 2", "12 3", "c a"]
    tokens = ["<unk>", "<s>", "</s>", *letters, *(m.replace(" ", "") for m in merges)]
    kinds = [2, 3, 3, *[1] * (len(tokens) - 3)]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True}
    said = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges, **ids}
    return {f"tokenizer.ggml.{k}": v for k, v in said.items()}


def sentencepiece_file(model: Path) -> dict[str, Any]:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    n = range(pieces.get_piece_size())
    said = {
        "model": "llama",
        "tokens": [pieces.id_to_piece(i) for i in n],
        "scores": [pieces.get_score(i) for i in n],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * (len(n) - 259)],
    }
    return {f"tokenizer.ggml.{k}": v for k, v in said.items()}


def put(kind: str, folder: Path, model: Path) -> None:
    """A tokenizer into a checkpoint: as a GGUF file or a random model brings it, or as LLaMA 2 has it."""
    from export.random_model import _byte_tokenizer

    for name in files_of(folder, TOKENIZER_FILES):
        (folder / name).unlink()
    if kind == "tokenizer.model":
        shutil.copyfile(model, folder / kind)
    elif kind == "random-model":
        _byte_tokenizer().save_pretrained(folder)
    else:
        said = sentencepiece_file(model) if kind == "sentencepiece" else byte_level_file(kind)
        gguf_tokenizer(Path("a.gguf"), said.get).tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    "kind",
    ["smollm", "llama-bpe", "qwen2", "gpt-2", "default", "tekken", "sentencepiece", "tokenizer.model", "random-model"],
)
def test_text_in_and_out(kind: str, checkpoints: Checkpoints, sentencepiece_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = shutil.copytree(checkpoints(), tmp_path / "c")
    put(kind, folder, sentencepiece_model)
    export_model(ExportSpec(str(folder)), tmp_path / "out")
    theirs = og.Tokenizer(og.Model(str(tmp_path / "out")))
    theirs.update_options(add_special_tokens="true")
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        assert theirs.encode(text).tolist() == ids, text
        said = ours.decode(ids, skip_special_tokens=True)
        stream = theirs.create_stream()
        assert "".join(stream.decode(i) for i in ids) == said
        # Whether the blank that sentencepiece puts before a text is taken off again is genai's own rule.
        assert theirs.decode(ids).strip(" ") == said.strip(" ")


def test_the_chat_template_is_the_one_that_transformers_takes(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints(), tmp_path / "c")
    put("smollm", folder, folder)
    (folder / "chat_template.jinja").write_text("<s>{% for m in messages %}{{ m['content'] }}{% endfor %}")
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "another"}))
    export_model(ExportSpec(str(folder)), tmp_path / "out")
    theirs = og.Tokenizer(og.Model(str(tmp_path / "out")))
    message = json.dumps([{"role": "user", "content": "hi"}])
    assert theirs.apply_chat_template(message, add_generation_prompt=False) == "<s>hi"
