"""Public sets in their own formats, as small local copies with invented text."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.data.items import Dataset, Item, prompt_ids
from bench.data.loading import load_dataset
from bench.errors import DatasetError
from bench.gate.metrics import rouge_mlperf, score_task
from bench.gate.word_perplexity import (
    WordPerplexity,
    assemble,
    document_windows,
    rolling_windows,
    window_nats,
)

datasets = pytest.importorskip("datasets")

LINES = [
    "",
    " = The Stone Bridge = \n",
    "",
    " It was built in 18 @-@ 19 , of local stone ( granite ) . \n",
    " = = Later years = = \n",
    " The town 's council paid 1 @,@ 200 coins ; it is 3 @.@ 5 m wide . \n",
    "",
    " = A Second Page = \n",
    ' He said " no " and left . \n',
]
ARTICLE = {
    "article": "The mayor opened the bridge. Mr. Hill spoke.",
    "highlights": "Bridge opened .\nHill spoke .",
    "id": "a1",
}
PAIR = {"translation": {"de": "Die Brücke ist alt.", "en": "The bridge is old."}}
QUESTION = {
    "id": "q1",
    "title": "Bridge",
    "context": "The bridge was built in 1819.",
    "question": " When was the bridge built?",
    "answers": {"text": ["1819", "in 1819", "1819"], "answer_start": [24, 21, 24]},
}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "wiki.jsonl", [{"text": t} for t in LINES])


def test_wikitext_pages_and_detokenisation(wikitext: Path) -> None:
    dataset = load_dataset(f"hf:{wikitext}:wikitext")
    first, second = dataset.prose()
    assert "built in 18-19, of local stone (granite)." in first
    assert "== Later years ==" in first  # a heading of the second level starts no page
    assert "town's council paid 1,200 coins; it is 3.5 m wide." in first
    assert 'said "no" and left.' in second
    assert dataset.items[0].fields["original"].startswith(" = The Stone Bridge = ")


def test_infinite_word_perplexities_have_a_ratio() -> None:
    ours, theirs = (WordPerplexity((n, n), (1, 1), (900, 900), 600, "") for n in (2001.0, 2000.0))
    assert ours.word_perplexity == theirs.word_perplexity == math.inf
    assert ours.ratio(theirs) == pytest.approx(math.e)
    assert ours.byte_perplexity == pytest.approx(math.exp(2001 / 900))


def test_word_perplexity_counts_words_of_the_original(wikitext: Path) -> None:
    dataset = load_dataset(f"hf:{wikitext}:wikitext")
    originals = [i.fields["original"] for i in dataset.items]

    class Uniform:
        """Gives every token the same probability: perplexities are known in closed form."""

        def score(self, ids: Any) -> Any:
            return np.zeros((len(ids), 50), np.float32)

    class Letters:
        bos_token_id, eos_token_id = None, 2

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            assert options == {"add_special_tokens": False}
            return {"input_ids": [ord(c) % 50 for c in text]}

    windows = document_windows(dataset, Letters(), 16)
    assert windows[0].inputs[0] == 2  # the first token is predicted from the end token where there is no begin token
    found = assemble(dataset, windows, [window_nats(Uniform(), w) for w in windows])  # type: ignore[arg-type]
    tokens = sum(len(t) for t in dataset.prose())
    # White space at both ends makes an empty word each, as the harness counts.
    words = sum(len(t.split()) + (t[:1].isspace()) + (t[-1:].isspace()) for t in originals)
    assert found.tokens == tokens
    assert sum(found.words) == words
    assert found.word_perplexity == pytest.approx(math.exp(tokens * math.log(50) / words))
    size = sum(len(t.encode()) for t in originals)
    assert found.bits_per_byte == pytest.approx(tokens * math.log2(50) / size)
    assert found.byte_perplexity == pytest.approx(2**found.bits_per_byte)


@pytest.mark.parametrize("n", [1, 4, 5, 8, 11])
def test_rolling_windows_predict_each_token_once(n: int) -> None:
    ids = list(range(100, 100 + n))
    windows = rolling_windows(ids, 7, 4)
    assert [t for w in windows for t in w.targets] == ids
    before = [7, *ids]
    for w in windows:
        end = w.targets[-1] - 100 + 1
        assert list(w.inputs) == before[max(0, end - 4) : end]  # filled up with context on the left
        assert len(w.inputs) <= 4


def test_word_perplexity_of_a_real_session_is_the_models(
    wikitext: Path, checkpoints: Callable[..., Path], one_thread: None, words: list[str]
) -> None:
    """Against transformers' own loss, window by window."""
    import torch
    from transformers import AutoModelForCausalLM

    from runtime.text import load_tokenizer
    from runtime.torch_session import TorchSession

    text = " ".join(words * 3)
    dataset = Dataset("d", "0", (Item("p", "perplexity", {"text": text}, ()),))
    windows = document_windows(dataset, load_tokenizer(checkpoints()), 160, 20)
    session = TorchSession(checkpoints(), threads=1)
    ours = [window_nats(session, w) for w in windows]
    model = AutoModelForCausalLM.from_pretrained(checkpoints()).eval()
    for w, nats in zip(windows, ours, strict=True):
        whole = torch.tensor([[*w.inputs, w.targets[-1]]])
        labels = whole.clone()
        labels[:, : whole.shape[1] - len(w.targets)] = -100
        with torch.inference_mode():
            loss = model(whole, labels=labels).loss
        assert nats == pytest.approx(float(loss) * len(w.targets), rel=1e-5)
    windows = document_windows(dataset, load_tokenizer(checkpoints()), session.info.context_length, 20)
    whole_figure = assemble(dataset, windows, [window_nats(session, w) for w in windows])
    assert whole_figure == assemble(dataset, windows, ours)
    assert whole_figure.word_perplexity == pytest.approx(math.exp(sum(ours) / len(words * 3)))


