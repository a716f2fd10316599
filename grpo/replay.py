"""Updates in bounded memory: by samples, by denoising steps that are replayed, and by slices of the vocabulary.

1. Where something below the heads trains, the states of a trajectory are computed again, one denoising step at a time:
   a part holds the actions of one step, and its backward frees the step's graph before the next one is built.
2. A uniformly drawn subset of k of the S steps, weighted by S / k, has the gradient of all steps in expectation.
3. Losses are sums over actions with denominators known before, so parts of any size add up to the same gradient.
4. Tables over the vocabulary, or over the positions of re-mask draws, are made for a slice at a time. Where there are
   several slices, each one's is dropped after the forward and made again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo.model import GPT
from grpo.noise import row_seeds, uniforms
from grpo.policy_loss import exact_kl
from grpo.remasking import draw_log_probs
from grpo.slices import slices
from grpo.trajectory import (
    ACTION_FIELDS,
    TABLE,
    Choices,
    Data,
    Rollout,
    choice_weights,
    credited,
    judged_wrong,
    policy_log_probs,
    taken,
)

REPLAY_STREAM = 23
"""Noise stream of the steps that are drawn (see `grpo.noise.row_seeds`)."""
CACHED = -1
"""The step of a part that is not replayed."""
DRAW_FIELDS = ("choice", "draw", "actions")
"""Fields of `Choices` with one entry per draw that its probability needs."""
JUDGED_FIELDS = ("hidden", "tokens", "neighbors", "by_lm")
"""Fields of `Choices` with one entry per judged position."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of a rollout's actions, which one backward takes."""

    rollout: Rollout
    """The rollout as if it had had these samples and, replayed, this one step only."""
    index: Tensor
    """[m + d] int64, which of the rollout's M + D credited actions these are."""
    samples: slice
    """Which of the rollout's samples."""
    step: int
    """Denoising step of a replayed part; CACHED where the states are, and all steps lie together."""
    padded: bool
    """Whether attention must be kept off pads; of a replayed part."""

    def to(self, device: torch.device | str) -> Part:
        return replace(self, rollout=self.rollout.to(device), index=self.index.to(device))


def split(rollout: Rollout, micro_batch: int) -> list[Part]:
    """Cut a rollout into parts of at most `micro_batch` samples (0: all), one per denoising step where it is replayed.

    Parts without actions are left out, but for the last where there are no others.
    """
    if rollout.inputs is None and (not micro_batch or micro_batch >= len(rollout.tokens)):
        every = torch.arange(len(credited(rollout, "rows")), device=rollout.rows.device)
        return [Part(rollout=rollout, index=every, samples=slice(None), step=CACHED, padded=False)]
    size = micro_batch or len(rollout.tokens)
    steps = [CACHED] if rollout.inputs is None else range(len(rollout.inputs))
    starts = range(0, len(rollout.tokens), size)
    parts = [_part(rollout, slice(start, start + size), step) for start in starts for step in steps]
    return [part for part in parts if len(part.index)] or parts[-1:]


def _part(rollout: Rollout, samples: slice, step: int) -> Part:
    rows = torch.arange(len(rollout.tokens), device=rollout.rows.device)[samples]
    choices = rollout.choices

    def mine(kind: Rollout | Choices) -> Tensor:
        inside = (kind.rows >= rows[0]) & (kind.rows <= rows[-1])
        return (inside if step == CACHED else inside & (kind.steps == step)).nonzero()[:, 0]

    actions = mine(rollout)
    chosen = {name: _pick(getattr(rollout, name), actions) for name in ACTION_FIELDS}
    draws = actions[:0]
    if choices is not None:
        draws = mine(choices)
        choices = _some_choices(choices, draws, samples, step, len(rollout.tokens)) if len(draws) else None
    small = replace(
        rollout,
        tokens=rollout.tokens[samples],
        attention_mask=rollout.attention_mask[samples],
        completion_mask=rollout.completion_mask[samples],
        waves=None if rollout.waves is None else rollout.waves[slice(None) if step == CACHED else [step], samples],
        inputs=None if rollout.inputs is None else rollout.inputs[step : step + 1, samples],
        choices=choices,
        **(chosen | {"rows": chosen["rows"] - rows[0]}),
    )
    return Part(
        rollout=small,
        index=torch.cat([actions, len(rollout.actions) + draws]),
        samples=samples,
        step=step,
        padded=not bool(small.attention_mask.all()),
    )


