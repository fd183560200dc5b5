"""``llama-onnx validate``: is this exported folder still the model? Named checks, a verdict, and why.

Exact checks run first and cost seconds; numbers follow. A check that raises has failed: a folder that stops the
runtime is no folder to ship. Try: ``llama-onnx validate FOLDER --baseline demo --mode quick``.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.gate.registry import BY_NAME, CHECKS
from bench.gate.subject import MODES, CheckSpec, Found, Mode, Subject
from reports.validation import CheckResult, Finding, Validation, decide_verdict
from runtime.errors import ProviderUnavailableError
from runtime.trim import trim

if TYPE_CHECKING:
    from bench.data.loading import Dataset

OnResult = Callable[[CheckResult], None]


def chosen_checks(only: str | None, mode: str) -> tuple[tuple[CheckSpec, ...], Mode]:
    """The checks asked for, in their own order.

    Raises:
        BenchError: a name that is no check, or no mode.
    """
    if mode not in MODES:
        raise BenchError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
    if not only:
        return CHECKS, MODES[mode]
    names = [n.strip() for n in only.split(",") if n.strip()]
    strange = [n for n in names if n not in BY_NAME]
    if strange or not names:
        raise BenchError(f"no check named {', '.join(strange) or only!r}; see llama-onnx validate --list-checks")
    return tuple(c for c in CHECKS if c.name in names), MODES[mode]


def expected(text: str | None) -> dict[str, str]:
    """``precision=fp16,target=ort`` as a mapping.

    Raises:
        BenchError: another key, or a value that no folder has.
    """
    from export.spec import METHODS, PRECISIONS, TARGETS

    known = {"precision": PRECISIONS, "target": TARGETS, "method": METHODS}
    found: dict[str, str] = {}
    for part in (text or "").split(","):
        key, _, value = (x.strip() for x in part.partition("="))
        if not part.strip():
            continue
        if value not in known.get(key, ()):
            choices = "; ".join(f"{k}={'|'.join(v)}" for k, v in known.items())
            raise BenchError(f"--expect {part.strip()!r} cannot be met by any folder; choose of {choices}")
        found[key] = value
    return found


def run_check(spec: CheckSpec, subject: Subject) -> tuple[CheckResult, Found]:
    """One check, timed; whatever it raises is its FAIL.

    Raises:
        ProviderUnavailableError: this machine cannot run the folder, which says nothing about the folder.
    """
    started = time.perf_counter()
    try:
        found = spec.run(subject)
    except (KeyboardInterrupt, MemoryError, ProviderUnavailableError):
        raise
    except Exception as e:  # the runtime's, the graph's or the data's: all of them mean that it cannot be shipped so
        text = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:240]}"
        found = Found("FAIL", f"stopped: {text}", [Finding(where=spec.name, what=f"stopped: {text}")])
    finally:
        trim()  # what one check needed is not kept beside the next one's
    return (
        CheckResult(
            name=spec.name,
            kind=spec.kind,
            status=found.status,
            figure=found.figure,
            seconds=time.perf_counter() - started,
            findings=list(found.findings)[:50],
            figures=list(found.figures),
            tasks=list(found.tasks),
            notes=list(found.notes),
        ),
        found,
    )


def run_checks(
    subject: Subject, specs: Iterable[CheckSpec], on_result: OnResult = lambda _r: None
) -> list[tuple[CheckResult, Found]]:
    """The checks in order. A folder that cannot even be read fails the first one, and the rest is not run."""
    done: list[tuple[CheckResult, Found]] = []
    for spec in specs:
        subject.tick(spec.name)
        done.append(run_check(spec, subject))
        on_result(done[-1][0])
        if not _readable(subject):
            break
    return done


def _readable(subject: Subject) -> bool:
    try:
        return subject.manifest is not None
    except Exception:
        return False


def validate(
    subject: Subject,
    specs: Sequence[CheckSpec] = CHECKS,
    localize: bool = True,
    on_result: OnResult = lambda _r: None,
) -> Validation:
    """Everything, in order; localisation on a FAIL of the numbers.

    Args:
        subject: folder, baseline, mode and data.
        specs: which checks.
        localize: whether to look for the place.
        on_result: told each result as it comes.
    """
    from bench.machine.environment import machine, versions

    started = time.perf_counter()
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    # Before anything is measured: what a certificate of this result may cover.
    digest, baseline_digest = subject.digest, subject.baseline.digest
    done = run_checks(subject, specs, on_result)
    results = [r for r, _ in done]
    place = None
    notes: list[str] = []
    if localize and any(r.kind != "exact" and r.status == "FAIL" for r in results):
        from bench.gate.localize import localize as find_place

        subject.tick("localising")
        try:
            place = find_place(subject)
            if place is None:
                notes.append(
                    "localisation: no layer leaves the baseline in one pass; look at decode, batches, tokenizer"
                )
        except Exception as e:
            notes.append(f"localisation stopped: {type(e).__name__}: {str(e)[:200]}")
    if subject.resumed:
        notes.append(f"{subject.resumed} windows and batches were finished by an earlier run that was stopped")
    verdict, reasons = decide_verdict(results)
    if any(r.kind == "numeric" and r.status == "INCONCLUSIVE" for r in results):
        notes.append("more text decides: put your own beside the project's with --dataset own+FILE.jsonl")
    if verdict == "PASS" and not subject.mode.judges_tails:
        notes.append("quick mode: tails and top-1 are reported, standard mode judges them")
    if not subject.__dict__.get("manifest"):
        tier = "unknown"
    else:
        tier = subject.manifest.precision
        if not subject.ours:
            notes.append("not a fused folder of ours: attributes, weights by content and numbers were checked")
        open_ = [r.name for r in results if r.kind == "exact" and r.status in ("SKIPPED", "REPORTED")]
        if verdict == "PASS" and open_:
            notes.append(f"exact checks that could not judge this folder: {', '.join(open_)}")
    return Validation(
        created_utc=created,
        folder=subject.folder.resolve().name,
        folder_sha256=digest,
        baseline=f"{subject.baseline.source.name} ({subject.baseline.source.origin}), PyTorch fp32",
        baseline_sha256=baseline_digest,
        mode=subject.mode.name,
        tier=tier,
        dataset=f"{subject.dataset.name} (SHA-256 {subject.dataset.sha256[:16]})",
        settings={
            "provider": subject.provider,
            "threads": subject.threads,
            "window": subject.mode.window,
            "windows": subject.mode.windows,
            "items": subject.mode.items,
            "workers": subject.workers,
            **{f"expected {key}": value for key, value in subject.expect.items()},
        },
        results=results,
        examples=[e for _, f in done for e in f.examples],
        place=place,
        verdict=verdict,
        reasons=reasons,
        seconds=time.perf_counter() - started,
        machine=machine(),
        versions=versions(),
        notes=notes,
    )


def make_subject(
    folder: Path,
    model: str,
    mode: Mode,
    dataset: Dataset | None = None,
    threads: int | None = None,
    memo_bytes: int = 0,
    status: Callable[[str], None] = lambda _s: None,
    keep: bool = False,
    workers: int = 1,
    expect: str | None = None,
) -> Subject:
    """A subject from what the command line says.

    Args:
        folder: the exported folder.
        model: the baseline, as :func:`export.source.resolve` takes it.
        mode: quick or standard.
        dataset: None takes the project's own.
        threads: CPU threads of both sides.
        memo_bytes: see :class:`bench.gate.baseline.Baseline`.
        status: told what is fetched, and what is wrong with kept results.
        keep: whether the baseline's results are kept in (and taken from) the user's cache, and this folder's until the
            run has ended.
        workers: processes that share windows and generations, ``threads`` each.
        expect: ``KEY=VALUE,...``, see :func:`expected`.

    Raises:
        BenchError: an expectation that is none.
        ExportError: the baseline cannot be found.
        ManifestError: no such folder.
    """
    import os

    from bench.data.loading import load_shipped
    from bench.gate.baseline import Baseline
    from export.manifest import ManifestError
    from export.source import resolve

    folder = folder.expanduser()
    if not folder.is_dir():
        raise ManifestError(f"no exported folder at {folder}; make one with: llama-onnx export MODEL {folder}")
    threads = threads or len(os.sched_getaffinity(0))
    source = resolve(model, status=status)
    baseline = Baseline(source, threads, memo_bytes, keep=keep, say=status)
    data = dataset or load_shipped()
    wanted = expected(expect)
    return Subject(folder, baseline, mode, data, threads=threads, workers=workers, say=status, expect=wanted)
