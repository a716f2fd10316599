import argparse
import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from mlflow import MlflowClient

from benchmarks.adversarial import train_base
from grpo.checkpoint import save_checkpoint
from grpo.config import Config, DataSection
from grpo.config_file import load_config, to_dict
from grpo.data import make_dataset, windows
from grpo.denoise import denoise
from grpo.example_rewards import balanced_brackets, vowel_share
from grpo.model import GPT
from grpo.noise import row_seeds
from grpo.remasking import POLICIES
from grpo.tokenizer import build_tokenizer
from pipelines.evaluate import (
    SHOWN,
    SWEPT,
    VALIDATION_WINDOWS_SEED,
    Setting,
    check_splits,
    fit_judge,
    forwards,
    grid,
    main,
    measure,
    measure_natural,
    quality_table,
    reward_columns,
)
from pipelines.live_view import token_pieces
from pipelines.tracking import Tracker

torch.set_num_threads(1)
TINY = ["data.block_size=32", "grpo.prompt_tokens=8", "model.n_layer=1", "model.n_head=2", "model.n_embd=16",
        "pretrain.batch_size=8", "pretrain.eval_rows=8", "pretrain.steps=2", "evaluation.samples=24",
        "evaluation.judge_steps=2", "evaluation.judge_layers=1", "evaluation.judge_width=16", "run.threads=1"]


def settings(*overrides):
    return load_config("configs/tiny.yaml", [*TINY, *overrides])


def test_the_grid_crosses_the_lists_and_keeps_what_is_not_listed():
    lists = ["evaluation.temperature=[0.8,1.2]", "evaluation.steps=[4,8,16]", "evaluation.sampler=[false,true]"]
    config = settings(*lists, "denoise.top_p=0.9")
    found = [(each.temperature, each.steps, each.sampler) for each in grid(config)]
    assert found == list(product((0.8, 1.2), (4, 8, 16), (False, True)))
    assert {(each.top_p, each.remasking) for each in grid(config)} == {(0.9, "random")}
    assert grid(settings()) == [settings().denoise]


def test_a_grid_with_the_sampler_needs_its_head():
    with pytest.raises(ValueError, match="evaluation.sampler must be false unless model.sampler is true, got True"):
        grid(settings("evaluation.sampler=[true]", "model.sampler=false"))


@pytest.mark.parametrize("policy", POLICIES)
def test_forwards_are_those_that_denoising_takes(policy):
    config = Config()
    vocabulary = build_tokenizer("bytes").vocabulary
    torch.manual_seed(0)
    shape = replace(config.model, n_layer=1, n_head=2, n_embd=16)
    model = GPT(shape, vocabulary, block_size=16).eval()
    classifier = GPT(shape, vocabulary, mode="token_classifier", block_size=16).eval()
    passes = []
    for each in (model, classifier):
        each.trunk.register_forward_hook(lambda *_: passes.append(1))
    tokens = torch.full((3, 16), vocabulary.mask_id)
    denoise(model, tokens, seeds=row_seeds(0, 1, 0, torch.arange(3)), steps=5, remasking=policy,
            remasking_model=classifier if policy == "model" else None)
    assert len(passes) == forwards(replace(config.denoise, steps=5), policy)


def test_the_judge_and_all_models_lie_on_a_gpu_where_there_is_one(monkeypatch, tmp_path):
    config = settings(f"run.cache={tmp_path}")
    documents = [f"{n} green bottles hanging on the wall, {n * n} in all." for n in range(400)]
    dataset = make_dataset(documents, config.data, tmp_path / "data")
    model, devices = GPT(config.model, dataset.vocabulary, block_size=config.data.block_size), []
    save_checkpoint(tmp_path / "model", model, config=to_dict(config), tokenizer=dataset.tokenizer)

    def made(*_, device, **__):
        devices.append(device)
        return SimpleNamespace(eval=lambda: model, train=lambda: model, dataset=dataset, config=config)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("load_model", "load_remasking_model", "Judge"):
        monkeypatch.setattr(f"pipelines.evaluate.{name}", made)
    Setting(config, dataset.folder, fit_judge(config, dataset.folder), tmp_path / "model")
    assert devices == ["cuda"] * 4  # the judge that trains; then the judge, the generator and its re-masking model


