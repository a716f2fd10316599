"""The reward model in a process: the generator's bare trunk under a head that tells natural from synthetic.

1. The trunk is frozen, so a text's features never change: they are computed here once, scored here, and travel to the
   learner, whose reward phase trains on them without another trunk pass.
2. One call scores whole groups with one version of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.trunk_store import Arrays, Blueprint, fetch, load_heads, mount
from grpo.trajectory import Rollout


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the reward model says of B texts, on the CPU."""

    logits: Tensor
    """[B, 2] pooled logits (natural, synthetic)."""
    token_logits: Tensor
    """[B, T] log-odds of natural per token."""
    features: Tensor
    """[B, T, F] frozen states that the head reads."""
    version: int
    """Version of the reward head that scored."""


class Reward:
    """Scores rollouts and natural text. A plain class; the pipeline makes it a Ray actor."""

    def __init__(
        self,
        blueprint: Blueprint,
        trunk: Arrays | bytes,
        heads: Arrays | bytes,
        *,
        threads: int,
        device: str = "cpu",
    ) -> None:
        torch.set_num_threads(threads)
        self.model = mount(blueprint, "reward", fetch(trunk), fetch(heads), device=device)
        self.version = -1
        self.device = device

    @torch.no_grad()
    def score(self, heads: Arrays, version: int, rollout: Rollout) -> Scores:
        """Features and scores of a rollout's final texts, by the given version of the head."""
        if version != self.version:
            load_heads(self.model, heads)
            self.version = version
        completion = rollout.completion_mask.to(self.device)
        mask = None if bool(rollout.attention_mask.all()) else rollout.attention_mask.to(self.device)
        features = self.model.reward_features(rollout.tokens.to(self.device), completion, mask)
        output = self.model.heads["reward"](features, completion)
        return Scores(
            logits=output.logits.cpu(), token_logits=output.token_logits.cpu(), features=features.cpu(), version=version
        )
