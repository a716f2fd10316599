"""Linear layers whose matrix products take the faster of torch's two CPU libraries.

1. torch multiplies float32 matrices on x86 by MKL, which leaves the wide vector units (AVX-512) of processors that are
   not Intel's unused. oneDNN, which torch carries too, uses them: 2.3 times the rate on a Zen 5. torch calls it for
   float32 from compiled models alone; this calls the same operator directly, and gives it a backward.
2. Which library is used depends on the machine and on the sizes of the product, never on a timing: a resumed run goes
   on bit for bit. Small products stay with MKL, for oneDNN's call costs 10 microseconds more.
3. oneDNN compiles a kernel for every number of rows that it meets, and keeps it: up to a megabyte each. So rows are
   padded with zeros to one of eight numbers between two powers of 2.
4. Everywhere else (GPU, compiled models, other dtypes, autocast, other processors, a torch without the operator) this
   is `F.linear`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_LEAST = 1 << 20
"""Multiplications from which oneDNN's call pays."""


@functools.cache
def prefers_onednn() -> bool:
    """Whether this machine multiplies float32 matrices faster by oneDNN: AVX-512, and not Intel's."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    about = Path("/proc/cpuinfo")
    return about.exists() and "GenuineIntel" not in about.read_text(encoding="utf-8", errors="replace")


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K] of any strides -> x weight^T + bias [..., N]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = _multiply(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        flat_x, flat = x.flatten(0, -2), gradient.flatten(0, -2)
        of_weight = None
        if ctx.needs_input_grad[1]:  # the operator copies a first factor that lies across: the smaller one
            if weight.shape[0] < weight.shape[1]:
                of_weight = _multiply(flat.t(), flat_x.t())
            else:
                of_weight = _multiply(flat_x.t(), flat.t()).t()
        return of_x, of_weight, flat.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x [..., K], weight [N, K], bias [N] -> [..., N]."""
    if (
        not x.is_cpu
        or x.dim() < 2
        or torch.compiler.is_compiling()
        or x.numel() * len(weight) < _LEAST
        or not x.dtype == weight.dtype == torch.float32
        or not prefers_onednn()
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(x, weight, bias)
    multiply = _Linear.apply if torch.is_grad_enabled() else _multiply
    rows = x.numel() // x.shape[-1]
    beyond = -rows % (1 << max(rows.bit_length() - 4, 0))
    if not beyond:
        return multiply(x, weight, bias)
    padded = F.pad(x.flatten(0, -2), (0, 0, 0, beyond))
    return multiply(padded, weight, bias)[:rows].unflatten(0, x.shape[:-1])


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
