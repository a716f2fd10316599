"""How do time and memory grow with tokens, steps, group size and vocabulary?

Each row doubles one size and holds the others; the exponent is the slope of log time (log peak bytes) against log size,
by least squares. Small sizes carry fixed costs, so an exponent below 1 is that; above 1 would be work that grows faster
than its input. Attention alone may: T x T products per head, though never a T x T table.

    pretrain/T      a pretraining step, 4 rows of T = 64 .. 1024 tokens
    denoise/T       sampling, 4 rows, 8 steps, T = 64 .. 1024
    denoise/steps   sampling, 8 rows of 64 tokens, 4 .. 64 steps
    round/group     roll out, score, generator phase, reward phase: 4 prompts x 4 .. 32 texts
    pretrain/V      a pretraining step, 4 rows of 64 tokens, 256 .. 50,048 tokens of vocabulary

Memory is the peak of what tensors hold beyond what there was before (benchmarks/peak_memory.py).

--quick takes three sizes of each row. Run: python benchmarks/growth.py [--quick] [--seeds N]. The last line is one JSON
object with the key `exponents`: `time/<row>` and `memory/<row>`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from benchmarks.adversarial import Adversary
from benchmarks.models import TINY, dataset_of
from benchmarks.peak_memory import PeakMemory
from benchmarks.pretrain_speed import our_step
from benchmarks.speed import run, seconds
from grpo.config import ModelSection
from grpo.config_file import load_config
from grpo.denoise import denoise
from grpo.model import GPT
from grpo.noise import row_seeds
from grpo.tokenizer import Vocabulary

SIZES = {
    "pretrain/T": (64, 128, 256, 512, 1024),
    "denoise/T": (64, 128, 256, 512, 1024),
    "denoise/steps": (4, 8, 16, 32, 64),
    "round/group": (4, 8, 16, 32),
    "pretrain/V": (256, 1024, 4096, 16384, 50048),
}


def work(row: str, size: int, args: argparse.Namespace, seed: int) -> Callable[[], object]:
    """What a row of the table does at a size."""
    if row.startswith("pretrain"):
        columns, vocabulary = (size, 256) if row.endswith("T") else (64, size)
        return our_step(seed, vocabulary, 4, columns=columns)[0]
    if row.startswith("denoise"):
        columns, steps, rows = (size, 8, 4) if row.endswith("T") else (64, size, 8)
        torch.manual_seed(seed)
        model = GPT(ModelSection(), Vocabulary(256), block_size=columns).eval()
        tokens, seeds = torch.full((rows, columns), model.vocabulary.mask_id), row_seeds(seed, 0, 0, torch.arange(rows))
        return lambda: denoise(model, tokens, seeds=seeds, steps=steps)
    config = load_config(TINY, [f"run.seed={seed}", f"run.cache={args.cache}", "grpo.prompts=4",
                                f"grpo.group_size={size}", f"reward.batch_size={8 * size}", "reward.min_steps=4",
                                "reward.max_steps=4"])
    dataset = dataset_of(config)
    torch.manual_seed(seed)
    base = GPT(config.model, dataset.vocabulary, block_size=config.data.block_size).eval()
    adversary, rounds = Adversary(config, dataset, base, threads=args.threads), itertools.count()
    return lambda: adversary.round(next(rounds))


def exponent(sizes: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def measure(args: argparse.Namespace, seed: int) -> dict[str, float]:
    figures = {}
    for row, sizes in SIZES.items():
        chosen = [sizes[0], sizes[len(sizes) // 2], sizes[-1]] if args.quick else list(sizes)
        times, peaks = [], []
        for size in chosen:
            call = work(row, size, args, seed)
            call()
            times.append(statistics.median(seconds(call) for _ in range(2 if args.quick else 5)))
            with PeakMemory() as memory:
                call()
            peaks.append(memory.peak_bytes)
            print(f"{row:14s} {size:6d}  {1e3 * times[-1]:9.1f} ms  {peaks[-1] / 2**20:8.1f} MiB", flush=True)
        figures |= {f"time/{row}": exponent(chosen, times), f"memory/{row}": exponent(chosen, peaks)}
    return figures


if __name__ == "__main__":
    run(__doc__, measure, under="exponents")
