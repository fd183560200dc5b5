"""One call at a time, and none that leaves half a batch behind.

A session is state (KV buffers, ids, mask) that two threads must not write at once, and a step that Ctrl-C cuts short
has written some of it. :class:`Guarded` holds both rules for every kind of session, at about 1 µs a call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Self, TypeVar

from runtime.errors import SessionBusyError, SessionError

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Guarded")
_IN = "in"
CLOSED = "the session is closed; open a new one"


class Guarded:
    """Base of sessions whose methods are :func:`guarded`."""

    def __init__(self) -> None:
        self._turn: dict[str, object] = {}  # who is inside a call
        self._half = False  # a call has begun and not ended
        self._closed = False

    def _drop(self) -> None:
        """Give up the batch and free what it holds; may be called again and again."""
        raise NotImplementedError

    def _free(self) -> None:
        """Free the model; may be called again and again."""
        raise NotImplementedError

    def close(self) -> None:
        """Free everything; closing twice is allowed.

        A call that another thread is in the middle of ends as if nothing had happened, and frees the session then.
        """
        self._closed = True
        self._free_between_calls()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _free_between_calls(self) -> None:
        mine = object()
        try:
            if self._turn.setdefault(_IN, mine) is mine:
                self._drop()
                self._free()
        finally:
            if _IN in self._turn and self._turn[_IN] is mine:
                del self._turn[_IN]


def guarded(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that runs alone, on an open session, and to its end or not at all.

    What is interrupted (Ctrl-C, out of memory) leaves no batch behind. A :class:`SessionError` is a refusal: the
    method raises it before it has changed anything.

    Raises:
        SessionBusyError: another call is under way; that one is not disturbed.
        SessionError: the session is closed.
    """

    def to_its_end(self: S, /, *args: P.args, **options: P.kwargs) -> R:
        if self._closed:
            raise SessionError(CLOSED)
        if self._half:  # a second Ctrl-C came while the first one was being cleared up
            self._drop()
        self._half = True
        try:
            result = method(self, *args, **options)
        except SessionError:
            self._half = False
            raise
        except BaseException:
            self._drop()
            self._half = False
            raise
        self._half = False
        return result

    @wraps(method)
    def run(self: S, /, *args: P.args, **options: P.kwargs) -> R:
        mine = object()
        try:
            if self._turn.setdefault(_IN, mine) is not mine:  # one atomic operation, never a wait
                raise SessionBusyError(
                    f"{method.__name__}() while another call of this session is under way; "
                    "one session per thread: open another with runtime.load"
                )
            return to_its_end(self, *args, **options)
        finally:
            # No function is called before the turn is over: Python lets no signal handler in between.
            if _IN in self._turn and self._turn[_IN] is mine:
                del self._turn[_IN]
            if self._closed:
                self._free_between_calls()

    return run
