"""What every page says about the gate's validation: the answer, its reason in one line, and the measurement to show.

Used by the run page, the comparison page and the validation's own page, in HTML, Markdown and JUnit alike.
Try: ``llama-onnx report validation.json --out /tmp/page``.
"""

from __future__ import annotations

from typing import Any

from reports.render import words
from reports.validation import RANK, CheckResult, Measurement, Validation

EXAMPLES_SHOWN = 20
FINDINGS_SHOWN = 5
STANDING_OUT = RANK[: RANK.index("PASS")]
"""Statuses whose checks stand first, each with what it looks at and what it found."""


def word(validation: Validation | None) -> str:
    """Yes, No, Undecided or Not examined: is it still the same model?"""
    if validation is None:
        return "Not examined"
    return {"PASS": "Yes", "FAIL": "No", "INCONCLUSIVE": "Undecided"}[validation.verdict]


def short(validation: Validation | None) -> str:
    """The words that stand beside every speed-up."""
    if validation is None:
        return "parity not examined"
    verb = {"PASS": "holds", "FAIL": "fails", "INCONCLUSIVE": "undecided"}[validation.verdict]
    return f"parity {verb} at {words.shorten(validation.tier, 20)}"


def line(validation: Validation | None) -> str:
    """How many checks pass in which tolerance tier, and what did not."""
    if validation is None:
        return "no check was run"
    judged = validation.of("PASS", "SUSPICIOUS", "FAIL", "INCONCLUSIVE")
    passed = validation.of("PASS", "SUSPICIOUS")
    tier = words.shorten(validation.tier, 40)
    told = [f"{len(passed)} of {len(judged)} checks pass, tolerance tier {tier}, mode {validation.mode}"]
    for status in ("FAIL", "INCONCLUSIVE", "SUSPICIOUS"):
        names = [r.title for r in validation.of(status)]
        if names:
            which = f" ({words.shorten(names[0], 40)})" if len(names) == 1 else ""
            told.append(f"{len(names)} {'failed' if status == 'FAIL' else status.lower()}{which}")
    return ", ".join(told)


def ordered(validation: Validation | None) -> list[CheckResult]:
    """The results, failed and undecided ones first."""
    return sorted(validation.results, key=lambda r: RANK.index(r.status)) if validation else []


def counts(validation: Validation) -> list[tuple[str, int]]:
    """How many checks have each status that occurs."""
    return [(status, n) for status in RANK if (n := len(validation.of(status)))]


def leading(validation: Validation | None) -> Measurement | None:
    """The measurement to show beside a speed-up: the worst, and of equals the mean KL divergence."""
    every = [m for r in validation.results for m in r.measurements] if validation else []
    return min(every, key=lambda m: (RANK.index(m.status), m.name != "mean_kld"), default=None)


def measurement_line(m: Measurement | None) -> str:
    """A measurement with limit and null control, such as ``Mean KL divergence 2.1e-11 nats, limit ≤ 1e-8``."""
    if m is None:
        return ""
    held = m.bound if m.bound is not None else m.value
    text = f"{words.shorten(m.title, 60)} {words.number(held, m.unit, m.limit)}"
    if m.limit is not None:
        text += f", limit {words.limit_text(m.limit, m.better)}"
    if m.null_value is not None:
        text += f", null control {words.number(m.null_value, '', m.limit)}"
    return text


def context(validation: Validation | None) -> dict[str, Any]:
    """What the template of the section needs."""
    return {
        "validation": validation,
        "parity_word": word(validation),
        "parity_status": validation.verdict if validation else "INCONCLUSIVE",
        "parity_short": short(validation),
        "parity_line": line(validation),
        "leading": measurement_line(leading(validation)),
        "results": ordered(validation),
        "standing_out": STANDING_OUT,
        "findings_shown": FINDINGS_SHOWN,
        "examples": validation.examples[:EXAMPLES_SHOWN] if validation else [],
    }


def facts(validation: Validation) -> list[tuple[str, list[tuple[str, str]]]]:
    """What was validated, against what, how, and what ran, as pairs of name and value."""
    v = validation
    gate = [
        ("Folder", v.folder),
        ("Folder SHA-256", v.folder_sha256 or words.DASH),
        ("Baseline", v.baseline),
        ("Baseline SHA-256", v.baseline_sha256 or words.DASH),
        ("Data", v.dataset),
        ("Data SHA-256", v.dataset_sha256),
        ("Tolerance tier", v.tier),
        ("Mode", v.mode),
        ("Tokens scored", f"{v.tokens_scored:,}"),
        *((name, str(value)) for name, value in v.settings.items() if value is not None),
    ]
    return [("Gate", gate), ("What ran", [(k, str(value)) for k, value in v.session.items()])]
