"""Evaluate a generator: its bound, and its text beside natural text by measures that were never a reward.

    python pipelines/evaluate.py --checkpoint runs/NAME denoise.steps=8
    python pipelines/evaluate.py --checkpoint runs/NAME --base BASE 'evaluation.temperature=[0.8,1.0,1.2]' \
        'evaluation.steps=[4,8,16]' 'evaluation.sampler=[false,true]'

    runs/evaluate-HASH/summary.json          every row; `run.name` on the command line names the folder
    runs/evaluate-HASH/figures/frontier.png  quality against diversity

1. What is measured, and on what text, is in `pipelines/measurements.py`. Measurements run side by side.
2. The lists of the section `evaluation` are crossed; each model is measured at every combination.
"""

from __future__ import annotations

import sys
from pathlib import Path

_here = Path(__file__).resolve().parent
if __name__ == "__main__":  # `python pipelines/evaluate.py` puts pipelines/ first, where grpo.py hides the package
    sys.path[:] = [str(_here.parent)] + [p for p in sys.path if Path(p or ".").resolve() != _here]

# ruff: noqa: E402
import argparse
import itertools
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from grpo.checkpoint import load_model, load_tokenizer
from grpo.completion import load_remasking_model
from grpo.config import Config, DenoiseSection
from grpo.config_file import config_hash, save_config, to_dict
from grpo.config_model import check
from grpo.data import Dataset, open_dataset
from grpo.files import write_json
from grpo.remasking import forwards, resolve_policy
from grpo.reward_functions import resolve_rewards
from grpo.run_checkpoints import find_checkpoint
from pipelines.figures import frontier_figure, nfe_figure
from pipelines.launch import checkpoint_config, launch, start_ray
from pipelines.measurements import (
    check_enough,
    check_splits,
    fit_judge,
    follow_judge,
    judge_folder,
    load_scorer,
    measure,
    measure_natural,
    weak_judge,
)
from pipelines.placement import at_once, node_resources, task_options
from pipelines.prepare import prepare
from pipelines.progress import Display, awaited, follow, overdue, summary_table
from pipelines.run_folder import run_folder
from pipelines.tracking import Tracker

SHOWN = {
    "judge_nll": "judge NLL",
    "entropy": "entropy",
    "distinct_4": "distinct-4",
    "c2st": "C2ST",
    "ngram_js": "n-gram JS",
    "self_bleu": "self-BLEU",
}
"""Figures of every row, and their headings."""
SWEPT = ("temperature", "top_p", "steps", "remasking", "sampler")
"""Keys of `evaluation` that are lists of values of the same keys of `denoise`."""


def grid(config: Config) -> list[DenoiseSection]:
    """The denoising settings that the lists of `evaluation` span."""
    lists = [getattr(config.evaluation, key) or (getattr(config.denoise, key),) for key in SWEPT]
    return [replace(config.denoise, **dict(zip(SWEPT, values, strict=True))) for values in itertools.product(*lists)]


def check_model(option: str, checkpoint: Path, config: Config, dataset: Dataset) -> None:
    """Raise a one-line ValueError where the checkpoint that an option names cannot be measured on this text at each of
    the settings."""
    if load_tokenizer(checkpoint).fingerprint != dataset.tokenizer.fingerprint:
        remedy = f"set data.tokenizer={checkpoint}/tokenizer" if option == "--checkpoint" else "give another"
        raise ValueError(f"{option} {checkpoint} reads other tokens than the data: {remedy}")
    model = load_model(checkpoint)
    if model.mode != "language_model":
        raise ValueError(f"{option} {checkpoint} is a {model.mode}: give that of a generator")
    check(config.data.block_size <= model.block_size, "data.block_size",
          f"at most {model.block_size}, that of {option} {checkpoint}", config.data.block_size)
    check_splits(checkpoint, config.data, dataset, option)
    if model.trunk.causal:
        return
    for denoise in grid(config):
        resolve_policy(denoise.remasking, model, load_remasking_model(denoise, tokenizer=dataset.tokenizer))
        if denoise.sampler and "sampler" not in model.heads:
            raise ValueError(f"{option} {checkpoint} has no sampler head: denoise.sampler and evaluation.sampler must "
                             "be false")


def reward_columns(row: dict[str, Any]) -> dict[str, str]:
    """A heading for each of a row's rewards: the function's name, or all of it where two functions share one."""
    names = {key: key.rpartition(".")[2] for key in row if key.startswith("rewards/")}
    return {key: name if list(names.values()).count(name) == 1 else key for key, name in names.items()}


def asked_columns(row: dict[str, Any]) -> dict[str, str]:
    """Headings of the figures that a row has because a config asks for them."""
    return ({"scorer": "scorer"} if "scorer" in row else {}) | reward_columns(row)


def quality_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print rows of measurements, the classifier's accuracy with its 95 % interval."""
    asked = asked_columns(next(iter(rows.values())))
    columns = ["temperature", *SHOWN, *asked, "tokens_per_s"]
    summary_table(
        title,
        [[name, *(_cell(row, column) for column in columns)] for name, row in rows.items()],
        ["text", "temperature", *SHOWN.values(), *asked.values(), "tokens/s"],
    )


