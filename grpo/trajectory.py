"""Rollouts that remember what the update needs: the policy's actions, their states and their exact log-probabilities.

1. An action is one proposed token at one denoising step. Its state is the trunk's hidden state there, which
   a frozen trunk never changes; under the wavefront also the neighbours that were visible. So likelihood ratios and KL
   need head-sized matrix products only, and no replay of the trajectory.
2. The remasker is part of the environment, as it was when the round began. Which of its choices and of the proposals
   are credited, `grpo/actions.py` says. Each draw of a credited re-mask choice is a categorical over the positions
   still left, at the states that were judged.
3. Probabilities are those that were sampled from: temperature and nucleus included. The nucleus is the behaviour
   policy's, kept with the action, so that a ratio compares two distributions over the same support.
4. Where something below the heads trains, states do not last: the rollout keeps what the trunk read at each step
   instead, and `grpo/replay.py` computes them again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from grpo.autoregress import Generation, generate
from grpo.config import DenoiseSection
from grpo.data import completion_mask
from grpo.denoise import StepRecord, denoise
from grpo.metrics import weighted_sum
from grpo.model import GPT
from grpo.remasking import (
    draw_log_probs,
    draw_turns,
    log_wrong_from_confidence,
    log_wrong_from_states,
    plackett_luce_weights,
)
from grpo.slices import slices
from grpo.wavefront import proposal_logits, proposal_logprobs

Data = TypeVar("Data", "Choices", "Rollout")
TABLE = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Entries of the largest table over the vocabulary or over positions: 64 MB of float32 and 128 MB of float64 on a CPU,
four times that on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The policy's own re-mask choices: R choices (a sample at a step) of D draws, judged at E eligible positions."""

    policy: str
    """`self`, `critic` or `confidence`."""
    randomness: float
    """Of the Plackett-Luce weights, strictly between 0 and 1."""
    mask_bias: float
    """Bias on the [MASK] logit, nats, when the choice was made."""
    hidden: Tensor | None
    """[E, C] trunk states that were judged, in row-major order of `eligible`; None where they are to be replayed."""
    turns: Tensor
    """[R, T] int32, at which draw each position was taken (`grpo.remasking.draw_turns`)."""
    choice: Tensor
    """[D] int64, choice of each draw, in 0..R-1."""
    draw: Tensor
    """[D] int64, which of its choice's draws each is."""
    actions: Tensor
    """[D] int64, position drawn."""
    rows: Tensor
    """[D] int64, sample of each draw."""
    steps: Tensor
    """[D] int64, denoising step of each draw."""
    logprobs: Tensor
    """[D] behaviour log-probabilities, nats."""
    tokens: Tensor | None = None
    """[E] int64, proposals whose confidence was judged; `confidence` alone."""
    neighbors: Tensor | None = None
    """[E, 2] int64, as in `Rollout`; `confidence` alone."""
    by_lm: Tensor | None = None
    """[E] bool, as in `Rollout`; `confidence` alone."""
    inputs: Tensor | None = None
    """[S - 1, B, T] int64, the filled texts that `self` and `critic` judged; None with cached states."""

    @property
    def eligible(self) -> Tensor:
        """[R, T] bool, positions that were judged."""
        return self.turns >= 0

    @property
    def positions(self) -> Tensor:
        """[D] int64, position of each draw: the action itself."""
        return self.actions

    def to(self, device: torch.device | str) -> Choices:
        return _moved(self, device)


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
    hidden: Tensor | None
    """[M, C] trunk states at the actions; None where they are to be replayed."""
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
    entropies: Tensor
    """[M] entropy of the distribution that each action was drawn from, nats."""
    neighbors: Tensor | None = None
    """[M, 2] int64, ids of the left and right neighbours that the sampler saw, -1 where none; None without it."""
    by_lm: Tensor | None = None
    """[M] bool, actions of a wavefront's bootstrap, drawn from the lm head; None without the sampler."""
    waves: Tensor | None = None
    """[S, B] int64, waves that each sample took at each denoising step; None without the sampler."""
    support: Tensor | None = None
    """[M, base vocabulary] bool, the behaviour policy's nucleus; None at top_p 1."""
    inputs: Tensor | None = None
    """[S, B, T] int64, what the trunk read at each denoising step; None with cached states."""
    choices: Choices | None = None
    """Re-mask choices that are credited beside the M actions; None where the remasker is part of the environment."""

    def to(self, device: torch.device | str) -> Rollout:
        return _moved(self, device)


