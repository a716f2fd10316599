"""Adversarial GRPO: make a generator's text harder to tell from natural text, over a frozen trunk, on Ray.

    python pipelines/grpo.py --config configs/tiny.yaml run.name=first grpo.rounds=100

    runs/NAME/config.yaml      the resolved config       runs/NAME/final/         the trained generator
    runs/NAME/summary.json     figures, when it is done  runs/NAME/checkpoints/   the last ones, to go on from

1. Base model (given, or pretrained first and cached) -> trunk published once -> generator and reward actors -> rounds
   in one long-lived Ray Train loop (`pipelines/rounds.py`) -> measured before and after by what was never a reward.
2. The final model is compared with its base, and with its base at the temperature that gives the final model's token
   entropy: a knob must not explain the gain.
3. The same command with the same `run.name` goes on after whatever ended the run.
"""

from __future__ import annotations

import sys
from pathlib import Path

_here = Path(__file__).resolve().parent
if __name__ == "__main__":  # `python pipelines/grpo.py` puts pipelines/ first, where this script hides the package
    sys.path[:] = [str(_here.parent)] + [p for p in sys.path if Path(p or ".").resolve() != _here]

# ruff: noqa: E402
import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from actors.generator import Generator
from actors.reward import Reward
from actors.trunk_store import Blueprint, publish, seal, share_on_gpus, to_arrays
from grpo.actions import credits_positions
from grpo.checkpoint import check_tokenizer, load_checkpoint, load_model, model_digest
from grpo.completion import load_remasking_model, remasking_checkpoint
from grpo.config import Config, GrpoSection
from grpo.config_file import config_hash, save_config, to_dict
from grpo.data import open_dataset
from grpo.files import write_json
from grpo.model import GPT
from grpo.remasking import resolve_policy
from grpo.reward_functions import resolve_rewards
from grpo.run_checkpoints import find_checkpoint, newest_step
from pipelines.evaluate import quality_table, reward_columns
from pipelines.figures import denoising_figure, grpo_figure, series
from pipelines.fit import fit
from pipelines.launch import launch, start_ray
from pipelines.measurements import (
    check_enough,
    check_splits,
    fit_judge,
    follow_judge,
    judge_folder,
    judge_nll_gain,
    load_scorer,
    measure,
    measure_natural,
    weak_judge,
)
from pipelines.placement import (
    check_fits,
    computes_on,
    homes_of,
    node_resources,
    on_gpu,
    placed,
    room_beside,
    task_options,
)
from pipelines.prepare import prepare
from pipelines.pretrain import pretrain
from pipelines.progress import Display, awaited
from pipelines.rollouts import RoundsJob
from pipelines.rounds import worker_loop
from pipelines.run_folder import alone, check_same, run_folder
from pipelines.tracking import Tracker, tracking_uri

BOOKKEEPING = ("rounds", "num_workers", "rollout_actors", "checkpoint_every", "keep", "base", "micro_batch")
"""Fields of `grpo` that change no round (but for the order of summation)."""
WATCHED = 2
"""Texts of the final model whose denoising is drawn."""


@dataclass(frozen=True, kw_only=True)
class Paths:
    """What a run starts from."""

    dataset: Path
    base: Path
    judge: Path


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    resolve_rewards(config.grpo.rewards)  # a name that nobody has is said before anything starts
    folder = run_folder(config.run, f"grpo-{config_hash(config)}", trains=True)
    with alone(folder), Display() as display:
        _check_rounds(config, folder)
        paths, config = _prepare(config, folder, display)
        check_same(folder, _what_decides(config, paths))
        save_config(config, folder / "config.yaml")
        meta = open_dataset(paths.dataset).meta
        with Tracker(
            config.tracking, folder, folder.name, config=to_dict(config), start_step=newest_step(folder) + 1
        ) as tracker:
            tracker.dataset(paths.dataset, config.data.source, meta["splits"])
            history, rows = _train_and_measure(config, paths, folder, tracker, display)
            gain = judge_nll_gain(rows)
            summary = {
                "session_s": time.monotonic() - started,
                "rounds": config.grpo.rounds,
                "seed": config.run.seed,
                "checkpoints": {"base": str(paths.base)},
                "judge": paths.judge.name,
                "weak_judge": weak_judge(rows["natural"]["judge_bpb"], rows["base"]["nelbo_bpb"]),
                **{
                    row: {key: value for key, value in figures.items() if key not in ("samples", "denoising")}
                    for row, figures in rows.items()
                },
                "nelbo_bpb": rows["final"]["nelbo_bpb"],
                "judge_nll_gain": gain,
                "mlflow_run_id": tracker.run_id,
            }
            write_json(folder / "summary.json", summary)
            tracker.log(
                {
                    f"{row}/{key}": value
                    for row, figures in rows.items()
                    for key, value in figures.items()
                    if isinstance(value, float)
                }
                | ({} if gain is None else {"judge_nll_gain": gain}),
                len(history),
                measured_again=True,
            )
            tracker.table(
                "samples",
                [[row, *sample] for row in ("base", "final") for sample in rows[row]["samples"]],
                ["model", "prompt", "completion"],
            )
            targets = {
                "reward_accuracy": (config.reward.band_low, config.reward.band_high),
                "p_mask_unmask": (config.mask_bias.target,),
            }
            tracker.figure("rounds", grpo_figure(series(history), targets=targets))
            if watched := rows["final"]["denoising"]:
                tracker.figure("denoising", denoising_figure(watched, steps=config.denoise.steps))
            tracker.model(folder / "final")
            tracker.artifact(folder / "summary.json")
    _show(config, folder, rows, summary)
    return summary


