"""How much faster is a generator phase on cached states than the same update by replay, and what does replay hold?

1. Speed. A learner takes `--epochs` (4) inner epochs on one round's rollouts, anchor on natural text included, once
   from cached states and once by replaying every denoising step through the frozen trunk. Both start from the same
   weights; A B A B alternation. `speedup` is the median ratio of neighbours.
2. Gradient. The first epoch's gradients of all heads, of both, in float32: |difference| / |gradient|.
3. Memory. With the whole trunk training, the peak of one replayed update at 64 denoising steps over that at 8, of what
   tensors hold (benchmarks/peak_memory.py); and, for contrast, with all steps in one backward.

The generator has the default shape with 4 layers of width 128 (0.9 M parameters) and initial weights, whose values
change neither time nor memory.

Run: python benchmarks/cached_update.py [--quick] [--seeds N] [--epochs E]. The last line is one JSON object: `speedup`,
`gradient_relative_error`, `replay_peak_ratio`, `one_backward_peak_ratio`.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from actors.learner import Learner
from actors.reward import Scores
from benchmarks.adversarial import Adversary
from benchmarks.models import configure, dataset_of, parse, print_table, summarise
from benchmarks.peak_memory import PeakMemory
from grpo.config import Config
from grpo.lora import Trainable, train_below_heads
from grpo.model import GPT
from grpo.replay import action_values, split
from grpo.trajectory import Rollout


class Round:
    """One round's rollouts, with cached states and to be replayed, their scores, and the learner that takes them."""

    def __init__(self, config: Config, seed: int) -> None:
        dataset, grpo = dataset_of(config), config.grpo
        torch.manual_seed(seed)
        base = GPT(config.model, dataset.vocabulary, block_size=config.data.block_size).eval()
        self.world = Adversary(config, dataset, base)
        natural = self.world.natural.batch(0)
        self.prompts = natural[:: grpo.group_size]
        self.cached, self.replayed = self.roll_out(False), self.roll_out(True)
        self.scores = self.world.reward.score(self.world.scoring, 0, self.cached)
        self.start = {name: value.clone() for name, value in self.learner.model.heads.state_dict().items()}

    @property
    def learner(self) -> Learner:
        return self.world.learner

    def roll_out(self, replay: bool) -> Rollout:
        self.world.generator.settings["replay"] = replay
        indices = torch.arange(self.world.config.grpo.prompts)
        return self.world.generator.roll_out(
            self.world.heads, 0, 0.0, 0, indices, self.prompts.tokens, self.prompts.attention_mask
        )

    def phase(self, rollout: Rollout) -> float:
        """Seconds of a generator phase from the starting weights."""
        self.learner.model.heads.load_state_dict(self.start)
        self.learner.version = rollout.policy_version
        started = time.perf_counter()
        scores: list[Scores] = [self.scores]
        self.learner.generator_phase(0, [rollout], scores, self.prompts, torch.arange(len(self.prompts.tokens)))
        return time.perf_counter() - started

    def first_gradient(self, rollout: Rollout) -> Tensor:
        """Of all heads, flat, before it is clipped."""
        found: list[Tensor] = []
        optimizer, config = self.learner.optimizer, self.learner.config
        self.learner.config = replace(config, grpo=replace(config.grpo, num_iterations=1, grad_clip=1e9))
        step, optimizer.step = optimizer.step, lambda: found.extend(
            p.grad.flatten().clone() for p in self.learner.model.heads.parameters() if p.grad is not None
        )
        self.phase(rollout)
        optimizer.step, self.learner.config = step, config
        return torch.cat(found)


def peak(rollout: Rollout, model: Callable[[], GPT], *, together: bool) -> int:
    """Bytes that one update of the whole trunk holds at most; `together`: all steps in one backward."""
    policy, reference = model(), model()
    train_below_heads(policy.trunk, Trainable(kind="all"), seed=0)
    parts = split(rollout, 0)
    with PeakMemory() as memory:
        total: Tensor | float = 0.0
        for part in parts:
            logprobs, kl = action_values(policy, reference, part)
            loss = (kl - logprobs).sum() / len(rollout.rows)
            total = total + loss
            if not together:
                loss.backward()
        if together:
            total.backward()
    return memory.peak_bytes


def peak_ratios(config: Config, seed: int) -> dict[str, float]:
    peaks = {}
    few = replace(config, grpo=replace(config.grpo, prompts=2))
    for steps in (8, 64):
        world = Round(replace(few, denoise=replace(few.denoise, steps=steps)), seed)

        def model(world: Round = world) -> GPT:
            return copy.deepcopy(world.learner.reference)

        for together in (False, True):
            peaks[steps, together] = peak(world.replayed, model, together=together)
    return {
        "replay_peak_ratio": peaks[64, False] / peaks[8, False],
        "one_backward_peak_ratio": peaks[64, True] / peaks[8, True],
        "replay_peak_mb": peaks[64, False] / 2**20,
        "one_backward_peak_mb": peaks[64, True] / 2**20,
    }


def measure(config: Config, *, repeats: int, seed: int) -> dict[str, float]:
    world = Round(config, seed)
    gradients = [world.first_gradient(rollout) for rollout in (world.cached, world.replayed)]
    pairs = [(world.phase(world.cached), world.phase(world.replayed)) for _ in range(repeats + 1)][1:]
    return {
        "speedup": statistics.median(replayed / cached for cached, replayed in pairs),
        "cached_s": statistics.median(cached for cached, _ in pairs),
        "replayed_s": statistics.median(replayed for _, replayed in pairs),
        "gradient_relative_error": ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item(),
        **peak_ratios(config, seed),
    }


def main() -> None:
    args = parse(__doc__, lambda parser: parser.add_argument("--epochs", type=int, default=4, help="inner epochs"))
    sizes = ("model.n_layer=4", "model.n_embd=128", "model.n_head=4", f"grpo.num_iterations={args.epochs}")
    sizes += ("grpo.prompts=4" if args.quick else "grpo.prompts=16",)
    runs = [measure(configure(args, seed, *sizes), repeats=2 if args.quick else 3, seed=seed)
            for seed in range(args.seeds)]
    print_table("4 steps", {"generator phase": runs})
    print(json.dumps(summarise(runs)))


if __name__ == "__main__":
    main()
