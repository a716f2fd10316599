"""What does the sampler head give to parallel sampling, and what does it cost?

Filling k tokens in one step, each blind to the others, draws from a product of marginals instead of the joint that
one-by-one sampling draws from: the factorisation gap. The wavefront conditions each token on its fresh neighbours.

1. Pairs: k adjacent [MASK]s in natural text; the joint distribution of the leftmost two, given the text around them, as
   one step draws it (a product), as the wavefront draws it, and as the trunk draws it one by one from the left. All
   three are enumerated (values of probability below 1e-6 left out), so there is no sampling noise. Jensen-Shannon
   distances to one by one, mean over contexts. The floor is one by one from the right, for a masked model's two orders
   do not agree either: `gap_recovered` = (parallel - sampler) / (parallel - floor), distances summed over k = 2, 4, 8;
   `gap_recovered_raw` has 0 for the floor. `gap_recovered_nll`: the same ratio of the pairs' mean negative
   log-likelihood in natural text, one by one from the left being the floor.
2. Texts: a prompt of 16 and 48 new tokens, `random` re-masking, k tokens per step against one by one.
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
import statistics
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
from grpo.model import GPT
from grpo.text_quality import judge_nll, ngram_js, token_entropy
from grpo.wavefront import proposal_logits

TOKENS_PER_STEP = (2, 4, 8)
RATIOS = (0.01, 0.05, 0.1, 0.2, 1.0)
GAP_START = 28

Rows = dict[str, dict[str, float]]


def js_distance(p: Tensor, q: Tensor) -> Tensor:
    """[B, V, V] joint distributions -> [B], the square root of the divergence in bits."""
    middle = ((p + q) / 2).clamp(min=1e-300)
    nats = (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).flatten(1).sum(1) / 2
    return (nats / math.log(2)).clamp(min=0).sqrt()


def joint(first: Tensor, second: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[B, V, V] joint of two tokens.

    Args:
        first: [B, V] distribution of one.
        second: rows [n], values [n] of the first -> [n, V] distribution of the other.
    """
    table = torch.zeros(*first.shape, first.shape[1], dtype=torch.float64)
    row, value = (first > 1e-6).nonzero(as_tuple=True)
    for part in torch.arange(len(row)).split(512):
        r, v = row[part], value[part]
        table[r, v] = first[r, v, None] * second(r, v)
    return table


@torch.no_grad()
def pair_joints(model: GPT, text: Tensor, k: int) -> dict[str, Tensor]:
    """Joints [B, V, V] of the leftmost two of k adjacent masks, by way of filling."""
    left, right = GAP_START, GAP_START + 1
    blank = text.clone()
    blank[:, left : left + k] = model.vocabulary.mask_id
    hidden = model.encode(blank)
    none = torch.full((len(text),), -1)

    def distribution(states: Tensor, neighbors: Tensor | None = None) -> Tensor:
        return proposal_logits(model, states, neighbors).double().softmax(-1)

    def trunk(known: int, wanted: int) -> Callable[[Tensor, Tensor], Tensor]:
        def conditional(row: Tensor, value: Tensor) -> Tensor:
            rows = blank[row]
            rows[:, known] = value
            return distribution(model.encode(rows)[:, wanted])
        return conditional

    def wavefront(row: Tensor, value: Tensor) -> Tensor:
        beyond = text[row, right + 1] if k == 2 else none[row]  # a wider gap's next token is not there yet
        return distribution(hidden[row, right], torch.stack([value, beyond], 1))

    at_left, at_right = distribution(hidden[:, left]), distribution(hidden[:, right])
    seen_left = distribution(hidden[:, left], torch.stack([text[:, left - 1], none], 1))
    return {"parallel": at_left[:, :, None] * at_right[:, None, :], "sampler": joint(seen_left, wavefront),
            "from the right": joint(at_right, trunk(right, left)).transpose(1, 2),
            "one by one": joint(at_left, trunk(left, right))}


def pair_gaps(model: GPT, text: Tensor, k: int) -> dict[str, float]:
    """Part 1: distances to one by one, and NLL of natural pairs (nats per pair), means over contexts."""
    joints = pair_joints(model, text, k)
    row = torch.arange(len(text))
    figures = {f"JS {name}": float(js_distance(table, joints["one by one"]).mean())
               for name, table in joints.items() if name != "one by one"}
    return figures | {f"NLL {name}": float(-table[row, text[:, GAP_START], text[:, GAP_START + 1]].clamp(min=1e-12)
                                           .log().mean()) for name, table in joints.items()}


