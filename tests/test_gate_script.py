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
    export)
        mkdir -p gate-out/export; echo "\"sha256\": \"${BYTES:-1}\"" > gate-out/export/manifest.json
        exit "${EXPORT:-0}" ;;
    bench)
        if [ -n "${DIES:-}" ]; then exit "$BENCH"; fi
        mkdir -p gate-out/gate; echo gate > gate-out/gate/report.md; exit "${BENCH:-0}" ;;
    compare)
        mkdir -p gate-out/compare; echo pair >> gate-out/compare/cases.jsonl
        if [ -n "${KILLED:-}" ]; then exit 137; fi
        touch gate-out/compare/comparison.json
        echo comparison > gate-out/compare/report.md; exit "${COMPARE:-0}" ;;
esac
"""


def run(tmp_path, **settings):
    fake = tmp_path / "llama-onnx"
    fake.write_text(FAKE, encoding="utf-8")
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": "gate-out", **settings}
    return subprocess.run([str(SCRIPT)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False).returncode


@pytest.mark.parametrize(
    ("bench", "compare", "code", "quoted"),
    [
        ("0", "0", 0, "comparison"),
        ("0", "3", 3, "comparison"),
        ("3", "1", 1, "comparison"),
        ("1", "1", 1, "comparison"),
        ("1", "3", 1, "gate"),
        ("2", "3", 2, "gate"),
        ("4", "3", 4, "gate"),
        ("1", "2", 1, "gate"),
    ],
)
def test_ends_with_the_worst_code_and_quotes_its_part(tmp_path, bench, compare, code, quoted):
    assert run(tmp_path, BENCH=bench, COMPARE=compare, BASE_EXPORT="base") == code
    assert (tmp_path / "gate-out" / "comment.md").read_text(encoding="utf-8") == f"{quoted}\n"


def test_a_part_without_a_report_is_not_covered_by_an_earlier_one(tmp_path):
    assert run(tmp_path, BASE_EXPORT="base") == 0
    assert run(tmp_path, BASE_EXPORT="base", BENCH="2", DIES="1") == 2
    comment = (tmp_path / "gate-out" / "comment.md").read_text(encoding="utf-8")
    assert comment == "export: exit code 0\ngate: exit code 2\ncompare: exit code 0\n"
    assert not (tmp_path / "gate-out" / "gate" / "report.md").exists()


def test_the_export_is_made_anew_and_the_gate_knows_what_it_has_to_be(tmp_path):
    assert run(tmp_path, PRECISION="int4", TARGET="plain") == 0
    export, bench = (tmp_path / "calls.txt").read_text(encoding="utf-8").splitlines()
    assert "--force" in export.split()
    assert "--precision int4 --target plain" in bench


def test_a_comparison_goes_on_only_where_it_was_cut_off_over_the_same_files(tmp_path):
    def pairs(**settings):
        run(tmp_path, BASE_EXPORT="base", **settings)
        return (tmp_path / "gate-out" / "compare" / "cases.jsonl").read_text(encoding="utf-8").count("pair")

    assert pairs(KILLED="1") == 1
    assert pairs() == 2
    assert pairs(KILLED="1") == 1  # that one was finished
    assert pairs(BYTES="2") == 1


def test_without_a_base_nothing_is_compared(tmp_path):
    assert run(tmp_path) == 0
    calls = (tmp_path / "calls.txt").read_text(encoding="utf-8").split("\n")
    assert [c.split()[0] for c in calls if c] == ["export", "bench"]
    assert (tmp_path / "gate-out" / "comment.md").read_text(encoding="utf-8") == "gate\n"


def test_a_failed_export_ends_it(tmp_path):
    assert run(tmp_path, EXPORT="2", BASE_EXPORT="base") == 2
    assert len((tmp_path / "calls.txt").read_text(encoding="utf-8").split("\n")) == 2
