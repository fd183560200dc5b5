"""A decoder with fused operators, through optimum's own extension points: ONNX Runtime's, or opset 24's standard ones.

A subclass of optimum's ``LlamaOnnxConfig`` (:mod:`export.optimum_adapter`) brings its own model patcher. While it is
active, the decoder layers call ``torch.autograd.Function``s whose ``symbolic`` emits ONNX Runtime's fused operators
directly. No graph pattern is matched afterwards, so nothing can be missed silently; :mod:`export.check` counts all the
same.

The functions compute nothing (they return zeros of the right shape): only the trace matters, and the exported graph
is compared with the *unpatched* model. Linear layers become marker operators that :mod:`export.convert` turns into
``MatMul`` nodes over streamed weights.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from export.architectures import architecture_of
from export.optimum_adapter import ModelPatcher, OnnxConfig
from export.spelling import cache_in, embeddings_in

MARKER_DOMAIN = "llama_onnx_bench"
MS = "com.microsoft"


def _hidden(value: Any, last: int) -> Any:
    """Type of a traced ``[batch, sequence, last]`` value: the leading axes are dynamic."""
    return value.type().with_sizes([None, None, last])


class _Linear(torch.autograd.Function):
    """``x @ W.T (+ b)`` for one or several weights side by side; a marker in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int, n_weights: int, *params: Tensor) -> Tensor:
        return x.new_zeros((*x.shape[:-1], out_features))

    @staticmethod
    def symbolic(g: Any, x: Any, out_features: int, n_weights: int, *params: Any) -> Any:
        out = g.op(f"{MARKER_DOMAIN}::Linear", x, *params, n_weights_i=n_weights)
        out.setType(_hidden(x, out_features))
        return out


def _absent(g: Any) -> Any:
    """An optional input that is not given."""
    none = g.op("prim::Constant")
    none.setType(torch._C.OptionalType.ofTensor())
    return none


@dataclass(frozen=True)
class _Heads:
    """The numbers of an attention.

    ``epsilon`` is of the QK norm (0: none), ``window`` counts tokens; ``evicts``: the cache is as long as it.
    """

    queries: int
    keys: int
    size: int
    scale: float
    window: int | None
    epsilon: float
    evicts: bool

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of the query, the key and the value."""
        return self.queries * self.size, self.keys * self.size, self.keys * self.size


def _constant(g: Any, *values: int) -> Any:
    return g.op("Constant", value_t=torch.tensor(values))


def _rms_norm(g: Any, x: Any, weight: Any, eps: float, standard: bool) -> Any:
    """RMSNorm of the last axis, the sum of squares in fp32: ONNX's operator, or ONNX Runtime's name for it."""
    operator = "RMSNormalization" if standard else "SimplifiedLayerNormalization"
    return g.op(operator, x, weight, axis_i=-1, epsilon_f=eps, stash_type_i=1)


def _split(g: Any, qkv: Any, heads: _Heads) -> list[Any]:
    """Query, key and value of packed QKV, head by head: ``[batch, new, heads, size]``."""
    parts = g.op("Split", qkv, _constant(g, *heads.widths), axis_i=-1, outputs=3)
    numbers = (heads.queries, heads.keys, heads.keys)
    return [g.op("Reshape", part, _constant(g, 0, -1, n, heads.size)) for part, n in zip(parts, numbers, strict=True)]


class _CachedAttention(torch.autograd.Function):
    """Attention over packed QKV ``[batch, new, ...]`` with rotary embedding inside: output, present key and value.

    ``rest`` holds the weights of the QK norm, None or ``[size]`` for queries and keys, then the
    operator's own inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: _Heads, qkv: Tensor, past_key: Tensor, past_value: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, new = qkv.shape[:2]
        shape = (batch, heads.keys, past_key.shape[2] + new, heads.size)
        key, value = (qkv.new_zeros(1).expand(shape) for _ in range(2))  # no memory for a long cache
        return qkv.new_zeros((batch, new, heads.widths[0])), key, value


