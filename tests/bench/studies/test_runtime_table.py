"""The tables of forms under several ONNX Runtimes."""

from __future__ import annotations

from pathlib import Path

from bench.studies.runtime_table import parity, ratio, tables
from reports.matrix import Matrix
from tests.reports.matrix_examples import CASES, example_matrix, row, speed

ROOT = Path(__file__).parents[3]
REFERENCE = row("1.32.0", runtime="onnxruntime 1.32.0 (reference)", reference=True, speed=[])


def test_a_line_is_a_runtime_and_a_column_a_form() -> None:
    other = [row("1.9.0", outcome="refused", verdict="FAIL", reasons=["refuses"]), REFERENCE]
    slower = speed((1.2512, "REGRESSION"), (1.08, "INCONCLUSIVE"), *((1.0, "EQUIVALENT"),) * 2)
    twin = [row("1.32.0"), REFERENCE, row("1.27.0", speed=slower)]
    text = tables({"fp32": example_matrix(rows=twin), "int4": example_matrix(rows=other)})
    found = text[text.index(f"Decode, {CASES[0]}") :].split("\n\n")[1].splitlines()
    assert found[2:] == [
        "| onnxruntime 1.9.0 | - | - |",
        "| onnxruntime 1.27.0 | **1.251** (1.24 to 1.26) | - |",
        "| onnxruntime 1.32.0 | 1.002 (0.99 to 1.01) | - |",
        "| onnxruntime 1.32.0 (reference) | 1 | 1 |",
    ]
    assert "| onnxruntime 1.9.0 | - | refuses the folder |" in text
    assert "| onnxruntime 1.27.0 | 1.080? (1.07 to 1.09) | - |" in text
    assert "| onnxruntime 1.32.0 | 412 MB | - |" in text


def test_two_providers_of_one_runtime_are_two_lines() -> None:
    both = [row("1.27.0"), row("1.27.0", "cuda", parity="FAIL"), REFERENCE]
    text = tables({"fp32": example_matrix(rows=both)})
    assert "| onnxruntime 1.27.0, cpu | PASS" in text
    assert "| onnxruntime 1.27.0, cuda | FAIL" in text


def test_the_page_of_measurements_tells_what_was_recorded() -> None:
    page = (ROOT / "docs/measurements/runtimes-demo.md").read_text(encoding="utf-8")
    recorded = Matrix.read(ROOT / "reports/gallery/runtimes/matrix.json")
    for r in recorded.rows:
        assert f"| {parity(r)} |" in page
        for metric in ("ttft", "tpot"):
            assert f"| {ratio(r, recorded.cases[0], metric)} |" in page
