"""Sweep any keys of a config with Ray Tune: which values make the best generator?

    python pipelines/sweep.py --config configs/sweep.yaml run.name=gains sweep.trials=16

    runs/NAME/best.yaml     the best trial's config: `pipelines/grpo.py --config` runs it
    runs/NAME/trials.json   every trial, failed ones with their reason; runs/NAME/trials/ID/ has its files
    runs/NAME/figures/      parallel coordinates, response to each key, how p(MASK) came to its target

1. As many trials run at once as the cluster has CPUs (GPUs, if it has any). All share the data set and the judge; the
   base model and its published trunk as well, unless a swept key decides something of pretraining.
2. Every trial is a nested MLflow run whose params are the swept keys.
3. The same command goes on after whatever ended the sweep. What a trial has reported lies in its folder, and is told to
   Tune again: searcher and ASHA learn what they knew, no trial is lost, and none runs twice.
"""

from __future__ import annotations

import sys
from pathlib import Path

_here = Path(__file__).resolve().parent
if __name__ == "__main__":  # `python pipelines/sweep.py` puts pipelines/ first, where grpo.py hides the package
    sys.path[:] = [str(_here.parent)] + [p for p in sys.path if Path(p or ".").resolve() != _here]

# ruff: noqa: E402
import argparse
import logging
import math
import os
import shutil
import time
from collections import Counter
from dataclasses import replace
from typing import Any

from grpo.config import Config
from grpo.config_file import config_hash, save_config, to_dict, value_at, with_values
from grpo.config_model import one_of
from grpo.config_sweep import SweepSection
from grpo.data import open_dataset
from grpo.files import write_json
from grpo.reward_functions import resolve_rewards
from pipelines.fit import beside_main_thread
from pipelines.grpo import base_of, check_base, judge_beside, publish_trunk
from pipelines.launch import launch, start_ray
from pipelines.measurements import check_enough, judge_folder, measure_natural
from pipelines.placement import at_once, check_fits, check_seen, node_resources, on_gpu, task_options
from pipelines.prepare import prepare
from pipelines.pretrain import what_decides
from pipelines.pretrain_loop import read_curve
from pipelines.progress import Display, awaited, follow, overdue, start_board, summary_table
from pipelines.run_folder import alone, check_same, run_folder
from pipelines.sweep_figures import approaches, parallel_coordinates, responses
from pipelines.tracking import Tracker, tracking_uri
from pipelines.trial import MEASURED, PRETRAINED, Shared, Trial, new_record, read_trial, trial_folder

SHARED_SECTIONS = ("run", "data", "evaluation", "tracking", "cluster", "sweep")
"""What all trials have in common; of `run`, the seed alone may be swept."""
SHARED_KEYS = ("grpo.base", "grpo.num_workers", "grpo.rollout_actors", "pretrain.num_workers")
"""The same of other sections: a trial has the sweep's base or its own, and one process with one actor of a kind."""
COLUMNS = ("val_bpb", "p_mask_settled_step", "p_mask_overshoot", "critic_auroc", "wall_s")
"""Figures of the table, beside the swept keys and the objective, where trials have them."""


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    check_space(config)
    check_objective(config)
    weights = {key: values[0] for key, (_, values) in config.sweep.ranges.items() if key.startswith("grpo.rewards.")}
    resolve_rewards(with_values(config, weights, "sweep.space").grpo.rewards)  # an unknown name is said first
    folder = run_folder(config.run, f"sweep-{config_hash(config)}", trains=True)
    cache = str(Path(config.run.cache).expanduser().absolute())
    placed = replace(config, run=replace(config.run, output=str(folder.parent), cache=cache))
    with alone(folder), Display() as display:
        shared = _prepare(placed, folder, display)
        check_same(folder, _what_decides(shared), begun=bool(read_trials(folder)))
        save_config(config, folder / "config.yaml")
        with Tracker(config.tracking, folder, folder.name, config=to_dict(config)) as tracker:
            meta = open_dataset(shared.dataset).meta
            tracker.dataset(shared.dataset, config.data.source, meta["splits"])
            _search(replace(shared, mlflow_run=tracker.run_id), display)
            trials = read_trials(folder)
            best = best_trial(trials, config.sweep)
            summary = {
                "session_s": time.monotonic() - started,
                "trials": Counter(trial["status"] for trial in trials),
                "objective": config.sweep.objective,
                "best": best and {key: best[key] for key in ("trial", "values", "reports")},
                "mlflow_run_id": tracker.run_id,
            }
            write_json(folder / "trials.json", trials)
            write_json(folder / "summary.json", summary)
            _publish(config, folder, tracker, trials, best)
    _show(config, folder, trials, best)
    if best is None:
        raise ValueError(f"no trial of {folder} finished; the first reason: {_reason(trials)}")
    return summary


