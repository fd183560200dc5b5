"""ONNX Runtimes by version: a virtual environment each in the user's cache, made when it is first asked for.

An environment holds onnxruntime and numpy and nothing else (for a GPU also what that distribution asks for, and onnx,
of which :mod:`runtime.device_choice` makes its helper graphs). uv makes it where it is installed, else pip. It is
complete or not there at all, and who asks for it is told where it lies, how large it is and how to remove it.

Try: ``llama-onnx validate FOLDER --baseline demo --runtime onnxruntime==1.23.2``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import InvalidVersion, Version

from bench.errors import BenchError, last_line
from export.cache import cache_dir, publish

Say = Callable[[str], None]
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
FORM = "write onnxruntime==1.23.2,1.27.0 (or onnxruntime-gpu==...), or venv=PATH"
FACTS = "runtime.json"
_ASK = (
    "import json, onnxruntime as o, numpy as n; print(json.dumps("
    "{'onnxruntime': o.__version__, 'numpy': n.__version__, 'providers': o.get_available_providers()}))"
)


def home() -> Path:
    """Where the environments lie."""
    return cache_dir().absolute() / "runtimes"


def kept() -> dict[str, int | str]:
    """``count``, ``bytes`` and ``folder`` of all environments that were made."""
    made = [p.parent for p in home().glob(f"*/{FACTS}")]
    return {"count": len(made), "bytes": sum(map(_bytes_of, made)), "folder": str(home())}


def _bytes_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


@dataclass(frozen=True)
class Runtime:
    """One ONNX Runtime: ``distribution`` of ``version`` from the package index, or what lies in ``venv``.

    With both it is this environment's own, see :func:`here`.
    """

    distribution: str = ""
    version: str = ""
    venv: str = ""
    note: str = ""
    """Tells it from another one of the same version."""

    @property
    def text(self) -> str:
        """As it is written on a command line; of a folder its name, which does not tell where it lies."""
        return f"{self.distribution}=={self.version}" if self.distribution else f"venv={environment_name(self.venv)}"

    @property
    def label(self) -> str:
        """For a table: ``onnxruntime 1.23.2``."""
        if self.distribution:
            return f"{self.distribution} {self.version}" + (f" ({self.note})" if self.note else "")
        return f"venv {environment_name(self.venv)}" + f" (onnxruntime {self.version})" * bool(self.version)

    @property
    def folder(self) -> Path:
        """Its virtual environment, which may not have been made yet."""
        if self.venv:
            return Path(self.venv).expanduser().absolute()
        python = f"cp{sys.version_info.major}{sys.version_info.minor}"
        return home() / f"{self.distribution}-{self.version}-{python}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @cached_property
    def key(self) -> Version:
        """What versions are ordered by; a folder's come first."""
        return Version(self.version or "0")


def environment_name(venv: str) -> str:
    """What tells environments apart: most are called ``.venv``, so with the folder that one stands in."""
    path = Path(venv).expanduser().absolute()
    return f"{path.parent.name}/{path.name}" if path.name in (".venv", "venv") else path.name


def parse_runtimes(text: str, option: str = "--runtime", form: str = FORM) -> list[Runtime]:
    """``onnxruntime==1.23.2,1.27,venv=PATH`` in the order given; a bare version is of the distribution before it.

    Raises:
        BenchError: no such list, or one named twice.
    """
    found: list[Runtime] = []
    distribution = DISTRIBUTIONS[0]
    for part in (p.strip() for p in text.split(",")):
        if part.startswith("venv="):
            found.append(Runtime(venv=part.removeprefix("venv=")))
            continue
        name, equals, number = part.rpartition("==")
        distribution = name.strip() if equals else distribution
        try:
            parsed = Version(number.strip())
        except InvalidVersion:
            raise BenchError(f"{option} {part!r} names no version; {form}") from None
        if distribution not in DISTRIBUTIONS:
            raise BenchError(f"{option} {part!r} is neither onnxruntime nor onnxruntime-gpu; {form}")
        whole = ".".join(map(str, (*parsed.release, 0, 0)[: max(3, len(parsed.release))]))
        found.append(Runtime(distribution, str(parsed).replace(parsed.base_version, whole, 1)))
    twice = next((r.text for k, r in enumerate(found) if r in found[:k]), None)
    if twice:
        raise BenchError(f"{option} names {twice} twice; {form}")
    return found


