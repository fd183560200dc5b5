"""What is asked for: a frozen, validated description of one export.

Try: ``python -c "from export.spec import ExportSpec; print(ExportSpec('demo', 'int4'))"``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from export.errors import ExportError

FLOATS = ("fp32", "fp16", "bf16")
BITS = {"int8": 8, "int4": 4}
PRECISIONS = (*FLOATS, *BITS)
TARGETS = ("ort", "tensorrt", "plain")
METHODS = ("rtn", "hqq", "kquant", "gptq")
PROVIDERS = ("any", "cuda")
ZERO_POINTS = ("integer", "float", "none")
KEEP = ("none", "qkv", "o", "gate", "up", "down", "first:N", "last:N")
BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class ExportSpec:
    """One export, as asked for. None means the default of the precision, filled in at once.

    Args:
        model: ``demo``, a local folder, a GGUF file or a hub id.
        precision: storage type of the weights, one of :data:`PRECISIONS`.
        target: ``ort`` (com.microsoft fused operators), ``tensorrt`` (standard operators, opset 24) or ``plain``
            (optimum's own graph, for any decoder that optimum exports with past).
        revision: branch, tag or commit when ``model`` is a hub id.
        activations: type of activations, scales and KV cache; the precision itself unless that is int8 or int4,
            then fp32, or fp16 for target ``tensorrt``, which has no fused attention in fp32.
        provider: ``any``, or ``cuda`` for a graph that has to run on ONNX Runtime's CUDA provider: it has no
            GroupQueryAttention for fp32, so that combination gets standard operators.
        method: how weights become integers: ``rtn`` (round to nearest), ``hqq``, ``kquant`` or ``gptq`` (calibrated).
        block_size: weights that share a scale, along the input axis.
        accuracy_level: MatMulNBits' own: 0 computes in the activations' type, 4 in int8. With standard operators it
            is ONNX Runtime's session option on the CPU; TensorRT computes in the activations' type.
        zero_points: ``integer``; ``float``: real ones fit better and cost a small product more (4 bits only); ``none``:
            zero is the middle code of every block, which is fastest and fits worst, and all that TensorRT takes.
        keep_float: comma-separated parts that stay in the activations' type: ``qkv``, ``o``, ``gate``, ``up``,
            ``down``, ``first:N`` and ``last:N`` layers, or ``none``.
        lm_head: ``float``, ``int8`` or ``int4``.
        embedding: ``float`` or ``int8``.
        cache_length: tokens that a row of the KV cache holds, prompt and answer, where the graph fixes it (standard
            operators); None: the smaller of the context and 4,096.
        window_cache: whether layers with an attention window keep no more tokens than it has (GroupQueryAttention).

    Raises:
        ExportError: a value that is not known, or a combination that makes no sense.
    """

    model: str
    precision: str = "fp32"
    target: str = "ort"
    revision: str | None = None
    activations: str | None = None
    provider: str = "any"
    method: str | None = None
    block_size: int | None = None
    accuracy_level: int | None = None
    zero_points: str | None = None
    keep_float: str | None = None
    lm_head: str | None = None
    embedding: str | None = None
    cache_length: int | None = None
    window_cache: bool = False

    def __post_init__(self) -> None:
        one_of("precision", self.precision, PRECISIONS)
        one_of("target", self.target, TARGETS)
        one_of("provider", self.provider, PROVIDERS)
        if not self.model:
            raise ExportError("no model given; pass a folder, a GGUF file, a hub id or 'demo'")
        quantised = self.precision in BITS
        if self.activations is None:  # the other defaults depend on it
            floats = "fp16" if self.target == "tensorrt" else "fp32"
            object.__setattr__(self, "activations", floats if quantised else self.precision)
        defaults = {
            "method": {"int8": "rtn", "int4": "hqq"}.get(self.precision),
            # int8 in blocks of 16 with the sensitive parts in floats: see the export table for what each costs.
            "block_size": {"int8": 16, "int4": 32}.get(self.precision),
            "accuracy_level": 4 if quantised else None,
            "zero_points": self._zero_points() if quantised else None,
            "keep_float": {"int8": "qkv,down,first:2,last:1", "int4": "none"}.get(self.precision),
            "lm_head": {"int4": "int8"}.get(self.precision, "float"),
            "embedding": "float",
        }
        if not quantised:
            given = [
                n
                for n in ("method", "block_size", "accuracy_level", "zero_points", "keep_float")
                if getattr(self, n) is not None
            ]
            given += [n for n in ("lm_head", "embedding") if getattr(self, n) not in (None, "float")]
            if given:
                raise ExportError(
                    f"--{given[0].replace('_', '-')} belongs to int8 and int4; this precision is {self.precision}"
                )
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.cache_length is not None:
            if self.attention != "Attention":
                raise ExportError(
                    "--cache-length belongs to --target tensorrt; the KV cache of other graphs is as long as is needed"
                )
            if self.cache_length < 2:
                raise ExportError(f"--cache-length {self.cache_length} holds no prompt and answer; give 2 or more")
        if self.window_cache and self.attention != "GroupQueryAttention":
            raise ExportError(
                "--window-cache belongs to GroupQueryAttention (--target ort; with --provider cuda in fp16 or bf16); "
                "the KV cache of other graphs is whole"
            )
        one_of("activations", self.float_type, FLOATS)
        one_of("embedding", str(self.embedding), ("float", "int8"))
        one_of("lm-head", str(self.lm_head), ("float", *BITS))
        if quantised:
            one_of("method", str(self.method), METHODS)
            one_of("block-size", self.block, BLOCK_SIZES)
            one_of("zero-points", self.zero_points, ZERO_POINTS)
            if self.zero_points == "float" and self.precision == "int8":
                raise ExportError("--zero-points float goes with int4: MatMulNBits takes integers for 8 bits")
            for part in str(self.keep_float).split(","):
                name, _, number = part.partition(":")
                if f"{name}:N" in KEEP and number.isdecimal():
                    continue
                one_of("part in keep-float", part, KEEP[:6])
            one_of("accuracy-level", self.accuracy_level or 0, (0, 1, 2, 3, 4))
            if self.target == "plain":
                raise ExportError(
                    f"{self.precision} exists for the targets 'ort' and 'tensorrt'; plain graphs take "
                    f"{', '.join(FLOATS)}"
                )
            if self.standard and not self.symmetric:
                raise ExportError(
                    f"--zero-points {self.zero_points} needs MatMulNBits; TensorRT refuses every zero point but 0. "
                    f"Pass --zero-points none"
                )
            if self.standard and self.embedding != "float":
                raise ExportError(
                    f"--embedding {self.embedding} needs GatherBlockQuantized, which TensorRT lacks; "
                    f"pass --embedding float"
                )
        elif self.float_type != self.precision:
            raise ExportError(f"--activations {self.activations} belongs to int8 and int4; use --precision instead")

    @property
    def float_type(self) -> str:
        """Type of activations, norms, scales and KV cache."""
        return str(self.activations)

    @property
    def block(self) -> int:
        """Weights that share a scale; 0 where nothing is quantised."""
        return self.block_size or 0

    @property
    def attention(self) -> str:
        """``GroupQueryAttention``, ``Attention`` (standard, opset 24) or ``unfused``."""
        if self.target == "plain":
            return "unfused"
        return "Attention" if self.standard else "GroupQueryAttention"

    @property
    def standard(self) -> bool:
        """Whether the graph has ONNX's own operators only, in which int8 and int4 are ``DequantizeLinear``."""
        return self.target == "tensorrt" or (
            self.target == "ort" and self.provider == "cuda" and self.float_type == "fp32"
        )

    def _zero_points(self) -> str:
        if self.standard:
            return "none"
        return "float" if self.precision == "int4" and (self.method or "hqq") in ("hqq", "kquant") else "integer"

    def bits_of(self, weight: str, layers: int) -> int | None:
        """Bits of a linear layer's weight in a model of so many layers, None for a float one."""
        if weight == "lm_head.weight":
            return BITS.get(str(self.lm_head))
        index, part = int(weight.split(".")[2]), weight.split(".")[-2].removesuffix("_proj")
        part = "qkv" if part in ("q", "k", "v") else part
        for kept in str(self.keep_float).split(","):
            name, _, number = kept.partition(":")
            if (
                name == part
                or (name == "first" and index < int(number))
                or (name == "last" and index >= layers - int(number))
            ):
                return None
        return BITS.get(self.precision)

    def float_zero(self, bits: int) -> bool:
        """Whether zero points of such a weight are real numbers."""
        return self.zero_points == "float" and bits == 4

    @property
    def symmetric(self) -> bool:
        """Whether no zero points are stored: codes stand around the middle one."""
        return self.zero_points == "none"

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the fields that decide what is written; equal digests mean equal requests."""
        fields = asdict(self)
        if self.attention != "Attention":  # which has no say
            del fields["cache_length"]
        if not self.window_cache:  # as before there was such a field
            del fields["window_cache"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    """Refuse a value that is not known."""
    if value not in known:
        raise ExportError(f"unknown {name} {value!r}; choose one of {', '.join(map(str, known))}")