def _cached(qkv: Any, past_key: Any, made: tuple[Any, Any, Any], heads: _Heads) -> Any:
    """The outputs of an attention with their types."""
    out, *presents = made
    out.setType(_hidden(qkv, heads.widths[0]))
    for present in presents:
        present.setType(past_key.type().with_sizes([None, heads.keys, None, heads.size]))
    return made


class _GroupQueryAttention(_CachedAttention):
    """com.microsoft::GroupQueryAttention; its own inputs: lengths, total length, cosine and sine tables.

    It takes the weights of the QK norm, too, but has no kernel for that on the CPU (1.32): the norms are
    nodes, which ONNX Runtime's optimiser may fold where the provider has one.
    """

    @staticmethod
    def symbolic(
        g: Any, heads: _Heads, qkv: Any, past_key: Any, past_value: Any, q_norm: Any, k_norm: Any, *inputs: Any
    ) -> Any:
        queries, keys, values = qkv, _absent(g), _absent(g)
        if heads.epsilon:
            q, k, v = _split(g, qkv, heads)
            normed = [_rms_norm(g, x, w, heads.epsilon, standard=False) for x, w in ((q, q_norm), (k, k_norm))]
            queries, keys, values = (
                g.op("Reshape", x, _constant(g, 0, -1, width))
                for x, width in zip((*normed, v), heads.widths, strict=True)
            )
        window = {} if heads.window is None else {"local_window_size_i": heads.window}
        window |= {"sliding_window_cache_i": 1} if heads.evicts else {}
        made = g.op(
            f"{MS}::GroupQueryAttention",
            *(queries, keys, values, past_key, past_value, *inputs),
            num_heads_i=heads.queries,
            kv_num_heads_i=heads.keys,
            scale_f=heads.scale,
            do_rotary_i=1,
            rotary_interleaved_i=0,
            **window,
            outputs=3,
        )
        return _cached(qkv, past_key, made, heads)


class _StandardAttention(_CachedAttention):
    """``RotaryEmbedding``, ``Attention`` and opset 24's ``TensorScatter``, which writes into the KV cache in place.

    Its own inputs: mask, write indices, cosine and sine tables, positions. TensorRT's parser takes an ``Attention`` of
    one output and without ``past_key``; it ignores ``nonpad_kv_seqlen``, so the mask says everything.
    """

    @staticmethod
    def symbolic(
        g: Any, heads: _Heads, qkv: Any, past_key: Any, past_value: Any, q_norm: Any, k_norm: Any, *inputs: Any
    ) -> Any:
        mask, write_indices, cos, sin, position_ids = inputs
        q, k, v = _split(g, qkv, heads)
        if heads.epsilon:
            q, k = (_rms_norm(g, x, w, heads.epsilon, standard=True) for x, w in ((q, q_norm), (k, k_norm)))
        q, k, v = (g.op("Transpose", x, perm_i=[0, 2, 1, 3]) for x in (q, k, v))
        q, k = (g.op("RotaryEmbedding", x, cos, sin, position_ids, interleaved_i=0) for x in (q, k))
        key, value = (
            g.op("TensorScatter", old, new, write_indices, axis_i=2) for old, new in ((past_key, k), (past_value, v))
        )
        y = g.op("Attention", q, key, value, mask, scale_f=heads.scale)
        flat = _constant(g, 0, -1, heads.widths[0])
        out = g.op("Reshape", g.op("Transpose", y, perm_i=[0, 2, 1, 3]), flat)
        return _cached(qkv, past_key, (out, key, value), heads)


