"""Peak memory of each side, in a process of its own."""

from __future__ import annotations

import pytest

from bench.suite.run import Run


def test_peak_memory(run: Run, side: str, record_property: pytest.FixtureRequest) -> None:
    found = run.measuring.memory_of(side)
    record_property("peak_bytes", found.peak_bytes)  # type: ignore[operator]
    weights = run.manifest.decode_weight_bytes
    # A process that generated has touched every weight; less means that something else was measured.
    if run.deployment.device == "cpu":
        assert found.peak_bytes >= 0.9 * weights, f"{side}: peak {found.peak_bytes} under the weights' {weights} bytes"
