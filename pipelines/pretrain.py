"""Pretrain a generator (or a stand-alone classifier of its errors) in one long-lived Ray Train loop.

    python pipelines/pretrain.py --config configs/tiny.yaml run.name=first pretrain.steps=2000

    runs/NAME/config.yaml      the resolved config          runs/NAME/best/          the model with the best bound
    runs/NAME/summary.json     figures, when it is done     runs/NAME/checkpoints/   the last two, to go on from

1. `runs/NAME` belongs to one config: the same command goes on where the last one ended, another config is refused.
2. Other pipelines call `pretrain` and find the model in `run.cache`, under the hash of everything that decides it.
3. SIGTERM and Ctrl-C write a checkpoint and leave with exit code 143.
4. On several machines `run.output` and `run.cache` must lie on storage that all of them see.
"""

from __future__ import annotations

import sys
from pathlib import Path

_here = Path(__file__).resolve().parent
if __name__ == "__main__":  # `python pipelines/pretrain.py` puts pipelines/ first, where grpo.py hides the package
    sys.path[:] = [str(_here.parent)] + [p for p in sys.path if Path(p or ".").resolve() != _here]

# ruff: noqa: E402
import argparse
import contextlib
import json
import time
from dataclasses import replace
from typing import Any

from grpo.checkpoint import model_digest
from grpo.config import Config, PretrainSection
from grpo.config_file import config_hash, save_config, to_dict
from grpo.data import Dataset, open_dataset, windows
from grpo.files import write_json
from grpo.run_checkpoints import find_checkpoint, newest_step
from pipelines.figures import pretrain_figure, series
from pipelines.fit import fit
from pipelines.launch import launch, start_ray
from pipelines.placement import computes_on, may_grow, node_resources, on_gpu, total
from pipelines.prepare import prepare
from pipelines.pretrain_loop import PretrainJob, make_trainer, read_curve, worker_loop
from pipelines.progress import Display, summary_table
from pipelines.ranks import Ranks
from pipelines.run_folder import alone, check_same, run_folder
from pipelines.tracking import Tracker, tracking_uri

BOOKKEEPING = ("num_workers", "micro_batches", "log_every", "checkpoint_every")
"""Fields of `pretrain` that change no weight (but for the order of summation)."""

PARTS = ("val_loss_", "val_p_mask_")
"""Figures of a validation that the curve and the summary hold, and the table at the end does without."""


def pretrain(config: Config, *, folder: Path | None = None, display: Display | None = None) -> Path:
    """The checkpoint folder of the pretrained model; trained now unless the folder holds it already.

    Args:
        folder: of the run; None: in `run.cache`, under the hash of everything that decides the weights.
        display: where progress goes, already entered; None: one of its own.

    Raises:
        ValueError: a mistake in config or data, a folder of another config, or a loss that is not finite.
        SystemExit: SIGTERM or Ctrl-C came; a checkpoint is written.
    """
    started = time.monotonic()
    with contextlib.nullcontext(display) if display else Display() as shown:
        dataset = open_dataset(prepare(config.data, config.run.cache, shown))
        for split, rows, key in (("train", 1, ""), ("validation", config.pretrain.eval_rows, "pretrain.eval_rows")):
            windows(dataset, split, rows, config.data.block_size, seed=0, key=key)  # too little text is said first
        if config.pretrain.mode != "generator":
            make_trainer(config, dataset, Ranks())  # and so is a teacher that does not fit
        decides = what_decides(config, dataset.folder)
        if folder is None:
            folder = Path(config.run.cache).expanduser().absolute() / f"base-{config_hash(decides)}"
        with alone(folder):
            check_same(folder, decides)
            if not _is_over(folder, config.pretrain):
                if not display:
                    shown.note(f"data: {config.data.source}")
                save_config(config, folder / "config.yaml")
                figures = _fit_and_track(config, dataset, folder, shown)
                summary = {"mode": config.pretrain.mode, **figures, "session_s": time.monotonic() - started}
                write_json(folder / "summary.json", summary)
    return folder / "best"


