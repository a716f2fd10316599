import math

import pytest
import torch

from grpo.reward_loss import (
    dense_rewards,
    discriminator_loss,
    log_odds,
    reward_steps,
    told_apart,
)

torch.set_num_threads(1)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def bce(odds, target):
    return -target * math.log(sigmoid(odds)) - (1 - target) * math.log(1 - sigmoid(odds))


def texts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits, token_logits = (torch.randn(4, n, generator=generator, dtype=torch.float64) for n in (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    return logits, token_logits, torch.tensor([True, False, False, True]), mask


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["mse", "bce", "bradley_terry"])
def test_discriminator_loss_by_hand(loss, smoothing):
    logits, token_logits, natural, mask = texts()
    value, metrics = discriminator_loss(
        logits, token_logits, natural, mask, loss=loss, smoothing=smoothing, total_texts=8
    )
    targets = [1 - smoothing if n else smoothing for n in natural.tolist()]
    odds = [a - b for a, b in logits.tolist()]
    if loss == "bce":
        pooled = sum(bce(o, t) for o, t in zip(odds, targets, strict=True))
    elif loss == "mse":
        pooled = sum(
            ((sigmoid(o) - t) ** 2 + (1 - sigmoid(o) - (1 - t)) ** 2) / 2 for o, t in zip(odds, targets, strict=True)
        )
    else:  # the first natural text (0) against the first synthetic one (1), the second (3) against the second (2)
        pooled = 2 * sum(bce(odds[i] - odds[j], 1 - smoothing) for i, j in ((0, 1), (3, 2)))
    token = 0.0
    for b in range(4):
        counted = [bce(token_logits[b, t].item(), targets[b]) for t in range(5) if mask[b, t]]
        token += sum(counted) / len(counted)
    assert value.item() == pytest.approx((pooled + token) / 8, rel=1e-9)
    assert metrics["reward_loss_pooled"].tolist() == pytest.approx([pooled, 4])
    assert metrics["reward_loss_token"].tolist() == pytest.approx([token, 4])
    right = sum((o > 0) == n for o, n in zip(odds, natural.tolist(), strict=True))
    if loss == "bradley_terry":
        right = 2 * sum(odds[i] > odds[j] for i, j in ((0, 1), (3, 2)))
    assert metrics["reward_accuracy_train"].tolist() == [right, 4]


@pytest.mark.parametrize("loss", ["mse", "bce", "bradley_terry"])
def test_texts_without_a_completion_have_no_say(loss):
    logits, token_logits, natural, mask = texts()
    empty = mask.clone()
    empty[2:] = False  # a pair
    value, metrics = discriminator_loss(
        logits, token_logits, natural, empty, loss=loss, smoothing=0.1, total_texts=8
    )
    only, of_only = discriminator_loss(
        logits[:2], token_logits[:2], natural[:2], mask[:2], loss=loss, smoothing=0.1, total_texts=8
    )
    torch.testing.assert_close(value, only)
    assert {name: pair.tolist() for name, pair in metrics.items()} == {n: p.tolist() for n, p in of_only.items()}


@pytest.mark.parametrize("loss", ["mse", "bce", "bradley_terry"])
def test_a_text_on_the_fence_is_told_by_no_loss(loss):
    logits, token_logits, natural, mask = texts()
    logits[:2] = 1.0  # a pair
    _, metrics = discriminator_loss(
        logits, token_logits, natural, mask, loss=loss, smoothing=0.1, total_texts=4
    )
    odds = log_odds(logits)
    told = told_apart(odds[~natural], odds[natural], loss)
    assert metrics["reward_accuracy_train"].tolist() == [told.sum(), 4] and not told[::2].any()


def test_accuracy_of_pairs_does_not_hang_on_an_offset_that_their_loss_leaves_free():
    generated, natural = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([1.0, 1.0, 1.0])
    assert told_apart(generated, natural, "bce").tolist() == [True, False, False, True, True, True]
    for offset in (-7, 0, 7):
        assert told_apart(generated + offset, natural + offset, "bradley_terry").tolist() == 2 * [True, True, False]


def test_squared_error_has_no_gradient_where_it_is_confidently_wrong():
    """Log-odds of -24 for a natural text: 7.5e-11 against 1 for cross-entropy."""
    gradients = {}
    for loss in ("mse", "bce"):
        logits = torch.tensor([[-12.0, 12.0]], dtype=torch.float64, requires_grad=True)
        value, _ = discriminator_loss(
            logits,
            torch.zeros(1, 3),
            torch.tensor([True]),
            torch.ones(1, 3).bool(),
            loss=loss,
            smoothing=0.0,
            total_texts=1,
        )
        value.backward()
        gradients[loss] = -logits.grad[0, 0].item()
    assert gradients["mse"] == pytest.approx(7.55e-11, rel=1e-2)
    assert gradients["bce"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_split_texts_give_the_same_gradient(loss):
    logits, token_logits, natural, mask = texts()
    gradients = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        pooled, token = logits.clone().requires_grad_(), token_logits.clone().requires_grad_()
        for part in parts:
            discriminator_loss(
                pooled[part], token[part], natural[part], mask[part], loss=loss, smoothing=0.1, total_texts=4
            )[0].backward()
        gradients.append((pooled.grad, token.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-15)
    assert (gradients[0][1][~mask] == 0).all()


def test_smoothing_puts_the_optimum_at_its_log_odds():
    logits = torch.tensor([[math.log(9.0), 0.0]], requires_grad=True)
    token = torch.full((1, 2), math.log(9.0), requires_grad=True)
    discriminator_loss(
        logits, token, torch.tensor([True]), torch.ones(1, 2).bool(), loss="bce", smoothing=0.1, total_texts=1
    )[0].backward()
    assert logits.grad.abs().max() < 1e-7 and token.grad.abs().max() < 1e-7


def test_shapes_that_would_broadcast_silently_are_refused():
    for shape in ((2,), (2, 1), (2, 3), (2, 2, 2)):
        with pytest.raises(ValueError, match=r"must be \[B, 2\]"):
            log_odds(torch.zeros(shape))
    logits, token_logits, _, mask = texts()
    with pytest.raises(ValueError, match="bradley_terry needs pairs, got 3 natural and 1 synthetic"):
        discriminator_loss(
            logits,
            token_logits,
            torch.tensor([True, True, True, False]),
            mask,
            loss="bradley_terry",
            smoothing=0.0,
            total_texts=4,
        )


@pytest.mark.parametrize("signal", ["log_odds", "probability"])
@pytest.mark.parametrize("credit", ["sequence", "token", "both", "window"])
def test_dense_rewards_match_a_slow_loop(credit, signal):
    logits, token_logits, _, mask = texts(1)
    rewards = dense_rewards(logits, token_logits, mask, credit=credit, signal=signal, window=1)
    shape = sigmoid if signal == "probability" else (lambda x: x)
    for b in range(4):
        own = {t: shape(token_logits[b, t].item()) for t in range(5) if mask[b, t]}
        for t in range(5):
            near = [own[s] for s in (t - 1, t, t + 1) if s in own]
            expected = (
                0.0
                if t not in own
                else {
                    "sequence": shape((logits[b, 0] - logits[b, 1]).item()),
                    "token": own[t],
                    "both": own[t] + sum(own.values()) / len(own),
                    "window": sum(near) / len(near),
                }[credit]
            )
            assert rewards[b, t].item() == pytest.approx(expected, rel=1e-9, abs=1e-12), (b, t)


def test_a_window_of_nothing_is_the_token_itself():
    logits, token_logits, _, mask = texts(2)
    both = [
        dense_rewards(logits, token_logits, mask, credit=c, signal="log_odds", window=0) for c in ("window", "token")
    ]
    torch.testing.assert_close(*both)


def test_log_odds_do_not_saturate_as_a_reward():
    logits = torch.tensor([[20.0, -20.0], [25.0, -25.0]])
    mask = torch.ones(2, 1, dtype=torch.bool)
    by = lambda signal: dense_rewards(logits, torch.zeros(2, 1), mask, credit="sequence", signal=signal)[:, 0]  # noqa: E731
    assert by("probability")[0] == by("probability")[1] and by("log_odds").tolist() == [40, 50]


def test_reward_steps_move_by_one_towards_the_band_and_stay_in_bounds():
    def step(current, accuracy):
        return reward_steps(current, accuracy, band_low=0.6, band_high=0.8, min_steps=1, max_steps=8)

    assert [step(4, a) for a in (0.5, 0.6, 0.7, 0.8, 0.9)] == [5, 4, 4, 4, 3]
    assert step(8, 0.5) == 8 and step(1, 0.99) == 1
