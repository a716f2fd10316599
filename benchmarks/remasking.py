"""Which tokens should go back to [MASK]? All policies side by side at an equal number of trunk forwards: 8.

`random` and `confidence` cost one forward a step; `self`, `critic` and `model` read the filled text with a second one,
never on the last step, so N forwards give them (N + 1) // 2 steps. (`model` is a stand-alone classifier with a trunk of
its own size.)

1. Prompts of 16 and 48 new tokens, no sampler; randomness 0 (top k), 0.5 and 0.8. Judge NLL at temperature 1, and at
   the temperature where the texts have natural text's token entropy (`matched_nll`, NaN where none up to 2 does).
2. What the mask bias does to policy `self`, at randomness 0.5: log P(MASK) saturates under a high bias, so the choice
   becomes uniform; under a low one weights are the odds, whatever the bias. At randomness 0 it does nothing.

Run: python benchmarks/remasking.py [--quick] [--seeds N] [--data FILE]. The last line is one JSON object:
`best_policy` (by matched_nll), `matched_nll_<policy>` and `self_bias_effect`, and `rows`.
"""

from __future__ import annotations

import json
import math
import statistics
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
from grpo.model import GPT
from grpo.remasking import POLICIES, steps_within
from grpo.text_quality import token_entropy

FORWARDS = 8
Rows = dict[str, dict[str, float]]


def measure(texts: Texts, model: GPT, policy: str, target: float, **settings: object) -> dict[str, float]:
    """Figures at temperature 1 and the judge NLL at the target entropy."""
    steps = steps_within(policy, FORWARDS)
    plain = texts.measure(texts.write(model, policy, steps, **settings))
    matched = texts.at_entropy(lambda heat: texts.write(model, policy, steps, temperature=heat, **settings), target)
    return {"steps": steps, **plain, "matched_nll": matched["judge_nll"]}


def policies(texts: Texts, model: GPT, classifier: GPT, bias: float, target: float) -> Rows:
    """Part 1."""
    table = {}
    for policy in reversed(POLICIES):
        settings = {"mask_bias": bias, "remasking_model": classifier if policy == "model" else None}
        for randomness in (1.0,) if policy == "random" else (0.0, 0.5, 0.8):
            table[f"{policy} r={randomness}"] = measure(texts, model, policy, target, randomness=randomness, **settings)
    return table


def finite(value: float) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def main() -> None:
    args = parse(__doc__)
    tables: list[Rows] = []
    biases: list[Rows] = []
    for seed in range(args.seeds):
        config = configure(args, seed)
        dataset = dataset_of(config)
        folder = generator(config, dataset)
        model, bias = load_generator(folder)
        texts = Texts(config, dataset, 96 if args.quick else 256)
        natural = texts.measure(texts.natural.tokens)
        target = token_entropy(texts.natural.tokens[:, texts.start :])
        table = {"natural text": {"steps": 0, **natural, "matched_nll": natural["judge_nll"]}}
        table |= policies(texts, model, own_trunk_critic(config, dataset, folder), bias, target)
        tables.append(table)
        biases.append({f"bias {value:+.1f}": measure(texts, model, "self", target, mask_bias=value, randomness=0.5)
                       for value in (-6.0, 0.0, 3.0, 6.0)}
                      | {"controller's": table["self r=0.5"]})
    print_table("re-masking", {name: [rows[name] for rows in tables] for name in tables[0]})
    print_table("self by bias", {name: [rows[name] for rows in biases] for name in biases[0]})

    def best(rows: Rows, policy: str) -> float:
        found = [row["matched_nll"] for name, row in rows.items() if name.startswith(f"{policy} ")]
        return min(value for value in [*found, math.inf] if not math.isnan(value))

    runs = [{f"matched_nll_{policy}": best(rows, policy) for policy in POLICIES} | {
        "natural_nll": rows["natural text"]["judge_nll"],
        "self_bias_effect": max(row["judge_nll"] for row in by_bias.values())
        - min(row["judge_nll"] for row in by_bias.values())} for rows, by_bias in zip(tables, biases, strict=True)]
    figures = summarise(runs)
    print(json.dumps({
        "best_policy": min(POLICIES, key=lambda policy: figures[f"matched_nll_{policy}"]),
        **{name: value and finite(value) for name, value in figures.items()},
        "forwards": FORWARDS, "seeds": args.seeds, "quick": args.quick,
        "rows": {name: {key: finite(statistics.fmean(rows[name][key] for rows in tables)) for key in tables[0][name]}
                 for name in tables[0]}}))


if __name__ == "__main__":
    main()
