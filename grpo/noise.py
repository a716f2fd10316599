"""Counter-based random numbers: every draw is a pure function of (row seed, counters).

A row's text must not depend on its batch mates, on the number of workers, or on where a run was resumed. So noise is
not drawn from a stream but computed: the SplitMix64 finaliser (Steele, Lea, Flood, OOPSLA 2014) hashes the row's seed
with each counter in turn, as in counter-based generators (Salmon et al., SC 2011).

1. Arithmetic is in int64, whose products wrap as SplitMix64's do; the logical right shift is built from the
   arithmetic one by clearing the sign bits that it drags in.
2. Uniforms carry 53 random bits in float64, offset by half a unit, so that 0 and 1 never occur and log(-log(u)) is
   finite: float32 uniforms lose the tail of a Gumbel and of an inverse distribution function.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB

STRATUM, JITTER, SHARE, KIND, OFFSET, SOURCE, ORDER, FILL, HIDE_LEFT, HIDE_RIGHT = range(10)
"""What a corrupted row's noise is for: the first counter after its seed. One row's corruption, fills and losses share a
seed, so two of these with one number would be one draw."""
PROPOSE, SEED, REMASK = 1, 2, 5
"""What a denoised row's noise is for: the counter after its step."""


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _absorb(state: Tensor, counter: int | Tensor) -> Tensor:
    offset = _GOLDEN + counter * _GOLDEN
    if isinstance(offset, int):  # a Python product does not wrap by itself
        offset = (offset + 2**63) % 2**64 - 2**63
    return _mix(state * 3 + offset)


def row_seeds(run_seed: int, stream: int, step: int, indices: Tensor) -> Tensor:
    """One seed per row, from the run's seed, what the noise is for, the step, and the row's global index.

    Args:
        run_seed: the run's seed.
        stream: distinguishes uses (rollouts, corruption, evaluation) that share a step.
        step: training step or round.
        indices: [B] int64, index of each row in the whole batch, whatever rank holds it.

    Returns:
        [B] int64.
    """
    state = torch.zeros_like(indices, dtype=torch.int64)
    for counter in (run_seed, stream, step, indices.long()):
        state = _absorb(state, counter)
    return state


def uniforms(seeds: Tensor, *counters: int | Tensor) -> Tensor:
    """Independent uniforms in (0, 1), one for each element of the broadcast of seeds and counters.

    Args:
        seeds: int64, any shape.
        counters: integers or int64 tensors that broadcast with the seeds.

    Returns:
        float64, of the broadcast shape.
    """
    state = seeds
    for counter in counters:
        state = _absorb(state, counter)
    return (_shift_right(_mix(state), 11).double() + 0.5) * 2.0**-53


def to_gumbels(noise: Tensor) -> Tensor:
    """Uniforms in (0, 1), of any shape, as standard Gumbel noise: argmax(logits + noise) samples softmax(logits)."""
    return -torch.log(-torch.log(noise))
