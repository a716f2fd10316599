import math

import pytest
import torch

from grpo.policy_loss import (
    action_weights,
    clipped_policy_loss,
    equal_groups,
    exact_kl,
    group_advantages,
    likelihood_ratios,
    temperature_direction,
)

torch.set_num_threads(1)
ROWS = torch.tensor([0, 0, 0, 2, 2, 1, 3, 3, 3, 3])  # actions of four samples: 3, 1, 2, 4
LOSSES = ("grpo", "dapo", "dr_grpo", "gspo")


def test_advantages_by_hand_in_groups_of_one_prompt():
    rewards = torch.tensor([[1.0, 2.0, 3.0], [10.0, 10.0, 40.0]])  # row n is prompt n: strangers never meet
    centred = torch.tensor([[-1.0, 0.0, 1.0], [-10.0, -10.0, 20.0]])
    std = torch.tensor([[math.sqrt(2 / 3)], [math.sqrt(200.0)]])
    torch.testing.assert_close(group_advantages(rewards, normalize=False), centred)
    torch.testing.assert_close(group_advantages(rewards), centred / std)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_divided_advantages_are_the_same_on_any_scale(scale):
    rewards = torch.tensor([[1.0, 2.0, 3.0, 5.0]])
    torch.testing.assert_close(group_advantages(rewards * scale), group_advantages(rewards))


@pytest.mark.parametrize("normalize", [False, True])
def test_advantages_sum_to_zero_within_a_group(normalize):
    for shape in ((5, 8), (5, 8, 7)):
        rewards = 100 + torch.randn(shape, dtype=torch.float64)
        mask = torch.rand(5, 1, 7).expand(5, 8, 7) < 0.6 if len(shape) == 3 else None
        assert group_advantages(rewards, mask=mask, normalize=normalize).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7e5, 1e-30])
def test_equal_rewards_give_exact_zeros_and_are_counted(value):
    for size in (2, 3, 7, 10):  # the mean of 0.1 repeated is not 0.1
        rewards = torch.full((2, size), value)
        rewards[1] = torch.randn(size)
        advantages = group_advantages(rewards)
        assert torch.equal(advantages[0], torch.zeros(size)) and (advantages[1] != 0).all()
        assert equal_groups(rewards) == 1
        dense = rewards[..., None] * torch.ones(4)
        dense[1, :, 1] = value  # one flat position does not make a flat group
        advantages = group_advantages(dense)
        assert (advantages[0] == 0).all() and (advantages[1, :, 1] == 0).all() and (advantages[1, :, 0] != 0).all()
        assert equal_groups(dense) == 1


@pytest.mark.parametrize("normalize", [False, True])
def test_rounding_is_no_reward_and_a_small_reward_is_one(normalize):
    rounded = torch.tensor([[0.7, 0.7, 0.7, 0.7 + 6e-8], [0.7, 0.7, 0.7, 0.7 + 7e-6]])
    assert rounded[0, 3] != rounded[0, 0]
    advantages = group_advantages(rounded, normalize=normalize)
    assert (advantages[0] == 0).all() and (advantages[1] != 0).all()
    assert equal_groups(rounded) == 1


@pytest.mark.parametrize("normalize", [False, True])
def test_dense_advantages_match_a_slow_loop(normalize):
    rewards = torch.randn(3, 4, 6, dtype=torch.float64)
    mask = (torch.rand(3, 1, 6) < 0.7).expand(3, 4, 6)
    expected = torch.zeros(3, 4, 6, dtype=torch.float64)
    for n in range(3):
        for t in range(6):
            if mask[n, 0, t]:
                mean = sum(rewards[n, g, t] for g in range(4)) / 4
                for g in range(4):
                    expected[n, g, t] = rewards[n, g, t] - mean
        if normalize:
            counted = [expected[n, g, t].item() for g in range(4) for t in range(6) if mask[n, g, t]]
            expected[n] /= math.sqrt(sum(x * x for x in counted) / len(counted))
    torch.testing.assert_close(group_advantages(rewards * mask, mask=mask, normalize=normalize), expected)


