"""How close do estimates of a diffusion policy's gradient come to the exact one, for how many trunk passes?

A trained generator writes groups of texts in S denoising steps (random re-masking, temperature 1). Their reward is the
mean log-probability of their character pairs in held-out text, their advantages are GRPO's. Each estimator of
benchmarks/estimators.py then gives the gradient of the policy loss over all of the generator's parameters, on the same
texts, against the exact one, which replays every step. Over R draws of a random estimator's noise:

    cosine     mean cosine with the exact gradient g
    expected   mean cosine with the exact gradient of 8 other batches: what the texts' own noise leaves of it
    bias       |mean - g| / |g|, the draws' own variance taken off; of a random one it is known up to `bias_noise`
    variance   mean squared distance from the mean, over |g|^2
    passes     trunk passes (forward and backward) of one estimate
    seconds    of one estimate, on this machine

1. An estimate may have another scale than g without harm (an optimiser's learning rate absorbs it): read the cosine
   first. At the best scale, an estimator without noise keeps a bias of sqrt(1 - cosine^2).
2. `cached` is the exact gradient from states that the rollout kept. It exists for heads over a frozen trunk alone, and
   is compared with the exact gradient of these.

Run: python benchmarks/gradient_fidelity.py [--quick] [--seeds N] [--steps S]. The last line is one JSON object: `rows`
(estimator, cosine, bias, variance, passes, seconds) and `cheapest`, the estimator of fewest passes with cosine >= 0.99.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.estimators import EXACT, Batch, Estimator, estimators, gradient
from benchmarks.models import configure, dataset_of, generator, load_generator, parse, print_table, summarise
from grpo.config import Config
from grpo.data import Dataset, windows
from grpo.model import GPT
from grpo.noise import row_seeds
from grpo.policy_loss import group_advantages
from grpo.trajectory import Rollout, roll_out, trajectory_logprobs

FULL = ("model.n_layer=4", "model.n_embd=128", "pretrain.steps=500", "pretrain.batch_size=32")
BARE = ("model.critic=false", "model.sampler=false")
NEEDED = 0.99
OTHERS = 8
"""Batches whose mean gradient stands for the expected one."""


def pair_logprobs(dataset: Dataset, length: int) -> Tensor:
    """[V, V] log P(next token | token) in held-out text, add-one smoothed."""
    tokens = windows(dataset, "judge", 1024, length, 1).tokens
    size = dataset.vocabulary.size
    pairs = torch.bincount((tokens[:, :-1] * size + tokens[:, 1:]).flatten(), minlength=size * size).view(size, size)
    return (pairs + 1.0).log() - (pairs + 1.0).sum(1, keepdim=True).log()


def rolled_out(
    model: GPT, config: Config, dataset: Dataset, *, prompts: int, steps: int, seed: int, replay: bool
) -> Rollout:
    natural = windows(dataset, "train", prompts, config.data.block_size, seed)
    return roll_out(
        model, natural.tokens, natural.attention_mask, prompt_tokens=config.grpo.prompt_tokens,
        group_size=config.grpo.group_size, seeds=row_seeds(seed, 0, 0, torch.arange(prompts * config.grpo.group_size)),
        settings=replace(config.denoise, steps=steps), remasking="random", policy_tokens="kept", mask_bias=0.0,
        min_neighbors_ratio=0.01, policy_version=0, replay=replay,
    )


def cosine(left: Tensor, right: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=0).item()


def compare(
    estimator: Estimator, model: GPT, batch: Batch, exact: Tensor, others: Tensor, draws: int
) -> dict[str, float]:
    """One row of the table; `others` is the exact gradient of other batches."""
    cosines, expected, seconds, total, squares, passes = [], [], [], torch.zeros_like(exact), 0.0, 0
    draws = draws if estimator.random else 1
    for seed in range(draws):
        started = time.perf_counter()
        found, passes = gradient(estimator, model, batch, seed)
        seconds.append(time.perf_counter() - started)
        cosines.append(cosine(found, exact))
        expected.append(cosine(found, others))
        total += found
        squares += found.square().sum().item()
    mean, norm = total / draws, exact.square().sum().item()
    variance = max(0.0, (squares - draws * mean.square().sum().item()) / max(1, draws - 1))
    bias = max(0.0, (mean - exact).square().sum().item() - variance / draws)
    return {
        "cosine": statistics.fmean(cosines), "expected": statistics.fmean(expected),
        "bias": (bias / norm) ** 0.5, "variance": variance / norm,
        "bias_noise": (variance / draws / norm) ** 0.5, "passes": float(passes), "seconds": statistics.median(seconds),
    }


def cached_row(model: GPT, cached: Batch, replayed: Batch, others: Tensor) -> dict[str, float]:
    """The exact gradient of the heads from cached states, against its replay; heads come last in `others`."""
    model.trunk.requires_grad_(False)
    exact, _ = gradient(EXACT, model, replayed)
    rollout, advantages = cached.rollout, cached.advantages
    started = time.perf_counter()
    model.zero_grad(set_to_none=True)
    (-(advantages[rollout.rows] * trajectory_logprobs(model, rollout)).sum() / len(advantages)).backward()
    seconds = time.perf_counter() - started
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.heads.parameters()])
    model.trunk.requires_grad_(True)
    return {
        "cosine": cosine(found, exact), "expected": cosine(found, others[-len(found) :]),
        "bias": ((found - exact).norm() / exact.norm()).item(),
        "variance": 0.0, "bias_noise": 0.0, "passes": 0.0, "seconds": seconds,
    }


def measure(config: Config, *, prompts: int, steps: int, draws: int, seed: int) -> dict[str, dict[str, float]]:
    """A row of figures per estimator."""
    dataset = dataset_of(config)
    model, _ = load_generator(generator(config, dataset))
    model.untie()
    rewards, start = pair_logprobs(dataset, config.data.block_size), config.grpo.prompt_tokens - 1

    def batch(number: int, replay: bool = True) -> Batch:
        options = {"prompts": prompts, "steps": steps, "seed": 1000 * (seed + 1) + number, "replay": replay}
        rollout = rolled_out(model, config, dataset, **options)
        texts = rollout.tokens[:, start:]
        earned = rewards[texts[:, :-1], texts[:, 1:]].mean(1)
        return Batch(rollout, group_advantages(earned.view(prompts, -1)).flatten())

    replayed = batch(0)
    exact, _ = gradient(EXACT, model, replayed)
    others = sum(gradient(EXACT, model, batch(number))[0] for number in range(1, 1 + OTHERS))
    rows = {each.name: compare(each, model, replayed, exact, others, draws) for each in estimators(steps)}
    return rows | {"cached (heads)": cached_row(model, batch(0, replay=False), replayed, others)}


def cheapest(rows: list[dict[str, object]]) -> str:
    """Of the estimators of the whole gradient; the cached one needs no pass at all, where heads alone train."""
    close = [row for row in rows if row["cosine"] >= NEEDED and row["passes"]]
    return min(close, key=lambda row: row["passes"])["estimator"]


def main() -> None:
    args = parse(__doc__, lambda parser: parser.add_argument("--steps", type=int, default=0, help="S (16; quick: 8)"))
    steps, sizes = args.steps or (8 if args.quick else 16), BARE if args.quick else (*FULL, *BARE)
    scale = {"prompts": 2, "draws": 4} if args.quick else {"prompts": 4, "draws": 16}
    runs = [measure(configure(args, seed, *sizes), steps=steps, seed=seed, **scale) for seed in range(args.seeds)]
    print_table(f"S = {steps}", {name: [run[name] for run in runs] for name in runs[0]})
    rows = [{"estimator": name, **summarise([run[name] for run in runs])} for name in runs[0]]
    best = cheapest(rows)
    print(f"\nfewest trunk passes with cosine >= {NEEDED}: {best}")
    print(json.dumps({"rows": rows, "cheapest": best, "steps": steps}))


if __name__ == "__main__":
    main()
