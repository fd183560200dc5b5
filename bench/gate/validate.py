"""The gate: is this exported folder still the model? Named checks, each run once, and the verdict over them.

``llama-onnx validate``, ``pytest bench/``, ``llama-onnx compare --model`` and the catalogue of defects all judge by
:class:`Gate`. Exact checks run first and cost seconds; numbers follow. A check that raises has failed: a folder that
stops the runtime must not be shipped. Try: ``llama-onnx validate FOLDER --baseline demo --mode quick``.
"""

from __future__ import annotations

import datetime
import errno
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from bench.data.items import Dataset
from bench.data.loading import load_shipped
from bench.deployment import Deployment
from bench.digests import DigestError
from bench.errors import BenchError, MachineError
from bench.gate.baseline import Baseline
from bench.gate.checks.numeric import places_expected
from bench.gate.found import CheckSpec, Found, stopped
from bench.gate.localize import localize
from bench.gate.modes import MODES, Mode
from bench.gate.registry import BY_NAME, CHECKS, checks_of
from bench.gate.replay import other_items
from bench.gate.subject import Subject
from bench.machine.environment import machine, versions
from export.manifest import UserError, require_folder
from export.source import Source, resolve
from export.spec import METHODS, PRECISIONS, TARGETS
from reports.validation import CheckResult, Evidence, Place, Validation, decide_verdict
from runtime.errors import ProviderUnavailableError
from runtime.session import NOT_AS_ASKED
from runtime.trim import trim

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
OnResult = Callable[[CheckResult], None]
MOST_FINDINGS = 50


def chosen_checks(only: str | None) -> tuple[CheckSpec, ...]:
    """The checks asked for, in their own order; all of them for None.

    Raises:
        BenchError: a name that is no check.
    """
    if not only:
        return CHECKS
    names = [n.strip() for n in only.split(",") if n.strip()]
    strange = [n for n in names if n not in BY_NAME]
    if strange or not names:
        raise BenchError(f"no check named {', '.join(strange) or only!r}; see llama-onnx validate --list-checks")
    return tuple(c for c in CHECKS if c.name in names)


def mode_of(name: str) -> Mode:
    """A mode by its name.

    Raises:
        BenchError: there is none.
    """
    if name not in MODES:
        raise BenchError(f"unknown mode {name!r}; choose one of {', '.join(MODES)}")
    return MODES[name]


def expected(text: str | None) -> dict[str, str]:
    """``precision=fp16,target=ort`` as a mapping.

    Raises:
        BenchError: another key, or a value that no folder has.
    """
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


