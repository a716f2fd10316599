import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from grpo.config import ClusterSection, Config, GrpoSection
from pipelines.grpo import judge_beside
from pipelines.placement import (
    at_once,
    check_fits,
    computes_on,
    node_resources,
    placed,
    room_beside,
    task_options,
)

ROOT = Path(__file__).resolve().parent.parent
GRPO = GrpoSection(num_workers=2, rollout_actors=4, prompts=8)


def test_what_a_rank_books_is_divided_among_its_actors():
    cluster = ClusterSection(generator_cpus=3.0)
    assert cluster.booked("generator", per_rank=2) == {"CPU": 1.5}
    assert cluster.booked("generator", per_rank=2, on_gpu=True) == {"CPU": 1.5, "GPU": 0.15}
    assert cluster.booked("reward", per_rank=2) == {} and cluster.booked("learner") == {"CPU": 1.0}


def test_a_demand_beyond_the_cluster_is_one_line_with_keys():
    check_fits(ClusterSection(), GRPO, [{"CPU": 2.0, "GPU": 2.0}])
    with pytest.raises(ValueError, match=r"cluster.learner_cpus must together be at most 0.5 .* got 1$"):
        check_fits(ClusterSection(), GRPO, [{"CPU": 1.0}])
    with pytest.raises(ValueError, match=r"cluster.learner_gpus must together be at most 0.5 .* got 1$"):
        check_fits(ClusterSection(), GRPO, [{"CPU": 8.0, "GPU": 1.0}])
    with pytest.raises(ValueError, match=r"cluster.generator_gpus must be at most 2 or a multiple of it .* got 3$"):
        check_fits(ClusterSection(generator_gpus=3), GRPO, [{"CPU": 8.0, "GPU": 16.0}])


@pytest.mark.parametrize("booked, num_workers, told", [
    ((0.3, 0.3, 0.4), 4, None),
    ((0.2, 0.1, 0.2), 1, None),
    ((0.2, 0.1, 0.2), 4, "more than 0.5 of a GPU .* two of the 4 ranks come to one GPU; got 0.3 and 0.2$"),
    ((0.3, 0.3, 0.2), 4, "two of the 4 ranks come to one GPU; got 0.6 and 0.2$"),
    ((0.5, 0.5, 0.6), 4, None),
    ((0.5, 0.5, 0.5), 4, "two of the 4 ranks come to one GPU; got 1 and 0.5$"),
    ((0.7, 0.6, 0.6), 1, "must together be at most 1, or whole GPUs, got 1.3$"),
    ((0.3, 0.3, 0.0), 1, "cluster.learner_gpus must be above 0 where the cluster has GPUs, got 0$"),
])
def test_shares_of_gpus_that_cannot_be_had_are_one_line(booked, num_workers, told):
    shares = dict(zip(("generator_gpus", "reward_gpus", "learner_gpus"), booked, strict=True))
    grpo = GrpoSection(num_workers=num_workers, rollout_actors=num_workers, prompts=8)
    with pytest.raises(ValueError, match=told) if told else contextlib.nullcontext():
        check_fits(ClusterSection(**shares), grpo, [{"CPU": 16.0, "GPU": 8.0}])


def test_ranks_that_share_gpus_are_spread_over_nodes():
    nodes = [{"CPU": 16.0, "GPU": 2.0}] * 2
    grpo = GrpoSection(num_workers=4, rollout_actors=4, prompts=8)
    check_fits(ClusterSection(placement="SPREAD"), grpo, nodes)
    check_fits(ClusterSection(), GRPO, nodes)
    with pytest.raises(ValueError, match=r"must be SPREAD .* 4 ranks are more than a node takes \(2 GPUs\), got PACK"):
        check_fits(ClusterSection(), grpo, nodes)


SPREAD = """
import json
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from grpo.config import ClusterSection, GrpoSection
from pipelines.placement import check_fits, node_resources, placed

class Place:
    def where(self):
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_accelerator_ids()["GPU"]

nodes = Cluster()
for _ in range(2):
    nodes.add_node(num_cpus=4, num_gpus=2, object_store_memory=80 * 2**20, include_dashboard=False)
ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
cluster, grpo = ClusterSection(placement="SPREAD"), GrpoSection(num_workers=4, rollout_actors=8, prompts=8)
check_fits(cluster, grpo, node_resources())
with placed(cluster, grpo, on_gpu=True, timeout_s=30) as pairs:
    actors = [ray.remote(**options)(Place).remote() for pair in pairs for options in pair]
    group = placement_group([cluster.booked("learner", on_gpu=True)] * 4, strategy="SPREAD")
    assert group.wait(30)
    bundles = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in range(4)]
    learners = [ray.remote(num_cpus=1, num_gpus=0.4, scheduling_strategy=bundle)(Place).remote() for bundle in bundles]
    print(json.dumps(ray.get([each.where.remote() for each in actors + learners], timeout=60)))
"""


