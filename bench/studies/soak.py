"""Soak: thousands of generations of random lengths and batch sizes in one process, and what must not happen in it.

Memory may not grow after the first hundred, outputs must be those of fresh sessions, sessions of two threads must not
disturb each other, an interrupt must leave a session usable. Try: ``python -m bench.studies.soak FOLDER --generations
2000``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from runtime.generate import generate
from runtime.session import Session

WARM = 100
GROWTH_LIMIT = 0.02
Opener = Callable[[], Session]


@dataclass(frozen=True)
class Job:
    """One generation: prompts and how many tokens, with the token that ends a row (chosen so that some rows end)."""

    prompts: list[list[int]]
    new_tokens: int
    eos: tuple[int, ...]


@dataclass(frozen=True)
class Soak:
    """What was seen; resident bytes by generation, ``differing`` the sampled generations unlike a fresh session's."""

    generations: int
    seconds: float
    tokens: int
    rss_bytes: list[int]
    compared: int
    differing: int
    threads_differing: int
    interrupts: int
    after_interrupt_differing: int

    @property
    def growth(self) -> float:
        """Share by which resident memory grew from generation :data:`WARM` to the end (medians of 20 readings)."""
        warm = np.median(self.rss_bytes[WARM : WARM + 20])
        return float(np.median(self.rss_bytes[-20:]) / warm - 1)

    @property
    def passed(self) -> bool:
        """Whether nothing happened that must not."""
        return self.growth <= GROWTH_LIMIT and not (
            self.differing or self.threads_differing or self.after_interrupt_differing
        )


def jobs(count: int, vocab: int, longest: int, batch: int, new_tokens: int, seed: int) -> list[Job]:
    """Random jobs; the first one is the largest, so that what a buffer may need at most is there from the start."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        rows = batch if n == 0 else int(rng.integers(1, batch + 1))
        lengths = [longest if n == 0 else int(rng.integers(1, longest + 1)) for _ in range(rows)]
        tokens = new_tokens if n == 0 else int(rng.integers(1, new_tokens + 1))
        prompts = [rng.integers(3, vocab, length).tolist() for length in lengths]
        made.append(Job(prompts, tokens, tuple(rng.integers(3, vocab, vocab // 20).tolist()) if n else ()))
    return made


Tokens = tuple[tuple[int, ...], ...]


def run_job(session: Session, job: Job) -> Tokens:
    """Greedy; the rows' tokens."""
    return generate(session, job.prompts, job.new_tokens, job.eos).tokens


def soak(open_session: Opener, todo: Sequence[Job], samples: int, interrupts: int, tick: Callable[[], None]) -> Soak:
    """Run everything on one session; every so many generations one is repeated on a fresh session."""
    session = open_session()
    every = max(1, len(todo) // samples)
    process = psutil.Process()
    rss, differing, tokens = [], 0, 0
    kept: list[tuple[Job, Tokens]] = []
    started = time.perf_counter()
    for n, job in enumerate(todo):
        done = run_job(session, job)
        tokens += sum(map(len, done))
        if n % every == 0:
            kept.append((job, done))
        gc.collect(0)
        rss.append(process.memory_info().rss)
        tick()
    seconds = time.perf_counter() - started
    for job, expected in kept:
        with contextlib.closing(open_session()) as fresh:
            differing += run_job(fresh, job) != expected
    reference = [(job, expected) for job, expected in kept if len(job.prompts) > 1][:8] or kept[:8]
    threads_differing = _two_threads(open_session, reference)
    after = _interrupted(session, reference, interrupts)
    session.close()
    session.close()  # twice is allowed
    return Soak(len(todo), seconds, tokens, rss, len(kept), differing, threads_differing, interrupts, after)


def _two_threads(open_session: Opener, reference: Sequence[tuple[Job, Tokens]]) -> int:
    """A session in each of two threads, the same jobs in another order; returns how many outputs differed."""

    def work(order: int) -> int:
        with contextlib.closing(open_session()) as session:
            return sum(run_job(session, job) != expected for job, expected in reference[::order])

    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(work, order) for order in (1, -1)]
    return sum(len(reference) if d.exception() else d.result() for d in done)


def _interrupted(session: Session, reference: Sequence[tuple[Job, Tokens]], count: int) -> int:
    """Ctrl-C at random moments, each followed by a job whose outcome is known; returns how many came out wrong."""
    rng = np.random.default_rng(1)
    wrong = 0

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for n in range(count):
            job, expected = reference[n % len(reference)]
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-4, 5e-3)))
                while True:
                    run_job(session, job)
            wrong += run_job(session, job) != expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """0 when nothing happened that must not, else 1."""
    from bench.progress import progress
    from runtime.loading import load

    parser = argparse.ArgumentParser(prog="python -m bench.studies.soak", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="made by llama-onnx export")
    parser.add_argument("--generations", type=int, default=2000)
    parser.add_argument("--longest", type=int, default=64, help="longest prompt in tokens")
    parser.add_argument("--batch", type=int, default=4, help="largest batch")
    parser.add_argument("--new-tokens", type=int, default=24, help="most new tokens")
    parser.add_argument("--samples", type=int, default=20, help="generations repeated on a fresh session")
    parser.add_argument("--interrupts", type=int, default=50)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.generations < WARM + 20:
        parser.error(
            f"--generations {args.generations} is too few: growth counts from {WARM} on; give {WARM + 20} or more"
        )
    open_session = partial(load, args.folder, threads=args.threads, verify=False, huge_pages=False)
    with contextlib.closing(open_session()) as probe:
        vocab = probe.info.vocab_size
    todo = jobs(args.generations, vocab, args.longest, args.batch, args.new_tokens, args.seed)
    with progress("generations", len(todo)) as bar:
        found = soak(open_session, todo, args.samples, args.interrupts, bar.tick)
    if args.json:
        sys.stdout.write(json.dumps({**asdict(found), "growth": found.growth, "passed": found.passed}) + "\n")
    else:
        print(describe(found))
    return 0 if found.passed else 1


def describe(found: Soak) -> str:
    """A few lines for a person."""
    return (
        f"{found.generations:,} generations, {found.tokens:,} tokens in {found.seconds:.0f} s\n"
        f"resident memory {found.rss_bytes[WARM] / 1e6:.1f} MB after {WARM}, {found.rss_bytes[-1] / 1e6:.1f} MB at the "
        f"end: growth {found.growth:+.2%} (limit {GROWTH_LIMIT:.0%})\n"
        f"unlike a fresh session: {found.differing} of {found.compared}; from two threads: {found.threads_differing}; "
        f"after {found.interrupts} interrupts: {found.after_interrupt_differing}\n"
        f"{'passed' if found.passed else 'FAILED'}"
    )


if __name__ == "__main__":
    sys.exit(main())