class Gate:
    """Runs checks over one subject, each once, in whatever order they are asked for.

    Args:
        subject: folder, baseline, mode and data.
        on_result: told each result as it comes.
    """

    def __init__(self, subject: Subject, on_result: OnResult = lambda _r: None) -> None:
        self.subject, self._on_result = subject, on_result
        self._done: dict[str, tuple[CheckResult, Found]] = {}
        self._stopped: list[str] = []
        self._started = time.perf_counter()
        self._created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    @cached_property
    def _digests(self) -> tuple[str, str]:
        """Of folder and baseline before anything is measured: what a certificate of this result may cover."""
        return self.subject.digest, self.subject.baseline.digest

    def result(self, spec: CheckSpec) -> CheckResult:
        """One check's result; run now if it was not before.

        Raises:
            ProviderUnavailableError: this machine cannot run the folder, which says nothing about the folder.
            BenchError: the data's fault, the user's, or a worker's, which says nothing about the folder either.
        """
        if spec.name not in self._done:
            _ = self._digests
            self.subject.tick(spec.name)
            self._done[spec.name] = _run(spec, self.subject)
            self.subject.observe()
            self._on_result(self._done[spec.name][0])
        return self._done[spec.name][0]

    @cached_property
    def specs(self) -> tuple[CheckSpec, ...]:
        """The whole set for a folder of this target."""
        return checks_of(self.subject.manifest.target if self._readable else "")

    @property
    def results(self) -> list[CheckResult]:
        """What was run so far, in the order of the set."""
        return [self._done[c.name][0] for c in CHECKS if c.name in self._done]

    def run(self, specs: Iterable[CheckSpec] = CHECKS) -> None:
        """Several checks in order. A folder that cannot even be read fails one of them, and the rest is not run.

        Checks that do not concern the folder's target are left out.

        Raises:
            UserError: as :meth:`result`, where nothing has failed before.
            BenchError: none of them concerns the folder.
        """
        asked = list(specs)
        concerned = [spec for spec in asked if not spec.target or spec in self.specs]
        if asked and not concerned:
            names = ", ".join(f"{spec.name} judges folders of --target {spec.target}" for spec in asked)
            raise BenchError(f"{names}; {self.subject.folder} is of another")
        for spec in concerned:
            try:
                self.result(spec)
            except UserError as error:
                if not self._failed:
                    raise
                self._stopped = [f"stopped at {spec.name}: {error}"]
                break
            if not self._readable:
                break
        if not self._readable and not self._failed:
            self.result(BY_NAME["manifest"])

    @property
    def _failed(self) -> bool:
        return any(r.status == "FAIL" for r in self.results)

    @property
    def _readable(self) -> bool:
        try:
            return self.subject.manifest is not None
        except Exception:
            return False

    def validation(self, place: bool = True, command: Sequence[str] = ()) -> Validation:
        """Everything that was run as a document.

        Args:
            place: whether to look for the layer where the folder leaves the baseline when the numbers failed.
            command: how to repeat it.
        """
        s = self.subject
        done = [self._done[c.name] for c in CHECKS if c.name in self._done]
        results = [r for r, _ in done]
        found, notes = self._place(results) if place else (None, [])
        verdict, reasons = decide_verdict(results)
        digest, baseline_digest = self._digests
        evidence = Evidence()
        for _, f in done:
            evidence = evidence.joined(f.evidence)
        terms = s.terms if self._readable else None
        return Validation(
            tool_version=versions().get("llama-onnx-bench", "unknown"),
            created_utc=self._created,
            command=list(command),
            folder=s.folder.resolve().name,
            folder_sha256=digest,
            baseline=f"{s.baseline.source.name} ({s.baseline.source.origin}), PyTorch fp32",
            baseline_sha256=baseline_digest,
            mode=s.mode.name,
            tier=terms.precision if terms else "unknown",
            activations=terms.activations if terms else "unknown",
            kv_dtype=terms.kv_dtype if terms else "unknown",
            dataset=s.dataset.name,
            dataset_sha256=s.dataset.sha256,
            settings=s.settings(),
            session=s.session,
            checks=[c.name for c in self.specs],
            results=results,
            evidence=evidence,
            examples=[e for _, f in done for e in f.examples],
            place=found,
            verdict=verdict,
            reasons=reasons,
            seconds=time.perf_counter() - self._started,
            machine=machine(),
            versions=versions(),
            notes=[*notes, *self._stopped, *self._notes(results, verdict)],
        )

    def _place(self, results: Sequence[CheckResult]) -> tuple[Place | None, list[str]]:
        """Where the numbers that failed leave the baseline, and a note where that is not known."""
        if not any(r.kind != "exact" and r.status == "FAIL" for r in results):
            return None, []
        self.subject.tick("localising")
        try:
            found = localize(self.subject)
        except Exception as e:
            return None, [f"localisation stopped: {type(e).__name__}: {str(e)[:200]}"]
        if found is None:
            return None, ["localisation: no layer leaves the baseline in one pass; look at decode, batches, tokenizer"]
        return found, []

    def _notes(self, results: Sequence[CheckResult], verdict: str) -> list[str]:
        s, notes = self.subject, []
        if s.resumed:
            notes.append(f"{s.resumed} windows and batches were finished by an earlier run that was stopped")
        if s.left_out:
            short = "folder's KV cache" if s.room < s.baseline.context else "baseline's context"
            notes.append(f"items left out, too long for the {short}: {s.left_out}")
        if any(r.kind == "numeric" and r.status == "INCONCLUSIVE" for r in results):
            notes.append("more text decides: --mode full, or your own with --dataset own+FILE.jsonl")
        if verdict == "PASS" and not s.mode.judges_tails:
            left = ", ".join(r.name for r in results if r.kind == "numeric" and r.status == "REPORTED")
            if left:
                notes.append(f"quick mode reports what so few samples leave open ({left}); standard mode judges it")
        for kind in NOT_AS_ASKED:
            if kind in s.session:
                notes.append(f"not run on {s.deployment.provider}{' alone' * (kind != 'fallback')}: {s.session[kind]}")
        if self._readable:
            if not s.ours:
                notes.append("not our fused export: attributes, weights by content and numbers were checked")
            open_ = [r.name for r in results if r.kind == "exact" and r.status in ("SKIPPED", "REPORTED")]
            if verdict == "PASS" and open_:
                notes.append(f"exact checks that could not judge this folder: {', '.join(open_)}")
        return notes


