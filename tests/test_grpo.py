import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.faults import TIMES, Nodes, Run, difference, finished
from grpo.checkpoint import load_checkpoint, load_model, save_checkpoint
from grpo.config import (
    Config,
    CriticSection,
    DataSection,
    EvaluationSection,
    GrpoSection,
    ModelSection,
    PretrainSection,
    RewardSection,
    RunSection,
    SamplerSection,
)
from grpo.config_file import from_dict, load_config, save_config
from grpo.run_checkpoints import checkpoint_folder, newest_step
from pipelines.grpo import _show, main
from tests.small_gpt import make

ROOT = Path(__file__).resolve().parent.parent
ROWS = ("natural", "base", "base_matched", "final")
FIGURES = {"judge_nll", "entropy", "distinct_4", "c2st", "ngram_js"}
VOWELS = "rewards/grpo.example_rewards.vowel_share"
ROUNDS, WARMUP = 10, 2
TEXT = "".join(f"{number} times {number} is {number * number}. " for number in range(3000))


@pytest.fixture(scope="module")
def config(tmp_path_factory, ray_session):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT)
    return Config(
        run=RunSection(threads=1, output=str(folder), cache=str(folder / "cache"), name="steady", timeout_s=120),
        data=DataSection(source=str(folder / "text.txt"), block_size=20),
        model=ModelSection(n_layer=1, n_head=2, n_embd=16),
        critic=CriticSection(start=4, end=6),
        sampler=SamplerSection(start=2),
        pretrain=PretrainSection(steps=8, batch_size=8, eval_rows=8),
        grpo=GrpoSection(
            rounds=ROUNDS,
            prompts=4,
            group_size=4,
            prompt_tokens=4,
            residual=8,
            checkpoint_every=1,
            rollout_actors=1,
            learning_rate=3e-3,
            rewards={"grpo.example_rewards:vowel_share": 0.0},
        ),
        reward=RewardSection(
            hidden=16, batch_size=16, warmup_rounds=WARMUP, warmup_steps=2, min_steps=1, max_steps=2, replay_rounds=2
        ),
        evaluation=EvaluationSection(samples=40, judge_steps=8, judge_layers=1, judge_width=16),
    )


@pytest.fixture(scope="module")
def steady(config):
    """An undisturbed run, and the store of all runs of this module."""
    return main(config, None), Path(config.run.output)


def heads(folder):
    tensors = load_checkpoint(folder).tensors
    return {name: tensor for name, tensor in tensors.items() if name.startswith("heads.")}


def store(output):
    import mlflow

    return mlflow.MlflowClient(f"sqlite:///{output / 'mlflow.db'}")


def logged(output, run_id, name):
    return [point.step for point in store(output).get_metric_history(run_id, name)]


