"""The weight audit: every checkpoint tensor is in the folder, bit-equal after the declared cast or inside the bound of
the declared quantiser, at the place where the graph reads it, and no weight is left over.

Statistics cannot do this: one rare token's zeroed embedding row, or one matrix in int4 under a claimed fp16, moves no
mean. Tensors are streamed: the largest one is in memory, never the model. torch is imported where tensors are read: who
replays a document needs the list of checks and no torch.
Try: ``llama-onnx validate FOLDER --baseline demo --only weights``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bench.gate.canonical import constants_of, layer_of
from bench.gate.found import Found, exact
from bench.gate.subject import Subject
from reports.validation import Finding

if TYPE_CHECKING:
    from torch import Tensor

    from bench.gate.tensors import TensorReader
    from export.manifest import Weight

RATIO = {"rtn": 1.0, "hqq": 1.02, "kquant": 1.3, "gptq": float("inf")}
"""Largest squared error of a block against round-to-nearest's, by method. hqq keeps a grid only where it is better,
kquant weighs errors by magnitude; gptq moves error between columns on purpose, so only whole tensors can be held."""
WHOLE = {"rtn": 1.0, "hqq": 1.02, "kquant": 1.3, "gptq": 10.0}
"""The same over a whole tensor."""
ROW = 30.0
"""The same over one row of the head by gptq: each is one token's, and no statistic sees a rare one's. Elsewhere every
token goes through every row, and after inputs with a few huge values an honest row may be off by 176 times."""


def weights(s: Subject) -> Found:
    """The audit; of folders made elsewhere by content, whatever the names."""
    if not s.ours:
        from bench.gate.checks.by_content import by_content

        return by_content(s)
    from bench.gate.tensors import TensorReader

    findings: list[Finding] = []
    audited: set[tuple[str, str]] = set()
    reader = TensorReader(s.folder)
    for role in s.roles:
        tensors = constants_of(s.graph(role))
        pairing = s.pairings[role]
        findings += [
            Finding(where=name, what=f"is stored in the {role} graph and belongs to no tensor of the checkpoint")
            for name in pairing.unused
        ]
        places = {e: f for e, f in pairing.weights.items() if _new(audited, role, e, tensors.get(f))}
        for finding in _audit(s, reader, places, tensors):
            if finding not in findings:
                findings.append(finding)
        missing = [r.name for r in s.conversion.recipes if r.name not in pairing.weights and r.name not in tensors]
        findings += [Finding(where=n, what=f"is read nowhere in the {role} graph", layer=layer_of(n)) for n in missing]
    sources = {x for r in s.conversion.recipes for x in r.sources}
    claimed = s.manifest.precision
    return exact(findings, f"{len(sources)} checkpoint tensors found, {_how(claimed)}, none left over")


def _how(precision: str) -> str:
    return "inside the quantiser's bound" if precision.startswith("int") else f"bit-equal as {precision}"


def _new(audited: set[tuple[str, str]], role: str, expected: str, tensor: Any) -> bool:
    """Whether this weight at this place was not compared before: both graphs mostly read one file."""
    external = sorted((e.key, e.value) for e in tensor.external_data) if tensor is not None else []
    place = repr((external, tensor.data_type, list(tensor.dims))) if external else role
    key = (expected.partition("#")[0], place)
    if key in audited:
        return False
    audited.add(key)
    return True


def _audit(s: Subject, reader: TensorReader, places: dict[str, str], tensors: dict[str, Any]) -> Iterator[Finding]:
    from export.architectures import architecture_of
    from export.weights import check_names

    conversion, checkpoint = s.conversion, s.baseline.tensors
    with s.baseline.at_fault():
        config = s.baseline.config
        check_names(conversion, checkpoint, architecture_of(config).class_name, config.tie_word_embeddings)
    recipes = {r.name: r for r in conversion.recipes}
    for expected, found in places.items():
        recipe = recipes.get(expected.partition("#")[0])
        if recipe is None or recipe.transform == "rope":
            continue
        try:
            if recipe.transform in ("scales", "zero_points", "offsets", "scales_transposed"):
                continue  # judged together with their codes
            sources = [checkpoint.read(x) for x in recipe.sources]
            if recipe.transform in ("codes", "codes_transposed"):
                wrong = _quantised(s, reader, recipe, places, tensors, sources)
            else:
                wrong = _floats(reader.tensor(tensors[found]), recipe, sources)
        except ValueError as e:
            wrong = str(e)
        if wrong:
            yield Finding(where=found, what=wrong, layer=layer_of(expected))
        s.tick(f"weights: {expected}")


def _floats(found: Tensor, recipe: Weight, sources: list[Tensor]) -> str | None:
    import torch

    from export.weights import make_initialiser

    wanted = make_initialiser(recipe, sources)
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"has type {found.dtype} and shape {list(found.shape)}, not {wanted.dtype} and {list(wanted.shape)}"
    integer = {4: torch.int32, 2: torch.int16}[wanted.dtype.itemsize]
    if torch.equal(found.view(integer), wanted.view(integer)):
        return None
    differ = found != wanted
    n = int(differ.sum())
    # -0.0 and 0.0, or NaN, differ in bits alone.
    if not n:
        return "differs in signs of zeros only"
    where = [int(x) for x in differ.nonzero()[0]]
    gap = (found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30)
    looks = _looks_quantised(found, wanted)
    joined = " + ".join(recipe.sources)
    return (
        f"{n:,} of {found.numel():,} values are not those of {joined} cast to {recipe.dtype} "
        f"(first at {where}, relative difference {float(gap):.2g}){looks}"
    )


def _looks_quantised(found: Tensor, wanted: Tensor) -> str:
    """Whether blocks of 32 inputs hold so few distinct values as 4 bits give, where the checkpoint's hold more."""
    if found.ndim != 2 or found.shape[0] % 32 or found.shape[0] < 64:
        return ""

    def distinct(t: Tensor) -> float:
        blocks = t.t()[:64].reshape(-1, 32).float().sort(dim=1).values
        return float(((blocks[:, 1:] != blocks[:, :-1]).sum(dim=1) + 1).float().mean())

    have, want = distinct(found), distinct(wanted)
    return (
        f"; its blocks hold {have:.0f} distinct values, the checkpoint's {want:.0f}: quantised?" if have < want else ""
    )


