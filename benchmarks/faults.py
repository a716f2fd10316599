"""What does a killed process cost? Every kind, at random moments, in runs of `pipelines/grpo.py` on 3 nodes.

1. One undisturbed run. Then disturbed ones, in each of which every kind of fault happens once, in a random order, some
   rounds apart, at a random moment within the round.
2. Kinds: SIGKILL to a generator actor, a reward actor, the Train worker (`learner`), the driver, a whole node (the one
   that holds the learner; another node joins); SIGTERM to the driver, which leaves by itself; and a full object store
   (one and a half times its size is put on every node, so that objects must be spilled). Whoever lost the driver starts
   the same command again.
3. Lost: finished rounds that were done again, plus the round in flight where its learner was killed. Seconds to
   recover: until two more rounds are checkpointed, less what two undisturbed rounds take.
4. At the end the trained heads and all figures of all rounds (but times) are compared with the undisturbed run's, and
   MLflow must hold each round exactly once.

The nodes are processes of one machine (`ray.cluster_utils.Cluster`), the model is tiny: a round takes a fraction of a
second, and what is measured is detection and restart. --quick: one disturbed run instead of three.
Run: python benchmarks/faults.py [--quick] [--runs N]. The last line is one JSON object: `rows`, `lost_rounds_max`,
`recovered` (the share of faults after which the run went on and ended as the undisturbed one), `max_difference`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from benchmarks.models import print_table
from grpo.checkpoint import latest_checkpoint, load_checkpoint
from pipelines.launch import quiet

ROOT = Path(__file__).resolve().parent.parent
ACTORS = {"generator": "ray::Generator", "reward": "ray::Reward", "learner": "ray::RayTrainWorker"}
FAULTS = (*ACTORS, "driver", "node", "SIGTERM", "full store")
WARMUP, FIRST, APART = 2, 4, 4
ROUNDS = FIRST + APART * len(FAULTS)
STORE_BYTES = 100 * 2**20
CONFIG = f"""
data: {{block_size: 20}}
model: {{n_layer: 1, n_head: 2, n_embd: 16}}
critic: {{start: 4, end: 6}}
sampler: {{start: 2}}
pretrain: {{steps: 8, batch_size: 8, eval_rows: 8}}
grpo: {{rounds: {ROUNDS - WARMUP}, prompts: 8, group_size: 4, prompt_tokens: 4, residual: 8, rollout_actors: 2,
  keep: 1000}}
reward: {{hidden: 16, batch_size: 16, warmup_rounds: {WARMUP}, warmup_steps: 2, min_steps: 1, max_steps: 2,
  replay_rounds: 2}}
evaluation: {{samples: 40, judge_steps: 8, judge_layers: 1, judge_width: 16}}
"""
TIMES = ("seconds/", "time/", "tokens_per_s")
"""Beginnings of the names of figures that no seed decides."""
PATIENCE_S = 600.0


def text() -> str:
    """A corpus that takes no time to tokenize."""
    return "".join(f"{number} times {number} is {number * number}. " for number in range(3000))


class Nodes:
    """A head without CPUs, where the driver lives, and two workers."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={
            "num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False})
        self.workers = [self.add(), self.add()]

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=3, object_store_memory=STORE_BYTES)

    def kill(self, node: Any) -> None:
        """SIGKILL to everything of a node."""
        processes = _below(_raylet(node))
        self.cluster.remove_node(node, allow_graceful=False)
        for process in processes:
            _kill(process)
        self.workers.remove(node)

    def processes(self, kind: str) -> list[psutil.Process]:
        """Of one kind of actor, on all nodes."""
        return [process for node in self.workers + [self.cluster.head_node] for process in _below(_raylet(node))
                if _title(process).startswith(ACTORS[kind])]

    def of(self, process: psutil.Process) -> Any:
        """The worker node that a process belongs to."""
        return next(node for node in self.workers if process in _below(_raylet(node)))


def _raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        pass


class Run:
    """One run of the pipeline, whoever drives it at the moment."""

    def __init__(self, nodes: Nodes, folder: Path, options: list[str]) -> None:
        self.nodes, self.folder = nodes, folder
        self.command = [sys.executable, str(ROOT / "pipelines" / "grpo.py"), *options]
        self.log = folder.with_suffix(".log").open("w")
        self.drive()

    def drive(self) -> None:
        environment = {**os.environ, "RAY_ADDRESS": self.nodes.cluster.address}
        self.driver = subprocess.Popen(self.command, stdout=self.log, stderr=self.log, env=environment)

    def written(self) -> dict[int, int]:
        """When each round's checkpoint was written."""
        found = self.folder.glob("checkpoints/step-*")
        return {int(path.name.rpartition("-")[2]): path.stat().st_ctime_ns for path in found}

    def wait(self, what: str, holds: Callable[[], bool]) -> None:
        """Until something holds; the driver must live, and patience ends."""
        end = time.monotonic() + PATIENCE_S
        while not holds():
            if self.driver.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{self.folder.name} did not reach {what}; the driver's code is "
                                   f"{self.driver.poll()}:\n{Path(self.log.name).read_text()}")
            time.sleep(0.01)

    def wait_for_round(self, round: int) -> None:
        self.wait(f"round {round}", lambda: max(self.written(), default=0) >= round)

    def finish(self) -> dict[str, Any]:
        """What it ended with."""
        if self.driver.wait(PATIENCE_S):
            raise RuntimeError(f"{self.folder.name} ended with code {self.driver.returncode}:\n"
                               f"{Path(self.log.name).read_text()}")
        return finished(self.folder)