def _check_rounds(config: Config, folder: Path) -> None:
    """Raise a one-line ValueError where the folder holds more rounds than there should be: none can be taken back."""
    done = newest_step(folder) - config.warmup_rounds
    if done > config.grpo.rounds:
        raise ValueError(
            f"grpo.rounds must be at least {done}, the rounds that {folder} holds, got {config.grpo.rounds}: "
            f"grpo.rounds={done} finishes now, and another run.name begins anew"
        )


def _asked(config: Config) -> dict[str, Any]:
    """What the config says of the rounds, whatever their base."""
    sections = to_dict(config)
    names = ("corruption", "loss", "mask_bias", "critic", "sampler", "denoise", "grpo", "reward")
    kept = {name: {key: value for key, value in sections[name].items() if key not in BOOKKEEPING} for name in names}
    return {"run": {"seed": config.run.seed}, **kept}


def _what_decides(config: Config, paths: Paths) -> dict[str, Any]:
    """What the rounds are a function of: a folder that holds other rounds is not gone on with."""
    remasker = remasking_checkpoint(config.denoise)
    used = {"base": paths.base} | ({"remasking_model": remasker} if remasker else {})
    weights = {name: model_digest(path) for name, path in used.items()}
    return {"dataset": paths.dataset.name, "model": to_dict(config)["model"], **weights, **_asked(config)}


def _prepare(config: Config, folder: Path, display: Display) -> tuple[Paths, Config]:
    """Data, base model and judge, each made once and cached; the config with the base model's own shape."""

    load_remasking_model(config.denoise)  # a wrong one is said before anything starts, and so is a wrong base
    if config.grpo.base:
        find_checkpoint(config.grpo.base, "grpo.base")
    if config.denoise.remasking != "auto":
        credits_positions(config.grpo.policy_positions, config.denoise.remasking, config.denoise.randomness)
    start_ray()
    nodes = node_resources()
    check_fits(config.cluster, config.grpo, nodes)
    device = computes_on(config.cluster, nodes, config.grpo.num_workers, "grpo.num_workers")
    display.note(f"data: {config.data.source}; {device}")
    check_same(folder, _asked(config), partly=True)
    dataset = prepare(config.data, config.run.cache, display)
    check_same(folder, {"dataset": dataset.name}, partly=True)
    check_enough(config, dataset)
    tokenizer = open_dataset(dataset).tokenizer
    load_scorer(config.evaluation.scorer, tokenizer)
    classifier = load_remasking_model(config.denoise, tokenizer=tokenizer)
    with judge_beside(config, dataset, display):
        base = base_of(config, display)
        shape = check_base(base, config, dataset)
        remasking = resolve_policy(config.denoise.remasking, shape, classifier)
        credits_positions(config.grpo.policy_positions, remasking, config.denoise.randomness)
    return Paths(dataset=dataset, base=base, judge=judge_folder(config, dataset)), replace(config, model=shape.model)


def base_of(config: Config, display: Display) -> Path:
    """Checkpoint of the base model: the given one, or one that is pretrained unless the cache has it."""
    return find_checkpoint(config.grpo.base, "grpo.base") if config.grpo.base else pretrain(config, display=display)


