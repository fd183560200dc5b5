"""The schema that stands in the repository, and what a reader of a wrong file is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

import reports.record as record_module
from reports.base import schema_text
from reports.errors import RecordError
from reports.record import RunRecord

SCHEMA = Path(record_module.__file__).with_name("record.schema.json")


def test_schema_file_is_current():
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(RunRecord)


def test_schema_takes_a_record_and_refuses_a_broken_one(make_record):
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    raw = json.loads(make_record().to_json())
    assert list(validator.iter_errors(raw)) == []
    raw["series"][0]["case"]["batch"] = 0
    assert [list(e.absolute_path) for e in validator.iter_errors(raw)] == [["series", 0, "case", "batch"]]


def test_round_trip(make_record, tmp_path):
    record = make_record()
    path = tmp_path / "record.json"
    path.write_text(record.to_json(), encoding="utf-8")
    assert RunRecord.read(path) == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["model"].pop("parameters"), r"model\.parameters"),
        (
            lambda raw: raw["series"][2]["rounds"][1]["at_s"].__setitem__(0, -1),
            r"series\.2\.rounds\.1\.at_s\.0",
        ),
        (lambda raw: raw.update(schema_version=9), "version 9"),
        (lambda raw: raw.update(extra=1), "extra"),
    ],
)
def test_read_record_names_the_place(make_record, tmp_path, change, message):
    raw = json.loads(make_record().to_json())
    change(raw)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(RecordError, match=message):
        RunRecord.read(path)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "of kind None")])
def test_read_record_of_no_record(tmp_path, text, message):
    path = tmp_path / "record.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=message):
        RunRecord.read(path)
    with pytest.raises(RecordError, match="cannot read"):
        RunRecord.read(tmp_path / "none.json")


def test_importing_reports_stays_light():
    heavy = "jinja2 pydantic scipy numpy rich torch onnxruntime"
    code = f"import reports, reports.render, sys; print([m for m in {heavy.split()} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_statistics_load_no_renderer():
    code = "import reports.verdict, sys; print('jinja2' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
