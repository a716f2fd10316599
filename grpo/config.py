"""The configuration of a run: one frozen dataclass per section, read from YAML plus dotted overrides.

The sections stand in `grpo/config_model.py`, `grpo/config_rounds.py` and `grpo/config_sweep.py`; what must hold between
two sections is checked here. Reading, overriding, saving and hashing live in `grpo/config_file.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from grpo.config_cluster import ClusterSection
from grpo.config_model import (
    CorruptionSection,
    CriticSection,
    DataSection,
    LossSection,
    MaskBiasSection,
    ModelSection,
    PretrainSection,
    RunSection,
    SamplerSection,
    check,
)
from grpo.config_rounds import (
    DenoiseSection,
    EvaluationSection,
    GrpoSection,
    RewardSection,
    TrackingSection,
)
from grpo.config_sweep import SweepSection

__all__ = [
    "ClusterSection",
    "Config",
    "CorruptionSection",
    "CriticSection",
    "DataSection",
    "DenoiseSection",
    "EvaluationSection",
    "GrpoSection",
    "LossSection",
    "MaskBiasSection",
    "ModelSection",
    "PretrainSection",
    "RewardSection",
    "RunSection",
    "SamplerSection",
    "SweepSection",
    "TrackingSection",
]


SHORTEST = 4
"""Tokens that a completion must have to be measured."""


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
    cluster: ClusterSection = field(default_factory=ClusterSection)
    sweep: SweepSection = field(default_factory=SweepSection)

    def __post_init__(self) -> None:
        check(
            self.grpo.prompt_tokens <= self.data.block_size - SHORTEST,
            "grpo.prompt_tokens",
            f"at least {SHORTEST} below data.block_size ({self.data.block_size}), so that a completion has 4-grams",
            self.grpo.prompt_tokens,
        )
        layers = self.model.n_layer
        check(
            all(layer == -1 or 1 <= layer <= layers for layer in self.reward.layers),
            "reward.layers",
            f"-1 or from 1 to model.n_layer ({layers})",
            list(self.reward.layers),
        )
        steps = 1 if self.model.attention == "causal" else self.denoise.steps
        check(
            self.grpo.replay_steps <= steps,
            "grpo.replay_steps",
            f"at most denoise.steps ({steps}; 1 for causal models)",
            self.grpo.replay_steps,
        )
        if self.denoise.sampler:
            check(self.model.sampler, "denoise.sampler", "false unless model.sampler is true", self.denoise.sampler)
        if self.denoise.remasking == "critic":
            check(
                self.model.critic,
                "denoise.remasking",
                "another policy than critic unless model.critic is true",
                self.denoise.remasking,
            )

    @property
    def warmup_rounds(self) -> int:
        """Rounds before the first generator phase: none where there is no discriminator to warm up."""
        return self.reward.warmup_rounds if self.grpo.adversary else 0