def _some_choices(choices: Choices, draws: Tensor, samples: slice, step: int, num_rows: int) -> Choices:
    """The choices of some samples, at one step or at all; choice s x B + b is row b's at step s."""
    keep = torch.zeros(len(choices.turns) // num_rows, num_rows, dtype=torch.bool, device=draws.device)
    keep[slice(None) if step == CACHED else step, samples] = True
    keep = keep.flatten()
    judged = keep[choices.eligible.nonzero()[:, 0]]
    return replace(
        choices,
        turns=choices.turns[keep],
        choice=(keep.cumsum(0) - 1)[choices.choice[draws]],
        rows=choices.rows[draws] - samples.start,
        **{name: getattr(choices, name)[draws] for name in ("draw", "actions", "steps", "logprobs")},
        **{name: _pick(getattr(choices, name), judged) for name in JUDGED_FIELDS},
        inputs=None if choices.inputs is None else choices.inputs[step : step + 1, samples],
    )


def _pick(values: Tensor | None, which: Tensor) -> Tensor | None:
    return None if values is None else values[which]


def draw_steps(run_seed: int, update: int, steps: int, num: int) -> list[int]:
    """`num` different ones of 0..steps-1, all subsets equally likely, the same on every rank; all of them for num = 0.

    Args:
        update: number of the optimizer step.
    """
    if not num:
        return list(range(steps))
    seeds = row_seeds(run_seed, REPLAY_STREAM, update, torch.arange(steps))
    return uniforms(seeds).argsort()[:num].tolist()


def with_states(model: GPT, part: Part) -> Rollout:
    """The part with states under the model's present trunk: a pass through it, and one more where a head of the
    generator judged the filled text; or its cached ones."""
    rollout, choices = part.rollout, part.rollout.choices
    if rollout.inputs is None:
        return rollout
    causal = model.trunk.causal
    visible = rollout.attention_mask if part.padded and not causal else None
    states = model.encode(rollout.inputs[0], visible)
    if choices is not None:
        read = states if choices.inputs is None else model.encode(choices.inputs[0], visible)
        choices = replace(choices, hidden=read[choices.eligible])
    return replace(rollout, hidden=states[rollout.rows, rollout.positions - int(causal)], choices=choices)


def action_values(policy: GPT, reference: GPT, part: Part) -> tuple[Tensor, Tensor]:
    """What the policy loss needs of each credited action, in bounded memory.

    Returns:
        [m + d] log-probability under the policy; [m + d] KL(policy || reference) at its state, exact over the
        vocabulary or the positions, without gradient for the reference. Nats.
    """
    table, mine = TABLE[part.index.device.type], with_states(policy, part)
    with torch.no_grad():
        theirs = with_states(reference, part)

    def proposals(piece: slice) -> tuple[Tensor, Tensor]:
        rollout = _slice(mine, piece, ACTION_FIELDS)
        own = policy_log_probs(policy, rollout)
        with torch.no_grad():
            other = policy_log_probs(reference, _slice(theirs, piece, ACTION_FIELDS))
        return taken(own, rollout), exact_kl(own, other)

    values = _by_slices(proposals, slices(len(mine.actions), policy.vocabulary.base_size, table))
    logprobs, kl = (torch.cat(column) for column in zip(*values, strict=True))
    if mine.choices is None:
        return logprobs, kl
    weights = _weights(policy, mine.choices, table)
    with torch.no_grad():
        others = _weights(reference, theirs.choices, table)

    def draws(piece: slice) -> tuple[Tensor, Tensor]:
        choices = _slice(mine.choices, piece, DRAW_FIELDS)
        own = draw_log_probs(weights, choices.turns, choices.choice, choices.draw)
        with torch.no_grad():
            other = draw_log_probs(others, choices.turns, choices.choice, choices.draw)
        return taken(own, choices), exact_kl(own, other)

    values = _by_slices(draws, slices(len(mine.choices.actions), weights.shape[1], table))
    of_draws, kl_of_draws = (torch.cat(column).to(logprobs.dtype) for column in zip(*values, strict=True))
    return torch.cat([logprobs, of_draws]), torch.cat([kl, kl_of_draws])


@torch.no_grad()
def part_logprobs(policy: GPT, part: Part) -> Tensor:
    """[m + d] log-probabilities of the part's actions under the policy's present weights, nats."""
    table, mine, choices = TABLE[part.index.device.type], with_states(policy, part), part.rollout.choices
    rollouts = (
        _slice(mine, piece, ACTION_FIELDS) for piece in slices(len(mine.actions), policy.vocabulary.base_size, table)
    )
    logprobs = [taken(policy_log_probs(policy, rollout), rollout) for rollout in rollouts]
    if choices is not None:
        weights = _weights(policy, mine.choices, table)
        draws = (_slice(choices, piece, DRAW_FIELDS) for piece in slices(len(choices.actions), weights.shape[1], table))
        tables = ((draw_log_probs(weights, d.turns, d.choice, d.draw), d) for d in draws)
        logprobs += [taken(drawn, d).to(logprobs[0].dtype) for drawn, d in tables]
    return torch.cat(logprobs)


def _weights(model: GPT, choices: Choices, table: int) -> Tensor:
    """`choice_weights` under the model's present heads."""
    judged = slices(len(choices.hidden), model.vocabulary.base_size, table)
    log_wrong = _by_slices(lambda piece: judged_wrong(model, _slice(choices, piece, JUDGED_FIELDS)), judged)
    return choice_weights(choices, torch.cat(log_wrong))


def _by_slices(function: Callable[[slice], Any], pieces: Iterable[slice]) -> list[Any]:
    """What a function makes of each slice; where there are several, its tables are made again in the backward."""
    pieces = list(pieces)
    if len(pieces) == 1 or not torch.is_grad_enabled():
        return [function(piece) for piece in pieces]
    return [checkpoint(function, piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]


def _slice(data: Data, piece: slice, names: tuple[str, ...]) -> Data:
    return replace(data, **{name: _pick(getattr(data, name), piece) for name in names})
