"""The answer of one run: is it still the same model, is it faster, and may a pipeline go on.

Try: ``python -c "import pathlib, reports.record as r, reports.verdict as v;
print(v.judge(r.RunRecord.read(pathlib.Path('reports/out/record.json'))).headline)"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from reports.record import Case, Outcome, RunRecord
from reports.stats import METRICS, SPREAD_LIMIT, Comparison, Estimate, samples
from reports.summary import (
    against_baseline,
    headline_case,
    measured_sides,
    ordered_sides,
    series_spread,
)
from reports.targets import Target, targets_of
from reports.validation import EXIT_CODES, Status, Validation, overall
from reports.validation import Verdict as Word

ParityAnswer = Literal["same", "different", "undecided", "in part", "not examined"]
MINIMUM_ROUNDS = 6
"""A median has its 95 % interval from so many rounds."""
ANSWERS: dict[Word, ParityAnswer] = {"PASS": "same", "FAIL": "different", "INCONCLUSIVE": "undecided"}
WORDS: dict[Word, str] = {"PASS": "PASSED", "FAIL": "FAILED", "INCONCLUSIVE": "INCONCLUSIVE"}
PARITY_WORDS: dict[ParityAnswer, str] = {
    "same": "Same model",
    "different": "Different model",
    "undecided": "Parity undecided",
    "in part": "Parity examined in part",
    "not examined": "Parity not examined",
}


@dataclass(frozen=True)
class Verdict:
    """What a reader and a pipeline need to know.

    ``speed`` is the candidate against the baseline on the headline case: ``decode`` and ``prefill``, as far as they
    were measured. ``outcome`` is FAIL where a check of the gate or another test failed. Targets that were missed do
    not change it.
    """

    parity: ParityAnswer
    speed: Mapping[str, Comparison]
    headline: str
    outcome: Word
    gated: int
    passed: int
    failed: tuple[str, ...]
    inconclusive: tuple[str, ...]
    suspicious: tuple[str, ...]
    failed_tests: tuple[str, ...]
    targets: tuple[Target, ...]
    warnings: tuple[str, ...]
    not_examined: tuple[str, ...]
    rounds: int
    tokens_scored: int | None

    @property
    def exit_code(self) -> Literal[0, 1, 3]:
        """What a pipeline obeys."""
        return EXIT_CODES[self.outcome]

    @property
    def word(self) -> str:
        """PASSED, FAILED or INCONCLUSIVE."""
        return WORDS[self.outcome]


def judge(record: RunRecord) -> Verdict:
    """Derive the verdict of a record. Pure: the same record gives the same verdict."""
    validation = record.validation
    parity = parity_answer(validation)
    speed = _speed(record)
    failed_tests = tuple(o.test for o in other_outcomes(record) if o.outcome in ("failed", "error"))
    aims = targets_of(record)
    examined: list[Word] = [] if parity == "in part" or validation is None else [validation.verdict]
    outcome = overall([*examined, *("FAIL" for _ in failed_tests)])

    def titles(*statuses: Status) -> tuple[str, ...]:
        return tuple(r.title for r in validation.of(*statuses)) if validation else ()

    case = headline_case(record)
    return Verdict(
        parity=parity,
        speed=speed,
        headline=_headline(record, parity, speed, failed_tests, aims),
        outcome=outcome,
        gated=len(titles("PASS", "SUSPICIOUS", "FAIL", "INCONCLUSIVE")),
        passed=len(titles("PASS", "SUSPICIOUS")),
        failed=titles("FAIL"),
        inconclusive=titles("INCONCLUSIVE"),
        suspicious=titles("SUSPICIOUS"),
        failed_tests=failed_tests,
        targets=aims,
        warnings=(*record.warnings, *derived_warnings(record)),
        not_examined=_not_examined(record),
        rounds=_rounds(record, case),
        tokens_scored=validation.tokens_scored if validation else None,
    )


def parity_answer(validation: Validation | None) -> ParityAnswer:
    """The gate's verdict as an answer to "is it the same model?"; some checks alone cannot say yes."""
    if validation is None:
        return "not examined"
    return "in part" if validation.verdict == "PASS" and not validation.complete else ANSWERS[validation.verdict]


def other_outcomes(record: RunRecord) -> list[Outcome]:
    """Tests of a run but those of a check whose result is in the validation, which tells of it."""
    checks = {f"test_check[{r.name}]" for r in record.validation.results} if record.validation else set()
    return [o for o in record.outcomes if o.test not in checks]


def speed_sentence(speed: Mapping[str, Comparison]) -> str:
    """Such as ``2.79 times as fast (95 % interval 2.7 to 2.9) in decode, ...`` or ``speed not measured``."""
    return ", ".join(f"{_times(pair.speedup)} in {name}" for name, pair in speed.items()) or "speed not measured"


def derived_warnings(record: RunRecord) -> list[str]:
    """What the raw samples themselves warn of; each line says what to do about it."""
    found = []
    if record.model.random_weights:
        found.append(
            "The weights are random: latency and numeric parity stand, answers and task scores mean nothing. "
            "Run a trained checkpoint before shipping."
        )
    return [*found, *_spread_warnings(record), *_count_warnings(record)]


