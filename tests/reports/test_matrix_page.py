"""A matrix as document, page, Markdown, JUnit and terminal: the same answer everywhere, names and paths stay text."""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree as ET

import jsonschema
import pytest
from rich.console import Console

import reports.matrix as module
from bench.cli.main import main
from reports.base import schema_text
from reports.errors import RecordError
from reports.matrix import OUTCOMES, Matrix, Outcome, matrix_verdict
from reports.publish import publish, write_report
from reports.render import matrix_words as mw
from reports.render.matrix import WARNING_CHARS, render_matrix, render_matrix_junit, render_matrix_markdown
from reports.render.matrix_terminal import print_matrix, print_row
from reports.verdict import WORDS
from tests.reports.matrix_examples import (
    CASES,
    DIFFERENCE,
    LONG_WARNING,
    SAME,
    checks,
    example_matrix,
    result,
    row,
    speed,
)
from tests.reports.test_html import Page
from tests.reports.validation_examples import HOSTILE

SCHEMA = Path(module.__file__).with_name("matrix.schema.json")
REFERENCE = row("1.32.0", reference=True, speed=[])
ALL_SAME = [row("1.30.0"), row("1.31.1"), REFERENCE]
FORMS = ("page", "markdown", "junit", "terminal")


def terminal(m: Matrix, width: int = 200) -> str:
    out = io.StringIO()
    print_matrix(m, Console(file=out, width=width, color_system=None))
    return out.getvalue()


def told(m: Matrix) -> dict[str, str]:
    """What each form says, as one line of plain text."""
    texts = {
        "page": Page(render_matrix(m)).words,
        "markdown": render_matrix_markdown(m).replace("\\", "").replace("&lt;", "<"),
        "junit": "".join(ET.fromstring(render_matrix_junit(m)).itertext()),
        "terminal": terminal(m),
    }
    return {name: " ".join(text.split()) for name, text in texts.items()}


def of(rows: list[module.MatrixRow], **more: object) -> mw.Overview:
    return mw.Overview(example_matrix(rows=rows, bisection="", **more))


# -- the document ----------------------------------------------------------------------------------------------------


def test_the_gallery_s_matrix_names_the_slow_version():
    made = Matrix.read(SCHEMA.parent / "gallery" / "runtimes" / "matrix.json")
    slowest = max((r for row in made.rows for r in row.speed if r.ratio), key=lambda r: r.ratio or 0.0)
    (row,) = [row for row in made.rows if slowest in row.speed]
    assert (row.version, slowest.metric, slowest.status) == ("1.29.0", "tpot", "REGRESSION")
    assert {row.parity for row in made.rows} == {"PASS"}


@pytest.mark.parametrize("bisection", ["", "parity", "speed"])
def test_schema_file_is_current_and_takes_a_matrix_that_comes_back(bisection, tmp_path):
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(Matrix)
    made = example_matrix(bisection=bisection)
    validator = jsonschema.Draft202012Validator(json.loads(schema_text(Matrix)))
    assert list(validator.iter_errors(json.loads(made.to_json()))) == []
    path = write_report(made, tmp_path).with_name("matrix.json")
    assert Matrix.read(path) == made
    assert {r.outcome for r in made.rows} == set(get_args(Outcome)) == set(OUTCOMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "record"}, r"is of kind 'record'; pass a matrix\.json"),
        ({"schema_version": 7}, "has matrix schema version 7, this tool reads 1"),
        ({"rows": [{"runtime": "x"}]}, r"rows\.0\.text: Field required"),
    ],
)
def test_a_broken_matrix_names_the_place(tmp_path, change, message):
    path = tmp_path / "matrix.json"
    path.write_text(json.dumps(json.loads(example_matrix().to_json()) | change), encoding="utf-8")
    with pytest.raises(RecordError, match=message):
        Matrix.read(path)


