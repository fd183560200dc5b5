"""The catalogue on the tiny model: every defect fails by its check, every harmless change passes."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import bench.defects.__main__ as catalogue
from bench.defects.__main__ import DEFECTS, NOT_APPLICABLE, row_of, run_change, table
from bench.defects.harmless import HARMLESS
from bench.defects.in_family import DEFECTS as IN_FAMILY
from bench.defects.workshop import Defect, Harmless, NotApplicableError, Workshop
from bench.gate.localize import localize
from bench.gate.modes import MODES, Mode
from bench.gate.registry import CHECKS
from bench.gate.validate import validate

Exports = Callable[..., Path]
# Blocks of 32 inputs need no remainder; a cache longer than 512 so that a window of 512 cuts something off; generation
# settings to change.
SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "max_position_embeddings": 640,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# The tiny LLaMA has neither generation settings to change nor what the other architectures have.
NOT_HERE = {"another temperature in generation_config.json", *(d.name for d in IN_FAMILY)}
NOT_HERE |= {"a mask of its own for each windowed layer", "biases added from the other side"}
FAMILY: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": 24, "head_dim": 32},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
}
FAMILY = {name: SIZES | changes for name, changes in FAMILY.items()}
TENSORRT = {"target": "tensorrt", "activations": "fp32"}
NAMED = {d.name: d for d in DEFECTS}
EXACT = [c for c in CHECKS if c.kind == "exact" and not c.target]
OLD = (
    *("attention scale off by 2 %, one layer", "norm epsilon 1e-3, one layer", "two layers exchanged"),
    *("residual taken after the norm, one layer", "cache written one position off, decode only"),
    *("rope base off by 0.1 %", "two KV heads exchanged, one layer", "norm weight of one layer left out"),
)


@pytest.fixture
def subject(exports: Exports, subjects: Callable[..., Any]) -> Any:
    return subjects(exports(**SIZES), **SIZES)


@pytest.mark.parametrize("defect", [d for d in DEFECTS if d.name not in NOT_HERE], ids=lambda d: d.name)
def test_a_defect_fails_by_its_check_first(defect: Defect, subject: Any, exports: Exports, tmp_path: Path) -> None:
    row = run_change(defect, subject, exports(**SIZES), tmp_path)
    assert (row.verdict, row.first) == ("FAIL", defect.first), row.reason
    if row.layer is not None and row.layer_found is not None:
        assert row.layer_found == row.layer, row


@pytest.mark.parametrize("change", [c for c in HARMLESS if c.name not in NOT_HERE], ids=lambda c: c.name)
def test_a_harmless_change_passes(change: Harmless, subject: Any, exports: Exports, tmp_path: Path) -> None:
    row = run_change(change, subject, exports(**SIZES), tmp_path)
    assert row.verdict == "PASS", row.reason


def on_each(kind: str, defects: Iterable[Defect], *names: str) -> list[Any]:
    return [pytest.param(kind, n, d, id=f"{kind}-{n}-{d.name}") for n in names for d in defects]


def of_family(*parts: str) -> list[Defect]:
    return [d for d in IN_FAMILY if any(part in d.name for part in parts)]


HAS = (
    ("mistral", ("attention window one", "window missing", "twice")),
    ("qwen2", ("window in a layer that has none", "bias")),
    ("qwen3", ("norm",)),
)
UNSEEN = {"epsilon of a head norm 1e-3, one layer"}


@pytest.mark.parametrize(
    ("name", "defect"), [pytest.param(n, d, id=f"{n}-{d.name}") for n, parts in HAS for d in of_family(*parts)]
)
def test_a_defect_of_the_family_fails_by_its_check_and_by_the_numbers(
    name: str, defect: Defect, subjects: Any, exports: Exports, tmp_path: Path
) -> None:
    """The numbers alone see it as well, whatever the exact checks can read; both name its layer."""
    good = exports(**FAMILY[name])
    row = run_change(defect, subjects(good, **FAMILY[name]), good, tmp_path)
    assert (row.verdict, row.first) == ("FAIL", defect.first), row.reason
    assert bool(row.seen) == (defect.name not in UNSEEN), row.seen
    if row.layer is not None:
        assert re.search(rf"\blayers?[. ]{row.layer}\b", row.reason), row
        assert row.layer_found == (row.layer if row.seen else None)


@pytest.mark.parametrize(
    ("kind", "name", "defect"),
    [
        *on_each("fp32", [d for d in DEFECTS if d.name in OLD], *FAMILY),
        *on_each("fp16", of_family("bias"), "qwen2"),
        *on_each("fp16", of_family("norm"), "qwen3"),
        *on_each("tensorrt", [*of_family("window"), *(d for d in DEFECTS if d.name in OLD[:5])], "qwen2"),
        *on_each("tensorrt", of_family("norm"), "qwen3"),
    ],
)
def test_exact_checks_name_it_on_other_graphs(
    kind: str, name: str, defect: Defect, subjects: Any, exports: Exports, tmp_path: Path
) -> None:
    good = exports("fp32", TENSORRT, **FAMILY[name]) if kind == "tensorrt" else exports(kind, {}, **FAMILY[name])
    row = run_change(defect, subjects(good, **FAMILY[name]), good, tmp_path, EXACT)
    there = kind != "tensorrt" or not defect.name.startswith(("residual taken", "cache written"))
    assert (row.verdict, row.first) == (("FAIL", defect.first) if there else (NOT_APPLICABLE, "")), row.reason
    in_mask = kind == "tensorrt" and "window" in defect.name  # which is in no layer
    if there and row.layer is not None and not in_mask:
        assert re.search(rf"\blayers?[. ]{row.layer}\b", row.reason), row


@pytest.mark.parametrize(
    "change", [c for c in HARMLESS if re.search("context$|mask|other side|left out", c.name)], ids=lambda c: c.name
)
@pytest.mark.parametrize("kind", ["ort", "tensorrt"])
def test_a_harmless_change_of_the_family_passes(
    change: Harmless, kind: str, subjects: Any, exports: Exports, tmp_path: Path
) -> None:
    good = exports("fp32", TENSORRT if kind == "tensorrt" else {}, **FAMILY["qwen2"])
    row = run_change(change, subjects(good, **FAMILY["qwen2"]), good, tmp_path)
    other = {"ort": "mask", "tensorrt": "windows as large"}[kind]
    assert row.verdict == (NOT_APPLICABLE if other in change.name else "PASS"), row.reason


@pytest.mark.parametrize(
    ("name", "part", "operator"),
    [
        ("mistral", "attention window one token longer", "attention"),
        ("qwen2", "bias of QKV zeroed", "qkv"),
        ("qwen2", "window in a layer that has none", "attention"),
        ("qwen3", "norm weights of queries and keys exchanged", "attention"),
        ("qwen3", "norms of heads after rotary", "attention"),
    ],
)
@pytest.mark.parametrize("kind", ["fp16", "tensorrt"])
def test_localisation_names_layer_and_operator(
    kind: str,
    name: str,
    part: str,
    operator: str,
    subjects: Any,
    exports: Exports,
    checkpoints: Exports,
    tmp_path: Path,
) -> None:
    good = exports("fp32", TENSORRT, **FAMILY[name]) if kind == "tensorrt" else exports(kind, {}, **FAMILY[name])
    shop = Workshop(good, tmp_path / "copy", checkpoints(**FAMILY[name]))
    (defect,) = of_family(part)
    defect.change(shop)
    shop.reseal()
    for folder, wanted in ((good, None), (shop.folder, (defect.layer(shop), operator))):
        with contextlib.closing(subjects(folder, **FAMILY[name])) as s:
            place = localize(s)
        assert (place and (place.layer, place.operator)) == wanted


@pytest.mark.parametrize("defect", IN_FAMILY, ids=lambda d: d.name)
def test_a_defect_that_a_model_has_no_place_for_says_so(
    defect: Defect, exports: Exports, checkpoints: Exports, tmp_path: Path
) -> None:
    shop = Workshop(exports(**SIZES), tmp_path / "copy", checkpoints(**SIZES))
    with pytest.raises(NotApplicableError, match="no "):
        defect.change(shop)


def test_what_is_not_applicable_is_told_and_not_counted() -> None:
    none = catalogue.Row("a window", False, NOT_APPLICABLE, "", "", [], [], None, None, 0.0, "no window")
    assert none.good
    assert "Not applicable to this folder: a window (no window)." in table([none], "title")
    assert "defects failed" not in table([none], "title")


def test_the_workshop_never_touches_the_good_folder(exports: Exports, checkpoints: Exports, tmp_path: Path) -> None:
    good = exports(**SIZES)
    before = {p.name: p.read_bytes() for p in good.iterdir()}
    for defect in DEFECTS:
        if defect.name in NOT_HERE:
            continue
        shop = Workshop(good, tmp_path / "copy", checkpoints(**SIZES))
        defect.change(shop)
        shop.reseal()
        changed = [p.name for p in shop.folder.iterdir() if p.read_bytes() != before.get(p.name)]
        shop.close()
        assert changed, f"{defect.name} changes nothing"
    assert {p.name: p.read_bytes() for p in good.iterdir()} == before


def test_the_list_is_as_long_as_promised() -> None:
    assert len(DEFECTS) >= 30
    assert len(HARMLESS) >= 12
    names = [d.name for d in (*DEFECTS, *HARMLESS)]
    assert len(set(names)) == len(names)


def test_the_table_counts_what_failed(subject: Any, exports: Exports) -> None:
    subject.folder = exports(**SIZES)
    with contextlib.closing(subject):
        found = validate(subject, place=False)
    rows = [row_of("good", found, "graph", 1, False), row_of("fine", found, "", None, True)]
    text = table(rows, "title")
    assert "0 of 1 defects failed" in text
    assert "1 of 1 harmless changes passed" in text


def test_a_catalogue_that_was_stopped_goes_on(
    exports: Exports, checkpoints: Exports, tiny_dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are there are kept as they are, the others are run."""
    monkeypatch.setattr(catalogue, "load_file", lambda _: tiny_dataset)
    monkeypatch.setattr(catalogue, "MODES", {**MODES, "quick": Mode("tiny", 96, 70, 4, 3, True)})
    out = tmp_path / "table.md"
    names = [d.name for d in DEFECTS if "norm epsilon" in d.name.lower()]
    assert len(names) == 2
    kept = {"name": names[0], "harmless": False, "verdict": "FAIL", "wanted_first": "graph", "first": "graph"}
    kept |= {"failed": ["graph"], "seen": [], "layer": 1, "layer_found": None, "seconds": 99.0, "reason": "kept"}
    out.with_suffix(".json").write_text(json.dumps([kept]))
    arguments = ["--model", str(checkpoints(**SIZES)), "--folder", str(exports(**SIZES)), "--out", str(out)]
    arguments += ["--dataset", "texts.jsonl", "--only", "norm epsilon", "--resume"]
    assert catalogue.main(arguments) == 0
    rows = json.loads(out.with_suffix(".json").read_text())
    assert [r["name"] for r in rows] == names
    assert rows[0] == kept
    assert rows[1]["verdict"] == "FAIL"
    assert "2 of 2 defects failed" in out.read_text()


def test_resume_needs_a_file_to_go_on_with(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        catalogue.main(["--resume"])
    assert stopped.value.code == 2
    assert "--out FILE" in capsys.readouterr().err
