"""The discriminator's side of a round: replay buffer, reward phase, averaged head, and how much it trains.

1. Features of frozen states never change: each text's are computed once, and every reward step is a head-sized product.
2. Every sample has a global index k in 0..B-1; a rank owns a contiguous range of them. Natural rows share the index
   space. The reward phase draws the same (round, k) pairs on every rank and each rank trains on those it owns, so the
   number of ranks changes nothing but the order of summation.
3. The head is judged before it is trained: its accuracy on a round's new texts is a held-out figure. The natural half
   comes from the training split, so after a pass over it (`grpo.prompts` x `group_size` rows a round) these are texts
   that the head has seen, some rounds ago; the generated half is always new.
4. An average of the head may score (`reward.ema`); by default, and in the warm-up, it is the head itself.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from actors.phase import Phase, with_prefix
from actors.reward import Scores
from actors.trunk_store import Arrays, Blueprint, to_arrays
from grpo.config import Config
from grpo.data import Batch, completion_mask
from grpo.metrics import accumulate, reduced_means, weighted_sum
from grpo.model import GPT
from grpo.optim import check_finite, clip_parts, flat_state, load_flat_state, make_optimizer, trainable_parts
from grpo.reward_loss import discriminator_loss, log_odds, reward_steps, told_apart
from grpo.trajectory import Rollout

PAIR_STREAM = 22
MAX_NORM = 1.0
"""Of the reward head's gradient."""
POWER_ITERATIONS = 8
"""For the spectral norms of a head that scores, where `reward.spectral_norm` bounds them."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A round's generated and natural texts of this rank, index k by index k."""

    round: int
    tokens: Tensor
    """[2, b, T] generated, natural."""
    attention_mask: Tensor
    """[2, b, T] bool."""
    features: Tensor
    """[2, b, T - P, F] frozen states of the part after the prompt."""
    mask: Tensor
    """[2, b, T - P] bool, tokens that are scored."""


