"""A :class:`bench.matrix.differ.Runner` in an environment of :mod:`bench.runtimes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bench.matrix.differ import RunnerError
from bench.runtimes.environments import Runtime
from bench.runtimes.remote import Child
from export.manifest import first_line
from runtime.errors import SessionError
from runtime.settings import SessionSettings


class RemoteRunner:
    """Graphs opened, run once and closed in a child; one that died is replaced.

    Args:
        other: the environment, made.
        settings: provider, threads, options.
        limit_s: the most seconds that one graph may take.
    """

    def __init__(self, other: Runtime, settings: SessionSettings, limit_s: float) -> None:
        self._other, self._settings, self._limit_s = other, settings, limit_s
        self._child: Child | None = None

    @property
    def label(self) -> str:
        """The runtime's."""
        return self._other.label

    def run(
        self, graph: Path, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str], *, optimise: bool = True
    ) -> dict[str, NDArray[Any]]:
        """See :meth:`bench.matrix.differ.Runner.run`.

        Raises:
            RunnerError: the runtime refuses, crashes or hangs.
        """
        if self._child is None or self._child.ended:
            self._child = Child(self._other, self._limit_s)
        try:
            found: dict[str, NDArray[Any]] = self._child.ask(
                "run", str(graph), dict(feeds), list(outputs), self._settings, optimise
            )
        except SessionError as error:
            raise RunnerError(first_line(error)) from None
        return found

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.close()
