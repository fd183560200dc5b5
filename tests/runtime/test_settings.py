"""How a folder is opened: one list of settings, by name, refused where it makes no sense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from runtime import ort_session
from runtime.errors import SessionError
from runtime.loading import load
from runtime.settings import MoreSettings, SessionSettings
from runtime.tensorrt import Shapes

GIVEN: dict[str, Any] = {
    "huge_pages": False,
    "provider_options": {"a": "1"},
    "allow_fallback": True,
    "cuda_graph": False,
    "choose_on_device": True,
    "shapes": Shapes(),
    "engine_home": Path("engines"),
    "session_options": {"session.intra_op.allow_spinning": "0"},
    "profile": Path("profile"),
    "log_severity": 2,
    "prefill_chunk": 7,
    "any_runtime": True,
}


def test_the_keywords_are_the_fields() -> None:
    types = {f.name: f.type for f in fields(SessionSettings) if f.name not in ("provider", "threads")}
    named = {name: getattr(hint, "__forward_arg__", hint) for name, hint in MoreSettings.__annotations__.items()}
    assert named == types


def test_load_hands_every_setting_over(exports: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(ort_session, "OrtSession", lambda *given: seen.append(given))
    load(exports(), "tensorrt", 3, verify=False, **GIVEN)
    load(exports(), provider="cuda", threads=2)
    assert seen[0][2] == SessionSettings("tensorrt", 3, **GIVEN)
    assert {*GIVEN, "one_graph"} == set(MoreSettings.__annotations__)
    assert all(getattr(seen[0][2], name) == value for name, value in GIVEN.items())
    assert seen[1][2] == SessionSettings("cuda", 2)
    load(exports(), verify=False, one_graph=True)  # alone: it goes with no profile
    assert seen[2][2].one_graph
    with pytest.raises(SessionError, match="one_graph"):
        SessionSettings(**GIVEN, one_graph=True)
    with pytest.raises(FrozenInstanceError):
        seen[0][2].threads = 1


def test_a_negative_chunk_is_refused() -> None:
    with pytest.raises(SessionError, match="-1 tokens makes no sense; give 0 for the whole prompt"):
        SessionSettings(prefill_chunk=-1)


def test_session_entries_reach_onnx_runtime(exports: Callable[..., Path]) -> None:
    with load(exports(), threads=1, session_options={"session.intra_op.allow_spinning": "0"}) as session:
        options = session._decode.session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert options.intra_op_num_threads == 1
        assert session.info.details["option session.intra_op.allow_spinning"] == "0"


@pytest.mark.parametrize("threads", [0, -2, 100_000])
def test_threads_that_make_no_sense(exports: Callable[..., Path], threads: int) -> None:
    with pytest.raises(SessionError, match=f"{threads} threads make no sense") as refused:
        load(exports(), threads=threads)
    assert refused.value.exit_code == 2
    with pytest.raises(TypeError, match="thread_count"):
        load(exports(), thread_count=1)  # type: ignore[call-arg]
