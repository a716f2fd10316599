import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import pipelines.grpo
from grpo.checkpoint import load_checkpoint
from grpo.config import (
    ClusterSection,
    Config,
    CriticSection,
    DataSection,
    EvaluationSection,
    GrpoSection,
    ModelSection,
    PretrainSection,
    RewardSection,
    RunSection,
    SweepSection,
)
from grpo.config_file import from_dict, load_config, save_config, with_values
from grpo.files import write_json
from pipelines.progress import Display
from pipelines.sweep import (
    _news,
    _own_bases,
    _searcher,
    best_trial,
    check_objective,
    check_space,
    main,
    num_trials,
    read_trials,
)
from pipelines.trial import MEASURED, PRETRAINED, Shared, Trial, new_record, trial_folder

ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(f"{number} times {number} is {number * number}. " for number in range(3000))
ALPHAS, RATES = (0.0, 0.7), (3e-3, 1e30)
SPACE = {"critic.alpha": {"grid": [*ALPHAS]}, "pretrain.learning_rate": {"grid": [*RATES]}}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps")
    (folder / "text.txt").write_text(TEXT)
    return Config(
        run=RunSection(threads=1, output=str(folder), cache=str(folder / "cache"), name="killed", timeout_s=120),
        data=DataSection(source=str(folder / "text.txt"), block_size=20),
        model=ModelSection(n_layer=1, n_head=2, n_embd=16, sampler=False),
        critic=CriticSection(start=4, end=6),
        pretrain=PretrainSection(steps=8, batch_size=8, eval_rows=8, log_every=1, checkpoint_every=4),
        grpo=GrpoSection(
            rounds=3, prompts=4, group_size=4, prompt_tokens=4, residual=8, rollout_actors=1, learning_rate=3e-3
        ),
        reward=RewardSection(
            hidden=16, batch_size=16, warmup_rounds=1, warmup_steps=2, min_steps=1, max_steps=2, replay_rounds=2
        ),
        evaluation=EvaluationSection(samples=40, judge_steps=8, judge_layers=1, judge_width=16),
        sweep=SweepSection(space=SPACE, asha=False, stretches=2),
    )


