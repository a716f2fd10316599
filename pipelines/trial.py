"""One trial of a sweep, in one process: a base model, adversarial rounds on it, and measurements in between.

1. A trial is what `pipelines/grpo.py` does with the same config: the same loops, actors and measures, without the
   start-up of Ray Train. Where swept keys decide nothing of pretraining, all trials share one base and its published
   trunk; otherwise each pretrains its own.
2. A trial is a function of its swept values and lives in a folder named by them. `step` takes the next report from
   there, or makes it: a sweep that is started again is told what it knew, and nothing is done twice.
3. Quality is measured at the temperature that gives the token entropy of natural text, so that no trial wins by a knob.
   A generator that repeats itself at every temperature has none: where the objective is a figure of its text, the trial
   fails. One that is too random at every temperature is measured at the lowest; `entropy_error_matched` tells.
4. Of pretraining's p(MASK) at masked positions, as a moving average that is the same for all trials: when it settled
   (within `TOLERANCE` of the target to the end; the number of steps, if never), how far it overshot, and its mean
   distance to the target in the last quarter.
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from actors.torch_setup import set_up_torch, worker_threads
from grpo.config import Config, TrackingSection
from grpo.config_file import config_hash, save_config, with_values
from grpo.files import write_json
from grpo.metrics import overshoot, settle_index
from pipelines import pretrain_loop, rounds
from pipelines.grpo import Paths, check_base, start_actors
from pipelines.measurements import FIGURES, OF_TEXT, is_matched, measure
from pipelines.pretrain_loop import read_curve
from pipelines.ranks import Ranks
from pipelines.rollouts import RoundsJob
from pipelines.run_folder import alone
from pipelines.tracking import Tracker, mlflow_variables

TOLERANCE = 0.05
"""Of p(MASK)."""
MEASURED = tuple(f"{name}_matched" for name in FIGURES)
"""Figures of every report: those of the generator's text and bound."""
AT_ENTROPY = tuple(f"{name}_matched" for name in OF_TEXT)
"""Those that mean little at a lower token entropy: text that repeats itself is likely."""
PRETRAINED = (
    "val_nelbo_nats", "val_nelbo_se", "val_bpb", "critic_auroc", "critic_ece", "p_mask_settled_step",
    "p_mask_overshoot", "p_mask_error", "mask_bias_final",
)
"""Figures of every report of a trial with a base of its own, as far as the base has a critic and a mask bias."""
WINDOW = 5
"""Readings of p(MASK), each a mean over `pretrain.log_every` steps, that are averaged."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the trials of a sweep have in common."""

    config: Config
    """Before any swept value, with absolute folders."""
    folder: Path
    """Of the sweep."""
    dataset: Path
    judge: Path
    base: Path | None
    """The base model of all trials; None: each has its own."""
    trunk: tuple[Any] | None
    """Reference of the base's published trunk."""
    entropy: float
    """Token entropy of natural text, nats."""
    tracking: TrackingSection
    """With the URI that the driver resolved."""
    mlflow_run: str | None
    """The sweep's run, of which those of the trials are children."""
    board: Any
    """Handle of the `ProgressBoard` actor."""
    device: str
    mlflow: dict[str, str] = field(default_factory=mlflow_variables, repr=False)
    """The driver's."""
    neighbors: int
    """Trials that run at once on one machine, this one included."""


def trial_folder(sweep: Path, values: dict[str, Any]) -> Path:
    return sweep / "trials" / config_hash(dict(sorted(values.items())))[:8]


def read_trial(folder: Path) -> dict[str, Any] | None:
    """A trial's record: values, status, reports; None before its first word."""
    path = folder / "trial.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def new_record(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The record of a trial that begins."""
    return {"trial": folder.name, "values": values, "status": "running", "started": time.time(), "wall_s": 0.0,
            "reports": []}


