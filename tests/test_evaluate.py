import argparse
import json
import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from mlflow import MlflowClient

from benchmarks.adversarial import train_base
from grpo.checkpoint import save_checkpoint
from grpo.config_file import load_config, to_dict
from grpo.data import make_dataset
from grpo.model import GPT
from grpo.tokenizer import build_tokenizer
from pipelines.evaluate import SHOWN, SWEPT, check_model, grid, main, quality_table, reward_columns
from pipelines.tracking import Tracker
from tests.test_measurements import settings

torch.set_num_threads(1)


def test_the_grid_crosses_the_lists_and_keeps_what_is_not_listed():
    lists = ["evaluation.temperature=[0.8,1.2]", "evaluation.steps=[4,8,16]", "evaluation.sampler=[false,true]"]
    config = settings(*lists, "denoise.top_p=0.9")
    found = [(each.temperature, each.steps, each.sampler) for each in grid(config)]
    assert found == list(product((0.8, 1.2), (4, 8, 16), (False, True)))
    assert {(each.top_p, each.remasking) for each in grid(config)} == {(0.9, "random")}
    assert grid(settings()) == [settings().denoise]


@pytest.mark.parametrize("option", ["--checkpoint", "--base"])
@pytest.mark.parametrize("changes, section, message", [
    ((), dict(sampler=False), "has no sampler head: denoise.sampler and evaluation.sampler must be false"),
    ((), dict(critic=False), "denoise.remasking=critic needs a generator with model.critic=true"),
    (("data.block_size=64",), {}, "data.block_size must be at most 32, that of {option} {folder}, got 64"),
    ((), "token_classifier", "{option} {folder} is a token_classifier: give that of a generator"),
    ((), "bpe", "{option} {folder} reads other tokens than the data: "),
])
def test_a_model_that_cannot_be_measured_is_said_first(option, changes, section, message, tmp_path):
    config = settings("evaluation.sampler=[false,true]", "evaluation.remasking=[random,critic]", *changes)
    dataset = make_dataset(["some words of text " * 4000], config.data, tmp_path / "data")
    tokenizer = build_tokenizer("bpe:300", ["some words of text"]) if section == "bpe" else dataset.tokenizer
    model = replace(config.model, **(section if isinstance(section, dict) else {}))
    mode = section if section == "token_classifier" else "language_model"
    folder = save_checkpoint(tmp_path / "model", GPT(model, tokenizer.vocabulary, block_size=32, mode=mode), config={},
                             tokenizer=tokenizer)
    with pytest.raises(ValueError, match=re.escape(message.format(option=option, folder=folder))):
        check_model(option, folder, config, dataset)


def test_the_table_has_a_column_for_each_of_the_users_rewards(capsys):
    figures = dict.fromkeys(SHOWN, 0.5) | {"c2st_ci95": (0.4, 0.62)}
    quality_table("here", {"final": figures | {"rewards/a.score": 0.123, "rewards/b.other": 0.789}})
    heads = capsys.readouterr().out
    assert "0.500 +- 0.110" in heads
    assert " score" in heads and " other" in heads and "0.123" in heads and "0.789" in heads
    assert reward_columns({"rewards/a.f": 1, "rewards/b.f": 2, "rewards/b.g": 3}) == {
        "rewards/a.f": "rewards/a.f", "rewards/b.f": "rewards/b.f", "rewards/b.g": "g"}


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
    params = MlflowClient(earlier.uri).get_run(run_id).data.params
    assert {name: params[f"checkpoints.{name}"] for name in ("model", "base")} == {
        name: str(tmp_path / name) for name in ("model", "base")}
    summary = json.loads((tmp_path / "runs" / "here" / "summary.json").read_text())
    rows = {(row["model"], row["temperature"], row["steps"]): row for row in summary["rows"]}
    assert set(rows) == set(product(("model", "base"), (0.02, 1.0), (1, 2)))
    assert set(summary["nelbo_bpb"]) == {"model", "base"}
    assert bool(summary["weak_judge"]) == (summary["natural"]["judge_bpb"] > min(summary["nelbo_bpb"].values()))
    assert (tmp_path / "cache" / summary["judge"] / "manifest.json").exists()
    vowels = "rewards/grpo.example_rewards.vowel_share"
    for key in (*SHOWN, "c2st_ci95", vowels):
        assert rows["model", 0.02, 2][key] == rows["base", 0.02, 2][key] and key in summary["natural"]
    table = json.loads((tmp_path / "runs" / "here" / "tables" / "settings.json").read_text())
    for step, row in enumerate(table["data"]):
        told = dict(zip(table["columns"], row, strict=True))
        assert told["step"] == step and told.items() <= (summary["rows"][step] | {"step": step}).items()
        assert {"model", *SWEPT, "nfe", *SHOWN, "c2st_ci95", vowels} <= told.keys()
    (bound,) = MlflowClient(earlier.uri).get_metric_history(run_id, "base/nelbo_nats")
    assert bound.value == pytest.approx(rows["base", 0.02, 1]["nelbo_nats"]) and rows["base", 0.02, 1]["nelbo_se"] > 0
    assert rows["model", 0.02, 2]["entropy"] < rows["model", 1.0, 2]["entropy"]
    assert load_config(tmp_path / "runs" / "here" / "config.yaml") == config
    assert (tmp_path / "runs" / "here" / "figures" / "frontier.png").stat().st_size > 10_000
