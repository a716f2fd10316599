import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from actors.pretrainer import Pretrainer
from grpo.checkpoint import load_checkpoint, load_model
from grpo.config import (
    Config,
    CorruptionSection,
    CriticSection,
    DataSection,
    GrpoSection,
    LossSection,
    ModelSection,
    PretrainSection,
    RunSection,
    SamplerSection,
)
from grpo.config_file import load_config, save_config, to_dict
from grpo.data import make_dataset, open_dataset
from grpo.run_checkpoints import newest_step
from pipelines.prepare import prepare
from pipelines.pretrain import pretrain, what_decides
from pipelines.pretrain_loop import PretrainJob, _resume, make_trainer, read_curve, train
from pipelines.ranks import Ranks, check_shared

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(f"{number} times {number} is {number * number}. " for number in range(3000))
CONFIG = Config(
    run=RunSection(threads=1), data=DataSection(block_size=16),
    model=ModelSection(n_layer=1, n_head=2, n_embd=16, dropout=0.1), grpo=GrpoSection(prompt_tokens=4),
    corruption=CorruptionSection(proofreading_warmup=30), loss=LossSection(masking_warmup=30),
    critic=CriticSection(start=20, end=40), sampler=SamplerSection(start=10),
    pretrain=PretrainSection(steps=60, batch_size=8, learning_rate=3e-3, warmup=5, eval_every=20, eval_rows=8,
                             checkpoint_every=15, log_every=10))


def altered(config=CONFIG, **pretrain):
    return replace(config, pretrain=replace(config.pretrain, **pretrain))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset([TEXT], CONFIG.data, tmp_path_factory.mktemp("data") / "set").folder


def run(config, dataset, folder, stop_at=None, **ranks):
    """The loop alone, without Ray; returns its figures and what it logged."""
    logged = []
    job = PretrainJob(config=config, dataset=dataset, folder=folder)
    result = train(job, Ranks(**ranks), lambda done, figures: done == stop_at,
                   lambda figures, step: logged.append((step, figures)))
    return result, logged


def tensors(folder):
    checkpoint = load_checkpoint(folder)
    return {**checkpoint.tensors, **checkpoint.state.get("optimizer", {})}


def same_bits(left, right):
    left, right = tensors(left), tensors(right)
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def untimed(logged):
    return [(step, {k: v for k, v in figures.items() if k != "tokens_per_s"}) for step, figures in logged]


def test_stopped_anywhere_and_resumed_is_bitwise_the_undisturbed_run(dataset, tmp_path):
    whole, logged = run(CONFIG, dataset, tmp_path / "whole")
    for stop in (0, 7, 20, 33, 59):
        first, before = run(CONFIG, dataset, tmp_path / str(stop), stop_at=stop)
        assert first == {"stopped": stop}
        torch.manual_seed(stop)  # whatever else draws numbers
        result, after = run(CONFIG, dataset, tmp_path / str(stop))
        for name in ("best", "checkpoints/step-00000060"):
            assert same_bits(tmp_path / "whole" / name, tmp_path / str(stop) / name)
        assert untimed(after) == untimed(logged) and untimed(before) == untimed(logged)[: len(before)], stop
        assert {k: v for k, v in result.items() if not k.endswith("_s")} == {
            k: v for k, v in whole.items() if not k.endswith("_s")}


def test_a_rank_resumes_where_rank_0_does(dataset, tmp_path):
    run(CONFIG, dataset, tmp_path, stop_at=33)  # checkpoints 30 and 33
    asked = []

    def beside(rank_0):  # a second rank's reductions, where the first one's newest checkpoint is this
        answers = iter([rank_0])
        return lambda tensor, op: asked.append(op) or torch.tensor(max(int(tensor), next(answers, 0)))

    seen = Ranks(rank=1, all_reduce=beside(30))
    state = _resume(tmp_path, make_trainer(CONFIG, open_dataset(dataset), Ranks()), seen)
    assert state["step"] == 30 and asked == ["max"]


def test_a_folder_that_a_rank_does_not_see_is_said_by_all_ranks(tmp_path):
    def run(sees, others):
        (tmp_path / "config.yaml").write_text("") if sees else (tmp_path / "config.yaml").unlink(missing_ok=True)
        check_shared(tmp_path, Ranks(all_reduce=lambda tensor, op: torch.tensor(max(int(tensor), not others))))

    run(sees=True, others=True)
    for sees, others in ((True, False), (False, True)):
        with pytest.raises(ValueError, match="^run.output, run.cache: not every process of the run sees "):
            run(sees, others)