class _RMSNorm(torch.autograd.Function):
    """``x / rms(x) * w``; see :func:`_rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, standard: bool) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def symbolic(g: Any, x: Any, weight: Any, eps: float, standard: bool) -> Any:
        out = _rms_norm(g, x, weight, eps, standard)
        out.setType(_hidden(x, weight.type().sizes()[0]))
        return out


class _SkipRMSNorm(torch.autograd.Function):
    """SkipSimplifiedLayerNormalization: the residual add and the norm that follows it, in one operator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), torch.zeros_like(x)

    @staticmethod
    def symbolic(g: Any, x: Any, skip: Any, weight: Any, eps: float) -> Any:
        # outputs: normalised, mean, inverse std (both unused), x + skip
        out, _, _, total = g.op(f"{MS}::SkipSimplifiedLayerNormalization", x, skip, weight, epsilon_f=eps, outputs=4)
        for value in (out, total):
            value.setType(_hidden(x, weight.type().sizes()[0]))
        return out, total


def _linear(x: Tensor, *layers: nn.Linear) -> Tensor:
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    out: Tensor = _Linear.apply(x, sum(layer.out_features for layer in layers), len(layers), *weights, *biases)
    return out


def _heads(attention: Any, window: int | None, evicts: bool) -> _Heads:
    """The numbers of transformers' attention module."""
    norm = getattr(attention, "q_norm", None)
    return _Heads(
        attention.config.num_attention_heads,
        attention.config.num_key_value_heads,
        attention.head_dim,
        float(attention.scaling),
        window,
        norm.variance_epsilon if norm is not None else 0.0,
        evicts and window is not None,
    )


def _attention(self: Any, x: Tensor, mask: tuple[Tensor, ...], rope: tuple[Tensor, ...], cache: Any) -> Tensor:
    layer = cache.layers[self.layer_idx]
    qkv = _linear(x, self.q_proj, self.k_proj, self.v_proj)
    norms = [self.q_norm.weight, self.k_norm.weight] if self.heads.epsilon else [None, None]
    operator = _StandardAttention if len(rope) == 3 else _GroupQueryAttention
    out, layer.keys, layer.values = operator.apply(self.heads, qkv, layer.keys, layer.values, *norms, *mask, *rope)
    return _linear(out, self.o_proj)


def _norm(norm: Any, x: Tensor | tuple[Tensor, Tensor], standard: bool) -> tuple[Tensor, Tensor]:
    """Normalise a plain tensor or a (branch, residual) pair; returns (normalised, new residual)."""
    if isinstance(x, tuple) and not standard:
        out: tuple[Tensor, Tensor] = _SkipRMSNorm.apply(*x, norm.weight, norm.variance_epsilon)
        return out
    total = x[0] + x[1] if isinstance(x, tuple) else x
    return _RMSNorm.apply(total, norm.weight, norm.variance_epsilon, standard), total


def _decoder_layer(
    self: Any,
    hidden_states: Tensor | tuple[Tensor, Tensor],
    attention_mask: tuple[Tensor, ...],
    position_embeddings: tuple[Tensor, ...],
    **given: Any,
) -> tuple[Tensor, Tensor]:
    standard = len(position_embeddings) == 3
    x, residual = _norm(self.input_layernorm, hidden_states, standard)
    x = _attention(self.self_attn, x, attention_mask, position_embeddings, cache_in(given))
    x, residual = _norm(self.post_attention_layernorm, (x, residual), standard)
    gate = self.mlp.act_fn(_linear(x, self.mlp.gate_proj))
    return _linear(gate * _linear(x, self.mlp.up_proj), self.mlp.down_proj), residual


