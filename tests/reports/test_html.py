"""The page: self-contained, escaped, deterministic, legible in both themes, and whole when parts miss."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

import reports.render.html as html_module
from reports.render.html import render_html
from reports.render.parity import EXAMPLES_SHOWN
from reports.render.plots import SHAPES, all_plots
from reports.render.svg import DOTS
from reports.summary import floor_rows, floor_s, headline_case

HOSTILE = '<script>alert(1)</script>|`$x_{$ & id="q" url(#z) #010201 *b* @team'
CONTEXT, FLOOR = "Time per output token against context", "Distance to the memory floor"
TTFT, TPOT, TOTAL = (f"{m}, each round" for m in ("Time to first token", "Time per output token", "End to end"))
GAPS = "Gap between tokens, all rounds"
VOID = {"meta", "link", "br", "img", "input", "hr"}
CSS = (Path(html_module.__file__).parent / "templates" / "style.css.j2").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Every tag with its attributes and its ancestors, and all text outside the style sheet."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.text: list[str] = []
        self.by_tag: dict[str, list[str]] = {}
        self.stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.stack)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.stack)))

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data):
        here = self.stack[-1] if self.stack else ""
        self.by_tag.setdefault(here, []).append(data)
        if here != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for t, attrs, _ in self.tags if t == tag]


@pytest.mark.parametrize("options", [{}, {"hostile": HOSTILE}, {"bare": True}, {"rounds": 1}])
def test_page_is_self_contained_and_well_nested(make_record, options):
    text = render_html(make_record(**options))
    page = Page(text)
    assert page.stack == []
    names = {tag for tag, _, _ in page.tags}
    assert not names & {"script", "link", "iframe", "img", "object", "embed", "base", "form"}
    for tag, attrs, _ in page.tags:
        assert not {a for a in attrs if a.startswith("on") or a in ("src", "srcset", "action")}, tag
        assert (attrs.get("href") or "#").startswith("#")
        assert "http" not in (attrs.get("style") or "")
    sheet = "".join(page.by_tag["style"])
    assert "@import" not in sheet
    assert "url(" not in sheet
    assert not [a for _, attrs, _ in page.tags for a in attrs.values() if a and re.search(r"url\((?!#)", a)]


def test_ids_are_unique_and_every_link_lands(make_record):
    page = Page(render_html(make_record()))
    ids = [attrs["id"] for _, attrs, _ in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for _, a, _ in page.tags if a.get("href")]
    assert len(targets) > 8
    assert set(targets) <= set(ids)


def test_structure_for_keyboard_and_screen_reader(make_record):
    page = Page(render_html(make_record()))
    assert page.of("html") == [{"lang": "en"}]
    levels = [int(t[1]) for t, _, _ in page.tags if re.fullmatch(r"h[1-6]", t)]
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    regions = [a for a in page.of("div") if a.get("class", "").startswith("scroll")]
    assert len(regions) == len(page.of("table")) >= 7
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in regions)
    assert all(a.get("scope") for a in page.of("th"))
    assert all("main" in parents for t, _, parents in page.tags if t == "table")


def test_first_screen_answers(make_record):
    text = render_html(make_record())
    top = Page(text[: text.index("</header>")] + "</header></body></html>").words
    for answer in (
        "PASSED",
        "Same model as PyTorch? Yes 17 of 17 checks pass, tolerance tier fp32, mode standard, "
        "1 suspicious (99.9 % KL divergence)",
        "2.86×",
        "95 % interval 2.85 to 2.91",
        "1.77×",
        "AMD EPYC 7B13 · 2 cores",
        "12 rounds a side (batch 1, prompt 128), 2,040 tokens scored, 360 answers compared, 1 warning",
        "Not examined latency beyond 1,072 of 8,192 tokens",
    ):
        assert answer in top, answer


def test_failure_and_random_weights_are_prominent(make_record):
    text = render_html(make_record(failing_check=True, random_weights=True))
    top = Page(text[: text.index("</header>")] + "</header></body></html>").words
    assert "FAILED" in top
    assert "Same model as PyTorch? No" in top
    assert "Random weights. This model was never trained" in top
    assert "never trained" not in Page(render_html(make_record())).words


def test_hostile_names_stay_text(make_record):
    text = render_html(make_record(hostile=HOSTILE))
    page = Page(text)
    assert "<script" not in text
    assert HOSTILE in page.words
    # In the plots too: the short label as drawn, and the whole name in the description.
    assert any(HOSTILE in (svg.get("aria-label") or "") for svg in page.of("svg"))
    assert any(t.startswith("ONN<script>alert(1)") for t in page.by_tag["text"])


def test_deterministic_across_processes(make_record, tmp_path):
    record = make_record(rounds=3)
    (tmp_path / "record.json").write_text(record.to_json(), encoding="utf-8")
    code = (
        "import pathlib, sys, reports.record as r, reports.render.html as h\n"
        "sys.stdout.reconfigure(encoding='utf-8')\n"
        "print(h.render_html(r.RunRecord.read(pathlib.Path(sys.argv[1]))), end='')"
    )
    env = {**os.environ, "PYTHONHASHSEED": "99", "SOURCE_DATE_EPOCH": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "record.json")],
        capture_output=True,
        check=True,
        env=env,
    )
    assert found.stdout.decode("utf-8") == render_html(record)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parity": False}, ["Parity was not examined", "Not examined no check was run"]),
        ({"floor": False}, ["The memory floor was not measured."]),
        ({"single_side": True}, ["Decode, one token – not measured"]),
        ({"rounds": 1}, ["no interval from 1 round 2", "Fewer than 6 rounds"]),
        ({"rounds": 5}, ["no interval from 5 rounds 2"]),
        (
            {"bare": True},
            [
                "Latency was not measured.",
                "Memory was not measured.",
                "The project's targets are about the fused graph",
            ],
        ),
        ({"statuses": ["PASS"]}, ["Generation tasks were not examined."]),
    ],
)
def test_missing_parts_are_said(make_record, options, said):
    words = Page(render_html(make_record(**options))).words
    for sentence in said:
        assert sentence in words
    assert "None" not in words
    assert "nan" not in words.split()


def test_tables_hold_the_measurements(make_record):
    words = Page(render_html(make_record())).words
    for text in (
        "decode over the memory floor ✕ MISSED 1.43 ≤ 1.35 x",
        "✓ PASS 1.6e-11 nats 2.1e-11 nats ≤ 1e-8 nats 8e-12 nats 2,040",
        "Mean KL divergence of next-token distributions. 2040 tokens in 8 chunks.",
        "Summaries, ROUGE-L",
        "llama-onnx bench --profile quick --out 'my report'",
        "GroupQueryAttention × 30",
        "9f2c9f2c",
        "20250102",
        "1 skipped",
        "no GPU",
    ):
        assert text in words, text


def test_not_finite_figures_do_not_break_the_page(make_record):
    record = make_record()
    nowhere = {"value": float("nan"), "bound": float("inf")}
    results = [
        r.model_copy(update={"measurements": [m.model_copy(update=nowhere) for m in r.measurements]})
        for r in record.validation.results
    ]
    words = Page(render_html(make_record(validation=record.validation.model_copy(update={"results": results})))).words
    assert "not a number" in words
    assert "infinite" in words


def test_examples_are_capped_and_the_page_stays_small(make_record):
    text = render_html(make_record(examples=5000))
    assert text.count("the two are identical") == EXAMPLES_SHOWN
    assert f"{EXAMPLES_SHOWN} of 5000 examples" in text
    assert len(text) < 400_000


def _plots(record):
    """Plots by title, each as its tags, and what it says to those who cannot see it."""
    found = {p.title: p for p in all_plots(record)}
    said = {title: Page(p.svg).of("svg")[0]["aria-label"] for title, p in found.items()}
    return found, said


def test_plots_say_in_words_what_they_show(make_record):
    plots, said = _plots(make_record())
    assert list(plots) == [CONTEXT, FLOOR, TTFT, TPOT, GAPS, TOTAL]
    assert "ONNX Runtime, fused graph: " in said[CONTEXT]
    assert said[CONTEXT].endswith("The dashed line is the memory floor.")
    assert "1.43×" in said[FLOOR]
    assert "genai 0.18 median 41.0 ms, 40.2 to 41.8 ms, 12 samples" in said[TPOT]
    for p in plots.values():
        assert 'role="img"' in p.svg
        # Colours follow the theme: the style sheet has them all.
        assert not re.search(r"#(?!mark-)|(fill|stroke|style)=", re.sub(r"<text.*?</text>", "", p.svg))
    assert plots[GAPS].svg.count("<use") == 4 * DOTS


def test_sides_differ_by_marker_and_by_place(make_record):
    record = make_record()
    plots, _ = _plots(record)
    for title, small in ((TPOT, "-small"), (CONTEXT, "")):
        used = [a["href"] for a in Page(plots[title].svg).of("use")]
        assert list(dict.fromkeys(used)) == [f"#mark-{shape}{small}" for shape in SHAPES[:4]]
    x = [float(a["x"].rstrip("%")) for a in Page(plots[TPOT].svg).of("use")]
    # Places are proportional to time, from zero at 2 %: the axis is linear and the same for all rows.
    times = [r.tpot_s for s in ("onnx", "pytorch") for r in record.find(record.cases()[1], s).rounds]
    ratios = [
        (place - 2) / t for place, t in zip(x, [t for i in (0, 12) for t in sorted(times[i : i + 12])], strict=False)
    ]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-3)


def test_bars_are_as_long_as_their_times(make_record):
    record = make_record()
    widths = [float(a["width"].rstrip("%")) for a in Page(_plots(record)[0][FLOOR].svg).of("rect")]
    case = headline_case(record)
    times = [r.tpot.value / floor_s(record, case) for r in floor_rows(record, case)]
    assert [w / widths[0] for w in widths[1:]] == pytest.approx(times, rel=1e-3)


def test_plots_without_floor_or_second_context(make_record):
    plots, said = _plots(make_record(floor=False))
    assert FLOOR not in plots
    assert "floor" not in said[CONTEXT]
    one = [s for s in make_record().series if s.case.prompt == 128 and s.case.batch == 1]
    assert CONTEXT not in _plots(make_record(series=one))[0]
    assert all_plots(make_record(bare=True)) == []


def test_stray_samples_do_not_squeeze_the_axis(make_record):
    series = [s.model_dump() for s in make_record().series]
    for s in series:
        if s["side"] == "onnx":
            s["rounds"][0]["at_s"] = [t * 400 for t in s["rounds"][0]["at_s"]]
    plot = _plots(make_record(series=series))[0][TPOT]
    assert "1 beyond ▸" in plot.svg
    assert "right of the axis" in plot.caption
    assert plot.svg.count("<use") == 4 * 12 - 1


def test_style_sheet_is_balanced():
    assert CSS.count("{") == CSS.count("}")
    assert not re.findall(r"[,;{]\s*[,;]|,\s*}", CSS)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast_is_wcag_aa(theme):
    block = re.findall(r":root \{(.*?)\}", CSS, flags=re.S)[theme]
    colours = dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", block))
    for name, least in [(n, 4.5) for n in ("ink", "muted", "accent", "pass", "fail", "open")] + [
        (f"s{i}", 3.0) for i in range(6)
    ]:
        bright, dark = sorted((_luminance(colours[name]), _luminance(colours["bg"])), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= least, name
