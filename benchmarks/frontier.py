"""Does adversarial training move the whole frontier, or only along it?

    python benchmarks/frontier.py [section.key=value ...] [--quick] [--seeds N] [--first N] [--data FILE]
                                  [--forwards 4 8 ...] [--temperatures 0.5 ...] [--kinds random ...] [--figure FILE]

The trained model against its own base, over temperatures and trunk forwards (NFE), the base under each way of
re-masking and by the sampler's wavefront. The wavefront is the base's best, so the rounds start from it
(`denoise.sampler=true`); `denoise.sampler=false` trains the filling in parallel.

1. Equal entropy: each of the trained model's points is compared with the base where it has the same token entropy,
   at a temperature that is sought. A temperature must not explain the gain. Where one of the base's kinds has no such
   temperature there is no comparison, and the point is named as left out.
2. Each measure is that of the base's best kind of sampling, chosen by that measure.
3. `dominates`: at every NFE and temperature that all seeds compare, the gains in C2ST accuracy and in n-gram distance
   are above zero by more than their 95 % intervals over seeds. `trained_8_vs_base_64`: the gains of the trained model
   at temperature 1 and 8 forwards over the base at 64; it names the numbers, where `--forwards` leaves these out.
4. `averages`: each seed's gains averaged over the plane, over its temperatures by NFE, and over NFE by temperature,
   then means and intervals over seeds. A C2ST varies from drawing to drawing of the texts; an average shows what single
   points leave within their noise.
5. Every model and every measurement is kept in the cache, so a run that was stopped goes on, and one with more seeds,
   temperatures or forwards adds to what is there. Runs that begin at other seeds (`--first`) may share a cache.

The last line is a JSON object: `rows` (gains by NFE and temperature), `averages`, `dominates`, `trained_8_vs_base_64`,
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
    Curve,
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
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.remasking import steps_within
from grpo.config import Config
from grpo.model import GPT

FORWARDS = (4, 8, 16, 32, 64)
TEMPERATURES = (0.5, 0.7, 0.85, 1.0, 1.2)
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

    decides = (of.folder.name, *texts.decided_by, kind, forwards, temperature)
    return remembered(config, compute, "frontier", *decides)


def gains(trained: dict, curves: list[Curve]) -> dict[str, float] | None:
    """What the base's best kind has above the trained model's figures, by measure, at equal token entropy."""
    met = [curve.at_entropy(trained["entropy"]) for curve in curves]
    if not all(met):
        return None
    best = {name: min(row[name] for row in met) for name in MEASURES}
    return {f"{name}_gain": best[name] - trained[name] for name in MEASURES} | {
        f"{name}_{who}": value[name] for name in MEASURES for who, value in (("trained", trained), ("base", best))
    }


Point = tuple[int, float]
"""NFE and temperature."""


def recipe(args: argparse.Namespace, seed: int) -> Config:
    """The config of one seed: that of `configs/wavefront.yaml`."""
    rounds = ["grpo.rounds=8", "reward.warmup_rounds=2"] if args.quick else ["grpo.rounds=180"]
    return configure(args, seed, "denoise.sampler=true", *rounds)


def seed_rows(args: argparse.Namespace, seed: int) -> tuple[dict[Point, dict | None], dict | None, list[dict]]:
    """Gains by point, gains at few forwards against many, and the plane, of one seed."""
    config = recipe(args, seed)
    dataset = dataset_of(config)
    base_folder = generator(config, dataset)
    folder = adversarial(config, dataset, base_folder)
    base, final = (Sampled(name, path, *load_generator(path)) for name, path in (("base", base_folder),
                                                                                ("trained", folder)))
    own = "sampler" if config.denoise.sampler else "random"
    texts = Texts(config, dataset, config.evaluation.samples)

    def curve(of: Sampled, kind: str, forwards: int) -> Curve:
        return Curve(lambda heat: measured(config, texts, of, kind, forwards, heat), args.temperatures)

    trained = {forwards: curve(final, own, forwards) for forwards in args.forwards}
    of_base = {forwards: {kind: curve(base, kind, forwards) for kind in args.kinds} for forwards in args.forwards}
    found = {}
    for forwards in args.forwards:
        for heat, row in trained[forwards].rows.items():
            gained = found[forwards, heat] = gains(row, list(of_base[forwards].values()))
            said = "  ".join(f"{k} {v:.4f}" for k, v in gained.items()) if gained else "no comparison"
            print(f"seed {seed} NFE {forwards} T {heat}: {said}", flush=True)
    against = gains(trained[args.few].rows[args.warm], list(of_base[args.many].values()))
    plane = [
        {"seed": seed, "model": model, "kind": kind, "forwards": forwards, "temperature": heat, **row}
        for forwards in args.forwards
        for model, curves in (("trained", {own: trained[forwards]}), ("base", of_base[forwards]))
        for kind, line in curves.items() for heat, row in line.rows.items()
    ]  # fmt: skip
    return found, against, plane


def above_zero(values: list[float]) -> bool:
    """The mean is above zero by more than its interval; never with one seed."""
    half = spread(values)
    return half is not None and sum(values) / len(values) > half


def averages(runs: dict[Point, list[dict]]) -> dict[str, list[dict]]:
    """Each seed's figures, averaged over the points of one NFE, of one temperature, and over all of them."""
    lines = {f"NFE {forwards}": [point for point in runs if point[0] == forwards] for forwards, _ in runs}
    lines |= {f"T {heat}": [point for point in runs if point[1] == heat] for _, heat in runs}
    return {
        line: [{name: statistics.fmean(run[name] for run in seed) for name in seed[0]}
               for seed in zip(*(runs[point] for point in points), strict=True)]
        for line, points in (lines | {"plane": list(runs)}).items()
    }  # fmt: skip


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
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--forwards", type=int, nargs="+", help=f"default: {FORWARDS}")
    parser.add_argument("--temperatures", type=float, nargs="+", help=f"of the plane; default: {TEMPERATURES}")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="how the base is sampled; default: all")
    parser.add_argument("--figure", help="draw the plane into this PNG file")


