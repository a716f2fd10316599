"""The generator in a process: it holds a mounted trunk and the newest heads, and rolls out.

1. What trains comes with every call, by reference, so a restarted actor cannot act with stale weights.
2. Noise belongs to the sample's global index, so results do not depend on how many actors share the work.
"""

from __future__ import annotations

import torch

from actors.torch_setup import set_up_torch, worker_threads
from actors.trunk_store import Arrays, Blueprint, Tenant, fetch, load_heads, mount
from grpo.actions import credited_tokens, credits_positions
from grpo.completion import load_remasking_model
from grpo.config import Config
from grpo.lora import Trainable
from grpo.noise import row_seeds
from grpo.trajectory import Rollout, roll_out

ROLLOUT_STREAM = 11
"""Noise stream of rollouts (see `grpo.noise.row_seeds`)."""


class Generator(Tenant):
    """Rolls out groups with the policy's newest heads. A plain class; the pipeline makes it a Ray actor.

    Args:
        remasking: the policy that `denoise.remasking` comes to.
        neighbors: processes that compute beside this one, this one included; they share the cores.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        trunk: Arrays | bytes,
        heads: Arrays | bytes,
        *,
        config: Config,
        remasking: str,
        neighbors: int = 1,
        device: str = "cpu",
    ) -> None:
        set_up_torch(device, worker_threads(config.run.threads, neighbors))
        grpo, denoise = config.grpo, config.denoise
        self.model = mount(
            blueprint,
            "generator",
            fetch(trunk),
            fetch(heads),
            lm_residual=grpo.residual,
            device=device,
            trainable=Trainable.of(grpo),
        )
        self.version = -1
        self.seed, self.group_size, self.device = config.run.seed, grpo.group_size, device
        self.settings = {
            "settings": denoise,
            "remasking": remasking,
            "policy_tokens": credited_tokens(grpo.policy_tokens, remasking, denoise.sampler),
            "positions": credits_positions(grpo.policy_positions, remasking, denoise.randomness),
            "prompt_tokens": grpo.prompt_tokens,
            "group_size": grpo.group_size,
            "min_neighbors_ratio": config.sampler.min_neighbors_ratio,
            "replay": grpo.trainable != "heads",
            "remasking_model": load_remasking_model(denoise, device=device) if remasking == "model" else None,
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
