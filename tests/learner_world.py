"""One rank's learner with its actors, without Ray: what the tests of the learner share."""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from actors.generator import Generator
from actors.learner import Learner
from actors.reward import Reward
from actors.trunk_store import Blueprint, to_arrays
from grpo.config import (
    Config,
    CorruptionSection,
    DataSection,
    DenoiseSection,
    GrpoSection,
    ModelSection,
    RewardSection,
    RunSection,
    SamplerSection,
)
from grpo.data import Batch
from grpo.model import GPT
from grpo.tokenizer import Vocabulary

torch.set_num_threads(1)
T, P, N, G = 16, 4, 4, 4
VOCABULARY = Vocabulary(12)
CONFIG = Config(
    run=RunSection(threads=1),
    data=DataSection(block_size=T, layout="documents"),
    model=ModelSection(n_layer=1, n_head=2, n_embd=16),
    corruption=CorruptionSection(own_predictions=0.5),
    sampler=SamplerSection(min_neighbors_ratio=0.1),
    denoise=DenoiseSection(steps=3),
    grpo=GrpoSection(
        prompts=N, group_size=G, prompt_tokens=P, residual=8, learning_rate=3e-3, num_iterations=2, rollout_actors=2
    ),
    reward=RewardSection(hidden=16, batch_size=16, replay_rounds=2, layers=(1, -1), learning_rate=3e-3),
)
BUSY = replace(
    CONFIG,
    denoise=DenoiseSection(steps=3, remasking="critic", randomness=0.5, sampler=True),
    grpo=replace(CONFIG.grpo, policy_positions=True),
)


def grpo_with(config=CONFIG, **changes):
    return replace(config, grpo=replace(config.grpo, **changes))


def natural(round, full=False):
    """[N x G, T] rows of unequal length; the rows of a group share prompt length."""
    generator = torch.Generator().manual_seed(100 + round)
    tokens = (torch.randint(0, 4, (N * G, 1), generator=generator) + torch.arange(T)) % 12
    length = torch.full((N * G, 1), T) if full else torch.randint(P + 2, T + 1, (N * G, 1), generator=generator)
    real = torch.arange(T) < length
    return Batch(tokens.masked_fill(~real, VOCABULARY.pad_id), real)


class World:
    """One rank's learner, with its share of two pairs of actors."""

    def __init__(self, config, rank=0, world=1, device="cpu", **distribution):
        torch.manual_seed(5)
        self.config, self.world = config, world
        base = GPT(config.model, VOCABULARY, block_size=T).eval()
        for parameter in base.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.2)
        blueprint = Blueprint(model=config.model, vocabulary=VOCABULARY, block_size=T, reward=config.reward)
        self.trunk = {name: array.copy() for name, array in to_arrays(base.trunk.state_dict()).items()}
        base.untie(config.grpo.residual)
        heads = to_arrays(base.heads.state_dict())
        policy = config.denoise.remasking
        self.learner = Learner(
            blueprint, config, self.trunk, heads,
            remasking=policy, rank=rank, world=world, device=device, **distribution,
        )
        shared = dict(config=config, remasking=policy, device=device)
        self.actors = [
            (
                Generator(blueprint, self.trunk, heads, **shared),
                Reward(blueprint, self.trunk, self.learner.discriminator.scoring_heads(), threads=1, device=device),
            )
            for _ in range(2 // world)
        ]
        self.prompts = torch.arange(N).chunk(world)[rank]
        self.rows = slice(rank * N * G // world, (rank + 1) * N * G // world)

    def roll(self, round, full=False):
        learner, rows = self.learner, natural(round, full)
        share = rows[self.rows]
        prompts = share[::G]
        parts = len(self.actors)
        splits = zip(
            self.prompts.chunk(parts), prompts.tokens.chunk(parts), prompts.attention_mask.chunk(parts), strict=True
        )
        heads, scoring = learner.generator_heads(), learner.discriminator.scoring_heads()
        rollouts = [
            g.roll_out(heads, round, learner.bias, round, *split)
            for (g, _), split in zip(self.actors, splits, strict=True)
        ]
        scores = [r.score(scoring, round, rollout) for (_, r), rollout in zip(self.actors, rollouts, strict=True)]
        return rollouts, scores, share, prompts

    def round(self, round):
        rollouts, scores, share, prompts = self.roll(round)
        metrics = self.learner.discriminator.remember(
            round, rollouts, scores, share, self.learner.discriminator.natural_features(share)
        )
        metrics |= self.learner.generator_phase(round, rollouts, scores, prompts, self.prompts)
        self.learner.discriminator.steer(metrics["reward_accuracy"])
        return metrics | self.learner.discriminator.train(round)

    def state(self):
        return {name: tensor.clone() for name, tensor in self.learner.tensors().items()}


def assert_same(left, right, **tolerance):
    assert set(left) == set(right)
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], **(tolerance or dict(rtol=0, atol=0)), msg=lambda m, n=name: f"{n}: {m}"
        )


def run_rank(rank, folder, config):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def all_reduce(tensor, op="sum"):
        dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
        return tensor

    world = World(
        config,
        rank,
        2,
        all_reduce=all_reduce,
        wrap=lambda module: DistributedDataParallel(module, find_unused_parameters=True),
    )
    metrics = [world.round(round) for round in range(3)]
    torch.save(
        (world.state(), metrics, world.learner.numbers(), world.learner.discriminator.texts()), f"{folder}/{rank}"
    )
    dist.destroy_process_group()


PLAIN = dict(anchor=0.0, kl=0.0, num_iterations=1, grad_clip=1e9)


def policy_gradient(world, rollouts, scores, prompts, round=0):
    """Gradient of the first iteration of a phase, by parameter of the policy."""
    gradients = {}
    step, model = world.learner.optimizer.step, world.learner.model
    world.learner.optimizer.step = lambda: gradients.update(
        {
            name.removeprefix("heads."): None if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
    )
    world.learner.generator_phase(round, rollouts, scores, prompts, world.prompts)
    world.learner.optimizer.step = step
    return gradients
