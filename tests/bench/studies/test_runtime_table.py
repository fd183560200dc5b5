"""The tables of forms under several ONNX Runtimes."""

from __future__ import annotations

from bench.studies.runtime_table import tables
from tests.reports.matrix_examples import CASES, example_matrix, row, speed


def test_a_line_is_a_runtime_and_a_column_a_form() -> None:
    other = [
        row("1.9.0", outcome="refused", verdict="FAIL", reasons=["refuses"]),
        row("1.32.0", reference=True, speed=[]),
    ]
    slower = speed((1.25, "REGRESSION"), *((1.0, "EQUIVALENT"),) * 3)
    twin = [row("1.32.0"), row("1.32.0", reference=True, speed=[]), row("1.27.0", speed=slower)]
    text = tables({"fp32": example_matrix(rows=twin), "int4": example_matrix(rows=other)})
    found = text[text.index(f"Decode, {CASES[0]}") :].split("\n\n")[1].splitlines()
    assert found[2:] == [
        "| 1.9.0 | - | - |",
        "| 1.27.0 | **1.25** (1.24 to 1.26) | - |",
        "| 1.32.0 | 1.00 (0.99 to 1.01) | - |",
        "| 1.32.0 (reference) | 1 | 1 |",
    ]
    assert "| 1.9.0 | - | refuses the folder |" in text
    assert "| 1.32.0 | 0.61 s, 412 MB | - |" in text
