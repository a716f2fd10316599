"""The pretraining loop, as every Ray Train worker runs it: steps, readings, validations, checkpoints, in this order.

1. A run is a function of its config: batches, noise and dropout are drawn from (seed, step), so that a run killed at
   any step and started again by the same command ends with the same weights, bit for bit (one worker, CPU).
2. Checkpoints are this file's own, atomic and in the run's folder; Ray Train restarts a dead worker, which goes on from
   the newest. `ray.train.report` is never called: it blocks until the controller polls.
3. `best` is chosen by the bound on fixed validation rows, and by nothing else, among the validations at which every
   head had joined (`critic.end`, `sampler.start`) if the run gets that far.
4. Readings are kept in `curve.jsonl` as well, for figures; a resumed run cuts off those that it makes again.
5. The device is waited for at readings only (every `log_every` steps, before validations and checkpoints), where a
   figure that is not finite ends the run before it reaches a checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.classifier import SequenceScorer, Teacher, TokenClassifier
from actors.pretrainer import Pretrainer
from grpo.checkpoint import load_checkpoint, load_into, save_checkpoint
from grpo.config import Config
from grpo.config_file import to_dict
from grpo.data import VALIDATION_WINDOWS_SEED, Cursor, Dataset, open_dataset, windows
from grpo.files import write_text
from grpo.metrics import merge_sums
from grpo.model import GPT
from grpo.run_checkpoints import checkpoint_folder, newest_step, prune_checkpoints
from pipelines.ranks import Ranks, agreed, check_shared, worker_ranks
from pipelines.tracking import Tracker

KEEP = 2
"""Checkpoints kept."""
REPORT_S = 0.3
"""Seconds between two messages to the board."""
SHOWN = ("loss_unmask", "loss_next", "loss_wrong", "loss_scorer", "loss_critic", "p_mask_unmask", "val_nelbo_nats",
         "val_loss", "tokens_per_s")
"""Figures of the live line, where a run has them."""

Report = Callable[[int, dict[str, float]], bool]
"""report(steps done, newest figures) -> whether to stop."""
Log = Callable[[dict[str, float], int], None]
"""log(figures, step)."""


@dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """What every rank of a pretraining is told."""

    config: Config
    dataset: Path
    folder: Path


def worker_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on each rank."""
    job: PretrainJob = settings["job"]
    ranks = worker_ranks(job.config.run.threads)
    try:
        check_shared(job.folder, ranks)
        if ranks.rank > 0:
            return train(job, ranks, lambda done, figures: False, lambda figures, step: None)
        board = settings["board"]
        with Tracker(settings["tracking"], job.folder, job.folder.name, run_id=settings["mlflow_run"], writer="rank0",
                     warn=lambda text: board.note.remote(text)) as tracker:
            return train(job, ranks, _reporter(board, job.config.pretrain.steps), tracker.log)
    except ValueError as error:  # what a user wrote: no restart would help, and Ray Train would wrap it in a traceback
        return {"error": str(error)}


def _reporter(board: Any, total: int) -> Report:
    """Tell the board about a step, at most every `REPORT_S`, and learn whether somebody wants to stop."""
    import ray

    last, answer, stop = 0.0, None, False

    def report(done: int, figures: dict[str, float]) -> bool:
        nonlocal last, answer, stop
        if answer is not None and ray.wait([answer], timeout=0)[0]:
            stop, answer = stop or ray.get(answer, timeout=30), None
        if done == total or (answer is None and time.monotonic() - last > REPORT_S):
            shown = {name: figures[name] for name in SHOWN if name in figures}
            last, answer = time.monotonic(), board.report.remote("pretrain", done, total, shown)
        return stop

    return report


def make_trainer(config: Config, dataset: Dataset, ranks: Ranks) -> Pretrainer:
    """The learner of `pretrain.mode`, with fresh weights that are the same on every rank."""
    settings = config.pretrain
    torch.manual_seed(config.run.seed)
    model = GPT(config.model, dataset.vocabulary, mode=settings.mode, block_size=config.data.block_size,
                reward=config.reward)
    if settings.mode == "generator":
        return Pretrainer(model, config, **vars(ranks))
    teacher = Teacher(settings.teacher, dataset.tokenizer, ranks.device)
    learner = {"token_classifier": TokenClassifier, "sequence_scorer": SequenceScorer}[settings.mode]
    return learner(model, config, teacher, **vars(ranks))


