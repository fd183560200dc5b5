"""Plain exports of other decoders pass: sizes under other names, no limit of the context, windows in some layers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from bench.deployment import Deployment
from bench.gate.checks.weights import weights
from bench.gate.modes import MODES, Mode
from bench.gate.validate import chosen_checks, make_subject, validate

Decoders = Callable[[str], tuple[Path, Path]]
CHECKS = "manifest,graph,weights,prefill_logits,decode_steps,batch_rows,long_context"


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon", "gemma2", "qwen2-windows", "gptj"])
def test_a_plain_export_passes(name: str, decoders: Decoders, tiny_dataset: Any) -> None:
    checkpoint, folder = decoders(name)
    mode = Mode("tiny", 96, 4, 4, 3, True)
    subject = make_subject(folder, str(checkpoint), mode, tiny_dataset, Deployment(threads=1))
    try:
        found = validate(subject, chosen_checks(CHECKS), False)
    finally:
        subject.close()
        subject.baseline.close()
    statuses = {r.name: r.status for r in found.results}
    del statuses["graph"]  # none of ours to compare with; what it says is `unexplained control`
    assert set(statuses.values()) == {"PASS"}, statuses
    assert found.verdict == "PASS"


def test_a_changed_bias_of_alibi_is_named(decoders: Decoders, tmp_path: Path) -> None:
    checkpoint, good = decoders("mpt")
    folder = shutil.copytree(good, tmp_path / "folder")
    model = onnx.load(folder / "model.onnx")
    bias = next(n for n in model.graph.node if n.op_type == "Constant" and list(n.attribute[0].t.dims) == [4, 1, 160])
    array = numpy_helper.to_array(bias.attribute[0].t).copy()
    array[..., 100:] *= 1.1
    bias.attribute[0].t.CopyFrom(numpy_helper.from_array(array))
    onnx.save(model, folder / "model.onnx")
    found = weights(make_subject(folder, str(checkpoint), MODES["quick"]))
    assert found.status == "INCONCLUSIVE", found.summary
    assert bias.output[0] in found.summary
