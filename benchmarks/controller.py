"""Does the mask-bias controller settle, what do its gains do, and where may the bias act?

1. Closed loop on a simulated model: P(MASK) at unmask positions is the mean of sigmoid(a + bias) over 64 positions with
   a ~ N(shift, 1.5), drawn anew each step. From bias 3.5 and from -3.5 the EMA has 3,000 steps to settle at the target;
   then the shift jumps to +1 and, 3,000 steps later, to -1.
2. The same for a table of gains.
3. Training in the loop: a small network of three-token windows learns a Markov chain with the corrective loss for
   20,000 AdamW steps while the controller runs, once with the bias acting on sampling alone and once inside the loss,
   there also without bounds.

--quick tries fewer gains, and in part 3 trains all but the default for 3,000 steps only.

Settled: from that step on, the EMA stays within 0.02 of the target. Overshoot: how far it passes the target.
Run: python benchmarks/controller.py [--quick] [--seeds N]. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tables import spread
from grpo.config import MaskBiasSection
from grpo.corruption import Corrupted, corrupt, ramp, stratified_rows
from grpo.diffusion_loss import corrective_denominator, corrective_loss
from grpo.mask_bias import MaskBias
from grpo.metrics import means, overshoot, settle_index
from grpo.tokenizer import Vocabulary

TOLERANCE = 0.02
PHASE = 3000
SHIFTS = (0.0, 1.0, -1.0)
VOCABULARY = Vocabulary(12)
UNBOUNDED = 1e6


def closed_loop(section: MaskBiasSection, seed: int) -> dict:
    """Run the simulated model through its three phases; one dictionary of figures per phase."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(seed)
    controller = MaskBias(section)
    count = torch.tensor(64.0, dtype=torch.float64)
    phases = []
    for shift in SHIFTS:
        emas = []
        for _ in range(PHASE):
            log_odds = shift + 1.5 * torch.randn(64, generator=rng, dtype=torch.float64)
            controller.update(torch.stack([(log_odds + controller.bias).sigmoid().sum(), count]))
            emas.append(controller.ema)
        emas = torch.stack(emas)
        phases.append(
            {
                "settle_steps": settle_index(emas, section.target, TOLERANCE),
                "overshoot": overshoot(emas, section.target),
                "settled_mask_prob": float(emas[-500:].mean()),
                "final_spread": float((emas[-500:] - section.target).abs().max()),
            }
        )
    return {"phases": phases, "bias": float(controller.bias)}


class Windows(nn.Module):
    """Logits of each position from the embeddings of itself and its two neighbours."""

    def __init__(self, width: int = 16, hidden: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY.size, width)
        self.hidden = nn.Linear(3 * width, hidden)
        self.head = nn.Linear(hidden, VOCABULARY.size)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        left, right = F.pad(x, (0, 0, 1, 0))[:, :-1], F.pad(x, (0, 0, 0, 1))[:, 1:]
        return self.head(F.gelu(self.hidden(torch.cat([left, x, right], -1))))


def markov_text(num_rows: int, num_tokens: int, rng: torch.Generator) -> Tensor:
    """[num_rows, num_tokens] from a fixed chain over the 12 words."""
    chain = (3 * torch.randn(12, 12, generator=torch.Generator().manual_seed(5))).softmax(-1)
    tokens = [torch.randint(0, 12, (num_rows,), generator=rng)]
    for _ in range(num_tokens - 1):
        tokens.append(torch.multinomial(chain[tokens[-1]], 1, generator=rng)[:, 0])
    return torch.stack(tokens, 1)


