"""BLEU, ROUGE, exact match and token F1, with a paired bootstrap over items.

sacrebleu and rouge-score compute; here their per-item statistics are kept, so that resampling costs no new scoring.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rouge_score import rouge_scorer
from rouge_score.scoring import Score
from sacrebleu.metrics import BLEU

Array = NDArray[np.float64]
RESAMPLES = 2000
ROUGE_SETTINGS = "rouge-score, stemmer, rougeLsum on sentences"
QA_SETTINGS = "lower case, articles and punctuation dropped, best reference"


@dataclass(frozen=True)
class Scored:
    """One metric over items: ``statistics[i]`` of item i, whose sum over items becomes a score (0 to 100).

    BLEU: sacrebleu's counts (lengths, n-gram matches and totals); every other metric: the item's value (0 to 1) and 1.
    """

    metric: str
    statistics: Array
    settings: str

    def score_of(self, total: Array) -> float:
        """The score of summed statistics."""
        if self.metric == "BLEU":
            return float(BLEU()._compute_score_from_stats([int(v) for v in total]).score)
        return 100.0 * float(total[0] / total[1])

    @property
    def score(self) -> float:
        """The metric over all items."""
        return self.score_of(self.statistics.sum(axis=0))


def plain_typography(text: str) -> str:
    """Fold typographic apostrophes, quotes and no-break spaces, which sacrebleu's tokenizer tells apart."""
    table = {"’": "'", "‘": "'", "“": '"', "”": '"', "\u202f": " ", "\u00a0": " "}
    return " ".join("".join(table.get(c, c) for c in text).split())


def bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    """Corpus BLEU (sacrebleu, 13a, exp smoothing); items may have different numbers of references."""
    metric = BLEU()
    width = max(len(r) for r in references)
    streams: Any = [[plain_typography(r[k]) if k < len(r) else None for r in references] for k in range(width)]
    hypotheses = [plain_typography(o) for o in outputs]
    # Called for its signature; it also proves on every run that the statistics below are sacrebleu's own.
    whole = metric.corpus_score(hypotheses, streams)
    # The per-segment statistics are what sacrebleu's own significance module resamples.
    stats: Any = metric._extract_corpus_statistics(hypotheses, streams)
    scored = Scored(
        "BLEU",
        np.asarray(stats, dtype=np.float64),
        f"sacrebleu {metric.get_signature()}; typographic quotes and spaces folded",
    )
    if abs(scored.score - whole.score) > 1e-9:
        raise RuntimeError(
            "sacrebleu's statistics do not give its own score; pin sacrebleu to a version that was tested"
        )
    return scored


def _mean(metric: str, values: list[float], settings: str) -> Scored:
    statistics = np.stack([np.asarray(values, np.float64), np.ones(len(values))], axis=1)
    return Scored(metric, statistics, settings)


def _sentences(text: str) -> str:
    return "\n".join(s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s)