def measure_grid(
    config: Config, dataset: Path, judge: Path, checkpoints: dict[str, Path], display: Display
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of natural text, and one for each model at each setting; models alternate, and a model's first row holds
    its bound.
    """
    import ray

    settings, options, tasks = grid(config), task_options(config.cluster), {}
    remote, total = ray.remote(**options)(measure), len(settings) * len(checkpoints) + 1  # natural text beside them
    neighbors = min(total, at_once(node_resources(), {"CPU": options["num_cpus"], "GPU": options["num_gpus"]})[1])
    natural = ray.remote(**options)(measure_natural).remote(config, dataset, judge, neighbors=neighbors)
    for index, denoise in enumerate(settings):
        for name, checkpoint in checkpoints.items():
            at = replace(config, denoise=denoise)
            tasks[remote.remote(at, dataset, judge, checkpoint, bound=not index, neighbors=neighbors)] = (name, denoise)
    waiting, done = list(tasks), {}
    with follow(overdue("the first setting to be measured", lambda: bool(done)), display):
        while waiting:
            display.phase("settings measured", len(done), len(tasks))
            ready, waiting = ray.wait(waiting)
            done |= {task: ray.get(task) for task in ready}
    display.phase("settings measured", len(done), len(tasks))
    models = {name: load_model(checkpoint) for name, checkpoint in checkpoints.items()}
    rows = []
    for task, (name, denoise) in tasks.items():
        causal = models[name].trunk.causal
        policy = "none" if causal else resolve_policy(denoise.remasking, models[name], load_remasking_model(denoise))
        what = {key: getattr(denoise, key) for key in SWEPT} | {"remasking": policy}
        length = config.data.block_size - config.grpo.prompt_tokens
        nfe = length if causal else forwards(policy, denoise.steps, denoise.randomness)
        rows.append({"model": name, **what, "nfe": nfe, **done[task]})
    return awaited([natural], "natural text to be measured", display)[0], rows


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    import ray

    checkpoints = {"model": find_checkpoint(args.checkpoint, "--checkpoint")}
    if args.base:
        checkpoints["base"] = find_checkpoint(args.base, "--base")
    folder = run_folder(config.run, f"evaluate-{config_hash(*map(str, checkpoints.values()), config)}")
    resolve_rewards(config.grpo.rewards)  # a name that nobody has is said before anything starts
    of = {key: str(path) for key, path in checkpoints.items()}
    with Display() as display, ExitStack() as stack:
        dataset = prepare(config.data, config.run.cache, display)
        check_enough(config, dataset)
        load_scorer(config.evaluation.scorer, open_dataset(dataset).tokenizer)
        for option, checkpoint in zip(("--checkpoint", "--base"), checkpoints.values(), strict=False):
            check_model(option, checkpoint, config, open_dataset(dataset))
        folder.mkdir(parents=True, exist_ok=True)
        told = {"config": to_dict(config), "inputs": {"checkpoints": of}}
        tracker = stack.enter_context(Tracker(config.tracking, folder, folder.name, **told, resumes=False))
        start_ray()
        follow_judge(ray.remote(**task_options(config.cluster))(fit_judge).remote(config, dataset), display)
        judge = judge_folder(config, dataset)
        natural, rows = measure_grid(config, dataset, judge, checkpoints, display)
        save_config(config, folder / "config.yaml")
        bounded = [row for row in rows if "nelbo_bpb" in row]
        bounds = {row["model"]: row["nelbo_bpb"] for row in bounded}
        if weak := weak_judge(natural["judge_bpb"], min(bounds.values())):
            display.note(weak)
        summary = {"checkpoints": of, "judge": judge.name,
                   "weak_judge": weak, "nelbo_bpb": bounds, "natural": natural, "rows": rows}
        write_json(folder / "summary.json", summary)
        tracker.figure("frontier", frontier_figure(rows, natural))
        tracker.figure("nfe", nfe_figure(rows, natural))
        tracker.artifact(folder / "summary.json")
        figures = (*SHOWN, *asked_columns(natural), "tokens_per_s")
        for step, row in enumerate(rows):
            tracker.log({f"{row['model']}/{key}": row[key] for key in figures}, step)
        for row in bounded:
            tracker.log({f"{row['model']}/{key}": row[key] for key in ("nelbo_bpb", "nelbo_nats", "nelbo_se")}, 0)
        columns = ["model", *SWEPT, "nfe", *figures, "c2st_ci95"]
        tracker.table("settings", [[step, *(row[key] for key in columns)] for step, row in enumerate(rows)],
                      ["step", *columns])
    quality_table(str(checkpoints["model"]), {"natural": natural} | {_label(row): row for row in rows})
    for row in bounded:
        print(f"bound    {row['model']}: {row['nelbo_bpb']:.3f} bits per byte, {row['nelbo_nats']:.3f} +- "
              f"{1.96 * row['nelbo_se']:.3f} nats per token")
    print(f"figure   {folder / 'figures' / 'frontier.png'}\nsummary  {folder / 'summary.json'}")
    return summary


def _cell(row: dict[str, Any], column: str) -> Any:
    if column != "c2st":
        return row.get(column)
    low, high = row["c2st_ci95"]
    return f"{row['c2st']:.3f} +- {(high - low) / 2:.3f}"


def _label(row: dict[str, Any]) -> str:
    words = [row["model"], f"{row['steps']} steps", row["remasking"], *(["sampler"] if row["sampler"] else [])]
    words += [f"top_p {row['top_p']}"] if row["top_p"] < 1 else []
    return f"{' '.join(words)} @ {row['temperature']:g}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or a run's folder")
    parser.add_argument("--base", default="", help="another checkpoint to measure beside it, such as its base")


if __name__ == "__main__":
    launch(main, __doc__, base=checkpoint_config, arguments=add_arguments)
