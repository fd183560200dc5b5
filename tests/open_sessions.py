"""Counts ONNX Runtime's open sessions, for tests of what is in memory at once."""

from __future__ import annotations

import weakref
from typing import Any

import onnxruntime as ort
import pytest


class Alive:
    """How many of ONNX Runtime's sessions are open; ``most`` is the largest number seen at an opening."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = self.opened = 0
        live: weakref.WeakSet[Any] = weakref.WeakSet()
        real = ort.InferenceSession

        def opening(*args: Any, **more: Any) -> Any:
            made = real(*args, **more)
            live.add(made)
            self.opened += 1
            self.most = max(self.most, len(live))
            return made

        monkeypatch.setattr(ort, "InferenceSession", opening)