def recovered(gaps: list[dict[str, float]]) -> dict[str, float]:
    """Shares of the gaps, summed over k."""
    total = {name: sum(row[name] for row in gaps) for name in gaps[0]}
    gained = total["JS parallel"] - total["JS sampler"]
    return {"gap_recovered": gained / (total["JS parallel"] - total["JS from the right"]),
            "gap_recovered_raw": gained / total["JS parallel"],
            "gap_recovered_nll": (total["NLL parallel"] - total["NLL sampler"])
            / (total["NLL parallel"] - total["NLL one by one"])}


def timed(write: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it returns and the seconds of this thread."""
    start = time.process_time()
    tokens = write()
    return tokens, time.process_time() - start


def texts_by_step(config: Config, model: GPT, texts: Texts, repeats: int) -> tuple[Rows, dict[str, float]]:
    """Parts 2, 3 and 4: rows of the table, and figures."""
    length, P = config.data.block_size - texts.start, texts.start

    def write(steps: int, sampler: bool, temperature: float = 1.0, seed: int = 7) -> Tensor:
        return texts.write(model, "random", steps, sampler=sampler, temperature=temperature, seed=seed)

    one_by_one = write(length, False)
    entropy = token_entropy(one_by_one[:, P:])
    measured = texts.measure(one_by_one)
    table = {"one by one": measured | {"matched_nll": measured["judge_nll"], "tokens_per_s": math.nan}}
    figures: dict[str, float] = {"one_by_one_nll": measured["judge_nll"]}
    seconds = {False: 0.0, True: 0.0}
    for k in TOKENS_PER_STEP:
        steps, spent = math.ceil(length / k), {False: 0.0, True: 0.0}
        for _ in range(repeats):
            for sampler in (False, True):
                tokens, elapsed = timed(lambda steps=steps, sampler=sampler: write(steps, sampler))
                spent[sampler] += elapsed
                table[f"k = {k} {'sampler' if sampler else 'parallel'}"] = texts.measure(tokens)
        for sampler, name in ((False, "parallel"), (True, "sampler")):
            matched = texts.at_entropy(lambda heat, steps=steps, on=sampler: write(steps, on, heat), entropy)
            figures[f"matched_nll_{name}_k{k}"] = matched["judge_nll"]
            table[f"k = {k} {name}"] |= {
                "matched_nll": matched["judge_nll"],
                "tokens_per_s": repeats * length * len(texts.natural.tokens) / spent[sampler]}
        figures[f"overhead_k{k}"] = spent[True] / spent[False] - 1
        seconds = {on: seconds[on] + spent[on] for on in seconds}
    figures["overhead"] = seconds[True] / seconds[False] - 1
    figures["steps_ratio"] = steps_ratio(figures)
    return table, figures


def steps_ratio(figures: dict[str, float]) -> float:
    """k of the sampler (8) over the k at which parallel sampling has its judge NLL; k = 1 is one by one; NaN where
    one of them has no figure."""
    nats = [figures["one_by_one_nll"], *(figures[f"matched_nll_parallel_k{k}"] for k in TOKENS_PER_STEP)]
    goal = figures["matched_nll_sampler_k8"]
    if math.isnan(sum(nats) + goal):
        return math.nan
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
        contexts = texts.natural.tokens[:32 if args.quick else 128]
        gaps = {f"k = {k}": pair_gaps(model, contexts, k) for k in TOKENS_PER_STEP}
        figures |= recovered(list(gaps.values()))
        seeds = bootstraps(model, texts)
        for kept, new in zip(tables, (table, gaps, seeds), strict=True):
            kept.append(new)
        runs.append(figures)
    titles = ("texts, one-by-one against k tokens per step", "first two of k masks",
              "no prompt, 4 steps, by bootstrap ratio")
    for title, kept in zip(titles, tables, strict=True):
        print_table(title, {name: [rows[name] for rows in kept] for name in kept[0]})
    best = min(RATIOS, key=lambda ratio: statistics.fmean(rows[f"ratio {ratio}"]["judge_nll"] for rows in tables[2]))
    print(json.dumps(summarise(runs) | {"best_bootstrap_ratio": best, "seeds": args.seeds, "quick": args.quick}))


if __name__ == "__main__":
    main()
