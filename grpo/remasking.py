"""Which tokens go back to [MASK]: policies that estimate log P(wrong), and a Plackett-Luce choice among them.

`auto` takes the first of model > critic > self that is available; each policy can be named.

1. Every policy answers on one scale, the log-probability that a token is wrong, so that `randomness` means the same
   for all: weights are P(wrong)^((1 - r) / r), r = 0 being the plain top k and r = 1 a uniform draw.
2. The choice is a Gumbel top-k with float64 noise, which is a Plackett-Luce sample (arXiv:1903.06059): its probability
   is known, in the order drawn. Protected positions are cut off after the noise is added and exactly k are chosen.
3. `self` reads P([MASK]) with the mask bias at filled positions; `confidence` is one minus the plain probability of
   the proposal (MaskGIT, arXiv:2202.04200, adds the noise to the log-probability of being right instead).
4. A choice of k positions is k draws without replacement, each a categorical over the positions still left; a policy
   gradient credits each draw by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from grpo.mask_bias import mask_log_odds
from grpo.model import GPT
from grpo.noise import to_gumbels
from grpo.wavefront import state_slices

_LEAST = -1e-12  # log-probability of a token that is certain, so that log P(wrong) stays finite


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A filled text and what is known about it when the re-masking policy is asked."""

    model: GPT
    tokens: Tensor
    """[B, T] int64, no [MASK]."""
    attention_mask: Tensor | None
    """[B, T] bool."""
    eligible: Tensor
    """[B, T] bool, positions that may be re-masked."""
    num_eligible: int
    """Their number in the batch, known to the host."""
    confidences: Tensor
    """[B, T] log-probability of each token filled in this step, before temperature and nucleus."""
    mask_bias: Tensor | float
    """Added to the [MASK] logit, nats."""
    remasking_model: GPT | None
    """A token_classifier whose class 1 means wrong."""


@dataclass(frozen=True)
class Verdict:
    """log_wrong: [B, T] float64. hidden: [N, C], states of the filled text at its N eligible positions in row-major
    order, where a head of the generator judged them (`self`, `critic`)."""

    log_wrong: Tensor
    hidden: Tensor | None = None


def by_model(filled: Filled) -> Verdict:
    """The stand-alone classifier's P(wrong). One trunk forward, of its own trunk."""
    logits = filled.remasking_model(filled.tokens, attention_mask=filled.attention_mask)
    return Verdict(logits.double().log_softmax(-1)[..., 1])


def by_critic(filled: Filled) -> Verdict:
    """The critic head's P(wrong). One trunk forward."""
    return _by_head(filled, "critic")


def by_self(filled: Filled) -> Verdict:
    """The lm head's own P([MASK]) where a token stands. One trunk forward."""
    return _by_head(filled, "self")


def _by_head(filled: Filled, policy: str) -> Verdict:
    places = torch.nonzero_static(filled.eligible.flatten(), size=filled.num_eligible)[:, 0]
    hidden = filled.model.encode(filled.tokens, filled.attention_mask, at=places)
    log_wrong = torch.zeros(filled.tokens.numel(), dtype=torch.float64, device=hidden.device)
    log_wrong[places] = log_wrong_from_states(policy, filled.model, hidden, filled.mask_bias)
    return Verdict(log_wrong.view_as(filled.tokens), hidden)


def by_confidence(filled: Filled) -> Verdict:
    """One minus the probability that the proposal was given. No trunk forward."""
    return Verdict(log_wrong_from_confidence(filled.confidences))


def by_chance(filled: Filled) -> Verdict:
    """All alike. No trunk forward."""
    return Verdict(torch.zeros(filled.tokens.shape, dtype=torch.float64, device=filled.tokens.device))


POLICIES: dict[str, Callable[[Filled], Verdict]] = {
    "model": by_model,
    "critic": by_critic,
    "self": by_self,
    "confidence": by_confidence,
    "random": by_chance,
}

FRESH_ONLY = ("confidence", "random")
"""Policies that take back only tokens filled in the same step; the others may take back any unprotected token."""


def forwards(policy: str, steps: int, randomness: float) -> int:
    """Trunk passes over a text: a policy that reads the filled text takes a second one in all steps but the last. A
    uniform draw, at randomness 1, asks no policy."""
    return steps if policy in FRESH_ONLY or randomness == 1 else 2 * steps - 1


def steps_within(policy: str, num_forwards: int) -> int:
    """Most denoising steps that this many trunk passes pay for, at a randomness below 1."""
    return num_forwards if policy in FRESH_ONLY else (num_forwards + 1) // 2


