"""The adversarial loop in every Ray Train worker: roll out, score, generator phase, reward phase, publish.

1. While the actors work (`pipelines/rollouts.py`), the worker prepares the natural text's features; with
   `grpo.max_staleness: 1` it trains on round r while they roll out round r + 1 with the heads of before.
2. Rank 0 publishes new heads once per round; the others pick the references up.
3. A checkpoint's model is the run's result so far, the averaged policy. Its state holds heads, optimisers, controllers,
   replay buffer, counters, the history of metrics, and the heads of a round that is under way; a resumed run continues
   with the round after it, and rolls that one out again.
4. A failure that the same round would meet again is left on the board, and ends the run instead of repeating it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from actors.learner import Learner
from actors.trunk_store import to_arrays
from grpo.checkpoint import load_checkpoint, save_checkpoint
from grpo.config_file import to_dict
from grpo.data import open_dataset
from grpo.reward_functions import RewardFunctionError
from grpo.run_checkpoints import checkpoint_folder, latest_checkpoint, newest_step, prune_checkpoints
from grpo.text_quality import distinct_n
from pipelines.ranks import Ranks, check_shared, worker_ranks
from pipelines.rollouts import Rollouts, RoundsJob, Share, fetch, newest_heads, own, publish, shared_by
from pipelines.tracking import Tracker

SHOWN = ("reward", "p_natural", "reward_accuracy", "kl", "entropy")
"""Figures of the live line."""

Log = Callable[[dict[str, float], int], None]
"""log(figures, round): what a run shows of a round; figures of rounds before a resume come again."""
Report = Callable[[int, int, dict[str, float]], bool]
"""report(rounds done, of how many, newest figures) -> whether to stop."""


def worker_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on each rank; returns what `train` does, or {"error": reason}."""
    job: RoundsJob = settings["job"]
    ranks = worker_ranks(job.config.run.threads)
    try:
        check_shared(job.folder, ranks)
    except ValueError as error:
        return {"error": str(error)}
    board, timeout_s = settings["board"], job.config.run.timeout_s
    share = own if ranks.world == 1 else shared_by(board, ranks, timeout_s)
    if reason := fetch(board.failure.remote(), "the progress board", timeout_s):
        return {"error": reason}

    def report(done: int, total: int, figures: dict[str, float]) -> bool:
        answer = board.report.remote("adversarial rounds", done, total, figures)
        return fetch(answer, "the progress board", timeout_s)

    try:
        if ranks.rank > 0:
            return train(job, ranks, lambda figures, step: None, report, share=share)
        with Tracker(
            settings["tracking"],
            job.folder,
            job.folder.name,
            run_id=settings["mlflow_run"],
            start_step=1,
            writer="rank0",
            warn=lambda text: board.note.remote(text),
        ) as tracker:
            return train(job, ranks, tracker.log, report, board.note.remote, share)
    except (RewardFunctionError, FloatingPointError) as error:
        reason = getattr(error, "cause", error)  # an actor's error carries its traceback in its text
        reason = f"{reason}; {_remedy(error, newest_step(job.folder))}"
        fetch(board.fail.remote(reason), "the progress board", timeout_s)
        if ranks.world == 1:
            return {"error": reason}
        raise  # the other ranks wait for this one; Ray Train starts all of them again, and they find the reason


def _remedy(error: Exception, kept: int) -> str:
    """What helps after an error that ended the rounds, whose newest checkpoint is of round `kept`."""
    if isinstance(error, FloatingPointError):  # the same round would end the same way
        return f"lower grpo.learning_rate and choose another run.name; the checkpoint of round {kept} is kept"
    return f"the same command goes on after round {kept}"


