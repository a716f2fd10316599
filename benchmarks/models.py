"""Data, models and measures that the quality benchmarks share; what takes long is trained once and kept.

1. A model's folder under `--cache` is named by the hash of everything that decides its weights, data included; so are
   the figures of long benchmarks (`remembered`), which go on where they were stopped. Code is not in the hash: after a
   change of the mathematics take another `--cache`.
2. Training is `Pretrainer`, `Judge` and `TokenClassifier`, called in this process without Ray.
3. `--quick` has a narrower model, fewer steps and fewer texts, and the same code.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small products, which threads only slow down
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.classifier import Teacher, TokenClassifier
from actors.judge import Judge, judge_config
from benchmarks.adversarial import Adversary, fit, train_base
from benchmarks.tables import print_table as print_table
from benchmarks.tables import spread as spread
from benchmarks.tables import summarise as summarise
from grpo.checkpoint import load_checkpoint, load_model, save_checkpoint
from grpo.completion import complete
from grpo.config import Config
from grpo.config_file import config_hash, load_config, to_dict
from grpo.corruption import mask_only
from grpo.data import Batch, Dataset, make_dataset, open_dataset, window_places, windows
from grpo.files import write_json
from grpo.model import GPT
from grpo.sources import read_documents, source_digests
from grpo.text_quality import c2st, distinct_n, judge_nll, ngram_js, temperature_matching_entropy, token_entropy

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"
FULL = ["pretrain.steps=1000", "sampler.start=300", "critic.start=400", "critic.end=500"]
QUICK = ["model.n_layer=2", "model.n_embd=64", "model.n_head=2", "pretrain.steps=300",
         "pretrain.batch_size=32", "corruption.proofreading_warmup=100", "loss.masking_warmup=100", "sampler.start=60",
         "critic.start=100", "critic.end=120", "evaluation.samples=128", "evaluation.judge_steps=150",
         "evaluation.judge_layers=2", "evaluation.judge_width=64"]

MEASURES = ("c2st", "ngram_js", "judge_nll")
"""Figures of texts that are lower where texts are better, at one token entropy."""


def parse(doc: str, arguments: Callable[[argparse.ArgumentParser], None] | None = None) -> argparse.Namespace:
    """The command line that the quality benchmarks share; prints their first line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller models and fewer texts")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with this many seeds")
    parser.add_argument("--data", default="python-docs", help="text file; default: the prose that ships with CPython")
    parser.add_argument("--cache", default="~/.cache/grpo-diffusion", help="folder of trained models")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="on top of the benchmark's config")
    if arguments:
        arguments(parser)
    args = parser.parse_intermixed_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(doc.splitlines()[0], flush=True)
    return args


def configure(args: argparse.Namespace, seed: int, *overrides: str) -> Config:
    """The benchmark's config, for one seed."""
    sizes = QUICK if args.quick else FULL
    return load_config(TINY, [f"data.source={args.data}", f"run.cache={args.cache}", f"run.seed={seed}", *sizes,
                              *overrides, *args.overrides])


def dataset_of(config: Config) -> Dataset:
    name = f"data-{config_hash(config.data, source_digests(config.data.source))}-local"
    folder = Path(config.run.cache).expanduser().absolute() / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        documents = read_documents(config.data.source, config.data.text_column, config.data.separator)
        return make_dataset(documents, config.data, folder)
    return open_dataset(folder)


def generator(config: Config, dataset: Dataset) -> Path:
    """Checkpoint of a generator pretrained on the training split, with its mask-bias controller's state."""

    def train(folder: Path) -> None:
        model, trainer = train_base(config, dataset)
        save_checkpoint(folder, model, config=to_dict(config), tokenizer=dataset.tokenizer,
                        state={"mask_bias": trainer.mask_bias.state_dict()})

    return _trained("generator", config, dataset, train, *_decides(config))


def load_generator(folder: Path) -> tuple[GPT, float]:
    """The model, in eval mode, and its mask bias."""
    return load_model(folder).eval(), load_checkpoint(folder).state["mask_bias"]["bias"]


def judge(config: Config, dataset: Dataset) -> GPT:
    """The independent causal model, trained on the judge's split whatever the generator's settings."""

    def train(folder: Path) -> None:
        judge = Judge(config, dataset, threads=torch.get_num_threads())
        for _ in judge.train():
            pass
        save_checkpoint(folder, judge.model, config={})

    wanted = judge_config(config)
    return load_model(_trained("judge", wanted, dataset, train, wanted.model, wanted.pretrain)).eval()


