"""Nothing reports its use: no process of ours lets onnxruntime keep its telemetry database in the user's cache."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from export import TELEMETRY_OFF

Get = Callable[..., Path]
ROOT = Path(__file__).parents[2]
# Where one of these is set onnxruntime keeps its telemetry off by itself, and the tests would look at nothing.
CI_SERVERS = (
    "APPVEYOR",
    "BUILDKITE",
    "CI",
    "CIRCLECI",
    "CODEBUILD_BUILD_ID",
    "GITHUB_ACTIONS",
    "GITLAB_CI",
    "JENKINS_URL",
    "TEAMCITY_VERSION",
    "TF_BUILD",
    "TRAVIS",
)
OPEN = (
    "import os, runtime, sys; runtime.load(sys.argv[1], threads=1).close(); print(os.environ['ORT_DISABLE_TELEMETRY'])"
)


def run(arguments: Sequence[object], home: Path, **env: str) -> tuple[str, list[Path]]:
    """A Python process in an empty home -> its standard output, and what the telemetry left there."""
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if k not in {*TELEMETRY_OFF, *CI_SERVERS}}
    kept |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(ROOT)} | env
    done = subprocess.run([sys.executable, *map(str, arguments)], env=kept, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1, 3), done.stderr
    return done.stdout, [p for p in home.rglob("*") if "Microsoft" in p.parts]


@pytest.mark.parametrize(
    "name",
    [
        "generate",
        "validate",
        pytest.param("workers", marks=pytest.mark.slow),
        "doctor",
        "measure_case",
        "peak_memory",
        "import runtime",
        "pytest bench/",
    ],
)
def test_no_process_reports_its_use(
    name: str, exports: Get, checkpoints: Get, tiny_dataset_file: Path, tmp_path: Path
) -> None:
    if name == "workers":
        pytest.importorskip("ray")
    folder, model = exports(), checkpoints()
    case = {"folder": str(folder), "batch": 1, "prompt": 4, "new_tokens": 2, "rounds": 1, "threads": 1}
    side = {"kind": "onnxruntime", "path": str(folder), "deployment": {"threads": 1}} | case
    validate = ("validate", folder, "--baseline", model, "--dataset", tiny_dataset_file, "--only", "prefill_logits")
    suite = (
        "--profile",
        "smoke",
        "-k",
        "load",
        "--model",
        model,
        "--exported",
        folder,
        "--report-dir",
        tmp_path / "out",
    )
    cli = ("-m", "bench.cli")
    arguments, said = {
        "generate": ((*cli, "generate", folder, "the cat", "--json"), '"end_reason"'),
        "validate": ((*cli, *validate), "prefill_logits"),
        "workers": (
            (*cli, "perplexity", folder, "--dataset", tiny_dataset_file, "--workers", 2, "--threads", 1),
            "words",
        ),
        "doctor": ((*cli, "doctor", "--no-bandwidth"), "off in every library"),
        "measure_case": (("-P", "bench/latency/measure_case.py", json.dumps(case)), '"ttft"'),
        "peak_memory": (("-m", "bench.latency.peak_memory", json.dumps(side)), "peak_bytes"),
        "import runtime": (("-c", OPEN, folder), "1\n"),
        "pytest bench/": (("-m", "pytest", "bench/", *suite), "onnxruntime-cpu"),
    }[name]
    out, left = run(arguments, tmp_path / "home")
    assert said in out
    assert left == []


def test_what_the_user_has_set_stays(exports: Get, tmp_path: Path) -> None:
    out, left = run(("-c", OPEN, exports()), tmp_path / "home", ORT_DISABLE_TELEMETRY="0")
    assert out == "0\n"
    version = tuple(map(int, importlib.metadata.version("onnxruntime").split(".")[:2]))
    assert bool(left) == (sys.platform == "linux" and version >= (1, 29))  # else the tests above look at nothing
    page, _ = run(("-m", "bench.cli", "doctor", "--no-bandwidth"), tmp_path / "again", ORT_DISABLE_TELEMETRY="0")
    assert "as you set it: ORT_DISABLE_TELEMETRY=0" in page
