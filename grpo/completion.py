"""Continue prompts of natural text, whichever kind of generator, with what its settings ask for.

1. A row's noise belongs to its index, so the number of rows at once changes no text.
2. A row keeps its natural length; pads stay pads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from grpo.autoregress import generate
from grpo.checkpoint import check_tokenizer, load_model
from grpo.config import DenoiseSection
from grpo.data import Batch, completion_mask
from grpo.denoise import StepRecord, denoise
from grpo.model import GPT
from grpo.noise import row_seeds
from grpo.run_checkpoints import find_checkpoint
from grpo.tokenizer import Tokenizer

EVALUATION_STREAM = 31
"""Noise stream of evaluations (see `grpo.noise.row_seeds`)."""


def remasking_checkpoint(settings: DenoiseSection) -> Path | None:
    """Folder of the stand-alone classifier of `denoise.remasking_model`; None where the policy asks for none."""
    if not settings.remasking_model or settings.remasking not in ("auto", "model"):
        return None
    return find_checkpoint(settings.remasking_model, "denoise.remasking_model")


def load_remasking_model(
    settings: DenoiseSection, *, tokenizer: Tokenizer | None = None, device: str | torch.device = "cpu"
) -> GPT | None:
    """The stand-alone classifier of `denoise.remasking_model`, in eval mode; None where the policy asks for none.

    Args:
        tokenizer: the generator's, which it must share; None where that is known.

    Raises:
        ValueError: there is no checkpoint, or it is of something else, or reads other tokens.
    """
    folder = remasking_checkpoint(settings)
    if folder is None:
        return None
    if tokenizer is not None:
        check_tokenizer(folder, tokenizer, "denoise.remasking_model")
    model = load_model(folder, device=device).eval()
    if model.mode != "token_classifier":
        raise ValueError(
            f"denoise.remasking_model {settings.remasking_model} is a {model.mode}: give that of a token_classifier"
        )
    return model


@torch.no_grad()
def complete(
    model: GPT,
    prompts: Batch,
    settings: DenoiseSection,
    *,
    prompt_tokens: int,
    seed: int,
    mask_bias: float = 0.0,
    min_neighbors_ratio: float = 0.01,
    remasking_model: GPT | None = None,
    batch_size: int = 256,
    on_step: Callable[[StepRecord], object] | None = None,
) -> Tensor:
    """Continue natural rows [B, T] from their first `prompt_tokens` tokens; returns [B, T] on the CPU.

    Args:
        on_step: called with each denoising step of each batch.
    """
    device = next(model.parameters()).device
    seeds = row_seeds(seed, EVALUATION_STREAM, 0, torch.arange(len(prompts.tokens)))
    out = []
    for part in torch.arange(len(prompts.tokens)).split(batch_size):
        rows = prompts[part].to(device)
        tokens, visible = rows.tokens, rows.attention_mask
        completion = completion_mask(visible, prompt_tokens)
        mask = None if bool(visible.all()) else visible
        if model.trunk.causal:
            new = generate(
                model,
                tokens[:, :prompt_tokens],
                num_new=tokens.shape[1] - prompt_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seeds=seeds[part].to(device),
            )
            out.append(torch.where(completion, new, tokens).cpu())
            continue
        out.append(
            denoise(
                model,
                tokens.masked_fill(completion, model.vocabulary.mask_id),
                seeds=seeds[part].to(device),
                steps=settings.steps,
                schedule=settings.schedule,
                temperature=settings.temperature,
                top_p=settings.top_p,
                remasking=settings.remasking,
                randomness=settings.randomness,
                protected=~completion,
                attention_mask=mask,
                sampler=settings.sampler,
                min_neighbors_ratio=min_neighbors_ratio,
                mask_bias=mask_bias,
                remasking_model=remasking_model,
                on_step=on_step,
            ).cpu()
        )
    return torch.cat(out)
