"""What has its own tests on a CPU runs on a CUDA device too: every tensor lies where it is needed, resumes included."""

import pytest
import torch

from grpo.trajectory import credited, trajectory_logprobs
from tests.learner_world import BUSY, CONFIG, World, grpo_with
from tests.small_rollouts import KINDS, large
from tests.test_pretrain import CONFIG as PRETRAINING
from tests.test_pretrain import dataset, run  # noqa: F401

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_states_give_the_rollouts_logprobs(kind):
    model, rollout = large(kind, dtype=torch.float64, device=DEVICE)
    again = trajectory_logprobs(model, rollout.to(DEVICE)).cpu()
    torch.testing.assert_close(again, credited(rollout, "logprobs"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "config", [CONFIG, BUSY, grpo_with(trainable="lora")], ids=["random", "critic", "lora"]
)
def test_rounds_go_on_after_a_resume(config):
    steady = World(config, device=DEVICE)
    for round in range(2):
        steady.round(round)
    fresh = World(config, device=DEVICE)
    discriminator = steady.learner.discriminator
    fresh.learner.load(steady.state(), discriminator.texts(), steady.learner.numbers())
    expected = steady.round(2)
    assert fresh.round(2) == pytest.approx(expected, rel=1e-2, abs=1e-2)


def test_a_pretraining_goes_on_after_a_stop_between_readings(dataset, tmp_path):  # noqa: F811
    whole, _ = run(PRETRAINING, dataset, tmp_path / "whole", device=DEVICE)
    assert run(PRETRAINING, dataset, tmp_path / "cut", stop_at=33, device=DEVICE)[0] == {"stopped": 33}
    result, _ = run(PRETRAINING, dataset, tmp_path / "cut", device=DEVICE)
    assert result["val_nelbo_nats"] == pytest.approx(whole["val_nelbo_nats"], rel=1e-2)
