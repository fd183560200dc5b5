"""1,000 random changes of one value in a certificate that is then signed anew: all refused (60 where time is short)."""

from __future__ import annotations

import copy
import datetime
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("securesystemslib")
pytest.importorskip("in_toto_attestation")

from bench.certificate.envelope import read_public_key, seal
from bench.certificate.statement import EXTENSION, CertificateError, make_certificate, statement_digest
from bench.certificate.verify import verify_certificate
from bench.data.loading import load_shipped
from reports.validation import Validation

CHANGES = pytest.mark.parametrize("changes", [60, pytest.param(1000, marks=pytest.mark.slow)])
NOW = datetime.datetime(2026, 11, 24, 12, 0, tzinfo=datetime.UTC)
DERIVED = ("results", "evidence", "verdict", "tier", "mode", "checks")
"""Parts of the result of which every value is derived, or something is derived from it."""
FREE = {
    "time that a check took": r"results\.\d+\.seconds",
    "wording of an exact check": r"results\.\d+\.(summary|notes)",
    "name or value of a place that is not the worst": r"evidence\.places\.\w+\.\d+\.(place|kld)",
    "PyTorch's own loss, which is compared only": r"evidence\.own_loss\.\d+\.\d+",
    "last digit of a score, lost in a sum": r"evidence\.(chunks|null)\.\d+\.(nll_candidate|nll_baseline|kld)\.\d+ last",
    "last digit of a task score, lost in a sum": r"evidence\.tasks\.\d+\.(candidate|baseline|cross)\.\d+\.0 last",
    "tokens before a divergence that is neither first nor median": r"evidence\.outputs\.\d+\.equal",
}
"""Kinds of change that alter nothing that is derived, by their place; of each a change may be accepted."""
pytestmark = pytest.mark.usefixtures("kept_tasks")


def walk(rng: random.Random, node: Any, path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The place of a random value: down at random, so that long lists do not hide the rest; seldom a list or object."""
    while isinstance(node, dict | list) and node and not (len(path) > 1 and rng.random() < 0.05):
        key = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node, path = node[key], (*path, key)
    return path


def changed(rng: random.Random, value: Any) -> tuple[Any, str]:
    """Another value, and what was done in a word."""
    if isinstance(value, bool):
        return not value, "flipped"
    if isinstance(value, int):
        return value + rng.choice([-1, 1, 7]), "number"
    if isinstance(value, float):
        if rng.random() < 0.5:
            return math.nextafter(value, rng.choice([-math.inf, math.inf])), "last"
        return value * 1.5 + 0.01, "number"
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1] if value else "y"]), "text"
    if value is None:
        return rng.choice([0, "x"]), "something"
    if isinstance(value, list):
        k = rng.randrange(len(value)) if value else 0
        return (
            (value[:k] + value[k + 1 :], "removed")
            if value and rng.random() < 0.5
            else (
                [*value[:k], *value[k : k + 1] * 2, *value[k + 1 :]] if value else [None],
                "doubled",
            )
        )
    gone = rng.choice(sorted(value)) if value else None
    return ({k: v for k, v in value.items() if k != gone} if value else {"x": 1}), "removed"


def change(rng: random.Random, statement: dict[str, Any], path: tuple[Any, ...]) -> str:
    """Change the value at that place; gives the word for it."""
    node = statement
    for key in path[:-1]:
        node = node[key]
    node[path[-1]], word = changed(rng, node[path[-1]])
    return word


@pytest.fixture
def attempt(
    folder: Path, baseline: Path, keys: Path, tmp_path: Path, result_of: Callable[..., Validation]
) -> Callable[[str, Callable[[dict[str, Any]], Any]], str]:
    """``attempt(precision, edit)``: a good certificate, edited and signed anew; the reason of the refusal, or ""."""
    key = read_public_key(keys / "ours.pub.pem")
    path = tmp_path / "cert.json"
    made: dict[str, Any] = {}

    def get(precision: str, edit: Callable[[dict[str, Any]], Any]) -> str:
        if precision not in made:
            result = result_of(folder, baseline, precision, tokens=TOKENS[precision])
            made[precision] = make_certificate(result, folder, baseline, load_shipped(), now=NOW)
        statement = copy.deepcopy(made[precision])
        edit(statement)
        path.write_text(json.dumps(seal(statement, keys / "ours.pem")))
        try:
            verify_certificate(path, folder, key=key, now=NOW)
        except CertificateError as e:
            return e.reason
        return ""

    assert get("int4", lambda _s: None) == ""
    return get


TOKENS = {"int4": 20, "fp16": 340}


@CHANGES
def test_any_change(changes: int, attempt: Callable[..., str]) -> None:
    rng = random.Random(1)
    reasons: Counter[str] = Counter()

    def edit(statement: dict[str, Any]) -> None:
        inside = ("predicate", EXTENSION, "validation") if rng.random() < 0.7 else ()
        node = statement["predicate"][EXTENSION]["validation"] if inside else statement
        change(rng, statement, walk(rng, node, inside))

    for _ in range(changes):
        reasons[attempt("int4", edit)] += 1
    assert reasons.total() == changes
    assert not reasons[""]
    assert reasons["contradiction"] > changes / 2


@CHANGES
def test_a_change_by_somebody_who_makes_the_digest_fit(changes: int, attempt: Callable[..., str]) -> None:
    rng = random.Random(2)
    accepted: Counter[str] = Counter()
    refused = 0
    place = ""

    def edit(statement: dict[str, Any]) -> None:
        nonlocal place
        validation = statement["predicate"][EXTENSION]["validation"]
        part = rng.choice(DERIVED)
        path = walk(rng, validation[part], (part,))
        word = change(rng, validation, path)
        place = ".".join(map(str, path)) + f" {word}"
        statement["predicate"][EXTENSION]["statement_sha256"] = statement_digest(statement)

    for k in range(changes):
        if attempt("fp16" if k % 20 == 0 else "int4", edit):
            refused += 1
            continue
        kinds = [kind for kind, form in FREE.items() if re.fullmatch(f"{form}( .*)?", place)]
        assert kinds, f"accepted: {place}"
        accepted[kinds[0]] += 1
    assert refused + accepted.total() == changes
    assert refused > 0.9 * changes
