"""Block-wise weight-only quantisation in the layout of ONNX Runtime's ``com.microsoft::MatMulNBits``.

Quantising here rather than in ONNX Runtime keeps the choice of codes testable weight by weight, gives the better
methods a place, and needs no session. A weight stands for ``(code - zero point) * scale``, where scale and zero point
belong to one block of consecutive inputs of one row.

Try: ``python -m pytest tests/export/test_quantize.py -q``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from export.errors import BrokenCheckpointError, UnsupportedModelError
from export.process import malloc_limits
from export.spec import METHODS

# Weights per piece of work: about 1 MB of fp32, so that the passes over it run from the cache.
_PIECE = 1 << 18
# A stored scale may be this much (relatively) smaller than the wanted one: room for fp32 noise in weights that were
# dequantised from a grid whose scale the type holds exactly.
_SCALE_SLACK = 2.0**-20
# A real zero point lies in 0..top unless a block's values are all of one sign; past this many ranges outside, a 16-bit
# zero point would be too coarse.
_FAR = 16

# Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", their defaults.
_LP_NORM = 0.7
_BETA = 10.0
_KAPPA = 1.01
_ITERATIONS = 20
_REFITS = 3
# A step goes on over all blocks until fewer than this share of them still gain.
_CROWDED = 0.7
# How many codes at the ends a block of grid weights may leave unused: 32 random codes leave more in one of 500,000.
_UNUSED = 5
# One block in so many is looked at to see whether a piece of a tensor was read from a 4-bit file.
_SAMPLED = 16

_DAMPING = 0.01
_GPTQ_BATCH = 128


@dataclass(frozen=True)
class Packed:
    """A quantised weight of N rows; the inputs to a ``MatMulNBits`` node, as they are stored.

    Attributes:
        codes: uint8 [N, blocks, block * bits // 8]; with 4 bits the first of two codes is in the low nibble.
        scales: [N, blocks] in the storage type, of either sign, 0 for a block of zeros (but see ``positive``).
        zero_points: uint8 [N, ceil(blocks * bits / 8)], packed like the codes; or, real-valued, [N, blocks] in the
            type of the scales; None means ``2 ** (bits - 1)`` throughout.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None


def quantize(
    weight: Tensor,
    bits: int,
    block: int,
    method: str,
    symmetric: bool = False,
    hessian: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
    float_zero: bool = False,
    positive: bool = False,
) -> Packed:
    """Quantise a weight, in pieces of rows: beyond input and result 20 MB a thread are needed (gptq: and the factor).

    Args:
        weight: [N, K], any float type, rows are output features as in ``nn.Linear.weight``. Where ``block`` does not
            divide K, the last block is shorter; its padding takes no part in any choice and decodes to zero (to within
            half a step with ``float_zero``).
        bits: 4 or 8.
        block: weights per scale, a power of two from 16 on.
        method: ``rtn``: the range of a block, rounded to nearest. ``hqq``: zero point by half-quadratic splitting, then
            least squares. ``kquant``: llama.cpp's search over scales, errors weighted by magnitude. ``gptq``: rtn
            grids, each column's error made good by the columns after it.
        symmetric: no zero points are stored; zero is the middle code.
        hessian: [K, K], 2/n X^T X of the layer's inputs X [n, K]; for gptq, and only for it. Factorised in its own
            type, at least fp32.
        scale_dtype: type of the scales. They are rounded to it before codes are chosen.
        float_zero: real-valued zero points, for 4 bits (ONNX Runtime refuses them with 8). ONNX Runtime's CPU kernel
            then expands the weight at every call: exact for weights that came from a grid, but slow.
        positive: every scale is above 0, that of a block of zeros too; for symmetric grids. TensorRT's parser refuses
            other scales.

    Raises:
        BrokenCheckpointError: the weight holds NaN or infinity.
        UnsupportedModelError: a scale is too large for ``scale_dtype``.
        ValueError: a wrong argument, by name; a missing or unusable hessian.
    """
    _check(weight, bits, block, method, symmetric, hessian, scale_dtype, float_zero, positive)
    n, k = weight.shape
    blocks = -(-k // block)
    grid = _Grid(2**bits - 1, symmetric, float_zero, scale_dtype, positive)
    root = _inverse_root(hessian) if hessian is not None else None
    packed_codes = torch.empty(n, blocks, block * bits // 8, dtype=torch.uint8)
    scales = torch.empty(n, blocks)
    zeros = torch.empty(n, blocks)
    # gptq loops over columns in Python, which more rows at a time make cheaper per weight.
    step = max(1, _PIECE * (16 if root is not None else 1) // k)
    whole = k // block * block

    def quantize_rows(first: int) -> None:
        rows = weight[first : first + step].to(torch.float32)
        _refuse_non_finite(rows, first)
        piece = slice(first, first + len(rows))
        codes = torch.empty(len(rows), blocks * block, dtype=torch.uint8)
        if root is not None:
            _gptq(rows, root, block, grid, codes, scales[piece], zeros[piece])
        else:
            for start, stop in ((0, whole), (whole, k)):
                if start == stop:
                    continue
                values = rows[:, start:stop].reshape(-1, min(block, stop - start))
                scale, zero = grid.fit(values)
                if method == "hqq":
                    scale, zero = _hqq(values, scale, zero, grid)
                elif method == "kquant":
                    scale, zero = _kquant(values, scale, zero, grid)
                codes[:, start:stop] = _encode(values, scale, zero, grid.top).view(len(rows), -1)
                here = slice(start // block, -(-stop // block))
                scales[piece, here] = scale.view(len(rows), -1)
                zeros[piece, here] = zero.view(len(rows), -1)
        codes[:, k:] = zeros[piece, -1:].round().clamp_(0, grid.top)
        packed_codes[piece] = pack(codes, bits).view(len(rows), blocks, -1)

    _each(quantize_rows, range(0, n, step), threads=1 if root is not None else torch.get_num_threads())
    if symmetric:
        stored = None
    elif float_zero:
        stored = zeros.to(scale_dtype)
    else:
        stored = pack(zeros.to(torch.uint8), bits)
    return Packed(packed_codes, scales.to(scale_dtype), stored)


def dequantize(packed: Packed, bits: int, block: int, columns: int) -> Tensor:
    """``(code - zero point) * scale``, fp32 [N, columns]; ``columns`` is the K before padding.

    Raises:
        ValueError: the tensors do not have the shapes that these numbers demand.
    """
    n, blocks = packed.scales.shape
    if blocks != -(-columns // block) or packed.codes.shape != (n, blocks, block * bits // 8):
        raise ValueError(
            f"codes {list(packed.codes.shape)} and scales {list(packed.scales.shape)} are not those of {columns} "
            f"columns in blocks of {block} with {bits} bits"
        )
    values = unpack(packed.codes.view(n, -1), bits, blocks * block).view(n, blocks, block).to(torch.float32)
    values.sub_(_zeros(packed, bits).unsqueeze(-1)).mul_(packed.scales.to(torch.float32).unsqueeze(-1))
    return values.view(n, -1)[:, :columns].contiguous()


def error_bound(packed: Packed, bits: int, block: int, columns: int) -> Tensor:
    """The largest ``|w - dequantize(w)|`` that a correct round-to-nearest result can have, fp32 [N, blocks].

    Half a step: rtn chooses its grids so that nothing is clipped by more. To it comes what ``_SCALE_SLACK`` and fp32
    arithmetic may add over the range of the codes. The other methods may clip, so that for them this is no bound.

    Raises:
        ValueError: as ``dequantize``.
    """
    if packed.scales.shape[1] != -(-columns // block):
        raise ValueError(f"scales {list(packed.scales.shape)} are not those of {columns} columns in blocks of {block}")
    steps = _zeros(packed, bits).abs_().add_(2**bits).mul_(2 * _SCALE_SLACK).add_(0.5)
    size = packed.scales.to(torch.float32).abs()
    bound = size * steps
    # Half of the smallest subnormal would be 0.
    return bound.where(bound > 0, size)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [N, n], to uint8 [N, ceil(n * bits / 8)]; the first of two 4-bit codes is in the low nibble."""
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of ``pack``: uint8 [N, count], one code a byte."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=-1).view(len(packed), -1)[:, :count]


def _zeros(packed: Packed, bits: int) -> Tensor:
    """Zero points, fp32 [N, blocks]."""
    zeros = packed.zero_points
    if zeros is None:
        return torch.full(packed.scales.shape, 2.0 ** (bits - 1))
    if not zeros.dtype.is_floating_point:
        zeros = unpack(zeros, bits, packed.scales.shape[1])
    return zeros.to(torch.float32)


@functools.cache
def _keep_freed_pages() -> None:
    """Have glibc keep 64 MB that were freed: given back after each operation, page faults cost a third of the time."""
    malloc_limits(apart=16 << 20, kept=64 << 20)


def _each(work: Callable[[int], None], pieces: range, threads: int) -> None:
    """Call for every piece, in as many threads: an operation on 1 MB is too short to be split well by itself."""
    if len(pieces) > 1:
        _keep_freed_pages()
    if threads == 1 or len(pieces) == 1:
        for piece in pieces:
            work(piece)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, pieces):  # raises the first piece's error, as one thread would
                pass
    finally:
        torch.set_num_threads(threads)


def _check(
    weight: Tensor,
    bits: int,
    block: int,
    method: str,
    symmetric: bool,
    hessian: Tensor | None,
    scale_dtype: torch.dtype,
    float_zero: bool,
    positive: bool,
) -> None:
    if weight.ndim != 2 or not weight.numel() or not weight.dtype.is_floating_point:
        raise ValueError(f"weight must be [N, K] of a float type, not {list(weight.shape)} of {weight.dtype}")
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    if block < 16 or block & (block - 1):
        raise ValueError(f"block must be a power of two from 16 on, as MatMulNBits demands, not {block}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if scale_dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"scale_dtype must be float16, bfloat16 or float32, not {scale_dtype}")
    if float_zero and (symmetric or bits != 4):
        raise ValueError("float_zero goes with asymmetric 4-bit weights only: MatMulNBits takes no others")
    if positive and not symmetric:
        raise ValueError("positive goes with symmetric weights only: the scales of others are never negative")
    if (method == "gptq") != (hessian is not None):
        raise ValueError("method 'gptq' needs a hessian (2/n X^T X of the layer's inputs); the others take none")
    if hessian is not None and hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"hessian must be [{weight.shape[1]}, {weight.shape[1]}], not {list(hessian.shape)}")


def _refuse_non_finite(rows: Tensor, first: int) -> None:
    # A sum is finite whenever every value is, and costs one pass; an overflow of the sum itself is told apart below.
    if rows.sum().isfinite():
        return
    row, column = (~rows.isfinite()).nonzero(as_tuple=True)
    if len(row):
        r, c = int(row[0]), int(column[0])
        raise BrokenCheckpointError(
            f"the weight holds {len(row)} non-finite values, the first {float(rows[r, c])} in row {first + r}, column "
            f"{c}; download the checkpoint again, or keep bf16 weights out of fp16"
        )


def _divisor(scale: Tensor) -> Tensor:
    """The scales as [B, 1], with 1 for 0."""
    return scale.where(scale != 0, 1.0).unsqueeze(1)


def _encode(values: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """The nearest codes, as floats [B, L], of values [B, L] on grids [B]."""
    return torch.div(values, _divisor(scale)).add_(zero.unsqueeze(1)).round_().clamp_(0, top)


@dataclass(frozen=True)
class _Grid:
    """What may be stored: codes 0..``top``, which zero points, scales of which type and sign."""

    top: int
    symmetric: bool
    float_zero: bool
    dtype: torch.dtype
    positive: bool = False

    def store(self, scale: Tensor) -> Tensor:
        """Positive fp64 scales as the type holds them, in fp32: to nearest, upwards where clipping would follow.

        Raises:
            UnsupportedModelError: one is larger than the type can say.
        """
        kept = scale.to(self.dtype)
        whole = torch.int32 if self.dtype == torch.float32 else torch.int16
        # The next larger float is the next integer; this also keeps a tiny scale from becoming 0.
        short = kept.to(torch.float64) < scale * (1 - _SCALE_SLACK)
        kept = (kept.view(whole) + short.to(whole)).view(self.dtype)
        if kept.isinf().any():
            name = str(self.dtype).removeprefix("torch.")
            raise UnsupportedModelError(
                f"a block of weights needs the scale {float(scale.max()):.3g}, more than {name} holds; "
                f"use float32 or bfloat16 scales"
            )
        return kept.to(torch.float32)

    def fit(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, fp32 [B] each, of the finest grid that clips no value [B, L] by over half a step."""
        low, high = values.amin(1).double(), values.amax(1).double()
        if self.symmetric:
            half = (self.top + 1) // 2
            if self.positive:
                scale = self.store(torch.maximum(-low / half, high / (half - 0.5)))
                return scale.where(scale != 0, 1.0), torch.full_like(scale, half)
            # Codes reach one step further below zero than above, so the larger side goes below, by the scale's sign.
            larger, smaller = torch.maximum(high, -low), torch.minimum(high, -low)
            scale = self.store(torch.maximum(larger / half, smaller / (half - 0.5)))
            return scale.where(high <= -low, -scale), torch.full_like(scale, half)
        with_zero_low, with_zero_high = low.clamp(max=0), high.clamp(min=0)
        if self.float_zero:
            far = (high - low) * _FAR < torch.maximum(high, -low)
            low, high = with_zero_low.where(far, low), with_zero_high.where(far, high)
        else:
            low, high = with_zero_low, with_zero_high
        scale = self.store((high - low) / self.top)
        return scale, self.zero(-low / scale.where(scale != 0, 1.0))

    def zero(self, zero: Tensor) -> Tensor:
        """Zero points as they can be stored, fp32."""
        if self.float_zero:
            return zero.to(self.dtype).to(torch.float32)
        return zero.round().clamp_(0, self.top).to(torch.float32)


class _Search:
    """The best grid so far of each block; an offer counts as it would be stored, so that none can do harm.

    Works on values in steps of the first grid: squares neither overflow nor vanish, whatever the weight's magnitude.
    """

    def __init__(self, units: Tensor, base: Tensor, zero: Tensor, grid: _Grid, weights: Tensor | None = None) -> None:
        self.units, self.base, self.grid, self.weights = units, base.double(), grid, weights
        self.factor, self.zero = torch.ones_like(base), zero
        self.scale = base
        self.codes = _encode(units, self.factor, zero, grid.top)
        self.error = self._error(self.codes, self.factor, zero)

    def _total(self, values: Tensor) -> Tensor:
        return (values if self.weights is None else values.mul_(self.weights)).sum(1)

    def _error(self, codes: Tensor, factor: Tensor, zero: Tensor) -> Tensor:
        residual = (codes - zero.unsqueeze(1)).mul_(factor.unsqueeze(1)).sub_(self.units)
        return self._total(residual.square_())

    def offer(self, factor: Tensor, zero: Tensor) -> Tensor:
        """Take a grid (scale as a factor of the first one) where it is better; returns its codes [B, L]."""
        magnitude = self.base.abs() * factor.double()
        magnitude = self.grid.store(magnitude.clamp_(max=torch.finfo(self.grid.dtype).max))
        scale = magnitude.copysign(self.base)
        factor = (scale / self.base.where(self.base != 0, 1.0)).to(torch.float32)
        zero = self.grid.zero(zero) if not self.grid.symmetric else zero
        codes = _encode(self.units, factor, zero, self.grid.top)
        error = self._error(codes, factor, zero)
        better = error < self.error
        self.error = error.where(better, self.error)
        self.scale = scale.to(torch.float32).where(better, self.scale)
        self.zero = zero.where(better, self.zero)
        return codes

    def offer_neighbours(self) -> None:
        """Offer the whole zero points next to the best, each with the range's scale and with the best for its codes."""
        low, high = self.units.amin(1).clamp_(max=0), self.units.amax(1).clamp_(min=0)
        top = self.grid.top
        for neighbour in (self.zero - 1, self.zero + 1):
            zero = neighbour.clamp_(0, top)
            codes = self.offer(torch.maximum(-low / (zero + 0.5), high / (top + 0.5 - zero)), zero)
            self.offer(self._slope(codes, zero), zero)

    def offer_coarser(self) -> None:
        """Offer real-zero grids of which the values [B, L] use fewer than all codes.

        Weights read from a 4-bit file need not hold both end codes in each block; their step is then the range over
        fewer than ``top``, and exact. Weights that never were on a grid gain nothing here and are spared the search.
        """
        sample = self.units[::_SAMPLED].sort(1).values
        if not (sample.diff(dim=1).ne(0).sum(1) <= self.grid.top).any():
            return
        low = self.units.amin(1)
        extent = self.units.amax(1) - low
        for steps in range(self.grid.top - 1, self.grid.top - 1 - _UNUSED, -1):
            factor = extent / steps
            self.offer(factor, -low / factor.where(factor != 0, 1.0))

    def refit(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The least-squares factor and zero point [B] for given codes [B, L]; 1 and the best so far where undefined."""
        zero = self.zero
        if not self.grid.symmetric:
            count = self._total(torch.ones_like(codes))
            mean_code = self._total(codes.clone()) / count
            mean_unit = self._total(self.units.clone()) / count
            centred = codes - mean_code.unsqueeze(1)
            slope = self._total(centred * self.units) / self._total(centred.square())
            zero = mean_code - mean_unit / slope
            zero = self.grid.zero(zero.where(zero.isfinite(), self.zero))
            if self.grid.float_zero:
                return slope.where(slope > 0, 1.0), zero
        return self._slope(codes, zero), zero

    def _slope(self, codes: Tensor, zero: Tensor) -> Tensor:
        """The least-squares factor [B] for given codes [B, L] and zero points [B]; 1 where undefined."""
        centred = codes - zero.unsqueeze(1)
        slope = self._total(centred * self.units) / self._total(centred.square())
        return slope.where(slope > 0, 1.0)


def _hqq(values: Tensor, scale: Tensor, zero: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Grids [B] by half-quadratic quantisation, then least squares; in squared error never worse than those given.

    A whole zero point mostly rounds back to where it began, so there its neighbours are tried too.
    """
    units = values / _divisor(scale)
    search = _Search(units, scale, zero, grid)
    codes = search.codes
    if not grid.symmetric:
        codes = search.offer(torch.ones_like(scale), _half_quadratic_zero(units, zero, grid.top))
    for _ in range(_REFITS):
        codes = search.offer(*search.refit(codes))
    if grid.float_zero:
        search.offer_coarser()
    elif not grid.symmetric:
        search.offer_neighbours()
    return search.scale, search.zero


def _half_quadratic_zero(units: Tensor, zero: Tensor, top: int) -> Tensor:
    """Real zero points [B] that minimise sum |u - (q - z)|^p, p < 1, for values [B, L] in steps of the grid.

    Badri & Shaji 2023, section 2: alternate e = shrink(u - (q - z), beta), the generalised soft-threshold
    sign(x) max(0, |x| - |x|^(p-1) / beta), and z = mean(q - (u - e)). In steps, not in weight units, so that beta means
    the same whatever the weight's magnitude. A block stops at its first step that does not lower its mean error.
    """
    best_zero = zero.clone()
    best = torch.full_like(zero, torch.inf)
    where = torch.arange(len(zero))
    alive = torch.ones(len(zero), dtype=torch.bool)
    beta = _BETA
    for _ in range(_ITERATIONS):
        shifted = units + zero.unsqueeze(1)
        residual = shifted.sub_(shifted.round().clamp_(0, top))
        size = residual.abs()
        error = size.mean(1)
        alive &= error < best
        best_zero[where[alive]] = zero[alive]
        count = int(alive.sum())
        if not count:
            break
        # Leaving stopped blocks out copies the others: worth it only where it saves much.
        if count < _CROWDED * len(alive):
            where, zero, error = where[alive], zero[alive], error[alive]
            units, residual, size = units[alive], residual[alive], size[alive]
            alive = torch.ones(count, dtype=torch.bool)
        best = error
        # max(0, |x| - |x|^(p-1)/beta); at 0 the power is infinite and the maximum 0.
        kept = size.sub_(size.pow(_LP_NORM - 1).div_(beta)).clamp_(min=0).copysign_(residual)
        zero = zero + kept.sub_(residual).mean(1)
        beta *= _KAPPA
    return best_zero


def _kquant(values: Tensor, scale: Tensor, zero: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Grids [B] by llama.cpp's search (``make_qkx2_quants``; ``make_qx_quants`` if symmetric).

    For each of about 20 scales around the range's the codes are chosen, then the grid that is best for them; errors are
    weighted by |w| + rms(w), llama.cpp's weights without an importance matrix.
    """
    units = values / _divisor(scale)
    weights = units.abs()
    weights += units.square().mean(1, keepdim=True).sqrt_()
    search = _Search(units, scale, zero, grid, weights)
    low, high = units.amin(1), units.amax(1)
    if not grid.float_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    for tenths in range(-10, 11):
        if grid.symmetric:
            half = (grid.top + 1) / 2
            start, offset = torch.full_like(scale, half / (half + tenths / 10)), zero
        else:
            start = (high - low) / (grid.top + tenths / 10)
            offset = -low / start.where(start != 0, 1.0)
        search.offer(*search.refit(_encode(units, start, offset, grid.top)))
    if grid.float_zero:
        search.offer_coarser()
    return search.scale, search.zero


def _inverse_root(hessian: Tensor) -> Tensor:
    """U [K, K], upper triangular, with U^T U = (H + damping)^-1; fp32 or fp64 like the hessian.

    Frantar et al. 2022, "GPTQ", section 3.3, step 3. The damping is 1 % of the mean diagonal of the columns in use. An
    input that was always zero has a zero row; the damping alone makes it a column without any compensation.

    Raises:
        ValueError: not finite, or not positive semidefinite.
    """
    h = hessian.to(torch.promote_types(hessian.dtype, torch.float32), copy=True)
    diagonal = h.diagonal()
    if not h.sum().isfinite():
        raise ValueError("the hessian is not finite; were the calibration inputs?")
    used = diagonal > 0
    mean = diagonal[used].mean() if used.any() else torch.ones((), dtype=h.dtype)
    diagonal += _DAMPING * mean
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        root: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except RuntimeError as e:
        raise ValueError(f"the hessian is not positive semidefinite ({e}); compute it in float64") from None
    return root


def _gptq(rows: Tensor, root: Tensor, block: int, grid: _Grid, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
    """GPTQ of rows [R, K] in column order into codes [R, >= K], scales and zeros [R, blocks].

    Frantar et al. 2022, algorithm 1: a column's rounding error, divided by U's diagonal, is taken off the columns after
    it in proportion to U's row: at once within a batch of columns, at its end beyond. A block's grid is fitted to its
    weights as they stand when its first column is due.
    """
    k = rows.shape[1]
    # Columns as rows, so that each step works on contiguous memory; a copy, as it is overwritten.
    columns = rows.t().clone(memory_format=torch.contiguous_format)
    root = root.to(torch.float32)
    batch = max(_GPTQ_BATCH, block)
    scale = zero = torch.empty(0)
    for start in range(0, k, batch):
        stop = min(start + batch, k)
        errors = torch.empty(stop - start, len(rows))
        for c in range(start, stop):
            if c % block == 0:
                scale, zero = grid.fit(columns[c : min(c + block, k)].t())
                scales[:, c // block], zeros[:, c // block] = scale, zero
            code = _encode(columns[c].unsqueeze(1), scale, zero, grid.top).squeeze(1)
            codes[:, c] = code
            error = (columns[c] - (code - zero) * scale) / root[c, c]
            errors[c - start] = error
            columns[c + 1 : stop].addr_(root[c, c + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(root[start:stop, stop:].t(), errors, alpha=-1)
