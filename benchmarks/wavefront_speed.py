"""How much faster is the wavefront than a loop over rows and positions?

Both fill the same masked batch from the same trunk states with the same noise, and must draw the same text. The loop
is the definition: while a row has [MASK]s, find those next to a known token, and put each one's state through the
sampler head, the lm head and the sampling by itself. (It is given the rows' seeds, so it never has to find them.)

1. Fully masked rows, 64 x 256 tokens: the wavefront's worst case, for each row grows from its few seeds.
2. The same with half of the tokens known, and with a prompt of 16.

--quick runs the loop on 4 of the 64 rows and scales its time up (the loop's time is proportional to its rows).
Run: python benchmarks/wavefront_speed.py [--quick] [--seeds N] [--device cuda]. The last line is one JSON object:
`speedup_vs_loop` (fully masked), `masks_left` (over all cases and repeats), `texts_equal`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # both are many small products, which threads only slow down
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.tables import spread
from grpo.config import ModelSection
from grpo.model import GPT
from grpo.noise import PROPOSE, row_seeds, uniforms
from grpo.tokenizer import Vocabulary
from grpo.wavefront import WavefrontResult, proposal_logits, sample_tokens, wavefront_fill

ROWS, COLUMNS = 64, 256


def make_model(seed: int, device: str) -> GPT:
    """The default architecture, with a sampler head that has moved off zero."""
    torch.manual_seed(seed)
    model = GPT(ModelSection(), Vocabulary(256), block_size=COLUMNS).eval()
    torch.nn.init.normal_(model.heads["sampler"].layers[-1].weight, std=0.1)
    return model.to(device)


def cases(model: GPT, seed: int, device: str) -> dict[str, Tensor]:
    """Name -> [ROWS, COLUMNS] tokens."""
    rng = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 256, (ROWS, COLUMNS), generator=rng)
    half = torch.rand(ROWS, COLUMNS, generator=rng) < 0.5
    after_prompt = (torch.arange(COLUMNS) >= 16).expand(ROWS, -1)
    everywhere = torch.ones_like(half)
    masks = {"fully masked": everywhere, "half masked": half, "prompt of 16": after_prompt}
    return {name: text.masked_fill(mask, model.vocabulary.mask_id).to(device) for name, mask in masks.items()}


@torch.no_grad()
def fill_by_loop(model: GPT, hidden: Tensor, tokens: Tensor, seeds: Tensor, first: Tensor) -> Tensor:
    """Row by row and position by position; `first` [B, T] bool marks the seeds of rows that know nothing."""
    base, filled = model.vocabulary.base_size, tokens.clone()
    for row in range(len(tokens)):
        line = tokens[row].tolist()
        starts = first[row].nonzero()[:, 0].tolist()
        while model.vocabulary.mask_id in line:
            known = [-1, *(token if token < base else -1 for token in line), -1]
            ready = [i for i, token in enumerate(line) if token >= base and max(known[i], known[i + 2]) >= 0]
            now = [i for i in ready if i - 1 not in ready] or starts
            for i in now:
                neighbors = torch.tensor([[known[i], known[i + 2]]], device=tokens.device)
                logits = proposal_logits(model, hidden[row, i : i + 1], neighbors if ready else None)
                noise = uniforms(seeds[row : row + 1], 0, PROPOSE, i)
                line[i] = int(sample_tokens(logits, noise).tokens)
        filled[row] = torch.tensor(line, device=tokens.device)
    return filled


def timed(fill: Callable[[], Tensor | WavefrontResult], device: str) -> tuple[Tensor | WavefrontResult, float]:
    """What it returns and the seconds that it takes."""
    start = time.perf_counter()
    result = fill()
    if device != "cpu":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="loop over 4 rows only and scale its time")
    parser.add_argument("--seeds", type=int, default=3, help="repeats, each with other weights, tokens and noise")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    print(__doc__.splitlines()[0])
    loop_rows = 4 if args.quick else ROWS
    speedups: dict[str, list[float]] = {}
    figures: dict[str, list[list[float]]] = {}
    masks_left, texts_equal = 0, True
    for seed in range(args.seeds):
        model = make_model(seed, args.device)
        row_noise = row_seeds(seed, 0, 0, torch.arange(ROWS, device=args.device))
        for name, tokens in cases(model, seed, args.device).items():
            with torch.no_grad():
                hidden = model.encode(tokens)
            fill = lambda h=hidden, t=tokens, m=model, s=row_noise: wavefront_fill(m, h, t, seeds=s, step=0)  # noqa: E731
            result, _ = timed(fill, args.device)  # the first call warms caches
            masked = tokens == model.vocabulary.mask_id
            first = torch.zeros_like(masked).masked_scatter(masked, result.by_lm)
            part = slice(0, loop_rows)
            loop = lambda h=hidden, t=tokens, m=model, s=row_noise, f=first, p=part: fill_by_loop(  # noqa: E731
                m, h[p], t[p], s[p], f[p])
            before = timed(fill, args.device)[1]
            looped, loop_s = timed(loop, args.device)
            wave_s = (before + timed(fill, args.device)[1]) / 2
            loop_s *= ROWS / loop_rows
            masks_left += int((result.tokens == model.vocabulary.mask_id).sum())
            texts_equal = texts_equal and torch.equal(looped, result.tokens[part])
            speedups.setdefault(name, []).append(loop_s / wave_s)
            waves = int(result.waves.max())
            figures.setdefault(name, []).append([1e3 * loop_s, 1e3 * wave_s, waves, int(masked.sum()) / waves])
    print(f"\n{ROWS} x {COLUMNS} tokens on {args.device}, {torch.get_num_threads()} threads, {args.seeds} seeds\n")
    heads = f"{'waves':>8}{'tokens/wave':>13}{'speedup':>10}{'95 % +-':>10}"
    print(f"{'case':14}{'loop ms':>12}{'wavefront ms':>14}{heads}")
    for name, values in speedups.items():
        loop_ms, wave_ms, waves, per_wave = (statistics.mean(column) for column in zip(*figures[name], strict=True))
        half_width = spread(values) or math.nan
        print(f"{name:14}{loop_ms:12.0f}{wave_ms:14.1f}{waves:8.0f}{per_wave:13.1f}"
              f"{statistics.mean(values):10.1f}{half_width:10.1f}")
    print(json.dumps({
        "speedup_vs_loop": round(statistics.mean(speedups["fully masked"]), 1),
        "masks_left": masks_left,
        "texts_equal": texts_equal,
        "speedup_half_masked": round(statistics.mean(speedups["half masked"]), 1),
        "speedup_prompt": round(statistics.mean(speedups["prompt of 16"]), 1),
    }))


if __name__ == "__main__":
    main()
