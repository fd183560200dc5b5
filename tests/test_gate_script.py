"""docs/ci/gate.sh: its exit code is the worst of its parts, and it compares only with a base."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "docs" / "ci" / "gate.sh"
FAKE = """#!/usr/bin/env bash
echo "$@" >> calls.txt
case $1 in
    export) exit "${EXPORT:-0}" ;;
    bench) mkdir -p gate-out/gate; echo gate > gate-out/gate/report.md; exit "${BENCH:-0}" ;;
    compare) mkdir -p gate-out/compare; echo comparison > gate-out/compare/report.md; exit "${COMPARE:-0}" ;;
esac
"""


def run(tmp_path, **settings):
    fake = tmp_path / "llama-onnx"
    fake.write_text(FAKE, encoding="utf-8")
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": "gate-out", **settings}
    return subprocess.run([str(SCRIPT)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False).returncode


@pytest.mark.parametrize(
    ("bench", "compare", "code"),
    [("0", "0", 0), ("0", "3", 3), ("3", "1", 1), ("1", "3", 1), ("2", "3", 2), ("4", "3", 4), ("1", "2", 1)],
)
def test_ends_with_the_worst_code(tmp_path, bench, compare, code):
    assert run(tmp_path, BENCH=bench, COMPARE=compare, BASE_EXPORT="base") == code
    assert (tmp_path / "gate-out" / "comment.md").read_text(encoding="utf-8") == "comparison\n"


def test_without_a_base_nothing_is_compared(tmp_path):
    assert run(tmp_path) == 0
    calls = (tmp_path / "calls.txt").read_text(encoding="utf-8").split("\n")
    assert [c.split()[0] for c in calls if c] == ["export", "bench"]
    assert (tmp_path / "gate-out" / "comment.md").read_text(encoding="utf-8") == "gate\n"


def test_a_failed_export_ends_it(tmp_path):
    assert run(tmp_path, EXPORT="2", BASE_EXPORT="base") == 2
    assert len((tmp_path / "calls.txt").read_text(encoding="utf-8").split("\n")) == 2
