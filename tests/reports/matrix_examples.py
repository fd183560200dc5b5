"""A made-up matrix with a row of every outcome; ``example_matrix(...)`` has knobs for what can be missing or hostile.

It is written by hand, not measured: renderers must show whatever the schema allows.
"""

from __future__ import annotations

from typing import Any

from reports.comparison import PairResult, Result
from reports.matrix import Bisection, Difference, Matrix, MatrixRow, OperatorTime, matrix_verdict
from reports.validation import CheckResult
from tests.reports.validation_examples import MACHINE, example_validation

LONG_WARNING = (
    "2026-11-28 10:00:00.123 [W:onnxruntime:, constant_folding.cc:268 ApplyImpl] Could not find a CPU kernel and hence "
    "can't constant fold Sqrt node '/model/layers.0/input_layernorm/Sqrt'; " + "and so on, " * 80
)
DIFFERENCE = Difference(
    layer=0,
    node="/model/layers.0/attn/qkv_proj/MatMulNBits",
    operator="MatMulNBits",
    scenario="a prompt of 24 tokens",
    what="layer 0, MatMulNBits (/model/layers.0/attn/qkv_proj/MatMulNBits): relative error 1.3 over equal inputs",
    deviation=1.31,
    expected=0.0021,
    reproduction="rows/1.22.1-cpu/reproduce_MatMulNBits.py",
    reproduction_bytes=312_000,
)
PAGES = {"mean_kld", "top1_agreement", "greedy"}


def checks(failing: str = "", undecided: str = "") -> list[CheckResult]:
    """The numeric and generation checks of a validation."""
    found = [r for r in example_validation().results if r.kind != "exact" and r.name != "tasks"]
    made = []
    for r in found:
        status = "INCONCLUSIVE" if r.name == undecided else r.status
        if failing and r.name in PAGES:
            value = {"mean_kld": 12.04, "top1_agreement": 0.0, "greedy": 0.0}[r.name]
            m = r.measurements[0].model_copy(update={"status": "FAIL", "value": value, "bound": value})
            update: dict[str, Any] = {"status": "FAIL", "measurements": [m]}
            update["summary"] = f"{value:g}, limit {m.limit} (2040 tokens in 8 chunks)"
        else:
            update = {"status": status}
        made.append(r.model_copy(update=update))
    return made


def result(case: str, metric: str, ratio: float | None, status: str, width: float = 0.011, **more: Any) -> Result:
    """One judged metric."""
    base = {"tpot": 0.0163, "ttft": 0.089}[metric]
    measured: dict[str, Any] = {} if ratio is None else {
        "ratio": ratio,
        "low": ratio * (1 - width),
        "high": ratio * (1 + width),
        "p": 0.001,
        "p_holm": 0.004,
        "base_median": base,
        "candidate_median": base * ratio,
        "pairs": [PairResult(index=i, base=base, candidate=base * ratio, ratio=ratio) for i in range(8)],
    }  # fmt: skip
    reason = {
        "REGRESSION": "slower, beyond the margin of 3 %, and not noise",
        "IMPROVED": "faster, beyond the margin of 3 %, and not noise",
        "EQUIVALENT": "inside the margin of 3 %",
        "INCONCLUSIVE": "between 1.1 % faster and 5.4 % slower after 8 pairs; about 21 pairs would decide",
        "MISSING": "candidate ran out of memory in 3 of 3 attempts",
    }[status]
    fields = {"case": case, "metric": metric, "unit": "s", "gating": True, "status": status, "reason": reason}
    return Result.model_validate(fields | {"margin": 0.03} | measured | more)


CASES = ["b1-p128-n32", "b1-p1024-n2"]


def speed(*told: tuple[float | None, str]) -> list[Result]:
    """Decode and prefill of both cases, in this order."""
    places = [(case, metric) for case in CASES for metric in ("tpot", "ttft")]
    return [result(case, metric, *t) for (case, metric), t in zip(places, told, strict=True)]


SAME = ((1.002, "EQUIVALENT"), (0.997, "EQUIVALENT"), (1.004, "EQUIVALENT"), (1.001, "EQUIVALENT"))


