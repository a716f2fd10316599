"""Updates in bounded memory: by samples, by denoising steps that are replayed, and by slices of the vocabulary.

1. Where something below the heads trains, the states of a trajectory are computed again, one denoising step at a time:
   a part holds the actions of one step, and its backward frees the step's graph before the next one is built.
2. A uniformly drawn subset of k of the S steps, weighted by S / k, has the gradient of all steps in expectation.
3. Losses are sums over actions with denominators known before, so parts of any size add up to the same gradient.
4. Tables over the vocabulary are made for a slice of the actions at a time. Where there are several slices, each one's
   is dropped after the forward and made again in the backward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo.model import GPT
from grpo.noise import row_seeds, uniforms
from grpo.policy_loss import exact_kl
from grpo.slices import slices
from grpo.trajectory import (
    ACTION_FIELDS,
    Choices,
    Rollout,
    choice_log_probs,
    credited,
    policy_log_probs,
    taken,
)

REPLAY_STREAM = 23
"""Noise stream of the steps that are drawn (see `grpo.noise.row_seeds`)."""
CACHED = -1
"""The step of a part that is not replayed."""
TABLE = 1 << 24
"""Entries of the largest table over the vocabulary that an update makes; float32, 64 MB."""


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
    keep = torch.zeros(len(choices.eligible) // num_rows, num_rows, dtype=torch.bool, device=draws.device)
    keep[slice(None) if step == CACHED else step, samples] = True
    keep = keep.flatten()
    judged = keep[choices.eligible.nonzero()[:, 0]]
    return replace(
        choices,
        eligible=choices.eligible[keep],
        choice=(keep.cumsum(0) - 1)[choices.choice[draws]],
        rows=choices.rows[draws] - samples.start,
        **{name: getattr(choices, name)[draws] for name in ("left", "actions", "steps", "logprobs")},
        **{name: _pick(getattr(choices, name), judged) for name in ("hidden", "tokens", "neighbors", "by_lm")},
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


def action_values(policy: GPT, reference: GPT, part: Part, *, table: int = TABLE) -> tuple[Tensor, Tensor]:
    """What the policy loss needs of each credited action, in bounded memory.

    Args:
        table: entries of the largest table over the vocabulary.

    Returns:
        [m + d] log-probability under the policy; [m + d] KL(policy || reference) at its state, exact over the
        vocabulary or the positions, without gradient for the reference. Nats.
    """
    mine = with_states(policy, part)
    with torch.no_grad():
        theirs = with_states(reference, part)
    pieces = list(slices(len(mine.actions), policy.vocabulary.base_size, table))
    values = []
    for piece in pieces:
        both = [_slice(rollout, piece) for rollout in (mine, theirs)]
        if len(pieces) > 1 and torch.is_grad_enabled():
            kept = {"use_reentrant": False, "preserve_rng_state": False}
            values.append(checkpoint(_proposal_values, policy, reference, *both, **kept))
        else:
            values.append(_proposal_values(policy, reference, *both))
    logprobs, kl = (torch.cat(column) for column in zip(*values, strict=True))
    if mine.choices is not None:
        own = choice_log_probs(policy, mine.choices)
        with torch.no_grad():
            other = choice_log_probs(reference, theirs.choices)
        logprobs = torch.cat([logprobs, taken(own, mine.choices).to(logprobs.dtype)])
        kl = torch.cat([kl, exact_kl(own, other).to(kl.dtype)])
    return logprobs, kl


def _slice(rollout: Rollout, piece: slice) -> Rollout:
    return replace(rollout, **{name: _pick(getattr(rollout, name), piece) for name in ACTION_FIELDS})


def _proposal_values(policy: GPT, reference: GPT, mine: Rollout, theirs: Rollout) -> tuple[Tensor, Tensor]:
    own = policy_log_probs(policy, mine)
    with torch.no_grad():
        other = policy_log_probs(reference, theirs)
    return taken(own, mine), exact_kl(own, other)


@torch.no_grad()
def part_logprobs(policy: GPT, part: Part, *, table: int = TABLE) -> Tensor:
    """[m + d] log-probabilities of the part's actions under the policy's present weights, nats."""
    mine = with_states(policy, part)
    pieces = [_slice(mine, piece) for piece in slices(len(mine.actions), policy.vocabulary.base_size, table)]
    logprobs = [taken(policy_log_probs(policy, piece), piece) for piece in pieces]
    if mine.choices is not None:
        logprobs.append(taken(choice_log_probs(policy, mine.choices), mine.choices).to(logprobs[0].dtype))
    return torch.cat(logprobs)
