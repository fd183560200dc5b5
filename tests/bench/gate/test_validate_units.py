"""What the gate computes once: one hash pass, one baseline for many folders, nothing twice after a kill.

Several workers give the document of one, to the last digit.

The model is the tiny one; windows and batches are few, so that every call can be counted.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.cli.main import main
from bench.defects.in_files import DEFECTS
from bench.defects.workshop import Workshop
from bench.deployment import Deployment
from bench.gate import units
from bench.gate.baseline import Baseline
from bench.gate.modes import MODES, Mode
from bench.gate.registry import BY_NAME, CHECKS
from bench.gate.subject import Subject
from bench.gate.validate import make_subject, validate
from bench.process.workers import cluster
from reports.validation import Validation
from runtime.ort_session import OrtSession
from runtime.torch_session import TorchSession
from tests.open_sessions import Alive

Exports = Callable[..., Path]
MODE = Mode("tiny", 64, 6, 2, 3, True, new_tokens=6)
LONG = ("mean_kld", "tail_kld", "greedy", "tasks")
SPECS = [BY_NAME[n] for n in LONG]


def measured(found: Validation) -> list[Any]:
    """Everything that was measured, without the seconds."""
    return [r.model_dump(exclude={"seconds"}) for r in found.results]


@pytest.fixture
def opened(
    checkpoints: Exports, tiny_dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Subject]:
    """A subject whose results are kept in this test's own cache; ``opened(folder, workers=1)``."""
    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path / "cache"))

    def get(folder: Path, mode: Mode = MODE, **more: Any) -> Subject:
        return make_subject(folder, str(checkpoints()), mode, tiny_dataset, Deployment(threads=1), keep=True, **more)

    return get


class Counted:
    """Counts calls of a method over all instances; raises KeyboardInterrupt in the n-th."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type, name: str, stop_at: int = 0) -> None:
        self.calls: list[Any] = []
        real = getattr(kind, name)

        def method(this: Any, *args: Any, **more: Any) -> Any:
            self.calls.append(args[0] if args else None)
            if len(self.calls) == stop_at:
                raise KeyboardInterrupt
            return real(this, *args, **more)

        monkeypatch.setattr(kind, name, method)

    def __len__(self) -> int:
        return len(self.calls)


def test_every_file_is_read_once(
    exports: Exports, checkpoints: Exports, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check `files` and the digest of the record share one pass, and it still sees a flipped byte."""
    from bench import digests
    from export import manifest

    read: Counter[str] = Counter()
    real = manifest.sha256_of

    def counted(path: Path, *rest: Any) -> str:
        if path.parent == exports():
            read[path.name] += 1
        return real(path, *rest)

    monkeypatch.setattr(digests, "sha256_of", counted)
    monkeypatch.setattr(manifest, "sha256_of", counted)
    assert main(["validate", str(exports()), "--baseline", str(checkpoints()), "--only", "files", "--no-cache"]) == 0
    assert read == Counter(p.name for p in exports().iterdir())


def test_the_one_pass_sees_a_flipped_byte(exports: Exports, opened: Callable[..., Subject], tmp_path: Path) -> None:
    folder = shutil.copytree(exports(), tmp_path / "flipped")
    data = next(folder.glob("*.data"))
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    found = validate(opened(folder), [BY_NAME["files"]])
    assert found.results[0].status == "FAIL"
    assert data.name in found.results[0].summary
    assert found.folder_sha256 not in ("", validate(opened(exports()), [BY_NAME["files"]]).folder_sha256)


