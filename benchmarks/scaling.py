"""What do more rollout actors give, how long does the learner wait, and what saturates first on 8, 64 and 512 GPUs?

1. Measured, on the default model (untrained: its speed is the same) with the real actors and the real loop
   (`pipelines.rounds.train`), without Ray Train. The same prompts rolled out by one actor and by two, A B A B in one
   Ray; then rounds with `grpo.max_staleness` 0 and 1, alternating, for the learner's idle share.
2. On paper: one rank and its actors per GPU, the prompts per GPU fixed (weak scaling), a GPT-2-sized model. Bytes
   per action and per token are the measured ones, scaled by the width; seconds per token are the measured ones, scaled
   by parameters and by a GPU's speed. Bandwidths and the GPU's speed are assumptions (constants below). Load: the share
   of a round's time, or of the capacity, that a resource is busy. Above 1 it is what the round waits for.
3. The setting that relieves what saturates first, and the table with it.

--quick: fewer rounds and samples.
Run: python benchmarks/scaling.py [--quick] [--seeds N]. The last line is one JSON object: `rollout_speedup_2`,
`learner_idle` (at staleness 0), `learner_idle_stale` (at 1), `first` and `loads`.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import configure, dataset_of, parse, print_table, summarise

# isort: split
from actors.learner import Learner
from grpo.checkpoint import save_checkpoint
from grpo.config import Config
from grpo.config_file import to_dict
from grpo.data import Dataset
from grpo.model import GPT
from pipelines.grpo import Paths, start_actors
from pipelines.launch import quiet, start_ray
from pipelines.ranks import Ranks
from pipelines.rounds import Rollouts, fetch, newest_heads, publish, train

REPEATS = 5
GPUS = (8, 64, 512)
WIDTH, PARAMETERS, BLOCK, HEAD_BYTES, REWARD_BYTES = 768, 124e6, 256, 160e6, 4e6
"""The model on paper: GPT-2's shape over 50,257 tokens, whose untied lm head is what travels every round."""
GPU_SPEEDUP = 2000.0
"""One GPU against one core of this machine, at a round's matrix products: 100 against 0.05 TFLOP/s."""
PER_NODE, NODE_STORE, NODE_NETWORK, COPY, DISK, REDUCE_LATENCY_S = 8, 200e9, 25e9, 4e9, 2e9, 3e-5
"""GPUs per node; bytes of its object store; bytes/s of its network, of one process's copies into and out of the store,
and of the shared disk; seconds that each doubling of the ranks adds to a reduction."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one sample of the default model, on one core."""

    action_bytes: float
    """Of a rollout, per credited action, less its state."""
    width: int
    parameters: int
    tokens: int
    """Generated, per sample."""
    feature_bytes: float
    """Of the scores, per token and unit of width."""
    rollout_s: float
    score_s: float
    update_s: float
    """Generator and reward phase."""
    generator_steps: float
    reward_steps: float
    """Optimizer steps of a round."""


def nbytes(parts: list[Any]) -> int:
    """Of all tensors in dataclasses."""
    return sum(value.nbytes for part in parts for value in vars(part).values() if hasattr(value, "nbytes"))


def measure(config: Config, dataset: Dataset, scratch: Path, repeats: int) -> tuple[dict[str, float], Measured]:
    import ray

    base = GPT(config.model, dataset.vocabulary, block_size=config.data.block_size)
    save_checkpoint(scratch / "base", base, config=to_dict(config), tokenizer=dataset.tokenizer)
    paths = Paths(dataset=dataset.folder, base=scratch / "base", judge=Path())
    with start_actors(config, paths, scratch / "both") as job:
        both, one = Rollouts(job, Ranks()), Rollouts(replace(job, generators=job.generators[:1],
                                                             rewards=job.rewards[:1]), Ranks())
        seconds: dict[int, list[float]] = {1: [], 2: []}
        scored = []
        learner = Learner(job.blueprint, config, *fetch([job.trunk[0], job.heads[0]], "the trunk", 60.0),
                          remasking=job.remasking)
        published = publish(newest_heads(learner, 0), Ranks())
        for round in range(repeats + 1):
            for actors, source in ((1, one), (2, both)):
                started = time.perf_counter()
                flight = source.start(round, published)
                ray.wait(flight.rollouts, num_returns=len(flight.rollouts), fetch_local=False)
                rolled = time.perf_counter() - started
                ray.wait(flight.scores, num_returns=len(flight.scores), fetch_local=False)
                if round:  # the first call of an actor warms it up
                    seconds[actors].append(rolled)
                    scored += [time.perf_counter() - started - rolled] if actors == 1 else []
        rollouts, scores = ray.get(flight.rollouts), ray.get(flight.scores)
    histories: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    for turn in range(2):
        for staleness in (0, 1):
            mine = replace(config, grpo=replace(config.grpo, max_staleness=staleness))
            with start_actors(mine, paths, scratch / f"staleness-{staleness}-{turn}") as job:
                history = train(job, Ranks(), lambda figures, step: None, lambda done, total, shown: False)["history"]
                histories[staleness] += history[config.warmup_rounds + 1 :]
    medians = {name: statistics.median(row[name] for row in histories[0]) for name in histories[0][0]}
    idle = {staleness: statistics.median(row["time/learner_idle"] for row in rows)
            for staleness, rows in histories.items()}
    rates = {staleness: statistics.median(row["tokens_per_s"] for row in rows) for staleness, rows in histories.items()}
    samples, completion = len(rollouts[0].tokens) * 2, config.data.block_size - config.grpo.prompt_tokens
    actions = sum(len(rollout.actions) for rollout in rollouts)
    figures = {
        "rollout_s_1": statistics.median(seconds[1]), "rollout_s_2": statistics.median(seconds[2]),
        "rollout_speedup_2": statistics.median(seconds[1]) / statistics.median(seconds[2]),
        "learner_idle": idle[0], "learner_idle_stale": idle[1],
        "tokens_per_s": rates[0], "tokens_per_s_stale": rates[1],
        "rollout_bytes_per_sample": nbytes(rollouts) / samples, "score_bytes_per_sample": nbytes(scores) / samples,
    }
    states = sum(rollout.hidden.nbytes for rollout in rollouts)
    return figures, Measured(
        action_bytes=(nbytes(rollouts) - states) / actions, width=config.model.n_embd,
        parameters=sum(parameter.numel() for parameter in base.parameters()), tokens=completion,
        feature_bytes=nbytes(scores) / samples / config.data.block_size / config.model.n_embd,
        rollout_s=figures["rollout_s_1"] / samples, score_s=statistics.median(scored) / samples,
        update_s=(medians["seconds/generator"] + medians["seconds/reward"]) / samples,
        generator_steps=config.grpo.num_iterations, reward_steps=medians["reward_steps"])