def test_writes_four_files_and_equal_bytes(tmp_path):
    made = example_matrix(bisection="speed")
    assert write_report(made, tmp_path / "a") == tmp_path / "a" / "index.html"
    write_report(made, tmp_path / "b")
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert sorted(files) == ["index.html", "junit.xml", "matrix.json", "report.md"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()} == files


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        (ALL_SAME, 0),
        ([*ALL_SAME, row("1.22.1", parity="FAIL", verdict="FAIL", reasons=["mean_kld: 12"])], 1),
        ([*ALL_SAME, row("1.33.0", outcome="unavailable", verdict="INCONCLUSIVE", reasons=["no wheel"])], 3),
        ([], 3),
    ],
)
def test_report_command_renders_it_again_with_the_exit_code_of_the_verdict(rows, code, tmp_path, capsys):
    made = example_matrix(rows=rows, bisection="")
    source = write_report(made, tmp_path / "in").with_name("matrix.json")
    assert publish(source, tmp_path / "p").exit_code == code
    assert main(["report", str(source), "--out", str(tmp_path / "out")]) == code
    assert f"{WORDS[made.verdict.outcome]}: " in capsys.readouterr().out
    assert (tmp_path / "out" / "index.html").read_text() == (tmp_path / "in" / "index.html").read_text()
    root = ET.parse(tmp_path / "out" / "junit.xml").getroot()
    assert (int(root.get("failures")) > 0) == (code != 0)


# -- the answer ------------------------------------------------------------------------------------------------------


def test_a_reference_that_is_tried_again_keeps_the_names_short():
    twins = [row("1.31.1"), row("1.32.0", runtime="onnxruntime 1.32.0 (reference)", reference=True), row("1.32.0")]
    told = of([row("1.30.0"), *twins])
    assert told.model_sentences[0] == "The same model under all 3 runtimes, onnxruntime 1.30.0 to 1.32.0."
    assert [told.short(r) for r in twins] == ["1.31.1", "1.32.0 (reference)", "1.32.0"]


@pytest.mark.parametrize(
    ("rows", "first", "second"),
    [
        (ALL_SAME, "The same model under all 3 runtimes, onnxruntime 1.30.0 to 1.32.0.", ""),
        (ALL_SAME[:1], "The same model under onnxruntime 1.30.0.", ""),
        ([], "No runtime was tried.", ""),
        (
            None,
            "The same model under onnxruntime 1.23.2 to 1.29.0 and 1.32.0 and another model under 1.22.1.",
            "Parity undecided under 1.32.1, refused by 1.20.1, crashed under 1.30.0, took too long under 1.31.1 and "
            "not tried under 1.33.0.",
        ),
        (
            [row("1.22.1", parity="FAIL"), row("1.20.1", outcome="refused"), row("1.21.1", parity=None)],
            "Nowhere shown to be the same model: another model under onnxruntime 1.22.1.",
            "Parity not examined under 1.21.1 and refused by 1.20.1.",
        ),
        # Versions that do not follow each other, or stand the other way round, are no range.
        (
            [ALL_SAME[2], ALL_SAME[1], ALL_SAME[0]],
            "The same model under all 3 runtimes, onnxruntime 1.32.0, 1.31.1 and 1.30.0.",
            "",
        ),
        (
            [*ALL_SAME, row("1.32.0", "cuda"), row("1.31.1", "cuda", parity="FAIL")],
            "The same model under onnxruntime 1.30.0 to 1.32.0 on cpu and 1.32.0 on cuda and another model under "
            "1.31.1 on cuda.",
            "",
        ),
        # An environment has its own name.
        (
            [row("1.30.0"), row("1.30.0", runtime="onnxruntime 1.30.0 (mine)")],
            "The same model under both runtimes, onnxruntime 1.30.0 and onnxruntime 1.30.0 (mine).",
            "",
        ),
    ],
)
def test_under_which_runtimes_is_it_still_the_model(rows, first, second):
    m = example_matrix(rows=rows, bisection="")
    assert mw.Overview(m).model_sentences == (first, second)
    page = render_matrix(m)
    top = Page(page[: page.index("</header>")] + "</header></body></html>")
    assert first in "".join(top.by_tag["h1"])
    assert WORDS[m.verdict.outcome] in top.words
    for form, text in told(m).items():
        assert first in text, form
        assert second in text, form


