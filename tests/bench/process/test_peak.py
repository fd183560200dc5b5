"""Peak memory is the process's own, also where this suite cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.peers.exports import PEAK, genai_export

HELD = 300_000_000
BUILDER = "import sys\nheld = bytearray({held})\ndel held\nprint(sys.argv[1:])\n"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
def test_memory_that_was_freed_counts_and_the_parents_does_not() -> None:
    script = f"import runpy; peak = runpy.run_path({str(PEAK)!r})['peak_bytes']; first = peak(); "
    script += f"bytearray({HELD}); print(first, peak())"
    held = bytearray(HELD)  # what ru_maxrss would keep across exec
    command = [sys.executable, "-I", "-S", "-c", script]
    first, second = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert len(held) > first > 1_000_000
    assert HELD < second < HELD + first + 20_000_000


def test_genais_builder_in_its_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "onnxruntime_genai" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()  # before an onnxruntime-genai that is installed
    (package / "__init__.py").touch()
    (package / "builder.py").write_text(BUILDER.format(held=HELD))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = genai_export(Path(sys.executable), tmp_path / "checkpoint", tmp_path / "out", "fp32")
    assert HELD < found["peak_bytes"] < 2 * HELD
    assert found["seconds"] > 0
