"""Is this folder safe to open? Read before ONNX Runtime does, because a graph names files, operators and sizes.

A third-party graph can point its weights at ``/etc/passwd``, claim 2**62 elements, call an operator that only a
shared library brings, or nest functions until they unfold into a billion nodes. Everything here is a look at headers:
no weight is read, whatever its size, and no operator runs. Hashes are :func:`export.manifest.verify_files`' business.
A folder that somebody changes between the check and the opening is not covered.

Not covered: what the operators compute. A graph that asks for a huge tensor at run time (``ConstantOfShape``) or loops
for ever is valid ONNX; against that only limits on the process help.
Try: ``python -c "from pathlib import Path; from runtime.trust import check_folder; check_folder(Path('FOLDER'))"``.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx

from export.manifest import is_hub_blob, standard
from runtime.errors import SessionError

ALLOWED_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
"""Domains whose operators ONNX Runtime itself brings and a language model needs.

``ai.onnx.ml`` (trees, support vectors, string maps) and ``ai.onnx.preview*`` are ONNX's as well, but no transformer
uses them: they would only widen what a hostile graph can reach. ``com.microsoft.nchwc`` and ``com.ms.internal.nhwc``
are what ONNX Runtime writes for itself and does not validate on reading.
"""

ORT_DEFAULT_DOMAIN_OPS = frozenset({"SimplifiedLayerNormalization", "LayerNormalization"})
"""Contributed operators that ONNX Runtime keeps in ONNX's own domain (``LayerNormalization`` before opset 17)."""

REFUSED_OPS = frozenset({"EPContext", "Snpe", "PythonOp", "PythonOpGrad", "ATen", "TritonOp"})
"""``com.microsoft`` operators that carry or call compiled code, or name a file of it, instead of computing."""

GRAPH_BYTES_LIMIT = 2**31 - 1
"""Protobuf's own limit for one message."""
JSON_BYTES_LIMIT = 256 << 20
DEPTH_LIMIT = 32
"""Subgraphs in subgraphs, and functions in functions; an exported module tree has under ten."""
NODES_LIMIT = 2_000_000
"""Nodes after all local functions are inlined, which is what ONNX Runtime does first."""
RANK_LIMIT = 64
ELEMENTS_LIMIT = 2**56
SPARSE_BYTES_LIMIT = 1 << 30
"""A sparse tensor is made dense on loading: the one place where a few bytes of file are many bytes of memory."""
SHARING_LIMIT = 4
"""How often, on average, a byte of the data files may be used. Tied weights need 2."""

_LIBRARY = re.compile(r"\.(so(\.\d+)*|dll|dylib)$", re.IGNORECASE)
_LIBRARY_KEY = re.compile(r"customops?(lib|path)|pluginlib")
# Colon: drives and NTFS streams. Star: ONNX Runtime's "*/_ORT_MEM_ADDR_/*", where the offset is a memory address.
_BAD_IN_LOCATION = re.compile(r"[\x00-\x1f\x7f\\:*]")
_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)
# TensorProto type -> bits of an element, the field that holds it when raw_data does not, entries in it per element
# (below 8 bits: one entry is one packed byte).
_TYPES: dict[str, tuple[int, str, int]] = {
    **dict.fromkeys(("INT8", "UINT8", "BOOL"), (8, "int32_data", 1)),
    **dict.fromkeys(
        ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"), (8, "int32_data", 1)
    ),
    **dict.fromkeys(("INT16", "UINT16", "FLOAT16", "BFLOAT16"), (16, "int32_data", 1)),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), (4, "int32_data", 1)),
    **dict.fromkeys(("INT2", "UINT2"), (2, "int32_data", 1)),
    "INT32": (32, "int32_data", 1),
    "INT64": (64, "int64_data", 1),
    "UINT32": (32, "uint64_data", 1),
    "UINT64": (64, "uint64_data", 1),
    "FLOAT": (32, "float_data", 1),
    "DOUBLE": (64, "double_data", 1),
    "COMPLEX64": (64, "float_data", 2),
    "COMPLEX128": (128, "double_data", 2),
    "STRING": (0, "string_data", 1),
}
_TYPED_FIELDS = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")


