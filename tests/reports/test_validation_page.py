"""A validation as document, page, Markdown, JUnit and terminal: the same verdict everywhere, names stay text."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree as ET

import jsonschema
import pytest
from rich.console import Console

import reports.validation as module
from bench.cli.main import main
from reports.base import schema_text
from reports.errors import RecordError
from reports.publish import publish, read_any, write_report
from reports.render.markdown import parity_blocks
from reports.render.parity import FINDINGS_SHOWN
from reports.render.validation import (
    headline,
    print_validation,
    render_validation,
    render_validation_junit,
    render_validation_markdown,
)
from reports.validation import Status, Validation
from tests.reports.comparison_examples import example_comparison
from tests.reports.test_html import Page
from tests.reports.validation_examples import HOSTILE, WRONG_WEIGHTS, example_validation

SCHEMA = Path(module.__file__).with_name("validation.schema.json")
STATUSES: tuple[Status, ...] = get_args(Status)
FIRST = "model.layers.3.mlp.up_proj.weight: 6 of 884,736 values differ"


def terminal(v: Validation, width: int = 200) -> str:
    out = io.StringIO()
    print_validation(v, Console(file=out, width=width, color_system=None))
    return out.getvalue()


def told(v: Validation) -> dict[str, str]:
    """What each form says, as one line of plain text."""
    texts = {
        "page": Page(render_validation(v)).words,
        "markdown": render_validation_markdown(v).replace("\\", ""),
        "junit": "".join(ET.fromstring(render_validation_junit(v)).itertext()),
        "terminal": terminal(v),
    }
    return {name: " ".join(text.split()) for name, text in texts.items()}


# -- the document ----------------------------------------------------------------------------------------------------


def test_schema_file_is_current_and_takes_a_validation():
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(Validation)
    validator = jsonschema.Draft202012Validator(json.loads(schema_text(Validation)))
    raw = json.loads(example_validation(failing="mean_kld").to_json())
    assert list(validator.iter_errors(raw)) == []
    raw["results"][3]["status"] = "GOOD"
    assert [list(e.absolute_path) for e in validator.iter_errors(raw)] == [["results", 3, "status"]]


def test_round_trip_keeps_the_evidence(tmp_path):
    made = example_validation(failing="weights")
    path = write_report(made, tmp_path).with_name("validation.json")
    assert Validation.read(path) == made
    # A reader may page through it: the long lists stand in one line.
    assert len(path.read_text(encoding="utf-8").splitlines()) < 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "record"}, r"is of kind 'record'; pass a validation\.json"),
        ({"schema_version": 7}, "has validation schema version 7, this tool reads 1"),
        ({"results": [{"name": "files"}]}, r"results\.0\.kind: Field required"),
        ({"evidence": {"chunks": [{"kld": []}]}}, r"evidence\.chunks\.0\.nll_candidate"),
        ({"verdict": "GOOD"}, "verdict: Input should be 'PASS', 'FAIL' or 'INCONCLUSIVE'"),
        ({"exit_code": 0}, "exit_code: Extra inputs"),
    ],
)
def test_a_broken_validation_names_the_place(tmp_path, change, message):
    path = tmp_path / "validation.json"
    path.write_text(json.dumps(json.loads(example_validation().to_json()) | change), encoding="utf-8")
    with pytest.raises(RecordError, match=message):
        Validation.read(path)


def test_writes_four_files_and_equal_bytes(tmp_path):
    made = example_validation()
    assert write_report(made, tmp_path / "a") == tmp_path / "a" / "index.html"
    write_report(made, tmp_path / "b")
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert sorted(files) == ["index.html", "junit.xml", "report.md", "validation.json"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()} == files


@pytest.mark.parametrize(("failing", "code"), [("", 0), ("mean_kld", 1)])
def test_publish_takes_each_kind(make_record, tmp_path, failing, code):
    documents = {
        "record.json": make_record(failing_check=bool(failing)),
        "comparison.json": example_comparison(failing_parity=bool(failing)),
        "validation.json": example_validation(failing=failing),
    }
    for name, document in documents.items():
        source, out = tmp_path / "any name", tmp_path / name.removesuffix(".json")
        source.write_text(document.to_json(), encoding="utf-8")
        found = publish(source, out)
        assert found.page == out / "index.html"
        assert sorted(p.name for p in out.iterdir()) == sorted({"index.html", "junit.xml", "report.md", name})
        assert read_any(out / name) == document
        # The made-up comparison has a regression, whatever its parity.
        assert found.exit_code == (1 if name == "comparison.json" else code)
        shown = io.StringIO()
        found.show(Console(file=shown, width=100))
        assert ("FAIL" in shown.getvalue()) == (found.exit_code == 1), name


def test_report_command_recognises_a_validation(tmp_path, capsys):
    source = write_report(example_validation(failing="weights"), tmp_path / "in").with_name("validation.json")
    assert main(["report", str(source), "--out", str(tmp_path / "out")]) == 1
    assert FIRST in capsys.readouterr().out


# -- what it says ----------------------------------------------------------------------------------------------------


def test_every_status_stands_everywhere():
    v = example_validation(statuses=STATUSES)
    texts = told(v)
    for status in STATUSES:
        for name in ("page", "markdown", "terminal"):
            assert status in texts[name], (name, status)
    cases = ET.fromstring(render_validation_junit(v)).findall(".//testcase")
    kinds = {s: [child.get("type") for child in c] for s, c in zip(STATUSES, cases, strict=True)}
    assert kinds["FAIL"] == ["parity"]
    assert kinds["INCONCLUSIVE"] == ["inconclusive"]
    assert kinds["SKIPPED"] == ["skipped"]
    assert [kinds[s] for s in ("PASS", "REPORTED", "SUSPICIOUS")] == [[None]] * 3
    counted = re.search(r'<ul class="counts".*?</ul>', render_validation(v), flags=re.S)
    assert counted
    assert Page(counted.group()).words == ("1 ✕ fail 1 ? inconclusive 1 ! suspicious 1 ✓ pass 1 · reported 1 · skipped")


@pytest.mark.parametrize(
    ("options", "word", "sentence"),
    [
        (
            {},
            "PASSED",
            "Same model: 17 of 17 checks pass, tolerance tier fp32, mode standard, 1 suspicious "
            "(99.9 % KL divergence).",
        ),
        ({"failing": "weights"}, "FAILED", f"Different model: weights: {FIRST} (and 4 more)."),
        ({"statuses": ["INCONCLUSIVE", "PASS"]}, "INCONCLUSIVE", "Parity undecided: c0: 10 files as published."),
        ({"statuses": ["SKIPPED"]}, "INCONCLUSIVE", "Parity undecided: no check could judge anything."),
        ({"statuses": []}, "INCONCLUSIVE", "Parity undecided: no check could judge anything."),
    ],
)
def test_page_and_markdown_begin_with_the_verdict(options, word, sentence):
    v = example_validation(**options)
    assert headline(v) == sentence
    page = render_validation(v)
    top = Page(page[: page.index("</header>")] + "</header></body></html>").words
    assert word in top
    assert sentence in top
    mark = {"PASSED": "✅", "FAILED": "❌", "INCONCLUSIVE": "❔"}[word]
    assert told(v)["markdown"].startswith(f"**{mark} {word}: {sentence}**")
    assert f"{v.verdict} exports/smollm2 against " in told(v)["terminal"]


def test_failed_and_undecided_checks_stand_first():
    v = example_validation(failing="mean_kld")
    results = [r.model_copy(update={"status": "INCONCLUSIVE"}) if r.name == "greedy" else r for r in v.results]
    v = v.model_copy(update={"results": results})
    first = ["Mean KL divergence", "Equal greedy generations", "99.9 % KL divergence", "Files", "Manifest"]
    page = Page(render_validation(v))
    assert [t.strip() for t in page.by_tag["b"] if t.strip() in {r.title for r in v.results}][:5] == first
    rows = re.findall(r"^\| ([A-Z9].*?) \|", "\n".join(parity_blocks(v)), flags=re.M)
    assert rows[1:6] == first


def test_a_failing_exact_check_shows_its_findings_with_their_layers():
    texts = told(example_validation(failing="weights"))
    for name, text in texts.items():
        assert FIRST in text, name
    for f in WRONG_WEIGHTS:
        for name in ("page", "junit"):
            assert f"{f['where']}: {f['what']} (layer {f['layer']})" in texts[name], name
    # What it looks at stands below it; that of checks that passed waits behind a click.
    assert "Every checkpoint tensor where the graph reads it" in texts["page"].split("What each of the other")[0]
    assert "config.json against the baseline's." in texts["page"].split("What each of the other")[1]


def test_many_findings_are_cut_and_counted():
    v = example_validation(failing="weights")
    results = [r.model_copy(update={"findings": r.findings * 30}) for r in v.results]
    page = Page(render_validation(v.model_copy(update={"results": results}))).words
    assert page.count("values differ (layer") == FINDINGS_SHOWN
    assert f"and {30 * len(WRONG_WEIGHTS) - FINDINGS_SHOWN} more in validation.json" in page


def test_a_measured_check_shows_value_bound_limit_and_null_control():
    texts = told(example_validation(failing="mean_kld"))
    assert "✕ FAIL 0.0032 nats 0.0039 nats ≤ 1e-8 nats 8e-12 nats 2,040" in texts["page"]
    assert "| Mean KL divergence | ❌ FAIL | 0.0032 nats | 0.0039 nats | ≤ 1e-8 nats | 2,040 |" in texts["markdown"]


def test_the_place_where_it_begins_and_the_notes_stand_everywhere():
    v = example_validation(failing="mean_kld")
    for name, text in told(v).items():
        if name != "junit":
            assert v.place.detail in text, name
            assert "the baseline's logits came from the cache" in text.replace("The baseline", "the baseline"), name
    assert "eaves the baseline at" not in " ".join(told(example_validation()).values())


def test_an_incomplete_run_says_how_much_was_left_out():
    texts = told(example_validation(left_out=3))
    for name in ("page", "markdown"):
        assert "3 of 18 checks" in texts[name], name
        assert " of 18 checks" not in told(example_validation())[name]
    assert "Generation tasks were not examined." in texts["page"]


def test_terminal_shows_findings_beside_the_first():
    lines = terminal(example_validation(failing="weights")).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("weights"))
    assert re.match(r"weights +FAIL +1\.5 s  model\.layers\.3", lines[at])
    assert [line.split()[:2] for line in lines[at + 1 : at + 4]] == [
        ["also", f"{f['where']}:"] for f in WRONG_WEIGHTS[1:4]
    ]
    assert lines[at + 4].startswith("tokenizer")


def test_junit_counts():
    root = ET.fromstring(render_validation_junit(example_validation(failing="weights")))
    assert {k: root.get(k) for k in ("tests", "failures", "errors", "skipped", "time")} == {
        "tests": "22",
        "failures": "1",
        "errors": "0",
        "skipped": "1",
        "time": "183.000",
    }


# -- hostile names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["", "mean_kld", "weights"])
def test_names_stay_text(failing):
    nasty = HOSTILE + " www.evil.example\x00\x1b[31m"
    v = example_validation(failing=failing, hostile=nasty)
    text = render_validation(v)
    page = Page(text)
    assert page.stack == []
    assert "<script" not in text
    assert HOSTILE in page.words
    assert {tag for tag, _, _ in page.tags} == {
        tag for tag, _, _ in Page(render_validation(example_validation(failing=failing))).tags
    }
    markdown = render_validation_markdown(v)
    outside = re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.S | re.M)
    for sign in ("<script", "@team", "://", "www."):
        assert sign not in outside
    for block in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    root = ET.fromstring(render_validation_junit(v))
    assert any("<script>alert(1)</script>" in (c.get("name") or "") for c in root.iter("testcase"))
    assert "[bold]x[/nope]" in terminal(example_validation(failing=failing, hostile="[bold]x[/nope]"))


@pytest.mark.parametrize("hostile", ["", "`" * 3000, "|<&>@" * 3000])
def test_markdown_fits_a_comment(hostile):
    v = example_validation(examples=5000, hostile=hostile, failing="weights")
    text = render_validation_markdown(v.model_copy(update={"results": v.results * 200, "notes": v.notes * 300}))
    assert len(text) < 65_000
    assert "of 5,000 examples; the rest are in validation.json." in text


@pytest.mark.parametrize("options", [{}, {"hostile": HOSTILE}, {"statuses": []}, {"failing": "weights"}])
def test_page_is_self_contained_and_its_links_land(options):
    page = Page(render_validation(example_validation(**options)))
    assert page.stack == []
    assert not {tag for tag, _, _ in page.tags} & {"script", "link", "iframe", "img", "form"}
    ids = [attrs["id"] for _, attrs, _ in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for a in page.of("a")]
    assert len(targets) >= 4
    assert {t[1:] for t in targets} <= set(ids)
    assert all(a.get("scope") for a in page.of("th"))
    assert "None" not in page.words
