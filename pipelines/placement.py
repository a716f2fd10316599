"""Where the processes of the adversarial rounds go: what Ray books for each, and which of them share a node.

1. A rank's generators and reward actors stand in one bundle of a placement group, so that rollouts stay in the node's
   object store and a fraction of a GPU is one GPU's. What books nothing Ray would put anywhere, a head without CPUs
   included: such actors go to the node that has the most CPUs, or with `SPREAD` to all nodes with CPUs in turn.
2. Inside a placement group (a trial of a sweep) actors take what that group holds, or stay on its process's node.
3. A demand that the cluster cannot meet is an error and no silent wait; with `cluster.device: cuda` a cluster may grow,
   so there it is a wait.
4. Ray looks for a node by the sum of its GPUs and only there for one GPU that has enough left, the fullest first:
   fractions must be such that this cannot go wrong.
5. What a task or a trial computes has no limit of time, so what it books is compared with the cluster before.
6. A task that measures, or that trains the judge, books what a learner has of a GPU, which is at most one: whoever else
   holds GPUs then (pretraining, other such tasks) ends without it, so it waits at most for its turn. Pretraining waits
   for a limited time and needs whole GPUs, so the judge trains beside it only where both find room.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo.config import ClusterSection, GrpoSection
from grpo.config_cluster import KINDS
from pipelines.launch import private_ray
from pipelines.progress import Display, awaited, free_resources

Resources = dict[str, float]
EPSILON = 1e-6


def node_resources() -> list[Resources]:
    """What each living node has."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def total(nodes: list[Resources], resource: str) -> float:
    return sum(node.get(resource, 0.0) for node in nodes)


def may_grow(cluster: ClusterSection) -> bool:
    """Whether nodes with GPUs may come that an autoscaler adds for what is booked."""
    return cluster.device == "cuda" and not private_ray()


def on_gpu(cluster: ClusterSection, nodes: list[Resources]) -> bool:
    """Whether ranks, actors and tasks get GPUs.

    Raises:
        ValueError: they must, and this machine has none.
    """
    gpus = total(nodes, "GPU")
    if cluster.device == "cuda" and not gpus and not may_grow(cluster):
        raise ValueError(
            "cluster.device is cuda, but Ray sees no CUDA GPU on this machine: set cluster.device=auto to compute on "
            "CPUs, or RAY_ADDRESS to a cluster with GPUs"
        )
    return cluster.device == "cuda" or gpus > 0


def computes_on(cluster: ClusterSection, nodes: list[Resources], num_workers: int, key: str) -> str:
    """What a run computes on, for the reader: a GPU that Ray does not see is otherwise missed by nobody.

    Args:
        key: that sets `num_workers`.
    """
    if not on_gpu(cluster, nodes):
        return f"on {total(nodes, 'CPU'):g} CPUs, without a GPU"
    gpus = total(nodes, "GPU")
    if num_workers > gpus:
        return f"on {num_workers} GPUs ({key}), of which the cluster has {gpus:g} now"
    return f"on {gpus:g} GPUs, {num_workers} of them used ({key})"


def check_fits(cluster: ClusterSection, grpo: GrpoSection, nodes: list[Resources]) -> None:
    """Raise a one-line ValueError where all ranks together need more than the cluster has, or ever will."""
    gpu = on_gpu(cluster, nodes)
    for resource in () if may_grow(cluster) else ("CPU", "GPU"):
        has = total(nodes, resource)
        booked = [cluster.booked(kind, on_gpu=gpu) for kind in KINDS]
        needed = grpo.num_workers * sum(each.get(resource, 0.0) for each in booked)
        if needed > has + EPSILON:
            keys = ", ".join(f"cluster.{kind}_{resource.lower()}s" for kind in KINDS)
            raise ValueError(
                f"{keys} must together be at most {has / grpo.num_workers:g} (the cluster has {has:g} {resource}s, "
                f"grpo.num_workers is {grpo.num_workers}), got {needed / grpo.num_workers:g}"
            )
    if gpu:
        _check_gpus(cluster, grpo, [node["GPU"] for node in nodes if node.get("GPU")])


def _check_gpus(cluster: ClusterSection, grpo: GrpoSection, gpus: list[float]) -> None:
    """Every process gets a GPU, and every rank its own.

    Args:
        gpus: of each node that has some.
    """
    for kind in KINDS:
        if not getattr(cluster, f"{kind}_gpus"):
            raise ValueError(f"cluster.{kind}_gpus must be above 0 where the cluster has GPUs, got 0")
    per_rank = grpo.rollout_actors // grpo.num_workers
    for kind in ("generator", "reward"):
        each = getattr(cluster, f"{kind}_gpus") / per_rank
        if each > 1 and each != int(each):  # Ray splits one GPU, never several
            raise ValueError(
                f"cluster.{kind}_gpus must be at most {per_rank} or a multiple of it (the rank's rollout actors), "
                f"got {each * per_rank:g}"
            )
    actors, learner = cluster.generator_gpus + cluster.reward_gpus, cluster.learner_gpus
    whole = abs(actors - round(actors)) < EPSILON
    if actors > 1 and not whole:
        raise ValueError(
            f"cluster.generator_gpus and cluster.reward_gpus must together be at most 1, or whole GPUs, got {actors:g}"
        )
    if grpo.num_workers == 1:
        return
    rest = 1.0 if whole else 1 - actors
    if not (whole or actors > 0.5 + EPSILON) or not rest / 2 + EPSILON < learner < rest + EPSILON:
        raise ValueError(
            "cluster.generator_gpus and cluster.reward_gpus must together be more than 0.5 of a GPU (or whole GPUs), "
            "and cluster.learner_gpus more than half of what they leave of one: otherwise two of the "
            f"{grpo.num_workers} ranks come to one GPU; got {actors:g} and {learner:g}"
        )
    if len(gpus) > 1 and cluster.placement == "PACK" and not whole and grpo.num_workers > min(gpus):
        raise ValueError(
            f"cluster.placement must be SPREAD where GPUs are shared and {grpo.num_workers} ranks are more than a node "
            f"takes ({min(gpus):g} GPUs), got PACK"
        )


