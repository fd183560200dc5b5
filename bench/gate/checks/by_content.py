"""The weight audit of third-party exports: names and layout are another tool's, so tensors are paired by their values.

Both directions count. Every checkpoint tensor has to be among the stored weights that the outputs depend on, and every
such weight has to be a checkpoint tensor: a good head beside a damaged copy of it in the embedding is a defect. What
resembles a checkpoint tensor and is not it has failed; what was not recognised at all leaves the check undecided.
Try: ``llama-onnx validate FOLDER_WITHOUT_MANIFEST --baseline demo --only weights``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gate.canonical import constants_of, layer_of, read_by_outputs
from bench.gate.checks.graph import table_names
from bench.gate.found import Found, exact, undecided
from bench.gate.subject import Subject
from bench.gate.tensors import TensorReader, one_valued
from export.convert import TORCH_DTYPE
from export.weights import BUFFERS
from reports.validation import Finding
from runtime.stored_weights import StoredWeight, stored_weights

LARGE = 64
"""Elements from which on a stored tensor that is no checkpoint tensor has to be explained."""
RESEMBLES = 0.5
"""Relative difference up to which a tensor is a damaged copy of another, not an unrelated one."""
WHOLE, TOKEN_ROW = 10.0, 30.0
"""Largest squared error over that of rounding to nearest: of a whole weight by whatever method, and of one row of an
embedding or a head. Elsewhere every token goes through every row, and a good method may sacrifice one."""
SAMPLE = 2048
FP16_LEAST = 2.0**-24
_JOINED = re.compile(r"(.*)\.([qkv]_proj|gate_proj|up_proj)\.(weight|bias)$")
_JOINS = (("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj"), ("up_proj", "gate_proj"))
Sources = tuple[str, ...]


@dataclass(frozen=True)
class _Stored:
    """A stored weight in its graph; ``place`` is the same for two graphs that read the same bytes."""

    weight: StoredWeight
    tensors: dict[str, Any]

    @property
    def place(self) -> str:
        w = self.weight
        stored = {kind: self.tensors[name] for kind, name in {"": w.name, **w.parts}.items()}
        places = {k: sorted((e.key, e.value) for e in t.external_data) or _bytes_of(t) for k, t in stored.items()}
        return repr((w.kind, w.shape, w.block, w.packed, w.middle, places))


def by_content(s: Subject) -> Found:
    """The audit; see the module."""
    return _Audit(s).run()


class _Audit:
    def __init__(self, s: Subject) -> None:
        self.s, self.reader, self.checkpoint = s, TensorReader(s.folder), s.baseline.tensors
        self.floats = TORCH_DTYPE.get(s.manifest.precision)
        self.cast = self.floats or TORCH_DTYPE[s.manifest.activations]
        self.bits = int(s.manifest.precision.removeprefix("int")) if self.floats is None else 0
        self.names = [n for n in self.checkpoint.where if not n.endswith(("rotary_emb.inv_freq", *BUFFERS))]
        self.joins = list(_joins(self.names))
        self.found: set[str] = set()
        self.joined = self.quantised = 0
        self.wrong: list[Finding] = []
        self.open: list[Finding] = []

    def run(self) -> Found:
        stored, others = self._stored()
        unknown = self._exact(stored)
        samples: dict[Sources, Tensor] = {}
        for w in sorted(unknown, key=lambda w: w.weight.name):
            self._judge(w, samples)
            self.s.tick(f"weights: {w.weight.name}")
        told = {n for f in self.wrong for n in f.where.split(" + ")} | self.found
        for name in self.names:
            if name not in told:
                what = "was not found in the folder: not as it is, transposed, joined or quantised in a form known here"
                self.open.append(Finding(where=name, what=what, layer=layer_of(name)))
        for name, tensor in others:
            value = self.reader.tensor(tensor)
            if not (self._mask(value) or _numbering(value)):
                what = f"is read, {list(tensor.dims)}, and is no tensor of the checkpoint, nor a causal mask"
                self.open.append(Finding(where=name, what=what, layer=layer_of(name)))
        if self.wrong or not self.open:
            ways = f"{self.joined} joined" + f", {self.quantised} quantised" * (self.quantised > 0)
            return exact(self.wrong, f"{len(self.names)} checkpoint tensors found by content ({ways})")
        return undecided(self.open)

    # -- what is stored ----------------------------------------------------------------------------------------------

    def _stored(self) -> tuple[list[_Stored], list[tuple[str, Any]]]:
        """Weights that the outputs depend on, and other tensors large enough to steer them."""
        weights: dict[str, _Stored] = {}
        others: dict[str, tuple[str, Any]] = {}
        for role in self.s.roles:
            graph = self.s.graph(role)
            tensors = constants_of(graph)
            read = read_by_outputs(graph)  # the right weight beside the one that is used proves nothing
            found = stored_weights(graph, tensors)
            taken = {n for w in found for n in (w.name, *w.parts.values())}
            tables = {n for _, n in table_names(graph)}  # the check `rotary_tables` reads them row by row
            for w in found:
                if w.name in read and w.name not in tables:
                    one = _Stored(w, tensors)
                    weights.setdefault(one.place, one)
            for name, tensor in tensors.items():
                if name in read - taken and math.prod(tensor.dims) > LARGE:
                    others.setdefault(_bytes_of(tensor), (name, tensor))
        return list(weights.values()), list(others.values())

    def _exact(self, stored: Sequence[_Stored]) -> list[_Stored]:
        """Pair what is equal bit for bit after a cast; what is left of the stored weights comes back."""
        index: dict[tuple[tuple[int, ...], torch.dtype, bytes], list[_Stored]] = {}
        kinds: dict[tuple[int, ...], set[torch.dtype]] = {}
        left = {id(w): w for w in stored}
        for w in stored:
            if w.weight.bits:
                continue
            value = self.reader.weight(w.weight, w.tensors)
            shape = _squeezed(value.shape)
            value = value.reshape(shape)
            index.setdefault((shape, value.dtype, _digest(value)), []).append(w)
            kinds.setdefault(shape, set()).add(value.dtype)

        def pair(sources: Sources) -> bool:
            shape = self._shape(sources)
            turned = shape[::-1]
            if shape not in kinds and turned not in kinds:
                return False
            weight = self._read(sources).reshape(shape)
            hits = [
                w
                for dtype in kinds.get(shape, set()) | kinds.get(turned, set())
                for form in self._casts(weight, dtype, sources)
                for view in ((form, form.t()) if form.ndim == 2 else (form,))
                for w in index.get((tuple(view.shape), dtype, _digest(view)), [])
            ]
            for w in hits:
                left.pop(id(w), None)
            return bool(hits)

        for name in self.names:
            if pair((name,)):
                self.found.add(name)
        for sources in self.joins:
            if not self.found.issuperset(sources) and pair(sources):
                self.joined += len(set(sources) - self.found)
                self.found |= set(sources)
        return list(left.values())

    def _casts(self, weight: Tensor, dtype: torch.dtype, sources: Sources) -> list[Tensor]:
        """Forms that a right export may hold: cast, cast by way of the folder's type, Gemma's norm plus 1."""
        forms = [weight.to(dtype)] if self._holds(weight, dtype) else []
        if self.cast != dtype:
            forms.append(weight.to(self.cast).to(dtype))
        if weight.ndim == 1 and "norm" in sources[0] and str(self.s.baseline.config.model_type).startswith("gemma"):
            forms += [(1.0 + weight.to(t).float()).to(dtype) for t in {self.cast, weight.dtype}]
        return forms

    def _holds(self, weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether a type is as fine as the precision of the folder, or holds this weight exactly."""
        return (
            self.floats is None
            or dtype == self.floats
            or dtype.itemsize > self.floats.itemsize
            or bool((weight.to(dtype).to(weight.dtype) == weight).all())
        )

    # -- the checkpoint's side ---------------------------------------------------------------------------------------

    def _shape(self, sources: Sources) -> tuple[int, ...]:
        shapes = [_squeezed(self.checkpoint.shapes[n]) for n in sources]
        return (sum(x[0] for x in shapes), *shapes[0][1:])

    def _read(self, sources: Sources) -> Tensor:
        tensors = [self.checkpoint.read(n) for n in sources]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    # -- what is not equal -------------------------------------------------------------------------------------------

    def _judge(self, w: _Stored, samples: dict[Sources, Tensor]) -> None:
        """A stored weight that is equal to nothing: a quantised one, a damaged one, or no weight of the checkpoint."""
        name = w.weight.name
        try:
            value = self.reader.weight(w.weight, w.tensors)
        except ValueError as e:
            self.open.append(Finding(where=name, what=str(e), layer=layer_of(name)))
            return
        value = value.reshape(_squeezed(value.shape))
        finite = bool(value.isfinite().all())
        sources, turned = self._nearest(value, samples)
        wanted = self._read(sources).reshape(self._shape(sources)).float() if sources else None
        if wanted is None or (finite and not self._close(value, wanted, turned)):
            if not self._explained(value):
                what = f"is read, {list(value.shape)}, and is no tensor of the checkpoint"
                kept, what = (self.wrong, f"{what}; it holds NaN") if value.isnan().any() else (self.open, what)
                kept.append(Finding(where=name, what=what, layer=layer_of(name)))
            return
        value = value.t() if turned else value
        codes = w.weight.bits > 0 and finite
        wrong = self._lossy(w.weight, value, wanted, turned) if codes else _difference(value, wanted)
        if wrong is None:
            self.quantised += len(set(sources) - self.found) if codes else 0
            self.found |= set(sources)
        else:
            found = Finding(where=" + ".join(sources), what=f"{wrong}, in {name}", layer=layer_of(sources[0]))
            self.wrong.append(found)

    def _nearest(self, value: Tensor, samples: dict[Sources, Tensor]) -> tuple[Sources, bool]:
        """The checkpoint tensor (or join) that has this shape and the nearest values, and whether it is transposed."""
        best = math.inf
        choice: tuple[Sources, bool] = ((), False)
        ours = {turned: _sample(value.t() if turned else value) for turned in {False, value.ndim == 2}}
        for sources in [*((n,) for n in self.names), *self.joins]:
            shape = self._shape(sources)
            for turned in ours:
                if tuple(value.shape) != (shape[::-1] if turned else shape):
                    continue
                if sources not in samples:
                    samples[sources] = _sample(self._read(sources).reshape(shape))
                theirs = samples[sources]
                off = (ours[turned] - theirs).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
                gap = float(off.norm() / theirs.norm().clamp_min(1e-30))
                if gap < best:
                    best, choice = gap, (sources, turned)
        return choice

    def _close(self, value: Tensor, wanted: Tensor, turned: bool) -> bool:
        value = (value.t() if turned else value).float()
        return bool((value - wanted).norm() <= RESEMBLES * wanted.norm())

    def _lossy(self, w: StoredWeight, value: Tensor, wanted: Tensor, turned: bool) -> str | None:
        """Whether codes stand for their weight ``[rows, columns]`` as well as some quantiser makes them."""
        if not self.bits or w.bits < self.bits:
            return f"is quantised to {w.bits} bits, the folder's weights are {self.s.manifest.precision}"
        rounding = _rounding(wanted, w.block[::-1] if turned else w.block, w.bits)
        if (row := one_valued(value, wanted, 2 * (12 * rounding.amax(1)).sqrt())) is not None:
            return f"row {row} is one value throughout"
        square = (value - wanted).square()
        nearest = rounding + 1e-6 * wanted.square()
        whole = float(square.sum() / nearest.sum().clamp_min(1e-30))
        if whole > WHOLE:
            return f"its squared error is {whole:.3g} times that of rounding to nearest, {WHOLE:g} is allowed"
        if len(wanted) == self.s.baseline.config.vocab_size:
            rows = square.sum(1) / nearest.sum(1).clamp_min(1e-30)
            if (top := float(rows.max())) > TOKEN_ROW:
                return f"row {int(rows.argmax())} has {top:.3g} times the squared error of rounding to nearest"
        return None

    def _explained(self, value: Tensor) -> bool:
        """Constants that are computed from the configuration: rotary frequencies, masks; and small ones."""
        if self._mask(value):
            return True
        if value.numel() <= LARGE:
            return not bool(value.isnan().any())
        flat = value.flatten().double()
        return any(t.numel() == len(flat) and bool(torch.allclose(flat, t)) for t in self.s.baseline.tables)

    def _mask(self, value: Tensor) -> bool:
        """A causal mask, or one of a window that the configuration names; as booleans or as what is added to scores."""
        if value.ndim < 2 or value.shape[-1] != value.shape[-2] or value.numel() != value.shape[-1] ** 2:
            return False
        value = value.reshape(value.shape[-2:])
        seen = value if value.dtype == torch.bool else value != 0
        places = torch.arange(len(seen))
        ahead = places[None] - places[:, None]  # column minus row
        config = self.s.baseline.config
        windows = [w for n in ("window_size", "sliding_window") if (w := getattr(config, n, None))]
        masks = [ahead <= 0, *((ahead <= 0) & (ahead > -w) for w in windows)]
        return any(bool((seen == m).all()) or bool((seen == ~m).all()) for m in masks)