def test_many_runtimes_are_counted_and_not_named():
    rows = [row(f"1.{k}.0", verdict="PASS", parity="PASS" if k % 2 else "FAIL") for k in range(10, 30)]
    first, _ = of(rows).model_sentences
    assert first == (
        "The same model under onnxruntime 1.11.0, 1.13.0, 1.15.0 and 7 more and another model under 1.10.0, 1.12.0, "
        "1.14.0 and 7 more."
    )


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (ALL_SAME, "As fast as under onnxruntime 1.32.0, within the margin."),
        ([REFERENCE], "Speed was not measured."),
        (
            [
                row("1.27.0", speed=speed(*SAME[:3], (0.8, "IMPROVED"))),
                row("1.28.0", speed=speed(*SAME[:3], (1.25, "REGRESSION"))),
                row("1.29.0", speed=speed((1.04, "REGRESSION"), (1.12, "REGRESSION"), *SAME[2:])),
                REFERENCE,
            ],
            "Against onnxruntime 1.32.0, decode is 4.0 % slower under 1.29.0 and prefill is 12 to 25 % slower under "
            "1.28.0 and 1.29.0 and 20 % faster under 1.27.0.",
        ),
        # However fast another model is.
        ([row("1.22.1", parity="FAIL", speed=speed((0.5, "IMPROVED"), *SAME[1:]))], "Speed was not measured."),
        ([row("1.31.1", speed=[result("c", "tpot", 50.9, "REGRESSION")])],
         "Against onnxruntime 1.32.0, decode is 50.9 times as slow under 1.31.1."),
        ([row("1.31.1", speed=[result("c", "tpot", None, "MISSING")])], "Speed could not be measured under 1.31.1."),
        ([row("1.31.1", speed=speed((1.02, "INCONCLUSIVE"), *SAME[1:]))], "1 of 4 speed results is undecided."),
        ([row("1.31.1", speed=[result("c", "tpot", 1.2, "REGRESSION", gating=False)])], "Speed was not measured."),
    ],
)  # fmt: skip
def test_how_fast_is_it_there(rows, sentence):
    assert of(rows).speed_sentence.replace("\u00a0", " ") == sentence
    for form, text in told(example_matrix(rows=rows, bisection="")).items():
        assert sentence in text.replace("\u00a0", " "), form


def test_without_pairs_nothing_is_said_about_speed():
    m = example_matrix(measured=False)
    texts = told(m)
    for form in FORMS:
        assert "Speed was not measured." in texts[form], form
        assert "IMPROVED" not in texts[form]
    page = Page(render_matrix(m))
    assert "#speed" not in [a["href"] for a in page.of("a")]
    assert "forest" not in [a.get("class") for a in page.of("figure")]
    # There is nothing to which the reference could be one.
    assert "reference – –" not in texts["terminal"]
    assert "1.32.0 PASS same – – – –" in texts["terminal"]
    assert "1 reference" not in page.words


# -- rows ------------------------------------------------------------------------------------------------------------


def test_every_outcome_stands_everywhere_with_its_reason():
    texts = told(example_matrix())
    for form, text in texts.items():
        for words in (
            "refuses the folder: Fatal error: com.microsoft:MatMulNBits: zero_points of type float",
            "crashed: killed by signal 11 (segmentation fault) in the prefill of 512 tokens",
            "took too long: no answer within 900 s",
            "cannot run on this machine: no wheel for Python 3.11",
            "different: mean_kld",
            "mean_kld: 12.04, limit 1e-08",
            "undecided: mean_kld",
            "ttft of b1-p1024-n2: 25.3 % slower, beyond the margin of 3 %, and not noise",
            "differs from the reference in a prompt of 24 tokens: layer 0, MatMulNBits "
            "(/model/layers.0/attn/qkv_proj/MatMulNBits): relative error 1.3 over equal inputs "
            "(rounding explains up to 0.0021)",
        ):
            assert words in text.replace("\u00a0", " ").replace("Differs", "differs"), (form, words)


def test_no_rounding_explains_a_refusal():
    refused = DIFFERENCE.model_copy(update={"deviation": float("inf")})
    assert "rounding" in mw.difference_line(DIFFERENCE)
    assert "rounding" not in mw.difference_line(refused)


def test_the_table_of_the_page_shows_parity_and_speed_as_numbers():
    page = Page(render_matrix(example_matrix())).words
    table = page.split("Peak", 1)[1].split("Speed against the reference")[0]
    assert (
        "1.22.1 cpu ✕ FAIL different: mean_kld 12 nats ≤ 1e-8 0.0 % ≥ 0.998 0.0 % ≥ 0.95 ◀ 0.710 b1-p128-n32 "
        "● 1.004 b1-p1024-n2 ◀ 0.900 b1-p128-n32 ● 1.001 b1-p1024-n2 0.612 s 412 MB"
    ) in table
    assert "1.20.1 cpu ✕ FAIL refused – – – – – – –" in table
    assert "100.0 % ≥ 0.95 1 reference 1 reference 0.612 s 412 MB" in table
    assert "1.32.1 cpu ? INCONCLUSIVE undecided: mean_kld" in table
    assert "− missing b1-p128-n32 – 0.612 s" in table