def _run(spec: CheckSpec, subject: Subject) -> tuple[CheckResult, Found]:
    """One check, timed; whatever it raises is its FAIL."""
    started = time.perf_counter()
    try:
        found = spec.run(subject)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as e:  # the runtime's or the graph's: all of them mean that it cannot be shipped so
        if isinstance(e, ProviderUnavailableError | BenchError) and not isinstance(e, DigestError):
            raise  # the machine's, the baseline's, the data's or the user's
        if isinstance(e, OSError) and e.errno in NO_ROOM:
            raise MachineError(f"{spec.name} could not be run: {e.strerror}; make room, then start again") from e
        said = (str(e).splitlines() or [""])[0].replace(f"{subject.folder.absolute()}/", "")  # no path of this machine
        text = f"{type(e).__name__}: {said[:240]}"
        found = stopped(spec.name, text)
    finally:
        trim()  # what one check needed is not kept beside the next one's
    result = CheckResult(
        name=spec.name,
        kind=spec.kind,
        status=found.status,
        looks_at=spec.looks_at,
        summary=found.summary,
        seconds=time.perf_counter() - started,
        findings=list(found.findings)[:MOST_FINDINGS],
        measurements=list(found.measurements),
        tasks=list(found.tasks),
        notes=list(found.notes),
    )
    return result, found


def validate(
    subject: Subject,
    specs: Sequence[CheckSpec] = CHECKS,
    place: bool = True,
    on_result: OnResult = lambda _r: None,
    command: Sequence[str] = (),
) -> Validation:
    """Checks in order, and what they come to; arguments as for :class:`Gate` and :meth:`Gate.validation`."""
    gate = Gate(subject, on_result)
    gate.run(specs)
    return gate.validation(place, command)


def thinned(document: Validation, subject: Subject) -> list[str]:
    """What of the evidence that folder, baseline and data demand a PASS does not hold, one sentence each.

    It could be cut out of a document and every result computed anew from the rest, where no replay sees it. No model is
    opened for it: tokenizer, configuration, manifest and, of a third-party export, the graphs are read.
    """
    if document.verdict != "PASS":
        return []
    e, terms = document.evidence, subject.terms
    whole = [c.name for c in checks_of(subject.manifest.target)]
    claims = {"tier": terms.precision, "activations": terms.activations, "kv_dtype": terms.kv_dtype}
    wrong = [f"{n}: says {have}, the folder is {v}" for n, v in claims.items() if (have := getattr(document, n)) != v]
    if [len(c.kld) for c in e.chunks] != [len(w) - 1 for w in subject.windows]:
        wrong.append(
            f"{document.tokens_scored:,} tokens in {len(e.chunks)} chunks, the data have {len(subject.windows)}"
        )
    wrong += other_items(document, subject.dataset)
    planned = {name: count for name, count in places_expected(subject).items() if count}
    held = {name: len(rows) for name, rows in e.places.items() if rows}
    wrong += [] if document.checks == whole else [f"checks: not the {len(whole)} of {subject.manifest.target} folders"]
    return wrong + [f"{n} looked at {held.get(n, 0)} places, not {c}" for n, c in planned.items() if held.get(n) != c]


def make_subject(
    folder: Path,
    model: str | Source,
    mode: Mode,
    dataset: Dataset | None = None,
    deployment: Deployment | None = None,
    *,
    memo_bytes: int = 0,
    status: Callable[[str], None] = lambda _s: None,
    keep: bool = False,
    workers: int = 1,
    expect: Mapping[str, str] | None = None,
    allow_pickle: bool = False,
    sms: tuple[int, ...] = (89,),
) -> Subject:
    """A subject from what a command line says.

    Args:
        folder: the exported folder.
        model: the baseline, as :func:`export.source.resolve` takes it, or what that gave.
        mode: how much is measured.
        dataset: None takes the project's own.
        deployment: how the folder runs; PyTorch gets as many threads.
        memo_bytes: see :class:`bench.gate.baseline.Baseline`.
        status: told what is fetched, and what is wrong with kept results.
        keep: whether the baseline's results are kept in (and taken from) the user's cache, and this folder's until the
            run has ended.
        workers: processes that share windows and generations, each with the deployment's threads.
        expect: see :func:`expected`.
        allow_pickle: see :func:`export.source.resolve`.
        sms: see :attr:`bench.gate.subject.Subject.sms`.

    Raises:
        ExportError: the baseline cannot be found.
        ManifestError: no such folder.
    """
    folder = folder.expanduser()
    require_folder(folder)
    deployment = deployment or Deployment()
    source = resolve(model, status=status, allow_pickle=allow_pickle) if isinstance(model, str) else model
    baseline = Baseline(source, deployment.threads, memo_bytes, keep=keep, say=status, device=deployment.device)
    data = dataset or load_shipped()
    return Subject(folder, baseline, mode, data, deployment, workers=workers, say=status, expect=expect or {}, sms=sms)
