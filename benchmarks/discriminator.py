"""Which discriminator tells best, and whose judgement is the best reward?

    python benchmarks/discriminator.py [--quick] [--seeds N] [section.key=value ...]

Sorted lists (see benchmarks/grammar.py), one base, no generator phase: only the reward head trains, by each pooling,
loss, feature set and regularisation, on the same rounds of texts. Because sentences can be checked, the reward can be
held against the truth that it never saw.

1. `accuracy`: natural against generated, on the texts of rounds that the head has not trained on yet.
2. `auroc_text`: does the pooled signal put valid generated sentences above invalid ones?
3. `auroc_token`: does a token's reward (credit `grpo.credit`) put letters that stand in order above those that do not?

The last line is a JSON object: `rows`, `best_pooling` and `best_loss` (by accuracy), with `_ci95` over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.grammar import is_sorted, sentences, settings
from benchmarks.models import dataset_of, generator, load_generator, parse, print_table, summarise

# isort: split
import torch
from torch import Tensor

from benchmarks.adversarial import Adversary
from grpo.data import Batch, Dataset
from grpo.metrics import auroc
from grpo.model import GPT
from grpo.reward_loss import dense_rewards, log_odds
from grpo.trajectory import Rollout

POOLINGS, LOSSES = ("last", "mean", "both"), ("bce", "mse", "bradley_terry")
VARIANTS = {
    **{f"{pooling}, {loss}": [f"reward.pooling={pooling}", f"reward.loss={loss}"]
       for pooling in POOLINGS for loss in LOSSES},
    "both, bce, spectral norm": ["reward.spectral_norm=true"],
    "both, bce, visible states alone": ["reward.masked_passes=0"],
    "both, bce, 3 masked passes": ["reward.masked_passes=3"],
    "both, bce, all layers": ["reward.layers=[1,2,-1]"],
    "both, bce, no neighbours": ["reward.reach=0"],
    "both, bce, two neighbours on each side": ["reward.reach=2"],
}  # fmt: skip


def in_order(tokens: Tensor, real: Tensor) -> Tensor:
    """[B, T] bool: characters not above the next one nor below the one before; `real` [B, T] is False at pads."""
    falls = (tokens[:, 1:] < tokens[:, :-1]) & real[:, 1:]
    none = torch.zeros_like(falls[:, :1])
    return ~(torch.cat([falls, none], 1) | torch.cat([none, falls], 1))


def is_valid(dataset: Dataset, rollout: Rollout) -> Tensor:
    """[B] bool."""
    return torch.tensor([is_sorted(each) for each in sentences(dataset, Batch(rollout.tokens, rollout.attention_mask))])


def measure(args: argparse.Namespace, seed: int, dataset: Dataset, base: GPT, overrides: list[str]) -> dict[str, float]:
    """One variant's row."""
    warmup = 3 if args.quick else 8
    config = settings(args, seed, *overrides, f"reward.warmup_rounds={warmup}")
    adversary, accuracy = Adversary(config, dataset, base), 0.0
    for round in range(warmup + 2):
        metrics = adversary.round(round, train_generator=False, reward_steps=config.reward.warmup_steps)
        accuracy += metrics["reward_accuracy"] / 2 if round >= warmup else 0
    grpo, round = config.grpo, warmup + 2
    rows = adversary.natural.batch(round)
    prompts = rows[:: grpo.group_size]
    rollout = adversary.generator.roll_out(
        adversary.heads, 0, 0.0, round, torch.arange(grpo.prompts), prompts.tokens, prompts.attention_mask
    )
    scores = adversary.reward.score(adversary.scoring, round, rollout)
    valid, mask = is_valid(dataset, rollout), rollout.completion_mask
    right = in_order(rollout.tokens, rollout.attention_mask)

    rewards = dense_rewards(scores.logits, scores.token_logits, mask, credit=grpo.credit, signal=config.reward.signal,
                            window=grpo.credit_window)
    return {"accuracy": accuracy, "auroc_text": float(auroc(log_odds(scores.logits), valid)),
            "auroc_token": float(auroc(rewards[mask], right[mask]))}


def main() -> None:
    args = parse(__doc__)
    args.grammar = "sorted"
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for seed in range(args.seeds):
        config = settings(args, seed)
        dataset = dataset_of(config)
        base = load_generator(generator(config, dataset))[0]
        for name, overrides in VARIANTS.items():
            rows[name].append(measure(args, seed, dataset, base, overrides))
            print(f"seed {seed}  {name}: " + "  ".join(f"{k} {v:.3f}" for k, v in rows[name][-1].items()), flush=True)
    print_table("reward heads", rows)
    table = {name: summarise(runs) for name, runs in rows.items()}
    print(json.dumps({
        "best_pooling": max(POOLINGS, key=lambda pooling: table[f"{pooling}, bce"]["accuracy"]),
        "best_loss": max(LOSSES, key=lambda loss: table[f"both, {loss}"]["accuracy"]),
        "rows": table, "seeds": args.seeds, "quick": args.quick,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