def _quantised(
    s: Subject,
    reader: TensorReader,
    recipe: Weight,
    places: dict[str, str],
    tensors: dict[str, Any],
    sources: list[Tensor],
) -> str | None:
    """Dequantise what is stored and hold its error against round-to-nearest on the same blocks."""
    import torch

    from bench.gate.tensors import one_valued
    from export.quantize import Packed, dequantize, error_bound, pack, quantize

    base = recipe.name.removesuffix(".codes")

    def part(kind: str) -> Tensor | None:
        name = places.get(f"{base}.{kind}") or f"{base}.{kind}"
        return reader.tensor(tensors[name]) if name in tensors else None

    codes, scales = part("codes"), part("scales")
    if codes is None or scales is None:
        return "has codes without scales"
    weight = (sources[0] if len(sources) == 1 else torch.cat(sources)).float()
    rows, columns = weight.shape
    block, bits = s.spec.block, recipe.bits
    blocks = -(-columns // block)
    zeros, offsets = part("zero_points"), part("offsets")
    if recipe.transform == "codes_transposed":  # signed, [columns, rows]: the same codes around the middle one
        middle = 1 << (bits - 1)
        filled = torch.nn.functional.pad(codes.t(), (0, blocks * block - columns))
        codes, scales = pack((filled.to(torch.int16) + middle).to(torch.uint8), bits), scales.t()
    codes = codes.reshape(rows, -1)  # of an embedding, the last block is as long as it is
    codes = torch.nn.functional.pad(codes, (0, blocks * block * bits // 8 - codes.shape[1])).view(rows, blocks, -1)
    method = "rtn" if s.spec.method == "gptq" and base.startswith("model.embed") else str(s.spec.method)
    value = dequantize(Packed(codes, scales.reshape(rows, blocks), zeros), bits, block, columns)
    if offsets is not None:  # (q - 8) s + (8 - z) s: the second part is stored on its own
        value += offsets.float().t().repeat_interleave(block, dim=1)[:, :columns]
    if (row := one_valued(value, weight)) is not None:
        return f"row {row} is one value throughout"
    error = value.sub_(weight)
    padded = torch.nn.functional.pad(error, (0, blocks * block - columns)).view(rows, blocks, block)
    nearest = quantize(
        weight,
        bits,
        block,
        "rtn",
        s.spec.symmetric,
        scale_dtype=scales.dtype,
        float_zero=s.spec.float_zero(bits),
        positive=s.spec.standard,
    )
    if method == "rtn" and offsets is None:
        bound = error_bound(Packed(codes, scales.reshape(rows, blocks), zeros), bits, block, columns)
        # Half a step of the grid that rounding to nearest has: a wider one of its own would hide what it lost.
        bound = torch.minimum(bound, error_bound(nearest, bits, block, columns))
        over = ~(padded.abs().amax(dim=2) <= bound * 1.0001 + 1e-12)  # NaN is over, too
    else:
        base_error = dequantize(nearest, bits, block, columns).sub_(weight)
        base_square = torch.nn.functional.pad(base_error, (0, blocks * block - columns)).view_as(padded).square().sum(2)
        square = padded.square().sum(dim=2)
        # Room for the rounding of the scales and offsets in their own type.
        slack = 1e-5 * torch.nn.functional.pad(weight, (0, blocks * block - columns)).view_as(padded).square().sum(2)
        if scales.dtype != torch.float32:
            slack *= 10
        over = ~(square <= RATIO[method] * base_square + slack) if method != "gptq" else ~square.isfinite()
        if method == "gptq" and base == "lm_head.weight":
            rows_over = square.sum(1) / (base_square.sum(1) + slack.sum(1)).clamp_min(1e-30)
            if (wrong := ~(rows_over <= ROW)).any():
                row = int(wrong.nonzero()[0])
                return (
                    f"row {row} has {float(rows_over[row]):.3g} times the squared error of rounding to nearest, gptq "
                    f"allows {ROW:g} ({int(wrong.sum())} of {rows} rows)"
                )
        whole = float(square.sum() / (base_square.sum() + slack.sum()))
        if not whole <= WHOLE[method]:
            return (
                f"its squared error is {whole:.3g} times that of rounding to nearest, {method} allows {WHOLE[method]}"
            )
    if not over.any():
        return None
    row, column = (int(x) for x in over.nonzero()[0])
    return (
        f"{int(over.sum()):,} of {over.numel():,} blocks are off by more than {method} may be "
        f"(first: row {row}, block {column})"
    )
