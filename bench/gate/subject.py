"""What a check gets and gives: the subject (folder, baseline, settings) with everything heavy made once and shared.

A check is a function ``Subject -> Found``; :mod:`bench.gate.registry` names them. Nothing heavy is imported here,
so that ``validate --list-checks`` starts at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.manifest import MANIFEST_NAME, Manifest
from reports.record import Check, Example, TaskMetric
from reports.validation import Finding, Kind, Outcome

if TYPE_CHECKING:
    from bench.data.loading import Dataset
    from bench.gate.baseline import Baseline
    from bench.gate.canonical import Pairing
    from bench.gate.statistics import Tier, TokenFigures
    from bench.gate.store import ResultStore
    from export.convert import Conversion
    from export.spec import ExportSpec
    from runtime.ort_session import OrtSession
    from runtime.probe import GraphProbe

Tick = Callable[[str], None]
SEED = 20_261_124
UNFINISHED_BYTES = 1_000_000_000
"""The most that the figures of runs that were stopped may take on the disk; 160 windows of 384 tokens take 5 MB."""


@dataclass(frozen=True)
class Mode:
    """How much is measured. ``window`` tokens a chunk, at most ``windows`` of them; ``items`` of each task group.

    ``new_tokens`` caps each generation (None: the task's own length), ``places`` the places that behaviour checks look
    at. ``judges_tails``: whether so many tokens can decide the tail and top-1; if not they are reported.
    """

    name: str
    window: int
    windows: int | None
    null_windows: int | None
    items: int
    judges_tails: bool
    new_tokens: int | None = None
    places: int | None = None


MODES = {
    "quick": Mode("quick", 128, 6, 1, 1, False, new_tokens=16, places=1),
    "standard": Mode("standard", 384, None, 8, 16, True),
}


@dataclass(frozen=True)
class Found:
    """What a check found; ``figure`` is its line on the terminal."""

    status: Outcome
    figure: str
    findings: Sequence[Finding] = ()
    figures: Sequence[Check] = ()
    tasks: Sequence[TaskMetric] = ()
    notes: Sequence[str] = ()
    examples: Sequence[Example] = ()


@dataclass(frozen=True)
class CheckSpec:
    """One named check: what it looks at in one sentence, and what it catches (both stand in docs/gate.md)."""

    name: str
    kind: Kind
    looks_at: str
    catches: str
    run: Callable[[Subject], Found]


def exact(findings: Sequence[Finding], good: str, notes: Sequence[str] = ()) -> Found:
    """PASS with ``good``, or FAIL naming the first finding."""
    if not findings:
        return Found("PASS", good, notes=notes)
    first = findings[0]
    more = f" (+{len(findings) - 1} more)" if len(findings) > 1 else ""
    return Found("FAIL", f"{first.where}: {first.what}{more}", findings=findings, notes=notes)


@dataclass
class Subject:
    """One folder under test beside its baseline."""

    folder: Path
    baseline: Baseline
    mode: Mode
    dataset: Dataset
    provider: str = "cpu"
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    tick: Tick = lambda _message: None
    workers: int = 1
    say: Tick = lambda _message: None
    expect: Mapping[str, str] = field(default_factory=dict)
    """``precision``, ``target`` and ``method`` that the folder has to be of; the rest is as its manifest says."""
    progress: Callable[[int, int], None] = lambda _done, _total: None
    """Told (finished, all) windows or batches of the stage that is running; (0, 0) between stages."""
    resumed: int = field(default=0, init=False)
    """Windows and batches that an earlier run, which was stopped, had finished."""
    used: list[Any] = field(default_factory=list, init=False)
    """What of :attr:`unfinished` this run read or wrote."""

    # -- what is in the folder ---------------------------------------------------------------------------------------

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file by name, read once for all that ask; {} where a certificate could not cover them."""
        from bench.certificate.statement import CertificateError, hash_folder

        try:
            return hash_folder(self.folder)
        except (CertificateError, OSError):
            return {}  # links or unreadable files: the check `files` says so

    @property
    def digest(self) -> str:
        """One SHA-256 over names and contents of the folder, "" where there is none."""
        from bench.certificate.statement import folder_digest

        return folder_digest(self.hashes) if self.hashes else ""

    @cached_property
    def manifest(self) -> Manifest:
        """The folder's manifest, or the one made up for a folder from elsewhere; hashes are another check's."""
        from runtime.loading import read_folder

        return read_folder(self.folder, verify=False)

    @property
    def sealed(self) -> bool:
        """Whether the folder carries our manifest."""
        return (self.folder / MANIFEST_NAME).is_file()

    @property
    def ours(self) -> bool:
        """Whether the folder carries our manifest with the description of a fused graph."""
        return self.sealed and self.manifest.target != "plain"

    @cached_property
    def spec(self) -> ExportSpec:
        """The request that the manifest says it was made from."""
        from dataclasses import fields

        from export.spec import ExportSpec

        known = {f.name for f in fields(ExportSpec)}
        return ExportSpec(**{k: v for k, v in self.manifest.spec.items() if k in known})

    @cached_property
    def conversion(self) -> Conversion:
        """What the export makes of the *baseline's* configuration: the graphs to compare with."""
        return self.baseline.conversion(self.spec, self.manifest.data_file)

    def graph(self, role: str) -> Any:
        """``decode`` or ``scoring`` graph of the folder, without its external data."""
        return self._graphs[role]

    @cached_property
    def _graphs(self) -> dict[str, Any]:
        import onnx

        names = {"decode": self.manifest.decode_graph, "scoring": self.manifest.scoring_graph}
        loaded = {n: onnx.load(self.folder / n, load_external_data=False) for n in set(names.values())}
        return {role: loaded[n] for role, n in names.items()}

    @property
    def roles(self) -> tuple[str, ...]:
        """The graphs that are really two."""
        return ("decode",) if self.manifest.decode_graph == self.manifest.scoring_graph else ("decode", "scoring")

    @cached_property
    def pairings(self) -> dict[str, Pairing]:
        """Expected against found graph, by role (only where :attr:`ours`)."""
        from bench.gate.canonical import pair_graphs

        wanted = {
            "decode": self.conversion.decode if self.manifest.decode_logits == "last" else self.conversion.scoring,
            "scoring": self.conversion.scoring,
        }
        return {role: pair_graphs(wanted[role], self.graph(role)) for role in self.roles}

    # -- what runs ---------------------------------------------------------------------------------------------------

    @cached_property
    def tier(self) -> Tier:
        """Margins of the precision that the folder claims."""
        from bench.gate.statistics import TIERS

        return TIERS[self.manifest.precision]

    @property
    def tail_limit(self) -> float:
        """Largest KL divergence that a single place may have, nats; int4 has no tail margin, ten means stand in."""
        return self.tier.tail_kld if self.tier.tail_kld is not None else 10 * self.tier.mean_kld

    @cached_property
    def candidate(self) -> OrtSession:
        """The folder on ONNX Runtime."""
        from bench.gate.units import open_candidate

        return open_candidate(self.folder, self.provider, self.threads)

    @cached_property
    def probe(self) -> GraphProbe:
        """The scoring graph, with a cache of the check's own."""
        from runtime.probe import GraphProbe

        return GraphProbe.of(self.candidate)

    @cached_property
    def tokenizer(self) -> Any:
        """The baseline's tokenizer: both sides get the same ids."""
        from runtime.text import load_tokenizer

        return load_tokenizer(self.baseline.checkpoint)

    @cached_property
    def windows(self) -> list[list[int]]:
        """Token windows, from every text in turn so that few windows still see every kind of text."""
        from bench.latency.workload import chunked

        size = min(self.mode.window, self.baseline.config.max_position_embeddings)
        per_text = [chunked(self.tokenizer(t)["input_ids"], size) for t in self.dataset.prose()]
        width = max((len(w) for w in per_text), default=0)
        mixed = [w[k] for k in range(width) for w in per_text if k < len(w)]
        return mixed[: self.mode.windows] if self.mode.windows else mixed

    @cached_property
    def figures(self) -> list[TokenFigures]:
        """Teacher-forced comparison of every window."""
        from bench.gate.units import CANDIDATE, score

        return score(self, CANDIDATE, self.windows)

    # -- what a run that is stopped leaves to the next one -----------------------------------------------------------

    @cached_property
    def unfinished(self) -> ResultStore | None:
        """Finished windows and batches of this folder, against this baseline, in these settings; None: not kept."""
        from bench.gate.store import ResultStore
        from bench.machine.environment import versions
        from export.cache import cache_dir

        if not self.baseline.key or not self.digest:
            return None
        facts = [self.digest, self.baseline.key, self.provider, self.threads, sorted(versions().items())]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
        return ResultStore(name, cache_dir() / "unfinished", UNFINISHED_BYTES, self.say, "unfinished validation")

    def finish(self) -> None:
        """Forget what was kept for the case that this run is stopped: a new run is a new measurement."""
        if self.used and self.unfinished is not None:
            self.unfinished.forget(self.used)

    def close(self) -> None:
        """Free what was opened for this folder; the baseline stays."""
        for name in ("probe", "candidate"):
            opened = self.__dict__.pop(name, None)
            if opened is not None:
                opened.close()

    def at(self, folder: Path) -> Subject:
        """The same settings over another folder."""
        return replace(self, folder=folder)