def _numbering(value: Tensor) -> bool:
    """0, 1, 2 and so on: the slots of a KV cache of fixed length, which a mask is compared with."""
    integers = not value.dtype.is_floating_point and value.dtype != torch.bool
    return integers and torch.equal(value.flatten().long(), torch.arange(value.numel()))


def _joins(names: Sequence[str]) -> Iterator[Sources]:
    """Tensors that exporters put together, side by side along their outputs."""
    parts: dict[tuple[str, str], set[str]] = {}
    for m in map(_JOINED.match, names):
        if m:
            parts.setdefault((m[1], m[3]), set()).add(m[2])
    for (prefix, kind), there in parts.items():
        for join in _JOINS:
            if there.issuperset(join):
                yield tuple(f"{prefix}.{part}.{kind}" for part in join)


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(x for x in shape if x != 1) or (1,)


def _bytes_of(tensor: Any) -> str:
    return hashlib.blake2b(tensor.SerializeToString()).hexdigest()


def _digest(value: Tensor) -> bytes:
    raw: Any = value.contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(raw, digest_size=16).digest()


def _sample(value: Tensor) -> Tensor:
    """Values at places that depend on the shape alone, fp32."""
    flat = torch.Generator().manual_seed(0)
    places = [torch.randint(0, n, (SAMPLE,), generator=flat) for n in value.shape]
    sample: Tensor = value[tuple(places)].float()
    return sample