def test_the_curve_on_disk_is_the_undisturbed_run_s(dataset, tmp_path):
    _, logged = run(CONFIG, dataset, tmp_path / "whole")
    run(CONFIG, dataset, tmp_path / "killed", stop_at=33)
    with (tmp_path / "killed" / "curve.jsonl").open("a") as file:
        file.write('{"step": 40, "loss_unmask": 0.0}\n{"step": 60, "lo')  # a kill after the newest checkpoint
    run(CONFIG, dataset, tmp_path / "killed")
    (_, counts), *readings = untimed(logged)
    assert counts["parameters/total"] > counts["parameters/trunk"] > 0
    for name in ("whole", "killed"):
        assert untimed([(row.pop("step"), row) for row in read_curve(tmp_path / name)]) == readings


def test_the_held_out_objective_stands_in_the_curve_beside_the_bound(dataset, tmp_path):
    result, _ = run(CONFIG, dataset, tmp_path)
    parts = {"val_loss_unmask", "val_loss_remask", "val_loss_keep", "val_loss_sampler", "val_p_mask_unmask"}
    bounded = [row for row in read_curve(tmp_path) if "val_nelbo_nats" in row]
    assert [row["step"] for row in bounded] == [20, 40, 60] and all(parts <= row.keys() for row in bounded)
    assert parts <= result.keys()


def test_a_run_that_is_over_only_gives_its_figures_again(dataset, tmp_path):
    whole = run(CONFIG, dataset, tmp_path)
    assert run(CONFIG, dataset, tmp_path) == whole
    assert {"params", "tokens_per_s", "val_nelbo_nats", "val_bpb", "critic_auroc", "best_step"} <= whole[0].keys()


def test_a_damaged_checkpoint_is_passed_over_and_made_again(dataset, tmp_path):
    whole, logged = run(CONFIG, dataset, tmp_path / "whole")
    run(CONFIG, dataset, tmp_path / "hurt", stop_at=50)
    (tmp_path / "hurt/checkpoints/step-00000050/training.safetensors").write_bytes(b"cut short")
    assert newest_step(tmp_path / "hurt") == 45
    again, after = run(CONFIG, dataset, tmp_path / "hurt")
    assert untimed(after) == untimed(logged)
    assert same_bits(tmp_path / "whole/best", tmp_path / "hurt/best") and again["val_bpb"] == whole["val_bpb"]


