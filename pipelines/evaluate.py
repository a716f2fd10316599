"""Evaluate a generator: its bound, and its text beside natural text by measures that were never a reward.

    python pipelines/evaluate.py --checkpoint runs/NAME denoise.steps=8

1. Prompts and natural references are fixed windows of the validation split. The judge is trained on the `judge` split,
   and held-out n-grams come from there too; the discriminator has only ever seen `train`.
2. Natural text is measured like generated text, against other natural text, which shows what a perfect model would get.
3. Each measurement is a Ray task: they run side by side, and load a checkpoint as any user would.
"""

from __future__ import annotations

import sys
from pathlib import Path

_here = Path(__file__).resolve().parent
if __name__ == "__main__":  # `python pipelines/evaluate.py` puts pipelines/ first, where grpo.py hides the package
    sys.path[:] = [str(_here.parent)] + [p for p in sys.path if Path(p or ".").resolve() != _here]

# ruff: noqa: E402
import argparse
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from actors.judge import Judge, judge_config
from actors.pretrainer import validation_bound
from grpo.checkpoint import load_checkpoint, load_model, save_checkpoint, verify_checkpoint
from grpo.completion import complete
from grpo.config import Config
from grpo.config_file import config_hash, save_config, to_dict
from grpo.data import open_dataset, windows
from grpo.text_quality import judge_nll, quality_report, temperature_matching_entropy
from pipelines.launch import launch, start_ray, worker_threads
from pipelines.prepare import prepare
from pipelines.pretrain import write_json
from pipelines.progress import Display, summary_table

VALIDATION_WINDOWS_SEED = 1
SHOWN = ("judge_nll", "entropy", "distinct_4", "c2st", "ngram_js")
SAMPLES_SHOWN = 8
ENTROPY_TOLERANCE = 0.003
"""Relative; at the base's slope over temperatures, 0.02 nats of judge NLL."""


def fit_judge(config: Config, dataset: Path) -> Path:
    """Train the judge, once per data and shape, into `run.cache`; returns its checkpoint. Runs as a Ray task."""
    wanted = judge_config(config)
    decides = config_hash(dataset.name, wanted.model, wanted.evaluation, wanted.pretrain, config.run.seed)
    folder = Path(config.run.cache).expanduser().absolute() / f"judge-{decides}"
    try:
        verify_checkpoint(folder)
    except ValueError:
        judge = Judge(config, open_dataset(dataset), threads=worker_threads(config.run.threads, 2))
        save_checkpoint(folder, judge.train(), config=to_dict(judge.config), tokenizer=judge.dataset.tokenizer)
    return folder


class Setting:
    """What one evaluation has in common: data, prompts, judge, and the generator's checkpoint."""

    def __init__(self, config: Config, dataset: Path, judge: Path, checkpoint: Path | None) -> None:
        torch.set_num_threads(worker_threads(config.run.threads, 2))
        self.config, self.data, num = config, open_dataset(dataset), config.evaluation.samples
        block = config.data.block_size
        self.start = config.grpo.prompt_tokens
        self.natural = windows(self.data, "validation", num, block, VALIDATION_WINDOWS_SEED)
        other = windows(self.data, "judge", 2 * num, block, VALIDATION_WINDOWS_SEED)
        self.other, self.held_out = other.tokens[:num], other.tokens[num:, self.start :]
        self.judge = load_model(judge).eval()
        self.mask_bias = config.mask_bias.initial
        self.remasking_model = None
        if config.denoise.remasking == "model":
            self.remasking_model = load_model(config.denoise.remasking_model).eval()
        if checkpoint is not None:
            self.model = load_model(checkpoint).eval()
            state = load_checkpoint(checkpoint).state or {}
            self.mask_bias = state.get("mask_bias", {}).get("bias", self.mask_bias)

    def texts(self, temperature: float) -> Tensor:
        """[B, T] completions of the evaluation prompts."""
        return complete(
            self.model,
            self.natural,
            replace(self.config.denoise, temperature=temperature),
            prompt_tokens=self.start,
            seed=self.config.run.seed,
            mask_bias=self.mask_bias,
            min_neighbors_ratio=self.config.sampler.min_neighbors_ratio,
            remasking_model=self.remasking_model,
        )

    def report(self, texts: Tensor, beside: Tensor) -> dict[str, Any]:
        mask = None if bool(self.natural.attention_mask.all()) else self.natural.attention_mask
        return quality_report(
            beside,
            texts,
            start=self.start,
            held_out=self.held_out,
            mask=mask,
            judge=lambda tokens: judge_nll(self.judge, tokens, self.start, mask),
        )


