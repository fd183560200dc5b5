"""The gate: is the export still the PyTorch model? Each named check is a test; what ``llama-onnx validate`` runs.

A check that fails or stays undecided is a failing test with its value and bound. Where nothing worse happened than an
undecided check, the run ends with exit code 3.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.gate.found import CheckSpec
from bench.suite.run import Run
from export.manifest import UserError


@pytest.fixture(scope="module", autouse=True)
def models_are_freed(run: Run) -> Iterator[None]:
    """Latency is measured without the gate's models in memory."""
    yield
    run.close_gate()


def test_check(run: Run, check: CheckSpec) -> None:
    try:
        result = run.check(check)
    except UserError as error:  # the machine's or the data's fault: no verdict on the folder
        run.stopped = True
        pytest.exit(f"error: {error}", returncode=error.exit_code)
    if result.status == "SKIPPED":
        pytest.skip(result.summary)
    findings = "".join(f"\n{f.where}: {f.what}" for f in result.findings)
    assert result.status not in ("FAIL", "INCONCLUSIVE"), f"{result.status}: {result.title}: {result.summary}{findings}"
