"""Pages of comparisons, validations and matrices in real Chromium: sort, filter, keyboard, phone, axe, errors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reports.render.comparison_html import ROWS_SHOWN, render_comparison
from reports.render.html import render_html
from reports.render.matrix import render_matrix
from reports.render.validation import render_validation
from tests.reports.comparison_examples import example_comparison
from tests.reports.matrix_examples import example_matrix
from tests.reports.validation_examples import example_validation

CHROMIUM = Path("/usr/bin/chromium")
REQUIRED = bool(os.environ.get("LLAMA_ONNX_REQUIRE_BROWSER"))
HOSTILE = '<script>document.title="owned"</script><img src=x onerror=alert(1)>|"\'&'
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]

if REQUIRED:
    import axe_playwright_python.sync_playwright as axe_module
    import playwright.sync_api as playwright_api
else:
    playwright_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright axe-playwright-python")
    axe_module = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python"
    )

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists() and not REQUIRED, reason="no /usr/bin/chromium; apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens a page's text; fails at the end if anything was logged, thrown or asked from elsewhere."""
    contexts, complaints = [], []

    def open_(text, **options):
        (tmp_path / "index.html").write_text(text, encoding="utf-8")
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(f"console: {m.text}"))
        page.on("pageerror", lambda e: complaints.append(f"error: {e}"))
        page.on("dialog", lambda d: (complaints.append("dialog"), d.dismiss()))
        page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith("file:") else None)
        page.goto((tmp_path / "index.html").as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


def column(page, number):
    return page.eval_on_selector_all(f"#table tbody tr > :nth-child({number})", "cells => cells.map(c => c.innerText)")


def big(count):
    made = example_comparison()
    one = made.results[1]
    results = [one.model_copy(update={"case": f"case {i:05d}", "status": "EQUIVALENT"}) for i in range(count)]
    return made.model_copy(update={"results": [*made.results, *results]})


def test_sorts_by_mouse_and_by_keyboard(open_page):
    page = open_page(render_comparison(example_comparison()))
    first = page.locator("#table thead th").first
    first.locator("button").click()
    assert first.get_attribute("aria-sort") == "ascending"
    names = [n.strip() for n in column(page, 1)]
    # Numbers inside names sort as numbers.
    assert names == sorted(names, key=lambda n: [int(part[1:]) for part in n.split("-")])
    ratio = page.locator("#table thead th").nth(5)
    ratio.locator("button").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert ratio.get_attribute("aria-sort") == "descending"
    assert first.get_attribute("aria-sort") is None
    shown = [c.split("\n")[0].strip() for c in column(page, 6)]
    figures = [float(c) for c in shown if c != "–"]
    assert figures == sorted(figures, reverse=True)
    assert len(figures) > 5
    assert shown[len(figures) :] == ["–"] * (len(shown) - len(figures))


def test_filters_by_text_and_status(open_page):
    page = open_page(render_comparison(example_comparison()))
    assert "18 of 18" in page.locator("#shown").inner_text()
    page.locator("#find").fill("B4-P128")
    assert {n.strip() for n in column(page, 1)} == {"b4-p128-n32"}
    assert "3 of 18" in page.locator("#shown").inner_text()
    page.locator("#find").fill("")
    page.locator("input[value=REGRESSION]").focus()
    page.keyboard.press("Space")
    assert len(column(page, 1)) == 16
    assert not any("REGRESSION" in c for c in column(page, 3))
    page.locator("#find").fill("no such case")
    assert column(page, 1) == []


def test_large_family_is_paged_and_searched_whole(open_page):
    page = open_page(render_comparison(big(1000)))
    assert len(column(page, 1)) == ROWS_SHOWN
    page.locator("#more").click()
    assert len(column(page, 1)) == 2 * ROWS_SHOWN
    page.locator("#find").fill("case 00999")
    assert [n.strip() for n in column(page, 1)] == ["case 00999"]
    assert page.locator("#more").is_hidden()


def test_works_without_script(open_page):
    page = open_page(render_comparison(example_comparison()), java_script_enabled=False)
    assert page.locator("#table tbody tr").count() == 18
    assert page.locator("#filter").is_hidden()


def test_a_link_opens_its_case(open_page):
    page = open_page(render_comparison(example_comparison()))
    link = page.locator("#table tbody a", has_text="b1-p512-n32").first
    target = link.get_attribute("href")
    assert not page.locator(target).evaluate("e => e.open")
    link.click()
    assert page.locator(target).evaluate("e => e.open")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "page_kind", ["comparison", "failing parity", "run", "validation", "failing validation", "matrix"]
)
def test_axe_finds_nothing_serious(open_page, make_record, scheme, page_kind):
    if page_kind == "run":
        text = render_html(make_record())
    elif page_kind == "matrix":
        text = render_matrix(example_matrix(bisection="speed"))
    elif "validation" in page_kind:
        text = render_validation(example_validation(failing="mean_kld" if "failing" in page_kind else ""))
    else:
        text = render_comparison(example_comparison(failing_parity="failing" in page_kind))
    page = open_page(text, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    found = axe_module.Axe().run(page).response["violations"]
    serious = [(v["id"], v["nodes"][0]["html"][:120]) for v in found if v["impact"] in ("serious", "critical")]
    assert serious == []


def test_axe_sees_a_defect(open_page):
    page = open_page(render_comparison(example_comparison()).replace('<html lang="en">', "<html>"))
    found = axe_module.Axe().run(page).response["violations"]
    assert any(v["impact"] in ("serious", "critical") for v in found)


def test_dark_and_light_differ_and_both_are_readable(open_page):
    text = render_comparison(example_comparison())
    lightness = {}
    for scheme in ("light", "dark"):
        page = open_page(text, color_scheme=scheme)
        read = "e => getComputedStyle(e)[%r].match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)"
        lightness[scheme] = [page.locator("body").evaluate(read % name) for name in ("backgroundColor", "color")]
    assert lightness["light"][0] > 700 > 150 > lightness["light"][1]
    assert lightness["dark"][1] > 600 > 150 > lightness["dark"][0]


@pytest.mark.parametrize("hostile", ["", "W" * 200, HOSTILE])
def test_no_horizontal_scroll_on_a_phone(open_page, hostile):
    page = open_page(render_comparison(example_comparison(hostile=hostile)), viewport={"width": 390, "height": 844})
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator(".results").evaluate("e => e.scrollWidth > e.clientWidth")


@pytest.mark.parametrize("hostile", ["", "W" * 200, HOSTILE])
@pytest.mark.parametrize("failing", ["", "mean_kld", "weights"])
def test_a_validation_is_whole_on_a_phone(open_page, failing, hostile):
    text = render_validation(example_validation(failing=failing, hostile=hostile))
    page = open_page(text, viewport={"width": 390, "height": 844})
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    # Each check is a card: its table has nothing beyond the right edge.
    assert page.locator(".cards").evaluate_all("all => all.map(e => e.scrollWidth - e.clientWidth)") == [0, 0]
    # Each number stands beside its name, which is a column's head on a wide screen.
    shown = page.locator(".cards td[data-label=limit]").first
    assert shown.evaluate("e => getComputedStyle(e, '::before').content") == '"limit "'


@pytest.mark.parametrize("hostile", ["", "W" * 200, HOSTILE])
@pytest.mark.parametrize("bisection", ["", "parity", "speed"])
def test_a_matrix_is_whole_on_a_phone(open_page, bisection, hostile):
    page = open_page(
        render_matrix(example_matrix(bisection=bisection, hostile=hostile)), viewport={"width": 390, "height": 844}
    )
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    # The table scrolls inside its own box, and the runtime stays in sight.
    table = page.locator(".runtimes").first
    assert table.evaluate("e => e.scrollWidth > e.clientWidth")
    left = table.evaluate(
        "e => { e.scrollLeft = 200; return e.querySelector('tbody th').getBoundingClientRect().left; }"
    )
    assert left == 20
    assert page.locator(".cards").evaluate_all("all => all.every(e => e.scrollWidth === e.clientWidth)")


def test_first_screen_of_a_matrix(open_page):
    text = render_matrix(example_matrix())
    for size in ((1280, 800), (390, 844)):
        page = open_page(text, viewport=dict(zip(("width", "height"), size, strict=True)))
        for selector in ("h1", ".second", ".counts"):
            box = page.locator(selector).first.bounding_box()
            assert box["y"] + box["height"] <= size[1], (size, selector)
    # On a desktop the whole table of runtimes needs no scrolling to the side.
    page = open_page(text)
    assert page.locator(".runtimes").first.evaluate("e => e.scrollWidth - e.clientWidth") == 0


def test_first_screens_of_a_validation(open_page):
    text = render_validation(example_validation(failing="weights"))
    for size in ((1280, 800), (390, 844)):
        page = open_page(text, viewport=dict(zip(("width", "height"), size, strict=True)))
        for selector in ("h1", ".counts", ".facts"):
            box = page.locator(selector).first.bounding_box()
            assert box["y"] + box["height"] <= size[1], (size, selector)
    # On a desktop a check that passed is one line, so that all of them are seen in one look.
    page = open_page(text, viewport={"width": 1280, "height": 800})
    heights = page.locator(".cards tr:has(.status.pass)").evaluate_all("rows => rows.map(r => r.clientHeight)")
    assert len(heights) > 15
    assert max(heights[:15]) < 45


def test_first_screen_holds_the_answer(open_page):
    page = open_page(render_comparison(example_comparison()), viewport={"width": 1280, "height": 800})
    for selector in ("h1", ".counts", ".answers", ".facts"):
        box = page.locator(selector).bounding_box()
        assert box["y"] + box["height"] <= 800, selector


def test_names_stay_text(open_page):
    page = open_page(render_comparison(example_comparison(hostile=HOSTILE)))
    assert page.title().startswith("FAILED")
    assert page.locator("#table tbody th", has_text=HOSTILE).count() == 3
    assert page.locator("img").count() == 0
    page.locator("#find").fill("<script>")
    assert len(column(page, 1)) == 3


def test_prints_every_case_and_no_controls(open_page):
    page = open_page(render_comparison(example_comparison()))
    page.emulate_media(media="print")
    assert page.locator("#filter").is_hidden()
    closed = page.locator("details.case:not([open]) .metric")
    assert closed.count() > 0
    assert all(closed.nth(i).bounding_box()["height"] > 50 for i in range(closed.count()))
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
