"""The heads that read a trunk's hidden states: lm, critic, sampler, reward, classifier and scorer.

1. A tied lm head holds no parameter of its own, only a reference to the token embedding, so that checkpoints, DDP and
   `load_state_dict(assign=True)` cannot break the tie. Untied, it owns a copy and may put a residual MLP, zero at the
   start, in front of it: GRPO then begins at exactly the base model's logits.
2. The sampler adds its output to the hidden state and its last layer starts at zero, so an untrained sampler is the
   lm head. (A head that ends in SiLU and LayerNorm starts far from it.)
3. The reward head gives logits, natural first. Beside the pooled pair it gives each token's log-odds of being natural,
   on the same features, for dense credit.
4. Its features are standardised by fixed statistics of natural text: their scales differ a hundredfold between layers,
   and a head on raw ones learns too slowly to be a useful opponent. Pooled statistics are taken over the completion.
5. A token's score also reads who stands beside it. The features of one token say how well it fits, not with what; a
   pair that never occurs in natural text would pass, where each of the two fits by itself.
6. States are cast to the head's dtype: a frozen trunk may be bfloat16 under float32 heads that train.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from grpo.products import Linear, linear


class LmHead(nn.Module):
    """Hidden states to logits over the vocabulary, [MASK], pad and padding columns included."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._tied_to: tuple[nn.Embedding, ...] = (embedding,)  # in a tuple: it stays a part of the trunk alone
        self.matrix: nn.Parameter | None
        self.register_parameter("matrix", None)
        self.residual: nn.Sequential | None = None

    @property
    def tied(self) -> bool:
        return self.matrix is None

    @property
    def weight(self) -> Tensor:
        """[V, C]: the trunk's token embedding until `untie`, then the head's own copy."""
        return self._tied_to[0].weight if self.matrix is None else self.matrix

    def untie(self, residual: int = 0) -> None:
        """Own a copy of the matrix; a positive `residual` adds an MLP of that width. Logits do not change by a bit."""
        if self.matrix is None:
            self.matrix = nn.Parameter(self.weight.detach().clone())
            self._tied_to = ()  # a head that is sent elsewhere does not take the embedding along
        if residual and self.residual is None:
            width, where = self.matrix.shape[1], {"device": self.matrix.device, "dtype": self.matrix.dtype}
            self.residual = nn.Sequential(
                Linear(width, residual, **where), nn.SiLU(), _zeroed(Linear(residual, width, **where))
            )

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., V]."""
        hidden = hidden.to(self.weight.dtype)
        if self.residual is not None:
            hidden = hidden + self.residual(hidden)
        return linear(hidden, self.weight)


class SamplerHead(nn.Module):
    """Conditions a hidden state on the embeddings of its known neighbours; the lm matrix comes after."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Linear(3 * width, width), nn.SiLU(), nn.LayerNorm(width), _zeroed(Linear(width, width))
        )

    def forward(self, hidden: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """hidden, left, right [..., C] (a missing neighbour is a zero vector) -> hidden' [..., C]."""
        return hidden + self.layers(torch.cat((left, hidden, right), dim=-1).to(self.layers[0].weight.dtype))


class CriticHead(nn.Module):
    """The logit of "this token is wrong"."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [...]."""
        return self.layers(hidden.to(self.layers[0].weight.dtype)).squeeze(-1)


class ClassifierHead(nn.Module):
    """Per-token class logits."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.layer = Linear(width, num_classes)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., num_classes]."""
        return self.layer(hidden.to(self.layer.weight.dtype))


class ScorerHead(nn.Module):
    """One score in (0, 1) for a whole text."""

    def __init__(self, width: int, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling
        self.layer = Linear(_pooled_width(width, pooling), 1)

    def forward(self, features: Tensor, completion_mask: Tensor) -> Tensor:
        """features [B, T, F], completion_mask [B, T] bool -> [B]."""
        return torch.sigmoid(self.logits(features, completion_mask))

    def logits(self, features: Tensor, completion_mask: Tensor) -> Tensor:
        """The same before the sigmoid, for losses: [B]."""
        features = features.to(self.layer.weight.dtype)
        return self.layer(pool(features, completion_mask, self.pooling)).squeeze(-1)


class RewardOutput(NamedTuple):
    """What the reward head says of texts."""

    logits: Tensor
    """[B, 2]: natural, synthetic."""
    token_logits: Tensor
    """[B, T]: log-odds of natural of each completion token; 0 elsewhere."""


class RewardHead(nn.Module):
    """Natural or synthetic, for the text and for each of its tokens, from (cached) features of the frozen trunk."""

    def __init__(
        self, features: int, *, hidden: int, pooling: str, spectral: bool, reach: int = 0, identity: int = 0
    ) -> None:
        """A fresh head.

        Args:
            features: F, of each token; identity: the last so many of them tell tokens apart (`identity_width`).
            reach: a token's score reads those of this many tokens on each side.
        """
        super().__init__()
        self.pooling, self.reach, self.identity = pooling, reach, identity
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.pooled = nn.Sequential(
            Linear(_pooled_width(features, pooling), hidden), nn.ReLU(), Linear(hidden, 2)
        )
        beside = 2 * reach * identity
        self.token = nn.Sequential(Linear(features + beside, hidden), nn.ReLU(), Linear(hidden, 1))
        if spectral:
            for layer in (self.pooled[0], self.pooled[2], self.token[0], self.token[2]):
                spectral_norm(layer)

    @torch.no_grad()
    def calibrate(self, mean: Tensor, spread: Tensor) -> None:
        """Fix the standardisation of each feature to the mean and standard deviation [F] of natural text."""
        self.shift.copy_(mean)
        self.scale.copy_(1 / spread.clamp(min=1e-4))

    def forward(self, features: Tensor, completion_mask: Tensor) -> RewardOutput:
        """Score texts.

        Args:
            features: [B, T, F] frozen features (`GPT.reward_features`).
            completion_mask: [B, T] bool, True at the tokens judged: neither prompt nor pad.
        """
        features = features.to(self.pooled[0].weight.dtype)
        features = (features - self.shift) * self.scale
        logits = self.pooled(pool(features, completion_mask, self.pooling))
        token_logits = self.token(self._with_neighbors(features, completion_mask)).squeeze(-1)
        return RewardOutput(logits, token_logits.masked_fill(~completion_mask, 0.0))

    def _with_neighbors(self, features: Tensor, completion_mask: Tensor) -> Tensor:
        """[B, T, F] -> [B, T, F + 2 x reach x identity]: left to right; zeros where no token of the completion is."""
        reach, length = self.reach, features.shape[1]
        if not reach:
            return features
        who = F.pad(features[..., -self.identity :] * completion_mask[..., None], (0, 0, reach, reach))
        beside = [who[:, shift : shift + length] for shift in range(2 * reach + 1) if shift != reach]
        return torch.cat([features, *beside], dim=-1)


def pool(features: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Summarise the states of the tokens under a mask.

    Args:
        features: [B, T, F].
        mask: [B, T] bool. A row without any True gives zeros.
        pooling: `last` (state of the last True token), `mean`, or `both` concatenated in that order.

    Returns:
        [B, F], or [B, 2F] for `both`.
    """
    parts = []
    if pooling in ("last", "both"):
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, positions, 0).amax(dim=1)
        state = features[torch.arange(len(features), device=mask.device), last]
        parts.append(state * mask.any(dim=1, keepdim=True))
    if pooling in ("mean", "both"):
        weights = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
        parts.append((weights.to(features.dtype).unsqueeze(1) @ features).squeeze(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _pooled_width(width: int, pooling: str) -> int:
    return 2 * width if pooling == "both" else width


def _zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
