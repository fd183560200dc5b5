"""``compare`` for real with the two sides that are more than a folder: ``venv=PATH`` and ``rev=REV``."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from bench.cli.main import main
from bench.latency.sides import ROOT
from reports.comparison import Comparison

CALM = ["--max-steal", "9", "--max-others", "9"]
SMALL = ["--pairs", "5", "--cases", "b1-p8-n4", "--rounds", "1", *CALM]


@pytest.mark.slow
def test_another_virtual_environment(
    exports: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each side's processes run in its own environment, and the comparison says with which onnxruntime."""
    venv = tmp_path / "other" / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python3*/site-packages")
    # A venv of a venv sees the system's packages, not its parent's; its own distribution comes before both.
    (packages / "parent.pth").write_text("\n".join(site.getsitepackages()))
    (packages / "onnxruntime-9.9.9.dist-info").mkdir()
    (packages / "onnxruntime-9.9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime\n")
    with (packages / "onnxruntime-9.9.9.dist-info" / "METADATA").open("a") as f:
        f.write("Version: 9.9.9\n")
    folder = str(exports())
    sides = ["--base", f"{folder},threads=1", "--candidate", f"{folder},threads=1,venv={venv}"]
    assert main(["compare", *sides, *SMALL, "--out", str(tmp_path / "out"), "--json"]) in (0, 1, 3)
    made = Comparison.model_validate_json(capsys.readouterr().out)
    assert [r.outcome for r in made.records] == ["ok"] * len(made.records)
    seen = {(r.side, r.versions["onnxruntime"]) for r in made.records}
    assert seen == {("base", version("onnxruntime")), ("candidate", "9.9.9")}
    assert made.candidate.versions["onnxruntime"] == "9.9.9"
    assert made.candidate.venv == "other/.venv"
    assert made.base.weights_sha256 == made.candidate.weights_sha256


SLOWER = '''

_plain_load = load


def load(*args, **kwargs):
    """Every step takes 60 ms more."""
    import time

    session = _plain_load(*args, **kwargs)
    for name in ("step", "step_token"):
        if plain := getattr(session, name, None):

            def slow(*a, _plain=plain, **k):
                time.sleep(0.06)
                return _plain(*a, **k)

            setattr(session, name, slow)
    return session
'''


def _git(folder: Path, *arguments: str) -> None:
    names = ["-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *names, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.mark.slow
def test_another_revision_of_the_suite(exports: Callable[..., Path], tmp_path: Path) -> None:
    """A commit that makes every step slower is found between two revisions of one clone."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    clone = tmp_path / "clone"
    _git(tmp_path, "clone", "--quiet", str(ROOT), str(clone))
    with (clone / "runtime" / "loading.py").open("a") as f:
        f.write(SLOWER)
    _git(clone, "commit", "--all", "--quiet", "--message", "slower")
    folder, out = str(exports()), tmp_path / "out"
    sides = ["--base", f"{folder},threads=1,rev=HEAD~1", "--candidate", f"{folder},threads=1,rev=HEAD"]
    env = {**os.environ, "PYTHONPATH": str(clone), "LLAMA_ONNX_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "bench.cli", "compare", *sides, *SMALL, "--out", str(out), "--json"]
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr
    made = Comparison.model_validate_json(done.stdout)
    assert {r.metric: r.status for r in made.results}["tpot"] == "REGRESSION"
    assert (made.base.revision, made.candidate.revision) == ("HEAD~1", "HEAD")
    steps = {side: [r.metrics["tpot"][0] for r in made.records if r.side == side] for side in ("base", "candidate")}
    assert min(steps["candidate"]) > 0.06
    assert min(steps["base"]) < 0.06
    trees = sorted((tmp_path / "cache" / "revisions").iterdir())
    assert sorted("60 ms more" in (t / "runtime" / "loading.py").read_text() for t in trees) == [False, True]
    assert json.loads((out / "plan.json").read_text())["base"]["revision"] == "HEAD~1"