def train(
    job: RoundsJob,
    ranks: Ranks,
    log: Log,
    report: Report,
    note: Callable[[str], object] = lambda text: None,
    share: Share = own,
) -> dict[str, Any]:
    """All rounds, from the newest checkpoint on; rank 0 logs, reports, and notes what should stay on the screen.

    Returns:
        The history, and {"stopped": round} if `report` said stop.
    """
    config, grpo = job.config, job.config.grpo
    trunk, heads = fetch([job.trunk[0], job.heads[0]], "the published trunk", config.run.timeout_s)
    learner = Learner(
        job.blueprint,
        config,
        trunk,
        heads,
        remasking=job.remasking,
        rank=ranks.rank,
        world=ranks.world,
        wrap=ranks.wrap,
        all_reduce=ranks.all_reduce,
        device=ranks.device,
    )
    if job.mask_bias:
        learner.mask_bias.load_state_dict(job.mask_bias)
    dataset = open_dataset(job.dataset)
    source = Rollouts(job, ranks)
    done, history, behind = _resume(job.folder, learner, ranks, share)
    if ranks.rank == 0:
        log({f"parameters/{part}": count for part, count in learner.model.parameter_counts().items()}, 0)
        for row in history:  # a killed process may have taken figures along; what the store has is not stored twice
            log({name: value for name, value in row.items() if name != "step"}, row["step"])
    warmup = config.warmup_rounds
    total = warmup + grpo.rounds
    published = publish(newest_heads(learner, done), ranks, share)
    late = publish(behind, ranks, share) if behind and done < total else None  # what rolls out the next round, if stale
    flight = late and source.start(done, late)
    saved = done
    stop = False

    def save() -> None:
        texts = _whole_texts(learner.discriminator.texts(), ranks)
        if ranks.rank == 0:
            state = {
                "round": done,
                "history": history,
                "learner": learner.tensors(),
                "texts": texts,
                "behind": late and late.state(),
                **learner.numbers(),
            }
            save_checkpoint(
                checkpoint_folder(job.folder / "checkpoints", done),
                learner.result,
                config=to_dict(config),
                tokenizer=dataset.tokenizer,
                state=state,
                provenance=[*job.provenance, dataset.provenance],
            )
            prune_checkpoints(job.folder / "checkpoints", grpo.keep, done)

    clock = Clock(time.monotonic())
    while done < total and not stop:
        clock.lap("checkpoint")
        round = done
        now = flight or source.start(round, published)
        features = learner.discriminator.natural_features(now.natural)
        clock.lap("features")
        rollouts = fetch(now.rollouts, f"rollouts of round {round} from the generator actors", config.run.timeout_s)
        clock.lap("rollout")
        scores = fetch(now.scores, f"scores of round {round} from the reward actors", config.run.timeout_s)
        clock.lap("score")
        idle = clock.seconds["seconds/rollout"] + clock.seconds["seconds/score"]
        version, late = learner.version, published if grpo.max_staleness else None
        flight = source.start(round + 1, late) if late and round + 1 < total else None
        metrics = learner.discriminator.remember(round, rollouts, scores, now.natural, features)
        if round >= warmup:
            earlier = learner.back_offs
            metrics |= learner.generator_phase(round, rollouts, scores, now.prompts, source.prompts)
            if learner.back_offs > earlier and ranks.rank == 0:
                note(
                    f"round {round + 1}: the policy's entropy fell to {metrics['entropy']:.2f} nats, below "
                    f"grpo.entropy_floor ({grpo.entropy_floor} of {learner.first_entropy:.2f}): back to the averaged "
                    f"policy, at half the learning rate"
                )
            clock.lap("generator")
            learner.discriminator.steer(metrics.get("reward_accuracy"))
            metrics |= learner.discriminator.train(round)
        else:
            metrics |= learner.discriminator.train(round, config.reward.warmup_steps)
        clock.lap("reward")
        published = publish(newest_heads(learner, round + 1), ranks, share)
        clock.lap("publish")
        done, laps, clock = round + 1, clock, Clock(clock.last)
        written = [torch.stack([r.tokens, r.completion_mask])[:, :, grpo.prompt_tokens :] for r in rollouts]
        written = _on_rank_0(torch.cat(written, 1), ranks)
        if ranks.rank == 0:
            texts, real = torch.cat(written, 1)
            real = real.bool()
            if int(real.sum(1).max()) >= 4:
                metrics["distinct_4"] = distinct_n(texts, 4, real)
            metrics |= {
                "staleness": float(version - rollouts[0].policy_version),
                "policy_version": rollouts[0].policy_version,
                "tokens_per_s": int(real.sum()) / laps.total(),
                "time/learner_idle": idle / laps.total(),
                **laps.seconds,
            }
            history.append({"step": done, **metrics})
            log(metrics, done)
            shown = {name: metrics[name] for name in SHOWN if name in metrics}
            stop = report(done, total, shown)
        stop = bool(ranks.all_reduce(torch.tensor(float(stop), device=ranks.device), "max"))
        if done % grpo.checkpoint_every == 0 or done == total or stop:
            save()
            saved = done
        del now, rollouts, scores  # the next round's take their place in memory
    if saved == done == total and ranks.rank == 0:
        save_checkpoint(
            job.folder / "final",
            learner.result,
            config=to_dict(config),
            tokenizer=dataset.tokenizer,
            state={"mask_bias": learner.mask_bias.state_dict()},
            provenance=[*job.provenance, dataset.provenance],
        )
    return {"history": history, **({"stopped": done} if done < total else {})}


class Clock:
    """Seconds by phase of one round, and of the checkpoint and the figures of the round before it."""

    def __init__(self, since: float) -> None:
        self.started = self.last = since
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[f"seconds/{phase}"] = now - self.last
        self.last = now

    def total(self) -> float:
        return self.last - self.started


def _resume(
    folder: Path, learner: Learner, ranks: Ranks, share: Share
) -> tuple[int, list[dict[str, float]], dict[str, Any] | None]:
    """Load the newest checkpoint into the learner, if there is one.

    Returns:
        Rounds done, the history, and the heads (as in `Published`) that roll out the next round if it was under way.
    """
    newest = share(latest_checkpoint(folder / "checkpoints") if ranks.rank == 0 else None)
    if newest is None:
        return 0, [], None
    state = load_checkpoint(newest).state
    share = {name: tensor.chunk(ranks.world, 1)[ranks.rank] for name, tensor in state["texts"].items()}
    learner.load(state["learner"], share, state)
    behind = state.get("behind")
    if behind:
        behind = {**behind, **{name: to_arrays(behind[name]) for name in ("generator", "reward")}}
    return state["round"], state["history"], behind


def _whole_texts(texts: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor] | None:
    """The replay buffer of all ranks in the order of the global index, on rank 0."""
    gathered = _on_rank_0(texts, ranks)
    return gathered and {name: torch.cat([part[name] for part in gathered], 1) for name in texts}


def _on_rank_0(value: Any, ranks: Ranks) -> list[Any] | None:
    """The values of all ranks in their order, on rank 0."""
    if ranks.world == 1:
        return [value]
    gathered: list[Any] | None = [None] * ranks.world if ranks.rank == 0 else None
    dist.gather_object(value, gathered, 0)
    return gathered
