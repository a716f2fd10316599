"""The pretrainer in a process: a whole model, its optimiser and controllers, one optimizer step at a time.

    step = example of each micro-batch -> counts over all of them and all ranks -> losses, backward -> clip, AdamW

1. Distribution is applied from outside: `wrap` makes a module data-parallel, `all_reduce(tensor, op)` reduces over
   ranks. Losses carry global denominators and are multiplied by the number of ranks, because DDP averages.
2. Parts (trunk with the mode's own head, critic, sampler) are clipped each by itself.
3. Nothing but the weights, the optimiser's moments and the controller lasts from one step to the next: noise, dropout
   and learning rate are functions of the step. What is saved is all that an exact resume needs.
4. Validation reports a true bound on fixed rows, whatever the objective: the NELBO of a masked model, the exact
   likelihood of a causal one; for the critic, AUROC and calibration on the model's own sampled errors.
5. Beside it stand the parts of a diffusion model's own objective: one corruption of these rows, at the curriculum's
   final values whatever the step, without the mask bias, which moves when the model does not, and with replacements
   drawn uniformly, so that the corrupted text stays the same.
6. A learner of another task (`actors/classifier.py`) has its own `example`, `counts`, `losses` and `validate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from actors.phase import Phase, accumulating, objective
from grpo.config import Config
from grpo.corruption import mask_only, stratified_rows
from grpo.critic import fill
from grpo.data import Batch
from grpo.diffusion_loss import nelbo, next_token_counted, ratio_with_error
from grpo.mask_bias import MaskBias
from grpo.metrics import auroc, bits_per_byte, expected_calibration_error, means, merge_sums, reduced_means
from grpo.model import GPT, MODES, text_logits
from grpo.multitask import BEYOND_RAMPS, Objective, Stage, corrupt_batch, counts, multitask_loss, stage
from grpo.noise import row_seeds
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
DROPOUT_STREAM = 3
OBJECTIVE_STREAM = 4
VALIDATION_SEED = 20_000_003
NELBO_DRAWS = 4
VALIDATION_ROWS = 128
VALIDATION_LOGITS = 1 << 27
"""Most rows, and most logits, that a validation holds at once."""


class Pretrainer:
    """Trains a language model on natural text. A plain class, driven by a Ray Train worker or by a script."""

    selects = "val_nelbo_nats"
    """The figure of `validate` that chooses the best checkpoint, smaller being better: the bound and nothing else."""

    def __init__(
        self,
        model: GPT,
        config: Config,
        *,
        rank: int = 0,
        world: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
        all_reduce: Callable[..., Tensor] = lambda tensor, op="sum": tensor,
        device: str = "cpu",
    ) -> None:
        self.model, self.config, self.device = model.to(device), config, device
        self.rank, self.world, self.all_reduce = rank, world, all_reduce
        self.objective = objective(config)
        own = MODES[model.mode]
        main = {"generator" if own == "lm" else own: [*model.trunk.parameters(), *model.heads[own].parameters()]}
        self.parts = trainable_parts(main | {name: head for name, head in model.heads.items() if name != own})
        self.module = wrap(Phase({"model": model}))
        self.optimizer = make_optimizer(
            self.parts, learning_rate=config.pretrain.learning_rate, weight_decay=config.pretrain.weight_decay
        )
        self.mask_bias = MaskBias(config.mask_bias, device)
        self.autocast = torch.autocast(
            torch.device(device).type, torch.bfloat16, enabled=config.pretrain.dtype == "bfloat16"
        )

    def rows(self) -> range:
        """This rank's rows of each batch."""
        share = self.config.pretrain.batch_size // self.world
        return range(self.rank * share, (self.rank + 1) * share)

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step on this rank's rows; returns metrics as pairs of this rank (see `grpo/metrics.py`)."""
        settings = self.config.pretrain
        self.model.train()
        if self.config.model.dropout:
            noise = row_seeds(self.config.run.seed, DROPOUT_STREAM, step, torch.tensor([self.rank]))
            torch.manual_seed(int(noise))
        batch, own = batch.to(self.device), self.rows()
        rows = torch.arange(own.start, own.stop, device=self.device)
        seeds, times = stratified_rows(self.config.run.seed, TRAIN_STREAM, step, rows, settings.batch_size)
        examples = [
            self.example(
                step,
                batch.tokens[part],
                batch.attention_mask[part],
                rows=rows[part],
                seeds=seeds[part],
                times=times[part],
            )
            for part in torch.arange(len(rows), device=self.device).chunk(settings.micro_batches)
        ]
        totals = self.all_reduce(sum(self.counts(step, example) for example in examples))
        sums: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for index, example in enumerate(examples):

            def compute(example: Any = example) -> Tensor:
                nonlocal sums
                with self.autocast:
                    loss, metrics = self.losses(step, example, totals)
                sums = merge_sums(sums, metrics)
                return loss * self.world

            with accumulating(self.module, index < len(examples) - 1):
                self.module(compute).backward()
        norms = clip_parts(self.parts, settings.grad_clip)
        set_learning_rate(
            self.optimizer,
            cosine_learning_rate(step, peak=settings.learning_rate, warmup=settings.warmup, steps=settings.steps),
        )
        self.optimizer.step()
        if "p_mask_unmask" in sums:
            self.mask_bias.update(self.all_reduce(sums["p_mask_unmask"].clone()))
        return sums | {
            f"grad_norm_{name}": torch.stack([norm.double(), torch.ones_like(norm).double()])
            for name, norm in norms.items()
        }

    def example(
        self, step: int, tokens: Tensor, attention_mask: Tensor, *, rows: Tensor, seeds: Tensor, times: Tensor
    ) -> Any:
        """What the model is shown of one micro-batch, without gradients.

        Args:
            tokens, attention_mask: [B, T].
            rows: [B] global indices; seeds, times: [B], of `stratified_rows`.
        """
        return corrupt_batch(
            self.model, self.objective, stage(self.objective, step), tokens, attention_mask, seeds=seeds, times=times
        ), seeds

    def counts(self, step: int, example: Any) -> Tensor:
        """[K] denominators of the losses in this micro-batch, summed later over the whole optimizer step."""
        return counts(self.objective, example[0])

    def losses(self, step: int, example: Any, totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the total loss, and metrics as pairs."""
        return multitask_loss(
            self.model,
            self.objective,
            stage(self.objective, step),
            example[0],
            seeds=example[1],
            totals=totals,
            mask_bias=self.mask_bias.bias,
        )

    def read(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Means over ranks of accumulated pairs, and the controller's state; the host waits for them here alone."""
        values = reduced_means(sums, self.all_reduce)
        if "p_mask_unmask" in sums:
            values |= {
                "mask_bias": float(self.mask_bias.bias),
                "mask_prob_ema": float(self.mask_bias.ema),
                "mask_prob_target": self.config.mask_bias.target,
            }
        return values

    @torch.no_grad()
    def validate(self, rows: Batch, bytes_per_token: float) -> dict[str, float]:
        """On fixed rows, functions of the model alone: the bound, nats per token and bits per byte, with its standard
        error; the objective's parts; the critic's AUROC."""
        self.model.eval()
        rows, steps = rows.to(self.device), self.config.pretrain.steps
        figures = validation_bound(self.model, rows, bytes_per_token)
        if not self.model.trunk.causal:
            sampler_trains = stage(self.objective, steps - 1).sampler
            final = replace(stage(self.objective, BEYOND_RAMPS), critic_weight=0.0, sampler=sampler_trains)
            figures |= objective_parts(self.model, self.objective, final, rows)
        if "critic" in self.model.heads and stage(self.objective, steps).critic_weight:
            figures |= critic_quality(self.model, rows)
        return figures

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's tensors for a checkpoint; the model is saved by itself."""
        return flat_state(self.optimizer)

    def load(self, tensors: dict[str, Tensor], mask_bias: dict[str, float]) -> None:
        """Go on from `tensors` and the controller's state of a checkpoint."""
        load_flat_state(self.optimizer, tensors)
        self.mask_bias.load_state_dict(mask_bias)


def rows_at_once(model: GPT, rows: Batch) -> int:
    """Rows whose logits a validation holds at once."""
    return max(1, min(VALIDATION_ROWS, VALIDATION_LOGITS // (rows.tokens.shape[1] * model.vocabulary.size)))


def validation_parts(model: GPT, rows: Batch) -> Iterator[tuple[Tensor, Batch]]:
    """As many rows after the other as a validation holds at once: their indices, and the rows."""
    for index in torch.arange(len(rows.tokens), device=rows.tokens.device).split(rows_at_once(model, rows)):
        yield index, rows[index]


@torch.no_grad()
def validation_bound(model: GPT, rows: Batch, bytes_per_token: float) -> dict[str, float]:
    """NELBO (causal: exact negative log-likelihood) of fixed rows, nats per token, its error, and bits per byte."""
    if model.trunk.causal:
        nats, error = causal_nll(model, rows)
    else:
        nats, error = nelbo(
            model,
            rows.tokens,
            attention_mask=rows.attention_mask,
            vocabulary=model.vocabulary,
            seed=VALIDATION_SEED,
            num_draws=NELBO_DRAWS,
            batch_size=rows_at_once(model, rows),
        )
    return {
        "val_nelbo_nats": float(nats),
        "val_nelbo_se": float(error),
        "val_bpb": bits_per_byte(float(nats), bytes_per_token),
    }


def causal_nll(model: GPT, rows: Batch) -> tuple[Tensor, Tensor]:
    """Mean next-token loss of a causal model over fixed rows, nats per predicted token, and its standard error."""
    nats, num = [], []
    for _, part in validation_parts(model, rows):
        tokens, mask = part.tokens, part.attention_mask
        logprobs = text_logits(model(tokens, attention_mask=mask), model.vocabulary)[:, :-1].float().log_softmax(-1)
        counted = next_token_counted(mask)
        chosen = logprobs.gather(-1, tokens[:, 1:].masked_fill(~counted, 0)[..., None]).squeeze(-1)
        nats.append(-(chosen * counted).sum(1).double())
        num.append(counted.sum(1).double())
    return ratio_with_error(torch.cat(nats), torch.cat(num))


def objective_parts(model: GPT, objective: Objective, stage: Stage, rows: Batch) -> dict[str, float]:
    """Losses by task, nats, and mean P([MASK]) by task on one fixed corruption of fixed rows, as `val_...`."""
    objective = replace(objective, corruption=replace(objective.corruption, own_predictions=0.0))
    totals = torch.ones(3, device=rows.tokens.device)  # the total is not read
    sums: dict[str, Tensor] = {}
    for index, part in validation_parts(model, rows):
        seeds, times = stratified_rows(VALIDATION_SEED, OBJECTIVE_STREAM, 0, index, len(rows.tokens))
        corrupted = corrupt_batch(model, objective, stage, part.tokens, part.attention_mask, seeds=seeds, times=times)
        _, metrics = multitask_loss(model, objective, stage, corrupted, seeds=seeds, totals=totals, mask_bias=0.0)
        sums = merge_sums(sums, metrics)
    return {f"val_{name}": value for name, value in means(sums).items() if name.startswith(("loss_", "p_mask_"))}


def critic_quality(model: GPT, rows: Batch) -> dict[str, float]:
    """AUROC and calibration error of the critic on the model's own sampled fills of fixed rows."""
    scores, wrong = [], []
    for index, part in validation_parts(model, rows):
        seeds, times = stratified_rows(VALIDATION_SEED, CRITIC_STREAM, 0, index, len(rows.tokens))
        mask, vocabulary = part.attention_mask, model.vocabulary
        blank = mask_only(part.tokens, vocabulary=vocabulary, attention_mask=mask, seeds=seeds, times=times)
        filled = fill(model, blank.inputs, mask, seeds)
        scores.append(model.critic_scores(filled, mask)[blank.masked])
        wrong.append((filled != part.tokens)[blank.masked])
    logits, truth = torch.cat(scores), torch.cat(wrong)
    return {
        "critic_auroc": float(auroc(logits, truth)),
        "critic_ece": float(expected_calibration_error(logits.sigmoid(), truth)),
    }
