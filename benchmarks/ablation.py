"""What makes adversarial rounds improve on the base at equal token entropy?

    python benchmarks/ablation.py [--quick] [--seeds N] [--data FILE]

Variants of the same rounds over one base model: as configured; without the policy gradient (anchor alone); with
advantages that see the temperature; with visible features only; without neighbours in a token's score; with a scoring
head that lags; with advantages divided by their spread; with the last heads as the result. The gain of each is the
judge's NLL of the base at the variant's token entropy, read off a curve over temperatures, less the variant's own.
The last line is a JSON object: `rows` (variant, gain and its parts, 95 % intervals over seeds) and `gain`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.adversarial import Adversary, generate
from benchmarks.models import configure, dataset_of, generator, judge, load_generator, parse, print_table, summarise
from grpo.config import Config
from grpo.data import Batch, Dataset, window_places, windows
from grpo.model import GPT
from grpo.text_quality import c2st, distinct_n, judge_nll, token_entropy

TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.2)
VARIANTS: dict[str, list[str]] = {
    "as configured": [],
    "anchor alone": [],
    "advantages see the temperature": ["grpo.neutral=false"],
    "visible features only": ["reward.masked_passes=0"],
    "no neighbours": ["reward.reach=0"],
    "a head that lags": ["reward.ema=0.9"],
    "normalized advantages": ["grpo.normalize=true"],
    "last heads": ["grpo.ema=0"],
}


def measure(
    config: Config, model: GPT, judge_model: GPT, rows: Batch, places: Tensor, temperature: float = 1.0
) -> dict[str, float]:
    """Figures of completions of fixed rows, which stand at these places in the corpus."""
    start = config.grpo.prompt_tokens
    texts = generate(model, rows, config.denoise, prompt_tokens=start, seed=config.run.seed, temperature=temperature)
    return {
        "judge_nll": judge_nll(judge_model, texts, start),
        "entropy": token_entropy(texts[:, start:]),
        "distinct_4": distinct_n(texts[:, start:], 4),
        "c2st": c2st(rows.tokens[:, start:], texts[:, start:], places=places)[0],
    }


def at_entropy(curve: list[dict[str, float]], entropy: float) -> float:
    """The base's judge NLL at a token entropy, between the temperatures that were measured (linear beyond them)."""
    pairs = sorted((row["entropy"], row["judge_nll"]) for row in curve)
    index = min(max(sum(e < entropy for e, _ in pairs), 1), len(pairs) - 1)
    (e0, n0), (e1, n1) = pairs[index - 1], pairs[index]
    return n0 + (n1 - n0) * (entropy - e0) / (e1 - e0)


def train(config: Config, dataset: Dataset, base: GPT, variant: str) -> GPT:
    """Run the rounds of one variant; returns its result."""
    adversary = Adversary(config, dataset, base)
    if variant == "anchor alone":
        score = adversary.reward.score

        def silent(*arguments: object) -> object:
            scores = score(*arguments)
            return replace(scores, token_logits=torch.zeros_like(scores.token_logits))

        adversary.reward.score = silent
    return adversary.run()


def main() -> None:
    args = parse(__doc__)
    rounds = ["grpo.rounds=6", "reward.warmup_rounds=2"] if args.quick else []
    results: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for seed in range(args.seeds):
        config = configure(args, seed, *rounds)
        dataset = dataset_of(config)
        base, judge_model = load_generator(generator(config, dataset))[0], judge(config, dataset)
        which = ("validation", config.evaluation.samples, config.data.block_size, 1)
        rows = windows(dataset, *which), window_places(dataset, *which)
        curve = [measure(config, base, judge_model, *rows, t) for t in TEMPERATURES]
        for variant, overrides in VARIANTS.items():
            settings = configure(args, seed, *rounds, *overrides)
            figures = measure(settings, train(settings, dataset, base, variant), judge_model, *rows)
            gain = at_entropy(curve, figures["entropy"]) - figures["judge_nll"]
            results[variant].append({"gain": gain, **figures})
            print(f"seed {seed}  {variant}: gain {gain:+.3f} nats per token", flush=True)
    print_table("gain over the base at equal token entropy", results)
    table = [{"variant": name, **summarise(runs)} for name, runs in results.items()]
    print(json.dumps({"rows": table, "gain": table[0]["gain"]}))


if __name__ == "__main__":
    main()
