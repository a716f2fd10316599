"""The bias on the [MASK] logit, and the controller that sets it.

    EMA   <- ema x EMA + (1 - ema) x signal,      signal = mean P(MASK) at unmask positions, over the whole batch
    error  = target - EMA
    I     <- I + k_i x error,                     bias = clamp(I + k_p x error, -bound, bound)

P(MASK) above the target lowers the bias.

1. The EMA starts at the first signal, not at zero or at the target: no fictitious error, no fictitious success.
2. k_p acts on the output, not on its increment (where it would only be a larger k_i).
3. Anti-windup: the integral holds while the output stands at a bound and the error points outward, and is itself
   kept within the bounds, so the bias leaves a bound at the first signal on the other side.
4. State is a few 0-dimensional float64 tensors on the device: an update costs no host synchronisation and is the same
   bit for bit on every rank that is given the same reduced signal. A signal of zero count changes nothing.
5. P(MASK) is taken over words and [MASK]; pad and the vocabulary's padding, which no loss ever trains, are left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo.config import MaskBiasSection
from grpo.tokenizer import Vocabulary


def saved_bias(state: Any, settings: MaskBiasSection) -> float:
    """The bias in a checkpoint's training state; the controller's first one where it never had a controller."""
    saved = state.get("mask_bias") if isinstance(state, dict) else None
    return float((saved or {}).get("bias", settings.initial))


def apply_mask_bias(logits: Tensor, bias: Tensor | float, vocabulary: Vocabulary) -> Tensor:
    """Add the bias to the [MASK] column, out of place.

    Args:
        logits: [..., V] with V > mask_id; any number of columns may follow.
        bias: scalar, nats.

    Returns:
        [..., V], a new tensor.
    """
    is_mask = torch.arange(logits.shape[-1], device=logits.device) == vocabulary.mask_id
    return logits + (is_mask * bias).to(logits.dtype)


def mask_log_odds(logits: Tensor, vocabulary: Vocabulary) -> Tensor:
    """log P(MASK) - log P(any word): P(MASK) under a bias is sigmoid(log-odds + bias).

    Args:
        logits: [..., V] unbiased.

    Returns:
        [...] float32 (float64 for float64 logits).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits[..., vocabulary.mask_id] - logits[..., : vocabulary.base_size].logsumexp(-1)


class MaskBias:
    """The controller's state; `bias` is what losses and samplers add to the [MASK] logit."""

    def __init__(self, section: MaskBiasSection, device: torch.device | str = "cpu") -> None:
        self.section = section
        self.integral = torch.tensor(section.initial, dtype=torch.float64, device=device)
        self.bias = self.integral
        self.ema = torch.tensor(section.target, dtype=torch.float64, device=device)
        self.num_signals = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, signal: Tensor) -> None:
        """One update per optimizer step.

        Args:
            signal: [2] = (sum of P(MASK), number of positions) over all ranks and micro-batches of the step.
        """
        section = self.section
        total, count = signal.double().unbind()
        has_signal = count > 0
        mean = total / count.clamp(min=1)
        decay = section.ema * (self.num_signals > 0).double()
        ema = decay * self.ema + (1 - decay) * mean
        error = section.target - ema

        output = self.integral + section.k_p * error
        winding_up = (output.abs() >= section.bound) & (output.sign() == error.sign())
        integral = torch.where(winding_up, self.integral, self.integral + section.k_i * error)
        integral = integral.clamp(-section.bound, section.bound)
        bias = (integral + section.k_p * error).clamp(-section.bound, section.bound)

        self.ema = torch.where(has_signal, ema, self.ema)
        self.integral = torch.where(has_signal, integral, self.integral)
        self.bias = torch.where(has_signal, bias, self.bias)
        self.num_signals = self.num_signals + has_signal

    def state_dict(self) -> dict[str, float]:
        """Plain numbers for JSON, whose text form of a float64 is exact."""
        names = ("bias", "integral", "ema", "num_signals")
        return {name: getattr(self, name).item() for name in names}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict`'s numbers, on this controller's device."""
        for name in ("bias", "integral", "ema", "num_signals"):
            setattr(self, name, torch.full_like(getattr(self, name), state[name]))
