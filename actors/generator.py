"""The generator in a process: it holds a mounted trunk and the newest heads, and rolls out.

1. What trains comes with every call, by reference, so a restarted actor cannot act with stale weights.
2. Noise belongs to the sample's global index, so results do not depend on how many actors share the work.
"""

from __future__ import annotations

import torch

from actors.threads import worker_threads
from actors.trunk_store import Arrays, Blueprint, Tenant, fetch, load_heads, mount
from grpo.checkpoint import load_model
from grpo.config import DenoiseSection
from grpo.lora import HEADS, Trainable
from grpo.noise import row_seeds
from grpo.trajectory import Rollout, roll_out

ROLLOUT_STREAM = 11
"""Noise stream of rollouts (see `grpo.noise.row_seeds`)."""


class Generator(Tenant):
    """Rolls out groups with the policy's newest heads. A plain class; the pipeline makes it a Ray actor.

    Args:
        neighbors: processes that compute beside this one, this one included; they share the cores.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        trunk: Arrays | bytes,
        heads: Arrays | bytes,
        *,
        settings: DenoiseSection,
        remasking: str,
        policy_tokens: str,
        positions: bool,
        prompt_tokens: int,
        group_size: int,
        min_neighbors_ratio: float,
        seed: int,
        lm_residual: int,
        threads: int,
        neighbors: int = 1,
        device: str = "cpu",
        remasking_model: str = "",
        trainable: Trainable = HEADS,
    ) -> None:
        torch.set_num_threads(worker_threads(threads, neighbors))
        self.model = mount(
            blueprint,
            "generator",
            fetch(trunk),
            fetch(heads),
            lm_residual=lm_residual,
            device=device,
            trainable=trainable,
        )
        self.version = -1
        self.seed, self.group_size, self.device = seed, group_size, device
        self.settings = {
            "settings": settings,
            "remasking": remasking,
            "policy_tokens": policy_tokens,
            "positions": positions,
            "prompt_tokens": prompt_tokens,
            "group_size": group_size,
            "min_neighbors_ratio": min_neighbors_ratio,
            "replay": trainable.kind != "heads",
            "remasking_model": load_model(remasking_model, device=device).eval() if remasking_model else None,
        }

    def roll_out(
        self,
        heads: Arrays,
        version: int,
        mask_bias: float,
        round: int,
        indices: torch.Tensor,
        prompts: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> Rollout:
        """Continue prompts.

        Args:
            heads, version: the policy's heads, with whatever else of it trains, and their number; read only when new.
            mask_bias: bias on the [MASK] logit, nats.
            round: numbers the noise together with the indices.
            indices: [n] int64, global index of each prompt in this round.
            prompts, attention_mask: [n, T].
        """
        if version != self.version:
            load_heads(self.model, heads)
            self.version = version
        samples = (indices[:, None] * self.group_size + torch.arange(self.group_size)).flatten()
        seeds = row_seeds(self.seed, ROLLOUT_STREAM, round, samples).to(self.device)
        return roll_out(
            self.model,
            prompts.to(self.device),
            attention_mask.to(self.device),
            seeds=seeds,
            mask_bias=mask_bias,
            policy_version=version,
            **self.settings,
        )
