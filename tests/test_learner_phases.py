"""What the phases of a round put together, against sums over rollouts and texts that are made another way."""

from dataclasses import replace

import pytest
import torch

from tests.learner_world import CONFIG, PLAIN, G, N, World, grpo_with, policy_gradient

torch.set_num_threads(1)


def test_where_no_reward_differs_the_gradient_is_the_kls():
    world = World(grpo_with(**PLAIN | {"kl": 1.0}, neutral=False))
    rollouts, scores, _, prompts = world.roll(0, full=True)
    flat = [replace(score, token_logits=torch.full_like(score.token_logits, 0.1)) for score in scores]
    model, reference = world.learner.model, world.learner.reference
    matrix = model.heads["lm"].matrix
    with torch.no_grad():
        matrix.add_(0.1 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1)))
    found = policy_gradient(world, rollouts, flat, prompts)["lm.matrix"]
    total = 0.0
    for rollout in rollouts:
        p, q = (each.heads["lm"](rollout.hidden)[:, :12].log_softmax(-1) for each in (model, reference))
        kl = (p.exp() * (p - q.detach())).sum(-1)
        total = total + sum(kl[rollout.rows == row].mean() for row in range(len(rollout.tokens))) / (N * G)
    torch.testing.assert_close(found, torch.autograd.grad(total, matrix)[0], rtol=1e-4, atol=1e-7)


def test_the_mask_bias_controller_is_steered_by_what_the_anchor_measures():
    world = World(grpo_with(num_iterations=1))
    metrics = world.round(0)
    assert world.learner.mask_bias.ema.item() == pytest.approx(metrics["p_mask_unmask"], rel=1e-5)


def test_the_discriminator_learns_that_natural_text_is_natural():
    world = World(replace(CONFIG, reward=replace(CONFIG.reward, learning_rate=1e-2)))
    discriminator = world.learner.discriminator
    for round in range(3):
        rollouts, scores, natural, _ = world.roll(round, full=True)
        scores = [replace(score, features=score.features - 1.0) for score in scores]
        features = discriminator.natural_features(natural) + 1.0
        accuracy = discriminator.remember(round, rollouts, scores, natural, features)["reward_accuracy"]
        discriminator.train(round, 20)
    assert accuracy > 0.9


def test_half_of_the_texts_of_a_reward_step_are_new():
    world = World(CONFIG)
    for round in range(3):
        world.round(round)
    parts = world.learner.discriminator._draw(50, torch.Generator().manual_seed(0))
    new, old = (sum(len(piece) for part in parts for piece in part[cut]) for cut in (slice(-1, None), slice(0, -1)))
    assert new == old == 50 * 4


@pytest.mark.parametrize("side", ["low", "high"])
def test_each_side_of_the_ratio_is_clipped_at_its_own_bound(side):
    low, high = (1e-6, 1e3) if side == "low" else (0.999, 1e-6)
    world = World(grpo_with(**PLAIN, epsilon_low=low, epsilon_high=high))
    rollouts, scores, _, prompts = world.roll(0, full=True)
    matrix = world.learner.model.heads["lm"].matrix
    with torch.no_grad():
        matrix.add_(0.1 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1)))
    metrics = world.learner.generator_phase(0, rollouts, scores, prompts, world.prompts)
    assert [name for name in ("low", "high") if metrics[f"clip_{name}"] > 0] == [side]


def test_gradients_are_clipped_at_the_configs_norm():
    world = World(grpo_with(**PLAIN | {"grad_clip": 1e-6}))
    rollouts, scores, _, prompts = world.roll(0, full=True)
    found = [each for each in policy_gradient(world, rollouts, scores, prompts).values() if each is not None]
    assert 0 < max(each.norm() for each in found) <= 1.001e-6
