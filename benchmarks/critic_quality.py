"""Does the critic see the generator's own errors, and does re-masking what it doubts pay?

1. Held-out text, ceil(t n) of each row's n tokens masked, t uniform, filled by samples: at once, or by the wavefront.
   The critic reads the filled text; AUROC and expected calibration error (15 bins) of P(wrong) at the filled positions.
   `auroc` and `ece` are of fills at once, `auroc_wavefront` and `ece_wavefront` of the others (the critic's training
   fills). A token that differs from the truth can be as plausible, so no critic reaches 1.
2. `auroc_ceiling`: a critic with a trunk of its own, started from the generator's and trained on such fills alone.
3. `auroc_all`, `ece_all`: the same at all positions, kept ones included, as a critic that is never told which tokens
   were sampled.
4. `critic_n_vs_plain_2n`: judge NLL of plain sampling (`random`) with 2N forwards minus that of critic-guided
   re-masking with N forwards ((N + 1) // 2 steps), at natural text's token entropy; N = 8; positive: the critic wins.
   `..._steps`: the same with N steps (2N - 1 forwards) against 2N. The better of randomness 0.5 and 0.8.

Run: python benchmarks/critic_quality.py [--quick] [--seeds N] [--data FILE]. The last line is one JSON object.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import (
    Texts,
    configure,
    dataset_of,
    generator,
    load_generator,
    own_trunk_critic,
    parse,
    print_table,
    summarise,
)

# isort: split
import torch
from torch import Tensor

from grpo.corruption import mask_only, stratified_rows
from grpo.critic import fill
from grpo.data import Batch
from grpo.metrics import auroc, expected_calibration_error
from grpo.model import GPT
from grpo.remasking import forwards, steps_within
from grpo.text_quality import token_entropy
from grpo.wavefront import wavefront_fill

N = 8
FEW_AND_MANY = (steps_within("critic", N), N)
SEED = 20_000_004


@torch.no_grad()
def own_fills(model: GPT, rows: Batch, wavefront: bool) -> tuple[Tensor, Tensor]:
    """[B, T] held-out text with some tokens sampled by the model, and [B, T] bool where."""
    seeds, times = stratified_rows(SEED, 0, 0, torch.arange(len(rows.tokens)), len(rows.tokens))
    blank = mask_only(rows.tokens, vocabulary=model.vocabulary, attention_mask=rows.attention_mask, seeds=seeds,
                      times=times)
    if wavefront:
        return wavefront_fill(model, model.encode(blank.inputs), blank.inputs, seeds=seeds, step=0).tokens, blank.masked
    return fill(model, blank.inputs, None, seeds), blank.masked


def judged(scores: Tensor, wrong: Tensor) -> dict[str, float]:
    probabilities = scores.sigmoid()
    return {"auroc": float(auroc(scores, wrong)), "ece": float(expected_calibration_error(probabilities, wrong)),
            "mean P(wrong)": float(probabilities.mean()), "wrong": float(wrong.double().mean())}


@torch.no_grad()
def discrimination(model: GPT, ceiling: GPT, rows: Batch) -> dict[str, dict[str, float]]:
    """Parts 1 to 3."""
    table = {}
    for name, wavefront in (("at once", False), ("wavefront", True)):
        filled, masked = own_fills(model, rows, wavefront)
        wrong, scores = filled != rows.tokens, model.critic_scores(filled)
        table[f"critic, filled {name}"] = judged(scores[masked], wrong[masked])
        table[f"critic, all tokens, {name}"] = judged(scores.flatten(), wrong.flatten())
        log_odds = ceiling(filled, positions=masked)
        table[f"own trunk, filled {name}"] = judged(log_odds[:, 1] - log_odds[:, 0], wrong[masked])
    return table


def guided_sampling(model: GPT, texts: Texts) -> dict[str, dict[str, float]]:
    """Part 4."""
    target = token_entropy(texts.natural.tokens[:, texts.start :])

    def row(policy: str, steps: int, randomness: float) -> dict[str, float]:
        write = lambda heat: texts.write(model, policy, steps, temperature=heat, randomness=randomness)  # noqa: E731
        return {"forwards": forwards(policy, steps, randomness), **texts.at_entropy(write, target)}

    plans = [("random", N, 1.0), ("random", 2 * N, 1.0)]
    plans += [("critic", steps, randomness) for steps in FEW_AND_MANY for randomness in (0.5, 0.8)]
    return {f"{policy}, {steps} steps, r={randomness}": row(policy, steps, randomness)
            for policy, steps, randomness in plans}


def main() -> None:
    args = parse(__doc__)
    tables: list[list[dict[str, dict[str, float]]]] = [[], []]
    runs = []
    for seed in range(args.seeds):
        config = configure(args, seed)
        dataset = dataset_of(config)
        folder = generator(config, dataset)
        model, _ = load_generator(folder)
        texts = Texts(config, dataset, 96 if args.quick else 256)
        table = discrimination(model, own_trunk_critic(config, dataset, folder), texts.natural)
        guided = guided_sampling(model, texts)
        critic, wave, both = (table[f"critic, {name}"] for name in ("filled at once", "filled wavefront",
                                                                    "all tokens, at once"))
        ceiling = table["own trunk, filled at once"]["auroc"]
        plain = guided[f"random, {2 * N} steps, r=1.0"]["judge_nll"]
        few, many = (min((row["judge_nll"] for name, row in guided.items() if name.startswith(f"critic, {steps} ")
                          and not math.isnan(row["judge_nll"])), default=math.nan) for steps in FEW_AND_MANY)
        runs.append({
            "auroc": critic["auroc"], "ece": critic["ece"], "auroc_ceiling": ceiling,
            "auroc_share_of_ceiling": critic["auroc"] / ceiling, "auroc_wavefront": wave["auroc"],
            "ece_wavefront": wave["ece"], "auroc_all": both["auroc"], "ece_all": both["ece"],
            "critic_n_vs_plain_2n": plain - few, "critic_n_vs_plain_2n_steps": plain - many})
        for kept, new in zip(tables, (table, guided), strict=True):
            kept.append(new)
    for title, kept in zip(("own sampled errors", "at natural entropy"), tables, strict=True):
        print_table(title, {name: [rows[name] for rows in kept] for name in kept[0]})
    print(json.dumps(summarise(runs) | {"seeds": args.seeds, "quick": args.quick}))


if __name__ == "__main__":
    main()