class Trial:
    """A trial in a process: `step` gives one report after another, `close` lets go of actors and tracking."""

    def __init__(self, shared: Shared, values: dict[str, Any]) -> None:
        self.shared, self.folder = shared, trial_folder(shared.folder, values)
        self.base, self.ranks = shared.base or self.folder / "base" / "best", Ranks(device=shared.device)
        self.open, self.reported = ExitStack(), 0
        self.tracker: Tracker | None = None
        self.job: RoundsJob | None = None
        os.environ.update(shared.mlflow)
        self.open.enter_context(alone(self.folder))
        self.record = read_trial(self.folder) or new_record(self.folder, values)
        write_json(self.folder / "trial.json", self.record)
        set_up_torch(shared.device, worker_threads(shared.config.run.threads, shared.neighbors))

    def step(self) -> dict[str, float]:
        """The next report: figures so far, the first one after pretraining, then one after each stretch of rounds."""
        if self.record["status"] == "failed":
            raise RuntimeError(self.record["reason"])
        if self.reported == len(self.record["reports"]):
            try:
                self._advance()
            except Exception as error:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                write_json(self.folder / "trial.json", {**self.record, "status": "failed", "reason": reason})
                if self.tracker:
                    self.tracker.finish("FAILED")
                raise
        self.reported += 1
        return self.record["reports"][self.reported - 1]

    def close(self) -> None:
        self.open.close()

    def _advance(self) -> None:
        """Make the next report."""
        started, sweep = time.monotonic(), self.shared.config.sweep
        self.record["status"] = "running"  # it may have been stopped when trials came in another order
        self.record.pop("reason", None)
        if self.tracker is None:
            self._begin()
        figures = self._rounds(self.reported) if self.reported else self._pretrain()
        _release()
        newest = self.folder / "final" if self.reported else self.base
        row = measure(self.config, self.shared.dataset, self.shared.judge, newest, self.shared.entropy,
                      neighbors=self.shared.neighbors)
        _release()
        if sweep.objective in AT_ENTROPY and row["entropy"] < self.shared.entropy and not is_matched(row):
            raise ValueError(f"its token entropy comes no nearer to natural text's {self.shared.entropy:.3f} nats than "
                             f"{row['entropy']:.3f}, at temperature {row['temperature']:.3g}: {sweep.objective}, which "
                             "is sweep.objective, is not at equal entropy")
        quality = {matched: row[name] for matched, name in zip(MEASURED, FIGURES, strict=True)}
        figures, quality = _finite(figures), _finite(quality)
        self.tracker.log(quality, self._rounds_until(self.reported) if self.reported else 0)
        report = {**(self.record["reports"][-1] if self.reported else {}), **figures, **quality}
        if sweep.objective not in report:
            raise ValueError(f"{sweep.objective}, which is sweep.objective, cannot be measured in this trial")
        self.record["reports"].append(report)
        self.record["wall_s"] += time.monotonic() - started
        if self.reported == sweep.stretches:
            self.record["status"] = "finished"
            self.tracker.artifact(self.folder / "final", "checkpoint")
        self.tracker.flush()  # what is on record is not logged again
        write_json(self.folder / "trial.json", self.record)

    def _begin(self) -> None:
        """Resolve the config, which may refuse this combination of values, as may the base, and start tracking."""
        config = with_values(self.shared.config, self.record["values"], "sweep.space")
        single = {"num_workers": 1, "rollout_actors": 1}
        self.config = replace(
            config, grpo=replace(config.grpo, **single), pretrain=replace(config.pretrain, num_workers=1)
        )
        if self.shared.base:
            check_base(self.shared.base, self.config, self.shared.dataset)
        self.tracker = self.open.enter_context(
            Tracker(self.shared.tracking, self.folder, self.folder.name, config=self.record["values"],
                    parent_run_id=self.shared.mlflow_run, warn=lambda text: self.shared.board.note.remote(text))
        )
        save_config(self.config, self.folder / "config.yaml")
        self.tracker.artifact(self.folder / "config.yaml")

    # ---- pretraining ----------------------------------------------------------------------------------------------

    def _pretrain(self) -> dict[str, float]:
        """Pretrain the trial's own base, if it has one; its bound, its critic, and how its mask bias fared."""
        if self.shared.base:
            return {}
        folder = self.folder / "base"

        def log(figures: dict[str, float], step: int) -> None:
            self.tracker.log({f"pretrain/{name}": value for name, value in figures.items()}, step)

        job = pretrain_loop.PretrainJob(config=self.config, dataset=self.shared.dataset, folder=folder)
        figures = pretrain_loop.train(job, self.ranks, lambda step, figures: False, log)
        figures |= settling(read_curve(folder), self.config.mask_bias.target, self.config.pretrain.steps)
        return {name: figures[name] for name in PRETRAINED if name in figures}

    # ---- adversarial rounds ---------------------------------------------------------------------------------------

    def _rounds_until(self, stretch: int) -> int:
        return -(-self.config.grpo.rounds * stretch // self.config.sweep.stretches)

    def _rounds(self, stretch: int) -> dict[str, float]:
        """The rounds up to the end of a stretch; means of its rounds' figures."""
        if self.job is None:
            paths = Paths(dataset=self.shared.dataset, base=self.base, judge=self.shared.judge)
            same = self.config.grpo.trunk_dtype == self.shared.config.grpo.trunk_dtype
            trunk = self.shared.trunk[0] if self.shared.trunk and same else None
            actors = start_actors(self.config, paths, self.folder, trunk, neighbors=self.shared.neighbors)
            self.job = self.open.enter_context(actors)
            self.logged = -1

        def log(figures: dict[str, float], round: int) -> None:
            if round > self.logged:
                self.tracker.log(figures, round)
                self.logged = round

        grpo = replace(self.config.grpo, rounds=self._rounds_until(stretch))
        job = replace(self.job, config=replace(self.config, grpo=grpo))
        history = rounds.train(job, self.ranks, log, lambda done, total, figures: False)["history"]
        first = self.config.warmup_rounds + self._rounds_until(stretch - 1)
        rows = [row for row in history if row["step"] > first]
        return means_of(rows)


def means_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means of figures over the rounds that have them: a round of fresh rollouts, for example, has no importance."""
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    return {name: fmean(row[name] for row in rows if name in row) for name in names}


def settling(curve: list[dict[str, float]], target: float, num_steps: int) -> dict[str, float]:
    """How p(MASK) at masked positions came to its target, by the readings of pretraining; nothing without any."""
    rows = [row for row in curve if "p_mask_unmask" in row]
    if not rows:
        return {}
    window = min(WINDOW, len(rows))
    signal = torch.tensor([row["p_mask_unmask"] for row in rows]).unfold(0, window, 1).mean(-1)
    settled = settle_index(signal, target, TOLERANCE)
    last = signal[3 * len(signal) // 4 :]
    return {
        "p_mask_settled_step": float(num_steps if settled is None else rows[settled + window - 1]["step"]),
        "p_mask_overshoot": overshoot(signal, target),
        "p_mask_error": float((last - target).abs().mean()),
        "mask_bias_final": rows[-1]["mask_bias"],
    }


def _release() -> None:
    """Hand back GPU memory that this process no longer needs and would keep from its actors and neighbours."""
    if torch.cuda.is_initialized():
        gc.collect()  # a cycle through torch's imports holds what made the process's first optimizer
        torch.cuda.empty_cache()


def _finite(figures: dict[str, float]) -> dict[str, float]:
    """Without what could not be measured, such as the AUROC of a critic that saw no error."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}
