"""`pytest bench/` itself, in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.defects.__main__ import DEFECTS
from bench.defects.workshop import Workshop

ROOT = Path(__file__).parents[3]
Paths = Callable[..., Path]


def bench(*arguments: object, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "100"}
    if cache:
        env["LLAMA_ONNX_CACHE"] = str(cache)
    command = [sys.executable, "-m", "pytest", "bench/", "--profile", "smoke", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


@pytest.fixture(scope="module")
def dataset(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [{"task": "perplexity", "text": " ".join(words[(k * i) % 16] for i in range(150))} for k in range(1, 9)]
    lines += [
        {"task": "qa", "context": "the cat sat", "question": "who sat", "references": ["the cat"], "id": f"q{k}"}  # type: ignore[dict-item]
        for k in range(3)
    ]
    path = tmp_path_factory.mktemp("data") / "own.jsonl"
    path.write_text("\n".join(json.dumps(x) for x in lines))
    return path


def test_a_run_leaves_page_record_and_junit(checkpoints: Paths, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    arguments = ["--model", checkpoints(), "--dataset", dataset, "--report-dir", out, "--batch-sizes", "1,2"]
    done = bench(*arguments, "--new-tokens", 4, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.count("test_check[") == 0  # one line of dots a file, 26 checks in it
    assert {p.name for p in out.iterdir()} == {"index.html", "report.md", "record.json", "junit.xml"}
    assert done.stdout.rstrip().splitlines()[-2].startswith(f"page: {out.resolve()}/index.html")
    from reports.record import RunRecord

    record = RunRecord.read(out / "record.json")
    assert [s.label for s in record.sides] == ["onnxruntime-cpu", "pytorch-cpu"]
    assert [c.label for c in record.cases()] == ["batch 1, prompt 32", "batch 2, prompt 32", "batch 1, prompt 128"]
    assert [c.new_tokens for c in record.cases()] == [4, 4, 1]
    assert all(len(r.at_s) == s.case.new_tokens for s in record.series for r in s.rounds)
    tests = [o.test for o in record.outcomes]
    assert sum("b1-p128" in name for name in tests) == 2  # a prefill of each side, no decode
    floor = record.prefill_floor
    assert floor is not None
    assert [(m.case.label, m.rows, len(m.samples_s)) for m in floor.measured] == [
        ("batch 1, prompt 32", 32, 3),
        ("batch 1, prompt 128", 128, 3),
    ]
    assert floor.products is not None
    assert floor.missing == ""
    assert "Prefill tokens per second by prompt length" in (out / "index.html").read_text()
    assert record.floor is not None
    assert len(record.floor.bandwidth_samples) == 3
    assert {m.side for m in record.memory} == {"onnxruntime-cpu", "pytorch-cpu"}
    assert record.validation is not None
    assert record.validation.complete
    assert record.validation.mode == "quick"
    assert all(len(d) == 64 for d in (record.validation.folder_sha256, record.validation.baseline_sha256))
    # A second run reuses the export.
    data = next((tmp_path / "cache" / "exports").glob("*/model.onnx.data"))
    made = data.stat().st_mtime_ns
    again = bench(*arguments, "--new-tokens", 4, "-k", "load", cache=tmp_path / "cache")
    assert again.returncode == 3, again.stdout[-3000:]  # loading alone says nothing about parity
    assert data.stat().st_mtime_ns == made


def test_another_models_export_fails_the_gate(
    checkpoints: Paths, exports: Paths, dataset: Path, tmp_path: Path
) -> None:
    arguments = ["--model", checkpoints(), "--exported", exports(seed=1), "--dataset", dataset]
    done = bench(*arguments, "--report-dir", tmp_path / "report", "-k", "test_check")
    assert done.returncode == 1
    assert "FAIL: Mean KL divergence: " in done.stdout
    assert "FAIL: Weights: " in done.stdout
    assert "FAIL" in (tmp_path / "report" / "report.md").read_text().splitlines()[0].upper()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "attention scale off in the decode graph alone",
        "one matrix rounded to a shorter type",
        "wrong chat template",
    ],
)
def test_a_defect_of_the_catalogue_fails_pytest_bench(
    name: str, checkpoints: Paths, exports: Paths, dataset: Path, tmp_path: Path
) -> None:
    """Also in the smallest profile; which defects there are, and by which check each fails, is the catalogue's test."""
    defect = next(d for d in DEFECTS if d.name == name)
    shop = Workshop(exports(), tmp_path / "bad", checkpoints())
    defect.change(shop)
    shop.reseal()
    done = bench(
        *("--model", checkpoints(), "--exported", shop.folder, "--dataset", dataset),
        *("--report-dir", tmp_path / "report", "-k", "test_check"),
    )
    assert done.returncode == 1, done.stdout[-2000:]
    assert f"FAILED bench/test_gate.py::test_check[{defect.first}]" in done.stdout