def test_cnn_dailymail(tmp_path: Path) -> None:
    dataset = load_dataset(f"hf:{jsonl(tmp_path / 'x.jsonl', [ARTICLE])}:cnn_dailymail")
    (item,) = dataset.items
    assert (item.id, item.references) == ("a1", (ARTICLE["highlights"],))
    assert ARTICLE["article"] in item.instruction
    assert [s.metric for s in score_task(item.task, ["x"], [item.references])] == [
        "ROUGE-1",
        "ROUGE-2",
        "ROUGE-L",
        "ROUGE-Lsum",
    ]


def test_rouge_as_mlperf() -> None:
    output, reference = "Hill spoke. The bridge opened.", "The bridge opened. Hill sang."
    scores = {s.metric: s.score for s in score_task("cnn_dailymail", [output], [[reference]])}
    assert scores["ROUGE-1"] == pytest.approx(80.0)  # 4 of 5 words
    assert scores["ROUGE-L"] == pytest.approx(60.0)  # one sequence: the order of sentences counts
    assert scores["ROUGE-Lsum"] == pytest.approx(80.0)  # sentence by sentence: it does not
    stemmed = {s.metric: s.score for s in rouge_mlperf(["bridges opening"], [["bridge opened"]])}
    assert stemmed["ROUGE-1"] == pytest.approx(100.0)
    assert "punkt" in rouge_mlperf([output], [[reference]])[0].settings


def test_wmt14_directions(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [PAIR])
    there = load_dataset(f"hf:{path}:wmt14:en-de").items[0]
    back = load_dataset(f"hf:{path}:wmt14:de-en").items[0]
    assert (there.fields["text"], there.references) == ("The bridge is old.", ("Die Brücke ist alt.",))
    assert (back.fields["text"], back.references) == ("Die Brücke ist alt.", ("The bridge is old.",))
    assert there.group == "translation en-de"
    with pytest.raises(DatasetError, match="no en and fr"):
        load_dataset(f"hf:{path}:wmt14:en-fr")
    with pytest.raises(DatasetError, match="no direction"):
        load_dataset(f"hf:{path}:wmt14:german")


def test_squad(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [QUESTION])
    (item,) = load_dataset(f"hf:{path}:squad").items
    assert item.references == ("1819", "in 1819")
    assert item.fields["question"] == "When was the bridge built?"
    assert prompt_ids(item, lambda text: {"input_ids": [len(text)]})
    unanswerable = {**QUESTION, "answers": {"text": [], "answer_start": []}}
    jsonl(path, [QUESTION, unanswerable])
    with pytest.raises(DatasetError, match="row 1 has no answer"):
        load_dataset(f"hf:{path}:squad")


def test_folders_as_the_hub_lays_them_out(tmp_path: Path) -> None:
    rows = [{**QUESTION, "id": f"q{k}"} for k in range(5)]
    for split, n in (("train", 2), ("validation", 3)):
        datasets.Dataset.from_list(rows[:n]).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    assert len(load_dataset(f"hf:{tmp_path}:squad").items) == 3  # the template's own split
    assert len(load_dataset(f"hf:{tmp_path}:squad@train").items) == 2
    assert len(load_dataset(f"hf:{tmp_path}:squad@validation[:1]").items) == 1
    with pytest.raises(DatasetError, match="no file of split 'test'"):
        load_dataset(f"hf:{tmp_path}:squad@test")
    saved = tmp_path / "saved"
    datasets.DatasetDict({"validation": datasets.Dataset.from_list(rows[:3])}).save_to_disk(saved)
    from_disk = load_dataset(f"hf:{saved}:squad")
    assert from_disk.sha256 == load_dataset(f"hf:{tmp_path}:squad").sha256  # the content counts, not the format
    with pytest.raises(DatasetError, match="no split 'train'"):
        load_dataset(f"hf:{saved}:squad@train")


def test_an_edited_copy_is_read_anew(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", [QUESTION])
    before = load_dataset(f"hf:{path}:squad").sha256
    jsonl(path, [{**QUESTION, "question": "Who built it?"}])
    assert load_dataset(f"hf:{path}:squad").sha256 != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf:", "no template for .an empty name"),
        ("hf:glue:cola", "no template for 'glue'"),
        ("hf:/nowhere", "say which set's format"),
        ("hf:/nowhere:glue", "unknown template|say which"),
        ("hf:/nowhere:squad", "nothing at /nowhere"),
    ],
)
def test_names_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_dataset(text)


def test_missing_column_empty_and_broken_files(tmp_path: Path, wikitext: Path) -> None:
    with pytest.raises(DatasetError, match=r"no column 'context'.*it has text"):
        load_dataset(f"hf:{wikitext}:squad")
    empty = tmp_path / "none"
    empty.mkdir()
    with pytest.raises(DatasetError, match="no data file"):
        load_dataset(f"hf:{empty}:squad")
    (tmp_path / "bad.jsonl").write_text('{"context": \n')
    with pytest.raises(DatasetError, match="cannot be read"):
        load_dataset(f"hf:{tmp_path / 'bad.jsonl'}:squad")


def test_offline_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DatasetError, match=r"hf:squad.*(pass hf:/path/to/copy:squad|on the hub)"):
        load_dataset("hf:squad")


def test_the_suite_takes_it(wikitext: Path) -> None:
    from bench.suite.run import Run

    assert Run(Namespace(dataset=f"hf:{wikitext}:wikitext")).dataset.name.startswith("hf:wiki.jsonl:wikitext")