class Discriminator:
    """Owns the trainable reward head, its average, its optimiser and the replay buffer of one rank."""

    def __init__(
        self,
        blueprint: Blueprint,
        config: Config,
        model: GPT,
        *,
        rank: int,
        world: int,
        wrap: Callable[[nn.Module], nn.Module],
        all_reduce: Callable[..., Tensor],
        device: str,
    ) -> None:
        self.config, self.model, self.device = config, model, device
        self.rank, self.world, self.all_reduce = rank, world, all_reduce
        self.num_actors = config.grpo.rollout_actors // world
        torch.manual_seed(config.run.seed)
        self.head = blueprint.build("reward").heads["reward"].to(device)
        self.average = copy.deepcopy(self.head).requires_grad_(False)
        self.module = wrap(Phase({"reward": self.head}))
        self.parts = trainable_parts({"reward": self.head})
        self.optimizer = make_optimizer(self.parts, learning_rate=config.reward.learning_rate)
        self.buffer: deque[Texts] = deque(maxlen=config.reward.replay_rounds + 1)
        self.num_steps = config.reward.max_steps

    def scoring_heads(self) -> Arrays:
        """The reward head that scores, under the names that a reward model's heads have."""
        state = {f"reward.{name}": value for name, value in self.average.state_dict().items()}
        return {name: array.copy() for name, array in to_arrays(state).items()}

    @torch.no_grad()
    def natural_features(self, natural: Batch) -> Tensor:
        """[b, T - P, F] features of this rank's natural rows; computed while the actors roll out."""
        natural, prompt_tokens = natural.to(self.device), self.config.grpo.prompt_tokens
        mask = natural.attention_mask
        completion = completion_mask(mask, prompt_tokens)
        features = self.model.reward_features(natural.tokens, completion, None if bool(mask.all()) else mask)
        return features[:, prompt_tokens:]

    def remember(
        self, round: int, rollouts: list[Rollout], scores: list[Scores], natural: Batch, features: Tensor
    ) -> dict[str, float]:
        """Add a round's texts to the replay buffer and judge the reward head on them before it sees them in training.

        Args:
            rollouts, scores: of this rank's actors, in the order of the global index.
            natural, features: this rank's natural rows [b, T] and their features.
        """
        prompt = self.config.grpo.prompt_tokens
        natural_mask = natural.attention_mask[:, prompt:]
        texts = Texts(
            round=round,
            tokens=torch.stack([torch.cat([r.tokens for r in rollouts]), natural.tokens]),
            attention_mask=torch.stack([torch.cat([r.attention_mask for r in rollouts]), natural.attention_mask]),
            features=torch.stack([torch.cat([s.features[:, prompt:] for s in scores]).to(self.device), features]),
            mask=torch.stack([torch.cat([r.completion_mask[:, prompt:] for r in rollouts]), natural_mask]).to(
                self.device
            ),
        )
        if not self.buffer:
            self._calibrate(features, texts.mask[1])
        self.buffer.append(texts)
        with torch.no_grad():
            odds = [log_odds(self.head(f, m).logits) for f, m in zip(texts.features, texts.mask, strict=True)]
        told = told_apart(*odds, self.config.reward.loss)
        return reduced_means({"reward_accuracy": weighted_sum(told, texts.mask.any(-1).flatten())}, self.all_reduce)

    def train(self, round: int, num_steps: int | None = None) -> dict[str, float]:
        """Train the reward head on pairs of generated and natural texts, new ones and replayed ones.

        Args:
            num_steps: optimizer steps of a warm-up round; None: what the accuracy-band controller says.
        """
        settings = self.config.reward
        warming_up = num_steps is not None
        steps = num_steps if warming_up else self.num_steps
        generator = torch.Generator().manual_seed(self.config.run.seed * 1_000_003 + round * 1009 + PAIR_STREAM)
        sums: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        for chosen in self._draw(steps, generator):
            features, mask = self._gather(chosen)
            natural = torch.arange(len(features), device=features.device) >= len(features) // 2

            def losses(features: Tensor = features, mask: Tensor = mask, natural: Tensor = natural) -> Tensor:
                output = self.head(features, mask)
                loss, part = discriminator_loss(
                    output.logits,
                    output.token_logits,
                    natural,
                    mask,
                    loss=settings.loss,
                    smoothing=settings.smoothing,
                    total_texts=settings.batch_size,
                )
                accumulate(sums, part)
                return loss * self.world

            self.optimizer.zero_grad(set_to_none=True)
            self.module(losses).backward()
            for name, norm in clip_parts(self.parts, MAX_NORM).items():
                norms[name] = torch.maximum(norms.get(name, norm), norm)
            self.optimizer.step()
        check_finite(norms, f"reward phase of round {round}")  # once: a phase that fails is lost with its round
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.head.parameters(), strict=True):
                mean.lerp_(now, 1.0 if warming_up else 1 - settings.ema)
            for mean, now in zip(self.average.buffers(), self.head.buffers(), strict=True):
                mean.copy_(now)
            for layer in filter(is_parametrized, self.average.modules()):  # spectral norm of the average's own weights
                for _ in range(POWER_ITERATIONS):
                    _ = layer.weight
        return reduced_means(sums, self.all_reduce) | {"reward_steps": steps}

    def steer(self, accuracy: float | None) -> None:
        """Choose how many reward steps follow, by the held-out accuracy; None, of no text at all, leaves it."""
        settings = self.config.reward
        if accuracy is None:
            return
        self.num_steps = reward_steps(
            self.num_steps,
            accuracy,
            band_low=settings.band_low,
            band_high=settings.band_high,
            min_steps=settings.min_steps,
            max_steps=settings.max_steps,
        )

    def texts(self) -> dict[str, Tensor]:
        """This rank's replay buffer as tokens; its features are computed again on load."""
        return {
            f"{name}.{texts.round}": getattr(texts, name)
            for texts in self.buffer
            for name in ("tokens", "attention_mask")
        }

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs, under plain names; the replay buffer is `texts`."""
        state = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        state |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        return state | {f"optimizer.{name}": value for name, value in flat_state(self.optimizer).items()}

    def load(self, tensors: dict[str, Tensor], texts: dict[str, Tensor], num_steps: int) -> None:
        """Continue from `tensors`, `texts` and the controller's number of steps."""
        self.head.load_state_dict(with_prefix(tensors, "head."))
        self.average.load_state_dict(with_prefix(tensors, "average."))
        load_flat_state(self.optimizer, with_prefix(tensors, "optimizer."))
        self.num_steps = num_steps
        prompt = self.config.grpo.prompt_tokens
        self.buffer.clear()
        for round in sorted(int(name.partition(".")[2]) for name in texts if name.startswith("tokens.")):
            tokens, mask = texts[f"tokens.{round}"], texts[f"attention_mask.{round}"]
            parts = zip(tokens[0].chunk(self.num_actors), mask[0].chunk(self.num_actors), strict=True)
            generated = [self.natural_features(Batch(*part)) for part in parts]  # sizes of products decide their bits
            features = torch.stack([torch.cat(generated), self.natural_features(Batch(tokens[1], mask[1]))])
            scored = mask[:, :, prompt:].to(self.device)
            self.buffer.append(Texts(round=round, tokens=tokens, attention_mask=mask, features=features, mask=scored))

    def _calibrate(self, features: Tensor, mask: Tensor) -> None:
        """Standardise the reward head's features by the first round's natural text of all ranks; for want of two tokens
        they keep their scale.
        """
        chosen = features[mask].double()
        count = self.all_reduce(torch.tensor(float(len(chosen)), dtype=torch.float64, device=self.device))
        mean = self.all_reduce(chosen.sum(0)) / count.clamp(min=1)
        variance = self.all_reduce((chosen - mean).square().sum(0)) / (count - 1).clamp(min=1)
        for head in (self.head, self.average):
            head.calibrate(mean, torch.where(count > 1, variance, 1.0).sqrt())

    def _draw(self, steps: int, generator: torch.Generator) -> list[list[Tensor]]:
        """Of each reward step, the pairs that this rank owns: their places in each round of the buffer.

        They are drawn on the CPU, where their numbers are known, and travel to the device together.
        """
        per_rank, latest = len(self.buffer[-1].tokens[0]), len(self.buffer) - 1
        pairs, low = self.config.reward.batch_size // 2, self.rank * per_rank
        drawn = []
        for _ in range(steps):
            slots = torch.randint(per_rank * self.world, (pairs,), generator=generator)
            ages = torch.randint(max(1, latest), (pairs,), generator=generator)
            ages[: pairs // 2] = latest  # half from this round, half from earlier ones
            owned = (slots >= low) & (slots < low + per_rank)
            drawn += [slots[owned & (ages == age)] - low for age in range(len(self.buffer))]
        places = torch.cat([torch.empty(0, dtype=torch.int64), *drawn]).to(self.device).split([len(d) for d in drawn])
        return [list(places[first : first + latest + 1]) for first in range(0, len(places), latest + 1)]

    def _gather(self, chosen: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Features [2m, T - P, F] and masks of m pairs: generated first, natural second."""
        rounds = [(texts, places, side) for side in (0, 1) for texts, places in zip(self.buffer, chosen, strict=True)]
        features = torch.cat([texts.features[side][places] for texts, places, side in rounds])
        return features, torch.cat([texts.mask[side][places] for texts, places, side in rounds])


class NoDiscriminator:
    """In the place of a discriminator where `grpo.adversary` is 0: nothing is scored, kept or trained."""

    num_steps = 0

    def __init__(self, *_: object, **__: object) -> None: ...

    def scoring_heads(self) -> Arrays:
        return {}

    def natural_features(self, natural: Batch) -> None: ...

    def remember(self, *_: object) -> dict[str, float]:
        return {}

    def train(self, round: int, num_steps: int | None = None) -> dict[str, float]:
        return {}

    def steer(self, accuracy: float | None) -> None: ...

    def texts(self) -> dict[str, Tensor]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: dict[str, Tensor], texts: dict[str, Tensor], num_steps: int) -> None: ...
