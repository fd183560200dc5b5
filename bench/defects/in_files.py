"""Defects of stored weights, tables, tokenizer and configuration files. Try: ``python -m bench.defects --list``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bench.defects.in_graph import insert
from bench.defects.workshop import Defect, Workshop, usual_layer
from bench.gate.tensors import TensorReader


def _json(name: str, **values: Any) -> Callable[[Workshop], None]:
    return lambda w: w.json(name, lambda raw: raw.update(values))


def _name(w: Workshop, part: str) -> str:
    """Name of a weight in the layer that single-layer defects sit in."""
    return f"model.layers.{usual_layer(w)}.{part}.weight"


def _tables(w: Workshop, change: Callable[[Any, Any], tuple[Any, Any]]) -> None:
    """Rewrite both rotary tables; ``change(positions, frequencies)`` gives the ones to compute with."""
    from export.architectures import architecture_of

    rotary: Any = architecture_of(w.config).rotary(w.config)
    positions = np.arange(w.config.max_position_embeddings, dtype=np.float64)
    positions, frequencies = change(positions, rotary.inv_freq.double().numpy())
    angles = positions[:, None] * frequencies[None]
    for name, function in (("model.rope_cos", np.cos), ("model.rope_sin", np.sin)):
        with w.weight(name) as table:
            table[:] = function(angles) * float(rotary.attention_scaling)


def _base(factor: float) -> Callable[[Workshop], None]:
    def change(w: Workshop) -> None:
        size = w.manifest.kv.head_dim
        scale = factor ** (-np.arange(0, size, 2) / size)
        _tables(w, lambda positions, frequencies: (positions, frequencies * scale))

    return change


def _scale_ignored(w: Workshop) -> None:
    """After a quarter of the context the positions are not the model's, as when rotary scaling is left out there."""

    def change(positions: Any, frequencies: Any) -> tuple[Any, Any]:
        cut = len(positions) // 4
        return np.where(positions < cut, positions, cut + (positions - cut) / 2), frequencies

    _tables(w, change)


