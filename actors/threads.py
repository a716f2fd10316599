"""How many torch threads a process gets: the CPUs that its machine, or its container, grants it, shared out."""

from __future__ import annotations

import os
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of CPU time and of the period in which it may take them (cgroup v2), or `max` and the period."""


def worker_threads(requested: int, num_workers: int) -> int:
    """Torch threads of one of `num_workers` busy processes where this one runs; `requested` > 0 wins."""
    return requested or max(1, _cores() // num_workers)


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit, period = CPU_MAX.read_text().split() if CPU_MAX.exists() else ("max", "")
    return cores if limit == "max" else min(cores, int(limit) // int(period))