class UntrustedModelError(SessionError):
    """A folder or a graph that asks for more than a model needs; names the thing and the remedy."""


def check_graph(path: Path) -> Any:
    """Check one ONNX file and everything that it names, without reading a weight.

    External data and the file itself have to lie in the file's folder. A symbolic link may lead out of it in one case:
    the folder is a snapshot in a Hugging Face hub cache (``REPO/snapshots/REVISION/...``) and the link, itself in that
    folder, ends at a blob of the same repository (``REPO/blobs/HASH``), which is how that cache keeps every file.

    Args:
        path: an ``.onnx`` file of at most 2 GiB (larger weights belong in external data).

    Returns:
        The parsed ``onnx.ModelProto``; its external tensors still are names and numbers.

    Raises:
        UntrustedModelError: what was found and what to do about it.
    """
    path = Path(path)
    size = _size_of(path.parent, path, str(path))
    if path.suffix.lower() == ".ort":
        raise UntrustedModelError(f"{path}: ONNX Runtime reads its own format from that ending; pass an .onnx file")
    if size > GRAPH_BYTES_LIMIT:
        raise UntrustedModelError(
            f"{path} has {size} bytes, a graph can have {GRAPH_BYTES_LIMIT}; export it with external data"
        )
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except Exception as e:  # DecodeError of whichever protobuf is installed; it has no stable import path
        raise UntrustedModelError(f"{path} is not an ONNX file or damaged ({e}); download or export it again") from None
    _Graphs(path, model).check()
    return model


