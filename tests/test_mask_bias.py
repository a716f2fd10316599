import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grpo.config import MaskBiasSection
from grpo.corruption import corrupt, stratified_rows
from grpo.diffusion_loss import corrective_denominator, corrective_loss
from grpo.mask_bias import MaskBias, apply_mask_bias, mask_log_odds
from grpo.tokenizer import Vocabulary

torch.set_num_threads(1)
VOCABULARY = Vocabulary(8)


def signal(p, count=100):
    return torch.tensor([p * count, count], dtype=torch.float64)


def test_bias_touches_the_mask_column_of_a_new_tensor():
    logits = torch.randn(3, 4, VOCABULARY.size)
    before = logits.clone()
    biased = apply_mask_bias(logits, torch.tensor(2.5, dtype=torch.float64), VOCABULARY)
    assert torch.equal(logits, before) and biased.dtype == logits.dtype
    difference = biased - before
    assert torch.allclose(difference[..., 8], torch.tensor(2.5)) and difference.count_nonzero() == 12


def test_log_odds_equal_the_softmax_over_words_and_mask():
    logits = torch.randn(5, VOCABULARY.size, dtype=torch.float64)
    logits[:, 9:] = 50.0  # pad and the vocabulary's padding count for nothing
    expected = apply_mask_bias(logits, 1.5, VOCABULARY)[:, :9].softmax(-1)[:, 8]
    assert torch.allclose((mask_log_odds(logits, VOCABULARY) + 1.5).sigmoid(), expected, atol=1e-12)


def test_two_updates_of_a_hand_worked_example():
    controller = MaskBias(MaskBiasSection(initial=1.0, target=0.5, ema=0.9, k_i=0.1, k_p=2.0))
    assert controller.bias == 1.0
    controller.update(signal(0.7))  # EMA 0.7, error -0.2, integral 0.98, bias 0.98 - 0.4
    assert controller.ema.item() == pytest.approx(0.7, abs=1e-12)
    assert controller.bias.item() == pytest.approx(0.58, abs=1e-12)
    controller.update(signal(0.2))  # EMA 0.65, error -0.15, integral 0.965, bias 0.965 - 0.3
    assert controller.ema.item() == pytest.approx(0.65, abs=1e-12)
    assert controller.bias.item() == pytest.approx(0.665, abs=1e-12)


def test_a_batch_without_unmask_positions_changes_nothing():
    controller = MaskBias(MaskBiasSection())
    controller.update(torch.zeros(2))
    assert controller.num_signals == 0 and controller.bias == 3.5
    controller.update(signal(0.9))
    before = controller.state_dict()
    controller.update(torch.zeros(2))
    assert controller.state_dict() == before


def test_signal_is_weighted_by_counts():
    halves, whole = (MaskBias(MaskBiasSection()) for _ in range(2))
    halves.update(signal(0.9, 10) + signal(0.3, 90))
    whole.update(torch.tensor([36.0, 100.0]))
    assert halves.ema.item() == pytest.approx(0.36) and halves.state_dict() == whole.state_dict()


@pytest.mark.parametrize(("p", "direction"), [(0.9, -1), (0.1, 1)])
@pytest.mark.parametrize("gains", [{"k_i": 0.01}, {"k_i": 0.0, "k_p": 1.0}])
def test_a_disturbance_each_way_moves_the_bias_against_it(p, direction, gains):
    controller = MaskBias(MaskBiasSection(initial=0.0, ema=0.9, **gains))
    for _ in range(5):
        controller.update(signal(0.5))
    assert controller.bias == 0
    for _ in range(5):
        before = controller.bias
        controller.update(signal(p))
        assert (controller.bias - before).sign() == direction


@pytest.mark.parametrize("k_p", [0.0, 1.0])
def test_bias_leaves_its_bound_at_the_first_signal_of_the_other_side(k_p):
    controller = MaskBias(MaskBiasSection(initial=0.0, ema=0.0, k_i=0.1, k_p=k_p, bound=2.0))
    for _ in range(500):  # an unanswered error would have integrated to 25
        controller.update(signal(0.0))
    assert controller.bias.item() == pytest.approx(2.0, abs=1e-9) and controller.integral <= 2.0
    controller.update(signal(1.0))
    assert controller.bias < 2.0 - 0.04


def test_state_survives_json_and_continues_bit_for_bit():
    straight = MaskBias(MaskBiasSection(k_p=0.3))
    for p in (0.81, 0.33, 0.7):
        straight.update(signal(p))
    resumed = MaskBias(MaskBiasSection(k_p=0.3))
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for controller in (straight, resumed):
        controller.update(signal(0.123))
    assert resumed.state_dict() == straight.state_dict()


@pytest.mark.parametrize("initial", [3.5, -3.5])
def test_closed_loop_settles_from_both_sides_and_returns_after_a_disturbance(initial):
    controller = MaskBias(MaskBiasSection(initial=initial))
    spread = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)

    def run(shift, steps):
        for _ in range(steps):
            p = (spread + shift + controller.bias).sigmoid()
            controller.update(torch.stack([p.sum(), torch.tensor(31.0, dtype=torch.float64)]))

    run(0.0, 3000)
    assert abs(controller.ema - 0.5) < 0.02 and abs(controller.bias) < 0.2
    for shift in (1.0, -1.0):
        run(shift, 3000)
        assert abs(controller.ema - 0.5) < 0.02 and abs(controller.bias + shift) < 0.2


class Neighbors(nn.Module):
    """Logits of each position from itself and its two neighbours."""

    def __init__(self, width=16):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY.size, width)
        self.head = nn.Sequential(nn.Linear(3 * width, 32), nn.GELU(), nn.Linear(32, VOCABULARY.size))

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(torch.cat([F.pad(x, (0, 0, 1, 0))[:, :-1], x, F.pad(x, (0, 0, 0, 1))[:, 1:]], -1))


def train(applies_to, num_steps=1500, num_rows=16):
    """Train on counting text with the controller in the loop; return it and the biases of all steps."""
    torch.manual_seed(0)
    model = Neighbors()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, fused=True)
    controller = MaskBias(MaskBiasSection(ema=0.95, k_i=0.03, bound=30.0, applies_to=applies_to))
    rows = torch.arange(num_rows)
    clean = (rows[:, None] + torch.arange(12)) % 8
    biases = []
    for step in range(num_steps):
        seeds, times = stratified_rows(0, 1, step, rows, num_rows)
        corrupted = corrupt(
            clean, vocabulary=VOCABULARY, attention_mask=torch.ones_like(clean, dtype=torch.bool), seeds=seeds,
            times=times, remask_ratio=1.0, guaranteed_correct=0.01,
        )
        weights = {"weight_unmask": 1.0, "weight_remask": 1.0}
        loss, metrics = corrective_loss(
            model(corrupted.inputs), corrupted, vocabulary=VOCABULARY, **weights, penalty=0.5,
            denominator=corrective_denominator(corrupted, **weights), mask_bias=controller.bias, applies_to=applies_to,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.update(metrics["p_mask_unmask"])
        biases.append(controller.bias)
    return controller, torch.stack(biases)


def test_closed_loop_with_training_has_a_fixed_point_when_the_bias_acts_on_sampling():
    controller, biases = train("sampling")
    assert abs(controller.ema - 0.5) < 0.05
    assert biases.abs().max() < 10 and abs(biases[-1] - biases[-500]) < 1.0


def test_closed_loop_with_training_winds_up_when_the_bias_acts_on_the_loss():
    controller, biases = train("loss")
    assert controller.ema < 0.1
    assert biases[-1] - biases[-500] > 5.0
