"""Latency, load time and memory of every side of a run, each measured when it is first asked for.

Try: ``pytest bench/ --profile smoke -k decode``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bench.data.loading import load_shipped
from bench.gate.subject import Subject
from bench.latency.interleave import interleave, load_times, peak_memory
from bench.latency.prefill_floor import PrefillFloorMeter
from bench.latency.workload import Profile, latency_prompts
from bench.machine.bandwidth import CpuBandwidth, CudaBandwidth
from bench.peers.choice import TITLES, Peers, choose
from bench.peers.choice import opener as peer_opener
from bench.peers.llama_cpp import LABEL as LLAMA_CPP
from bench.peers.optimum_ort import LABEL as OPTIMUM
from bench.peers.optimum_ort import OptimumSession, plain_export
from bench.peers.parity import PeerParity, peer_parity
from bench.peers.table import PARITY
from bench.progress import Bar
from bench.progress import progress as progress_bar
from export.cache import cache_dir
from reports.record import Case, Floor, Load, Memory, PrefillFloor, Series, Side
from runtime.session import Session
from runtime.settings import SessionSettings
from runtime.tensorrt import Shapes
from runtime.torch_session import TorchSession

Progress = Callable[[str, int | None], AbstractContextManager[Bar]]
KIND = {"GroupQueryAttention": "fused", "Attention": "standard operators", "unfused": "plain"}


@dataclass
class Measuring:
    """The sides of one run, and what was measured of them so far.

    Args:
        subject: the folder under test beside its baseline.
        profile: how much is measured.
        peers_asked: whether further peers take part in the headline case, with ``gguf`` for llama.cpp.
        progress: opens a progress bar.
    """

    subject: Subject
    profile: Profile
    peers_asked: bool = False
    gguf: Path | None = None
    progress: Progress = progress_bar
    series: list[Series] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    floor: Floor | None = None
    prefill_floor: PrefillFloor | None = None
    peer_parities: dict[str, PeerParity] = field(default_factory=dict)
    _sessions: dict[str, Session] = field(default_factory=dict)

    # -- sides ------------------------------------------------------------------------------------------------------

    @property
    def candidate(self) -> str:
        """Label of the side under test."""
        return f"onnxruntime-{self.subject.deployment.provider}"

    @property
    def baseline(self) -> str:
        """Label of the PyTorch side."""
        return f"pytorch-{self.subject.deployment.device}"

    @property
    def headline(self) -> Case:
        """The case that memory, floor and peers are about."""
        return self.profile.cases()[0]

    def labels(self, case: Case | None = None) -> list[str]:
        """Sides that take part, in a case or at all."""
        optimum = self._asks_for_optimum(case) and OPTIMUM not in self.peers.skipped
        more = self.peers.labels if case == self.headline else ()
        return [self.candidate, self.baseline, *([OPTIMUM] if optimum else []), *more]

    def _asks_for_optimum(self, case: Case | None) -> bool:
        m = self.subject.manifest
        fused = m.precision == "fp32" and m.attention == "GroupQueryAttention"
        wanted = {"none": False, "headline": case in (None, self.headline), "all": True}[self.profile.peers]
        return wanted and fused and self.subject.deployment.device == "cpu"

    @cached_property
    def peers(self) -> Peers:
        """Further peers of the headline case (``--peers``), and why others, optimum too, cannot take part."""
        from export.optimum_adapter import missing_optimum  # transformers

        why = missing_optimum("this peer") if self._asks_for_optimum(None) else ""
        without = {OPTIMUM: why} if why else {}
        if not self.peers_asked:
            return Peers((), without)
        found = choose(self.subject.deployment.device, self.subject.manifest.attention, self.gguf)
        found = Peers(found.labels, {**without, **found.skipped})
        if LLAMA_CPP in found.labels and self.profile.batch_sizes[0] != 1:
            labels = tuple(label for label in found.labels if label != LLAMA_CPP)
            return Peers(labels, {**found.skipped, LLAMA_CPP: "it is measured at batch 1 only"})
        return found

    @cached_property
    def _plain(self) -> Path:
        """optimum's plain export of the checkpoint, made once."""
        source = self.subject.baseline.source
        name = f"{source.name.replace('/', '--')}-{source.content_key[:12]}"
        with self.progress("optimum's plain export, once", 1) as bar:
            bar.tick("optimum export (about a minute)")
            return plain_export(source.folder, cache_dir() / "plain" / name)

    def opener(self, label: str) -> Callable[[], Session]:
        """How to load a side; files are resolved now, so that calling it is loading alone."""
        s, where = self.subject, self.subject.deployment
        if label == self.candidate:
            p, shapes = self.profile, None
            if where.provider.startswith("tensorrt"):  # engines are built for the run's own batches and lengths
                context = s.manifest.longest_row
                lengths = (*p.prompt_lengths, *p.prefill_lengths)
                shapes = Shapes.of_workload(p.batch_sizes, lengths, p.new_tokens, context)
            return lambda: where.open(s.folder, shapes=shapes)
        checkpoint, activations = s.baseline.checkpoint, s.manifest.activations
        if label == self.baseline:
            return lambda: TorchSession(checkpoint, activations, where.device, threads=where.threads)
        if label in TITLES:
            model = (checkpoint, s.folder, activations)
            return peer_opener(label, model, where, self.gguf, lambda: self.session(self.candidate).info)
        plain = self._plain
        return lambda: OptimumSession(plain, where.threads)

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

    def sides(self) -> list[Side]:
        """The sides that took part, for the record, with what each runs."""
        provider, attention = self.subject.deployment.provider, self.subject.manifest.attention
        titles = {
            self.candidate: ("candidate", f"ONNX Runtime ({provider}), {KIND[attention]}"),
            self.baseline: ("baseline", f"PyTorch eager ({self.subject.deployment.device})"),
            OPTIMUM: ("peer", "optimum, plain export"),
            **{label: ("peer", title) for label, title in TITLES.items()},
        }
        found = []
        for label in dict.fromkeys([*(s.side for s in self.series), *self._sessions]):
            role, title = titles[label]
            details = dict(self._sessions[label].info.details) if label in self._sessions else {}
            if label in self.peer_parities:
                details[PARITY] = self.peer_parities[label].describe()
            found.append(Side(label=label, role=role, title=title, details=details))  # type: ignore[arg-type]
        return found

    # -- measurements -----------------------------------------------------------------------------------------------

    def series_of(self, case: Case, label: str) -> Series:
        """One side's rounds of a case; the whole case is measured on first use, all sides interleaved."""
        if not any(s.case == case for s in self.series):
            self._measure(case)
        return next(s for s in self.series if s.case == case and s.side == label)

    def _measure(self, case: Case) -> None:
        headline = case == self.headline
        rounds = self.profile.rounds if headline else self.profile.more_rounds
        sides = {label: self.session(label) for label in self.labels(case)}
        prose = self.subject.dataset.prose() or load_shipped().prose()
        ids = [token for text in prose for token in self.subject.tokenizer(text)["input_ids"]]
        samples: list[float] = []
        where, bandwidth = self.subject.deployment, None
        if headline:
            bandwidth = CudaBandwidth() if where.device == "cuda" else CpuBandwidth(where.threads)
        probes: list[Callable[[], None]] = [lambda: samples.append(bandwidth())] if bandwidth else []
        if case.batch == self.profile.batch_sizes[0] and (sample := self._prefill_meter.beside(case)):
            probes.append(sample)

        def probe() -> None:
            for one in probes:
                one()

        with self.progress(f"latency, {case.label}", len(sides) * (rounds + 1)) as bar:
            self.series += interleave(
                sides,
                ids,
                case,
                rounds,
                self.profile.warmup_cap,
                bar.tick,
                probe,
            )
        self.prefill_floor = self._prefill_meter.floor
        if headline:
            prompts = latency_prompts(ids, case, 0)
            for label in self.peers.labels:
                side, baseline = sides[label], sides[self.baseline]
                self.peer_parities[label] = peer_parity(side, baseline, prompts, case.new_tokens)
        if bandwidth:
            self.floor = Floor(
                method=bandwidth.method,
                bandwidth_samples=samples,
                weight_bytes=self.subject.manifest.decode_weight_bytes,
                kv_bytes_per_token=self.subject.manifest.kv.bytes_per_token(),
            )

    @cached_property
    def _prefill_meter(self) -> PrefillFloorMeter:
        s, where, ran_on = self.subject, self.subject.deployment, self.session(self.candidate).info.provider
        options = where.provider_options if ran_on == where.provider else None
        settings = SessionSettings(
            ran_on, where.threads, provider_options=options, session_options=where.session_options
        )
        return PrefillFloorMeter(s.baseline.config, s.manifest.activations, settings)

    def load_of(self, label: str) -> Load:
        """Load times of a side; all sides are measured on first use."""
        if not self.loads:
            openers = {name: self.opener(name) for name in self.labels() if name not in TITLES}
            with self.progress("load", len(openers) * self.profile.loads) as bar:
                self.loads = load_times(openers, self.profile.loads, bar.tick)
        return next(x for x in self.loads if x.side == label)

    def memory_of(self, label: str) -> Memory:
        """Peak memory of a side in a process of its own, on the headline case."""
        found = next((m for m in self.memory if m.side == label), None)
        if found is None:
            s, where = self.subject, self.subject.deployment
            kinds = {self.candidate: "onnxruntime", self.baseline: "pytorch", OPTIMUM: "optimum"}
            paths = {self.candidate: s.folder, self.baseline: s.baseline.checkpoint}
            path = paths.get(label) or self._plain
            with self.progress("memory", 1) as bar:
                bar.tick(f"{label}: peak memory in a process of its own")
                found = peak_memory(label, self.headline, kinds[label], path, s.manifest.activations, where)
            self.memory.append(found)
        return found
