"""Corrupt clean text for training: masks, wrong words, and the curriculum that mixes them.

A row's total rate u = t x (1 - guaranteed_correct); a part of it, U(0,1) x u x remask_ratio, becomes replacements
(target [MASK]), the rest becomes masks (target: the clean token); untouched tokens are their own target.

1. Times are stratified over the whole batch, not over a rank's share: row i of N gets t = (p(i) + U_i) / N with p a
   random permutation that every rank computes alike from (run seed, stream, step). Each t is uniform by itself, any
   split of the batch gives the same text, and the N times still cover (0, 1) evenly (low-discrepancy sampler of
   arXiv:2107.00630, with a permutation in place of an order, so that no share of rows gets only small times).
2. Corruption is independent per position, so `guaranteed_correct` bounds the rate, not the count of a short row.
3. A replacement is clean + offset modulo the base vocabulary with an offset in 1 .. base-1: never the clean token,
   never a special id. A prediction of the model's own that happens to be right, or is a special id, is no error: such
   a position takes a uniform replacement, so the replacement rate does not depend on the model.
4. `mask_only` masks exactly k = ceil(t x n) of a row's n tokens and reports the rate k / n. The bound's expectation is
   that of independent masks at rate t (the any-order form, arXiv:2406.03736, arXiv:2502.09992), but its 1/t weight
   never exceeds n, where independent masks have infinite variance as t -> 0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from grpo.noise import JITTER, KIND, OFFSET, ORDER, SHARE, SOURCE, STRATUM, row_seeds, uniforms
from grpo.tokenizer import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Corrupted:
    """A corrupted batch; all fields live on the clean tokens' device."""

    inputs: Tensor
    """[B, T] int64: what the model reads."""
    targets: Tensor
    """[B, T] int64: what it should say: the clean token, or [MASK] where the input is a wrong word."""
    clean: Tensor
    """[B, T] int64: the text itself, the truth for the critic."""
    loss_mask: Tensor
    """[B, T] bool: True at real tokens, False at pads."""
    masked: Tensor
    """[B, T] bool: the input is [MASK] (task: unmask)."""
    replaced: Tensor
    """[B, T] bool: the input is a wrong word (task: re-mask)."""
    rate: Tensor
    """[B] float64: `corrupt`: the total rate u; `mask_only`: the masked share k / n (1 for a row of pads)."""

    @property
    def kept(self) -> Tensor:
        """[B, T] bool: the input is the clean token (task: keep)."""
        return self.loss_mask & ~self.masked & ~self.replaced

    def rows(self, rows: slice) -> Corrupted:
        """The same of some rows."""
        return Corrupted(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def ramp(step: int, start: int, end: int, final: float) -> float:
    """0 up to `start`, `final` from `end` on, linear between; a jump at `end` when both are equal."""
    if step >= end:
        return final
    return final * (step - start) / (end - start) if step > start else 0.0


def stratified_rows(run_seed: int, stream: int, step: int, rows: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Seeds and stratified times of some rows of a batch.

    Args:
        run_seed: the run's seed.
        stream: what the noise is for.
        step: optimizer step (or number of the draw, in an evaluation).
        rows: [B] int64, global indices of the rows at hand, each below `batch_size`.
        batch_size: N, rows of the whole batch over all ranks and micro-batches.

    Returns:
        ([B] int64 seeds, [B] float64 times in (0, 1)); both depend on nothing but the arguments above and each row.
    """
    seeds = row_seeds(run_seed, stream, step, torch.arange(batch_size, device=rows.device))
    strata = uniforms(seeds, STRATUM).argsort().argsort()
    times = (strata + uniforms(seeds, JITTER)) / batch_size
    return seeds[rows], times[rows]


def corrupt(
    clean: Tensor,
    *,
    vocabulary: Vocabulary,
    attention_mask: Tensor,
    seeds: Tensor,
    times: Tensor,
    remask_ratio: float,
    guaranteed_correct: float,
    own_predictions: Tensor | None = None,
    own_share: float = 0.0,
) -> Corrupted:
    """Mask some tokens and replace others by wrong ones.

    Args:
        clean: [B, T] int64.
        attention_mask: [B, T] bool, True at real tokens.
        seeds: [B] int64, one per row, from `stratified_rows`.
        times: [B] float64 in (0, 1), from `stratified_rows`.
        remask_ratio: upper bound, at this step, of the share of the corruption that is replacements.
        guaranteed_correct: the total rate stays below 1 minus this.
        own_predictions: [B, T] int64, tokens drawn from the model itself; None: uniform replacements only.
        own_share: probability with which a replacement takes the model's own token.
    """
    positions = torch.arange(clean.shape[1], device=clean.device)
    seeds_B1 = seeds[:, None]
    rate = times * (1 - guaranteed_correct)
    replace_rate = rate * remask_ratio * uniforms(seeds, SHARE)

    kind = uniforms(seeds_B1, KIND, positions)
    replaced = attention_mask & (kind < replace_rate[:, None])
    masked = attention_mask & ~replaced & (kind < rate[:, None])

    base_size = vocabulary.base_size
    offset = 1 + (uniforms(seeds_B1, OFFSET, positions) * (base_size - 1)).long()
    wrong = (clean + offset) % base_size
    if own_predictions is not None:
        is_error = (own_predictions != clean) & (own_predictions < base_size)
        takes_own = is_error & (uniforms(seeds_B1, SOURCE, positions) < own_share)
        wrong = torch.where(takes_own, own_predictions, wrong)

    return Corrupted(
        inputs=torch.where(replaced, wrong, clean).masked_fill(masked, vocabulary.mask_id),
        targets=clean.masked_fill(replaced, vocabulary.mask_id),
        clean=clean,
        loss_mask=attention_mask,
        masked=masked,
        replaced=replaced,
        rate=rate,
    )


def mask_only(
    clean: Tensor, *, vocabulary: Vocabulary, attention_mask: Tensor, seeds: Tensor, times: Tensor
) -> Corrupted:
    """Mask ceil(t x n) of each row's n real tokens, drawn uniformly; replace nothing.

    Args:
        clean: [B, T] int64.
        attention_mask: [B, T] bool, True at real tokens.
        seeds: [B] int64, one per row, from `stratified_rows`.
        times: [B] float64 in (0, 1), from `stratified_rows`.
    """
    positions = torch.arange(clean.shape[1], device=clean.device)
    num_tokens = attention_mask.sum(1)
    num_masked = (times * num_tokens).ceil()
    order = uniforms(seeds[:, None], ORDER, positions).masked_fill(~attention_mask, 2.0)  # pads come last
    masked = attention_mask & (order.argsort(1).argsort(1) < num_masked[:, None])
    return Corrupted(
        inputs=clean.masked_fill(masked, vocabulary.mask_id),
        targets=clean,
        clean=clean,
        loss_mask=attention_mask,
        masked=masked,
        replaced=torch.zeros_like(masked),
        rate=torch.where(num_tokens > 0, num_masked / num_tokens.clamp(min=1), 1.0),
    )