def _speed(record: RunRecord) -> dict[str, Comparison]:
    case, candidate = headline_case(record), record.side("candidate")
    if case is None or candidate is None:
        return {}
    decode = against_baseline(record, case, candidate.label, "tpot")
    prefill = against_baseline(record, case, candidate.label, "ttft")
    return {name: pair for name, pair in (("decode", decode), ("prefill", prefill)) if pair}


def _rounds(record: RunRecord, case: Case | None) -> int:
    """Rounds of the less often measured of candidate and baseline on the headline case."""
    if case is None:
        return 0
    sides = [s for s in measured_sides(record, case) if s.role != "peer"] or measured_sides(record, case)
    return min(len(found.rounds) for s in sides if (found := record.find(case, s.label)))


def _times(speedup: Estimate) -> str:
    text = f"{speedup.value:.3g} times as fast"
    if speedup.low is None or speedup.high is None:
        return f"{text} (no interval from {speedup.n} round{'s' * (speedup.n != 1)})"
    return f"{text} (95 % interval {speedup.low:.3g} to {speedup.high:.3g})"


def _headline(
    record: RunRecord,
    parity: ParityAnswer,
    speed: Mapping[str, Comparison],
    failed_tests: tuple[str, ...],
    targets: tuple[Target, ...],
) -> str:
    parts = [PARITY_WORDS[parity]]
    gains = [
        f"{pair.speedup.value:.3g}{'' if i else ' times as fast'} in {name}"
        for i, (name, pair) in enumerate(speed.items())
    ]
    parts.append(" and ".join(gains) or "speed not measured")
    if failed_tests:
        parts.append(f"{len(failed_tests)} test{'s' * (len(failed_tests) > 1)} failed")
    if missed := sum(not t.met for t in targets):
        parts.append(f"{missed} of {len(targets)} targets missed")
    text = ", ".join(parts) + "."
    return f"Random weights: {text[0].lower()}{text[1:]}" if record.model.random_weights else text


def _not_examined(record: RunRecord) -> tuple[str, ...]:
    found = unexamined(record.validation) if record.validation else ["parity with PyTorch"]
    if not _speed(record):
        found.append("speed against a baseline")
    found += _unmeasured_context(record)
    parts = {"memory": record.memory, "load time": record.loads, "memory floor": record.floor}
    if record.prefill_floor is not None:
        parts["matrix-product floor"] = record.prefill_floor.measured
    return (*found, *(name for name, part in parts.items() if not part))


def _unmeasured_context(record: RunRecord) -> list[str]:
    """Beyond which context nothing was timed; a prefill-only case says nothing about decode."""
    context = record.model.context_length
    prefill = max((c.prompt for c in record.cases()), default=0)
    longest = max((c.prompt + c.new_tokens for c in record.cases() if c.new_tokens > 1), default=0)
    if longest < prefill:
        ends = (("decode", longest), ("prefill", prefill))
        parts = [f"{name} beyond {end:,}" if end else name for name, end in ends if end < context]
        return [f"{' and '.join(parts)} of {context:,} tokens of context"] if parts else []
    return [f"latency beyond {longest:,} of {context:,} tokens of context"] if 0 < longest < context else []


def unexamined(validation: Validation) -> list[str]:
    """What of the gate was left out or could not judge this folder."""
    found = []
    if not validation.complete:
        found.append(f"{len(validation.checks) - len(validation.results)} of {len(validation.checks)} checks")
    if open_ := [r.title.lower() for r in validation.of("SKIPPED") if r.name != "null_ratio"]:
        found.append(f"not judged: {', '.join(open_)}")
    return found


def _spread_warnings(record: RunRecord) -> list[str]:
    """One line for all noisy series: a line for each would bury the rest on a noisy machine."""
    spreads = [
        (spread, metric, side.title, case)
        for case in record.cases()
        for side in measured_sides(record, case)
        for metric in ("ttft", "tpot")
        if (spread := series_spread(record, case, side.label, metric)) is not None
    ]
    noisy = [s for s in spreads if s[0] > SPREAD_LIMIT]
    if not noisy:
        return []
    spread, metric, title, case = max(noisy, key=lambda s: s[0])
    return [
        f"Spread between rounds above {100 * SPREAD_LIMIT:.1f} % in {len(noisy)} of {len(spreads)} series, "
        f"at most {100 * spread:.1f} % ({metric.upper()} of {title}, {case.label}): trust the paired ratios "
        "more than the medians; a quieter machine or more rounds narrow both."
    ]


def _count_warnings(record: RunRecord) -> list[str]:
    found, few = [], []
    for side in ordered_sides(record):
        series = [s for s in record.series if s.side == side.label]
        least = min((len(s.rounds) for s in series), default=MINIMUM_ROUNDS)
        if least < MINIMUM_ROUNDS:
            few.append(f"{side.title} ({least})")
        if any(v <= 0 for s in series for m in METRICS for v in samples(s, m)):
            found.append(f"{side.title}: a time that is not positive; its clock is broken, run it again.")
    if few:
        found.append(
            f"Fewer than {MINIMUM_ROUNDS} rounds on some case: {', '.join(few)}. Their times are not sure; "
            "raise the number of rounds."
        )
    for case in record.cases():
        counts = {len(s.rounds) for s in record.series if s.case == case}
        if len(counts) > 1:
            found.append(f"{case.label}: sides have {min(counts)} to {max(counts)} rounds; ratios pair only the first.")
    return found
