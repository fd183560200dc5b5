"""What a run does: profiles, cases and the prompts of the latency rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.errors import BenchError
from reports.record import Case


@dataclass(frozen=True)
class Profile:
    """How much a run measures; ``rounds`` is for the first (headline) case, ``more_rounds`` for the others.

    ``mode`` is the gate's (:data:`bench.gate.modes.MODES`), ``peers`` says in which cases optimum's plain export is
    measured as well. At ``prefill_lengths`` the prefill alone is measured, as a case of one new token.
    """

    name: str
    batch_sizes: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    new_tokens: int
    rounds: int
    more_rounds: int
    warmup_cap: int
    loads: int
    mode: str
    peers: str
    prefill_lengths: tuple[int, ...] = ()

    def cases(self) -> list[Case]:
        """Every prompt length at the first batch size, every other batch size at the first prompt length.

        Then the prefills alone, at the first batch size.
        """
        first_batch, first_prompt = self.batch_sizes[0], self.prompt_lengths[0]
        pairs = [(first_batch, p) for p in self.prompt_lengths] + [(b, first_prompt) for b in self.batch_sizes[1:]]
        prefills = [Case(batch=first_batch, prompt=p, new_tokens=1) for p in self.prefill_lengths]
        return [*(Case(batch=b, prompt=p, new_tokens=self.new_tokens) for b, p in pairs), *prefills]


PROFILES = {
    "smoke": Profile("smoke", (1,), (32,), 8, 3, 3, 1, 1, "quick", "none", (128,)),
    "standard": Profile("standard", (1, 4), (128, 512, 1024), 32, 12, 6, 3, 5, "standard", "headline", (2048,)),
    "full": Profile("full", (1, 2, 4, 8), (128, 512, 1024, 2048), 64, 30, 15, 5, 9, "full", "all"),
}


def choose_profile(
    name: str,
    batch_sizes: Sequence[int] = (),
    prompt_lengths: Sequence[int] = (),
    new_tokens: int | None = None,
    context: int | None = None,
) -> Profile:
    """A profile with the user's own sizes put in; prompt lengths that the context cannot hold are an error.

    Whoever gives prompt lengths gets these alone, without the profile's ``prefill_lengths``.

    Raises:
        BenchError: unknown profile, a size below 1, or a case beyond the context.
    """
    if name not in PROFILES:
        raise BenchError(f"unknown profile {name!r}; choose one of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    prefills = () if prompt_lengths else profile.prefill_lengths
    asked = bool(prompt_lengths) or new_tokens is not None
    profile = replace(
        profile,
        batch_sizes=tuple(batch_sizes) or profile.batch_sizes,
        prompt_lengths=tuple(prompt_lengths) or profile.prompt_lengths,
        new_tokens=profile.new_tokens if new_tokens is None else new_tokens,
        prefill_lengths=prefills,
    )
    for title, values in (("batch size", profile.batch_sizes), ("prompt length", profile.prompt_lengths)):
        if min(values) < 1:
            raise BenchError(f"{title} {min(values)} makes no sense; give 1 or more")
    if profile.new_tokens < 2:
        raise BenchError("--new-tokens must be at least 2: one token has no decode step to measure")
    if context is not None:
        fits = tuple(p for p in profile.prompt_lengths if p + profile.new_tokens <= context)
        if len(fits) < len(profile.prompt_lengths) and (asked or not fits):
            worst = max(profile.prompt_lengths)
            raise BenchError(
                f"a prompt of {worst} tokens and {profile.new_tokens} new ones exceed the model's context "
                f"of {context}; pass smaller --prompt-lengths or --new-tokens"
            )
        prefills = tuple(p for p in prefills if p < context)
        profile = replace(profile, prompt_lengths=fits, prefill_lengths=prefills)
    return profile


def latency_prompts(token_stream: Sequence[int], case: Case, round_index: int) -> list[list[int]]:
    """Prompts of one round: real text, other text in each round, the same for every side.

    The stream is read as a ring, each row from its own place.
    """
    n = len(token_stream)
    starts = (round_index * 977 + row * 1709 for row in range(case.batch))
    return [[token_stream[(start + k) % n] for k in range(case.prompt)] for start in starts]
