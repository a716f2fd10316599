"""How much does diffusion sampling cost beyond the trunk's own forwards, and how much faster is it than a naive loop?

1. Overhead: `denoise` after a prompt of one token, against as many bare trunk forwards as the policy needs (one a step;
   a second one, on all steps but the last, where critic, lm head or a stand-alone model judge the filled text), in
   turns. 4 layers of width 128, 256 tokens, bytes; 1 to 256 rows, 8 to 64 steps; re-masking by random, confidence,
   self, critic and model with a parallel fill; and the wavefront, which fills one wave after the other.
2. Naive: the loop that a tutorial writes: logits at every position, then row by row a draw and a choice, with the same
   trunk, policy `random`.

--quick has batches of 1 and 16 rows and 8 steps. Run: python benchmarks/sampling_speed.py [--quick] [--seeds N].
The last line is one JSON object: `overhead_vs_trunk` (the worst parallel case's share beyond the bare
forwards), `overhead_mean` of these, `overhead_wavefront` (worst), `ratio_vs_naive`, `tokens_per_s` (16 rows, 8 steps,
random).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.speed import alternate, ratio, run
from grpo.config import ModelSection
from grpo.denoise import denoise
from grpo.model import GPT
from grpo.noise import row_seeds
from grpo.remasking import forwards
from grpo.tokenizer import Vocabulary

COLUMNS = 256
POLICIES = ("random", "confidence", "self", "critic", "model", "wavefront")


def make(seed: int, mode: str = "generator") -> GPT:
    torch.manual_seed(seed)
    section = ModelSection(n_layer=4, n_head=4, n_embd=128)
    return GPT(section, Vocabulary(256), mode=mode, block_size=COLUMNS).eval()


def blank(model: GPT, rows: int) -> Tensor:
    """[rows, COLUMNS], one token of text and [MASK]s."""
    tokens = torch.full((rows, COLUMNS), model.vocabulary.mask_id)
    tokens[:, 0] = 65
    return tokens


@torch.no_grad()
def naive(model: GPT, tokens: Tensor, steps: int) -> Tensor:
    """All logits, then row by row: draw every [MASK], put back those that the schedule leaves."""
    mask_id, base = model.vocabulary.mask_id, model.vocabulary.base_size
    tokens = tokens.clone()
    free = int((tokens[0] == mask_id).sum())
    for step in range(steps):
        probabilities = model(tokens)[..., :base].softmax(-1)
        keep_masked = free * (steps - 1 - step) // steps
        for row in range(len(tokens)):
            masked = (tokens[row] == mask_id).nonzero()[:, 0]
            tokens[row, masked] = torch.multinomial(probabilities[row, masked], 1)[:, 0]
            tokens[row, masked[torch.randperm(len(masked))[:keep_masked]]] = mask_id
    return tokens


@torch.no_grad()
def read(model: GPT, tokens: Tensor, num: int) -> None:
    for _ in range(num):
        model.encode(tokens)


def measure(args: argparse.Namespace, seed: int) -> dict[str, float]:
    model, judge = make(seed), make(seed + 1, "token_classifier")
    cases = [(rows, 8) for rows in (1, 16)] if args.quick else [(1, 8), (1, 64), (16, 8), (16, 64), (256, 8)]
    overheads: dict[bool, list[float]] = {False: [], True: []}
    tokens_per_s = 0.0
    for rows, steps in cases:
        tokens, seeds = blank(model, rows), row_seeds(seed, 0, 0, torch.arange(rows))
        for policy in POLICIES:
            sampler = policy == "wavefront"
            remasking = "random" if sampler else policy

            def ours(remasking: str = remasking, sampler: bool = sampler, tokens: Tensor = tokens, steps: int = steps,
                     seeds: Tensor = seeds) -> Tensor:
                return denoise(model, tokens, seeds=seeds, steps=steps, remasking=remasking, randomness=0.5,
                               sampler=sampler, remasking_model=judge if remasking == "model" else None)

            num = forwards(remasking, steps, 0.5)
            turns = max(1, min(15, 400 // (rows * num)))
            times = alternate({"denoise": ours, "forwards": lambda n=num, t=tokens: read(model, t, n)}, turns,
                              warm=int(turns > 1))
            overhead = ratio(times["denoise"], times["forwards"]) - 1
            overheads[sampler].append(overhead)
            rate = rows * COLUMNS / statistics.median(times["denoise"])
            print(f"{rows:4d} rows {steps:3d} steps {policy:11s} {rate:10.0f} tokens/s, "
                  f"{100 * overhead:6.1f} % over {num} forwards", flush=True)
            if (rows, steps, policy) == (16, 8, "random"):
                tokens_per_s = rate
    tokens, seeds = blank(model, 16), row_seeds(seed, 0, 0, torch.arange(16))
    times = alternate(
        {
            "naive": lambda: naive(model, tokens, 8),
            "ours": lambda: denoise(model, tokens, seeds=seeds, steps=8, remasking="random"),
        },
        3 if args.quick else 8,
    )
    return {
        "overhead_vs_trunk": max(overheads[False]),
        "overhead_mean": statistics.fmean(overheads[False]),
        "overhead_wavefront": max(overheads[True]),
        "ratio_vs_naive": ratio(times["naive"], times["ours"]),
        "tokens_per_s": tokens_per_s,
    }


if __name__ == "__main__":
    run(__doc__, measure)
