"""Masked-diffusion sampling: fill every [MASK], take back what the schedule says, until nothing is masked.

Each step fills all [MASK]s, at once or by the wavefront, then re-masks the number that the schedule leaves, chosen by
a re-masking policy among unprotected positions. The last step leaves none.

1. One trunk forward per step; a second one where the policy reads the filled text, never on the last step, nor at
   randomness 1, where all that is eligible is alike.
2. The number of [MASK]s at each step follows from the first input, so the host reads all of them once per call, and
   head logits are computed at [MASK]s only. (The wavefront reads its waves' sizes once per step.)
3. `random` and `confidence` take back only tokens filled in the same step, as MDLM (arXiv:2406.07524) and MaskGIT
   (arXiv:2202.04200) do; `self`, `critic` and `model` may take back any unprotected one.
4. All noise is a function of (row seed, step, purpose, position), so a row's text depends on its seed and not on its
   batch mates, up to the last bits of the matrix products.
5. Each step's record holds what the exact probability of its actions needs. Nothing is replayed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.model import GPT
from grpo.noise import PROPOSE, REMASK, uniforms
from grpo.remasking import FRESH_ONLY, POLICIES, Filled, by_chance, choose, resolve_policy
from grpo.slices import slices
from grpo.wavefront import propose, wavefront_fill

NOISE_AT_ONCE = 1 << 20
"""Numbers of noise that are computed together: it takes fifty operations, however many they are."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One denoising step. M positions were filled, in row-major order."""

    step: int
    """From 0."""
    inputs: Tensor
    """[B, T] int64, before the fill."""
    masked: Tensor
    """[B, T] bool, positions filled in this step."""
    hidden: Tensor
    """[M, C] trunk states there."""
    proposals: Tensor
    """[B, T] int64, the filled text."""
    logprobs: Tensor
    """[M] behaviour log-probability of each proposal, temperature and nucleus included, nats."""
    entropies: Tensor
    """[M] entropy of the distribution that each was drawn from, nats."""
    support: Tensor | None
    """[M, base_size] bool, the nucleus; None at top_p 1."""
    neighbors: Tensor | None
    """[M, 2] int64, tokens that the sampler saw left and right, -1 for none; None without the wavefront."""
    by_lm: Tensor | None
    """[M] bool, proposals that seeded a row from the lm head; None without the wavefront."""
    waves: Tensor | None
    """[B] int64, waves that each row took; None without the wavefront."""
    eligible: Tensor
    """[B, T] bool, positions that might have been re-masked."""
    remask: Tensor
    """[B, T] bool, positions re-masked after this step."""
    num_remasked: int
    """Their number in the batch, known to the host."""
    remask_order: Tensor
    """[B, T] int64, the same in the order drawn, then -1: a Plackett-Luce sample with weights of `scores`."""
    scores: Tensor | None
    """[B, T] float64 log P(wrong); None on the last step."""
    judged: Tensor | None
    """[N, C], states of the filled text at its N eligible positions, which `self` and `critic` scored."""


def num_masked_after(step: int, steps: int, n: Tensor, schedule: str) -> Tensor:
    """How many of n positions stay [MASK] after a step; 0 after the last.

    Args:
        step: from 0.
        n: int64, any shape.
        schedule: `linear`, or `cosine` (MaskGIT, arXiv:2202.04200), which fills few at first.
    """
    if schedule == "linear":
        return n * (steps - 1 - step) // steps
    if schedule == "cosine":
        return (n.double() * math.cos(math.pi / 2 * (step + 1) / steps)).floor().long()
    raise ValueError(f"denoise.schedule must be one of linear, cosine, got {schedule!r}")


