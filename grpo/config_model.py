"""Sections of a run that make a base model: run, data, model, corruption, losses, heads, pretraining.

1. Every field is followed by its meaning, its unit and, where it has one, its source.
2. Each contract is checked once, in `__post_init__`, with the full key in the message; code downstream trusts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def check(holds: bool, key: str, rule: str, value: Any) -> None:
    """Raise a ValueError `KEY must be RULE, got VALUE` unless it holds."""
    if not holds:
        raise ValueError(f"{key} must be {rule}, got {value!r}")


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError that lists what is allowed unless the value is among it."""
    check(value in allowed, key, f"one of {', '.join(allowed)}", value)


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """A run's name, seed, folders, limits and threads."""

    name: str = ""
    """Folder under `run.output` and name of the MLflow run; empty: pipeline name plus a config hash. Reusing a
    name resumes that run."""
    seed: int = 0
    """Seed of every random draw of the run."""
    output: str = "runs"
    """Folder that holds one folder per run. Relative to the current directory. On a cluster it lies on storage that all
    nodes mount, and so does `cache`."""
    cache: str = "~/.cache/grpo-diffusion"
    """Folder of prepared data, base models and judges, each named by the hash of what made it."""
    timeout_s: float = 900.0
    """Seconds after which a wait for actors, other ranks, or free CPUs and GPUs becomes an error that says for what.
    Rank 0 of a pretraining validates alone: with several ranks a validation must take less."""
    threads: int = 0
    """Torch threads per worker process; 0: the cores of its machine, within its container's limit, divided by the
    workers."""

    def __post_init__(self) -> None:
        check(0 <= self.seed < 1 << 32, "run.seed", "between 0 and 2^32 - 1", self.seed)
        check(self.timeout_s > 0, "run.timeout_s", "positive", self.timeout_s)
        check(self.threads >= 0, "run.threads", "0 (automatic) or more", self.threads)
        for name in ("output", "cache"):
            path, rule = getattr(self, name), "a folder's path, no URI (on a cluster one that all nodes see)"
            check("://" not in path, f"run.{name}", rule, path)
        plain = "/" not in self.name and self.name not in (".", "..")
        check(plain, "run.name", "a folder's name: without '/', and neither '.' nor '..'", self.name)


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Text, how it becomes tokens and rows, and what is held out."""

    source: str = "python-docs"
    """`python-docs` (the prose that ships with CPython), or a file, glob, folder or pyarrow.fs URI of text, JSONL,
    CSV, Parquet or Arrow."""
    text_column: str = "text"
    """Column (JSONL key) that holds the text of tabular sources."""
    tokenizer: str = "bytes"
    """`bytes`, `bpe:<size>` (trained on the source), a tiktoken encoding name, a folder that `Tokenizer.save` wrote, or
    a `.tiktoken` rank file, which holds no pattern that splits text before merging: it gets GPT-2's."""
    layout: str = "blocks"
    """`blocks`: documents joined by `separator`, cut into windows of `block_size`. `documents`: a padded row each."""
    separator: str = "\n\n"
    """Text put between two documents in layout `blocks`; also what stands between two documents of a text file (one
    with Windows line ends wants `"\\r\\n\\r\\n"`)."""
    block_size: int = 64
    """T, tokens per row."""
    validation_fraction: float = 0.1
    """Share of the source kept for validation, evaluation prompts and natural references."""
    judge_fraction: float = 0.25
    """Share of the source kept for the independent judge; neither generator nor discriminator is trained on it."""
    split_seed: int = 0
    """Seed of the assignment of documents (or contiguous chunks) to splits."""

    def __post_init__(self) -> None:
        one_of("data.layout", self.layout, ("blocks", "documents"))
        check(self.block_size >= 2, "data.block_size", "at least 2 tokens", self.block_size)
        check(
            0 < self.validation_fraction < 1, "data.validation_fraction", "between 0 and 1", self.validation_fraction
        )
        check(0 <= self.judge_fraction < 1, "data.judge_fraction", "at least 0 and below 1", self.judge_fraction)
        total = self.validation_fraction + self.judge_fraction
        check(
            total < 1,
            "data.validation_fraction + data.judge_fraction",
            "below 1 (something must be left to train on)",
            total,
        )


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Shape of the trunk, and which heads a generator has."""

    n_layer: int = 3
    """Number of transformer blocks."""
    n_head: int = 4
    """H, attention heads per block."""
    n_embd: int = 96
    """C, width."""
    attention: str = "bidirectional"
    """`bidirectional` (masked diffusion) or `causal` (autoregressive)."""
    position: str = "rotary"
    """`rotary` (RoFormer, arXiv:2104.09864) or `learned` (a `wpe` table of data.block_size rows)."""
    bias: bool = False
    """Biases in linear layers and norms."""
    dropout: float = 0.0
    """Dropout probability in pretraining; a frozen trunk never drops."""
    critic: bool = True
    """Attach a critic head: which tokens are wrong?"""
    sampler: bool = True
    """Attach a sampler head: which token goes here, now that its neighbours are known?"""

    def __post_init__(self) -> None:
        check(self.n_layer >= 1, "model.n_layer", "at least 1", self.n_layer)
        check(self.n_head >= 1, "model.n_head", "at least 1", self.n_head)
        check(
            self.n_embd >= 1 and self.n_embd % self.n_head == 0,
            "model.n_embd",
            f"a positive multiple of model.n_head ({self.n_head})",
            self.n_embd,
        )
        one_of("model.attention", self.attention, ("bidirectional", "causal"))
        one_of("model.position", self.position, ("rotary", "learned"))
        if self.position == "rotary":
            check(
                self.n_embd // self.n_head % 2 == 0,
                "model.n_embd",
                "an even width per head for rotary positions",
                self.n_embd,
            )
        check(0 <= self.dropout < 1, "model.dropout", "at least 0 and below 1", self.dropout)
        if self.attention == "causal":
            check(
                not self.sampler,
                "model.sampler",
                "false when model.attention is causal (it needs both neighbours)",
                self.sampler,
            )
            check(
                not self.critic,
                "model.critic",
                "false when model.attention is causal (it reads masked text)",
                self.critic,
            )


@dataclass(frozen=True, kw_only=True)
class CorruptionSection:
    """What masked-diffusion training hides and replaces."""

    guaranteed_correct: float = 0.01
    """Share of each row that is never corrupted: total rate u ~ U(0, 1 - guaranteed_correct)."""
    remask_ratio: float = 1.0
    """Final upper bound of the share of the corruption that is replacements rather than masks."""
    proofreading_warmup: int = 2000
    """Optimizer steps over which the replacement share ramps 0 -> remask_ratio."""
    own_predictions: float = 0.0
    """Share of replacements drawn from the model's own predictions (wrong but plausible) instead of uniformly."""

    def __post_init__(self) -> None:
        for name in ("guaranteed_correct", "remask_ratio", "own_predictions"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"corruption.{name}", "between 0 and 1", value)
        check(
            self.proofreading_warmup >= 0, "corruption.proofreading_warmup", "0 or more steps", self.proofreading_warmup
        )


