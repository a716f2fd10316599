import io
from types import SimpleNamespace

import pytest
from ray.train import ScalingConfig, WorkerGroupError
from rich.console import Console

from grpo.config import Config
from pipelines.fit import fit, reason_of, torch_config
from pipelines.pretrain_loop import Job
from pipelines.progress import Display

TRACE = "Traceback (most recent call last):\n  File ...\nTimeoutError: waited 3 s for scores of round 2\n"


def test_what_ended_the_workers_is_one_line():
    error = WorkerGroupError("...", {1: RuntimeError(TRACE)})
    assert reason_of(error) == "TimeoutError: waited 3 s for scores of round 2"
    assert torch_config(12.5).timeout_s == 13


def ends_with(outcome, folder, monkeypatch):
    """What the driver makes of the loop's outcome, and what it showed; without workers."""
    class Trainer:
        def __init__(self, loop, *, train_loop_config, **options):
            self.fit = lambda: SimpleNamespace(return_value=loop(train_loop_config))

    def loop(settings):
        (settings["job"].folder / "ray-train").mkdir()
        settings["job"].board.note.remote("begun")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    config, shown = Config(), io.StringIO()
    job = Job(config=config, dataset=folder, folder=folder, tracking=config.tracking, board=None, mlflow_run=None)
    with Display(Console(file=shown, width=120)) as display:
        try:
            result = fit(loop, job, display, workers=ScalingConfig(num_workers=1), unit="round")
        except (Exception, SystemExit) as error:
            result = error
    assert not (folder / "ray-train").exists() and shown.getvalue().startswith("begun\n")
    return result, shown.getvalue()


@pytest.mark.ray
def test_how_a_loop_ended_is_a_value_an_error_or_an_exit_code(ray_session, tmp_path, monkeypatch):
    assert ends_with({"history": []}, tmp_path, monkeypatch)[0] == {"history": []}
    error, _ = ends_with({"error": "a user's mistake"}, tmp_path, monkeypatch)
    assert isinstance(error, ValueError) and str(error) == "a user's mistake"
    error, shown = ends_with({"stopped": 3}, tmp_path, monkeypatch)
    assert isinstance(error, SystemExit) and error.code == 143
    assert shown.endswith("stopped after round 3; the same command goes on from there\n")
    error, _ = ends_with(WorkerGroupError("...", {0: RuntimeError(TRACE)}), tmp_path, monkeypatch)
    assert isinstance(error, RuntimeError) and str(error) == (
        "a worker ended 4 times, the last time by TimeoutError: waited 3 s for scores of round 2; the same command "
        "goes on after round 0"
    )
