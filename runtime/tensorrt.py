"""TensorRT: shape profiles from the workload, one engine for the prompt and one for decoding, and where they are kept.

An engine is built for a range of shapes. Outside of it ONNX Runtime would build another one in the middle of a
request, minutes long, without a word: here that is an error. Option names: ONNX Runtime's TensorRT provider.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnxruntime as ort

from export.manifest import Manifest
from runtime.errors import SessionError
from runtime.providers import installed

Range = tuple[int, int, int]
"""Least, expected and greatest size of a dimension."""
PHASES = ("prefill", "decode", "score")


class ShapeOutsideProfileError(SessionError):
    """A batch for which no engine was built."""


@dataclass(frozen=True)
class Shapes:
    """The workload that engines are built for: rows, prompt tokens and new tokens.

    Raises:
        SessionError: sizes below 1 or not in order.
    """

    batch: Range = (1, 1, 1)
    prompt: Range = (1, 128, 1024)
    new_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("batch", "prompt"):
            low, usual, high = getattr(self, name)
            if not 1 <= low <= usual <= high:
                raise SessionError(f"the {name} sizes {low}, {usual}, {high} are not in order from 1 on")
        if self.new_tokens < 1:
            raise SessionError(f"an engine for {self.new_tokens} new tokens makes no sense; give 1 or more")

    @classmethod
    def of_workload(cls, batches: Sequence[int], prompts: Sequence[int], new_tokens: int, context: int) -> Shapes:
        """From the sizes that a run will use; the first of each is the one to be fastest at."""
        room = min(max(prompts), max(1, context - new_tokens))
        return cls((min(batches), batches[0], max(batches)), (1, min(prompts[0], room), room), new_tokens)

    @property
    def total(self) -> int:
        """The longest row, prompt and answer."""
        return self.prompt[2] + self.new_tokens


def profile(manifest: Manifest, shapes: Shapes, phase: str) -> tuple[dict[str, list[int]], ...]:
    """Least, expected and greatest shape of every input, for one of :data:`PHASES`."""
    kv = manifest.kv
    fixed, found = kv.cache_length, []
    for k in range(3):
        if phase == "decode":
            past, new = (shapes.prompt[0], shapes.prompt[1] + shapes.new_tokens // 2, shapes.total - 1)[k], 1
        else:
            past, new = 0, shapes.prompt[k] if phase == "prefill" else (1, shapes.prompt[1], shapes.total)[k]
        batch = 1 if phase == "score" else shapes.batch[k]
        if fixed is not None:
            past, new = fixed, min(new, fixed)
        sizes = {
            "input_ids": [batch, new],
            "attention_mask": [batch, past if fixed is not None else past + new],
            "position_ids": [batch, new],
            "write_indices": [batch],
        }
        one = {n: s for n, s in sizes.items() if n in manifest.inputs}
        for layer in range(kv.layers):
            for kind in ("key", "value"):
                one[f"past_key_values.{layer}.{kind}"] = [batch, kv.kv_heads, past, kv.head_dim]
        found.append(one)
    return tuple(found)


def engine_profiles(
    manifest: Manifest, shapes: Shapes, phases: Sequence[str] = ("prefill", "decode")
) -> dict[str, dict[str, tuple[list[int], ...]]]:
    """By phase and input, least, expected and greatest shape: for a compiler."""
    found = {}
    for phase in phases:
        sizes = profile(manifest, shapes, phase)
        found[phase] = {name: tuple(size[name] for size in sizes) for name in sizes[0]}
    return found


def profile_options(manifest: Manifest, shapes: Shapes, phase: str, prefix: str = "trt") -> dict[str, str]:
    """The provider's ``..._profile_min/opt/max_shapes``; ``prefix`` is ``trt``, or ``nv`` for TensorRT-RTX."""
    least, usual, most = profile(manifest, shapes, phase)
    texts = {"min": least, "opt": usual, "max": most}
    return {
        f"{prefix}_profile_{name}_shapes": ",".join(f"{n}:{'x'.join(map(str, s))}" for n, s in one.items())
        for name, one in texts.items()
    }


def require_inside(manifest: Manifest, shapes: Shapes, phase: str, batch: int, new: int, past: int) -> None:
    """Refuse what the engine was not built for.

    Raises:
        ShapeOutsideProfileError: names the size, its range and the option that widens it.
    """
    least, _, most = profile(manifest, shapes, phase)
    past = manifest.kv.cache_length or past
    asked = {"input_ids": [batch, new], "past_key_values.0.key": [batch, manifest.kv.kv_heads, past]}
    for name, words in (("input_ids", ("rows", "new tokens")), ("past_key_values.0.key", ("rows", "heads", "past"))):
        for low, value, high, what in zip(least[name], asked[name], most[name], words, strict=False):
            if not low <= value <= high:
                raise ShapeOutsideProfileError(
                    f"{value} {what} in {phase} lie outside the TensorRT engine's {low} to {high}; open the session "
                    f"with shapes=Shapes(...) that cover it (an engine is built for them once)"
                )


def cache_key(
    manifest: Manifest, shapes: Shapes, phase: str, gpu: str, tensorrt: str, options: Mapping[str, str] | None = None
) -> str:
    """What an engine depends on, as a name: model, ONNX Runtime, TensorRT, GPU, profile and the provider's options."""
    facts = {
        "weights": manifest.weights_sha256,
        "spec": manifest.spec_digest,
        "graph": {n: e.sha256 for n, e in sorted(manifest.files.items()) if n.endswith(".onnx")},
        "onnxruntime": ort.__version__,
        "tensorrt": tensorrt,
        "gpu": gpu,
        "phase": phase,
        "shapes": asdict(shapes),
        "options": options or {},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def engine_options(
    provider: str,
    manifest: Manifest,
    shapes: Shapes,
    phase: str,
    home: Path | None,
    given: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], bool]:
    """Provider options for one phase, and whether its engine is in the cache already.

    Args:
        provider: ``tensorrt`` or ``tensorrt-rtx``.
        manifest: of the folder.
        shapes: the workload.
        phase: one of :data:`PHASES`.
        home: the tool's cache folder; None keeps no engine.
        given: the provider's other options, which go before these.
    """
    rtx = provider == "tensorrt-rtx"
    options = profile_options(manifest, shapes, phase, "nv" if rtx else "trt")
    if home is None:
        return options, False
    found = installed("onnxruntime-ep-nv-tensorrt-rtx(-cu|$)" if rtx else "tensorrt(-cu|$)")
    version = next((d.version for d in found.values()), "none")
    given = given or {}
    place = "nv_runtime_cache_path" if rtx else "trt_engine_cache_path"
    key = cache_key(manifest, shapes, phase, gpu_name(), version, given)
    folder = Path(given.get(place) or home / "engines" / key)
    built = folder.is_dir() and any(folder.iterdir())
    folder.mkdir(parents=True, exist_ok=True)
    options[place] = str(folder)
    if rtx:
        return options, built
    options |= {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_prefix": phase,
        "trt_timing_cache_enable": "1",
        # Timings of kernels serve every model on this GPU with this TensorRT.
        "trt_timing_cache_path": str(home / "engines"),
    }
    return options, built


def gpu_name() -> str:
    """Of the first GPU; ``unknown`` where nothing tells."""
    from runtime.doctor import gpus

    devices = gpus().devices
    return str(devices[0]["name"]) if devices else "unknown"
