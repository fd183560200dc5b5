"""The history: medians of past runs in one SQLite file of the user's data folder, and where a metric's level stepped.

Keyed by the machine's fingerprint: measurements of another machine are no history. Always advisory; a verdict needs
interleaved pairs (:mod:`reports.compare`). Steps are found by Pettitt's test (1979), a Mann-Whitney statistic at every
place of the series, here standardised: it sees ranks only, so a single wild night neither makes nor hides a step and no
noise model is needed; its p-value comes from permutations of a fixed seed. Series with several steps are split at the
surest one and both halves searched again (binary segmentation).

Try: ``llama-onnx history list``.
"""

from __future__ import annotations

import json
import os
import sqlite3
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import platformdirs
from numpy.typing import NDArray

from reports.comparison import CaseRecord, History, HistoryPoint, HistoryStep, in_kept_unit
from reports.errors import ReportError

STORE_ENV = "LLAMA_ONNX_HISTORY"
VERSION = 1
ALPHA = 0.01
"""A step is reported from this p-value on: the search asks at every place and again in both halves."""
LEAST_POINTS = 8
LEAST_SEGMENT = 3
PERMUTATIONS = 2000

_TABLE = """
CREATE TABLE IF NOT EXISTS points (
  fingerprint TEXT NOT NULL, model TEXT NOT NULL, case_name TEXT NOT NULL, metric TEXT NOT NULL, unit TEXT NOT NULL,
  at_utc TEXT NOT NULL, value REAL NOT NULL CHECK (value > 0), label TEXT NOT NULL, run TEXT NOT NULL,
  PRIMARY KEY (fingerprint, model, case_name, metric, run)
)
"""


class StoreError(ReportError):
    """The history cannot be used as asked; names the file and the remedy."""


class Point(NamedTuple):
    """One metric of one run: the median over its processes, in ``unit``."""

    fingerprint: str
    model: str
    case_name: str
    metric: str
    unit: str
    at_utc: str
    value: float
    label: str
    run: str


def default_path() -> Path:
    """Where the history lies; the environment variable ``LLAMA_ONNX_HISTORY`` moves it."""
    chosen = os.environ.get(STORE_ENV)
    return Path(chosen) if chosen else Path(platformdirs.user_data_dir("llama-onnx-bench")) / "history.sqlite"


def points_of(records: Iterable[CaseRecord], at_utc: str, run: str, label: str = "") -> list[Point]:
    """Medians of the undisturbed records, one point a case and metric.

    Raises:
        StoreError: a record without a fingerprint: nobody could say whose past it is.
    """
    values: dict[tuple[str, str, str, str], list[float]] = {}
    units: dict[str, str] = {}
    for r in records:
        if r.outcome != "ok":
            continue
        if not r.fingerprint:
            raise StoreError(f"the record of {r.case} names no machine (fingerprint); it cannot become history")
        units |= r.units
        for metric, found in r.metrics.items():
            key = (r.fingerprint, str(r.details.get("model", "")), r.case, metric)
            values.setdefault(key, []).append(statistics.median(found))
    return [
        Point(*key, units.get(key[3], ""), at_utc, statistics.median(found), label, run)
        for key, found in values.items()
    ]


def _kept(point: Point) -> Point:
    try:
        unit, factor = in_kept_unit(point.metric, point.unit or None)
    except ValueError as e:
        raise StoreError(f"the point of {point.case_name} at {point.at_utc}: {e}") from None
    return point._replace(unit=unit, value=point.value * factor)


