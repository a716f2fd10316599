"""Evaluate a generator: its bound, and its text beside natural text by measures that were never a reward.

    python pipelines/evaluate.py --checkpoint runs/NAME denoise.steps=8
    python pipelines/evaluate.py --checkpoint runs/NAME --base BASE 'evaluation.temperature=[0.8,1.0,1.2]' \
        'evaluation.steps=[4,8,16]' 'evaluation.sampler=[false,true]'

    runs/evaluate-HASH/summary.json          every row; `run.name` on the command line names the folder
    runs/evaluate-HASH/figures/frontier.png  quality against diversity

1. Prompts and natural references are fixed windows of the validation split. The judge is trained on the `judge` split,
   and held-out n-grams come from there too; the discriminator has only ever seen `train`.
2. Natural text is measured like generated text, against other natural text, which shows what a perfect model would get.
3. Each measurement is a Ray task: they run side by side, and load a checkpoint as any user would.
4. The user's own rewards (`grpo.rewards`) are measured beside the other figures; they are the one thing here that may
   have been a reward.
5. The lists of the section `evaluation` are crossed; each model is measured at every combination.
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
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from actors.judge import Judge, judge_config
from actors.pretrainer import validation_bound
from grpo.checkpoint import check_tokenizer, load_checkpoint, load_model, save_checkpoint, verify_checkpoint
from grpo.completion import complete, load_remasking_model
from grpo.config import Config, DataSection, DenoiseSection
from grpo.config_file import config_hash, save_config, to_dict
from grpo.config_model import check
from grpo.data import Batch, open_dataset, window_places, windows
from grpo.denoise import StepRecord
from grpo.mask_bias import saved_bias
from grpo.remasking import FRESH_ONLY, resolve_policy
from grpo.reward_functions import resolve_rewards, reward_figure, score_texts
from grpo.run_checkpoints import find_checkpoint
from grpo.text_quality import judge_nll, quality_report, temperature_matching_entropy
from pipelines.figures import frontier_figure, nfe_figure
from pipelines.launch import checkpoint_config, launch, run_folder, start_ray, worker_threads, write_json
from pipelines.live_view import Recorder, token_pieces
from pipelines.placement import at_once, node_resources, task_options
from pipelines.prepare import prepare
from pipelines.progress import Display, summary_table
from pipelines.tracking import Tracker

VALIDATION_WINDOWS_SEED = 1
SHOWN = ("judge_nll", "entropy", "distinct_4", "c2st", "ngram_js")
FIGURES = (
    "judge_nll", "entropy", "distinct_4", "self_bleu", "c2st", "ngram_js", "temperature", "tokens_per_s", "nelbo_bpb",
)
"""All numbers of a generator's row."""
SWEPT = ("temperature", "top_p", "steps", "remasking", "sampler")
"""Keys of `evaluation` that are lists of values of the same keys of `denoise`."""
SAMPLES_SHOWN = 8
ENTROPY_TOLERANCE = 0.003
"""Relative; at the base's slope over temperatures, 0.02 nats of judge NLL."""


def check_enough(config: Config, dataset: Path) -> None:
    """Raise a ValueError where a split holds too little text to measure by."""
    data, num = open_dataset(dataset), config.evaluation.samples
    for split, rows in (("validation", num), ("judge", 2 * num)):
        windows(data, split, rows, config.data.block_size, VALIDATION_WINDOWS_SEED)


def fit_judge(config: Config, dataset: Path) -> Path:
    """Train the judge, once per data and recipe, beside the data; returns its checkpoint. Runs as a Ray task."""
    wanted = judge_config(config)
    decides = config_hash(dataset.name, wanted.model, wanted.pretrain, wanted.run.seed)
    folder = dataset.parent / f"judge-{decides}"
    try:
        verify_checkpoint(folder)
    except ValueError:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        judge = Judge(config, open_dataset(dataset), threads=worker_threads(config.run.threads, 2), device=device)
        save_checkpoint(folder, judge.train(), config=to_dict(judge.config), tokenizer=judge.dataset.tokenizer)
    return folder


