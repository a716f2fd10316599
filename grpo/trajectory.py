"""Rollouts that remember what the update needs: the policy's actions, their states and their exact log-probabilities.

1. An action is one proposed token at one denoising step (DESIGN 9). Its state is the trunk's hidden state there, which
   a frozen trunk never changes; under the wavefront also the neighbours that were visible. So likelihood ratios and KL
   need head-sized matrix products only, and no replay of the trajectory.
2. The remasker is part of the environment. When it ignores the proposals (`random`), proposals that it discards have
   zero expected score, and only kept ones are credited.
3. Probabilities are those that were sampled from: temperature and nucleus included. The nucleus is the behaviour
   policy's, kept with the action, so that a ratio compares two distributions over the same support.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from grpo.autoregress import generate
from grpo.config import DenoiseSection
from grpo.denoise import StepRecord, denoise
from grpo.model import GPT
from grpo.wavefront import proposal_logits, proposal_logprobs


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """B = N x G finished samples (row n x G + g continues prompt n) and their M credited actions, on the CPU."""

    tokens: Tensor
    """[B, T] int64, prompt and completion."""
    attention_mask: Tensor
    """[B, T] bool, False at pads."""
    completion_mask: Tensor
    """[B, T] bool, generated positions."""
    group_size: int
    """G."""
    temperature: float
    """Temperature of the proposals."""
    policy_version: int
    """Version of the heads that acted."""
    hidden: Tensor
    """[M, C] trunk states at the actions."""
    actions: Tensor
    """[M] int64, proposed tokens."""
    rows: Tensor
    """[M] int64, sample of each action."""
    positions: Tensor
    """[M] int64, position of each action."""
    steps: Tensor
    """[M] int64, denoising step of each action."""
    logprobs: Tensor
    """[M] float32, behaviour log-probabilities, nats."""
    neighbors: Tensor | None = None
    """[M, 2] int64, ids of the left and right neighbours that the sampler saw, -1 where none; None without it."""
    by_lm: Tensor | None = None
    """[M] bool, actions of a wavefront's bootstrap, drawn from the lm head; None without the sampler."""
    support: Tensor | None = None
    """[M, base vocabulary] bool, the behaviour policy's nucleus; None at top_p 1."""

    def to(self, device: torch.device | str) -> Rollout:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in moved.items() if isinstance(value, Tensor)})


ACTION_FIELDS = ("hidden", "actions", "rows", "positions", "steps", "logprobs", "neighbors", "by_lm", "support")


def credited_tokens(policy_tokens: str, remasking: str) -> str:
    """Resolve `auto`: `kept` when the remasker ignores the proposals, `all` when it looked at them.

    Raises:
        ValueError: `kept` under a remasker that looks at proposals, which biases the gradient.
    """
    if policy_tokens == "auto":
        return "kept" if remasking == "random" else "all"
    if policy_tokens == "kept" and remasking != "random":
        raise ValueError(
            f"grpo.policy_tokens must be all or auto when denoise.remasking is {remasking} "
            "(the remasker chose by the proposals, so discarded ones must be credited too), got 'kept'"
        )
    return policy_tokens