def main() -> None:
    args = parse(__doc__, options)
    args.forwards = args.forwards or ([8, 64] if args.quick else list(FORWARDS))
    args.temperatures = args.temperatures or ([0.85, 1.0] if args.quick else list(TEMPERATURES))
    args.kinds = args.kinds or (["random", "sampler"] if args.quick else list(KINDS))
    args.few, args.many = min(args.forwards, key=lambda n: abs(n - 8)), max(args.forwards)
    args.warm = min(args.temperatures, key=lambda heat: abs(heat - 1))
    seeds = [seed_rows(args, args.first + number) for number in range(args.seeds)]
    points = {point: [found[point] for found, _, _ in seeds] for point in seeds[0][0]}
    runs = {point: of_seeds for point, of_seeds in points.items() if all(of_seeds)}
    means = averages(runs) if runs else {}
    if runs:
        named = {f"NFE {forwards}, T {heat}": of_seeds for (forwards, heat), of_seeds in runs.items()}
        print_table("trained model against base at equal entropy", named)
        print_table("averages", means)
    against = [against for _, against, _ in seeds]
    if all(against):
        print_table(f"trained at {args.few} forwards against base at {args.many}", {"gains": against})
    rows = [
        {"nfe": forwards, "temperature": heat, **summarise(of_seeds),
         "dominates": all(above_zero([run[f"{name}_gain"] for run in of_seeds]) for name in ("c2st", "ngram_js"))}
        for (forwards, heat), of_seeds in runs.items()
    ]  # fmt: skip
    plane = [row for _, _, plane in seeds for row in plane]
    if args.figure:
        draw(plane).savefig(args.figure, dpi=110)
    compared = {"trained_nfe": args.few, "base_nfe": args.many, "temperature": args.warm}
    print(json.dumps({
        "rows": rows, "averages": {line: summarise(of_seeds) for line, of_seeds in means.items()},
        "dominates": bool(rows) and all(row["dominates"] for row in rows),
        "left_out": [point for point in points if point not in runs],
        "trained_8_vs_base_64": compared | summarise(against) if all(against) else None,
        "seeds": args.seeds, "quick": args.quick, "curve": plane,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