def check_splits(checkpoint: Path, data: DataSection, key: str) -> None:
    """Raise a ValueError that names the option `key` where a model was trained on other splits of the same source: it
    would be measured on text that it knows.
    """
    trained = load_checkpoint(checkpoint).config.get("data", {})
    for name in ("validation_fraction", "judge_fraction", "split_seed") if trained.get("source") == data.source else ():
        if trained[name] != getattr(data, name):
            raise ValueError(f"{key} {checkpoint} was trained with data.{name} {trained[name]} on this source, got "
                             f"{getattr(data, name)}: it may know the text to measure by")


class Setting:
    """What one evaluation has in common: data, prompts, judge, and the generator's checkpoint.

    Args:
        neighbors: measurements that run at once on this machine, this one included.
    """

    def __init__(
        self, config: Config, dataset: Path, judge: Path, checkpoint: Path | None, *, neighbors: int = 1
    ) -> None:
        torch.set_num_threads(worker_threads(config.run.threads, neighbors))
        self.config, self.data, num = config, open_dataset(dataset), config.evaluation.samples
        block = config.data.block_size
        self.start = config.grpo.prompt_tokens
        self.natural = windows(self.data, "validation", num, block, VALIDATION_WINDOWS_SEED)
        self.places = window_places(self.data, "validation", num, block, VALIDATION_WINDOWS_SEED)
        other = windows(self.data, "judge", 2 * num, block, VALIDATION_WINDOWS_SEED)
        self.other, self.held_out = (
            Batch(other.tokens[rows], other.attention_mask[rows]) for rows in (slice(num), slice(num, None))
        )
        self.other_places = window_places(self.data, "judge", 2 * num, block, VALIDATION_WINDOWS_SEED)[:num]
        self.rewards = resolve_rewards(config.grpo.rewards)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.judge = load_model(judge, device=self.device).eval()
        if checkpoint is not None:
            check_tokenizer(checkpoint, self.data.tokenizer, "checkpoint")
            self.model = load_model(checkpoint, device=self.device).eval()
            self.mask_bias = saved_bias(load_checkpoint(checkpoint).state, config.mask_bias)
            self.remasking_model = load_remasking_model(config.denoise, device=self.device)

    def texts(
        self, temperature: float, num: int | None = None, on_step: Callable[[StepRecord], object] | None = None
    ) -> Tensor:
        """[B, T] completions of the first `num` evaluation prompts, or of all; `on_step` as in `denoise`."""
        return complete(
            self.model,
            Batch(self.natural.tokens[:num], self.natural.attention_mask[:num]),
            replace(self.config.denoise, temperature=temperature),
            prompt_tokens=self.start,
            seed=self.config.run.seed,
            mask_bias=self.mask_bias,
            min_neighbors_ratio=self.config.sampler.min_neighbors_ratio,
            remasking_model=self.remasking_model,
            on_step=on_step,
        )

    @property
    def mask(self) -> Tensor:
        """[B, T - P] bool, tokens of completions that are no pads."""
        return self.natural.attention_mask[:, self.start :]

    def report(self, texts: Tensor, beside: Batch, places: Tensor) -> dict[str, Any]:
        """Figures of `texts`, told apart from `beside`; places of texts in the corpus as `c2st` wants them."""
        mask = self.natural.attention_mask
        report = quality_report(
            beside.tokens,
            texts,
            start=self.start,
            held_out=self.held_out.tokens[:, self.start :],
            mask=mask,
            natural_mask=beside.attention_mask,
            held_out_mask=self.held_out.attention_mask[:, self.start :],
            places=places,
            judge=lambda tokens: judge_nll(self.judge, tokens, self.start, mask),
        )
        return report | self.mean_rewards(texts)

    def mean_rewards(self, texts: Tensor) -> dict[str, float]:
        """Means of the user's own rewards over the completions in [B, T], read without prompts and pads."""
        rows = zip(texts[:, self.start :].cpu().numpy(), self.mask.numpy(), strict=True)
        completions = [self.data.tokenizer.decode(tokens[mask]) for tokens, mask in rows]
        scores = score_texts(self.rewards, completions)
        return {reward_figure(name): float(own.mean()) for name, own in scores.items()}


