"""What the verdict's statistics are worth: simulated families of benchmarks, judged by the code that judges real ones.

``python -m bench.studies.simulate`` writes the table into ``docs/statistics.md``; the tests run the same scenarios.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.gate.modes import SEED
from bench.studies.tables import markdown
from reports.paired import assess, decide

Floats = NDArray[np.float64]
PLANNED, MOST = 10, 15
MARGIN = math.log(1.03)


@dataclass(frozen=True)
class Scenario:
    """One world. ``noise`` is the sd of a process's ln median; ``slow`` of the ``size`` benchmarks have ``change``.

    ``drift`` is by how much the machine slows over the run, as a ramp, a wave of three periods or a random walk;
    ``outliers`` the share of processes that take ``outlier`` times as long; ``uneven`` spreads the benchmarks' own
    noise (sd of its logarithm); ``order`` is what the second process of a pair loses always.
    """

    name: str
    size: int = 40
    noise: float = 0.015
    slow: int = 0
    change: float = 0.0
    drift: float = 0.0
    shape: str = "ramp"
    outliers: float = 0.0
    outlier: float = 1.3
    uneven: float = 0.0
    order: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Rates over the families of one scenario.

    ``alarms``: families with a REGRESSION or IMPROVED among unchanged benchmarks; ``found``: changed benchmarks called
    REGRESSION, after the planned pairs and after the extension; ``equivalent``: changed ones called EQUIVALENT;
    ``passed``: unchanged ones called EQUIVALENT; ``extended``: benchmarks that got more pairs; ``fixed``: families in
    which a rule of "5 % slower in one run" gives a false alarm.
    """

    scenario: Scenario
    families: int
    alarms: float
    alarms_planned: float
    found_planned: float | None
    found: float | None
    equivalent: float | None
    passed: float | None
    extended: float
    fixed: float | None


