"""What does logging to MLflow cost a round, and how much does the SQLite store take?

1. Rounds of `configs/tiny.yaml` in this process, A B A B: while every second one is at work, the figures of the one
   before go to a SQLite store, as in `pipelines/grpo.py`. `share_of_round` is what the tracker takes of such a round:
   the seconds that the loop spends in `log`, plus the CPU seconds of the background thread, which cost nothing where a
   core is to spare. `share_blocked` is the loop's part alone; `share_a_b` is how much longer the median round with
   logging took.
2. `metrics_per_s`: steps of 20 figures, from the first `log` until all are stored. The same by MLflow's own calls, one
   metric, one step of 20, and 1,000 at a time: `calls_per_s`.

Run: python benchmarks/tracking_cost.py [--quick] [--seeds N]. The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import configure, dataset_of, parse, print_table, summarise

# isort: split
import torch

from benchmarks.adversarial import Adversary
from grpo.config import TrackingSection
from grpo.model import GPT
from pipelines.tracking import Tracker

WIDTH = 20
"""Figures of a step."""
SIZES = {"one metric": 1, "a step of 20": WIDTH, "1,000 metrics": 1000}


def thread_seconds() -> float:
    """CPU seconds of the tracker's background thread, which is named `tracking`."""
    (thread,) = (each for each in threading.enumerate() if each.name == "tracking")
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def rounds(adversary: Adversary, tracker: Tracker, num: int) -> dict[str, float]:
    """Shares of a round, over `num` rounds with logging and as many without, in turn."""
    adversary.round(0, train_generator=False, reward_steps=4)
    metrics = adversary.round(1)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    blocked = background = 0.0
    for index in range(2 * num):
        logs, before, started = index % 2 == 1, thread_seconds(), time.perf_counter()
        if logs:
            tracker.log(metrics, index)
            blocked += time.perf_counter() - started
        metrics = adversary.round(index + 2)
        seconds[logs].append(time.perf_counter() - started)
        if logs:
            tracker.flush()  # what a round left behind is counted as its own
            background += thread_seconds() - before
    with_log = sum(seconds[True])
    return {
        "share_of_round": (blocked + background) / with_log,
        "share_blocked": blocked / with_log,
        "share_a_b": statistics.median(seconds[True]) / statistics.median(seconds[False]) - 1,
        "round_s": statistics.median(seconds[False]),
        "figures_per_round": float(len(metrics)),
    }


def throughput(tracker: Tracker, steps: int) -> dict[str, float]:
    """Metrics per second through the tracker, and how long one `log` holds up its caller."""
    figures = [{f"throughput/{name}": float(name) for name in range(WIDTH)}] * steps
    started = time.perf_counter()
    for step, row in enumerate(figures):
        tracker.log(row, step)
    logged = time.perf_counter()
    if not tracker.flush(600):
        raise TimeoutError("the SQLite store did not take the metrics within 600 s")
    stored = time.perf_counter()
    return {"metrics_per_s": steps * WIDTH / (stored - started), "log_us": 1e6 * (logged - started) / steps}


def calls(tracker: Tracker, seconds: float) -> dict[str, float]:
    """MLflow's own calls per second, by metrics in each."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client, run_id, rates = MlflowClient(tracking_uri=tracker.uri), tracker.run_id, {}
    for name, size in SIZES.items():
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            now = time.time_ns() // 1_000_000
            client.log_batch(run_id, metrics=[Metric(f"calls/{size}-{index}", 1.0, now, done) for index in range(size)])
            done += 1
        rates[name] = done / (time.perf_counter() - started)
    return rates


def main() -> None:
    args = parse(__doc__)
    runs, tables = [], []
    for seed in range(args.seeds):
        config = configure(args, seed)
        dataset = dataset_of(config)
        torch.manual_seed(seed)
        base = GPT(config.model, dataset.vocabulary, block_size=config.data.block_size).eval()
        with tempfile.TemporaryDirectory() as root, Tracker(TrackingSection(), Path(root) / "run", "run") as tracker:
            tracker.flush(600)  # the store's tables are made
            figures = rounds(Adversary(config, dataset, base), tracker, 4 if args.quick else 15)
            figures |= throughput(tracker, 100 if args.quick else 1000)
            rates = calls(tracker, 2 if args.quick else 10)
        runs.append(figures)
        tables.append(rates)
    print_table("a round", {name: [{"value": run[name]} for run in runs] for name in runs[0]})
    print_table("MLflow's calls on SQLite", {
        name: [{"calls_per_s": rates[name], "metrics_per_s": rates[name] * size} for rates in tables]
        for name, size in SIZES.items()})
    print(json.dumps(summarise(runs) | {"calls_per_s": tables[0], "seeds": args.seeds, "quick": args.quick}))


if __name__ == "__main__":
    main()
