"""Packages start light, errors have one root; who may import whom is import-linter's (pyproject.toml)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "optimum", "transformers", "onnxruntime", "onnx", "ray")
HOUSE = ("export", "runtime", "bench", "reports")


def files() -> list[Path]:
    return [p for name in HOUSE for p in sorted((ROOT / name).rglob("*.py"))]


def test_errors_have_one_root_on_each_side() -> None:
    bases = {
        node.name: ast.unparse(node.bases[0])
        for path in files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }
    assert len(bases) > 20
    roots = [name for name, base in bases.items() if base not in bases]
    assert sorted(roots) == ["ReportError", "UserError"]


@pytest.mark.parametrize("module", ["export", "runtime", "bench", "reports", "bench.cli.main"])
def test_starts_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["report", "RECORD", "--out", "OUT"]])
def test_help_and_report_load_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    record = str(ROOT / "reports/gallery/demo-cpu/record.json")
    asked = [{"RECORD": record, "OUT": str(tmp_path)}.get(a, a) for a in arguments]
    code = f"""
import atexit, sys
atexit.register(lambda: print("heavy:", [m for m in {HEAVY} if m in sys.modules], file=sys.stderr))
from bench.cli.main import main
sys.exit(main({asked}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 1, 3)
    assert done.stderr.splitlines()[-1] == "heavy: []"


def test_every_command_is_listed() -> None:
    from bench.cli.main import COMMANDS

    modules = {p.stem for p in (ROOT / "bench/cli").glob("*.py")} - {
        "__init__",
        "__main__",
        "main",
        "output",
        "numbers",
    }
    assert {c.__name__.rpartition(".")[2] for c in COMMANDS} == modules


def test_nothing_names_this_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert tracked
    bad = [f for f in tracked if (ROOT / f).is_file() and b"/work/" + b"main" in (ROOT / f).read_bytes()]
    assert bad == []
