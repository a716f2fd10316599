"""Rows of figures: of natural text, and of a generator's text at a setting, by measures that were never a reward.

1. Prompts and natural references are fixed windows of the validation split. The judge is trained on the `judge` split,
   and held-out n-grams come from there too; the discriminator has only ever seen `train`.
2. Natural text is measured like generated text, against other natural text, which shows what a perfect model would get.
3. Each measurement is a Ray task, and loads a checkpoint as any user would.
4. The user's own rewards (`grpo.rewards`) are measured beside the other figures; they are the one thing here that may
   have been a reward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.judge import Judge, judge_config
from actors.pretrainer import validation_bound
from actors.torch_setup import set_up_torch, worker_threads
from grpo.checkpoint import check_tokenizer, load_checkpoint, load_model, save_checkpoint, verify_checkpoint
from grpo.completion import complete, load_remasking_model
from grpo.config import SHORTEST, Config, DataSection
from grpo.config_file import config_hash, to_dict
from grpo.config_model import check
from grpo.data import VALIDATION_WINDOWS_SEED, Batch, Dataset, completion_mask, open_dataset, window_places, windows
from grpo.denoise import StepRecord
from grpo.mask_bias import saved_bias
from grpo.model import GPT
from grpo.reward_functions import resolve_rewards, reward_figure, score_texts
from grpo.run_checkpoints import find_checkpoint
from grpo.text_quality import judge_nll, quality_report, temperature_matching_entropy
from grpo.tokenizer import Tokenizer
from pipelines.live_view import Recorder, token_pieces
from pipelines.progress import Display, follow, overdue
from pipelines.run_folder import alone

OF_TEXT = ("judge_nll", "entropy", "distinct_4", "self_bleu", "c2st", "ngram_js")
FIGURES = (*OF_TEXT, "entropy_error", "temperature", "tokens_per_s", "nelbo_bpb")
"""All numbers of a generator's row at a given token entropy."""
SAMPLES_SHOWN = 8
ROWS_AT_ONCE = 64
ENTROPY_TOLERANCE = 0.003
"""Relative, at which the search ends; at the base's slope over temperatures, 0.02 nats of judge NLL."""
EQUAL_ENTROPY = 0.01
"""Relative, up to which token entropies are called the same."""
SPLIT_BY = ("validation_fraction", "judge_fraction", "split_seed", "layout", "separator", "text_column", "block_size")
"""Keys of `data` that decide, beside the text and its tokens, what is held out. A block size may leave it as it is."""


def check_enough(config: Config, dataset: Path) -> None:
    """Raise a ValueError where a split holds too little text to measure by, or none that goes on after a prompt."""
    data, num, prompt = open_dataset(dataset), config.evaluation.samples, config.grpo.prompt_tokens
    for split, rows in (("validation", num), ("judge", 2 * num)):
        drawn = windows(data, split, rows, config.data.block_size, VALIDATION_WINDOWS_SEED, key="evaluation.samples")
        for part in drawn.attention_mask.split(num):
            longest = int(part.sum(1).max())
            check(prompt <= longest - SHORTEST, "grpo.prompt_tokens",
                  f"at least {SHORTEST} below the longest of the {num} rows to measure by ({longest} tokens, {split} "
                  "split), so that a completion has 4-grams", prompt)


def judge_folder(config: Config, dataset: Path) -> Path:
    """Where the judge lies: beside the data, by its recipe."""
    wanted = judge_config(config)
    return dataset.parent / f"judge-{config_hash(dataset.name, wanted.model, wanted.pretrain, wanted.run.seed)}"


