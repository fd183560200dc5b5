"""Exact checks of the graph: files, manifest, the graph as the export would make it, every attribute.

They cost seconds and name a defect by its node, so they come first: a norm epsilon of 1e-3 in one layer moves the mean
KL divergence by 3e-10, which no statistic finds under fp16 noise.
Try: ``llama-onnx validate FOLDER --baseline demo --only graph,attributes``.
"""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatch
from typing import Any

import numpy as np

from bench.gate.found import Found, exact, undecided
from bench.gate.subject import Subject
from export.manifest import (
    ATTENTIONS,
    MANIFEST_NAME,
    NORMS,
    ONNX_TYPE,
    ManifestError,
    release,
    sha256_of,
    verify_files,
)
from export.oldest_runtime import oldest_runtime
from reports.validation import Finding

LOADED_ELSEWHERE = (
    *(".safetensors", ".gguf", "pytorch_model*.bin", "adapter_model*.bin"),
    *("consolidated*.pth", "tf_model*.h5", "flax_model*.msgpack"),
)
"""Names of weights that other programs would load in place of a graph."""


def files(s: Subject) -> Found:
    """Every file against the manifest's size and SHA-256, and nothing in the folder that may not be trusted."""
    from runtime.errors import SessionError
    from runtime.loading import read_folder

    try:
        manifest = read_folder(s.folder, verify=False)
        if s.sealed:
            verify_files(s.folder, manifest, known=s.hashes)
    except (ManifestError, SessionError) as e:
        return exact([Finding(where="folder", what=str(e))], "")
    there = {p.relative_to(s.folder).as_posix() for p in s.folder.rglob("*") if not p.is_dir()}
    if broken := sorted(n for n in there if not (s.folder / n).is_file()):
        what = "is a link that leads nowhere, or no plain file; copy the folder whole"
        return exact([Finding(where=n, what=what) for n in broken], "")
    unseen = _unseen(s, there)
    if wrong := [*(unseen if s.ours else ()), *_other_weights(s, there)]:
        return exact(wrong, "")
    if not s.sealed:
        notes = [*manifest.notes, *(f"{f.where} {f.what}" for f in unseen)]
        return Found("REPORTED", "no manifest: a third-party export, no hash to check", notes=notes)
    extra = sorted(there - manifest.files.keys() - {MANIFEST_NAME})
    notes = [f"not in the manifest: {', '.join(extra[:5])}"] if extra else []
    return exact([], f"{len(manifest.files)} files as published", notes)


def _unseen(s: Subject, there: set[str]) -> list[Finding]:
    """Graphs that no check looks at, and data that the graphs read and no hash holds."""
    m = s.manifest
    graphs = {m.decode_graph, m.scoring_graph}
    # optimum takes model.onnx, onnxruntime-genai what its configuration names.
    what = f"is a graph that no check looks at ({', '.join(sorted(graphs))} is); remove it"
    found = [Finding(where=n, what=what) for n in sorted(there - graphs) if n.endswith(".onnx")]
    what = "holds weights and is not in the manifest's list of files"
    return found + [Finding(where=n, what=what) for n in sorted(_data_of(s) - m.files.keys())]


def _data_of(s: Subject) -> set[str]:
    """Files that the graphs read weights from."""
    from bench.gate.canonical import constants_of

    tensors = [t for role in s.roles for t in constants_of(s.graph(role)).values()]
    return {e.value for t in tensors for e in t.external_data if e.key == "location"}


def _other_weights(s: Subject, there: set[str]) -> list[Finding]:
    """Weights of another model beside the graphs, which transformers and others would load in their place."""
    names = sorted(n for n in there - _data_of(s) if any(fnmatch(n, f"*{p}") for p in LOADED_ELSEWHERE))
    what = "holds weights that are not the baseline's, and other programs load it in place of the graph; remove it"
    same = set(s.baseline.hashes["baseline"].values()) if names else set()
    return [
        Finding(where=n, what=what)
        for n in names
        if (s.hashes.get(n) or sha256_of(s.folder / n)) not in same and not _equal_weights(s, n)
    ]


def _equal_weights(s: Subject, name: str) -> bool:
    """Whether a safetensors file holds the baseline's tensors, in whatever float type is wide enough for them."""
    import torch
    from safetensors import SafetensorError, safe_open

    if not name.endswith(".safetensors"):
        return False
    theirs = s.baseline.tensors
    try:
        with safe_open(s.folder / name, framework="pt") as held:
            return all(
                n in theirs.where and torch.equal(held.get_tensor(n).double(), theirs.read(n).double())
                for n in held.keys()  # noqa: SIM118 - not a dict
            )
    except SafetensorError:
        return False


