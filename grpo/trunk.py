"""The trunk of a GPT whose attention looks both ways or back only.

1. Pre-norm blocks as in GPT-2 (Radford et al. 2019), with rotary positions (arXiv:2104.09864) unless `position:
   learned`, and its initialisation: N(0, 0.02), residual projections scaled by 1/sqrt(2 n_layer). The exact GELU takes
   the place of the tanh form, which costs 2.5 times as much on a CPU; `gelu="tanh"` is for weights trained with it.
2. Rotary pairs are neighbours in memory, so that a rotation is one complex product. The table is computed when first
   needed, per device: a buffer would be lost when the model is built on the meta device.
3. Pads are never attended to. A row of pads only attends to itself, for otherwise softmax would give NaN.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grpo.config import ModelSection
from grpo.kv_cache import KVCache
from grpo.products import Linear
from grpo.slices import slices
from grpo.tokenizer import Vocabulary

READ_AT_ONCE = 1 << 18
"""Entries of the states of those rows that a CPU reads together without gradients: what is made of them, 12 times that
in all, stays close to the cache."""


@functools.lru_cache(maxsize=64)
def _rotations(length: int, half: int, device: torch.device) -> Tensor:
    """exp(i position frequency), [T, 1, 1, D/2] complex64, in the layout of `qkv[:, :, :2]`."""
    with torch.inference_mode(False):  # a table first made in inference mode could not be used in training
        positions = torch.arange(length, device=device, dtype=torch.float64)
        frequencies = 10000.0 ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
        angles = torch.outer(positions, frequencies)
        return torch.complex(angles.cos(), angles.sin()).to(torch.complex64)[:, None, None]


def _rotate(query_key: Tensor, rotations: Tensor) -> Tensor:
    """Turn [B, T, 2, H, D] by the complex [T, 1, 1, D/2]."""
    wide = query_key if query_key.dtype in (torch.float32, torch.float64) else query_key.float()
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * rotations
    return torch.view_as_real(turned).flatten(-2).to(query_key.dtype)


class Attention(nn.Module):
    def __init__(self, model: ModelSection) -> None:
        super().__init__()
        self.num_heads, self.dropout = model.n_head, model.dropout
        self.qkv = Linear(model.n_embd, 3 * model.n_embd, bias=model.bias)
        self.out = Linear(model.n_embd, model.n_embd, bias=model.bias)

    def forward(
        self,
        x: Tensor,
        rotations: Tensor | None,
        allowed: Tensor | None,
        causal: bool,
        cache: KVCache | None,
        block: int,
        at: Tensor | None,
    ) -> Tensor:
        """x [B, T, C], allowed: bool that broadcasts to [B, H, T, keys], True = may attend -> [B, T, C], or [M, C] at
        the flat places [M]."""
        query_key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).split((2, 1), dim=2)
        if rotations is not None:
            query_key = _rotate(query_key, rotations)
        if cache is not None and x.shape[1] == 1 and x.is_cpu:
            query, key = query_key[:, 0].unbind(1)
            return self.out(cache.attend_one(block, query, key, value[:, 0, 0]).flatten(1)[:, None])
        query, key = query_key.permute(2, 0, 3, 1, 4)
        value = value.squeeze(2).transpose(1, 2)
        if cache is not None:
            key, value = cache.extend(block, key, value)
        y = F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, is_causal=causal, dropout_p=self.dropout if self.training else 0.0
        )
        y = y.transpose(1, 2).flatten(2)
        return self.out(y if at is None else y.flatten(0, 1)[at])


class Mlp(nn.Module):
    def __init__(self, model: ModelSection, gelu: str) -> None:
        super().__init__()
        self.gelu = gelu
        self.up = Linear(model.n_embd, 4 * model.n_embd, bias=model.bias)
        self.down = Linear(4 * model.n_embd, model.n_embd, bias=model.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        in_place = None if torch.is_grad_enabled() else x  # large tables are dearer to allocate than to fill
        return self.down(F.gelu(x, approximate=self.gelu, out=in_place))


class Block(nn.Module):
    def __init__(self, model: ModelSection, gelu: str) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(model.n_embd, bias=model.bias)
        self.attention = Attention(model)
        self.mlp_norm = nn.LayerNorm(model.n_embd, bias=model.bias)
        self.mlp = Mlp(model, gelu)
        self.dropout = nn.Dropout(model.dropout) if model.dropout else nn.Identity()

    def forward(self, x: Tensor, *attention_arguments, at: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C], or [M, C] at the flat places [M]."""
        attended = self.attention(self.attention_norm(x), *attention_arguments, at)
        x = (x if at is None else x.flatten(0, 1)[at]) + self.dropout(attended)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Trunk(nn.Module):
    """Tokens to hidden states; everything below the heads."""

    def __init__(self, model: ModelSection, vocabulary: Vocabulary, *, block_size: int, gelu: str = "none") -> None:
        super().__init__()
        self.causal, self.block_size, self.frozen = model.attention == "causal", block_size, False
        self.half_head = model.n_embd // model.n_head // 2
        self.wte = nn.Embedding(vocabulary.size, model.n_embd)
        self.wpe = nn.Embedding(block_size, model.n_embd) if model.position == "learned" else None
        self.dropout = nn.Dropout(model.dropout) if model.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(model, gelu) for _ in range(model.n_layer))
        self.norm = nn.LayerNorm(model.n_embd, bias=model.bias)
        self._initialise()

    def _initialise(self) -> None:
        residual_std = 0.02 / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=residual_std if is_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def train(self, mode: bool = True) -> Trunk:
        return super().train(mode and not self.frozen)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        layers: tuple[int, ...] = (-1,),
        cache: KVCache | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Read tokens.

        Args:
            tokens: [B, T] int64.
            attention_mask: [B, T] bool, True = real token; None: all are.
            layers: whose states to return, concatenated in this order: -1 the final norm's output, k the output of
                block k (from 1).
            cache: what earlier calls have read (causal only); these tokens follow it and are added to it.
            at: [M] int64, ascending places b x T + t whose final states alone are wanted (`layers` is (-1,)): what
                comes after the last block's attention is then computed there only.

        Returns:
            [B, T, C x len(layers)], or [M, C].
        """
        if cache is None and tokens.is_cpu and not torch.is_grad_enabled():
            parts = list(slices(len(tokens), tokens.shape[1] * self.wte.embedding_dim, READ_AT_ONCE))
            if len(parts) > 1:
                return self._read_in_parts(parts, tokens, attention_mask, layers, at)
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        x = self.wte(tokens)
        rotations = None
        if self.wpe is None:
            table_length = max(64, 1 << (end - 1).bit_length())  # a few tables serve all lengths
            rotations = _rotations(table_length, self.half_head, tokens.device)[start:end]
        else:
            if end > self.block_size:
                raise ValueError(f"learned positions end at data.block_size = {self.block_size}, got {end} tokens")
            x = x + self.wpe.weight[start:end]
        x = self.dropout(x)
        allowed, causal = self._allowed(tokens, attention_mask, start)
        states = {}
        for index, block in enumerate(self.blocks, start=1):
            x = block(x, rotations, allowed, causal, cache, index - 1, at=at if index == len(self.blocks) else None)
            if index in layers:
                states[index] = x
        if cache is not None:
            cache.length = end
        states[-1] = self.norm(x)
        return states[-1] if layers == (-1,) else torch.cat([states[layer] for layer in layers], dim=-1)

    def _read_in_parts(
        self,
        parts: list[slice],
        tokens: Tensor,
        attention_mask: Tensor | None,
        layers: tuple[int, ...],
        at: Tensor | None,
    ) -> Tensor:
        """`forward`, some rows at a time."""
        places = [None] * len(parts)
        if at is not None:
            starts = torch.tensor([rows.start * tokens.shape[1] for rows in parts])
            ends = torch.searchsorted(at, starts).tolist()[1:]
            places = [own - start for own, start in zip(at.tensor_split(ends), starts, strict=True)]
        masks = [None if attention_mask is None else attention_mask[rows] for rows in parts]
        return torch.cat([
            self(tokens[rows], mask, layers, at=own) for rows, mask, own in zip(parts, masks, places, strict=True)
        ])

    def _allowed(self, tokens: Tensor, attention_mask: Tensor | None, start: int) -> tuple[Tensor | None, bool]:
        """The boolean attention mask, if one is needed, and whether SDPA's own causal path serves instead."""
        length = tokens.shape[1]
        if not self.causal:
            assert start == 0, "only a causal trunk reads on from a KV cache"
            if attention_mask is None:
                return None, False
            return (attention_mask | ~attention_mask.any(dim=1, keepdim=True))[:, None, None], False
        if attention_mask is None and (start == 0 or length == 1):
            return None, length > 1
        earlier = torch.ones(length, start + length, dtype=torch.bool, device=tokens.device).tril(start)
        if attention_mask is None:
            return earlier, False
        assert start == 0, "a KV cache takes rows without pads"
        itself = torch.eye(length, dtype=torch.bool, device=tokens.device)
        return ((earlier & attention_mask[:, None]) | itself)[:, None], False
