"""Learners of a teacher's mistakes: which tokens of its fills are wrong, and which texts are its own.

    token_classifier   natural text, [MASK]s filled by samples of the teacher -> right (0) or wrong (1), per token
    sequence_scorer    natural text, or its beginning continued by the teacher -> P(natural), per text

1. The teacher is a frozen generator checkpoint. The classifier starts from its trunk, to see what it saw; the scorer
   starts afresh, for a judge should not share the features of whom it judges.
2. The token loss is the mean over wrong tokens plus the mean over right ones, halved: most tokens are right, and an
   unweighted loss would learn to say so. Its logit is log-odds at even prior, which ranks tokens all the same.
3. Half of each batch's rows are natural and the other half are denoised, by the parity of the global row. They share
   length, prompt length and tokenization, and only what follows the prompt is pooled.
4. `best` is chosen by this loss on fixed validation rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.pretrainer import CRITIC_STREAM, VALIDATION_SEED, Pretrainer, validation_parts
from grpo.checkpoint import check_tokenizer, load_checkpoint, load_into, load_model
from grpo.completion import load_remasking_model
from grpo.config import Config
from grpo.config_file import from_dict
from grpo.corruption import mask_only, stratified_rows
from grpo.critic import fill
from grpo.data import Batch, completion_mask
from grpo.denoise import denoise
from grpo.mask_bias import saved_bias
from grpo.metrics import auroc, weighted_sum
from grpo.model import GPT
from grpo.run_checkpoints import find_checkpoint
from grpo.tokenizer import Tokenizer


class Teacher:
    """A frozen generator and how it fills text."""

    def __init__(self, path: str, tokenizer: Tokenizer, device: str) -> None:
        folder = find_checkpoint(path, "pretrain.teacher")
        checkpoint = load_checkpoint(folder)
        self.tokenizer = tokenizer
        self.trunk = {name: value for name, value in checkpoint.tensors.items() if name.startswith("trunk.")}
        self.model = load_model(folder, device=device).eval().requires_grad_(False)
        if self.model.mode != "language_model" or self.model.trunk.causal:
            raise ValueError(f"pretrain.teacher={path} is no masked-diffusion generator: give the checkpoint of one")
        check_tokenizer(folder, tokenizer, "pretrain.teacher")
        self.mask_bias = saved_bias(checkpoint.state, from_dict(checkpoint.config).mask_bias)

    @torch.no_grad()
    def fill(self, tokens: Tensor, attention_mask: Tensor, seeds: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] text with ceil(t x n) tokens of each row filled by samples; [B, T] bool where they differ."""
        vocabulary = self.model.vocabulary
        blank = mask_only(tokens, vocabulary=vocabulary, attention_mask=attention_mask, seeds=seeds, times=times)
        filled = fill(self.model, blank.inputs, attention_mask, seeds)
        return filled, filled != tokens

    def continue_(
        self, tokens: Tensor, attention_mask: Tensor, seeds: Tensor, config: Config, remasking_model: GPT | None
    ) -> Tensor:
        """[B, T] the rows' first `grpo.prompt_tokens` tokens, and what the teacher denoises after them."""
        settings = config.denoise
        completion = completion_mask(attention_mask, config.grpo.prompt_tokens)
        blank = tokens.masked_fill(completion, self.model.vocabulary.mask_id)
        return denoise(
            self.model,
            blank,
            seeds=seeds,
            steps=settings.steps,
            schedule=settings.schedule,
            temperature=settings.temperature,
            top_p=settings.top_p,
            remasking=settings.remasking,
            randomness=settings.randomness,
            attention_mask=attention_mask,
            sampler=settings.sampler,
            min_neighbors_ratio=config.sampler.min_neighbors_ratio,
            mask_bias=self.mask_bias,
            remasking_model=remasking_model,
        )


class Filled(NamedTuple):
    tokens: Tensor
    """[B, T]."""
    attention_mask: Tensor
    """[B, T] bool."""
    wrong: Tensor
    """[B, T] bool."""