@pytest.fixture(scope="module")
def swept(config, ray_session, tmp_path_factory):
    """A sweep whose driver is killed when a trial has finished, and the same sweep, gone on with to its end."""
    import ray

    file, folder = tmp_path_factory.mktemp("config") / "config.yaml", Path(config.run.output) / config.run.name
    save_config(config, file)
    driver = subprocess.Popen(
        [sys.executable, str(ROOT / "pipelines/sweep.py"), "--config", str(file)],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline, before = time.monotonic() + 400, []
    while not any(t["status"] == "finished" for t in before) and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
        before = read_trials(folder)
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL, driver.stderr.read()
    driver.stderr.close()
    assert not (folder / "summary.json").exists()
    return before, main(config, None), folder


@pytest.mark.ray
def test_a_killed_sweep_goes_on_and_no_trial_is_lost_or_begun_again(swept):
    before, summary, folder = swept
    after = {trial["trial"]: trial for trial in read_trials(folder)}
    points = [{"critic.alpha": alpha, "pretrain.learning_rate": rate} for rate in RATES for alpha in ALPHAS]
    assert after.keys() == {trial_folder(folder, point).name for point in points}
    assert summary["trials"] == {"finished": 2, "failed": 2}
    for trial in before:
        assert after[trial["trial"]]["started"] == trial["started"]
        if trial["status"] != "running":
            assert after[trial["trial"]] == trial


@pytest.mark.ray
def test_trials_are_nested_runs_with_the_swept_keys_as_params_and_no_step_twice(swept, config):
    import mlflow

    _, summary, folder = swept
    client = mlflow.MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    parent = client.get_run(summary["mlflow_run_id"])
    found = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert {run.info.run_name: run.data.params for run in found} == {
        trial["trial"]: {key: str(value) for key, value in trial["values"].items()} for trial in read_trials(folder)
    }
    for run in found:
        if run.info.run_name == summary["best"]["trial"]:
            expected = {"pretrain/loss_unmask": range(1, 9), "kl": range(2, 5), "reward_accuracy": range(1, 5)}
            for name, steps in expected.items():
                assert [point.step for point in client.get_metric_history(run.info.run_id, name)] == [*steps], name
    for made in ("base/best", "final"):
        saved = load_checkpoint(folder / "trials" / summary["best"]["trial"] / made)
        assert from_dict(saved.config).tracking == config.tracking


@pytest.mark.ray
def test_a_failed_trial_is_reported_with_its_reason(swept):
    _, _, folder = swept
    for trial in read_trials(folder):
        failed = trial["values"]["pretrain.learning_rate"] == 1e30
        assert (trial["status"] == "failed") == failed
        assert not failed or "became" in trial["reason"] and "\n" not in trial["reason"]
    rows = json.loads((folder / "tables" / "trials.json").read_text())["data"]
    assert [row[-1].partition(":")[0] for row in rows] == ["finished", "finished", "failed", "failed"]


@pytest.fixture
def shared(config, tmp_path):
    """What trials share that never come to their data."""
    return Shared(config=config, folder=tmp_path, dataset=tmp_path, judge=tmp_path, base=None, trunk=None, entropy=0.0,
                  tracking=config.tracking, mlflow_run=None, board=None, device="cpu", neighbors=1)


def test_values_that_only_together_are_refused_fail_one_trial(shared):
    for error in (ValueError, RuntimeError):  # Tune tries again, and reads the reason off the record
        trial = Trial(shared, {"critic.start": 9, "critic.end": 7})
        with pytest.raises(error, match="critic.start must be between 0 and critic.end"):
            trial.step()
        trial.close()
    (record,) = read_trials(shared.folder)
    assert record["status"] == "failed" and "critic.start must be" in record["reason"]


def test_a_trial_that_died_before_its_first_word_is_on_record(shared):
    ended = SimpleNamespace(config={"critic.start": 9, "critic.end": 7})
    _news(shared, Display(), 1).on_trial_error(0, [ended], ended)
    (record,) = read_trials(shared.folder)
    assert (record["status"], record["values"]) == ("failed", ended.config) and "died" in record["reason"]


@pytest.mark.parametrize("status", ["finished", "running", "failed"])
def test_a_trial_that_is_over_for_good_keeps_its_models_alone(shared, status):
    values = {"critic.alpha": 0.5}
    folder = trial_folder(shared.folder, values)
    for made in ("base/best", "base/checkpoints", "final", "checkpoints"):
        (folder / made).mkdir(parents=True)
    known = {"status": status, "reason": "", "reports": [{shared.config.sweep.objective: 1.0}]}
    write_json(folder / "trial.json", new_record(folder, values) | known)
    ended = SimpleNamespace(config=values, last_result={"training_iteration": 1})
    _news(shared, Display(), 1).on_trial_complete(0, [ended], ended)
    (record,) = read_trials(shared.folder)
    assert record["status"] == ("stopped" if status == "running" else status)  # by ASHA
    kept = {path.name for path in folder.glob("**/*") if path.is_dir()}
    assert kept == {"base", "best", "final"} | ({"checkpoints"} if status == "failed" else set())


@pytest.mark.ray
def test_the_best_config_makes_the_same_generator_in_grpo(swept, config, tmp_path):
    _, summary, folder = swept
    best = load_config(folder / "best.yaml", [f"run.output={tmp_path}", "run.name=again"])
    assert best.critic.alpha == summary["best"]["values"]["critic.alpha"] and best.sweep == SweepSection()
    pipelines.grpo.main(best, None)
    trial = folder / "trials" / summary["best"]["trial"]
    expected, made = (load_checkpoint(path / "final").tensors for path in (trial, tmp_path / "again"))
    assert expected.keys() == made.keys() and all(made[name].equal(expected[name]) for name in expected)


@pytest.mark.ray
def test_trials_share_a_base_that_no_swept_key_decides(swept, config):
    _, summary, folder = swept
    base = folder / "trials" / summary["best"]["trial"] / "base"
    sweep = SweepSection(space={"grpo.kl": {"uniform": [0.0, 0.1]}}, search="tpe", trials=1, stretches=1)
    shared = replace(
        config,
        run=replace(config.run, name="shared"),
        grpo=replace(config.grpo, base=str(base / "best"), rounds=1),
        sweep=sweep,
    )
    main(shared, None)
    with pytest.raises(ValueError, match="a run with evaluation.samples=40, not 41: choose another run.name"):
        main(replace(shared, evaluation=replace(config.evaluation, samples=41)), None)
    (trial,) = read_trials(folder.parent / "shared")
    assert trial["status"] == "finished" and len(trial["reports"]) == 2
    assert not (folder.parent / "shared" / "trials" / trial["trial"] / "base").exists()
    final = folder.parent / "shared" / "trials" / trial["trial"] / "final"
    first, last = (load_checkpoint(path).tensors for path in (base / "best", final))
    trunk = [name for name in first if name.startswith("trunk.")]
    assert trunk and all(last[name].equal(first[name]) for name in trunk)
    write_json(
        folder.parent / "shared" / "trials" / trial["trial"] / "trial.json",
        {**trial, "status": "stopped", "reason": "by ASHA", "reports": trial["reports"][:1]},
    )
    shutil.rmtree(final)
    main(shared, None)  # in which ASHA lets it go on
    (again,) = read_trials(folder.parent / "shared")
    assert again["status"] == "finished" and "reason" not in again and len(again["reports"]) == 2
    assert all(tensor.equal(last[name]) for name, tensor in load_checkpoint(final).tensors.items())
    another = replace(shared, run=replace(config.run, name="another"))
    with pytest.raises(ValueError, match=f"^grpo.residual must be 8, as in grpo.base {final}, got 16$"):
        main(replace(another, grpo=replace(shared.grpo, base=str(final), residual=16)), None)


@pytest.mark.ray
def test_every_report_has_the_figures_that_an_objective_may_name(swept):
    _, _, folder = swept
    finished, named = [each for each in read_trials(folder) if each["reports"]], {*MEASURED, *PRETRAINED}
    assert len(finished) == 2
    for first, *others in (trial["reports"] for trial in finished):
        assert named - first.keys() <= {"critic_auroc", "critic_ece"}  # the critic of so short a training saw no error
        assert first.keys() <= named and all(first.keys() <= other.keys() for other in others)


def test_an_objective_that_no_report_has_is_refused_before_anything_starts(config, tmp_path):
    for space, objective, allowed in (
        ({}, "judge_nll_matched", True),
        ({}, "val_bpb", True),
        ({"grpo.kl": {"uniform": [0.0, 0.1]}}, "val_bpb", False),
        ({}, "judge_nll", False),
    ):
        run = replace(config.run, output=str(tmp_path))
        swept = replace(config, run=run, sweep=SweepSection(space=space, objective=objective))
        if allowed:
            check_objective(swept)
            continue
        with pytest.raises(ValueError, match=f"^sweep.objective must be one of judge_nll_matched, .*got '{objective}'"):
            main(swept, None)
        assert not list(tmp_path.iterdir())


@pytest.mark.ray
def test_trials_that_the_cluster_cannot_hold_are_said_and_not_waited_for(config, ray_session, tmp_path):
    swept = replace(config, cluster=ClusterSection(learner_cpus=99), run=replace(config.run, output=str(tmp_path)))
    with pytest.raises(ValueError, match="cluster.learner_cpus must together be at most .* got 99"):
        main(swept, None)


def test_grids_are_crossed_and_times_what_is_drawn():
    grids = {"grpo.kl": {"grid": [0.1, 0.2]}, "grpo.prompts": {"grid": [8, 16, 32]}}
    assert num_trials(SweepSection(space=grids, trials=5)) == 6
    assert num_trials(SweepSection(space=grids | {"critic.alpha": {"uniform": [0, 1]}}, trials=5)) == 30


def test_only_keys_of_pretraining_cost_a_base_each(config):
    for key, decides in (("critic.alpha", True), ("mask_bias.k_i", True), ("grpo.kl", False), ("run.seed", True)):
        kind = {"choice": [1, 2]} if key == "run.seed" else {"uniform": [0.1, 0.2]}
        swept = replace(config, sweep=SweepSection(space={key: kind}))
        assert _own_bases(swept) is decides, key


@pytest.mark.parametrize(
    "space, words",
    [
        ({"critic.alfa": {"uniform": [0, 1]}}, ["critic.alfa", "did you mean critic.alpha"]),
        ({"critic.alpha": {"uniform": [-1, 1]}}, ["critic.alpha", "0 or more", "-1"]),
        ({"data.block_size": {"choice": [32]}}, ["data.block_size", "what all trials share"]),
        ({"run.name": {"choice": ["a"]}}, ["run.name", "what all trials share"]),
        ({"grpo.base": {"choice": ["a", "b"]}}, ["sweep.space.grpo.base", "what all trials share"]),
        ({"grpo.num_workers": {"choice": [1, 2]}}, ["sweep.space.grpo.num_workers", "what all trials share"]),
        ({"grpo.rollout_actors": {"grid": [1, 2]}}, ["sweep.space.grpo.rollout_actors", "what all trials share"]),
        ({"grpo.group_size": {"uniform": [2.5, 8]}}, ["grpo.group_size", "2.5"]),
    ],
)
def test_a_space_that_no_trial_can_take_is_one_line(config, space, words):
    with pytest.raises(ValueError) as error:
        check_space(replace(config, sweep=SweepSection(space=space)))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_no_key_of_pretraining_is_swept_over_a_given_base(config):
    based = replace(config, grpo=replace(config.grpo, base="runs/base"))
    for key, refused in (("pretrain.learning_rate", True), ("model.dropout", True), ("critic.alpha", False)):
        swept = replace(based, sweep=SweepSection(space={key: {"uniform": [0.1, 0.2]}}))
        if not refused:
            check_space(swept)
            continue
        with pytest.raises(ValueError, match=f"sweep.space.{key} must be left out where grpo.base is given"):
            check_space(swept)


@pytest.mark.parametrize(
    "override, words",
    [
        ("sweep.space={critic.alpha: 3}", ["sweep.space.critic.alpha", "one range"]),
        ("sweep.space={critic.alpha: {uniform: [1, 1]}}", ["low below high"]),
        ("sweep.space={critic.alpha: {loguniform: [0, 1]}}", ["above 0"]),
        ("sweep.search=grid", ["sweep.search", "random, tpe", "grid"]),
        ("sweep.trials=0", ["sweep.trials", "at least 1"]),
    ],
)
def test_a_bad_range_is_one_line(override, words):
    with pytest.raises(ValueError) as error:
        load_config(None, [override])
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_tpe_is_told_what_is_known_and_then_draws_what_is_new(config):
    space = {"critic.alpha": {"uniform": [0.0, 1.0]}, "grpo.group_size": {"uniform": [2, 8]}}
    swept = replace(config, sweep=SweepSection(space=space, search="tpe"))

    def suggestions(known, count):
        from pipelines.sweep import _domains

        searcher = _searcher(swept, known)
        searcher.set_search_properties("judge_nll_matched", "min", _domains(swept))
        return [searcher.suggest(str(index)) for index in range(count)]

    first = suggestions([], 3)
    assert all(isinstance(each["grpo.group_size"], int) for each in first)
    again = suggestions(first, 5)
    assert again[:3] == first and not any(new in first for new in again[3:])


@pytest.mark.parametrize("given", [{}, {"grpo.example_rewards:vowel_share": 1.0}])
@pytest.mark.parametrize("kind", ["uniform", "loguniform"])
def test_the_weight_of_a_user_s_reward_has_a_domain(config, given, kind):
    from pipelines.sweep import _domains

    key = "grpo.rewards.grpo.example_rewards:vowel_share"
    space = {key: {kind: [0.1, 1.0]}}
    swept = replace(config, sweep=SweepSection(space=space), grpo=replace(config.grpo, rewards=given))
    check_space(swept)
    assert 0.1 <= _domains(swept)[key].sample() <= 1.0


def test_a_reward_that_nobody_has_is_said_before_a_sweep_prepares_anything(config):
    space = {"grpo.rewards.grpo.example_rewards:vowels": {"uniform": [0.0, 1.0]}}
    with pytest.raises(ValueError, match="has no function vowels; did you mean vowel_share"):
        main(replace(config, sweep=SweepSection(space=space)), None)


def test_the_best_trial_is_the_best_among_the_finished():
    trials = [
        {"status": status, "reports": [{"x": value}]}
        for status, value in (("finished", 2.0), ("stopped", 0.0), ("finished", 1.0), ("finished", 3.0))
    ]
    assert best_trial(trials, SweepSection(objective="x"))["reports"] == [{"x": 1.0}]
    assert best_trial(trials, SweepSection(objective="x", mode="max"))["reports"] == [{"x": 3.0}]
    assert best_trial(trials[1:2], SweepSection(objective="x")) is None


def test_a_value_lands_at_its_key(config):
    assert with_values(config, {"critic.alpha": 0.25}, "x").critic == replace(config.critic, alpha=0.25)
