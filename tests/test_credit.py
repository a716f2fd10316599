import pytest
import torch

from actors.credit import action_credits
from actors.reward import Scores
from grpo.config import GrpoSection
from grpo.policy_loss import group_advantages
from grpo.reward_loss import dense_rewards
from grpo.trajectory import Rollout

N, G, T, P = 3, 4, 6, 2
B = N * G
ROWS = torch.arange(B).repeat_interleave(T - P)
POSITIONS = torch.arange(P, T).repeat(B)
WEIGHTS = torch.full((len(ROWS),), 1 / len(ROWS))
NAME = "my_module:score"


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rollout():
    completion = (torch.arange(T) >= P).expand(B, T)
    nothing = torch.zeros(len(ROWS), dtype=torch.int64)
    return Rollout(
        tokens=torch.zeros(B, T, dtype=torch.int64), attention_mask=torch.ones(B, T, dtype=torch.bool),
        completion_mask=completion, group_size=G, temperature=1.0, policy_version=0, hidden=torch.zeros(len(ROWS), 4),
        actions=nothing, rows=ROWS, positions=POSITIONS, steps=nothing, logprobs=-draw(len(ROWS)).abs(),
        entropies=draw(len(ROWS), seed=1).abs(),
    )


def credits(users, tokens=None, **settings):
    scores = Scores(logits=draw(B, 2, seed=2), token_logits=draw(B, T, seed=3) if tokens is None else tokens,
                    features=None, users=users)
    grpo = GrpoSection(**{"rewards": {NAME: 1.0}, "credit": "token", **settings})
    found, sums = action_credits([rollout()], [scores], [WEIGHTS], grpo=grpo, signal="log_odds",
                                 all_reduce=lambda tensor, op="sum": tensor)
    return found[0], sums


@pytest.mark.parametrize("neutral", [False, True])
def test_a_users_reward_is_normalised_by_itself_weighted_and_added_to_every_action(neutral):
    score = draw(B, seed=4)
    alone, _ = credits({}, rewards={}, neutral=neutral)
    for scale in (1.0, 1000.0):
        both, _ = credits({NAME: scale * score}, rewards={NAME: 0.5}, neutral=neutral)
        for row in range(B):
            group = score[row // G * G : row // G * G + G]
            expected = 0.5 * (score[row] - group.mean()) / group.std(correction=0)
            torch.testing.assert_close((both - alone)[ROWS == row], expected.expand(T - P), rtol=1e-4, atol=1e-5)
    raw, divided = (credits({}, rewards={}, normalize=normalize, neutral=False)[0] for normalize in (False, True))
    ratios = (raw / divided).view(N, -1)  # the discriminator's, by one number in each group
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios), rtol=1e-4, atol=1e-5)
    assert (ratios[:, 0] - 1).abs().min() > 1e-3


def test_weights_scale_each_side():
    score = draw(B, seed=4)
    adversary, _ = credits({}, rewards={}, adversary=2.0)
    user, _ = credits({NAME: score}, adversary=0.0, rewards={NAME: 3.0})
    both, _ = credits({NAME: score}, adversary=2.0, rewards={NAME: 3.0})
    torch.testing.assert_close(both, adversary + user)
    torch.testing.assert_close(user, 3 * group_advantages(score.view(N, G)).flatten()[ROWS])
    logged, sums = credits({NAME: score}, adversary=2.0, rewards={NAME: 0.0})
    assert torch.equal(logged, adversary) and "rewards/my_module.score" in sums


def test_groups_of_equal_rewards_earn_exactly_nothing_and_are_counted():
    score = draw(B, seed=4)
    score[:G] = 0.1
    flat = torch.full((B, T), 0.3)
    found, sums = credits({NAME: score}, tokens=flat)
    assert (found[ROWS < G] == 0).all() and (found[ROWS >= G] != 0).all()
    assert sums["zero_spread_groups"].tolist() == [1, N]
    nothing, sums = credits({NAME: torch.ones(B)}, adversary=0.0)
    assert (nothing == 0).all() and sums["zero_spread_groups"].tolist() == [N, N]


def test_each_reward_is_a_figure_of_its_own():
    score = draw(B, seed=4)
    _, sums = credits({NAME: score}, adversary=0.0, rewards={NAME: 2.0})
    mean = lambda name: (sums[name][0] / sums[name][1]).item()  # noqa: E731
    assert mean("rewards/my_module.score") == pytest.approx(score.mean().item(), rel=1e-5)
    assert mean("rewards/my_module.score/square") == pytest.approx(score.square().mean().item(), rel=1e-5)
    assert mean("reward") == pytest.approx(2 * score.mean().item(), rel=1e-5) and "p_natural" not in sums


@pytest.mark.parametrize("neutral", [False, True])
def test_the_advantages_that_are_logged_are_those_that_act_as_the_loss_weighs_them(neutral):
    """Two texts of two tokens, three actions credited; the user's reward adds 1 to one text, -1 to the other."""
    tokens = torch.tensor([[5.0, 2.0], [1.0, 4.0]])  # advantages 2, -1 and -2, 1 without the user's
    rows, positions = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    weights = torch.tensor([0.25, 0.25, 0.5])
    nothing = torch.zeros(3, dtype=torch.int64)
    acted = Rollout(
        tokens=torch.zeros(2, 2, dtype=torch.int64), attention_mask=torch.ones(2, 2, dtype=torch.bool),
        completion_mask=torch.ones(2, 2, dtype=torch.bool), group_size=2, temperature=1.0, policy_version=0,
        hidden=torch.zeros(3, 4), actions=nothing, rows=rows, positions=positions, steps=nothing,
        logprobs=torch.tensor([-1.0, -2.0, -3.0]), entropies=torch.tensor([3.0, 2.0, 2.0]))  # k = 2, 0, -1
    scores = Scores(logits=torch.zeros(2, 2), token_logits=tokens, features=None,
                    users={NAME: torch.tensor([7.0, 3.0])})
    grpo = GrpoSection(rewards={NAME: 1.0}, credit="token", neutral=neutral, prompts=1, group_size=2, rollout_actors=1)
    found, sums = action_credits([acted], [scores], [weights], grpo=grpo, signal="log_odds",
                                 all_reduce=lambda tensor, op="sum": tensor)
    # c = (0.25 x 2 x 2 + 0.5 x 1 x -1) / (0.25 x 4 + 0.5 x 1) = 1/3
    expected = [2 - 2 / 3 + 1, -1.0 + 1, 1 + 1 / 3 - 1] if neutral else [3.0, 0.0, 0.0]
    square = 0.25 * 49 / 9 + 0.5 / 9 if neutral else 0.25 * 9
    torch.testing.assert_close(found[0], torch.tensor(expected))
    assert sums["advantage"].tolist() == pytest.approx([0.75, 1.0], rel=1e-6)
    assert sums["advantage/square"].tolist() == pytest.approx([square, 1.0], rel=1e-6)


def test_credit_by_windows_reads_the_configs_width():
    tokens, mask = draw(B, T, seed=3), rollout().completion_mask
    for width in (1, 2):
        found, _ = credits({}, rewards={}, credit="window", credit_window=width, normalize=False, neutral=False)
        own = dense_rewards(draw(B, 2, seed=2), tokens, mask, credit="window", signal="log_odds", window=width)
        expected = group_advantages(own.view(N, G, T), mask=mask.view(N, G, T), normalize=False).flatten(0, 1)
        torch.testing.assert_close(found, expected[ROWS, POSITIONS])
