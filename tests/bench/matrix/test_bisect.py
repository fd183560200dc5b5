"""The first version that changed it: found in as few rows as halving takes, over rows that are made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from bench.errors import BenchError
from bench.matrix import bisect as module
from bench.matrix.bisect import bisect, change_between, parse_range
from bench.matrix.rows import Side, against_manifest
from bench.runtimes.environments import Runtime, parse_runtimes
from reports.comparison import Result
from reports.matrix import Bisection, Difference, MatrixRow, OperatorTime
from reports.record import Case

VERSIONS = [f"1.{n}.0" for n in range(20, 33)]
CASE = "b1-p512-n2"


def row(version: str, parity: str = "PASS", outcome: str = "ran", ratio: float = 1.0, status: str = "") -> MatrixRow:
    known = status or ("EQUIVALENT" if abs(ratio - 1) < 0.03 else "REGRESSION" if ratio > 1 else "IMPROVED")
    result = Result(case=CASE, metric="ttft", unit="s", gating=True, status=known, reason="", margin=0.03, ratio=ratio)
    ran = outcome == "ran"
    return MatrixRow(
        runtime=f"onnxruntime {version}",
        text=f"onnxruntime=={version}",
        version=version,
        provider="cpu",
        outcome=outcome,
        parity=parity if ran else None,
        speed=[result] if ran else [],
        verdict=parity if ran else "FAIL",
        reasons=[f"as {version}"],
    )


class Rows:
    """Rows by version, and which were asked for what."""

    def __init__(self, made: dict[str, MatrixRow]) -> None:
        self.known, self.asked = made, list[tuple[str, bool, bool]]()
        self.plan = SimpleNamespace(cases=(Case(batch=1, prompt=512, new_tokens=2),), seed=1)

    def difference(self, right: Side, wrong: Side, _notes: list[str]) -> Difference:
        """Whose turn it was, as its node."""
        what = f"{right.runtime.version} against {wrong.runtime.version}"
        return Difference(layer=3, node=what, operator="MatMul", scenario="", what=what, deviation=0.1, expected=1e-5)

    def row(self, side: Side, parity: bool = True, speed: bool = True) -> MatrixRow:
        self.asked.append((side.runtime.version, parity, speed))
        return self.known[side.runtime.version]


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``look(rows, range)`` bisects over 13 versions that are all there."""
    monkeypatch.setattr(module, "prepare", lambda runtime, say: runtime)
    profile = [OperatorTime(operator="GroupQueryAttention", before_us=1000.0, after_us=3000.0)]
    monkeypatch.setattr(module, "profiled", lambda *_: (profile, "prefill of 512 tokens"))

    def run(made: dict[str, MatrixRow], text: str = "1.20.0..1.32.0") -> tuple[Bisection, Rows]:
        first, last = parse_range(text)
        monkeypatch.setattr(
            module,
            "released",
            lambda name, a, b: [r for v in VERSIONS for r in parse_runtimes(v) if a <= r.key <= b],
        )
        rows = Rows(made)
        return bisect(rows, first, last, "cpu", lambda _: None), rows  # type: ignore[arg-type]

    return run


@pytest.mark.parametrize("changed_at", range(1, 13))
def test_the_version_that_changed_parity_is_found_in_log2_rows(look: Any, changed_at: int) -> None:
    made = {v: row(v, "PASS" if k < changed_at else "FAIL") for k, v in enumerate(VERSIONS)}
    found, rows = look(made)
    assert (found.before, found.after) == (VERSIONS[changed_at - 1], VERSIONS[changed_at])
    assert found.changed == "parity"
    assert found.difference is not None
    assert found.difference.node == f"{found.before} against {found.after}"
    assert len(found.tried) - 2 <= 4
    between = [a for a in rows.asked if a[0] not in ("1.20.0", "1.32.0")][: len(found.tried) - 2]
    assert all(parity and not speed for _, parity, speed in between)  # speed is only measured where it matters
    assert rows.asked[-2:] == [(found.before, True, True), (found.after, True, True)]  # both neighbours' whole rows


def test_a_folder_that_got_right_is_found_as_well(look: Any) -> None:
    made = {v: row(v, outcome="refused" if k < 3 else "ran") for k, v in enumerate(VERSIONS)}
    found, _ = look(made)
    assert (found.before, found.after) == ("1.22.0", "1.23.0")
    assert "refuses the folder, then PASS" in found.summary
    assert found.difference is not None
    assert found.difference.node == "1.23.0 against 1.22.0"  # the one that is right is asked what should come out


def test_a_speed_that_changed_names_metric_case_and_operator(look: Any) -> None:
    made = {v: row(v, ratio=1.25 if k >= 8 else 1.01) for k, v in enumerate(VERSIONS)}
    found, rows = look(made)
    assert (found.before, found.after, found.changed) == ("1.27.0", "1.28.0", f"ttft of {CASE}")
    assert found.profiled == "prefill of 512 tokens"
    assert "GroupQueryAttention takes 3.0 ms a run where it took 1.0 ms" in found.summary
    assert all(speed and not parity for _, parity, speed in rows.asked[2:-2])


