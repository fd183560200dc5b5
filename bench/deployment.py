"""Where and how a folder runs: provider, threads and options, in one value that every command opens folders with.

Try: ``llama-onnx validate FOLDER --baseline demo --provider cpu --session-option session.intra_op.allow_spinning=0``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from runtime.settings import SessionSettings, usable_cores

if TYPE_CHECKING:
    from runtime.ort_session import OrtSession
    from runtime.settings import MoreSettings


def add_options(add: Callable[..., Any], provider: str = "cpu") -> None:
    """The options of a deployment; ``add`` is argparse's ``add_argument`` or pytest's ``addoption``."""
    auto = ": cuda where a GPU loads, else cpu" if provider == "auto" else ""
    add("--provider", default=provider, help=f"cpu, cuda, tensorrt or tensorrt-rtx (default {provider}{auto})")
    add("--provider-option", action="append", default=[], metavar="KEY=VALUE", help="of the provider; may be repeated")
    add("--session-option", action="append", default=[], metavar="KEY=VALUE", help="of the session; may be repeated")
    add("--allow-fallback", action="store_true", help="run elsewhere where the provider cannot; the result says so")
    add("--threads", type=int, help="CPU threads of every side (default: every core)")


@dataclass(frozen=True)
class Deployment:
    """How a folder is opened; see :class:`runtime.settings.SessionSettings` for the fields."""

    provider: str = "cpu"
    threads: int = field(default_factory=usable_cores)
    provider_options: Mapping[str, str] = field(default_factory=dict)
    session_options: Mapping[str, str] = field(default_factory=dict)
    allow_fallback: bool = False

    @classmethod
    def of(cls, asked: Any) -> Deployment:
        """From parsed options; ``auto`` is CUDA where a GPU is there, else the CPU.

        Raises:
            SessionError: an unknown provider, one that cannot run here (unless a fallback is allowed), options and
                threads that make no sense, or several workers that may fall back, each by itself.
        """
        from runtime.errors import ProviderUnavailableError, SessionError
        from runtime.provider_options import options_of, parse_options
        from runtime.providers import auto_provider, require

        if asked.allow_fallback and getattr(asked, "workers", 1) > 1:
            raise SessionError("--allow-fallback with --workers: no result could say which fell back; leave one out")
        name = auto_provider() if asked.provider == "auto" else asked.provider
        try:
            require(name, None)
        except ProviderUnavailableError:
            if not asked.allow_fallback:
                raise
        options, threads = parse_options(asked.provider_option), asked.threads
        options_of(name, options)
        SessionSettings(name, threads)  # it knows what makes no sense
        session = parse_options(asked.session_option)
        return cls(name, usable_cores() if threads is None else threads, options, session, asked.allow_fallback)

    @property
    def device(self) -> str:
        """Where PyTorch runs beside it: ``cpu``, or ``cuda`` for every other provider that loads here."""
        if self.provider == "cpu":
            return "cpu"
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def open(self, folder: Path, **more: Unpack[MoreSettings]) -> OrtSession:
        """The folder on ONNX Runtime; its hashes are the check ``files``' business.

        Args:
            folder: the exported folder.
            more: settings that are not of the deployment, see :class:`runtime.settings.SessionSettings`.

        Raises:
            SessionError: the folder cannot be opened so.
        """
        from export.cache import cache_dir
        from runtime.loading import load

        settings: MoreSettings = {
            "provider_options": self.provider_options or None,
            "session_options": self.session_options or None,
            "allow_fallback": self.allow_fallback,
            "engine_home": cache_dir() if self.provider.startswith("tensorrt") else None,
            **more,
        }
        return load(folder, self.provider, self.threads, verify=False, **settings)

    def settings(self) -> dict[str, str | int | bool]:
        """What was asked for, for a result."""
        options = {f"provider option {k}": v for k, v in self.provider_options.items()}
        options |= {f"session option {k}": v for k, v in self.session_options.items()}
        fallback: dict[str, str | int | bool] = {"fallback allowed": True} if self.allow_fallback else {}
        return {"provider": self.provider, "threads": self.threads, **options, **fallback}