def test_cases_stand_in_the_order_in_which_they_were_asked_for():
    m = example_matrix()
    turned = m.model_copy(update={"rows": [r.model_copy(update={"speed": r.speed[::-1]}) for r in m.rows]})
    assert render_matrix(turned) == render_matrix(m)


def test_one_case_needs_no_name_and_shows_its_interval():
    rows = [row("1.31.1", speed=[result("only", "tpot", 1.02, "INCONCLUSIVE")]), REFERENCE]
    page = Page(render_matrix(example_matrix(rows=rows, bisection=""))).words
    assert "○ 1.020 [1.009, 1.031] –" in page


def test_the_plot_has_a_row_a_result_and_the_margin():
    text = render_matrix(example_matrix())
    figures = re.findall(r'<figure class="forest">.*?</figure>', text, flags=re.S)
    assert [re.search("<h3>(.*?)</h3>", f).group(1) for f in figures] == [
        f"{title}, {case}"
        for title in ("Decode, time per output token", "Prefill, time to first token")
        for case in CASES
    ]
    # Seven rows have this result; the reference, and what did not run, have none.
    assert [f.count('class="fl"') for f in figures] == [7, 6, 6, 6]
    assert [f.count('class="margin"') for f in figures] == [7, 6, 6, 6]
    assert [f.count('class="ci ') for f in figures] == [6, 6, 6, 6]
    # A speed-up of another model is no success.
    assert re.search(r'<li class="wrong">.*?1\.22\.1.*?IMPROVED.*?another model', figures[0], flags=re.S)
    assert '<span class="key fail" aria-hidden="true">◀</span><a href="#row-2">' in figures[0]
    assert '<span class="key pass" aria-hidden="true">◀</span><a href="#row-4">' in figures[3]


def test_a_row_has_its_checks_speed_warnings_session_and_page():
    text = render_matrix(example_matrix())
    section = re.search(r'<details class="case" id="row-3".*?</details>', text, flags=re.S).group()
    page = Page(section)
    for words in (
        "Mean KL divergence ✓ PASS 1.6e-11, limit 1e-08",
        "b1-p1024-n2 decode ● EQUIVALENT 16.4 ms 16.3 ms 1.004",
        "attention GroupQueryAttention",
        "the first process was slower than the others",
    ):
        assert words in page.words
    assert "fallbacks" not in page.words
    assert {"href": "rows/1.23.2-cpu/index.html"} in page.of("a")
    printed = "".join(page.by_tag["code"])
    assert printed.splitlines()[0] == f"{LONG_WARNING[: WARNING_CHARS - 1].rstrip()}…"
    assert printed.splitlines()[1] == "short"
    assert " open>" not in section.partition("\n")[0]
    assert re.search(r'id="row-2" open>', text)
    assert "2 warnings printed by the runtime" in told(example_matrix())["terminal"]
    only = example_matrix(rows=[row("1.30.0", warnings=["w"])], bisection="")
    assert "1 warning printed by the runtime" in told(only)["terminal"]


def test_the_difference_leads_to_its_reproduction():
    m = example_matrix()
    page = Page(render_matrix(m))
    links = [a["href"] for a in page.of("a")]
    # Once in its row, once in the bisection.
    assert links.count(DIFFERENCE.reproduction) == 2
    for form, text in told(m).items():
        assert "312 kB" in text, form
    bare = DIFFERENCE.model_copy(update={"reproduction": "", "scenario": "", "what": "the head", "expected": 0.0})
    assert mw.difference_lines(bare) == ["differs from the reference: the head"]


def test_what_all_rows_note_is_told_once():
    rows = [row("1.30.0", notes=["few samples", "slow start"]), REFERENCE.model_copy(update={"notes": ["few samples"]})]
    m = example_matrix(rows=[*rows, row("1.20.1", outcome="refused", reason="no", verdict="FAIL")], bisection="")
    for form in ("page", "markdown", "terminal"):
        assert told(m)[form].count("few samples") == 1, form
    assert told(m)["page"].count("slow start") == told(m)["terminal"].count("slow start") == 1
    alone = example_matrix(rows=rows[:1], bisection="")
    assert told(alone)["terminal"].count("few samples") == 1


