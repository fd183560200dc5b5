"""Child processes of a measurement: run one to its end, or let two take their rounds in turn; every end is an outcome.

A neighbour on a shared machine slows memory down for seconds at a time. Two processes measured one after the other meet
different seconds, so the ratio of two equal builds scatters by 6 %; where both are alive and measure round by round in
turn, the one that waits being stopped (SIGSTOP: not even its spinning threads cost anything), it scatters by 2 %.

Try: ``python -m pytest tests/bench/process/test_child.py``, or two of :mod:`bench.latency.measure_case` through
:func:`run_in_turn`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import BenchError, last_line
from reports.comparison import CaseOutcome, SideName

LAST_LINES = 12
MEMORY_WORDS = ("bad_alloc", "out of memory", "memoryerror", "failed to allocate memory", "cannot allocate memory")
TIED = Path(__file__).resolve().with_name("tied.py")
"""Before a command: it dies with its parent, even where it stands stopped."""
TURN = "@turn"
"""Marks a child's lines that mean "my turn is over"; whatever else it prints is not for us."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: its JSON when all is well, else what went wrong with its last lines of output."""

    outcome: CaseOutcome
    reason: str
    exit_code: int | None
    last_lines: list[str]
    found: dict[str, Any]
    refusal: str = ""
    """An error of ours, meant for the user: wrong input, a provider that is not there."""
    seconds: float = 0.0
    """Time for which it ran, the time in which it stood stopped left out."""


class Child:
    """One process in a session of its own, read line by line, with ``limit_s`` seconds of running time (may be inf)."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], limit_s: float, talks: bool = False) -> None:
        self.limit_s, self._used, self._awake = limit_s, 0.0, time.perf_counter()
        self._timed_out = False
        self._lines: list[str] = []
        self._said: queue.Queue[str | None] = queue.Queue()
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            list(command),
            env=dict(env),
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.put(line)
        self._said.put(None)

    @property
    def seconds(self) -> float:
        """Time for which it was running; to be asked while it is awake."""
        return self._used + time.perf_counter() - self._awake

    def hear(self, mark: str | None) -> str | None:
        """The next line that begins with ``mark``; None when the child ended or had to be killed before that."""
        while True:
            try:
                line = self._said.get(timeout=min(max(0.0, self.limit_s - self.seconds), threading.TIMEOUT_MAX))
            except queue.Empty:
                self._timed_out = True
                self.kill()
                return None
            if line is None:
                self._said.put(None)  # for whoever asks again
                return None
            if mark and line.startswith(mark):
                return line
            self._lines.append(line)

    def say(self, text: str) -> None:
        """A line on the child's standard input; one that is gone already is found out by :meth:`hear`."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(text + "\n")
            self.process.stdin.flush()

    def pause(self) -> None:
        """Stop it with all its threads."""
        self._signal(signal.SIGSTOP)
        with contextlib.suppress(ChildProcessError):  # until it really stands; its exit is left for Popen
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        self._used = self.seconds

    def wake(self) -> None:
        """Let it go on."""
        self._awake = time.perf_counter()
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it with all its own children."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def ended(self) -> Ended:
        """Wait for its end and say how that was."""
        self.hear(None)
        code = self.process.wait()
        seconds = self.seconds
        self._reader.join(timeout=5)  # a grandchild may hold the pipe open
        while not self._said.empty():
            self._lines += [line for line in [self._said.get()] if line is not None]
        self._errors.seek(0)
        said = self._errors.read()
        self.close()
        lines = [line[:500] for line in f"{''.join(self._lines)}\n{said}".splitlines() if line.strip()][-LAST_LINES:]
        if self._timed_out:
            return Ended("timeout", f"no end after {self.limit_s:g} s", None, lines, {}, seconds=seconds)
        return _outcome(code, self._lines, said, lines, seconds)

    def close(self) -> None:
        """Kill it if it lives, and close the pipes."""
        if self.process.poll() is None:
            self.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was still to be flushed to a dead child
                    stream.close()


def _outcome(code: int, out: list[str], err: str, lines: list[str], seconds: float) -> Ended:
    if code == 0:
        try:
            return Ended("ok", "", 0, [], json.loads(out[-1]), seconds=seconds)
        except (ValueError, IndexError):
            return Ended("crash", "ended well without a result", 0, lines, {}, seconds=seconds)
    said = err.lower()
    if code in (-signal.SIGKILL, 137) or any(w in said for w in MEMORY_WORDS):
        return Ended("oom", "out of memory", code, lines, {}, seconds=seconds)
    if code in (2, 4) and lines and lines[-1].startswith("error: "):
        message = lines[-1].removeprefix("error: ")
        return Ended("crash", message, code, lines, {}, refusal=message, seconds=seconds)
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return Ended("crash", how, code, lines, {}, seconds=seconds)


def output_of(command: Sequence[str], failed: str = "", timeout: float | None = None) -> str:
    """Standard output of a command that is waited for.

    Raises:
        BenchError: its exit code is not 0; ``failed`` and the last line of its standard error.
    """
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout)
    if done.returncode:
        raise BenchError(failed + last_line(done.stderr))
    return done.stdout


def json_of(command: Sequence[str], failed: str = "", timeout: float | None = None) -> Any:
    """The JSON in the last line of what :func:`output_of` gives."""
    return json.loads(output_of(command, failed, timeout).strip().splitlines()[-1])


def run_child(command: list[str], env: dict[str, str], limit_s: float) -> Ended:
    """Run one child to its end, or kill it with all its own children at the limit."""
    with contextlib.closing(Child(command, env, limit_s)) as child:
        return child.ended()


def run_in_turn(
    commands: Mapping[SideName, tuple[list[str], dict[str, str]]], rounds: int, limit_s: float
) -> dict[SideName, Ended]:
    """Two children that measure round by round in turn; in order A B, B A, A B ... , A being the first of ``commands``.

    Each loads and warms up alone, the first one first, then waits stopped. ``limit_s`` counts the seconds in which a
    child runs. One that fails leaves the other to finish alone.
    """
    children: dict[SideName, Child] = {}
    try:
        for name, (command, env) in commands.items():
            children[name] = Child(command, env, limit_s, talks=True)
            children[name].hear(TURN)
            children[name].pause()
        order = list(children.values())
        for k in range(rounds):
            for child in order if k % 2 == 0 else reversed(order):
                child.wake()
                child.say(f"round {k}")
                child.hear(TURN)
                child.pause()
        made: dict[SideName, Ended] = {}
        for name, child in children.items():
            child.wake()
            child.say("end")
            made[name] = child.ended()
        return made
    finally:
        for child in children.values():
            child.close()