def train(job: PretrainJob, ranks: Ranks, report: Report, log: Log) -> dict[str, Any]:
    """Train from the newest checkpoint to the last step, or until `report` says stop.

    Returns:
        The figures of the summary, or {"stopped": step}.
    """
    config, settings, block_size = job.config, job.config.pretrain, job.config.data.block_size
    num_tokens = settings.batch_size * block_size
    dataset = open_dataset(job.dataset)
    trainer = make_trainer(config, dataset, ranks)
    cursor = Cursor(dataset, "train", settings.batch_size, block_size, config.run.seed)
    rows = windows(dataset, "validation", settings.eval_rows, block_size, VALIDATION_WINDOWS_SEED)
    state = _resume(job.folder, trainer, ranks)
    step, read_at, sums, figures = state["step"], state.pop("read_at"), state.pop("sums"), {}
    curve = None
    if ranks.rank == 0:
        log({f"parameters/{part}": count for part, count in trainer.model.parameter_counts().items()}, 0)
        curve = _continued_curve(job.folder, step)
        for row in read_curve(job.folder):  # a killed process may have taken figures along; none is stored twice
            log({name: value for name, value in row.items() if name != "step"}, row["step"])
    mark = time.monotonic()

    def save(folder: Path, **more: Any) -> None:
        save_checkpoint(folder, trainer.model, config=to_dict(config), tokenizer=dataset.tokenizer,
                        state={**state, "step": step, "mask_bias": trainer.mask_bias.state_dict(), **more},
                        provenance=[dataset.provenance])

    def save_to_resume() -> None:
        if ranks.rank == 0:
            save(checkpoint_folder(job.folder / "checkpoints", step), optimizer=trainer.tensors(), sums=sums,
                 read_at=read_at)
            prune_checkpoints(job.folder / "checkpoints", KEEP, step)

    while step < settings.steps:
        if _all_stop(report(step, figures), ranks, step % settings.log_every == 0):
            if sums:
                _finite(trainer.read(sums), read_at, step)
            state["trained_s"] += time.monotonic() - mark
            save_to_resume()
            return {"stopped": step}
        sums = merge_sums(sums, trainer.step(step, cursor.batch(step, rows=trainer.rows())))
        step += 1
        ends = step == settings.steps
        validates, saves = step % settings.eval_every == 0 or ends, step % settings.checkpoint_every == 0 or ends
        if not (step % settings.log_every == 0 or validates or saves):
            continue
        figures = _finite(trainer.read(sums), read_at, step)
        seconds = time.monotonic() - mark
        state["trained_s"] += seconds
        figures |= {"tokens_per_s": (step - max(read_at, state["step"])) * num_tokens / seconds,
                    "learning_rate": trainer.optimizer.param_groups[0]["lr"]}
        if validates and ranks.rank == 0:
            state["last"] = trainer.validate(rows, dataset.bytes_per_token("validation"))
            figures |= state["last"]
            candidate = {"full": step >= _all_joined(config, trainer), "step": step, **state["last"]}
            if _better(candidate, state["best"], trainer.selects):
                state["best"] = candidate
                save(job.folder / "best")
        log(figures, step)
        if curve is not None:
            with curve.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
        sums, read_at = {}, step
        if saves:
            save_to_resume()
        mark = time.monotonic()
    report(step, figures)
    return {"params": sum(p.numel() for p in trainer.model.parameters()), "steps": step,
            "tokens_per_s": step * num_tokens / max(state["trained_s"], 1e-9),
            "train_s": state["trained_s"], "best_step": state["best"].get("step"),
            **{name: value for name, value in state["best"].items() if name not in ("full", "step")},
            **{f"last_{name}": value for name, value in state["last"].items()}}


def read_curve(folder: Path) -> list[dict[str, float]]:
    """The readings of a pretraining, with their `step`; none where none were kept."""
    path = folder / "curve.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _continued_curve(folder: Path, step: int) -> Path:
    """The file of readings, without those after a step."""
    rows = [row for row in read_curve(folder) if row["step"] <= step]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "curve.jsonl"
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def _resume(folder: Path, trainer: Pretrainer, ranks: Ranks) -> dict[str, Any]:
    """Load the checkpoint that is the newest to rank 0, if there is one; returns the loop's state."""
    newest = agreed(newest_step(folder) if ranks.rank == 0 else 0, ranks)
    if not newest:
        return {"step": 0, "read_at": 0, "sums": {}, "trained_s": 0.0, "last": {}, "best": {}}
    newest = checkpoint_folder(folder / "checkpoints", newest)
    checkpoint = load_checkpoint(newest)
    try:
        load_into(trainer.model, checkpoint.tensors)
    except ValueError as error:
        raise ValueError(f"{newest}: {error}; choose another run.name") from error
    state = dict(checkpoint.state)
    trainer.load(state.pop("optimizer"), state.pop("mask_bias"))
    sums = {name: pair.to(trainer.device) for name, pair in state["sums"].items()}
    return state | {"sums": sums}


def _all_stop(stop: bool, ranks: Ranks, meeting: bool) -> bool:
    """Whether to leave now. All ranks must leave after the same step, so they ask each other, but only at meetings."""
    if ranks.world == 1:
        return stop
    return meeting and bool(agreed(int(stop), ranks))


def _finite(figures: dict[str, float], first: int, last: int) -> dict[str, float]:
    for name in sorted(figures, key=lambda name: not name.startswith("loss")):
        if not math.isfinite(figures[name]):
            raise ValueError(f"{name} became {figures[name]} within steps {first + 1} to {last}: lower "
                             "pretrain.learning_rate and choose another run.name; the last good checkpoint is kept")
    return figures


def _all_joined(config: Config, trainer: Pretrainer) -> int:
    """The step from which every head trains at full weight, or the last one."""
    heads = trainer.model.heads
    joined = max(config.critic.end if "critic" in heads else 0, config.sampler.start if "sampler" in heads else 0)
    return min(joined, config.pretrain.steps)


def _better(candidate: dict[str, Any], best: dict[str, Any], figure: str) -> bool:
    """A validation with every head in it beats one without; then the lower figure does."""
    rank = lambda row: (not row["full"], math.inf if math.isnan(row[figure]) else row[figure])  # noqa: E731
    return not best or rank(candidate) < rank(best)
