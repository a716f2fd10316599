"""A loss over rows, taken slice by slice, so that the logits of a large vocabulary never exist all at once.

    total = sum over slices of loss(head(hidden states of the slice))

1. A slice is differentiated as soon as it is computed. What waits for the backward pass is the gradient with respect
   to hidden states and head, not the logits; on a CPU they then stay within the cache. (Liger, arXiv:2410.10989, does
   so for one loss; this takes any that is a sum over rows.)
2. Order of summation apart, values and gradients are those of the whole; a batch of one slice takes autograd's own
   path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grpo.slices import slices

LOGITS_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Logits of a slice: 8 MB on a CPU, 1 GB of float32 on a GPU."""


def sliced_loss(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    loss: Callable[[slice, Tensor], Tensor],
    *,
    vocabulary: int,
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """Sum of a loss over slices of rows.

    Args:
        head: states [b, .., C] -> logits [b, .., V].
        hidden: [B, .., C] states.
        loss: (rows, logits [b, .., V] of these rows) -> their share of the loss, 0-dimensional. It may keep other
            figures; it runs once per slice, in order.
        vocabulary: V.
        parameters: what the head reads and the loss is to reach.

    Returns:
        0-dimensional; differentiable with respect to the states and the parameters.
    """
    at_once = LOGITS_AT_ONCE[hidden.device.type]
    parts = list(slices(len(hidden), math.prod(hidden.shape[1:-1]) * vocabulary, at_once))
    if len(parts) == 1:
        return loss(parts[0], head(hidden))
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, *parameters))):
        return sum(loss(rows, head(hidden[rows])) for rows in parts)
    return _Sliced.apply(parts, head, loss, hidden, *parameters)


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts: list[slice], head: Callable, loss: Callable, hidden: Tensor, *parameters: Tensor) -> Tensor:
        wanted = [p for p in parameters if p.requires_grad]
        total = torch.zeros((), device=hidden.device)
        of_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        of_head: list[Tensor] = []
        for rows in parts:
            with torch.enable_grad():
                part = hidden[rows].detach().requires_grad_(hidden.requires_grad)
                value = loss(rows, head(part))
                inputs = [part, *wanted] if hidden.requires_grad else wanted
                gradients = list(torch.autograd.grad(value, inputs))
            if of_hidden is not None:
                of_hidden[rows] = gradients.pop(0)
            of_head = [a.add_(b) for a, b in zip(of_head, gradients, strict=True)] if of_head else gradients
            total = total + value.detach()
        ctx.gradients = (of_hidden, *(of_head.pop(0) if p.requires_grad else None for p in parameters))
        return total

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *(None if g is None else g.mul_(scale) for g in gradients)
