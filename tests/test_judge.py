from dataclasses import replace

import pytest
import torch

from actors.judge import Judge, judge_config
from grpo.config import (
    Config,
    DataSection,
    DenoiseSection,
    EvaluationSection,
    GrpoSection,
    ModelSection,
    PretrainSection,
    RewardSection,
)
from grpo.data import Cursor, make_dataset, windows
from grpo.text_quality import judge_nll

torch.set_num_threads(1)
CONFIG = Config(
    data=DataSection(block_size=16, judge_fraction=0.4, validation_fraction=0.2),
    model=ModelSection(n_layer=3, n_head=2, n_embd=24),
    denoise=DenoiseSection(remasking="critic", sampler=True),
    grpo=GrpoSection(prompt_tokens=4),
    pretrain=PretrainSection(batch_size=16, warmup=10, num_workers=2, learning_rate=1e-2),
    evaluation=EvaluationSection(judge_steps=60, judge_layers=1, judge_width=16),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    documents = ["".join("abcdefgh"[(i * 5 + j * 3) % 8] for j in range(200)) for i in range(30)]
    return make_dataset(documents, CONFIG.data, tmp_path_factory.mktemp("data") / "x")


def test_the_judge_is_a_causal_model_of_its_own_size():
    config = judge_config(CONFIG)
    assert (config.model.attention, config.model.n_layer, config.model.n_embd) == ("causal", 1, 16)
    assert not (config.model.critic or config.model.sampler or config.denoise.sampler)
    assert (config.pretrain.steps, config.pretrain.num_workers, config.pretrain.warmup) == (60, 1, 7)


def test_a_judge_fits_beside_any_generator():
    of_generator = replace(
        CONFIG,
        model=replace(CONFIG.model, n_head=20, n_embd=320),
        grpo=replace(CONFIG.grpo, trainable="lora", replay_steps=2),
        reward=RewardSection(layers=(3,)),
    )
    assert judge_config(of_generator).model.n_head == CONFIG.evaluation.judge_heads


@pytest.mark.parametrize("section, settings", [
    ("pretrain", {"learning_rate": 1e-3, "batch_size": 8, "warmup": 3, "dtype": "bfloat16", "log_every": 7}),
    ("model", {"position": "learned", "bias": True, "dropout": 0.1}),
    ("loss", {"objective": "mdlm"}),
    ("run", {"seed": 5}),
])
def test_the_judge_is_the_same_whatever_trains_the_generator(dataset, section, settings):
    other = replace(CONFIG, **{section: replace(getattr(CONFIG, section), **settings)})
    judges = [Judge(config, dataset, threads=1) for config in (CONFIG, other)]
    for judge in judges:
        judge.config = replace(judge.config, pretrain=replace(judge.config.pretrain, steps=2))
        assert list(judge.train()) == [1, 2]
    first, second = (judge.model.state_dict() for judge in judges)
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_the_judge_reads_its_own_split_alone_and_learns(dataset, monkeypatch):
    splits = []

    def cursor(dataset, split, *rest):
        splits.append(split)
        return Cursor(dataset, split, *rest)

    monkeypatch.setattr("actors.judge.Cursor", cursor)
    judge = Judge(replace(CONFIG, evaluation=replace(CONFIG.evaluation, judge_steps=250)), dataset, threads=1)
    validation = windows(dataset, "validation", 16, 16, 0).tokens
    before = float(judge_nll(judge.model, validation, 4, None))
    assert list(judge.train()) == list(range(1, 251)) and splits == ["judge"]
    assert before > 4.5 and float(judge_nll(judge.model, validation, 4, None)) < 1.5 and not judge.model.training