@pytest.mark.ray
def test_a_run_goes_from_text_to_figures(config, steady):
    summary, output = steady
    folder = output / "steady"
    written = json.loads((folder / "summary.json").read_text())
    for found in (summary, written):
        assert {"session_s", "nelbo_bpb", "judge_nll_gain", "mlflow_run_id", *ROWS} <= found.keys()
        assert found["rounds"] == ROUNDS
        for row in ROWS:
            assert FIGURES <= found[row].keys() and all(found[row][name] is not None for name in FIGURES)
            assert 0 <= found[row][VOWELS] < 1
    assert written["final"]["nelbo_bpb"] == written["nelbo_bpb"] > 0
    assert (output / "cache" / written["judge"] / "manifest.json").exists()
    assert Path(written["checkpoints"]["base"]) == next((output / "cache").glob("base-*")) / "best"
    assert written["base"]["temperature"] == 1.0 and written["natural"]["judge_nll"] < written["base"]["judge_nll"]
    assert logged(output, written["mlflow_run_id"], f"final/{VOWELS}") == [ROUNDS + WARMUP]
    assert bool(written["weak_judge"]) == (written["natural"]["judge_bpb"] > written["base"]["nelbo_bpb"])
    error, entropy = (written[row][name] for row, name in (("base_matched", "entropy_error"), ("final", "entropy")))
    assert (written["judge_nll_gain"] is not None) == (abs(error) <= 0.01 * entropy)
    gained = logged(output, written["mlflow_run_id"], "judge_nll_gain")
    assert gained == ([] if written["judge_nll_gain"] is None else [ROUNDS + WARMUP])
    artifacts = {each.path for each in store(output).list_artifacts(written["mlflow_run_id"])}
    assert "model" in artifacts and "checkpoint" not in artifacts  # the weights travel once
    for name, count in (("reward_accuracy", ROUNDS + WARMUP), ("kl", ROUNDS)):
        steps = logged(output, written["mlflow_run_id"], name)
        assert steps == list(range(ROUNDS + WARMUP - count + 1, ROUNDS + WARMUP + 1))
    assert {path.name for path in (folder / "figures").iterdir()} == {"rounds.png", "denoising.png"}
    final = load_model(folder / "final")
    base = load_model(next((output / "cache").glob("base-*")) / "best")
    for name, tensor in base.trunk.state_dict().items():
        assert final.trunk.state_dict()[name].equal(tensor), name
    assert not final.heads["lm"].weight.equal(base.heads["lm"].weight)
    assert newest_step(folder) == ROUNDS + WARMUP
    for saved in (load_config(folder / "config.yaml"), from_dict(load_checkpoint(folder / "final").config)):
        assert saved.tracking == config.tracking  # the store of this machine is not the next one's


