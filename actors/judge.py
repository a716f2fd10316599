"""The independent judge in a process: a causal model with a share of the corpus of its own to train on.

1. It is never a reward. Its split (`judge`) is disjoint from the generator's (`train`) and from the evaluation
   prompts and natural references (`validation`).
2. `grpo.text_quality.judge_nll` reads its likelihood of completions, given their prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from actors.pretrainer import Pretrainer
from grpo.config import Config
from grpo.data import Cursor, Dataset
from grpo.model import GPT


def judge_config(config: Config) -> Config:
    """The judge's own config: a causal model of its own size on the same data."""
    settings = config.evaluation
    model = replace(
        config.model,
        attention="causal",
        critic=False,
        sampler=False,
        n_layer=settings.judge_layers,
        n_embd=settings.judge_width,
        n_head=settings.judge_heads,
        dropout=0.0,
    )
    steps = settings.judge_steps
    pretrain = replace(
        config.pretrain,
        mode="generator",
        steps=steps,
        num_workers=1,
        micro_batches=1,
        warmup=min(config.pretrain.warmup, steps // 10 + 1),
    )
    denoise = replace(config.denoise, sampler=False, remasking="random")
    grpo, reward = replace(config.grpo, replay_steps=0), replace(config.reward, layers=(-1,))
    return replace(config, model=model, pretrain=pretrain, denoise=denoise, grpo=grpo, reward=reward)


class Judge:
    """Trains itself once, then scores texts. A plain class; the pipeline makes it a Ray actor."""

    def __init__(self, config: Config, dataset: Dataset, *, threads: int, device: str = "cpu") -> None:
        torch.set_num_threads(threads)
        self.config, self.dataset, self.device = judge_config(config), dataset, device
        torch.manual_seed(config.run.seed + 1)
        self.model = GPT(self.config.model, dataset.vocabulary, block_size=config.data.block_size).to(device)

    def train(self, on_step: Callable[[int], None] = lambda step: None) -> GPT:
        """Train on the judge's split; returns the model."""
        settings = self.config.pretrain
        cursor = Cursor(self.dataset, "judge", settings.batch_size, self.config.data.block_size, self.config.run.seed)
        trainer = Pretrainer(self.model, self.config, device=self.device)
        for step in range(settings.steps):
            trainer.step(step, cursor.batch(step))
            on_step(step)
        self.model.eval()
        return self.model
