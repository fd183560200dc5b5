"""What ``--base`` and ``--candidate`` name: a folder, how to run it, and in which environment.

``FOLDER[,provider=cpu][,threads=2][,option:KEY=VALUE]...[,runtime=onnxruntime==1.23.2][,venv=PATH][,rev=GITREV]``:
``option:`` is a session configuration entry of ONNX Runtime (or ``huge_pages``, ``prefill_chunk``), ``runtime`` another
onnxruntime, whose environment is made in the cache, ``venv`` another virtual environment, ``rev`` another revision of
this suite, checked out into a worktree beside the cache.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.process.child import output_of
from bench.runtimes.environments import Say, environment_name, parse_runtimes, prepare
from export.cache import cache_dir
from reports.comparison import ComparedSide, Scalar, SideName

KEYS = "provider, threads, option:KEY, runtime, venv and rev"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class SideSpec:
    """One side as it was asked for."""

    name: SideName
    text: str
    folder: str
    provider: str = "cpu"
    threads: int | None = None
    options: dict[str, Scalar] = field(default_factory=dict)
    venv: str | None = None
    revision: str | None = None
    any_runtime: bool = False
    """See :class:`runtime.settings.SessionSettings`."""

    def python(self) -> str:
        """The interpreter that measures this side.

        Raises:
            BenchError: the virtual environment has none.
        """
        if self.venv is None:
            return sys.executable
        found = Path(self.venv).expanduser() / "bin" / "python"
        if found.exists():
            return str(found.absolute())
        raise BenchError(f"no virtual environment at {self.venv}; make one with: python -m venv {self.venv}")

    @property
    def lent(self) -> bool:
        """Whether another environment gets this suite, by :mod:`bench.process.suite`."""
        return self.venv is not None and self.revision is None

    def arguments(self) -> dict[str, Any]:
        """What :mod:`bench.latency.measure_case` has to know of the side."""
        from runtime.loading import read_folder

        folder = Path(self.folder).expanduser().absolute()
        found = {"folder": str(folder), "provider": self.provider, "threads": self.threads, "options": self.options}
        if self.lent:
            manifest = asdict(read_folder(folder, verify=False).without_lists)  # onnx may be missing there
            found |= {"suite": str(ROOT), "manifest": manifest, "any_runtime": self.any_runtime}
        return found

    def as_options(self) -> list[str]:
        """The same as options of ``llama-onnx validate``; settings that change speed alone are left out."""
        from bench.latency.measure_case import OWN_SETTINGS, SESSION_PREFIXES

        found = ["--provider", self.provider]
        found += ["--runtime", f"venv={self.venv}"] if self.venv else []
        found += ["--threads", str(self.threads)] if self.threads else []
        for key, value in self.options.items():
            if key not in OWN_SETTINGS:
                kind = "session" if key.startswith(SESSION_PREFIXES) else "provider"
                found += [f"--{kind}-option", f"{key}={value}"]
        return found

    def described(self) -> ComparedSide:
        """The side as it stands in a comparison before anything was measured: no path of this machine is told."""
        folder = Path(self.folder).expanduser().absolute().name
        venv = None if self.venv is None else environment_name(self.venv)
        more = [f"{k}={v}" for k, v in self.options.items()]
        more += [f"{k}={v}" for k, v in (("venv", venv), ("rev", self.revision)) if v]
        more += [f"{self.threads} threads"] if self.threads else []
        label = ", ".join([folder, self.provider, *more])
        typed = [f"venv={venv}" if part.startswith("venv=") else part for part in self.text.split(",")[1:]]
        return ComparedSide(
            name=self.name,
            label=label,
            text=",".join([folder, *typed]),
            folder=folder,
            provider=self.provider,
            venv=venv,
            revision=self.revision,
            options=self.options,
        )


def parse_side(name: SideName, text: str, say: Say = lambda _: None) -> SideSpec:
    """Read a side from the command line; ``say`` is told of an environment that is made for it.

    Raises:
        BenchError: no such folder, an unknown key, threads that are no number.
    """
    folder, *parts = text.split(",")
    given: dict[str, Any] = {}
    options: dict[str, Scalar] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise BenchError(f"--{name}: {part!r} is not KEY=VALUE")
        if key == "option:prefill_chunk" and not value.isdigit():
            raise BenchError(f"--{name}: prefill_chunk={value} is not a number of tokens")
        if key.startswith("option:"):
            options[key.removeprefix("option:")] = value
        elif key == "runtime":
            (asked,) = parse_runtimes(value)
            given["venv"] = str(prepare(asked, say).folder)
        elif key in ("provider", "venv", "rev"):
            given["revision" if key == "rev" else key] = value
        elif key == "threads":
            if not value.isdigit() or value == "0":
                raise BenchError(f"--{name}: threads={value} is not a number of threads")
            given["threads"] = int(value)
        else:
            raise BenchError(f"--{name}: unknown key {key!r}; known are {KEYS}")
    if not Path(folder).expanduser().is_dir():
        raise BenchError(f"--{name}: no folder at {folder}; make one with: llama-onnx export MODEL {folder}")
    side = SideSpec(name=name, text=text, folder=folder, options=options, **given)
    side.python()
    return side


def _git(*arguments: str) -> str:
    return output_of(["git", "-C", str(ROOT), *arguments], f"git {' '.join(arguments[:2])} failed: ").strip()


def suite_root(side: SideSpec) -> Path:
    """Where the side's ``runtime`` and ``export`` come from: here, or a worktree of another revision.

    Raises:
        BenchError: this is no git checkout, or has no such revision.
    """
    if side.revision is None:
        return ROOT
    commit = _git("rev-parse", "--verify", f"{side.revision}^{{commit}}")
    place = cache_dir() / "revisions" / commit[:16]
    if not (place / "runtime").is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        _git("worktree", "prune")
        _git("worktree", "add", "--detach", str(place), commit)
    return place


def environment(side: SideSpec) -> dict[str, str]:
    """Environment variables of the side's processes: nothing fetched; the suite's revision on the path, if not lent."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")} | {"HF_HUB_OFFLINE": "1"}
    return env if side.lent else env | {"PYTHONPATH": str(suite_root(side))}
