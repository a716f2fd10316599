from types import SimpleNamespace

import pytest
import torch

from actors.torch_setup import set_up_torch, worker_threads
from pipelines.ranks import worker_ranks


@pytest.mark.parametrize("limit, cores", [(None, 64), ("max 100000", 64), ("400000 100000", 4), ("50000 100000", 1)])
def test_threads_are_those_of_the_container_shared_out(monkeypatch, tmp_path, limit, cores):
    """Of a machine with 64 cores, whose affinity a container's limit does not change."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr("actors.torch_setup.CPU_MAX", tmp_path / "cpu.max")
    if limit:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert worker_threads(0, 1) == cores and worker_threads(0, 2) == max(1, cores // 2)
    assert worker_threads(0, 1000) == 1 and worker_threads(3, 1000) == 3


@pytest.mark.parametrize("device, precision", [("cuda:1", "high"), (torch.device("cuda"), "high"), ("cpu", "highest")])
def test_a_process_takes_tf32_on_cuda_alone_and_threads_where_they_are_given(monkeypatch, device, precision):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    set_up_torch(device)
    assert torch.get_float32_matmul_precision() == precision and not threads
    set_up_torch(device, 3)
    assert torch.get_float32_matmul_precision() == precision and threads == [3]


@pytest.mark.parametrize("device, precision, threads", [("cpu", "highest", [4]), ("cuda:0", "high", [])])
def test_a_worker_of_ray_train_sets_its_threads_on_a_cpu_alone(monkeypatch, device, precision, threads):
    import ray.train.torch

    told, context = [], SimpleNamespace(get_local_world_size=lambda: 2, get_world_rank=int, get_world_size=lambda: 1)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr("actors.torch_setup._cores", lambda: 8)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device(device))
    assert worker_ranks(0).device == device
    assert (torch.get_float32_matmul_precision(), told) == (precision, threads)