class FusedPatcher(ModelPatcher):  # type: ignore[misc]
    """Replaces what a decoder computes by fused operators while ``with`` is active; restores everything after."""

    def __init__(self, config: Any, model: Any, model_kwargs: dict[str, Any] | None = None) -> None:
        # The exporter would trace the default 0 as a tensor, which the model's forward reads as an index.
        super().__init__(config, model, {**(model_kwargs or {}), "logits_to_keep": 0})

    def __enter__(self) -> None:
        super().__enter__()
        model = self._model.model
        last_only = self.real_config.last_logits
        hidden_size = int(self._model.config.hidden_size)
        standard = self.real_config.attention == "Attention"
        guarded = self.real_config.guarded
        seen: dict[str, Tensor] = {}

        def mask_to_lengths(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
            one: Any = _LeftPaddingGuard.apply(attention_mask) if guarded else 1
            lengths = (attention_mask.sum(dim=1) - one).to(torch.int32)
            total = torch._shape_as_tensor(attention_mask)[1].to(torch.int32)
            seen["lengths"] = lengths
            return lengths, total

        slots = torch.arange(self.real_config.cache_length) if standard else torch.empty(0)

        def slot_mask(window: int | None, attention_mask: Tensor, input_embeds: Tensor) -> tuple[Tensor, Tensor]:
            first = seen["write_indices"]
            new: Any = torch._shape_as_tensor(input_embeds)[1]
            last = first[:, None] + torch.arange(new)  # the slot of each new token, [batch, new]
            own = last[:, None, :, None]
            allowed = (slots <= own) & attention_mask.to(torch.bool)[:, None, None]
            if window is not None:
                allowed = allowed & (slots >= own - (window - 1))
            # Half of the least number: a query that may see nothing (left padding) must not become NaN.
            low = torch.full((), torch.finfo(input_embeds.dtype).min / 2, dtype=input_embeds.dtype)
            if "last" not in seen:
                seen["last"] = (attention_mask * slots).amax(dim=1) - first
            return torch.where(allowed, torch.zeros((), dtype=input_embeds.dtype), low), first

        def final_norm(_self: Any, hidden: tuple[Tensor, Tensor]) -> Tensor:
            out, _residual = _norm(_self, hidden, standard)
            if not last_only:
                return out
            if standard:
                index = seen["last"].reshape(-1, 1)
            else:
                # Last valid position of each row: `lengths` on a first prompt, 0 for a single new token, and the last
                # new one when a single row continues; min(lengths, new - 1) is all three.
                new = torch._shape_as_tensor(out)[1].to(torch.int32)
                index = torch.minimum(seen["lengths"], new - 1).to(torch.int64).reshape(-1, 1)
            last: Tensor = _TakePosition.apply(out, index, hidden_size)
            return last

        self._undo: list[tuple[Any, str, Any]] = []

        def patch(owner: Any, name: str, value: Any) -> None:
            self._undo.append((owner, name, owner.__dict__.get(name)))
            setattr(owner, name, value)

        def tables(_hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
            return (model.rope_cos, model.rope_sin, *((position_ids,) if standard else ()))

        masks: dict[int | None, tuple[Tensor, ...]] = {}
        architecture = architecture_of(self._model.config)
        window = architecture.attention_window(self._model.config)
        for name, tokens in (("create_causal_mask", None), ("create_sliding_window_causal_mask", window)):

            def mask(*, attention_mask: Tensor, tokens: int | None = tokens, **given: Any) -> tuple[Tensor, ...]:
                # GroupQueryAttention has its window as an attribute: its inputs are the same in every layer.
                key = tokens if standard else None
                if key not in masks:
                    masks[key] = (
                        slot_mask(tokens, attention_mask, embeddings_in(given))
                        if standard
                        else mask_to_lengths(attention_mask)
                    )
                return masks[key]

            if hasattr(architecture.modeling, name):
                patch(architecture.modeling, name, mask)
        if standard:
            forward = self._model.forward

            def with_write_indices(
                input_ids: Tensor,
                attention_mask: Tensor,
                position_ids: Tensor,
                write_indices: Tensor,
                past_key_values: Any,
            ) -> Any:
                seen["write_indices"] = write_indices
                return forward(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                )

            patch(self._model, "forward", with_write_indices)
        patch(model.rotary_emb, "forward", tables)
        windows = architecture.windows(self._model.config)
        for layer, own in zip(model.layers, windows, strict=True):
            patch(layer.self_attn, "heads", _heads(layer.self_attn, own, self.real_config.window_cache and last_only))
            patch(layer, "forward", types.MethodType(_decoder_layer, layer))
        patch(model.norm, "forward", types.MethodType(final_norm, model.norm))
        patch(self._model.lm_head, "forward", lambda x: _linear(x, self._model.lm_head))

    def __exit__(self, *exc: Any) -> None:
        for owner, name, value in reversed(self._undo):
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        super().__exit__(*exc)


class _LeftPaddingGuard(torch.autograd.Function):
    """1 for each row ``[batch]``, computed so that a row padded on the left makes ONNX Runtime stop.

    The first valid position must be 0: a table of one element has no other index. GroupQueryAttention itself would
    give wrong logits without a word.
    """

    @staticmethod
    def forward(ctx: Any, mask: Tensor) -> Tensor:
        return mask[:, 0]

    @staticmethod
    def symbolic(g: Any, mask: Any) -> Any:
        table = _constant(g, 1)
        out = g.op("Gather", table, g.op("ArgMax", mask, axis_i=1, keepdims_i=0), axis_i=0)
        out.setType(mask.type().with_sizes([None]))
        return out


class _TakePosition(torch.autograd.Function):
    """``x[b, index[b]]`` as one GatherND, result ``[batch, 1, hidden]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, hidden: int) -> Tensor:
        return x[:, :1]

    @staticmethod
    def symbolic(g: Any, x: Any, index: Any, hidden: int) -> Any:
        # Indices [B, 1, 1] with one batch axis pick [B, 1, H].
        index3 = g.op("Unsqueeze", index, _constant(g, 2))
        out = g.op("GatherND", x, index3, batch_dims_i=1)
        out.setType(x.type().with_sizes([None, 1, hidden]))
        return out


class FusedOnnxConfig(OnnxConfig):  # type: ignore[misc]
    """The export configuration of the fused graph of every architecture that has one.

    GroupQueryAttention derives positions from the mask, so there is no ``position_ids``; the standard operators take
    it, and ``write_indices``, the slots of the first new tokens. Past and present lengths are independent axes for
    GroupQueryAttention (a preallocated buffer is longer than the tokens in it); the standard operators' cache, and the
    mask over it, is ``cache_length`` slots long, as TensorRT demands.
    ``last_logits`` chooses between logits ``[batch, 1, vocab]`` of the last valid position and
    ``[batch, sequence, vocab]`` of all. With ``window_cache`` the former drops keys that no window reaches any more;
    the latter, which is for whole texts, does not. ``guarded`` makes left-padded batches an error of the graph.
    """

    _MODEL_PATCHER = FusedPatcher
    last_logits = True
    attention = "GroupQueryAttention"
    guarded = True
    cache_length = 0
    window_cache = False

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Input names with their dynamic axes, in graph order."""
        standard = self.attention == "Attention"
        names = {
            "input_ids": {0: "batch_size", 1: "sequence_length"},
            "attention_mask": {0: "batch_size"} if standard else {0: "batch_size", 1: "total_sequence_length"},
        }
        if standard:
            names["position_ids"] = {0: "batch_size", 1: "sequence_length"}
            names["write_indices"] = {0: "batch_size"}
        return names | self._cache("past_key_values", "past_sequence_length")

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Output names with their dynamic axes, in graph order."""
        logits = {0: "batch_size"} if self.last_logits else {0: "batch_size", 1: "sequence_length"}
        return {"logits": logits} | self._cache("present", "total_sequence_length")

    def _cache(self, prefix: str, length: str) -> dict[str, dict[int, str]]:
        axes = {0: "batch_size"} if self.attention == "Attention" else {0: "batch_size", 2: length}
        return {
            f"{prefix}.{i}.{kind}": axes for i in range(self._config.num_hidden_layers) for kind in ("key", "value")
        }
