"""What a peer's speed is worth: how far its outputs are the baseline's, on the prompts of one round.

Where a side shows logits: teacher-forced along the baseline's greedy tokens, mean KL divergence and top-1. Where it
does not: its greedy tokens beside the baseline's, up to the first that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.gate.found import first_difference
from bench.gate.statistics import kl_divergence
from runtime.generate import generate
from runtime.session import Ids, Session


@dataclass(frozen=True)
class PeerParity:
    """``mean_kld`` in nats, None without logits; ``agree`` the share of tokens equal (top-1, or greedy tokens before
    the first that differs)."""

    tokens: int
    agree: float
    mean_kld: float | None

    def describe(self) -> str:
        """One line for the table."""
        kld = "greedy tokens equal" if self.mean_kld is None else f"KLD {self.mean_kld:.1e}, top-1"
        return f"{kld} {self.agree:.1%} of {self.tokens}"


def tokens_agree(theirs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> float:
    """Share of tokens before each row's first difference."""
    return sum(first_difference(a, b) for a, b in zip(theirs, ours, strict=True)) / sum(map(len, ours))


def peer_parity(peer: Session, baseline: Session, prompts: Ids, new_tokens: int) -> PeerParity:
    """Compare one side with the baseline on one batch."""
    expected = generate(baseline, prompts, new_tokens).tokens
    count = len(prompts) * new_tokens
    own = getattr(peer, "own_generate", None)
    if own is not None:
        return PeerParity(count, tokens_agree(own(prompts, new_tokens).tokens, expected), None)
    steps = np.array(expected)
    klds, same = [], 0
    for n in range(new_tokens):
        fed = steps[:, n - 1].tolist()
        a = baseline.prefill(prompts, new_tokens) if n == 0 else baseline.step(fed)
        b = peer.prefill(prompts, new_tokens) if n == 0 else peer.step(fed)
        klds.append(kl_divergence(b, a))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    return PeerParity(count, same / count, float(np.mean(klds)))
