"""What has its own tests on a CPU runs on another device too: every tensor lies where it is needed, resumes included.

Once on CUDA, where there is some, and once on a device that only says that it is elsewhere (`tests/elsewhere.py`).
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from grpo.checkpoint import save_checkpoint
from grpo.completion import complete
from grpo.config import DenoiseSection
from grpo.config_file import to_dict
from grpo.data import Batch, make_dataset
from grpo.denoise import denoise
from grpo.model import GPT
from grpo.noise import row_seeds
from grpo.trajectory import credited, trajectory_logprobs
from pipelines import sample
from pipelines.measurements import measure, measure_natural
from tests.elsewhere import elsewhere, waits  # noqa: F401
from tests.learner_world import BUSY, CONFIG, World, grpo_with
from tests.small_rollouts import KINDS, large, make_model
from tests.test_measurements import fitted_judge, settings
from tests.test_pretrain import CONFIG as PRETRAINING
from tests.test_pretrain import altered, dataset, run  # noqa: F401

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["elsewhere", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])])
def device(request):
    if request.param == "elsewhere":
        request.getfixturevalue("elsewhere")
    return "cuda"


@pytest.fixture
def set_up(monkeypatch):
    """The devices that processes are set up for."""
    devices = []
    for user in ("actors.generator", "actors.reward", "actors.judge", "pipelines.measurements", "pipelines.sample"):
        monkeypatch.setattr(f"{user}.set_up_torch", lambda device, threads=None: devices.append(device))
    return devices


def test_what_lies_elsewhere_does_not_mix(elsewhere):  # noqa: F811
    here, there = torch.arange(3.0), torch.arange(3.0, device=elsewhere)
    with pytest.raises(RuntimeError, match="two devices"):
        here + there
    assert torch.equal((there * 2 + torch.tensor(1.0))[torch.tensor([2, 0])].cpu(), torch.tensor([5.0, 1.0]))
    assert sum(waits.values()) == 2  # for the upload of the indices, and for the read
    there[there > 0] = there[there < 2]
    assert sum(waits.values()) == 4 and there.tolist() == [0, 0, 1]  # for the number of each mask's places


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_states_give_the_rollouts_logprobs(kind, device):
    model, rollout = large(kind, dtype=torch.float64, device=device)
    again = trajectory_logprobs(model, rollout.to(device)).cpu()
    torch.testing.assert_close(again, credited(rollout, "logprobs"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "config", [CONFIG, BUSY, grpo_with(trainable="lora")], ids=["random", "critic", "lora"]
)
def test_rounds_go_on_after_a_resume(config, device, set_up):
    steady = World(config, device=device)
    assert set_up == [device] * 4  # two generators and two reward models
    for round in range(2):
        steady.round(round)
    fresh = World(config, device=device)
    discriminator = steady.learner.discriminator
    fresh.learner.load(steady.state(), discriminator.texts(), steady.learner.numbers())
    expected = steady.round(2)
    if torch.cuda.is_available():  # its sums have no order
        assert fresh.round(2) == pytest.approx(expected, rel=1e-2, abs=1e-2)
    else:
        assert fresh.round(2) == expected and fresh.learner.numbers() == steady.learner.numbers()


def test_a_pretraining_goes_on_after_a_stop_between_readings(dataset, tmp_path, device):  # noqa: F811
    config = altered(steps=40)
    whole, _ = run(config, dataset, tmp_path / "whole", device=device)
    assert run(config, dataset, tmp_path / "cut", stop_at=33, device=device)[0] == {"stopped": 33}
    result, _ = run(config, dataset, tmp_path / "cut", device=device)
    assert result["val_nelbo_nats"] == pytest.approx(whole["val_nelbo_nats"], rel=1e-2)


@pytest.mark.parametrize("mode", ["token_classifier", "sequence_scorer"])
def test_a_teacher_s_pupils_learn(mode, dataset, tmp_path, device):  # noqa: F811
    run(altered(steps=20), dataset, tmp_path / "teacher", device=device)
    pupil = altered(mode=mode, steps=20, teacher=str(tmp_path / "teacher" / "best"))
    run(pupil, dataset, tmp_path / "pupil", device=device)


def test_an_autoregressive_model_learns(dataset, tmp_path, device):  # noqa: F811
    causal = replace(PRETRAINING.model, attention="causal", critic=False, sampler=False)
    run(replace(altered(steps=20), model=causal), dataset, tmp_path / "causal", device=device)


@pytest.mark.parametrize(
    "settings",
    [
        dict(remasking="confidence", randomness=0.5, top_p=0.9),
        dict(remasking="critic", randomness=0.3, sampler=True),
        dict(remasking="self", schedule="cosine"),
        None,
    ],
    ids=["confidence", "critic", "self", "causal"],
)
def test_texts_are_those_of_a_cpu(settings, device):
    model = make_model(20, causal=settings is None, block_size=16)
    mask = torch.ones(6, 16, dtype=torch.bool)
    mask[2, 13:] = False
    natural = Batch(torch.randint(20, (6, 16)).masked_fill(~mask, model.vocabulary.pad_id), mask)
    settings = DenoiseSection(steps=4, **(settings or {}))
    expected = complete(model, natural, settings, prompt_tokens=4, seed=1)
    assert torch.equal(complete(model.to(device), natural, settings, prompt_tokens=4, seed=1), expected)


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_a_checkpoint_is_measured_and_writes_text_on_the_device(kind, tmp_path, device, set_up):
    heads = ["model.critic=false", "model.sampler=false"] if kind == "causal" else []
    config = settings(f"run.cache={tmp_path}", f"run.output={tmp_path}", f"model.attention={kind}", *heads)
    documents = [f"{n} green bottles hanging on the wall, {n * n} in all." for n in range(400)]
    data = make_dataset(documents, config.data, tmp_path / "data")
    model = GPT(config.model, data.vocabulary, block_size=config.data.block_size)
    save_checkpoint(tmp_path / "model", model, config=to_dict(config), tokenizer=data.tokenizer)
    judge = fitted_judge(config, data.folder)
    natural = measure_natural(config, data.folder, judge)
    row = measure(config, data.folder, judge, tmp_path / "model", natural["entropy"], watched=2)
    assert set(row) > set(natural) - {"judge_bpb"}
    page = str(tmp_path / "page.html") if kind == "bidirectional" else ""
    wanted = SimpleNamespace(checkpoint=str(tmp_path / "model"), prompt="1 ", num=2, length=0, live=False, html=page)
    assert len(sample.main(config, wanted)["texts"]) == 2
    assert set_up == [device] * 4  # the judge that trains, two measurements, the sample


@pytest.mark.parametrize("sampler, reads", [(False, 1), (True, 1 + 4)])
def test_the_host_reads_once_per_call_and_once_per_wavefront(sampler, reads, elsewhere):  # noqa: F811
    model = make_model(20, block_size=16).to(elsewhere)
    seeds = row_seeds(1, 0, 0, torch.arange(6)).to(elsewhere)
    rows = torch.full((6, 16), model.vocabulary.mask_id, device=elsewhere)
    rows[:, :4] = 0
    waits.clear()
    denoise(model, rows, seeds=seeds, steps=4, remasking="random", sampler=sampler)
    assert sum(waits.values()) == reads, waits


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_the_host_waits_for_the_reward_phase_once_and_not_for_its_steps(loss, elsewhere):  # noqa: F811
    world = World(replace(CONFIG, reward=replace(CONFIG.reward, loss=loss)), device=elsewhere)
    counts = []
    world.round(0)
    for steps in (1, 5):
        waits.clear()
        world.learner.discriminator.train(1, steps)
        counts.append(sum(waits.values()))
    assert counts[0] == counts[1], waits
