import itertools
from dataclasses import replace

import pytest
import torch

import grpo.replay
from benchmarks.peak_memory import PeakMemory
from grpo.lora import Trainable, train_below_heads
from grpo.metrics import merge_sums
from grpo.remasking import draw_log_probs
from grpo.replay import CACHED, action_values, draw_steps, part_logprobs, split, with_states
from grpo.trajectory import (
    TABLE,
    choice_log_probs,
    credited,
    judged_wrong,
    policy_log_probs,
    trajectory_logprobs,
    wavefront_figures,
)
from tests.small_rollouts import KINDS, T, gradient, large, make_model, relative, rolled


def both(kind, dtype=torch.float32, rows=None):
    """The same rollout with cached states and to be replayed."""
    model, cached = large(kind, rows, dtype)
    _, replayed = large(kind, rows, dtype, replay=True)
    return model, cached, replayed


def joined(values, parts, num):
    """[M + D] from values by part."""
    whole = torch.full((num,), float("nan"), dtype=values[0].dtype)
    for value, part in zip(values, parts, strict=True):
        whole[part.index] = value.detach()
    return whole


@pytest.mark.parametrize("micro_batch", [0, 1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_replay_equals_cached_states_equals_the_rollout(kind, micro_batch):
    model, cached, replayed = both(kind)
    behaviour = credited(cached, "logprobs")
    assert replayed.hidden is None and cached.inputs is None
    assert torch.equal(credited(replayed, "logprobs"), behaviour)
    parts = split(replayed, micro_batch)
    again = joined([part_logprobs(model, part) for part in parts], parts, len(behaviour))
    with torch.no_grad():
        stored = trajectory_logprobs(model, cached)
    for found in (again, stored):
        assert ((found - behaviour).abs() <= 1e-6 * behaviour.abs().clamp(min=1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_cover_each_action_once_with_its_own_data(kind):
    _, cached, replayed = both(kind)
    for rollout, micro_batch in ((cached, 5), (replayed, 0), (replayed, 5)):
        parts = split(rollout, micro_batch)
        every = torch.cat([part.index for part in parts])
        assert torch.equal(every.sort().values, torch.arange(len(credited(rollout, "rows"))))
        for part in parts:
            for field in ("positions", "steps", "logprobs"):
                assert torch.equal(credited(part.rollout, field), credited(rollout, field)[part.index])
            rows = credited(part.rollout, "rows") + part.samples.start
            assert torch.equal(rows, credited(rollout, "rows")[part.index])
            assert (part.step == CACHED) == (rollout is cached)
            if rollout is replayed:
                assert (credited(part.rollout, "steps") == part.step).all()


def head_gradient(model, reference, parts, weights):
    """Of a loss that uses both values, one backward per part."""
    model.zero_grad(set_to_none=True)
    for part in parts:
        logprobs, kl = action_values(model, reference, part)
        (weights[part.index] * (logprobs + kl)).sum().backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()
                      if p.requires_grad])


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_and_sliced_and_split_gradients_equal_the_cached_one(kind):
    model, cached, replayed = both(kind, torch.float64)
    reference, _ = large(kind, dtype=torch.float64)
    with torch.no_grad():
        for p in model.heads.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1)))
    weights = torch.randn(len(credited(cached, "rows")), dtype=torch.float64)
    exact = head_gradient(model, reference, split(cached, 0), weights)
    assert exact.norm() > 0
    for rollout, micro_batch in ((cached, 5), (replayed, 0), (replayed, 1), (replayed, 5)):
        found = head_gradient(model, reference, split(rollout, micro_batch), weights)
        assert relative(found, exact) < 1e-10


@pytest.mark.parametrize("kind", ["wavefront", "confidence", "critic"])
def test_small_tables_change_no_gradient(kind, monkeypatch):
    model, cached, _ = both(kind, torch.float64)
    reference, _ = large(kind, dtype=torch.float64)
    part, = split(cached, 0)
    whole = action_values(model, reference, part)
    judged, drawn = [], []
    monkeypatch.setattr(grpo.replay, "judged_wrong",
                        lambda model, choices: judged.append(len(choices.hidden)) or judged_wrong(model, choices))
    monkeypatch.setattr(grpo.replay, "draw_log_probs",
                        lambda *given: drawn.append(len(given[-1])) or draw_log_probs(*given))
    monkeypatch.setitem(TABLE, "cpu", 100)
    sliced = action_values(model, reference, part)
    assert max(judged) == 100 // 20 and max(drawn) == 100 // 16
    for a, b in zip(whole, sliced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    left, right = (gradient(model, logprobs.sum() + 2 * kl.sum()) for logprobs, kl in (whole, sliced))
    assert relative(right, left) < 1e-12
    torch.testing.assert_close(part_logprobs(model, part), whole[0].detach(), rtol=1e-12, atol=1e-12)
    _, rolled_so = large(kind, dtype=torch.float64)
    torch.testing.assert_close(credited(rolled_so, "logprobs"), credited(cached, "logprobs"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["parallel", "kept", "self", "wavefront", "causal"])
@pytest.mark.parametrize("what", ["lora", "all"])
def test_a_replayed_trunk_gets_the_gradient_of_one_backward_through_all_steps(kind, what):
    model, _, replayed = both(kind, torch.float64)
    reference, _ = large(kind, dtype=torch.float64)
    train_below_heads(model.trunk, Trainable(kind=what, rank=2, alpha=4.0), seed=3)
    if what == "lora":
        with torch.no_grad():
            for name, p in model.trunk.named_parameters():
                if name.endswith("adapter.up"):
                    p.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    weights = torch.randn(len(credited(replayed, "rows")), dtype=torch.float64)
    parts = split(replayed, 5)
    found = head_gradient(model, reference, parts, weights)
    below = [p for p in model.trunk.parameters() if p.requires_grad]
    assert below and any(p.grad is not None and p.grad.abs().max() > 0 for p in below)
    model.zero_grad(set_to_none=True)
    total = 0.0
    for part in split(replayed, 0):  # all graphs at once
        logprobs, kl = action_values(model, reference, part)
        total = total + (weights[part.index] * (logprobs + kl)).sum()
    total.backward()
    whole = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()
                       if p.requires_grad])
    assert relative(found, whole) < 1e-10


