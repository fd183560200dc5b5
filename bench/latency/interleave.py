"""Interleaved rounds of several sides, their load times, and the peak memory of a fresh process.

Sides are interleaved round by round in alternating order (A B C, C B A, ...), so that drift of the machine meets all
alike. Warm-up rounds are run apart and not recorded.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from bench.deployment import Deployment
from bench.latency.measure_case import undisturbed, warm_up
from bench.latency.workload import latency_prompts
from bench.process.child import json_of
from reports.record import Case, Load, Memory, Round, Series
from runtime.generate import Generation, generate
from runtime.session import Session

Tick = Callable[[str], None]


def timed_generation(session: Session, prompts: list[list[int]], new_tokens: int) -> Generation:
    """One timed generation without garbage collection in it; end tokens are ignored, the length is fixed."""
    own = getattr(session, "own_generate", None) or partial(generate, session)  # a peer that brings its own loop
    made: Generation = undisturbed(lambda: own(prompts, new_tokens))
    return made


def interleave(
    sides: dict[str, Session],
    stream: Sequence[int],
    case: Case,
    rounds: int,
    warmup_cap: int,
    tick: Tick = lambda _: None,
    probe: Callable[[], None] | None = None,
) -> list[Series]:
    """Measure one case on every side.

    Args:
        sides: label -> session.
        stream: token ids of real text (see :func:`bench.latency.workload.latency_prompts`).
        case: the workload.
        rounds: recorded generations for each side.
        warmup_cap: most warm-up rounds for each side.
        tick: told after each generation what was run.
        probe: called once a round, before its first side (the bandwidth is measured there).

    Returns:
        One series a side; rounds of equal index ran back to back on equal prompts.
    """
    warmed = {}
    for label, session in sides.items():

        def generation(n: int, session: Session = session) -> Generation:
            return timed_generation(session, latency_prompts(stream, case, -n - 1), case.new_tokens)

        warmed[label], _ = warm_up(generation, warmup_cap)
        tick(f"{label}: warm-up")
    collected: dict[str, list[Round]] = {label: [] for label in sides}
    order = 0
    for index in range(rounds):
        prompts = latency_prompts(stream, case, index)
        labels = list(sides) if index % 2 == 0 else list(reversed(sides))
        if probe:
            probe()
        for label in labels:
            result = timed_generation(sides[label], prompts, case.new_tokens)
            collected[label].append(Round(order=order, at_s=list(result.at_s)))
            order += 1
            tick(f"{label}: {case.label}, round {index + 1}")
    return [Series(case=case, side=label, warmup_rounds=warmed[label], rounds=collected[label]) for label in sides]


def load_times(openers: dict[str, Callable[[], Session]], samples: int, tick: Tick = lambda _: None) -> list[Load]:
    """Seconds from nothing to the first token of a one-token prompt, files in the disk cache, sides interleaved.

    The token belongs to it: a loader that only maps the weights into memory pays when they are first read.
    """
    times: dict[str, list[float]] = {label: [] for label in openers}
    for index in range(samples):
        labels = list(openers) if index % 2 == 0 else list(reversed(openers))
        for label in labels:
            started = time.perf_counter()
            session = openers[label]()
            session.prefill([[1]], reserve=0)
            times[label].append(time.perf_counter() - started)
            session.close()
            del session
            gc.collect()
            tick(f"{label}: load")
    return [Load(side=label, samples_s=values) for label, values in times.items()]


def peak_memory(label: str, case: Case, kind: str, path: Path, precision: str, where: Deployment) -> Memory:
    """Peak resident memory of a fresh process that loads a side and generates once.

    Args:
        label: of the side.
        case: what is generated.
        kind, path, precision, where: what is loaded and how, see :mod:`bench.latency.peak_memory`.

    Raises:
        BenchError: the process failed; its last line is quoted.
    """
    asked = {"kind": kind, "path": str(path), "precision": precision, "deployment": asdict(where), **case.model_dump()}
    command = [sys.executable, "-m", "bench.latency.peak_memory", json.dumps(asked)]
    found = json_of(command, f"measuring the memory of {label} failed: ", timeout=600)
    return Memory(side=label, case=case, **found)