@dataclass(frozen=True, kw_only=True)
class LossSection:
    """The generator's loss on natural text."""

    objective: str = "corrective"
    """`corrective` or `mdlm` (masks only, 1/t-weighted, arXiv:2406.07524). Causal models use next-token."""
    weight_unmask: float = 1.0
    """Weight of input [MASK], target a word."""
    weight_remask: float = 1.0
    """Weight of input a wrong word, target [MASK]."""
    penalty_mask_correct: float = 0.5
    """Final strength of the penalty for destroying correct words (weight of 'keep' = 1 - p_mask x (1 - e))."""
    masking_warmup: int = 1000
    """Optimizer steps over which the penalty ramps 0 -> penalty_mask_correct."""

    def __post_init__(self) -> None:
        one_of("loss.objective", self.objective, ("corrective", "mdlm"))
        for name in ("weight_unmask", "weight_remask"):
            check(getattr(self, name) >= 0, f"loss.{name}", "0 or more", getattr(self, name))
        check(
            0 <= self.penalty_mask_correct <= 1,
            "loss.penalty_mask_correct",
            "between 0 and 1",
            self.penalty_mask_correct,
        )
        check(self.masking_warmup >= 0, "loss.masking_warmup", "0 or more steps", self.masking_warmup)


@dataclass(frozen=True, kw_only=True)
class MaskBiasSection:
    """The controller of the bias on the [MASK] logit."""

    initial: float = 3.5
    """Bias on the [MASK] logit at step 0, nats."""
    target: float = 0.5
    """Wanted mean [MASK] probability at unmask positions."""
    ema: float = 0.99
    """Decay of the moving average of the signal, per optimizer step."""
    k_i: float = 0.01
    """Integral gain: nats of bias per unit of error per step."""
    k_p: float = 0.0
    """Proportional gain, nats per unit of error."""
    bound: float = 10.0
    """The bias stays within [-bound, bound] nats; the integral stops there (anti-windup)."""
    applies_to: str = "sampling"
    """`sampling`: the loss sees unbiased logits (has a fixed point). `loss`: biased ones, and the bias winds up."""

    def __post_init__(self) -> None:
        check(0 < self.target < 1, "mask_bias.target", "a probability strictly between 0 and 1", self.target)
        check(0 <= self.ema < 1, "mask_bias.ema", "at least 0 and below 1", self.ema)
        check(self.bound > 0, "mask_bias.bound", "positive", self.bound)
        check(
            abs(self.initial) <= self.bound,
            "mask_bias.initial",
            f"within +-mask_bias.bound ({self.bound})",
            self.initial,
        )
        check(
            self.k_i >= 0,
            "mask_bias.k_i",
            "0 or more (the sign is fixed: p(MASK) above target lowers the bias)",
            self.k_i,
        )
        check(
            self.k_p >= 0,
            "mask_bias.k_p",
            "0 or more (the sign is fixed: p(MASK) above target lowers the bias)",
            self.k_p,
        )
        one_of("mask_bias.applies_to", self.applies_to, ("sampling", "loss"))


