"""One training step's losses on natural text: generator, sampler and critic on a shared trunk pass.

    total = generator loss + sampler loss + alpha(step) x critic loss

1. Three stages by step: the generator alone, then the sampler, then the critic with its ramp. Pretraining counts
   optimizer steps; adversarial rounds pass a step beyond every ramp.
2. The critic reads the text that the generator itself would propose: [MASK]s filled by samples, by the wavefront once
   the sampler is active. That is a second trunk pass. The samples are of the loss's own logits, dropout included.
3. Each part is divided by its own count over the whole optimizer step (`counts`, summed over micro-batches and ranks
   from outside), so any split gives the same gradient.
4. A frozen trunk is read without gradients; the heads then train on states.
5. With a large vocabulary logits exist for a few rows at a time (`grpo/sliced_loss.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.config import CorruptionSection, CriticSection, LossSection, ModelSection, SamplerSection
from grpo.corruption import Corrupted, corrupt, mask_only, ramp
from grpo.critic import critic_counted, critic_loss, fill, fill_masks
from grpo.diffusion_loss import (
    corrective_denominator,
    corrective_loss,
    mdlm_denominator,
    mdlm_loss,
    next_token_counted,
    next_token_loss,
)
from grpo.metrics import merge_sums
from grpo.model import GPT
from grpo.sliced_loss import sliced_loss
from grpo.wavefront import sampler_loss, wavefront_fill

BEYOND_RAMPS = 1 << 40
"""Step at which every curriculum has reached its end."""
CRITIC_STEP = 1 << 20
"""Counter that keeps the wavefront noise of critic inputs apart from that of denoising steps."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The settings that decide the losses on natural text."""

    model: ModelSection
    corruption: CorruptionSection
    loss: LossSection
    critic: CriticSection
    sampler: SamplerSection
    applies_to: str
    """`mask_bias.applies_to`."""
    padded: bool
    """Whether rows may hold pads; without them attention is spared its mask, and the device the question."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the curriculum says at a step."""

    remask_ratio: float
    """Upper bound of the replacements' share of the corruption."""
    penalty: float
    """Strength of the penalty for destroying correct words."""
    critic_weight: float
    """alpha at this step; 0 leaves the critic out."""
    sampler: bool
    """Whether the sampler trains, and fills the critic's input."""


def stage(objective: Objective, step: int) -> Stage:
    """The curriculum's values at an optimizer step."""
    critic = objective.critic
    has_critic = objective.model.critic and step >= critic.start
    return Stage(
        remask_ratio=ramp(step, 0, objective.corruption.proofreading_warmup, objective.corruption.remask_ratio),
        penalty=ramp(step, 0, objective.loss.masking_warmup, objective.loss.penalty_mask_correct),
        critic_weight=ramp(step, critic.start, critic.end, critic.alpha) if has_critic else 0.0,
        sampler=objective.model.sampler and step >= objective.sampler.start,
    )


def corrupt_batch(
    model: GPT,
    objective: Objective,
    stage: Stage,
    clean: Tensor,
    attention_mask: Tensor,
    *,
    seeds: Tensor,
    times: Tensor,
) -> Corrupted:
    """Corrupt rows for the objective; replacements may come from the model's own predictions.

    Args:
        clean: [B, T] int64; attention_mask: [B, T] bool; seeds, times: [B], from `stratified_rows`.
    """
    rows = {"vocabulary": model.vocabulary, "attention_mask": attention_mask, "seeds": seeds, "times": times}
    if objective.loss.objective == "mdlm":
        return mask_only(clean, **rows)
    rates = {"remask_ratio": stage.remask_ratio, "guaranteed_correct": objective.corruption.guaranteed_correct}
    corrupted, share = corrupt(clean, **rows, **rates), objective.corruption.own_predictions
    if not share or not stage.remask_ratio:
        return corrupted
    blank = corrupted.inputs.masked_fill(corrupted.replaced, model.vocabulary.mask_id)
    training = [module for module in model.modules() if module.training]
    model.eval()  # as it will when it samples: dropout is not text's
    own = fill(model, blank, attention_mask if objective.padded else None, seeds)
    for module in training:
        module.training = True
    return corrupt(clean, **rows, **rates, own_predictions=own, own_share=share)


