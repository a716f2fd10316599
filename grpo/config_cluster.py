"""The section that says what Ray books for each process of the adversarial rounds, and how it spreads them.

Fields and checks are written as in `grpo/config_model.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo.config_model import check, one_of

KINDS = ("generator", "reward", "learner")


@dataclass(frozen=True, kw_only=True)
class ClusterSection:
    """What each process books of a Ray cluster, and where it is placed."""

    generator_cpus: float = 0.0
    """CPUs booked per rank, divided among its generator actors; 0 books none, so that all fit on a small machine."""
    reward_cpus: float = 0.0
    """The same for its reward actors."""
    learner_cpus: float = 1.0
    """CPUs booked for each rank's learner."""
    generator_gpus: float = 0.3
    """GPUs booked per rank, divided among its generator actors; a fraction shares a GPU. Unused without GPUs."""
    reward_gpus: float = 0.3
    """The same for its reward actors."""
    learner_gpus: float = 0.4
    """GPUs booked for each rank's learner, and for each task that measures or trains the judge; at most 1."""
    share_gpu_trunk: bool = False
    """Actors of one GPU use one copy of the trunk by CUDA IPC (Ray Direct Transport, alpha), where grpo.trainable is
    heads; otherwise each has its own."""
    placement: str = "PACK"
    """Ray's strategy over nodes: `PACK` (as few as will do), `SPREAD`, or `STRICT_PACK` (one node). The actors of a
    rank always stand side by side where anything is booked for them."""

    def __post_init__(self) -> None:
        for kind in KINDS:
            for resource in ("cpus", "gpus"):
                booked = getattr(self, f"{kind}_{resource}")
                check(booked >= 0, f"cluster.{kind}_{resource}", "0 or more", booked)
        check(self.learner_cpus > 0, "cluster.learner_cpus", "above 0", self.learner_cpus)
        check(self.learner_gpus <= 1, "cluster.learner_gpus", "at most 1", self.learner_gpus)
        one_of("cluster.placement", self.placement, ("PACK", "SPREAD", "STRICT_PACK"))

    def booked(self, kind: str, *, per_rank: int = 1, on_gpu: bool = False) -> dict[str, float]:
        """CPUs and GPUs of one of a rank's `per_rank` processes of a kind; without zeros."""
        amounts = {"CPU": getattr(self, f"{kind}_cpus"), "GPU": getattr(self, f"{kind}_gpus") if on_gpu else 0.0}
        return {name: amount / per_rank for name, amount in amounts.items() if amount}