def manifest(s: Subject) -> Found:
    """What the manifest claims against what the baseline's configuration and the request demand."""
    from export.sizes import head_dim_of, kv_heads_of

    m, config = s.manifest, s.baseline.config

    wanted: dict[str, tuple[Any, Any]] = {
        "context_length": (m.context_length, s.baseline.context),
        "vocab_size": (m.vocab_size, config.vocab_size),
        "eos_token_ids": (tuple(m.eos_token_ids), s.baseline.eos),
        "kv.layers": (m.kv.layers, config.num_hidden_layers),
        "kv.kv_heads": (m.kv.kv_heads, kv_heads_of(config)),
        "kv.head_dim": (m.kv.head_dim, head_dim_of(config)),
        "model_type": (m.model_type, config.model_type),
    }
    if s.ours:
        from export.convert import kept_windows

        graph = s.conversion.decode.graph
        past = next(i for i in graph.input if i.name == "past_key_values.0.key")
        wanted |= {
            "kv.cache_length": (m.kv.cache_length, past.type.tensor_type.shape.dim[2].dim_value or None),
            "precision": (m.precision, s.spec.precision),
            "activations": (m.activations, s.spec.float_type),
            "kv.dtype": (m.kv.dtype, s.spec.float_type),
            "kv.windows": (m.kv.windows, kept_windows(config, s.spec)),
            "attention": (m.attention, s.spec.attention),
            "padding": (m.padding, "right" if s.spec.attention == "GroupQueryAttention" else "any"),
            "inputs": (set(m.inputs), {i.name for i in graph.input}),
            "outputs": (set(m.outputs), {o.name for o in graph.output}),
            "weights": ({w.name for w in m.weights}, {r.name for r in s.conversion.recipes}),
        }
        oldest = oldest_runtime(s.conversion.decode, s.conversion.scoring)[0]
        if m.oldest_runtime and release(m.oldest_runtime) < release(oldest):
            wanted["oldest_runtime"] = (m.oldest_runtime, oldest)
    elif s.sealed:
        from runtime.foreign import describe

        wanted["precision"] = (m.precision, describe(s.folder).precision)
    findings = [
        Finding(where=f"{MANIFEST_NAME}, {key}", what=f"says {_short(have)}, the baseline demands {_short(want)}")
        for key, (have, want) in wanted.items()
        if have != want
    ]
    # A folder says itself in which precision it wants to be judged: who ships it may know better.
    claimed = {
        "precision": m.precision,
        "target": m.target if s.sealed else "none: there is no manifest",
        "method": m.quantisation.method if m.quantisation else "none: it is not quantised",
    }
    findings += [
        Finding(where=f"{key} of the folder", what=f"is {claimed[key]}, {value} was expected")
        for key, value in s.expect.items()
        if claimed[key] != value
    ]
    asked = f", and is {', '.join(s.expect.values())} as expected" if s.expect else ""
    return exact(findings, f"{len(wanted)} claims agree with the baseline's configuration{asked}")


def _short(value: Any) -> str:
    text = str(sorted(value) if isinstance(value, set) else value)
    return text if len(text) < 80 else text[:77] + "..."


def graph(s: Subject) -> Found:
    """Both graphs against what the export makes of this configuration, node by node (names and order aside)."""
    if not s.ours:
        return _third_party(s)
    from export.tensorrt_ops import check_standard

    if s.spec.attention == "Attention" and not s.manifest.kv.cache_length:
        what = "grows its KV cache by Concat: an older version of this tool exported it; export it again"
        return exact([Finding(where=s.manifest.decode_graph, what=what)], "")
    findings: list[Finding] = []
    for role in s.roles:
        name = s.manifest.decode_graph if role == "decode" else s.manifest.scoring_graph
        findings += [f.model_copy(update={"where": f"{name}: {f.where}"}) for f in s.pairings[role].findings]
        if s.spec.target == "tensorrt":
            findings += [Finding(where=name, what=what) for what in check_standard(s.graph(role))]
    # The checks that compute skip what does not fit: without this, a short cache would leave little of the gate.
    if not findings and s.room < (least := min(s.mode.window, s.baseline.context)):
        what = f"is {s.room}: too short for the gate, whose texts take {least}; export with a larger --cache-length"
        return undecided([Finding(where=f"{MANIFEST_NAME}, kv.cache_length", what=what)])
    nodes = [n for role in s.roles for n in s.graph(role).graph.node]
    fused = findings and any("Fusion" in n.name for n in nodes)
    notes = ["ONNX Runtime's optimiser has saved this graph; ship it as exported, it is optimised when it is opened"]
    return exact(findings, f"{len(nodes)} nodes in {len(s.roles)} graphs equal to the export's", notes if fused else ())


