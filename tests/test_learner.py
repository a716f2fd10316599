import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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
    SamplerSection,
)
from grpo.data import Batch
from grpo.lora import Trainable
from grpo.model import GPT
from grpo.replay import draw_steps
from grpo.reward_loss import log_odds
from grpo.tokenizer import Vocabulary

torch.set_num_threads(1)
T, P, N, G = 16, 4, 4, 4
VOCABULARY = Vocabulary(12)
CONFIG = Config(
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

    def __init__(self, config, rank=0, world=1, **distribution):
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
            blueprint, config, self.trunk, heads, remasking=policy, rank=rank, world=world, **distribution
        )
        shared = dict(
            settings=config.denoise,
            remasking=policy,
            prompt_tokens=P,
            group_size=G,
            min_neighbors_ratio=0.1,
            policy_tokens="kept" if policy == "random" else "all",
            positions=config.grpo.policy_positions,
            seed=0,
            lm_residual=config.grpo.residual,
            threads=1,
            trainable=Trainable.of(config.grpo),
        )
        self.actors = [
            (
                Generator(blueprint, self.trunk, heads, **shared),
                Reward(blueprint, self.trunk, self.learner.discriminator.scoring_heads(), threads=1),
            )
            for _ in range(2 // world)
        ]
        self.prompts = torch.arange(N).chunk(world)[rank]
        self.rows = slice(rank * N * G // world, (rank + 1) * N * G // world)

    def roll(self, round, full=False):
        learner, rows = self.learner, natural(round, full)
        share = Batch(rows.tokens[self.rows], rows.attention_mask[self.rows])
        prompts = Batch(share.tokens[::G], share.attention_mask[::G])
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


# ---- ranks and resumes -----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("config", [CONFIG, BUSY], ids=["random", "critic, wavefront, positions"])
def test_two_ranks_train_as_one(tmp_path, config):
    alone = World(config)
    metrics = [alone.round(round) for round in range(3)]
    mp.spawn(run_rank, (str(tmp_path), config), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    assert_same(ranks[0][0], ranks[1][0])
    assert_same(ranks[0][0], alone.state(), rtol=1e-5, atol=1e-5)
    for mine, first, second in zip(metrics, ranks[0][1], ranks[1][1], strict=True):
        assert first == second
        assert first == pytest.approx(mine, rel=1e-5, abs=1e-6)
    assert ranks[0][2]["mask_bias"] == pytest.approx(alone.learner.mask_bias.state_dict(), rel=1e-6)
    texts = {name: torch.cat([part[3][name] for part in ranks], 1) for name in ranks[0][3]}
    assert_same(texts, alone.learner.discriminator.texts())  # rank by rank is the order of the global index


def test_one_rollout_actor_or_two_make_no_difference():
    """The actors are micro-batches of one update: gradients and credits must not depend on the split."""
    one, two = World(CONFIG), World(CONFIG)
    one.actors = one.actors[:1]
    for round in range(2):
        assert one.round(round) == pytest.approx(two.round(round), rel=1e-5, abs=1e-6)
    assert_same(one.state(), two.state(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config", [grpo_with(rollout_actors=1), grpo_with(BUSY, rollout_actors=1)], ids=["random", "critic"]
)
def test_a_resumed_learner_continues_bit_for_bit(config):
    steady, stopped = World(config), World(config)
    for world in (steady, stopped):
        world.actors = world.actors[:1]
        for round in range(4):
            world.round(round)
    saved = copy.deepcopy((stopped.state(), stopped.learner.discriminator.texts(), stopped.learner.numbers()))
    fresh = World(config)
    fresh.actors = fresh.actors[:1]
    fresh.learner.load(*saved)
    assert len(fresh.learner.discriminator.buffer) == config.reward.replay_rounds + 1
    for mine, other in zip(fresh.learner.discriminator.buffer, steady.learner.discriminator.buffer, strict=True):
        assert mine.round == other.round and torch.equal(mine.features, other.features)
        assert torch.equal(mine.mask, other.mask)
    for round in (4, 5):
        assert fresh.round(round) == steady.round(round)
    assert_same(fresh.state(), steady.state())
    assert fresh.learner.numbers() == steady.learner.numbers()


# ---- the frozen trunk ------------------------------------------------------------------------------------------------


def test_no_phase_moves_a_bit_of_any_trunk():
    world = World(BUSY)
    learner = world.learner
    models = {
        "published": None,
        "policy": learner.model,
        "reference": learner.reference,
        **{f"generator {i}": g.model for i, (g, _) in enumerate(world.actors)},
        **{f"reward {i}": r.model for i, (_, r) in enumerate(world.actors)},
    }
    read = lambda model: world.trunk if model is None else to_arrays(model.trunk.state_dict())  # noqa: E731
    before = {name: {k: a.copy() for k, a in read(model).items()} for name, model in models.items()}
    reference_heads = {k: v.clone() for k, v in learner.reference.heads.state_dict().items()}
    rollouts, scores, share, prompts = world.roll(0)
    phases = [
        lambda: learner.discriminator.remember(
            0, rollouts, scores, share, learner.discriminator.natural_features(share)
        ),
        lambda: learner.generator_phase(0, rollouts, scores, prompts, world.prompts),
        lambda: learner.discriminator.train(0),
        lambda: world.round(1),
    ]
    for phase in phases:
        phase()
        for name, model in models.items():
            for key, array in read(model).items():
                assert np.array_equal(array.view(np.int32), before[name][key].view(np.int32)), (name, key)
    for name in ("lm.matrix", "critic.layers.0.weight", "sampler.layers.0.weight"):  # while every head did move
        assert not torch.equal(learner.model.heads.state_dict()[name], reference_heads[name]), name
    assert_same(reference_heads, dict(learner.reference.heads.state_dict()))
    assert not learner.model.heads["lm"].tied
    trained = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in learner.model.trunk.parameters()}
    address = world.trunk["wte.weight"].__array_interface__["data"][0]
    assert all(m.trunk.wte.weight.data_ptr() == address for m in models.values() if m is not None)  # one copy


def test_a_generator_step_does_not_move_the_reward_of_unchanged_text():
    world = World(CONFIG)
    rollouts, scores, share, prompts = world.roll(0)
    world.learner.discriminator.remember(
        0, rollouts, scores, share, world.learner.discriminator.natural_features(share)
    )
    scoring = world.learner.discriminator.scoring_heads()
    reward = world.actors[0][1]
    before = reward.score(scoring, 1, rollouts[0])
    for _ in range(2):
        world.learner.generator_phase(0, rollouts, scores, prompts, world.prompts)
    after = reward.score(world.learner.discriminator.scoring_heads(), 2, rollouts[0])
    for field in ("logits", "token_logits", "features"):
        assert torch.equal(getattr(before, field), getattr(after, field))


# ---- the generator phase ---------------------------------------------------------------------------------------------


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


PLAIN = dict(anchor=0.0, kl=0.0, num_iterations=1, grad_clip=1e9)


@pytest.mark.parametrize("neutral", [False, True])
def test_groups_of_equal_reward_give_exactly_no_policy_gradient(neutral):
    world = World(grpo_with(**PLAIN, neutral=neutral))
    rollouts, scores, _, prompts = world.roll(0, full=True)
    flat = [replace(s, token_logits=torch.full_like(s.token_logits, 0.1)) for s in scores]
    assert all(g is None or (g == 0).all() for g in policy_gradient(world, rollouts, flat, prompts).values())
    # one flat group among others contributes nothing: its actions could be anything
    some = [replace(scores[0], token_logits=scores[0].token_logits.clone()), scores[1]]
    some[0].token_logits[:G] = 0.1
    other = replace(rollouts[0], actions=torch.where(rollouts[0].rows < G, 3, rollouts[0].actions))
    left, right = (policy_gradient(world, [r, rollouts[1]], some, prompts) for r in (rollouts[0], other))
    assert left["lm.matrix"].abs().max() > 0
    for name in left:
        assert left[name] is None or torch.equal(left[name], right[name])


def test_the_phases_gradient_is_the_policy_gradient_of_a_slow_loop():
    config = grpo_with(**PLAIN, neutral=False, credit="sequence", normalize=False)
    world = World(config)
    rollouts, scores, _, prompts = world.roll(0)
    found = policy_gradient(world, rollouts, scores, prompts)
    model, total = copy.deepcopy(world.learner.model), 0.0
    for rollout, score in zip(rollouts, scores, strict=True):
        odds = log_odds(score.logits)
        for b in range(len(rollout.tokens)):
            group = range(b // G * G, b // G * G + G)
            advantage = odds[b] - sum(odds[g] for g in group) / G
            mine = rollout.rows == b
            logprobs = model.heads["lm"](rollout.hidden[mine])[:, :12].log_softmax(-1)
            total = total - advantage * logprobs.gather(1, rollout.actions[mine][:, None]).mean() / (N * G)
    for name, p in model.heads.named_parameters():
        expected = torch.autograd.grad(total, p, allow_unused=True, retain_graph=True)[0]
        if expected is not None:
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7, msg=name)


def test_a_neutral_update_leaves_the_temperature_alone_to_first_order():
    """The derivative of the policy loss along a scaling of the logits is zero, and is not without `neutral`."""
    slopes = {}
    for neutral in (False, True):
        world = World(grpo_with(**PLAIN, neutral=neutral))
        rollouts, scores, _, prompts = world.roll(0)
        g = policy_gradient(world, rollouts, scores, prompts)["lm.matrix"]
        slopes[neutral] = (g * world.learner.model.heads["lm"].matrix.detach()).sum().abs().item()  # d / d log scale
    assert slopes[True] < 1e-6 < 1e-4 < slopes[False]


def test_the_first_iteration_has_ratio_one_and_no_kl():
    for config in (CONFIG, BUSY, replace(CONFIG, denoise=replace(CONFIG.denoise, temperature=0.7, top_p=0.8))):
        world = World(grpo_with(config, num_iterations=1))
        metrics = world.round(0)
        assert metrics["ratio"] == pytest.approx(1, abs=1e-6) and metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
        assert metrics["kl"] == 0 and metrics["clip_low"] == metrics["clip_high"] == 0
        moved = world.round(1)
        assert moved["kl"] > 1e-6 and moved["ratio"] == pytest.approx(1, abs=1e-6)


def test_a_non_finite_gradient_stops_with_the_phase_and_the_head():
    world = World(CONFIG)
    rollouts, scores, share, prompts = world.roll(0)
    bad = replace(rollouts[0], hidden=rollouts[0].hidden * float("nan"))
    with pytest.raises(FloatingPointError, match="generator phase of round 7: the gradient of lm"):
        world.learner.generator_phase(7, [bad, rollouts[1]], scores, prompts, world.prompts)


# ---- the reward phase ------------------------------------------------------------------------------------------------


def test_the_reward_head_is_judged_on_texts_that_it_has_not_seen():
    """Labels without any signal: training accuracy rises above chance, the reported one cannot."""
    config = replace(CONFIG, reward=replace(CONFIG.reward, replay_rounds=0, learning_rate=1e-2))
    world = World(config)
    held_out, seen = [], []
    for round in range(12):
        rollouts, scores, share, _ = world.roll(round, full=True)
        generator = torch.Generator().manual_seed(round)
        noise = lambda x: torch.randn(x.shape, generator=generator)  # noqa: B023, E731
        scores = [replace(s, features=noise(s.features)) for s in scores]
        features = torch.cat([noise(s.features) for s in scores])[:, P:]
        held_out.append(
            world.learner.discriminator.remember(round, rollouts, scores, share, features)["reward_accuracy"]
        )
        seen.append(world.learner.discriminator.train(round, 40)["reward_accuracy_train"])
    assert sum(held_out) / 12 < 0.58 and sum(seen) / 12 > 0.8


def test_calibration_is_by_the_natural_text_of_all_ranks():
    world = World(CONFIG)
    rollouts, scores, share, _ = world.roll(0)
    features = world.learner.discriminator.natural_features(share)
    world.learner.discriminator.remember(0, rollouts, scores, share, features)
    chosen = features[share.attention_mask[:, P:]]
    for head in (world.learner.discriminator.head, world.learner.discriminator.average):
        torch.testing.assert_close(head.shift, chosen.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(head.scale, 1 / chosen.std(0).clamp(min=1e-4), rtol=1e-4, atol=1e-4)
    before = world.learner.discriminator.head.shift.clone()
    world.round(1)
    assert torch.equal(world.learner.discriminator.head.shift, before)  # fixed by the first round


def test_the_scoring_head_is_the_moving_average_and_the_buffer_forgets():
    world = World(CONFIG)
    for round in range(5):
        old = {k: v.clone() for k, v in world.learner.discriminator.average.named_parameters()}
        world.round(round)
        now = dict(world.learner.discriminator.head.named_parameters())
        for name, value in world.learner.discriminator.average.named_parameters():
            torch.testing.assert_close(value, CONFIG.reward.ema * old[name] + (1 - CONFIG.reward.ema) * now[name])
    assert [texts.round for texts in world.learner.discriminator.buffer] == [2, 3, 4]
    published = world.learner.discriminator.scoring_heads()
    assert np.array_equal(
        published["reward.token.0.weight"], world.learner.discriminator.average.token[0].weight.numpy()
    )


# ---- does it learn? --------------------------------------------------------------------------------------------------

CAUSAL = replace(CONFIG, model=replace(CONFIG.model, attention="causal", critic=False, sampler=False))
SELF = replace(CONFIG, denoise=DenoiseSection(steps=3, remasking="self", randomness=0.5))


@pytest.mark.parametrize("credit", ["sequence", "token"])
@pytest.mark.parametrize("config", [CONFIG, CAUSAL, SELF, BUSY], ids=["diffusion", "causal", "self", "wavefront"])
def test_the_policy_climbs_a_known_reward(config, credit):
    """The reward is the share of one token; chance gives 1/12."""
    world = World(
        grpo_with(
            config,
            **PLAIN | dict(grad_clip=1.0),
            neutral=False,
            credit=credit,
            learning_rate=1e-2,
            policy_positions=config is BUSY,
        )
    )
    shares = []
    for round in range(30):
        rollouts, scores, _, prompts = world.roll(round, full=True)
        for i, rollout in enumerate(rollouts):
            wanted = (rollout.tokens == 7).float()
            share = wanted[:, P:].mean(1)
            scores[i] = replace(scores[i], logits=torch.stack([share, torch.zeros_like(share)], 1), token_logits=wanted)
        shares.append(torch.cat([r.tokens[:, P:] == 7 for r in rollouts]).float().mean().item())
        world.learner.generator_phase(round, rollouts, scores, prompts, world.prompts)
    assert sum(shares[:3]) / 3 < 0.2 and sum(shares[-3:]) / 3 > 0.5, shares


# ---- the result ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [0.98, 0.3, 0.0])
def test_the_result_is_the_mean_of_the_policies_by_round(ema):
    world = World(grpo_with(num_iterations=1, ema=ema))
    policies = [world.state()]
    for round in range(3):
        world.round(round)
        policies.append(world.state())
    weights = {0.98: [0.1, 0.2, 0.3, 0.4], 0.3: [0.027, 0.063, 0.21, 0.7], 0.0: [0, 0, 0, 1]}[ema]
    for name in ("lm.matrix", "critic.layers.0.weight"):
        mean = sum(weight * state[f"policy.{name}"] for weight, state in zip(weights, policies, strict=True))
        torch.testing.assert_close(policies[-1][f"result.{name}"], mean)


# ---- collapse --------------------------------------------------------------------------------------------------------


def test_a_collapsed_policy_goes_back_to_the_average_and_learns_half_as_fast():
    world = World(grpo_with(num_iterations=1, entropy_floor=0.5))
    learner = world.learner
    assert world.round(0)["back_offs"] == 0
    with torch.no_grad():  # a policy that is sure of everything
        learner.model.heads["lm"].weight.mul_(100)
    metrics = world.round(1)
    assert metrics["entropy"] < 0.5 * learner.first_entropy and metrics["back_offs"] == 1
    policy, result = learner.model.heads.state_dict(), learner.result.heads.state_dict()
    assert all(torch.equal(policy[name], result[name]) for name in policy)
    assert metrics["learning_rate"] == world.config.grpo.learning_rate / 2
    assert not learner.optimizer.state
    again = World(world.config)
    again.learner.load(world.state(), learner.discriminator.texts(), learner.numbers())
    assert again.learner.optimizer.param_groups[0]["lr"] == world.config.grpo.learning_rate / 2


def test_without_a_floor_a_collapsed_policy_goes_on():
    world = World(grpo_with(num_iterations=1, entropy_floor=0.0))
    world.round(0)
    with torch.no_grad():
        world.learner.model.heads["lm"].weight.mul_(100)
    assert world.round(1)["back_offs"] == 0


# ---- what trains below the heads -------------------------------------------------------------------------------------

LORA = grpo_with(trainable="lora", lora_rank=2)
ALL = grpo_with(trainable="all")
BUSY_LORA = grpo_with(BUSY, trainable="lora", lora_rank=2)


def with_rollouts(world, replay):
    for actor, _ in world.actors:
        actor.settings["replay"] = replay
    return world


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
@pytest.mark.parametrize("config", [CONFIG, BUSY], ids=["random", "wavefront, critic, positions"])
def test_a_phase_by_replay_is_the_phase_on_cached_states(config, loss):
    results = []
    for replay in (False, True):
        world = with_rollouts(World(grpo_with(config, loss=loss)), replay)
        metrics = [world.round(round) for round in range(2)]
        results.append((metrics, world.state()))
    for mine, other in zip(*(metrics for metrics, _ in results), strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert_same(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, BUSY, LORA, ALL], ids=["heads", "wavefront", "lora", "all"])
def test_micro_batches_change_no_gradient(config):
    gradients = []
    for size in (0, 1, 3):
        world = World(grpo_with(config, micro_batch=size, num_iterations=1))
        world.round(0)
        rollouts, scores, _, prompts = world.roll(1)
        gradients.append(policy_gradient(world, rollouts, scores, prompts))
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            if gradient is not None:
                torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("config", [LORA, BUSY_LORA, ALL], ids=["lora", "lora, wavefront", "all"])
def test_below_the_heads_only_what_trains_moves_and_the_reward_does_not(config):
    world = World(config)
    learner, reward = world.learner, world.actors[0][1]
    base = {name: array.copy() for name, array in world.trunk.items()}
    start = {name: tensor.clone() for name, tensor in learner.model.trunk.state_dict().items()}
    rollouts, _, share, _ = world.roll(0)
    before = reward.score(learner.discriminator.scoring_heads(), 0, rollouts[0]).features
    natural_before = learner.discriminator.natural_features(share)
    for round in range(2):
        world.round(round)
    for models in (learner.reference, reward.model):
        for name, array in to_arrays(models.trunk.state_dict()).items():
            assert np.array_equal(array.view(np.int32), base[name].view(np.int32)), name
    assert all(np.array_equal(world.trunk[name], base[name]) for name in base)
    for name, tensor in learner.model.trunk.state_dict().items():
        moves = ".adapter." in name or config is ALL
        assert torch.equal(tensor, start[name]) != moves, name
    after = reward.score(learner.discriminator.scoring_heads(), 9, rollouts[0]).features
    assert torch.equal(after, before)
    assert torch.equal(learner.discriminator.natural_features(share), natural_before)
    newest = learner.generator_heads()
    world.actors[0][0].roll_out(newest, 99, 0.0, 5, torch.arange(1), share.tokens[:1], share.attention_mask[:1])
    assert_same(
        dict(world.actors[0][0].model.trunk.state_dict()), dict(learner.model.trunk.state_dict())
    )  # the actor acts with the learner's trunk


@pytest.mark.parametrize("config", [LORA, ALL], ids=["lora", "all"])
def test_the_first_ratio_is_one_below_the_heads_too(config):
    world = World(grpo_with(config, num_iterations=1))
    for round in range(3):
        metrics = world.round(round)
        assert metrics["ratio"] == pytest.approx(1, abs=1e-5) and metrics["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["kl"] > 1e-6 and metrics[f"grad_norm_{'adapters' if config is LORA else 'trunk'}"] > 0


@pytest.mark.parametrize("config", [LORA, ALL], ids=["lora", "all"])
def test_a_learner_with_a_trunk_resumes_bit_for_bit(config):
    config = grpo_with(config, rollout_actors=1, replay_steps=2)
    steady, stopped, fresh = World(config), World(config), World(config)
    for world in (steady, stopped, fresh):
        world.actors = world.actors[:1]
    for world in (steady, stopped):
        for round in range(2):
            world.round(round)
    fresh.learner.load(
        *copy.deepcopy((stopped.state(), stopped.learner.discriminator.texts(), stopped.learner.numbers()))
    )
    assert fresh.round(2) == steady.round(2)
    assert_same(fresh.state(), steady.state())


def test_two_ranks_train_adapters_as_one(tmp_path):
    alone = World(LORA)
    for round in range(3):
        alone.round(round)
    mp.spawn(run_rank, (str(tmp_path), LORA), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    assert_same(ranks[0][0], ranks[1][0])
    assert_same(ranks[0][0], alone.state(), rtol=1e-5, atol=1e-6)


def test_a_drawn_step_has_the_weight_of_those_left_out():
    """The average update over all draws of one of three steps is that of all steps, before it is clipped."""
    world = World(grpo_with(ALL, **PLAIN))
    rollouts, scores, _, prompts = world.roll(0)
    full = policy_gradient(world, rollouts, scores, prompts)
    subsets = {}
    for round in range(40):
        if len(subsets) == 3:
            break
        again = World(grpo_with(ALL, **PLAIN, replay_steps=1))
        seen = policy_gradient(again, *again.roll(0)[:2], prompts, round=round)
        drawn = draw_steps(0, round, 3, 1)[0]
        subsets.setdefault(drawn, seen)
    for name, gradient in full.items():
        if gradient is not None:
            mean = sum(subsets[step][name] for step in range(3)) / 3
            torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("replay", [False, True])
def test_a_stale_rollout_is_weighted_by_its_truncated_likelihood_ratio(replay):
    """Against a slow loop at the weights of the phase's start; a fresh one has weights of 1."""
    cap = 1.02
    config = grpo_with(**PLAIN, neutral=False, credit="sequence", normalize=False, importance_cap=cap)
    world = with_rollouts(World(config), replay)
    rollouts, scores, _, prompts = world.roll(0)
    plain, _, _, _ = with_rollouts(world, False).roll(0)
    with torch.no_grad():
        for p in world.learner.model.heads["lm"].parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    world.learner.version = 1  # the rollouts are of version 0
    found = policy_gradient(world, rollouts, scores, prompts)
    model, total, capped = copy.deepcopy(world.learner.model), 0.0, 0
    for rollout, score in zip(plain, scores, strict=True):
        odds = log_odds(score.logits)
        for b in range(len(rollout.tokens)):
            group = range(b // G * G, b // G * G + G)
            advantage = odds[b] - sum(odds[g] for g in group) / G
            mine = rollout.rows == b
            logprobs = model.heads["lm"](rollout.hidden[mine])[:, :12].log_softmax(-1)
            logprobs = logprobs.gather(1, rollout.actions[mine][:, None])[:, 0]
            ratio = (logprobs.detach() - rollout.logprobs[mine]).exp()
            capped += int((ratio > cap).sum())
            total = total - advantage * (ratio.clamp(max=cap) * logprobs).mean() / (N * G)
    assert 0 < capped < sum(len(r.rows) for r in plain)
    for name, p in model.heads.named_parameters():
        expected = torch.autograd.grad(total, p, allow_unused=True, retain_graph=True)[0]
        if expected is not None:
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7, msg=name)
