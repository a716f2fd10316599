"""Causal generation, one token at a time, from a cache of keys and values.

1. Tokens are drawn like the denoiser's proposals (`wavefront.propose`): temperature, nucleus, and the inverse of a
   float64 distribution function over base tokens alone, with noise that depends on the row's seed and the position.
   A prompt that is continued several times is read once.
2. The state recorded for an action is the one that predicts it, that of the token before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.kv_cache import KVCache
from grpo.model import GPT
from grpo.noise import PROPOSE, uniforms
from grpo.wavefront import propose


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Generated texts and their M = B x num_new actions, row by row; fields as in `denoise.StepRecord`."""

    tokens: Tensor
    """[B, T] int64, prompt and completion."""
    proposals: Tensor
    """The same tokens."""
    masked: Tensor
    """[B, T] bool, generated positions."""
    hidden: Tensor
    """[M, C] states that the lm head read."""
    logprobs: Tensor
    """[M] log-probabilities of the drawn tokens under temperature and nucleus, nats."""
    entropies: Tensor
    """[M] entropies of the distributions that they were drawn from, nats."""
    support: Tensor | None
    """[M, base vocabulary] bool, the nucleus; None at top_p 1."""
    step: int = 0
    """Denoising step: all actions of a causal rollout belong to one."""
    neighbors: None = None
    """No sampler head in causal models."""
    by_lm: None = None
    """No sampler head in causal models."""


@torch.no_grad()
def generate(
    model: GPT,
    tokens: Tensor,
    *,
    num_new: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seeds: Tensor,
    record: bool = False,
    on_token: Callable[[int], object] | None = None,
) -> Tensor | Generation:
    """Continue texts.

    Args:
        tokens: [N, P] int64, prompts of one length, at least one token.
        num_new: tokens to add to each.
        temperature: divides the logits.
        top_p: nucleus mass (arXiv:1904.09751).
        seeds: [B] int64, one per text, B = N x G: text n x G + g continues prompt n. A text does not depend on its
            batch mates.
        record: return a `Generation` with the actions' states and log-probabilities.
        on_token: called with how many tokens each text has gained.

    Returns:
        [B, P + num_new] int64, or a `Generation` that holds them.

    Raises:
        ValueError: the model is not causal, or there is no prompt.
    """
    if not model.trunk.causal:
        raise ValueError("model.attention must be causal to generate token by token; use denoise for bidirectional")
    rows, start, copies = len(seeds), tokens.shape[1], len(seeds) // len(tokens)
    if start < 1 or num_new < 1:
        raise ValueError(f"generation needs at least one prompt token and one new token, got {start} and {num_new}")
    end = start + num_new
    noise = uniforms(seeds[:, None], 0, PROPOSE, torch.arange(start, end, device=tokens.device))
    cache = KVCache(end - 1)
    texts = torch.cat((tokens.repeat_interleave(copies, 0), tokens.new_empty(rows, num_new)), dim=1)
    actions = []
    with torch.inference_mode():  # less to keep account of; what leaves it is stacked outside, hence plain again
        hidden = model.trunk(tokens, cache=cache)[:, -1].repeat_interleave(copies, 0)
        cache.repeat(copies)
        for position in range(start, end):
            if position > start:
                hidden = model.trunk(texts[:, position - 1 : position], cache=cache)[:, -1]
            drawn = propose(
                model, hidden, noise[:, position - start], temperature=temperature, top_p=top_p, record=record
            )
            texts[:, position] = drawn.tokens
            if record:
                actions.append((hidden, drawn))
            if on_token is not None:
                on_token(position - start + 1)
    if not record:
        return texts
    by_row = lambda columns: torch.stack(columns, dim=1).flatten(0, 1)  # noqa: E731
    return Generation(
        tokens=texts,
        proposals=texts,
        masked=(torch.arange(end, device=tokens.device) >= start).expand(rows, end),
        hidden=by_row([hidden for hidden, _ in actions]),
        logprobs=by_row([drawn.logprobs for _, drawn in actions]),
        entropies=by_row([drawn.entropies for _, drawn in actions]),
        support=None if top_p == 1 else by_row([drawn.support for _, drawn in actions]),
    )