def _third_party(s: Subject) -> Found:
    """No graph to compare with: what decides by ids, places or lengths and has no place in a decoder is named."""
    from bench.gate.canonical import oddities
    from bench.gate.control import unexplained

    odd = [f"{f.where} {f.what}" for role in s.roles for f in oddities(s.graph(role))]
    notes = [*odd[:5], f"{len(odd) - 5} more of the kind"] if len(odd) > 5 else odd
    if control := [f for role in s.roles for f in unexplained(s.graph(role), s.baseline.config)]:
        named = [f.model_copy(update={"where": f"unexplained control, {f.where}"}) for f in control]
        return undecided(named, notes)
    return Found(
        "SKIPPED", "not a fused graph of ours: attributes, control and numbers are checked instead", notes=notes
    )


def attributes(s: Subject) -> Found:
    """Every attribute that the configuration determines, read from each node; also of graphs made elsewhere."""
    from bench.gate.canonical import layers_of

    findings: list[Finding] = []
    count = 0
    for role in s.roles:
        model = s.graph(role)
        name = s.manifest.decode_graph if role == "decode" else s.manifest.scoring_graph
        layers = layers_of(model)
        for node, layer in zip(model.graph.node, layers, strict=True):
            wrong, looked = _node_attributes(node, s, layer)
            count += looked
            where = f"{name}: " + (f"layer {layer}, " if layer is not None else "") + f"{node.op_type} ({node.name})"
            findings += [Finding(where=where, what=w, layer=layer) for w in wrong]
        findings += _counts(model, s, name)
    if not count:
        return Found("REPORTED", "no fused attention or norm whose attributes could be read: the numbers decide")
    return exact(findings, f"{count} attributes as the configuration demands")


def _window(config: Any, layer: int | None) -> int | None:
    """GroupQueryAttention's ``local_window_size`` in a layer, -1 where it attends to everything; None: not known."""
    from export.architectures import ARCHITECTURES

    if config.model_type not in ARCHITECTURES:
        return None if getattr(config, "sliding_window", None) else -1
    windows = ARCHITECTURES[config.model_type].windows(config)
    if (layer is None and len(set(windows)) > 1) or (layer or 0) >= len(windows):
        return None
    return windows[layer or 0] or -1


def _node_attributes(node: Any, s: Subject, layer: int | None) -> tuple[list[str], int]:
    from bench.gate.canonical import attributes_of
    from export.sizes import head_dim_of, kv_heads_of

    config = s.baseline.config
    values = attributes_of(node, s.baseline.context)
    size = head_dim_of(config)
    wanted: dict[str, Any] = {}
    if node.op_type == "GroupQueryAttention":
        values.setdefault("scale", 0.0)
        wanted = {"num_heads": config.num_attention_heads, "kv_num_heads": kv_heads_of(config), "rotary_interleaved": 0}
        if (window := _window(config, layer)) is not None:
            wanted["local_window_size"] = window
        wanted |= {"softcap": 0.0, "smooth_softmax": -1, "causal": 1}
        if s.ours:
            wanted["do_rotary"] = 1
        if _has_qk_norm(node):
            wanted["qk_norm_epsilon"] = float(np.float32(config.rms_norm_eps))
    elif node.op_type == "Attention":
        wanted = {"softcap": 0.0}
    elif node.op_type == "RotaryEmbedding":
        wanted = {"interleaved": 0}
    wrong = [f"{k} is {values.get(k)}, not {v}" for k, v in wanted.items() if values.get(k) != v]
    looked = len(wanted)
    if node.op_type in ATTENTIONS:
        looked += 1
        scale = values.get("scale", 0.0) or size**-0.5  # 0 or nothing stands for 1 / sqrt(head size)
        if abs(scale - size**-0.5) > 1e-6 * size**-0.5:
            wrong.append(f"scale is {scale:.7g}, not {size**-0.5:.7g}")
    if node.op_type in NORMS:
        looked += 1
        epsilon = values.get("epsilon", 0.0)
        if abs(epsilon - config.rms_norm_eps) > 1e-6 * config.rms_norm_eps:
            wrong.append(f"epsilon is {epsilon:.4g}, not {config.rms_norm_eps:.4g}")
    if node.op_type == "GroupQueryAttention":
        looked += 1
        names = [n.split(".")[1] for n in [*node.input[3:5], *node.output[1:3]] if n.count(".") == 2]
        if len(set(names)) > 1:
            wrong.append(f"reads and writes the cache of layers {', '.join(sorted(set(names)))}")
    return wrong, looked