def order_of(rng: np.random.Generator, pairs: int) -> NDArray[np.bool_]:
    """Whether base runs first in each pair: A B B A or B A A B, drawn for each two pairs."""
    first = rng.random((pairs + 1) // 2) < 0.5
    return np.stack([first, ~first], axis=1).reshape(-1)[:pairs]


def _drift(rng: np.random.Generator, scenario: Scenario, times: Floats) -> Floats:
    if scenario.shape == "wave":
        return scenario.drift * np.sin(2 * np.pi * (3 * times / MOST + rng.random()))
    if scenario.shape == "walk":
        steps = np.cumsum(rng.normal(0, scenario.drift / math.sqrt(2 * MOST), 2 * MOST))
        return np.asarray(steps[np.round(2 * times).astype(int)])
    return scenario.drift * times / MOST


def simulate_pairs(rng: np.random.Generator, s: Scenario) -> Floats:
    """ln(candidate / base) of ``[size, MOST]`` pairs; the first ``slow`` rows are changed."""
    noise = s.noise * np.exp(rng.normal(0, s.uneven, (s.size, 1, 1)))
    ln = rng.normal(0, 1, (s.size, MOST, 2)) * noise
    ln += np.where(rng.random(ln.shape) < s.outliers, math.log(s.outlier), 0.0)
    ln[: s.slow, :, 1] += math.log1p(s.change)
    base_first = np.stack([order_of(rng, MOST) for _ in range(s.size)]) if s.drift or s.order else None
    if base_first is not None:
        early, late = np.arange(MOST) + 0.0, np.arange(MOST) + 0.5
        drift_early, drift_late = _drift(rng, s, np.stack([early, late]))
        ln[:, :, 0] += np.where(base_first, drift_early, drift_late + s.order)
        ln[:, :, 1] += np.where(base_first, drift_late + s.order, drift_early)
    difference: Floats = ln[:, :, 1] - ln[:, :, 0]
    return difference


def judge_family(d: Floats) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """Statuses after the planned pairs, and after the extension of the undecided rows."""
    size = len(d)
    groups = ["tpot"] * size
    margins = np.full(size, MARGIN)
    first = decide(assess(d[:, :PLANNED], groups, size), margins)
    undecided = first == "INCONCLUSIVE"
    last = first.copy()
    if undecided.any():
        rows = [row if more else row[:PLANNED] for row, more in zip(d, undecided, strict=True)]
        second = decide(assess(rows, groups, size, gating=undecided), margins)
        last[undecided] = second[undecided]
    return first, last


def run(s: Scenario, families: int = 1000, seed: int = SEED) -> Outcome:
    """Simulate and judge ``families`` families."""
    rng = np.random.default_rng(seed)
    changed = np.arange(s.size) < s.slow
    pairs = np.stack([simulate_pairs(rng, s) for _ in range(families)])
    one, two = np.stack([judge_family(d) for d in pairs], axis=1)
    fixed = pairs[:, ~changed, 0] > math.log(1.05)

    def share(of: NDArray[np.bool_], rows: NDArray[np.bool_]) -> float | None:
        return float(of[:, rows].mean()) if rows.any() else None

    def families_with(statuses: NDArray[np.str_]) -> float:
        return float(np.isin(statuses[:, ~changed], ("REGRESSION", "IMPROVED")).any(axis=1).mean())

    return Outcome(
        scenario=s,
        families=families,
        alarms=families_with(two),
        alarms_planned=families_with(one),
        found_planned=share(one == "REGRESSION", changed),
        found=share(two == "REGRESSION", changed),
        equivalent=share(two == "EQUIVALENT", changed),
        passed=share(two == "EQUIVALENT", ~changed),
        extended=float((one == "INCONCLUSIVE").mean()),
        fixed=float(fixed.any(axis=1).mean()) if not changed.all() else None,
    )


UNCHANGED = (
    Scenario("unchanged"),
    Scenario("unchanged, drift 3 % (ramp)", drift=0.03),
    Scenario("unchanged, drift 3 % (wave)", drift=0.03, shape="wave"),
    Scenario("unchanged, drift 3 % (random walk)", drift=0.03, shape="walk"),
    Scenario("unchanged, 1 % outliers of +30 %", outliers=0.01),
    Scenario("unchanged, drift 3 % and 1 % outliers", drift=0.03, outliers=0.01),
    Scenario("unchanged, the second process always loses 1 %", order=0.01),
    Scenario("unchanged, uneven noise (0.7 to 3.3 %)", uneven=0.4),
    Scenario("unchanged, noise 3 %", noise=0.03),
    Scenario("unchanged, 4 benchmarks", size=4),
    Scenario("unchanged, 4 benchmarks, drift and outliers", size=4, drift=0.03, outliers=0.01),
)
SLOWER = (
    Scenario("one of 40 slower by 5 %", slow=1, change=0.05),
    Scenario("one of 40 slower by 5 %, drift 3 %", slow=1, change=0.05, drift=0.03),
    Scenario("one of 40 slower by 5 %, 1 % outliers", slow=1, change=0.05, outliers=0.01),
    Scenario("one of 40 slower by 5 %, drift and outliers", slow=1, change=0.05, drift=0.03, outliers=0.01),
    Scenario("one of 40 slower by 5 %, uneven noise", slow=1, change=0.05, uneven=0.4),
    Scenario("20 of 40 slower by 5 %", slow=20, change=0.05),
    Scenario("one of 4 slower by 5 %", size=4, slow=1, change=0.05),
    Scenario("one of 4 slower by 5 %, drift and outliers", size=4, slow=1, change=0.05, drift=0.03, outliers=0.01),
)
AT_MARGIN = (
    Scenario("all slower by exactly 3 %", slow=40, change=0.03),
    Scenario("all slower by exactly 3 %, drift and outliers", slow=40, change=0.03, drift=0.03, outliers=0.01),
    Scenario("all slower by 3.5 %", slow=40, change=0.035),
    Scenario("4 benchmarks slower by exactly 3 %", size=4, slow=4, change=0.03),
)


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    columns = ["scenario", "false alarm in a family", "the same, 5 % fixed rule", "real change found at 10 pairs"]
    columns += ["after the extension", "changed called EQUIVALENT", "unchanged called EQUIVALENT", "got 5 more pairs"]
    rows = []
    for o in outcomes:
        alarms = None if o.fixed is None else o.alarms
        shares = (alarms, o.fixed, o.found_planned, o.found, o.equivalent, o.passed, o.extended)
        rows.append([o.scenario.name, *("" if s is None else f"{100 * s:.1f} %" for s in shares)])
    return markdown(columns, rows)


def main(arguments: list[str] | None = None, write: Callable[[str], object] = sys.stdout.write) -> None:
    """Run every scenario; print the table, and with ``--out`` put it between the marks of that file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=Path("docs/statistics.md"))
    args = parser.parse_args(arguments)
    made = table([run(s, args.families, args.seed) for s in (*UNCHANGED, *SLOWER, *AT_MARGIN)])
    write(made)
    start, end = "<!-- simulation -->\n", "<!-- /simulation -->"
    if args.out.is_file() and start in (text := args.out.read_text(encoding="utf-8")):
        before, _, rest = text.partition(start)
        args.out.write_text(before + start + made + end + rest.partition(end)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
