"""Estimators of a diffusion policy's log-likelihood gradient behind one interface: what others use, and the exact one.

An estimator is a generator function of (model, batch, seed) that yields one loss per trunk pass, to be
differentiated at once. Summed over the passes, the losses' gradient estimates that of

    - sum over samples b of  advantage_b / B  x  log p(trajectory_b)

whose exact value credits every kept token, given the state from which it was proposed (`grpo/trajectory.py`).

    one-step          every completion token from the fully masked completion           d1, arXiv:2504.12216
    coupled           a random mask, its complement, and the full mask, averaged        coupled-GRPO, arXiv:2506.20639
    ELBO, k           k random masks of l of L tokens, each weighted L / l              arXiv:2502.09992, VRPO, ESPO
    merged, N         the steps in N segments, a segment's tokens from its first input  d2, arXiv:2509.21474; BGPO
    subset, k         k of the S steps, drawn at random, weighted S / k                 `grpo.replay_steps`
    exact             all S steps                                                       `grpo.trainable: lora | all`

1. Only what a row of this table says is taken from its source: prompts are never masked, the temperature is 1, and an
   ELBO's mask has a number of tokens that is uniform in 1..L, for all sources alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from grpo.model import GPT, text_logits
from grpo.noise import row_seeds, uniforms
from grpo.replay import draw_steps, split, with_states
from grpo.trajectory import Rollout, trajectory_logprobs


@dataclass(frozen=True)
class Batch:
    """Finished trajectories and what they earned."""

    rollout: Rollout
    """To be replayed, kept tokens credited."""
    advantages: Tensor
    """[B]."""

    @property
    def steps(self) -> int:
        return len(self.rollout.inputs)


Estimate = Callable[[GPT, Batch, int], Iterator[Tensor]]


@dataclass(frozen=True)
class Estimator:
    name: str
    estimate: Estimate
    random: bool = False
    """Whether another seed gives another estimate."""


def pass_loss(model: GPT, batch: Batch, inputs: Tensor, filled: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Loss of one pass: the final text's tokens where `filled` [B, T], given `inputs` [B, T]; weights [B]."""
    states = model.encode(inputs)[filled]
    logprobs = text_logits(model.heads["lm"](states), model.vocabulary).log_softmax(-1)
    taken = logprobs.gather(-1, batch.rollout.tokens[filled][:, None])[:, 0]
    credit = batch.advantages * weights / len(batch.advantages)
    return -(credit[filled.nonzero()[:, 0]] * taken).sum()


def masked_loss(model: GPT, batch: Batch, hidden: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """The same of the final text with [MASK]s where `hidden`, at these."""
    return pass_loss(model, batch, batch.rollout.tokens.masked_fill(hidden, model.vocabulary.mask_id), hidden, weights)


def one_step(model: GPT, batch: Batch, seed: int) -> Iterator[Tensor]:
    yield masked_loss(model, batch, batch.rollout.completion_mask)


def coupled(model: GPT, batch: Batch, seed: int) -> Iterator[Tensor]:
    completion = batch.rollout.completion_mask
    rate = 0.2 + 0.6 * _uniforms(batch, seed, 0)[:, :1]  # the source's range
    mask = completion & (_uniforms(batch, seed, 1) < rate)
    for hidden in (mask, completion & ~mask, completion):
        yield masked_loss(model, batch, hidden, 0.5)


def elbo(k: int, model: GPT, batch: Batch, seed: int) -> Iterator[Tensor]:
    completion = batch.rollout.completion_mask
    length = completion.sum(1)
    for draw in range(k):
        noise = _uniforms(batch, seed, 2, draw).masked_fill(~completion, 2.0)
        number = 1 + (_uniforms(batch, seed, 3, draw)[:, 0] * length).long()
        hidden = noise.argsort(1).argsort(1) < number[:, None]
        yield masked_loss(model, batch, hidden, (length / number / k).to(batch.advantages.dtype))


def merged(segments: int, model: GPT, batch: Batch, seed: int) -> Iterator[Tensor]:
    """The tokens that a segment's steps fill and keep, all from the segment's first input."""
    rollout, mask_id = batch.rollout, model.vocabulary.mask_id
    bounds = [batch.steps * i // segments for i in range(segments + 1)]
    for first, after in zip(bounds, bounds[1:], strict=False):
        hidden = rollout.inputs[first] == mask_id
        later = rollout.inputs[after] == mask_id if after < batch.steps else torch.zeros_like(hidden)
        yield pass_loss(model, batch, rollout.inputs[first], hidden & ~later)


def subset(k: int, model: GPT, batch: Batch, seed: int) -> Iterator[Tensor]:
    """k = 0: all steps, the exact gradient."""
    drawn = draw_steps(seed, 0, batch.steps, k)
    for part in split(batch.rollout, 0):
        if part.step in drawn:
            credit = batch.advantages[part.rollout.rows] * batch.steps / len(drawn)
            yield -(credit * trajectory_logprobs(model, with_states(model, part))).sum() / len(batch.advantages)


def _uniforms(batch: Batch, seed: int, *counters: int) -> Tensor:
    rows, columns = batch.rollout.tokens.shape
    seeds = row_seeds(seed, 0, 0, torch.arange(rows))
    return uniforms(seeds[:, None], *counters, torch.arange(columns))


EXACT = Estimator("exact", partial(subset, 0))


def estimators(steps: int) -> list[Estimator]:
    """All of them, for trajectories of this many steps; the exact one last."""
    return [
        Estimator("one-step", one_step),
        Estimator("coupled", coupled, random=True),
        *(Estimator(f"ELBO, k = {k}", partial(elbo, k), random=True) for k in (1, 2, 4)),
        *(Estimator(f"merged, N = {n}", partial(merged, n)) for n in (2, 4, 8) if n < steps),
        *(Estimator(f"subset, k = {k}", partial(subset, k), random=True) for k in (1, 2, 4, 8) if k < steps),
        EXACT,
    ]


def gradient(estimator: Estimator, model: GPT, batch: Batch, seed: int = 0) -> tuple[Tensor, int]:
    """The estimate over all parameters that train, flat, and the trunk passes that it took."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    passes = 0
    for loss in estimator.estimate(model, batch, seed):
        loss.backward()
        passes += 1
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]), passes
