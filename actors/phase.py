"""What trains in one phase, as the one module that data parallelism wraps; the settings of its loss on natural text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from grpo.config import Config
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


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, under what remains of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
