"""The page in a real browser: it draws, fits a phone, and answers on the first screen."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from reports.publish import write_report

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=4000",
)
PROBE = """<script>addEventListener('load', () => {
  const facts = document.querySelector('.facts');
  parent.postMessage(document.documentElement.scrollWidth + ' '
    + (facts ? Math.ceil(facts.getBoundingClientRect().bottom) : 0), '*');
});</script></body>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="no /usr/bin/chromium; apt-get install chromium"),
]


def _chromium(tmp_path, *arguments):
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def _layout(tmp_path, text, width, height):
    """Scroll width of the page and bottom of its facts, in a frame of that size: windows have a minimum."""
    (tmp_path / "page.html").write_text(text.replace("</body>", PROBE), encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        "<!doctype html><script>addEventListener('message', e => { document.title = 'got ' + e.data; });"
        "</script>"
        f'<iframe src="page.html" style="width:{width}px;height:{height}px;border:0"></iframe>',
        encoding="utf-8",
    )
    dom = _chromium(tmp_path, "--dump-dom", "--window-size=1400,1000", (tmp_path / "frame.html").as_uri())
    found = re.search(r"<title>got (\d+) (\d+)</title>", dom)
    assert found, dom[:500]
    return int(found.group(1)), int(found.group(2))


def test_screenshot_has_the_size_of_the_window(make_record, tmp_path):
    page = write_report(make_record(), tmp_path / "out")
    png = tmp_path / "page.png"
    _chromium(tmp_path, f"--screenshot={png}", "--window-size=1280,800", page.as_uri())
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1280, 800)
    assert len(data) > 30_000


@pytest.mark.parametrize("options", [{}, {"failing_check": True, "random_weights": True}, {"hostile": "W" * 200}])
def test_no_horizontal_scroll_on_a_phone(make_record, tmp_path, options):
    page = write_report(make_record(**options), tmp_path / "out")
    scroll, facts = _layout(tmp_path, page.read_text(encoding="utf-8"), 375, 812)
    assert scroll == 375
    if not options.get("hostile"):
        assert 200 < facts <= 812


def test_first_screen_of_a_desktop_holds_the_answers(make_record, tmp_path):
    page = write_report(make_record(), tmp_path / "out")
    scroll, facts = _layout(tmp_path, page.read_text(encoding="utf-8"), 1280, 800)
    assert scroll == 1280
    assert 200 < facts <= 800


def test_the_probe_sees_an_overflow(tmp_path):
    scroll, _ = _layout(tmp_path, "<body><div style='width:600px'>wide</div></body>", 375, 812)
    assert scroll > 600
