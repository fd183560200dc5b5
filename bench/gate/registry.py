"""The named checks in the order in which they run: cheap and exact first, so that they name a defect first; then those
that ask one graph side by side, because each is opened anew in the other's place.

Try: ``llama-onnx validate --list-checks``.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.gate import judge
from bench.gate.checks import generation, graph, numeric, tensorrt, text, weights
from bench.gate.found import CheckSpec, Found
from bench.gate.subject import Subject

Run = Callable[[Subject], Found]


def _exact(run: Run, looks_at: str, catches: str, may_abstain: bool = False, target: str = "") -> CheckSpec:
    return CheckSpec(run.__name__, "exact", looks_at, catches, run, may_abstain=may_abstain, target=target)


def _places(run: Run, looks_at: str, catches: str) -> CheckSpec:
    return CheckSpec(run.__name__, "numeric", looks_at, catches, run, numeric.PLACES[run.__name__])


def _tokens(name: str, looks_at: str, catches: str) -> CheckSpec:
    return CheckSpec(name, "numeric", looks_at, catches, numeric.tokens(name), judge.tokens(name))


def _generated(by: judge.Judge, looks_at: str, catches: str) -> CheckSpec:
    return CheckSpec(by.__name__, "generation", looks_at, catches, generation.judged(by), by)


CHECKS: tuple[CheckSpec, ...] = (
    _exact(
        graph.files,
        "size and SHA-256 of every file, paths, operators that may not be trusted, graphs that nothing else looks at",
        "a flipped byte, a file of another export, a link out of the folder, another model under the usual name",
        may_abstain=True,
    ),
    _exact(
        graph.manifest,
        "the manifest's claims against the baseline's configuration and what --expect names",
        "another context length, end token, cache layout, a precision that was not asked for",
    ),
    _exact(
        text.config,
        "config.json against the baseline's",
        "a changed rope base, head count or norm epsilon",
        may_abstain=True,
    ),
    _exact(
        graph.graph,
        "both graphs, node by node, against what the export makes of the configuration",
        "a wrong wire, a residual from the wrong side of a norm, swapped layers, a cache of another layer, an operator "
        "too many, a function, or a second tensor of a known name",
        may_abstain=True,
    ),
    _exact(
        graph.attributes,
        "heads, scale, rotary flags, window, softcap and epsilon of every node",
        "an epsilon of 1e-3 in one layer, a scale off by 2 %, an interleaved rotary embedding, a window of 512",
        may_abstain=True,
    ),
    _exact(
        graph.rotary_tables,
        "cosine and sine row by row against transformers' frequencies in fp64",
        "a rope base off by 0.01 %, rotary scaling left out beyond the original context",
        may_abstain=True,
    ),
    _exact(
        weights.weights,
        "every checkpoint tensor where the graph reads it, bit for bit after the cast, or inside the quantiser's bound",
        "another fine-tune's file, swapped rows, one zeroed row, int4 under a claimed fp16",
        may_abstain=True,
    ),
    _exact(
        text.tokenizer, "its parts and settings, added tokens, the ids of many texts and the way back", "a wrong merge"
    ),
    _exact(
        text.chat_template,
        "what the template makes of three conversations, and the template itself (comments aside)",
        "a template of another model, or one that answers otherwise to one word",
        may_abstain=True,
    ),
    _exact(
        text.special_ids,
        "bos, eos, pad, unk, added tokens; end tokens of the manifest; genai_config.json",
        "a missing end token, sampling or another graph in genai_config.json",
    ),
    _exact(text.generation_config, "generation_config.json", "another temperature, a lost end token", may_abstain=True),
    _exact(
        tensorrt.tensorrt_compile,
        "what TensorRT-RTX's own parser and compiler make of the graphs, layer by layer (--target tensorrt only)",
        "an operator that TensorRT lacks, a cache that is copied, an attention pulled apart, an input that it ignores",
        may_abstain=True,
        target="tensorrt",
    ),
    _places(
        numeric.prefill_logits,
        "the decode graph's prefill at several lengths against the baseline",
        "a decode graph that is not the scoring graph's model, temperature in the graph",
    ),
    _places(
        numeric.decode_steps,
        "steps over the cache against one pass of the baseline",
        "a cache that is not updated, or written one position off",
    ),
    _places(
        numeric.batch_rows,
        "every row of uneven batches, prefill and two steps",
        "lengths taken from row 0, pad tokens attended to",
    ),
    CheckSpec(
        "determinism",
        "numeric",
        "the same prompt and step twice",
        "reads of memory that nobody wrote",
        numeric.determinism,
    ),
    _places(numeric.chunked_prefill, "prompts in three chunks over the cache", "positions that start again at 0"),
    _places(
        numeric.long_context,
        "16 tokens at the end, in the middle and around the original rope context",
        "a past cut at 512, rotary scaling ignored",
    ),
    _tokens("perplexity_ratio", "teacher-forced perplexity over the baseline's", "coarse damage"),
    _tokens("mean_kld", "mean KL divergence of next-token distributions", "most numeric defects"),
    _tokens("tail_kld", "99.9 % quantile of the KL divergence", "damage to rare tokens or places"),
    _tokens("top1_agreement", "share of tokens where both sides put the same one first", "what greedy decoding shows"),
    _tokens("null_ratio", "loss over what PyTorch itself loses in fp16 or bf16", "fp16 worse than it has to be"),
    _generated(judge.greedy, "greedy generations equal token for token", "what a user reads first"),
    _generated(judge.length_band, "length of the outputs over the baseline's", "answers cut short"),
    _generated(judge.end_token, "generations that end by themselves", "a lost end token"),
    CheckSpec(
        "tasks",
        "generation",
        "BLEU, ROUGE-1/2/L, exact match and F1 on four tasks",
        "worse answers",
        generation.tasks,
        judge.tasks,
    ),
)


def checks_of(target: str) -> tuple[CheckSpec, ...]:
    """The checks that concern folders of a target."""
    return tuple(c for c in CHECKS if c.target in ("", target))


BY_NAME = {c.name: c for c in CHECKS}
