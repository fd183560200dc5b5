"""The child in another environment: opens a folder there with our own runtime, and does what its parent asks.

It needs numpy and an onnxruntime; the packages ``runtime`` and ``export.manifest`` are the parent's and need nothing
else (:mod:`bench.process.suite`). Requests and answers are pickled over the socket whose number is the first argument:
``(name, arguments)``, ``("ok", value)`` or ``("error", kind, message)``. What ONNX Runtime prints goes to standard
error, which the parent keeps.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class Server:
    """One session, one probe over a graph, and whatever graph is to be run once."""

    def __init__(self) -> None:
        self._session: Any = None
        self._probe: Any = None

    def open(self, folder: str, manifest: Any, settings: Any) -> Any:
        """A session over a folder that the parent has checked; its :class:`runtime.session.SessionInfo`."""
        from runtime.ort_session import OrtSession

        self._session = OrtSession(Path(folder), manifest, settings)
        return self._session.info, self._session.load_s, self._session.choose_on_device

    def session(self, method: str, *arguments: Any) -> Any:
        """A method of the session."""
        return getattr(self._session, method)(*arguments)

    def info(self) -> Any:
        """What runs now; a graph that opens later may have fallen back."""
        return self._session.info

    def open_probe(self, graph: str, manifest: Any, threads: int, provider: str, options: Any) -> None:
        """A :class:`runtime.probe.GraphProbe` over a graph of its own; "" for the session's scoring graph."""
        from runtime.probe import GraphProbe

        if graph:
            self._probe = GraphProbe(Path(graph), manifest, threads, provider, options)
        else:
            self._probe = GraphProbe.of(self._session)

    def probe(self, method: str, *arguments: Any) -> Any:
        """A method of the probe."""
        return getattr(self._probe, method)(*arguments)

    def run(self, graph: str, feeds: Any, outputs: Any, settings: Any, optimise: bool) -> Any:
        """A graph opened, run once and closed; see :func:`runtime.probe.run_once`."""
        from runtime.probe import run_once

        return run_once(Path(graph), feeds, outputs, settings, optimise)


def answer(work: Callable[[], Any]) -> tuple[Any, ...]:
    """What goes back for one request."""
    from export.manifest import UserError, first_line

    try:
        return "ok", work()
    except UserError as error:
        return "error", type(error).__name__, str(error)
    except Exception as error:  # ONNX Runtime raises its own C++-bound classes
        return "error", "", f"{type(error).__name__}: {first_line(error)}"


def main() -> None:
    """Until the parent hangs up."""
    root = Path(__file__).resolve().parents[2]
    runpy.run_path(str(root / "bench" / "process" / "suite.py"))["load"](root)
    server: Any = Server()
    parent = Connection(int(sys.argv[1]))
    while True:
        try:
            name, arguments = parent.recv()
        except EOFError:
            return
        parent.send(answer(partial(getattr(server, name), *arguments)))


if __name__ == "__main__":
    main()