def loads(measured: Measured, gpus: int, *, samples: int, checkpoint_every: int, replay_rounds: int, staleness: int,
          prompt: int = 32) -> dict[str, float]:
    """Busy share of each resource over a round of `samples` samples per GPU."""
    tokens, nodes = BLOCK - prompt, max(1, gpus // PER_NODE)
    slower = PARAMETERS / measured.parameters * tokens / measured.tokens / GPU_SPEEDUP
    rollout, score, update = (samples * each * slower
                              for each in (measured.rollout_s, measured.score_s, measured.update_s))
    sample_bytes = tokens * (measured.action_bytes + 4 * WIDTH) + BLOCK * measured.feature_bytes * WIDTH
    moved = samples * sample_bytes
    reduced = measured.generator_steps * HEAD_BYTES + measured.reward_steps * REWARD_BYTES
    latency_s = (measured.generator_steps + measured.reward_steps) * REDUCE_LATENCY_S * math.log2(gpus)
    reduce_s = 2 * reduced / (NODE_NETWORK / PER_NODE) + latency_s
    texts = gpus * samples * replay_rounds * BLOCK * 9  # a token's int64 and its mask
    saved = 4 * PARAMETERS + 5 * HEAD_BYTES + texts  # the model; policy, average and two moments of its heads
    checkpoint_s = saved / DISK + texts / NODE_NETWORK
    round_s = max(rollout + score, update + reduce_s) if staleness else rollout + score + update + reduce_s
    return {
        "GPU: rollouts and scores": (rollout + score) / round_s,
        "GPU: updates": update / round_s,
        "network: gradients of the heads": reduce_s / round_s,
        "network: heads to every node": nodes * HEAD_BYTES / NODE_NETWORK / round_s,
        "store: copies in and out, per process": 2 * moved / COPY / round_s,
        "store: capacity": PER_NODE * (1 + staleness) * (moved + HEAD_BYTES / PER_NODE) / NODE_STORE,
        "rank 0: checkpoint": checkpoint_s / checkpoint_every / round_s,
        "rank 0: completions for distinct-n": gpus * samples * tokens * 8 / NODE_NETWORK / round_s,
    }


def main() -> None:
    args = parse(__doc__)
    quiet()
    start_ray()
    runs, tables, relieved = [], [], []
    for seed in range(args.seeds):
        config = configure(args, seed, "run.threads=1", "grpo.rollout_actors=2", "reward.warmup_rounds=1",
                           f"grpo.rounds={4 if args.quick else 10}", "grpo.checkpoint_every=1000")
        with tempfile.TemporaryDirectory() as scratch:
            figures, measured = measure(config, dataset_of(config), Path(scratch), 3 if args.quick else REPEATS)
        runs.append(figures)
        common = {"samples": config.grpo.prompts * config.grpo.group_size, "staleness": 0}
        common["replay_rounds"] = config.reward.replay_rounds
        tables.append({gpus: loads(measured, gpus, checkpoint_every=1, **common) for gpus in GPUS})
        relieved.append({gpus: loads(measured, gpus, checkpoint_every=20, **common) for gpus in GPUS})
    print_table("measured", {"default model, 2 cores": runs})
    names = list(tables[0][8])
    for title, found in (("load on paper", tables), ("with grpo.checkpoint_every 20", relieved)):
        print_table(title, {name: [{f"{gpus} GPUs": table[gpus][name] for gpus in GPUS} for table in found]
                            for name in names})
    mean = {name: {gpus: statistics.fmean(table[gpus][name] for table in tables) for gpus in GPUS} for name in names}
    growing = [name for name in names if mean[name][512] > 1.2 * mean[name][8]]
    print(json.dumps({**summarise(runs), "first": max(growing or names, key=lambda name: mean[name][512]),
                      "loads": mean, "seeds": args.seeds, "quick": args.quick}))


if __name__ == "__main__":
    main()