def test_gpt_neo_goes_through_export_run_and_gate(
    decoders: Callable[[str], tuple[Path, Path]], dataset: Path, tmp_path: Path
) -> None:
    """The stand-in of the source material, on optimum's plain graph, which --target auto chooses."""
    from reports.record import RunRecord

    checkpoint, folder = decoders("gpt_neo")
    common = ["--dataset", dataset, "--new-tokens", 4, "-k", "test_check or prefill"]
    done = bench("--model", checkpoint, "--report-dir", tmp_path / "good", *common, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    record = RunRecord.read(tmp_path / "good" / "record.json")
    assert record.model.target == "plain"
    assert record.prefill_floor is not None
    assert record.prefill_floor.missing == "the matrix products of model type 'gpt_neo' are not counted"
    assert record.validation is not None
    assert record.validation.verdict == "PASS"
    # Another window of its local attention is another model.
    config = json.loads((checkpoint / "config.json").read_text())
    other = shutil.copytree(checkpoint, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({**config, "window_size": 4}))
    done = bench("--model", other, "--exported", folder, "--report-dir", tmp_path / "bad", *common)
    assert done.returncode == 1
    assert "FAIL: Mean KL divergence: " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "nowhere"], 2, "no such model"),
        (["--dataset", "nowhere.jsonl"], 2, "cannot read the dataset"),
        (["--provider", "npu"], 2, "unknown provider 'npu'"),
        (["--provider", "cuda"], 4, "pip install 'onnxruntime-gpu"),
        (["--prompt-lengths", "150", "--new-tokens", "20"], 2, "exceed the model's context of 160"),
        (["--exported", "nowhere"], 2, "no exported folder"),
    ],
)
def test_bad_input_ends_the_run_at_once(
    arguments: list[str], code: int, words: str, checkpoints: Paths, exports: Paths, tmp_path: Path
) -> None:
    if "cuda" in arguments:
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("onnxruntime-gpu is installed here")
    if "--model" not in arguments:
        arguments = ["--model", str(checkpoints()), *arguments]
    if "--exported" not in arguments:
        arguments = ["--exported", str(exports()), *arguments] if "nowhere" not in arguments else arguments
    done = bench(*arguments, "--report-dir", tmp_path / "report")
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "report").exists()


def test_a_changed_export_is_refused(checkpoints: Paths, exports: Paths, tmp_path: Path) -> None:
    broken = shutil.copytree(exports(), tmp_path / "broken")
    with (broken / "model.onnx.data").open("r+b") as f:
        f.write(b"\xff")
    arguments = ["--model", checkpoints(), "--exported", broken, "--report-dir", tmp_path / "report"]
    done = bench(*arguments, "-k", "test_check and files")
    assert done.returncode == 1
    assert "SHA-256 of model.onnx.data" in done.stdout


def test_what_is_undecided_is_exit_code_3(checkpoints: Paths, exports: Paths, words: list[str], tmp_path: Path) -> None:
    """Ten generations cannot decide a task score in fp32 that differs in one: neither passed nor failed."""
    lines = [{"id": f"p{k}", "task": "perplexity", "text": " ".join(words * 3)} for k in range(2)]
    (tmp_path / "few.jsonl").write_text("\n".join(json.dumps(x) for x in lines))
    arguments = ["--model", checkpoints(), "--exported", exports(), "--dataset", tmp_path / "few.jsonl"]
    common = ["--report-dir", tmp_path / "report", "-k", "top1_agreement", "--profile", "standard"]
    done = bench(*arguments, *common)
    assert done.returncode == 3, done.stdout[-2000:]
    assert "INCONCLUSIVE: Top-1 agreement" in done.stdout
    assert "tokens would decide" in done.stdout


def test_some_checks_alone_are_no_verdict(checkpoints: Paths, exports: Paths, tmp_path: Path) -> None:
    arguments = ["--model", checkpoints(), "--exported", exports(), "--report-dir", tmp_path, "-k", "files"]
    done = bench(*arguments)
    assert done.returncode == 3, done.stdout[-2000:]
    assert "Parity examined in part" in done.stdout
    assert "Same model" not in done.stdout


def test_a_failure_of_a_plugin_is_not_talked_away(
    checkpoints: Paths, exports: Paths, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_plugin.py").write_text(
        "import pytest\n\n@pytest.hookimpl(tryfirst=True)\ndef pytest_sessionfinish(session):\n"
        "    session.exitstatus = 1\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ["--model", checkpoints(), "--exported", exports(), "--dataset", dataset, "-k", "test_check"]
    assert bench(*arguments, "--report-dir", tmp_path / "report").returncode == 0
    assert bench(*arguments, "--report-dir", tmp_path / "report", "-p", "failing_plugin").returncode == 1


def test_where_nothing_can_be_written_nothing_is_measured(checkpoints: Paths, exports: Paths, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = bench("--model", checkpoints(), "--exported", exports(), "--report-dir", tmp_path / "file" / "report")
    assert done.returncode == 2
    assert "cannot be written" in done.stdout + done.stderr


def test_what_an_exported_folder_has_to_be(checkpoints: Paths, exports: Paths, tmp_path: Path) -> None:
    arguments = ["--model", checkpoints(), "--exported", exports(), "--report-dir", tmp_path, "--precision", "int4"]
    done = bench(*arguments, "-k", "test_check and manifest")
    assert done.returncode == 1
    assert "int4" in done.stdout


@pytest.mark.slow
def test_the_demo_model_through_the_whole_gate(demo_checkpoint: Path, tmp_path: Path) -> None:
    done = bench("--report-dir", tmp_path / "report")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    from reports.record import RunRecord

    record = RunRecord.read(tmp_path / "report" / "record.json")
    assert record.model.node_count <= 350
    assert not record.model.random_weights
    assert record.validation is not None
    assert record.validation.verdict == "PASS"
    greedy = next(r for r in record.validation.results if r.name == "greedy")
    assert greedy is not None
    assert greedy.measurements[0].value == 1.0
