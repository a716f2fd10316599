"""The learner in a process: the generator phase of an adversarial round, and its opponent.

1. Where heads train, they train on the rollout's cached hidden states: no trunk pass belongs to an update, except the
   anchor's on natural text. Where the trunk or adapters of it train too, each denoising step is replayed, with a
   backward of its own. The reward model and the reference of the KL keep the base's trunk.
2. Distribution is applied from outside: `wrap` makes a module data-parallel, `all_reduce(tensor, op)` reduces a tensor.
   Losses carry global denominators and are multiplied by the number of ranks, because DDP averages.
3. The two players orbit each other, so the run's result is the average over rounds of what trains, not its last value.
4. A rollout of older weights is clipped around the policy at the start of the phase, and its actions are weighted by
   that policy's truncated likelihood ratio to the one that acted; a fresh rollout's weights are 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from actors.credit import action_credits
from actors.discriminator import Discriminator, NoDiscriminator
from actors.phase import Phase, accumulate, accumulating, check_finite, objective, reduced_means, with_prefix
from actors.reward import Scores
from actors.trunk_store import Arrays, Blueprint, attach, mount, own_heads, to_arrays
from grpo.actions import credited_tokens, credits_positions, most_actions
from grpo.config import Config
from grpo.corruption import stratified_rows
from grpo.data import Batch
from grpo.lora import Trainable, load_policy_state, policy_state, trainable_modules
from grpo.mask_bias import MaskBias
from grpo.metrics import weighted_sum
from grpo.multitask import BEYOND_RAMPS, corrupt_batch, counts, multitask_loss, stage
from grpo.optim import (
    Parts,
    clip_parts,
    flat_state,
    load_flat_state,
    make_optimizer,
    set_learning_rate,
    trainable_parts,
)
from grpo.policy_loss import (
    action_weights,
    clipped_policy_loss,
    importance_weights,
    likelihood_ratios,
    mean_log_ratios,
)
from grpo.replay import CACHED, Part, action_values, draw_steps, part_logprobs, split
from grpo.trajectory import Rollout, credited, wavefront_figures

ANCHOR_STREAM = 21


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
        trunk = attach(trunk, device)
        policy = {"lm_residual": config.grpo.residual, "trainable": Trainable.of(config.grpo), "seed": config.run.seed}
        self.model = own_heads(mount(blueprint, "generator", trunk, heads, device=device, **policy))
        self.reference = mount(blueprint, "generator", trunk, heads, lm_residual=config.grpo.residual, device=device)
        self.result = own_heads(mount(blueprint, "generator", trunk, heads, device=device, **policy))
        self.result.requires_grad_(False)
        ranks = {"rank": rank, "world": world, "wrap": wrap, "all_reduce": all_reduce, "device": device}
        opponent = Discriminator if config.grpo.adversary else NoDiscriminator
        self.discriminator = opponent(blueprint, config, self.reference, **ranks)
        self.objective = objective(config)
        self.stage = stage(self.objective, BEYOND_RAMPS)
        modules = {**dict(self.model.heads.items()), **trainable_modules(self.model.trunk)}
        self.parts: Parts = trainable_parts(modules)
        self.generator_phase_module = wrap(Phase(modules))
        self.optimizer = make_optimizer(self.parts, learning_rate=config.grpo.learning_rate)
        self.mask_bias = MaskBias(config.mask_bias, device)
        self.first_entropy: float | None = None
        self.back_offs = self.backed_off_at = 0
        self.version = 0

    # ---- what the actors need -------------------------------------------------------------------------------------

    def generator_heads(self) -> Arrays:
        """The policy's heads, and under `trunk.` what else of it trains."""
        state = policy_state(self.model.trunk, self.model.heads)
        return {name: array.copy() for name, array in to_arrays(state).items()}

    @property
    def bias(self) -> float:
        """Bias on the [MASK] logit, nats."""
        return float(self.mask_bias.bias)

    # ---- the round ------------------------------------------------------------------------------------------------

    def generator_phase(
        self, round: int, rollouts: list[Rollout], scores: list[Scores], natural: Batch, rows: Tensor
    ) -> dict[str, float]:
        """Group-relative policy gradient on the rollouts' actions, plus the anchor on natural text.

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
            rollouts,
            scores,
            weights,
            grpo=grpo,
            signal=self.config.reward.signal,
            all_reduce=self.all_reduce,
        )
        updates = range(round * grpo.num_iterations, (round + 1) * grpo.num_iterations)
        num_steps = 1 if self.model.trunk.causal else self.config.denoise.steps
        drawn = [draw_steps(self.config.run.seed, update, num_steps, grpo.replay_steps) for update in updates]
        parts = [(r, part) for r, rollout in enumerate(rollouts) for part in split(rollout, grpo.micro_batch)]
        for rollout, own in zip(rollouts, weights, strict=True):
            accumulate(sums, {"entropy": weighted_sum(rollout.entropies, own[: len(rollout.entropies)])})
            accumulate(sums, wavefront_figures(rollout))
        proximal = self._proximal(rollouts, parts, {CACHED}.union(*drawn))
        ratio_max = torch.zeros((), device=self.device)
        norms: dict[str, Tensor] = {}
        for update, steps in zip(updates, drawn, strict=True):
            self.optimizer.zero_grad(set_to_none=True)
            chosen = [(r, part) for r, part in parts if part.step in (CACHED, *steps)] or parts[-1:]
            log_means = self._sequence_ratios(rollouts, parts, proximal)
            for number, (r, part) in enumerate(chosen):
                last = number == len(chosen) - 1

                def losses(
                    r: int = r,
                    part: Part = part,
                    last: bool = last,
                    update: int = update,
                    steps: list[int] = steps,
                    log_means: list[Tensor | None] = log_means,
                ) -> Tensor:
                    nonlocal ratio_max
                    share = 1.0 if part.step == CACHED else num_steps / len(steps) * (part.step in steps)
                    loss, figures, largest = self._policy_losses(
                        part,
                        credits[r][part.index],
                        share * weights[r][part.index],
                        proximal[r][part.index],
                        log_means[r],
                        stale=rollouts[r].policy_version < self.version,
                    )
                    ratio_max = torch.maximum(ratio_max, largest)
                    accumulate(sums, figures)
                    if last and grpo.anchor:
                        anchor, figures = self._anchor_loss(update, natural, rows)
                        accumulate(sums, figures)
                        loss = loss + grpo.anchor * anchor
                    return loss * self.world

                with accumulating(self.generator_phase_module, not last):
                    self.generator_phase_module(losses).backward()
            norms = clip_parts(self.parts, grpo.grad_clip)
            check_finite(norms, f"generator phase of round {round}")
            self.optimizer.step()
        self.version += 1
        self._average()
        metrics = self._means(sums)
        self._watch_entropy(metrics.get("entropy"), min(rollout.policy_version for rollout in rollouts))
        return metrics | {
            "ratio_max": float(self.all_reduce(ratio_max, "max")),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "back_offs": self.back_offs,
            "mask_bias": self.bias,
            **{f"grad_norm_{name}": float(norm) for name, norm in norms.items()},
        }

    # ---- state ----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, under plain names; what of the trunk is frozen excluded."""
        state = {f"policy.{name}": value for name, value in policy_state(self.model.trunk, self.model.heads).items()}
        result = policy_state(self.result.trunk, self.result.heads)
        state |= {f"result.{name}": value for name, value in result.items()}
        state |= {f"optimizer.{name}": value for name, value in flat_state(self.optimizer).items()}
        return state | {f"discriminator.{name}": value for name, value in self.discriminator.tensors().items()}

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint keeps beside `tensors`, as JSON."""
        return {
            "version": self.version,
            "num_reward_steps": self.discriminator.num_steps,
            "mask_bias": self.mask_bias.state_dict(),
            "first_entropy": self.first_entropy,
            "back_offs": self.back_offs,
            "backed_off_at": self.backed_off_at,
        }

    def load(self, tensors: dict[str, Tensor], texts: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Continue from `tensors`, `texts` and `numbers`."""
        load_policy_state(self.model.trunk, self.model.heads, with_prefix(tensors, "policy."))
        load_policy_state(self.result.trunk, self.result.heads, with_prefix(tensors, "result."))
        load_flat_state(self.optimizer, with_prefix(tensors, "optimizer."))
        self.version = numbers["version"]
        self.mask_bias.load_state_dict(numbers["mask_bias"])
        self.first_entropy = numbers["first_entropy"]
        self.back_offs, self.backed_off_at = numbers["back_offs"], numbers["backed_off_at"]
        set_learning_rate(self.optimizer, self._learning_rate)
        self.discriminator.load(with_prefix(tensors, "discriminator."), texts, numbers["num_reward_steps"])

    @property
    def _learning_rate(self) -> float:
        return self.config.grpo.learning_rate / 2**self.back_offs

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

    def _proximal(self, rollouts: list[Rollout], parts: list[tuple[int, Part]], steps: set[int]) -> list[Tensor]:
        """[M + D] log-probabilities that ratios are relative to: those that a fresh rollout acted with; of a stale one
        those of the present policy, at the steps that will be used."""
        proximal = [credited(rollout, "logprobs") for rollout in rollouts]
        for r, rollout in enumerate(rollouts):
            if rollout.policy_version < self.version:
                proximal[r] = proximal[r].clone()
                for _, part in (each for each in parts if each[0] == r and each[1].step in steps):
                    proximal[r][part.index] = part_logprobs(self.model, part)
        return proximal

    def _sequence_ratios(
        self, rollouts: list[Rollout], parts: list[tuple[int, Part]], proximal: list[Tensor]
    ) -> list[Tensor | None]:
        """[b] mean log-ratio of each sample, which `gspo` needs where a part holds but one step of it; else None."""
        if self.config.grpo.loss != "gspo":
            return [None] * len(rollouts)
        means: list[Tensor | None] = []
        for r, rollout in enumerate(rollouts):
            if rollout.inputs is None:
                means.append(None)
                continue
            present = torch.empty_like(proximal[r])
            for _, part in (each for each in parts if each[0] == r):
                present[part.index] = part_logprobs(self.model, part)
            means.append(mean_log_ratios(present - proximal[r], credited(rollout, "rows"), len(rollout.tokens)))
        return means

    def _policy_losses(
        self,
        part: Part,
        credit: Tensor,
        weights: Tensor,
        proximal: Tensor,
        log_means: Tensor | None,
        *,
        stale: bool,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Policy loss and KL term of a part, figures as pairs, and the largest ratio."""
        grpo, rollout = self.config.grpo, part.rollout
        logprobs, kl = action_values(self.model, self.reference, part)
        rows, num_rows = credited(rollout, "rows"), len(rollout.tokens)
        if log_means is not None:
            log_means = log_means[part.samples]
        ratios = likelihood_ratios(
            logprobs, proximal, rows=rows, num_rows=num_rows, loss=grpo.loss, log_means=log_means
        )
        trusted, figures = weights, {}
        if stale:
            importance = importance_weights(proximal, credited(rollout, "logprobs"), grpo.importance_cap)
            trusted, figures = weights * importance, {"importance": weighted_sum(importance, weights)}
        loss, metrics = clipped_policy_loss(
            ratios, credit, trusted, epsilon_low=grpo.epsilon_low, epsilon_high=grpo.epsilon_high
        )
        figures |= metrics | {"kl": weighted_sum(kl, weights)}
        return loss + grpo.kl * (weights * kl).sum(), figures, torch.cat([ratios.detach(), ratios.new_zeros(1)]).max()

    def _anchor_loss(self, step: int, natural: Batch, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The multi-task loss on natural text with the mask-bias controller."""
        tokens, mask = natural.tokens.to(self.device), natural.attention_mask.to(self.device)
        seeds, times = stratified_rows(self.config.run.seed, ANCHOR_STREAM, step, rows, len(rows) * self.world)
        seeds, times = seeds.to(self.device), times.to(self.device)
        corrupted = corrupt_batch(self.model, self.objective, self.stage, tokens, mask, seeds=seeds, times=times)
        totals = self.all_reduce(counts(self.objective, corrupted))
        loss, metrics = multitask_loss(
            self.model,
            self.objective,
            self.stage,
            corrupted,
            seeds=seeds,
            totals=totals,
            mask_bias=self.mask_bias.bias,
        )
        if "p_mask_unmask" in metrics:
            self.mask_bias.update(self.all_reduce(metrics["p_mask_unmask"].clone()))
        return loss, metrics

    @torch.no_grad()
    def _average(self) -> None:
        """Move the run's result towards the newest policy: weights rise with the round until `grpo.ema` caps them."""
        decay = min(self.config.grpo.ema, self.version / (self.version + 2))
        now = policy_state(self.model.trunk, self.model.heads)
        for name, mean in policy_state(self.result.trunk, self.result.heads).items():
            mean.lerp_(now[name], 1 - decay)

    def _watch_entropy(self, entropy: float | None, acted: int) -> None:
        """Back off where the policy of version `acted` had collapsed; None: it proposed nothing."""
        if entropy is None:
            return
        self.first_entropy = self.first_entropy or entropy
        if entropy < self.config.grpo.entropy_floor * self.first_entropy and acted >= self.backed_off_at:
            self._back_off()

    def _back_off(self) -> None:
        """Leave a collapsed policy: take the averaged one, forget the optimiser's moments, learn half as fast."""
        self.back_offs += 1
        self.backed_off_at = self.version  # rollouts in flight are still the collapsed policy's
        load_policy_state(self.model.trunk, self.model.heads, policy_state(self.result.trunk, self.result.heads))
        self.optimizer = make_optimizer(self.parts, learning_rate=self._learning_rate)

    def _sum(self, count: int) -> Tensor:
        return self.all_reduce(torch.tensor(float(count), device=self.device))

    def _means(self, sums: dict[str, Tensor]) -> dict[str, float]:
        values = reduced_means(sums, self.all_reduce)
        for name in [name.removesuffix("/square") for name in values if name.endswith("/square")]:
            values[f"{name}_std"] = max(0.0, values.pop(f"{name}/square") - values.get(name, 0.0) ** 2) ** 0.5
        return values
