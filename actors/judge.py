"""The independent judge in a process: a causal model with a share of the corpus of its own to train on.

1. It is never a reward. Its split (`judge`) is disjoint from the generator's (`train`) and from the evaluation
   prompts and natural references (`validation`).
2. It is one ruler for all runs on the same data: nothing but the data and `evaluation.judge_*` decides it. All else is
   the default of its section, and the seed is its own, so runs of other training settings or seeds can be compared.
3. One that knows the data less well than the generator says little about it; a run says so where that is the case.
4. `grpo.text_quality.judge_nll` reads its likelihood of completions, given their prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from actors.pretrainer import Pretrainer
from actors.torch_setup import set_up_torch
from grpo.config import Config, GrpoSection, ModelSection, PretrainSection
from grpo.data import Cursor, Dataset
from grpo.model import GPT

SEED = 0
WARMUP = 50
"""Most steps of the judge's own warm-up."""


def judge_config(config: Config) -> Config:
    """The judge's own config: a causal model of its own size on the same data, trained by its own recipe."""
    settings = config.evaluation
    return Config(
        run=replace(config.run, seed=SEED),
        data=config.data,
        model=ModelSection(
            attention="causal",
            critic=False,
            sampler=False,
            n_layer=settings.judge_layers,
            n_embd=settings.judge_width,
            n_head=settings.judge_heads,
        ),
        pretrain=PretrainSection(
            steps=settings.judge_steps,
            learning_rate=settings.judge_learning_rate,
            warmup=min(WARMUP, settings.judge_steps // 10 + 1),
        ),
        grpo=GrpoSection(prompt_tokens=config.grpo.prompt_tokens),
        evaluation=settings,
    )


class Judge:
    """The judge before its training. A plain class, used inside the task `fit_judge` and by benchmarks."""

    def __init__(self, config: Config, dataset: Dataset, *, threads: int, device: str = "cpu") -> None:
        set_up_torch(device, threads)
        self.config, self.dataset, self.device = judge_config(config), dataset, device
        torch.manual_seed(SEED + 1)
        self.model = GPT(self.config.model, dataset.vocabulary, block_size=config.data.block_size).to(device)

    def train(self) -> Iterator[int]:
        """Train `model` on the judge's split; yields how many steps are done."""
        settings = self.config.pretrain
        cursor = Cursor(self.dataset, "judge", settings.batch_size, self.config.data.block_size, SEED)
        trainer = Pretrainer(self.model, self.config, device=self.device)
        for step in range(settings.steps):
            trainer.step(step, cursor.batch(step))
            yield step + 1
        self.model.eval()
