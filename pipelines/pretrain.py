"""Pretrain a generator (or a stand-alone classifier of its errors) in one long-lived Ray Train loop.

    python pipelines/pretrain.py --config configs/tiny.yaml run.name=first pretrain.steps=2000

    runs/NAME/config.yaml      the resolved config          runs/NAME/best/          the model with the best bound
    runs/NAME/summary.json     figures, when it is done     runs/NAME/checkpoints/   the last two, to go on from

1. A run is a function of its config: batches, noise and dropout are drawn from (seed, step), so that a run killed at
   any step and started again by the same command ends with the same weights, bit for bit (one worker, CPU).
2. Checkpoints are this file's own, atomic and in the run's folder; Ray Train restarts a dead worker, which goes on from
   the newest. `ray.train.report` is never called: it blocks until the controller polls.
3. `best` is chosen by the bound on fixed validation rows, and by nothing else, among the validations at which every
   head had joined (`critic.end`, `sampler.start`) if the run gets that far.
4. SIGTERM and Ctrl-C write a checkpoint and leave with exit code 143.
5. On several machines `run.output` and `run.cache` must lie on storage that all of them see.
"""

from __future__ import annotations

import sys
from pathlib import Path

_here = Path(__file__).resolve().parent
if __name__ == "__main__":  # `python pipelines/pretrain.py` puts pipelines/ first, where grpo.py hides the package
    sys.path[:] = [str(_here.parent)] + [p for p in sys.path if Path(p or ".").resolve() != _here]

# ruff: noqa: E402
import argparse
import fcntl
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.pretrainer import Pretrainer
from grpo.checkpoint import (
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    load_into,
    prune_checkpoints,
    save_checkpoint,
)
from grpo.config import Config
from grpo.config_file import config_hash, save_config, to_dict
from grpo.data import Cursor, Dataset, open_dataset, windows
from grpo.metrics import merge_sums
from grpo.model import GPT
from grpo.optim import cosine_learning_rate
from pipelines.launch import launch, start_ray, worker_threads
from pipelines.prepare import prepare
from pipelines.progress import Display, ProgressBoard, follow, stop_on_signals, summary_table

KEEP = 2
"""Checkpoints kept."""
MAX_FAILURES = 3
"""Times that Ray Train starts again after a worker has died."""
REPORT_S = 0.3
"""Seconds between two messages to the board."""
VALIDATION_WINDOWS_SEED = 1
LEFT_BY_SIGNAL = 143
BOOKKEEPING = ("num_workers", "micro_batches", "log_every", "checkpoint_every")
"""Fields of `pretrain` that change no weight (but for the order of summation)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every rank is told."""

    config: Config
    dataset: Path
    folder: Path
    board: Any
    """Handle of the `ProgressBoard` actor."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Data parallelism as the loop sees it: a rank among others, what wraps a module, what reduces a tensor."""

    rank: int = 0
    world: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    all_reduce: Callable[..., Tensor] = lambda tensor, op="sum": tensor
    device: str = "cpu"


# ---- the loop, in every Ray Train worker ------------------------------------------------------------------------------


