"""The named checks in the order in which they run: cheap and exact first, so that they name a defect first; then those
that ask one graph side by side, because each is opened anew in the other's place.

Try: ``llama-onnx validate --list-checks``. Nothing heavy is imported until a check runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from bench.checks.base import CheckSpec, Found, Subject
from reports.validation import Kind


def _late(module: str, name: str) -> Callable[[Subject], Found]:
    def run(subject: Subject) -> Found:
        found: Found = getattr(importlib.import_module(f"bench.checks.{module}"), name)(subject)
        return found

    return run


def _spec(name: str, module: str, looks_at: str, catches: str, function: str = "", kind: Kind = "exact") -> CheckSpec:
    return CheckSpec(name, kind, looks_at, catches, _late(module, function or name))


CHECKS: tuple[CheckSpec, ...] = (
    _spec(
        "files",
        "graph_checks",
        "size and SHA-256 of every file, paths, operators that may not be trusted, graphs that nothing else looks at",
        "a flipped byte, a file of another export, a link out of the folder, another model under the usual name",
    ),
    _spec(
        "manifest",
        "graph_checks",
        "the manifest's claims against the baseline's configuration and what --expect names",
        "another context length, end token, cache layout, a precision that was not asked for",
    ),
    _spec(
        "config", "text_checks", "config.json against the baseline's", "a changed rope base, head count or norm epsilon"
    ),
    _spec(
        "graph",
        "graph_checks",
        "both graphs, node by node, against what the export makes of the configuration",
        "a wrong wire, a residual from the wrong side of a norm, swapped layers, a cache of another layer, an operator "
        "too many, a function or a second tensor behind a known name",
    ),
    _spec(
        "attributes",
        "graph_checks",
        "heads, scale, rotary flags, window, softcap and epsilon of every node",
        "an epsilon of 1e-3 in one layer, a scale off by 2 %, an interleaved rotary embedding, a window of 512",
    ),
    _spec(
        "rotary_tables",
        "graph_checks",
        "cosine and sine row by row against transformers' frequencies in fp64",
        "a rope base off by 0.01 %, rotary scaling left out beyond the original context",
    ),
    _spec(
        "weights",
        "weights",
        "every checkpoint tensor where the graph reads it, bit for bit after the cast, or inside the quantiser's bound",
        "another fine-tune's file, swapped rows, one zeroed row, int4 under a claimed fp16",
    ),
    _spec(
        "tokenizer",
        "text_checks",
        "its parts and settings, added tokens, the ids of many texts and the way back",
        "a wrong merge",
    ),
    _spec(
        "chat_template",
        "text_checks",
        "what the template makes of three conversations, and the template itself (comments aside)",
        "a template of another model, or one that answers otherwise to one word",
    ),
    _spec(
        "special_ids",
        "text_checks",
        "bos, eos, pad, unk, added tokens; end tokens of the manifest; genai_config.json",
        "a missing end token, sampling or another graph in genai_config.json",
    ),
    _spec("generation_config", "text_checks", "generation_config.json", "another temperature, a lost end token"),
    _spec(
        "prefill_logits",
        "numeric",
        "the decode graph's prefill at five lengths against the baseline",
        "a decode graph that is not the scoring graph's model, temperature in the graph",
        kind="numeric",
    ),
    _spec(
        "decode_steps",
        "numeric",
        "36 steps over the cache against one pass of the baseline",
        "a cache that is not updated, or written one position off",
        kind="numeric",
    ),
    _spec(
        "batch_rows",
        "numeric",
        "every row of uneven batches in three orders, prefill and two steps",
        "lengths taken from row 0, pad tokens attended to",
        kind="numeric",
    ),
    _spec(
        "determinism", "numeric", "the same prompt and step twice", "reads of memory that nobody wrote", kind="numeric"
    ),
    _spec(
        "chunked_prefill",
        "numeric",
        "a prompt in three chunks over the cache",
        "positions that start again at 0",
        kind="numeric",
    ),
    _spec(
        "long_context",
        "numeric",
        "16 tokens at the end, in the middle and around the original rope context",
        "a past cut at 512, rotary scaling ignored",
        kind="numeric",
    ),
    _spec(
        "perplexity_ratio", "numeric", "teacher-forced perplexity over the baseline's", "coarse damage", kind="numeric"
    ),
    _spec(
        "mean_kld", "numeric", "mean KL divergence of next-token distributions", "most numeric defects", kind="numeric"
    ),
    _spec(
        "tail_kld", "numeric", "99.9 % quantile of the KL divergence", "damage to rare tokens or places", kind="numeric"
    ),
    _spec(
        "top1_agreement",
        "numeric",
        "share of tokens where both sides put the same one first",
        "what greedy decoding shows",
        kind="numeric",
    ),
    _spec(
        "null_ratio",
        "numeric",
        "loss over what PyTorch itself loses in fp16 or bf16",
        "fp16 worse than it has to be",
        kind="numeric",
    ),
    _spec(
        "greedy", "generation", "greedy generations equal token for token", "what a user reads first", kind="generation"
    ),
    _spec(
        "length_band", "generation", "length of the outputs over the baseline's", "answers cut short", kind="generation"
    ),
    _spec("end_token", "generation", "generations that end by themselves", "a lost end token", kind="generation"),
    _spec(
        "tasks", "generation", "BLEU, ROUGE-1/2/L, exact match and F1 on four tasks", "worse answers", kind="generation"
    ),
)
BY_NAME = {c.name: c for c in CHECKS}