def resolve_policy(remasking: str, model: GPT, remasking_model: GPT | None) -> str:
    """The policy that is named, or for `auto` the first that the model has.

    Raises:
        ValueError: the named policy's head or model is missing.
    """
    if remasking == "auto":
        if remasking_model is not None:
            return "model"
        return "critic" if "critic" in model.heads else "self"
    if remasking not in POLICIES:
        raise ValueError(f"denoise.remasking must be one of auto, {', '.join(POLICIES)}, got {remasking!r}")
    if remasking == "model" and remasking_model is None:
        raise ValueError("denoise.remasking=model needs denoise.remasking_model, a token_classifier checkpoint")
    if remasking == "critic" and "critic" not in model.heads:
        raise ValueError("denoise.remasking=critic needs a generator with model.critic=true; this one has no critic")
    return remasking


def log_wrong_from_states(policy: str, model: GPT, hidden: Tensor, mask_bias: Tensor | float) -> Tensor:
    """What policy `self` or `critic` reads off states of the filled text: [N, C] -> [N] float64 log P(wrong)."""
    if policy == "critic":
        return F.logsigmoid(model.heads["critic"](hidden).double())
    return log_mask_probability(model, hidden, mask_bias)


def log_wrong_from_confidence(confidences: Tensor) -> Tensor:
    """log(1 - p) from log p, of any shape, float64; finite where p is 1."""
    right = confidences.double().clamp(max=_LEAST)
    return torch.where(right > -0.7, (-torch.expm1(right)).log(), torch.log1p(-right.exp()))


def log_mask_probability(model: GPT, hidden: Tensor, mask_bias: Tensor | float) -> Tensor:
    """[N, C] states -> [N] float64 log P([MASK]) over text and [MASK], with the bias, in bounded memory."""
    parts = []
    for part in state_slices(model.vocabulary, hidden):
        odds = mask_log_odds(model.heads["lm"](hidden[part]), model.vocabulary)
        parts.append(F.logsigmoid(odds.double() + mask_bias))
    return torch.cat(parts)


def plackett_luce_weights(log_wrong: Tensor, randomness: float) -> Tensor:
    """log P(wrong) scaled so that randomness 1 is uniform and randomness towards 0 is the top k. [B, T]"""
    return log_wrong * ((1 - randomness) / randomness)


def choose(
    log_wrong: Tensor, k: Tensor, eligible: Tensor, *, randomness: float, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose exactly min(k, eligible) positions of each row.

    Args:
        log_wrong: [B, T] float64.
        k: [B] int64.
        eligible: [B, T] bool.
        randomness: 0 for the top k (ties to the left), 1 for a uniform draw, between for Plackett-Luce.
        noise: [B, T] float64 uniforms.

    Returns:
        [B, T] bool, the chosen; [B, T] int64, their positions in the order drawn, then -1.
    """
    column = torch.arange(log_wrong.shape[1], device=log_wrong.device)
    keys = log_wrong
    if randomness > 0:
        keys = plackett_luce_weights(log_wrong, randomness) + to_gumbels(noise)
    order = torch.where(eligible, keys, float("-inf")).argsort(dim=1, descending=True, stable=True)
    taken = column < torch.minimum(k, eligible.sum(1))[:, None]
    return torch.zeros_like(eligible).scatter(1, order, taken), torch.where(taken, order, -1)


def draw_turns(eligible: Tensor, order: Tensor) -> Tensor:
    """At which draw of its choice each position was taken, counted from 0: a position is left to a draw if its turn is
    not before it.

    Args:
        eligible: [R, T] bool.
        order: [R, T] int64 positions in the order drawn, -1 after the last (of `choose`).

    Returns:
        [R, T] int32; T where an eligible position was never taken, -1 where it could not be.
    """
    columns = eligible.shape[1]
    never = F.pad(torch.where(eligible, columns, -1), (0, 1))
    column = torch.arange(columns, device=order.device).expand_as(order)
    return never.scatter(1, torch.where(order >= 0, order, columns), column)[:, :columns].int()


def draw_log_probs(log_weights: Tensor, turns: Tensor, choice: Tensor, draw: Tensor) -> Tensor:
    """Plackett-Luce: each draw falls on one of the positions left, in proportion to its weight.

    Args:
        log_weights: [R, T] float64, of `plackett_luce_weights`; differentiable.
        turns: [R, T] int32, of `draw_turns`.
        choice: [D] int64, 0..R-1; draw: [D] int64, which of the choice's draws each is.

    Returns:
        [D, T] normalised log-probabilities of positions; -inf where it is not left. The draws of a choice sum to the
        log-probability of the choice in the order drawn.
    """
    return log_weights[choice].masked_fill(turns[choice] < draw[:, None], float("-inf")).log_softmax(-1)
