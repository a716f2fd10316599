"""Adversarial training in this process, without Ray: what the quality benchmarks run many times over.

The same `Generator`, `Reward` and `Learner` as `pipelines/grpo.py`, called directly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from actors.generator import Generator
from actors.learner import Learner
from actors.pretrainer import Pretrainer
from actors.reward import Reward
from actors.trunk_store import Blueprint, to_arrays
from grpo.config import Config
from grpo.data import Cursor, Dataset
from grpo.model import GPT
from grpo.remasking import resolve_policy


def train_base(config: Config, dataset: Dataset, *, device: str = "cpu") -> tuple[GPT, Pretrainer]:
    """Pretrain a generator."""
    torch.manual_seed(config.run.seed)
    model = GPT(config.model, dataset.vocabulary, block_size=config.data.block_size)
    trainer = Pretrainer(model, config, device=device)
    fit(trainer, dataset)
    return model, trainer


def fit(trainer: Pretrainer, dataset: Dataset) -> None:
    """Take all of the trainer's steps on the training split; leaves its model in eval mode."""
    config = trainer.config
    cursor = Cursor(dataset, "train", config.pretrain.batch_size, config.data.block_size, config.run.seed)
    for step in range(config.pretrain.steps):
        trainer.step(step, cursor.batch(step))
    trainer.model.eval()


class Adversary:
    """A learner with one generator and one reward model, and the loop around them."""

    def __init__(self, config: Config, dataset: Dataset, base: GPT, *, mask_bias: dict[str, float] | None = None,
                 threads: int = 1, device: str = "cpu") -> None:
        """mask_bias: state of the base's controller, which goes on; None: a fresh one."""
        self.config, grpo = config, config.grpo
        blueprint = Blueprint(
            model=config.model, vocabulary=dataset.vocabulary, block_size=config.data.block_size, reward=config.reward
        )
        trunk = {name: array.copy() for name, array in to_arrays(base.trunk.state_dict()).items()}
        torch.manual_seed(config.run.seed)
        scratch = blueprint.build("generator")
        scratch.load_state_dict(base.state_dict())
        scratch.untie(grpo.residual)
        heads = to_arrays(scratch.heads.state_dict())
        remasking = resolve_policy(config.denoise.remasking, base, None)
        self.learner = Learner(blueprint, config, trunk, heads, remasking=remasking, device=device)
        if mask_bias:
            self.learner.mask_bias.load_state_dict(mask_bias)
        self.generator = Generator(
            blueprint,
            trunk,
            heads,
            config=replace(config, run=replace(config.run, threads=threads)),
            remasking=remasking,
            device=device,
        )
        self.reward = Reward(
            blueprint,
            trunk,
            self.learner.discriminator.scoring_heads(),
            threads=threads,
            device=device,
            functions=grpo.rewards,
            tokenizer=dataset.tokenizer,
        )
        self.natural = Cursor(dataset, "train", grpo.prompts * grpo.group_size, config.data.block_size, config.run.seed)
        self.heads, self.scoring = self.learner.generator_heads(), self.learner.discriminator.scoring_heads()

    def round(self, round: int, *, train_generator: bool = True, reward_steps: int | None = None) -> dict[str, float]:
        """Roll out, score, generator phase, reward phase."""
        learner, grpo = self.learner, self.config.grpo
        natural = self.natural.batch(round)
        prompts = natural[:: grpo.group_size]
        rollout = self.generator.roll_out(
            self.heads,
            learner.version,
            learner.bias,
            round,
            torch.arange(grpo.prompts),
            prompts.tokens,
            prompts.attention_mask,
        )
        scores = self.reward.score(self.scoring, round, rollout)
        metrics = learner.discriminator.remember(
            round, [rollout], [scores], natural, learner.discriminator.natural_features(natural)
        )
        if train_generator:
            metrics |= learner.generator_phase(round, [rollout], [scores], prompts, torch.arange(grpo.prompts))
            self.heads = learner.generator_heads()
            learner.discriminator.steer(metrics.get("reward_accuracy"))
        metrics |= learner.discriminator.train(round, reward_steps)
        self.scoring = learner.discriminator.scoring_heads()
        return metrics

    def run(self, on_round: Callable[[int, dict[str, float]], None] = lambda round, metrics: None) -> GPT:
        warmup = self.config.warmup_rounds
        for round in range(warmup + self.config.grpo.rounds):
            first = round < warmup
            on_round(
                round - warmup,
                self.round(
                    round, train_generator=not first, reward_steps=self.config.reward.warmup_steps if first else None
                ),
            )
        return self.learner.result
