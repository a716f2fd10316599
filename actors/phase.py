"""What trains in one phase, as the one module that data parallelism wraps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


class Phase(nn.Module):
    """Holds the modules that train and runs a closure as its forward, which is all that DDP needs to see."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()


def accumulating(module: nn.Module, more_to_come: bool) -> AbstractContextManager:
    """Hold DDP's reduction back while further micro-batches of the same optimizer step follow."""
    return module.no_sync() if more_to_come and hasattr(module, "no_sync") else nullcontext()
