"""The command line's contract: exit codes, one or two lines for bad input, clean standard output."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.cli.main import main
from bench.machine.lock import machine_lock

Paths = Callable[..., Path]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_export_inspect_generate(capsys: pytest.CaptureFixture[str], checkpoints: Paths, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, _ = run(capsys, "export", checkpoints(), out)
    assert code == 0
    assert "2 GroupQueryAttention" in said
    code, said, _ = run(capsys, "export", checkpoints(), out)
    assert code == 0
    assert said.startswith("already there")
    code, said, _ = run(capsys, "inspect", out, "--json")
    assert code == 0
    assert json.loads(said)["kv"]["layers"] == 2
    code, said, _ = run(capsys, "inspect", out)
    assert (code, "every file as published" in said) == (0, True)
    assert "1.20.1 or newer: SkipSimplifiedLayerNormalization" in " ".join(said.split())
    code, said, err = run(capsys, "generate", out, "the cat sat", "--max-new-tokens", 5)
    assert code == 0
    assert "TTFT" in err
    assert "TTFT" not in said
    code, said, _ = run(capsys, "generate", out, "the cat sat", "--chat", "--json", "--max-new-tokens", 5)
    found = json.loads(said)
    assert code == 0
    assert found["prompt_tokens"] == 6  # <s> is not added: <u> the cat sat </u> <a>
    assert len(found["at_s"]) == found["new_tokens"] <= 5


def test_bad_input_is_one_or_two_lines_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], checkpoints: Paths, exports: Paths, tmp_path: Path
) -> None:
    broken = shutil.copytree(exports(), tmp_path / "broken")
    with (broken / "model.onnx.data").open("r+b") as f:
        f.write(b"\xff")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    cases: list[tuple[list[object], str]] = [
        (["export", "nowhere", tmp_path / "o"], "no such model"),
        (["export", "someone/unknown-llama", tmp_path / "o"], "hub"),
        (["export", checkpoints(), tmp_path / "other"], "not an export of ours"),
        (["export", checkpoints(), tmp_path / "o", "--precision", "fp8"], "unknown precision"),
        (["inspect", tmp_path / "nowhere"], "no exported folder"),
        (["inspect", broken], "SHA-256 of model.onnx.data"),
        (["generate", broken, "the cat"], "SHA-256 of model.onnx.data"),
        (["generate", exports(), "the cat " * 100], "exceed the context of 160"),
        (["generate", exports(), ""], "prompt is empty"),
        (["generate", exports(), "the cat", "--provider", "npu"], "unknown provider"),
        (["generate", exports(), "the cat", "--max-new-tokens", "0"], "at least 1"),
        (["report", tmp_path / "nowhere.json"], "nowhere.json"),
    ]
    for arguments, words in cases:
        code, said, err = run(capsys, *arguments)
        assert (code, said) == (2, ""), arguments
        errors = [line for line in err.splitlines() if line]
        assert words in err, err
        assert "Traceback" not in err
        assert len([line for line in errors if line.startswith("error: ")]) == 1
        assert not (tmp_path / "o").exists()


def test_a_provider_that_is_not_installed_is_exit_code_4(capsys: pytest.CaptureFixture[str], exports: Paths) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed here")
    code, _, err = run(capsys, "generate", exports(), "the cat", "--provider", "cuda")
    assert code == 4
    assert "pip install 'onnxruntime-gpu" in err


def test_a_defect_of_ours_is_not_dressed_up(
    capsys: pytest.CaptureFixture[str], exports: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("runtime.loading.read_folder", broken)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(exports())])


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = run(capsys, "doctor", "--json")
    assert code == 0
    report = json.loads(said)
    found = {f["provider"]: f for f in report["providers"]}
    assert found["cpu"]["loads"] is True
    assert report["bandwidth"]["cpu_bytes_per_s"] > 1e8
    assert "needs no GPU" in report["compiler"] or "pip install 'llama-onnx-bench[tensorrt-rtx]'" in report["compiler"]
    code, said, _ = run(capsys, "doctor", "--no-bandwidth")
    assert found["cuda"]["loads"] or "[cuda,cudnn]" in said.replace("\n", "")


def test_usage_errors_are_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fly"])
    assert caught.value.code == 2
    assert "fly" in capsys.readouterr().err


def test_options_of_other_commands_are_not_swallowed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--profile", "smoke"])
    assert caught.value.code == 2
    assert "--profile" in capsys.readouterr().err


def test_an_option_that_the_suite_lacks_is_exit_code_2() -> None:
    """Not pytest's own 4, which here means that the machine cannot run it."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "bench.cli", "bench", "--nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 2
    assert "--nonsense" in done.stderr


