"""Does adversarial training remove what is wrong from a language whose truth can be checked?

    python benchmarks/grammar.py [--quick] [--seeds N] [--grammar sorted|brackets] [section.key=value ...]

Sentences of a small formal grammar, made here, are the only natural text; "natural" means valid. The discriminator sees
examples, and validity is never a reward: it is only counted, before and after.

1. `sorted`: letters in alphabetical order. `brackets`: balanced brackets of four kinds. A sentence is a document of its
   own; its first character is the prompt.
2. A completion has the length of the natural sentence that it stands for, as everywhere in this project, so lengths are
   natural ones and no discriminator wins by them. (When the filling up to a block was the generator's choice, the two
   players circled about the length: findings.)
3. Invalid at few steps is what tokens filled at once do to each other. A base with twice the steps stands beside.
4. `grpo.neutral` is off: to be valid is to be less random, so a change of temperature is part of the answer here.
5. `distinct_ratio`: share of distinct sentences, final against base. `letters_js`: Jensen-Shannon distance between the
   frequencies of single characters and those of natural sentences.

The last line is a JSON object: `base_valid`, `final_valid`, `distinct_ratio`, `invalid_removed`, `rows`, with `_ci95`
over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.adversarial import Adversary
from benchmarks.models import configure, dataset_of, generator, load_generator, parse, print_table, summarise
from grpo.completion import complete
from grpo.config import Config
from grpo.data import Batch, Dataset, windows
from grpo.model import GPT
from grpo.text_quality import ngram_js

BLOCK = 12
PAIRS = ("()", "[]", "{}", "<>")
SENTENCES = 30_000


def sorted_sentence(rng: Random) -> str:
    """4 to 12 letters in alphabetical order."""
    return "".join(sorted(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, BLOCK))))


def is_sorted(sentence: str) -> bool:
    return sentence.isascii() and sentence.isalpha() and sentence == "".join(sorted(sentence))


def bracket_sentence(rng: Random) -> str:
    """2 to 6 balanced pairs; at each place opening and closing are equally likely where both may stand."""
    left, waiting, sentence = rng.randint(2, BLOCK // 2), [], ""
    while left or waiting:
        if left and (not waiting or rng.random() < 0.5):
            pair = rng.choice(PAIRS)
            sentence, left = sentence + pair[0], left - 1
            waiting.append(pair[1])
        else:
            sentence += waiting.pop()
    return sentence


def is_balanced(sentence: str) -> bool:
    waiting, closing = [], dict(PAIRS)
    for character in sentence:
        if character in closing:
            waiting.append(closing[character])
        elif not waiting or character != waiting.pop():
            return False
    return bool(sentence) and not waiting


GRAMMARS = {"sorted": (sorted_sentence, is_sorted), "brackets": (bracket_sentence, is_balanced)}


def corpus(grammar: str, folder: Path) -> Path:
    """A file of distinct sentences, an empty line between two; made once."""
    path = folder / f"grammar-{grammar}.txt"
    if not path.exists():
        rng, make = Random(0), GRAMMARS[grammar][0]
        lines = dict.fromkeys(make(rng) for _ in range(SENTENCES))
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(lines))
    return path


def sentences(dataset: Dataset, rows: Batch) -> list[str]:
    return [dataset.tokenizer.decode(row[real].tolist()) for row, real in zip(rows.tokens, rows.attention_mask,
                                                                              strict=True)]


def figures(grammar: str, texts: list[str], natural: list[str]) -> dict[str, float]:
    """Share of valid and of distinct sentences, and how far their characters are from natural ones."""
    letters, others = (torch.tensor(list("".join(each).encode()))[:, None] for each in (texts, natural))
    return {
        "valid": sum(map(GRAMMARS[grammar][1], texts)) / len(texts),
        "distinct": len(set(texts)) / len(texts),
        "letters_js": ngram_js(letters, others, 1),
    }


def settings(args: argparse.Namespace, seed: int, *overrides: str) -> Config:
    """The config of one seed: a very small generator."""
    sizes = [
        "model.n_layer=2", "model.n_embd=32", "model.n_head=2", "pretrain.steps=800", "sampler.start=200",
        "critic.start=300", "critic.end=400", f"data.block_size={BLOCK}", "data.layout=documents",
        "data.validation_fraction=0.2", "data.judge_fraction=0", "grpo.prompt_tokens=1", "evaluation.samples=1024",
        "denoise.sampler=true", "grpo.neutral=false", "grpo.anchor=0", "grpo.kl=0.03", "grpo.ema=0.9",
        "grpo.rounds=320", "reward.warmup_steps=90", "reward.batch_size=256",
    ]  # fmt: skip
    if args.quick:
        sizes += ["pretrain.steps=400", "sampler.start=60", "critic.start=100", "critic.end=120", "grpo.rounds=20",
                  "reward.warmup_rounds=3", "evaluation.samples=512"]
    source = corpus(args.grammar, Path(args.cache).expanduser())
    return configure(args, seed, f"data.source={source}", *sizes, *overrides)


def write(config: Config, model: GPT, rows: Batch, steps: int) -> Batch:
    """Sentences that begin like these and are as long."""
    ratio = config.sampler.min_neighbors_ratio
    start = config.grpo.prompt_tokens
    denoise = replace(config.denoise, steps=steps)
    tokens = complete(model, rows, denoise, prompt_tokens=start, seed=config.run.seed, min_neighbors_ratio=ratio)
    return Batch(tokens, rows.attention_mask)


def run(args: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Rows of one seed's table."""
    config = settings(args, seed)
    dataset = dataset_of(config)
    base = load_generator(generator(config, dataset))[0]
    rows, steps = windows(dataset, "validation", 2 * config.evaluation.samples, BLOCK, 1), config.denoise.steps
    natural = sentences(dataset, rows)
    half = config.evaluation.samples
    prompts = rows[:half]

    def measure(model: GPT, steps: int) -> dict[str, float]:
        return figures(args.grammar, sentences(dataset, write(config, model, prompts, steps)), natural[half:])

    table = {
        "natural": figures(args.grammar, natural[:half], natural[half:]),
        f"base, {steps} steps": measure(base, steps),
        f"base, {2 * steps} steps": measure(base, 2 * steps),
    }
    adversary = Adversary(config, dataset, base)

    def follow(round: int, metrics: dict[str, float]) -> None:
        if round >= 0 and round % 10 == 9:
            at = measure(adversary.learner.result, steps)
            shown = {"kl": metrics["kl"], "accuracy": metrics["reward_accuracy"], **at}
            print(f"seed {seed} round {round + 1}: " + "  ".join(f"{k} {v:.3f}" for k, v in shown.items()), flush=True)

    table[f"final, {steps} steps"] = measure(adversary.run(follow), steps)
    return table


def main() -> None:
    args = parse(__doc__, lambda parser: parser.add_argument("--grammar", choices=GRAMMARS, default="sorted"))
    tables = [run(args, seed) for seed in range(args.seeds)]
    rows = {name: [table[name] for table in tables] for name in tables[0]}
    print_table(f"{args.grammar}, {len(tables)} seeds", rows)
    runs = []
    for table in tables:
        _, base, _, final = table.values()
        runs.append({
            "base_valid": base["valid"], "final_valid": final["valid"],
            "invalid_removed": (final["valid"] - base["valid"]) / (1 - base["valid"]),
            "distinct_ratio": final["distinct"] / base["distinct"],
        })  # fmt: skip
    print(json.dumps(summarise(runs) | {"rows": {name: summarise(each) for name, each in rows.items()},
                                        "grammar": args.grammar, "seeds": args.seeds, "quick": args.quick}))


if __name__ == "__main__":
    main()
