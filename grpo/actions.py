"""Which choices of a rollout are actions of the policy, that is, earn credit.

1. When the remasker ignores the proposals (`random`), proposals that it discards have zero expected score, and only
   kept ones need be credited; but under the wavefront a discarded token was its neighbours' context, so there all are.
2. Policy `self` re-masks by the lm head's own judgement, so its choices are actions too. `grpo.policy_positions`
   credits those of `confidence` and `critic`, whose weights also come from the generator's heads, in the same way.
"""

from __future__ import annotations

import torch

from grpo.config import DenoiseSection
from grpo.denoise import num_masked_after


def credited_tokens(policy_tokens: str, remasking: str, sampler: bool) -> str:
    """Resolve `auto`: `kept` where discarded proposals changed nothing that was kept, `all` elsewhere."""
    return "kept" if policy_tokens == "auto" and remasking == "random" and not sampler else "all"


def credits_positions(policy_positions: bool, remasking: str, randomness: float) -> bool:
    """Whether re-mask choices are actions: always under `self`, on demand under `confidence` and `critic`.

    A choice without randomness has no density, and one of full randomness no dependence on the heads.

    Raises:
        ValueError: they are demanded where no head of the generator makes them, or where they have no gradient.
    """
    random = 0 < randomness < 1
    if not policy_positions:
        return remasking == "self" and random
    if remasking not in ("self", "confidence", "critic"):
        raise ValueError(
            f"grpo.policy_positions must be false when denoise.remasking is {remasking} (its choices do not "
            "come from the generator's heads), got true"
        )
    if not random:
        raise ValueError(
            "denoise.randomness must be strictly between 0 and 1 when grpo.policy_positions is true (a choice "
            f"needs a probability that the heads can change), got {randomness}"
        )
    return True


def most_actions(length: int, settings: DenoiseSection, *, policy_tokens: str, positions: bool, causal: bool) -> int:
    """The most credited actions that a sample of `length` generated tokens can have: the constant of `dr_grpo`."""
    if causal:
        return length
    again = sum(
        int(num_masked_after(step, settings.steps, torch.tensor(length), settings.schedule))
        for step in range(settings.steps - 1)
    )  # positions that are re-masked, then filled again
    return length + again * ((policy_tokens == "all") + positions)