def test_one_sample_has_no_group():
    with pytest.raises(ValueError, match="at least 2 samples per prompt, got 1"):
        group_advantages(torch.zeros(3, 1))


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_match_a_slow_loop(loss):
    weights = action_weights(ROWS, 4, loss=loss, total_rows=4, total_actions=10, actions_per_row=5)
    counts = [3, 1, 2, 4]
    expected = [{"dapo": 1 / 10, "dr_grpo": 1 / (4 * 5)}.get(loss, 1 / (counts[r] * 4)) for r in ROWS.tolist()]
    torch.testing.assert_close(weights, torch.tensor(expected))
    total = {"dr_grpo": 10 / 20}.get(loss, 1.0)
    assert weights.sum().item() == pytest.approx(total)


def test_the_weight_of_long_samples_differs_as_each_loss_says():
    """Share of the 4-action sample against the 1-action one: equal, by actions, by actions."""
    share = {}
    for loss in LOSSES:
        weights = action_weights(ROWS, 4, loss=loss, total_rows=4, total_actions=10, actions_per_row=5)
        share[loss] = (weights[ROWS == 3].sum() / weights[ROWS == 1].sum()).item()
    assert share == pytest.approx({"grpo": 1, "gspo": 1, "dapo": 4, "dr_grpo": 4})


def whole_loss(logits, actions, behaviour, advantages, rows, loss, *, totals=(4, 10), num_rows=4):
    logprobs = logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    ratios = likelihood_ratios(logprobs, behaviour, rows=rows, num_rows=num_rows, loss=loss)
    weights = action_weights(
        rows, num_rows, loss=loss, total_rows=totals[0], total_actions=totals[1], actions_per_row=5
    )
    return clipped_policy_loss(ratios, advantages, weights, epsilon_low=0.2, epsilon_high=0.28)


def a_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 6, dtype=torch.float64, generator=generator)
    actions = torch.randint(0, 6, (10,), generator=generator)
    behaviour = (logits + 0.4 * torch.randn(10, 6, dtype=torch.float64, generator=generator)).log_softmax(-1)
    return (
        logits,
        actions,
        behaviour.gather(1, actions[:, None])[:, 0],
        torch.randn(10, dtype=torch.float64, generator=generator),
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_matches_a_slow_loop(loss):
    logits, actions, behaviour, advantages = a_batch()
    value, metrics = whole_loss(logits, actions, behaviour, advantages, ROWS, loss)
    logp = [
        math.log(math.exp(row[a]) / sum(math.exp(x) for x in row))
        for row, a in zip(logits.tolist(), actions.tolist(), strict=True)
    ]
    counts, expected, ratios = [3, 1, 2, 4], 0.0, []
    for m, r in enumerate(ROWS.tolist()):
        ratio = math.exp(logp[m] - behaviour[m].item())
        if loss == "gspo":
            inside = [i for i in range(10) if ROWS[i] == r]
            ratio = math.exp(sum(logp[i] - behaviour[i].item() for i in inside) / len(inside))
        a = advantages[m].item()
        term = min(ratio * a, min(max(ratio, 0.8), 1.28) * a)
        expected -= term * {"dapo": 1 / 10, "dr_grpo": 1 / 20}.get(loss, 1 / (counts[r] * 4))
        ratios.append(ratio)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    if loss == "dapo":
        low = sum(q < 0.8 and a < 0 for q, a in zip(ratios, advantages.tolist(), strict=True))
        high = sum(q > 1.28 and a > 0 for q, a in zip(ratios, advantages.tolist(), strict=True))
        assert low and high and (metrics["clip_low"][0] * 10).item() == pytest.approx(low, rel=1e-6)
        assert (metrics["clip_high"][0] * 10).item() == pytest.approx(high, rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_split_batch_gives_same_gradient(loss):
    logits, actions, behaviour, advantages = a_batch()
    whole = logits.clone().requires_grad_()
    whole_loss(whole, actions, behaviour, advantages, ROWS, loss)[0].backward()
    split = logits.clone().requires_grad_()
    for low, high in ((0, 2), (2, 4)):  # samples 0, 1 and samples 2, 3, as two ranks would hold them
        mine = (ROWS >= low) & (ROWS < high)
        whole_loss(split[mine], actions[mine], behaviour[mine], advantages[mine], ROWS[mine] - low, loss, num_rows=2)[
            0
        ].backward()
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-12, atol=1e-14)


def test_gspo_has_the_gradient_of_the_sequence_ratio():
    logits, actions, behaviour, _ = a_batch()
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)[ROWS]
    token = logits.clone().requires_grad_()
    logprobs = token.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    ratios = likelihood_ratios(logprobs, behaviour, rows=ROWS, num_rows=4, loss="gspo")
    weights = action_weights(ROWS, 4, loss="gspo", total_rows=4, total_actions=10, actions_per_row=5)
    (weights * ratios * advantages).sum().backward()
    sequence = logits.clone().requires_grad_()
    logprobs = sequence.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    total = sum(((logprobs - behaviour)[ROWS == r].mean().exp()) * advantages[ROWS == r][0] for r in range(4)) / 4
    total.backward()
    torch.testing.assert_close(token.grad, sequence.grad, rtol=1e-6, atol=1e-9)