def check_folder(folder: Path) -> None:
    """Check every ``.onnx`` file, every JSON file and the file names of a folder and of its ``onnx/``.

    Pickled weights are not looked at: nothing here opens them.

    Raises:
        UntrustedModelError: no ONNX file at all, a graph that :func:`check_graph` refuses, a shared library, a
            configuration that names one, or JSON that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UntrustedModelError(f"no folder at {folder}; pass the folder that holds the .onnx file")
    inner = folder / "onnx"
    if inner.is_dir() and not inner.resolve().is_relative_to(folder.resolve()):
        raise UntrustedModelError(f"{inner} is a link out of the folder; copy the files into the folder")
    files = [p for level in (folder, inner) if level.is_dir() for p in sorted(level.iterdir())]
    for path in files:
        if _LIBRARY.search(path.name):
            raise UntrustedModelError(
                f"{path} is a shared library, which would run as you: a model is data; remove it to open the model"
            )
    graphs = [p for p in files if p.suffix.lower() == ".onnx"]
    if not graphs:
        raise UntrustedModelError(f"{folder} and {inner} hold no .onnx file; pass the folder that holds it")
    for path in files:
        if path.suffix.lower() == ".json":
            _check_json(path)
    for path in graphs:
        check_graph(path)


def _size_of(folder: Path, path: Path, what: str) -> int:
    """Bytes of a regular file of this folder (or, in a hub cache, of this repository); nothing is opened."""
    try:
        home = Path(os.path.realpath(folder, strict=True))
        target = Path(os.path.realpath(path, strict=True))
        status = target.stat()
        place = Path(os.path.realpath(path.parent, strict=True))
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UntrustedModelError(f"{what}: cannot be opened ({reason}); copy the folder whole") from None
    if not (target.is_relative_to(home) or (place.is_relative_to(home) and is_hub_blob(home, target))):
        raise UntrustedModelError(f"{what}: leads out of {folder}, to {target}; copy that file into the folder")
    # A pipe would block the reader, a device never end.
    if not stat.S_ISREG(status.st_mode):
        raise UntrustedModelError(f"{what}: is not a regular file; replace it by one")
    return status.st_size


def _check_json(path: Path) -> None:
    """Refuse JSON that is unreadable or would have a program load a library."""
    size = _size_of(path.parent, path, str(path))
    if size > JSON_BYTES_LIMIT:
        raise UntrustedModelError(f"{path} has {size} bytes, the limit is {JSON_BYTES_LIMIT}; remove it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UntrustedModelError(f"{path} is not readable JSON ({e}); download or export it again") from None
    # A tokenizer's vocabulary may well hold ".dll"; a configuration has no reason to.
    is_config = "config" in path.name.lower()
    todo = [content]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            for key, value in item.items():
                if value and _LIBRARY_KEY.search(re.sub(r"[^a-z]", "", key.lower())):
                    raise UntrustedModelError(
                        f"{path}: {key!r} names a custom-op library ({str(value)[:80]!r}), which would run as you; "
                        f"remove the entry, or export the model without custom operators"
                    )
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)
        elif is_config and isinstance(item, str) and _LIBRARY.search(item.strip()):
            raise UntrustedModelError(f"{path} names the shared library {item[:80]!r}; remove the entry")


class _Graphs:
    """One walk over all graphs and functions of a model."""

    def __init__(self, path: Path, model: Any):
        self.path = path
        self.model = model
        self.functions: dict[tuple[str, str, str], Any] = {}
        self.external_bytes = 0
        self.file_sizes: dict[str, int] = {}

    def check(self) -> None:
        """Raise for the first thing that is wrong."""
        model = self.model
        if not model.HasField("graph"):
            raise self.error("holds no graph", "download or export it again")
        for function in model.functions:
            key = self.key(function, function.name)
            if key in self.functions:
                raise self.error(f"defines the function {function.name!r} twice")
            self.functions[key] = function
        opsets = self.opsets(model.opset_import)
        training = [g for t in model.training_info for g in (t.initialization, t.algorithm)]
        calls = Counter[tuple[str, str, str]]()
        nodes = sum(self.graph(g, opsets, calls, 0) for g in (model.graph, *training))
        bodies = {}
        for key, function in self.functions.items():
            inner = Counter[tuple[str, str, str]]()
            own = self.opsets(function.opset_import)
            size = self.nodes(function.node, own, inner, 0)
            size += sum(self.attribute(a, own, inner, 0) for a in function.attribute_proto)
            bodies[key] = (size, inner)
        self.check_inlined(nodes, calls, bodies)
        if self.external_bytes > SHARING_LIMIT * sum(self.file_sizes.values()):
            raise self.error(
                f"uses its data files' {sum(self.file_sizes.values())} bytes as {self.external_bytes} bytes of weights",
                "export it again with one place per weight",
            )

    def error(self, what: str, remedy: str = "export it again") -> UntrustedModelError:
        """An error that names the file."""
        return UntrustedModelError(f"{self.path} {what}; {remedy}")

    def text(self, value: str | bytes) -> str:
        """A string of the model. Protobuf hands out bytes where it is not UTF-8."""
        if not isinstance(value, str):
            raise self.error(f"has the name {value[:80]!r}, which is not UTF-8", "download or export it again")
        return value

    def key(self, item: Any, name: str | bytes) -> tuple[str, str, str]:
        """What a call of a function or operator is looked up by; ONNX's own domain has two names."""
        return standard(self.text(item.domain)), self.text(name), self.text(item.overload)

    def opsets(self, imports: Iterable[Any]) -> int | None:
        """Version of ONNX's own operator set, None where it is not imported."""
        versions: dict[str, int] = {}
        for entry in imports:
            domain = standard(self.text(entry.domain))
            if versions.setdefault(domain, entry.version) != entry.version:
                raise self.error(f"imports the operator set {domain!r} in two versions")
        version = versions.get("")
        known = onnx.defs.onnx_opset_version()
        if version is not None and not 1 <= version <= known:
            raise self.error(f"needs ONNX opset {version}, known are 1 to {known}", "upgrade onnx, or export it again")
        return version

    def check_inlined(self, nodes: int, calls: Counter[Any], bodies: dict[Any, tuple[int, Counter[Any]]]) -> None:
        """Refuse functions that call themselves, or that unfold without measure."""
        known: dict[Any, tuple[int, int]] = {}

        def inlined(key: Any, above: int) -> tuple[int, int]:
            """Nodes and levels of a function, called from ``above`` levels."""
            if key not in known and above < DEPTH_LIMIT:
                own, inner = bodies[key]
                parts = [(times, inlined(k, above + 1)) for k, times in inner.items()]
                known[key] = (own + sum(n * part[0] for n, part in parts), 1 + max((p[1] for _, p in parts), default=0))
            if key not in known or above + known[key][1] > DEPTH_LIMIT:
                raise self.error(
                    f"has functions that call themselves or nest deeper than {DEPTH_LIMIT} (at {key[1]!r})",
                    "export it without local functions",
                )
            return known[key]

        # Functions that nobody calls count as well: ONNX Runtime reads them all.
        for key in bodies:
            inlined(key, 0)
        total = nodes + sum(times * inlined(key, 0)[0] for key, times in calls.items())
        if total > NODES_LIMIT:
            raise self.error(
                f"unfolds into {total} nodes, the limit is {NODES_LIMIT}", "export it without local functions"
            )

    def graph(self, graph: Any, opset: int | None, calls: Counter[Any], depth: int) -> int:
        """Check a graph, return the nodes in it and in its subgraphs, count its calls of functions."""
        if depth > DEPTH_LIMIT:
            raise self.error(f"has subgraphs nested deeper than {DEPTH_LIMIT}")
        for tensor in graph.initializer:
            self.tensor(tensor)
        for sparse in graph.sparse_initializer:
            self.sparse(sparse)
        return self.nodes(graph.node, opset, calls, depth)

    def nodes(self, nodes: Iterable[Any], opset: int | None, calls: Counter[Any], depth: int) -> int:
        """Check operators and attributes; see :meth:`graph`."""
        total = 0
        for node in nodes:
            total += 1
            self.operator(node, opset, calls)
            for attribute in node.attribute:
                total += self.attribute(attribute, opset, calls, depth)
        return total

    def attribute(self, attribute: Any, opset: int | None, calls: Counter[Any], depth: int) -> int:
        """Check whatever an attribute carries, whichever type it claims to have."""
        for tensor in _given(attribute, "t", attribute.tensors):
            self.tensor(tensor)
        for sparse in _given(attribute, "sparse_tensor", attribute.sparse_tensors):
            self.sparse(sparse)
        return sum(self.graph(g, opset, calls, depth + 1) for g in _given(attribute, "g", attribute.graphs))

    def operator(self, node: Any, opset: int | None, calls: Counter[Any]) -> None:
        """Refuse operators that ONNX Runtime does not bring or that run somebody's code."""
        domain, op, _ = key = self.key(node, node.op_type)
        where = f"has the node {node.name!r} of the operator {domain + '::' if domain else ''}{op}"
        if key in self.functions:
            calls[key] += 1
        elif domain not in ALLOWED_DOMAINS:
            raise self.error(
                f"{where}, which only a custom-op library can run", "export it with ONNX or com.microsoft operators"
            )
        elif domain and op in REFUSED_OPS:
            raise self.error(f"{where}, which runs compiled code from the model", "export it as plain operators")
        elif not domain:
            if opset is None:
                raise self.error(f"{where} and imports no ONNX operator set")
            if op not in ORT_DEFAULT_DOMAIN_OPS and not onnx.defs.has(op, opset, ""):
                raise self.error(f"{where}, which ONNX opset {opset} does not have")

    def sparse(self, sparse: Any) -> None:
        """Check a sparse tensor: its two parts, and what it becomes when it is made dense."""
        self.tensor(sparse.values)
        self.tensor(sparse.indices)
        name = sparse.values.name
        bits = _TYPES[_type_name(sparse.values.data_type)][0] or 8
        if (dense := self.elements(name, sparse.dims) * bits // 8) > SPARSE_BYTES_LIMIT:
            raise self.error(
                f"has the sparse tensor {name!r}, {dense} bytes when dense, the limit is {SPARSE_BYTES_LIMIT}",
                "export it as a dense one",
            )

    def elements(self, name: str, dims: Iterable[int]) -> int:
        """Product of the dimensions."""
        shape = list(dims)
        total = bound = 1
        for dim in shape:
            total *= dim
            # Zeros aside: [2**62, 2**62, 0] has no element and still overflows whoever multiplies from the left.
            bound = min(bound * max(dim, 1), ELEMENTS_LIMIT + 1)
        if len(shape) > RANK_LIMIT or bound > ELEMENTS_LIMIT or any(d < 0 for d in shape):
            shown = str(shape[:8])[:-1] + (", ...]" if len(shape) > 8 else "]")
            raise self.error(f"has the tensor {name!r} of the impossible shape {shown}")
        return total

    def tensor(self, tensor: Any) -> None:
        """Check that a tensor has exactly the data that its shape and type demand, wherever they are."""
        name = tensor.name
        kind = _type_name(tensor.data_type)
        if kind not in _TYPES:
            raise self.error(f"has the tensor {name!r} of the unknown type {tensor.data_type}")
        bits, field, entries = _TYPES[kind]
        count = self.elements(name, tensor.dims)
        nbytes = -(-count * bits // 8)
        filled = [f for f in _TYPED_FIELDS if len(getattr(tensor, f))]
        raw = tensor.HasField("raw_data")
        external = tensor.data_location == tensor.EXTERNAL
        if tensor.HasField("segment") or external != bool(tensor.external_data) or raw + external + len(filled) > 1:
            raise self.error(f"has the tensor {name!r} with its data in two places or in none")
        if external or raw:
            if kind == "STRING":
                raise self.error(f"has the tensor {name!r} of strings as raw or external data")
            if external:
                self.external(name, tensor.external_data, nbytes)
            elif len(tensor.raw_data) != nbytes:
                raise self.wrong_size(name, nbytes, f"{len(tensor.raw_data)} bytes in the graph")
        else:
            expected = nbytes if bits in (2, 4) else count * entries
            have = len(getattr(tensor, field))
            if have != expected:
                raise self.wrong_size(name, nbytes, f"{have} entries in {field}, not {expected}")

    def wrong_size(self, name: str, nbytes: int, found: str) -> UntrustedModelError:
        """An error for data that are not as long as the shape says."""
        return self.error(f"has the tensor {name!r}, whose shape and type demand {nbytes} bytes, with {found}")

    def external(self, name: str, entries: Iterable[Any], nbytes: int) -> None:
        """Check that ``nbytes`` of a tensor lie in a file of the folder."""
        values: dict[str, str] = {}
        for entry in entries:
            # ONNX Runtime's "prepacked_*" would be read as a kernel's memory layout; other keys nobody knows.
            key = self.text(entry.key)
            if key in values or key not in ("location", "offset", "length", "checksum"):
                raise self.error(f"has the tensor {name!r} with the external-data key {key!r}, twice or not known")
            values[key] = self.text(entry.value)
        location = values.get("location", "")
        what = f"{self.path}: the external data {location!r} of the tensor {name!r}"
        parts = location.split("/")
        if not location or _BAD_IN_LOCATION.search(location) or "" in parts or ".." in parts:
            raise UntrustedModelError(
                f"{what} is not a plain path inside the folder; move the file there and export the model again"
            )
        if location not in self.file_sizes:
            self.file_sizes[location] = _size_of(self.path.parent, self.path.parent / location, what)
        size = self.file_sizes[location]
        offset, length = (self.number(what, key, values.get(key)) for key in ("offset", "length"))
        if length is not None and length != nbytes:
            raise self.wrong_size(name, nbytes, f"{length} bytes of external data")
        if (offset or 0) + nbytes > size:
            raise UntrustedModelError(
                f"{what} ends at byte {(offset or 0) + nbytes} of a file of {size}; copy the folder whole"
            )
        self.external_bytes += nbytes

    def number(self, what: str, key: str, text: str | None) -> int | None:
        """A non-negative decimal number; ``int`` would take ``-1``, ``1_0`` and Arabic digits as well."""
        if text is None:
            return None
        if not _NUMBER.fullmatch(text):
            raise UntrustedModelError(f"{what} has the {key} {text[:40]!r}, not a number of bytes; export it again")
        return int(text)


def _given(message: Any, field: str, more: Iterable[Any]) -> Iterator[Any]:
    """A singular field where it is set, then the repeated one."""
    if message.HasField(field):
        yield getattr(message, field)
    yield from more


def _type_name(code: int) -> str:
    """``FLOAT`` for 1; empty for a number that ONNX does not know."""
    try:
        return str(onnx.TensorProto.DataType.Name(code))
    except ValueError:
        return ""
