"""Prefill by prompt length: the right samples, the floor, and the page, Markdown and terminal that show them."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from reports.publish import write_report
from reports.record import Case, PrefillFloor, PrefillProducts, RunRecord
from reports.render.html import render_html
from reports.render.markdown import render_markdown
from reports.render.plots import all_plots
from reports.render.terminal import print_summary
from reports.summary import headline_case, prefill_cases, prefill_limit, prefill_of, prefill_rows
from reports.verdict import judge
from tests.reports.test_browser import _layout
from tests.reports.test_browser import pytestmark as browser
from tests.reports.test_html import Page

TITLE = "Prefill tokens per second by prompt length"
PRODUCTS = {"layer_weights": 106_168_320, "head_weights": 28_311_552, "attention_width": 576, "windows": [None] * 30}
LENGTHS = (32, 128, 512, 1024, 2048)


def floor_of(record: RunRecord, **changes: Any) -> dict[str, Any]:
    """A floor whose product slows down from round to round, as the machine does."""
    cases = [c for c in record.cases() if c.batch == 1]
    sizes = {"inner": 576, "outer": 1536}
    made: dict[str, Any] = {
        "method": "one matrix product, tokens x 576 by 576 x 1,536, on ONNX Runtime (cpu, fp32, 2 threads), median",
        "dtype": "fp32",
        "products": PRODUCTS,
        "measured": [
            {
                "case": c.model_dump(),
                "rows": c.prompt,
                **sizes,
                "samples_s": [2 * c.prompt * 576 * 1536 / (150e9 / (1 + r / 100)) for r in range(12)],
            }
            for c in cases
        ],
    }
    return made | changes


@pytest.fixture
def measured(make_record: Any) -> RunRecord:
    """The made-up record with a prefill alone at 2,048 tokens, and the floor."""
    first: RunRecord = make_record()
    long = {"batch": 1, "prompt": 2048, "new_tokens": 1}
    starts = {"onnx": 4.9, "pytorch": 8.6}
    series = [s.model_dump() for s in first.series]
    for side, ttft in starts.items():
        rounds = [{"order": r, "at_s": [ttft * (1 + r / 100)]} for r in range(12)]
        series.append({"case": long, "side": side, "warmup_rounds": 2, "rounds": rounds})
    made: RunRecord = make_record(series=series)
    return made.model_copy(update={"prefill_floor": PrefillFloor.model_validate(floor_of(made))})


def terminal(record: RunRecord) -> str:
    out = io.StringIO()
    print_summary(record, Console(file=out, width=80, color_system=None))
    return out.getvalue()


def test_operations_of_a_prompt() -> None:
    """The head once a row; each token attends to itself and those before it, at most a window of them."""
    products = PrefillProducts(layer_weights=1000, head_weights=70, attention_width=4, windows=[None, 3])
    pairs = (1 + 2 + 3 + 4 + 5) + (1 + 2 + 3 + 3 + 3)
    assert products.operations(Case(batch=1, prompt=5, new_tokens=9)) == 2 * (5 * 1000 + 70) + 4 * 4 * pairs
    two = products.operations(Case(batch=2, prompt=2, new_tokens=1))
    assert two == 2 * (2 * (2 * 1000 + 70) + 4 * 4 * (3 + 3))


def test_tokens_per_second_are_the_prompt_over_the_first_time_stamp(measured: RunRecord) -> None:
    cases = prefill_cases(measured)
    assert [(c.batch, c.prompt) for c in cases] == [(1, p) for p in LENGTHS]
    assert prefill_cases(measured.model_copy(update={"series": measured.series[::-1]})) == cases
    found = prefill_of(measured, cases[-1], "pytorch")
    assert found is not None
    assert found.tokens_per_s.value == pytest.approx(2048 / (8.6 * 1.055))
    low, high = found.tokens_per_s.low, found.tokens_per_s.high
    assert low is not None
    assert high is not None
    assert 2048 / (8.6 * 1.11) < low < found.tokens_per_s.value < high < 2048 / 8.6
    # With a decode after it the first time stamp counts, not the last.
    series = measured.find(cases[1], "onnx")
    assert series is not None
    times = sorted(r.at_s[0] for r in series.rounds)
    short = prefill_of(measured, cases[1], "onnx")
    assert short is not None
    assert short.tokens_per_s.value == pytest.approx(128 / ((times[5] + times[6]) / 2))


def test_a_round_is_held_against_the_product_beside_it(measured: RunRecord) -> None:
    """Both slow down by 1 % a round: the multiple is the same in each."""
    case = prefill_cases(measured)[-1]
    found = prefill_of(measured, case, "onnx")
    assert found is not None
    assert found.multiple is not None
    attention = 4 * 576 * 30 * (2048 * 2049 / 2)
    least = (2 * (2048 * 106_168_320 + 28_311_552) + attention) / 150e9
    assert found.multiple.low == pytest.approx(4.9 / least)
    assert found.multiple.high == pytest.approx(4.9 / least)
    limit = prefill_limit(measured, case)
    assert limit == pytest.approx(2048 / (least * 1.055))


def test_sides_that_lack_a_length_have_a_gap_there(measured: RunRecord) -> None:
    rows = {side.label: cells for side, cells in prefill_rows(measured)}
    assert list(rows) == ["onnx", "pytorch", "optimum-ort", "genai"]
    assert [bool(c) for c in rows["genai"]] == [True] * 4 + [False]
    assert all(rows["onnx"])


def test_the_plot_draws_each_side_and_the_floor(measured: RunRecord) -> None:
    plot = all_plots(measured)[0]
    assert plot.title == TITLE
    svg = Page(plot.svg).of("svg")[0]
    said = svg["aria-label"] or ""
    assert said.startswith(f"{TITLE}, batch 1. ONNX Runtime, fused graph: ")
    assert "PyTorch eager: " in said
    assert "226 at 2,048 tokens" in said
    limit = prefill_limit(measured, prefill_cases(measured)[-1])
    assert f"{limit:.0f} at 2,048 tokens. The dashed line is the matrix-product floor." in said
    assert len([x for x in Page(plot.svg).of("line") if x["class"] == "floor"]) == len(LENGTHS) - 1
    assert plot.svg.count("<use") == 2 * 5 + 2 * 4
    # The x places are proportional to the prompt: 512 lies a quarter of the way from 0 to 2,048.
    x = [float((a["x"] or "").rstrip("%")) for a in Page(plot.svg).of("use")[:5]]
    assert (x[2] - 12) / (x[4] - 12) == pytest.approx(0.25, abs=2e-3)
    assert (x[1] - 12) / (x[4] - 12) == pytest.approx(1 / 16, abs=2e-3)


def test_page_markdown_and_terminal_show_the_table(measured: RunRecord) -> None:
    words = Page(render_html(measured)).words
    for text in (
        "Prefill by prompt length",
        "2,048 tokens",
        "(the layers' matrices, attention of each token to itself and those before it, the head for the last position)",
        "at the speed of one matrix product, tokens x 576 by 576 x 1,536, on ONNX Runtime (cpu, fp32, 2 threads)",
        "Matrix-product floor The time of a prompt's matrix products at the speed of one plain product here.",
    ):
        assert text in words, text
    assert "yardstick" not in words
    markdown = render_markdown(measured)
    assert "| Prefill, tokens/s | prompt 32 | prompt 128 | prompt 512 | prompt 1,024 | prompt 2,048 |" in markdown
    assert "| Matrix-product floor |" in markdown
    for block in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.M):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    # No decode, so nothing that the baseline's would be 1 of.
    assert re.search(
        r"\| batch 1, prompt 2048 \| PyTorch eager \| \S+ \[.*\] \| baseline \| – \| – \| – \| 12 \|", markdown
    )
    assert re.search(r"PyTorch eager 9,07[0-9.]* \[[^]]*\] 1 baseline – – 9,07", words)
    text = terminal(measured)
    assert re.search(r"batch 1, prompt 2048 .*\n.*\n.*\n PyTorch eager +9,07\d +1 +– +– +– ", text)
    assert max(map(len, text.splitlines())) <= 80
    assert "Prefill, tokens/s by prompt length, x floor below, batch 1" in text
    assert re.search(r"396 *\n.* 1\.27x *\n", text)
    assert re.search(r"Matrix-product floor +\S+ +\S+ +\S+ +\S+ +\S+", text)


def test_a_floor_in_another_type_than_the_weights_is_no_bound(measured: RunRecord) -> None:
    made = measured.model_copy(update={"model": measured.model.model_copy(update={"precision": "int4"})})
    sentence = "The weights are int4 and have a kernel of their own: next to it a product in fp32 is a yardstick"
    assert sentence in Page(render_html(made)).words
    assert sentence in render_markdown(made)


@pytest.mark.parametrize(
    "changes",
    [
        {"products": None, "measured": [], "missing": "the matrix products of model type 'gpt_neo' are not counted"},
        {"measured": [], "missing": "a plain matrix product does not run here"},
    ],
)
def test_without_a_floor_the_sides_are_drawn_and_the_reason_is_told(
    measured: RunRecord, changes: dict[str, Any]
) -> None:
    floor = PrefillFloor.model_validate(floor_of(measured, **changes))
    made = measured.model_copy(update={"prefill_floor": floor})
    plot = all_plots(made)[0]
    assert plot.title == TITLE
    assert "floor" not in plot.svg
    assert "floor" not in plot.caption
    words = Page(render_html(made)).words
    assert f"There is no matrix-product floor: {changes['missing']}." in words
    assert "matrix-product floor" in judge(made).not_examined
    assert "None" not in words
    assert "Prefill, tokens/s by prompt length, batch 1" in terminal(made)
    assert "Matrix-product floor" not in terminal(made)


def test_a_record_from_before_the_floor_shows_what_it_showed(make_record: Any, measured: RunRecord) -> None:
    old = make_record()
    assert old.prefill_floor is None
    assert all_plots(old)[0].title == "Time per output token against context"
    for text in (render_html(old), render_markdown(old), terminal(old)):
        assert "atrix-product" not in text
    assert "Matrix-product" in render_html(measured)


def test_one_prompt_length_has_a_table_and_no_plot(measured: RunRecord) -> None:
    one = [s for s in measured.series if s.case.prompt == 128]
    made = measured.model_copy(update={"series": one})
    assert TITLE not in [p.title for p in all_plots(made)]
    assert "Prefill by prompt length" in render_html(made)


def test_a_prompt_without_decode_examined_no_decode(make_record: Any, measured: RunRecord) -> None:
    assert "decode beyond 1,072 and prefill beyond 2,048 of 8,192 tokens of context" in judge(measured).not_examined
    model = measured.model.model_copy(update={"context_length": 2048})
    made = judge(measured.model_copy(update={"model": model}))
    assert "decode beyond 1,072 of 2,048 tokens of context" in made.not_examined
    assert "latency beyond 1,072 of 8,192 tokens of context" in judge(make_record()).not_examined


def test_a_prompt_without_decode_is_not_the_headline(measured: RunRecord) -> None:
    """The smoke profile adds 128 tokens, the headline's length: its decode and memory floor must stay."""
    alone = [
        s.model_copy(update={"case": s.case.model_copy(update={"new_tokens": 1})}) if s.case.prompt == 128 else s
        for s in measured.series
    ]
    made = measured.model_copy(update={"series": alone})
    case = headline_case(made)
    assert case is not None
    assert (case.prompt != 128, case.new_tokens > 1) == (True, True)
    assert "decode" in judge(made).speed


@pytest.mark.slow
@browser[1]
def test_the_page_fits_a_phone(measured: RunRecord, tmp_path: Any) -> None:
    page = write_report(measured, tmp_path / "out")
    scroll, _ = _layout(tmp_path, page.read_text(encoding="utf-8"), 375, 812)
    assert scroll == 375
