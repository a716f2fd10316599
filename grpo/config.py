"""The configuration of a run: one frozen dataclass per section, read from YAML plus dotted overrides.

1. Every field is followed by its meaning, its unit and, where it has one, its source.
2. Each contract is checked once, in `__post_init__`, with the full key in the message; code downstream trusts it.
3. Reading, overriding, saving and hashing live in `grpo/config_file.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _check(holds: bool, key: str, rule: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{key} must be {rule}, got {value!r}")


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    _check(value in allowed, key, f"one of {', '.join(allowed)}", value)


@dataclass(frozen=True, kw_only=True)
class RunSection:
    name: str = ""
    """Folder under `run.output` and name of the MLflow run; empty: pipeline name plus a config hash. Reusing a
    name resumes that run."""
    seed: int = 0
    """Seed of every random draw of the run."""
    output: str = "runs"
    """Folder that holds one folder per run. Relative to the current directory."""
    cache: str = "~/.cache/grpo-diffusion"
    """Folder of prepared data, base models and judges, each named by the hash of what made it."""
    timeout_s: float = 900.0
    """Seconds after which a wait for actors or other ranks becomes an error that names the phase."""
    threads: int = 0
    """Torch threads per worker process; 0: the cores of this machine divided by the workers."""

    def __post_init__(self) -> None:
        _check(self.threads >= 0, "run.threads", "0 (automatic) or more", self.threads)
        _check("/" not in self.name, "run.name", "a plain folder name without '/'", self.name)


@dataclass(frozen=True, kw_only=True)
class DataSection:
    source: str = "python-docs"
    """`python-docs` (the prose that ships with CPython), or a file, glob, folder or pyarrow.fs URI of text, JSONL,
    CSV, Parquet or Arrow."""
    text_column: str = "text"
    """Column (JSONL key) that holds the text of tabular sources."""
    tokenizer: str = "bytes"
    """`bytes`, `bpe:<size>` (trained on the source), a `.tiktoken` rank file, or a tiktoken encoding name."""
    layout: str = "blocks"
    """`blocks`: documents joined by `separator`, cut into windows of `block_size`. `documents`: a padded row each."""
    separator: str = "\n\n"
    """Text put between two documents in layout `blocks`."""
    block_size: int = 64
    """T, tokens per row."""
    validation_fraction: float = 0.1
    """Share of the source kept for validation, evaluation prompts and natural references."""
    judge_fraction: float = 0.25
    """Share of the source kept for the independent judge; neither generator nor discriminator ever sees it."""
    split_seed: int = 0
    """Seed of the assignment of documents (or contiguous chunks) to splits."""

    def __post_init__(self) -> None:
        _one_of("data.layout", self.layout, ("blocks", "documents"))
        _check(self.block_size >= 2, "data.block_size", "at least 2 tokens", self.block_size)
        _check(
            0 < self.validation_fraction < 1, "data.validation_fraction", "between 0 and 1", self.validation_fraction
        )
        _check(0 <= self.judge_fraction < 1, "data.judge_fraction", "at least 0 and below 1", self.judge_fraction)
        total = self.validation_fraction + self.judge_fraction
        _check(
            total < 1,
            "data.validation_fraction + data.judge_fraction",
            "below 1 (something must be left to train on)",
            total,
        )


@dataclass(frozen=True, kw_only=True)
class ModelSection:
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
    """Attach a critic head: which tokens are wrong? (DESIGN 6)"""
    sampler: bool = True
    """Attach a sampler head: which token goes here, now that its neighbours are known? (DESIGN 7)"""

    def __post_init__(self) -> None:
        _check(self.n_layer >= 1, "model.n_layer", "at least 1", self.n_layer)
        _check(self.n_head >= 1, "model.n_head", "at least 1", self.n_head)
        _check(
            self.n_embd >= 1 and self.n_embd % self.n_head == 0,
            "model.n_embd",
            f"a positive multiple of model.n_head ({self.n_head})",
            self.n_embd,
        )
        _one_of("model.attention", self.attention, ("bidirectional", "causal"))
        _one_of("model.position", self.position, ("rotary", "learned"))
        if self.position == "rotary":
            _check(
                self.n_embd // self.n_head % 2 == 0,
                "model.n_embd",
                "an even width per head for rotary positions",
                self.n_embd,
            )
        _check(0 <= self.dropout < 1, "model.dropout", "at least 0 and below 1", self.dropout)
        if self.attention == "causal":
            _check(
                not self.sampler,
                "model.sampler",
                "false when model.attention is causal (it needs both neighbours)",
                self.sampler,
            )
            _check(
                not self.critic,
                "model.critic",
                "false when model.attention is causal (it reads masked text)",
                self.critic,
            )


@dataclass(frozen=True, kw_only=True)
class CorruptionSection:
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
            _check(0 <= value <= 1, f"corruption.{name}", "between 0 and 1", value)
        _check(
            self.proofreading_warmup >= 0, "corruption.proofreading_warmup", "0 or more steps", self.proofreading_warmup
        )


@dataclass(frozen=True, kw_only=True)
class LossSection:
    objective: str = "corrective"
    """`corrective` (DESIGN 5) or `mdlm` (masks only, 1/t-weighted, arXiv:2406.07524). Causal models use next-token."""
    weight_unmask: float = 1.0
    """Weight of input [MASK], target a word."""
    weight_remask: float = 1.0
    """Weight of input a wrong word, target [MASK]."""
    penalty_mask_correct: float = 0.5
    """Final strength of the penalty for destroying correct words (weight of 'keep' = 1 - p_mask x (1 - e))."""
    masking_warmup: int = 1000
    """Optimizer steps over which the penalty ramps 0 -> penalty_mask_correct."""

    def __post_init__(self) -> None:
        _one_of("loss.objective", self.objective, ("corrective", "mdlm"))
        for name in ("weight_unmask", "weight_remask"):
            _check(getattr(self, name) >= 0, f"loss.{name}", "0 or more", getattr(self, name))
        _check(
            0 <= self.penalty_mask_correct <= 1,
            "loss.penalty_mask_correct",
            "between 0 and 1",
            self.penalty_mask_correct,
        )
        _check(self.masking_warmup >= 0, "loss.masking_warmup", "0 or more steps", self.masking_warmup)


@dataclass(frozen=True, kw_only=True)
class MaskBiasSection:
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
    """`sampling`: the loss sees unbiased logits (has a fixed point). `loss`: the source design, which winds up."""

    def __post_init__(self) -> None:
        _check(0 < self.target < 1, "mask_bias.target", "a probability strictly between 0 and 1", self.target)
        _check(0 <= self.ema < 1, "mask_bias.ema", "at least 0 and below 1", self.ema)
        _check(self.bound > 0, "mask_bias.bound", "positive", self.bound)
        _check(
            abs(self.initial) <= self.bound,
            "mask_bias.initial",
            f"within +-mask_bias.bound ({self.bound})",
            self.initial,
        )
        _check(
            self.k_i >= 0,
            "mask_bias.k_i",
            "0 or more (the sign is fixed: p(MASK) above target lowers the bias)",
            self.k_i,
        )
        _check(
            self.k_p >= 0,
            "mask_bias.k_p",
            "0 or more (the sign is fixed: p(MASK) above target lowers the bias)",
            self.k_p,
        )
        _one_of("mask_bias.applies_to", self.applies_to, ("sampling", "loss"))


@dataclass(frozen=True, kw_only=True)
class CriticSection:
    alpha: float = 0.5
    """Final weight of the critic's loss in the total (the sweeps' `critic_alpha`)."""
    start: int = 500
    """Optimizer step at which the critic's loss joins (`start_critic`)."""
    end: int = 1000
    """Optimizer step at which its weight reaches alpha (`end_critic`)."""
    scope: str = "all"
    """Positions that the critic is trained on: `masked_only` or `all` non-pad ones."""

    def __post_init__(self) -> None:
        _check(self.alpha >= 0, "critic.alpha", "0 or more", self.alpha)
        _check(0 <= self.start <= self.end, "critic.start", f"between 0 and critic.end ({self.end})", self.start)
        _one_of("critic.scope", self.scope, ("masked_only", "all"))


