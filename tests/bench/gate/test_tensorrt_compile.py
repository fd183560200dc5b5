"""The check `tensorrt_compile`: what it demands, what it names, and that folders of other targets do not know it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from bench.cli.main import main
from bench.defects.workshop import Workshop
from bench.errors import BenchError
from bench.gate.checks.tensorrt import unintended
from bench.gate.found import Found
from bench.gate.modes import MODES
from bench.gate.registry import BY_NAME, CHECKS, checks_of
from bench.gate.replay import incomplete, replay
from bench.gate.validate import Gate, make_subject, thinned, validate
from reports.validation import Finding
from reports.verdict import unexamined
from runtime import trt_compiler
from runtime.errors import CompilerMissingError
from runtime.loading import read_folder
from runtime.trt_compiler import Compiled, Layer
from tests.synthetic import synthetic

Exports = Callable[..., Path]
Subjects = Callable[..., Any]
NAME = "tensorrt_compile"
TARGET = {"target": "tensorrt"}
HEADS = {"head_dim": 64}
compiles = pytest.mark.usefixtures("tensorrt_rtx")


def look(subject: Any) -> Found:
    return BY_NAME[NAME].run(subject)


@compiles
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_export_compiles_for_every_gpu_asked_for(precision: str, exports: Exports, subjects: Subjects) -> None:
    subject = replace(subjects(exports(precision, TARGET, **HEADS), **HEADS), sms=(89, 120))
    found = look(subject)
    assert found.status == "PASS", found.summary
    assert found.summary == "4 caches updated in place, 2 attentions whole, engines for SM 89, 120"
    assert "4 KV_CACHE_UPDATE" in found.notes[0]
    assert [n.split(":")[0] for n in found.notes[1:]] == ["SM 89", "SM 120"]


@compiles
def test_fp32_is_parsed_and_no_engine_is_promised(exports: Exports, subjects: Subjects) -> None:
    found = look(subjects(exports("fp32", TARGET)))
    assert found.status == "SKIPPED"
    assert "no fused attention in fp32: parsed, 4 caches updated in place" in found.summary
    assert "--precision fp16" in found.summary


@compiles
@pytest.mark.parametrize("slots", [2, 100])
def test_a_cache_shorter_than_the_longest_answer(slots: int, exports: Exports, subjects: Subjects) -> None:
    found = look(subjects(exports("fp16", {**TARGET, "cache_length": slots}, **HEADS), **HEADS))
    assert found.status == "PASS", found.summary


def copied_cache(model: Any) -> None:
    """The new keys of layer 1 replace the past by a Concat: nothing is updated in place."""
    scatter = next(n for n in model.graph.node if n.op_type == "TensorScatter" and "present.1.key" in n.output)
    past, new = scatter.input[:2]
    scatter.CopyFrom(helper.make_node("Concat", [past, new], ["present.1.key"], name=scatter.name, axis=2))


def unfused_attention(model: Any) -> None:
    """Layer 1's attention becomes what it is made of (heads are equal, so no group is repeated)."""
    at, node = next((k, n) for k, n in enumerate(model.graph.node) if n.op_type == "Attention" and "layers.1" in n.name)
    q, k, v, mask = node.input[:4]
    parts = [
        helper.make_node("Transpose", [k], ["kt"], name="/model/layers.1/T", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", [q, "kt"], ["qk"], name="/model/layers.1/QK"),
        helper.make_node("Add", ["qk", mask], ["masked"], name="/model/layers.1/Mask"),
        helper.make_node("Softmax", ["masked"], ["weights"], name="/model/layers.1/Softmax", axis=-1),
        helper.make_node("MatMul", ["weights", v], list(node.output), name="/model/layers.1/PV"),
    ]
    nodes = [*model.graph.node[:at], *parts, *model.graph.node[at + 1 :]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@compiles
@pytest.mark.parametrize(
    ("defect", "where", "what"),
    [
        (copied_cache, "model.onnx: present.1.key", "(CONCATENATION), not from a KV_CACHE_UPDATE"),
        (unfused_attention, "model.onnx: present.1.value", "is read by 0 attentions"),
        (unfused_attention, "model.onnx: /model/layers.1/Softmax", "pulled apart"),
    ],
)
def test_a_defect_is_named_with_its_layer(
    defect: Callable[[Any], None], where: str, what: str, workshop: Callable[..., Workshop], subjects: Subjects
) -> None:
    heads = {**HEADS, "num_key_value_heads": 4}
    shop = workshop("fp16", TARGET, **heads)
    shop.graphs(defect, ("decode",))
    found = look(subjects(shop.folder, **heads))
    assert found.status == "FAIL"
    assert [f.layer for f in found.findings if f.where == where and what in f.what] == [1]


def layers(count: int) -> list[Layer]:
    made = []
    for k in range(count):
        for kind in ("key", "value"):
            made.append(Layer("KV_CACHE_UPDATE", f"scatter {kind}", (), (f"present.{k}.{kind}",)))
        made.append(Layer("CAST", "cast", (f"present.{k}.value",), (f"cast {k}",)))
        made.append(Layer("ATTENTION_INPUT", f"attention {k}", (f"cast {k}",), ()))
    return made


@pytest.mark.parametrize(
    ("change", "findings"),
    [
        (lambda ls: ls, []),
        (lambda ls: [x for x in ls if x.outputs != ("present.1.key",)], ["present.1.key"]),
        (lambda ls: [*ls, Layer("SOFTMAX", "/model/layers.0/Softmax", (), ())], ["/model/layers.0/Softmax"]),
        (lambda ls: [*ls, ls[-1]], ["present.1.value", "network"]),
        (lambda ls: ls[:-1], ["present.1.value", "network"]),
    ],
)
def test_what_is_demanded(change: Callable[[list[Layer]], list[Layer]], findings: list[str], exports: Exports) -> None:
    manifest = read_folder(exports("fp16", TARGET, **HEADS), verify=False)
    network = Compiled("1.7", (), tuple(change(layers(2))), (), ())
    found: list[Finding] = list(unintended(network, manifest))
    assert [f.where for f in found] == findings


def test_without_the_extra_it_is_skipped_and_the_verdict_says_so(
    exports: Exports, subjects: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object) -> None:
        raise CompilerMissingError(f"TensorRT-RTX's compiler is not installed: {trt_compiler.INSTALL}")

    monkeypatch.setattr("bench.process.trt_compile.compile_in_child", absent)
    gate = Gate(replace(subjects(exports("fp16", TARGET, **HEADS), **HEADS), mode=MODES["quick"]))
    gate.run([BY_NAME["generation_config"], BY_NAME[NAME]])
    document = gate.validation(place=False)
    assert document.results[1].status == "SKIPPED"
    assert "pip install 'llama-onnx-bench[tensorrt-rtx]'" in document.results[1].summary
    assert f"exact checks that could not judge this folder: {NAME}" in document.notes
    assert "not judged: tensorrt compile" in unexamined(document)
    assert not replay(document)


def test_other_targets_do_not_know_it(exports: Exports, subjects: Subjects) -> None:
    subject = replace(subjects(exports()), mode=MODES["quick"])
    document = validate(subject, [c for c in CHECKS if c.name in (NAME, "files")], place=False)
    assert [r.name for r in document.results] == ["files"]
    assert NAME not in document.checks
    assert not replay(document)
    with pytest.raises(BenchError, match="tensorrt_compile judges folders of --target tensorrt"):
        validate(subjects(exports()), [BY_NAME[NAME]], place=False)


def test_a_document_cannot_do_without_it(exports: Exports, subjects: Subjects) -> None:
    without = synthetic()
    assert not replay(without)
    assert not incomplete(without)
    subject = subjects(exports("fp16", TARGET, **HEADS), **HEADS)
    assert "checks: not the 27 of tensorrt folders" in thinned(without, subject)
    whole = without.model_copy(update={"checks": [c.name for c in checks_of("tensorrt")]})
    assert not replay(whole)
    assert incomplete(whole) == ["1 of 27 checks were not run: tensorrt_compile"]


def test_a_gpu_that_the_compiler_does_not_know(
    exports: Exports, checkpoints: Exports, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["validate", str(exports()), "--baseline", str(checkpoints()), "--sm", "90"]
    assert main(asked) == 2
    assert "--sm '90': TensorRT-RTX compiles for 75, 80, 86, 89, 120, 121" in capsys.readouterr().err


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("asked", [["fp16"], ["int4", "--activations", "fp16"]])
def test_the_demo_model_compiles(
    asked: list[str], demo_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    assert main(["export", "demo", str(folder), "--target", "tensorrt", "--precision", *asked]) == 0
    check = ["validate", str(folder), "--baseline", "demo", "--only", NAME, "--sm", "89,120", "--mode", "quick"]
    assert main([*check, "--out", str(tmp_path / "page")]) == 0
    assert "60 caches updated in place, 30 attentions whole, engines for SM 89, 120" in capsys.readouterr().out


def test_a_compiler_without_memory_leaves_the_parity_to_be_judged(
    exports: Callable[..., Path], checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.errors import MachineError
    from bench.process import trt_compile

    def killed(*_: Any) -> Any:
        raise MachineError("ran out of memory")

    monkeypatch.setattr(trt_compile, "compile_in_child", killed)
    folder = exports("fp16", {"target": "tensorrt"})
    found = BY_NAME["tensorrt_compile"].run(make_subject(folder, str(checkpoints()), MODES["quick"]))
    assert (found.status, found.summary) == ("SKIPPED", "ran out of memory")
