"""Metrics and parity statistics against known values; each verdict from both sides."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from bench.gate.metrics import bleu, difference_interval, normalise_answer, plain_typography, question_answering, rouge
from bench.gate.statistics import (
    TIERS,
    TokenScores,
    agreement_bounds,
    decide,
    mean_bounds,
    mean_kld,
    perplexity_ratio,
    score_tokens,
    tail_kld,
    tokens_needed,
    top1_agreement,
)
from reports.validation import Measurement

REFERENCES = [["the cat sat on the mat"], ["it rained all day", "the rain fell all day"], ["he went home early today"]]
OUTPUTS = ["the cat sat on a mat", "it rained the whole day", "he went home early today"]


def test_bleu_is_sacrebleus() -> None:
    streams = [[r[0] for r in REFERENCES], [REFERENCES[0][0], REFERENCES[1][1], REFERENCES[2][0]]]
    padded = [r * 2 if len(r) == 1 else r for r in REFERENCES]
    assert bleu(OUTPUTS, padded).score == pytest.approx(sacrebleu.corpus_bleu(OUTPUTS, streams).score)
    assert "tok:13a" in bleu(OUTPUTS, REFERENCES).settings


def test_typography_is_folded_on_both_sides() -> None:
    assert plain_typography("l’eau\u202f: « oui »") == "l'eau : « oui »"
    assert bleu(["l'escalier chaque soir même"], [["l’escalier chaque soir même"]]).score == pytest.approx(100)


def test_rouge_known_values() -> None:
    one, two, longest = rouge(["the cat sat"], [["the cat ran"]])
    assert one.score == pytest.approx(100 * 2 / 3)
    assert two.score == pytest.approx(50)
    assert longest.score == pytest.approx(100 * 2 / 3)


def test_question_answering_known_values() -> None:
    assert normalise_answer("The Answer, an apple!") == ["answer", "apple"]
    exact, f1 = question_answering(["The cat.", "a big dog", ""], [["cat"], ["dog", "small dog"], ["x"]])
    assert exact.score == pytest.approx(100 / 3)
    assert f1.score == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)


def test_difference_of_equal_outputs_is_nothing() -> None:
    scored = bleu(OUTPUTS, REFERENCES)
    assert difference_interval(scored, scored, seed=1) == (0.0, 0.0)


def test_a_worse_candidate_shows_in_the_interval() -> None:
    references = [[f"the {w} cat sat on the old mat near the door"] for w in "abcdefghijkl"]
    good = bleu([r[0] for r in references], references)
    bad = bleu([r[0].replace("old mat near", "new rug by") for r in references], references)
    low, high = difference_interval(bad, good, seed=1)
    assert low <= high < -10


def logits(seed: int, n: int = 200, vocabulary: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (n, vocabulary)).astype(np.float32)


def test_token_scores_by_hand() -> None:
    p = np.log(np.asarray([[0.5, 0.25, 0.25], [1 / 3] * 3], np.float32))
    q = np.log(np.asarray([[0.2, 0.6, 0.2], [1 / 3] * 3], np.float32))
    found = score_tokens(q, p, [0, 1])
    # baseline || candidate, not the other way round (which would be 0.275)
    by_hand = 0.5 * np.log(0.5 / 0.2) + 0.25 * np.log(0.25 / 0.6) + 0.25 * np.log(0.25 / 0.2)
    assert found.kld[0] == pytest.approx(by_hand, rel=1e-5)
    assert found.nll_candidate[0] == pytest.approx(-np.log(0.6), rel=1e-5)
    assert found.nll_baseline[0] == pytest.approx(np.log(4), rel=1e-6)
    assert not found.same_top1[0]
    with pytest.raises(ValueError, match="NaN"):
        score_tokens(np.full_like(p, np.nan), p, [0, 1])
    with pytest.raises(ValueError, match="do not fit"):
        score_tokens(q, p, [0, 1, 2])


@given(st.integers(0, 1000), st.floats(1e-3, 1.0))
def test_kld_is_zero_only_without_a_change(seed: int, size: float) -> None:
    base = logits(seed, 5)
    ids = [0, 1, 2, 3, 4]
    assert score_tokens(base, base, ids).kld.max() == 0
    shifted = score_tokens(base + 3, base, ids).kld.max()
    assert abs(shifted) < 1e-9
    moved = base.copy()
    moved[:, 0] += size
    assert score_tokens(moved, base, ids).kld.min() > 0


def chunks_of(noise: float, chunks: int, n: int = 200, shift: float = 0.0) -> list[TokenScores]:
    out = []
    for k in range(chunks):
        base = logits(k, n)
        changed = base + noise * logits(1000 + k, n) + shift * np.eye(1, 50, dtype=np.float32)
        out.append(score_tokens(changed, base, (np.arange(n) % 50).tolist()))
    return out


def measured(scores: list[TokenScores], null: list[TokenScores]) -> list[Measurement]:
    tier = TIERS["fp32"]
    common = perplexity_ratio(scores, null, tier, 1), mean_kld(scores, null, tier, 1)
    return [*common, tail_kld(scores, null, tier, None), top1_agreement(scores, null, tier, 1, None)]


def statuses(scores: list[TokenScores], null: list[TokenScores]) -> dict[str, str]:
    return {m.name: m.status for m in measured(scores, null)}


def test_the_same_model_passes() -> None:
    found = statuses(chunks_of(1e-7, 40), chunks_of(1e-7, 5))
    assert found == {"perplexity_ratio": "PASS", "mean_kld": "PASS", "tail_kld": "PASS", "top1_agreement": "PASS"}


def test_another_model_fails() -> None:
    found = statuses(chunks_of(0.05, 40), chunks_of(1e-7, 5))
    assert found["mean_kld"] == found["tail_kld"] == found["top1_agreement"] == "FAIL"


def test_inside_the_margin_but_far_from_the_null_control_is_suspicious() -> None:
    found = statuses(chunks_of(2e-5, 40), chunks_of(1e-7, 5))
    assert found["mean_kld"] == "SUSPICIOUS"


def test_too_few_tokens_is_inconclusive_and_says_how_many() -> None:
    check = top1_agreement(chunks_of(1e-7, 4), [], TIERS["fp32"], 1, None)
    assert check.status == "INCONCLUSIVE"
    assert f"about {tokens_needed(0.9995)} tokens would decide" in check.detail


def test_tokens_needed_is_the_smallest_number() -> None:
    need = tokens_needed(0.9995)
    assert agreement_bounds(need, need)[0] >= 0.9995 > agreement_bounds(need - 1, need - 1)[0]
    assert tokens_needed(0.9995, agreement=0.999) == 0


def test_agreement_bounds_by_the_rule_of_three() -> None:
    low, high = agreement_bounds(1000, 1000)
    assert low == pytest.approx(0.05 ** (1 / 1000))
    assert high == 1.0
    low, high = agreement_bounds(0, 10)
    assert low == 0.0
    assert high == pytest.approx(1 - 0.05 ** (1 / 10))


def test_bounds_cover_the_mean() -> None:
    rng = np.random.default_rng(7)
    missed = 0
    for seed in range(300):
        chunks = [rng.normal(1.0 + rng.normal(0, 0.2), 1.0, 50) for _ in range(25)]
        _, high = mean_bounds(chunks, seed, resamples=400)
        missed += high < 1.0
    # nominal 5 %; the percentile bootstrap over 25 chunks is a little short of it
    assert missed / 300 < 0.09


@pytest.mark.parametrize(
    ("bound", "opposite", "better", "status"),
    [
        (0.9, 0.5, "lower", "PASS"),
        (1.1, 0.9, "lower", "INCONCLUSIVE"),
        (1.2, 1.1, "lower", "FAIL"),
        (1.1, 1.2, "higher", "PASS"),
        (0.9, 1.1, "higher", "INCONCLUSIVE"),
        (0.8, 0.9, "higher", "FAIL"),
    ],
)
def test_decide(bound: float, opposite: float, better: str, status: str) -> None:
    assert decide(bound, opposite, 1.0, better) == status  # type: ignore[arg-type]
