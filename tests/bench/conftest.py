"""What the gate's tests share: texts in the tiny tokenizer's words, and a subject over the tiny model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def tiny_dataset_file(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose and tasks in words that the tiny tokenizer knows."""
    rng = np.random.default_rng(4)

    def text(n: int) -> str:
        return " ".join(rng.choice(words, n))

    lines: list[dict[str, Any]] = [{"task": "perplexity", "text": text(192), "id": f"p{k}"} for k in range(40)]
    for k in range(4):
        lines.append({"id": f"q{k}", "task": "qa", "context": text(9), "question": text(4), "references": ["cat"]})
        lines.append({"id": f"s{k}", "task": "summarization", "text": text(20), "references": [text(6)]})
    path = tmp_path_factory.mktemp("data") / "tiny.jsonl"
    path.write_text("\n".join(json.dumps(x) for x in lines))
    return path


@pytest.fixture(scope="session")
def tiny_dataset(tiny_dataset_file: Path) -> Any:
    """The same, read."""
    from bench.data.loading import load_file

    return load_file(tiny_dataset_file)


@pytest.fixture(scope="session")
def subjects(checkpoints: Callable[..., Path], tiny_dataset: Any) -> Iterator[Callable[..., Any]]:
    """``subjects(folder, **changes)``: the folder beside the tiny baseline of that configuration, baselines shared."""
    from bench.deployment import Deployment
    from bench.gate.modes import Mode
    from bench.gate.validate import make_subject

    mode = Mode("tiny", 96, 70, 4, 3, True)
    made: dict[str, Any] = {}

    def get(folder: Path, **changes: Any) -> Any:
        key = repr(sorted(changes.items(), key=str))
        if key not in made:
            made[key] = make_subject(
                folder, str(checkpoints(**changes)), mode, tiny_dataset, Deployment(threads=1), memo_bytes=1 << 28
            )
        return made[key].at(folder)

    yield get
    for subject in made.values():
        subject.baseline.close()


@pytest.fixture
def workshop(exports: Callable[..., Path], checkpoints: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """``workshop(precision, spec, **changes)``: a copy of that export to edit; hashes stay until it is resealed."""
    from bench.defects.workshop import Workshop

    def get(*asked: Any, **changes: Any) -> Workshop:
        return Workshop(exports(*asked, **changes), tmp_path / "copy", checkpoints(**changes))

    return get


@pytest.fixture(scope="module")
def ray(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Ray on this machine only, two workers; skips with its reason where it cannot start."""
    found = pytest.importorskip("ray")
    from bench.process import workers

    try:
        workers._start_ray(2)
    except workers.WorkerError as e:
        pytest.skip(f"Ray cannot start here: {e}")
    from ray import cloudpickle

    module = sys.modules[request.module.__name__]
    cloudpickle.register_pickle_by_value(module)  # workers cannot import a test file
    yield found
    cloudpickle.unregister_pickle_by_value(module)
    found.shutdown()
