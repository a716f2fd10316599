"""Does the discriminator's reward point where the truth points, and how steadily, by kind of credit?

    python benchmarks/credit.py [--quick] [--seeds N] [section.key=value ...]

Sorted lists (see benchmarks/grammar.py), one base, a warmed-up reward head, several rounds of rollouts of the base and
no update. For each kind of credit the policy gradient of each round; and two that know the truth: a token earns 1 where
it stands in order, or every token of a valid sentence earns 1.

1. `steadiness`: mean cosine between the gradients of two rounds. It falls with noise.
2. `to_token_truth`, `to_text_truth`: cosine between the mean gradient of one half of the rounds and that of the truth
   over the other half. Its ceiling is the cosine of the truth with itself, in the last two rows.
3. `all` credits every proposal, `kept` those that stayed in the text: under the wavefront a biased gradient of less
   noise, since proposals that were taken back earn what their successors earned.

The last line is a JSON object: `rows`, `best_credit` (by `to_text_truth`, all proposals), with `_ci95` over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.discriminator import in_order, is_valid
from benchmarks.grammar import settings
from benchmarks.models import dataset_of, generator, load_generator, parse, print_table, summarise

# isort: split
import torch
from torch import Tensor

from actors.reward import Scores
from benchmarks.adversarial import Adversary
from grpo.data import Dataset
from grpo.policy_loss import group_advantages, temperature_direction
from grpo.reward_loss import dense_rewards
from grpo.trajectory import Rollout, policy_log_probs

CREDITS = (("token", 0), ("window", 1), ("window", 2), ("window", 4), ("both", 0), ("sequence", 0))
TRUTHS = ("truth of tokens", "truth of texts")


def rewards_by_credit(scores: Scores, rollout: Rollout, dataset: Dataset) -> dict[str, Tensor]:
    """[B, T] rewards under every kind of credit and both truths."""
    mask = rollout.completion_mask
    rewards = {
        f"{credit} {reach or ''}".strip(): dense_rewards(scores.logits, scores.token_logits, mask, credit=credit,
                                                         signal="log_odds", window=reach)
        for credit, reach in CREDITS
    }  # fmt: skip
    right = in_order(rollout.tokens, rollout.attention_mask), is_valid(dataset, rollout)[:, None].expand_as(mask)
    return rewards | {name: truth * mask.float() for name, truth in zip(TRUTHS, right, strict=True)}


def stayed(rollout: Rollout) -> Tensor:
    """[M] bool, proposals of the last step at their position."""
    columns = rollout.tokens.shape[1]
    place = rollout.rows * columns + rollout.positions
    last = torch.full((rollout.tokens.numel(),), -1).scatter_reduce(0, place, rollout.steps, "amax")
    return rollout.steps == last[place]


def gradients(adversary: Adversary, rollout: Rollout, scores: Scores, dataset: Dataset) -> Iterator[tuple[str, Tensor]]:
    """Name and flat policy gradient, temperature taken out, of each credit with all and with kept proposals."""
    model, size = adversary.learner.model, rollout.group_size
    heads = [p for name, p in model.heads.named_parameters() if not name.startswith("critic")]
    log_policy = policy_log_probs(model, rollout)
    own = log_policy.gather(-1, rollout.actions[:, None])[:, 0]
    knob = temperature_direction(rollout.logprobs, rollout.entropies)
    grouped = rollout.completion_mask.unflatten(0, (-1, size))
    for name, rewards in rewards_by_credit(scores, rollout, dataset).items():
        advantages = group_advantages(rewards.unflatten(0, (-1, size)), mask=grouped).flatten(0, 1)
        for which, chosen in (("all", torch.ones_like(rollout.steps)), ("kept", stayed(rollout))):
            weights = chosen.float() / chosen.sum()
            credit = advantages[rollout.rows, rollout.positions]
            credit = credit - (weights * credit * knob).sum() / (weights * knob.square()).sum() * knob
            found = torch.autograd.grad((weights * credit * own).sum(), heads, retain_graph=True, allow_unused=True)
            yield f"{name}, {which}", torch.cat([g.flatten() for g in found if g is not None])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def measure(args: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """One seed's rows."""
    warmup, rounds = (3, 4) if args.quick else (8, 8)
    config = settings(args, seed, f"reward.warmup_rounds={warmup}")
    dataset = dataset_of(config)
    adversary = Adversary(config, dataset, load_generator(generator(config, dataset))[0])
    for round in range(warmup):
        adversary.round(round, train_generator=False, reward_steps=config.reward.warmup_steps)
    grpo, found = config.grpo, {}
    for round in range(warmup, warmup + rounds):
        rows = adversary.natural.batch(round)
        prompts = rows[:: grpo.group_size]
        rollout = adversary.generator.roll_out(
            adversary.heads, 0, 0.0, round, torch.arange(grpo.prompts), prompts.tokens, prompts.attention_mask
        )
        scores = adversary.reward.score(adversary.scoring, round, rollout)
        for name, gradient in gradients(adversary, rollout, scores, dataset):
            found.setdefault(name, []).append(gradient)
    sums = {name: torch.stack(each) for name, each in found.items()}
    half = rounds // 2

    def across(name: str, other: str) -> float:
        a, b = sums[name], sums[f"{other}, all"]
        return (cosine(a[:half].mean(0), b[half:].mean(0)) + cosine(a[half:].mean(0), b[:half].mean(0))) / 2

    pairs = list(combinations(range(rounds), 2))
    return {
        name: {
            "steadiness": sum(cosine(each[i], each[j]) for i, j in pairs) / len(pairs),
            "to_token_truth": across(name, TRUTHS[0]),
            "to_text_truth": across(name, TRUTHS[1]),
        }
        for name, each in sums.items()
    }


def main() -> None:
    args = parse(__doc__)
    args.grammar = "sorted"
    args.overrides = ["denoise.sampler=true", *args.overrides]
    seeds = [measure(args, seed) for seed in range(args.seeds)]
    rows = {name: [seed[name] for seed in seeds] for name in seeds[0]}
    print_table("policy gradients", rows)
    table = {name: summarise(runs) for name, runs in rows.items()}
    own = [name for name in table if name.endswith(", all") and not name.startswith("truth")]
    print(json.dumps({"rows": table, "best_credit": max(own, key=lambda name: table[name]["to_text_truth"]),
                      "seeds": args.seeds, "quick": args.quick}))


if __name__ == "__main__":
    main()
