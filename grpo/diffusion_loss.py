"""The generator's losses: corrective cross-entropy, MDLM, next token; and the bound that is reported.

A loss is a sum over positions divided by a denominator that the caller gives: what the matching `*_denominator`
returns, summed over all micro-batches and ranks of the optimizer step. Then the gradients of any split add up to the
gradient of the whole. (DistributedDataParallel divides by the number of ranks: multiply the loss by it.)

    corrective   sum over positions of w x -log P(target) / sum of task weights
        unmask   input [MASK], target a word         w = weight_unmask
        re-mask  input a wrong word, target [MASK]   w = weight_remask
        keep     input = target                      w = 1 - p_mask (1 - e), e = penalty (1 - replaced / visible)
    mdlm         sum over masked positions of -log P(clean) / t, over the number of tokens   (arXiv:2406.07524)

1. The denominator counts task weights without the keep discount: it is known before the forward pass, and a uniform
   weight of 4 does not give four times the loss.
2. No arg-max decides what "wants to destroy" means: p_mask is the detached probability of [MASK].
3. The keep weight is a discount, and e = 1 alone is free of bias. Where visible words are wrong with probability r, and
   cannot be told apart, minimising gives P(MASK) = r at e = 1 but r / (1 - r) at e = 0: readier to take words back.
4. With `applies_to="sampling"` the loss, its discount included, does not depend on the bias; only the measured P(MASK)
   does. With "loss" the cross-entropy sees the biased logits.
5. Corrective log-probabilities are over words and [MASK]; MDLM, next-token and NELBO ones over words alone. Pad and the
   vocabulary's padding are in none.
6. Metrics are (sum, count) pairs, see `grpo/metrics.py`. All P(MASK) metrics include the bias: what a sampler sees.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.corruption import Corrupted, mask_only, stratified_rows
from grpo.mask_bias import apply_mask_bias
from grpo.metrics import weighted_sum
from grpo.tokenizer import Vocabulary

_NELBO_STREAM = 0x4E454C42  # keeps its noise apart from that of training


class _Nats(torch.autograd.Function):
    """-log P(target) and log P(last column) over leading columns; its backward writes one table, autograd's four."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        logprobs = logits[..., :num_columns].to(wide).log_softmax(-1)
        ctx.save_for_backward(logprobs, targets)
        ctx.logits = logits.shape, logits.dtype
        last = logprobs[..., -1].clone()
        ctx.mark_non_differentiable(last)
        return -logprobs.gather(-1, targets[..., None]).squeeze(-1), last

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        logprobs, targets = ctx.saved_tensors
        shape, dtype = ctx.logits
        num_columns = logprobs.shape[-1]
        gradient = logprobs.new_empty(shape)
        gradient[..., num_columns:] = 0
        inside = gradient[..., :num_columns]
        torch.exp(logprobs, out=inside).mul_(scale[..., None])
        inside.scatter_add_(-1, targets[..., None], -scale[..., None])
        return gradient.to(dtype), None, None


