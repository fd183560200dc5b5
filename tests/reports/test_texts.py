"""Markdown, JUnit, the terminal and the folder that is written."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

import reports.publish as publish
from reports.publish import write_report
from reports.record import Outcome, RunRecord
from reports.render.html import render_html
from reports.render.junit import render_junit
from reports.render.markdown import escape, fenced, render_markdown
from reports.render.terminal import print_summary
from reports.render.words import difference, fixed, limit_text, ms, number, size, times
from reports.stats import Estimate

HOSTILE = '<script>alert(1)</script>|`$x_{$ & "q" *b* @team [a](http://evil.example) www.evil.example'


def _terminal(record, width=80):
    out = io.StringIO()
    print_summary(record, Console(file=out, width=width, color_system=None))
    return out.getvalue()


def test_markdown_begins_with_the_verdict(make_record):
    first = render_markdown(make_record()).splitlines()[0]
    assert (
        first == "**✅ PASSED: Same model, 2.86 times as fast in decode and 1.77 in prefill, 1 of 4 targets missed.**"
    )
    assert render_markdown(make_record(failing_check=True)).startswith("**❌ FAILED: Different model")
    assert render_markdown(make_record(parity=False)).startswith("**❔ INCONCLUSIVE: Parity not examined")


@pytest.mark.parametrize("hostile", ["", "`" * 3000, "|<&>@" * 3000])
def test_markdown_fits_a_comment_with_5000_examples(make_record, hostile):
    record = make_record(examples=5000, hostile=hostile)
    many = record.validation.model_copy(update={"results": record.validation.results * 200})
    text = render_markdown(record.model_copy(update={"validation": many, "warnings": record.warnings * 300}))
    assert len(text) < 65_000
    shown = text.count("<details>")
    assert shown == 5 if not hostile else shown >= 1
    assert f"… {shown} of 5,000 examples; the rest are in record.json." in text
    assert "more rows are in index.html" in text or "more parts are in index.html" in text


def test_markdown_says_what_it_cut(make_record):
    record = make_record()
    many = record.validation.model_copy(update={"results": record.validation.results * 10})
    text = render_markdown(record.model_copy(update={"validation": many}))
    assert "… 120 more rows are in index.html." in text


def test_markdown_tables_are_rectangular(make_record):
    for options in ({}, {"hostile": HOSTILE}):
        blocks = re.findall(r"(?:^\|.*\n)+", render_markdown(make_record(**options)), flags=re.M)
        assert len(blocks) >= 5
        for block in blocks:
            counts = {line.count("|") for line in block.splitlines()}
            assert len(counts) == 1, block


def test_markdown_shows_hostile_names_as_text(make_record):
    outside = re.sub(r"^(`{3,}).*?^\1$", "", render_markdown(make_record(hostile=HOSTILE)), flags=re.S | re.M)
    assert "<script" not in outside
    assert "@team" not in outside
    assert "://" not in outside
    assert "www." not in outside
    assert not re.search(r"(?<!\\)[*]b[*]", outside)
    assert r"\[a\]\(" in outside


def test_escape_is_one_line_and_fences_outrun_their_text():
    assert escape("a\n\nb\t c") == "a b c"
    assert escape("x" * 50, 10) == "x" * 9 + "…"
    assert fenced("a\n````\nb").startswith("`````text\n")


def test_junit_counts(make_record):
    outcomes = [
        {"test": "bench/test_a.py::test_x[1]", "outcome": o, "seconds": 1.5, "message": f"why {o}"}
        for o in ("passed", "failed", "error", "skipped")
    ]
    record = make_record(outcomes=outcomes, failing_check=True)
    results = [
        r.model_copy(update={"status": "INCONCLUSIVE"}) if r.name == "top1_agreement" else r
        for r in record.validation.results
    ]
    told = Outcome(test="test_check[mean_kld]", outcome="failed", seconds=1, message="the suite parity has it")
    validation = record.validation.model_copy(update={"results": results})
    record = record.model_copy(update={"validation": validation, "outcomes": [*record.outcomes, told]})
    root = ET.fromstring(render_junit(record))
    bench, parity = root.findall("testsuite")
    assert {k: bench.get(k) for k in ("tests", "failures", "errors", "skipped", "time")} == {
        "tests": "4",
        "failures": "1",
        "errors": "1",
        "skipped": "1",
        "time": "6.000",
    }
    assert (parity.get("tests"), parity.get("failures")) == ("22", "2")
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("26", "3", "1")
    assert [f.get("type") for f in parity.iter("failure")] == ["parity", "inconclusive"]
    assert "limit 1e-08" in next(parity.iter("failure")).text
    case = bench.find("testcase")
    assert (case.get("classname"), case.get("name")) == ("bench.test_a", "test_x[1]")
    assert len(list(root.iter("testcase"))) == 26


def test_junit_survives_hostile_names_and_control_characters(make_record):
    nasty = HOSTILE + "\x00\x1b[31m\ufffe"
    root = ET.fromstring(render_junit(make_record(hostile=nasty)))
    titles = [c.get("name") for c in root.iter("testcase")]
    assert any("<script>alert(1)</script>" in t for t in titles)
    assert not any("\x1b" in t for t in titles)


def test_junit_without_parity_has_one_suite(make_record):
    root = ET.fromstring(render_junit(make_record(parity=False)))
    assert [s.get("name") for s in root.findall("testsuite")] == ["bench"]
    assert ET.fromstring(render_junit(make_record(bare=True))).get("tests") == "0"


def test_terminal_fits_80_columns_and_ends_with_the_verdict(make_record):
    text = _terminal(make_record())
    assert max(map(len, text.splitlines())) <= 80
    for said in (
        "2.86x",
        "2.85-2.91",
        "Mean KL divergence",
        "≤ 1e-8 nats",
        "MISSED",
        "1.43",
        "warning: Turbo",
    ):
        assert said in text
    assert " ".join(text.split()).endswith(
        "PASSED: Same model, 2.86 times as fast in decode and 1.77 in prefill, 1 of 4 targets missed."
    )


def test_terminal_names_why_a_check_failed(make_record):
    assert "FAIL Mean KL divergence: 0.0032, limit 1e-08 (2040 tokens in 8 chunks)" in _terminal(
        make_record(failing_check=True)
    )
    assert "RANDOM WEIGHTS" in _terminal(make_record(random_weights=True))


def test_terminal_takes_names_as_text_and_says_what_misses(make_record):
    assert "[bold]" in _terminal(make_record(hostile="[bold]x[/nope]"))
    text = _terminal(make_record(bare=True))
    assert "Latency: not measured." in text
    assert "Parity: not examined." in text


def test_write_report_writes_four_files_and_the_record_reads_back(make_record, tmp_path):
    record = make_record()
    out = tmp_path / "deep" / "page"
    assert write_report(record, out) == out / "index.html"
    assert sorted(p.name for p in out.iterdir()) == ["index.html", "junit.xml", "record.json", "report.md"]
    assert RunRecord.read(out / "record.json") == record
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    write_report(record, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first


def test_a_failed_rendering_leaves_the_former_report(make_record, tmp_path, monkeypatch):
    write_report(make_record(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def broken(_record):
        raise RuntimeError("no page")

    monkeypatch.setitem(publish.RENDERERS, RunRecord, (render_junit, broken, render_html))
    with pytest.raises(RuntimeError, match="no page"):
        write_report(make_record(failing_check=True), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    publish.write_atomically(path, "old")

    def full(*_args):
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "replace", full)
    with pytest.raises(OSError, match="disk full"):
        publish.write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0248, "24.8 ms"), (1.6, "1,600 ms"), (0.00248, "2.48 ms"), (2.48e-5, "0.0248 ms"), (None, "–")],
)
def test_ms(seconds, text):
    assert ms(seconds) == text


def test_numbers_can_be_told_from_their_limits():
    assert number(1.0000149, "", 1.00001) == "1.0000149"
    assert number(1.6e-11, "nats", 1e-8) == "1.6e-11 nats"
    assert number(0.26, "nats", 1e-8) == "0.26 nats"
    assert number(0.99949, "", 0.9995) == "0.99949"
    assert limit_text(1e-8, "lower", "nats") == "≤ 1e-8 nats"
    assert limit_text(0.9995, "higher") == "≥ 0.9995"
    assert limit_text(1.0, "equal") == "≈ 1"
    assert limit_text(-0.1 * 3, "higher") == "≥ -0.3"
    assert difference(-0.0214) == "-0.021"
    assert (fixed(0), fixed(41_234.0), fixed(0.5)) == ("0", "41,234", "0.500")
    assert size(1_340_000_000) == "1.34 GB"
    assert times(Estimate(2.876, None, None, 1)) == "2.88×"


def test_an_undecided_task_says_how_many_items_would_decide(make_record):
    record = make_record()
    undecided = {"status": "INCONCLUSIVE", "items_needed": 12345}
    tasks = [t.model_copy(update=undecided) for t in record.validation.tasks[:1]]
    results = [r.model_copy(update={"tasks": tasks}) for r in record.validation.results if r.tasks]
    changed = record.model_copy(update={"validation": record.validation.model_copy(update={"results": results})})
    words = "about 12,345 items would decide"
    assert words in _terminal(changed, 160)
    assert words in render_markdown(changed)
    assert words in render_junit(changed)
    assert words in render_html(changed)
    assert "would decide" not in render_markdown(record)