@contextmanager
def judge_beside(config: Config, dataset: Path, display: Display) -> Iterator[None]:
    """Train the judge beside the body, which may pretrain; before it, where the cluster has no room for both."""
    import ray

    booked = task_options(config.cluster)
    judge = ray.remote(**booked)(fit_judge).remote(config, dataset)
    beside = room_beside(booked, config.pretrain.num_workers, on_gpu=on_gpu(config.cluster, node_resources()))
    if not beside:
        follow_judge(judge, display)
    yield
    if beside:
        follow_judge(judge, display)


def check_base(base: Path, config: Config, dataset: Path) -> GPT:
    """The base model of the rounds.

    Raises:
        ValueError: it does not fit the data or `grpo.residual`.
    """
    model, data = load_model(base), open_dataset(dataset)
    check_tokenizer(base, data.tokenizer, "grpo.base")
    if model.mode != "language_model":
        raise ValueError(f"grpo.base {base} is a {model.mode}: give the checkpoint of a generator")
    check_splits(base, config.data, data, "grpo.base")
    if model.block_size != config.data.block_size:
        raise ValueError(
            f"grpo.base {base} was trained with data.block_size {model.block_size}, got {config.data.block_size}"
        )
    if config.denoise.sampler and not model.model.sampler:
        raise ValueError(f"denoise.sampler must be false, for grpo.base {base} has no sampler head, got true")
    if model.residual not in (0, config.grpo.residual):
        raise ValueError(f"grpo.residual must be {model.residual}, as in grpo.base {base}, got {config.grpo.residual}")
    return model


def _train_and_measure(
    config: Config, paths: Paths, folder: Path, tracker: Tracker, display: Display
) -> tuple[list[dict[str, float]], dict[str, dict[str, Any]]]:
    """Measure the base, train, measure again; returns the rounds' history and a row of figures per text."""
    import ray

    what, task = (config, paths.dataset, paths.judge), ray.remote(**task_options(config.cluster))
    display.note("measuring the base model")
    rows = {}  # one after the other, so that each has the machine alone: tokens per second are compared

    def measured(name: str, reference: Any) -> None:
        [rows[name]] = awaited([reference], f"text to be measured ({name})", display)

    measured("natural", task(measure_natural).remote(*what))
    measured("base", task(measure).remote(*what, paths.base))
    if weak := weak_judge(rows["natural"]["judge_bpb"], rows["base"]["nelbo_bpb"]):
        display.note(weak)
    with start_actors(config, paths, folder) as job:
        history = _fit(job, tracker, display)
    display.note("measuring the trained model, then the base at the same token entropy")
    measured("final", task(measure).remote(*what, folder / "final", watched=WATCHED))
    measured("base_matched", task(measure).remote(*what, paths.base, rows["final"]["entropy"]))
    return history, {name: rows[name] for name in ("natural", "base", "base_matched", "final")}


@contextmanager
def ending(actors: list[Any]) -> Iterator[None]:
    """Kill the listed actors after the body."""
    import ray

    try:
        yield
    finally:
        for actor in actors:
            ray.kill(actor)


def publish_trunk(base: GPT, grpo: GrpoSection) -> Any:
    """Put a base model's trunk into the object store, in the rounds' dtype."""
    return publish(base.trunk.to(getattr(torch, grpo.trunk_dtype)).state_dict())


