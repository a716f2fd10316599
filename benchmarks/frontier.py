"""Does adversarial training move the whole frontier, or only along it?

    python benchmarks/frontier.py [--quick] [--seeds N] [--data FILE] [--forwards 4 8 ...] [--temperatures 0.5 ...]

The trained model against its own base, over temperatures and trunk forwards (NFE), the base under each way of
re-masking and by the sampler's wavefront. The wavefront is the base's best, so the rounds start from it
(`denoise.sampler=true`); `denoise.sampler=false` trains the filling in parallel.

1. Equal entropy: each of the trained model's points is compared with the base at the same token entropy, interpolated
   between the two temperatures whose entropies enclose it. A temperature must not explain the gain. Where no
   temperature does, there is no comparison.
2. Each measure is that of the base's best kind of sampling, chosen by that measure.
3. `dominates`: at every NFE and temperature that all seeds compare, the gains in C2ST accuracy and in n-gram distance
   are above zero by more than their 95 % intervals over seeds. `trained_8_vs_base_64`: the gains of the trained model
   at 8 forwards and temperature 1 over the base at 64.
4. Every model and every measurement is kept in the cache, so a run that was stopped goes on, and one with more seeds,
   temperatures or forwards adds to what is there.

The last line is a JSON object: `rows` (gains by NFE and temperature), `dominates`, `trained_8_vs_base_64`,
`curve` (the plane).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import (
    MEASURES,
    Texts,
    adversarial,
    at_equal_entropy,
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
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.remasking import steps_within
from grpo.config import Config
from grpo.model import GPT

FORWARDS = (4, 8, 16, 32, 64)
TEMPERATURES = (0.5, 0.7, 0.85, 1.0, 1.2)
HOTTER = 1.4
"""The base is sampled at this temperature too, to meet the entropy of the trained model's hottest texts."""
KINDS: dict[str, dict[str, object]] = {
    "random": {"policy": "random"},
    "sampler": {"policy": "random", "sampler": True},
    "confidence": {"policy": "confidence", "randomness": 0.8},
    "critic": {"policy": "critic", "randomness": 0.8},
}
"""Ways in which the base may be sampled; randomness as in findings, where no policy gains by less."""


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


def gains(trained: dict, curves: list[list[dict]]) -> dict[str, float] | None:
    """What the base's best kind has above the trained model's figures, by measure, at equal token entropy."""
    met = [row for row in (at_equal_entropy(curve, trained["entropy"]) for curve in curves) if row]
    if not met:
        return None
    best = {name: min(row[name] for row in met) for name in MEASURES}
    return {f"{name}_gain": best[name] - trained[name] for name in MEASURES} | {
        f"{name}_{who}": value[name] for name in MEASURES for who, value in (("trained", trained), ("base", best))
    }


Point = tuple[int, float]
"""NFE and temperature."""


def seed_rows(args: argparse.Namespace, seed: int) -> tuple[dict[Point, dict], dict | None, list[dict]]:
    """Gains by point, gains at 8 against 64, and the plane, of one seed."""
    rounds = ["grpo.rounds=8", "reward.warmup_rounds=2"] if args.quick else ["grpo.rounds=180"]
    config = configure(args, seed, "denoise.sampler=true", *rounds)
    dataset = dataset_of(config)
    base_folder = generator(config, dataset)
    folder = adversarial(config, dataset, base_folder)
    base, final = (Sampled(name, path, *load_generator(path)) for name, path in (("base", base_folder),
                                                                                ("trained", folder)))
    own = "sampler" if config.denoise.sampler else "random"
    texts = Texts(config, dataset, config.evaluation.samples)
    plane = [
        {"seed": seed, "model": of.name, "kind": kind, "forwards": forwards, "temperature": heat,
         **measured(config, texts, of, kind, forwards, heat)}
        for forwards in args.forwards
        for of, kinds, heats in ((final, [own], args.temperatures), (base, args.kinds, [*args.temperatures, HOTTER]))
        for kind in kinds for heat in heats
    ]  # fmt: skip

    def of_base(forwards: int) -> list[list[dict]]:
        rows = [row for row in plane if row["model"] == "base" and row["forwards"] == forwards]
        return [[row for row in rows if row["kind"] == kind] for kind in args.kinds]

    trained = {(row["forwards"], row["temperature"]): row for row in plane if row["model"] == "trained"}
    found = {point: gains(row, of_base(point[0])) for point, row in trained.items()}
    few, many = min(args.forwards, key=lambda n: abs(n - 8)), max(args.forwards)
    warm = min(args.temperatures, key=lambda heat: abs(heat - 1))
    for point, row in found.items():
        if row and point[1] == warm:
            print(f"seed {seed} NFE {point[0]}: " + "  ".join(f"{k} {v:.4f}" for k, v in row.items()), flush=True)
    return {point: row for point, row in found.items() if row}, gains(trained[few, warm], of_base(many)), plane


