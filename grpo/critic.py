"""The critic head's task: which tokens of a filled text are wrong?

The critic reads the corrupted input with its [MASK]s filled by samples from the generator, and learns
P(filled token != clean token).

1. The truth is the clean token, not the training target, which is [MASK] at a replaced position.
2. Fills are sampled, never arg-max, over words only, from detached logits: the critic must know the generator's real
   errors. They are drawn as the denoiser draws its proposals (`wavefront.sample_tokens`).
3. Pads and positions out of scope are neither right nor wrong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.corruption import Corrupted
from grpo.metrics import weighted_sum
from grpo.model import GPT, text_logits
from grpo.noise import FILL, uniforms
from grpo.tokenizer import Vocabulary
from grpo.wavefront import propose, sample_tokens, state_slices


@torch.no_grad()
def fill_masks(inputs: Tensor, logits: Tensor, *, vocabulary: Vocabulary, seeds: Tensor) -> Tensor:
    """Replace every [MASK] by a word sampled from the logits, in bounded memory; all other tokens stay.

    Args:
        inputs: [B, T] int64.
        logits: [B, T, V].
        seeds: [B] int64, one per row.

    Returns:
        [B, T] int64 without [MASK]s.
    """
    masked = inputs == vocabulary.mask_id
    row, column = masked.nonzero(as_tuple=True)
    words, noise = text_logits(logits, vocabulary), uniforms(seeds[row], FILL, column)
    drawn = [
        sample_tokens(words[row[part], column[part]], noise[part]).tokens for part in state_slices(vocabulary, row)
    ]
    return inputs.masked_scatter(masked, torch.cat(drawn))


@torch.no_grad()
def fill(model: GPT, inputs: Tensor, attention_mask: Tensor | None, seeds: Tensor) -> Tensor:
    """The same by the generator itself, whose logits exist for a slice of the [MASK]s at a time. One trunk forward.

    Args:
        inputs: [B, T] int64; attention_mask: [B, T] bool, None without pads; seeds: [B] int64.

    Returns:
        [B, T] int64 without [MASK]s.
    """
    masked = inputs == model.vocabulary.mask_id
    row, column = masked.nonzero(as_tuple=True)
    hidden = model.encode(inputs, attention_mask, at=row * inputs.shape[1] + column)
    noise = uniforms(seeds[row], FILL, column)
    return inputs.masked_scatter(masked, propose(model, hidden, noise, temperature=1, top_p=1, record=False).tokens)


def critic_targets(filled: Tensor, clean: Tensor) -> Tensor:
    """True where the filled text is wrong: [B, T] bool from two [B, T] int64."""
    return filled != clean


def critic_counted(corrupted: Corrupted, scope: str) -> Tensor:
    """[B, T] bool, positions that the critic is trained on; their number is the loss's denominator.

    Args:
        scope: "masked_only": filled positions; "all": every real token, replaced and kept ones included.
    """
    return corrupted.masked if scope == "masked_only" else corrupted.loss_mask


def critic_loss(
    scores: Tensor, filled: Tensor, corrupted: Corrupted, *, scope: str, denominator: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Binary cross-entropy of the error logits.

    Args:
        scores: [B, T] error logits for the filled text.
        filled: [B, T] int64, what the critic read.
        scope: see `critic_counted`.
        denominator: counted positions over the whole optimizer step.

    Returns:
        (loss, metrics): pairs `loss_critic`, `critic_error_rate` (true errors), `critic_p_error` (predicted).
    """
    counted = critic_counted(corrupted, scope)
    wrong = critic_targets(filled, corrupted.clean)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    losses = F.binary_cross_entropy_with_logits(scores, wrong.to(scores.dtype), reduction="none")
    losses = torch.where(counted, losses, 0.0)
    metrics = {
        "loss_critic": weighted_sum(losses, counted),
        "critic_error_rate": weighted_sum(wrong, counted),
        "critic_p_error": weighted_sum(scores.sigmoid(), counted),
    }
    return losses.sum() / denominator, metrics