def check_space(config: Config) -> None:
    """Every swept key must exist, take its range's values, and belong to the trials.

    Raises:
        ValueError: one line naming the key.
    """
    for key, (_, values) in config.sweep.ranges.items():
        section = key.partition(".")[0]
        if key in SHARED_KEYS or (section in SHARED_SECTIONS and key != "run.seed"):
            raise ValueError(f"sweep.space.{key} must be a key of one trial, got one of what all trials share "
                             f"({', '.join(SHARED_SECTIONS + SHARED_KEYS)})")
        if config.grpo.base and section in ("model", "pretrain"):
            raise ValueError(f"sweep.space.{key} must be left out where grpo.base is given (no trial pretrains then), "
                             f"got {values}: sweep other keys, or leave grpo.base empty")
        for value in values:
            with_values(config, {key: value}, "sweep.space")


def num_trials(sweep: SweepSection) -> int:
    """Trials of the whole sweep: all values of the grids, crossed, times what is drawn beside them."""
    return _samples(sweep) * math.prod(len(values) for kind, values in sweep.ranges.values() if kind == "grid")


def _samples(sweep: SweepSection) -> int:
    return 1 if all(kind == "grid" for kind, _ in sweep.ranges.values()) else sweep.trials


def check_objective(config: Config) -> None:
    """What chooses the best trial must be a figure of every report."""
    known = MEASURED + (PRETRAINED if _own_bases(config) else ())
    one_of("sweep.objective", config.sweep.objective, known)


def read_trials(folder: Path) -> list[dict[str, Any]]:
    """Records of all trials of a sweep, in the order in which they began."""
    records = (read_trial(path.parent) for path in (folder / "trials").glob("*/trial.json"))
    return sorted(filter(None, records), key=lambda record: record["started"])


def best_trial(trials: list[dict[str, Any]], sweep: SweepSection) -> dict[str, Any] | None:
    """The finished trial whose last report has the best objective; None: none finished."""
    finished = [trial for trial in trials if trial["status"] == "finished"]
    sign = 1 if sweep.mode == "min" else -1
    return min(finished, key=lambda trial: sign * trial["reports"][-1][sweep.objective], default=None)


def _what_decides(shared: Shared) -> dict[str, Any]:
    """What a trial is a function of, beside its swept values."""
    sections = to_dict(shared.config)
    kept = {name: values for name, values in sections.items() if name not in SHARED_SECTIONS}
    swept = {"space": sections["sweep"]["space"], "stretches": shared.config.sweep.stretches}
    measured = {key: sections["evaluation"][key] for key in ("samples", "scorer")}
    run = {"seed": shared.config.run.seed}
    return {"dataset": shared.dataset.name, "judge": shared.judge.name, "evaluation": measured, "run": run,
            "sweep": swept, **kept}


def _prepare(config: Config, folder: Path, display: Display) -> Shared:
    """What all trials share, each made once and cached."""
    import ray

    start_ray()
    single = replace(config.grpo, num_workers=1, rollout_actors=1)
    check_fits(config.cluster, single, node_resources())
    check_seen(folder, display)
    display.note(f"data: {config.data.source}")
    dataset = prepare(config.data, config.run.cache, display)
    check_enough(config, dataset)
    base = trunk = None
    with judge_beside(config, dataset, display):
        if not _own_bases(config):
            base = base_of(config, display)
            model = check_base(base, config, dataset)
            trunk, config = (publish_trunk(model, config.grpo),), replace(config, model=model.model)
    judge = judge_folder(config, dataset)
    measured = ray.remote(**task_options(config.cluster))(measure_natural).remote(config, dataset, judge)
    [natural] = awaited([measured], "natural text to be measured", display)
    gpu = on_gpu(config.cluster, node_resources())
    return Shared(
        config=config,
        folder=folder,
        dataset=dataset,
        judge=judge,
        base=base,
        trunk=trunk,
        entropy=natural["entropy"],
        tracking=replace(config.tracking, uri=tracking_uri(config.tracking, config.run.output)),
        mlflow_run=None,
        board=start_board(),
        device="cuda" if gpu else "cpu",
        neighbors=min(at_once(node_resources(), *_bundles(config, gpu))[1], num_trials(config.sweep)),
    )