def test_a_change_is_told_beside_the_version_that_it_was_measured_beside(look: Any) -> None:
    made = {v: row(v, ratio=1.25 if k >= 8 else 1.08 if k else 1.0) for k, v in enumerate(VERSIONS)}
    found, _ = look(made)
    assert found.before == "1.27.0"
    assert f"prefill of {CASE} is 25 % slower than under onnxruntime 1.20.0;" in found.summary
    found, _ = look({v: row(v, ratio=8.7 if k >= 9 else 1.0) for k, v in enumerate(VERSIONS)})
    assert "8.70 times as slow as under onnxruntime 1.20.0;" in found.summary


def test_why_a_difference_was_not_looked_for_is_said(look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rows, "difference", lambda _self, _right, _wrong, notes: notes.append("no text to look over"))
    found, _ = look({v: row(v, "PASS" if v < "1.28" else "FAIL") for v in VERSIONS}, "1.27.0..1.28.0")
    assert found.summary.endswith("; no text to look over")


def test_a_profile_is_taken_over_tokens_that_the_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        prompts: ClassVar[list[Any]] = []

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...

        def prefill(self, prompts: Any, reserve: int) -> None:
            self.prompts.append(prompts)

        def end_profile(self) -> str:
            return ""

    rows = SimpleNamespace(
        plan=SimpleNamespace(seed=1),
        subject=SimpleNamespace(folder="", manifest=SimpleNamespace(vocab_size=7)),
        deployment=lambda _: SimpleNamespace(open=lambda *_, **__: Session()),
    )
    monkeypatch.setattr("bench.latency.profile.operator_times", lambda *_: {"MatMul": (3.0, 1.0)})
    side = Side(Runtime("onnxruntime", "1.27.0"), "cpu")
    case = Case(batch=2, prompt=50, new_tokens=2)
    assert module._times(rows, side, case, prefill=True) == {"MatMul": 3.0}  # type: ignore[arg-type]
    assert {i for prompt in Session.prompts for ids in prompt for i in ids} == set(range(7))


def test_an_undecided_speed_counts_to_the_nearer_end(look: Any) -> None:
    ratios = [1.0] * 6 + [1.05, 1.25] + [1.25] * 5
    made = {
        v: row(v, ratio=r, status="INCONCLUSIVE" if r == 1.05 else "") for v, r in zip(VERSIONS, ratios, strict=True)
    }
    found, _ = look(made)
    assert (found.before, found.after) == ("1.26.0", "1.27.0")


def test_nothing_changed_is_said(look: Any) -> None:
    found, rows = look({v: row(v) for v in VERSIONS})
    assert (found.changed, found.before, found.after) == ("", "", "")
    assert len(rows.asked) == 2
    assert "the same verdict (PASS)" in found.summary


def test_neighbours_need_no_step(look: Any) -> None:
    found, _ = look({v: row(v, "PASS" if v < "1.28" else "FAIL") for v in VERSIONS}, "1.27.0..1.28.0")
    assert found.tried == ["1.27.0", "1.28.0"]
    assert found.between == 2


def test_rows_keep_the_manifest_honest() -> None:
    rows = [row("1.21.0", outcome="refused"), row("1.22.0"), row("1.23.0"), row("1.24.0", "FAIL")]
    assert against_manifest(rows, "1.23.0") == [
        "the manifest says that nothing older than 1.23.0 is right; onnxruntime 1.22.0, cpu is, on this machine",
        "the manifest says that 1.23.0 and later are right for this folder; onnxruntime 1.24.0, cpu is not",
    ]
    assert against_manifest(rows, "") == []
    assert against_manifest([row("1.23.0", "FAIL"), row("1.24.0", "FAIL")], "1.23.0") == []  # the folder is wrong
    assert against_manifest([row("1.24.0", outcome="unavailable")], "1.23.0") == []


def test_parity_goes_before_speed() -> None:
    assert str(change_between(row("1.0.0"), row("1.1.0", "FAIL", ratio=1.5))) == "parity"
    assert change_between(row("1.0.0"), row("1.1.0", ratio=1.5, status="INCONCLUSIVE")) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1.27.0", "no range of versions"),
        ("1.27.0..", r"names no version; write --bisect 1\.22\.1\.\.1\.23\.2"),
        ("1.28.0..1.27.0", "exchange the ends"),
        ("1.27..1.27.0", "--bisect names onnxruntime==1.27.0 twice"),
        ("1.27.0..onnxruntime-gpu==1.28.0", "one version at each end"),
        ("1.26.0,1.27.0..1.28.0", "one version at each end"),
        ("venv=/a..venv=/b", "no range of versions"),
    ],
)
def test_what_is_no_range_is_refused(text: str, told: str) -> None:
    with pytest.raises(BenchError, match=told):
        parse_range(text)


def test_the_range_may_name_the_gpu_distribution() -> None:
    assert parse_range("onnxruntime-gpu==1.27..1.31.1") == (
        Runtime("onnxruntime-gpu", "1.27.0"),
        Runtime("onnxruntime-gpu", "1.31.1"),
    )
