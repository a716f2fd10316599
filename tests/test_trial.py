"""A trial beside its sweep: what is compared, and what its figures are."""

from unittest.mock import MagicMock

import pytest
import torch

import pipelines.trial
from grpo.config import Config, RunSection, SweepSection
from pipelines.measurements import FIGURES
from pipelines.sweep import read_trials
from pipelines.trial import Shared, Trial, means_of, settling


def make_trial(monkeypatch, folder, entropy=2.0, objective="judge_nll_matched", **common):
    row = dict.fromkeys(FIGURES, 1.0) | {"entropy": entropy, "entropy_error": entropy - 2.0}
    monkeypatch.setattr("pipelines.trial.measure", lambda *_, **__: row)
    monkeypatch.setattr("pipelines.trial.Tracker", MagicMock())
    monkeypatch.setattr("pipelines.trial.check_base", MagicMock())
    sweep = SweepSection(space={"grpo.kl": {"grid": [0.1]}}, objective=objective)
    config = Config(run=RunSection(threads=1), sweep=sweep)
    shared = {"base": folder, "device": "cpu", **common}
    shared = Shared(config=config, folder=folder, dataset=folder, judge=folder, trunk=None, entropy=2.0,
                    tracking=config.tracking, mlflow_run=None, board=MagicMock(), neighbors=1, **shared)
    return Trial(shared, {"grpo.kl": 0.1})


@pytest.mark.parametrize("entropy, objective, compared", [
    (1.9, "judge_nll_matched", False),
    (1.9, "nelbo_bpb_matched", True),
    (1.99, "judge_nll_matched", True),
    (2.5, "judge_nll_matched", True),
])
def test_a_trial_below_natural_entropy_is_not_compared_by_its_text(monkeypatch, tmp_path, entropy, objective, compared):
    trial = make_trial(monkeypatch, tmp_path, entropy, objective)
    try:
        if compared:
            assert trial.step()["entropy_error_matched"] == entropy - 2.0
            return
        told = "^its token entropy comes no nearer to natural text's 2.000 nats than 1.900, at temperature 1: judge_nll"
        with pytest.raises(ValueError, match=told):
            trial.step()
        assert read_trials(tmp_path)[0]["status"] == "failed"
        trial.tracker.finish.assert_called_once_with("FAILED")
    finally:
        trial.close()


def test_a_trial_hands_its_peak_on_a_gpu_back_after_pretraining_and_after_measuring(monkeypatch, tmp_path):
    calls = []
    trial = make_trial(monkeypatch, tmp_path, base=None, device="cuda")
    assert torch.get_float32_matmul_precision() == "high"
    for name, result in (("pretrain_loop.train", {}), ("measure", pipelines.trial.measure())):
        monkeypatch.setattr(f"pipelines.trial.{name}", lambda *_, n=name, r=result, **__: calls.append(n) or r)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    try:
        trial.step()
    finally:
        trial.close()
    assert calls == ["pretrain_loop.train", "empty", "measure", "empty"]


def test_means_are_over_the_rounds_that_have_a_figure():
    rows = [{"step": 3, "kl": 1.0}, {"step": 4, "kl": 3.0, "importance": 0.5}]
    assert means_of(rows) == {"kl": 2.0, "importance": 0.5} == means_of(rows[::-1])


def test_settling_is_read_off_the_moving_average():
    readings = [0.9] * 5 + [0.4] * 5 + [0.6, 0.4] * 5  # means of five: 0.9, 0.8, ... 0.4, then 0.44, 0.44, 0.48, ...
    curve = [{"step": 10.0 * (i + 1), "p_mask_unmask": p, "mask_bias": 1.0} for i, p in enumerate(readings)]
    found = settling([{"step": 5.0, "loss_wrong": 1.0}, *curve], 0.5, 200)
    means = [sum(readings[i - 4 : i + 1]) / 5 for i in range(4, 20)]
    settled = max(i for i, mean in enumerate(means) if abs(mean - 0.5) > 0.05) + 1
    assert found["p_mask_settled_step"] == 10 * (settled + 5) == 130
    assert found["p_mask_overshoot"] == pytest.approx(0.5 - min(means), abs=1e-6)
    assert found["p_mask_error"] == pytest.approx(sum(abs(mean - 0.5) for mean in means[12:]) / 4, abs=1e-6)
    assert settling(curve[:7], 0.5, 200)["p_mask_settled_step"] == 200 and settling([], 0.5, 200) == {}
