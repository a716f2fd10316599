"""A generator with all that it needs to write text, as one module: what a model store hands out.

1. It reads a checkpoint once; afterwards it depends on no file (but for a stand-alone remasking model's weights, which
   it takes in).
2. A text's noise belongs to its number, so more texts change none of the earlier ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from grpo.checkpoint import load_checkpoint, load_model, load_tokenizer
from grpo.completion import complete, load_remasking_model
from grpo.config_file import from_dict
from grpo.data import Batch
from grpo.mask_bias import saved_bias


class TextGenerator(nn.Module):
    """Continues text with a checkpoint's own denoising settings."""

    def __init__(self, checkpoint: str | Path) -> None:
        super().__init__()
        found = load_checkpoint(checkpoint)
        config = from_dict(found.config)
        self.model, self.tokenizer = load_model(checkpoint).eval(), load_tokenizer(checkpoint)
        self.settings, self.block_size = config.denoise, config.data.block_size
        self.min_neighbors_ratio = config.sampler.min_neighbors_ratio
        self.mask_bias = saved_bias(found.state, config.mask_bias)
        self.remasking_model = load_remasking_model(config.denoise, tokenizer=self.tokenizer)

    def forward(self, prompt: str, *, num: int = 1, length: int = 0, seed: int = 0) -> list[str]:
        """Texts that begin with the prompt.

        Args:
            num: how many. length: tokens of each, prompt included; 0: the training block.

        Raises:
            ValueError: the prompt leaves nothing to write, or gives a causal model nothing to continue.
        """
        tokens, length = self.tokenizer.encode(prompt), length or self.block_size
        fewest = 1 if self.model.trunk.causal else 0
        if not fewest <= len(tokens) < length:
            raise ValueError(f"the prompt must have {fewest} to {length - 1} tokens, got {len(tokens)}")
        rows = torch.zeros(num, length, dtype=torch.int64)
        rows[:, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        texts = complete(
            self.model,
            Batch(rows, torch.ones(num, length, dtype=torch.bool)),
            self.settings,
            prompt_tokens=len(tokens),
            seed=seed,
            mask_bias=self.mask_bias,
            min_neighbors_ratio=self.min_neighbors_ratio,
            remasking_model=self.remasking_model,
        )
        return [self.tokenizer.decode(row) for row in texts.tolist()]
