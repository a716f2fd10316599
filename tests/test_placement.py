import pytest
import ray

from grpo.config import ClusterSection, GrpoSection
from pipelines.placement import at_once, check_fits, placed, task_options
from pipelines.ranks import reason_of, torch_config

GRPO = GrpoSection(num_workers=2, rollout_actors=4, prompts=8)


def test_what_a_rank_books_is_divided_among_its_actors():
    cluster = ClusterSection(generator_cpus=3.0)
    assert cluster.booked("generator", per_rank=2) == {"CPU": 1.5}
    assert cluster.booked("generator", per_rank=2, on_gpu=True) == {"CPU": 1.5, "GPU": 0.15}
    assert cluster.booked("reward", per_rank=2) == {} and cluster.booked("learner") == {"CPU": 1.0}


def test_a_demand_beyond_the_cluster_is_one_line_with_keys():
    check_fits(ClusterSection(), GRPO, {"CPU": 2.0, "GPU": 2.0})
    with pytest.raises(ValueError, match=r"cluster.learner_cpus must together be at most 0.5 .* got 1$"):
        check_fits(ClusterSection(), GRPO, {"CPU": 1.0})
    with pytest.raises(ValueError, match=r"cluster.learner_gpus must together be at most 0.5 .* got 1$"):
        check_fits(ClusterSection(), GRPO, {"CPU": 8.0, "GPU": 1.0})
    with pytest.raises(ValueError, match=r"cluster.generator_gpus must be at most 2 or a multiple of it .* got 3$"):
        check_fits(ClusterSection(generator_gpus=3), GRPO, {"CPU": 8.0, "GPU": 16.0})


@pytest.mark.parametrize("resources, gpus", [({"CPU": 4.0}, 0), ({"CPU": 4.0, "GPU": 2.0}, 0.25)])
def test_a_task_books_a_learners_share_where_the_cluster_has_gpus(monkeypatch, resources, gpus):
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    assert task_options(ClusterSection(learner_cpus=2.0, learner_gpus=0.25)) == {"num_cpus": 1, "num_gpus": gpus}


def test_a_task_that_no_node_can_take_is_said_and_not_waited_for(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1e9})
    with pytest.raises(ValueError, match="a measurement takes 1 CPU, the cluster has 0: add a node"):
        task_options(ClusterSection())


def test_how_many_fit_at_once_is_bounded_by_the_scarcest(monkeypatch):
    nodes = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 4.0}, {"CPU": 64.0}]
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 75.0, "GPU": 5.0})
    dead = {"Alive": False, "Resources": {"CPU": 999.0, "GPU": 999.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [dead, *({"Alive": True, "Resources": each} for each in nodes)])
    assert at_once({"CPU": 1.0}) == (75, 64)
    assert at_once({"CPU": 1.0, "GPU": 0.4}, {"GPU": 0.1}) == (10, 3)  # two on the first node, three on the second
    assert at_once({"CPU": 70.0}) == (1, 1)


def test_what_ended_the_workers_is_one_line():
    from ray.train import WorkerGroupError

    trace = "Traceback (most recent call last):\n  File ...\nTimeoutError: waited 3 s for scores of round 2\n"
    error = WorkerGroupError("...", {1: RuntimeError(trace)})
    assert reason_of(error) == "TimeoutError: waited 3 s for scores of round 2"
    assert torch_config(12.5).timeout_s == 13


@pytest.mark.ray
def test_a_pair_of_actors_shares_a_bundle_and_leaves_nothing_behind(ray_session):
    free = ray.available_resources()["CPU"]
    cluster = ClusterSection(generator_cpus=0.5, reward_cpus=1.0)
    with placed(cluster, GRPO, on_gpu=False, timeout_s=30) as pairs:
        assert [[options["num_cpus"] for options in pair] for pair in pairs] == [[0.25, 0.5]] * 4
        bundles = [[options["scheduling_strategy"].placement_group_bundle_index for options in pair] for pair in pairs]
        assert bundles == [[0, 0], [1, 1], [2, 2], [3, 3]]
        where = ray.remote(lambda: ray.get_runtime_context().get_placement_group_id())
        assert ray.get([where.options(**options).remote() for pair in pairs for options in pair], timeout=60)[0]
    with placed(ClusterSection(placement="SPREAD"), GRPO, on_gpu=False, timeout_s=30) as pairs:
        assert pairs[0][0] == {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": "SPREAD"}
    with pytest.raises(TimeoutError, match="waited 1 s for 4 places of .*cluster.placement is STRICT_PACK"):
        with placed(ClusterSection(generator_cpus=16, placement="STRICT_PACK"), GRPO, on_gpu=False, timeout_s=1):
            pass
    ray.get(ray.remote(num_cpus=free)(lambda: None).remote(), timeout=60)  # all CPUs are free again
