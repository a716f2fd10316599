"""A round's work for the actors: whose rows are whose, sending them out by reference, and publishing heads.

1. Rollouts and scores go by reference from generator to reward actor to the worker; the driver sees none of them.
2. Rank r owns a contiguous share of the prompts and of the actors. Seeds belong to global indices, so the number of
   actors and ranks changes nothing but the order of summation.
3. Every wait has a limit and names what it waited for.
4. References reach the other ranks by the board and not by a pickled message: what a reference in a pickle refers to
   Ray keeps as long as the process lives that pickled it, every round's heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.learner import Learner
from actors.trunk_store import Blueprint, to_tensors
from grpo.config import Config
from grpo.data import Batch, Cursor, open_dataset
from pipelines.ranks import Ranks

Share = Callable[[Any], Any]
"""share(value of rank 0) -> the same on all ranks; it may hold object references."""


def own(value: Any) -> Any:
    """`Share` of a world of one."""
    return value


@dataclass(frozen=True, kw_only=True)
class RoundsJob:
    """What every rank of the rounds is told."""

    config: Config
    dataset: Path
    folder: Path
    blueprint: Blueprint
    remasking: str
    """Resolved re-masking policy."""
    trunk: tuple[Any]
    """Reference of the published trunk, in a tuple so that Ray does not fetch it on the way."""
    heads: tuple[Any]
    """Reference of the base heads."""
    mask_bias: dict[str, float] | None
    """The base model's mask-bias controller, which the rounds go on steering; None: it has none."""
    provenance: list[dict[str, Any]]
    """Of the texts that the base model was trained on."""
    generators: list[Any]
    """Handles of the generator actors, in the order of the prompts that they own."""
    rewards: list[Any]
    """Handles of the reward actors, one beside each generator."""


def fetch(references: Any, waiting_for: str, timeout_s: float) -> Any:
    """`ray.get` with a limit whose error says what was waited for."""
    import ray

    try:
        return ray.get(references, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise TimeoutError(f"waited {timeout_s:.0f} s for {waiting_for}; run.timeout_s sets the limit") from None


@dataclass(frozen=True, kw_only=True)
class Published:
    """References of heads, as they were before a round."""

    round: int
    """Rounds done, which numbers the reward head."""
    version: int
    """Updates of the generator, which numbers its heads."""
    generator: Any
    reward: Any
    mask_bias: float

    def state(self) -> dict[str, Any]:
        """The heads themselves, for a checkpoint."""
        import ray

        generator, reward = map(to_tensors, ray.get([self.generator, self.reward]))
        heads = {"generator": generator, "reward": reward}
        return {"round": self.round, "version": self.version, "mask_bias": self.mask_bias, **heads}


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A round whose rollouts are under way."""

    published: Published
    natural: Batch
    """This rank's natural rows."""
    prompts: Batch
    rollouts: list[Any]
    """References, in the order of the global index."""
    scores: list[Any]


class Rollouts:
    """This rank's actors and its share of each round's rows."""

    def __init__(self, job: RoundsJob, ranks: Ranks) -> None:
        self.job, grpo = job, job.config.grpo
        share = len(job.generators) // ranks.world
        mine = slice(ranks.rank * share, (ranks.rank + 1) * share)
        self.generators, self.rewards = job.generators[mine], job.rewards[mine]
        per_rank = grpo.prompts // ranks.world
        self.prompts = torch.arange(ranks.rank * per_rank, (ranks.rank + 1) * per_rank)
        rows = range(ranks.rank * per_rank * grpo.group_size, (ranks.rank + 1) * per_rank * grpo.group_size)
        self.rows = rows
        self.cursor = Cursor(
            open_dataset(job.dataset),
            "train",
            grpo.prompts * grpo.group_size,
            job.config.data.block_size,
            job.config.run.seed,
        )

    def natural(self, round: int) -> tuple[Batch, Batch]:
        """This rank's natural rows, and the prompts among them: row n x G is the true continuation of prompt n."""
        natural = self.cursor.batch(round, rows=self.rows)
        size = self.job.config.grpo.group_size
        return natural, natural[::size]

    def start(self, round: int, published: Published) -> Flight:
        """Send a round's prompts to the actors."""
        natural, prompts = self.natural(round)
        parts = len(self.generators)
        rollouts = [
            actor.roll_out.remote(published.generator, published.version, published.mask_bias, round, *split)
            for actor, split in zip(
                self.generators,
                zip(
                    self.prompts.chunk(parts),
                    prompts.tokens.chunk(parts),
                    prompts.attention_mask.chunk(parts),
                    strict=True,
                ),
                strict=True,
            )
        ]
        scores = [
            actor.score.remote(published.reward, published.round, rollout)
            for actor, rollout in zip(self.rewards, rollouts, strict=True)
        ]
        return Flight(published=published, natural=natural, prompts=prompts, rollouts=rollouts, scores=scores)


def newest_heads(learner: Learner, round: int) -> dict[str, Any]:
    """What rank 0 publishes, as in `Published`."""
    return {
        "round": round,
        "version": learner.version,
        "mask_bias": learner.bias,
        "generator": learner.generator_heads(),
        "reward": learner.discriminator.scoring_heads(),
    }


def publish(heads: dict[str, Any], ranks: Ranks, share: Share = own) -> Published:
    """Rank 0 puts both heads into the object store; all ranks get the references."""
    import ray

    new = None
    if ranks.rank == 0:
        new = Published(**{**heads, **{name: ray.put(heads[name]) for name in ("generator", "reward")}})
    return share(new)


def shared_by(board: Any, ranks: Ranks, timeout_s: float) -> Share:
    """What shares among several ranks, by way of the progress board."""

    def wait_for_all() -> None:
        float(ranks.all_reduce(torch.zeros((), device=ranks.device)))  # on a GPU only the read waits

    def share(value: Any) -> Any:
        if ranks.rank == 0:
            fetch(board.share.remote(value), "the progress board", timeout_s)
        wait_for_all()
        value = value if ranks.rank == 0 else fetch(board.shared.remote(), "the progress board", timeout_s)
        wait_for_all()  # or rank 0 could replace what another has not read yet
        return value

    return share
