"""The learner in a process: the generator phase of an adversarial round, over the frozen trunk, and its opponent.

1. The generator trains on the rollout's cached hidden states. No trunk pass belongs to an update, except the anchor's
   on natural text.
2. Distribution is applied from outside: `wrap` makes a module data-parallel, `all_reduce(tensor, op)` reduces a tensor.
   Losses carry global denominators and are multiplied by the number of ranks, because DDP averages.
3. The two players orbit each other, so the run's result is the average of the heads over rounds, not the last ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from actors.credit import action_credits
from actors.discriminator import Discriminator, NoDiscriminator
from actors.phase import Phase, accumulate, accumulating, check_finite, reduced_means, with_prefix
from actors.reward import Scores
from actors.trunk_store import Arrays, Blueprint, mount, to_arrays
from grpo.config import Config
from grpo.corruption import stratified_rows
from grpo.data import Batch
from grpo.mask_bias import MaskBias
from grpo.metrics import weighted_sum
from grpo.multitask import corrupt_batch, counts, multitask_loss, stage
from grpo.optim import Parts, clip_parts, flat_state, load_flat_state, make_optimizer, trainable_parts
from grpo.policy_loss import (
    action_weights,
    clipped_policy_loss,
    entropy,
    exact_kl,
    likelihood_ratios,
)
from grpo.reward_loss import entropy_coefficient
from grpo.trajectory import (
    Rollout,
    action_tables,
    credited,
    credited_tokens,
    credits_positions,
    most_actions,
    taken,
)

ANCHOR_STREAM = 21
BEYOND_RAMPS = 1 << 40
"""Step at which every curriculum of pretraining has reached its end."""


class Learner:
    """Owns the trainable heads, their optimisers and controllers. A plain class, driven by a Ray Train worker."""

    def __init__(
        self,
        blueprint: Blueprint,
        config: Config,
        trunk: Arrays,
        heads: Arrays,
        *,
        remasking: str,
        rank: int = 0,
        world: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
        all_reduce: Callable[..., Tensor] = lambda tensor, op="sum": tensor,
        device: str = "cpu",
    ) -> None:
        self.config, self.rank, self.world = config, rank, world
        self.remasking, self.all_reduce, self.device = remasking, all_reduce, device
        self.model = mount(blueprint, "generator", trunk, heads, lm_residual=config.grpo.residual, device=device)
        self.reference = mount(blueprint, "generator", trunk, heads, lm_residual=config.grpo.residual, device=device)
        self.reference.requires_grad_(False)
        self.result = mount(blueprint, "generator", trunk, heads, lm_residual=config.grpo.residual, device=device)
        self.result.requires_grad_(False)
        ranks = {"rank": rank, "world": world, "wrap": wrap, "all_reduce": all_reduce, "device": device}
        opponent = Discriminator if config.grpo.adversary else NoDiscriminator
        self.discriminator = opponent(blueprint, config, self.model, **ranks)
        self.stage = stage(config, BEYOND_RAMPS)
        self.parts: Parts = trainable_parts(dict(self.model.heads.items()))
        self.generator_phase_module = wrap(Phase(dict(self.model.heads.items())))
        self.optimizer = make_optimizer(self.parts, learning_rate=config.grpo.learning_rate)
        self.mask_bias = MaskBias(config.mask_bias, device)
        self.entropy_target: float | None = None
        self.entropy_integral = self.entropy_weight = 0.0
        self.version = 0

    # ---- what the actors need -------------------------------------------------------------------------------------

    def generator_heads(self) -> Arrays:
        return {name: array.copy() for name, array in to_arrays(self.model.heads.state_dict()).items()}

    @property
    def bias(self) -> float:
        return float(self.mask_bias.bias)

    # ---- the round ------------------------------------------------------------------------------------------------

    def generator_phase(
        self, round: int, rollouts: list[Rollout], scores: list[Scores], natural: Batch, rows: Tensor
    ) -> dict[str, float]:
        """Group-relative policy gradient on the rollouts' cached states, plus the anchor on natural text.

        Args:
            rollouts, scores: of this rank's actors.
            natural: this rank's share of the anchor batch; rows: [b] its global row indices in the batch.

        Returns:
            Metrics, the same on every rank.
        """
        grpo = self.config.grpo
        rollouts = [rollout.to(self.device) for rollout in rollouts]
        weights = self._weights(rollouts)
        credits, sums = action_credits(
            self.model,
            rollouts,
            scores,
            weights,
            grpo=grpo,
            signal=self.config.reward.signal,
            all_reduce=self.all_reduce,
        )
        ratio_max = torch.zeros((), device=self.device)
        norms: dict[str, Tensor] = {}
        for iteration in range(grpo.num_iterations):
            self.optimizer.zero_grad(set_to_none=True)
            for index, rollout in enumerate(rollouts):
                last = index == len(rollouts) - 1

                def losses(
                    rollout: Rollout = rollout,
                    index: int = index,
                    last: bool = last,
                    iteration: int = iteration,
                ) -> Tensor:
                    nonlocal ratio_max
                    loss, part, largest = self._policy_losses(rollout, credits[index], weights[index])
                    ratio_max = torch.maximum(ratio_max, largest)
                    accumulate(sums, part)
                    if last and grpo.anchor:
                        anchor, part = self._anchor_loss(round * grpo.num_iterations + iteration, natural, rows)
                        accumulate(sums, part)
                        loss = loss + grpo.anchor * anchor
                    return loss * self.world

                with accumulating(self.generator_phase_module, not last):
                    self.generator_phase_module(losses).backward()
            norms = clip_parts(self.parts, grpo.grad_clip)
            check_finite(norms, f"generator phase of round {round}")
            self.optimizer.step()
        self.version += 1
        self._average_heads()
        metrics = self._means(sums)
        if grpo.entropy:
            self.entropy_target = self.entropy_target or grpo.entropy * metrics["entropy"]
            self.entropy_integral, self.entropy_weight = entropy_coefficient(
                self.entropy_integral, metrics["entropy"], self.entropy_target
            )
        return metrics | {
            "entropy_weight": self.entropy_weight,
            "ratio_max": float(self.all_reduce(ratio_max, "max")),
            "learning_rate": grpo.learning_rate,
            "mask_bias": self.bias,
            **{f"grad_norm_{name}": float(norm) for name, norm in norms.items()},
        }

    # ---- state ----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, under plain names; trunk excluded."""
        state = {f"heads.{name}": value for name, value in self.model.heads.state_dict().items()}
        state |= {f"result.{name}": value for name, value in self.result.heads.state_dict().items()}
        state |= {f"optimizer.{name}": value for name, value in flat_state(self.optimizer).items()}
        return state | {f"discriminator.{name}": value for name, value in self.discriminator.tensors().items()}

    def numbers(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "num_reward_steps": self.discriminator.num_steps,
            "mask_bias": self.mask_bias.state_dict(),
            "entropy": [self.entropy_target, self.entropy_integral, self.entropy_weight],
        }

    def load(self, tensors: dict[str, Tensor], texts: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Continue from `tensors`, `texts` and `numbers`."""
        self.model.heads.load_state_dict(with_prefix(tensors, "heads."))
        self.result.heads.load_state_dict(with_prefix(tensors, "result."))
        load_flat_state(self.optimizer, with_prefix(tensors, "optimizer."))
        self.version = numbers["version"]
        self.mask_bias.load_state_dict(numbers["mask_bias"])
        self.entropy_target, self.entropy_integral, self.entropy_weight = numbers["entropy"]
        self.discriminator.load(with_prefix(tensors, "discriminator."), texts, numbers["num_reward_steps"])

    # ---- parts of the phases --------------------------------------------------------------------------------------

    def _weights(self, rollouts: list[Rollout]) -> list[Tensor]:
        """[M + D] weight of each action of each rollout, with denominators over all rollouts and ranks."""
        grpo, denoise = self.config.grpo, self.config.denoise
        most = most_actions(
            self.config.data.block_size - grpo.prompt_tokens,
            denoise,
            policy_tokens=credited_tokens(grpo.policy_tokens, self.remasking, denoise.sampler),
            positions=credits_positions(grpo.policy_positions, self.remasking, denoise.randomness),
            causal=self.model.trunk.causal,
        )
        rows = [credited(rollout, "rows") for rollout in rollouts]
        total_actions = self._sum(sum(len(each) for each in rows))
        total_rows = self._sum(sum(len(rollout.tokens) for rollout in rollouts))
        return [
            action_weights(
                each,
                len(rollout.tokens),
                loss=grpo.loss,
                total_rows=total_rows,
                total_actions=total_actions,
                actions_per_row=most,
            )
            for each, rollout in zip(rows, rollouts, strict=True)
        ]

    def _policy_losses(
        self, rollout: Rollout, credit: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        grpo = self.config.grpo
        policy = action_tables(self.model, rollout)
        with torch.no_grad():
            reference = action_tables(self.reference, rollout)
        ratios = likelihood_ratios(
            taken(policy, rollout),
            credited(rollout, "logprobs"),
            rows=credited(rollout, "rows"),
            num_rows=len(rollout.tokens),
            loss=grpo.loss,
        )
        loss, metrics = clipped_policy_loss(
            ratios, credit, weights, epsilon_low=grpo.epsilon_low, epsilon_high=grpo.epsilon_high
        )
        kl = torch.cat([exact_kl(*tables).to(ratios.dtype) for tables in zip(policy, reference, strict=True)])
        spread, of_tokens = entropy(policy[0]), weights[: len(rollout.actions)]
        metrics |= {"kl": weighted_sum(kl, weights), "entropy": weighted_sum(spread, of_tokens)}
        loss = loss + grpo.kl * (weights * kl).sum() - self.entropy_weight * (of_tokens * spread).sum()
        return loss, metrics, ratios.detach().max()

    def _anchor_loss(self, step: int, natural: Batch, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The multi-task loss on natural text with the mask-bias controller, heads only (DESIGN 9)."""
        tokens, mask = natural.tokens.to(self.device), natural.attention_mask.to(self.device)
        seeds, times = stratified_rows(self.config.run.seed, ANCHOR_STREAM, step, rows, len(rows) * self.world)
        seeds, times = seeds.to(self.device), times.to(self.device)
        corrupted = corrupt_batch(self.model, self.config, self.stage, tokens, mask, seeds=seeds, times=times)
        totals = self.all_reduce(counts(self.config, self.stage, corrupted))
        loss, metrics = multitask_loss(
            self.model, self.config, self.stage, corrupted, seeds=seeds, totals=totals, mask_bias=self.mask_bias.bias
        )
        if "p_mask_unmask" in metrics:
            self.mask_bias.update(self.all_reduce(metrics["p_mask_unmask"].clone()))
        return loss, metrics

    @torch.no_grad()
    def _average_heads(self) -> None:
        """Move the run's result towards the newest heads; an average of few rounds forgets faster."""
        decay = min(self.config.grpo.ema, self.version / (self.version + 9))
        for mean, now in zip(self.result.heads.parameters(), self.model.heads.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)

    def _sum(self, count: int) -> Tensor:
        return self.all_reduce(torch.tensor(float(count), device=self.device))

    def _means(self, sums: dict[str, Tensor]) -> dict[str, float]:
        values = reduced_means(sums, self.all_reduce)
        for name in [name.removesuffix("_square") for name in values if name.endswith("_square")]:
            values[f"{name}_std"] = max(0.0, values.pop(f"{name}_square") - values.get(name, 0.0) ** 2) ** 0.5
        return values