# -- bisection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bisection", ["parity", "speed"])
def test_the_bisection_says_what_changed_and_shows_both_neighbours(bisection):
    m = example_matrix(bisection=bisection)
    texts = told(m)
    for form, text in texts.items():
        assert m.bisection.summary in text.replace("\u00a0", " "), form
        assert mw.bisection_line(m.bisection) in text, form
    assert "3 of 4 versions measured, 2 min 11 s" in texts["page"] or bisection == "speed"
    assert [r.version for r in mw.Overview(m).neighbours(m.bisection)] == [m.bisection.before, m.bisection.after]
    section = texts["page"].split("Both neighbours")[-1].split("Row by row")[-2]
    assert m.bisection.before in section
    assert m.bisection.after in section
    assert "In this order: 1.2" in texts["page"]


def test_the_operator_that_costs_the_time_stands_everywhere():
    texts = told(example_matrix(bisection="speed"))
    assert "GroupQueryAttention 61.2 ms 149 ms +87.7 ms 2.433" in texts["page"]
    assert "GroupQueryAttention 61.2 ms 149 ms +87.7 ms 2.433" in texts["terminal"]
    assert "| GroupQueryAttention | 61.2 ms | 149 ms | +87.7 ms | 2.433 |" in texts["markdown"]
    assert "FlashAttention – 0.312 ms +0.312 ms –" in texts["page"]
    assert "Gather 0.0120 ms – −0.0120 ms –" in texts["page"]
    assert "prefill of 1,024 tokens" in texts["terminal"]
    assert "Time by operator" not in told(example_matrix())["markdown"]


def test_a_bisection_that_found_nothing():
    found = example_matrix().bisection.model_copy(
        update={"changed": "", "before": "", "after": "", "difference": None, "summary": "both ends are alike"}
    )
    m = example_matrix(bisection=found)
    assert mw.bisection_line(found).startswith("1.22.1 to 1.23.2: nothing changed; ")
    assert mw.Overview(m).neighbours(found) == []
    assert "Both ends are alike." in told(m)["page"]


# -- Markdown, JUnit, terminal ---------------------------------------------------------------------------------------


def test_markdown_begins_with_the_verdict_and_has_a_row_a_runtime():
    text = render_matrix_markdown(example_matrix())
    assert text.startswith("**❌ FAILED: The same model under onnxruntime 1.23.2 to 1.29.0 and 1.32.0 and another")
    lines = [line for line in text.splitlines() if line.startswith("| onnxruntime 1.28.0 | cpu | ❌ FAIL | same | ")]
    assert lines[0].endswith("| ● 1.004 | ▶ 1.253 | 0.612 s | 412 MB |")
    assert render_matrix_markdown(example_matrix(rows=ALL_SAME, bisection="")).startswith("**✅ PASSED: The same model")


@pytest.mark.parametrize("hostile", ["", "`" * 3000, "|<&>@" * 3000])
def test_markdown_fits_a_comment(hostile):
    m = example_matrix(hostile=hostile)
    text = render_matrix_markdown(m.model_copy(update={"rows": m.rows * 40, "notes": m.notes * 300}))
    assert len(text) < 65_000


def test_junit_has_a_case_a_row_and_fails_what_makes_the_exit_code():
    root = ET.fromstring(render_matrix_junit(example_matrix()))
    verdict, matrix = root.findall("testsuite")
    assert [f.get("type") for f in verdict.iter("failure")] == ["fail"]
    assert {k: matrix.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "12",
        "failures": "7",
        "errors": "0",
        "skipped": "1",
    }
    kinds = {c.get("name"): [(child.tag, child.get("type")) for child in c] for c in matrix.iter("testcase")}
    assert {name.split()[1]: kind[0] for name, kind in kinds.items() if kind[0][1]} == {
        "1.20.1": ("failure", "refused"),
        "1.22.1": ("failure", "parity"),
        "1.28.0": ("failure", "speed"),
        "1.29.0": ("failure", "inconclusive"),
        "1.30.0": ("failure", "crashed"),
        "1.31.1": ("failure", "timeout"),
        "1.32.1": ("failure", "inconclusive"),
        "1.33.0": ("skipped", "skipped"),
    }
    assert {c.get("classname") for c in matrix.iter("testcase")} == {"matrix.cpu"}
    crashed = next(c for c in matrix.iter("testcase") if c.get("name") == "onnxruntime 1.30.0")
    assert "printed: free(): invalid pointer" in crashed.find("failure").text
    clean = ET.fromstring(render_matrix_junit(example_matrix(rows=ALL_SAME, bisection="")))
    assert (clean.get("tests"), clean.get("failures"), clean.get("skipped")) == ("4", "0", "0")


