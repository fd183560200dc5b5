"""A peer that generates in a loop of its own and shows no logits: only ``own_generate`` works."""

from __future__ import annotations

from typing import Any, NoReturn

from runtime.errors import SessionError
from runtime.session import SessionInfo


class OwnLoop:
    """The part of the session protocol that such a peer does not offer."""

    info: SessionInfo

    def prefill(self, *_: Any, **__: Any) -> NoReturn:
        """Not offered."""
        raise SessionError("this peer shows no logits: it is measured by its own generator")

    step = score = prefill
