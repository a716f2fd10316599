"""Does adversarial training move the whole frontier, or only along it?

    python benchmarks/frontier.py [--quick] [--seeds N] [--data FILE] [--forwards 4 8 ...] [--temperatures 0.5 ...]

The trained model against its own base, over temperatures and trunk forwards (NFE), the base under each way of
re-masking and with the sampler's wavefront.

1. Matched entropy: at each NFE the base's temperature is sought where its token entropy is the trained model's at
   temperature 1 (within 1 %); there each measure is that of the base's best kind of sampling, chosen by that measure.
   A temperature must not explain the gain.
2. `dominates`: at every NFE the gains in C2ST accuracy and in n-gram distance are above zero by more than their 95 %
   intervals over seeds. `trained_8_vs_base_64`: the gains of the trained model at 8 forwards over the base at 64.
3. Every model and every measurement is kept in the cache, so a run that was stopped goes on, and one with more seeds,
   temperatures or forwards adds to what is there.

The last line is a JSON object: `rows` (gains by NFE), `dominates`, `trained_8_vs_base_64`, `curve` (the plane).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import (
    Texts,
    adversarial,
    configure,
    dataset_of,
    generator,
    load_generator,
    parse,
    print_table,
    remembered,
    spread,
    summarise,
)

# isort: split
from torch import Tensor

from benchmarks.remasking import steps_within
from grpo.config import Config
from grpo.model import GPT

FORWARDS = (4, 8, 16, 32, 64)
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
KINDS: dict[str, dict[str, object]] = {
    "random": {"policy": "random"},
    "sampler": {"policy": "random", "sampler": True},
    "confidence": {"policy": "confidence", "randomness": 0.8},
    "critic": {"policy": "critic", "randomness": 0.8},
}
"""Ways in which the base may be sampled; randomness as in findings, where no policy gains by less."""
MEASURES = ("c2st", "ngram_js", "judge_nll")
TOLERANCE = 0.01


@dataclass(frozen=True)
class Sampled:
    """One model, as it is measured."""

    name: str
    folder: Path
    model: GPT
    bias: float

    def write(self, texts: Texts, kind: str, forwards: int, temperature: float) -> Tensor:
        settings = dict(KINDS[kind])
        policy = settings.pop("policy")
        steps = steps_within(policy, forwards)
        return texts.write(self.model, policy, steps, temperature=temperature, mask_bias=self.bias, **settings)


def measured(config: Config, texts: Texts, of: Sampled, kind: str, forwards: int, temperature: float) -> dict:
    """Figures at a temperature."""

    def compute() -> dict:
        tokens = of.write(texts, kind, forwards, temperature)
        return texts.measure(tokens) | {"c2st": texts.told_apart(tokens)}

    decides = (of.folder.name, len(texts.natural.tokens), kind, forwards, temperature)
    return remembered(config, compute, "frontier", *decides)


def matched(config: Config, texts: Texts, of: Sampled, kind: str, forwards: int, entropy: float) -> dict:
    """Figures at the temperature that gives this token entropy."""

    def compute() -> dict:
        def write(temperature: float) -> Tensor:
            return of.write(texts, kind, forwards, temperature)

        figures = texts.at_entropy(write, entropy)
        return figures | {"c2st": texts.told_apart(write(figures["temperature"]))}

    decides = (of.folder.name, len(texts.natural.tokens), kind, forwards, round(entropy, 6))
    return remembered(config, compute, "frontier", "matched", *decides)


def gains(config: Config, texts: Texts, base: Sampled, trained: dict, kinds: list[str], forwards: int) -> dict:
    """What the base's best kind has above the trained model's figures, by measure, at equal token entropy."""
    rows = {kind: matched(config, texts, base, kind, forwards, trained["entropy"]) for kind in kinds}
    near = {k: row for k, row in rows.items() if abs(row["entropy"] / trained["entropy"] - 1) <= TOLERANCE}
    if not near:
        raise ValueError(f"no temperature gives the base the trained model's token entropy ({trained['entropy']:.3f}) "
                         f"at {forwards} forwards")
    best = {name: min(near.values(), key=lambda row, name=name: row[name]) for name in MEASURES}
    return {f"{name}_gain": best[name][name] - trained[name] for name in MEASURES} | {
        f"{name}_{who}": value[name] for name in MEASURES for who, value in (("trained", trained), ("base", best[name]))
    }


def seed_rows(args: argparse.Namespace, seed: int) -> tuple[dict[str, dict], dict, list[dict]]:
    """Gains by NFE, gains at 8 against 64, and the plane, of one seed."""
    rounds = ["grpo.rounds=8", "reward.warmup_rounds=2"] if args.quick else []
    config = configure(args, seed, *rounds)
    dataset = dataset_of(config)
    base_folder = generator(config, dataset)
    folder = adversarial(config, dataset, base_folder)
    base, final = (Sampled(name, path, *load_generator(path)) for name, path in (("base", base_folder),
                                                                                ("trained", folder)))
    own = "sampler" if config.denoise.sampler else "random"
    texts = Texts(config, dataset, config.evaluation.samples)
    by_forwards, at_one = {}, {}
    for forwards in args.forwards:
        at_one[forwards] = measured(config, texts, final, own, forwards, 1.0)
        row = by_forwards[f"NFE {forwards}"] = gains(config, texts, base, at_one[forwards], args.kinds, forwards)
        print(f"seed {seed} NFE {forwards}: " + "  ".join(f"{k} {v:.4f}" for k, v in row.items()), flush=True)
    few, many = min(args.forwards, key=lambda n: abs(n - 8)), max(args.forwards)
    against = gains(config, texts, base, at_one[few], args.kinds, many)
    plane = [
        {"seed": seed, "model": of.name, "kind": kind, "forwards": forwards, "temperature": heat,
         **measured(config, texts, of, kind, forwards, heat)}
        for of, kinds in ((base, args.kinds), (final, [own]))
        for kind in kinds for forwards in args.forwards for heat in args.temperatures
    ]  # fmt: skip
    return by_forwards, against, plane


def above_zero(values: list[float]) -> bool:
    """The mean is above zero by more than its interval; never with one seed."""
    half = spread(values)
    return half is not None and sum(values) / len(values) > half


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--forwards", type=int, nargs="+", help=f"default: {FORWARDS}")
    parser.add_argument("--temperatures", type=float, nargs="*", help=f"of the plane; default: {TEMPERATURES}")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="how the base is sampled; default: all")


def main() -> None:
    args = parse(__doc__, options)
    args.forwards = args.forwards or ([8, 64] if args.quick else list(FORWARDS))
    if args.temperatures is None:
        args.temperatures = [1.0] if args.quick else list(TEMPERATURES)
    args.kinds = args.kinds or (["random", "sampler"] if args.quick else list(KINDS))
    seeds = [seed_rows(args, seed) for seed in range(args.seeds)]
    rows = {name: [by_forwards[name] for by_forwards, _, _ in seeds] for name in seeds[0][0]}
    print_table("trained model against base at equal entropy", rows)
    against = [against for _, against, _ in seeds]
    print_table("trained at 8 forwards against base at 64", {"gains": against})
    wins = {name: all(above_zero([run[f"{m}_gain"] for run in runs]) for m in ("c2st", "ngram_js"))
            for name, runs in rows.items()}
    print(json.dumps({
        "rows": [{"nfe": name, **summarise(runs), "dominates": wins[name]} for name, runs in rows.items()],
        "dominates": all(wins.values()), "trained_8_vs_base_64": summarise(against), "seeds": args.seeds,
        "quick": args.quick, "curve": [row for _, _, plane in seeds for row in plane],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
