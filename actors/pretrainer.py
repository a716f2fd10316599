"""The pretrainer in a process: a whole model, its optimiser and controllers, one optimizer step at a time.

1. Distribution is applied from outside: `wrap` makes a module data-parallel, `all_reduce(tensor, op)` reduces over
   ranks. Losses carry global denominators and are multiplied by the number of ranks, because DDP averages.
2. Parts (trunk with lm head, critic, sampler) are clipped each by itself.
3. Validation reports a true bound on fixed rows, whatever the objective: the NELBO of a masked model, the exact
   likelihood of a causal one; for the critic, AUROC and calibration on the model's own sampled errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from actors.phase import Phase, accumulating
from grpo.config import Config
from grpo.corruption import mask_only, stratified_rows
from grpo.critic import fill_masks
from grpo.data import Batch
from grpo.diffusion_loss import nelbo, next_token_counted, ratio_with_error
from grpo.mask_bias import MaskBias
from grpo.metrics import auroc, bits_per_byte, expected_calibration_error, means, merge_sums, pack_sums, unpack_sums
from grpo.model import GPT, text_logits
from grpo.multitask import corrupt_batch, counts, multitask_loss, stage
from grpo.optim import (
    clip_parts,
    cosine_learning_rate,
    flat_state,
    load_flat_state,
    make_optimizer,
    set_learning_rate,
    trainable_parts,
)

TRAIN_STREAM = 1
CRITIC_STREAM = 2
VALIDATION_SEED = 20_000_003
NELBO_DRAWS = 4
VALIDATION_BATCH = 128


class Pretrainer:
    """Trains a language model on natural text. A plain class, driven by a Ray Train worker or by a script."""

    def __init__(self, model: GPT, config: Config, *, rank: int = 0, world: int = 1,
                 wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
                 all_reduce: Callable[..., Tensor] = lambda tensor, op="sum": tensor, device: str = "cpu") -> None:
        self.model, self.config, self.device = model.to(device), config, device
        self.rank, self.world, self.all_reduce = rank, world, all_reduce
        heads = {name: head for name, head in model.heads.items() if name != "lm"}
        self.parts = trainable_parts({"generator": [*model.trunk.parameters(), *model.heads["lm"].parameters()], **heads})
        self.module = wrap(Phase({"model": model}))
        self.optimizer = make_optimizer(self.parts, learning_rate=config.pretrain.learning_rate,
                                        weight_decay=config.pretrain.weight_decay)
        self.mask_bias = MaskBias(config.mask_bias, device)

    def rows(self) -> range:
        """This rank's rows of each batch."""
        share = self.config.pretrain.batch_size // self.world
        return range(self.rank * share, (self.rank + 1) * share)

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step on this rank's rows; returns metrics as pairs of this rank (see `grpo/metrics.py`)."""
        settings, now = self.config.pretrain, stage(self.config, step)
        self.model.train()
        batch = batch.to(self.device)
        rows = torch.tensor(self.rows(), device=self.device)
        seeds, times = stratified_rows(self.config.run.seed, TRAIN_STREAM, step, rows, settings.batch_size)
        parts = []
        for part in torch.arange(len(rows), device=self.device).chunk(settings.micro_batches):
            corrupted = corrupt_batch(self.model, self.config, now, batch.tokens[part], batch.attention_mask[part],
                                      seeds=seeds[part], times=times[part])
            parts.append((corrupted, seeds[part]))
        totals = self.all_reduce(sum(counts(self.config, now, corrupted) for corrupted, _ in parts))
        sums: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for index, (corrupted, part_seeds) in enumerate(parts):

            def losses(corrupted: Any = corrupted, part_seeds: Tensor = part_seeds) -> Tensor:
                nonlocal sums
                with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
                    loss, metrics = multitask_loss(self.model, self.config, now, corrupted, seeds=part_seeds,
                                                   totals=totals, mask_bias=self.mask_bias.bias)
                sums = merge_sums(sums, metrics)
                return loss * self.world

            with accumulating(self.module, index < len(parts) - 1):
                self.module(losses).backward()
        norms = clip_parts(self.parts, settings.grad_clip)
        set_learning_rate(self.optimizer, cosine_learning_rate(step, peak=settings.learning_rate,
                                                               warmup=settings.warmup, steps=settings.steps))
        self.optimizer.step()
        if "p_mask_unmask" in sums:
            self.mask_bias.update(self.all_reduce(sums["p_mask_unmask"].clone()))
        return sums | {f"grad_norm_{name}": torch.stack([norm.double(), torch.ones_like(norm).double()])
                       for name, norm in norms.items()}

    def read(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Means over ranks of accumulated pairs, with the controller's state; the one place that waits for the device."""
        values = means(unpack_sums(sums, self.all_reduce(pack_sums(sums))))
        if not self.model.trunk.causal and self.config.loss.objective == "corrective":
            values |= {"mask_bias": float(self.mask_bias.bias), "mask_prob_ema": float(self.mask_bias.ema)}
        return values

    @torch.no_grad()
    def validate(self, rows: Batch, bytes_per_token: float) -> dict[str, float]:
        """The bound on fixed rows, nats per token and bits per byte, with its standard error; the critic's AUROC."""
        self.model.eval()
        rows = rows.to(self.device)
        if self.model.trunk.causal:
            nats, error = causal_nll(self.model, rows)
        else:
            nats, error = nelbo(self.model, rows.tokens, attention_mask=rows.attention_mask,
                                vocabulary=self.model.vocabulary, seed=VALIDATION_SEED, num_draws=NELBO_DRAWS,
                                batch_size=VALIDATION_BATCH)
        figures = {"val_nelbo_nats": float(nats), "val_nelbo_se": float(error),
                   "val_bpb": bits_per_byte(float(nats), bytes_per_token)}
        if "critic" in self.model.heads and stage(self.config, self.config.pretrain.steps).critic_weight:
            figures |= critic_quality(self.model, rows)
        return figures

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's tensors for a checkpoint; the model is saved by itself."""
        return flat_state(self.optimizer)

    def load(self, tensors: dict[str, Tensor], mask_bias: dict[str, float]) -> None:
        load_flat_state(self.optimizer, tensors)
        self.mask_bias.load_state_dict(mask_bias)


def causal_nll(model: GPT, rows: Batch) -> tuple[Tensor, Tensor]:
    """Mean next-token loss of a causal model over fixed rows, nats per predicted token, and its standard error."""
    nats, num = [], []
    for part in torch.arange(len(rows.tokens), device=rows.tokens.device).split(VALIDATION_BATCH):
        tokens, mask = rows.tokens[part], rows.attention_mask[part]
        logprobs = text_logits(model(tokens, attention_mask=mask), model.vocabulary)[:, :-1].float().log_softmax(-1)
        counted = next_token_counted(mask)
        chosen = logprobs.gather(-1, tokens[:, 1:].masked_fill(~counted, 0)[..., None]).squeeze(-1)
        nats.append(-(chosen * counted).sum(1).double())
        num.append(counted.sum(1).double())
    return ratio_with_error(torch.cat(nats), torch.cat(num))


def critic_quality(model: GPT, rows: Batch) -> dict[str, float]:
    """AUROC and calibration error of the critic on the model's own sampled fills of fixed rows."""
    scores, wrong = [], []
    for part in torch.arange(len(rows.tokens), device=rows.tokens.device).split(VALIDATION_BATCH):
        seeds, times = stratified_rows(VALIDATION_SEED, CRITIC_STREAM, 0, part, len(rows.tokens))
        mask = rows.attention_mask[part]
        blank = mask_only(rows.tokens[part], vocabulary=model.vocabulary, attention_mask=mask, seeds=seeds, times=times)
        filled = fill_masks(blank.inputs, model(blank.inputs, attention_mask=mask), vocabulary=model.vocabulary, seeds=seeds)
        scores.append(model.critic_scores(filled, mask)[blank.masked])
        wrong.append((filled != rows.tokens[part])[blank.masked])
    logits, truth = torch.cat(scores), torch.cat(wrong)
    return {"critic_auroc": float(auroc(logits, truth)),
            "critic_ece": float(expected_calibration_error(logits.sigmoid(), truth))}
