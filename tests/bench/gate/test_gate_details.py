"""Single rules of the gate that no entry of the catalogue rests on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.data.loading import load_dataset
from bench.errors import DatasetError
from bench.gate import statistics
from bench.gate.statistics import ROWS, score_tokens


@pytest.mark.parametrize("length", [1, 2, ROWS, ROWS + 1, ROWS + 2, 5 * ROWS - 3])
def test_a_window_is_compared_in_blocks_to_the_same_bits(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 384 tokens in float64 would be five times 150 MB beside both models."""
    rng = np.random.default_rng(length)
    ours, theirs = (rng.normal(0, 3, (length, 331)).astype(np.float32) for _ in range(2))
    ids = rng.integers(0, 331, length).tolist()
    rows = []
    real = torch.log_softmax

    def counted(x: torch.Tensor, dim: int) -> torch.Tensor:
        rows.append(len(x))
        return real(x, dim=dim)

    monkeypatch.setattr(torch, "log_softmax", counted)
    found = score_tokens(ours, theirs, ids)
    assert max(rows) <= ROWS
    assert sum(rows) == 2 * (length - 1)
    assert max(rows) - min(rows) <= 1  # none of a row or two, which PyTorch sums in another order
    monkeypatch.setattr(statistics, "ROWS", 10_000)
    whole = score_tokens(ours, theirs, ids)
    for name, values in vars(whole).items():
        np.testing.assert_array_equal(getattr(found, name), values)
        assert len(values) == length - 1


def test_a_hole_in_any_block_is_refused() -> None:
    theirs = np.zeros((3 * ROWS, 7), np.float32)
    for place in (0, ROWS, 3 * ROWS - 2):
        ours = theirs.copy()
        ours[place, 3] = np.nan
        with pytest.raises(ValueError, match="NaN"):
            score_tokens(ours, theirs, [1] * (3 * ROWS))
    ours = theirs.copy()
    ours[-1, 3] = np.nan  # the last position predicts nothing
    assert score_tokens(ours, theirs, [1] * (3 * ROWS)).kld.max() == 0


def test_texts_are_put_beside_the_projects_own(tmp_path: Path) -> None:
    """More text is what decides an undecided tail; the joined set is another one in records."""
    mine = tmp_path / "mine+more.jsonl"
    mine.write_text('{"task": "perplexity", "text": "The rain came late that year."}\n')
    other = tmp_path / "other.jsonl"
    other.write_text('{"task": "perplexity", "text": "The cat sat on the mat."}\n')
    own = load_dataset(None)
    assert load_dataset("own") == own
    assert load_dataset(str(mine)).prose() == ["The rain came late that year."]  # a plus sign in a name
    both = load_dataset(f"own+{other}")
    assert both.prose() == [*own.prose(), "The cat sat on the mat."]
    assert both.groups().keys() == own.groups().keys()
    three = load_dataset(f"own+{mine}+{other}") if "+" not in mine.name else load_dataset(f"{other}+own")
    assert len({i.id for i in three.items}) == len(three.items)
    assert both.name == f"{own.name} + other.jsonl"
    assert len({own.sha256, both.sha256, load_dataset(other).sha256, load_dataset(f"{other}+own").sha256}) == 4
    with pytest.raises(DatasetError, match="twice"):
        load_dataset(f"own+{other}+own")
    with pytest.raises(DatasetError, match="cannot read"):
        load_dataset(f"own+{tmp_path / 'nothing.jsonl'}")
