"""A session in another environment gives what one here gives, and its end is an error that says how."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.deployment import Deployment
from bench.gate.registry import CHECKS
from bench.gate.validate import Gate
from bench.latency.sides import SideSpec
from bench.latency.sides import environment as environment_of
from bench.runtimes import remote as remote_module
from bench.runtimes.environments import Runtime, prepare
from bench.runtimes.remote import WARNING, Child, RemoteSession, RuntimeDiedError, RuntimeSlowError
from runtime.errors import ContextOverflowError, ProviderUnavailableError, SessionError
from runtime.generate import generate
from runtime.loading import load, read_folder


@pytest.fixture(scope="module")
def other(environment: Path) -> Runtime:
    return prepare(Runtime(venv=str(environment)))


@pytest.fixture
def remote(exports: Callable[..., Path], other: Runtime) -> Iterator[RemoteSession]:
    with Deployment(threads=1, runtime=other).open(exports()) as session:
        assert isinstance(session, RemoteSession)
        yield session


def test_it_gives_the_same_bits(remote: RemoteSession, exports: Callable[..., Path]) -> None:
    here = load(exports(), threads=1, verify=False)
    ids = [[3, 4, 5, 6, 7], [8, 9], [10]]
    for session in (here, remote):
        session.prefill(ids, reserve=3)
        session.step([1, 2, 3])
        session.keep([0, 2])
    np.testing.assert_array_equal(remote.step([4, 5]), here.step([4, 5]))
    np.testing.assert_array_equal(remote.score(ids[0]), here.score(ids[0]))
    assert generate(remote, ids, 5).tokens == generate(here, ids, 5).tokens
    assert remote.info.details["environment"] == remote.child.runtime.label
    assert remote.info.context_length == here.info.context_length


def test_its_probe_gives_the_same_bits(remote: RemoteSession, exports: Callable[..., Path]) -> None:
    from runtime.probe import GraphProbe

    here = GraphProbe.of(load(exports(), threads=1, verify=False))
    there = remote.probe()
    names = ["logits", *there.present_names]
    assert there.present_names == here.present_names
    found = [p.run([3, 4, 5], None, names) for p in (here, there)]
    past = here.presents(found[0])
    np.testing.assert_array_equal(found[1]["logits"], found[0]["logits"])
    np.testing.assert_array_equal(there.presents(found[1])[1][1], past[1][1])
    np.testing.assert_array_equal(there.after_past([6, 7], past, 9), here.after_past([6, 7], past, 9))


def test_the_child_loads_onnxruntime_and_numpy_alone(remote: RemoteSession) -> None:
    remote.score([3, 4])
    mapped = Path(f"/proc/{remote.child._process.pid}/maps").read_text()
    assert "/onnxruntime/" in mapped
    assert not [p for p in ("/torch/", "/onnx/", "/transformers/", "/scipy/") if f"site-packages{p}" in mapped]


def test_what_lies_beside_an_installed_suite_stays_out(
    exports: Callable[..., Path], other: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In site-packages that is another onnxruntime, which would be measured in place of the environment's own."""
    site, root = tmp_path / "site-packages", remote_module.HERE.parents[1]
    for name in ("export", "runtime", "bench/process", "bench/runtimes", "bench/latency"):
        shutil.copytree(root / name, site / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("onnxruntime", "numpy"):
        (site / f"{name}.py").write_text("raise RuntimeError('another environment')\n")
    monkeypatch.setattr(remote_module, "HERE", site / "bench" / "runtimes")
    with Deployment(threads=1, runtime=other).open(exports()) as session:
        assert session.score([3]).shape[0] == 1
    side = SideSpec("base", "", str(exports()), threads=1, venv=other.venv)
    asked = side.arguments() | {"suite": str(site), "batch": 1, "prompt": 8, "new_tokens": 4, "rounds": 1}
    command = [other.python, "-P", site / "bench" / "latency" / "measure_case.py", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_of(side))
    assert '"ttft"' in done.stdout, done.stderr


def test_a_probe_that_cannot_be_opened_leaves_no_child(
    exports: Callable[..., Path], other: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Child] = []
    monkeypatch.setattr(remote_module, "Child", lambda *a: made.append(Child(*a)) or made[-1])
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    manifest = read_folder(exports(), verify=False)
    with pytest.raises(SessionError, match="cannot open"):
        Deployment(threads=1, runtime=other).probe(tmp_path / "broken.onnx", manifest)
    assert made[0]._process.poll() is not None


def test_refusals_come_as_what_they_are(remote: RemoteSession) -> None:
    with pytest.raises(ContextOverflowError, match="exceed the context"):
        remote.prefill([[1] * 5], reserve=100_000)
    with pytest.raises(SessionError, match="outside the vocabulary"):
        remote.score([10**6])
    assert remote.score([3]).shape[0] == 1  # and it goes on


def test_a_provider_that_is_not_there_says_nothing_about_the_folder(
    exports: Callable[..., Path], other: Runtime
) -> None:
    with pytest.raises(ProviderUnavailableError, match="provider 'cuda' is not installed"):
        Deployment(provider="cuda", threads=1, runtime=other).open(exports(precision="fp16"))


def test_a_crash_is_an_error_that_names_the_signal(remote: RemoteSession) -> None:
    os.kill(remote.child._process.pid, signal.SIGSEGV)
    for _ in range(2):
        with pytest.raises(RuntimeDiedError, match=r"died with signal 11 \(Segmentation fault\)"):
            remote.score([3])
    assert remote.info.precision == "fp32"  # what was known last


def test_a_child_that_does_not_answer_is_killed(exports: Callable[..., Path], other: Runtime) -> None:
    with Deployment(threads=1, runtime=other, limit_s=20.0).open(exports()) as session:
        assert isinstance(session, RemoteSession)
        session.child._limit_s = 0.2
        os.kill(session.child._process.pid, signal.SIGSTOP)
        with pytest.raises(RuntimeSlowError, match=r"no answer after 0\.2 s"):
            session.score([3])
        assert session.child._process.poll() is not None


def test_a_request_that_was_interrupted_answers_no_other(
    remote: RemoteSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(remote.child._connection, "poll", interrupt)
    with pytest.raises(KeyboardInterrupt):
        remote.score([3])
    assert remote.child._process.poll() is not None
    assert remote.info.precision == "fp32"
    with pytest.raises(RuntimeDiedError, match="was interrupted"):
        remote.score([3])


def test_warnings_are_told_without_their_time() -> None:
    line = (
        "\x1b[0;93m2026-11-28 10:00:00.123456789 [W:onnxruntime:, session_state.cc:1280 "
        "VerifyEachNodeIsAssignedToAnEp] Some nodes were not assigned\x1b[m"
    )
    found = WARNING.match(line)
    assert found is not None
    assert found.group(1).startswith("Some nodes were not assigned")


def test_the_gate_judges_a_folder_in_another_environment(
    subjects: Callable[..., Any], exports: Callable[..., Path], other: Runtime
) -> None:
    from dataclasses import replace

    here = subjects(exports())
    there = replace(here, deployment=replace(here.deployment, runtime=other))
    gate = Gate(there)
    gate.run([c for c in CHECKS if c.kind != "exact"])
    there.close()
    assert {r.status for r in gate.results} <= {"PASS", "SKIPPED", "REPORTED", "SUSPICIOUS"}
    assert gate.validation(place=False).session["environment"] == other.label