@contextmanager
def start_actors(
    config: Config, paths: Paths, folder: Path, trunk: Any = None, *, neighbors: int = 1
) -> Iterator[RoundsJob]:
    """Publish trunk and heads, start the actors, and end them with the body.

    Args:
        folder: of the run.
        trunk: reference of a trunk that is published already; None: publish the base model's.
        neighbors: runs like this one that share a machine, this one included.
    """
    import ray

    grpo, nodes = config.grpo, node_resources()
    device = "cuda" if on_gpu(config.cluster, nodes) else "cpu"
    base = load_model(paths.base)
    blueprint = Blueprint(
        model=base.model, vocabulary=base.vocabulary, block_size=base.block_size, reward=config.reward, gelu=base.gelu
    )
    saved = load_checkpoint(paths.base)
    remasking = resolve_policy(config.denoise.remasking, base, load_remasking_model(config.denoise))
    torch.manual_seed(config.run.seed)  # the residual MLP in front of the lm head is drawn here
    base.untie(grpo.residual)
    trunk = trunk or publish_trunk(base, grpo)
    heads = publish(base.heads.state_dict())
    scoring = ray.put(to_arrays(blueprint.build("reward").heads.state_dict()) if grpo.adversary else {})
    hosts = max(1, len(homes_of(config.cluster.placement)))
    common = {"neighbors": -(-grpo.rollout_actors // hosts) * neighbors, "device": device}
    rolling = {"config": config, "remasking": remasking}
    tokenizer = open_dataset(paths.dataset).tokenizer
    scored = {"threads": config.run.threads, "functions": tuple(grpo.rewards), "tokenizer": tokenizer}
    started: list[Any] = []
    share = config.cluster.share_gpu_trunk and device == "cuda" and grpo.trainable == "heads"

    def start(kind: type, options: dict[str, Any], heads: Any, settings: dict[str, Any]) -> Any:
        remote = ray.remote(max_restarts=3, max_task_retries=3, enable_tensor_transport=share, **options)(kind)
        started.append(remote.remote(blueprint, seal(trunk), seal(heads), **settings, **common))
        return started[-1]

    places = placed(config.cluster, grpo, on_gpu=device == "cuda", timeout_s=config.run.timeout_s)
    with places as pairs, ending(started):
        generators = [start(Generator, options, heads, rolling) for options, _ in pairs]
        rewards = [start(Reward, options, scoring, scored) for _, options in pairs]
        if share:
            share_on_gpus(started, config.run.timeout_s)
        yield RoundsJob(
            config=config,
            dataset=paths.dataset,
            folder=folder,
            blueprint=blueprint,
            remasking=remasking,
            trunk=(trunk,),
            heads=(heads,),
            mask_bias=(saved.state or {}).get("mask_bias"),
            provenance=saved.provenance,
            generators=generators,
            rewards=rewards,
        )


def _fit(job: RoundsJob, tracker: Tracker, display: Display) -> list[dict[str, float]]:
    """Run the rounds on Ray Train; returns the history."""
    import ray.train

    grpo, cluster = job.config.grpo, job.config.cluster
    use_gpu = on_gpu(cluster, node_resources())
    workers = ray.train.ScalingConfig(
        num_workers=grpo.num_workers,
        use_gpu=use_gpu,
        resources_per_worker=cluster.booked("learner", on_gpu=use_gpu),
        placement_strategy=cluster.placement,
    )
    display.phase("adversarial rounds", newest_step(job.folder), grpo.rounds + job.config.warmup_rounds)
    return fit(worker_loop, job, tracker, display, workers=workers, unit="round")["history"]


def _show(config: Config, folder: Path, rows: dict[str, dict[str, Any]], summary: dict[str, Any]) -> None:
    prompt, completion = max(rows["final"]["samples"], key=lambda sample: sum(map(str.isalpha, "".join(sample))))
    quality_table(
        f"{folder.name}: {config.denoise.steps} denoising steps, {config.evaluation.samples} texts, "
        f"{summary['session_s']:.0f} s",
        rows,
    )
    gain, matched = summary["judge_nll_gain"], rows["base_matched"]
    at = f"at {'the nearest' if gain is None else 'the same'} token entropy"
    for key, name in reward_columns(rows["final"]).items():
        print(f"{name} of the final model: {rows['final'][key]:.4g}; of its base {rows['base'][key]:.4g}, {at} "
              f"{matched[key]:.4g}; of natural text {rows['natural'][key]:.4g}")
    if gain is None:
        told = (f"not matched: the final model's token entropy is {rows['final']['entropy']:.3f} nats, the base's "
                f"nearest {matched['entropy']:.3f} at temperature {matched['temperature']:.3g}")
    else:
        told = f"{abs(gain):.3f} nats per token {'better' if gain > 0 else 'worse'}"
    print(
        f"judge NLL of the final model against its base at the same token entropy: {told}\n"
        f"a sample  {json.dumps(prompt)} -> {json.dumps(completion)}\n"
        f"model     {folder / 'final'}\nsummary   {folder / 'summary.json'}\n"
        f"curves    mlflow ui --backend-store-uri {tracking_uri(config.tracking, folder.parent)}\n"
        f"look      python pipelines/sample.py --checkpoint {folder / 'final'} --live"
    )


if __name__ == "__main__":
    launch(main, __doc__)