def above_zero(values: list[float]) -> bool:
    """The mean is above zero by more than its interval; never with one seed."""
    half = spread(values)
    return half is not None and sum(values) / len(values) > half


def draw(plane: list[dict]) -> Figure:
    """C2ST accuracy and n-gram distance over token entropy, a column per NFE: means over seeds with 95 % intervals."""
    columns = sorted({row["forwards"] for row in plane})
    figure = Figure(figsize=(1 + 2.6 * len(columns), 5.5), layout="constrained")
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    points: dict[tuple, list[dict]] = {}
    for row in plane:
        points.setdefault((row["model"], row["kind"], row["forwards"], row["temperature"]), []).append(row)
    for line in sorted({point[:2] for point in points}, reverse=True):
        style = {"linewidth": 2} if line[0] == "trained" else {"linewidth": 1, "linestyle": "--"}
        for column, forwards in enumerate(columns):
            rows = [runs for point, runs in sorted(points.items()) if (*line, forwards) == point[:3]]
            for axis, name in zip(axes[:, column], ("c2st", "ngram_js"), strict=True):
                x, y = ([statistics.fmean(run[of] for run in runs) for runs in rows] for of in ("entropy", name))
                half = [spread([run[name] for run in runs]) or 0.0 for runs in rows]
                axis.errorbar(x, y, half, label=", ".join(line), marker=".", capsize=2, **style)
                axis.grid(alpha=0.25)
    for column, forwards in enumerate(columns):
        axes[0, column].set_title(f"{forwards} forwards", fontsize=10)
        axes[1, column].set_xlabel("token entropy, nats")
    axes[0, 0].set_ylabel("C2ST accuracy (lower is better)")
    axes[1, 0].set_ylabel("n-gram distance (lower is better)")
    axes[0, -1].legend(fontsize=8, frameon=False)
    return figure


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--forwards", type=int, nargs="+", help=f"default: {FORWARDS}")
    parser.add_argument("--temperatures", type=float, nargs="+", help=f"of the plane; default: {TEMPERATURES}")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="how the base is sampled; default: all")
    parser.add_argument("--figure", help="draw the plane into this PNG file")


def main() -> None:
    args = parse(__doc__, options)
    args.forwards = args.forwards or ([8, 64] if args.quick else list(FORWARDS))
    args.temperatures = args.temperatures or ([0.85, 1.0] if args.quick else list(TEMPERATURES))
    args.kinds = args.kinds or (["random", "sampler"] if args.quick else list(KINDS))
    seeds = [seed_rows(args, seed) for seed in range(args.seeds)]
    shared = [point for point in seeds[0][0] if all(point in found for found, _, _ in seeds)]
    runs = {point: [found[point] for found, _, _ in seeds] for point in shared}
    print_table("trained model against base at equal entropy", {f"NFE {n}, T {heat}": r for (n, heat), r in
                                                                runs.items()})
    against = [against for _, against, _ in seeds if against]
    if against:
        print_table("trained at 8 forwards against base at 64", {"gains": against})
    rows = [
        {"nfe": forwards, "temperature": heat, **summarise(of_seeds),
         "dominates": all(above_zero([run[f"{name}_gain"] for run in of_seeds]) for name in ("c2st", "ngram_js"))}
        for (forwards, heat), of_seeds in runs.items()
    ]  # fmt: skip
    plane = [row for _, _, plane in seeds for row in plane]
    if args.figure:
        draw(plane).savefig(args.figure, dpi=110)
    print(json.dumps({
        "rows": rows, "dominates": bool(rows) and all(row["dominates"] for row in rows),
        "trained_8_vs_base_64": summarise(against) if against else None, "seeds": args.seeds, "quick": args.quick,
        "curve": plane,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