def _bundles(config: Config, on_gpu: bool) -> list[dict[str, float]]:
    """What a trial books: the first is its own process's; its actors take the others."""
    booked = [config.cluster.booked(kind, on_gpu=on_gpu) for kind in ("learner", "generator", "reward")]
    return [each for each in booked if each]


def _own_bases(config: Config) -> bool:
    """Whether each trial pretrains a base: none is given, and a swept key decides something of it."""
    data = Path()  # the same for all
    unswept = what_decides(config, data)
    return not config.grpo.base and any(
        what_decides(with_values(config, {key: value}, "sweep.space"), data) != unswept
        for key, (_, values) in config.sweep.ranges.items()
        for value in values
    )


def _search(shared: Shared, display: Display) -> None:
    """Run Tune until every trial has finished, failed or been stopped."""
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    sweep, known = shared.config.sweep, read_trials(shared.folder)
    scratch = shared.folder / "ray-tune"
    for noisy in ("ray.tune", "ray.train", "optuna"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # what a trial failed of is told by `_show`
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_GLOBAL_CHECKPOINT_S": "3600"}
    bundles = _bundles(shared.config, shared.device == "cuda")
    reports = sweep.stretches + 1
    tuner = tune.Tuner(
        tune.with_resources(_trainable(shared), tune.PlacementGroupFactory(bundles)),
        param_space=_domains(shared.config),
        tune_config=tune.TuneConfig(
            metric=sweep.objective,
            mode=sweep.mode,
            num_samples=_samples(sweep),
            max_concurrent_trials=max(1, at_once(node_resources(), *bundles)[0]),
            search_alg=_searcher(shared.config, [trial["values"] for trial in known]),
            scheduler=ASHAScheduler(max_t=reports, grace_period=1, reduction_factor=2) if sweep.asha else None,
        ),
        run_config=tune.RunConfig(
            name=f"fit-{time.time_ns()}",
            storage_path=str(scratch),
            verbose=0,
            stop={"training_iteration": reports},
            failure_config=tune.FailureConfig(max_failures=1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a trial's folder is its checkpoint
            callbacks=[_news(shared, display, num_trials(sweep))],
        ),
    )
    late = overdue("the first trial to begin", lambda: bool(read_trials(shared.folder)))
    try:
        with follow(lambda: [*ray.get(shared.board.drain.remote(), timeout=10), *late()], display):
            beside_main_thread(tuner.fit)
    finally:
        ray.kill(shared.board)
        shutil.rmtree(scratch, ignore_errors=True)


def _trainable(shared: Shared) -> type:
    """`Trial` as Tune wants it."""
    from ray import tune

    class Trainable(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.trial = Trial(shared, config)

        def step(self) -> dict[str, float]:
            return self.trial.step()

        def cleanup(self) -> None:
            self.trial.close()

    return Trainable


def _domains(config: Config) -> dict[str, Any]:
    """Tune's domain of each swept key; ranges of whole-number fields hold whole numbers, both ends included."""
    from ray import tune

    domains = {}
    for key, (kind, values) in config.sweep.ranges.items():
        if kind == "grid":
            domains[key] = tune.grid_search(values)
        elif kind == "choice":
            domains[key] = tune.choice(values)
        elif isinstance(value_at(config, key), int):
            whole = {"uniform": tune.randint, "loguniform": tune.lograndint}[kind]
            domains[key] = whole(values[0], values[1] + 1)
        else:
            domains[key] = {"uniform": tune.uniform, "loguniform": tune.loguniform}[kind](*values)
    return domains


def _searcher(config: Config, known: list[dict[str, Any]]) -> Any:
    """Random search is the same sequence each time; TPE is told the known trials first and then draws new ones."""
    if config.sweep.search == "random":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(random_state=config.run.seed)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return OptunaSearch(seed=config.run.seed + len(known), points_to_evaluate=known or None)


def _news(shared: Shared, display: Display, total: int) -> Any:
    """What Tune tells of trials: a bar, and the status of those that did not end by themselves."""
    from ray import tune

    sweep, ended = shared.config.sweep, 0

    class News(tune.Callback):
        def __reduce__(self) -> Any:  # Tune keeps a copy of its settings on disk, where a display has no place
            return tune.Callback, ()

        def _end(self, trial: Any, status: str, reason: str) -> None:
            nonlocal ended
            ended += 1
            folder = trial_folder(shared.folder, trial.config)
            record = read_trial(folder) or new_record(folder, trial.config)  # none: it died before its first word
            if record["status"] == "running":
                record |= {"status": status, "reason": reason}
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / "trial.json", record)
            if record["status"] != "failed":  # the models stay; a stopped trial that ever goes on makes its rounds anew
                for made in (folder, folder / "base"):
                    shutil.rmtree(made / "checkpoints", ignore_errors=True)
            told = record.get("reason") or f"{sweep.objective} {record['reports'][-1][sweep.objective]:.4g}"
            display.note(f"trial {record['trial']} {record['status']}: {told}")
            display.phase("trials", ended, total)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            done, reports = trial.last_result.get("training_iteration", 0), sweep.stretches + 1
            self._end(trial, "stopped", f"by ASHA after measurement {done} of {reports}")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._end(trial, "failed", "its process died, twice")

    return News()


def _publish(config: Config, folder: Path, tracker: Tracker, trials: list[dict[str, Any]], best: Any) -> None:
    """The sweep's table and best config, in the folder and in MLflow."""
    sweep, (rows, columns) = config.sweep, _rows(config.sweep, trials)
    tracker.table("trials", rows, columns)
    tracker.figure("parallel_coordinates", parallel_coordinates(trials, sweep.ranges, sweep.objective, sweep.mode))
    tracker.figure("responses", responses(trials, sweep.ranges, [sweep.objective, *COLUMNS[:-1], "p_mask_error"]))
    for key, (kind, values) in sweep.ranges.items():
        curves = [_approach(folder, trial, key) for trial in trials if key.startswith("mask_bias.")]
        if any(steps for steps, *_ in curves) and not isinstance(values[0], str):
            figure = approaches(curves, key=key, target=config.mask_bias.target, log=kind == "loguniform")
            tracker.figure(f"p_mask_by_{key}", figure)
    if best is not None:
        chosen = with_values(config, best["values"], "best trial")
        save_config(replace(chosen, run=replace(chosen.run, name=""), sweep=SweepSection()), folder / "best.yaml")
        figures = {f"best/{name}": value for name, value in best["reports"][-1].items()}
        tracker.log(figures, len(trials), measured_again=True)
        tracker.artifact(folder / "best.yaml")
    tracker.artifact(folder / "trials.json")
    tracker.artifact(folder / "summary.json")


def _approach(folder: Path, trial: dict[str, Any], key: str) -> tuple[list[float], list[float], float]:
    """Steps and p(MASK) of a trial's own pretraining, and its value of a key."""
    rows = [row for row in read_curve(folder / "trials" / trial["trial"] / "base") if "p_mask_unmask" in row]
    return [row["step"] for row in rows], [row["p_mask_unmask"] for row in rows], trial["values"][key]


def _rows(sweep: SweepSection, trials: list[dict[str, Any]]) -> tuple[list[list[Any]], list[str]]:
    """A row per trial, the best first, those without a measurement last; and the columns."""
    sign = 1 if sweep.mode == "min" else -1
    figures = [{"wall_s": trial["wall_s"], **(trial["reports"] or [{}])[-1]} for trial in trials]
    shown = [name for name in (sweep.objective, *COLUMNS) if any(name in each for each in figures)]
    order = sorted(
        range(len(trials)),
        key=lambda i: (trials[i]["status"] != "finished", sign * figures[i].get(sweep.objective, sign * float("inf"))),
    )
    rows = [
        [
            trials[i]["trial"],
            *(trials[i]["values"][key] for key in sweep.ranges),
            *(figures[i].get(name) for name in shown),
            ": ".join(filter(None, [trials[i]["status"], trials[i].get("reason", "")])),
        ]
        for i in order
    ]
    return rows, ["trial", *sweep.ranges, *shown, "status"]


def _reason(trials: list[dict[str, Any]]) -> str:
    return next((trial["reason"] for trial in trials if trial.get("reason")), "none was begun")


def _show(config: Config, folder: Path, trials: list[dict[str, Any]], best: dict[str, Any] | None) -> None:
    rows, columns = _rows(config.sweep, trials)
    summary_table(f"{folder.name}: {len(trials)} trials, best first", rows, columns)
    print(f"trials    {folder / 'trials.json'}\nfigures   {folder / 'figures'}\n"
          f"compare   mlflow ui --backend-store-uri {tracking_uri(config.tracking, folder.parent)}")
    if best is not None:
        print(f"next      python pipelines/grpo.py --config {folder / 'best.yaml'}")


if __name__ == "__main__":
    launch(main, __doc__, default="configs/sweep.yaml")
