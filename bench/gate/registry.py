"""The named checks in the order in which they run: cheap and exact first, so that they name a defect first; then those
that ask one graph side by side, because each is opened anew in the other's place.

Try: ``llama-onnx validate --list-checks``.
"""

from __future__ import annotations

from bench.gate import judge
from bench.gate.checks import generation, graph, numeric, text, weights
from bench.gate.found import CheckSpec

CHECKS: tuple[CheckSpec, ...] = (
    CheckSpec(
        "files",
        "exact",
        "size and SHA-256 of every file, paths, operators that may not be trusted, graphs that nothing else looks at",
        "a flipped byte, a file of another export, a link out of the folder, another model under the usual name",
        graph.files,
    ),
    CheckSpec(
        "manifest",
        "exact",
        "the manifest's claims against the baseline's configuration and what --expect names",
        "another context length, end token, cache layout, a precision that was not asked for",
        graph.manifest,
    ),
    CheckSpec(
        "config",
        "exact",
        "config.json against the baseline's",
        "a changed rope base, head count or norm epsilon",
        text.config,
    ),
    CheckSpec(
        "graph",
        "exact",
        "both graphs, node by node, against what the export makes of the configuration",
        "a wrong wire, a residual from the wrong side of a norm, swapped layers, a cache of another layer, an operator "
        "too many, a function, or a second tensor of a known name",
        graph.graph,
    ),
    CheckSpec(
        "attributes",
        "exact",
        "heads, scale, rotary flags, window, softcap and epsilon of every node",
        "an epsilon of 1e-3 in one layer, a scale off by 2 %, an interleaved rotary embedding, a window of 512",
        graph.attributes,
    ),
    CheckSpec(
        "rotary_tables",
        "exact",
        "cosine and sine row by row against transformers' frequencies in fp64",
        "a rope base off by 0.01 %, rotary scaling left out beyond the original context",
        graph.rotary_tables,
    ),
    CheckSpec(
        "weights",
        "exact",
        "every checkpoint tensor where the graph reads it, bit for bit after the cast, or inside the quantiser's bound",
        "another fine-tune's file, swapped rows, one zeroed row, int4 under a claimed fp16",
        weights.weights,
    ),
    CheckSpec(
        "tokenizer",
        "exact",
        "its parts and settings, added tokens, the ids of many texts and the way back",
        "a wrong merge",
        text.tokenizer,
    ),
    CheckSpec(
        "chat_template",
        "exact",
        "what the template makes of three conversations, and the template itself (comments aside)",
        "a template of another model, or one that answers otherwise to one word",
        text.chat_template,
    ),
    CheckSpec(
        "special_ids",
        "exact",
        "bos, eos, pad, unk, added tokens; end tokens of the manifest; genai_config.json",
        "a missing end token, sampling or another graph in genai_config.json",
        text.special_ids,
    ),
    CheckSpec(
        "generation_config",
        "exact",
        "generation_config.json",
        "another temperature, a lost end token",
        text.generation_config,
    ),
    CheckSpec(
        "prefill_logits",
        "numeric",
        "the decode graph's prefill at five lengths against the baseline",
        "a decode graph that is not the scoring graph's model, temperature in the graph",
        numeric.prefill_logits,
        numeric.PLACES["prefill_logits"],
    ),
    CheckSpec(
        "decode_steps",
        "numeric",
        "36 steps over the cache against one pass of the baseline",
        "a cache that is not updated, or written one position off",
        numeric.decode_steps,
        numeric.PLACES["decode_steps"],
    ),
    CheckSpec(
        "batch_rows",
        "numeric",
        "every row of uneven batches in three orders, prefill and two steps",
        "lengths taken from row 0, pad tokens attended to",
        numeric.batch_rows,
        numeric.PLACES["batch_rows"],
    ),
    CheckSpec(
        "determinism",
        "numeric",
        "the same prompt and step twice",
        "reads of memory that nobody wrote",
        numeric.determinism,
    ),
    CheckSpec(
        "chunked_prefill",
        "numeric",
        "a prompt in three chunks over the cache",
        "positions that start again at 0",
        numeric.chunked_prefill,
        numeric.PLACES["chunked_prefill"],
    ),
    CheckSpec(
        "long_context",
        "numeric",
        "16 tokens at the end, in the middle and around the original rope context",
        "a past cut at 512, rotary scaling ignored",
        numeric.long_context,
        numeric.PLACES["long_context"],
    ),
    CheckSpec(
        "perplexity_ratio",
        "numeric",
        "teacher-forced perplexity over the baseline's",
        "coarse damage",
        numeric.perplexity_ratio,
        judge.tokens("perplexity_ratio"),
    ),
    CheckSpec(
        "mean_kld",
        "numeric",
        "mean KL divergence of next-token distributions",
        "most numeric defects",
        numeric.mean_kld,
        judge.tokens("mean_kld"),
    ),
    CheckSpec(
        "tail_kld",
        "numeric",
        "99.9 % quantile of the KL divergence",
        "damage to rare tokens or places",
        numeric.tail_kld,
        judge.tokens("tail_kld"),
    ),
    CheckSpec(
        "top1_agreement",
        "numeric",
        "share of tokens where both sides put the same one first",
        "what greedy decoding shows",
        numeric.top1_agreement,
        judge.tokens("top1_agreement"),
    ),
    CheckSpec(
        "null_ratio",
        "numeric",
        "loss over what PyTorch itself loses in fp16 or bf16",
        "fp16 worse than it has to be",
        numeric.null_ratio,
        judge.tokens("null_ratio"),
    ),
    CheckSpec(
        "greedy",
        "generation",
        "greedy generations equal token for token",
        "what a user reads first",
        generation.greedy,
        judge.greedy,
    ),
    CheckSpec(
        "length_band",
        "generation",
        "length of the outputs over the baseline's",
        "answers cut short",
        generation.length_band,
        judge.length_band,
    ),
    CheckSpec(
        "end_token",
        "generation",
        "generations that end by themselves",
        "a lost end token",
        generation.end_token,
        judge.end_token,
    ),
    CheckSpec(
        "tasks",
        "generation",
        "BLEU, ROUGE-1/2/L, exact match and F1 on four tasks",
        "worse answers",
        generation.tasks,
        judge.tasks,
    ),
)
BY_NAME = {c.name: c for c in CHECKS}
