from functools import partial

import pytest
import torch

from benchmarks.estimators import EXACT, Batch, Estimator, coupled, elbo, estimators, gradient, merged, one_step, subset
from grpo.trajectory import trajectory_logprobs
from tests.small_rollouts import make_model, relative, rolled


def batch(prompt=4, **settings):
    """Trajectories of a model whose trunk trains too."""
    model = make_model(20, block_size=12)
    rollout = rolled(model, torch.arange(6), length=12, prompt=prompt, policy_tokens="kept", replay=True, **settings)
    cached = rolled(model, torch.arange(6), length=12, prompt=prompt, policy_tokens="kept", **settings)
    model.trunk.requires_grad_(True)
    generator = torch.Generator().manual_seed(3)
    return model, Batch(rollout, torch.randn(6, dtype=torch.float64, generator=generator)), cached


def found(model, batch, estimate, seed=0):
    return gradient(Estimator("", estimate), model, batch, seed)


def test_the_exact_gradient_is_that_of_the_trajectories_log_probability():
    model, trajectories, cached = batch(steps=4)
    exact, passes = gradient(EXACT, model, trajectories)
    heads = sum(p.numel() for p in model.heads.parameters())
    model.zero_grad(set_to_none=True)
    (-(trajectories.advantages[cached.rows] * trajectory_logprobs(model, cached)).sum() / 6).backward()
    slow = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.heads.parameters()])
    assert passes == 4 and relative(exact[-heads:], slow) < 1e-10 and exact[:-heads].norm() > 0


def test_one_segment_per_step_is_exact_and_fewer_are_not():
    model, trajectories, _ = batch(steps=4)
    exact, _ = gradient(EXACT, model, trajectories)
    assert relative(found(model, trajectories, partial(merged, 4))[0], exact) < 1e-10
    assert relative(found(model, trajectories, partial(merged, 2))[0], exact) > 1e-3


def test_a_single_step_is_what_one_step_and_one_segment_estimate():
    model, trajectories, _ = batch(steps=1)
    exact, _ = gradient(EXACT, model, trajectories)
    for estimate in (one_step, partial(merged, 1)):
        assert relative(found(model, trajectories, estimate)[0], exact) < 1e-10


def test_for_a_single_token_all_masks_are_alike():
    model, trajectories, _ = batch(prompt=11, steps=1)
    exact, _ = gradient(EXACT, model, trajectories)
    for estimate in (partial(elbo, 1), partial(elbo, 4), coupled):
        assert relative(found(model, trajectories, estimate, seed=5)[0], exact) < 1e-10


@pytest.mark.parametrize("k", [1, 2])
def test_passes_are_counted_and_seeds_draw(k):
    model, trajectories, _ = batch(steps=4)
    (first, passes), (again, _) = (found(model, trajectories, partial(subset, k), seed=1) for _ in range(2))
    assert passes == k and torch.equal(first, again)
    others = [found(model, trajectories, partial(subset, k), seed=seed)[0] for seed in range(2, 8)]
    assert any(relative(other, first) > 1e-3 for other in others)
    for each in estimators(4):
        _, passes = gradient(each, model, trajectories)
        named = [int(word) for word in each.name.split() if word.isdigit()]
        assert passes == (named[0] if named else {"one-step": 1, "coupled": 3, "exact": 4}[each.name])