@torch.no_grad()
def roll_out(
    model: GPT,
    prompts: Tensor,
    attention_mask: Tensor,
    *,
    prompt_tokens: int,
    group_size: int,
    seeds: Tensor,
    settings: DenoiseSection,
    remasking: str,
    policy_tokens: str,
    mask_bias: float,
    min_neighbors_ratio: float,
    policy_version: int,
    remasking_model: GPT | None = None,
) -> Rollout:
    """Continue each prompt `group_size` times and record the credited actions.

    Args:
        prompts: [N, T] int64, natural rows whose first `prompt_tokens` are the prompts; a row's length is kept.
        attention_mask: [N, T] bool, False at pads.
        seeds: [N x G] int64, one per sample.
        settings: the denoiser's settings; `remasking` is given resolved beside them.
        policy_tokens: `kept` or `all`.
        mask_bias: bias on the [MASK] logit, nats (policy `self`).

    Returns:
        A `Rollout` on the CPU.
    """
    tokens = prompts.repeat_interleave(group_size, 0)
    visible = attention_mask.repeat_interleave(group_size, 0)
    completion = visible.clone()
    completion[:, :prompt_tokens] = False
    mask = None if bool(attention_mask.all()) else visible
    records: list[StepRecord] = []
    if model.trunk.causal:
        record = generate(
            model,
            tokens[:, :prompt_tokens],
            num_new=tokens.shape[1] - prompt_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seeds=seeds,
            record=True,
        )
        final = torch.where(visible, record.tokens, tokens)
        parts = [_actions(record, completion)]
    else:
        final = denoise(
            model,
            tokens.masked_fill(completion, model.vocabulary.mask_id),
            seeds=seeds,
            steps=settings.steps,
            schedule=settings.schedule,
            temperature=settings.temperature,
            top_p=settings.top_p,
            remasking=remasking,
            randomness=settings.randomness,
            protected=~completion,
            attention_mask=mask,
            sampler=settings.sampler,
            min_neighbors_ratio=min_neighbors_ratio,
            mask_bias=mask_bias,
            remasking_model=remasking_model,
            on_step=records.append,
        )
        parts = [_actions(r, r.masked & ~r.remask if policy_tokens == "kept" else r.masked) for r in records]
    actions = {
        name: None if parts[0][name] is None else torch.cat([part[name] for part in parts]) for name in ACTION_FIELDS
    }
    return Rollout(
        tokens=final,
        attention_mask=visible,
        completion_mask=completion,
        group_size=group_size,
        temperature=settings.temperature,
        policy_version=policy_version,
        **actions,
    ).to("cpu")


def _actions(record: StepRecord, credited: Tensor) -> dict[str, Tensor | None]:
    """The credited ones [B, T] among a step's proposals, which the record holds in row-major order of `masked`."""
    chosen = credited[record.masked]
    rows, positions = credited.nonzero(as_tuple=True)
    pick = lambda x: None if x is None else x[chosen]  # noqa: E731
    return {
        "hidden": pick(record.hidden),
        "actions": record.proposals[rows, positions],
        "rows": rows,
        "positions": positions,
        "steps": torch.full_like(rows, record.step),
        "logprobs": pick(record.logprobs),
        "neighbors": pick(record.neighbors),
        "by_lm": pick(record.by_lm),
        "support": pick(record.support),
    }


def policy_log_probs(model: GPT, rollout: Rollout, part: slice | Tensor = slice(None)) -> Tensor:
    """Log-probabilities of the whole text vocabulary at the rollout's cached states, under the model's present heads.

    Args:
        part: which actions; all by default.

    Returns:
        [M, base vocabulary], normalised; -inf outside the behaviour policy's nucleus.
    """
    take = lambda x: None if x is None else x[part]  # noqa: E731
    logits = proposal_logits(model, rollout.hidden[part], take(rollout.neighbors), take(rollout.by_lm))
    return proposal_logprobs(logits, rollout.temperature, take(rollout.support))


def trajectory_logprobs(model: GPT, rollout: Rollout, part: slice | Tensor = slice(None)) -> Tensor:
    """Log-probability [M] of each credited action under the model's present heads, nats, from cached states."""
    return policy_log_probs(model, rollout, part).gather(-1, rollout.actions[part][:, None]).squeeze(-1)


def split_rows(rollout: Rollout, num_parts: int) -> list[tuple[Tensor, slice]]:
    """Cut a rollout into `num_parts` ranges of samples, groups kept whole.

    Returns:
        For each part the indices [m] of its actions and its range of rows.
    """
    groups = len(rollout.tokens) // rollout.group_size
    edges = [groups * i // num_parts * rollout.group_size for i in range(num_parts + 1)]
    return [
        (((rollout.rows >= low) & (rollout.rows < high)).nonzero().squeeze(-1), slice(low, high))
        for low, high in zip(edges, edges[1:], strict=False)
        if high > low
    ]