def _is_over(folder: Path, settings: PretrainSection) -> bool:
    """Whether the model is there with the summary of this training: another pipeline's has no mode and steps."""
    summary = folder / "summary.json"
    if not (summary.exists() and (folder / "best").exists()):
        return False
    figures = json.loads(summary.read_text(encoding="utf-8"))
    return (figures.get("mode"), figures.get("steps")) == (settings.mode, settings.steps)


def what_decides(config: Config, dataset: Path) -> dict[str, Any]:
    """Everything that the weights are a function of, as plain values."""
    sections = to_dict(config)
    names = ["model", "corruption", "loss", "mask_bias", "critic", "sampler"]
    values = {"dataset": dataset.name, "run": {"seed": config.run.seed}}
    settings = {name: value for name, value in sections["pretrain"].items() if name not in BOOKKEEPING}
    if config.pretrain.mode == "sequence_scorer":
        names += ["denoise"]
        values |= {"reward": {"pooling": config.reward.pooling}, "grpo": {"prompt_tokens": config.grpo.prompt_tokens}}
    if config.pretrain.mode != "generator":
        settings["teacher"] = model_digest(find_checkpoint(config.pretrain.teacher, "pretrain.teacher"))
    return {**values, "pretrain": settings, **{name: sections[name] for name in names}}


def _fit_and_track(config: Config, dataset: Dataset, folder: Path, display: Display) -> dict[str, Any]:
    """Train under one MLflow run, which the driver owns and rank 0 writes to; returns rank 0's figures."""
    tracking = replace(config.tracking, uri=tracking_uri(config.tracking, config.run.output))
    with Tracker(tracking, folder, folder.name, config=to_dict(config), start_step=newest_step(folder) + 1) as tracker:
        tracker.dataset(dataset.folder, config.data.source, dataset.meta["splits"])
        start_ray()
        figures = _fit(PretrainJob(config=config, dataset=dataset.folder, folder=folder), tracker, display)
        if config.pretrain.mode == "generator":
            tracker.figure("pretraining", pretrain_figure(series(read_curve(folder)), target=config.mask_bias.target))
            tracker.model(folder / "best")
        else:
            tracker.artifact(folder / "best", "checkpoint")
        return figures


def _fit(job: PretrainJob, tracker: Tracker, display: Display) -> dict[str, Any]:
    """Run the loop on Ray Train."""
    import ray.train

    cluster, num_workers, nodes = job.config.cluster, job.config.pretrain.num_workers, node_resources()
    kind = "GPU" if on_gpu(cluster, nodes) else "CPU"
    if num_workers > total(nodes, kind) and not may_grow(cluster):
        raise ValueError(f"pretrain.num_workers is {num_workers}, the cluster has {total(nodes, kind):g} {kind}s")
    device = computes_on(cluster, nodes, num_workers, "pretrain.num_workers")
    display.note(f"pretraining {device}")
    workers = ray.train.ScalingConfig(num_workers=num_workers, use_gpu=kind == "GPU")
    return fit(worker_loop, job, tracker, display, workers=workers, unit="step")


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    folder = run_folder(config.run, f"pretrain-{config_hash(config)}", trains=True)
    pretrain(config, folder=folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = [[key, value] for key, value in summary.items() if not key.removeprefix("last_").startswith(PARTS)]
    summary_table(f"pretrain {folder.name}", rows, ["", "value"])
    model, teacher = folder / "best", config.pretrain.teacher
    shows = {
        "generator": f"sample.py --checkpoint {model}",
        "token_classifier": f"sample.py --checkpoint {teacher} denoise.remasking=model denoise.randomness=0.3 "
                            f"denoise.remasking_model={model}",
        "sequence_scorer": f"evaluate.py --checkpoint {teacher} evaluation.scorer={model}",
    }[config.pretrain.mode]
    print(f"model    {model}\nsummary  {folder / 'summary.json'}\n"
          f"curves   mlflow ui --backend-store-uri {tracking_uri(config.tracking, config.run.output)}\n"
          f"next     python pipelines/{shows}")
    return summary


if __name__ == "__main__":
    launch(main, __doc__)
