"""A folder opened under another ONNX Runtime: the session lives in a child (:mod:`bench.runtimes.serve`).

The child holds onnxruntime, the graph and the KV cache; logits cross. It may crash, hang or refuse: each is an error
that says how it ended, and the parent goes on.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Self

from numpy.typing import NDArray

import runtime.errors
from bench.runtimes import LIMIT_S
from bench.runtimes.environments import Runtime
from export.manifest import Manifest
from runtime.errors import SessionError
from runtime.session import Ids, Logits, SessionInfo
from runtime.settings import SessionSettings

HERE = Path(__file__).resolve().parent
TIED = HERE.parent / "process" / "tied.py"
WARNING = re.compile(r"(?:\x1b\[[0-9;]*m)?\S+ \S+ \[W:onnxruntime:[^\]]*\] ?(.*)")
MOST_WARNINGS = 20


class RuntimeDiedError(SessionError):
    """The child with the other onnxruntime crashed or did not answer; says how."""

    exit_code = 1
    outcome: Literal["crashed", "timeout"] = "crashed"


class RuntimeSlowError(RuntimeDiedError):
    """It did not answer in time, and was killed."""

    outcome = "timeout"


class Child:
    """The process in the other environment.

    Args:
        runtime: the environment, made.
        limit_s: the most seconds that one request may take; the child is killed then.
    """

    def __init__(self, runtime: Runtime, limit_s: float = LIMIT_S) -> None:
        self.runtime, self._limit_s = runtime, limit_s
        self.ended: RuntimeDiedError | None = None
        """How it died, if it did."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        ours, theirs = socket.socketpair()
        with closing(theirs):
            python = str(runtime.python)
            command = [python, "-P", str(TIED), python, "-P", str(HERE / "serve.py"), str(theirs.fileno())]
            env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")}
            self._process = subprocess.Popen(
                command,
                env=env,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())

    def ask(self, name: str, *arguments: Any) -> Any:
        """One request of :class:`bench.runtimes.serve.Server`.

        Raises:
            RuntimeDiedError: it has died, now or before, or did not answer in time.
            SessionError: what the session, or ONNX Runtime, said.
        """
        if self.ended:
            raise self.ended
        try:
            self._connection.send((name, arguments))
            if not self._connection.poll(self._limit_s):
                raise self._died(RuntimeSlowError(f"{self.runtime.label}: no answer after {self._limit_s:g} s"))
            answer = self._connection.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
            last = [line.strip()[:200] for line in self.said().splitlines() if line.strip()][-1:]
            text = ": ".join([f"{self.runtime.label} died with {how}", *last])
            raise self._died(RuntimeDiedError(text)) from None
        except RuntimeDiedError:
            raise
        except BaseException:  # such as Ctrl-C: its answer would be taken for that of the next request
            self._died(RuntimeDiedError(f"{self.runtime.label} was interrupted"))
            raise
        if answer[0] == "ok":
            return answer[1]
        kind = getattr(runtime.errors, answer[1], SessionError)
        raise kind(answer[2] if answer[1] else f"{self.runtime.label}: {answer[2]}")

    def _died(self, error: RuntimeDiedError) -> RuntimeDiedError:
        self.close()
        self.ended = error
        return error

    def said(self) -> str:
        """What it wrote to standard output and standard error so far."""
        if self._errors.closed:
            return self._said
        file = self._errors.fileno()  # the child writes at the place where it is: that must not move
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def warnings(self) -> list[str]:
        """ONNX Runtime's own warnings, each once, without time stamps."""
        found = [m.group(1).strip() for line in self.said().splitlines() if (m := WARNING.match(line.strip()))]
        return list(dict.fromkeys(re.sub(r"\x1b\[[0-9;]*m", "", line)[:400] for line in found))[:MOST_WARNINGS]

    def close(self) -> None:
        """End it."""
        with suppress(OSError):
            self._connection.close()
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if not self._errors.closed:
            self._said = self.said()
            self._errors.close()


