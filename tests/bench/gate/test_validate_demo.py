"""The gate on the demo model: the export passes in quick mode, a small defect is named and placed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.defects.__main__ import DEFECTS, run_change
from bench.gate.modes import MODES
from bench.gate.validate import make_subject, validate

pytestmark = pytest.mark.slow
MODE = replace(MODES["quick"], windows=2, new_tokens=4)


@pytest.fixture(scope="module")
def subject(demo_export: Path, demo_checkpoint: Path) -> Iterator[Any]:
    made = make_subject(demo_export, str(demo_checkpoint), MODE, memo_bytes=1 << 30)
    yield made
    made.baseline.close()


def test_the_demo_export_passes(subject: Any) -> None:
    found = validate(subject)
    subject.close()
    assert found.verdict == "PASS", found.reasons
    assert sum(r.status == "PASS" for r in found.results) >= 17


def test_a_small_defect_is_named_and_placed(subject: Any, demo_export: Path, tmp_path: Path) -> None:
    """One layer's K times 1.01 on the demo model: mean KL divergence moves to about 1e-6 only."""
    row = run_change(next(d for d in DEFECTS if "K times" in d.name), subject, demo_export, tmp_path)
    assert (row.verdict, row.first) == ("FAIL", "weights")
    assert row.layer_found == row.layer == 10