def worker_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on each rank."""
    import ray.train
    import ray.train.torch

    job: Job = settings["job"]
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(worker_threads(job.config.run.threads, context.get_local_world_size()))
    ranks = Ranks(rank=context.get_world_rank(), device=str(device))
    if context.get_world_size() > 1:
        ranks = Ranks(rank=ranks.rank, world=context.get_world_size(), wrap=_data_parallel, all_reduce=_all_reduce,
                      device=str(device))
    report = _reporter(job.board, job.config.pretrain.steps) if ranks.rank == 0 else lambda *_: False
    try:
        return train(job, ranks, report)
    except ValueError as error:  # what a user wrote: no restart would help, and Ray Train would wrap it in a traceback
        return {"error": str(error)}


def _data_parallel(module: nn.Module) -> nn.Module:
    """DDP that lets heads which have not joined yet go without gradients."""
    return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)


def _all_reduce(tensor: Tensor, op: str = "sum") -> Tensor:
    dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return tensor


def _reporter(board: Any, total: int) -> Callable[[int, dict[str, float]], bool]:
    """Tell the board about a step, at most every `REPORT_S`, and learn whether somebody wants to stop."""
    import ray

    last, answer, stop = 0.0, None, False

    def report(done: int, figures: dict[str, float]) -> bool:
        nonlocal last, answer, stop
        if answer is not None and ray.wait([answer], timeout=0)[0]:
            stop, answer = stop or ray.get(answer, timeout=30), None
        if answer is None and time.monotonic() - last > REPORT_S:
            last, answer = time.monotonic(), board.report.remote("pretrain", done, total, figures)
        return stop

    return report


def train(job: Job, ranks: Ranks, report: Callable[[int, dict[str, float]], bool]) -> dict[str, Any]:
    """Train from the newest checkpoint to the last step, or until `report` says stop; returns the summary's figures."""
    config, settings, block_size = job.config, job.config.pretrain, job.config.data.block_size
    dataset = open_dataset(job.dataset)
    torch.manual_seed(config.run.seed)
    model = GPT(config.model, dataset.vocabulary, mode=settings.mode, block_size=block_size, reward=config.reward)
    trainer = Pretrainer(model, config, rank=ranks.rank, world=ranks.world, wrap=ranks.wrap,
                         all_reduce=ranks.all_reduce, device=ranks.device)
    cursor = Cursor(dataset, "train", settings.batch_size, block_size, config.run.seed)
    rows = windows(dataset, "validation", settings.eval_rows, block_size, VALIDATION_WINDOWS_SEED)
    state = _resume(job.folder, trainer)
    step, sums, figures = state["step"], {}, {}
    mark, last_read = time.monotonic(), step

    def save() -> None:
        if ranks.rank == 0:
            save_checkpoint(checkpoint_folder(job.folder / "checkpoints", step), model, config=to_dict(config),
                            tokenizer=dataset.tokenizer,
                            state={**state, "step": step, "mask_bias": trainer.mask_bias.state_dict(),
                                   "optimizer": trainer.tensors()})
            prune_checkpoints(job.folder / "checkpoints", KEEP)

    while step < settings.steps:
        if _agreed(report(step, figures), ranks, step % settings.log_every == 0):
            save()
            return {"stopped": step}
        sums = merge_sums(sums, trainer.step(step, cursor.batch(step, rows=trainer.rows())))
        step += 1
        last = step == settings.steps
        validates, saves = step % settings.eval_every == 0 or last, step % settings.checkpoint_every == 0 or last
        if not (step % settings.log_every == 0 or validates or saves):
            continue
        figures = _finite(trainer.read(sums), last_read, step)
        seconds = time.monotonic() - mark
        tokens = (step - last_read) * settings.batch_size * block_size
        state["trained_s"] += seconds
        figures |= {"tokens_per_s": tokens / seconds, "learning_rate": cosine_learning_rate(
            step - 1, peak=settings.learning_rate, warmup=settings.warmup, steps=settings.steps)}
        if validates and ranks.rank == 0:
            state["validation"] = trainer.validate(rows, dataset.bytes_per_token("validation"))
            figures |= state["validation"]
            _keep_best(job, model, trainer, dataset, state, step)
        if saves:
            save()
        sums, last_read, mark = {}, step, time.monotonic()
    tokens = settings.steps * settings.batch_size * block_size
    return {"params": sum(p.numel() for p in model.parameters()), "steps": step, "tokens": tokens,
            "tokens_per_s": tokens / max(state["trained_s"], 1e-9), "trained_s": state["trained_s"],
            **state["validation"], "best": state["best"]}


def _resume(folder: Path, trainer: Pretrainer) -> dict[str, Any]:
    """Load the newest checkpoint, if there is one; returns the loop's state."""
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is None:
        return {"step": 0, "trained_s": 0.0, "validation": {}, "best": {}}
    checkpoint = load_checkpoint(newest)
    load_into(trainer.model, checkpoint.tensors)
    state = dict(checkpoint.state)
    trainer.load(state.pop("optimizer"), state.pop("mask_bias"))
    return state


def _agreed(stop: bool, ranks: Ranks, meeting: bool) -> bool:
    """Whether rank 0 stops. All ranks must leave after the same step, so they ask each other, but only at meetings."""
    if ranks.world == 1 or not meeting:
        return stop and ranks.world == 1
    flag = torch.tensor(float(stop), device=ranks.device)
    return bool(ranks.all_reduce(flag, "max"))


def _finite(figures: dict[str, float], first: int, last: int) -> dict[str, float]:
    for name, value in figures.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value} within steps {first + 1} to {last}: lower pretrain.learning_rate; the "
                             "last good checkpoint is kept")
    return figures


def _keep_best(job: Job, model: GPT, trainer: Pretrainer, dataset: Dataset, state: dict[str, Any], step: int) -> None:
    """Write `best` when this validation's bound is the lowest so far, once every head has joined."""
    config, best = job.config, state["best"]
    joined = max(config.critic.end if config.model.critic else 0, config.sampler.start if config.model.sampler else 0)
    full = step >= min(joined, config.pretrain.steps)
    bound = state["validation"]["val_nelbo_nats"]
    if best and (best["full"], -best["val_nelbo_nats"]) >= (full, -bound):
        return
    state["best"] = {"full": full, "step": step, **state["validation"]}
    save_checkpoint(job.folder / "best", model, config=to_dict(config), tokenizer=dataset.tokenizer,
                    state={"step": step, "mask_bias": trainer.mask_bias.state_dict(), "validation": state["validation"]})


