"""TensorRT's own word on a folder of ``--target tensorrt``: TensorRT-RTX's parser and compiler, which need no GPU.

A list of operator names cannot know whether the cache is updated in place, whether an attention stays one layer, or
which input is ignored. Nothing is run: speed and numbers on a GPU stay open.
Try: ``llama-onnx validate FOLDER --baseline demo --only tensorrt_compile --sm 89,120``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.gate.canonical import layer_of
from bench.gate.found import Found, exact
from bench.gate.subject import Subject, gate_shapes
from export.manifest import Manifest
from reports.validation import Finding
from runtime.trt_compiler import UNFUSED_TYPE, Compiled, Fault, Layer


def tensorrt_compile(s: Subject) -> Found:
    """Both graphs parsed and held against :func:`unintended`; engines of the decode graph for prefill and decode."""
    from bench.errors import MachineError
    from bench.process.trt_compile import compile_in_child
    from runtime.errors import CompileError, CompilerMissingError
    from runtime.tensorrt import engine_profiles

    m = s.manifest
    engines = m.activations != UNFUSED_TYPE
    profiles = list(engine_profiles(m, gate_shapes(s)).values())
    findings: list[Finding] = []
    notes: list[str] = []
    for role in s.roles:
        name = m.decode_graph if role == "decode" else m.scoring_graph
        try:
            compiled, peak = compile_in_child(s.folder / name, profiles, s.sms if engines and role == "decode" else ())
        except (CompilerMissingError, MachineError) as e:  # parity is judged all the same
            return Found("SKIPPED", str(e))
        except CompileError as e:
            return exact([Finding(where=name, what=str(e))], "")
        faults = [*compiled.faults, *(f for e in compiled.engines for f in e.faults)]
        found = [*map(_finding, faults), *(() if compiled.faults else unintended(compiled, m))]
        findings += [f.model_copy(update={"where": f"{name}: {f.where}"}) for f in found]
        notes += [f"{name}: TensorRT-RTX warns: {w}" for w in compiled.warnings]
        if role == "decode":
            kinds = ", ".join(f"{n} {kind}" for kind, n in compiled.kinds().items())
            notes.append(f"TensorRT-RTX {compiled.compiler}, layers: {kinds}")
            notes += [
                f"SM {e.sm}: an engine of {e.nbytes / 1e6:,.0f} MB in {e.seconds:.1f} s, "
                f"{peak.own_bytes / 1e9:.1f} GB of memory"
                for e in compiled.engines
            ]
    held = f"{2 * m.kv.layers} caches updated in place, {m.kv.layers} attentions whole"
    if not findings and not engines:
        why = f"TensorRT has no fused attention in {UNFUSED_TYPE}: parsed, {held}, no engine; --precision fp16 has one"
        return Found("SKIPPED", why, notes=notes)
    return exact(findings, f"{held}, engines for SM {', '.join(map(str, s.sms))}", notes)


def _finding(fault: Fault) -> Finding:
    return Finding(where=fault.where, what=fault.what, layer=layer_of(fault.where))


def unintended(compiled: Compiled, manifest: Manifest) -> Iterator[Finding]:
    """Layers that are not what the export means: each cache updated in place, one attention a decoder layer."""
    made_by = {value: layer for layer in compiled.layers for value in layer.outputs}
    attentions = [layer for layer in compiled.layers if layer.kind == "ATTENTION_INPUT"]
    for k in range(manifest.kv.layers):
        for kind in ("key", "value"):
            name = f"present.{k}.{kind}"
            source = made_by.get(name)
            if source is None or source.kind != "KV_CACHE_UPDATE":
                what = f"comes from {_named(source)}, not from a KV_CACHE_UPDATE: the cache is copied at every token"
                yield Finding(where=name, what=what, layer=k)
        readers = [a.name for a in attentions if _reads(a, f"present.{k}.value", made_by)]
        if len(readers) != 1:
            yield Finding(where=f"present.{k}.value", what=f"is read by {len(readers)} attentions, not by one", layer=k)
    for layer in compiled.layers:
        if layer.kind == "SOFTMAX":
            yield Finding(
                where=layer.name, what="is an attention pulled apart: a SOFTMAX layer", layer=layer_of(layer.name)
            )
    if len(attentions) != manifest.kv.layers:
        what = f"has {len(attentions)} attention layers for {manifest.kv.layers} decoder layers"
        yield Finding(where="network", what=what)


def _reads(layer: Layer, value: str, made_by: dict[str, Layer], steps: int = 3) -> bool:
    """Whether a layer reads a value, casts and scales between them set aside."""
    if value in layer.inputs:
        return True
    before = [made_by[n] for n in layer.inputs if n in made_by]
    plain: Sequence[Layer] = [b for b in before if b.kind in ("CAST", "ELEMENTWISE", "IDENTITY", "SHUFFLE")]
    return steps > 0 and any(_reads(b, value, made_by, steps - 1) for b in plain)


def _named(layer: Layer | None) -> str:
    return "no layer" if layer is None else f"{layer.name} ({layer.kind})"