def _moved(data: Data, device: torch.device | str) -> Data:
    values = {f.name: getattr(data, f.name) for f in fields(data)}
    return replace(
        data, **{name: value.to(device) for name, value in values.items() if isinstance(value, Tensor | Choices)}
    )


ACTION_FIELDS = (
    "hidden", "actions", "rows", "positions", "steps", "logprobs", "entropies", "neighbors", "by_lm", "support",
)
"""Fields of a `Rollout` with one entry per action."""


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
    positions: bool = False,
    replay: bool = False,
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
        positions: credit the re-mask choices too (`credits_positions`).
        replay: keep what the trunk read instead of its states.

    Returns:
        A `Rollout` on the CPU.
    """
    tokens = prompts.repeat_interleave(group_size, 0)
    visible = attention_mask.repeat_interleave(group_size, 0)
    completion = completion_mask(visible, prompt_tokens)
    mask = None if bool(attention_mask.all()) else visible
    parts: list[dict[str, Tensor | None]] = []
    judged: list[StepRecord] = []
    read: list[Tensor] = []
    waves: list[Tensor] = []

    def remember(step: StepRecord) -> None:
        """Keep of a step what is credited; the rest of its states and nuclei is freed before the next step's exist."""
        step = replace(step, hidden=None, judged=None) if replay else step
        if policy_tokens == "kept":
            parts.append(_actions(step, step.masked & ~step.remask, len(step.logprobs) - step.num_remasked))
        else:
            parts.append(_actions(step, step.masked, len(step.logprobs)))
        if positions and step.scores is not None:  # the last step re-masks nothing
            judged.append(replace(step, support=None, hidden=step.hidden if remasking == "confidence" else None))
        if replay:
            read.append(step.inputs)
        if settings.sampler:
            waves.append(step.waves)

    if model.trunk.causal:
        record = generate(
            model,
            prompts[:, :prompt_tokens],
            num_new=tokens.shape[1] - prompt_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seeds=seeds,
            record=True,
        )
        final = torch.where(visible, record.tokens, tokens)
        parts.append(_actions(record, completion, int(completion.sum())))
        read.append(final)
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
            on_step=remember,
        )
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
        waves=torch.stack(waves) if waves else None,
        inputs=torch.stack(read) if replay else None,
        choices=_choices(judged, remasking, settings.randomness, mask_bias, replay) if judged else None,
        **(actions | {"hidden": None} if replay else actions),
    ).to("cpu")


def _actions(record: StepRecord | Generation, credited: Tensor, num: int) -> dict[str, Tensor | None]:
    """The credited ones, [B, T] bool and `num` of them, among a step's proposals, which the record holds in row-major
    order of `masked`. The host, which knows their number, does not wait."""
    places = torch.nonzero_static(credited.flatten(), size=num)[:, 0]
    rows, positions = places // credited.shape[1], places % credited.shape[1]
    chosen = None if num == len(record.logprobs) else (record.masked.flatten().cumsum(0) - 1)[places]
    pick = lambda x: x if x is None or chosen is None else x[chosen]  # noqa: E731
    return {
        "hidden": pick(record.hidden),
        "actions": record.proposals.flatten()[places],
        "rows": rows,
        "positions": positions,
        "steps": torch.full_like(rows, record.step),
        "logprobs": pick(record.logprobs),
        "entropies": pick(record.entropies),
        "neighbors": pick(record.neighbors),
        "by_lm": pick(record.by_lm),
        "support": pick(record.support),
    }


