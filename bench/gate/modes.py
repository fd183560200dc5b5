"""How much the gate measures, and what its margins depend on. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from bench.gate.statistics import TIERS, Tier

SEED = 20_261_124
LARGEST_BATCH = 17
"""Rows of the largest batch that any check computes."""


@dataclass(frozen=True)
class Mode:
    """How much is measured. ``window`` tokens a chunk, at most ``windows`` of them; ``items`` of each task group.

    ``new_tokens`` caps each generation (None: the task's own length), ``places`` the places that behaviour checks look
    at; ``longest`` tokens of text are the most that they compute over in one piece. ``judges_tails``: whether so many
    tokens can decide the tail and top-1; if not they are reported.
    ``every_text``: the sources of the tasks are scored as well as the prose.
    """

    name: str
    window: int
    windows: int | None
    null_windows: int | None
    items: int | None
    judges_tails: bool
    new_tokens: int | None = None
    places: int | None = None
    longest: int = 1040
    every_text: bool = False


MODES = {
    "quick": Mode("quick", 128, 6, 1, 1, False, new_tokens=16, places=1, longest=200),
    "standard": Mode("standard", 384, None, 8, 16, True),
    "full": Mode("full", 384, None, 16, None, True, longest=2064, every_text=True),
}
"""``full`` scores every text of the data and generates every item: what ``standard`` may leave undecided."""


@dataclass(frozen=True)
class Terms:
    """What decides how evidence is judged: the folder's precision, its activations and cache, and the mode."""

    precision: str
    activations: str
    kv_dtype: str
    mode: Mode

    @property
    def tier(self) -> Tier:
        """The tolerance tier of the precision that the folder claims."""
        return TIERS[self.precision]

    @property
    def tail_limit(self) -> float:
        """Largest KL divergence that a single place may have, nats; int4 has no tail margin, ten means stand in."""
        return self.tier.tail_kld if self.tier.tail_kld is not None else 10 * self.tier.mean_kld

    @property
    def short_floats(self) -> bool:
        """Whether the folder is judged beside PyTorch in the same short floating-point type."""
        return self.precision in ("fp16", "bf16")

    @property
    def null_kind(self) -> str:
        """The null control: PyTorch in the folder's own type, for fp32 with another attention kernel."""
        return self.activations if self.activations != "fp32" else "eager"
