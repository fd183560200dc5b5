"""What a check gets: one folder beside its baseline, with everything heavy made once and shared.

A check is a function ``Subject -> Found``; :mod:`bench.gate.registry` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.deployment import Deployment
from bench.digests import DigestError, folder_digest, hash_folder
from bench.gate.modes import Mode, Terms
from export.manifest import MANIFEST_NAME, Manifest
from reports.validation import ChunkScores, Evidence, GeneratedItem, Scalar

if TYPE_CHECKING:
    from bench.data.items import Dataset
    from bench.gate.baseline import Baseline
    from bench.gate.canonical import Pairing
    from bench.gate.generations import Outputs
    from bench.gate.statistics import TokenScores
    from bench.gate.store import ResultStore
    from bench.runtimes.remote import RemoteProbe, RemoteSession
    from export.convert import Conversion
    from export.spec import ExportSpec
    from runtime.ort_session import OrtSession
    from runtime.probe import GraphProbe
    from runtime.tensorrt import Shapes

Tick = Callable[[str], None]
UNFINISHED_BYTES = 1_000_000_000
"""The most that the scores of runs that were stopped may take on the disk; 160 windows of 384 tokens take 5 MB."""


@dataclass
class Subject:
    """One folder under test beside its baseline."""

    folder: Path
    baseline: Baseline
    mode: Mode
    dataset: Dataset
    deployment: Deployment = field(default_factory=Deployment)
    tick: Tick = lambda _message: None
    workers: int = 1
    say: Tick = lambda _message: None
    expect: Mapping[str, str] = field(default_factory=dict)
    """``precision``, ``target`` and ``method`` that the folder has to be of; the rest is as its manifest says."""
    sms: tuple[int, ...] = (89,)
    """Compute capabilities, times 10, that TensorRT-RTX compiles engines for (``--target tensorrt`` only)."""
    progress: Callable[[int, int], None] = lambda _done, _total: None
    """Told (finished, all) windows or batches of the stage that is running; (0, 0) between stages."""
    resumed: int = field(default=0, init=False)
    """Windows and batches that an earlier run, which was stopped, had finished."""
    left_out: int = field(default=0, init=False)
    """Items that are longer than the baseline's context, or a cache of fixed length, leaves for a prompt."""
    used: list[Any] = field(default_factory=list, init=False)
    """What of :attr:`unfinished` this run read or wrote."""
    session: dict[str, Scalar] = field(default_factory=dict, init=False)
    """What the candidate ran on, known once it was opened: provider, placement, attention kernel, fallbacks."""
    _own_losses: dict[int, NDArray[np.float64]] = field(default_factory=dict, init=False)

    # -- what is in the folder ---------------------------------------------------------------------------------------

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file by name, read once for all that ask; {} where a certificate could not cover them."""
        try:
            return hash_folder(self.folder)
        except (DigestError, OSError):
            return {}  # links or unreadable files: the check `files` says so

    @property
    def digest(self) -> str:
        """One SHA-256 over names and contents of the folder, "" where there is none."""
        return folder_digest(self.hashes) if self.hashes else ""

    @cached_property
    def manifest(self) -> Manifest:
        """The folder's manifest, or the one derived for a third-party export; hashes are another check's."""
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
    def context(self) -> int:
        """Tokens that both sides can hold; another check compares what each claims."""
        return min(self.manifest.longest_row, self.baseline.context)

    @property
    def room(self) -> int:
        """The baseline's context, or a cache of fixed length; a shorter context that a folder claims is a defect."""
        return min(self.manifest.kv.cache_length or self.baseline.context, self.baseline.context)

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
        return {role: pair_graphs(wanted[role], self.graph(role), self.baseline.context) for role in self.roles}

    # -- what runs ---------------------------------------------------------------------------------------------------

    @cached_property
    def terms(self) -> Terms:
        """What evidence about this folder is judged by: the precision that it claims, and the mode."""
        m = self.manifest
        return Terms(m.precision, m.activations, m.kv.dtype, self.mode)

    @cached_property
    def candidate(self) -> OrtSession | RemoteSession:
        """The folder on ONNX Runtime, as it is deployed; one graph at a time, beside PyTorch."""
        return self.opener()

    def observe(self) -> None:
        """Take down what the candidate runs on, once more after each check: a graph that opens later may fall back."""
        if "candidate" in vars(self):
            self.session.update(self.candidate.info.facts)

    @property
    def opener(self) -> Callable[[], OrtSession | RemoteSession]:
        """Opens the folder as every check needs it; picklable, for workers."""
        shapes = gate_shapes(self) if self.deployment.provider.startswith("tensorrt") else None
        return partial(self.deployment.open, self.folder, one_graph=True, huge_pages=False, shapes=shapes)

    @cached_property
    def probe(self) -> GraphProbe | RemoteProbe:
        """The scoring graph, with a cache of the check's own."""
        from bench.runtimes.remote import RemoteSession
        from runtime.probe import GraphProbe

        session = self.candidate
        return session.probe() if isinstance(session, RemoteSession) else GraphProbe.of(session)

    @cached_property
    def tokenizer(self) -> Any:
        """The baseline's tokenizer: both sides get the same ids."""
        from runtime.text import load_tokenizer

        with self.baseline.at_fault():
            return load_tokenizer(self.baseline.checkpoint)

    @cached_property
    def windows(self) -> list[list[int]]:
        """Chunks of token ids, from every text in turn so that few of them still see every kind of text."""
        from bench.data.items import chunked

        size = min(self.mode.window, self.room)
        texts = self.dataset.prose()
        if self.mode.every_text:
            seen = (
                self.manifest.quantisation and self.manifest.quantisation.method == "gptq"
            )  # it was calibrated on these
            texts += self.dataset.sources(without=self.dataset.calibration() if seen else ())
        per_text = [chunked(self.tokenizer(t)["input_ids"], size) for t in texts]
        width = max((len(w) for w in per_text), default=0)
        mixed = [w[k] for k in range(width) for w in per_text if k < len(w)]
        return mixed[: self.mode.windows] if self.mode.windows else mixed

    # -- evidence ----------------------------------------------------------------------------------------------------

    @cached_property
    def scores(self) -> list[TokenScores]:
        """Teacher-forced comparison of every chunk."""
        from bench.gate.units import CANDIDATE, score

        return score(self, CANDIDATE, self.windows)

    @cached_property
    def null_scores(self) -> list[TokenScores]:
        """PyTorch in the folder's own precision (fp32: with another attention kernel) against fp32, first chunks."""
        from bench.gate.units import score

        return score(self, self.terms.null_kind, self.windows[: self.mode.null_windows])

    def own_loss(self, k: int) -> NDArray[np.float64]:
        """KL divergence of PyTorch in the folder's precision over chunk k, ``[tokens]``, nats."""
        from bench.gate.units import score

        if k < len(self.null_scores):
            return self.null_scores[k].kld
        if k not in self._own_losses:
            self._own_losses[k] = score(self, self.terms.null_kind, [self.windows[k]])[0].kld
        return self._own_losses[k]

    @property
    def token_evidence(self) -> Evidence:
        """What the teacher-forced checks were computed from, so far."""
        losses = {k: v.tolist() for k, v in sorted(self._own_losses.items())}
        return Evidence(chunks=self._chunks, null=self._null_chunks, own_loss=losses)

    @cached_property
    def _chunks(self) -> list[ChunkScores]:
        from bench.gate.judge import chunk_of

        return [chunk_of(s) for s in self.scores]

    @cached_property
    def _null_chunks(self) -> list[ChunkScores]:
        from bench.gate.judge import chunk_of

        return [chunk_of(s) for s in self.null_scores]

    @cached_property
    def outputs(self) -> list[Outputs]:
        """Both sides' greedy generations of every item."""
        from bench.gate.generations import batches_of, outputs_in_order
        from bench.gate.units import Batch, generate_batches

        items = [item for members in self.dataset.groups(self.mode.items).values() for item in members]
        batches = batches_of(items, self.tokenizer, self.room, self.mode.new_tokens)
        fitting = {item.id for b in batches for item in b.items}
        self.left_out = len(items) - len(fitting)
        items = [item for item in items if item.id in fitting]
        eos = tuple(self.manifest.eos_token_ids)
        made = generate_batches(self, [Batch(b.prompts, b.limit, eos) for b in batches])
        return outputs_in_order(items, batches, made)

    @cached_property
    def generated(self) -> list[GeneratedItem]:
        """The same, as far as the checks of generations need them."""
        from bench.gate.generations import generated_items

        return generated_items(self.outputs, self.baseline.eos)

    # -- what a run that is stopped leaves to the next one -----------------------------------------------------------

    @cached_property
    def unfinished(self) -> ResultStore | None:
        """Finished windows and batches of this folder, against this baseline, in these settings; None: not kept."""
        from bench.gate.store import ResultStore, key_of
        from bench.machine.environment import versions
        from export.cache import cache_dir

        if not self.baseline.key or not self.digest:
            return None
        where = [sorted(self.deployment.settings().items()), repr(self.deployment.runtime)]  # its place is no setting
        facts = [self.digest, self.baseline.key, *where, sorted(versions().items())]
        return ResultStore(
            key_of(facts), cache_dir() / "unfinished", UNFINISHED_BYTES, self.say, "unfinished validation"
        )

    def settings(self) -> dict[str, Scalar]:
        """How much was measured, and how, for a result."""
        measured = {"window": self.mode.window, "windows": self.mode.windows, "items": self.mode.items}
        wanted = {f"expected {key}": value for key, value in self.expect.items()}
        return {**self.deployment.settings(), **measured, "workers": self.workers, **wanted}

    def finish(self) -> None:
        """Forget what was kept for the case that this run is stopped: a new run is a new measurement."""
        if self.used and self.unfinished is not None:
            self.unfinished.forget(self.used)

    def close(self) -> None:
        """Free what was opened for this folder; the baseline stays, and what was computed."""
        # functools documents deletion as the way to reset a cached property.
        for name in ("probe", "candidate"):
            if name in vars(self):
                getattr(self, name).close()
                delattr(self, name)

    def at(self, folder: Path) -> Subject:
        """The same settings over another folder."""
        return replace(self, folder=folder)


def gate_shapes(s: Subject) -> Shapes:
    """What TensorRT has to build engines for: every batch and length that the checks use."""
    from bench.data.items import NEW_TOKENS
    from bench.gate.modes import LARGEST_BATCH
    from runtime.tensorrt import Shapes

    new = max(NEW_TOKENS.values())
    context = s.manifest.longest_row
    room = max(1, context - new)
    return Shapes((1, 1, LARGEST_BATCH), (1, min(s.mode.window, room), room), min(new, context - 1))