class Store:
    """One open history; a context manager.

    Raises:
        StoreError: the file is no history, or of a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=30)
        try:
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if version > VERSION:
                raise StoreError(f"{path} was written by a newer version ({version}); update llama-onnx-bench")
            with self._db:
                self._db.execute(_TABLE)
                self._db.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.DatabaseError as e:
            self._db.close()
            raise StoreError(f"{path} is no history ({e}); move it away, or set {STORE_ENV}") from None
        except StoreError:
            self._db.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def add(self, points: Iterable[Point]) -> int:
        """Add points; those already there (same machine, model, case, metric, run) are left. How many were new.

        Values are kept in seconds and bytes, so that a metric's past is of one unit.
        """
        before = self._db.total_changes
        kept = [_kept(p) for p in points]
        with self._db:
            self._db.executemany(f"INSERT OR IGNORE INTO points VALUES ({', '.join('?' * len(Point._fields))})", kept)
        return self._db.total_changes - before

    def points(self, fingerprint: str | None = None) -> list[Point]:
        """All points in the order of time, of one machine or of all."""
        where, values = (" WHERE fingerprint = ?", (fingerprint,)) if fingerprint else ("", ())
        query = f"SELECT {', '.join(Point._fields)} FROM points{where} ORDER BY at_utc, run"
        return [Point(*row) for row in self._db.execute(query, values)]

    def export(self) -> Iterator[str]:
        """JSON Lines, one point each."""
        for p in self.points():
            yield json.dumps(p._asdict(), sort_keys=True)

    def load(self, lines: Iterable[str], source: str) -> int:
        """Add what :meth:`export` wrote; all or nothing. How many were new.

        Raises:
            StoreError: a line that is no point (it is named); nothing was added.
        """
        points = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                raw = json.loads(line)
                value = float(raw["value"])
                if set(raw) != set(Point._fields) or not 0 < value < float("inf"):
                    raise ValueError("not the fields of a point, or a value that is not positive")
                texts: dict[str, Any] = {name: str(text) for name, text in raw.items()}
                points.append(Point(**texts | {"value": value}))
            except (ValueError, KeyError, TypeError) as e:
                raise StoreError(f"{source}, line {number} is no history point: {e}") from None
        return self.add(points)

    def history(
        self, case: str, metric: str, fingerprint: str, model: str | None = None, any_machine: bool = False
    ) -> History | None:
        """A metric's past with its steps; None where there is none.

        Raises:
            StoreError: there is a past, but on other machines only, and ``any_machine`` was not asked for.
        """
        found = [
            p
            for p in self.points()
            if p.case_name == case and p.metric == metric and (model is None or p.model == model)
        ]
        own = [p for p in found if p.fingerprint == fingerprint]
        if any_machine:
            own = found
        elif found and not own:
            raise StoreError(
                f"the past of {metric} of {case} was measured on other machines "
                f"({', '.join(sorted({p.fingerprint for p in found}))}); compare with --any-machine if you must"
            )
        if not own:
            return None
        if len(units := {p.unit for p in own}) > 1:
            raise StoreError(f"the past of {metric} of {case} has several units: {', '.join(map(repr, sorted(units)))}")
        points = [HistoryPoint(at_utc=p.at_utc, value=p.value, label=p.label, run=p.run) for p in own]
        steps = find_steps([p.value for p in own])
        return History(case=case, metric=metric, unit=own[0].unit, fingerprint=fingerprint, points=points, steps=steps)


def _pettitt(ranks: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Place of the step and its statistic for each row of ranks ``[rows, n]``.

    U_t = 2 sum(ranks up to t) - t (n + 1), divided by sqrt(t (n - t)): the variance of U_t grows so, and without the
    division a step among the last nights would lose to the middle of the series.
    """
    n = ranks.shape[1]
    t = np.arange(1, n)
    u = np.abs(2 * ranks[:, :-1].cumsum(axis=1) - t * (n + 1)) / np.sqrt(t * (n - t))
    u[:, : LEAST_SEGMENT - 1] = 0
    u[:, n - LEAST_SEGMENT :] = 0
    at = u.argmax(axis=1)
    return at + 1, u[np.arange(len(u)), at]


def find_steps(values: Sequence[float], alpha: float = ALPHA, seed: int = 0) -> list[HistoryStep]:
    """Places where the level of a series changed for good, in order; ``ratio`` is median after / median before.

    Fewer than ``LEAST_POINTS`` points have no steps: their permutations cannot reach ``alpha``.
    """
    from scipy.stats import rankdata

    series = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    cuts: dict[int, float] = {}

    def search(start: int, end: int) -> None:
        n = end - start
        if n < LEAST_POINTS:
            return
        ranks = np.asarray(rankdata(series[start:end]), dtype=float)
        (at,), (k,) = _pettitt(ranks[None])
        _, others = _pettitt(rng.permuted(np.tile(ranks, (PERMUTATIONS, 1)), axis=1))
        p = (1 + int((others >= k).sum())) / (1 + PERMUTATIONS)
        if p > alpha:
            return
        cut = start + int(at)
        cuts[cut] = p
        search(start, cut)
        search(cut, end)

    search(0, len(series))
    edges = [0, *sorted(cuts), len(series)]
    return [
        HistoryStep(
            index=cut,
            ratio=float(np.median(series[cut:after]) / np.median(series[before:cut])),
            p=cuts[cut],
        )
        for before, cut, after in zip(edges, edges[1:], edges[2:], strict=False)
    ]
