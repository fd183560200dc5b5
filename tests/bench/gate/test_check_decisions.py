"""What a check decides once it has its metrics, and text checks where only one thing differs: no model is run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.data.items import Item
from bench.gate import judge
from bench.gate.checks import text as text_checks
from bench.gate.generations import Outputs, generated_items
from bench.gate.localize import _gap
from bench.gate.modes import MODES, Terms
from bench.gate.statistics import TokenScores
from reports.validation import Evidence, PlaceScore, TaskEvidence, TaskMetric

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "unk_token_id": 0}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


ITEM = Item("i", "qa", {"context": "x", "question": "y"}, ("z",))


def terms(mode: str) -> Terms:
    return Terms("fp32", "fp32", "fp32", MODES[mode])


class Tokenizer:
    """Words to ids and back; ``changes`` replace what it answers."""

    def __init__(self, **changes: Any) -> None:
        self.chat_template = TEMPLATE
        self.added = {"<s>": 1, "</s>": 2}
        self.last_word = ""
        self.prompt, self.chat = "assistant:", ""
        self.__dict__.update(IDS | changes)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(w) for w in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids)) + self.last_word

    def get_added_vocab(self) -> dict[str, int]:
        return self.added

    def apply_chat_template(self, chat: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        return self.chat + "".join(m["content"] for m in chat) + (self.prompt if add_generation_prompt else "")


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``beside(tokenizer)``: a subject whose folder has this tokenizer, the baseline the plain one."""

    def make(ours: Tokenizer) -> Any:
        monkeypatch.setattr("runtime.text.load_tokenizer", lambda folder: ours)
        config = SimpleNamespace(max_position_embeddings=64)
        return SimpleNamespace(
            folder=tmp_path,
            tokenizer=Tokenizer(),
            dataset=SimpleNamespace(items=[]),
            manifest=SimpleNamespace(eos_token_ids=[2, 5], decode_graph="model.onnx"),
            ours=False,
            baseline=SimpleNamespace(eos=(2, 5), config=config, context=64, checkpoint=tmp_path / "checkpoint"),
        )

    return make


def test_ids_that_decode_to_another_text_are_named(beside: Any) -> None:
    assert text_checks.tokenizer(beside(Tokenizer())).status == "PASS"
    result = text_checks.tokenizer(beside(Tokenizer(last_word="!")))
    assert (result.status, result.findings[0].what) == ("FAIL", "decodes to another text")


@pytest.mark.parametrize(
    ("changes", "conversations"),
    [({}, 0), ({"prompt": "bot:"}, 3), ({"chat": "<s>"}, 6), ({"chat_template": ""}, 1)],
    ids=["equal", "another generation prompt", "another beginning", "none"],
)
def test_every_rendering_of_the_chat_template_counts(changes: dict[str, Any], conversations: int, beside: Any) -> None:
    result = text_checks.chat_template(beside(Tokenizer(**changes)))
    assert (result.status, len(result.findings)) == ("FAIL" if conversations else "PASS", conversations)


@pytest.mark.parametrize(
    ("template", "findings"),
    [
        (TEMPLATE, 0),
        ("\n" + TEMPLATE, 0),
        ("{{ messages }}", 1),
        ([{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "x"}], 1),
    ],
)
def test_a_template_that_only_genai_reads(template: Any, findings: int, beside: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    result = text_checks.chat_template(beside(Tokenizer()))
    assert [f.where for f in result.findings] == findings * ["tokenizer_config.json, chat_template"]
    assert result.status == ("FAIL" if findings else "PASS")


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        *(({name: 3}, f"tokenizer, {name}") for name in IDS),
        ({"added": {"<s>": 1}}, "tokenizer, added tokens"),
        ({"added": {"<s>": 1, "</s>": 2, "<x>": 9}}, "tokenizer, added tokens"),
    ],
)
def test_special_ids_one_by_one(changes: dict[str, Any], where: str, beside: Any) -> None:
    assert text_checks.special_ids(beside(Tokenizer())).status == "PASS"
    result = text_checks.special_ids(beside(Tokenizer(**changes)))
    assert [f.where for f in result.findings] == [where]


@pytest.mark.parametrize(
    ("model", "where"),
    [
        ({"eos_token_id": [2, 5], "context_length": 64}, None),
        ({"eos_token_id": [2]}, "eos_token_id"),
        ({"eos_token_id": 2}, "eos_token_id"),
        ({}, "eos_token_id"),
        ({"eos_token_id": [2, 5, 9]}, "eos_token_id"),
        ({"eos_token_id": [2, 5], "context_length": 32}, "context_length"),
    ],
)
def test_genais_configuration_ends_where_the_baseline_does(
    model: dict[str, Any], where: str | None, beside: Any, tmp_path: Path
) -> None:
    document = {"model": {**model, "decoder": {"filename": "model.onnx"}}}
    (tmp_path / "genai_config.json").write_text(json.dumps(document), encoding="utf-8")
    result = text_checks.special_ids(beside(Tokenizer()))
    assert [f.where for f in result.findings] == ([f"genai_config.json, {where}"] if where else [])


