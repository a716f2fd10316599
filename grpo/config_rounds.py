"""Sections of a run that use a base model: denoising, adversarial rounds, reward, evaluation, tracking.

Fields and checks are written as in `grpo/config_model.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from grpo.config_model import check, one_of

REMASKING_POLICIES = ("auto", "model", "critic", "self", "confidence", "random")


@dataclass(frozen=True, kw_only=True)
class DenoiseSection:
    """How a generator writes."""

    steps: int = 4
    """S, denoising steps (trunk forwards that propose tokens)."""
    schedule: str = "linear"
    """How many [MASK]s are left after each step: `linear` or `cosine` (MaskGIT, arXiv:2202.04200)."""
    temperature: float = 1.0
    """Divides the logits of proposals."""
    top_p: float = 1.0
    """Nucleus mass of proposals (arXiv:1904.09751). Below 1 a rollout records the nucleus of each credited token,
    [M, V] bool: a byte per entry of the text vocabulary, 50 kB per token with GPT-2's."""
    remasking: str = "random"
    """`model`, `critic`, `self`, `confidence`, `random`, or `auto`: `model` if `remasking_model` names one, else
    `critic` if the generator has one, else `self`."""
    remasking_model: str = ""
    """Checkpoint of a token_classifier for `remasking: model`."""
    randomness: float = 1.0
    """0: the policy's top k; 1: uniform, whatever the policy thinks; between: a Plackett-Luce sample with weights
    P(wrong)^((1-r)/r)."""
    sampler: bool = False
    """Fill by the wavefront of the sampler head instead of all at once."""

    def __post_init__(self) -> None:
        check(self.steps >= 1, "denoise.steps", "at least 1", self.steps)
        one_of("denoise.schedule", self.schedule, ("linear", "cosine"))
        check(self.temperature > 0, "denoise.temperature", "positive", self.temperature)
        check(0 < self.top_p <= 1, "denoise.top_p", "above 0 and at most 1", self.top_p)
        one_of("denoise.remasking", self.remasking, REMASKING_POLICIES)
        check(
            self.remasking != "model" or self.remasking_model,
            "denoise.remasking_model",
            "a checkpoint path when denoise.remasking is model",
            self.remasking_model,
        )
        check(0 <= self.randomness <= 1, "denoise.randomness", "between 0 and 1", self.randomness)


