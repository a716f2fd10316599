"""Where the processes of the adversarial rounds go: what Ray books for each, and which of them share a node.

1. A reward actor stands in one bundle of a placement group with its generator, so that rollouts stay in the node's
   object store. Where nothing is booked for them, there is nothing to place, and Ray chooses the node.
2. Inside a placement group (a trial of a sweep) actors take what that group holds.
3. A demand that the cluster cannot meet is an error and no silent wait.
4. What a task or a trial computes has no limit of time, so what it books is compared with the cluster before.
5. A task that measures, or that trains the judge, books what a learner has of a GPU, which is at most one: whoever else
   holds GPUs then (pretraining, other such tasks) ends without it, so it waits at most for its turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grpo.config import ClusterSection, GrpoSection


def check_fits(cluster: ClusterSection, grpo: GrpoSection, total: dict[str, float]) -> None:
    """Raise a one-line ValueError where all ranks together need more than the cluster has.

    Args:
        total: `ray.cluster_resources()`.
    """
    for resource, has in (("CPU", total.get("CPU", 0.0)), ("GPU", total.get("GPU", 0.0))):
        booked = [cluster.booked(kind, on_gpu=bool(total.get("GPU"))) for kind in ("generator", "reward", "learner")]
        needed = grpo.num_workers * sum(each.get(resource, 0.0) for each in booked)
        if needed > has + 1e-6:
            keys = ", ".join(f"cluster.{kind}_{resource.lower()}s" for kind in ("generator", "reward", "learner"))
            raise ValueError(
                f"{keys} must together be at most {has / grpo.num_workers:g} (the cluster has {has:g} {resource}s, "
                f"grpo.num_workers is {grpo.num_workers}), got {needed / grpo.num_workers:g}"
            )
    per_rank = grpo.rollout_actors // grpo.num_workers
    for kind in ("generator", "reward") if total.get("GPU") else ():
        each = cluster.booked(kind, per_rank=per_rank, on_gpu=True).get("GPU", 0.0)
        if each > 1 and each != int(each):  # Ray splits one GPU, never several
            raise ValueError(
                f"cluster.{kind}_gpus must be at most {per_rank} or a multiple of it (the rank's rollout actors), "
                f"got {each * per_rank:g}"
            )


def task_options(cluster: ClusterSection) -> dict[str, float]:
    """What `ray.remote` books for a task that measures or that trains the judge.

    Raises:
        ValueError: the cluster never has that much.
    """
    import ray

    total = ray.cluster_resources()
    if total.get("CPU", 0) < 1:
        raise ValueError(f"a measurement takes 1 CPU, the cluster has {total.get('CPU', 0):g}: add a node")
    return {"num_cpus": 1, "num_gpus": cluster.booked("learner", on_gpu=bool(total.get("GPU"))).get("GPU", 0)}


def at_once(*bundles: dict[str, float]) -> tuple[int, int]:
    """How many times the cluster holds all of these bundles at once; of those, how many its largest node has (1 or
    more).
    """
    import ray

    needs = {name: sum(bundle.get(name, 0.0) for bundle in bundles) for bundle in bundles for name in bundle}

    def times(has: dict[str, float]) -> int:
        return min(int(has.get(name, 0.0) / need + 1e-6) for name, need in needs.items() if need)

    nodes = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return times(ray.cluster_resources()), max(1, *map(times, nodes))


@contextmanager
def placed(cluster: ClusterSection, grpo: GrpoSection, *, on_gpu: bool, timeout_s: float) -> Iterator[list[tuple]]:
    """Options of the generator and of the reward actor, pair by pair; the body ends before their places do."""
    import ray
    from ray.util.placement_group import get_current_placement_group, placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    per_rank = grpo.rollout_actors // grpo.num_workers
    booked = [cluster.booked(kind, per_rank=per_rank, on_gpu=on_gpu) for kind in ("generator", "reward")]
    bundle = {name: sum(each.get(name, 0.0) for each in booked) for name in {*booked[0], *booked[1]}}
    group: Any = None
    if bundle and get_current_placement_group() is None:
        group = placement_group([bundle] * grpo.rollout_actors, strategy=cluster.placement)
        if not group.wait(timeout_s):
            remove_placement_group(group)
            raise TimeoutError(
                f"waited {timeout_s:.0f} s for {grpo.rollout_actors} places of {bundle} for the rollout actors "
                f"(cluster.placement is {cluster.placement}); Ray has {ray.available_resources()} left"
            )

    def options(pair: int, mine: dict[str, float]) -> dict[str, Any]:
        where: Any = "SPREAD" if cluster.placement == "SPREAD" and not bundle else "DEFAULT"
        if group is not None:
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=pair)
        return {"num_cpus": mine.get("CPU", 0), "num_gpus": mine.get("GPU", 0), "scheduling_strategy": where}

    try:
        yield [tuple(options(pair, mine) for mine in booked) for pair in range(grpo.rollout_actors)]
    finally:
        if group is not None:
            remove_placement_group(group)