def finished(folder: Path) -> dict[str, Any]:
    """A finished run's summary, its last checkpoint's history, and the final heads."""
    tensors = load_checkpoint(folder / "final").tensors
    return {"summary": json.loads((folder / "summary.json").read_text()),
            "history": load_checkpoint(latest_checkpoint(folder / "checkpoints")).state["history"],
            "heads": {name: tensor for name, tensor in tensors.items() if name.startswith("heads.")}}


def strike(run: Run, kind: str, rng: random.Random) -> None:
    """Let one fault happen; returns when whoever was killed is gone."""
    nodes = run.nodes
    if kind in ACTORS:
        _kill(rng.choice(nodes.processes(kind)))
    elif kind == "node":
        nodes.kill(nodes.of(nodes.processes("learner")[0]))
        nodes.workers.append(nodes.add())
    elif kind == "full store":
        fill_stores(nodes)
    else:
        run.driver.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        code = run.driver.wait(PATIENCE_S)
        assert code == (143 if kind == "SIGTERM" else -signal.SIGKILL), code
        run.drive()


def fill_stores(nodes: Nodes) -> None:
    """Hold one and a half times its size in every node's store, through two tasks' results; let go at once after."""
    import numpy as np
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def ballast() -> np.ndarray:
        return np.ones(STORE_BYTES // 4, np.uint8)

    held = [ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))(
        ballast).remote() for node in ray.nodes() if node["Alive"] for _ in range(6)]
    ready, _ = ray.wait(held, num_returns=len(held), timeout=PATIENCE_S, fetch_local=False)
    assert len(ready) == len(held), "the ballast did not fit"


def disturb(run: Run, round_s: float, rng: random.Random) -> list[dict[str, Any]]:
    """All faults, one after another; a row each."""
    rows = []
    for index, kind in enumerate(rng.sample(FAULTS, len(FAULTS))):
        run.wait_for_round(FIRST + APART * index)
        time.sleep(rng.uniform(0, round_s))
        learner, before = run.nodes.processes("learner"), run.written()
        at, started = max(before), time.monotonic()
        strike(run, kind, rng)
        run.wait_for_round(at + 2)
        seconds = time.monotonic() - started - 2 * round_s
        again = [round for round, when in run.written().items() if before.get(round, when) != when]
        in_flight = kind != "SIGTERM" and run.nodes.processes("learner") != learner
        rows.append({"fault": kind, "round": at, "lost": len(again) + in_flight, "recover_s": max(seconds, 0.0)})
        print(f"  {kind} after round {at}: {rows[-1]['lost']} lost, {seconds:.1f} s", flush=True)
    return rows


def difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest relative difference of any round's figure or any head's value."""
    worst = 0.0
    for row, wanted in zip(found["history"], expected["history"], strict=True):
        assert row.keys() == wanted.keys()
        worst = max([worst, *(abs(row[name] - value) / max(abs(value), 1e-12) for name, value in wanted.items()
                              if not name.startswith(TIMES))])
    for name, tensor in expected["heads"].items():
        worst = max(worst, float((found["heads"][name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-12)))
    return worst


def rounds_in_mlflow(scratch: Path, summary: dict[str, Any]) -> list[int]:
    """Steps of the metric that every round logs, as the store holds them."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{scratch / 'runs' / 'mlflow.db'}")
    return sorted(point.step for point in client.get_metric_history(summary["mlflow_run_id"], "reward_accuracy"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one disturbed run")
    parser.add_argument("--runs", type=int, default=3, help="disturbed runs, each with all faults")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    print(__doc__.splitlines()[0], flush=True)
    quiet()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    rows, ends = [], []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "text.txt").write_text(text())
        (scratch / "config.yaml").write_text(CONFIG)
        nodes = Nodes()
        ray.init(address=nodes.cluster.address, logging_level="ERROR", log_to_driver=False)
        (scratch / "runs").mkdir()

        def start(name: str) -> Run:
            return Run(nodes, scratch / "runs" / name, [
                "--config", str(scratch / "config.yaml"), f"data.source={scratch / 'text.txt'}", f"run.name={name}",
                f"run.output={scratch / 'runs'}", f"run.cache={scratch / 'cache'}", "run.threads=1"])

        steady = start("steady")
        expected = steady.finish()
        when = sorted(steady.written().values())
        round_s = statistics.median(b - a for a, b in zip(when, when[1:], strict=False)) / 1e9
        print(f"undisturbed: {ROUNDS} rounds, {round_s:.2f} s each", flush=True)
        for number in range(1 if args.quick else args.runs):
            print(f"disturbed run {number + 1}", flush=True)
            run = start(f"disturbed-{number}")
            mine = disturb(run, round_s, random.Random(args.seed + number))
            found = run.finish()
            whole = rounds_in_mlflow(scratch, found["summary"]) == list(range(1, ROUNDS + 1))
            ends.append({"difference": difference(found, expected), "each round once in MLflow": float(whole)})
            rows += [row | {"ok": float(whole and ends[-1]["difference"] == 0)} for row in mine]
        ray.shutdown()
        nodes.cluster.shutdown()
    print_table("fault", {kind: [{"lost rounds": max(row["lost"] for row in rows if row["fault"] == kind),
                                  **{f"recover_s {what}": pick([row["recover_s"] for row in rows
                                                                if row["fault"] == kind])
                                     for what, pick in (("median", statistics.median), ("max", max))}}]
                          for kind in FAULTS})
    print_table("end", {f"disturbed run {number + 1}": [end] for number, end in enumerate(ends)})
    print(json.dumps({"lost_rounds_max": max(row["lost"] for row in rows),
                      "recovered": statistics.fmean(row["ok"] for row in rows),
                      "max_difference": max(end["difference"] for end in ends), "round_s": round_s,
                      "quick": args.quick, "rows": rows}))


if __name__ == "__main__":
    main()