def test_a_machine_that_measures_already_is_exit_code_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `bench` too, where it is pytest's code for wrong options."""
    import subprocess
    import sys

    monkeypatch.setenv("LLAMA_ONNX_LOCK", str(tmp_path / "lock"))
    with machine_lock("this test"):
        command = [sys.executable, "-m", "bench.cli", "bench", "--profile", "smoke"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 4
    assert "this test" in done.stderr + done.stdout


def test_a_reader_that_left_is_no_verdict() -> None:
    import subprocess
    import sys

    for command in (["validate", "--list-checks", "--json"], ["validate", "--list-checks"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([sys.executable, "-m", "bench.cli", *command], stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        assert done.returncode == 141, done.stderr
        assert b"Traceback" not in done.stderr


def test_bench_takes_the_suites_options(checkpoints: Paths, exports: Paths, tmp_path: Path) -> None:
    """In a process of its own: pytest inside pytest shares too much."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "bench.cli", "bench", "--json", "--profile", "smoke", "-k", "load"]
    command += ["--model", str(checkpoints()), "--exported", str(exports()), "--report-dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 3, done.stderr  # load alone says nothing about parity
    record = json.loads(done.stdout)
    assert {x["side"] for x in record["loads"]} == {"onnxruntime-cpu", "pytorch-cpu"}
    assert record["command"][:4] == ["llama-onnx", "bench", "--profile", "smoke"]


def test_what_the_machine_is_at_fault_for_is_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    checkpoints: Paths,
    exports: Paths,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    (tmp_path / "bomb.yaml").write_text("models: &a [demo]\nprecisions: *a\n")
    monkeypatch.setenv("LLAMA_ONNX_HISTORY", str(tmp_path / "file" / "history"))
    cases: list[tuple[list[object], str]] = [
        (["export", checkpoints(), tmp_path / "file" / "out"], "name another place"),
        (["export", checkpoints(), tmp_path / ("n" * 300)], "name another place"),
        (["export", checkpoints(), "~nobody-of-that-name/out"], "no home directory"),
        (["report", tmp_path / "deep.json"], "nested too deeply"),
        (["history", "list"], "name another place"),
        (["sweep", tmp_path / "bomb.yaml"], "by an alias"),
        (["generate", exports(), "the \udcff cat"], "not UTF-8"),
    ]
    for arguments, words in cases:
        code, said, err = run(capsys, *arguments)
        assert (code, said) == (2, ""), arguments
        assert words in err
        assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bomb.yaml", "deep.json", "file"]


def test_a_defect_of_ours_keeps_its_place(monkeypatch: pytest.MonkeyPatch, exports: Paths) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("runtime.loading.read_folder", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["inspect", str(exports())])


def test_nothing_of_a_folder_is_read_before_its_hashes_are_checked(
    capsys: pytest.CaptureFixture[str], exports: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = shutil.copytree(exports(), tmp_path / "changed")
    (changed / "tokenizer.json").write_text((changed / "tokenizer.json").read_text() + " ")
    monkeypatch.setattr("runtime.text.load_tokenizer", lambda folder: pytest.fail("the tokenizer was read"))
    code, _, err = run(capsys, "generate", changed, "the cat")
    assert code == 2
    assert "tokenizer.json" in err


@pytest.mark.slow
def test_terminated_midway_nothing_is_left(checkpoints: Paths, tmp_path: Path) -> None:
    """A CI time-out ends an export by SIGTERM: what it had half-written goes."""
    import signal
    import subprocess
    import sys
    import time

    out = tmp_path / "out"
    command = "import time, export.pipeline as p; p.write_manifest = lambda *_: time.sleep(60)\n"
    command += "import sys; from bench.cli.main import main; sys.exit(main())"
    child = subprocess.Popen([sys.executable, "-c", command, "export", str(checkpoints()), str(out)])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*/model.onnx")):
        assert time.monotonic() < deadline, "it never began"
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 143
    assert list(tmp_path.iterdir()) == []


def test_a_models_name_is_not_markup(capsys: pytest.CaptureFixture[str], checkpoints: Paths, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoints(), tmp_path / "[red]x")
    assert run(capsys, "export", source, tmp_path / "out")[0] == 0
    code, said, _ = run(capsys, "inspect", tmp_path / "out")
    assert code == 0
    assert "[red]x" in said