class RemoteSession:
    """A folder under another ONNX Runtime; see :class:`runtime.session.Session`.

    Args:
        folder: the exported folder; the caller has read it (:func:`runtime.loading.read_folder`).
        manifest: its manifest.
        settings: how it is opened.
        other: the environment.
        limit_s: see :class:`Child`.

    Raises:
        RuntimeDiedError, SessionError, ProviderUnavailableError: as :class:`runtime.ort_session.OrtSession`; with the
            warnings that were printed before.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, settings: SessionSettings, other: Runtime, limit_s: float = LIMIT_S
    ) -> None:
        self.folder, self.manifest, self.child = folder, manifest, Child(other, limit_s)
        self._slim = manifest.without_lists
        try:
            opened = self.child.ask("open", str(folder.absolute()), self._slim, settings)
        except BaseException as error:
            self.child.close()
            if isinstance(error, SessionError):
                error.warnings = self.child.warnings()
            raise
        self._info, self.load_s, self.choose_on_device = opened

    @property
    def info(self) -> SessionInfo:
        """What runs; what was known last where the child has died."""
        with suppress(RuntimeDiedError):
            self._info = self.child.ask("info")
        assert isinstance(self._info, SessionInfo)
        more = {"environment": self.child.runtime.label}
        return replace(self._info, details={**self._info.details, **more})

    def prefill(self, ids: Ids, reserve: int = 1) -> Logits:
        """See :meth:`runtime.session.Session.prefill`."""
        return self._ask("prefill", [list(row) for row in ids], reserve)  # type: ignore[no-any-return]

    def step(self, ids: Sequence[int]) -> Logits:
        """See :meth:`runtime.session.Session.step`."""
        return self._ask("step", list(ids))  # type: ignore[no-any-return]

    def prefill_token(self, *arguments: Any) -> Any:
        """See :meth:`runtime.ort_session.OrtSession.prefill_token`."""
        return self._ask("prefill_token", *arguments)

    def step_token(self, *arguments: Any) -> Any:
        """See :meth:`runtime.ort_session.OrtSession.step_token`."""
        return self._ask("step_token", *arguments)

    def keep(self, rows: Sequence[int]) -> None:
        """See :meth:`runtime.ort_session.OrtSession.keep`."""
        self._ask("keep", list(rows))

    def score(self, ids: Sequence[int]) -> Logits:
        """See :meth:`runtime.session.Session.score`."""
        return self._ask("score", list(ids))  # type: ignore[no-any-return]

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self.child.ask("session", method, *arguments)

    def end_profile(self) -> Path:
        """See :meth:`runtime.ort_session.OrtSession.end_profile`."""
        return self._ask("end_profile")  # type: ignore[no-any-return]

    def probe(self) -> RemoteProbe:
        """A :class:`runtime.probe.GraphProbe` over the scoring graph, in the child."""
        return RemoteProbe(self.child, self._slim)

    def close(self) -> None:
        """End the child."""
        self.child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RemoteProbe:
    """A :class:`runtime.probe.GraphProbe` in a child.

    Args:
        child: where.
        manifest: of the folder.
        graph: a graph of its own, whose child ends with the probe; None for the scoring graph of the session that the
            child has open.
        settings: of such a graph.
    """

    def __init__(
        self, child: Child, manifest: Manifest, graph: Path | None = None, settings: SessionSettings | None = None
    ) -> None:
        self._child, self._own = child, graph is not None
        s = settings or SessionSettings()
        try:
            child.ask("open_probe", str(graph or ""), manifest, s.threads, s.provider, s.provider_options)
        except BaseException:
            self.close()
            raise
        kv = manifest.kv
        self.present_names = [f"present.{i}.{kind}" for i in range(kv.layers) for kind in ("key", "value")]

    def run(
        self,
        ids: Sequence[int],
        past: Sequence[tuple[NDArray[Any], NDArray[Any]]] | None = None,
        outputs: Sequence[str] = ("logits",),
    ) -> dict[str, NDArray[Any]]:
        """See :meth:`runtime.probe.GraphProbe.run`."""
        return self._child.ask("probe", "run", list(ids), past, list(outputs))  # type: ignore[no-any-return]

    def after_past(
        self,
        ids: Sequence[int],
        first: Sequence[tuple[NDArray[Any], NDArray[Any]]],
        length: int,
        loud: tuple[int, float] | None = None,
    ) -> NDArray[Any]:
        """See :meth:`runtime.probe.GraphProbe.after_past`."""
        return self._child.ask("probe", "after_past", list(ids), list(first), length, loud)  # type: ignore[no-any-return]

    def presents(self, found: Mapping[str, NDArray[Any]]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """See :meth:`runtime.probe.GraphProbe.presents`."""
        names = self.present_names
        return [(found[k], found[v]) for k, v in zip(names[::2], names[1::2], strict=True)]

    def close(self) -> None:
        """End a child of its own."""
        if self._own:
            self._child.close()