def _choices(
    records: list[StepRecord], policy: str, randomness: float, mask_bias: float, replay: bool
) -> Choices:
    """The re-mask choices of these steps, choice s x B + b being row b's at the s-th of them."""
    eligible = torch.cat([record.eligible for record in records])
    order = torch.cat([record.remask_order for record in records])
    turns = draw_turns(eligible, order)
    choice, draw = (order >= 0).nonzero(as_tuple=True)
    actions = order[choice, draw]
    log_weights = plackett_luce_weights(torch.cat([record.scores for record in records]), randomness)
    logprobs = torch.cat(
        [
            draw_log_probs(log_weights, turns, choice[piece], draw[piece]).gather(-1, actions[piece, None])[:, 0]
            for piece in slices(len(choice), eligible.shape[1], TABLE[eligible.device.type])
        ]
    )
    num_rows = len(records[0].inputs)
    steps = torch.tensor([record.step for record in records], device=choice.device)
    judged: dict[str, Tensor | None] = {"hidden": None}
    if policy == "confidence":
        for name in ("hidden", "neighbors", "by_lm"):
            parts = [getattr(r, name) for r in records]
            judged[name] = (
                None
                if parts[0] is None
                else torch.cat([part[r.eligible[r.masked]] for part, r in zip(parts, records, strict=True)])
            )
        judged["tokens"] = torch.cat([r.proposals[r.eligible] for r in records])
    elif replay:
        judged["inputs"] = torch.stack([record.proposals for record in records])
    else:
        judged["hidden"] = torch.cat([record.judged for record in records])
    return Choices(
        policy=policy,
        randomness=randomness,
        mask_bias=mask_bias,
        turns=turns,
        choice=choice,
        draw=draw,
        actions=actions,
        rows=choice % num_rows,
        steps=steps[choice // num_rows],
        logprobs=logprobs,
        **judged,
    )


def wavefront_figures(rollout: Rollout) -> dict[str, Tensor]:
    """How the wavefront filled, as pairs (see `grpo/metrics.py`); nothing without it.

    Returns:
        Waves per step of a text, over steps that filled something; bootstraps per text, over all its steps; tokens
        filled per wave of a text: under the wavefront every filled token is an action.
    """
    if rollout.waves is None:
        return {}
    waves, filled = rollout.waves, rollout.waves.new_tensor(len(rollout.actions))
    texts = waves.new_tensor(len(rollout.tokens))
    return {
        "wavefront/waves": weighted_sum(waves, waves > 0),
        "wavefront/bootstraps": torch.stack([rollout.by_lm.sum(), texts]).double(),
        "wavefront/tokens_per_wave": torch.stack([filled, waves.sum()]).double(),
    }


def policy_log_probs(model: GPT, rollout: Rollout) -> Tensor:
    """Log-probabilities of the whole text vocabulary at the rollout's cached states, under the model's present heads.

    Returns:
        [M, base vocabulary], normalised; -inf outside the behaviour policy's nucleus.
    """
    logits = proposal_logits(model, rollout.hidden, rollout.neighbors, rollout.by_lm)
    return proposal_logprobs(logits, rollout.temperature, rollout.support)


def judged_wrong(model: GPT, choices: Choices) -> Tensor:
    """[E] float64 log P(wrong) at the judged positions, under the model's present heads."""
    if choices.policy == "confidence":
        logits = proposal_logits(model, choices.hidden, choices.neighbors, choices.by_lm)
        plain = proposal_logprobs(logits, 1.0).gather(-1, choices.tokens[:, None]).squeeze(-1)
        return log_wrong_from_confidence(plain)
    return log_wrong_from_states(choices.policy, model, choices.hidden, choices.mask_bias)


def choice_weights(choices: Choices, log_wrong: Tensor) -> Tensor:
    """[R, T] float64 Plackett-Luce weights, logarithmic, from `judged_wrong`."""
    table = torch.zeros(choices.turns.shape, dtype=torch.float64, device=log_wrong.device)
    return plackett_luce_weights(table.masked_scatter(choices.eligible, log_wrong), choices.randomness)


def choice_log_probs(model: GPT, choices: Choices) -> Tensor:
    """Log-probabilities of all positions at each re-mask draw, under the model's present heads.

    Returns:
        [D, T] float64, normalised; -inf where the draw could not fall.
    """
    weights = choice_weights(choices, judged_wrong(model, choices))
    return draw_log_probs(weights, choices.turns, choices.choice, choices.draw)


def taken(table: Tensor, kind: Rollout | Choices) -> Tensor:
    """Log-probability of the actions that were taken: [M] of `policy_log_probs`, [D] of `choice_log_probs`, nats."""
    return table.gather(-1, kind.actions[:, None])[:, 0]


def credited(rollout: Rollout, field: str) -> Tensor:
    """`rows`, `positions`, `steps` or `logprobs` [M + D] of all credited actions: proposals, then re-mask draws."""
    own = getattr(rollout, field)
    return own if rollout.choices is None else torch.cat([own, getattr(rollout.choices, field).to(own.dtype)])


def trajectory_logprobs(model: GPT, rollout: Rollout) -> Tensor:
    """Log-probability [M + D] of each credited action under the model's present heads, nats, from cached states."""
    logprobs = taken(policy_log_probs(model, rollout), rollout)
    if rollout.choices is None:
        return logprobs
    return torch.cat([logprobs, taken(choice_log_probs(model, rollout.choices), rollout.choices).to(logprobs.dtype)])
