"""What makes adversarial rounds improve on the base at equal token entropy, and what does it cost?

    python benchmarks/ablation.py [section.key=value ...] [--quick] [--seeds N] [--data FILE] [--variants NAME ...]

Variants of the same rounds over one base model: as configured; without the policy gradient (anchor alone); with
advantages that see the temperature; with visible features only; without neighbours in a token's score; with a scoring
head that lags; with advantages divided by their spread; with other values of the KL weight, of
the accuracy band and of the reward head's width; with an average of the last ten rounds, or the last heads, as the
result; with adapters or with the whole trunk trained beside the heads, by replay and at a third of the learning rate.
Gains are the base's figures where it has the variant's token entropy, less the variant's own: above zero is
better. `cpu_seconds` are those of a round when it was trained. Figures are kept in the cache.

The last line is a JSON object: `rows` (variant, gains and figures, 95 % intervals over seeds) and `gain` (in the
judge's likelihood, as configured). A variant whose entropy the base never has is left out of `rows`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import (
    MEASURES,
    Curve,
    Texts,
    configure,
    dataset_of,
    generator,
    load_generator,
    parse,
    print_table,
    remembered,
    rounds_follow_from,
    summarise,
)

# isort: split
import torch

from benchmarks.adversarial import Adversary
from grpo.checkpoint import load_checkpoint
from grpo.config import Config
from grpo.model import GPT

TEMPERATURES = (0.8, 1.0, 1.2)
BELOW_THE_HEADS = ["grpo.learning_rate=3e-4"]
VARIANTS: dict[str, list[str]] = {
    "as configured": [],
    "anchor alone": [],
    "advantages see the temperature": ["grpo.neutral=false"],
    "visible features only": ["reward.masked_passes=0"],
    "no neighbours": ["reward.reach=0"],
    "a head that lags": ["reward.ema=0.9"],
    "normalized advantages": ["grpo.normalize=true"],
    "KL 0.04": ["grpo.kl=0.04"],
    "a band up to 0.80": ["reward.band_high=0.8"],
    "a reward head of width 256": ["reward.hidden=256"],
    "a shorter average": ["grpo.ema=0.9"],
    "last heads": ["grpo.ema=0", "grpo.entropy_floor=0"],
    "adapters train": ["grpo.trainable=lora", *BELOW_THE_HEADS],
    "the trunk trains": ["grpo.trainable=all", *BELOW_THE_HEADS],
}


def measured(texts: Texts, model: GPT, bias: float, temperature: float = 1.0) -> dict[str, float]:
    """Figures of a model's texts, sampled as it was trained."""
    denoise = texts.config.denoise
    tokens = texts.write(model, "random", denoise.steps, temperature=temperature, sampler=denoise.sampler,
                         mask_bias=bias)
    return texts.measure(tokens) | {"c2st": texts.told_apart(tokens)}


def play(config: Config, texts: Texts, base: Path, variant: str) -> dict[str, float]:
    """Run the rounds of one variant; figures of its result, and seconds per round."""
    model, bias = load_generator(base)
    adversary = Adversary(config, dataset_of(config), model, mask_bias=load_checkpoint(base).state["mask_bias"])
    if variant == "anchor alone":
        score = adversary.reward.score

        def silent(*arguments: object) -> object:
            scores = score(*arguments)
            return replace(scores, token_logits=torch.zeros_like(scores.token_logits))

        adversary.reward.score = silent
    ends = []
    result = adversary.run(lambda round, metrics: ends.append(time.process_time()))
    first, last = ends[config.warmup_rounds], ends[-1]
    return measured(texts, result, bias) | {"cpu_seconds": (last - first) / (config.grpo.rounds - 1)}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME",
                        help=f"of {', '.join(VARIANTS)}; default: all, or three with --quick")


def seed_rows(args: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Gains and figures of each variant, of one seed."""
    rounds = ["grpo.rounds=6", "reward.warmup_rounds=2"] if args.quick else []
    config = configure(args, seed, *rounds)
    base = generator(config, dataset_of(config))
    texts = Texts(config, dataset_of(config), config.evaluation.samples)
    model, bias = load_generator(base)
    drawn = (base.name, config.denoise, *texts.decided_by)

    def of_base(heat: float) -> dict[str, float]:
        return remembered(config, lambda: measured(texts, model, bias, heat), "ablation", *drawn, heat)

    curve, found = Curve(of_base, TEMPERATURES), {}
    for variant in args.variants:
        settings = configure(args, seed, *rounds, *VARIANTS[variant])
        decides = (variant, *drawn, *rounds_follow_from(settings))
        figures = remembered(settings, lambda s=settings, v=variant: play(s, texts, base, v), "ablation", *decides)
        met = curve.at_entropy(figures["entropy"])
        if met is None:
            print(f"seed {seed}  {variant}: the base never has its entropy of {figures['entropy']:.3f}", flush=True)
            continue
        gains = {f"{name}_gain": met[name] - figures[name] for name in MEASURES}
        found[variant] = gains | figures
        print(f"seed {seed}  {variant}: " + "  ".join(f"{k} {v:+.3f}" for k, v in gains.items()), flush=True)
    return found


def main() -> None:
    args = parse(__doc__, options)
    args.variants = args.variants or (["as configured", "anchor alone", "last heads"] if args.quick else list(VARIANTS))
    seeds = [seed_rows(args, seed) for seed in range(args.seeds)]
    results = {v: [found[v] for found in seeds] for v in args.variants if all(v in found for found in seeds)}
    if results:
        print_table("against the base at equal token entropy", results)
    rows = {name: summarise(runs) for name, runs in results.items()}
    print(json.dumps({
        "rows": [{"variant": name, **row} for name, row in rows.items()],
        "gain": rows.get("as configured", {}).get("judge_nll_gain"), "seeds": args.seeds, "quick": args.quick,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