def _cross_entropy(logits: Tensor, targets: Tensor, counted: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """-log P(target) over the first `num_columns` columns in float32, and 0 where a position is not counted.

    Args:
        logits: [..., V].
        targets: [...] int64, below `num_columns` wherever counted.
        counted: [...] bool.

    Returns:
        [...], and [...] detached log P of the last of these columns.
    """
    losses, last = _Nats.apply(logits, targets.masked_fill(~counted, 0), num_columns)
    return torch.where(counted, losses, 0.0), last


def corrective_denominator(corrupted: Corrupted, *, weight_unmask: float, weight_remask: float) -> Tensor:
    """Sum of task weights over this part of the batch, 0-dimensional float64."""
    counts = [mask.sum().double() for mask in (corrupted.masked, corrupted.replaced, corrupted.kept)]
    return weight_unmask * counts[0] + weight_remask * counts[1] + counts[2]


def corrective_loss(
    logits: Tensor,
    corrupted: Corrupted,
    *,
    vocabulary: Vocabulary,
    denominator: Tensor,
    weight_unmask: float,
    weight_remask: float,
    penalty: float,
    mask_bias: Tensor | float,
    applies_to: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy weighted by task, with a discount where the model would destroy a correct word.

    Args:
        logits: [B, T, V] unbiased.
        denominator: sum of task weights over the whole optimizer step, positive.
        penalty: `penalty_mask_correct` at this step.
        mask_bias: the controller's bias, nats.
        applies_to: "sampling" or "loss".

    Returns:
        (loss, metrics): pairs `loss_unmask`, `loss_remask`, `loss_keep` (unweighted nats), `p_mask_unmask` (the
        controller's signal), `p_mask_remask`, `p_mask_keep`, and `keep_weight`.
    """
    if applies_to == "loss":
        logits = apply_mask_bias(logits, mask_bias, vocabulary)
    losses, log_p_mask = _cross_entropy(logits, corrupted.targets, corrupted.loss_mask, vocabulary.base_size + 1)
    p_mask = log_p_mask.exp()
    log_odds = -torch.expm1(-log_p_mask).log()
    p_mask_sampled = p_mask if applies_to == "loss" else (log_odds + mask_bias).sigmoid()

    num_visible = (corrupted.loss_mask & ~corrupted.masked).sum(1, keepdim=True)
    row_rate = corrupted.replaced.sum(1, keepdim=True) / num_visible.clamp(min=1)
    keep_weight = 1 - p_mask * (1 - penalty * (1 - row_rate))
    weights = torch.where(corrupted.masked, weight_unmask, torch.where(corrupted.replaced, weight_remask, keep_weight))

    loss = (weights.to(losses.dtype) * losses).sum() / denominator
    tasks = {"unmask": corrupted.masked, "remask": corrupted.replaced, "keep": corrupted.kept}
    metrics = {f"loss_{task}": weighted_sum(losses, mask) for task, mask in tasks.items()}
    metrics |= {f"p_mask_{task}": weighted_sum(p_mask_sampled, mask) for task, mask in tasks.items()}
    metrics["keep_weight"] = weighted_sum(keep_weight, corrupted.kept)
    return loss, metrics


def mdlm_denominator(corrupted: Corrupted) -> Tensor:
    """Real tokens in this part of the batch, masked or not, 0-dimensional float64."""
    return corrupted.loss_mask.sum().double()


def mdlm_loss(
    logits: Tensor, corrupted: Corrupted, *, vocabulary: Vocabulary, denominator: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The masked-diffusion NELBO of a batch made by `mask_only`, in nats per token.

    Args:
        logits: [B, T, V].
        denominator: real tokens of the whole optimizer step.

    Returns:
        (loss, metrics): pairs `loss_unmask` (unweighted nats per masked token) and `nelbo` (nats per token).
    """
    losses, _ = _cross_entropy(logits, corrupted.clean, corrupted.masked, vocabulary.base_size)
    weighted = losses / corrupted.rate[:, None].to(losses.dtype)
    metrics = {
        "loss_unmask": weighted_sum(losses, corrupted.masked),
        "nelbo": weighted_sum(weighted, corrupted.loss_mask),
    }
    return weighted.sum() / denominator, metrics


def next_token_counted(attention_mask: Tensor) -> Tensor:
    """Positions that predict a real successor: [B, T] -> [B, T-1] bool; its sum is the loss's denominator."""
    return attention_mask[:, 1:] & attention_mask[:, :-1]


def next_token_loss(
    logits: Tensor, clean: Tensor, *, attention_mask: Tensor, vocabulary: Vocabulary, denominator: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of each token given those before it, for causal models.

    Args:
        logits: [B, T, V].
        clean: [B, T] int64.
        attention_mask: [B, T] bool.
        denominator: counted positions of the whole optimizer step, see `next_token_counted`.

    Returns:
        (loss, metrics): the pair `loss_next`.
    """
    counted = next_token_counted(attention_mask)
    losses, _ = _cross_entropy(logits[:, :-1], clean[:, 1:], counted, vocabulary.base_size)
    return losses.sum() / denominator, {"loss_next": weighted_sum(losses, counted)}


@torch.no_grad()
def nelbo(
    predict: Callable[..., Tensor],
    clean: Tensor,
    *,
    attention_mask: Tensor,
    vocabulary: Vocabulary,
    seed: int,
    num_draws: int,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Negative evidence lower bound of fixed rows under a masked-diffusion model, in nats per token.

    Times are stratified over all rows within each draw. The result depends on the seed, not on `batch_size`.

    Args:
        predict: called as predict(tokens, attention_mask=..., positions=masked) -> [M, V], like `GPT.forward`.
        clean: [N, T] int64.
        attention_mask: [N, T] bool.
        seed: seed of times and masks; keep it fixed over a run.
        num_draws: independent corruptions of every row.
        batch_size: rows per call of `predict`.

    Returns:
        (mean, standard error), 0-dimensional float64. See `ratio_with_error` for the error.
    """
    num_rows = len(clean)
    row_nats = torch.zeros(num_rows, dtype=torch.float64, device=clean.device)
    for draw in range(num_draws):
        for rows in torch.arange(num_rows, device=clean.device).split(batch_size):
            seeds, times = stratified_rows(seed, _NELBO_STREAM, draw, rows, num_rows)
            corrupted = mask_only(
                clean[rows], vocabulary=vocabulary, attention_mask=attention_mask[rows], seeds=seeds, times=times
            )
            masked = corrupted.masked
            logits = predict(corrupted.inputs, attention_mask=attention_mask[rows], positions=masked)
            targets = corrupted.clean[masked]
            counted = torch.ones_like(targets, dtype=torch.bool)
            losses, _ = _cross_entropy(logits, targets, counted, vocabulary.base_size)
            local_row = masked.nonzero()[:, 0]
            row_nats.index_add_(0, rows[local_row], losses.double() / corrupted.rate[local_row] / num_draws)
    return ratio_with_error(row_nats, attention_mask.sum(1).double())


def ratio_with_error(totals: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """sum(totals) / sum(counts) and its standard error over rows (linearised ratio estimator).

    The error covers the choice of rows and the draws together, as if rows were independent. Stratified times make the
    draws' true error smaller; that rows of one document are alike makes the rows' larger.

    Args:
        totals: [N] float64, nats of each row.
        counts: [N] float64, tokens of each row.
    """
    ratio = totals.sum() / counts.sum()
    residual = totals - ratio * counts
    variance = (residual**2).sum() * len(totals) / max(len(totals) - 1, 1)
    return ratio, variance.sqrt() / counts.sum()
