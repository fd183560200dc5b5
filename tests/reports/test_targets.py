"""The project's targets: derived from a record, skipped where it lacks a part, silent where they are not about it."""

from __future__ import annotations

import statistics

import pytest

from reports.summary import floor_rows, headline_case
from reports.targets import Target, targets_of

NAMES = [
    "decode against PyTorch eager",
    "decode against optimum",
    "decode over the memory floor",
    "prefill against PyTorch eager",
]


def names(record):
    return [t.name for t in targets_of(record)]


def without(record, *labels):
    return {
        "sides": [s for s in record.sides if s.label not in labels],
        "series": [s for s in record.series if s.side not in labels],
    }


def test_targets_are_ratios_of_the_candidate_over_the_others(make_record):
    record = make_record()
    case = headline_case(record)
    ours, pytorch, optimum = (record.find(case, s).rounds for s in ("onnx", "pytorch", "optimum-ort"))
    found = {t.name: t for t in targets_of(record)}
    assert list(found) == NAMES
    for name, metric, other in (
        (NAMES[0], "tpot_s", pytorch),
        (NAMES[1], "tpot_s", optimum),
        (NAMES[3], "ttft_s", pytorch),
    ):
        ratios = [getattr(a, metric) / getattr(b, metric) for a, b in zip(ours, other, strict=True)]
        assert found[name].value == pytest.approx(statistics.median(ratios))
    assert found[NAMES[2]].value == floor_rows(record, case)[0].multiple.value
    assert [(t.limit, t.met) for t in found.values()] == [(0.45, True), (0.8, True), (1.35, False), (0.75, True)]


def test_what_a_record_lacks_is_left_out(make_record):
    record = make_record()
    assert names(make_record(**without(record, "optimum-ort"))) == [NAMES[0], *NAMES[2:]]
    assert names(make_record(**without(record, "pytorch"))) == NAMES[1:3]
    assert names(make_record(floor=False)) == [*NAMES[:2], NAMES[3]]
    assert names(make_record(**without(record, "onnx"))) == []
    assert names(make_record(bare=True)) == []


@pytest.mark.parametrize(
    ("part", "change"),
    [("settings", {"provider": "cuda"}), ("model", {"precision": "int4"}), ("model", {"fused_ops": {"MatMul": 9}})],
)
def test_another_kind_of_run_has_no_targets(make_record, part, change):
    record = make_record()
    raw = record.model_dump()[part] | change
    assert names(make_record(**{part: raw})) == []


def test_a_limit_is_held_from_its_own_side():
    assert [Target("", v, 1.0).met for v in (0.9, 1.0, 1.1)] == [True, True, False]
    assert [Target("", v, 1.0, better="higher").met for v in (0.9, 1.0, 1.1)] == [False, True, True]