class TokenClassifier(Pretrainer):
    """Learns which tokens of a filled text are wrong."""

    selects = "val_loss"

    def __init__(self, model: GPT, config: Config, teacher: Teacher, **distribution: Any) -> None:
        try:
            load_into(model, teacher.trunk)
        except ValueError as error:
            raise ValueError(f"pretrain.teacher={config.pretrain.teacher}: {error}") from error
        super().__init__(model, config, **distribution)
        self.teacher = teacher

    def example(
        self, step: int, tokens: Tensor, attention_mask: Tensor, *, rows: Tensor, seeds: Tensor, times: Tensor
    ) -> Filled:
        filled, wrong = self.teacher.fill(tokens, attention_mask, seeds, times)
        return Filled(filled, attention_mask, wrong)

    def counts(self, step: int, example: Filled) -> Tensor:
        """[2] right and wrong tokens."""
        num_wrong = example.wrong.sum()
        return torch.stack([example.attention_mask.sum() - num_wrong, num_wrong]).double().clamp(min=1e-9)

    def losses(self, step: int, example: Filled, totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.model(example.tokens, attention_mask=example.attention_mask).float()
        losses = F.cross_entropy(logits.flatten(0, 1), example.wrong.long().flatten(), reduction="none")
        losses, right = losses.view_as(example.tokens), example.attention_mask & ~example.wrong
        loss = 0.5 * ((losses * right).sum() / totals[0].float() + (losses * example.wrong).sum() / totals[1].float())
        return loss, {
            "loss_right": weighted_sum(losses, right),
            "loss_wrong": weighted_sum(losses, example.wrong),
            "error_rate": weighted_sum(example.wrong, example.attention_mask),
        }

    @torch.no_grad()
    def validate(self, rows: Batch, bytes_per_token: float) -> dict[str, float]:
        """The loss, and the AUROC at filled and kept tokens together."""
        self.model.eval()
        rows = rows.to(self.device)
        logits, wrong = [], []
        for index, part in validation_parts(self.teacher.model, rows):
            seeds, times = stratified_rows(VALIDATION_SEED, CRITIC_STREAM, 0, index, len(rows.tokens))
            mask = part.attention_mask
            filled, mistakes = self.teacher.fill(part.tokens, mask, seeds, times)
            logits.append(self.model(filled, attention_mask=mask)[mask].float())
            wrong.append(mistakes[mask])
        scores, truth = torch.cat(logits), torch.cat(wrong)
        losses = F.cross_entropy(scores, truth.long(), reduction="none")
        return {
            "val_loss": float(0.5 * (losses[truth].mean() + losses[~truth].mean())),
            "val_auroc": float(auroc(scores[:, 1] - scores[:, 0], truth)),
            "val_error_rate": float(truth.double().mean()),
        }


class Texts(NamedTuple):
    tokens: Tensor
    """[B, T]."""
    attention_mask: Tensor
    """[B, T] bool."""
    completion: Tensor
    """[B, T] bool, what is judged."""
    natural: Tensor
    """[B] bool."""


class SequenceScorer(Pretrainer):
    """Learns which texts are natural and which the teacher wrote."""

    selects = "val_loss"

    def __init__(self, model: GPT, config: Config, teacher: Teacher, **distribution: Any) -> None:
        super().__init__(model, config, **distribution)
        self.teacher = teacher
        self.remasking_model = load_remasking_model(config.denoise, tokenizer=teacher.tokenizer, device=self.device)
        if config.denoise.sampler and "sampler" not in teacher.model.heads:
            raise ValueError(f"denoise.sampler is true, but pretrain.teacher={config.pretrain.teacher} has no sampler")

    def example(
        self, step: int, tokens: Tensor, attention_mask: Tensor, *, rows: Tensor, seeds: Tensor, times: Tensor
    ) -> Texts:
        return self._texts(tokens, attention_mask, rows, seeds)

    def _texts(self, tokens: Tensor, attention_mask: Tensor, rows: Tensor, seeds: Tensor) -> Texts:
        natural = rows % 2 == 0
        written = self.teacher.continue_(tokens, attention_mask, seeds, self.config, self.remasking_model)
        completion = completion_mask(attention_mask, self.config.grpo.prompt_tokens)
        return Texts(torch.where(natural[:, None], tokens, written), attention_mask, completion, natural)

    def counts(self, step: int, example: Texts) -> Tensor:
        """[1] texts."""
        return example.natural.new_full((1,), len(example.natural), dtype=torch.float64)

    def losses(self, step: int, example: Texts, totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self._logits(example)
        losses = F.binary_cross_entropy_with_logits(logits, example.natural.float(), reduction="none")
        right, ones = (logits > 0) == example.natural, torch.ones_like(losses)
        return losses.sum() / totals[0].float(), {
            "loss_scorer": weighted_sum(losses, ones),
            "accuracy": weighted_sum(right, ones),
        }

    def _logits(self, texts: Texts) -> Tensor:
        hidden = self.model.encode(texts.tokens, texts.attention_mask)
        return self.model.heads["scorer"].logits(hidden, texts.completion).float()

    @torch.no_grad()
    def validate(self, rows: Batch, bytes_per_token: float) -> dict[str, float]:
        """The loss, accuracy and AUROC on fixed texts."""
        self.model.eval()
        rows = rows.to(self.device)
        logits, natural = [], []
        for index, part in validation_parts(self.teacher.model, rows):
            seeds, _ = stratified_rows(VALIDATION_SEED, CRITIC_STREAM, 0, index, len(rows.tokens))
            texts = self._texts(part.tokens, part.attention_mask, index, seeds)
            logits.append(self._logits(texts))
            natural.append(texts.natural)
        scores, truth = torch.cat(logits), torch.cat(natural)
        return {
            "val_loss": float(F.binary_cross_entropy_with_logits(scores, truth.float())),
            "val_accuracy": float(((scores > 0) == truth).double().mean()),
            "val_auroc": float(auroc(scores, truth)),
        }