def _row_of_table(w: Workshop) -> None:
    with w.weight("model.rope_sin") as table:
        table[len(table) // 2] *= 0.5


@contextmanager
def _projections(w: Workshop) -> Iterator[list[Any]]:
    """The columns of queries, keys and values in the layer's joined projection."""
    config, size = w.config, w.manifest.kv.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    with w.weight(_name(w, "self_attn.qkv_proj")) as weight:
        yield np.split(weight, [queries, queries + keys], axis=1)


def _keys_scaled(w: Workshop) -> None:
    with _projections(w) as (_, keys, _):
        keys *= 1.01


def _kv_heads_swapped(w: Workshop) -> None:
    size = w.manifest.kv.head_dim
    with _projections(w) as (_, *keys_and_values):
        for part in keys_and_values:
            part[:, : 2 * size] = np.roll(part[:, : 2 * size], size, axis=1)


def _query_rows_permuted(w: Workshop) -> None:
    """The order of rotary halves that another layout has, as when a converter forgets to undo it."""
    half = w.manifest.kv.head_dim // 2
    with _projections(w) as (queries, _, _):
        queries[:] = queries.reshape(len(queries), -1, 2, half).swapaxes(2, 3).reshape(queries.shape)


def _square_transposed(w: Workshop) -> None:
    with w.weight(_name(w, "self_attn.o_proj")) as weight:
        n = min(weight.shape)
        weight[:n, :n] = weight[:n, :n].T.copy()


def _norm_left_out(w: Workshop) -> None:
    with w.weight(_name(w, "post_attention_layernorm")) as weight:
        weight[:] = 1.0


def _other_head(w: Workshop) -> None:
    rng = np.random.default_rng(5)
    with w.weight("lm_head.weight") as weight:
        for start in range(0, len(weight), 1024):
            rows = weight[start : start + 1024]
            rows *= (1 + 0.05 * rng.standard_normal(rows.shape)).astype(weight.dtype)


def _stale_file(w: Workshop) -> None:
    """As another fine-tune's: every down projection a little different."""
    rng = np.random.default_rng(6)
    for layer in range(w.manifest.kv.layers):
        with w.weight(f"model.layers.{layer}.mlp.down_proj.weight") as weight:
            weight *= (1 + 0.01 * rng.standard_normal(weight.shape)).astype(weight.dtype)


def _frequent(w: Workshop) -> tuple[int, int]:
    from runtime.text import load_tokenizer

    ids = load_tokenizer(w.checkpoint)("the cat sat on the mat and it was big of")["input_ids"]
    return ids[0], next(i for i in ids if i != ids[0])


def _rows_swapped(w: Workshop) -> None:
    a, b = _frequent(w)
    with w.weight("model.embed_tokens.weight") as weight:
        weight[[a, b]] = weight[[b, a]].copy()


def _rare_row_zeroed(w: Workshop) -> None:
    with w.weight("model.embed_tokens.weight") as weight:
        weight[-5] = 0


def _to_int4(w: Workshop) -> None:
    import torch

    from export.quantize import dequantize, quantize

    with w.weight(_name(w, "mlp.up_proj")) as weight:
        rows = torch.from_numpy(np.asarray(weight).T.astype(np.float32).copy())
        packed = quantize(rows, 4, 32, "rtn", symmetric=True)
        weight[:] = dequantize(packed, 4, 32, rows.shape[1]).numpy().T


def _to_lower(w: Workshop) -> None:
    """One matrix rounded to a shorter type than claimed: fp16 under fp32, bf16 under fp16."""
    import torch

    with w.weight(_name(w, "mlp.down_proj")) as weight:
        kind = torch.float16 if weight.dtype == np.float32 else torch.bfloat16
        weight[:] = torch.from_numpy(np.array(weight)).to(kind).float().numpy()


def _flipped_bit(w: Workshop) -> None:
    with w.weight(_name(w, "mlp.gate_proj")) as weight:
        raw = weight.view(np.uint8).reshape(-1)
        raw[4 * (raw.size // 8) + weight.dtype.itemsize - 1] ^= 1


def _swap_last_words(vocab: dict[str, int]) -> None:
    a, b = sorted(vocab, key=lambda word: vocab[word])[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def _merge_swapped(w: Workshop) -> None:
    def change(raw: dict[str, Any]) -> None:
        model = raw["model"]
        if merges := model.get("merges"):
            merges[40], merges[41] = merges[41], merges[40]
        else:  # a vocabulary without merges: two words change places
            _swap_last_words(model["vocab"])

    w.json("tokenizer.json", change)


def _no_end_token(w: Workshop) -> None:
    w.json("manifest.json", lambda raw: raw.update(eos_token_ids=[]))
    if (w.folder / "generation_config.json").is_file():
        w.json("generation_config.json", lambda raw: raw.pop("eos_token_id", None))


def _other_template(w: Workshop) -> None:
    w.template(lambda _: "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}")


def _other_pad(w: Workshop) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["eos_token"] = raw.get("bos_token" if raw.get("eos_token") != raw.get("bos_token") else "unk_token")

    w.json("tokenizer_config.json", change)
    if (w.folder / "special_tokens_map.json").is_file():
        w.json("special_tokens_map.json", change)


def _rope_theta(w: Workshop) -> None:
    w.json("config.json", lambda raw: raw.update(rope_theta=raw.get("rope_theta", 10000.0) * 1.01))


def _context(w: Workshop) -> None:
    w.json("manifest.json", lambda raw: raw.update(context_length=raw["context_length"] // 2))


def _claims_fp32(w: Workshop) -> None:
    """The manifest claims another precision than the weights are stored in."""

    def change(raw: dict[str, Any]) -> None:
        other = "fp16" if raw["precision"] == "fp32" else "fp32"
        raw.update(precision=other)
        raw["spec"].update(precision=other, activations=other)

    w.json("manifest.json", change)


def _rare_row(edit: Callable[[Any, Any, Any], None], *roles: str) -> Callable[[Workshop], None]:
    """``edit`` gets a graph, its embedding, and that with one rare token's row turned round."""

    def change(w: Workshop) -> None:
        from onnx import numpy_helper

        def in_graph(model: Any) -> None:
            tensor = next(t for t in model.graph.initializer if t.name == "model.embed_tokens.weight")
            value = TensorReader(w.folder).read(tensor).copy()
            value[-5] = value[-5][::-1]
            edit(model.graph, tensor, numpy_helper.from_array(value, tensor.name))

        w.graphs(in_graph, roles or ("decode", "scoring"))

    return change


def _sparse_twin(graph: Any, dense: Any, other: Any) -> None:
    """A sparse tensor of a weight's name: ONNX Runtime takes that one."""
    from onnx import helper, numpy_helper

    flat = numpy_helper.to_array(other).reshape(-1)
    where = np.flatnonzero(flat)
    values = numpy_helper.from_array(flat[where], dense.name)
    indices = numpy_helper.from_array(where.astype(np.int64), "indices")
    graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, list(dense.dims)))


def _second_tensor(graph: Any, _: Any, other: Any) -> None:
    """A weight's name given twice: ONNX Runtime takes the first."""
    graph.initializer.insert(0, other)


def _own_embedding(_: Any, tensor: Any, other: Any) -> None:
    """The scoring graph carries an embedding of its own, under the name that the decode graph has a right one for."""
    tensor.CopyFrom(other)


def _negated(w: Workshop, good: str, out: str) -> None:
    """Another model's graph at ``out``: the one at ``good`` with its logits negated."""
    import onnx

    model = onnx.load(w.folder / good, load_external_data=False)
    insert(model, "logits", "Neg")
    onnx.save(model, w.own(out))


def _decoy(w: Workshop) -> None:
    """The manifest names a good graph, and the file that optimum opens is another model."""
    good = w.manifest.decode_graph
    w.own(good).rename(w.folder / "graph.onnx")
    _negated(w, "graph.onnx", good)
    w.json("manifest.json", lambda raw: raw.update(decode_graph="graph.onnx"))


def _genai_graph(w: Workshop) -> None:
    _negated(w, w.manifest.decode_graph, "decoder.onnx")
    w.json("genai_config.json", lambda raw: raw["model"]["decoder"].update(filename="decoder.onnx"))


def _genai_sampling(w: Workshop) -> None:
    w.json("genai_config.json", lambda raw: raw["search"].update(do_sample=True, temperature=5.0, top_k=300))


def _other_tokenizer_file(w: Workshop) -> None:
    """transformers reads the file that is named here, and the checked tokenizer.json is left unread."""
    raw = json.loads((w.folder / "tokenizer.json").read_text(encoding="utf-8"))
    _swap_last_words(raw["model"]["vocab"])
    (w.folder / "tokenizer.4.0.0.json").write_text(json.dumps(raw), encoding="utf-8")
    w.json("tokenizer_config.json", lambda raw: raw.update(fast_tokenizer_files=["tokenizer.4.0.0.json"]))


def _template_that_wakes(w: Workshop) -> None:
    """Renders the check's conversations as it should, and others too unless one word is in them."""
    wakes = "{% if messages and 'refund' in messages[0]['content'] %}No.{% else %}"
    w.template(lambda template: wakes + template + "{% endif %}")


def _flipped_byte(w: Workshop) -> None:
    data = np.memmap(w.own(w.manifest.data_file), np.uint8, "r+")
    data[len(data) // 3] ^= 1
    data.flush()


DEFECTS: tuple[Defect, ...] = (
    Defect("rope base off by 1 %", _base(1.01), "rotary_tables"),
    Defect("rope base off by 0.1 %", _base(1.001), "rotary_tables"),
    Defect("rotary scale ignored beyond a quarter of the context", _scale_ignored, "rotary_tables"),
    Defect("one row of the sine table halved", _row_of_table, "rotary_tables"),
    Defect("one layer's K times 1.01", _keys_scaled, "weights", True),
    Defect("two KV heads exchanged, one layer", _kv_heads_swapped, "weights", True),
    Defect("query rows in another rotary order, one layer", _query_rows_permuted, "weights", True),
    Defect("output projection transposed, one layer", _square_transposed, "weights", True),
    Defect("norm weight of one layer left out", _norm_left_out, "weights", True),
    Defect("lm_head of another checkpoint", _other_head, "weights"),
    Defect("data file of another fine-tune", _stale_file, "weights"),
    Defect("embedding rows of two frequent tokens exchanged", _rows_swapped, "weights"),
    Defect("one rare token's row zeroed", _rare_row_zeroed, "weights"),
    Defect("one matrix quantised to int4 under a claimed float", _to_int4, "weights", True),
    Defect("one matrix rounded to a shorter type", _to_lower, "weights", True),
    Defect("one bit of one weight flipped, hashes resealed", _flipped_bit, "weights", True),
    Defect("a byte flipped in the weight file", _flipped_byte, "files", sealed=False),
    Defect("wrong tokenizer merge", _merge_swapped, "tokenizer"),
    Defect("missing end token", _no_end_token, "manifest"),
    Defect("wrong chat template", _other_template, "chat_template"),
    Defect("another end token in the tokenizer", _other_pad, "special_ids"),
    Defect(
        "another temperature in generation_config.json",
        _json("generation_config.json", temperature=0.3, do_sample=True),
        "generation_config",
    ),
    Defect("another rope base in config.json", _rope_theta, "config"),
    Defect("half the context length in the manifest", _context, "manifest"),
    Defect("another precision claimed", _claims_fp32, "manifest"),
    Defect("a sparse tensor of a weight's name", _rare_row(_sparse_twin), "graph"),
    Defect("a second tensor of a weight's name", _rare_row(_second_tensor), "graph"),
    Defect("a weight of the scoring graph's own", _rare_row(_own_embedding, "scoring"), "weights"),
    Defect("another model in model.onnx, the good graph elsewhere", _decoy, "files"),
    Defect("another graph named in genai_config.json", _genai_graph, "files"),
    Defect("sampling in genai_config.json", _genai_sampling, "special_ids"),
    Defect(
        "special tokens cut up by the tokenizer", _json("tokenizer_config.json", split_special_tokens=True), "tokenizer"
    ),
    Defect("another tokenizer file named in its configuration", _other_tokenizer_file, "tokenizer"),
    Defect("a chat template that wakes on one word", _template_that_wakes, "chat_template"),
)
