"""Keys and values of the tokens that a causal trunk has read, and the attention of one more token to them.

1. Texts that continue one prompt share its keys and values: on a CPU, where attention of one query is bound by reading
   them, they are kept once per prompt, and the queries of its texts meet them in one product. (On a GPU they are
   copied, for one fused kernel takes the place of a dozen.)
2. One query per row takes plain batched products: torch's fused attention is made for many.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Per block [B, H, capacity, D], behind what its rows have in common, [N, H, P, D], B = N x copies."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.blocks: list[tuple[Tensor, Tensor]] = []
        self.common: list[tuple[Tensor, Tensor]] = []
        self.num_common = 0

    def extend(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H, T, D] keys and values behind those known; return views of all [B, H, length + T, D] that are not
        common."""
        start = self.length - self.num_common
        if block == len(self.blocks):
            shape = (*keys.shape[:2], self.capacity - self.num_common, keys.shape[3])
            self.blocks.append((keys.new_empty(shape), values.new_empty(shape)))
        end = start + keys.shape[2]
        if self.num_common + end > self.capacity:
            raise ValueError(f"the KV cache holds {self.capacity} tokens, got {self.num_common + end}")
        for store, new in zip(self.blocks[block], (keys, values), strict=True):
            store[:, :, start:end] = new
        stored_keys, stored_values = self.blocks[block]
        return stored_keys[:, :, :end], stored_values[:, :, :end]

    def repeat(self, copies: int) -> None:
        """Continue every row this many times: row b becomes rows b x copies to (b + 1) x copies - 1."""
        if copies == 1:
            return
        if self.blocks[0][0].is_cpu:
            self.num_common = self.length
            self.common = [tuple(store[:, :, : self.length].flatten(0, 1) for store in block) for block in self.blocks]
            self.blocks = []
        else:
            self.blocks = [tuple(store.repeat_interleave(copies, 0) for store in block) for block in self.blocks]

    def attend_one(self, block: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Add one token per row, and attend to it and to all before.

        Args:
            query, key, value: [B, H, D].

        Returns:
            [B, H, D].
        """
        rows, heads, size = query.shape
        keys, values = (each.flatten(0, 1) for each in self.extend(block, key[:, :, None], value[:, :, None]))
        query = query * size**-0.5
        scores = torch.bmm(query.reshape(rows * heads, 1, size), keys.transpose(1, 2))
        if not self.common:
            return torch.bmm(scores.softmax(-1), values).view(rows, heads, size)
        common_keys, common_values = self.common[block]
        prompts = len(common_keys) // heads

        def by_prompt(x: Tensor) -> Tensor:  # [B, H, *] -> [N x H, copies, *]
            return x.view(prompts, -1, heads, x.shape[-1]).transpose(1, 2).flatten(0, 1)

        def by_row(x: Tensor) -> Tensor:  # and back, to [B x H, 1, *]
            return x.view(prompts, heads, -1, x.shape[-1]).transpose(1, 2).reshape(rows * heads, 1, -1)

        of_common = torch.bmm(by_prompt(query), common_keys.transpose(1, 2))
        weights = torch.cat((by_row(of_common), scores), -1).softmax(-1)
        to_common = weights[..., : self.num_common].reshape(rows, heads, -1)
        of_prompt = by_row(torch.bmm(by_prompt(to_common), common_values))
        return torch.baddbmm(of_prompt, weights[..., self.num_common :], values).view(rows, heads, size)