def measure_natural(config: Config, dataset: Path, judge: Path, *, neighbors: int = 1) -> dict[str, Any]:
    """The row of natural text: the true continuations, told apart from other natural text."""
    setting = Setting(config, dataset, judge, None, neighbors=neighbors)
    places = torch.stack([setting.other_places, setting.places])
    return setting.report(setting.natural.tokens, setting.other, places)


def measure(
    config: Config,
    dataset: Path,
    judge: Path,
    checkpoint: Path,
    match_entropy: float | None = None,
    *,
    bound: bool = True,
    watched: int = 0,
    neighbors: int = 1,
) -> dict[str, Any]:
    """The row of a generator, at `denoise.temperature` or at the temperature that gives a token entropy.

    Returns:
        Figures, the temperature, tokens per second, and the first `SAMPLES_SHOWN` prompts and completions as text;
        with `bound` also the NELBO, which is the model's and not the setting's; with `watched` how so many of the
        texts came to be, as `denoising_figure` takes them.
    """
    setting = Setting(config, dataset, judge, checkpoint, neighbors=neighbors)
    temperature = config.denoise.temperature
    if match_entropy is not None:
        temperature, *_ = temperature_matching_entropy(
            lambda t: setting.texts(t)[:, setting.start :],
            match_entropy,
            mask=setting.mask,
            tolerance=ENTROPY_TOLERANCE,
        )
    started = time.perf_counter()
    texts = setting.texts(temperature)
    tokens_per_s = int(setting.mask.sum()) / (time.perf_counter() - started)
    decode = setting.data.tokenizer.decode
    samples = [
        [decode(row[: setting.start].tolist()), decode(row[setting.start :].tolist())] for row in texts[:SAMPLES_SHOWN]
    ]
    row = {
        **setting.report(texts, setting.natural, setting.places),
        "temperature": temperature,
        "tokens_per_s": tokens_per_s,
        "samples": samples,
    }
    if watched:
        row["denoising"] = _watch(setting, temperature, watched)
    return row | _bound(setting) if bound else row


@torch.no_grad()
def _watch(setting: Setting, temperature: float, num: int) -> list[dict[str, Any]]:
    """How the first texts came to be; nothing of a causal model, which has no steps.

    Returns:
        Of each text: `pieces`, each token's own text; `steps`, in which it was last filled, from 1, 0 where it was
        given; `p_wrong` by the critic that read the finished text, None without a critic.
    """
    model, tokenizer = setting.model, setting.data.tokenizer
    if model.trunk.causal:
        return []
    recorder = Recorder(tokenizer, setting.config.denoise.steps)
    texts, real = setting.texts(temperature, num, recorder), setting.natural.attention_mask[:num]
    p_wrong = None
    if "critic" in model.heads:
        p_wrong = model.critic_scores(texts.to(setting.device), real.to(setting.device)).sigmoid()
    lengths = real.sum(1).tolist()
    return [
        {
            "pieces": token_pieces(text[:length].tolist(), tokenizer),
            "steps": recorder.last_filled(row)[:length],
            "p_wrong": None if p_wrong is None else p_wrong[row, :length].tolist(),
        }
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True))
    ]


def _bound(setting: Setting) -> dict[str, float]:
    """NELBO of the model, nats per token and bits per byte."""
    config = setting.config
    num = min(config.pretrain.eval_rows, config.evaluation.samples)
    rows = windows(setting.data, "validation", num, config.data.block_size, VALIDATION_WINDOWS_SEED)
    figures = validation_bound(setting.model, rows.to(setting.device), setting.data.bytes_per_token("validation"))
    return {"nelbo_bpb": figures["val_bpb"]}


def grid(config: Config) -> list[DenoiseSection]:
    """The denoising settings that the lists of `evaluation` span."""
    wavefront = any(config.evaluation.sampler)
    check(config.model.sampler or not wavefront, "evaluation.sampler", "false unless model.sampler is true", wavefront)
    lists = [getattr(config.evaluation, key) or (getattr(config.denoise, key),) for key in SWEPT]
    return [replace(config.denoise, **dict(zip(SWEPT, values, strict=True))) for values in itertools.product(*lists)]


