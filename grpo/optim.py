"""Optimisers for separate players: one AdamW, parts clipped and stepped each by itself.

1. A joint gradient-norm clip couples parts that have nothing to do with each other: one head's large gradient would
   shrink another's step. Each part has its own norm.
2. Matrices decay, vectors (biases, norms) do not.
3. A part without gradients in this step (a head that has not joined yet) is left untouched, moments included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

Parts = dict[str, list[nn.Parameter]]
BETAS = (0.9, 0.95)
FLOOR = 0.1
"""Share of the peak learning rate at which the cosine ends."""


def trainable_parts(modules: dict[str, nn.Module | Iterable[nn.Parameter]]) -> Parts:
    """Named lists of the parameters that require gradients; a parameter shared by two parts belongs to the first."""
    parts: Parts = {}
    seen: set[int] = set()
    for name, module in modules.items():
        parameters = module.parameters() if isinstance(module, nn.Module) else module
        parts[name] = [p for p in parameters if p.requires_grad and id(p) not in seen and not seen.add(id(p))]
    return {name: parameters for name, parameters in parts.items() if parameters}


def make_optimizer(parts: Parts, *, learning_rate: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101), fused, with two groups per part: decayed matrices and undecayed vectors."""
    groups = []
    for name, parameters in parts.items():
        for decay, members in (
            (weight_decay, [p for p in parameters if p.dim() >= 2]),
            (0.0, [p for p in parameters if p.dim() < 2]),
        ):
            if members:
                groups.append({"params": members, "weight_decay": decay, "part": name})
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)


def clip_parts(parts: Parts, max_norm: float) -> dict[str, Tensor]:
    """Scale each part's gradient to at most `max_norm` by itself; returns the norms before, detached scalars."""
    norms = {}
    for name, parameters in parts.items():
        with_gradient = [p for p in parameters if p.grad is not None]
        if with_gradient:
            norms[name] = nn.utils.clip_grad_norm_(with_gradient, max_norm)
    return norms


def check_finite(norms: dict[str, Tensor], phase: str) -> None:
    """Stop a run whose gradient is not finite; the host waits once.

    Raises:
        FloatingPointError: names phase and part.
    """
    finite = torch.stack([norm.isfinite() for norm in norms.values()]).tolist() if norms else []
    for name, is_finite in zip(norms, finite, strict=True):
        if not is_finite:
            raise FloatingPointError(f"{phase}: the gradient of {name} is not finite")


def cosine_learning_rate(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """Linear warm-up over `warmup` steps, then a cosine to `FLOOR` x peak at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give all parameter groups this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def flat_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors under plain names, for a safetensors file: `<parameter index>.<field>`."""
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, fields in optimizer.state_dict()["state"].items()
        for name, value in fields.items()
    }


def load_flat_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `flat_state`, on an optimiser made from the same parts."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    whole = optimizer.state_dict()
    whole["state"] = state
    optimizer.load_state_dict(whole)
