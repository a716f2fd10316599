"""What the reward head reads of a text: frozen states of each token, with the token in sight and without it.

1. A state that has seen its own token says little about whether the token fits: a bidirectional trunk is trained to
   copy visible words. The state from which the token would have been predicted says much more. So beside the visible
   states each completion token has a *prediction state*, from a pass in which it is masked.
2. `masked_passes` K costs K trunk passes: pass k masks the completion positions t with t mod K = k, so that with K = 2
   each token is predicted with both neighbours in sight. A causal trunk needs none: its state at t - 1 is that state,
   met on the visible pass.
3. A token's features are [visible states of each layer, prediction state, token embedding, log-probability of the token
   there, entropy there], the last two under the trunk's own token embedding as lm matrix, in nats.
4. Everything here belongs to the frozen trunk, so a text's features never change and the generator cannot move them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.products import linear
from grpo.slices import slices
from grpo.tokenizer import Vocabulary

LOGITS_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 27}
"""Entries of the table over the vocabulary for the rows that are read together: 2 MB on a CPU, half a GB on a GPU."""


def feature_width(width: int, num_layers: int, masked_passes: int) -> int:
    """F, features per token, for a trunk of the given width C."""
    return width * num_layers + (2 * width + 2 if masked_passes else 0)


def identity_width(width: int, num_layers: int, masked_passes: int) -> int:
    """How many of a token's last features tell it from other tokens: its embedding and the two scalars, or all of them
    where no pass is masked."""
    return width + 2 if masked_passes else width * num_layers


def reward_features(
    trunk: nn.Module,
    vocabulary: Vocabulary,
    tokens: Tensor,
    completion_mask: Tensor,
    *,
    attention_mask: Tensor | None,
    layers: tuple[int, ...],
    masked_passes: int,
) -> Tensor:
    """Features of every token.

    Args:
        trunk: `grpo.trunk.Trunk`.
        tokens: [B, T] int64, without [MASK].
        completion_mask: [B, T] bool, tokens that are judged; only they are ever masked.
        attention_mask: [B, T] bool or None.
        layers: whose visible states are read; see `Trunk.forward`.
        masked_passes: K, 0 for visible states alone.

    Returns:
        [B, T, F]; prediction parts are zero outside the completion.
    """
    if not masked_passes:
        return trunk(tokens, attention_mask, layers)
    if trunk.causal:
        visible, predicted = _causal_predictions(trunk, tokens, completion_mask, attention_mask, layers)
    else:
        visible, predicted = _masked_predictions(
            trunk, vocabulary, tokens, completion_mask, attention_mask, layers, masked_passes
        )
    ids, scalars = tokens.clamp(max=vocabulary.base_size - 1), []
    for rows in slices(len(tokens), tokens.shape[1] * vocabulary.base_size, LOGITS_AT_ONCE[tokens.device.type]):
        logprobs = linear(predicted[rows], trunk.wte.weight[: vocabulary.base_size]).float().log_softmax(-1)
        own = logprobs.gather(-1, ids[rows][..., None])
        entropy = -(logprobs.exp() * logprobs).sum(-1, keepdim=True)
        scalars.append(torch.cat([own, entropy], -1).to(predicted.dtype))
    inside = torch.cat([trunk.wte(ids), torch.cat(scalars)], -1) * completion_mask[..., None]
    return torch.cat([visible, predicted, inside], -1)


def _causal_predictions(
    trunk: nn.Module, tokens: Tensor, completion_mask: Tensor, attention_mask: Tensor | None, layers: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    states = trunk(tokens, attention_mask, (*layers, -1))
    visible, last = states.split([trunk.wte.embedding_dim * len(layers), trunk.wte.embedding_dim], -1)
    return visible, F.pad(last[:, :-1], (0, 0, 1, 0)) * completion_mask[..., None]


def _masked_predictions(
    trunk: nn.Module, vocabulary: Vocabulary, tokens: Tensor, completion_mask: Tensor, attention_mask: Tensor | None,
    layers: tuple[int, ...], masked_passes: int,
) -> tuple[Tensor, Tensor]:
    """Visible states [B, T, C x layers] and prediction states [B, T, C], zero outside the completion."""
    visible = trunk(tokens, attention_mask, layers)
    predicted = torch.zeros_like(visible[..., : trunk.wte.embedding_dim]).flatten(0, 1)
    position = torch.arange(tokens.shape[1], device=tokens.device)
    for k in range(masked_passes):
        hidden_here = completion_mask & (position % masked_passes == k)
        places = hidden_here.flatten().nonzero()[:, 0]
        predicted[places] = trunk(tokens.masked_fill(hidden_here, vocabulary.mask_id), attention_mask, at=places)
    return visible, predicted.view(*tokens.shape, -1)
