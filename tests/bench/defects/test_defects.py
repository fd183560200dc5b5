"""The catalogue on the tiny model: every defect fails by its check, every harmless change passes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bench.defects.__main__ as catalogue
from bench.defects.__main__ import DEFECTS, row_of, run_change, table
from bench.defects.harmless import HARMLESS
from bench.defects.workshop import Defect, Harmless, Workshop
from bench.gate.modes import Mode
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
# The tiny model is random: nothing of its text or template is in a generation_config.json, and two words have no order.
NOT_HERE = {"another temperature in generation_config.json"}


@pytest.fixture
def subject(exports: Exports, subjects: Callable[..., Any]) -> Any:
    return subjects(exports(**SIZES), **SIZES)


@pytest.mark.parametrize("defect", [d for d in DEFECTS if d.name not in NOT_HERE], ids=lambda d: d.name)
def test_a_defect_fails_by_its_check_first(defect: Defect, subject: Any, exports: Exports, tmp_path: Path) -> None:
    row = run_change(defect, subject, exports(**SIZES), tmp_path)
    assert (row.verdict, row.first) == ("FAIL", defect.first), row.reason
    if row.layer is not None and row.layer_found is not None:
        assert row.layer_found == row.layer, row


@pytest.mark.parametrize("change", HARMLESS, ids=lambda c: c.name)
def test_a_harmless_change_passes(change: Harmless, subject: Any, exports: Exports, tmp_path: Path) -> None:
    row = run_change(change, subject, exports(**SIZES), tmp_path)
    assert row.verdict == "PASS", row.reason


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
    monkeypatch.setattr(catalogue, "MODES", {**catalogue.MODES, "quick": Mode("tiny", 96, 70, 4, 3, True)})
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
