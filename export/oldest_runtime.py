"""The oldest ONNX Runtime that computes a graph right: one table, from the form of an operator to a version.

Every row was tried at both ends on the CPU: one node against numpy under 24 releases from 1.16.3 to 1.32.0
(docs/export.md). Standard library only: ``runtime`` reads third-party graphs by it too.
Try: ``llama-onnx inspect FOLDER``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from export.manifest import release, standard

MS = "com.microsoft"
TRIED_FROM = "1.20.0"
"""No graph is said to be right under an older one: nobody tries those any more."""


@dataclass(frozen=True)
class Form:
    """A form of an operator that not every ONNX Runtime computes right.

    Attributes:
        operator, domain: the operator.
        oldest: ONNX Runtime's first version that computes it right.
        before: what older ones do with it.
        attributes: values, or ranges of them, that make the form; {} for every node of the operator.
        ir_version: 0, or what a graph of ours with it is stamped with, so that older ones, which read another meaning
            into it, refuse the file ("Unsupported model IR version").
    """

    operator: str
    domain: str
    oldest: str
    before: str
    attributes: Mapping[str, int | range] = field(default_factory=dict)
    ir_version: int = 0

    def __str__(self) -> str:
        named = (key if isinstance(value, range) else f"{key}={value}" for key, value in self.attributes.items())
        return " ".join([self.operator, *named])

    def fits(self, node: Any) -> bool:
        """Whether a node (``onnx.NodeProto``) has this form."""
        if (node.op_type, standard(node.domain)) != (self.operator, self.domain):
            return False
        values = {a.name: a.i for a in node.attribute}
        return all(
            values.get(key, -1) in (wanted if isinstance(wanted, range) else (wanted,))
            for key, wanted in self.attributes.items()
        )


_ANY_WINDOW = range(1, 1 << 31)
FORMS = (
    Form("GroupQueryAttention", MS, "1.20.0", "get wrong for several new tokens on a past"),
    Form(
        "GroupQueryAttention",
        MS,
        "1.24.1",
        "read as a window of one token more",
        {"local_window_size": _ANY_WINDOW},
        ir_version=12,
    ),
    Form("GroupQueryAttention", MS, "1.29.0", "refuse", {"sliding_window_cache": 1}),
    Form("SkipSimplifiedLayerNormalization", MS, "1.20.1", "refuse in fp16"),
    Form("MatMulNBits", MS, "1.20.0", "compute as infinity in fp16 with accuracy level 4"),
    Form("MatMulNBits", MS, "1.23.0", "refuse or, 1.22, get wrong on some CPUs", {"bits": 8}, ir_version=11),
    Form("GatherBlockQuantized", MS, "1.23.0", "refuse", {"bits": 8}),
    Form("TensorScatter", "", "1.25.0", "refuse"),
)
"""Operators of our exports whose first right version is not that of their operator set."""
OPSETS = {22: "1.21.0", 23: "1.23.0", 24: "1.24.1", 25: "1.24.1", 26: "1.25.0", 27: "1.32.0", 28: "1.32.0"}
IR_VERSIONS = {11: "1.23.0", 12: "1.24.1", 13: "1.24.1", 14: "1.32.0"}
"""ONNX's operator sets and file versions, each with the first ONNX Runtime that opens it; older ones refuse."""


def oldest_runtime(*models: Any) -> tuple[str, str]:
    """The oldest ONNX Runtime that computes all of these (``onnx.ModelProto``) right, and what demands it.

    Returns:
        A version, and the node that demands it; (``""``, ``""``) for an operator set that no version known here opens.
    """
    demands = [demand for model in models for demand in _demands(model)]
    if any(not version for version, _ in demands):
        return "", ""
    return max([*demands, (TRIED_FROM, "nothing older was tried")], key=lambda demand: release(demand[0]))


def ir_version_of(model: Any, least: int) -> int:
    """The file version that keeps out every ONNX Runtime which would misread the graph without an error."""
    return max([least, *(form.ir_version for form, _ in _forms(model))])


def _demands(model: Any) -> Iterator[tuple[str, str]]:
    for form, node in _forms(model):
        yield form.oldest, f"{form} ({(node.name or node.op_type)[:80]}), which older ones {form.before}"
    for opset in model.opset_import:
        if standard(opset.domain) == "" and opset.version >= min(OPSETS):
            yield OPSETS.get(opset.version, ""), f"operator set {opset.version}, which older ones refuse"
    if model.ir_version >= min(IR_VERSIONS):
        yield IR_VERSIONS.get(model.ir_version, ""), f"IR version {model.ir_version}, which older ones refuse"


def _forms(model: Any) -> Iterator[tuple[Form, Any]]:
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    return ((form, node) for node in nodes for form in FORMS if form.fits(node))