class FillCritic(TokenClassifier):
    """A token classifier of the teacher's fills alone, unweighted: what a critic of scope `masked_only` learns."""

    def example(self, step: int, tokens: Tensor, attention_mask: Tensor, *, rows: Tensor, seeds: Tensor,
                times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        filled, wrong = self.teacher.fill(tokens, attention_mask, seeds, times)
        masked = mask_only(tokens, vocabulary=self.model.vocabulary, attention_mask=attention_mask, seeds=seeds,
                           times=times).masked
        return filled, wrong, masked

    def counts(self, step: int, example: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return example[2].sum().double()[None]

    def losses(self, step: int, example: tuple[Tensor, Tensor, Tensor],
               totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        filled, wrong, masked = example
        logits = self.model(filled, positions=masked).float()
        return F.cross_entropy(logits, wrong[masked].long(), reduction="sum") / totals[0].float(), {}


def own_trunk_critic(config: Config, dataset: Dataset, teacher: Path) -> GPT:
    """A critic whose trunk starts as the teacher's and trains for nothing else; it can serve as a remasking model."""
    settings = replace(config.pretrain, mode="token_classifier", teacher=str(teacher),
                       steps=config.pretrain.steps // 2, learning_rate=config.pretrain.learning_rate / 3)

    def train(folder: Path) -> None:
        torch.manual_seed(config.run.seed)
        model = GPT(config.model, dataset.vocabulary, mode="token_classifier", block_size=config.data.block_size)
        trainer = FillCritic(model, replace(config, pretrain=settings), Teacher(str(teacher), dataset.tokenizer, "cpu"))
        fit(trainer, dataset)
        save_checkpoint(folder, model, config={})

    decides = (teacher.name, replace(settings, teacher=teacher.name))
    return load_model(_trained("fill-critic", config, dataset, train, *decides)).eval()


def _decides(config: Config) -> tuple:
    """What a generator's weights are a function of, beside data and seed."""
    return (config.model, config.corruption, config.loss, config.mask_bias, config.critic, config.sampler,
            config.pretrain)


def adversarial(config: Config, dataset: Dataset, base: Path) -> Path:
    """Checkpoint of what the adversarial rounds make of a base."""

    def train(folder: Path) -> None:
        mask_bias = load_checkpoint(base).state["mask_bias"]
        adversary = Adversary(config, dataset, load_generator(base)[0], mask_bias=mask_bias)
        save_checkpoint(folder, adversary.run(), config=to_dict(config), tokenizer=dataset.tokenizer,
                        state={"mask_bias": adversary.learner.mask_bias.state_dict()})

    return _trained("adversarial", config, dataset, train, base.name, *rounds_follow_from(config))


def rounds_follow_from(config: Config) -> tuple:
    """What adversarial rounds are a function of, beside their base, data and seed; the words tell them from those of
    earlier code, which a cache may still hold."""
    return ("with the base's mask-bias controller", config.denoise, config.grpo, config.reward, config.corruption,
            config.loss, config.mask_bias)


def remembered(config: Config, compute: Callable[[], dict], kind: str, *decides: object) -> dict:
    """Figures that are computed once and kept as JSON under `--cache`, under the hash of what decides them."""
    path = Path(config.run.cache).expanduser().absolute() / kind / f"{config_hash(config.run.seed, *decides)}.json"
    if not path.exists():
        figures = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, figures)
    return json.loads(path.read_text())


class Curve:
    """Measures of one model's texts by temperature, and at any token entropy."""

    def __init__(self, measure: Callable[[float], dict], temperatures: Iterable[float]) -> None:
        """Measure at these temperatures, at least one.

        Args:
            measure: temperature -> `entropy` and `MEASURES`.
        """
        self._measure = measure
        self.rows = {heat: measure(heat) for heat in temperatures}

    def at_entropy(self, entropy: float) -> dict[str, float] | None:
        """The measures where texts have this token entropy, in nats; None where no temperature gives it.

        Temperatures beyond those known are tried until two enclose it; then the one between them that should give it
        is measured too, so that what is left to interpolate is next to nothing. (A chord between distant temperatures
        lies above a convex curve, and would make the model look worse than it is.)
        """
        rows = dict(self.rows)
        for _ in range(4):
            if min(row["entropy"] for row in rows.values()) > entropy:
                heat = round(min(rows) * 0.8, 3)
            elif max(row["entropy"] for row in rows.values()) < entropy:
                heat = round(max(rows) * 1.2, 3)
            else:
                break
            rows[heat] = self._measure(heat)
        guess = _interpolated(rows, entropy)
        if guess is None:
            return None
        near = round(guess["temperature"], 3)
        rows.setdefault(near, self._measure(near))
        return _interpolated(rows, entropy)


def _interpolated(rows: dict[float, dict], entropy: float) -> dict[str, float] | None:
    """`temperature` and measures, linear in the entropy between the two rows that enclose it."""
    points = sorted((row | {"temperature": heat} for heat, row in rows.items()), key=lambda row: row["entropy"])
    for low, high in pairwise(points):
        if low["entropy"] <= entropy <= high["entropy"]:
            share = (entropy - low["entropy"]) / max(high["entropy"] - low["entropy"], 1e-12)
            return {name: low[name] + share * (high[name] - low[name]) for name in (*MEASURES, "temperature")}
    return None


def _trained(kind: str, config: Config, dataset: Dataset, train: Callable[[Path], None], *decides: object) -> Path:
    name = f"{kind}-{config_hash(dataset.folder.name, config.run.seed, *decides)}"
    folder = Path(config.run.cache).expanduser().absolute() / name
    if not folder.exists():
        started = time.monotonic()
        train(folder)
        print(f"trained {name} in {time.monotonic() - started:.0f} s", flush=True)
    return folder


class Texts:
    """Held-out rows, and the measures of what is written in the place of their completions."""

    def __init__(self, config: Config, dataset: Dataset, num: int) -> None:
        self.config, self.start = config, config.grpo.prompt_tokens
        which = ("validation", num, config.data.block_size, 1)
        self.natural: Batch = windows(dataset, *which)
        self.places = window_places(dataset, *which)
        self.reference = windows(dataset, "judge", 2 * num, config.data.block_size, 1).tokens
        self.judge = judge(config, dataset)

    @property
    def decided_by(self) -> tuple:
        """What figures are a function of, beside model, data and how texts are written."""
        of_judge = judge_config(self.config)
        return (len(self.natural.tokens), self.start, self.config.denoise.top_p, self.config.denoise.schedule,
                of_judge.model, of_judge.pretrain)

    def write(self, model: GPT, policy: str, steps: int, *, temperature: float = 1.0, sampler: bool = False,
              randomness: float = 0.0, seed: int = 7, **settings: object) -> Tensor:
        """[B, T] prompts and their completions by this re-masking policy."""
        denoise = replace(self.config.denoise, remasking="auto" if policy == "model" else policy, sampler=sampler,
                          randomness=randomness, temperature=temperature, steps=steps)
        settings = {"prompt_tokens": self.start, "min_neighbors_ratio": self.config.sampler.min_neighbors_ratio,
                    **settings}
        return complete(model, self.natural, denoise, seed=seed, **settings)

    def measure(self, tokens: Tensor) -> dict[str, float]:
        """Figures of completions in [B, T]."""
        texts = tokens[:, self.start :]
        return {"judge_nll": judge_nll(self.judge, tokens, self.start), "entropy": token_entropy(texts),
                "distinct_4": distinct_n(texts, 4), "ngram_js": ngram_js(texts, self.reference[:, self.start :], 3)}

    def told_apart(self, tokens: Tensor) -> float:
        """Accuracy of a fresh classifier on completions in [B, T] against the natural ones."""
        return c2st(self.natural.tokens[:, self.start :], tokens[:, self.start :], places=self.places)[0]

    def at_entropy(self, write: Callable[[float], Tensor], entropy: float) -> dict[str, float]:
        """The same at the temperature where completions have this token entropy; NaN where none up to 2 comes within
        1 % of it.

        Args:
            write: temperature -> [B, T].
        """
        start = self.start
        match = temperature_matching_entropy(lambda heat: write(heat)[:, start:], entropy, tolerance=0.005, max_calls=5)
        prompts = self.natural.tokens[:, :start]
        figures = self.measure(torch.cat([prompts, match.tokens], 1)) | {"temperature": match.temperature}
        return figures if abs(figures["entropy"] / entropy - 1) < 0.01 else dict.fromkeys(figures, math.nan)
