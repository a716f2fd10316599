"""The driver's side of a Ray Train fit: workers, progress, signals, and what is said when they end.

1. Ray Train starts its workers again after a dead one; the loop goes on from the newest checkpoint of the run's folder,
   so nothing of Ray Train's own storage is kept.
2. `fit` runs beside the main thread, which keeps its signal handlers: SIGTERM and Ctrl-C reach the loop by the board.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from grpo.run_checkpoints import newest_step
from pipelines.progress import Display, follow, start_board, stop_on_signals

MAX_FAILURES = 3
"""Times that Ray Train starts again after a worker has died."""
LEFT_BY_SIGNAL = 143


def fit(
    loop: Callable[[dict[str, Any]], dict[str, Any]], job: Any, display: Display, *, workers: Any, unit: str
) -> dict[str, Any]:
    """Run a loop in Ray Train's workers to its end; returns what it returned on rank 0.

    Args:
        loop: of each worker; returns {"error": reason} where starting it again would not help, and {"stopped": count}
            where it was asked to stop.
        job: what it is told, as settings["job"], with a board.
        workers: Ray Train's `ScalingConfig`.
        unit: what the loop counts, for the reader.

    Raises:
        ValueError: the loop returned an error.
        RuntimeError: workers ended too often.
        SystemExit: SIGTERM or Ctrl-C came; a checkpoint is written.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    board, scratch = start_board(), job.folder / "ray-train"
    trainer = TorchTrainer(
        loop,
        train_loop_config={"job": replace(job, board=board)},
        torch_config=torch_config(job.config.run.timeout_s),
        scaling_config=workers,
        run_config=ray.train.RunConfig(
            name=f"fit-{time.time_ns()}",
            storage_path=str(scratch),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    news = follow(lambda: ray.get(board.drain.remote(), timeout=10), display)
    try:
        with stop_on_signals(lambda: board.stop.remote()), news:
            result = beside_main_thread(trainer.fit).return_value
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(
            f"a worker ended {MAX_FAILURES + 1} times, the last time by {reason_of(error)}; the same command goes on "
            f"after {unit} {newest_step(job.folder)}"
        ) from error
    finally:
        ray.kill(board)
        shutil.rmtree(scratch, ignore_errors=True)
    if "error" in result:
        raise ValueError(result["error"])
    if "stopped" in result:
        display.note(f"stopped after {unit} {result['stopped']}; the same command goes on from there")
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


def beside_main_thread(call: Callable[[], Any]) -> Any:
    """Run a blocking call on a thread of its own: the main one keeps its signal handlers, which `fit` would replace."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = call()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=1.0)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