def _has_qk_norm(node: Any) -> bool:
    """Whether an attention holds the weights of the QK norm itself."""
    return node.op_type == "GroupQueryAttention" and len(node.input) > 15 and bool(node.input[14])


def _norms(config: Any) -> int:
    """Norms of a decoder; of one that is not described two a layer and the last one."""
    from export.architectures import ARCHITECTURES
    from export.check import norms_of

    return norms_of(config) if config.model_type in ARCHITECTURES else 2 * int(config.num_hidden_layers) + 1


def _counts(model: Any, s: Subject, name: str) -> list[Finding]:
    """As many fused attentions and norms as the configuration has layers; input, output and cache types as claimed."""
    found = Counter(n.op_type for n in model.graph.node)
    wrong = []
    layers = s.baseline.config.num_hidden_layers
    attention = s.manifest.attention
    if attention in ATTENTIONS and found[attention] != layers:
        wrong.append(f"{found[attention]} {attention} for {layers} layers")
    norms = sum(found[n] for n in NORMS)
    norms += 2 * sum(_has_qk_norm(n) for n in model.graph.node)
    if norms and norms != (expected := _norms(s.baseline.config)):
        wrong.append(f"{norms} fused norms where {layers} layers and the last norm make {expected}")
    wanted = ONNX_TYPE.get(s.manifest.kv.dtype)
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")) and value.type.tensor_type.elem_type != wanted:
            wrong.append(f"{value.name} is not of the claimed type {s.manifest.kv.dtype}")
    return [Finding(where=name, what=w) for w in wrong]


def rotary_tables(s: Subject) -> Found:
    """Cosine and sine tables row by row against tables computed anew from transformers' frequencies, in fp64."""
    from bench.gate.canonical import constants_of
    from bench.gate.tensors import TensorReader

    reader = TensorReader(s.folder)
    findings: list[Finding] = []
    rows = 0
    worst = 0.0
    seen: set[tuple[str, bytes]] = set()
    for role in s.roles:
        model = s.graph(role)
        tensors = constants_of(model)
        for kind, name in table_names(model):
            if name not in tensors:
                findings.append(Finding(where=name, what="is not a stored table, so its rows cannot be read"))
                continue
            place = tensors[name].SerializeToString()  # both graphs mostly read one file
            if (kind, place) in seen:
                continue
            seen.add((kind, place))
            found = reader.read(tensors[name])
            wanted, slack = s.baseline.rope_rows(kind, len(found))
            rows = max(rows, len(found))
            if found.shape != wanted.shape:
                findings.append(Finding(where=name, what=f"has shape {list(found.shape)}, not {list(wanted.shape)}"))
                continue
            # Half a unit in the last place of the stored type, beside what fp32 angles may be off.
            ulp = {2: 2.0**-11, 4: 2.0**-24}[found.dtype.itemsize] if s.manifest.activations != "bf16" else 2.0**-8
            off = np.abs(found.astype(np.float64) - wanted) - slack - 2 * ulp * np.maximum(1.0, np.abs(wanted).max())
            worst = max(worst, float(off.max()))
            if (off > 0).any():
                row = int(np.flatnonzero((off > 0).any(axis=1))[0])
                column = int(off[row].argmax())
                findings.append(
                    Finding(
                        where=f"{name}, row {row}",
                        what=f"column {column} is {float(found[row, column]):.7g}, transformers' rotary module gives "
                        f"{wanted[row, column]:.7g} ({int((off > 0).any(axis=1).sum())} of {len(found)} rows differ)",
                    )
                )
            if len(found) < s.baseline.context:
                findings.append(
                    Finding(
                        where=name,
                        what=f"has {len(found)} rows, the context is {s.baseline.context}",
                    )
                )
    if not seen and not findings:
        return Found("REPORTED", "the graph computes its rotary embedding itself: the numbers decide")
    return exact(findings, f"{rows:,} rows of cosine and sine as transformers computes them")


def table_names(model: Any) -> set[tuple[str, str]]:
    """(``cos`` or ``sin``, initialiser) of the tables that fused rotary embeddings read."""
    names: set[tuple[str, str]] = set()
    for node in model.graph.node:
        first = {"GroupQueryAttention": 7, "RotaryEmbedding": 1}.get(node.op_type)
        if first is not None and len(node.input) > first + 1 and node.input[first]:
            if node.op_type == "RotaryEmbedding" and node.domain:
                first = 2  # com.microsoft puts the positions first
            names |= {("cos", node.input[first]), ("sin", node.input[first + 1])}
    return names
