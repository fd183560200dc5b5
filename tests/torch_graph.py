"""Our graphs in PyTorch, operator by operator: for types that ONNX Runtime's CPU provider does not run (bf16).

Written from the operators' specifications, not from ``export``. As strict about types as ONNX: nothing is promoted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from export.manifest import read_manifest
from runtime.session import Ids, right_pad

DTYPE = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
}


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Halves (not neighbours) of ``x`` [B, heads, S, D] as pairs; tables [B, S, D / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    c, s = cos.float()[:, None], sin.float()[:, None]
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Softmax attention in fp32, rounded at its end; each key head serves ``heads / kv_heads`` query heads in turn."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(groups, dim=1) for t in (k, v))
    return (torch.softmax(q.float() @ k.transpose(2, 3) * scale + bias.float(), dim=-1) @ v).to(q.dtype)


def group_query_attention(inputs: Sequence[Any], a: dict[str, Any]) -> tuple[Tensor, ...]:
    """com.microsoft::GroupQueryAttention: packed QKV, rotary inside, past as a buffer that may be longer than used."""
    qkv, none_k, none_v, past_key, past_value, lengths, total, cos, sin = inputs
    assert none_k is None
    assert none_v is None
    assert (a["do_rotary"], a["rotary_interleaved"]) == (1, 0)
    heads, kv_heads = a["num_heads"], a["kv_num_heads"]
    batch, new, width = qkv.shape
    dim = width // (heads + 2 * kv_heads)
    q, k, v = (
        t.view(batch, new, -1, dim).transpose(1, 2)
        for t in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    )
    capacity = max(past_key.shape[2], int(total))
    present = [qkv.new_zeros((batch, kv_heads, capacity, dim)) for _ in range(2)]
    out = torch.empty_like(q)
    for b in range(batch):
        before = 0 if new == int(total) else int(lengths[b]) + 1 - new
        place = torch.arange(before, before + new)
        row_q, row_k = (rotate(t[b : b + 1], cos[place][None], sin[place][None]) for t in (q, k))
        for mine, past, fresh in zip(present, (past_key, past_value), (row_k, v[b : b + 1]), strict=True):
            mine[b, :, :before] = past[b, :, :before]
            mine[b, :, before : before + new] = fresh[0]
        end = before + new
        hidden = torch.arange(end)[None] > place[:, None]
        bias = torch.zeros(new, end).masked_fill(hidden, -torch.inf)
        out[b] = attend(row_q, present[0][b : b + 1, :, :end], present[1][b : b + 1, :, :end], bias, a["scale"])[0]
    return out.transpose(1, 2).reshape(batch, new, -1), *present


def _node(op: str, x: Sequence[Any], a: dict[str, Any]) -> Any:
    match op:
        case "Add":
            return x[0] + x[1]
        case "And":
            return x[0] & x[1]
        case "ArgMax":
            assert not a["keepdims"]
            return x[0].argmax(a["axis"])
        case "Attention":
            return attend(x[0], x[1], x[2], x[3], a["scale"])
        case "Cast":
            return x[0].to(DTYPE[a["to"]])
        case "Concat":
            return torch.cat(list(x), a["axis"])
        case "Gather":
            axis = a.get("axis", 0)
            assert int(x[1].max()) < x[0].shape[axis], f"index {int(x[1].max())} in an axis of {x[0].shape[axis]}"
            picked = x[0].index_select(axis, x[1].reshape(-1))
            return picked.reshape((*x[0].shape[:axis], *x[1].shape, *x[0].shape[axis + 1 :]))
        case "GatherND":
            assert a["batch_dims"] == 1
            assert x[1].shape[-1] == 1
            return torch.stack([row[index[..., 0]] for row, index in zip(x[0], x[1], strict=True)])
        case "GroupQueryAttention":
            return group_query_attention(x, a)
        case "LessOrEqual":
            return x[0] <= x[1]
        case "MatMul":
            return x[0] @ x[1]
        case "Min":
            return torch.minimum(x[0], x[1])
        case "Mul":
            return x[0] * x[1]
        case "Range":
            return torch.arange(int(x[0]), int(x[1]), int(x[2]))
        case "ReduceMax":
            return x[0].amax(x[1].tolist(), keepdim=bool(a.get("keepdims", 1)))
        case "ReduceSum":
            return x[0].sum(x[1].tolist(), keepdim=bool(a.get("keepdims", 1)))
        case "Reshape":
            return x[0].reshape([x[0].shape[i] if n == 0 else n for i, n in enumerate(x[1].tolist())])
        case "RMSNormalization" | "SimplifiedLayerNormalization":
            assert (a["axis"], a["stash_type"]) == (-1, 1)
            return rms_norm(x[0], x[1], a["epsilon"])
        case "RotaryEmbedding":
            assert not a["interleaved"]
            return rotate(x[0], x[1][x[3]], x[2][x[3]])
        case "Shape":
            return torch.tensor(x[0].shape)
        case "Sigmoid":
            return x[0].sigmoid()
        case "SkipSimplifiedLayerNormalization":
            total = x[0] + x[1]
            return rms_norm(total, x[2], a["epsilon"]), None, None, total
        case "Split":
            return x[0].split(x[1].tolist(), a["axis"])
        case "Sub":
            return x[0] - x[1]
        case "TensorScatter":
            assert a["axis"] == 2
            out = x[0].clone()
            for row, new, at in zip(out, x[1], x[2].tolist(), strict=True):
                row[:, at : at + new.shape[1]] = new
            return out
        case "Transpose":
            return x[0].permute(a["perm"])
        case "Unsqueeze":
            for axis in sorted(x[1].tolist()):
                x = (x[0].unsqueeze(axis),)
            return x[0]
        case "Where":
            return torch.where(x[0], x[1], x[2])
    raise NotImplementedError(op)


class TorchGraph:
    """One graph of an exported folder."""

    def __init__(self, folder: Path, file: str) -> None:
        self.model = onnx.load(folder / file, load_external_data=False)
        self.values: dict[str, Tensor] = {}
        for tensor in self.model.graph.initializer:
            self.values[tensor.name] = self._initialiser(folder, tensor)

    @staticmethod
    def _initialiser(folder: Path, tensor: TensorProto) -> Tensor:
        if tensor.data_location != TensorProto.EXTERNAL:
            if tensor.data_type == TensorProto.BFLOAT16:  # numpy has no such type
                return torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.bfloat16).reshape(tuple(tensor.dims))
            return torch.from_numpy(numpy_helper.to_array(tensor).copy())
        place = {e.key: e.value for e in tensor.external_data}
        with (folder / place["location"]).open("rb") as f:
            f.seek(int(place["offset"]))
            raw = bytearray(f.read(int(place["length"])))
        return torch.frombuffer(raw, dtype=DTYPE[tensor.data_type]).reshape(tuple(tensor.dims))

    def run(self, feed: dict[str, Tensor]) -> dict[str, Tensor]:
        """All outputs by name; inputs and outputs must have the types that the graph declares."""
        for given in self.model.graph.input:
            assert feed[given.name].dtype == DTYPE[given.type.tensor_type.elem_type], given.name
        values: dict[str, Any] = {"": None, **self.values, **feed}
        with torch.inference_mode():
            for node in self.model.graph.node:
                inputs = [values[name] for name in node.input]
                floats = {v.dtype for v in inputs if isinstance(v, Tensor) and v.is_floating_point()}
                assert len(floats) <= 1, f"{node.name}: {floats}"
                attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
                outputs = _node(node.op_type, inputs, attributes)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                for name, value in zip(node.output, outputs, strict=False):
                    if name:
                        values[name] = value
        for made in self.model.graph.output:
            assert values[made.name].dtype == DTYPE[made.type.tensor_type.elem_type], made.name
        return {made.name: values[made.name] for made in self.model.graph.output}


class TorchGraphSession:
    """prefill, step and score of an exported folder, as any session; ``last`` holds the last run's outputs."""

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder)
        self._decode = TorchGraph(folder, self.manifest.decode_graph)
        self._scoring = TorchGraph(folder, self.manifest.scoring_graph)
        self.last: dict[str, Tensor] = {}

    def _run(self, graph: TorchGraph, ids: Any, mask: Any, positions: Any) -> Any:
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        if length := self.manifest.kv.cache_length:
            feed["attention_mask"] = np.pad(mask, ((0, 0), (0, length - mask.shape[1])))
            feed["write_indices"] = positions[:, 0]  # padded on the right
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in feed.items() if k in self.manifest.inputs}
        self.last = graph.run(tensors | self._past)
        present = {k: v for k, v in self.last.items() if k.startswith("present")}
        self._past = {k.replace("present", "past_key_values"): v for k, v in present.items()}
        return self.last["logits"].numpy()

    def _start(self, ids: Ids, reserve: int) -> tuple[Any, Any, Any]:
        padded, mask = right_pad(ids)
        kv = self.manifest.kv
        capacity = kv.cache_length or padded.shape[1] + reserve
        kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[kv.dtype]
        empty = torch.zeros((len(ids), kv.kv_heads, capacity, kv.head_dim), dtype=kind)
        self._past = {name: empty for name in self.manifest.inputs if name.startswith("past")}
        self._lengths = mask.sum(1)
        return padded, mask, np.maximum(mask.cumsum(1) - 1, 0)

    def prefill(self, ids: Ids, reserve: int = 1) -> Any:
        return self._run(self._decode, *self._start(ids, reserve))[:, 0]

    def step(self, ids: Sequence[int]) -> Any:
        self._lengths = self._lengths + 1
        mask = (np.arange(self._lengths.max()) < self._lengths[:, None]).astype(np.int64)
        return self._run(self._decode, np.asarray(ids)[:, None], mask, self._lengths[:, None] - 1)[:, 0]

    def score(self, ids: Sequence[int]) -> Any:
        return self._run(self._scoring, *self._start([ids], 0))[0]
