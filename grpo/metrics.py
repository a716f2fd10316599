"""Measurements: sums that can be merged and all-reduced, AUROC, calibration error, bits per byte, settling of a signal.

1. A metric is a pair (weighted sum, weight) in one float64 tensor of shape [2]. Pairs add over micro-batches, steps
   and ranks, and are divided once, when somebody reads them; a mean of means would weigh unequal parts equally.
2. `pack_sums` stacks all pairs into one [K, 2] tensor, so that a step costs one all-reduce. The all-reduce itself is
   applied from outside.
3. AUROC is the exact rank statistic with ties counted half (Mann-Whitney), not a trapezoid over thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_BINS = 15
"""Of the calibration error, over [0, 1]."""


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """The pair (sum of weights x values, sum of weights), detached.

    Args:
        values: any shape; where the weight is zero the value may be anything, NaN included.
        weights: bool or float, of the same shape.

    Returns:
        [2] float64.
    """
    weights = weights.double()
    values = torch.where(weights != 0, values.detach().double(), 0.0)
    return torch.stack([(weights * values).sum(), weights.sum()])


def merge_sums(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add two dictionaries of pairs; a name that one of them lacks counts as (0, 0)."""
    return {**left, **{name: left[name] + pair if name in left else pair for name, pair in right.items()}}


def accumulate(sums: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    """Add pairs to those gathered so far, in place."""
    sums.update(merge_sums(sums, part))


def pack_sums(sums: dict[str, Tensor]) -> Tensor:
    """Stack all pairs, by sorted name, into [K, 2] float64: one tensor to all-reduce. Ranks must share the names."""
    return torch.stack([sums[name] for name in sorted(sums)])


def unpack_sums(names: list[str] | dict[str, Tensor], packed: Tensor) -> dict[str, Tensor]:
    """Undo `pack_sums` after an all-reduce.

    Args:
        names: the packed names, in any order.
        packed: [K, 2].
    """
    return dict(zip(sorted(names), packed.unbind(0), strict=True))


def means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Read every pair as sum / weight with one transfer to the host; names of zero weight are left out."""
    if not sums:
        return {}
    rows = zip(sorted(sums), pack_sums(sums).tolist(), strict=True)
    return {name: total / weight for name, (total, weight) in rows if weight != 0}


def reduced_means(sums: dict[str, Tensor], all_reduce: Callable[..., Tensor]) -> dict[str, float]:
    """Means of pairs over all ranks."""
    return means(unpack_sums(sums, all_reduce(pack_sums(sums)))) if sums else {}


def auroc(scores: Tensor, targets: Tensor) -> Tensor:
    """P(score of a positive > score of a negative) + half of P(tie).

    Args:
        scores: [N] real.
        targets: [N] bool, True for the positives.

    Returns:
        0-dimensional float64 in [0, 1]; NaN when one of the two classes is absent.
    """
    _, tie_group, tie_counts = torch.unique(scores, return_inverse=True, return_counts=True)
    last_rank = tie_counts.cumsum(0).double()
    average_rank = (last_rank - (tie_counts.double() - 1) / 2)[tie_group]
    num_positive = targets.sum().double()
    num_negative = targets.numel() - num_positive
    rank_sum = torch.where(targets, average_rank, 0.0).sum()
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def expected_calibration_error(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Mean over equal-width bins, weighted by count, of |mean probability - frequency| (arXiv:1706.04599).

    Args:
        probabilities: [N] in [0, 1], predicted probability of the positive class.
        targets: [N] bool.

    Returns:
        0-dimensional float64 in [0, 1].
    """
    probabilities = probabilities.double()
    bins = (probabilities * _BINS).long().clamp(0, _BINS - 1)
    gap = torch.zeros(_BINS, dtype=torch.float64, device=probabilities.device)
    gap.index_add_(0, bins, probabilities - targets.double())
    return gap.abs().sum() / probabilities.numel()


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Convert nats per token into bits per byte of text."""
    return nats_per_token / math.log(2) / bytes_per_token


def settle_index(signal: Tensor, target: float, tolerance: float) -> int | None:
    """First index from which [n] readings of the signal stay within the tolerance to the end; None: they never do."""
    outside = (signal - target).abs() > tolerance
    first = int(outside.nonzero().max()) + 1 if outside.any() else 0
    return first if first < len(signal) else None


def overshoot(signal: Tensor, target: float) -> float:
    """How far [n] readings of the signal pass the target, seen from the side where they stood furthest from it."""
    error = signal - target
    furthest = error.abs().argmax()
    return max(0.0, float((error[furthest:] * -error[furthest].sign()).max()))