def measure_natural(config: Config, dataset: Path, judge: Path) -> dict[str, Any]:
    """The row of natural text: the true continuations, told apart from other natural text."""
    setting = Setting(config, dataset, judge, None)
    return setting.report(setting.natural.tokens, setting.other)


def measure(
    config: Config, dataset: Path, judge: Path, checkpoint: Path, match_entropy: float | None = None
) -> dict[str, Any]:
    """The row of a generator, at `denoise.temperature` or at the temperature that gives a token entropy.

    Returns:
        Figures, the temperature, and the first `SAMPLES_SHOWN` prompts and completions as text.
    """
    setting = Setting(config, dataset, judge, checkpoint)
    temperature = config.denoise.temperature
    if match_entropy is not None:
        temperature, *_ = temperature_matching_entropy(
            lambda t: setting.texts(t)[:, setting.start :], match_entropy, tolerance=ENTROPY_TOLERANCE
        )
    texts = setting.texts(temperature)
    decode = setting.data.tokenizer.decode
    samples = [
        [decode(row[: setting.start].tolist()), decode(row[setting.start :].tolist())] for row in texts[:SAMPLES_SHOWN]
    ]
    bound = validation_bound(
        setting.model,
        windows(
            setting.data,
            "validation",
            min(config.pretrain.eval_rows, len(texts)),
            config.data.block_size,
            VALIDATION_WINDOWS_SEED,
        ),
        setting.data.bytes_per_token("validation"),
    )
    return {
        **setting.report(texts, setting.natural.tokens),
        "temperature": temperature,
        "samples": samples,
        "nelbo_bpb": bound["val_bpb"],
    }


def quality_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print rows of measurements."""
    columns = ["temperature", *SHOWN]
    summary_table(
        title,
        [[name, *(row.get(column) for column in columns)] for name, row in rows.items()],
        ["text", "temperature", "judge NLL", "entropy", "distinct-4", "C2ST", "n-gram JS"],
    )


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    import ray

    from pipelines.sample import find_checkpoint, resolve_config

    checkpoint = find_checkpoint(args.checkpoint)
    config = resolve_config(load_checkpoint(checkpoint), config, args)
    folder = Path(config.run.output).absolute() / (args.name or f"evaluate-{config_hash(str(checkpoint), config)}")
    folder.mkdir(parents=True, exist_ok=True)
    with Display() as display:
        dataset = prepare(config.data, config.run.cache)
        start_ray()
        display.note("training or loading the judge")
        judge = ray.get(ray.remote(fit_judge).remote(config, dataset))
        tasks = {
            "natural": ray.remote(measure_natural).remote(config, dataset, judge),
            "generated": ray.remote(measure).remote(config, dataset, judge, checkpoint),
        }
        rows = {name: ray.get(task) for name, task in tasks.items()}
    save_config(config, folder / "config.yaml")
    write_json(folder / "summary.json", {"checkpoint": str(checkpoint), **rows})
    quality_table(str(checkpoint), rows)
    print(f"summary  {folder / 'summary.json'}")
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or a run's folder")
    parser.add_argument("--name", default="", help="folder below run.output for summary.json; default: named by a hash")


if __name__ == "__main__":
    launch(main, __doc__, arguments=add_arguments)