@pytest.mark.ray
def test_a_run_whose_driver_is_killed_ends_as_the_undisturbed_one(config, steady, tmp_path):
    import ray

    undisturbed, output = steady
    killed = replace(config, run=replace(config.run, name="killed"))
    folder = output / "killed"
    save_config(killed, tmp_path / "config.yaml")
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen(
        [sys.executable, str(ROOT / "pipelines/grpo.py"), "--config", str(tmp_path / "config.yaml")],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 150
    while newest_step(folder) < 4 and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL, driver.stderr.read()
    driver.stderr.close()
    assert 4 <= newest_step(folder) < ROUNDS + WARMUP and not (folder / "summary.json").exists()

    summary = main(killed, None)
    assert summary["mlflow_run_id"] != undisturbed["mlflow_run_id"]
    for name, first in (("reward_accuracy", 1), ("kl", WARMUP + 1)):
        assert logged(output, summary["mlflow_run_id"], name) == list(range(first, ROUNDS + WARMUP + 1))
    assert logged(output, summary["mlflow_run_id"], "parameters/trainable") == [0]  # by both processes, kept once
    expected, found = heads(output / "steady" / "final"), heads(folder / "final")
    assert expected.keys() == found.keys() and all(found[name].equal(expected[name]) for name in expected)
    for row in ROWS:
        assert {k: summary[row][k] for k in FIGURES} == {k: undisturbed[row][k] for k in FIGURES}


@pytest.mark.ray
def test_two_ranks_run_as_one(config, steady):
    _, output = steady
    pair = replace(config.grpo, num_workers=2, rollout_actors=2)
    main(replace(config, run=replace(config.run, name="pair"), grpo=pair), None)
    alone, both = finished(output / "steady"), finished(output / "pair")
    for name, value in alone["heads"].items():
        # a hundredth of a step: AdamW's steps are of full size, also where a gradient all but cancels
        atol = 0.01 * config.grpo.learning_rate
        torch.testing.assert_close(both["heads"][name], value, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    for mine, theirs in zip(alone["history"], both["history"], strict=True):
        same = {name: value for name, value in mine.items() if not name.startswith(TIMES)}
        assert {name: theirs[name] for name in same} == pytest.approx(same, rel=1e-5, abs=1e-6)


@pytest.mark.ray
def test_a_result_is_the_base_of_more_rounds_with_its_own_residual_only(config, steady):
    base = str(Path(config.run.output) / "steady")
    grpo, run = replace(config.grpo, base=base, rounds=1), replace(config.run, name="further")
    for residual in (0, 16):
        with pytest.raises(ValueError, match=f"^grpo.residual must be 8, as in grpo.base {base}.*, got {residual}$"):
            main(replace(config, run=run, grpo=replace(grpo, residual=residual)), None)
    assert main(replace(config, run=run, grpo=grpo), None)["rounds"] == 1


def test_the_closing_lines_speak_of_the_users_reward_before_the_likelihood(config, capsys):
    figures = {"judge_nll": 4.0, "entropy": 2.5, "temperature": 2.0, "c2st": 0.5, "c2st_ci95": (0.4, 0.6),
               "samples": [["a", "b"]], "rewards/mine.score": 0.25}
    rows = {row: dict(figures) for row in ROWS}
    rows["final"]["rewards/mine.score"] = 0.75
    _show(config, Path("runs/here"), rows, {"session_s": 1.0, "judge_nll_gain": 0.125})
    told = capsys.readouterr().out
    assert "at the same token entropy: 0.125 nats per token better\n" in told
    line = "score of the final model: 0.75; of its base 0.25, at the same token entropy 0.25; of natural text 0.25"
    assert 0 < told.index(line) < told.index("judge NLL of the final model")
    rows["final"]["entropy"] = 2.75
    _show(config, Path("runs/here"), rows, {"session_s": 1.0, "judge_nll_gain": None})
    told = capsys.readouterr().out
    assert "of its base 0.25, at the nearest token entropy 0.25; of natural text 0.25" in told
    assert ("at the same token entropy: not matched: the final model's token entropy is 2.750 nats, the base's nearest "
            "2.500 at temperature 2\n") in told


@pytest.mark.parametrize("rewards, message", [
    ('{"nowhere:score": 1}', "got 'nowhere:score': no module nowhere in the current folder or PYTHONPATH"),
    ('{"nowhere": 1}', "grpo.rewards must be keyed by module:function, got 'nowhere'"),
])
def test_a_reward_that_nobody_has_is_said_before_anything_starts(tmp_path, rewards, message):
    command = [sys.executable, str(ROOT / "pipelines/grpo.py"), f"grpo.rewards={rewards}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert not (tmp_path / "runs").exists()


def test_fewer_rounds_than_a_run_has_done_is_said_before_anything_starts(tmp_path):
    folder = tmp_path / "longer"
    save_checkpoint(checkpoint_folder(folder / "checkpoints", 12), make(), config={})
    config = Config(
        run=RunSection(output=str(tmp_path), cache=str(tmp_path / "cache"), name="longer"),
        grpo=GrpoSection(rounds=9),
        reward=RewardSection(warmup_rounds=2),
    )
    with pytest.raises(ValueError, match=f"^grpo.rounds must be at least 10, the rounds that {folder} holds, got 9: "):
        main(config, None)
    assert not (tmp_path / "cache").exists() and not (folder / "config.yaml").exists()


@pytest.mark.ray
def test_a_run_on_a_cluster_outlives_the_node_of_its_learner(config, steady, tmp_path):
    """Three nodes on this machine; the one with the Train worker, and the actors beside it, is killed mid-run."""
    undisturbed, output = steady
    save_config(replace(config, run=replace(config.run, name="outlived")), tmp_path / "config.yaml")
    nodes = Nodes()
    try:
        run = Run(nodes, output / "outlived", ["--config", str(tmp_path / "config.yaml")])
        run.wait_for_round(4)
        nodes.kill(nodes.of(nodes.processes("learner")[0]))
        found = run.finish()
    finally:
        nodes.cluster.shutdown()
    assert difference(found, finished(output / "steady")) == 0
    for name, first in (("reward_accuracy", 1), ("kl", WARMUP + 1)):
        assert logged(output, found["summary"]["mlflow_run_id"], name) == list(range(first, ROUNDS + WARMUP + 1))
    for row in ROWS:
        assert {k: found["summary"][row][k] for k in FIGURES} == {k: undisturbed[row][k] for k in FIGURES}