@dataclass(frozen=True, kw_only=True)
class GrpoSection:
    """Adversarial rounds: groups, advantages, loss, limits of the policy, ranks and actors."""

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
    learning_rate: float = 1e-3
    """AdamW learning rate of all of the generator that trains: heads, and by `trainable` adapters or the trunk, which
    want less (3e-4 was measured)."""
    grad_clip: float = 1.0
    """Maximal gradient norm of each trainable part by itself."""
    loss: str = "grpo"
    """`grpo` (mean over each sample's actions, then over samples), `dr_grpo` (arXiv:2503.20783), `dapo`
    (arXiv:2503.14476, mean over all actions) or `gspo` (arXiv:2507.18071, sequence-level ratio)."""
    epsilon_low: float = 0.2
    """Lower clip range of the likelihood ratio."""
    epsilon_high: float = 0.28
    """Upper clip range of the likelihood ratio (DAPO's clip-higher)."""
    kl: float = 0.1
    """Weight of the KL divergence to the base heads, exact over the vocabulary, nats per action. 0.04 gains as much on
    the default corpus; a grammar's frequencies stay nearer with 0.1 (docs/findings.md)."""
    ema: float = 0.98
    """Largest decay per round of the averaged heads, which are the run's result (two players orbit; their mean does
    not). Until v / (v + 2) reaches it after v rounds, each round weighs in proportion to its number. 0: the last
    heads."""
    num_iterations: int = 4
    """Passes over each round's rollouts."""
    normalize: bool = False
    """Divide the discriminator's advantages by the group's standard deviation (false: Dr. GRPO). Its log-odds shrink as
    texts become natural, and so should its push. Those of a user's rewards are always divided."""
    credit: str = "token"
    """What a token earns: `sequence`: the pooled signal of its text; `token`: its own signal; `both`: its own plus the
    text's mean; `window`: the mean signal within `credit_window` tokens of it."""
    credit_window: int = 2
    """Reach of credit `window`, tokens on each side: how far a token can make its neighbours implausible."""
    neutral: bool = True
    """Remove from the advantages what a change of temperature would explain, so that the first-order effect of an
    update on the policy's entropy along that knob is zero."""
    entropy_floor: float = 0.5
    """Collapse: where the policy's entropy falls below this share of the first round's, it goes back to the averaged
    policy and its learning rate is halved; 0: never."""
    policy_tokens: str = "auto"
    """Proposals that are credited: `all`, or `auto`: kept ones alone where discarded ones changed none of them."""
    policy_positions: bool = False
    """Credit re-mask choices as actions, by their Plackett-Luce probability, also under `confidence` and `critic`;
    under `self` they are where `denoise.randomness` lies strictly between 0 and 1."""
    residual: int = 256
    """Width of the zero-initialised residual MLP in front of the generator's untied lm head; 0: none."""
    anchor: float = 0.1
    """Weight of pretraining's whole loss (diffusion, sampler, critic) on natural text in the generator phase. At 0
    critic and mask bias stay as they are, and the sampler learns from rewards alone."""
    adversary: float = 1.0
    """Weight of the discriminator's reward. 0: there is none, so no reward phase and no warm-up; with it usually go
    `anchor: 0`, `entropy_floor: 0` and `ema: 0` (nothing orbits, and an average would lag)."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Reward functions of the user's own and their weights, by `module:function` (see `grpo/reward_functions.py`); a
    weight of 0 logs one without learning from it. An override replaces those of the file;
    `grpo.rewards.module:function=WEIGHT` adds one."""
    trainable: str = "heads"
    """What trains in the generator: `heads` over cached states of the frozen trunk; with `lora` also low-rank adapters
    of the trunk's linear layers (arXiv:2106.09685), with `all` the trunk itself, by replaying the trajectories. The
    reward model keeps the base's trunk."""
    trunk_dtype: str = "float32"
    """Of the published trunk; `bfloat16` halves it, for GPUs, where heads alone train. Heads stay float32."""
    lora_rank: int = 8
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """The adapters' product is scaled by lora_alpha / lora_rank."""
    replay_steps: int = 0
    """Denoising steps that an update replays, drawn at random and weighted without bias; 0: all."""
    micro_batch: int = 0
    """Samples per backward, of each rollout actor's; 0: all. Changes the memory, not the gradient."""
    importance_cap: float = 2.0
    """Largest importance weight of an action whose rollout was made by older weights."""
    max_staleness: int = 0
    """1: the next round is rolled out while a round trains, so rollouts are one round old; 0: they never are."""
    num_workers: int = 1
    """Ray Train workers (DDP ranks)."""
    rollout_actors: int = 2
    """Generator actors, each with a reward actor beside it, shared out over the ranks."""
    checkpoint_every: int = 1
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
            check(getattr(self, name) >= 1, f"grpo.{name}", "at least 1", getattr(self, name))
        check(
            self.group_size >= 2,
            "grpo.group_size",
            "at least 2 (advantages are relative to the group)",
            self.group_size,
        )
        check(self.max_staleness in (0, 1), "grpo.max_staleness", "0 or 1", self.max_staleness)
        check(0 <= self.ema < 1, "grpo.ema", "at least 0 and below 1", self.ema)
        check(0 <= self.entropy_floor < 1, "grpo.entropy_floor", "at least 0 and below 1", self.entropy_floor)
        check(
            self.ema > 0 or self.entropy_floor == 0,
            "grpo.entropy_floor",
            "0 where grpo.ema is 0 (there is no averaged policy to go back to)",
            self.entropy_floor,
        )
        one_of("grpo.loss", self.loss, ("grpo", "dr_grpo", "dapo", "gspo"))
        one_of("grpo.credit", self.credit, ("sequence", "token", "both", "window"))
        one_of("grpo.policy_tokens", self.policy_tokens, ("auto", "all"))
        one_of("grpo.trainable", self.trainable, ("heads", "lora", "all"))
        one_of("grpo.trunk_dtype", self.trunk_dtype, ("float32", "bfloat16"))
        check(
            self.trunk_dtype == "float32" or self.trainable == "heads",
            "grpo.trunk_dtype",
            "float32 unless grpo.trainable is heads",
            self.trunk_dtype,
        )
        check(self.lora_rank >= 1, "grpo.lora_rank", "at least 1", self.lora_rank)
        check(self.lora_alpha > 0, "grpo.lora_alpha", "positive", self.lora_alpha)
        check(self.importance_cap > 0, "grpo.importance_cap", "positive", self.importance_cap)
        if self.trainable == "heads" or self.loss == "gspo":
            check(
                self.replay_steps == 0,
                "grpo.replay_steps",
                "0 where grpo.trainable is heads (nothing is replayed) or grpo.loss is gspo (a sample's ratio needs "
                "all of its steps)",
                self.replay_steps,
            )
        check(0 < self.epsilon_low < 1, "grpo.epsilon_low", "between 0 and 1", self.epsilon_low)
        check(self.epsilon_high > 0, "grpo.epsilon_high", "positive", self.epsilon_high)
        for name in (
            "kl", "anchor", "credit_window", "residual", "adversary", "replay_steps", "micro_batch",
        ):
            check(getattr(self, name) >= 0, f"grpo.{name}", "0 or more", getattr(self, name))
        for name, weight in self.rewards.items():
            module, _, function = name.partition(":")
            check(module and function.isidentifier(), "grpo.rewards", "keyed by module:function", name)
            check(math.isfinite(weight), f"grpo.rewards {name}", "weighted by a finite number", weight)
        check(
            self.adversary or any(self.rewards.values()),
            "grpo.adversary",
            "above 0 where grpo.rewards weights no function",
            self.adversary,
        )
        check(self.learning_rate > 0, "grpo.learning_rate", "positive", self.learning_rate)
        check(self.grad_clip > 0, "grpo.grad_clip", "positive", self.grad_clip)
        check(
            self.rollout_actors % self.num_workers == 0,
            "grpo.rollout_actors",
            f"a multiple of grpo.num_workers ({self.num_workers})",
            self.rollout_actors,
        )
        check(
            self.prompts % self.rollout_actors == 0,
            "grpo.prompts",
            f"a multiple of grpo.rollout_actors ({self.rollout_actors})",
            self.prompts,
        )


