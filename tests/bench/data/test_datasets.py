"""The shipped data and the user's own: form, size, errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.data.items import prompt_ids
from bench.data.loading import DATA, DatasetError, load_file, load_shipped

GOOD = {"id": "a", "task": "qa", "context": "It rained.", "question": "What did it do?", "references": ["rained"]}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "least"), [("qa", 40), ("summarization", 30), ("translation", 80), ("rewriting", 40), ("prose", 10)]
)
def test_shipped_files_say_their_licence_and_size(name: str, least: int) -> None:
    path = DATA / f"{name}.jsonl"
    header = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    items = load_file(path).items
    assert header["licence"] == "CC-BY-4.0"
    assert header["items"] == len(items) >= least
    assert len({i.id for i in items}) == len(items)


def test_shipped_tasks() -> None:
    data = load_shipped()
    groups = data.groups()
    assert set(groups) == {"qa", "summarization", "translation en-fr", "translation en-de", "rewriting"}
    assert min(len(groups["translation en-fr"]), len(groups["translation en-de"])) >= 40
    assert sum(len(t.split()) for t in data.prose()) > 7500
    for item in groups["qa"]:
        assert item.references[0] in item.fields["context"]


def test_a_limit_spreads_over_the_file() -> None:
    chosen = load_shipped().groups(4)["qa"]
    every = load_shipped().groups()["qa"]
    assert len(chosen) == 4
    assert [every.index(i) for i in chosen] == [0, 14, 29, 43]


def test_own_file_with_and_without_header(tmp_path: Path) -> None:
    plain = load_file(write(tmp_path / "a.jsonl", GOOD, "", GOOD | {"id": "b"}))
    assert [i.id for i in plain.items] == ["a", "b"]
    headed = load_file(write(tmp_path / "b.jsonl", {"dataset": "mine"}, GOOD))
    assert len(headed.items) == 1
    assert plain.sha256 != headed.sha256


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([GOOD, "{not json"], "line 2: not valid JSON"),
        ([GOOD, "", '["a"]'], "line 3: not a JSON object"),
        ([GOOD | {"task": "poetry"}], "line 1: task 'poetry' must be one of"),
        ([{k: v for k, v in GOOD.items() if k != "question"}], "line 1: 'question' is missing"),
        ([GOOD | {"references": []}], "line 1: 'references'"),
        ([GOOD | {"context": 3}], "line 1: 'context'"),
        ([GOOD, GOOD | {"context": "half \ud83d"}], r"line 2: holds half of a character \(\\ud83d alone\)"),
        ([], "is empty"),
        ([{"dataset": "only a header"}], "is empty"),
    ],
)
def test_errors_name_the_line(lines: list[object], words: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=words) as caught:
        load_file(write(tmp_path / "data.jsonl", *lines))
    assert caught.value.exit_code == 2
    assert "data.jsonl" in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot read the dataset"):
        load_file(tmp_path / "nowhere.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"task": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(DatasetError, match="not UTF-8"):
        load_file(tmp_path / "latin.jsonl")


def test_prompts_use_the_chat_template_where_there_is_one() -> None:
    item = load_shipped().groups()["rewriting"][0]
    question = load_shipped().groups()["qa"][0]

    class Chat:
        chat_template = "x"

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [-len(text)]}

        def apply_chat_template(self, message: list[dict[str, str]], **_: object) -> list[int]:
            return [len(message[0]["content"])]

    class Plain:
        chat_template = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [len(text)]}

    assert prompt_ids(item, Chat()) == [len(item.instruction)]
    assert prompt_ids(question, Chat()) == [-len(question.instruction)]
    assert question.instruction.count("Question:") == 2
    assert question.instruction.endswith("\nAnswer:")
    assert prompt_ids(item, Plain()) == [len(item.instruction + "\n\nAnswer:")]

    class Named(Chat):  # for tools alone
        def __init__(self) -> None:
            self.chat_template = {"tool_use": "x"}

        def __call__(self, text: str) -> dict[str, list[int]]:
            return Plain()(text)

    assert prompt_ids(item, Named()) == prompt_ids(item, Plain())
