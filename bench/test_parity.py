"""Parity: asserts that the export is still the PyTorch model, by the tier of its precision.

FAIL fails. INCONCLUSIVE fails too (too little was measured to say), except in the smoke profile, where it is a skip
with its reason: smoke is there to see that everything runs.
"""

from __future__ import annotations

import pytest

from bench.suite.run import Run


def _judge(run: Run, status: str, message: str) -> None:
    if status == "INCONCLUSIVE" and run.profile.name == "smoke":
        pytest.skip(f"INCONCLUSIVE in the smoke profile: {message}")
    assert status in ("PASS", "SUSPICIOUS", "REPORTED"), f"{status}: {message}"


def test_check(run: Run, check_name: str) -> None:
    parity = run.gate()
    check = next((c for c in parity.checks if c.name == check_name), None)
    if check is None:
        pytest.skip("the dataset has nothing to measure this on")
    bound = "" if check.bound is None else f", 95 % bound {check.bound:.6g}"
    _judge(run, check.status, f"{check.title} {check.value:.6g}{bound}, limit {check.limit}: {check.detail}")


def test_task(run: Run, task_metric: tuple[str, str]) -> None:
    group, metric = task_metric
    found = next(t for t in run.gate().tasks if (t.task, t.metric) == (group, metric))
    _judge(
        run,
        found.status,
        f"{metric} on {group}: {found.candidate:.2f} against {found.baseline:.2f}, "
        f"difference at least {found.difference_bound:.2f}, allowed {found.limit:.2f}, {found.items} items",
    )
