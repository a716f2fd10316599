import math

import pytest
import torch

from grpo.metrics import (
    auroc,
    bits_per_byte,
    expected_calibration_error,
    means,
    merge_sums,
    overshoot,
    pack_sums,
    settle_index,
    unpack_sums,
    weighted_sum,
)


def test_auroc_equals_a_loop_over_pairs_with_ties():
    rng = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (60,), generator=rng).float()
    targets = torch.rand(60, generator=rng) < 0.4
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p in scores[targets].tolist()
        for n in scores[~targets].tolist()
    ]
    assert auroc(scores, targets).item() == pytest.approx(sum(wins) / len(wins), abs=1e-12)


def test_auroc_of_perfect_reversed_and_one_sided_scores():
    scores = torch.tensor([0.1, 0.2, 0.8, 0.9])
    targets = torch.tensor([False, False, True, True])
    assert auroc(scores, targets) == 1 and auroc(-scores, targets) == 0
    assert auroc(scores, torch.ones(4, dtype=torch.bool)).isnan()


def test_calibration_error_of_a_hand_worked_example():
    # Bin [3/15, 4/15): 0.21 and 0.25, one true: too low by 0.54. Bin [14/15, 1]: 0.95, 1.0, 0.95, one false: too
    # high by 0.9. Bin [5/15, 6/15): 0.35, false.
    probabilities = torch.tensor([0.21, 0.25, 0.95, 1.0, 0.95, 0.35])
    targets = torch.tensor([False, True, True, True, False, False])
    error = expected_calibration_error(probabilities, targets)
    assert error.item() == pytest.approx((0.54 + 0.9 + 0.35) / 6, abs=1e-7)


def test_bits_per_byte_of_uniform_bytes_is_eight():
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8)
    assert bits_per_byte(math.log(256), 4.0) == pytest.approx(2)


def test_merged_unequal_parts_equal_the_whole_where_a_mean_of_means_does_not():
    values = torch.arange(10.0)
    counted = torch.ones(10, dtype=torch.bool)
    whole = means({"x": weighted_sum(values, counted)})["x"]
    parts = [{"x": weighted_sum(values[s], counted[s])} for s in (slice(0, 2), slice(2, 10))]
    assert means(merge_sums(*parts))["x"] == whole == 4.5
    assert sum(means(part)["x"] for part in parts) / 2 == 3.0


def test_uncounted_values_may_be_nan_and_uncounted_names_are_left_out():
    values = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    pair = weighted_sum(values, torch.tensor([True, False, True]))
    assert pair.tolist() == [4.0, 2.0] and not pair.requires_grad
    assert means({"a": pair, "b": torch.zeros(2, dtype=torch.float64)}) == {"a": 2.0}


def test_packing_keeps_each_name_with_its_pair():
    sums = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([3.0, 4.0])}
    doubled = unpack_sums(sums, pack_sums(sums) * 2)
    assert {name: pair.tolist() for name, pair in doubled.items()} == {"a": [6.0, 8.0], "b": [2.0, 4.0]}


def test_a_signal_settles_after_its_last_reading_outside_and_overshoots_from_its_furthest_side():
    signal = torch.tensor([0.9, 0.5, 0.3, 0.52, 0.49])
    assert settle_index(signal, 0.5, 0.05) == 3 and settle_index(signal[:3], 0.5, 0.05) is None
    assert settle_index(signal[3:], 0.5, 0.05) == 0
    assert overshoot(signal, 0.5) == pytest.approx(0.2) and overshoot(1 - signal, 0.5) == pytest.approx(0.2)
    assert overshoot(signal[:2], 0.5) == 0
