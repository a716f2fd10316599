"""The discriminator's loss and the rewards that it gives.

The reward head reads a text's frozen features and returns two pooled logits (natural, synthetic) and one log-odds of
natural per token. Sources: LSGAN's squared error for `mse`, cross-entropy with soft labels, Bradley-Terry for pairs;
dense rewards after ScratchGAN (arXiv:1905.09922).

1. The gradient of `mse` on softmax vanishes where the head is confidently wrong, so cross-entropy on logits is the
   default.
2. The per-token output is trained on the same label as its text. Averaged over a text it is a discriminator by
   itself; token by token it says where the text gives itself away, which a parallel generator needs to learn from.
3. Only completion tokens are scored: prompts are the same on both sides. A text without any has no say.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.metrics import weighted_sum


def log_odds(logits: Tensor) -> Tensor:
    """log P(natural) - log P(synthetic) from pooled logits [B, 2]; returns [B]."""
    if logits.dim() != 2 or logits.shape[1] != 2:
        raise ValueError(f"pooled logits must be [B, 2] (natural, synthetic), got {tuple(logits.shape)}")
    return logits[:, 0] - logits[:, 1]


def told_apart(generated: Tensor, natural: Tensor, loss: str) -> Tensor:
    """Which texts a head takes for what they are.

    Args:
        generated, natural: [m] log-odds of natural.
        loss: that trains the head. `bradley_terry` knows differences alone: it compares the two of each pair.

    Returns:
        [2m] bool, generated texts first.
    """
    if loss == "bradley_terry":
        return (natural > generated).repeat(2)
    return torch.cat([generated < 0, natural > 0])


def discriminator_loss(
    logits: Tensor,
    token_logits: Tensor,
    natural: Tensor,
    completion_mask: Tensor,
    *,
    loss: str,
    smoothing: float,
    total_texts: Tensor | int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pooled loss plus per-token cross-entropy, summed over texts and divided by their global number.

    Args:
        logits: [B, 2] pooled (natural, synthetic).
        token_logits: [B, T] log-odds of natural per token.
        natural: [B] bool, the label. `bradley_terry` pairs the i-th natural with the i-th synthetic text.
        completion_mask: [B, T] bool, tokens that are scored.
        loss: `mse`, `bce` or `bradley_terry`, for the pooled logits.
        smoothing: targets are smoothing and 1 - smoothing.
        total_texts: texts over all ranks and micro-batches.

    Returns:
        The loss, and metrics as pairs (see `grpo/metrics.py`).

    Raises:
        ValueError: `bradley_terry` with unequal numbers of natural and synthetic texts.
    """
    target = natural.to(logits.dtype) * (1 - 2 * smoothing) + smoothing
    odds, has_text = log_odds(logits), completion_mask.any(-1)
    if loss == "bradley_terry":
        better, worse = odds[natural], odds[~natural]  # the host waits for their numbers: for this loss alone
        if len(better) != len(worse):
            raise ValueError(f"bradley_terry needs pairs, got {len(better)} natural and {len(worse)} synthetic texts")
        margin = better - worse
        wanted = torch.full_like(margin, 1 - smoothing)
        counted = torch.cat([has_text[~natural], has_text[natural]])
        both = counted.view(2, -1).all(0).to(odds.dtype)
        pooled = 2 * F.binary_cross_entropy_with_logits(margin, wanted, weight=both, reduction="sum")
        told = told_apart(worse, better, loss)
    else:
        if loss == "mse":
            soft = torch.stack([target, 1 - target], -1)
            pooled = ((logits.softmax(-1) - soft).square().mean(-1) * has_text).sum()
        else:
            pooled = F.binary_cross_entropy_with_logits(odds, target, weight=has_text.to(odds.dtype), reduction="sum")
        told, counted = torch.where(natural, odds > 0, odds < 0), has_text
    lengths = completion_mask.sum(-1).clamp(min=1)
    per_token = F.binary_cross_entropy_with_logits(
        token_logits, target[:, None].expand_as(token_logits), reduction="none"
    )
    token = ((per_token * completion_mask).sum(-1) / lengths).sum()
    total = (pooled + token) / total_texts
    count = has_text.sum()
    metrics = {
        "reward_loss_pooled": torch.stack([pooled.detach(), count]).double(),
        "reward_loss_token": torch.stack([token.detach(), count]).double(),
        "reward_accuracy_train": weighted_sum(told, counted),
    }
    return total, metrics


def dense_rewards(
    logits: Tensor, token_logits: Tensor, completion_mask: Tensor, *, credit: str, signal: str, window: int = 0
) -> Tensor:
    """What each completion token earns.

    Args:
        logits: [B, 2] pooled; token_logits: [B, T]; completion_mask: [B, T] bool.
        credit: `sequence`: the pooled signal at every token. `token`: the token's own signal. `both`: the token's own
            signal plus the text's mean over tokens. `window`: the mean signal of completion tokens within reach.
        signal: `log_odds`, or `probability` P(natural).
        window: reach of credit `window`, tokens on each side.

    Returns:
        [B, T], zero outside completions.
    """
    shape = torch.sigmoid if signal == "probability" else lambda odds: odds
    if credit == "sequence":
        rewards = shape(log_odds(logits))[:, None].expand_as(token_logits)
    else:
        rewards = shape(token_logits)
        if credit == "both":
            mean = (rewards * completion_mask).sum(-1, keepdim=True) / completion_mask.sum(-1, keepdim=True).clamp(
                min=1
            )
            rewards = rewards + mean
        elif credit == "window":
            sums, counts = (
                F.avg_pool1d(x[:, None], 2 * window + 1, stride=1, padding=window)[:, 0]
                for x in (rewards * completion_mask, completion_mask.to(rewards.dtype))
            )
            rewards = sums / counts.clamp(min=1e-6)
    return rewards * completion_mask


def reward_steps(
    current: int, accuracy: float, *, band_low: float, band_high: float, min_steps: int, max_steps: int
) -> int:
    """How many reward steps follow: one more below the accuracy band, one fewer above it."""
    wanted = current + (accuracy < band_low) - (accuracy > band_high)
    return min(max(wanted, min_steps), max_steps)