@dataclass(frozen=True, kw_only=True)
class SamplerSection:
    start: int = 200
    """Optimizer step at which the sampler's loss joins (`start_sampler`)."""
    side_dropout: float = 0.3
    """Probability with which each neighbour is hidden in training, independently per side."""
    min_neighbors_ratio: float = 0.01
    """Share of a row (at least one position) that a wavefront without any neighbour seeds from the lm head."""

    def __post_init__(self) -> None:
        _check(self.start >= 0, "sampler.start", "0 or more steps", self.start)
        _check(0 <= self.side_dropout <= 1, "sampler.side_dropout", "between 0 and 1", self.side_dropout)
        _check(
            0 < self.min_neighbors_ratio <= 1,
            "sampler.min_neighbors_ratio",
            "above 0 and at most 1",
            self.min_neighbors_ratio,
        )


@dataclass(frozen=True, kw_only=True)
class PretrainSection:
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
        _one_of("pretrain.mode", self.mode, ("generator", "token_classifier", "sequence_scorer"))
        _check(
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
            _check(getattr(self, name) >= 1, f"pretrain.{name}", "at least 1", getattr(self, name))
        _check(
            self.batch_size % (self.num_workers * self.micro_batches) == 0,
            "pretrain.batch_size",
            f"a multiple of num_workers x micro_batches ({self.num_workers * self.micro_batches})",
            self.batch_size,
        )
        _check(self.learning_rate > 0, "pretrain.learning_rate", "positive", self.learning_rate)
        _check(self.grad_clip > 0, "pretrain.grad_clip", "positive", self.grad_clip)
        _one_of("pretrain.dtype", self.dtype, ("float32", "bfloat16"))


REMASKING_POLICIES = ("auto", "model", "critic", "self", "confidence", "random")


@dataclass(frozen=True, kw_only=True)
class DenoiseSection:
    steps: int = 4
    """S, denoising steps (trunk forwards that propose tokens)."""
    schedule: str = "linear"
    """How many [MASK]s are left after each step: `linear` or `cosine` (MaskGIT, arXiv:2202.04200)."""
    temperature: float = 1.0
    """Divides the logits of proposals."""
    top_p: float = 1.0
    """Nucleus mass of proposals (arXiv:1904.09751)."""
    remasking: str = "random"
    """`model`, `critic`, `self`, `confidence`, `random`, or `auto`: the first of these that the model has."""
    remasking_model: str = ""
    """Checkpoint of a token_classifier for `remasking: model`."""
    randomness: float = 1.0
    """0: the policy's top k; 1: uniform; between: a Plackett-Luce sample with weights P(wrong)^((1-r)/r)."""
    sampler: bool = False
    """Fill by the wavefront of the sampler head instead of all at once."""

    def __post_init__(self) -> None:
        _check(self.steps >= 1, "denoise.steps", "at least 1", self.steps)
        _one_of("denoise.schedule", self.schedule, ("linear", "cosine"))
        _check(self.temperature > 0, "denoise.temperature", "positive", self.temperature)
        _check(0 < self.top_p <= 1, "denoise.top_p", "above 0 and at most 1", self.top_p)
        _one_of("denoise.remasking", self.remasking, REMASKING_POLICIES)
        _check(
            self.remasking != "model" or self.remasking_model,
            "denoise.remasking_model",
            "a checkpoint path when denoise.remasking is model",
            self.remasking_model,
        )
        _check(0 <= self.randomness <= 1, "denoise.randomness", "between 0 and 1", self.randomness)


@dataclass(frozen=True, kw_only=True)
class GrpoSection:
    base: str = ""
    """Checkpoint of the base generator; empty: pretrain one first, cached by config hash."""
    rounds: int = 60
    """Rounds of rollout, score, generator phase, reward phase, publish."""
    prompts: int = 32
    """N, prompts per round, over all ranks."""
    group_size: int = 8
    """G, samples per prompt (GRPO, arXiv:2402.03300)."""
    prompt_tokens: int = 16
    """Tokens of natural text that each completion continues; the rest of data.block_size is generated."""
    learning_rate: float = 3e-4
    """AdamW learning rate of the generator's heads."""
    grad_clip: float = 1.0
    """Maximal gradient norm of each trainable part by itself."""
    loss: str = "grpo"
    """`grpo` (mean over each sample's actions, then over samples), `dr_grpo` (arXiv:2503.20783), `dapo`
    (arXiv:2503.14476, mean over all actions) or `gspo` (arXiv:2507.18071, sequence-level ratio)."""
    epsilon_low: float = 0.2
    """Lower clip range of the likelihood ratio."""
    epsilon_high: float = 0.28
    """Upper clip range of the likelihood ratio (DAPO's clip-higher)."""
    kl: float = 0.03
    """Weight of the KL divergence to the base heads, exact over the vocabulary, nats per action."""
    num_iterations: int = 1
    """Passes over each round's rollouts."""
    normalize: bool = True
    """Divide advantages by the group's standard deviation (false: Dr. GRPO)."""
    credit: str = "window"
    """What a token earns: `sequence`: the pooled signal of its text; `token`: its own signal; `both`: its own plus the
    text's mean; `window`: the mean signal within `credit_window` tokens of it."""
    credit_window: int = 2
    """Reach of credit `window`, tokens on each side: how far a token can make its neighbours implausible."""
    neutral: bool = True
    """Remove from the advantages what a change of temperature would explain, so that the first-order effect of an
    update on the policy's entropy along that knob is zero."""
    entropy: float = 1.0
    """Policy entropy that a controller holds, as a share of the base's on the first round; 0: no control. Without it
    the cheapest way to please a discriminator is a lower temperature."""
    policy_tokens: str = "auto"
    """Proposals that are credited: `all`, `kept`, or `auto` (kept where discarded ones change nothing that is kept)."""
    policy_positions: bool = False
    """Credit re-mask choices as actions, by their Plackett-Luce probability, also under `confidence` and `critic`;
    under `self` they always are."""
    residual: int = 256
    """Width of the zero-initialised residual MLP in front of the generator's untied lm head; 0: none."""
    anchor: float = 1.0
    """Weight of the diffusion loss on natural text in the generator phase."""
    num_workers: int = 1
    """Ray Train workers (DDP ranks)."""
    rollout_actors: int = 2
    """Generator actors, each with a reward actor beside it, shared out over the ranks."""
    checkpoint_every: int = 10
    """Rounds between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""

    def __post_init__(self) -> None:
        for name in (
            "rounds",
            "prompts",
            "num_iterations",
            "num_workers",
            "rollout_actors",
            "checkpoint_every",
            "keep",
            "prompt_tokens",
        ):
            _check(getattr(self, name) >= 1, f"grpo.{name}", "at least 1", getattr(self, name))
        _check(
            self.group_size >= 2,
            "grpo.group_size",
            "at least 2 (advantages are relative to the group)",
            self.group_size,
        )
        _one_of("grpo.loss", self.loss, ("grpo", "dr_grpo", "dapo", "gspo"))
        _one_of("grpo.credit", self.credit, ("sequence", "token", "both", "window"))
        _one_of("grpo.policy_tokens", self.policy_tokens, ("auto", "kept", "all"))
        _check(0 < self.epsilon_low < 1, "grpo.epsilon_low", "between 0 and 1", self.epsilon_low)
        _check(self.epsilon_high > 0, "grpo.epsilon_high", "positive", self.epsilon_high)
        for name in ("kl", "anchor", "entropy", "credit_window", "residual"):
            _check(getattr(self, name) >= 0, f"grpo.{name}", "0 or more", getattr(self, name))
        _check(self.learning_rate > 0, "grpo.learning_rate", "positive", self.learning_rate)
        _check(
            self.rollout_actors % self.num_workers == 0,
            "grpo.rollout_actors",
            f"a multiple of grpo.num_workers ({self.num_workers})",
            self.rollout_actors,
        )
        _check(
            self.prompts % self.rollout_actors == 0,
            "grpo.prompts",
            f"a multiple of grpo.rollout_actors ({self.rollout_actors})",
            self.prompts,
        )


@dataclass(frozen=True, kw_only=True)
class RewardSection:
    layers: tuple[int, ...] = (-1,)
    """Trunk layers whose hidden states the reward head reads; -1 is the normed output, k the output of block k."""
    masked_passes: int = 2
    """Trunk passes in which a share of the completion is masked, so that each token is also seen through the state
    that predicts it; 0: visible states alone. A causal trunk needs no further pass."""
    pooling: str = "both"
    """`last` non-pad token, `mean` over completion tokens, or `both` concatenated."""
    hidden: int = 256
    """Width of the reward head's hidden layer."""
    loss: str = "bce"
    """`mse` on softmax (the source design), `bce` on logits with soft targets, or `bradley_terry`."""
    signal: str = "log_odds"
    """Reward of the generator: `probability` P(natural), or `log_odds`, which does not saturate."""
    learning_rate: float = 1e-3
    """AdamW learning rate of the reward head."""
    smoothing: float = 0.1
    """Label smoothing: targets are smoothing and 1 - smoothing."""
    ema: float = 0.9
    """Decay per round of the averaged head that scores; 0: score with the trained head itself."""
    spectral_norm: bool = False
    """Spectral normalisation of the head's matrices (arXiv:1802.05957)."""
    replay_rounds: int = 8
    """Rounds of earlier rollouts kept for the reward phase."""
    batch_size: int = 256
    """Natural plus generated texts per reward step."""
    min_steps: int = 4
    """Fewest reward steps of a round."""
    max_steps: int = 8
    """Most reward steps of a round."""
    warmup_rounds: int = 6
    """Rounds before the first generator phase in which only the reward head trains."""
    warmup_steps: int = 30
    """Reward steps of each of these rounds."""
    band_low: float = 0.6
    """Held-out accuracy below which the controller adds reward steps."""
    band_high: float = 0.95
    """Held-out accuracy above which the controller removes reward steps."""

    def __post_init__(self) -> None:
        _one_of("reward.pooling", self.pooling, ("last", "mean", "both"))
        _one_of("reward.loss", self.loss, ("mse", "bce", "bradley_terry"))
        _one_of("reward.signal", self.signal, ("probability", "log_odds"))
        _check(len(self.layers) >= 1, "reward.layers", "at least one layer", self.layers)
        _check(
            self.masked_passes == 0 or self.masked_passes >= 2,
            "reward.masked_passes",
            "0 or at least 2 (one pass would hide every neighbour)",
            self.masked_passes,
        )
        _check(0 <= self.smoothing < 0.5, "reward.smoothing", "at least 0 and below 0.5", self.smoothing)
        _check(0 <= self.ema < 1, "reward.ema", "at least 0 and below 1", self.ema)
        _check(
            0.5 <= self.band_low < self.band_high <= 1,
            "reward.band_low",
            f"at least 0.5 and below reward.band_high ({self.band_high})",
            self.band_low,
        )
        _check(
            0 <= self.min_steps <= self.max_steps,
            "reward.min_steps",
            f"between 0 and reward.max_steps ({self.max_steps})",
            self.min_steps,
        )
        _check(
            self.batch_size >= 4 and self.batch_size % 2 == 0,
            "reward.batch_size",
            "an even number of at least 4",
            self.batch_size,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    samples: int = 512
    """Texts per evaluated setting, and natural ones beside them."""
    judge_steps: int = 500
    """Optimizer steps of the independent causal judge."""
    judge_layers: int = 3
    """Blocks of the judge."""
    judge_width: int = 96
    """Width of the judge."""

    def __post_init__(self) -> None:
        for name in ("samples", "judge_steps", "judge_layers", "judge_width"):
            _check(getattr(self, name) >= 1, f"evaluation.{name}", "at least 1", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class TrackingSection:
    uri: str = ""
    """MLflow tracking URI; empty: MLFLOW_TRACKING_URI, else a SQLite store in run.output."""
    experiment: str = "grpo"
    """MLflow experiment."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. Functions take the section or the values that they use, never this."""

    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    corruption: CorruptionSection = field(default_factory=CorruptionSection)
    loss: LossSection = field(default_factory=LossSection)
    mask_bias: MaskBiasSection = field(default_factory=MaskBiasSection)
    critic: CriticSection = field(default_factory=CriticSection)
    sampler: SamplerSection = field(default_factory=SamplerSection)
    pretrain: PretrainSection = field(default_factory=PretrainSection)
    denoise: DenoiseSection = field(default_factory=DenoiseSection)
    grpo: GrpoSection = field(default_factory=GrpoSection)
    reward: RewardSection = field(default_factory=RewardSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    tracking: TrackingSection = field(default_factory=TrackingSection)

    def __post_init__(self) -> None:
        _check(
            self.grpo.prompt_tokens < self.data.block_size,
            "grpo.prompt_tokens",
            f"below data.block_size ({self.data.block_size})",
            self.grpo.prompt_tokens,
        )
        if self.denoise.sampler:
            _check(self.model.sampler, "denoise.sampler", "false unless model.sampler is true", self.denoise.sampler)
        if self.denoise.remasking == "critic":
            _check(
                self.model.critic,
                "denoise.remasking",
                "another policy than critic unless model.critic is true",
                self.denoise.remasking,
            )
