"""A document is what its field ``kind`` says, whatever its name, its first bytes and its other fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reports import case_files, publish
from reports.base import first_document, kind_of
from reports.comparison import CaseRecord, Comparison
from reports.errors import RecordError
from reports.matrix import Matrix
from reports.record import RunRecord
from reports.validation import Validation
from tests.reports.comparison_examples import example_comparison


def test_each_of_our_documents_names_itself() -> None:
    kinds = {c: c.model_fields["kind"].default for c in (*publish.SUBJECTS.values(), CaseRecord)}
    assert set(publish.SUBJECTS.values()) == {RunRecord, Comparison, Validation, Matrix} == set(publish.RENDERERS)
    assert kinds == {c: name for name, c in publish.SUBJECTS.items()} | {CaseRecord: "case"}
    assert sorted(kinds.values()) == ["case", "comparison", "matrix", "record", "validation"]


def test_the_field_decides(make_record: Any, tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(make_record().to_json(), encoding="utf-8")
    assert isinstance(publish.read_any(path), RunRecord)
    assert {r.side for r in case_files.read_any(path, side="base")} == {None}
    made = example_comparison()
    raw = json.loads(made.to_json())
    text = json.dumps({**{k: v for k, v in raw.items() if k != "kind"}, "kind": raw["kind"]})  # at its very end
    path = tmp_path / "record.json"
    path.write_text(text, encoding="utf-8")
    assert publish.read_any(path) == made
    assert case_files.read_any(path, side="candidate") == [r for r in made.records if r.side == "candidate"]
    lines = tmp_path / "lines"
    lines.write_text("".join(r.model_dump_json() + "\n" for r in made.records), encoding="utf-8")
    assert kind_of(first_document(lines)) == "case"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema_version": 1, "kind": "case"}', "is of kind 'case'"),
        ('{"schema_version": 1, "series": [], "validation": null}', "does not name its kind"),
        ("[1]", "does not name its kind"),
        ("no JSON", "does not name its kind"),
        ("", "does not name its kind"),
    ],
)
def test_what_has_no_page_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=words):
        publish.read_any(path)


def test_a_validation_holds_no_latencies(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text('{"schema_version": 1, "kind": "validation"}', encoding="utf-8")
    with pytest.raises(RecordError, match="is of kind 'validation', which holds no latencies"):
        case_files.read_any(path, side="base")
