"""The session protocol: refusals before anything runs, padding, the cache in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from runtime.errors import ContextOverflowError, ProviderUnavailableError, SessionError, UnknownProviderError
from runtime.host_decode import spans
from runtime.loading import load
from runtime.session import Session
from runtime.torch_session import TorchSession

SPECS = {"shared": None, "static": {"target": "tensorrt"}, "growing": {"target": "plain"}}
"""How each kind of KV cache is exported."""


@pytest.fixture(params=[*SPECS, "pytorch"])
def either(
    request: pytest.FixtureRequest, exports: Callable[..., Path], checkpoints: Callable[..., Path]
) -> Iterator[Session]:
    """PyTorch, and ONNX Runtime over every kind of KV cache."""
    if request.param == "pytorch":
        opened: Any = TorchSession(checkpoints())
    else:
        opened = load(exports(spec=SPECS[request.param]), threads=1)
    with opened as chosen:
        yield chosen


def test_both_keep_the_protocol(either: Session) -> None:
    assert isinstance(either, Session)
    assert either.info.context_length == 160
    assert either.info.vocab_size == 331
    assert either.prefill([[1, 2, 3]]).shape == (1, 331)


def test_more_than_the_context_holds_is_refused_before_anything_runs(either: Session) -> None:
    either.prefill([[5, 6, 7]], reserve=2)
    before = either.step([8]).copy()
    with pytest.raises(ContextOverflowError, match="exceed the context of 160"):
        either.prefill([[1] * 150], reserve=11)
    with pytest.raises(ContextOverflowError, match="exceed the context of 160"):
        either.score([1] * 161)
    after = either.step([9]).copy()  # the open batch was not touched
    either.prefill([[5, 6, 7]], reserve=2)
    np.testing.assert_array_equal(either.step([8]), before)
    np.testing.assert_array_equal(either.step([9]), after)
    assert either.prefill([[1] * 150], reserve=10).shape == (1, 331)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [([], "no prompt"), ([[1], []], "prompt 1 is empty"), ([[331]], "331 is outside"), ([[-1]], "-1 is outside")],
)
def test_bad_prompts(prompts: list[list[int]], words: str, either: Session) -> None:
    with pytest.raises(SessionError, match=words):
        either.prefill(prompts)


def test_steps_need_a_batch_of_the_same_width_and_room(either: Session) -> None:
    with pytest.raises(SessionError, match="call prefill first"):
        either.step([1])
    either.prefill([[1, 2]], reserve=1)
    with pytest.raises(SessionError, match="2 ids for a batch of 1"):
        either.step([1, 2])
    either.step([3])
    with pytest.raises(ContextOverflowError, match="larger reserve"):
        either.step([4])


def test_closed_twice_and_used_after(either: Session) -> None:
    either.close()
    either.close()
    with pytest.raises(SessionError, match="closed"):
        either.prefill([[1]])
    with pytest.raises(SessionError, match="closed"):
        either.score([1])


@pytest.mark.parametrize("lengths", [(70, 3, 33, 1), (70, 16, 33, 25)], ids=["one batch", "row by row"])
def test_uneven_rows_give_what_each_gives_alone(lengths: tuple[int, ...], either: Session) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 331, n).tolist() for n in lengths]
    steps = rng.integers(0, 331, (20, 4))
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        together = [either.prefill([rows[i] for i in order], reserve=20).copy()]
        together += [either.step(step[order].tolist()).copy() for step in steps]
        for place, i in enumerate(order):
            alone = [either.prefill([rows[i]], reserve=20)[0].copy()]
            alone += [either.step([int(step[i])])[0].copy() for step in steps]
            for a, b in zip(together, alone, strict=True):
                np.testing.assert_allclose(a[place], b, rtol=0, atol=2e-5)


def test_long_rows_are_prefilled_alone_to_the_last_bit(session: Any) -> None:
    rng = np.random.default_rng(4)
    rows = [rng.integers(0, 331, n).tolist() for n in (20, 61, 16)]
    together = session.prefill(rows).copy()
    for row, logits in zip(rows, together, strict=True):
        np.testing.assert_array_equal(session.prefill([row])[0], logits)


def test_chunks_are_as_long_as_each_other_and_none_is_too_long() -> None:
    assert spans(100, 0) == [(0, 100)] == spans(100, 100)
    assert spans(1025, 512) == [(0, 341), (341, 683), (683, 1025)]
    for length in range(1, 70):
        cuts = spans(length, 7)
        assert [a for a, _ in cuts] == [0, *(b for _, b in cuts)][:-1]
        assert (cuts[-1][1], len(cuts)) == (length, -(-length // 7))
        assert all(1 <= b - a <= 7 for a, b in cuts)


@pytest.mark.parametrize(
    "changes",
    [{}, {"model_type": "mistral", "sliding_window": 24}, {"model_type": "qwen3", "head_dim": 32}],
    ids=["llama", "mistral", "qwen3"],
)
@pytest.mark.parametrize("target", ["ort", "tensorrt"])
def test_a_prompt_in_chunks_is_the_prompt(target: str, changes: dict[str, Any], exports: Callable[..., Path]) -> None:
    """Long and short rows, beyond a window, and the steps after them; the shortest chunk is one token."""
    folder = exports(spec={"target": target}, **changes)
    rng = np.random.default_rng(5)
    rows = [rng.integers(0, 331, n).tolist() for n in (90, 3, 41)]
    steps = rng.integers(0, 331, (4, 3)).tolist()

    def logits(chunk: int) -> list[Any]:
        with load(folder, threads=1, prefill_chunk=chunk) as opened:
            assert opened.info.details.get("prefill") == (f"in chunks of at most {chunk} tokens" if chunk else None)
            return [opened.prefill(rows, reserve=4).copy(), *(opened.step(ids).copy() for ids in steps)]

    whole = logits(0)
    for chunk in (1, 32, 40):
        for a, b in zip(logits(chunk), whole, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_a_graph_that_grows_its_cache_takes_a_prompt_whole(decoders: Callable[[str], tuple[Path, Path]]) -> None:
    _, folder = decoders("gpt_neo")
    with load(folder, threads=1, prefill_chunk=8) as opened:
        assert "prefill" not in opened.info.details
        opened.prefill([list(range(3, 40))])


def test_steps_equal_one_scoring_pass(session: Any) -> None:
    ids = np.random.default_rng(1).integers(0, 331, 90).tolist()
    whole = session.score(ids).copy()
    found = [session.prefill([ids[:40]], reserve=50)[0].copy()] + [session.step([t])[0].copy() for t in ids[40:]]
    np.testing.assert_allclose(np.stack(found), whole[39:], rtol=0, atol=2e-5)
    assert session._cache is not None
    session.score(ids)
    assert session._cache is None  # the batch and its buffers are gone


def test_last_position_logits_are_those_of_the_scoring_graph(session: Any) -> None:
    ids = list(range(3, 60))
    np.testing.assert_allclose(session.prefill([ids])[0], session.score(ids)[-1], rtol=0, atol=1e-6)


def test_past_and_present_are_one_buffer_that_is_reused(session: Any) -> None:
    session.prefill([[1, 2, 3]], reserve=60)
    cache = session._cache
    addresses = {n: v.data_ptr() for n, v in cache._values.items()}
    assert cache.capacity == 64
    outputs = {o.data_ptr() for o in session._host._binding.get_outputs()}
    assert len(outputs) == len(addresses) + 1  # and the logits
    assert outputs > set(addresses.values())
    for token in range(50):
        session.step([token])
    session.prefill([[4, 5]], reserve=10)
    assert session._cache is cache
    assert {n: v.data_ptr() for n, v in cache._values.items()} == addresses
    # Written in place: position 2 of the key buffer is not zero after two tokens and one step.
    session.step([7])
    key = cache._values["0.key"].numpy()
    assert np.abs(key[0, :, 2]).max() > 0


def test_a_decode_step_copies_no_cache(session: Any) -> None:
    """Capacity may be large: what a step writes is one position, the rest of the buffer stays as it was."""
    session.prefill([[9] * 30], reserve=100)
    key = session._cache._values["1.key"].numpy()
    before = key.copy()
    session.step([5])
    changed = np.flatnonzero((session._cache._values["1.key"].numpy() != before).any(axis=(0, 1, 3)))
    assert changed.tolist() == [30]


def test_unknown_and_missing_providers(exports: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownProviderError, match="choose one of cpu, cuda, tensorrt") as unknown:
        load(exports(), provider="npu")
    assert unknown.value.exit_code == 2
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderUnavailableError, match="pip install 'onnxruntime-gpu") as missing:
        load(exports(), provider="cuda")
    assert missing.value.exit_code == 4


def test_cuda_refuses_fp32_by_name(exports: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(ProviderUnavailableError, match="--precision fp16"):
        load(exports(), provider="cuda")


def test_a_silent_fallback_is_an_error() -> None:
    from runtime.providers import PROVIDERS, require_active

    class Fallen:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    with pytest.raises(ProviderUnavailableError, match="the session runs on CPUExecutionProvider"):
        require_active(Fallen(), PROVIDERS["cuda"])
    require_active(Fallen(), PROVIDERS["cpu"])


def test_doctor_believes_only_a_run() -> None:
    from runtime.doctor import examine

    found = {f.provider: f for f in examine()}
    assert found["cpu"].loads
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        assert not found["cuda"].loads
        assert "pip install" in found["cuda"].detail


@pytest.mark.gpu
def test_cuda_equals_cpu(exports: Callable[..., Path]) -> None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed: make test EXTRA=gpu on a machine with an NVIDIA GPU")
    ids = list(range(3, 60))
    with load(exports("fp16"), "cuda") as gpu, load(exports("fp16"), "cpu") as cpu:
        np.testing.assert_allclose(gpu.score(ids), cpu.score(ids), rtol=0, atol=5e-2)
