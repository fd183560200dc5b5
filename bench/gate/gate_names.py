"""Names of what the gate reports, known before it has run, so that each becomes a test of its own."""

from __future__ import annotations

from bench.data.loading import Dataset

CHECKS = (
    "perplexity_ratio",
    "mean_kld",
    "tail_kld",
    "top1_agreement",
    "decode_consistency",
    "batch_consistency",
    "greedy_tokens",
    "length_band",
)
METRICS = {
    "qa": ("exact match", "token F1"),
    "summarization": ("ROUGE-1", "ROUGE-2", "ROUGE-L"),
    "cnn_dailymail": ("ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-Lsum"),
    "translation": ("BLEU",),
    "rewriting": ("BLEU",),
}


def metric_names(dataset: Dataset) -> list[tuple[str, str]]:
    """(group, metric) pairs that the gate will report for this dataset."""
    return [(group, metric) for group, items in dataset.groups().items() for metric in METRICS[items[0].task]]
