"""Group-relative policy gradients: advantages, clipped likelihood ratios, exact KL.

Sources: GRPO (arXiv:2402.03300), Dr. GRPO (arXiv:2503.20783), DAPO (arXiv:2503.14476), GSPO (arXiv:2507.18071).

1. A policy's action is one proposed token at one denoising step, so the likelihood ratio belongs to that action and is
   exactly 1 before the first update of a round.
2. Rewards may be dense, [N, G, T]: each position is centred over the group at that position, and the whole group is
   divided by one standard deviation. A scalar reward, [N, G], gives GRPO's equation.
3. KL is the sum over the vocabulary at the cached state, not an estimate from the sampled token.
4. Each loss is a weighted sum over actions; the weights carry the denominator, so any split into micro-batches or
   ranks gives the same gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.metrics import weighted_sum

_ROUNDING = 8  # units of relative precision; products of matrices in another order differ by one or two

def group_advantages(rewards: Tensor, *, mask: Tensor | None = None, normalize: bool = True) -> Tensor:
    """Center rewards within each prompt's group (GRPO, arXiv:2402.03300, eq. 3).

    Args:
        rewards: [N, G] one scalar per sample, or [N, G, T] one per position.
        mask: [N, G, T] bool, positions that count; only with dense rewards. Samples of a group share their mask.
        normalize: divide by the group's standard deviation; False gives Dr. GRPO (arXiv:2503.20783).

    Returns:
        Shaped like rewards; sums to zero over G. A group of rewards that are equal up to rounding gives exact zeros.

    Raises:
        ValueError: G < 2, because advantages are relative to the group.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"advantages need at least 2 samples per prompt, got {rewards.shape[1]}")
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = centred.masked_fill(_flat(rewards), 0.0)
    if mask is not None:
        centred = centred * mask
    if not normalize:
        return centred
    others = tuple(range(1, rewards.dim()))
    count = rewards[0].numel() if mask is None else mask.sum(others, keepdim=True).clamp(min=1)
    tiny = torch.finfo(rewards.dtype).tiny
    centred = centred / centred.abs().amax(others, keepdim=True).clamp(min=tiny)  # squares neither vanish nor overflow
    std = (centred.square().sum(others, keepdim=True) / count).sqrt()
    return torch.where(std > 0, centred / std.clamp(min=tiny), 0.0)


def equal_groups(rewards: Tensor) -> Tensor:
    """Number of groups of equal rewards, which contribute nothing. rewards: [N, G] or [N, G, T]."""
    return _flat(rewards).flatten(1).all(1).sum()


def _flat(rewards: Tensor) -> Tensor:
    """[N, 1, ..] bool, where a group's rewards are equal. Equal texts in different batches differ by rounding, and so
    do equal rewards from their mean; divided by its own size, such dust would have the weight of a reward."""
    least, most = rewards.amin(1, keepdim=True), rewards.amax(1, keepdim=True)
    return most - least <= _ROUNDING * torch.finfo(rewards.dtype).eps * torch.maximum(least.abs(), most.abs())


def action_weights(
    rows: Tensor,
    num_rows: int,
    *,
    loss: str,
    total_rows: Tensor | int,
    total_actions: Tensor | int,
    actions_per_row: int,
) -> Tensor:
    """Weight of each action in the loss, denominators included.

    Args:
        rows: [M] int64, sample of each action, in 0..num_rows-1; a sample's actions are all here.
        num_rows: samples in this micro-batch.
        loss: `grpo` and `gspo`: mean over a sample's actions, then over samples. `dapo`: mean over all actions.
            `dr_grpo`: sum over a sample's actions divided by a constant, then mean over samples, so that length
            does not change an action's weight.
        total_rows: samples over all ranks and micro-batches.
        total_actions: actions over all ranks and micro-batches.
        actions_per_row: the constant of `dr_grpo`: the most credited actions that a sample can have.

    Returns:
        [M] float32.
    """
    if loss == "dapo":
        return torch.ones(rows.shape, device=rows.device) / total_actions
    if loss == "dr_grpo":
        return torch.ones(rows.shape, device=rows.device) / (total_rows * actions_per_row)
    counts = torch.bincount(rows, minlength=num_rows).clamp(min=1)
    return 1.0 / (counts[rows] * total_rows)


