"""What does a 124 M model do on this GPU: training, rollouts, and a whole adversarial round by phase?

1. Training: `Pretrainer.step` in bfloat16 (autocast), corrective objective, fused attention and fused AdamW; 12 layers,
   width 768, 50,257 tokens of vocabulary, rows of 1,024; eager, and with the trunk's blocks compiled. The share is
   that of the products the step needs (see benchmarks/pretrain_speed.py) in the card's rate of large bfloat16
   products, measured in the same run.
2. Rollouts: tokens/s of a round's rollout, 8 denoising steps.
3. Round: seconds of roll out, score, generator phase and reward phase, one process, no Ray; bfloat16 trunk, float32
   heads.
4. Trunk sharing: a second process maps the first one's trunk by CUDA IPC; the device memory that it adds, over the
   trunk's size, its CUDA context not counted (null on a CPU).

Text is random, and weights are initial: neither changes the time. On a CPU, or with --quick, a small model stands in,
to see that the script runs (on a CPU without compiling). Needs torch alone beyond what grpo/ and actors/ import,
and scipy for the intervals of several seeds.
Run: python benchmarks/gpu.py [--quick] [--seeds N] [--device cuda]. The last line is one JSON object:
`train_tokens_per_s`, `train_tokens_per_s_compiled`, `bf16_share`, `bf16_tflops`, `rollout_tokens_per_s`,
`seconds_rollout`, `seconds_score`, `seconds_generator`, `seconds_reward`, `peak_gb`, `ipc_second_actor_share`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import multiprocessing

from actors.torch_setup import set_up_torch
from actors.trunk_store import Blueprint, mount, to_arrays
from benchmarks.adversarial import Adversary
from benchmarks.pretrain_speed import needed_flops, our_step
from benchmarks.speed import matmul_rate, run, seconds
from grpo.config import Config, DataSection, DenoiseSection, GrpoSection, ModelSection, RewardSection, RunSection
from grpo.data import Batch, Dataset, Split
from grpo.model import GPT
from grpo.tokenizer import Vocabulary

GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768}
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 64}


def random_dataset(vocabulary: int, tokens: int) -> Dataset:
    """A training split of random text that lies in memory."""
    values = np.random.default_rng(0).integers(0, vocabulary, tokens)
    one = np.zeros(1, np.int64)
    split = Split(values=(values,), shard=one, start=one, length=np.array([tokens]))
    return Dataset(Path(), {"section": {"layout": "blocks"}}, SimpleNamespace(vocabulary=Vocabulary(vocabulary)),
                   {"train": split})


def training(args: argparse.Namespace, seed: int, small: bool) -> dict[str, float | None]:
    layout, vocabulary, rows, columns = (SMALL, 256, 4, 64) if small else (GPT2, 50_257, 32, 1024)
    figures: dict[str, float] = {}
    turns = 3 if small or args.quick else 10
    for name, compiles in (("train_tokens_per_s", False), ("train_tokens_per_s_compiled", True)):
        if compiles and args.device == "cpu":
            continue
        step, model = our_step(seed, vocabulary, rows, columns=columns, device=args.device, dtype="bfloat16", **layout)
        if compiles:
            for block in model.trunk.blocks:
                block.compile()
        for _ in range(3):
            seconds(step)
        figures[name] = rows * columns / statistics.median(seconds(step) for _ in range(turns))
        print(f"{name}: {figures[name]:.0f}", flush=True)
    rate = matmul_rate(args.device, torch.bfloat16, 512 if small else 8192)
    fastest = max(figures.values())
    flops = needed_flops(model, rows, columns) / (rows * columns)
    absent = {"train_tokens_per_s_compiled": None} if args.device == "cpu" else {}
    return figures | absent | {"bf16_share": fastest * flops / rate, "bf16_tflops": rate / 1e12}


def adversary(args: argparse.Namespace, seed: int, small: bool) -> Adversary:
    layout, vocabulary, columns, prompts = (SMALL, 256, 64, 4) if small else (GPT2, 50_257, 256, 16)
    config = Config(
        run=RunSection(seed=seed),
        data=DataSection(block_size=columns),
        model=ModelSection(**layout),
        denoise=DenoiseSection(steps=8, remasking="random"),
        grpo=GrpoSection(prompts=prompts, group_size=8, prompt_tokens=16, rollout_actors=1),
        reward=RewardSection(batch_size=2 * 8 * prompts, replay_rounds=1),
    )
    torch.manual_seed(seed)
    base = GPT(config.model, Vocabulary(vocabulary), block_size=columns).eval()
    base.trunk.bfloat16()
    return Adversary(config, random_dataset(vocabulary, 1 << 20), base, device=args.device)


def one_round(args: argparse.Namespace, seed: int, small: bool) -> dict[str, float]:
    world = adversary(args, seed, small)
    learner, config = world.learner, world.config
    size, prompts = config.grpo.group_size, torch.arange(config.grpo.prompts)
    laps: dict[str, list[float]] = {}
    state = SimpleNamespace()

    def lap(phase: str, call) -> None:
        laps.setdefault(phase, []).append(seconds(call))

    for round in range(3 if small or args.quick else 6):
        natural = world.natural.batch(round)
        first = natural[::size]

        def roll_out(round: int = round, first: Batch = first) -> None:
            state.rollout = world.generator.roll_out(
                world.heads, learner.version, learner.bias, round, prompts, first.tokens, first.attention_mask)

        def score(round: int = round, natural: Batch = natural) -> None:
            state.scores = world.reward.score(world.scoring, round, state.rollout)
            features = learner.discriminator.natural_features(natural)
            learner.discriminator.remember(round, [state.rollout], [state.scores], natural, features)

        def generator(round: int = round, first: Batch = first) -> None:
            learner.generator_phase(round, [state.rollout], [state.scores], first, prompts)
            world.heads = learner.generator_heads()

        lap("rollout", roll_out)
        lap("score", score)
        lap("generator", generator)
        lap("reward", lambda round=round: learner.discriminator.train(round))
    medians = {phase: statistics.median(times[1:]) for phase, times in laps.items()}
    new = config.grpo.prompts * size * (config.data.block_size - config.grpo.prompt_tokens)
    return {"rollout_tokens_per_s": new / medians["rollout"]} | {
        f"seconds_{phase}": value for phase, value in medians.items()
    }


def ipc_share(args: argparse.Namespace, seed: int, small: bool) -> float | None:
    """Device memory that a second process adds when it maps the first one's trunk, as a share of the trunk."""
    if args.device == "cpu":
        return None
    section, vocabulary = ModelSection(**(SMALL if small else GPT2), critic=False, sampler=False), Vocabulary(50_257)
    model = GPT(section, vocabulary, block_size=256)
    model.untie()
    blueprint = Blueprint(model=section, vocabulary=vocabulary, block_size=256, reward=RewardSection())
    heads = to_arrays(model.heads.state_dict())
    mounted = mount(blueprint, "generator", to_arrays(model.trunk.state_dict()), heads, device=args.device)
    trunk = dict(mounted.trunk.state_dict())
    size = sum(tensor.nbytes for tensor in trunk.values())
    context = multiprocessing.get_context("spawn")
    ready, done = context.Queue(), context.Event()
    free = torch.cuda.mem_get_info()[0]
    alone = context.Process(target=_hold, args=({}, ready, done))  # what a CUDA context costs by itself
    alone.start()
    ready.get(timeout=120)
    context_bytes = free - torch.cuda.mem_get_info()[0]
    other = context.Process(target=_hold, args=(trunk, ready, done))
    other.start()
    ready.get(timeout=120)
    added = free - torch.cuda.mem_get_info()[0] - 2 * context_bytes
    done.set()
    alone.join()
    other.join()
    return added / size


def _hold(tensors: dict[str, torch.Tensor], ready, done) -> None:
    ready.put(float(sum(tensor.float().sum() for tensor in tensors.values()) + torch.zeros(1, device="cuda")[0]))
    done.wait(timeout=300)


def measure(args: argparse.Namespace, seed: int) -> dict[str, float | None]:
    small = args.quick or args.device == "cpu"
    set_up_torch(args.device)
    figures = training(args, seed, small) | one_round(args, seed, small)
    peak = torch.cuda.max_memory_allocated() / 1e9 if args.device != "cpu" else None
    return figures | {"peak_gb": peak, "ipc_second_actor_share": ipc_share(args, seed, small)}


if __name__ == "__main__":
    run(__doc__, measure, device=True)