@pytest.mark.parametrize(
    ("ours", "theirs", "status"),
    [(20, 20, "PASS"), (19, 20, "PASS"), (20, 19, "PASS"), (17, 20, "FAIL"), (20, 17, "FAIL"), (0, 20, "FAIL")],
)
def test_too_many_ends_fail_as_too_few_do(ours: int, theirs: int, status: str) -> None:
    made = [
        Outputs(ITEM, (7, 2 if k < ours else 9), (7, 5 if k < theirs else 9)) for k in range(20)
    ]  # either end token ends
    evidence = Evidence(outputs=generated_items(made, (2, 5)))
    assert judge.end_token(evidence, terms("standard")).status == status


def test_short_answers_fall_out_of_the_length_band() -> None:
    full = Outputs(ITEM, tuple(range(10)), tuple(range(10)))
    cut = Outputs(ITEM, tuple(range(8)), tuple(range(10)))

    def judged(outputs: list[Outputs]) -> tuple[Any, Any]:
        evidence = Evidence(outputs=generated_items(outputs, (2,)))
        return judge.greedy(evidence, terms("standard")), judge.length_band(evidence, terms("standard"))

    tokens, band = judged([full] * 99 + [cut])
    assert (tokens.status, band.status) == ("PASS", "PASS")
    tokens, band = judged([full, cut, cut, cut])
    assert (tokens.status, band.status) == ("FAIL", "FAIL")
    assert "first divergence at token 9" in tokens.summary


@pytest.mark.parametrize(
    ("values", "status", "place"),
    [
        ([0.01, 0.02], "PASS", "b"),
        ([0.3, 0.02], "FAIL", "a"),
        ([float("nan"), 0.02], "FAIL", "a"),
        ([0.01, float("inf")], "FAIL", "b"),
    ],
)
def test_what_is_not_a_number_is_not_small(values: list[float], status: str, place: str) -> None:
    rows = [PlaceScore(place=p, kld=v) for p, v in zip("ab", values, strict=True)]
    terms = Terms("int4", "fp32", "fp32", MODES["standard"])  # its limit is 0.2
    result = judge.places("prefill_logits", "t", "d")(Evidence(places={"prefill_logits": rows}), terms)
    assert result.status == status
    assert result.measurements[0].detail == f"d; largest at {place}"
    assert [f.where for f in result.findings] == ([place] if status == "FAIL" else [])


def metric(status: str) -> TaskMetric:
    return TaskMetric(
        task="summarization",
        metric="BLEU",
        candidate=1.0,
        baseline=2.0,
        candidate_vs_baseline=None,
        difference_bound=-1.0,
        limit=-0.1,
        status=status,  # type: ignore[arg-type]
        items=4,
        settings="",
    )


TASK = TaskEvidence(
    group="summarization",
    metric="ROUGE-1",
    settings="",
    items=["a"],
    candidate=[[1.0, 1.0]],
    baseline=[[1.0, 1.0]],
    cross=[[1.0, 1.0]],
    same_outputs=True,
)


@pytest.mark.parametrize("mode", ["quick", "standard"])
@pytest.mark.parametrize("status", ["PASS", "FAIL", "INCONCLUSIVE"])
def test_few_items_report_what_is_undecided_and_fail_what_is_worse(
    mode: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = iter([metric("PASS"), metric(status)])
    monkeypatch.setattr(judge, "task_metric", lambda *_: next(made))
    expected = "REPORTED" if (mode, status) == ("quick", "INCONCLUSIVE") else status
    assert judge.tasks(Evidence(tasks=[TASK, TASK]), terms(mode)).status == expected


@pytest.mark.parametrize("mode", ["quick", "standard"])
@pytest.mark.parametrize("status", ["PASS", "FAIL", "INCONCLUSIVE"])
@pytest.mark.parametrize("name", ["tail_kld", "top1_agreement"])
def test_few_tokens_report_the_tail_and_fail_what_is_worse(name: str, mode: str, status: str) -> None:
    tokens = {"PASS": 20_000, "FAIL": 20_000, "INCONCLUSIVE": 50}[status]
    bad = np.arange(tokens) < (tokens // 2 if status == "FAIL" else 0)
    zeros = np.zeros(tokens)
    scores = [TokenScores(zeros, zeros, np.where(bad, 1.0, 0.0), ~bad)] * 2
    expected = status if status == "FAIL" or mode == "standard" else "REPORTED"
    assert judge.judge_tokens(name, scores, [], lambda _k: zeros, terms(mode)).status == expected


def test_one_wrong_row_does_not_drown_in_the_others() -> None:
    theirs = np.ones((100, 8))
    ours = theirs.copy()
    assert _gap(ours, theirs) == 0
    ours[3] *= 1.5
    assert _gap(ours, theirs) == pytest.approx(0.5)
    ours[3, 2] = np.nan
    assert _gap(ours, theirs) == float("inf")
    assert _gap(theirs[:50], theirs) == float("inf")