@dataclass(frozen=True, kw_only=True)
class RewardSection:
    """The discriminator: what it reads, its head, its training."""

    layers: tuple[int, ...] = (-1,)
    """Trunk layers whose hidden states the reward head reads; -1 is the normed output, k the output of block k."""
    masked_passes: int = 2
    """Trunk passes in which a share of the completion is masked, so that each token is also seen through the state
    that predicts it; 0: visible states alone. A causal trunk needs no further pass."""
    pooling: str = "both"
    """`last` non-pad token, `mean` over completion tokens, or `both` concatenated."""
    reach: int = 1
    """Tokens on each side that a token's score reads beside the token itself; 0: none."""
    hidden: int = 128
    """Width of the reward head's hidden layers; 256 gains no more (docs/findings.md)."""
    loss: str = "bce"
    """`mse` on softmax, `bce` on logits with soft targets, or `bradley_terry`."""
    signal: str = "log_odds"
    """Reward of the generator: `probability` P(natural), or `log_odds`, which does not saturate."""
    learning_rate: float = 1e-3
    """AdamW learning rate of the reward head."""
    smoothing: float = 0.1
    """Label smoothing: targets are smoothing and 1 - smoothing."""
    ema: float = 0.0
    """Decay per round of the averaged head that scores; 0: score with the trained head itself. A head that lags behind
    the generator is exploited: see docs/findings.md."""
    spectral_norm: bool = False
    """Spectral normalisation of the head's matrices (arXiv:1802.05957)."""
    replay_rounds: int = 8
    """Rounds of earlier rollouts kept for the reward phase, as features on the learner's device: (replay_rounds + 1) x
    2 (generated, natural) x prompts x group_size / num_workers x (block_size - prompt_tokens) x F x 4 bytes (2 with
    `grpo.trunk_dtype: bfloat16`) per rank, where F = (number of layers + 2) x n_embd + 2, without masked passes number
    of layers x n_embd (`grpo/features.py`). GPT-2's shape, 768 wide with block_size 1024, else by default: F = 2306,
    4.8 GB per round and 43 GB in all."""
    batch_size: int = 128
    """Natural plus generated texts per reward step."""
    min_steps: int = 10
    """Fewest reward steps of a round."""
    max_steps: int = 40
    """Most reward steps of a round."""
    warmup_rounds: int = 6
    """Rounds before the first generator phase in which only the reward head trains."""
    warmup_steps: int = 60
    """Reward steps of each of these rounds."""
    band_low: float = 0.6
    """Held-out accuracy below which the controller adds reward steps."""
    band_high: float = 0.95
    """Held-out accuracy above which the controller removes reward steps. 0.80 gains no more (docs/findings.md): the
    trunk's features tell a small model's texts with more than that."""

    def __post_init__(self) -> None:
        one_of("reward.pooling", self.pooling, ("last", "mean", "both"))
        one_of("reward.loss", self.loss, ("mse", "bce", "bradley_terry"))
        one_of("reward.signal", self.signal, ("probability", "log_odds"))
        for name in ("reach", "replay_rounds", "warmup_rounds", "warmup_steps"):
            check(getattr(self, name) >= 0, f"reward.{name}", "0 or more", getattr(self, name))
        check(self.hidden >= 1, "reward.hidden", "at least 1", self.hidden)
        check(self.learning_rate > 0, "reward.learning_rate", "positive", self.learning_rate)
        check(len(self.layers) >= 1, "reward.layers", "at least one layer", self.layers)
        check(
            self.masked_passes == 0 or self.masked_passes >= 2,
            "reward.masked_passes",
            "0 or at least 2 (one pass would hide every neighbour)",
            self.masked_passes,
        )
        check(0 <= self.smoothing < 0.5, "reward.smoothing", "at least 0 and below 0.5", self.smoothing)
        check(0 <= self.ema < 1, "reward.ema", "at least 0 and below 1", self.ema)
        check(
            0.5 <= self.band_low < self.band_high <= 1,
            "reward.band_low",
            f"at least 0.5 and below reward.band_high ({self.band_high})",
            self.band_low,
        )
        check(
            0 <= self.min_steps <= self.max_steps,
            "reward.min_steps",
            f"between 0 and reward.max_steps ({self.max_steps})",
            self.min_steps,
        )
        check(
            self.batch_size >= 4 and self.batch_size % 2 == 0,
            "reward.batch_size",
            "an even number of at least 4",
            self.batch_size,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """What is measured, on how much text, by which judge."""

    samples: int = 512
    """Texts per evaluated setting, and natural ones beside them."""
    judge_steps: int = 500
    """Optimizer steps of the independent causal judge, whose recipe no other keys than these of `evaluation` decide
    (`actors/judge.py`): runs on the same data are judged by the same model."""
    judge_layers: int = 3
    """Blocks of the judge."""
    judge_width: int = 96
    """Width of the judge."""
    judge_heads: int = 4
    """Attention heads of the judge."""
    judge_learning_rate: float = 3e-3
    """Peak learning rate of the judge; a wide one wants a smaller one."""
    scorer: str = ""
    """Checkpoint of a `sequence_scorer` (`pretrain.mode`), whose mean P(natural) of the texts is one more figure."""
    temperature: tuple[float, ...] = ()
    """Temperatures that `pipelines/evaluate.py` crosses with the lists below; empty: that of `denoise`, as there."""
    top_p: tuple[float, ...] = ()
    """Nucleus masses."""
    steps: tuple[int, ...] = ()
    """Numbers of denoising steps."""
    remasking: tuple[str, ...] = ()
    """Re-masking policies."""
    sampler: tuple[bool, ...] = ()
    """Fill by the wavefront of the sampler head, or all at once."""

    def __post_init__(self) -> None:
        check(self.samples >= 4, "evaluation.samples", "at least 4", self.samples)
        for name in ("judge_steps", "judge_layers", "judge_heads"):
            check(getattr(self, name) >= 1, f"evaluation.{name}", "at least 1", getattr(self, name))
        check(
            self.judge_width >= 1 and self.judge_width % (2 * self.judge_heads) == 0,
            "evaluation.judge_width",
            f"a positive multiple of twice evaluation.judge_heads ({self.judge_heads})",
            self.judge_width,
        )
        check(self.judge_learning_rate > 0, "evaluation.judge_learning_rate", "positive", self.judge_learning_rate)
        for value in self.temperature:
            check(value > 0, "evaluation.temperature", "positive numbers", value)
        for value in self.top_p:
            check(0 < value <= 1, "evaluation.top_p", "numbers above 0 and at most 1", value)
        for value in self.steps:
            check(value >= 1, "evaluation.steps", "numbers of at least 1", value)
        for value in self.remasking:
            one_of("evaluation.remasking", value, REMASKING_POLICIES)


@dataclass(frozen=True, kw_only=True)
class TrackingSection:
    """MLflow."""

    uri: str = ""
    """MLflow tracking URI; empty: MLFLOW_TRACKING_URI, else a SQLite store in run.output."""
    experiment: str = "grpo"
    """MLflow experiment."""
