import io
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import ray
from ray.train import ControllerError, ScalingConfig, WorkerGroupError
from ray.util.placement_group import placement_group, remove_placement_group
from rich.console import Console

from grpo.config import Config, RunSection
from pipelines.fit import fit, reason_of, torch_config
from pipelines.pretrain_loop import PretrainJob
from pipelines.progress import Display

TRACE = "Traceback (most recent call last):\n  File ...\nTimeoutError: waited 3 s for scores of round 2\n"
TRACKER = SimpleNamespace(uri="sqlite:///here", run_id="one")


def test_what_ended_the_workers_is_one_line():
    error = WorkerGroupError("...", {1: RuntimeError(TRACE)})
    assert reason_of(error) == "TimeoutError: waited 3 s for scores of round 2"
    assert torch_config(12.5).timeout_s == 13


def ends_with(outcome, folder, monkeypatch, before=lambda: None):
    """What the driver makes of the loop's outcome, and what it showed; without workers."""
    class Trainer:
        def __init__(self, loop, *, train_loop_config, **options):
            self.fit = lambda: before() or SimpleNamespace(return_value=loop(train_loop_config))

    def loop(settings):
        (settings["job"].folder / "ray-train").mkdir()
        assert (settings["tracking"].uri, settings["mlflow_run"]) == ("sqlite:///here", "one")
        assert "secret" not in repr(settings)
        settings["board"].note.remote("begun")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome() if callable(outcome) else outcome

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    shown = io.StringIO()
    job = PretrainJob(config=Config(), dataset=folder, folder=folder)
    with Display(Console(file=shown, width=120)) as display:
        try:
            result = fit(loop, job, TRACKER, display, workers=ScalingConfig(num_workers=1), unit="round")
        except (Exception, SystemExit) as error:
            result = error
    assert not (folder / "ray-train").exists() and shown.getvalue().startswith("begun\n")
    return result, shown.getvalue()


def signalled_at_the_end():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    return {"history": []}


@pytest.mark.ray
def test_how_a_loop_ended_is_a_value_an_error_or_an_exit_code(ray_session, tmp_path, monkeypatch):
    assert ends_with({"history": []}, tmp_path, monkeypatch)[0] == {"history": []}
    error, _ = ends_with({"error": "a user's mistake"}, tmp_path, monkeypatch)
    assert isinstance(error, ValueError) and str(error) == "a user's mistake"
    error, shown = ends_with({"stopped": 3}, tmp_path, monkeypatch)
    assert isinstance(error, SystemExit) and error.code == 143
    assert shown.endswith("stopped after round 3; the same command goes on from there\n")
    error, shown = ends_with(signalled_at_the_end, tmp_path, monkeypatch)
    assert isinstance(error, SystemExit) and error.code == 143
    assert shown.endswith("stopped after round 0; the same command goes on from there\n")
    error, _ = ends_with(WorkerGroupError("...", {0: RuntimeError(TRACE)}), tmp_path, monkeypatch)
    assert isinstance(error, RuntimeError) and str(error) == (
        "a worker ended 4 times, the last time by TimeoutError: waited 3 s for scores of round 2; the same command "
        "goes on after round 0"
    )
    error, _ = ends_with(ControllerError(OSError("no room")), tmp_path, monkeypatch)
    assert str(error).startswith("Ray Train's controller ended by no room; the same command goes on after ")


@pytest.mark.ray
def test_a_worker_that_tracks_gets_the_credentials_of_the_mlflow_server_and_nobody_else(
    ray_session, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")

    def elsewhere():
        monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")

    def outcome():
        return {"token": os.environ.get("MLFLOW_TRACKING_TOKEN")}

    assert ends_with(outcome, tmp_path, monkeypatch, elsewhere)[0] == {"token": "secret"}


@pytest.fixture
def others(ray_session):
    """Somebody who holds all CPUs."""
    until = time.monotonic() + 30
    while not (free := ray.available_resources().get("CPU")) and time.monotonic() < until:
        time.sleep(0.1)
    group = placement_group([{"CPU": free}])
    assert group.wait(30)
    yield
    remove_placement_group(group)


@pytest.mark.ray
def test_workers_that_find_no_place_are_said_and_not_waited_for_without_end(others, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.progress.OVERDUE_S", 1.0)
    config, shown = Config(run=RunSection(timeout_s=4.0)), io.StringIO()
    job = PretrainJob(config=config, dataset=tmp_path, folder=tmp_path)
    with Display(Console(file=shown, width=120)) as display:
        with pytest.raises(RuntimeError, match="not start 2 workers in 4 waits .* is 4; 0 CPUs .* are free.: "):
            fit(dict, job, TRACKER, display, workers=ScalingConfig(num_workers=2), unit="step")
    assert shown.getvalue() == "waiting for 2 Ray Train workers to begin: 0 CPUs and 0 GPUs are free\n"


def _signal_when_heeded():
    before = signal.getsignal(signal.SIGTERM)

    def send():
        while signal.getsignal(signal.SIGTERM) == before:
            time.sleep(0.1)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.ray
def test_a_signal_ends_the_waiting_for_workers(others, tmp_path):
    config, shown = Config(run=RunSection(timeout_s=600.0)), io.StringIO()
    job = PretrainJob(config=config, dataset=tmp_path, folder=tmp_path)
    _signal_when_heeded()
    with Display(Console(file=shown, width=120)) as display, pytest.raises(SystemExit) as left:
        fit(dict, job, TRACKER, display, workers=ScalingConfig(num_workers=2), unit="step")
    assert left.value.code == 143
    assert shown.getvalue() == "stopped after step 0; the same command goes on from there\n"
