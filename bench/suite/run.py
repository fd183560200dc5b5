"""One run of the suite: resolves the model, opens sessions when first needed, collects results, makes the record.

The pytest fixtures in ``bench/conftest.py`` are thin shells around this class, so that the command line, the tests
and a notebook can use it as well.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from bench.data.loading import Dataset, load_dataset, load_shipped
from bench.gate.old_gate import GateInputs, run_gate, text_windows, ticks_of
from bench.gate.statistics import TIERS
from bench.latency.interleave import interleave, load_times, peak_memory
from bench.latency.workload import PROFILES, Profile, choose_profile, latency_prompts
from bench.machine.bandwidth import CpuBandwidth, CudaBandwidth
from bench.machine.environment import machine, versions
from bench.peers.choice import LLAMA_CPP, TITLES, Peers, choose
from bench.peers.choice import opener as peer_opener
from bench.peers.optimum_ort import LABEL as OPTIMUM
from bench.peers.parity import PeerParity, peer_parity
from bench.peers.table import PARITY
from export.cache import cache_dir
from export.manifest import Manifest
from reports.record import (
    Case,
    Figure,
    Floor,
    Load,
    Memory,
    ModelFacts,
    Outcome,
    Parity,
    RunRecord,
    Series,
    Side,
)
from runtime.session import Session

SEED = 20_261_124
SUITE = (str(Path(__file__).parents[1]), "--import-mode=importlib", "-p", "no:cacheprovider")
"""What ``llama-onnx bench`` puts before the user's own options."""
Ticker = Callable[[str], None]


def command_line(arguments: Sequence[str]) -> list[str]:
    """How to repeat a run, as the user typed it: without the path of this installation."""
    if tuple(arguments[: len(SUITE)]) == SUITE:
        return ["llama-onnx", "bench", *arguments[len(SUITE) :]]
    return ["pytest", *arguments]


KIND = {"GroupQueryAttention": "fused", "Attention": "standard operators", "unfused": "plain"}


@dataclass(frozen=True)
class Options:
    """What the user asked for; see ``pytest bench/ --help``, group "llama-onnx"."""

    model: str = "demo"
    exported: Path | None = None
    provider: str = "auto"
    precision: str = "auto"
    target: str = "auto"
    method: str | None = None
    profile: str = "standard"
    batch_sizes: tuple[int, ...] = ()
    prompt_lengths: tuple[int, ...] = ()
    new_tokens: int | None = None
    dataset: str | Path | None = None
    threads: int | None = None
    peers: bool = False
    gguf: Path | None = None
    out: Path = Path("reports/out")


@contextmanager
def _no_progress(_title: str, _total: int) -> Iterator[Ticker]:
    yield lambda _message: None


