"""A document is judged again from its evidence: it holds as it was made, and every change of what counts is named."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.gate import replay as replaying
from bench.gate.found import stopped
from bench.gate.replay import SLACK, incomplete, replay
from reports.validation import Evidence, Validation, decide_verdict
from tests.synthetic import UNEXPLAINED, synthetic

KINDS = [("int4", "standard", 20), ("fp32", "quick", 127), ("fp16", "standard", 340), ("bf16", "standard", 340)]
Change = Callable[[Validation], Validation]


@pytest.fixture(scope="module", params=KINDS, ids=lambda p: f"{p[0]}-{p[1]}")
def document(request: pytest.FixtureRequest) -> Validation:
    return synthetic(*request.param)


@pytest.fixture(scope="module")
def fp16() -> Validation:
    return synthetic("fp16", "standard", 340)


@pytest.fixture(scope="module")
def bf16() -> Validation:
    return synthetic("bf16", "standard", 120)


def test_a_document_holds(document: Validation) -> None:
    read = Validation.model_validate_json(document.to_json())
    assert document.verdict == "PASS"
    assert replay(read) == []
    assert incomplete(read) == []


def test_it_takes_no_model() -> None:
    heavy = ("torch", "transformers", "onnxruntime", "onnx", "optimum")
    code = f"import sys, bench.gate.replay, bench.certificate.verify; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def of(name: str, **changes: Any) -> Change:
    """Fields of one result changed, the verdict made to fit."""

    def change(v: Validation) -> Validation:
        results = [r.model_copy(update=changes) if r.name == name else r for r in v.results]
        verdict, reasons = decide_verdict(results)
        return v.model_copy(update={"results": results, "verdict": verdict, "reasons": reasons})

    return change


def measured(name: str, **changes: Any) -> Change:
    def change(v: Validation) -> Validation:
        m = next(r for r in v.results if r.name == name).measurements
        return of(name, measurements=first(**changes)(m))(v)

    return change


def seen(part: str, make: Callable[[Any], Any]) -> Change:
    """One part of the evidence changed."""

    def change(v: Validation) -> Validation:
        return v.model_copy(update={"evidence": v.evidence.model_copy(update={part: make(getattr(v.evidence, part))})})

    return change


def first(**changes: Any) -> Callable[[list[Any]], list[Any]]:
    """The first entry of a list with fields changed; a function is given the value."""

    def make(rows: list[Any]) -> list[Any]:
        fields = {k: v(getattr(rows[0], k)) if callable(v) else v for k, v in changes.items()}
        return [rows[0].model_copy(update=fields), *rows[1:]]

    return make


WRONG: dict[str, tuple[Change, str]] = {
    "verdict": (lambda v: v.model_copy(update={"verdict": "FAIL"}), "verdict: says 'FAIL'"),
    "reasons": (lambda v: v.model_copy(update={"reasons": []}), "reasons: says []"),
    "list of checks": (lambda v: v.model_copy(update={"checks": v.checks[:1]}), "checks: not the list"),
    "a check twice": (lambda v: v.model_copy(update={"results": [*v.results, v.results[0]]}), "stands twice"),
    "mode": (lambda v: v.model_copy(update={"mode": "full"}), "settings.items: says 16"),
    "no mode": (lambda v: v.model_copy(update={"mode": "slow"}), "mode: 'slow' must be one of quick"),
    "tier": (lambda v: v.model_copy(update={"tier": "int8"}), "mean_kld.measurements[0].limit: says 0.0001"),
    "no tier": (lambda v: v.model_copy(update={"tier": "fp8"}), "tier: 'fp8' must be one of fp32"),
    "kind": (of("files", kind="numeric"), "files.kind: says 'numeric'"),
    "what it looks at": (of("greedy", looks_at="nothing"), "greedy.looks_at"),
    "status": (of("mean_kld", status="REPORTED"), "mean_kld.status: says 'REPORTED', the evidence gives 'PASS'"),
    "summary": (of("mean_kld", summary="good"), "mean_kld.summary"),
    "note of a judge": (of("mean_kld", notes=["trust me"]), "mean_kld.notes"),
    "last digit": (measured("mean_kld", bound=lambda x: math.nextafter(x, 1)), "mean_kld.measurements[0].bound"),
    "no measurement": (of("mean_kld", measurements=[]), "mean_kld.measurements"),
    "task": (of("tasks", tasks=[]), "tasks.tasks"),
    "exact without its finding": (of("weights", status="FAIL"), "weights.status: says FAIL with 0 findings"),
    "exact, suspicious": (of("weights", status="SUSPICIOUS"), "weights.status"),
    "exact that always decides": (of("tokenizer", status="SKIPPED"), "tokenizer.status: says SKIPPED"),
    "stopped that passed": (of("weights", summary="stopped: E"), "weights.status: says 'PASS'"),
    "a chunk less": (seen("chunks", lambda c: c[:-1]), "mean_kld.measurements[0].value"),
    "a token less": (seen("chunks", first(kld=lambda x: x[1:])), "chunk 0 has lists of different lengths"),
    "an empty chunk": (
        seen("chunks", first(kld=[], nll_candidate=[], nll_baseline=[], same_top1=[])),
        "chunk 0 has 0 tokens",
    ),
    "a long chunk": (seen("null", first(kld=lambda x: x * 2)), "null chunk 0 has 680 tokens"),
    "negative KL": (seen("chunks", first(kld=lambda x: [-1e-8, *x[1:]])), "chunk 0 holds a value that is negative"),
    "infinite loss": (seen("null", first(nll_baseline=lambda x: [float("inf"), *x[1:]])), "negative or not finite"),
    "less null": (seen("null", lambda n: n[:-1]), "null control is not over the first 8 chunks"),
    "no own loss": (seen("own_loss", lambda _o: {}), "tail_kld: cannot be judged from this evidence (KeyError: 14)"),
    "more own loss": (
        seen("own_loss", lambda o: {**o, 20: o[UNEXPLAINED]}),
        "own_loss of chunk 20, which no check asks for",
    ),
    "short own loss": (seen("own_loss", lambda o: {k: v[1:] for k, v in o.items()}), "own_loss of chunk 14"),
    "own loss of a null chunk": (seen("own_loss", lambda o: {**o, 3: o[UNEXPLAINED]}), "own_loss of chunk 3"),
    "places of no check": (seen("places", lambda p: {**p, "mean_kld": []}), "places of mean_kld"),
    "a place twice": (
        seen("places", lambda p: {**p, "decode_steps": p["decode_steps"] * 2}),
        "decode_steps looks at a place twice",
    ),
    "a place of no number": (
        seen("places", lambda p: {**p, "decode_steps": first(kld=float("nan"))(p["decode_steps"])}),
        "decode_steps has a divergence that is negative or no number",
    ),
    "an item twice": (seen("outputs", lambda o: [*o, o[0]]), "an item was generated twice"),
    "more equal than there is": (seen("outputs", first(equal=99)), "99 of"),
    "an end of nothing": (seen("outputs", first(candidate=0, equal=0)), "0 of 0"),
    "equal tokens, one ends": (seen("outputs", first(candidate_ended=False)), "equal outputs of which one ends"),
    "another group": (seen("outputs", first(group="poetry")), "no task makes the group 'poetry'"),
    "another item": (seen("outputs", first(item="x")), "is not over the items that were generated"),
    "a metric less": (seen("tasks", lambda t: t[1:]), "tasks are not every metric of every group once"),
    "rows less": (seen("tasks", first(cross=lambda x: x[1:])), "another number of rows than items"),
    "a score above 1": (
        seen("tasks", first(candidate=lambda x: [[1.5, 1.0], *x[1:]])),
        "exact match on qa has statistics that no output gives",
    ),
    "equal tokens, another score": (
        seen("tasks", first(candidate=lambda x: [[1.0 - x[0][0], 1.0], *x[1:]], same_outputs=False)),
        "scores equal tokens differently",
    ),
    "equal outputs, another score": (
        seen("tasks", first(candidate=lambda x: [[1.0 - v, 1.0] for v, _ in x], same_outputs=True)),
        "equal outputs that score differently",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_follow_is_named(name: str, fp16: Validation) -> None:
    change, words = WRONG[name]
    wrong = replay(change(fp16))
    assert any(words in w for w in wrong), wrong[:5]


def test_a_cache_probe_that_bf16_cannot_have(bf16: Validation) -> None:
    rows = bf16.evidence.places["decode_steps"]
    wrong = replay(seen("places", lambda p: {**p, "long_context": rows})(bf16))
    assert wrong == ["evidence: places of long_context, which no check of the document looks at"]


def test_equal_tokens_are_equal_outputs(fp16: Validation) -> None:
    def equal(v: Validation) -> Evidence:
        outputs = [o.model_copy(update={"candidate": o.baseline, "equal": o.baseline}) for o in v.evidence.outputs]
        tasks = [
            t.model_copy(update={"candidate": t.baseline, "same_outputs": t.group != "qa"}) for t in v.evidence.tasks
        ]
        return v.evidence.model_copy(update={"outputs": outputs, "tasks": tasks})

    wrong = replay(fp16.model_copy(update={"evidence": equal(fp16)}))
    assert [w for w in wrong if "calls equal tokens" in w] == wrong
    assert len(wrong) == 2


@pytest.mark.parametrize("part", ["chunks", "outputs", "tasks"])
def test_evidence_of_checks_that_were_left_out(part: str, fp16: Validation) -> None:
    names = {"chunks": replaying.TOKENS, "outputs": replaying.OUTPUTS, "tasks": ("tasks",)}[part]
    kept = [r for r in fp16.results if r.name not in names]
    verdict, reasons = decide_verdict(kept)
    wrong = replay(fp16.model_copy(update={"results": kept, "verdict": verdict, "reasons": reasons}))
    assert any("that no check of the document looks at" in w for w in wrong)
    assert incomplete(fp16.model_copy(update={"results": kept}))[0].startswith(f"{len(names)} of 26 checks")


def test_a_check_that_stopped_has_failed(fp16: Validation) -> None:
    found = stopped("mean_kld", "RuntimeError: no memory")
    fields = {"status": "FAIL", "summary": found.summary, "findings": list(found.findings), "measurements": []}
    document = of("mean_kld", **fields)(fp16)
    assert document.verdict == "FAIL"
    assert replay(document) == []


def test_other_libraries_may_move_a_last_digit(fp16: Validation) -> None:
    value = next(r for r in fp16.results if r.name == "mean_kld").measurements[0].value
    near = measured("mean_kld", value=value * (1 + SLACK / 3))(fp16)
    far = measured("mean_kld", value=value * (1 + SLACK * 3))(fp16)
    assert any("mean_kld.measurements[0].value" in w for w in replay(near))
    for name in replaying.NUMERIC:
        other = {"versions": fp16.versions | {name: "0.1"}}
        assert replay(near.model_copy(update=other)) == []
        assert replay(far.model_copy(update=other))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_a_run_writes_holds(
    precision: str, subjects: Callable[..., Any], exports: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real run, of which the statistics have to be the same again from its JSON."""
    from bench.gate.modes import MODES
    from bench.gate.validate import validate

    subject = subjects(exports(precision))
    monkeypatch.setitem(MODES, subject.mode.name, subject.mode)
    document = validate(subject, place=False)
    assert replay(Validation.model_validate_json(document.to_json())) == []
    assert incomplete(document) == []
