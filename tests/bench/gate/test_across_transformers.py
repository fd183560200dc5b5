"""Exported under one transformers and gated under another: equal graphs, logits within fp32's noise, PASS both ways.

The other interpreter is named by LLAMA_ONNX_OTHER_PYTHON; ``scripts/transformers5`` does, under transformers 5.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import transformers
from transformers import AutoConfig, AutoTokenizer

from bench.gate.canonical import pair_graphs
from bench.gate.validate import validate
from export.manifest import DECODE_GRAPH, SCORING_GRAPH, read_manifest
from export.pipeline import export_model
from export.source import resolve
from export.spec import ExportSpec
from runtime.loading import load
from runtime.torch_session import TorchSession

OTHER = os.environ.get("LLAMA_ONNX_OTHER_PYTHON", "")
pytestmark = pytest.mark.skipif(not OTHER, reason="LLAMA_ONNX_OTHER_PYTHON names no other interpreter")
ROOT = Path(__file__).parents[3]
IDS = [1, *range(5, 70)]
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
SAVED_HERE = "llama3-rope, configuration and tokenizer in this transformers' own words"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {}),
    "llama-biases-tied": ({"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, {}),
    "llama3-rope": ({"rope_scaling": LLAMA3, "rope_theta": 500000.0}, {}),
    SAVED_HERE: ({"rope_scaling": LLAMA3, "rope_theta": 77.0}, {}),
    "llama-int4": ({}, {"precision": "int4"}),
    "llama-standard-operators": ({}, {"target": "tensorrt", "precision": "fp16"}),
    "mistral-window": ({"model_type": "mistral", "sliding_window": 24}, {}),
    "qwen2-windows": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
        {},
    ),
    "qwen3": ({"model_type": "qwen3", "head_dim": 32}, {}),
}
GATED = ("llama", "mistral-window", "qwen3")
WORK = """
import json, sys
from pathlib import Path
import numpy as np
import transformers
from bench.data.loading import load_file
from bench.deployment import Deployment
from bench.gate.modes import Mode
from bench.gate.validate import make_subject, validate
from export.pipeline import export_model
from export.source import resolve
from export.spec import ExportSpec
from runtime.torch_session import TorchSession
asked = json.load(sys.stdin)
said = {"version": transformers.__version__, "verdicts": {}}
for job in asked["jobs"]:
    export_model(ExportSpec(job["checkpoint"], **job["spec"]), Path(job["out"]))
    np.save(job["logits"], TorchSession(resolve(job["checkpoint"]).folder, threads=1).score(asked["ids"]))
data = load_file(Path(asked["dataset"]))
for folder, checkpoint in asked["gate"]:
    subject = make_subject(Path(folder), checkpoint, Mode("tiny", 96, 70, 4, 3, True), data, Deployment(threads=1))
    found = validate(subject)
    said["verdicts"][checkpoint] = [found.verdict, found.reasons]
    subject.close()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A case's checkpoint."""
    saved = shutil.copytree(checkpoints(**CASES[SAVED_HERE][0]), tmp_path_factory.mktemp("saved") / "here")
    for kind in (AutoConfig, AutoTokenizer):
        kind.from_pretrained(saved).save_pretrained(saved)
    return lambda name: saved if name == SAVED_HERE else checkpoints(**CASES[name][0])


@pytest.fixture(scope="module")
def theirs(
    checkpoint: Callable[[str], Path],
    exports: Callable[..., Path],
    tiny_dataset_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """What the other interpreter made of every case, in one process: folders, logits, verdicts on our folders."""
    root = tmp_path_factory.mktemp("other")
    jobs = [
        {
            "checkpoint": str(checkpoint(name)),
            "spec": spec,
            "out": str(root / name),
            "logits": str(root / f"{name}.npy"),
        }
        for name, (_, spec) in CASES.items()
    ]
    gate = [(str(exports(**CASES[name][0])), str(checkpoint(name))) for name in GATED]
    asked = {"jobs": jobs, "ids": IDS, "gate": gate, "dataset": str(tiny_dataset_file)}
    done = subprocess.run(
        [OTHER, "-c", WORK], input=json.dumps(asked), capture_output=True, text=True, cwd=ROOT, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["version"].split(".")[0] != transformers.__version__.split(".")[0], "the same transformers twice"
    return root, said["verdicts"]


@pytest.mark.parametrize("name", CASES)
def test_graphs_weights_and_logits_are_equal(
    name: str, theirs: Any, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    root, _ = theirs
    ours = tmp_path / "ours"
    export_model(ExportSpec(str(checkpoint(name)), **CASES[name][1]), ours)
    for graph in (DECODE_GRAPH, SCORING_GRAPH):
        a, b = (onnx.load(folder / graph, load_external_data=False) for folder in (ours, root / name))
        assert len(a.graph.node) == len(b.graph.node) > 20
        assert pair_graphs(a, b).findings == []
    mine, other = (read_manifest(folder) for folder in (ours, root / name))
    assert mine.files[mine.data_file] == other.files[other.data_file]
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert mine.files[file] == other.files[file], file
    wanted = np.load(root / f"{name}.npy")
    baseline = TorchSession(resolve(str(checkpoint(name))).folder, threads=1)
    assert np.abs(baseline.score(IDS) - wanted).max() < 1e-4
    if not CASES[name][1]:
        with load(root / name, threads=1) as session:
            assert np.abs(session.score(IDS) - wanted).max() < 1e-4


@pytest.mark.parametrize("name", GATED)
def test_the_gate_passes_in_both_directions(name: str, theirs: Any, subjects: Callable[..., Any]) -> None:
    root, verdicts = theirs
    assert verdicts[str(subjects(root / name, **CASES[name][0]).baseline.checkpoint)][0] == "PASS", verdicts
    found = validate(subjects(root / name, **CASES[name][0]))
    assert found.verdict == "PASS", found.reasons
