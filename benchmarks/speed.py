"""What the speed benchmarks share: alternation, the machine's own limits, the repeats and the last line.

1. Candidates are timed in turns, A B A B, in one process; a ratio is the median of the ratios of neighbouring turns,
   so a machine that slows down slows both sides of it.
2. The limits are measured in the same run: the rate of large matrix products, and of copies that miss every cache.
3. `--cpu-time` counts the process's CPU seconds in place of the wall clock's: for a machine that others use too, with
   `--threads 1` (waiting threads spin).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from actors.torch_setup import worker_threads
from benchmarks.tables import print_table, summarise
from grpo.products import linear

Figures = dict[str, float]
clock = time.perf_counter
"""Seconds, of the wall or, with `--cpu-time`, of this process's threads."""


def run(
    doc: str, measure: Callable[[argparse.Namespace, int], Figures], *, device: bool = False, under: str = ""
) -> None:
    """A benchmark's main: parse, measure once per seed, print the table and the JSON line of its figures.

    Args:
        measure: (command line, seed) -> figures by name; None where the machine has no such thing.
        device: add `--device`.
        under: put all figures under this key of the JSON object.
    """
    global clock
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and turns")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with this many seeds")
    parser.add_argument("--threads", type=int, default=worker_threads(0, 1), help="torch threads")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds, not the wall clock's")
    parser.add_argument("--cache", default="~/.cache/grpo-diffusion", help="folder of prepared data")
    if device:
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"{doc.splitlines()[0]} ({args.threads} threads)", flush=True)
    runs = []
    for seed in range(args.seeds):
        torch.set_num_threads(args.threads)
        torch.manual_seed(seed)
        runs.append(measure(args, seed))
    absent = [name for name, value in runs[0].items() if value is None]
    runs = [{name: value for name, value in figures.items() if name not in absent} for figures in runs]
    print_table("figure", {name: [{"value": figures[name]} for figures in runs] for name in runs[0]})
    figures = {name: round(value, 4) for name, value in summarise(runs).items()} | dict.fromkeys(absent)
    print(json.dumps({under: figures} if under else figures))


def require_peer(package: str, script: str) -> None:
    """End with one line where a peer is not installed."""
    if importlib.util.find_spec(package) is None:
        sys.exit(f"error: {package} is not installed here: run `make peers`, then .venv-peers/bin/python {script}")


def seconds(call: Callable[[], object]) -> float:
    started = clock()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def alternate(candidates: dict[str, Callable[[], object]], turns: int, *, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each candidate's turns, in the order A B A B; `warm` turns before them do not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warm + turns):
        for name, call in candidates.items():
            taken = seconds(call)
            if turn >= warm:
                times[name].append(taken)
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over turns of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def matmul_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """Floating-point operations per second of a product of square matrices, by the faster of torch's own way and the
    project's (`grpo/products.py`); the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    ways = (lambda: a @ b, lambda: linear(a, b))
    return 2 * size**3 / min(min(seconds(way) for _ in range(11)) for way in ways)


def copy_rate() -> float:
    """Bytes per second, read plus written, of a copy of 256 MiB; the best of five."""
    source = torch.zeros(1 << 26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(6))