def test_a_second_folder_needs_no_pass_of_the_baseline(
    exports: Exports, opened: Callable[..., Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mode standard, every check: what the baseline says is taken from the first folder's run."""
    first = opened(exports(), MODES["standard"])
    whole = validate(first)
    first.close()
    first.baseline.close()
    first.finish()
    second = shutil.copytree(exports(), tmp_path / "second")
    (second / "notes.txt").write_text("another folder")
    loaded = Counted(monkeypatch, TorchSession, "__init__")
    scored = Counted(monkeypatch, OrtSession, "score")
    subject = opened(second, MODES["standard"])
    again = validate(subject)
    subject.close()
    assert again.folder_sha256 != whole.folder_sha256
    assert len(scored) == len(subject.windows) > 10  # the folder itself was measured
    assert len(loaded) == 0
    skipped = {"files"}  # it says what is not in the manifest
    kept, new = ([f for f in measured(v) if f["name"] not in skipped] for v in (whole, again))
    assert new == kept


def test_one_graph_is_open_at_a_time(
    exports: Exports, opened: Callable[..., Subject], checkpoints: Exports, tmp_path: Path
) -> None:
    """Every check and the localisation: weights are packed once, and beside them is PyTorch's model alone."""
    bad = Workshop(exports(), tmp_path / "bad", checkpoints())
    next(d for d in DEFECTS if "K times" in d.name).change(bad)
    with pytest.MonkeyPatch.context() as patch:
        alive = Alive(patch)
        subject = opened(bad.folder)
        found = validate(subject)
        subject.close()
        assert found.place is not None
        assert alive.most == 1
        # decode, scoring, decode for the generations, and the copy that shows its inner values
        assert alive.opened == 4


def test_the_heap_is_trimmed_after_each_window(
    exports: Exports, opened: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(units, "trim", lambda: trimmed.append(1))
    subject = opened(exports())
    assert len(subject.scores) == len(trimmed) == 6


def test_progress_counts_what_an_earlier_run_had_finished(exports: Exports, opened: Callable[..., Subject]) -> None:
    """The time left comes from these: each stage begins at what is done and ends at all of it."""
    seen: list[tuple[int, int]] = []
    subject = opened(exports())
    subject.progress = lambda done, total: seen.append((done, total))
    validate(subject, [BY_NAME["mean_kld"]])
    windows = [(k, 6) for k in range(7)]
    assert seen == [*windows, (0, 0), *[(k, 2) for k in range(3)], (0, 0)]
    seen.clear()
    again = opened(exports())
    again.progress = subject.progress
    validate(again, [BY_NAME["mean_kld"]])
    assert seen == [(6, 6), (0, 0), (2, 2), (0, 0)]


def interrupted(subject: Subject) -> None:
    with pytest.raises(KeyboardInterrupt):
        validate(subject, SPECS)
    subject.close()
    subject.baseline.close()


def test_a_run_stopped_in_a_window_goes_on_there_on_both_sides(
    exports: Exports, opened: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        ours = Counted(patch, OrtSession, "score", stop_at=4)
        interrupted(opened(exports()))
        assert len(ours) == 4
    with monkeypatch.context() as patch:
        ours, theirs = Counted(patch, OrtSession, "score"), Counted(patch, Baseline, "_compute_score")
        subject = opened(exports())
        found = validate(subject, SPECS)
        assert [tuple(c) for c in ours.calls] == [tuple(w) for w in subject.windows[3:6]]
        fp32 = [c for c in theirs.calls if c == "fp32"]
        assert len(fp32) == 3  # three windows were finished, the rest and no other was computed
    assert any("3 windows and batches were finished by an earlier run" in n for n in found.notes)
    subject.finish()
    assert not list((tmp_path / "cache" / "unfinished").glob("*/*"))

    again = opened(exports())  # a new run is a new measurement, and gives the same metrics
    with monkeypatch.context() as patch:
        ours = Counted(patch, OrtSession, "score")
        fresh = validate(again, SPECS)
        assert len(ours) == 6
    assert measured(fresh) == measured(found)
    assert not any("earlier run" in n for n in fresh.notes)


def test_a_run_stopped_in_a_batch_keeps_the_generations_before(
    exports: Exports, opened: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = units.generate

    def counted(session: Any, prompts: Sequence[Sequence[int]], *rest: Any) -> Any:
        made.append(prompts)
        if stop_at == len(made):
            raise KeyboardInterrupt
        return real(session, prompts, *rest)

    monkeypatch.setattr(units, "generate", counted)
    stop_at = 2
    interrupted(opened(exports()))
    stop_at, before = 0, list(made)
    made.clear()
    validate(opened(exports()), SPECS)
    assert before[1:] == made
    assert len(before) == 2


def test_other_settings_and_no_cache_take_nothing_over(
    exports: Exports, checkpoints: Exports, opened: Callable[..., Subject], tiny_dataset: Any
) -> None:
    subject = opened(exports())
    assert subject.unfinished is not None
    other = opened(exports("fp16"))
    assert other.unfinished is not None
    assert other.unfinished.folder != subject.unfinished.folder
    subject = opened(exports())
    subject.deployment = Deployment(threads=2)
    assert subject.unfinished is not None
    assert subject.unfinished.folder != opened(exports()).unfinished.folder  # type: ignore[union-attr]
    kept = make_subject(exports(), str(checkpoints()), MODE, tiny_dataset, Deployment(threads=1), keep=False)
    assert kept.unfinished is None


def test_two_workers_give_the_document_of_one(
    ray: Any, exports: Exports, opened: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To the last digit: windows, null control and generations, with both caches empty each time."""
    alone = opened(exports())
    one = validate(alone, SPECS)
    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path / "other cache"))
    here = [Counted(monkeypatch, OrtSession, "score"), Counted(monkeypatch, TorchSession, "score")]
    shared = opened(exports(), workers=2)
    two = validate(shared, SPECS)
    assert measured(two) == measured(one)
    assert all(r.status != "FAIL" for r in two.results)
    assert [len(c) for c in here] == [0, 0]  # all of it was the workers'
    assert shared.unfinished is not None
    assert len(list(shared.unfinished.folder.glob("*.json"))) == 6 + 2 + 2
    assert two.settings["workers"] == 2


def die_once(marker: str, killed: int, work: Any, sides: Any, unit: Any) -> Any:
    """One unit kills its worker the first time it is tried."""
    if unit.ids[0] == killed and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), 9)
    return work(sides, unit)


def test_a_dead_worker_costs_its_window_a_retry(
    ray: Any, exports: Exports, opened: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = [BY_NAME["mean_kld"]]
    one = validate(opened(exports()), spec)
    monkeypatch.setenv("LLAMA_ONNX_CACHE", str(tmp_path / "other cache"))
    said: list[str] = []
    shared = opened(exports(), workers=2, status=said.append)
    dying = partial(die_once, str(tmp_path / "marker"), shared.windows[2][0], units.window_scores)
    monkeypatch.setattr(units, "window_scores", dying)
    two = validate(shared, spec)
    assert measured(two) == measured(one)
    assert sum("is given to another worker" in line for line in said) == 1


def test_an_error_in_a_worker_is_the_finding_that_one_process_has(
    ray: Any, exports: Exports, opened: Callable[..., Subject], tmp_path: Path
) -> None:
    import onnx

    folder = shutil.copytree(exports(), tmp_path / "broken")
    name = opened(folder).manifest.scoring_graph
    model = onnx.load(folder / name, load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, folder / name)
    spec = [BY_NAME["mean_kld"]]
    one, two = (validate(opened(folder, workers=n), spec, place=False) for n in (1, 2))
    assert one.results[0].status == "FAIL"
    assert measured(two) == measured(one)


def test_without_ray_one_process_does_all(
    exports: Exports, opened: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.process.workers.find_spec", lambda name: None)
    said: list[str] = []
    subject = opened(exports(), workers=3, status=said.append)
    with cluster(3):
        found = validate(subject, SPECS)
    assert found.verdict in ("PASS", "INCONCLUSIVE")
    assert ["Ray is not installed" in line for line in said] == [True]
    assert found.settings["workers"] == 1
    assert subject.__dict__["candidate"]  # this process's own session, not a second one


def test_the_command_takes_workers(exports: Exports, checkpoints: Exports, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["validate", str(exports()), "--baseline", str(checkpoints()), "--only", "files"]
    assert main([*asked, "--workers", "0"]) == 2
    assert "--workers 1 or more" in capsys.readouterr().err
    assert len(CHECKS) > 20
