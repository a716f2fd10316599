"""How a process computes: in how many torch threads, and on CUDA with which float32 products.

1. Threads are the CPUs that the machine, or the container, grants, shared out.
2. On CUDA float32 matrices are multiplied in TF32. That is a setting of the process; on a CPU nothing is set.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of CPU time and of the period in which it may take them (cgroup v2), or `max` and the period."""


def worker_threads(requested: int, num_workers: int) -> int:
    """Torch threads of one of `num_workers` busy processes where this one runs; `requested` > 0 wins."""
    return requested or max(1, _cores() // num_workers)


def set_up_torch(device: torch.device | str, threads: int | None = None) -> None:
    """Make this process compute on a device, in so many torch threads; None leaves their number as it is."""
    if threads is not None:
        torch.set_num_threads(threads)
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit, period = CPU_MAX.read_text().split() if CPU_MAX.exists() else ("max", "")
    return cores if limit == "max" else min(cores, int(limit) // int(period))