@torch.no_grad()
def denoise(
    model: GPT,
    tokens: Tensor,
    *,
    seeds: Tensor,
    steps: int,
    schedule: str = "linear",
    temperature: float = 1.0,
    top_p: float = 1.0,
    remasking: str = "auto",
    randomness: float = 1.0,
    protected: Tensor | None = None,
    attention_mask: Tensor | None = None,
    sampler: bool = False,
    min_neighbors_ratio: float = 0.01,
    mask_bias: Tensor | float = 0.0,
    remasking_model: GPT | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    record: bool = True,
) -> Tensor:
    """Turn [MASK]s into text.

    Args:
        model: a bidirectional generator, in eval mode.
        tokens: [B, T] int64.
        seeds: [B] int64, one per row (`noise.row_seeds`).
        steps: S.
        protected: [B, T] bool, never re-masked; None protects every token that is given. Pads always are.
        attention_mask: [B, T] bool, True = real token.
        sampler: fill by the wavefront.
        mask_bias: on the [MASK] logit, for policy `self`.
        on_step: called with each step's record.
        record: that record holds entropies and support, which cost a pass over the logits.

    Returns:
        [B, T] int64 without [MASK].
    """
    policy = resolve_policy(remasking, model, remasking_model)
    if policy == "random":
        randomness = 1.0  # a top k of equal scores would take the leftmost
    vocabulary = model.vocabulary
    columns = tokens.shape[1]
    record = record and on_step is not None
    real = tokens != vocabulary.pad_id if attention_mask is None else attention_mask
    masked = (tokens == vocabulary.mask_id) & real
    pool = real & (masked if protected is None else ~protected)
    if policy in FRESH_ONLY:
        pool = pool & masked
    num_free = pool.sum(1)
    left = torch.stack([num_masked_after(step, steps, num_free, schedule) for step in range(steps)])  # [S, B]
    counts = torch.cat([masked.sum()[None], left.sum(1), num_free.sum()[None]])
    *num_masked, num_pool = [int(count) for count in counts.cpu()]  # the host's one read

    for step, noise in enumerate(_noise(seeds, steps, columns, (REMASK,) if sampler else (PROPOSE, REMASK))):
        places = torch.nonzero_static(masked.flatten(), size=num_masked[step])[:, 0]
        neighbors = by_lm = waves = None
        if sampler:
            hidden_BTC = model.encode(tokens, attention_mask)
            hidden = hidden_BTC.flatten(0, 1)[places]
            front = wavefront_fill(
                model, hidden_BTC, tokens, seeds=seeds, step=step, temperature=temperature, top_p=top_p,
                min_neighbors_ratio=min_neighbors_ratio, attention_mask=attention_mask, record=record,
            )
            filled, sampled = front.tokens, front.sampled
            neighbors, by_lm, waves = front.neighbors, front.by_lm, front.waves
        else:
            hidden = model.encode(tokens, attention_mask, at=places)
            sampled = propose(
                model, hidden, noise[0].flatten()[places], temperature=temperature, top_p=top_p,
                record=record,
            )
            filled = tokens.flatten().scatter(0, places, sampled.tokens).view_as(tokens)

        eligible = pool & masked if policy in FRESH_ONLY else pool
        if step == steps - 1:
            verdict = None
            remask, order = torch.zeros_like(masked), torch.full_like(tokens, -1)
        else:
            confidences = sampled.confidences.new_zeros(tokens.numel()).scatter(0, places, sampled.confidences)
            verdict = (by_chance if randomness == 1 else POLICIES[policy])(
                Filled(
                    model=model, tokens=filled, attention_mask=attention_mask, eligible=eligible,
                    num_eligible=num_pool, confidences=confidences.view_as(tokens), mask_bias=mask_bias,
                    remasking_model=remasking_model,
                )
            )
            remask, order = choose(
                verdict.log_wrong, left[step], eligible, randomness=randomness, noise=noise[-1]
            )
        if on_step is not None:
            on_step(
                StepRecord(
                    step=step, inputs=tokens, masked=masked, hidden=hidden, proposals=filled,
                    logprobs=sampled.logprobs, entropies=sampled.entropies, support=sampled.support,
                    neighbors=neighbors, by_lm=by_lm, waves=waves,
                    eligible=eligible, remask=remask, num_remasked=num_masked[step + 1], remask_order=order,
                    scores=None if verdict is None else verdict.log_wrong,
                    judged=None if verdict is None else verdict.hidden,
                )
            )
        tokens, masked = torch.where(remask, vocabulary.mask_id, filled), remask
    return tokens


def _noise(seeds: Tensor, steps: int, columns: int, purposes: tuple[int, ...]) -> Iterator[Tensor]:
    """Each step's uniforms [purposes, B, T], of several steps at once; the wavefront draws its proposals' itself."""
    column = torch.arange(columns, device=seeds.device)
    purpose = torch.tensor(purposes, device=seeds.device)[:, None, None]
    for part in slices(steps, len(purposes) * len(seeds) * columns, NOISE_AT_ONCE):
        step = torch.arange(part.start, part.stop, device=seeds.device)[:, None, None, None]
        yield from uniforms(seeds[:, None], step, purpose, column)