@pytest.mark.parametrize("num", [1, 2, 3])
def test_the_average_over_all_subsets_of_steps_is_the_full_gradient(num):
    model, _, replayed = both("self", torch.float64)
    reference, _ = large("self", dtype=torch.float64)
    weights = torch.randn(len(credited(replayed, "rows")), dtype=torch.float64)
    parts = split(replayed, 0)
    full = head_gradient(model, reference, parts, weights)
    subsets = list(itertools.combinations(range(4), num))
    estimates = [
        head_gradient(model, reference, [p for p in parts if p.step in subset], weights * 4 / num)
        for subset in subsets
    ]
    assert relative(sum(estimates) / len(subsets), full) < 1e-12
    assert relative(estimates[0], full) > 1e-2


def test_steps_are_drawn_uniformly_and_repeatably():
    assert draw_steps(0, 5, 6, 0) == list(range(6))
    counts = torch.zeros(6, 6)
    for update in range(3000):
        drawn = draw_steps(1, update, 6, 2)
        assert len(set(drawn)) == 2
        counts[drawn[0], drawn[1]] += 1
    assert draw_steps(1, 7, 6, 2) == draw_steps(1, 7, 6, 2)
    off = counts[~torch.eye(6, dtype=torch.bool)]
    assert counts.diagonal().sum() == 0 and off.min() > 60 and off.max() < 145  # 100 each, +- 4.5 sigma


def test_a_step_without_actions_costs_no_pass():
    model = make_model(20, block_size=16)
    rollout = rolled(model, torch.arange(3), length=16, prompt=12, steps=8, policy_tokens="kept", replay=True)
    parts = split(rollout, 0)
    assert len(rollout.inputs) == 8 and len(parts) == 4  # 4 tokens, one kept at a time
    none = replace(rollout, **{name: None if getattr(rollout, name) is None else getattr(rollout, name)[:0] for name in
                               ("actions", "rows", "positions", "steps", "logprobs", "entropies", "support")})
    part, = split(none, 0)  # somebody must take part in a data-parallel step
    assert len(part.index) == 0 and len(with_states(model, part).hidden) == 0


@pytest.mark.parametrize("replay", [False, True])
def test_the_wavefront_figures_of_parts_add_up_to_the_rollouts(replay):
    model = make_model(20, block_size=16)
    rollout = rolled(model, torch.arange(5), length=16, steps=3, remasking="self", sampler=True, replay=replay)
    parts, sums = split(rollout, 2), {}
    for part in parts:
        sums = merge_sums(sums, wavefront_figures(part.rollout))
    whole = wavefront_figures(rollout)
    for name in ("wavefront/waves", "wavefront/tokens_per_wave"):
        assert torch.equal(sums[name], whole[name])
    assert len(parts) == (9 if replay else 3)


def test_the_peak_of_a_replayed_update_does_not_grow_with_the_steps():
    peaks = {}
    for steps in (8, 64):
        model = make_model(20, block_size=T * 24, dtype=torch.float32)
        reference = make_model(20, block_size=T * 24, dtype=torch.float32)
        rollout = rolled(model, torch.arange(32), length=72, prompt=8, steps=steps, replay=True)
        train_below_heads(model.trunk, Trainable(kind="all"), seed=0)
        parts = split(rollout, 0)
        weights = torch.ones(len(rollout.rows))
        with PeakMemory() as memory:
            head_gradient(model, reference, parts, weights)
        peaks[steps] = memory.peak_bytes
    assert peaks[64] < 1.1 * peaks[8]


@pytest.mark.parametrize("kind", ["self", "critic"])
def test_the_kl_of_proposals_and_choices_is_over_each_models_own_states(kind):
    model, _, replayed = both(kind, torch.float64)
    reference, _ = large(kind, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            parameter.add_(0.05 * noise)
        part, expected = split(replayed, 0)[1], []
        for table in (policy_log_probs, lambda model, rollout: choice_log_probs(model, rollout.choices)):
            p, q = (table(each, with_states(each, part)) for each in (model, reference))
            expected.append(torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1))
        torch.testing.assert_close(action_values(model, reference, part)[1], torch.cat(expected))