def likelihood_ratios(
    logprobs: Tensor,
    behaviour: Tensor,
    *,
    rows: Tensor,
    num_rows: int,
    loss: str,
    log_means: Tensor | None = None,
) -> Tensor:
    """pi / pi_behaviour per action [M]; for `gspo` its geometric mean over the sample, with the action's gradient.

    The latter is GSPO's token form (arXiv:2507.18071, eq. 13): the value is the sequence's ratio s_i, and with equal
    advantages in a sample its gradient is that of s_i.

    Args:
        log_means: [num_rows] `mean_log_ratios` of whole samples, where not all of their actions are here.
    """
    log_ratio = logprobs - behaviour
    if loss == "gspo":
        if log_means is None:
            log_means = mean_log_ratios(log_ratio, rows, num_rows)
        log_ratio = log_means[rows] + logprobs - logprobs.detach()
    return log_ratio.exp()


@torch.no_grad()
def mean_log_ratios(log_ratio: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Mean log-ratio of each sample's actions: [M] and [M] int64 -> [num_rows]; 0 for a sample without actions."""
    counts = torch.bincount(rows, minlength=num_rows).clamp(min=1)
    return torch.zeros(num_rows, dtype=log_ratio.dtype, device=rows.device).index_add(0, rows, log_ratio) / counts


def importance_weights(proximal: Tensor, behaviour: Tensor, cap: float) -> Tensor:
    """min(pi_proximal / pi_behaviour, cap) per action [M]: truncated weights of a rollout that older weights made
    (decoupled as in arXiv:2505.24298, truncated as in arXiv:1802.01561).

    Args:
        proximal: [M] log-probabilities under the policy at the start of the update, around which the ratio is clipped.
        behaviour: [M] log-probabilities under the policy that acted.
    """
    return (proximal - behaviour).exp().clamp(max=cap)


def clipped_policy_loss(
    ratios: Tensor, advantages: Tensor, weights: Tensor, *, epsilon_low: float, epsilon_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """- sum of weight x min(ratio A, clip(ratio, 1 - low, 1 + high) A) (GRPO eq. 3, DAPO's two-sided range).

    Args:
        ratios: [M]; advantages: [M]; weights: [M] from `action_weights`.

    Returns:
        The loss, and metrics as pairs (see `grpo/metrics.py`).
    """
    clipped = ratios.clamp(1 - epsilon_low, 1 + epsilon_high)
    losses = -torch.minimum(ratios * advantages, clipped * advantages)
    metrics = {
        "policy_loss": weighted_sum(losses, weights),
        "ratio": weighted_sum(ratios, weights),
        "clip_low": weighted_sum((ratios < 1 - epsilon_low) & (advantages < 0), weights),
        "clip_high": weighted_sum((ratios > 1 + epsilon_high) & (advantages > 0), weights),
    }
    return (weights * losses).sum(), metrics


def temperature_direction(logprobs: Tensor, entropies: Tensor) -> Tensor:
    """d log pi(a) / d log(1 / temperature) = log pi(a) + entropy, per action: the score of the temperature knob.

    Args:
        logprobs: [M] of the actions; entropies: [M] of the distributions that they were drawn from, nats.

    Returns:
        [M], zero in expectation under the policy.
    """
    return logprobs + entropies


def exact_kl(log_policy: Tensor, log_reference: Tensor) -> Tensor:
    """KL(policy || reference) summed over the vocabulary, nats per action.

    Args:
        log_policy, log_reference: [M, V] normalised log-probabilities; -inf outside a shared nucleus.

    Returns:
        [M], non-negative up to rounding.
    """
    inside = log_policy > float("-inf")
    difference = (log_policy - log_reference).masked_fill(~inside, 0.0)
    return (log_policy.exp() * difference).sum(-1)
