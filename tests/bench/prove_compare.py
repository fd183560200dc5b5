"""The real proof on this machine: A against A, and A against A with a 5 % handicap in the decode loop.

``python -m tests.bench.prove_compare OUT same 0 1 2 3 4`` and ``... OUT slow 0 1 2 3 4``: one comparison for each seed,
written as ``OUT/KIND-SEED/comparison.json``; a line each on standard output.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from bench.cli import compare as compare_command
from bench.latency import paired_run, sides
from tests.bench import handicap


def prove(out: Path, kind: str, seed: int, folder: str, cases: str, rounds: int, more: list[str]) -> None:
    typed = ["compare", "--base", folder, "--candidate", folder, "--cases", cases, *more]
    typed += ["--rounds", str(rounds), "--seed", str(seed), "--out", str(out / f"{kind}-{seed}")]
    parser = argparse.ArgumentParser()
    compare_command.add_arguments(parser)
    args = parser.parse_args(typed[1:])
    args.json, args.typed = False, typed
    plain = sides.parse_side

    def handicapped(name: sides.SideName, text: str) -> sides.SideSpec:
        side = plain(name, text)
        return handicap.Handicapped(**vars(side), handicap="five_percent") if name == "candidate" else side

    paired_run.CHILD = handicap.CHILD
    sides.parse_side = handicapped if kind == "slow" else plain
    started = time.time()
    code = compare_command.run(args)
    sides.parse_side = plain
    print(f"{kind} {seed}: exit {code}, {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    from export.cache import cache_dir

    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("out", type=Path)
    asked.add_argument("kind", choices=("same", "slow"))
    asked.add_argument("seeds", type=int, nargs="+")
    asked.add_argument("--cases", default="b1-p32-n16")
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--side", default="", help="more of both sides, such as ,threads=1")
    asked.add_argument("--folder", type=Path, help="another export than the demo model's in the cache")
    given, others = asked.parse_known_args()
    chosen = given.folder or sorted((cache_dir() / "exports").glob("SmolLM2-135M-Instruct-fp32-*"))[0]
    for number in given.seeds:
        prove(given.out, given.kind, number, f"{chosen}{given.side}", given.cases, given.rounds, others)