def rouge(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[Scored]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (summary level) F-measure, best reference, mean over items."""
    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeLsum": "ROUGE-L"}
    lines = [(_sentences(o), [_sentences(r) for r in refs]) for o, refs in zip(outputs, references, strict=True)]
    return _rouge(names, lines, ROUGE_SETTINGS)


def _rouge(names: dict[str, str], pairs: Sequence[tuple[str, Sequence[str]]], settings: str) -> list[Scored]:
    """F-measures of outputs against the best of their references; ``names``: rouge-score's name -> ours."""
    scorer = rouge_scorer.RougeScorer(list(names), use_stemmer=True)
    scores: list[list[dict[str, Score]]] = [[scorer.score(r, output) for r in refs] for output, refs in pairs]
    return [_mean(title, [max(s[n].fmeasure for s in row) for row in scores], settings) for n, title in names.items()]


def punkt_sentences(text: str) -> tuple[list[str], str]:
    """Sentences by nltk's punkt, and which one it was: the English model where its data is, else the bare algorithm.

    nltk fetches the model from the network, which a gate may not; without it only abbreviations are told worse.
    """
    from nltk.tokenize import sent_tokenize
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    try:
        return list(sent_tokenize(text)), "punkt english"
    except LookupError:
        return list(PunktSentenceTokenizer().tokenize(text)), "punkt untrained"


def rouge_mlperf(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[Scored]:
    """ROUGE as MLPerf's reference scripts of the LLaMA benchmarks compute it (llama2-70b, llama3.1-8b).

    Both texts stripped, one sentence a line (nltk punkt), rouge-score with stemmer, F-measure, mean over items.
    ``rougeL`` reads a text as one sequence, ``rougeLsum`` line by line. One reference an item.
    """
    names = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
    lines, splitter = [], ""
    for output, refs in zip(outputs, references, strict=True):
        (target, splitter), (found, _) = (punkt_sentences(t.strip()) for t in (refs[0], output))
        lines.append(("\n".join(found), ["\n".join(target)]))
    return _rouge(names, lines, f"rouge-score, stemmer, one sentence a line by nltk ({splitter}), as MLPerf")


def normalise_answer(text: str) -> list[str]:
    """Words of an answer as SQuAD compares them: lower case, without punctuation and articles."""
    text = text.lower().replace("’", "'")
    text = "".join(c for c in text if c not in string.punctuation)
    return [w for w in text.split() if w not in ("a", "an", "the")]


def _f1(output: list[str], reference: list[str]) -> float:
    if not output or not reference:
        return float(output == reference)
    common = sum((Counter(output) & Counter(reference)).values())
    return 2 * common / (len(output) + len(reference))


def question_answering(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[Scored]:
    """Exact match and token F1, best reference, mean over items (the SQuAD definitions)."""
    exact, f1 = [], []
    for output, refs in zip(outputs, references, strict=True):
        words = normalise_answer(output)
        exact.append(max(float(words == normalise_answer(r)) for r in refs))
        f1.append(max(_f1(words, normalise_answer(r)) for r in refs))
    return [_mean("exact match", exact, QA_SETTINGS), _mean("token F1", f1, QA_SETTINGS)]


def score_task(task: str, outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[Scored]:
    """The metrics of a task: QA exact match and F1, summaries ROUGE (CNN/DailyMail as MLPerf), the others BLEU."""
    if task == "qa":
        return question_answering(outputs, references)
    if task == "summarization":
        return rouge(outputs, references)
    if task == "cnn_dailymail":
        return rouge_mlperf(outputs, references)
    return [bleu(outputs, references)]


def _interval(n: int, statistic: Callable[[Array], float], seed: int) -> tuple[float, float]:
    """One-sided 95 % bounds (lower, upper) of a statistic of items' weights: bootstrap over ``n`` items."""
    rng = np.random.default_rng(seed)
    values = np.empty(RESAMPLES)
    for k in range(RESAMPLES):
        values[k] = statistic(np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64))
    low, high = np.quantile(values, [0.05, 0.95])
    return float(low), float(high)


def _weighted(scored: Scored, weights: Array) -> Array:
    """Weighted sum over items, row by row: a matrix product's order of summation differs between processors."""
    return np.asarray((weights[:, None] * scored.statistics).sum(axis=0))


def score_interval(scored: Scored, seed: int) -> tuple[float, float]:
    """One-sided 95 % bounds (lower, upper) of one score: bootstrap over items."""
    return _interval(len(scored.statistics), lambda w: scored.score_of(_weighted(scored, w)), seed)


def difference_interval(candidate: Scored, baseline: Scored, seed: int) -> tuple[float, float]:
    """One-sided 95 % bounds (lower, upper) of candidate minus baseline: paired bootstrap over items.

    Koehn (2004), "Statistical significance tests for machine translation evaluation".
    """

    def difference(weights: Array) -> float:
        return candidate.score_of(_weighted(candidate, weights)) - baseline.score_of(_weighted(baseline, weights))

    return _interval(len(candidate.statistics), difference, seed)