@pytest.mark.parametrize("kind", ["critic", "no critic", "causal"])
def test_the_watched_texts_are_the_first_of_those_measured(tmp_path, kind):
    config = settings("data.layout=documents", "denoise.steps=3", f"model.critic={str(kind == 'critic').lower()}")
    documents = [f"{n} green bottles hanging on the wall, {n * n} in all."[: 12 + n % 30] for n in range(400)]
    dataset = make_dataset(documents, config.data, tmp_path / "data")
    torch.manual_seed(0)
    shape = config.model
    if kind == "causal":
        shape = replace(shape, attention="causal", sampler=False)
    model = GPT(shape, dataset.vocabulary, block_size=config.data.block_size).eval()
    save_checkpoint(tmp_path / "model", model, config=to_dict(config), tokenizer=dataset.tokenizer)
    row = measure(config, dataset.folder, tmp_path / "model", tmp_path / "model", bound=False, watched=2)
    if kind == "causal":
        assert row["denoising"] == []
        return
    setting = Setting(config, dataset.folder, tmp_path / "model", tmp_path / "model")
    texts, real = setting.texts(1.0)[:2], setting.natural.attention_mask[:2]
    assert len(row["denoising"]) == 2 and not real.all()
    for text, mask, found in zip(texts, real, row["denoising"], strict=True):
        assert found["pieces"] == token_pieces(text[mask].tolist(), dataset.tokenizer)
        assert found["steps"][:8] == [0] * 8 and set(found["steps"][8:]) <= {1, 2, 3}
        assert len(found["steps"]) == mask.sum()
        if kind == "critic":
            alone = model.critic_scores(text[mask][None]).sigmoid()[0]
            assert found["p_wrong"] == pytest.approx(alone.tolist(), abs=1e-5)
        else:
            assert found["p_wrong"] is None


def test_a_judge_is_found_again_by_runs_of_other_settings(tmp_path):
    config = settings()
    dataset = make_dataset([f"{n} times {n} is {n * n}. " for n in range(600)], config.data, tmp_path / "data").folder
    others = (["pretrain.learning_rate=1e-4", "pretrain.batch_size=4", "pretrain.log_every=3", "run.seed=2"],
              ["pretrain.warmup=7", "model.position=learned", "model.bias=true"])
    assert {fit_judge(settings(*other), dataset) for other in others} == {fit_judge(config, dataset)}
    assert fit_judge(settings("evaluation.judge_steps=3"), dataset) != fit_judge(config, dataset)


def test_measurements_that_run_at_once_share_the_cores_out(monkeypatch, tmp_path):
    config = settings("run.threads=0")
    dataset = make_dataset([f"{n} times {n} is {n * n}. " for n in range(600)], config.data, tmp_path / "data")
    judge = fit_judge(config, dataset.folder)
    assert judge.parent == tmp_path  # beside the data, from whatever folder the task runs in
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    try:
        for neighbors, threads in ((2, 4), (3, 2), (20, 1)):
            Setting(config, dataset.folder, judge, None, neighbors=neighbors)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("layout", ["blocks", "documents"])
def test_the_users_rewards_are_those_of_completions_without_prompts_and_pads(tmp_path, layout):
    names = ["grpo.example_rewards:vowel_share", "grpo.example_rewards:balanced_brackets"]
    config = settings(f'grpo.rewards={{"{names[0]}": 1.0, "{names[1]}": 0.0}}', f"data.layout={layout}")
    documents = [f"{n} bottles (and {n * n} more" + ")" * (n % 2) for n in range(600)]
    dataset = make_dataset(documents, config.data, tmp_path / "data")
    row = measure_natural(config, dataset.folder, fit_judge(config, dataset.folder))
    natural = windows(dataset, "validation", 24, 32, VALIDATION_WINDOWS_SEED)
    rows = zip(natural.tokens[:, 8:].tolist(), natural.attention_mask[:, 8:].tolist(), strict=True)
    texts = [bytes(t for t, real in zip(tokens, mask, strict=True) if real).decode() for tokens, mask in rows]
    for name, reward in zip(names, (vowel_share, balanced_brackets), strict=True):
        assert row[f"rewards/{name.replace(':', '.')}"] == pytest.approx(sum(reward(texts)) / 24, rel=1e-6)