def here() -> Runtime:
    """This environment's own.

    Raises:
        BenchError: it has none.
    """
    for distribution in DISTRIBUTIONS:
        with suppress(PackageNotFoundError):
            return Runtime(distribution, version(distribution), sys.prefix)
    raise BenchError("no onnxruntime in this environment; name a --reference")


def prepare(runtime: Runtime, say: Say = lambda _: None) -> Runtime:
    """Make the environment where it is not there yet; returns ``runtime``, of a ``venv`` with its version.

    Args:
        runtime: which.
        say: told in a line that one is made; size, place and how to remove it.

    Raises:
        BenchError: there is no such version for this Python, nothing that installs, or no onnxruntime in a ``venv``.
    """
    if runtime.venv and runtime.version:
        return runtime
    if runtime.venv:
        if not runtime.python.exists():
            raise BenchError(
                f"no virtual environment at {runtime.folder}; make one with: python -m venv {runtime.venv}"
            )
        return replace(runtime, version=str(_facts_of(runtime.python, runtime)["onnxruntime"]))
    if (runtime.folder / FACTS).is_file():
        if not runtime.python.exists():
            raise BenchError(
                f"{runtime.text}: the Python of its environment is gone; remove it with: rm -r '{runtime.folder}'"
            )
        return runtime
    say(f"making an environment for {runtime.text}")
    with publish(runtime.folder, shared=True) as work:
        _install(runtime, work)
        facts = _facts_of(work / "bin" / "python", runtime)
        (work / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    size = f"{_bytes_of(runtime.folder) / 1e6:.0f} MB"
    say(f"made it: {size} in {runtime.folder}; remove it with: rm -r '{runtime.folder}'")
    return runtime


def _install(runtime: Runtime, work: Path) -> None:
    """onnxruntime and numpy into a new environment at ``work``."""
    python = str(work / "bin" / "python")
    if uv := shutil.which("uv"):
        command = [uv, "pip", "install", "-q", "--python", python]
    else:
        command = [*_pip(f"install {runtime.text}"), "--python", python, "install", "-q", "--no-input"]
    venv.create(work, with_pip=False, symlinks=True)
    wanted = [f"numpy=={version('numpy')}"]
    if runtime.distribution == "onnxruntime":  # what it depends on beside numpy serves its tools, not its sessions
        wanted += [runtime.text, "--no-deps"]
    else:
        wanted += [f"{runtime.distribution}[cuda,cudnn]=={runtime.version}", "onnx"]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise BenchError(f"{runtime.text} cannot be installed: {_why(done.stderr)}")


def _pip(purpose: str) -> list[str]:
    """The command that is pip for this Python: its own, or one that uv fetches."""
    with suppress(PackageNotFoundError):
        version("pip")  # asking for the module would wake setuptools' hooks
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "--python", sys.executable, "pip"]
    raise BenchError(f"neither pip nor uv is here to {purpose}; install one, such as: python -m ensurepip")


def _why(said: str) -> str:
    """The line of pip or uv that says what is wrong, without colours."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"could not find|no version|because", line, re.I)]
    return (telling or lines or ["no output"])[0].removeprefix("ERROR: ")[:500]


def _facts_of(python: Path, runtime: Runtime) -> dict[str, object]:
    """Versions and providers that an environment's own onnxruntime names."""
    done = subprocess.run([str(python), "-P", "-c", _ASK], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise BenchError(f"{runtime.text}: its onnxruntime cannot be imported: {last_line(done.stderr)}")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def released(distribution: str, first: Version, last: Version) -> list[Runtime]:
    """Every released version from ``first`` to ``last`` that the package index has for this Python, oldest first.

    Raises:
        BenchError: the index cannot be asked, or neither pip nor uv is here.
    """
    command = [*_pip(f"ask for the versions of {distribution}"), "index", "versions", distribution]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    listed = re.search(r"Available versions: (.*)", done.stdout)
    if listed is None:
        raise BenchError(f"the package index does not tell the versions of {distribution}: {last_line(done.stderr)}")
    versions = [Version(v.strip()) for v in listed.group(1).split(",")]
    return [Runtime(distribution, str(v)) for v in sorted(versions) if first <= v <= last]