def train(section: MaskBiasSection, num_steps: int, weight_decay: float, seed: int) -> list[dict]:
    """Train with the controller in the loop; one row of figures at each of a few steps."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = Windows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=weight_decay, fused=True)
    controller = MaskBias(section)
    weights = {"weight_unmask": 1.0, "weight_remask": 1.0}
    batch, chunk, trace = 16, 500, []
    for step in range(num_steps):
        row = step % chunk * batch
        if row == 0:  # text and corruption of 500 steps at once
            clean = markov_text(batch * chunk, 16, rng)
            seeds, times = stratified_rows(seed, 1, step, torch.arange(len(clean)), len(clean))
            corrupted = corrupt(
                clean,
                vocabulary=VOCABULARY,
                attention_mask=torch.ones_like(clean, dtype=torch.bool),
                seeds=seeds,
                times=times,
                remask_ratio=1.0,
                guaranteed_correct=0.01,
            )
        part = Corrupted(**{name: value[row : row + batch] for name, value in vars(corrupted).items()})
        loss, metrics = corrective_loss(
            model(part.inputs),
            part,
            vocabulary=VOCABULARY,
            denominator=corrective_denominator(part, **weights),
            penalty=ramp(step, 0, 1000, 0.5),
            mask_bias=controller.bias,
            applies_to=section.applies_to,
            **weights,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.update(metrics["p_mask_unmask"])
        if step + 1 in (1000, 3000, 5000, 10_000, 20_000):
            seen = means(metrics)
            figures = {name: seen[f"p_mask_{name}"] for name in ("remask", "keep")}
            trace.append({"step": step + 1, "bias": float(controller.bias), "ema": float(controller.ema), **figures})
    return trace


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def describe(steps: list[int | None]) -> str:
    """Mean settling time over runs; "never" if one of them does not settle."""
    return "never" if None in steps else f"{mean(steps):.0f}"


def print_gain_row(section: MaskBiasSection, runs: list[dict]) -> None:
    start, up, down = ([run["phases"][i] for run in runs] for i in range(3))
    print(
        f"{section.k_i:6.3f} {section.k_p:5.1f} {section.ema:6.3f} {section.initial:8.1f} "
        f"{describe([p['settle_steps'] for p in start]):>8} {mean([p['overshoot'] for p in start]):10.3f} "
        f"{mean([p['settled_mask_prob'] for p in start]):9.3f} {max(p['final_spread'] for p in start):8.3f} "
        f"{describe([p['settle_steps'] for p in up]):>10} {describe([p['settle_steps'] for p in down]):>10}"
    )


def print_trace(title: str, trace: list[dict]) -> None:
    print(f"\n{title}\n  step     bias  EMA of p(MASK)   p(MASK) at wrong words   at right words")
    for row in trace:
        print(f"{row['step']:6d} {row['bias']:8.2f} {row['ema']:15.4f} {row['remask']:24.4f} {row['keep']:16.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer gains; shorter runs beside the 20,000 steps")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with this many seeds")
    args = parser.parse_args()

    default = MaskBiasSection()
    starts = [replace(default, initial=initial) for initial in (3.5, -3.5)]
    gains = [{"k_i": 0.003}, {"k_i": 0.03}, {"k_p": 2.0}, {"k_i": 0.03, "k_p": 4.0}]
    if not args.quick:
        gains += [{"k_i": 0.1}, {"k_p": 0.5}, {"k_p": 8.0}, {"ema": 0.9}, {"ema": 0.9, "k_i": 0.1}, {"ema": 0.999}]
    sections = starts + [replace(default, **gain) for gain in gains]
    side_steps = 3000 if args.quick else 20_000
    trainings = {
        "Bias on sampling (default), weight decay 0.1": (default, 20_000, 0.1),
        "Bias on sampling, no weight decay": (default, side_steps, 0.0),
        "Bias inside the loss, bounded": (replace(default, applies_to="loss"), side_steps, 0.1),
        "Bias inside the loss, no bound": (replace(default, applies_to="loss", bound=UNBOUNDED), side_steps, 0.1),
    }

    seeds = range(args.seeds)
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        training_runs = {
            title: [pool.submit(train, *settings, seed) for seed in seeds] for title, settings in trainings.items()
        }
        loops = [[pool.submit(closed_loop, section, seed) for seed in seeds] for section in sections]
        loop_runs = [[future.result() for future in futures] for futures in loops]
        traces = {title: [future.result() for future in futures] for title, futures in training_runs.items()}

    print("Closed loop on a simulated model; the first two rows are the defaults from both sides.")
    print("   k_i   k_p    ema  initial  settles  overshoot  p(MASK)   spread    after +1    after -1")
    for section, runs in zip(sections, loop_runs, strict=True):
        print_gain_row(section, runs)
    for title, runs in traces.items():
        print_trace(f"{title} (seed 0)", runs[0])

    phases = [run["phases"][0] for runs in loop_runs[:2] for run in runs]
    later = [phase for runs in loop_runs[:2] for run in runs for phase in run["phases"][1:]]
    settles, resettles = ([phase["settle_steps"] for phase in group] for group in (phases, later))
    last = {title: [trace[-1] for trace in runs] for title, runs in traces.items()}
    on_sampling, _, _, in_loss = last.values()
    print()
    print(
        json.dumps(
            {
                "settled_mask_prob": mean([phase["settled_mask_prob"] for phase in phases]),
                "settled_mask_prob_ci95": spread([phase["settled_mask_prob"] for phase in phases]),
                "settle_steps": None if None in settles else max(settles),
                "overshoot": max(phase["overshoot"] for phase in phases),
                "largest_deviation_when_settled": max(phase["final_spread"] for phase in phases),
                "settle_steps_after_disturbance": None if None in resettles else max(resettles),
                "sampling_final_bias": mean([row["bias"] for row in on_sampling]),
                "sampling_final_mask_prob": mean([row["ema"] for row in on_sampling]),
                "loss_final_bias": mean([row["bias"] for row in in_loss]),
                "loss_final_mask_prob": mean([row["ema"] for row in in_loss]),
                "loss_steps": in_loss[0]["step"],
                "seeds": args.seeds,
                "quick": args.quick,
            }
        )
    )


if __name__ == "__main__":
    main()