@dataclass
class Run:
    """State of one run. Everything heavy is made on first use."""

    options: Options
    progress: Callable[[str, int], Any] = _no_progress
    started: float = field(default_factory=time.time)
    series: list[Series] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    floor: Floor | None = None
    parity: Parity | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    peer_parities: dict[str, PeerParity] = field(default_factory=dict)
    _sessions: dict[str, Session] = field(default_factory=dict)

    # -- what is run ------------------------------------------------------------------------------------------------

    @cached_property
    def provider(self) -> str:
        """The provider asked for, or with ``auto`` CUDA where a GPU is there and the CPU elsewhere."""
        from runtime.providers import auto_provider, require

        name = auto_provider() if self.options.provider == "auto" else self.options.provider
        require(name, None)
        return name

    @property
    def device(self) -> str:
        """Where PyTorch runs beside it."""
        return "cpu" if self.provider == "cpu" else "cuda"

    @cached_property
    def precision(self) -> str:
        """The precision asked for, the exported folder's, or with ``auto`` fp32 on the CPU and fp16 on a GPU."""
        if self.options.exported:
            return self.manifest.precision
        if self.options.precision != "auto":
            return self.options.precision
        return "fp32" if self.device == "cpu" else "fp16"

    @property
    def threads(self) -> int:
        """CPU threads of every side."""
        return self.options.threads or len(os.sched_getaffinity(0))

    @cached_property
    def checkpoint(self) -> Path:
        """Folder of the baseline's checkpoint."""
        folder: Path = self._source.folder
        return folder

    @cached_property
    def _source(self) -> Any:
        from export.source import resolve

        with self.progress("model", 1) as tick:
            return resolve(self.options.model, status=tick)

    @cached_property
    def folder(self) -> Path:
        """The exported folder under test: the user's own, or made (and kept) in the cache."""
        if self.options.exported:
            return self.options.exported.expanduser()
        from export.pipeline import export_model, load_config
        from export.spec import ExportSpec

        target = self.options.target
        if target == "auto":
            target = "ort" if load_config(self._source).model_type == "llama" else "plain"
        spec = ExportSpec(
            self.options.model,
            self.precision,
            target,
            method=self.options.method,
            provider="cuda" if self.device == "cuda" and target == "ort" else "any",
        )
        key = hashlib.sha256((spec.digest + self._source.content_key).encode()).hexdigest()[:12]
        path = cache_dir() / "exports" / f"{self._source.name.replace('/', '--')}-{self.precision}-{key}"
        texts = self.dataset.calibration() if spec.method == "gptq" else ()
        with self.progress("export", 100) as tick:
            export_model(spec, path, source=self._source, calibration=texts, status=tick)
        return path

    def _digests(self) -> dict[str, str]:
        """What a certificate of this run is held against."""
        from bench.certificate.statement import (
            CertificateError,
            baseline_digest,
            folder_digest,
            hash_baseline,
            hash_folder,
        )

        try:
            return {
                "folder_sha256": folder_digest(hash_folder(self.folder)),
                "baseline_sha256": baseline_digest(hash_baseline(self.checkpoint)),
            }
        except (CertificateError, OSError):
            return {}  # a hub cache's folder of links

    @cached_property
    def manifest(self) -> Manifest:
        """The exported folder's manifest."""
        from runtime.loading import read_folder

        return read_folder(self.folder)

    @cached_property
    def profile(self) -> Profile:
        """The profile with the user's sizes, cut to the model's context."""
        o = self.options
        return choose_profile(o.profile, o.batch_sizes, o.prompt_lengths, o.new_tokens, self.manifest.context_length)

    @cached_property
    def dataset(self) -> Dataset:
        """The user's dataset or the project's."""
        return load_dataset(self.options.dataset)

    @cached_property
    def tokenizer(self) -> Any:
        """The exported folder's tokenizer.

        Raises:
            SessionError: the folder has none.
        """
        from runtime.text import load_tokenizer

        return load_tokenizer(self.folder)

    # -- sides ------------------------------------------------------------------------------------------------------

    @property
    def candidate(self) -> str:
        """Label of the side under test."""
        return f"onnxruntime-{self.provider}"

    @property
    def baseline(self) -> str:
        """Label of the PyTorch side."""
        return f"pytorch-{self.device}"

    def labels(self, case: Case | None = None) -> list[str]:
        """Sides that take part, in a case or at all."""
        peers = PROFILES[self.options.profile].peers
        optimum = self.device == "cpu" and self._is_headline and peers != "none"
        if case is not None and peers == "headline" and case != self.profile.cases()[0]:
            optimum = False
        wanted = self.options.peers and case is not None and case == self.profile.cases()[0]
        more = [p for p in self.peers.labels if p != LLAMA_CPP or self.profile.batch_sizes[0] == 1] if wanted else []
        return [self.candidate, self.baseline] + ([OPTIMUM] if optimum else []) + more

    @cached_property
    def peers(self) -> Peers:
        """Further peers of the headline case (``--peers``); those that cannot take part are a warning each."""
        if not self.options.peers:
            return Peers((), {})
        found = choose(self.device, self.manifest.attention, self.options.gguf)
        if LLAMA_CPP in found.labels and self.profile.batch_sizes[0] != 1:
            found.skipped[LLAMA_CPP] = "it is measured at batch 1 only"
        self.warnings += [f"peer {label} skipped: {why}" for label, why in found.skipped.items()]
        return found

    @property
    def _is_headline(self) -> bool:
        """Whether the project's own figures are about this run: the fused graph in fp32."""
        return self.precision == "fp32" and self.manifest.attention == "GroupQueryAttention"

    def _plain(self) -> Path:
        from bench.peers.optimum_ort import plain_export

        key = self._source.content_key[:12]
        with self.progress("optimum's plain export, once", 1) as tick:
            tick("optimum export (about a minute)")
            return plain_export(
                self.checkpoint, cache_dir() / "plain" / f"{self._source.name.replace('/', '--')}-{key}"
            )

    def opener(self, label: str) -> Callable[[], Session]:
        """How to load a side; files are resolved now, so that calling it is loading alone."""
        if label == self.candidate:
            from runtime.loading import load

            folder, more = self.folder, {**self._engines()}
            return lambda: load(folder, self.provider, self.threads, verify=False, **more)
        if label == self.baseline:
            from runtime.torch_session import TorchSession

            checkpoint = self.checkpoint
            return lambda: TorchSession(checkpoint, self.manifest.activations, self.device, threads=self.threads)
        if label in TITLES:
            return peer_opener(
                label,
                checkpoint=self.checkpoint,
                folder=self.folder,
                precision=self.manifest.activations,
                device=self.device,
                threads=self.threads,
                gguf=self.options.gguf,
                info=lambda: self.session(self.candidate).info,
            )
        from bench.peers.optimum_ort import OptimumSession

        plain = self._plain()
        return lambda: OptimumSession(plain, self.threads)

    def _engines(self) -> dict[str, Any]:
        """What TensorRT needs to know before it opens a graph: the run's shapes, and where engines are kept."""
        if not self.provider.startswith("tensorrt"):
            return {}
        from runtime.tensorrt import Shapes

        p, context = self.profile, self.manifest.context_length
        shapes = Shapes.of_workload(p.batch_sizes, (*p.prompt_lengths, p.window), p.new_tokens, context)
        return {"shapes": shapes, "engine_home": cache_dir()}

    def session(self, label: str) -> Session:
        """The loaded side; loaded on first use and kept."""
        if label not in self._sessions:
            self._sessions[label] = self.opener(label)()
        return self._sessions[label]

    def close(self) -> None:
        """Free every session."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    # -- measurements -----------------------------------------------------------------------------------------------

    def series_of(self, case: Case, label: str) -> Series:
        """One side's rounds of a case; the whole case is measured on first use, all sides interleaved."""
        if not any(s.case == case for s in self.series):
            self._measure(case)
        return next(s for s in self.series if s.case == case and s.side == label)

    def _measure(self, case: Case) -> None:
        headline = case == self.profile.cases()[0]
        rounds = self.profile.rounds if headline else self.profile.more_rounds
        sides = {label: self.session(label) for label in self.labels(case)}
        ids: list[int] = []
        for text in self.dataset.prose() or load_shipped().prose():
            ids += self.tokenizer(text)["input_ids"]
        samples: list[float] = []
        bandwidth = self._bandwidth() if headline else None
        with self.progress(f"latency, {case.label}", len(sides) * (rounds + 1)) as tick:
            self.series += interleave(
                sides,
                ids,
                case,
                rounds,
                self.profile.warmup_cap,
                tick,
                (lambda: samples.append(bandwidth())) if bandwidth else None,
            )
        if self.options.peers and headline:
            prompts = latency_prompts(ids, case, 0)
            for label in self.labels(case):
                if label not in (self.candidate, self.baseline):
                    side, baseline = sides[label], sides[self.baseline]
                    self.peer_parities[label] = peer_parity(side, baseline, prompts, case.new_tokens)
        if bandwidth:
            self.floor = Floor(
                method=bandwidth.method,
                bandwidth_samples=samples,
                weight_bytes=self.manifest.decode_weight_bytes,
                kv_bytes_per_token=self.manifest.kv.bytes_per_token(),
            )

    def _bandwidth(self) -> CpuBandwidth | CudaBandwidth:
        return CudaBandwidth() if self.device == "cuda" else CpuBandwidth(self.threads)

    def load_of(self, label: str) -> Load:
        """Load times of a side; all sides are measured on first use."""
        if not self.loads:
            openers = {name: self.opener(name) for name in self.labels()}
            with self.progress("load", len(openers) * self.profile.loads) as tick:
                self.loads = load_times(openers, self.profile.loads, tick)
        return next(x for x in self.loads if x.side == label)

    def memory_of(self, label: str) -> Memory:
        """Peak memory of a side in a process of its own, on the headline case."""
        found = next((m for m in self.memory if m.side == label), None)
        if found is None:
            kinds = {self.candidate: "onnxruntime", self.baseline: "pytorch", OPTIMUM: "optimum"}
            paths = {self.candidate: self.folder, self.baseline: self.checkpoint}
            arguments: dict[str, str | int | None] = {
                "kind": kinds[label],
                "path": str(paths.get(label) or self._plain()),
                "precision": self.manifest.activations,
                "provider": self.provider if label == self.candidate else self.device,
                "threads": self.threads,
            }
            with self.progress("memory", 1) as tick:
                tick(f"{label}: peak memory in a process of its own")
                found = peak_memory(label, self.profile.cases()[0], arguments)
            self.memory.append(found)
        return found

    def gate(self) -> Parity:
        """The parity report; computed on first use."""
        if self.parity is None:
            from runtime.torch_session import TorchSession

            def null_control() -> Session:
                return TorchSession(self.checkpoint, self.manifest.activations, self.device, "eager", self.threads)

            if self.manifest.activations == "fp32":
                baseline = self.session(self.baseline)
            else:
                baseline = TorchSession(self.checkpoint, "fp32", self.device, threads=self.threads)
            inputs = GateInputs(
                candidate=self.session(self.candidate),
                baseline=baseline,
                # GPT-Neo has one attention kernel only: the baseline against itself would show nothing.
                null=None if baseline.info.details.get("attention") == "eager" else null_control,
                tokenizer=self.tokenizer,
                eos=self.manifest.eos_token_ids,
                dataset=self.dataset,
                profile=self.profile,
                tier=TIERS[self.precision],
                seed=SEED,
            )
            windows = len(text_windows(self.dataset, self.tokenizer, self.profile))
            with self.progress("parity", ticks_of(self.dataset, windows, self.profile)) as tick:
                self.parity = run_gate(inputs, tick)
            if baseline is not self._sessions.get(self.baseline):
                baseline.close()
        return self.parity

    # -- the record -------------------------------------------------------------------------------------------------

    def figures(self) -> list[Figure]:
        """The project's figures on the headline case, as far as this run measured them (fp32, CPU)."""
        if not self.series or self.device != "cpu" or not self._is_headline:
            return []
        case = self.profile.cases()[0]
        found = {s.side: s for s in self.series if s.case == case}
        ours, theirs = found.get(self.candidate), found.get(self.baseline)
        if ours is None or theirs is None:
            return []

        def ratio(metric: str, other: Series) -> float:
            # Rounds of equal index ran back to back: the median of their ratios is what drift disturbs least.
            pairs = zip(ours.rounds, other.rounds, strict=True)
            ratios: list[float] = [getattr(a, metric) / getattr(b, metric) for a, b in pairs]
            return median(ratios)

        rows = [("decode against PyTorch eager", ratio("tpot_s", theirs), 0.45)]
        if OPTIMUM in found:
            rows.append(("decode against optimum", ratio("tpot_s", found[OPTIMUM]), 0.80))
        if self.floor:
            context = case.prompt + case.new_tokens / 2
            moved = self.floor.weight_bytes + case.batch * context * self.floor.kv_bytes_per_token
            multiples = [
                (r.tpot_s or 0.0) * bandwidth / moved
                for r, bandwidth in zip(ours.rounds, self.floor.bandwidth_samples, strict=True)
            ]
            rows.append(("decode over the memory floor", median(multiples), 1.35))
        rows.append(("prefill against PyTorch eager", ratio("ttft_s", theirs), 0.75))
        return [Figure(name=n, value=v, limit=limit, unit="x", better="lower") for n, v, limit in rows]

    def record(self) -> RunRecord:
        """Everything so far, as one record."""
        manifest = self.manifest
        sides = []
        titles = {
            self.candidate: ("candidate", f"ONNX Runtime ({self.provider}), {KIND[manifest.attention]}"),
            self.baseline: ("baseline", f"PyTorch eager ({self.device})"),
            OPTIMUM: ("peer", "optimum, plain export"),
            **{label: ("peer", title) for label, title in TITLES.items()},
        }
        for label in dict.fromkeys([*(s.side for s in self.series), *self._sessions]):
            session = self._sessions.get(label)
            role, title = titles[label]
            details = dict(session.info.details) if session else {}
            if label in self.peer_parities:
                details[PARITY] = self.peer_parities[label].describe()
            sides.append(Side(label=label, role=role, title=title, details=details))  # type: ignore[arg-type]
        p = self.profile
        return RunRecord(
            schema_version=1,
            tool_version=versions().get("llama-onnx-bench", "unknown"),
            created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            duration_s=time.time() - self.started,
            command=self.command,
            profile=p.name,
            seed=SEED,
            settings={
                "provider": self.provider,
                "precision": self.precision,
                "threads": self.threads,
                "batch_sizes": list(p.batch_sizes),
                "prompt_lengths": list(p.prompt_lengths),
                "new_tokens": p.new_tokens,
                "rounds": p.rounds,
                "window": p.window,
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
                **self._digests(),
            ),
            machine=machine(),
            versions=versions(),
            sides=sides,
            series=self.series,
            loads=self.loads,
            memory=self.memory,
            floor=self.floor,
            parity=self.parity,
            figures=self.figures(),
            outcomes=self.outcomes,
            warnings=self.warnings,
        )
