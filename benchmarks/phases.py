"""What does each phase of a round save: cached states, published heads, the data loader?

Default shape with 4 layers of width 128, 16 prompts x 8 texts of 64 tokens, 4 denoising steps; pairs in turns.

1. Reward phase: 8 steps on cached features, against the same steps with each batch's features computed again.
2. Generator phase: 4 inner epochs on cached states, against the same by replaying the rollout through the frozen trunk.
3. Publication: `ray.put` of both heads, against `ray.put` of the whole model and the reward head.
4. Data: `Cursor.batch` (shuffled windows, a function of seed and step), against random windows of a plain memory map,
   row by row as in nanoGPT's `get_batch`; 64 rows of 64 tokens.

Run: python benchmarks/phases.py [--quick] [--seeds N]. The last line is one JSON object: `reward_phase_ratio`,
`generator_phase_ratio`, `publish_ratio`, `loader_ratio` (all: times as fast), `loader_tokens_per_s`,
`loader_share_of_copy` (its output, of the machine's copy rate), and the seconds of the phases.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from actors.discriminator import Discriminator
from actors.trunk_store import to_arrays
from benchmarks.cached_update import Round
from benchmarks.models import TINY, dataset_of
from benchmarks.speed import alternate, copy_rate, ratio, run, seconds
from grpo.config_file import load_config
from grpo.data import Cursor, completion_mask
from pipelines.launch import quiet, start_ray

SIZES = ["model.n_layer=4", "model.n_embd=128", "grpo.prompts=16", "grpo.num_iterations=4"]


def recompute(discriminator: Discriminator, texts: int) -> None:
    """Features of as many texts as the reward phase's batches hold in 8 steps."""
    newest = discriminator.buffer[-1]
    tokens, mask = newest.tokens.flatten(0, 1), newest.attention_mask.flatten(0, 1)
    completion = completion_mask(mask, discriminator.config.grpo.prompt_tokens)
    chosen = torch.arange(texts) % len(tokens)
    for _ in range(8):
        with torch.no_grad():
            discriminator.model.reward_features(tokens[chosen], completion[chosen])


def measure(args: argparse.Namespace, seed: int) -> dict[str, float]:
    import ray

    config = load_config(TINY, [f"run.seed={seed}", f"run.cache={args.cache}", *SIZES])
    turns = 3 if args.quick else 9
    round = Round(config, seed)
    discriminator, rounds = round.learner.discriminator, itertools.count()
    natural = round.world.natural.batch(0)
    discriminator.remember(0, [round.cached], [round.scores], natural, discriminator.natural_features(natural))

    def reward_phase() -> None:
        discriminator.train(next(rounds), 8)

    def reward_phase_again() -> None:
        recompute(discriminator, config.reward.batch_size)
        discriminator.train(next(rounds), 8)

    reward = alternate({"cached": reward_phase, "again": reward_phase_again}, turns)
    generator = alternate(
        {"cached": lambda: round.phase(round.cached), "replay": lambda: round.phase(round.replayed)}, turns
    )

    quiet()
    start_ray(1)
    heads = [round.learner.generator_heads, discriminator.scoring_heads]
    whole = [lambda: to_arrays(round.learner.model.state_dict()), discriminator.scoring_heads]
    publish = alternate(
        {"heads": lambda: [ray.put(make()) for make in heads], "model": lambda: [ray.put(make()) for make in whole]},
        4 * turns,
    )
    ray.shutdown()

    dataset = dataset_of(config)
    cursor, steps = Cursor(dataset, "train", 64, 64, seed), itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        flat = np.concatenate([np.asarray(part) for part in dataset.splits["train"].values]).astype(np.uint16)
        flat.tofile(Path(folder) / "train.bin")
        mapped = np.memmap(Path(folder) / "train.bin", dtype=np.uint16, mode="r")

        def plain() -> Tensor:
            starts = torch.randint(len(mapped) - 64, (64,)).tolist()
            return torch.stack([torch.from_numpy(mapped[i : i + 64].astype(np.int64)) for i in starts])

        load = alternate(
            {
                "cursor": lambda: [cursor.batch(next(steps)) for _ in range(50)],
                "memmap": lambda: [plain() for _ in range(50)],
            },
            turns,
        )
    loaded = 50 * 64 * 64 / statistics.median(load["cursor"])
    return {
        "reward_phase_ratio": ratio(reward["again"], reward["cached"]),
        "generator_phase_ratio": ratio(generator["replay"], generator["cached"]),
        "publish_ratio": ratio(publish["model"], publish["heads"]),
        "loader_ratio": ratio(load["memmap"], load["cursor"]),
        "loader_tokens_per_s": loaded,
        "loader_share_of_copy": loaded * 8 / copy_rate(),
        "reward_phase_s": statistics.median(reward["cached"]),
        "generator_phase_s": statistics.median(generator["cached"]),
        "publish_s": statistics.median(publish["heads"]),
        "rollout_s": min(seconds(lambda: round.roll_out(False)) for _ in range(turns)),
    }


if __name__ == "__main__":
    run(__doc__, measure)
