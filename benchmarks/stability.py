"""Do the adversarial rounds survive, seed after seed, and what keeps them alive?

    python benchmarks/stability.py [--quick] [--seeds N] [--first N] [--ablations N] [--rounds N] [--processes N]
                                   [--data FILE]

The tiny configuration for many more rounds than it asks for. Every 50 rounds the run's result writes completions of
held-out prompts. A seed survives if, whenever it is measured, its token entropy and its distinct-4 are at least 95 % of
natural text's. The share of rounds is counted in which the discriminator's accuracy on texts that it has not trained on
lies within `reward.band_low` .. `reward.band_high`.

Variants leave out the accuracy band (as many reward steps in every round), the replay buffer, the KL penalty or the
anchor, let the advantages see the temperature, or divide them by their spread and score with a head that lags;
`--ablations` says with how many seeds. Each seed of each variant is kept in the cache, so that a run that was stopped
goes on and one with more seeds adds to what is there. `--processes` of them run at once, a thread each; `--first`
names the first seed, where machines share them.

The last line is a JSON object: `survived` and `in_band` (shares), `entropy_kept` (least entropy over natural text's,
mean over seeds), each with `_ci95` over seeds, and `rows`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import (
    Texts,
    configure,
    dataset_of,
    generator,
    judge,
    load_generator,
    parse,
    print_table,
    remembered,
    rounds_follow_from,
    summarise,
)

# isort: split
from benchmarks.adversarial import Adversary
from grpo.checkpoint import load_checkpoint
from grpo.config import Config
from grpo.text_quality import distinct_n, token_entropy

KEPT = 0.95
VARIANTS: dict[str, list[str]] = {
    "as configured": [],
    "no band": ["reward.min_steps=40"],
    "no replay": ["reward.replay_rounds=0"],
    "no KL": ["grpo.kl=0"],
    "no anchor": ["grpo.anchor=0"],
    "advantages see the temperature": ["grpo.neutral=false"],
    "normalized advantages, a head that lags": ["grpo.normalize=true", "reward.ema=0.9"],
}


def live(config: Config, args: argparse.Namespace, folder: Path, name: str) -> dict[str, list]:
    """Run all rounds; figures of the result every `every` rounds, and each round's discriminator accuracy.

    Args:
        folder: of the base; name: what to print figures under.
    """
    dataset = dataset_of(config)
    base, bias = load_generator(folder)
    texts = Texts(config, dataset, config.evaluation.samples)
    natural = texts.natural.tokens[:, texts.start :]
    of_natural = {"entropy": token_entropy(natural), "distinct_4": distinct_n(natural, 4)}
    points, accuracies = [], []
    adversary = Adversary(config, dataset, base, mask_bias=load_checkpoint(folder).state["mask_bias"])

    def follow(round: int, metrics: dict[str, float]) -> None:
        if round < 0:
            return
        accuracies.append(metrics["reward_accuracy"])
        if (round + 1) % args.every == 0:
            tokens = texts.write(adversary.learner.result, "random", config.denoise.steps,
                                 sampler=config.denoise.sampler, mask_bias=bias)[:, texts.start :]
            kept = {"entropy": token_entropy(tokens), "distinct_4": distinct_n(tokens, 4)}
            points.append({figure: value / of_natural[figure] for figure, value in kept.items()} | {"round": round + 1})
            shown = ", ".join(f"{figure} {points[-1][figure]:.3f}" for figure in kept)
            print(f"{name}, round {round + 1}: {shown} of natural text's", flush=True)

    try:
        adversary.run(follow)
    except FloatingPointError as error:
        print(error)
        points.append({"entropy": 0.0, "distinct_4": 0.0, "round": len(accuracies)})
    return {"points": points, "accuracies": accuracies}


def judged(config: Config, lived: dict[str, list]) -> dict[str, float]:
    """One seed's row."""
    entropy, distinct = (min(point[name] for point in lived["points"]) for name in ("entropy", "distinct_4"))
    band = [config.reward.band_low <= accuracy <= config.reward.band_high for accuracy in lived["accuracies"]]
    return {"survived": float(min(entropy, distinct) >= KEPT), "entropy_kept": entropy, "distinct_kept": distinct,
            "in_band": sum(band) / len(band), "accuracy": sum(lived["accuracies"]) / len(band)}


def row(args: argparse.Namespace, job: tuple[str, int]) -> dict[str, float]:
    """One seed's row of a variant."""
    variant, seed = job
    quick = ["reward.warmup_rounds=2"] if args.quick else []
    config = configure(args, seed, f"grpo.rounds={args.rounds}", *quick, *VARIANTS[variant])
    folder = generator(config, dataset_of(config))
    decides = (folder.name, args.every, config.evaluation.samples, *rounds_follow_from(config))
    return judged(config, remembered(config, lambda: live(config, args, folder, f"{variant}, seed {seed}"), "stability",
                                     *decides))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--ablations", type=int, default=1, help="seeds of each variant that leaves something out")
    parser.add_argument("--rounds", type=int, help="default: 500, or 6 with --quick")
    parser.add_argument("--processes", type=int, default=1, help="how many seeds run at once")


def main() -> None:
    args = parse(__doc__, options)
    args.rounds = args.rounds or (6 if args.quick else 500)
    args.every = min(50, args.rounds // 2)
    shared = configure(args, 0)
    judge(shared, dataset_of(shared))
    seeds = {variant: args.ablations for variant in VARIANTS} | {"as configured": args.seeds}
    jobs = [(variant, args.first + number) for variant in VARIANTS for number in range(seeds[variant])]
    rows: dict[str, list[dict[str, float]]] = {}
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for (variant, _), lived in zip(jobs, pool.map(partial(row, args), jobs), strict=True):
            rows.setdefault(variant, []).append(lived)
    print_table(f"{args.rounds} rounds", rows)
    table = {variant: summarise(runs) for variant, runs in rows.items()}
    print(json.dumps(table["as configured"] | {"rows": table, "rounds": args.rounds, "seeds": args.seeds,
                                               "quick": args.quick}))


if __name__ == "__main__":
    main()