def row(version: str, provider: str = "cpu", **more: Any) -> MatrixRow:
    """A row that passes, unless ``more`` says otherwise."""
    ran: dict[str, Any] = {
        "results": checks(),
        "speed": speed(*SAME),
        "parity": "PASS",
        "load_s": 0.612,
        "peak_memory_bytes": 412_300_000.0,
        "session": {"runtime": "onnxruntime", "provider": "cpu", "attention": "GroupQueryAttention", "fallbacks": None},
        "page": f"rows/{version}-{provider}/index.html",
        "seconds": 41.3,
    }
    fields = {"runtime": f"onnxruntime {version}", "text": f"onnxruntime=={version}", "version": version}
    fields |= {"provider": provider, "outcome": "ran", "verdict": "PASS", "reasons": ["7 checks passed"]}
    if more.get("outcome", "ran") != "ran":
        ran = {"seconds": 3.0}
    return MatrixRow.model_validate(fields | ran | more)


def _rows() -> list[MatrixRow]:
    refusal = "Fatal error: com.microsoft:MatMulNBits: zero_points of type float is not a registered type"
    missing = [result("b1-p128-n32", "tpot", None, "MISSING")]
    noisy = speed((1.021, "INCONCLUSIVE"), *SAME[1:])
    return [
        row("1.20.1", outcome="refused", reason=refusal, verdict="FAIL", reasons=[f"refuses the folder: {refusal}"]),
        row(
            "1.22.1",
            results=checks(failing="numeric"),
            parity="FAIL",
            verdict="FAIL",
            reasons=["mean_kld: 12.04, limit 1e-08", "top1_agreement: 0, limit 0.998"],
            speed=speed((0.71, "IMPROVED"), (0.9, "IMPROVED"), *SAME[2:]),
            difference=DIFFERENCE,
        ),
        row("1.23.2", warnings=[LONG_WARNING, "short"], notes=["the first process was slower than the others"]),
        row("1.24.4", speed=speed(*SAME[:3], (0.802, "IMPROVED"))),
        row("1.27.0", speed=speed(*SAME[:3], (0.797, "IMPROVED"))),
        row(
            "1.28.0",
            speed=speed(*SAME[:3], (1.253, "REGRESSION")),
            verdict="FAIL",
            reasons=["ttft of b1-p1024-n2: 25.3 % slower, beyond the margin of 3 %, and not noise"],
        ),
        row(
            "1.29.0", speed=noisy, verdict="INCONCLUSIVE", reasons=["tpot of b1-p128-n32: about 21 pairs would decide"]
        ),
        row(
            "1.30.0",
            outcome="crashed",
            reason="killed by signal 11 (segmentation fault) in the prefill of 512 tokens",
            verdict="FAIL",
            reasons=["crashed: killed by signal 11 (segmentation fault) in the prefill of 512 tokens"],
            warnings=["free(): invalid pointer"],
        ),
        row(
            "1.31.1",
            outcome="timeout",
            reason="no answer within 900 s",
            verdict="FAIL",
            reasons=["took too long: no answer within 900 s"],
        ),
        row("1.32.0", reference=True, speed=[]),
        row("1.32.1", results=checks(undecided="mean_kld"), parity="INCONCLUSIVE", verdict="INCONCLUSIVE",
            reasons=["mean_kld: about 40 chunks would decide"], speed=missing),
        row(
            "1.33.0",
            outcome="unavailable",
            reason="no wheel for Python 3.11 on this machine",
            verdict="INCONCLUSIVE",
            reasons=["cannot run on this machine: no wheel for Python 3.11 on this machine"],
        ),
    ]  # fmt: skip


