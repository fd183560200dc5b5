"""What can go wrong while running. Each error names the thing and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

from export.manifest import UserError


class SessionError(UserError):
    """Base of all runtime errors."""

    warnings: Sequence[str] = ()
    """What ONNX Runtime in another environment printed before."""


class ContextOverflowError(SessionError):
    """More tokens were asked for than the context (or the reserved buffer) holds."""


class SessionBusyError(SessionError):
    """A session was called while another call of it was under way."""


class UnknownProviderError(SessionError):
    """A provider name that this tool does not know."""


class ProviderUnavailableError(SessionError):
    """A known provider that this machine cannot run; names the cause and the install command."""

    exit_code = 4


class CompileError(SessionError):
    """A graph that TensorRT-RTX does not compile; names the node."""

    exit_code = 1


class CompilerMissingError(ProviderUnavailableError):
    """TensorRT-RTX's compiler is not installed here; names the install command."""