def test_the_first_iteration_is_the_plain_policy_gradient():
    logits, actions, _, advantages = a_batch()
    behaviour = logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    for loss in LOSSES:
        moving = logits.clone().requires_grad_()
        value, metrics = whole_loss(moving, actions, behaviour, advantages, ROWS, loss)
        value.backward()
        assert (metrics["ratio"][0] / metrics["ratio"][1]).item() == 1
        plain = logits.clone().requires_grad_()
        weights = action_weights(ROWS, 4, loss=loss, total_rows=4, total_actions=10, actions_per_row=5)
        logprobs = plain.log_softmax(-1).gather(1, actions[:, None])[:, 0]
        (-(weights * advantages) * logprobs).sum().backward()
        torch.testing.assert_close(moving.grad, plain.grad, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [
        (1.0, 1.0, True),
        (1.27, 1.0, True),
        (1.29, 1.0, False),
        (0.5, 1.0, True),  # a good action may come back freely
        (1.0, -1.0, True),
        (0.81, -1.0, True),
        (0.79, -1.0, False),
        (2.0, -1.0, True),  # a bad one too
    ],
)
def test_clipping_stops_a_ratio_only_on_its_way_out(ratio, advantage, gradient):
    ratios = torch.tensor([ratio], requires_grad=True)
    loss, _ = clipped_policy_loss(ratios, torch.tensor([advantage]), torch.ones(1), epsilon_low=0.2, epsilon_high=0.28)
    loss.backward()
    assert ratios.grad.item() == (-advantage if gradient else 0)


def test_exact_kl_matches_enumeration_and_holds_its_gradient():
    policy = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    other = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1)
    outside = torch.zeros(3, 5, dtype=torch.bool)
    outside[1, 2] = outside[2, :3] = True
    cut = lambda x: x.masked_fill(outside, -math.inf).log_softmax(-1)  # noqa: E731
    kl = exact_kl(cut(policy), cut(other))
    for m in range(3):
        inside = [v for v in range(5) if not outside[m, v]]
        p = torch.tensor([policy[m, v].item() for v in inside], dtype=torch.float64).softmax(0).tolist()
        q = torch.tensor([other[m, v].item() for v in inside], dtype=torch.float64).softmax(0).tolist()
        assert kl[m].item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: exact_kl(cut(x), cut(other)), (policy,))
    reference = torch.nn.functional.kl_div(other[:1], policy.log_softmax(-1)[:1], log_target=True, reduction="sum")
    torch.testing.assert_close(exact_kl(policy.log_softmax(-1)[:1], other[:1])[0], reference)


def test_kl_and_its_gradient_are_zero_at_the_start():
    policy = torch.randn(4, 7, requires_grad=True)
    log_policy = policy.log_softmax(-1)
    kl = exact_kl(log_policy, log_policy.detach())
    assert torch.equal(kl, torch.zeros(4))
    kl.sum().backward()
    assert policy.grad.abs().max() < 1e-6


def test_the_temperature_direction_is_the_score_of_the_temperature():
    logits = torch.randn(4, 6, dtype=torch.float64)
    actions = torch.tensor([0, 5, 2, 2])
    sharpness = torch.zeros((), dtype=torch.float64, requires_grad=True)  # log(1 / temperature)
    log_policy = (logits * sharpness.exp()).log_softmax(-1)
    logprobs = log_policy.gather(1, actions[:, None])[:, 0]
    expected = torch.stack([torch.autograd.grad(x, sharpness, retain_graph=True)[0] for x in logprobs])
    entropies = torch.distributions.Categorical(logits=log_policy).entropy()
    torch.testing.assert_close(temperature_direction(logprobs, entropies), expected)
    every = torch.stack([temperature_direction(log_policy[:, v], entropies) for v in range(6)], 1)
    assert ((log_policy.exp() * every).sum(1)).abs().max() < 1e-12
