"""What does the sampler head give to parallel sampling, and what does it cost?

Filling k tokens in one step, each blind to the others, draws from a product of marginals instead of the joint that
one-by-one sampling draws from: the factorisation gap. The wavefront conditions each token on its fresh neighbours.

1. Texts: a prompt of 16 and 48 new tokens, `random` re-masking, k tokens per step. Jensen-Shannon distance between the
   frequencies of adjacent pairs and those of one-by-one text. Two one-by-one sets that differ in noise give the floor
   of so many samples. `gap_recovered` = (parallel - sampler) / (parallel - floor), gaps summed over k = 2, 4, 8.
   `gap_recovered_natural`: the same with distances to natural text, one-by-one text being the floor; the sampler
   learns from clean text, not from one-by-one text.
2. A gap of k adjacent masks in natural text, filled in one step: KL(sampled || one by one from the left) in nats, per
   context, exact but for the sampling of texts: both likelihoods are known. The floor is one by one from the right,
   for the model's two orders do not agree either; `gap_recovered_kl` is (parallel - sampler) / (parallel - floor).
3. `overhead`: extra time per text with the sampler at the same number of trunk forwards, timed alternately, on one
   thread's own clock (wall clock of a quiet machine).
4. Judge NLL at the token entropy of one-by-one text; `steps_ratio`: how many times more steps parallel sampling needs
   for the NLL that the sampler has at k = 8 (log-linear between measured steps, at most 8).
5. Texts without a prompt, 4 steps, by bootstrap ratio (the share of a row that the lm head seeds).

Run: python benchmarks/sampler_gap.py [--quick] [--seeds N] [--data FILE]. The last line is one JSON object.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import Texts, configure, dataset_of, generator, load_generator, parse, print_table, summarise

# isort: split
import torch
from torch import Tensor

from grpo.config import Config
from grpo.model import GPT, text_logits
from grpo.noise import row_seeds, uniforms
from grpo.text_quality import judge_nll, ngram_js, token_entropy
from grpo.wavefront import PROPOSE, propose, wavefront_fill

TOKENS_PER_STEP = (2, 4, 8)
RATIOS = (0.01, 0.05, 0.1, 0.2, 1.0)
GAP_START = 28

Rows = dict[str, dict[str, float]]


@torch.no_grad()
def chain(model: GPT, tokens: Tensor, positions: list[int], seeds: Tensor, given: Tensor | None) -> tuple[Tensor, ...]:
    """One trunk forward per position, in this order.

    Args:
        tokens: [B, T] with [MASK] at the positions.
        given: [B, T], whose tokens are scored; None: tokens are drawn.

    Returns:
        [B, T] filled, [B] log-probability, nats.
    """
    tokens, total = tokens.clone(), 0.0
    for position in positions:
        hidden = model.encode(tokens)[:, position]
        if given is None:
            noise = uniforms(seeds, 0, PROPOSE, position)
            tokens[:, position] = propose(model, hidden, noise, temperature=1.0, top_p=1.0, record=False).tokens
        else:
            tokens[:, position] = given[:, position]
        logprobs = text_logits(model.heads["lm"](hidden), model.vocabulary).log_softmax(-1)
        total = total + logprobs.gather(1, tokens[:, position : position + 1])[:, 0].double()
    return tokens, total


@torch.no_grad()
def gap_divergences(model: GPT, text: Tensor, k: int, seed: int) -> dict[str, float]:
    """KL to one-by-one sampling of k adjacent tokens, nats per gap, by way of sampling."""
    positions = list(range(GAP_START, GAP_START + k))
    blank = text.clone()
    blank[:, positions] = model.vocabulary.mask_id
    seeds = row_seeds(seed, 1, k, torch.arange(len(text)))
    hidden = model.encode(blank)
    noise = uniforms(seeds[:, None], 0, PROPOSE, torch.tensor(positions)).flatten()
    drawn = propose(model, hidden[:, positions].flatten(0, 1), noise, temperature=1.0, top_p=1.0, record=False)
    parallel = blank.clone()
    parallel[:, positions] = drawn.tokens.view(-1, k)
    front = wavefront_fill(model, hidden, blank, seeds=seeds, step=0)
    filled = {
        "parallel": (parallel, drawn.logprobs.view(-1, k).double().sum(1)),
        "sampler": (front.tokens, front.sampled.logprobs.view(-1, k).double().sum(1)),
        "floor": chain(model, blank, positions[::-1], seeds, None),
    }
    return {name: float((own - chain(model, blank, positions, seeds, tokens)[1]).mean())
            for name, (tokens, own) in filled.items()}


def timed(write: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it returns and the seconds of this thread."""
    start = time.process_time()
    tokens = write()
    return tokens, time.process_time() - start