PARITY_BISECTION = Bisection(
    first="1.22.1",
    last="1.23.2",
    changed="parity",
    before="1.22.1",
    after="1.23.2",
    tried=["1.22.1", "1.23.2", "1.23.0"],
    between=4,
    difference=DIFFERENCE,
    summary="onnxruntime 1.23.2 is the first under which the folder is the same model; under 1.22.1 it is another one",
    seconds=131.0,
)
SPEED_BISECTION = Bisection(
    first="1.27.0",
    last="1.28.0",
    changed="ttft of b1-p1024-n2",
    before="1.27.0",
    after="1.28.0",
    tried=["1.27.0", "1.28.0"],
    between=2,
    profile=[
        OperatorTime(operator="GroupQueryAttention", before_us=61_200, after_us=148_900),
        OperatorTime(operator="MatMul", before_us=402_000, after_us=398_100),
        OperatorTime(operator="SkipSimplifiedLayerNormalization", before_us=5_100, after_us=5_000),
        OperatorTime(operator="FlashAttention", before_us=0, after_us=312),
        OperatorTime(operator="Gather", before_us=12, after_us=0),
    ],
    profiled="prefill of 1,024 tokens",
    summary="onnxruntime 1.28.0 is the first under which prefill of 1,024 tokens is 25 % slower than under 1.27.0",
    seconds=97.0,
)
BISECTIONS = {"parity": PARITY_BISECTION, "speed": SPEED_BISECTION}


def example_matrix(
    *,
    rows: list[MatrixRow] | None = None,
    bisection: str | Bisection = "parity",
    measured: bool = True,
    hostile: str = "",
    **top: Any,
) -> Matrix:
    """A row of each outcome, with speed and a bisection.

    Args:
        rows: instead of them.
        bisection: of parity, of speed, none, or this one.
        measured: False: speed was not measured (no pairs).
        hostile: stands in every name and path.
        **top: replaces fields.
    """
    rows = _rows() if rows is None else rows
    found = BISECTIONS.get(bisection) if isinstance(bisection, str) else bisection
    if not measured:
        bare = {"speed": [], "load_s": None, "peak_memory_bytes": None}
        rows = [r.model_copy(update=bare) for r in rows]
    raw: dict[str, Any] = {
        "tool_version": "0.1.0",
        "created_utc": "2026-11-28T10:00:00+00:00",
        "duration_s": 512.0,
        "command": ["llama-onnx", "matrix", "exports/int4", "--baseline", "demo", "--runtime", "onnxruntime==1.20.1"],
        "folder": "int4",
        "folder_sha256": "9f2c" * 16,
        "oldest_runtime": "1.23.2",
        "baseline": "PyTorch fp32, sdpa",
        "baseline_sha256": "77ab" * 16,
        "mode": "quick",
        "tier": "int4",
        "dataset": "technical English, 2,040 tokens, context 256-511",
        "reference": "onnxruntime 1.32.0",
        "cases": CASES if measured else [],
        "pairs": 8 if measured else 0,
        "seed": 7,
        "rows": [r.model_dump() for r in rows],
        "bisection": found.model_dump() if found else None,
        "machine": MACHINE.model_dump(),
        "versions": {"onnxruntime": "1.32.0", "torch": "2.13.0"},
        "notes": ["the baseline's logits came from the cache"],
    }
    if hostile:
        _rename(raw, hostile)
    verdict = matrix_verdict([MatrixRow.model_validate(r) for r in raw["rows"]])
    return Matrix.model_validate(raw | {"verdict": verdict} | top)


def _rename(raw: dict[str, Any], text: str) -> None:
    """Put ``text`` wherever a matrix holds free text or a path that reaches a page."""
    names = ("folder", "oldest_runtime", "baseline", "mode", "tier", "dataset", "reference")
    raw.update(dict.fromkeys(names, text), cases=[text, text + "2"], notes=[text], command=[text])
    raw.update(versions={text: text}, machine=raw["machine"] | {"cpu": text, "gpu": text})
    for r in raw["rows"]:
        r.update(dict.fromkeys(("runtime", "text", "version", "provider", "reason", "page"), text))
        r.update(reasons=[text, text + "2"], warnings=[text] * 3, notes=[text], session={text: text})
        for check in r["results"]:
            check.update(name=text, summary=text, looks_at=text)
            for m in check["measurements"]:
                m.update(title=text, unit=text, detail=text)
        for s in r["speed"]:
            s.update(case=text, reason=text)
    found = raw["bisection"]
    parts = [r["difference"] for r in raw["rows"]]
    if found:
        found.update(dict.fromkeys(("first", "last", "changed", "before", "after", "summary", "profiled"), text))
        found.update(tried=[text], profile=[p | {"operator": text} for p in found["profile"]])
        parts.append(found["difference"])
    for d in parts:
        if d:
            d.update(dict.fromkeys(("node", "operator", "scenario", "what", "reproduction"), text))
