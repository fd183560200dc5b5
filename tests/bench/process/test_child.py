"""Two children in turn: who runs when, that the other stands still, and what a failure of one costs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from bench.process.child import Ended, run_child, run_in_turn
from reports.comparison import SideName

CHILD = """
import json, os, pathlib, sys, time
name, folder, fails = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
(folder / f"{name}.pid").write_text(str(os.getpid()))

def state(pid):
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

print("noise that is no turn")
print("@turn", flush=True)
seen = []
for line in sys.stdin:
    if line.strip() == "end":
        break
    k = int(line.split()[1])
    if fails == f"crash{k}":
        print("about to die", flush=True)
        os.abort()
    if fails == f"hang{k}":
        time.sleep(600)
    others = [p for p in folder.glob("*.pid") if p.stem != name]
    seen.append([k, [state(p.read_text()) for p in others]])
    with (folder / "log").open("a") as f:
        f.write(f"{name}{k} ")
    print("@turn", flush=True)
print(json.dumps({"seen": seen}))
"""


def turns(folder: Path, rounds: int, limit_s: float = 60, base: str = "", candidate: str = "") -> dict[SideName, Ended]:
    command = [sys.executable, "-c", CHILD]
    env = dict(os.environ)
    sides: dict[SideName, tuple[list[str], dict[str, str]]] = {
        "candidate": ([*command, "candidate", str(folder), candidate], env),
        "base": ([*command, "base", str(folder), base], env),
    }
    return run_in_turn(sides, rounds, limit_s)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc on this system")
def test_rounds_alternate_and_who_waits_is_stopped(tmp_path: Path):
    made = turns(tmp_path, 4)
    assert [e.outcome for e in made.values()] == ["ok", "ok"]
    order = (tmp_path / "log").read_text().split()
    assert order == ["candidate0", "base0", "base1", "candidate1", "candidate2", "base2", "base3", "candidate3"]
    for ended in made.values():
        assert ended.found["seen"] == [[k, ["T"]] for k in range(4)]
        assert 0 < (ended.seconds or 0) < 30


def test_a_crash_leaves_the_other_to_finish(tmp_path: Path):
    made = turns(tmp_path, 3, base="crash1")
    assert made["base"].outcome == "crash"
    assert made["base"].reason == "signal 6"
    assert "about to die" in "\n".join(made["base"].last_lines)
    assert made["candidate"].outcome == "ok"
    assert len(made["candidate"].found["seen"]) == 3


def test_a_hang_is_ended_at_the_limit_and_the_others_time_is_its_own(tmp_path: Path):
    made = turns(tmp_path, 2, limit_s=3, candidate="hang0")
    assert made["candidate"].outcome == "timeout"
    assert made["base"].outcome == "ok"
    assert (made["candidate"].seconds or 0) >= 3 > (made["base"].seconds or 9)


def test_one_that_fails_before_its_first_turn_is_an_outcome(tmp_path: Path):
    error = [sys.executable, "-c", "import sys; print('error: no such provider', file=sys.stderr); sys.exit(4)"]
    good = [sys.executable, "-c", CHILD, "base", str(tmp_path), ""]
    made = run_in_turn({"candidate": (error, dict(os.environ)), "base": (good, dict(os.environ))}, 2, 60)
    assert made["candidate"].refusal == "no such provider"
    assert len(made["base"].found["seen"]) == 2


def test_output_that_comes_after_the_last_read_is_not_lost():
    command = [sys.executable, "-c", "import json; print('x' * 100000); print(json.dumps({'a': 1}))"]
    assert run_child(command, dict(os.environ), 60) == Ended(
        "ok", "", 0, [], {"a": 1}, seconds=pytest.approx(0, abs=60)
    )
    silent = run_child([sys.executable, "-c", "pass"], dict(os.environ), 60)
    assert (silent.outcome, silent.reason) == ("crash", "ended well without a result")
    assert json.dumps(silent.found) == "{}"