def texts_by_step(config: Config, model: GPT, texts: Texts, repeats: int) -> tuple[Rows, dict[str, float]]:
    """Part 1, 3 and 4: rows of the table, and figures."""
    length, P = config.data.block_size - texts.start, texts.start

    def write(steps: int, sampler: bool, temperature: float = 1.0, seed: int = 7) -> Tensor:
        return texts.write(model, "random", steps, sampler=sampler, temperature=temperature, seed=seed)

    one_by_one = write(length, False)
    def natural_js(tokens: Tensor) -> float:
        return ngram_js(tokens[:, P:], texts.reference, 2)

    floor = ngram_js(write(length, False, seed=8)[:, P:], one_by_one[:, P:], 2)
    entropy = token_entropy(one_by_one[:, P:])
    table = {"one by one": texts.measure(one_by_one) | {"matched_nll": judge_nll(texts.judge, one_by_one, P),
                                                        "pair_js": floor, "natural_js": natural_js(one_by_one),
                                                        "tokens_per_s": math.nan}}
    figures: dict[str, float] = {"pair_js_floor": floor}
    gap, recovered, seconds = 0.0, 0.0, {False: 0.0, True: 0.0}
    best = table["one by one"]["natural_js"]
    natural_gap, natural_recovered = 0.0, 0.0
    for k in TOKENS_PER_STEP:
        steps, spent, distance, natural = math.ceil(length / k), {False: 0.0, True: 0.0}, {}, {}
        for _ in range(repeats):
            for sampler in (False, True):
                tokens, elapsed = timed(lambda steps=steps, sampler=sampler: write(steps, sampler))
                spent[sampler] += elapsed
                distance[sampler] = ngram_js(tokens[:, P:], one_by_one[:, P:], 2)
                natural[sampler] = natural_js(tokens)
                table[f"k = {k} {'sampler' if sampler else 'parallel'}"] = texts.measure(tokens)
        for sampler, name in ((False, "parallel"), (True, "sampler")):
            matched = texts.at_entropy(lambda heat, steps=steps, on=sampler: write(steps, on, heat), entropy)
            figures[f"matched_nll_{name}_k{k}"] = matched["judge_nll"]
            table[f"k = {k} {name}"] |= {
                "matched_nll": matched["judge_nll"], "pair_js": distance[sampler],
                "natural_js": natural[sampler],
                "tokens_per_s": repeats * length * len(texts.natural.tokens) / spent[sampler]}
        figures[f"overhead_k{k}"] = spent[True] / spent[False] - 1
        figures[f"gap_recovered_k{k}"] = (distance[False] - distance[True]) / (distance[False] - floor)
        gap += distance[False] - floor
        recovered += distance[False] - distance[True]
        natural_gap += natural[False] - best
        natural_recovered += natural[False] - natural[True]
        seconds = {on: seconds[on] + spent[on] for on in seconds}
    figures |= {"gap_recovered": recovered / gap, "gap_recovered_natural": natural_recovered / natural_gap,
                "overhead": seconds[True] / seconds[False] - 1,
                "one_by_one_nll": table["one by one"]["judge_nll"]}
    figures["steps_ratio"] = steps_ratio(figures)
    return table, figures


def steps_ratio(figures: dict[str, float]) -> float:
    """k of the sampler (8) over the k at which parallel sampling has its judge NLL; k = 1 is one by one."""
    nats = [figures["one_by_one_nll"], *(figures[f"matched_nll_parallel_k{k}"] for k in TOKENS_PER_STEP)]
    goal = figures["matched_nll_sampler_k8"]
    if goal >= nats[-1]:
        return 1.0
    octave = next(i for i, value in enumerate(nats) if value > goal)
    if octave == 0:
        return 8.0
    return 2 ** (3 - (octave - 1 + (goal - nats[octave - 1]) / (nats[octave] - nats[octave - 1])))


def bootstraps(model: GPT, texts: Texts) -> Rows:
    """Part 5: texts without a prompt."""
    table = {}
    for ratio in RATIOS:
        tokens, seconds = timed(lambda ratio=ratio: texts.write(
            model, "random", 4, sampler=True, prompt_tokens=0, min_neighbors_ratio=ratio))
        table[f"ratio {ratio}"] = {"judge_nll": judge_nll(texts.judge, tokens, 1), "entropy": token_entropy(tokens),
                                   "trigram_js": ngram_js(tokens, texts.reference, 3), "seconds": seconds}
    return table


def main() -> None:
    args = parse(__doc__)
    tables: list[list[Rows]] = [[], [], []]
    runs = []
    for seed in range(args.seeds):
        config = configure(args, seed)
        dataset = dataset_of(config)
        model, _ = load_generator(generator(config, dataset))
        texts = Texts(config, dataset, 96 if args.quick else 192)
        table, figures = texts_by_step(config, model, texts, repeats=1 if args.quick else 2)
        kl = {f"k = {k}": gap_divergences(model, texts.natural.tokens, k, seed) for k in TOKENS_PER_STEP}
        parallel, sampler, floor = (sum(row[name] for row in kl.values()) for name in ("parallel", "sampler", "floor"))
        figures["gap_recovered_kl"] = (parallel - sampler) / (parallel - floor)
        seeds = bootstraps(model, texts)
        figures["best_bootstrap_ratio"] = min(RATIOS, key=lambda ratio: seeds[f"ratio {ratio}"]["trigram_js"])
        for kept, new in zip(tables, (table, kl, seeds), strict=True):
            kept.append(new)
        runs.append(figures)
    titles = ("texts, one-by-one against k tokens per step", "gap of k masks: KL to one by one, nats",
              "no prompt, 4 steps, by bootstrap ratio")
    for title, kept in zip(titles, tables, strict=True):
        print_table(title, {name: [rows[name] for rows in kept] for name in kept[0]})
    print(json.dumps(summarise(runs) | {"seeds": args.seeds, "quick": args.quick}))


if __name__ == "__main__":
    main()
