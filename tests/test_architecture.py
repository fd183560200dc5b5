"""One direction: export.manifest <- runtime <- bench -> reports; packages start light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "optimum", "transformers", "onnxruntime", "onnx", "ray")
HOUSE = ("export", "runtime", "bench", "reports")
ALLOWED = {"export": set(), "reports": set(), "runtime": {"export"}, "bench": {"export", "runtime", "reports"}}
# A heavy library belongs to one package; peers measure other runtimes and may import what they measure.
OWNERS = {"optimum": ("export/", "bench/peers/"), "onnxruntime": ("runtime/", "bench/peers/")}


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module or ""


def files() -> list[Path]:
    return [p for name in HOUSE for p in sorted((ROOT / name).rglob("*.py"))]


def test_arrows_point_one_way() -> None:
    wrong = []
    for path in files():
        package = path.relative_to(ROOT).parts[0]
        for line, module in imports_of(path):
            other = module.split(".")[0]
            if other in HOUSE and other != package and other not in ALLOWED[package]:
                wrong.append(f"{path.name}:{line} {module}")
            if package == "runtime" and other == "export" and module != "export.manifest":
                wrong.append(f"{path.name}:{line} runtime takes {module}")
    assert wrong == []


def test_heavy_libraries_have_one_owner() -> None:
    wrong = []
    for path in files():
        place = path.relative_to(ROOT).as_posix()
        for line, module in imports_of(path):
            owners = OWNERS.get(module.split(".")[0])
            if owners and not place.startswith(owners):
                wrong.append(f"{place}:{line} {module}")
    assert wrong == []


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
        "progress",
    }
    assert {c.__name__.rpartition(".")[2] for c in COMMANDS} == modules


def test_nothing_names_this_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert tracked
    bad = [f for f in tracked if (ROOT / f).is_file() and b"/work/" + b"main" in (ROOT / f).read_bytes()]
    assert bad == []