def test_the_terminal_has_a_line_a_row_at_100_columns():
    lines = terminal(example_matrix(), 100).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(" ─")) + 1
    table = lines[at : at + 12]
    assert [line.split()[0].rstrip(",") for line in table] == [r.version for r in example_matrix().rows]
    told_lines = [" ".join(line.split()) for line in table]
    assert told_lines[1] == "1.22.1 FAIL different: mean_kld ◀ 0.710 ◀ 0.900 0.612 s 412 MB"
    assert told_lines[9] == "1.32.0 PASS same reference reference 0.612 s 412 MB"
    assert max(map(len, table)) <= 100
    narrow = terminal(example_matrix(), 80)
    assert re.search(r"^ 1\.29\.0 +INCONCLUSIVE +same +○ 1\.021 +● 0\.997 +0\.612 s +412 MB *$", narrow, flags=re.M)
    # Neither a larger number nor the long name of an environment breaks numbers and verdicts.
    undecided = {"results": checks(undecided="top1_agreement"), "parity": "INCONCLUSIVE", "verdict": "INCONCLUSIVE"}
    large = row("1.29.0", "cuda", peak_memory_bytes=1.412e9, **undecided)
    named = large.model_copy(update={"runtime": "onnxruntime 1.29.0 (the environment of the service)"})
    whole = r"INCONCLUSIVE +undecided:? +● 1\.004 +● 0\.997 +0\.612 s +1,412 MB"
    for one in (large, named):
        assert re.search(whole, terminal(example_matrix(rows=[one, REFERENCE]), 80))
    recorded = terminal(Matrix.read(SCHEMA.parent / "gallery" / "runtimes" / "matrix.json"), 80)
    assert re.search(r"^ 1\.32\.0 +PASS +same +reference +reference +1\.90 s +737 MB *$", recorded, flags=re.M)
    # The path of a reproduction is in one piece, to be copied.
    assert f"reproduction: {DIFFERENCE.reproduction} (312 kB)" in narrow


def test_the_terminal_ends_with_the_verdict():
    m = example_matrix()
    last = terminal(m, 2000).splitlines()[-1]
    assert last.rstrip().replace("\u00a0", " ") == f"FAILED: {mw.Overview(m).headline}".replace("\u00a0", " ")
    assert "◀ improved  ● equivalent  ▶ regression  ○ inconclusive  − missing" in terminal(m)
    passed = terminal(example_matrix(rows=ALL_SAME, bisection="", notes=[]))
    assert "int4 under 3 runtimes, cpu" in passed
    assert re.search(r"^ 1\.30\.0 +PASS", passed, flags=re.M)
    # Nothing is wrong, so no row is told again.
    assert passed.count("1.31.1") == 1


def test_a_row_is_told_as_it_ends():
    rows = {r.version: r for r in example_matrix().rows}
    out = io.StringIO()
    console = Console(file=out, width=60, color_system=None)
    for version in ("1.20.1", "1.28.0", "1.23.2", "1.32.0"):
        print_row(rows[version], console)
    lines = out.getvalue().splitlines()
    assert re.fullmatch(r"onnxruntime 1\.20\.1, cpu +FAIL +3\.0 s  refused", lines[0])
    assert lines[1].startswith("  refuses the folder: Fatal error")
    assert lines[2].endswith("41.3 s  same, decode ● 1.004, prefill ▶ 1.253")
    assert lines[3] == "  ttft of b1-p1024-n2: 25.3 % slower, beyond the margin of 3 %, and not noise"
    assert lines[4].endswith("same, decode ● 1.004, prefill ● 0.997, 2 warnings printed by the runtime")
    assert lines[5].endswith("PASS           41.3 s  same")
    assert len(lines) == 6


