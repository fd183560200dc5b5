"""A comparison as sentence, page, Markdown, JUnit and terminal: the same verdict everywhere, names stay text."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from bench.cli.main import main
from reports.comparison import Comparison
from reports.comparison_summary import Digest
from reports.errors import RecordError
from reports.publish import publish, read_any, write_report
from reports.render import comparison_words as cw
from reports.render import svg
from reports.render.comparison_html import CASES_SHOWN, ROWS_SHOWN, render_comparison
from reports.render.comparison_junit import render_comparison_junit
from reports.render.comparison_markdown import render_comparison_markdown
from reports.render.comparison_plots import distribution, forest, forest_axis, machine_trace, pairs_plot
from reports.render.comparison_terminal import print_comparison
from tests.reports.comparison_examples import example_comparison

HOSTILE = "<script>alert(1)</script>|`x` @team *b* \"'&\x00"


def only(*statuses, **changes):
    """The example with gating results of these statuses only."""
    made = example_comparison()
    kept = [r for r in made.results if r.gating and r.status in statuses]
    return made.model_copy(update={"results": kept, **changes})


def many(count):
    made = example_comparison()
    results = [made.results[1].model_copy(update={"case": f"case {i}"}) for i in range(count)]
    records = [made.records[i % 20].model_copy(update={"case": f"case {i}"}) for i in range(count)]
    return made.model_copy(update={"results": results, "records": records})


def test_headline_says_what_moved_how_sure_and_what_is_open():
    first, second = cw.verdict_sentences(Digest(example_comparison()))
    assert "decode 4.8\u00a0% slower (batch 1, prompt 128)" in first
    assert "prefill 7.0\u00a0% faster (batch 1, prompt 512); we are sure" in first
    assert "Two could not be decided and need 11 more pairs." in second
    assert "Outside the gate, end to end was 4.8\u00a0% slower" in second


def test_headline_of_an_unchanged_one_of_a_single_regression_and_of_an_advisory_one():
    assert cw.headline(Digest(only("EQUIVALENT"))) == "Nothing moved: all 2 results are within 3\u00a0% of the base."
    text = cw.headline(Digest(only("EQUIVALENT", "REGRESSION")))
    assert text.endswith("we are sure. Nothing else moved.")
    advisory = cw.headline(Digest(only("REGRESSION", advisory=True)))
    assert "we are sure" not in advisory
    assert "Nothing was compared" in cw.headline(Digest(only()))


def test_more_pairs_are_those_of_the_neediest_gating_result():
    made = example_comparison()
    results = [
        r.model_copy(update={"pairs_needed": 13 if r.metric == "tpot" else 16, "gating": r.metric != "total"})
        for r in made.results
        if r.status == "INCONCLUSIVE"
    ]
    outside = results[0].model_copy(update={"gating": False, "pairs_needed": 99})
    assert Digest(made.model_copy(update={"results": [*results, outside]})).more_pairs == 6


@pytest.mark.parametrize(
    ("ratio", "unit", "text"),
    [
        (1.041, "s", "4.1\u00a0% slower"),
        (0.88, "s", "12\u00a0% faster"),
        (0.4, "s", "2.50 times as fast"),
        (1.2, "bytes", "20\u00a0% larger"),
        (2.5, "s", "2.50 times as slow"),
    ],
)
def test_changes_in_words(ratio, unit, text):
    assert cw.change(ratio, unit) == text


def test_signs_of_changes():
    assert [cw.signed(r) for r in (1.041, 0.88, 1.0001, None)] == ["+4.1\u00a0%", "−12\u00a0%", "0.0\u00a0%", "–"]


@pytest.mark.parametrize("failing", [False, True])
def test_a_speed_up_never_stands_without_its_parity(failing):
    made = example_comparison(failing_parity=failing)
    words = "parity fails at fp32" if failing else "parity holds at fp32"
    page = render_comparison(made)
    rows = re.findall(r'<tr data-status="IMPROVED">.*?</tr>', page)
    assert len(rows) == 1
    assert words in rows[0]
    assert ('class="status fail"' in rows[0]) == failing
    drawn = [li for li in re.findall(r"<li><span class=\"fl\">.*?</li>", page, flags=re.S) if "IMPROVED" in li]
    assert len(drawn) == 1
    assert words in drawn[0]
    line = next(x for x in render_comparison_markdown(made).split("\n") if "IMPROVED" in x)
    assert words in line
    assert ("❌" in line) == failing
    out = io.StringIO()
    print_comparison(made, Console(file=out, width=200))
    assert words in out.getvalue()
    case = next(c for c in ET.fromstring(render_comparison_junit(made)).iter("testcase") if "IMPROVED" in text_of(c))
    assert words in text_of(case)
    assert (case.find("failure") is not None) == failing
    first, second = cw.verdict_sentences(Digest(made))
    assert first.startswith("Not the same model") == failing
    assert ("faster" in first, "faster" in second) == (not failing, failing)


def text_of(element):
    return "".join(element.itertext())


def test_speed_up_without_parity_says_so():
    made = example_comparison(parity=False)
    assert cw.verdict_sentences(Digest(made))[1].startswith("Parity not examined.")
    assert cw.verdict_sentences(Digest(example_comparison()))[1].startswith("Parity holds at fp32.")
    assert "parity not examined" in render_comparison(made)
    assert "parity not examined" in render_comparison_markdown(made)
    assert "nothing is known about" in render_comparison(made)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.ids = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        for name, value in attrs:
            if name in ("href", "src"):
                assert value.startswith("#"), value


def test_names_stay_text_on_the_page():
    plain, hostile = Tags(), Tags()
    plain.feed(render_comparison(example_comparison()))
    hostile.feed(render_comparison(example_comparison(hostile=HOSTILE)))
    assert sorted(plain.seen) == sorted(hostile.seen)
    assert plain.seen.count("script") == 1
    assert len(set(plain.ids)) == len(plain.ids)


def test_names_stay_text_in_markdown_and_xml():
    text = render_comparison_markdown(example_comparison(hostile=HOSTILE))
    assert "<script" not in text
    assert "@team" not in text
    row = next(x for x in text.split("\n") if "script" in x and "REGRESSION" in x)
    assert row.count("|") == 10
    root = ET.fromstring(render_comparison_junit(example_comparison(hostile=HOSTILE)))
    names = [c.get("name") for c in root.iter("testcase")]
    assert HOSTILE.replace("\x00", "\ufffd") in names


def test_names_stay_text_in_the_terminal():
    out = io.StringIO()
    print_comparison(example_comparison(hostile="[red]x[/red]"), Console(file=out, width=200))
    assert "[red]x[/red]" in out.getvalue()


@pytest.mark.parametrize("statuses", [("EQUIVALENT",), ("REGRESSION",), ("INCONCLUSIVE",), ("IMPROVED", "EQUIVALENT")])
def test_junit_fails_exactly_when_the_exit_code_does(statuses):
    code = 1 if "REGRESSION" in statuses else 3 if "INCONCLUSIVE" in statuses else 0
    outcome = {0: "PASS", 1: "FAIL", 3: "INCONCLUSIVE"}[code]
    made = only(*statuses)
    verdict = made.verdict.model_copy(update={"outcome": outcome})
    root = ET.fromstring(render_comparison_junit(made.model_copy(update={"verdict": verdict})))
    assert (int(root.get("failures")) > 0) == (code != 0)
    assert int(root.get("tests")) == len(list(root.iter("testcase")))


def test_junit_of_an_advisory_comparison_has_no_failed_result():
    root = ET.fromstring(render_comparison_junit(only("REGRESSION", advisory=True)))
    assert root.find("testsuite[@name='compare']").get("failures") == "0"


def test_last_lines_of_a_lost_case_are_told():
    made = example_comparison()
    assert "std::bad_alloc" in render_comparison(made)
    assert "std::bad_alloc" in render_comparison_junit(made)


@pytest.mark.parametrize("name", ["x", "W" * 5000, HOSTILE * 40])
def test_markdown_fits_a_comment_and_is_cut_between_blocks(name):
    made = many(3000)
    results = [r.model_copy(update={"case": f"{name} {i}", "reason": name}) for i, r in enumerate(made.results)]
    made = made.model_copy(update={"results": results, "warnings": [name] * 900, "records": []})
    text = render_comparison_markdown(made)
    assert len(text) < 65_000
    assert text.count("<details>") == text.count("</details>")
    assert len(re.findall(r"^```", text, flags=re.M)) % 2 == 0
    assert "more rows are in index.html" in text or "cut here" in text


def test_a_large_family_stays_light_and_says_what_was_cut():
    page = render_comparison(many(3000))
    body, _, held = page.partition('<template id="more-rows">')
    assert body.count("<tr data-status") == ROWS_SHOWN
    assert held.count("<tr data-status") == 3000 - ROWS_SHOWN
    assert body.count('<details class="case"') + held.count('<details class="case"') == CASES_SHOWN
    assert f"{3000 - CASES_SHOWN:,} more are in comparison.json" in page
    assert "2,940 less pressing results" in page


def test_forest_draws_intervals_inside_and_arrows_beyond():
    r = example_comparison().results[1]
    far = r.model_copy(update={"ratio": 3.0, "low": 1.02, "high": 9.0})
    axis = forest_axis([r, far])
    inside, beyond = (drawn for _, drawn in forest([r, far], axis).rows)
    assert inside.count("#mark-cap") == 2
    assert beyond.count("#mark-cap") == 1
    assert "#mark-right" in beyond
    assert axis.low < -0.03 < 0.03 < axis.high


def test_pairs_show_order_and_validity():
    r = example_comparison().results[0]
    pairs = [p.model_copy(update={"valid": i != 4}) for i, p in enumerate(r.pairs)]
    figure = pairs_plot(r.model_copy(update={"pairs": pairs}))
    counts = {s: figure.svg.count(f"#mark-{s}") for s in ("circle", "square", "cross")}
    assert counts["cross"] == 1
    assert counts["circle"] + counts["square"] == len(pairs) - 1
    assert min(counts.values()) > 0
    assert pairs_plot(r.model_copy(update={"pairs": []})) is None


def test_distribution_uses_only_what_counts():
    made = example_comparison()
    invalid = next(r for r in made.results if r.status == "INVALID")
    records = [r for r in made.records if r.case == invalid.case]
    figure = distribution(invalid, records)
    assert figure.svg.count("#mark-circle-small") == figure.svg.count("#mark-square-small") == 7
    assert machine_trace(records).svg.count("#mark-cross") > 10
    assert machine_trace([]) is None


def test_ticks_are_round():
    assert svg.ticks(-0.036, 0.08, 5) == [-0.025, 0.0, 0.025, 0.05, 0.075]
    assert svg.ticks(1.0, 1.0) == [1.0]


def test_equal_comparisons_give_equal_bytes():
    assert render_comparison(example_comparison()) == render_comparison(example_comparison())


@pytest.mark.parametrize("left", ["machine", "validation", "seed", "records", "history", "results", "warnings"])
def test_whatever_is_missing_renders(left):
    made = example_comparison()
    empty = [] if isinstance(getattr(made, left), list) else None
    bare = made.model_copy(update={left: empty})
    bare = Comparison.model_validate_json(bare.to_json())
    print_comparison(bare, Console(file=io.StringIO()))
    for render in (render_comparison, render_comparison_markdown, render_comparison_junit):
        assert render(bare)


def test_report_command_recognises_a_comparison(tmp_path, capsys):
    source = tmp_path / "anything.json"
    source.write_text(example_comparison().to_json(), encoding="utf-8")
    assert main(["report", str(source), "--out", str(tmp_path / "out")]) == 1
    assert "we are sure" in " ".join(capsys.readouterr().out.split())
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"index.html", "report.md", "comparison.json", "junit.xml"}
    assert read_any(tmp_path / "out" / "comparison.json") == example_comparison()


def test_a_run_is_still_recognised(make_record, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(make_record(command=["comparison"]).to_json(), encoding="utf-8")
    assert publish(path, tmp_path / "out").page.name == "index.html"
    assert (tmp_path / "out" / "record.json").is_file()


def test_a_broken_comparison_names_the_place(tmp_path):
    path = write_report(example_comparison(), tmp_path).parent / "comparison.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"alpha": 0.05', '"alpha": "none"'), encoding="utf-8")
    with pytest.raises(RecordError, match=r"family\.alpha"):
        read_any(path)
    with pytest.raises(RecordError, match="cannot read"):
        read_any(tmp_path / "no.json")


@pytest.mark.parametrize(
    ("ratios", "told"),
    [
        ([1.041], "4.1\u00a0% slower"),
        ([1.041, 1.25], "4.1 to 25\u00a0% slower"),
        ([1.16, 7.93], "1.16 to 7.93 times as slow"),
        ([3.46, 7.93], "3.46 to 7.93 times as slow"),
        ([0.8, 0.25], "1.25 to 4.00 times as fast"),
    ],
)
def test_a_span_tells_both_its_ends(ratios: list[float], told: str):
    assert cw.span(ratios, "s") == told
