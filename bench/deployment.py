"""Where and how a folder runs: provider, threads, options, and under which onnxruntime, in one value that every command
opens folders with.

Try: ``llama-onnx validate FOLDER --baseline demo --provider cpu --session-option session.intra_op.allow_spinning=0``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from bench.runtimes import LIMIT_S
from runtime.settings import SessionSettings, usable_cores

if TYPE_CHECKING:
    from bench.runtimes.environments import Runtime
    from bench.runtimes.remote import RemoteProbe, RemoteSession
    from export.manifest import Manifest
    from runtime.ort_session import OrtSession
    from runtime.probe import GraphProbe
    from runtime.settings import MoreSettings


def add_options(add: Callable[..., Any], provider: str = "cpu") -> None:
    """The options of a deployment; ``add`` is argparse's ``add_argument`` or pytest's ``addoption``."""
    auto = ": cuda where a GPU loads, else cpu" if provider == "auto" else ""
    add("--provider", default=provider, help=f"cpu, cuda, tensorrt or tensorrt-rtx (default {provider}{auto})")
    add("--provider-option", action="append", default=[], metavar="KEY=VALUE", help="of the provider; may be repeated")
    add("--session-option", action="append", default=[], metavar="KEY=VALUE", help="of the session; may be repeated")
    add("--allow-fallback", action="store_true", help="run elsewhere where the provider cannot; the result says so")
    add("--threads", type=int, help="CPU threads of every side (default: every core)")


WARNINGS = 2
"""Severity from which another onnxruntime's messages are kept."""


def other_runtime(text: str | None) -> Runtime | None:
    """The one onnxruntime that ``--runtime`` names, its environment made; None where it names none.

    Raises:
        BenchError: several, or none that can be installed.
    """
    if not text:
        return None
    from bench.errors import BenchError
    from bench.runtimes.environments import parse_runtimes, prepare

    first, *rest = parse_runtimes(text)
    if rest:
        raise BenchError(f"--runtime names {rest[0].text} as well; this command takes one, llama-onnx matrix several")
    return prepare(first, say=lambda line: print(line, file=sys.stderr))


@dataclass(frozen=True)
class Deployment:
    """How a folder is opened; see :class:`runtime.settings.SessionSettings` for the fields."""

    provider: str = "cpu"
    threads: int = field(default_factory=usable_cores)
    provider_options: Mapping[str, str] = field(default_factory=dict)
    session_options: Mapping[str, str] = field(default_factory=dict)
    allow_fallback: bool = False
    runtime: Runtime | None = None
    """Another onnxruntime, its environment made; None: this environment's."""
    any_runtime: bool = False
    """Open folders under an older one than their manifest demands, to see what happens."""
    limit_s: float = LIMIT_S
    """The most seconds that one call may take under another onnxruntime."""

    @classmethod
    def of(cls, asked: Any) -> Deployment:
        """From parsed options; ``auto`` is CUDA where a GPU is there, else the CPU.

        Raises:
            SessionError: an unknown provider, one that cannot run here (unless a fallback is allowed), options and
                threads that make no sense, or several workers that may fall back, each by itself.
            BenchError: an onnxruntime that cannot be installed.
        """
        from runtime.errors import ProviderUnavailableError, SessionError
        from runtime.provider_options import options_of, parse_options
        from runtime.providers import PROVIDERS, auto_provider, require

        if asked.allow_fallback and getattr(asked, "workers", 1) > 1:
            raise SessionError("--allow-fallback with --workers: no result could say which fell back; leave one out")
        name = auto_provider() if asked.provider == "auto" else asked.provider
        other = other_runtime(getattr(asked, "runtime", None))
        try:
            if other is None or name not in PROVIDERS:  # what another one has, it says itself
                require(name, None)
        except ProviderUnavailableError:
            if not asked.allow_fallback:
                raise
        options, threads = parse_options(asked.provider_option), asked.threads
        options_of(name, options)
        SessionSettings(name, threads)  # it knows what makes no sense
        session = parse_options(asked.session_option)
        return cls(name, usable_cores() if threads is None else threads, options, session, asked.allow_fallback, other)

    @property
    def device(self) -> str:
        """Where PyTorch runs beside it: ``cpu``, or ``cuda`` for every other provider that loads here."""
        if self.provider == "cpu":
            return "cpu"
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def open(self, folder: Path, **more: Unpack[MoreSettings]) -> OrtSession | RemoteSession:
        """The folder on ONNX Runtime; its hashes are the check ``files``' business.

        Args:
            folder: the exported folder.
            more: settings that are not of the deployment, see :class:`runtime.settings.SessionSettings`.

        Raises:
            SessionError: the folder cannot be opened so.
        """
        from export.cache import cache_dir
        from runtime.loading import load, read_folder

        settings: MoreSettings = {
            "provider_options": self.provider_options or None,
            "session_options": self.session_options or None,
            "allow_fallback": self.allow_fallback,
            "engine_home": cache_dir() if self.provider.startswith("tensorrt") else None,
            **more,
        }
        if self.runtime is None:
            return load(folder, self.provider, self.threads, verify=False, **settings)
        from bench.runtimes.remote import RemoteSession

        manifest = read_folder(folder, verify=False)
        settings |= {"log_severity": WARNINGS, "any_runtime": self.any_runtime}
        asked = SessionSettings(self.provider, self.threads, **settings)
        return RemoteSession(folder, manifest, asked, self.runtime, self.limit_s)

    def probe(self, graph: Path, manifest: Manifest, provider: str | None = None) -> GraphProbe | RemoteProbe:
        """A graph of its own, such as a copy that shows its inner values, as the folder is run.

        Args:
            graph: the file.
            manifest: of the folder that it was made from.
            provider: where it ran, if that is not where it was asked to.
        """
        ran_on = provider or self.provider
        options = self.provider_options if ran_on == self.provider else None
        if self.runtime is None:
            from runtime.probe import GraphProbe

            return GraphProbe(graph, manifest, self.threads, ran_on, options)
        from bench.runtimes.remote import Child, RemoteProbe

        settings = SessionSettings(ran_on, self.threads, provider_options=options)
        return RemoteProbe(Child(self.runtime, self.limit_s), manifest, graph, settings)

    def settings(self) -> dict[str, str | int | bool]:
        """What was asked for, for a result."""
        options = {f"provider option {k}": v for k, v in self.provider_options.items()}
        options |= {f"session option {k}": v for k, v in self.session_options.items()}
        fallback: dict[str, str | int | bool] = {"fallback allowed": True} if self.allow_fallback else {}
        other = {"runtime": self.runtime.label} if self.runtime else {}
        return {"provider": self.provider, "threads": self.threads, **other, **options, **fallback}
