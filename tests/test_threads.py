import pytest

from actors.threads import worker_threads


@pytest.mark.parametrize("limit, cores", [(None, 64), ("max 100000", 64), ("400000 100000", 4), ("50000 100000", 1)])
def test_threads_are_those_of_the_container_shared_out(monkeypatch, tmp_path, limit, cores):
    """Of a machine with 64 cores, whose affinity a container's limit does not change."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr("actors.threads.CPU_MAX", tmp_path / "cpu.max")
    if limit:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert worker_threads(0, 1) == cores and worker_threads(0, 2) == max(1, cores // 2)
    assert worker_threads(0, 1000) == 1 and worker_threads(3, 1000) == 3