@dataclass(frozen=True, kw_only=True)
class CriticSection:
    """When and how strongly the critic head trains."""

    alpha: float = 0.5
    """Final weight of the critic's loss in the total. It acts through pretraining, where the loss reaches the trunk. In
    rounds with `grpo.trainable: heads` it reaches the critic head alone, which AdamW makes nearly scale-free: swept
    over a given `grpo.base`, weights above 0 differ by noise."""
    start: int = 500
    """Optimizer step at which the critic's loss joins."""
    end: int = 1000
    """Optimizer step at which its weight reaches alpha."""
    scope: str = "masked_only"
    """Positions that the critic is trained on: `masked_only`, P(wrong) of a token that was sampled, or `all` non-pad
    ones, where kept words and uniform replacements blur it (AUROC on own errors 0.82 against 0.86, ECE 0.60 and 0.05:
    docs/findings.md, Critic)."""

    def __post_init__(self) -> None:
        check(self.alpha >= 0, "critic.alpha", "0 or more", self.alpha)
        check(0 <= self.start <= self.end, "critic.start", f"between 0 and critic.end ({self.end})", self.start)
        one_of("critic.scope", self.scope, ("masked_only", "all"))


@dataclass(frozen=True, kw_only=True)
class SamplerSection:
    """When and how the sampler head trains, and how its wavefront begins."""

    start: int = 200
    """Optimizer step at which the sampler's loss joins."""
    side_dropout: float = 0.3
    """Probability with which each neighbour is hidden in training, independently per side."""
    min_neighbors_ratio: float = 0.01
    """Share of a row (at least one position) that a wavefront without any neighbour seeds from the lm head."""

    def __post_init__(self) -> None:
        check(self.start >= 0, "sampler.start", "0 or more steps", self.start)
        check(0 <= self.side_dropout <= 1, "sampler.side_dropout", "between 0 and 1", self.side_dropout)
        check(
            0 < self.min_neighbors_ratio <= 1,
            "sampler.min_neighbors_ratio",
            "above 0 and at most 1",
            self.min_neighbors_ratio,
        )


@dataclass(frozen=True, kw_only=True)
class PretrainSection:
    """Optimisation, validation and checkpoints of pretraining."""

    mode: str = "generator"
    """`generator`, `token_classifier` (a stand-alone remasking model) or `sequence_scorer` (a frozen judge)."""
    teacher: str = ""
    """Checkpoint of the generator whose errors a token_classifier or sequence_scorer learns to see."""
    steps: int = 1200
    """Optimizer steps."""
    batch_size: int = 64
    """Rows per optimizer step, over all workers and micro-batches."""
    micro_batches: int = 1
    """Micro-batches per worker and optimizer step (gradient accumulation)."""
    learning_rate: float = 3e-3
    """Peak AdamW learning rate."""
    warmup: int = 100
    """Steps of linear warm-up; cosine decay to a tenth follows."""
    weight_decay: float = 0.1
    """AdamW decay on matrices."""
    grad_clip: float = 1.0
    """Maximal gradient norm of each part (trunk with lm head, critic, sampler) by itself."""
    eval_every: int = 300
    """Steps between validations."""
    eval_rows: int = 256
    """Rows of the fixed validation set."""
    checkpoint_every: int = 300
    """Steps between checkpoints."""
    log_every: int = 20
    """Steps between logged metrics."""
    num_workers: int = 1
    """Ray Train workers (DDP ranks)."""
    dtype: str = "float32"
    """`float32` or `bfloat16` (autocast; for GPUs)."""

    def __post_init__(self) -> None:
        one_of("pretrain.mode", self.mode, ("generator", "token_classifier", "sequence_scorer"))
        check(
            self.mode == "generator" or self.teacher,
            "pretrain.teacher",
            "the path of a generator checkpoint when pretrain.mode is not generator",
            self.teacher,
        )
        for name in (
            "steps",
            "batch_size",
            "micro_batches",
            "eval_every",
            "eval_rows",
            "checkpoint_every",
            "log_every",
            "num_workers",
        ):
            check(getattr(self, name) >= 1, f"pretrain.{name}", "at least 1", getattr(self, name))
        check(
            self.batch_size % (self.num_workers * self.micro_batches) == 0,
            "pretrain.batch_size",
            f"a multiple of num_workers x micro_batches ({self.num_workers * self.micro_batches})",
            self.batch_size,
        )
        check(self.learning_rate > 0, "pretrain.learning_rate", "positive", self.learning_rate)
        for name in ("warmup", "weight_decay"):
            check(getattr(self, name) >= 0, f"pretrain.{name}", "0 or more", getattr(self, name))
        check(self.grad_clip > 0, "pretrain.grad_clip", "positive", self.grad_clip)
        one_of("pretrain.dtype", self.dtype, ("float32", "bfloat16"))