def test_every_rank_gets_a_gpu_of_its_own():
    """On nodes that only say that they have GPUs: what is shared out here are Ray's numbers."""
    done = subprocess.run([sys.executable, "-c", SPREAD], capture_output=True, text=True, timeout=180, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    places = [(node, *gpus) for node, gpus in json.loads(done.stdout.splitlines()[-1])]
    actors, learners = places[:16], places[16:]
    ranks = [set(actors[4 * rank : 4 * rank + 4]) for rank in range(4)]
    assert all(len(rank) == 1 for rank in ranks) and len(set.union(*ranks)) == 4
    assert len(set(learners)) == 4 and {len(place) for place in places} == {2}


HEAD_WITHOUT_CPUS = """
import json
import os
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from grpo.config import ClusterSection, GrpoSection
from pipelines.placement import check_seen, placed, this_node
from pipelines.progress import Display

def homes(placement, actors):
    grpo = GrpoSection(rollout_actors=actors, prompts=actors)
    with placed(ClusterSection(placement=placement), grpo, on_gpu=False, timeout_s=30) as pairs:
        where = ray.remote(this_node)
        return ray.get([where.options(**options).remote() for pair in pairs for options in pair], timeout=60)

nodes = Cluster()
for cpus in (0, 2, 3):
    nodes.add_node(num_cpus=cpus, object_store_memory=80 * 2**20, include_dashboard=False)
ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
group = placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD")
trials = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in range(2)]
trial = ray.remote(num_cpus=1)(lambda: (this_node(), homes("PACK", 1)))
os.environ["RAY_ADDRESS"] = nodes.address
check_seen(Path("/"), Display())
try:
    check_seen(Path("/nowhere"), Display())
except ValueError as error:
    said = str(error)
print(json.dumps({
    "cpus": {node["NodeID"]: node["Resources"].get("CPU", 0) for node in ray.nodes()},
    "said": said, "PACK": homes("PACK", 4), "SPREAD": homes("SPREAD", 4),
    "trials": ray.get([trial.options(scheduling_strategy=each).remote() for each in trials], timeout=60),
}))
"""


def test_actors_that_book_nothing_keep_off_a_head_without_cpus():
    """And a folder that the nodes with CPUs do not see is said."""
    done = subprocess.run([sys.executable, "-c", HEAD_WITHOUT_CPUS], capture_output=True, text=True, timeout=180,
                          cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    cpus = found["cpus"]
    assert found["said"].startswith("run.output: not every node sees /nowhere: set run.output to storage that all ")
    assert sorted(cpus.values()) == [0, 2, 3]
    assert [cpus[node] for node in found["PACK"]] == [3] * 8
    assert [cpus[node] for node in found["SPREAD"]] == [3, 3, 2, 2] * 2
    assert all(set(actors) == {trial} for trial, actors in found["trials"]) and len(found["trials"]) == 2


@pytest.mark.ray
def test_what_books_no_gpu_sees_none(ray_session):
    see = ray.remote(num_cpus=0)(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert ray.get(see.remote(), timeout=60) == ""


def test_a_run_says_what_it_computes_on():
    auto, nodes = ClusterSection(), [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0}]
    assert computes_on(auto, nodes, 1, "a.b") == "on 2 GPUs, 1 of them used (a.b)"
    assert computes_on(auto, [{"CPU": 4.0}, {"CPU": 2.0}], 1, "a.b") == "on 6 CPUs, without a GPU"


def test_gpus_that_are_asked_for_are_waited_for_on_a_cluster_and_missed_on_a_machine(monkeypatch):
    cuda, nodes = ClusterSection(device="cuda"), [{"CPU": 2.0}]
    monkeypatch.setattr("pipelines.placement.node_resources", lambda: nodes)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    check_fits(cuda, GRPO, nodes)
    assert computes_on(cuda, nodes, 2, "a.b") == "on 2 GPUs (a.b), of which the cluster has 0 now"
    assert task_options(cuda) == {"num_cpus": 1, "num_gpus": 0.4}
    monkeypatch.setattr("pipelines.placement.node_resources", lambda: [{"memory": 1e9}])  # scaled to a head alone
    assert task_options(cuda) == {"num_cpus": 1, "num_gpus": 0.4}
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(ValueError, match="^cluster.device is cuda, but Ray sees no CUDA GPU on this machine: set "):
        check_fits(cuda, GRPO, nodes)
    with pytest.raises(ValueError, match="cluster.generator_gpus, .* must together be at most 0.5 "):
        check_fits(cuda, GRPO, [{"CPU": 2.0, "GPU": 1.0}])


@pytest.mark.parametrize("resources, gpus", [({"CPU": 4.0}, 0), ({"CPU": 4.0, "GPU": 2.0}, 0.25)])
def test_a_task_books_a_learners_share_where_the_cluster_has_gpus(monkeypatch, resources, gpus):
    monkeypatch.setattr("pipelines.placement.node_resources", lambda: [resources])
    assert task_options(ClusterSection(learner_cpus=2.0, learner_gpus=0.25)) == {"num_cpus": 1, "num_gpus": gpus}


@pytest.mark.parametrize("resources, gpus, room", [
    ({"CPU": 2.0}, 0, True), ({"CPU": 1.0}, 0, False),
    ({"CPU": 1.0, "GPU": 2.0}, 0.4, True), ({"CPU": 8.0, "GPU": 1.0}, 0.4, False),
])
def test_the_judge_trains_before_a_pretraining_that_has_no_room_beside_it(
    ray_session, monkeypatch, resources, gpus, room
):
    monkeypatch.setattr("pipelines.placement.node_resources", lambda: [resources])
    assert room_beside({"num_cpus": 1, "num_gpus": gpus}, 1, on_gpu=gpus > 0) == room
    seen = []
    monkeypatch.setattr("pipelines.grpo.fit_judge", lambda config, dataset: iter(()))
    monkeypatch.setattr("pipelines.grpo.task_options", lambda cluster: {"num_cpus": 1, "num_gpus": 0})
    monkeypatch.setattr("pipelines.grpo.room_beside", lambda *_, on_gpu: room)
    monkeypatch.setattr("pipelines.grpo.follow_judge", lambda judge, display: seen.append("judge"))
    with judge_beside(Config(), Path(), None):
        seen.append("base")
    assert seen == (["base", "judge"] if room else ["judge", "base"])


def test_a_task_that_no_node_can_take_is_said_and_not_waited_for(monkeypatch):
    monkeypatch.setattr("pipelines.placement.node_resources", lambda: [{"memory": 1e9}])
    with pytest.raises(ValueError, match="a measurement takes 1 CPU, the cluster has 0: add a node"):
        task_options(ClusterSection())


def test_how_many_fit_at_once_is_bounded_by_the_scarcest(monkeypatch):
    nodes = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 4.0}, {"CPU": 64.0}]
    dead = {"Alive": False, "Resources": {"CPU": 999.0, "GPU": 999.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [dead, *({"Alive": True, "Resources": each} for each in nodes)])
    nodes = node_resources()
    assert at_once(nodes, {"CPU": 1.0}) == (75, 64)
    assert at_once(nodes, {"CPU": 1.0, "GPU": 0.4}, {"GPU": 0.1}) == (10, 3)  # two on the first node, three on the next
    assert at_once(nodes, {"CPU": 70.0}) == (1, 1)


@pytest.mark.ray
def test_a_pair_of_actors_shares_a_bundle_and_leaves_nothing_behind(ray_session):
    free = ray.available_resources()["CPU"]
    cluster = ClusterSection(generator_cpus=0.5, reward_cpus=1.0)
    with placed(cluster, GRPO, on_gpu=False, timeout_s=30) as pairs:
        assert [[options["num_cpus"] for options in pair] for pair in pairs] == [[0.25, 0.5]] * 4
        bundles = [[options["scheduling_strategy"].placement_group_bundle_index for options in pair] for pair in pairs]
        assert bundles == [[0, 0], [0, 0], [1, 1], [1, 1]]  # one bundle per rank
        where = ray.remote(lambda: ray.get_runtime_context().get_placement_group_id())
        assert ray.get([where.options(**options).remote() for pair in pairs for options in pair], timeout=60)[0]
    with pytest.raises(TimeoutError, match="waited 1 s for 2 places of .*cluster.placement is STRICT_PACK"):
        with placed(ClusterSection(generator_cpus=16, placement="STRICT_PACK"), GRPO, on_gpu=False, timeout_s=1):
            pass
    def inside():
        with placed(cluster, GRPO, on_gpu=False, timeout_s=30) as pairs:
            return [options["scheduling_strategy"].placement_group.id.hex() for pair in pairs for options in pair]

    around = placement_group([{"CPU": 1.0}, {"CPU": 3.0}])
    trial = ray.remote(num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(around, 0))(inside)
    assert ray.get(trial.remote(), timeout=60) == [around.id.hex()] * 8
    remove_placement_group(around)
    ray.get(ray.remote(num_cpus=free)(lambda: None).remote(), timeout=60)  # all CPUs are free again
