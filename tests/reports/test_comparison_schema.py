"""The published schemas are current, and take what the tool writes."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

import reports.comparison as module
from reports.base import schema_text
from reports.comparison import CaseRecord, Comparison
from tests.reports.comparison_examples import example_comparison

FOLDER = Path(module.__file__).parent


@pytest.mark.parametrize(
    ("name", "made"),
    [("case", schema_text(CaseRecord, "validation")), ("comparison", schema_text(Comparison))],
)
def test_schema_files_are_current(name: str, made: str):
    assert (FOLDER / f"{name}.schema.json").read_text(encoding="utf-8") == made


def test_example_fills_the_schema_and_comes_back():
    made = example_comparison()
    schema = json.loads(schema_text(Comparison))
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(json.loads(made.to_json()))) == []
    assert Comparison.model_validate_json(made.to_json()) == made
    assert {r.status for r in made.results} == {
        "REGRESSION",
        "IMPROVED",
        "EQUIVALENT",
        "INCONCLUSIVE",
        "INVALID",
        "NEW",
        "MISSING",
    }
    empty = [f for f in type(made).model_fields if getattr(made, f) in (None, [], {}, "") and f != "advisory_reason"]
    assert empty == []


def test_a_line_made_elsewhere_needs_three_fields():
    validator = jsonschema.Draft202012Validator(json.loads(schema_text(CaseRecord, "validation")))
    line = {"schema_version": 1, "case": "parse", "metrics": {"time": [0.1, 0.11]}}
    assert list(validator.iter_errors(line)) == []
    assert CaseRecord.model_validate(line).outcome == "ok"
    assert list(validator.iter_errors({**line, "metrics": {"time": [0.0]}})) != []
    assert list(validator.iter_errors({"schema_version": 1, "case": "parse"})) != []


GALLERY = sorted((FOLDER / "gallery").glob("*/comparison.json"))


@pytest.mark.parametrize("path", GALLERY, ids=[p.parent.name for p in GALLERY])
def test_gallery_comparisons_are_of_this_schema(path: Path):
    made = Comparison.model_validate_json(path.read_text(encoding="utf-8"))
    assert ("REGRESSION" in {r.status for r in made.results}) == (path.parent.name == "regression")
    assert ("IMPROVED" in {r.status for r in made.results}) == (path.parent.name == "parity-failure")
    assert made.validation is not None
    assert (made.validation.verdict == "FAIL") == (path.parent.name == "parity-failure")
