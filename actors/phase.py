"""What trains in one phase, as the one module that data parallelism wraps; the settings of its loss on natural text;
and what every phase does with figures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from grpo.config import Config
from grpo.metrics import means, merge_sums, pack_sums, unpack_sums
from grpo.multitask import Objective


class Phase(nn.Module):
    """Holds the modules that train and runs a closure as its forward, which is all that DDP needs to see."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()


def objective(config: Config) -> Objective:
    """The settings of the loss on natural text."""
    return Objective(
        model=config.model,
        corruption=config.corruption,
        loss=config.loss,
        critic=config.critic,
        sampler=config.sampler,
        applies_to=config.mask_bias.applies_to,
        padded=config.data.layout == "documents",
    )


def accumulating(module: nn.Module, more_to_come: bool) -> AbstractContextManager:
    """Hold DDP's reduction back while further micro-batches of the same optimizer step follow."""
    return module.no_sync() if more_to_come and hasattr(module, "no_sync") else nullcontext()


def accumulate(sums: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    """Add pairs (see `grpo/metrics.py`) to those gathered so far, in place."""
    sums.update(merge_sums(sums, part))


def reduced_means(sums: dict[str, Tensor], all_reduce: Callable[..., Tensor]) -> dict[str, float]:
    """Means of pairs over all ranks."""
    return means(unpack_sums(sums, all_reduce(pack_sums(sums)))) if sums else {}


def check_finite(norms: dict[str, Tensor], phase: str) -> None:
    """Stop before a gradient that is not finite reaches the weights.

    Raises:
        FloatingPointError: names phase and part.
    """
    for name, norm in norms.items():
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{phase}: the gradient of {name} is not finite")


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, under what remains of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