def test_the_last_two_checkpoints_are_kept(dataset, tmp_path):
    run(CONFIG, dataset, tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000045", "step-00000060"]
    state = load_checkpoint(tmp_path / "checkpoints/step-00000060").state
    assert state["step"] == 60 and state["mask_bias"]["num_signals"] == 60


@pytest.mark.parametrize("bounds, best", [
    ([9.0, 5.0, 6.0], 40), ([1.0, 5.0, 6.0], 40), ([1.0, 6.0, 5.0], 60), ([1.0, 5.0, 5.0], 40),
    ([1.0, float("nan"), 5.0], 60)])
def test_best_has_the_lowest_bound_among_validations_with_every_head(dataset, tmp_path, monkeypatch, bounds, best):
    """The critic joins fully at step 40: a lower bound at step 20 does not count, other figures never do."""
    values = iter(bounds)

    def validate(self, rows, bytes_per_token):
        bound = next(values)
        return {"val_nelbo_nats": bound, "critic_auroc": bound / 10, "loss": -bound}

    monkeypatch.setattr(Pretrainer, "validate", validate)
    result, _ = run(CONFIG, dataset, tmp_path)
    assert result["best_step"] == best and load_checkpoint(tmp_path / "best").state["step"] == best
    assert result["val_nelbo_nats"] == bounds[best // 20 - 1] and result["last_val_nelbo_nats"] == bounds[-1]


def test_a_run_too_short_for_its_heads_still_has_a_best(dataset, tmp_path):
    result, _ = run(altered(steps=12, eval_every=5), dataset, tmp_path)
    assert result["best_step"] == 12 and (tmp_path / "best").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(dataset, tmp_path, monkeypatch):
    step = Pretrainer.step

    def poisoned(self, number, batch):
        if number == 37:
            with torch.no_grad():
                self.model.trunk.wte.weight[65] = float("nan")
        return step(self, number, batch)

    monkeypatch.setattr(Pretrainer, "step", poisoned)
    with pytest.raises(ValueError, match="loss_.* became nan within steps 31 to 40: lower pretrain.learning_rate"):
        run(CONFIG, dataset, tmp_path)
    assert newest_step(tmp_path) == 30
    assert all(t.isfinite().all() for t in tensors(tmp_path / "checkpoints/step-00000030").values())


@pytest.mark.parametrize("changes", [
    {}, {"loss": LossSection(objective="mdlm")},
    {"model": ModelSection(n_layer=2, n_head=2, n_embd=32, attention="causal", critic=False, sampler=False)}])
def test_every_objective_learns_the_text_and_its_bound_is_of_the_validation_split(tmp_path, changes):
    """Runs of 16 to 24 equal letters out of eight: log 8 nats a letter without context, little with it."""
    letters = torch.randint(8, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    runs = [chr(97 + letter) * (16 + index % 9) for index, letter in enumerate(letters)]
    text = make_dataset(["".join(runs)], CONFIG.data, tmp_path / "set").folder
    config = replace(CONFIG, **{"model": ModelSection(n_layer=2, n_head=2, n_embd=32)} | changes)
    result, logged = run(altered(config, steps=160, batch_size=32, learning_rate=1e-2, eval_rows=100), text, tmp_path)
    bounds = [figures["val_nelbo_nats"] for _, figures in logged if "val_nelbo_nats" in figures]
    assert bounds[-1] < bounds[0] < math.log(256)
    assert math.log(8) / 20 < bounds[-1] < 0.5 * math.log(8)
    assert result["val_bpb"] == pytest.approx(result["val_nelbo_nats"] / math.log(2), rel=1e-9)


def test_the_cache_key_covers_what_decides_the_weights_and_nothing_else(dataset):
    key = what_decides(CONFIG, dataset)
    for same in (altered(log_every=3, checkpoint_every=7, micro_batches=2), replace(CONFIG, run=RunSection(threads=2)),
                 replace(CONFIG, grpo=GrpoSection(prompt_tokens=5))):
        assert what_decides(same, dataset) == key
    for other in (altered(learning_rate=1e-3), altered(eval_every=10), replace(CONFIG, run=RunSection(seed=1)),
                  replace(CONFIG, critic=CriticSection(alpha=0.1))):
        assert what_decides(other, dataset) != key
    assert what_decides(CONFIG, dataset.with_name("data-other")) != key


def test_the_configs_that_share_a_base_do(dataset):
    tiny, rewarded = (load_config(ROOT / "configs" / f"{name}.yaml") for name in ("tiny", "user-reward"))
    assert what_decides(tiny, dataset) == what_decides(rewarded, dataset) and tiny.data == rewarded.data


# ---- with Ray -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "squares.txt"
    path.write_text(TEXT)
    return path


def on_ray(config, corpus, folder, **changes):
    config = altered(config, **changes)
    return replace(config, data=replace(config.data, source=str(corpus)),
                   run=replace(config.run, cache=str(folder / "cache"), output=str(folder / "runs")))


def wait_for(path, alive, seconds=240):
    end = time.monotonic() + seconds
    while not path.exists():
        assert alive(), "it ended before it wrote " + path.name
        assert time.monotonic() < end, f"no {path.name} after {seconds} s"
        time.sleep(0.02)


@pytest.mark.ray
def test_a_killed_run_started_again_is_bitwise_the_undisturbed_one(corpus, tmp_path):
    """From another folder than the project's, with relative paths; the undisturbed one runs here, without Ray."""
    config = on_ray(CONFIG, corpus, tmp_path, steps=600, eval_every=200, checkpoint_every=50)
    save_config(replace(config, run=replace(config.run, output="runs", cache="cache")), tmp_path / "config.yaml")
    command = [sys.executable, str(ROOT / "pipelines" / "pretrain.py"), "--config", "config.yaml", "run.name=hurt"]
    folder = tmp_path / "runs" / "hurt"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=log, stderr=log)
    wait_for(folder / "checkpoints/step-00000100", lambda: process.poll() is None)
    process.kill()
    process.wait()
    assert 100 <= newest_step(folder) < 600

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "val_nelbo_nats" in done.stdout and "sample.py --checkpoint" in done.stdout
    assert f"data: {corpus}\n" in done.stdout and "pretraining on " in done.stdout
    assert "val_loss_unmask" not in done.stdout  # the table stays short
    run(config, prepare(config.data, config.run.cache), tmp_path / "whole")
    for name in ("best", "checkpoints/step-00000600"):
        assert same_bits(tmp_path / "whole" / name, folder / name)
    summary = json.loads((folder / "summary.json").read_text())
    assert {"params", "tokens_per_s", "val_nelbo_nats", "val_bpb", "session_s"} <= summary.keys()
    assert yaml.safe_load((folder / "config.yaml").read_text())["pretrain"] == to_dict(config.pretrain)
    assert_tracked_once(tmp_path / "runs" / "mlflow.db", "hurt", range(10, 601, 10))


def assert_tracked_once(database, name, steps):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    runs = client.search_runs([client.get_experiment_by_name("grpo").experiment_id])
    assert [run.info.run_name for run in runs] == [name] and runs[0].info.status == "FINISHED"
    history = client.get_metric_history(runs[0].info.run_id, "loss_unmask")
    assert sorted(metric.step for metric in history) == list(steps)
    assert {"p_mask_unmask", "mask_bias", "mask_prob_target", "loss_remask", "loss_keep", "loss_critic", "loss_sampler",
            "grad_norm_generator", "grad_norm_critic", "learning_rate", "tokens_per_s", "val_bpb",
            "val_loss_unmask", "val_p_mask_unmask", "critic_auroc"} <= runs[0].data.metrics.keys()


def processes_below(parent):
    """(pid, command) of a process's children and theirs: this session's own, nobody else's."""
    listed = subprocess.run(["ps", "-axo", "pid=,ppid=,command="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    below = [(int(pid), command) for pid, ppid, command in rows if int(ppid) == parent]
    return below + [found for pid, _ in below for found in processes_below(pid)]


@pytest.mark.ray
def test_two_workers_train_as_one_though_one_is_killed(ray_session, corpus, tmp_path):
    config = on_ray(CONFIG, corpus, tmp_path, num_workers=2, steps=200, eval_every=100, checkpoint_every=20)
    config = replace(config, model=replace(config.model, dropout=0.0))
    folder = tmp_path / "runs" / "pair"
    killed = []

    def kill_one():
        wait_for(folder / "checkpoints/step-00000040", lambda: True)
        victim = next(pid for pid, name in processes_below(os.getpid()) if "RayTrainWorker" in name)
        os.kill(victim, signal.SIGKILL)
        killed.append(newest_step(folder))

    thread = threading.Thread(target=kill_one)
    thread.start()
    pretrain(config, folder=folder)
    thread.join()
    assert killed and killed[0] < 200 and json.loads((folder / "summary.json").read_text())["steps"] == 200
    alone = altered(config, num_workers=1)
    run(alone, prepare(alone.data, alone.run.cache), tmp_path / "alone")
    one, two = tensors(tmp_path / "alone/best"), tensors(folder / "best")
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.ray
def test_sigterm_leaves_a_checkpoint_that_the_same_call_ends_and_the_next_finds(ray_session, corpus, tmp_path):
    config = on_ray(CONFIG, corpus, tmp_path, steps=800, eval_every=100, checkpoint_every=20)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def terminate():
        wait_for(tmp_path / "cache", lambda: True)
        while not list((tmp_path / "cache").glob("base-*/best")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(SystemExit) as left:
        pretrain(config)
    thread.join()
    assert left.value.code == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    folder = next((tmp_path / "cache").glob("base-*"))
    assert 0 < newest_step(folder) < 800 and not (folder / "summary.json").exists()

    (folder / "summary.json").write_text('{"texts": []}')  # another pipeline's does not end this one's work
    best = pretrain(config)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 800
    assert best == folder / "best" and load_model(best).mode == "language_model"
    assert load_checkpoint(best).config == to_dict(config)
    run(config, prepare(config.data, config.run.cache), tmp_path / "whole")
    assert same_bits(tmp_path / "whole/best", best)
    written = (best / "manifest.json").stat().st_mtime_ns
    assert pretrain(replace(config, run=replace(config.run, name="other"))) == best
    assert (best / "manifest.json").stat().st_mtime_ns == written


@pytest.mark.ray
def test_mistakes_are_met_before_anything_starts(ray_session, corpus, tmp_path):
    config = on_ray(CONFIG, corpus, tmp_path)
    with pytest.raises(ValueError, match="the validation split holds .* windows of 16 tokens, 1000000 needed"):
        pretrain(altered(config, eval_rows=10**6), folder=tmp_path / "runs" / "greedy")
    with pytest.raises(ValueError, match="pretrain.num_workers is 64, the cluster has 4 CPUs"):
        pretrain(altered(config, num_workers=64, batch_size=64), folder=tmp_path / "runs" / "many")
    with pytest.raises(ValueError, match="nowhere: no checkpoint there"):
        pretrain(altered(config, mode="sequence_scorer", teacher="nowhere"), folder=tmp_path / "runs" / "taught")

    (tmp_path / "runs/old/best").mkdir(parents=True)
    other = what_decides(altered(config, learning_rate=0.1), prepare(config.data, config.run.cache))
    (tmp_path / "runs/old/decides.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="holds a run with pretrain.learning_rate=0.1, not 0.003: choose another run"):
        pretrain(config, folder=tmp_path / "runs" / "old")