def fit_judge(config: Config, dataset: Path) -> Iterator[tuple[int, int]]:
    """Train the judge into `judge_folder`, if it is not there. Runs as a Ray task; where several runs start together,
    one trains it and the others wait.

    Yields:
        Steps done and of how many, at most a hundred times.
    """
    folder = judge_folder(config, dataset)
    with alone(dataset.parent / f"{folder.name}.lock"):  # the folder itself is replaced
        try:
            verify_checkpoint(folder)
        except ValueError:
            device, total = "cuda" if torch.cuda.is_available() else "cpu", config.evaluation.judge_steps
            judge = Judge(config, open_dataset(dataset), threads=worker_threads(config.run.threads, 2), device=device)
            for done in judge.train():
                if done % -(-total // 100) == 0 or done == total:
                    yield done, total
            save_checkpoint(folder, judge.model, config=to_dict(judge.config), tokenizer=judge.dataset.tokenizer)


def follow_judge(progress: Iterable[Any], display: Display) -> None:
    """Show how far a `fit_judge` task is until it ends."""
    import ray

    display.note("waiting for the judge")
    told: list[tuple[int, int]] = []
    with follow(overdue("the judge to begin", lambda: bool(told)), display):
        for news in progress:
            told.append(ray.get(news))
            display.phase("judge", *told[-1])


def check_splits(checkpoint: Path, data: DataSection, dataset: Dataset, key: str) -> None:
    """Raise a ValueError that names the option `key` where a model was trained on other splits of the same text: it
    would be measured on text that it knows. A checkpoint of unknown provenance is judged by the name of its source.
    """
    saved, present = load_checkpoint(checkpoint), dataset.provenance
    trained, known = saved.config.get("data", {}), saved.provenance
    others = [text for text in known if set(text["sources"]) & set(present["sources"]) and text != present]
    if known and not others or not known and trained.get("source") != data.source:
        return
    if any(text["sources"] != present["sources"] for text in others):
        raise ValueError(f"{key} {checkpoint} was trained on some of the files of data.source {data.source}, beside "
                         "others or fewer, so in other splits: it may know the text to measure by; give the same files")
    for name in SPLIT_BY if known else SPLIT_BY[:-1]:
        if trained[name] != getattr(data, name):
            raise ValueError(f"{key} {checkpoint} was trained with data.{name} {trained[name]!r} on this source, got "
                             f"{getattr(data, name)!r}, which splits it otherwise: it may know the text to measure by")
    if known:
        raise ValueError(f"{key} {checkpoint} was trained on other splits of this source: it may know the text to "
                         "measure by")


def load_scorer(path: str, tokenizer: Tokenizer, device: str = "cpu") -> GPT | None:
    """The model of `evaluation.scorer`, None where that is empty.

    Raises:
        ValueError: no checkpoint is there, or it is none of a sequence_scorer of this tokenizer.
    """
    if not path:
        return None
    folder = find_checkpoint(path, "evaluation.scorer")
    check_tokenizer(folder, tokenizer, "evaluation.scorer")
    model = load_model(folder, device=device).eval()
    check(model.mode == "sequence_scorer", "evaluation.scorer", "a model of mode sequence_scorer", model.mode)
    return model


class Setting:
    """What one evaluation has in common: data, prompts, judge, and the generator's checkpoint.

    Args:
        neighbors: measurements that run at once on this machine, this one included.
    """

    def __init__(
        self, config: Config, dataset: Path, judge: Path, checkpoint: Path | None, *, neighbors: int = 1
    ) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        set_up_torch(self.device, worker_threads(config.run.threads, neighbors))
        self.config, self.data, num = config, open_dataset(dataset), config.evaluation.samples
        block = config.data.block_size
        self.start = config.grpo.prompt_tokens
        self.natural = windows(self.data, "validation", num, block, VALIDATION_WINDOWS_SEED)
        self.places = window_places(self.data, "validation", num, block, VALIDATION_WINDOWS_SEED)
        other = windows(self.data, "judge", 2 * num, block, VALIDATION_WINDOWS_SEED)
        self.other, self.held_out = other[:num], other[num:]
        self.other_places = window_places(self.data, "judge", 2 * num, block, VALIDATION_WINDOWS_SEED)[:num]
        self.rewards = resolve_rewards(config.grpo.rewards)
        self.judge = load_model(judge, device=self.device).eval()
        self.scorer = load_scorer(config.evaluation.scorer, self.data.tokenizer, self.device)
        if checkpoint is not None:
            self.model = load_model(checkpoint, device=self.device).eval()
            self.mask_bias = saved_bias(load_checkpoint(checkpoint).state, config.mask_bias)
            self.remasking_model = load_remasking_model(
                config.denoise, tokenizer=self.data.tokenizer, device=self.device
            )

    def texts(
        self, temperature: float, num: int | None = None, on_step: Callable[[StepRecord], object] | None = None
    ) -> Tensor:
        """[B, T] completions of the first `num` evaluation prompts, or of all; `on_step` as in `denoise`."""
        return complete(
            self.model,
            self.natural[:num],
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
        return report | self.mean_score(texts) | self.mean_rewards(texts)

    @torch.no_grad()
    def mean_score(self, texts: Tensor) -> dict[str, float]:
        """Mean P(natural) of the completions in [B, T] by `evaluation.scorer`, if there is one."""
        if self.scorer is None:
            return {}
        mask = self.natural.attention_mask
        completion = completion_mask(mask, self.start)
        parts = (part.to(self.device).split(ROWS_AT_ONCE) for part in (texts, mask, completion))
        score = self.scorer.heads["scorer"]
        scores = [score(self.scorer.encode(tokens, seen), own) for tokens, seen, own in zip(*parts, strict=True)]
        return {"scorer": float(torch.cat(scores).double().mean())}

    def mean_rewards(self, texts: Tensor) -> dict[str, float]:
        """Means of the user's own rewards over the completions in [B, T], read without prompts and pads."""
        rows = zip(texts[:, self.start :].cpu().numpy(), self.mask.numpy(), strict=True)
        completions = [self.data.tokenizer.decode(tokens[mask]) for tokens, mask in rows]
        scores = score_texts(self.rewards, completions)
        return {reward_figure(name): float(own.mean()) for name, own in scores.items()}


def measure_natural(config: Config, dataset: Path, judge: Path, *, neighbors: int = 1) -> dict[str, Any]:
    """The row of natural text: the true continuations, told apart from other natural text; and `judge_bpb`, the judge's
    own bits per byte, beside which a generator's bound may stand.
    """
    setting = Setting(config, dataset, judge, None, neighbors=neighbors)
    places = torch.stack([setting.other_places, setting.places])
    report = setting.report(setting.natural.tokens, setting.other, places)
    return report | {"judge_bpb": _bound(setting, setting.judge)["nelbo_bpb"]}


def weak_judge(judge_bpb: float, bound: float) -> str:
    """A line that says so where the judge knows the data less well than a generator with this bound; else nothing."""
    if judge_bpb <= bound:
        return ""
    return (f"the judge knows the data less well ({judge_bpb:.3f} bits/byte) than the generator ({bound:.3f} at most): "
            "evaluation.judge_steps, evaluation.judge_layers and evaluation.judge_width make it a better one")


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
        Figures, the temperature, tokens per second, and the first `SAMPLES_SHOWN` prompts and completions as text; with
        `match_entropy` also `entropy_error`, the nats by which the texts' lies above it; with `bound` also the NELBO,
        which is the model's and not the setting's; with `watched` how so many of the texts came to be, as
        `denoising_figure` takes them.
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
    if setting.device == "cuda" and match_entropy is None:
        setting.texts(temperature, 1)  # a process loads its kernels once
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
    if match_entropy is not None:
        row["entropy_error"] = row["entropy"] - match_entropy
    if watched:
        row["denoising"] = _watch(setting, temperature, watched)
    return row | _bound(setting, setting.model) if bound else row


def is_matched(row: dict[str, Any]) -> bool:
    """Whether a row that was to match a token entropy does."""
    return abs(row["entropy_error"]) <= EQUAL_ENTROPY * (row["entropy"] - row["entropy_error"])


def judge_nll_gain(rows: dict[str, dict[str, Any]]) -> float | None:
    """Judge NLL of the base less the final model's at the final model's token entropy, nats per token; None where the
    base has no temperature that gives this entropy.
    """
    matched = rows["base_matched"]
    return matched["judge_nll"] - rows["final"]["judge_nll"] if is_matched(matched) else None


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


def _bound(setting: Setting, model: GPT) -> dict[str, float]:
    """NELBO of a model (causal: its exact likelihood) on validation text: bits per byte, nats per token, error."""
    config = setting.config
    num = min(config.pretrain.eval_rows, config.evaluation.samples)
    rows = windows(setting.data, "validation", num, config.data.block_size, VALIDATION_WINDOWS_SEED)
    figures = validation_bound(model, rows.to(setting.device), setting.data.bytes_per_token("validation"))
    return {
        "nelbo_bpb": figures["val_bpb"],
        "nelbo_nats": figures["val_nelbo_nats"],
        "nelbo_se": figures["val_nelbo_se"],
    }
