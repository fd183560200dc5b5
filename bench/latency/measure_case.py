"""Child process of ``llama-onnx compare``: one case of one side, measured once; JSON on the last line of its output.

It needs numpy and an onnxruntime besides the packages ``runtime`` and ``export`` of the suite's revision under test
(onnx too, where the parent hands over no manifest), so that it runs in another virtual environment. A process of its
own, because what differs from process to process (where the weights lie, which pages are huge, what the allocator did)
is most of the noise that a verdict has to see, and because a crash must not end the run.

Try: ``python -P bench/latency/measure_case.py '{"folder": "OUT", "batch": 1, "prompt": 32, "new_tokens": 8, "rounds":
3}'``.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

STEADY = 0.05
TURN = "@turn"
SESSION_PREFIXES = ("session.", "ep.", "mlas.")
"""Of ONNX Runtime's session configuration entries; other options are the execution provider's."""
# By their paths: `bench` may be another revision's, or not there.
_PROCESS = Path(__file__).resolve().parents[1] / "process"
peak_bytes = runpy.run_path(str(_PROCESS / "peak.py"))["peak_bytes"]
load_suite = runpy.run_path(str(_PROCESS / "suite.py"))["load"]
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy", "onnx", "llama-onnx-bench")
OWN_SETTINGS: dict[str, Any] = {
    "huge_pages": lambda value: str(value).lower() in ("1", "true", "yes"),
    "prefill_chunk": int,
}
"""Settings of :func:`runtime.load` that change speed alone, not ONNX Runtime's."""


def _prompts(vocabulary: int, batch: int, prompt: int, seed: int) -> list[list[int]]:
    """Random ids, equal for both sides of a pair: the time of a dense model does not depend on them."""
    rows: list[list[int]] = np.random.default_rng(seed).integers(0, vocabulary, (batch, prompt)).tolist()
    return rows


def _open(a: dict[str, Any]) -> Any:
    from runtime.loading import load

    more: dict[str, Any] = {}  # only what is given: an older revision of the suite does not know the others
    for key, value in (a.get("options") or {}).items():
        if key in OWN_SETTINGS:
            more[key] = OWN_SETTINGS[key](value)
        else:
            kind = "session_options" if key.startswith(SESSION_PREFIXES) else "provider_options"
            more.setdefault(kind, {})[key] = str(value)
    if a.get("manifest"):
        from export.manifest import manifest_of

        more |= {"manifest": manifest_of(a["manifest"]), "any_runtime": bool(a.get("any_runtime"))}
    if str(a.get("provider")).startswith("tensorrt"):  # engines for this case, built once for all its processes
        from export.cache import cache_dir
        from runtime.tensorrt import Shapes

        batch, prompt = int(a["batch"]), int(a["prompt"])
        shapes = Shapes((batch, batch, batch), (1, prompt, prompt), int(a["new_tokens"]))
        more |= {"shapes": shapes, "engine_home": cache_dir()}
    return load(a["folder"], a.get("provider") or "cpu", a.get("threads"), verify=False, **more)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _turns(a: dict[str, Any]) -> Iterator[int]:
    """The numbers of the rounds; with ``in_turn`` each when the parent says so, and a line when it is over."""
    if not a.get("in_turn"):
        yield from range(a["rounds"])
        return
    print(TURN, flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            return
        yield int(line.split()[1])
        print(TURN, flush=True)
    raise EOFError("the measuring process is gone")


def undisturbed(work: Callable[[], Any]) -> Any:
    """``work()`` without garbage collection in it."""
    gc.collect()
    gc.disable()
    try:
        return work()
    finally:
        gc.enable()


def warm_up(generate: Callable[[int], Any], cap: int) -> tuple[int, bool]:
    """Untimed rounds until two in a row agree within 5 %, at most ``cap``: how many, and whether two agreed."""
    totals: list[float] = []
    steady = False
    while len(totals) < cap and not steady:
        totals.append(generate(len(totals)).total_s)
        steady = len(totals) > 1 and abs(totals[-1] - totals[-2]) <= STEADY * totals[-2]
    return len(totals), steady


def measure(a: dict[str, Any]) -> dict[str, Any]:
    """Load, warm until two rounds agree within 5 % (at most ``warmup_cap``), then measure ``rounds`` generations.

    ``a``: folder, batch, prompt, new_tokens, rounds; optional suite (where ``runtime`` lies, if not on the path),
    manifest, provider, threads, options, warmup_cap, seed, in_turn (rounds when the parent asks for them).
    Returns metrics (seconds and bytes), warmup_rounds, steady, details, versions and facts of the model.
    """
    if a.get("suite"):
        load_suite(Path(a["suite"]))
    started = time.perf_counter()
    session = _open(a)
    load_s = time.perf_counter() - started
    from runtime.generate import generate

    manifest = session.manifest
    seed, cap = int(a.get("seed", 0)), int(a.get("warmup_cap", 6))

    def one(index: int) -> Any:
        prompts = _prompts(manifest.vocab_size, a["batch"], a["prompt"], seed + index)
        return undisturbed(lambda: generate(session, prompts, a["new_tokens"]))

    warmup_rounds, steady = warm_up(lambda n: one(1000 + n), cap)
    rounds = [one(k) for k in _turns(a)]
    metrics = {
        "ttft": [r.ttft_s for r in rounds],
        "tpot": [r.tpot_s for r in rounds if r.tpot_s is not None],
        "total": [r.total_s for r in rounds],
        "load": [load_s],
        "peak_memory": [float(peak_bytes())],
    }
    return {
        "metrics": {name: values for name, values in metrics.items() if values},
        "warmup_rounds": warmup_rounds,
        "steady": steady,
        "details": session.info.details,
        "versions": _versions(),
        "model": {
            "model": manifest.model_name,
            "precision": manifest.precision,
            "weights_sha256": manifest.weights_sha256,
            "spec_digest": manifest.spec_digest,
        },
    }


def main() -> int:
    """Measure what the first argument asks for; an error of ours is one line and its exit code."""
    try:
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    except Exception as error:
        code = getattr(type(error), "exit_code", None)
        if not isinstance(code, int):
            raise
        print(f"error: {error}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