def forwards(settings: DenoiseSection, policy: str) -> int:
    """Trunk passes over a text; a policy that reads the filled text takes a second one in all steps but the last."""
    return settings.steps if policy in FRESH_ONLY else 2 * settings.steps - 1


def reward_columns(row: dict[str, Any]) -> dict[str, str]:
    """A heading for each of a row's rewards: the function's name, or all of it where two functions share one."""
    names = {key: key.rpartition(".")[2] for key in row if key.startswith("rewards/")}
    return {key: name if list(names.values()).count(name) == 1 else key for key, name in names.items()}


def quality_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print rows of measurements."""
    rewards = reward_columns(next(iter(rows.values())))
    columns = ["temperature", *SHOWN, "self_bleu", *rewards, "tokens_per_s"]
    named = ["judge NLL", "entropy", "distinct-4", "C2ST", "n-gram JS", "self-BLEU", *rewards.values(), "tokens/s"]
    summary_table(
        title,
        [[name, *(row.get(column) for column in columns)] for name, row in rows.items()],
        ["text", "temperature", *named],
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
        rows.append({"model": name, **what, "nfe": length if causal else forwards(denoise, policy), **done[task]})
    return ray.get(natural), rows


def main(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    import ray

    checkpoints = {"model": find_checkpoint(args.checkpoint, "--checkpoint")}
    if args.base:
        checkpoints["base"] = find_checkpoint(args.base, "--base")
    folder = run_folder(config.run, f"evaluate-{config_hash(*map(str, checkpoints.values()), config)}")
    resolve_rewards(config.grpo.rewards)  # a name that nobody has is said before anything starts
    folder.mkdir(parents=True, exist_ok=True)
    tracking = Tracker(config.tracking, folder, folder.name, config=to_dict(config), resumes=False)
    with Display() as display, tracking as tracker:
        dataset = prepare(config.data, config.run.cache)
        check_enough(config, dataset)
        for key, checkpoint in checkpoints.items():
            check_splits(checkpoint, config.data, key)
        start_ray()
        display.note("training or loading the judge")
        task = ray.remote(**task_options(config.cluster))
        judge = ray.get(task(fit_judge).remote(config, dataset))
        natural, rows = measure_grid(config, dataset, judge, checkpoints, display)
        save_config(config, folder / "config.yaml")
        bounds = {row["model"]: row["nelbo_bpb"] for row in rows if "nelbo_bpb" in row}
        summary = {"checkpoints": {key: str(path) for key, path in checkpoints.items()}, "judge": judge.name,
                   "nelbo_bpb": bounds,
                   "natural": natural, "rows": rows}
        write_json(folder / "summary.json", summary)
        tracker.figure("frontier", frontier_figure(rows, natural))
        tracker.figure("nfe", nfe_figure(rows, natural))
        tracker.artifact(folder / "summary.json")
        figures = (*SHOWN, "self_bleu", *reward_columns(natural), "tokens_per_s")
        for step, row in enumerate(rows):
            tracker.log({f"{row['model']}/{key}": row[key] for key in figures}, step)
        columns = ["model", *SWEPT, "nfe", *figures]
        tracker.table("settings", [[step, *(row[key] for key in columns)] for step, row in enumerate(rows)],
                      ["step", *columns])
    title = "  ".join([str(checkpoints["model"]), *(f"{key} {bits:.3f} bits/byte" for key, bits in bounds.items())])
    quality_table(title, {"natural": natural} | {_label(row): row for row in rows})
    print(f"figure   {folder / 'figures' / 'frontier.png'}\nsummary  {folder / 'summary.json'}")
    return summary


def _label(row: dict[str, Any]) -> str:
    words = [row["model"], f"{row['steps']} steps", row["remasking"], *(["sampler"] if row["sampler"] else [])]
    words += [f"top_p {row['top_p']}"] if row["top_p"] < 1 else []
    return f"{' '.join(words)} @ {row['temperature']:g}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or a run's folder")
    parser.add_argument("--base", default="", help="another checkpoint to measure beside it, such as its base")


if __name__ == "__main__":
    launch(main, __doc__, base=checkpoint_config, arguments=add_arguments)