def task_options(cluster: ClusterSection) -> dict[str, float]:
    """What `ray.remote` books for a task that measures or that trains the judge.

    Raises:
        ValueError: the cluster never has that much.
    """
    nodes = node_resources()
    if total(nodes, "CPU") < 1 and not may_grow(cluster):
        raise ValueError(f"a measurement takes 1 CPU, the cluster has {total(nodes, 'CPU'):g}: add a node")
    return {"num_cpus": 1, "num_gpus": cluster.booked("learner", on_gpu=on_gpu(cluster, nodes)).get("GPU", 0)}


def room_beside(task: Resources, workers: int, *, on_gpu: bool) -> bool:
    """Whether the cluster holds such a task beside that many Ray Train workers, a whole GPU each, or a CPU."""
    needs = {"CPU": task["num_cpus"] + workers * (not on_gpu), "GPU": task["num_gpus"] + workers * on_gpu}
    return all(need <= total(node_resources(), name) + EPSILON for name, need in needs.items())


def at_once(nodes: list[Resources], *bundles: Resources) -> tuple[int, int]:
    """How many times the cluster holds all of these bundles at once; of those, how many its largest node has (1 or
    more).
    """
    needs = {name: sum(bundle.get(name, 0.0) for bundle in bundles) for bundle in bundles for name in bundle}

    def times(has: Resources) -> int:
        return min(int(has.get(name, 0.0) / need + EPSILON) for name, need in needs.items() if need)

    return times({name: total(nodes, name) for name in needs}), max(1, *map(times, nodes))


def this_node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def homes_of(placement: str) -> list[str]:
    """Ids of the nodes that take, in turn, the pairs of actors for which nothing is booked; none where no node has a
    CPU yet.
    """
    import ray

    cpus = {node["NodeID"]: node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]}
    here = this_node()
    homes = sorted(filter(cpus.get, cpus), key=lambda node: (-cpus[node], node != here))
    return homes if placement == "SPREAD" else homes[:1]


def check_seen(folder: Path, display: Display) -> None:
    """Raise a ValueError where a node that has CPUs does not see a folder of the driver's."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if private_ray():
        return
    look = ray.remote(num_cpus=0)(lambda: folder.is_dir())
    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in homes_of("SPREAD")]
    asked = [look.options(scheduling_strategy=each).remote() for each in there]
    if not all(awaited(asked, f"all nodes to look for {folder}", display)):
        raise ValueError(f"run.output: not every node sees {folder}: set run.output to storage that all nodes share")


@contextmanager
def placed(cluster: ClusterSection, grpo: GrpoSection, *, on_gpu: bool, timeout_s: float) -> Iterator[list[tuple]]:
    """Options of the generator and of the reward actor, pair by pair; the body ends before their places do."""
    from ray.util.placement_group import get_current_placement_group, placement_group, remove_placement_group
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

    per_rank = grpo.rollout_actors // grpo.num_workers
    booked = [cluster.booked(kind, per_rank=per_rank, on_gpu=on_gpu) for kind in ("generator", "reward")]
    bundle = {name: per_rank * sum(each.get(name, 0.0) for each in booked) for name in {*booked[0], *booked[1]}}
    around, own = get_current_placement_group(), None
    if bundle and around is None:
        own = placement_group([bundle] * grpo.num_workers, strategy=cluster.placement)
        if not own.wait(timeout_s):
            remove_placement_group(own)
            raise TimeoutError(
                f"waited {timeout_s:.0f} s for {grpo.num_workers} places of {bundle} for the rollout actors "
                f"(cluster.placement is {cluster.placement}); {free_resources()}"
            )

    homes = [] if bundle else homes_of(cluster.placement) if around is None else [this_node()]

    def options(pair: int, mine: Resources) -> dict[str, Any]:
        where: Any = "DEFAULT"
        if own is not None:
            where = PlacementGroupSchedulingStrategy(own, placement_group_bundle_index=pair // per_rank)
        elif bundle:  # "DEFAULT" would leave the group
            where = PlacementGroupSchedulingStrategy(around)
        elif homes:
            where = NodeAffinitySchedulingStrategy(homes[pair % len(homes)], soft=True)
        return {"num_cpus": mine.get("CPU", 0), "num_gpus": mine.get("GPU", 0), "scheduling_strategy": where}

    try:
        yield [tuple(options(pair, mine) for mine in booked) for pair in range(grpo.rollout_actors)]
    finally:
        if own is not None:
            remove_placement_group(own)