def counts(objective: Objective, corrupted: Corrupted) -> Tensor:
    """[3] float64: the denominators of generator, sampler and critic in this part of the batch, to be summed."""
    if objective.model.attention == "causal":
        generator = next_token_counted(corrupted.loss_mask).sum().double()
    elif objective.loss.objective == "mdlm":
        generator = mdlm_denominator(corrupted)
    else:
        generator = corrective_denominator(
            corrupted, weight_unmask=objective.loss.weight_unmask, weight_remask=objective.loss.weight_remask
        )
    critic = critic_counted(corrupted, objective.critic.scope).sum().double()
    return torch.stack([generator, corrupted.masked.sum().double(), critic]).clamp(min=1e-9)


def multitask_loss(
    model: GPT,
    objective: Objective,
    stage: Stage,
    corrupted: Corrupted,
    *,
    seeds: Tensor,
    totals: Tensor,
    mask_bias: Tensor | float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Generator + sampler + alpha x critic on one part of a batch.

    Args:
        corrupted: from `corrupt_batch`.
        seeds: [B] int64, the rows' seeds.
        totals: [3], `counts` summed over the whole optimizer step.
        mask_bias: the controller's bias, nats.

    Returns:
        The total, and metrics as pairs (see `grpo/metrics.py`).
    """
    visible = corrupted.loss_mask if objective.padded else None
    vocabulary = model.vocabulary
    totals = totals.float()
    fills = stage.critic_weight and not stage.sampler
    metrics: dict[str, Tensor] = {}
    filled: list[Tensor] = []

    def generator_loss(rows: slice, logits: Tensor) -> Tensor:
        nonlocal metrics
        part = corrupted.rows(rows)
        if model.trunk.causal:
            loss, own = next_token_loss(
                logits, part.clean, attention_mask=part.loss_mask, vocabulary=vocabulary, denominator=totals[0]
            )
        elif objective.loss.objective == "mdlm":
            loss, own = mdlm_loss(logits, part, vocabulary=vocabulary, denominator=totals[0])
        else:
            loss, own = corrective_loss(
                logits,
                part,
                vocabulary=vocabulary,
                denominator=totals[0],
                weight_unmask=objective.loss.weight_unmask,
                weight_remask=objective.loss.weight_remask,
                penalty=stage.penalty,
                mask_bias=mask_bias,
                applies_to=objective.applies_to,
            )
        metrics = merge_sums(metrics, own)
        if fills:
            filled.append(fill_masks(part.inputs, logits.detach(), vocabulary=vocabulary, seeds=seeds[rows]))
        return loss

    hidden = model.encode(corrupted.clean if model.trunk.causal else corrupted.inputs, visible)
    lm = model.heads["lm"]
    parameters = [*lm.parameters()] or [lm.weight]  # a tied head has none of its own
    total = sliced_loss(lm, hidden, generator_loss, vocabulary=len(lm.weight), parameters=parameters)
    if model.trunk.causal:
        return total, metrics
    if stage.sampler:
        loss, part = sampler_loss(
            model,
            hidden,
            corrupted.clean,
            corrupted.masked,
            seeds=seeds,
            side_dropout=objective.sampler.side_dropout,
            denominator=totals[1],
        )
        total, metrics = total + loss, metrics | part
    if stage.critic_weight:
        if not fills:
            filled.append(
                wavefront_fill(
                    model,
                    hidden.detach(),
                    corrupted.inputs,
                    seeds=seeds,
                    step=CRITIC_STEP,
                    attention_mask=visible,
                    min_neighbors_ratio=objective.sampler.min_neighbors_ratio,
                ).tokens
            )
        text = torch.cat(filled)
        scores = model.heads["critic"](model.encode(text, visible))
        loss, part = critic_loss(scores, text, corrupted, scope=objective.critic.scope, denominator=totals[2])
        total, metrics = total + stage.critic_weight * loss, metrics | part
    return total, metrics
