import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from pipelines.launch import NO_DASHBOARD, QUIET

ROOT = Path(__file__).resolve().parent.parent

os.environ.update(QUIET | {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1"})


@pytest.fixture(autouse=True)
def float32_products():
    """The precision of float32 products that a test sets for the process does not outlive it."""
    before = torch.get_float32_matmul_precision()
    yield
    if torch.get_float32_matmul_precision() != before:
        torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session")
def ray_session():
    import ray

    with pytest.MonkeyPatch.context() as patch:  # drivers of other processes join, with environments of their own
        for name, value in NO_DASHBOARD.items():
            patch.setenv(name, value)
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                 object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Start a pipeline's script in this process, in the test's folder, on a user's mistake; returns what it says."""

    def start(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "pipelines" / f"{name}.py"), run_name="__main__")
        out, told = capsys.readouterr()
        assert (ended.value.code, out) == (2, "") and told.startswith("error: ") and told.count("\n") == 1, told
        return told

    return start
