from argparse import Namespace
from dataclasses import replace

import pytest

from benchmarks.frontier import above_zero, averages, draw, gains, recipe
from benchmarks.models import Curve, remembered
from benchmarks.stability import judged
from grpo.config import Config, RewardSection, RunSection
from grpo.config_file import load_config


def test_the_shipped_config_is_what_the_frontier_measures():
    shipped = load_config("configs/wavefront.yaml")
    args = Namespace(quick=False, data="python-docs", cache=shipped.run.cache, overrides=[])
    measured = recipe(args, shipped.run.seed)
    looks = {name: getattr(shipped.pretrain, name) for name in ("eval_every", "checkpoint_every")}
    assert replace(measured, pretrain=replace(measured.pretrain, **looks)) == shipped


def test_figures_are_computed_once_for_what_decides_them(tmp_path):
    config, calls = Config(run=RunSection(cache=str(tmp_path))), []

    def compute():
        calls.append(1)
        return {"x": len(calls)}

    assert remembered(config, compute, "kind", 8, 0.5) == remembered(config, compute, "kind", 8, 0.5) == {"x": 1}
    assert remembered(config, compute, "kind", 8, 0.6) == {"x": 2}
    other = Config(run=RunSection(cache=str(tmp_path), seed=1))
    assert remembered(other, compute, "kind", 8, 0.5) == {"x": 3}


def test_a_computation_that_fails_leaves_nothing_to_be_remembered(tmp_path):
    config = Config(run=RunSection(cache=str(tmp_path)))
    with pytest.raises(ZeroDivisionError):
        remembered(config, lambda: {"x": 1 / 0}, "kind")
    assert remembered(config, lambda: {"x": 5}, "kind") == {"x": 5}


def point(entropy, value):
    return {"entropy": entropy, "c2st": value, "ngram_js": value / 10, "judge_nll": 4 * value}


def convex(heat):
    """Entropy rises with the temperature; the measure is best at an entropy of 2."""
    entropy = 1.5 + 0.7 * heat
    return point(entropy, 0.6 + (entropy - 2) ** 2)


@pytest.mark.parametrize("entropy", [2.0, 2.13, 1.85, 2.34, 1.7, 2.5])  # the last two lie beyond what was known
def test_a_curve_is_met_where_the_texts_have_that_entropy(entropy):
    asked = []
    curve = Curve(lambda heat: asked.append(heat) or convex(heat), [0.5, 0.9, 1.2])
    met = curve.at_entropy(entropy)
    assert met["temperature"] == pytest.approx((entropy - 1.5) / 0.7, abs=1e-3)
    assert met["c2st"] == pytest.approx(0.6 + (entropy - 2) ** 2, abs=1e-3)  # the chord alone is 0.01 off
    assert len(asked) <= 7 and list(curve.rows) == [0.5, 0.9, 1.2]


def test_a_curve_that_never_has_an_entropy_says_so():
    assert Curve(lambda heat: point(2.0 + 1e-3 * heat, 0.5), [0.5, 1.0]).at_entropy(2.4) is None


def test_each_gain_is_over_the_base_kind_that_is_best_at_the_same_entropy():
    trained = {"entropy": 2.1, "c2st": 0.7, "ngram_js": 0.05, "judge_nll": 3.0}
    random = Curve(lambda heat: point(2 + 0.4 * (heat - 0.5), 0.8 + 0.1 * (heat - 0.5)), [0.5, 1.5])  # 0.825 at 2.1
    confidence = Curve(lambda heat: point(1.9 + 0.2 * heat, 0.9), [0.5, 1.5])
    found = gains(trained, [random, confidence])
    assert {name: found[f"{name}_gain"] for name in ("c2st", "ngram_js", "judge_nll")} == pytest.approx(
        {"c2st": 0.125, "ngram_js": 0.0325, "judge_nll": 0.3}
    )
    without = Curve(lambda heat: point(3.0, 0.1), [1.0])  # the best kind by far, elsewhere
    assert gains(trained, [random, without]) is None


def test_the_plane_is_drawn_by_forwards_with_means_over_seeds():
    plane = [point(2 + heat / 10 + seed / 100, 0.8) | {"model": model, "kind": kind, "forwards": forwards,
                                                       "temperature": heat}
             for model, kind in (("base", "random"), ("base", "sampler"), ("trained", "sampler"))
             for forwards in (4, 8) for heat in (0.5, 1.0) for seed in (0, 1)]  # fmt: skip
    axes = draw(plane).axes
    assert [axis.get_title() for axis in axes] == ["4 forwards", "8 forwards", "", ""]
    labels, lines = axes[0].get_legend_handles_labels()[1], axes[0].lines
    assert labels == ["trained, sampler", "base, sampler", "base, random"]
    assert list(lines[0].get_xdata()) == pytest.approx([2.055, 2.105])


def test_a_gain_counts_when_its_interval_leaves_out_zero():
    assert above_zero([0.2, 0.21, 0.19, 0.2, 0.2])
    assert not above_zero([0.2, -0.1, 0.3, 0.1, -0.05])
    assert not above_zero([-0.2, -0.2, -0.2]) and not above_zero([0.5])


def test_gains_are_averaged_within_each_seed_by_forwards_by_temperature_and_over_the_plane():
    runs = {(4, 0.5): [{"gain": 1.0}, {"gain": 2.0}], (4, 1.0): [{"gain": 3.0}, {"gain": 6.0}],
            (8, 1.0): [{"gain": 8.0}, {"gain": 1.0}]}  # fmt: skip
    assert {line: [run["gain"] for run in of_seeds] for line, of_seeds in averages(runs).items()} == {
        "NFE 4": [2.0, 4.0], "NFE 8": [8.0, 1.0], "T 0.5": [1.0, 2.0], "T 1.0": [5.5, 3.5], "plane": [4.0, 3.0],
    }  # fmt: skip


def test_a_seed_survives_by_its_worst_measurement():
    config = Config(reward=RewardSection(band_low=0.6, band_high=0.8))
    points = [{"entropy": 1.0, "distinct_4": 1.3, "round": 50}, {"entropy": 0.94, "distinct_4": 1.2, "round": 100},
              {"entropy": 1.1, "distinct_4": 1.4, "round": 150}]
    row = judged(config, {"points": points, "accuracies": [0.5, 0.7, 0.8, 0.9]})
    assert (row["survived"], row["entropy_kept"], row["in_band"]) == (0.0, 0.94, 0.5)
    points[1]["entropy"] = 0.96
    assert judged(config, {"points": points, "accuracies": [0.7]})["survived"] == 1.0