# -- hostile names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bisection", ["parity", "speed"])
def test_names_stay_text(bisection):
    nasty = HOSTILE + " </script></code> www.evil.example\x00\x1b[31m"
    m = example_matrix(hostile=nasty, bisection=bisection)
    text = render_matrix(m)
    page = Page(text)
    assert page.stack == []
    assert "<script" not in text
    assert HOSTILE in page.words
    assert {tag for tag, _, _ in page.tags} == {
        tag for tag, _, _ in Page(render_matrix(example_matrix(bisection=bisection))).tags
    }
    assert "\x1b" not in text + render_matrix_markdown(m) + render_matrix_junit(m) + terminal(m)
    outside = re.sub(r"^(`{3,}).*?^\1$", "", render_matrix_markdown(m), flags=re.S | re.M)
    for sign in ("<script", "@team", "://", "www."):
        assert sign not in outside
    for block in re.findall(r"(?:^\|.*\n)+", outside, flags=re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    root = ET.fromstring(render_matrix_junit(m))
    assert any("<script>alert(1)</script>" in (c.get("name") or "") for c in root.iter("testcase"))
    assert "[bold]x[/nope]" in terminal(example_matrix(hostile="[bold]x[/nope]"))
    out = io.StringIO()
    print_row(example_matrix(hostile="[bold]x[/nope]").rows[0], Console(file=out, width=200))
    assert "[bold]x[/nope]" in out.getvalue()


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("rows/1.22.1-cpu/index.html", "rows/1.22.1-cpu/index.html"),
        ("rows/a b#c?.py", "rows/a%20b%23c%3F.py"),
        ("javascript:alert(1)", "javascript%3Aalert(1)".replace("(", "%28").replace(")", "%29")),
        ("https://evil.example/x", "https%3A//evil.example/x"),
        ("//evil.example/x", ""),
        ("/etc/passwd", ""),
        ("\\\\evil\\x", ""),
        ("../x", ""),
        ("a/../../x", ""),
        ("", ""),
    ],
)
def test_a_link_stays_beside_the_page(path, target):
    assert mw.link(path) == target
    m = example_matrix(rows=[row("1.30.0", page=path)], bisection="")
    links = [a["href"] for a in Page(render_matrix(m)).of("a") if not (a["href"] or "").startswith("#")]
    assert links == [target] * bool(target)


@pytest.mark.parametrize(
    "options",
    [{}, {"hostile": HOSTILE}, {"rows": [], "bisection": ""}, {"bisection": "speed"}, {"measured": False}],
)
def test_page_is_self_contained_and_its_links_land(options):
    page = Page(render_matrix(example_matrix(**options)))
    assert page.stack == []
    assert not {tag for tag, _, _ in page.tags} & {"script", "link", "iframe", "img", "form", "object", "base"}
    for tag, attrs, _ in page.tags:
        assert not {a for a in attrs if a.startswith("on") or a in ("src", "srcset", "action")}, tag
    ids = [attrs["id"] for _, attrs, _ in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    targets = [a["href"] or "" for a in page.of("a")]
    assert len(targets) >= 4
    assert {t[1:] for t in targets if t.startswith("#")} <= set(ids)
    assert not [t for t in targets if re.match(r"[a-z+.-]*:|//|/", t)]
    regions = [a for a in page.of("div") if (a.get("class") or "").startswith("scroll")]
    assert len(regions) == len(page.of("table"))
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    assert all(a.get("scope") for a in page.of("th"))
    levels = [int(t[1]) for t, _, _ in page.tags if re.fullmatch(r"h[1-6]", t)]
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert "None" not in page.words


def test_the_environment_can_be_had_again():
    page = Page(render_matrix(example_matrix())).words
    for words in ("AMD EPYC 7B13", "c0ffee1234", "torch 2.13.0", "Folder SHA-256 " + "9f2c" * 16, "Seed 7"):
        assert words in page
    assert "llama-onnx matrix exports/int4 --baseline demo --runtime" in page
    assert "Oldest runtime allowed 1.23.2" in page
    assert "none named in the manifest" in Page(render_matrix(example_matrix(oldest_runtime=""))).words


def test_the_verdict_names_the_rows_that_decide_it():
    m = example_matrix()
    assert m.exit_code == 1
    assert len(m.verdict.reasons) == 5
    page = Page(render_matrix(m)).words
    for reason in m.verdict.reasons:
        assert reason in page.replace("\u00a0", " ")
    assert matrix_verdict([]).reasons == ["nothing was measured"]
    undecided = example_matrix(
        rows=[row("1.30.0", results=checks(undecided="greedy"), parity="INCONCLUSIVE", verdict="INCONCLUSIVE")]
    )
    assert undecided.exit_code == 3
    assert "undecided: greedy" in told(undecided)["terminal"]
