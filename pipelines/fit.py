"""The driver's side of a Ray Train fit: workers, progress, signals, and what is said when they end.

1. Ray Train starts its workers again after a dead one; the loop goes on from the newest checkpoint of the run's folder,
   so nothing of Ray Train's own storage is kept.
2. It waits for CPUs and GPUs that others hold for a share of `run.timeout_s` each time, and ends after as many waits in
   vain as workers may die, however far apart. That it waits it logs below the level that is shown, so the driver says
   it.
3. `fit` runs beside the main thread, which keeps its signal handlers: SIGTERM and Ctrl-C reach the loop by the board,
   and end the waiting at once while no worker has begun.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from grpo.run_checkpoints import newest_step
from pipelines.pretrain_loop import PretrainJob
from pipelines.progress import Display, follow, free_resources, overdue, start_board, stop_on_signals
from pipelines.rollouts import RoundsJob
from pipelines.tracking import Tracker, mlflow_variables

MAX_FAILURES = 3
"""Times that Ray Train starts again after a worker has died."""
LEFT_BY_SIGNAL = 143


def fit(
    loop: Callable[[dict[str, Any]], dict[str, Any]],
    job: RoundsJob | PretrainJob,
    tracker: Tracker,
    display: Display,
    *,
    workers: Any,
    unit: str,
) -> dict[str, Any]:
    """Run a loop in Ray Train's workers to its end; returns what it returned on rank 0.

    Args:
        loop: of each worker; returns {"error": reason} where starting it again would not help, and {"stopped": count}
            where it was asked to stop. It is told the job, the progress board, and where rank 0 logs.
        tracker: of the driver, which owns the MLflow run.
        workers: Ray Train's `ScalingConfig`.
        unit: what the loop counts, for the reader.

    Raises:
        ValueError: the loop returned an error.
        RuntimeError: workers ended too often, or could not be started.
        SystemExit: SIGTERM or Ctrl-C came; a checkpoint is written, of a loop that had begun.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    timeout_s, board, scratch = job.config.run.timeout_s, start_board(), job.folder / "ray-train"
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(timeout_s / (MAX_FAILURES + 1))
    mlflow = mlflow_variables()  # in the function, which nobody shows or logs as they do settings and environments

    def begin(settings: dict[str, Any]) -> dict[str, Any]:
        """The loop in its worker, which the driver hears of."""
        os.environ.update(mlflow)
        settings["board"].begin.remote()
        return settings["loop"](settings)

    trainer = TorchTrainer(
        begin,
        train_loop_config={
            "loop": loop,
            "job": job,
            "board": board,
            "tracking": replace(job.config.tracking, uri=tracker.uri),
            "mlflow_run": tracker.run_id,
        },
        torch_config=torch_config(timeout_s),
        scaling_config=workers,
        run_config=ray.train.RunConfig(
            name=f"fit-{time.time_ns()}",
            storage_path=str(scratch),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=MAX_FAILURES),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    asked, unbegun = threading.Event(), threading.Event()

    def begun() -> bool:
        return ray.get(board.begun.remote(), timeout=10)

    def stop() -> None:
        asked.set()
        board.stop.remote()
        with suppress(ray.exceptions.RayError):  # at the end of a fit the board is gone
            if not begun():
                unbegun.set()

    late = overdue(f"{workers.num_workers} Ray Train workers to begin", begun)
    try:
        with stop_on_signals(stop), follow(lambda: [*ray.get(board.drain.remote(), timeout=10), *late()], display):
            fitted = beside_main_thread(trainer.fit, unless=unbegun)
    except ray.train.TrainingFailedError as error:
        ended = f"a worker ended {MAX_FAILURES + 1} times, the last time by {reason_of(error)}"
        if isinstance(error, ray.train.ControllerError):
            ended = f"Ray Train's controller ended by {reason_of(error)}"
        if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
            ended = (
                f"Ray Train could not start {workers.num_workers} workers in {MAX_FAILURES + 1} waits of this run "
                f"(run.timeout_s, of all together, is {timeout_s:g}; {free_resources()}): {reason_of(error)}"
            )
        raise RuntimeError(f"{ended}; the same command goes on after {unit} {newest_step(job.folder)}") from error
    finally:
        ray.kill(board)
        shutil.rmtree(scratch, ignore_errors=True)
    result = {} if fitted is None else fitted.return_value
    if "error" in result:
        raise ValueError(result["error"])
    if "stopped" in result or asked.is_set():  # asked too late, the loop ends by itself
        after = result.get("stopped", newest_step(job.folder))
        display.note(f"stopped after {unit} {after}; the same command goes on from there")
        raise SystemExit(LEFT_BY_SIGNAL)
    return result


def torch_config(timeout_s: float) -> Any:
    """Ray Train's process group, whose waits end after `run.timeout_s`."""
    from ray.train.torch import TorchConfig

    return TorchConfig(timeout_s=math.ceil(timeout_s))


def reason_of(error: Exception) -> str:
    """The last line of what ended a worker, or the controller, of a `TrainingFailedError`."""
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None), error]
    lines = str(next(filter(None, failures))).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def beside_main_thread(call: Callable[[], Any], unless: threading.Event | None = None) -> Any:
    """Run a blocking call on a thread of its own: the main one keeps its signal handlers, which `fit` would replace.

    Args:
        unless: what ends the waiting for it, with None in place of its value.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = call()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        if unless is not None and unless.is_set():
            return None
        thread.join(timeout=1.0)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
