"""What scores texts, in a process: a head on the generator's bare trunk that tells natural from synthetic, and the
user's own functions.

1. The trunk is frozen, so a text's features never change: they are computed here once, scored here, and travel to the
   learner, whose reward phase trains on them without another trunk pass.
2. One call scores whole groups with one version of the head.
3. Without an adversary there is no head, and the user's functions (`grpo/reward_functions.py`) score alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from actors.torch_setup import set_up_torch, worker_threads
from actors.trunk_store import Arrays, Blueprint, Tenant, fetch, load_heads, mount
from grpo.reward_functions import resolve_rewards, score_texts
from grpo.tokenizer import Tokenizer
from grpo.trajectory import Rollout


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What is said of B texts, on the CPU. Without an adversary the first three are None."""

    logits: Tensor | None
    """[B, 2] pooled logits (natural, synthetic)."""
    token_logits: Tensor | None
    """[B, T] log-odds of natural per token."""
    features: Tensor | None
    """[B, T, F] frozen states that the head reads."""
    users: dict[str, Tensor] = field(default_factory=dict)
    """[B] scores by the user's functions, by `module:function`."""


class Reward(Tenant):
    """Scores rollouts. A plain class; the pipeline makes it a Ray actor.

    Args:
        heads: of the reward model; empty without an adversary.
        neighbors: processes that compute beside this one, this one included; they share the cores.
        functions: the user's own rewards, `module:function`; they read what `tokenizer` decodes.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        trunk: Arrays | bytes,
        heads: Arrays | bytes,
        *,
        threads: int,
        neighbors: int = 1,
        device: str = "cpu",
        functions: Iterable[str] = (),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        set_up_torch(device, worker_threads(threads, neighbors))
        heads = fetch(heads)
        self.model = mount(blueprint, "reward", fetch(trunk), heads, device=device) if heads else None
        self.functions, self.tokenizer = resolve_rewards(functions), tokenizer
        self.version = -1
        self.device = device

    @torch.no_grad()
    def score(self, heads: Arrays, version: int, rollout: Rollout) -> Scores:
        """Scores of a rollout's final texts, and their features, by the given version of the head.

        Raises:
            RewardFunctionError: one of the user's functions failed.
        """
        users = score_texts(self.functions, self._completions(rollout)) if self.functions else {}
        if self.model is None:
            return Scores(logits=None, token_logits=None, features=None, users=users)
        if version != self.version:
            load_heads(self.model, heads)
            self.version = version
        completion = rollout.completion_mask.to(self.device)
        mask = None if bool(rollout.attention_mask.all()) else rollout.attention_mask.to(self.device)
        features = self.model.reward_features(rollout.tokens.to(self.device), completion, mask)
        output = self.model.heads["reward"](features, completion)
        return Scores(
            logits=output.logits.cpu(),
            token_logits=output.token_logits.cpu(),
            features=features.cpu(),
            users=users,
        )

    def _completions(self, rollout: Rollout) -> list[str]:
        """Decoded completions, without prompts and pads."""
        return [
            self.tokenizer.decode(tokens[mask])
            for tokens, mask in zip(rollout.tokens.numpy(), rollout.completion_mask.numpy(), strict=True)
        ]