def _rounding(weight: Tensor, block: tuple[int, int], bits: int) -> Tensor:
    """Squared error that rounding ``[rows, columns]`` to nearest leaves at each place: a twelfth of the squared step,
    which spans each block from its least to its largest value, and 0."""
    (rows, columns), (tall, wide) = weight.shape, block
    padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % tall))
    blocks = padded.view(padded.shape[0] // tall, tall, padded.shape[1] // wide, wide)
    step = (blocks.amax((1, 3), keepdim=True).clamp(min=0) - blocks.amin((1, 3), keepdim=True).clamp(max=0)) / (
        2**bits - 1
    )
    error: Tensor = (step.square() / 12).expand_as(blocks).reshape(padded.shape)
    return error[:rows, :columns]


def _difference(value: Tensor, wanted: Tensor) -> str | None:
    """How a float tensor differs from the checkpoint's; None where only signs of zeros do."""
    stored, wanted = wanted, wanted.to(value.dtype)
    differ = ~(value == wanted)
    if value.dtype == torch.float16:  # onnxruntime's converter raises what is smaller to the smallest number
        differ &= ~((stored.abs() < FP16_LEAST) & (value.abs() <= FP16_LEAST))
    n = int(differ.sum())
    if not n:
        return None
    where = [int(x) for x in differ.nonzero()[0]]
    broken = int((~value.isfinite()).sum())
    gap = float((value.float() - wanted.float()).nan_to_num(nan=0.0).norm() / wanted.float().norm().clamp_min(1e-30))
    size = f"{broken:,} are NaN or infinite" if broken else f"relative difference {gap:.2g}"
    return f"{n:,} of {value.numel():,} values are not the checkpoint's (first at {where}, {size})"