# ---- the driver -------------------------------------------------------------------------------------------------------


def pretrain(config: Config, *, folder: Path | None = None, display: Display | None = None) -> Path:
    """The checkpoint folder of the pretrained model; trained now unless the folder holds it already.

    Args:
        folder: of the run; None: `run.cache`, under the hash of everything that decides the weights.
        display: where progress goes; None: a display of its own.

    Raises:
        ValueError: a mistake in config or data, a folder of another config, or a loss that is not finite.
        SystemExit: SIGTERM or Ctrl-C came; a checkpoint is written.
    """
    started = time.monotonic()
    dataset = prepare(config.data, config.run.cache)
    decides = what_decides(config, dataset)
    if folder is None:
        folder = Path(config.run.cache).expanduser().absolute() / f"base-{config_hash(decides)}"
    with _alone(folder):
        _check_same(folder, decides)
        if not (folder / "summary.json").exists():
            save_config(config, folder / "config.yaml")
            figures = _fit(Job(config=config, dataset=dataset, folder=folder, board=None), display)
            summary = {**figures, "wall_s": time.monotonic() - started, "folder": str(folder)}
            _write_json(folder / "summary.json", summary)
    return folder / "best"


def what_decides(config: Config, dataset: Path) -> dict[str, Any]:
    """Everything that the weights are a function of, as plain values."""
    sections = to_dict(config)
    kept = {name: sections[name] for name in ("model", "corruption", "loss", "mask_bias", "critic", "sampler")}
    pretrain = {name: value for name, value in sections["pretrain"].items() if name not in BOOKKEEPING}
    return {"dataset": dataset.name, "run": {"seed": config.run.seed}, "pretrain": pretrain, **kept}


def _fit(job: Job, display: Display | None) -> dict[str, Any]:
    """Run the loop on Ray Train; returns rank 0's figures."""
    start_ray()
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    settings = job.config.pretrain
    resources = ray.cluster_resources()
    use_gpu = resources.get("GPU", 0) > 0
    available = int(resources.get("GPU" if use_gpu else "CPU", 0))
    if settings.num_workers > available:
        raise ValueError(f"pretrain.num_workers is {settings.num_workers}, but this cluster has {available} "
                         f"{'GPUs' if use_gpu else 'CPUs'}")
    board = ray.remote(num_cpus=0)(ProgressBoard).remote()
    scratch = job.folder / "ray-train"
    trainer = TorchTrainer(
        worker_loop, train_loop_config={"job": Job(**{**job.__dict__, "board": board})},
        scaling_config=ray.train.ScalingConfig(num_workers=settings.num_workers, use_gpu=use_gpu),
        run_config=ray.train.RunConfig(
            name=f"fit-{time.time_ns()}", storage_path=str(scratch),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            logging_config=ray.train.LoggingConfig(log_level="ERROR")))
    with display or Display() as shown:
        with stop_on_signals(lambda: board.stop.remote()), follow(lambda: ray.get(board.drain.remote(), timeout=10), shown):
            result = on_a_thread(trainer.fit).return_value
    ray.kill(board)
    shutil.rmtree(scratch, ignore_errors=True)
    if "error" in result:
        raise ValueError(result["error"])
    if "stopped" in result:
        print(f"stopped at step {result['stopped']}: the same command goes on from there", file=sys.stderr)
        raise SystemExit(LEFT_BY_SIGNAL)
    return result


def on_a_thread(call: Callable[[], Any]) -> Any:
    """Run a blocking call beside the main thread, which keeps its own signal handlers: `fit` would replace them."""
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


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; a second process waits, and then finds the finished model."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_same(folder: Path, decides: dict[str, Any]) -> None:
    """A folder belongs to one config: name the first key that differs."""
    path = folder / "decides.json"
    if not path.exists():
        _write_json(path, decides)
        return
    before, now = (_flat(values) for values in (json.loads(path.read_text(encoding="utf-8")), decides))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ValueError(f"{folder} holds a run with {key}={before.get(key)}, not {now.get(key)}: choose another "
                             "run.name, or delete that folder")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _write_json(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    name = config.run.name or f"pretrain-{config_hash(config)}"
    folder = Path(config.run.output).absolute() / name
    pretrain(config, folder=folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    summary_table(f"pretrained {name}", [[key, value] for key, value in summary.items() if key != "best"], ["", "value"])
    print(f"model    {folder / 'best'}\nsummary  {folder / 'summary.json'}\n"
          f"next     python pipelines/sample.py --checkpoint {folder / 'best'}")
    return summary


if __name__ == "__main__":
    launch(main, __doc__)
