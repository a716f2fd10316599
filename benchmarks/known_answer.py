"""Does the policy climb a reward whose answer is known, for both kinds of generator?

    python benchmarks/known_answer.py [--quick] [--seeds N] [--data FILE]

A user's reward function alone (`grpo.example_rewards:vowel_share`: the share of lower-case vowels), without adversary
and anchor, on small bases; then the same with a KL weight of 10; then one round in which all rewards are equal. The
last line is a JSON object: `climb_diffusion`, `climb_causal` (mean reward of the last three rounds less the first's),
`monotone_share` (share of rounds whose mean over three rounds does not fall), `kl_*` (nats per action at the end),
`held_climb_*` and `held_kl_*` (the same under the high KL weight), `equal_rewards_gradient` (largest norm of a head's
gradient, without the KL), and `<key>_ci95` over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.adversarial import Adversary
from benchmarks.models import configure, dataset_of, generator, load_generator, parse, print_table, summarise
from grpo.config import Config
from grpo.data import Dataset
from grpo.model import GPT

NAME = "grpo.example_rewards:vowel_share"
ALONE = [f'grpo.rewards={{"{NAME}": 1.0}}', "grpo.adversary=0", "grpo.anchor=0",
         "grpo.entropy_floor=0", "grpo.learning_rate=3e-4", "grpo.kl=0.03", "grpo.num_iterations=1"]
KINDS = {"diffusion": [], "causal": ["model.attention=causal", "model.critic=false", "model.sampler=false"]}
HIGH_KL = 10.0


def climb(config: Config, dataset: Dataset, base: GPT) -> dict[str, float]:
    """Train, and say how far and how steadily the reward rose."""
    rewards: list[float] = []
    last: dict[str, float] = {}

    def watch(round: int, metrics: dict[str, float]) -> None:
        rewards.append(metrics["reward"])
        last.update(metrics)

    Adversary(config, dataset, base).run(watch)
    smooth = [sum(rewards[i : i + 3]) / 3 for i in range(len(rewards) - 2)]
    rises = [after >= before for before, after in zip(smooth, smooth[1:], strict=False)]
    return {"first": rewards[0], "last": smooth[-1], "climb": smooth[-1] - rewards[0],
            "monotone_share": sum(rises) / len(rises), "kl": last["kl"], "entropy": last["entropy"]}


def gradient_of_equal_rewards(config: Config, dataset: Dataset, base: GPT) -> float:
    """Largest gradient norm among the heads in a round whose texts all earn the same; the KL's is rounding dust."""
    adversary = Adversary(replace(config, grpo=replace(config.grpo, kl=0.0)), dataset, base)
    adversary.reward.functions = {NAME: lambda texts: [0.1] * len(texts)}
    return max(value for name, value in adversary.round(0).items() if name.startswith("grad_norm_"))


def main() -> None:
    args = parse(__doc__)
    small = argparse.Namespace(**{**vars(args), "quick": True})  # small bases suffice; the full run has more rounds
    rounds = ["grpo.rounds=12"] if args.quick else ["grpo.rounds=25"]
    table: dict[str, list[dict[str, float]]] = {}
    runs = []
    for seed in range(args.seeds):
        found: dict[str, float] = {}
        for kind, shape in KINDS.items():
            config, held = (configure(small, seed, *shape, *ALONE, *rounds, *more)
                            for more in ([], [f"grpo.kl={HIGH_KL}"]))
            dataset = dataset_of(config)
            base = load_generator(generator(config, dataset))[0]
            free, near = climb(config, dataset, base), climb(held, dataset, base)
            table.setdefault(kind, []).append(free)
            table.setdefault(f"{kind}, KL weight {HIGH_KL:g}", []).append(near)
            zero = gradient_of_equal_rewards(config, dataset, base)
            print(f"seed {seed}  {kind}: {free['first']:.3f} -> {free['last']:.3f}", flush=True)
            found |= {f"climb_{kind}": free["climb"], f"monotone_{kind}": free["monotone_share"],
                      f"kl_{kind}": free["kl"], f"held_climb_{kind}": near["climb"], f"held_kl_{kind}": near["kl"],
                      f"equal_rewards_gradient_{kind}": zero}
        found["monotone_share"] = sum(found[f"monotone_{kind}"] for kind in KINDS) / len(KINDS)
        found["equal_rewards_gradient"] = max(found[f"equal_rewards_gradient_{kind}"] for kind in KINDS)
        runs.append(found)
    print_table("reward: share of vowels", table)
    print(json.dumps(summarise(runs)))


if __name__ == "__main__":
    main()
