"""One run of the suite: what is under test, the gate over it, what is measured of it, and the record of both.

The pytest fixtures in ``bench/conftest.py`` are thin shells around this class. Everything heavy is made on first use.
"""

from __future__ import annotations

import datetime
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bench.data.items import Dataset
from bench.data.loading import load_dataset
from bench.deployment import Deployment
from bench.exported import exported_folder
from bench.gate.found import CheckSpec
from bench.gate.modes import MODES, SEED
from bench.gate.subject import Subject
from bench.gate.validate import Gate, expected, make_subject
from bench.latency.workload import PROFILES, Profile, choose_profile
from bench.machine.environment import machine, versions
from bench.progress import progress as progress_bar
from bench.suite.measuring import Measuring, Progress
from export.manifest import Manifest
from export.source import Source, resolve
from reports.record import ModelFacts, Outcome, RunRecord
from reports.validation import CheckResult

SUITE = (str(Path(__file__).parents[1]), "--import-mode=importlib", "-p", "no:cacheprovider")
"""What ``llama-onnx bench`` puts before the user's own options."""


def command_line(arguments: Sequence[str]) -> list[str]:
    """How to repeat a run, as the user typed it: without the path of this installation."""
    if tuple(arguments[: len(SUITE)]) == SUITE:
        return ["llama-onnx", "bench", *arguments[len(SUITE) :]]
    return ["pytest", *arguments]


@dataclass
class Run:
    """State of one run; its options are :func:`bench.suite.options.add_options`', parsed."""

    options: Namespace
    progress: Progress = progress_bar
    command: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    outcomes: list[Outcome] = field(default_factory=list)
    stopped: bool = False
    """Whether a check could not be run for a reason that says nothing about the folder."""

    # -- what is under test -------------------------------------------------------------------------------------------

    @cached_property
    def deployment(self) -> Deployment:
        """Provider, threads and options; ``auto`` is CUDA where a GPU is there and the CPU elsewhere."""
        return Deployment.of(self.options)

    @cached_property
    def dataset(self) -> Dataset:
        """The user's dataset or the project's."""
        return load_dataset(self.options.dataset)

    @cached_property
    def source(self) -> Source:
        """The baseline's checkpoint."""
        with self.progress("model", 1) as bar:
            return resolve(self.options.model, status=bar.say, allow_pickle=self.options.allow_pickle)

    @cached_property
    def folder(self) -> Path:
        """The exported folder under test: the user's own, or made (and kept) in the cache."""
        o, device = self.options, self.deployment.device
        if o.exported:
            return Path(o.exported).expanduser()
        precision = o.precision if o.precision != "auto" else "fp32" if device == "cpu" else "fp16"
        with self.progress("export", None) as bar:
            return exported_folder(
                self.source, o.model, precision, device, o.target, o.method, self.dataset.calibration, bar.say
            )

    @cached_property
    def subject(self) -> Subject:
        """The folder beside its baseline, as the gate takes it."""
        mode = MODES[PROFILES[self.options.profile].mode]
        o = self.options
        asked = {"precision": o.precision, "target": o.target, "method": o.method}
        expect = {k: v for k, v in asked.items() if v not in (None, "auto")}
        return make_subject(
            self.folder,
            self.source,
            mode,
            self.dataset,
            self.deployment,
            keep=True,
            workers=o.workers,
            expect=expected(",".join(f"{k}={v}" for k, v in expect.items())),
        )

    @property
    def manifest(self) -> Manifest:
        """The exported folder's manifest."""
        return self.subject.manifest

    @cached_property
    def profile(self) -> Profile:
        """The profile with the user's sizes, cut to the model's context."""
        o = self.options
        return choose_profile(o.profile, o.batch_sizes, o.prompt_lengths, o.new_tokens, self.manifest.longest_row)

    # -- its two parts ------------------------------------------------------------------------------------------------

    @cached_property
    def gate(self) -> Gate:
        """Is it the same model?"""
        return Gate(self.subject)

    @cached_property
    def measuring(self) -> Measuring:
        """How fast is it, and how much memory does it take?"""
        return Measuring(self.subject, self.profile, self.options.peers, self.options.gguf, self.progress)

    @property
    def anything(self) -> bool:
        """Whether there is something to report."""
        m = self.measuring
        return bool(self.gate.results or m.series or m.memory or m.loads)

    def check(self, spec: CheckSpec) -> CheckResult:
        """One check of the gate, with a progress bar."""
        with self.progress(f"gate, {spec.name}", None) as bar:
            self.subject.tick, self.subject.progress = bar.say, bar.at
            return self.gate.result(spec)

    def close_gate(self) -> None:
        """Free the gate's models before anything is timed."""
        self.subject.close()
        self.subject.baseline.close()

    def close(self) -> None:
        """Free everything."""
        self.close_gate()
        self.measuring.close()
        self.subject.finish()

    # -- the record ---------------------------------------------------------------------------------------------------

    def record(self) -> RunRecord:
        """Everything so far, as one record."""
        manifest, p, m = self.manifest, self.profile, self.measuring
        validation = self.gate.validation(command=self.command) if self.gate.results else None
        skipped = [f"peer {label} skipped: {why}" for label, why in m.peers.skipped.items()]
        return RunRecord(
            tool_version=versions().get("llama-onnx-bench", "unknown"),
            created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            duration_s=time.time() - self.started,
            command=self.command,
            profile=p.name,
            seed=SEED,
            settings={
                **self.deployment.settings(),
                "precision": manifest.precision,
                "batch_sizes": list(p.batch_sizes),
                "prompt_lengths": list(p.prompt_lengths),
                **({"prefill_lengths": list(p.prefill_lengths)} if p.prefill_lengths else {}),
                "new_tokens": p.new_tokens,
                "rounds": p.rounds,
                "mode": p.mode,
                "dataset": self.dataset.name,
            },
            model=ModelFacts(
                name=manifest.model_name,
                origin=manifest.weights_origin,
                random_weights="random" in manifest.weights_origin,
                parameters=manifest.parameters,
                precision=manifest.precision,
                target=manifest.target,
                context_length=manifest.context_length,
                weights_sha256=manifest.weights_sha256,
                folder_bytes=sum(f.size for f in manifest.files.values()),
                node_count=manifest.node_count,
                fused_ops=manifest.fused_ops,
                spec_digest=manifest.spec_digest,
            ),
            machine=machine(),
            versions=versions(),
            sides=m.sides(),
            series=m.series,
            loads=m.loads,
            memory=m.memory,
            floor=m.floor,
            prefill_floor=m.prefill_floor,
            validation=validation,
            outcomes=self.outcomes,
            warnings=skipped,
        )
