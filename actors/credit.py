"""What each credited action earns: the discriminator's dense rewards and the user's own, relative to the group.

1. A user's reward is centred and scaled within its group by itself and weighted afterwards, so that weights compare
   what is on different scales (GDPO, arXiv:2601.05242). The discriminator's is scaled with `grpo.normalize` alone: it
   shrinks as texts become natural, and its push should too.
2. A user's reward belongs to the whole text, and so to each of its actions alike.
3. `grpo.neutral` works on the discriminator's part alone: what is wanted of the temperature there is nothing, while a
   user's reward may well ask for another one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.reward import Scores
from grpo.config import GrpoSection
from grpo.metrics import accumulate, weighted_sum
from grpo.policy_loss import equal_groups, group_advantages, temperature_direction
from grpo.reward_functions import reward_figure
from grpo.reward_loss import dense_rewards, log_odds
from grpo.trajectory import Rollout, credited


@torch.no_grad()
def action_credits(
    rollouts: list[Rollout],
    scores: list[Scores],
    weights: list[Tensor],
    *,
    grpo: GrpoSection,
    signal: str,
    all_reduce: Callable[..., Tensor],
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Credit of each credited action, and the figures that describe the rewards.

    Args:
        rollouts, scores, weights: of this rank's actors, on one device; weights: [M + D] of the loss.
        signal: `reward.signal`.
        all_reduce: see `actors/learner.py`.

    Returns:
        [M + D] for each rollout, and sums as pairs (see `grpo/metrics.py`).
    """
    sums: dict[str, Tensor] = {}
    dense, whole = [], []
    for rollout, score in zip(rollouts, scores, strict=True):
        by_token, by_text, part = _advantages(rollout, score, grpo, signal)
        rows = credited(rollout, "rows")
        dense.append(by_token[rows, credited(rollout, "positions")])
        whole.append(by_text[rows])
        accumulate(sums, part)
    if grpo.neutral and grpo.adversary:
        dense = _neutral(rollouts, dense, weights, all_reduce)
    credits = [tokens + texts for tokens, texts in zip(dense, whole, strict=True)]
    for credit, own in zip(credits, weights, strict=True):
        part = {"advantage": weighted_sum(credit, own), "advantage/square": weighted_sum(credit.square(), own)}
        accumulate(sums, part)
    return credits, sums


def _advantages(
    rollout: Rollout, score: Scores, grpo: GrpoSection, signal: str
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """[B, T] advantages by the discriminator, [B] by the user's functions, both weighted, and sums."""
    size, mask = rollout.group_size, rollout.completion_mask
    rewards = torch.zeros(mask.shape, device=mask.device)
    by_token, by_text = torch.zeros_like(rewards), torch.zeros(len(mask), device=mask.device)
    has_text, sums = mask.any(-1), {}
    if grpo.adversary:
        logits, token_logits = score.logits.to(mask.device), score.token_logits.to(mask.device)
        own = dense_rewards(
            logits, token_logits, mask, credit=grpo.credit, signal=signal, window=grpo.credit_window
        )
        grouped, group_mask = own.unflatten(0, (-1, size)), mask.unflatten(0, (-1, size))
        by_token = grpo.adversary * group_advantages(grouped, mask=group_mask, normalize=grpo.normalize).flatten(0, 1)
        rewards = grpo.adversary * own
        sums["p_natural"] = weighted_sum(log_odds(logits).sigmoid(), has_text)
    for name, weight in grpo.rewards.items():
        own = score.users[name].to(mask.device)
        by_text = by_text + weight * group_advantages(own.unflatten(0, (-1, size))).flatten()
        rewards = rewards + weight * own[:, None] * mask
        figure = reward_figure(name)
        sums |= {figure: weighted_sum(own, has_text), f"{figure}/square": weighted_sum(own.square(), has_text)}
    per_text = rewards.sum(-1) / mask.sum(-1).clamp(min=1)
    groups = rewards.unflatten(0, (-1, size))
    num_groups = torch.tensor(float(len(groups)), device=mask.device)
    return by_token, by_text, sums | {
        "reward": weighted_sum(per_text, has_text),
        "reward/square": weighted_sum(per_text.square(), has_text),
        "completion_length": weighted_sum(mask.sum(-1), torch.ones_like(has_text)),
        "zero_spread_groups": torch.stack([equal_groups(groups).double(), num_groups.double()]),
    }


def _neutral(
    rollouts: list[Rollout],
    credits: list[Tensor],
    weights: list[Tensor],
    all_reduce: Callable[..., Tensor],
) -> list[Tensor]:
    """The credits [M + D] without the part that the temperature explains."""
    knobs = []
    for rollout, credit in zip(rollouts, credits, strict=True):
        knob = temperature_direction(rollout.logprobs, rollout.entropies)
        knob = F.pad(knob, (0, len(credit) - len(knob)))  # re-mask draws know no temperature
        knobs.append(knob * (credit != 0))  # groups of equal reward stay without credit
    parts = [(w.double(), c, k) for w, c, k in zip(weights, credits, knobs, strict=True)]  # no actor's share rounds it
    sums = all_reduce(sum(torch.stack([(w * c * k).sum(), (w * k.square()).sum()]) for w, c, k in parts))
    return [credit - sums[0] / sums[1].clamp(min=1e-12) * knob for _, credit, knob in parts]