def test_the_table_has_a_column_for_each_of_the_users_rewards(capsys):
    figures = dict.fromkeys((*SHOWN, "self_bleu"), 0.5)
    quality_table("here", {"final": figures | {"rewards/a.score": 0.123, "rewards/b.other": 0.789}})
    heads = capsys.readouterr().out
    assert " score" in heads and " other" in heads and "0.123" in heads and "0.789" in heads
    assert reward_columns({"rewards/a.f": 1, "rewards/b.f": 2, "rewards/b.g": 3}) == {
        "rewards/a.f": "rewards/a.f", "rewards/b.f": "rewards/b.f", "rewards/b.g": "g"}


def test_a_model_is_not_measured_on_text_that_it_was_trained_on(tmp_path):
    tokenizer = build_tokenizer("bytes")
    config = settings("data.source=mine.txt", "data.judge_fraction=0")
    model = GPT(config.model, tokenizer.vocabulary, block_size=config.data.block_size)
    folder = save_checkpoint(tmp_path / "model", model, config=to_dict(config), tokenizer=tokenizer)
    check_splits(folder, config.data, "--base")
    check_splits(folder, DataSection(source="another.txt"), "--base")
    told = r"^--base .*model was trained with data.judge_fraction 0.0 on this source, got 0.25: it may know the text"
    with pytest.raises(ValueError, match=told):
        check_splits(folder, DataSection(source="mine.txt"), "--base")
    with pytest.raises(ValueError, match="data.split_seed 0 on this source, got 3"):
        check_splits(folder, replace(config.data, split_seed=3), "--base")


@pytest.mark.ray
def test_two_models_are_measured_at_every_setting_beside_natural_text(ray_session, tmp_path):
    config = settings(f"run.cache={tmp_path / 'cache'}", f"run.output={tmp_path / 'runs'}",
                      "run.name=here", "evaluation.temperature=[0.02,1.0]", "evaluation.steps=[1,2]",
                      "grpo.rewards.grpo.example_rewards:vowel_share=1.0")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{n} green bottles hanging on the wall, {n * n} in all." for n in range(400)))
    config = replace(config, data=replace(config.data, source=str(text)))
    dataset = make_dataset(text.read_text().split("\n\n"), config.data, tmp_path / "data")
    for name in ("model", "base"):
        save_checkpoint(tmp_path / name, train_base(config, dataset)[0], config=to_dict(config),
                        tokenizer=dataset.tokenizer)
    args = argparse.Namespace(checkpoint=str(tmp_path / "model"), base=str(tmp_path / "base"))
    with Tracker(config.tracking, tmp_path / "runs" / "here", "here") as earlier:
        earlier.log({"model/entropy": -1.0}, 0)
        earlier_run = earlier.run_id
    main(config, args)
    run_id = json.loads((tmp_path / "runs" / "here" / "mlflow.json").read_text())["run_id"]
    first, *_ = MlflowClient(earlier.uri).get_metric_history(run_id, "model/entropy")
    assert run_id != earlier_run and (first.step, first.value > 0) == (0, True)
    summary = json.loads((tmp_path / "runs" / "here" / "summary.json").read_text())
    rows = {(row["model"], row["temperature"], row["steps"]): row for row in summary["rows"]}
    assert set(rows) == set(product(("model", "base"), (0.02, 1.0), (1, 2)))
    assert set(summary["nelbo_bpb"]) == {"model", "base"}
    assert (tmp_path / "cache" / summary["judge"] / "manifest.json").exists()
    vowels = "rewards/grpo.example_rewards.vowel_share"
    for key in (*SHOWN, "self_bleu", "c2st_ci95", vowels):
        assert rows["model", 0.02, 2][key] == rows["base", 0.02, 2][key] and key in summary["natural"]
    table = json.loads((tmp_path / "runs" / "here" / "tables" / "settings.json").read_text())
    for step, row in enumerate(table["data"]):
        told = dict(zip(table["columns"], row, strict=True))
        assert told["step"] == step and told.items() <= (summary["rows"][step] | {"step": step}).items()
        assert {"model", *SWEPT, "nfe", *SHOWN, vowels} <= told.keys()
    assert rows["model", 0.02, 2]["entropy"] < rows["model", 1.0, 2]["entropy"]
    assert load_config(tmp_path / "runs" / "here" / "config.yaml") == config
    assert (tmp_path / "runs" / "here" / "figures" / "frontier.png").stat().st_size > 10_000
