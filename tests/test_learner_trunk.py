import copy

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from actors.trunk_store import to_arrays
from grpo.replay import draw_steps
from grpo.reward_loss import log_odds
from tests.learner_world import BUSY, CONFIG, PLAIN, G, N, World, assert_same, grpo_with, policy_gradient, run_rank

torch.set_num_threads(1)

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


def test_the_entropy_that_is_watched_is_of_all_steps_whichever_are_drawn():
    found = []
    for changes in ({}, {"replay_steps": 1}):
        world = World(grpo_with(ALL, **PLAIN, **changes))
        rollouts, scores, _, prompts = world.roll(0)
        found.append(world.learner.generator_phase(0, rollouts, scores, prompts, world.prompts)["entropy"])
    assert found[0] == found[1]


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
