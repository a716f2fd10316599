"""What does a killed process cost? Every kind, at random moments, in runs of `pipelines/grpo.py` on 3 nodes.

1. The undisturbed run is the same rounds in this process, without the pipeline and without Ray Train. In each disturbed
   run every kind of fault happens once, in a random order, at a random moment within a round.
2. Kinds: SIGKILL to a generator actor, a reward actor, the Train worker (`learner`), the driver, a whole node (the one
   that holds the learner; another node joins); SIGTERM to the driver, which leaves by itself; and a full object store
   (one and a half times its size is held on every node, so that objects must be spilled). Whoever lost the driver
   starts the same command again.
3. Lost: finished rounds that were done again, plus the round in flight where its learner was killed. Seconds to
   recover: from the fault until two more rounds are checkpointed, less what two undisturbed rounds take. For the full
   store they count from when it is full; the learner stands still while it fills, which takes as long as many rounds.
4. At the end the trained heads and all figures of all rounds (but times) are compared with the undisturbed run's, and
   MLflow must hold each round exactly once.

The nodes are processes of one machine (`ray.cluster_utils.Cluster`), the model is tiny and not trained: a round takes a
fraction of a second, and what is measured is detection and restart. --quick: one disturbed run, and of the kinds only
the two actors and the Train worker, because each start of a driver takes half a minute on two cores.
Run: python benchmarks/faults.py [--quick] [--seeds N]. The last line is one JSON object: `rows`, `lost_rounds_max`,
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch

from benchmarks.models import print_table, summarise
from grpo.checkpoint import load_checkpoint, save_checkpoint
from grpo.config_file import load_config
from grpo.data import open_dataset
from grpo.model import GPT
from grpo.run_checkpoints import latest_checkpoint
from pipelines.grpo import Paths, start_actors
from pipelines.launch import NO_DASHBOARD, quiet, start_ray
from pipelines.prepare import prepare
from pipelines.ranks import Ranks
from pipelines.rounds import train

ROOT = Path(__file__).resolve().parent.parent
ACTORS = {"generator": "ray::Generator", "reward": "ray::Reward", "learner": "ray::RayTrainWorker"}
FAULTS = (*ACTORS, "driver", "node", "SIGTERM", "full store")
QUICK = tuple(ACTORS)
WARMUP, FIRST, APART = 2, 4, 6
"""Rounds without the generator's phase, before the first fault, and of each fault: to aim, to be struck, to recover."""
STORE_BYTES, BALLAST_BYTES = 100 * 2**20, 2**20
CONFIG = f"""
data: {{block_size: 20}}
model: {{n_layer: 1, n_head: 2, n_embd: 16}}
grpo: {{prompts: 8, group_size: 4, prompt_tokens: 4, residual: 8, rollout_actors: 2, keep: 1000}}
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
            "num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False, "env_vars": NO_DASHBOARD})
        self.workers = [self.add(), self.add()]

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=3, object_store_memory=STORE_BYTES, env_vars=NO_DASHBOARD)

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
        return written(self.folder)

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
        return {"summary": json.loads((self.folder / "summary.json").read_text()), **finished(self.folder)}


def written(folder: Path) -> dict[int, int]:
    """When each round's checkpoint was written, in nanoseconds."""
    found = folder.glob("checkpoints/step-*")
    return {int(path.name.rpartition("-")[2]): path.stat().st_ctime_ns for path in found}


def finished(folder: Path) -> dict[str, Any]:
    """A finished run's last checkpoint's history, and its final heads."""
    tensors = load_checkpoint(folder / "final").tensors
    return {"history": load_checkpoint(latest_checkpoint(folder / "checkpoints")).state["history"],
            "heads": {name: tensor for name, tensor in tensors.items() if name.startswith("heads.")}}


def undisturbed(options: list[str], base: Path, folder: Path) -> None:
    """Save an untrained base model, and the rounds over it, in this process."""
    config = load_config(overrides=options[2:], path=options[1])
    dataset = prepare(config.data, config.run.cache)
    tokenizer = open_dataset(dataset).tokenizer
    torch.manual_seed(0)
    model = GPT(config.model, tokenizer.vocabulary, block_size=config.data.block_size)
    save_checkpoint(base, model, config={}, tokenizer=tokenizer)
    with start_actors(config, Paths(dataset=dataset, base=base, judge=Path()), folder) as job:
        train(job, Ranks(), lambda figures, step: None, lambda done, total, shown: False)


def aim(nodes: Nodes, kind: str, rng: random.Random) -> Any:
    """What a fault will hit, found beforehand: looking takes as long as a round."""
    if kind in ACTORS:
        return rng.choice(nodes.processes(kind))
    (learner,) = nodes.processes("learner")
    return nodes.of(learner) if kind == "node" else learner


def strike(run: Run, kind: str, target: Any) -> Any:
    """Let one fault happen; returns when whoever was killed is gone, with what must be held until the run goes on."""
    if kind in ACTORS:
        _kill(target)
    elif kind == "node":
        run.nodes.kill(target)
    elif kind == "full store":
        with standing_still(target):
            return fill_stores()
    else:
        run.driver.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        code = run.driver.wait(PATIENCE_S)
        assert code == (143 if kind == "SIGTERM" else -signal.SIGKILL), code
    return None


@contextmanager
def standing_still(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def fill_stores() -> list[Any]:
    """One and a half times its size in every node's store, one task's results each; they lie there as long as held."""
    import numpy as np
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    count = 3 * STORE_BYTES // (2 * BALLAST_BYTES)

    def ballast() -> list[np.ndarray]:
        return [np.ones(BALLAST_BYTES, np.uint8)] * count

    held = [piece for node in ray.nodes() if node["Alive"] for piece in ray.remote(
        num_cpus=0, num_returns=count,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))(ballast).remote()]
    ready, _ = ray.wait(held, num_returns=len(held), timeout=PATIENCE_S, fetch_local=False)
    assert len(ready) == len(held), "the ballast did not fit"
    return held


def disturb(run: Run, faults: tuple[str, ...], round_s: float, rng: random.Random) -> list[dict[str, Any]]:
    """All faults in a random order, one after another; a row each."""
    rows = []
    run.wait_for_round(FIRST)
    for kind in rng.sample(faults, len(faults)):
        learner, target = run.nodes.processes("learner"), aim(run.nodes, kind, rng)
        run.wait_for_round(max(run.written()) + 1)
        time.sleep(rng.uniform(0, round_s))
        started = time.monotonic()
        held = strike(run, kind, target)
        if kind == "full store":
            started = time.monotonic()
        before = run.written()
        if kind in ("driver", "SIGTERM"):
            run.drive()
        elif kind == "node":
            run.nodes.workers.append(run.nodes.add())
        run.wait_for_round(max(before) + 2)
        seconds = time.monotonic() - started - 2 * round_s
        del held
        again = [round for round, when in run.written().items() if before.get(round, when) != when]
        in_flight = kind != "SIGTERM" and run.nodes.processes("learner") != learner
        rows.append({"fault": kind, "round": max(before), "lost": len(again) + in_flight,
                     "recover_s": max(seconds, 0.0)})
        print(f"  {kind} after round {max(before)}: {rows[-1]['lost']} lost, {seconds:.1f} s", flush=True)
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


def rounds_in_mlflow(output: Path, summary: dict[str, Any]) -> list[int]:
    """Steps of the metric that every round logs, as the store holds them."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    return sorted(point.step for point in client.get_metric_history(summary["mlflow_run_id"], "reward_accuracy"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one disturbed run, three kinds of faults")
    parser.add_argument("--seeds", type=int, default=3, help="disturbed runs, each with its own order and moments")
    args = parser.parse_args()
    print(__doc__.splitlines()[0], flush=True)
    quiet()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    faults, seeds = (QUICK, 1) if args.quick else (FAULTS, args.seeds)
    rounds = FIRST + APART * len(faults)
    rows, ends = [], []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "text.txt").write_text(text())
        (scratch / "config.yaml").write_text(CONFIG)
        output = scratch / "runs"
        output.mkdir()
        options = ["--config", str(scratch / "config.yaml"), f"data.source={scratch / 'text.txt'}", "run.threads=1",
                   f"run.output={output}", f"run.cache={scratch / 'cache'}", f"grpo.base={scratch / 'base'}",
                   f"grpo.rounds={rounds - WARMUP}"]
        nodes = Nodes()
        os.environ["RAY_ADDRESS"] = nodes.cluster.address
        start_ray()
        undisturbed(options, scratch / "base", output / "undisturbed")
        expected = finished(output / "undisturbed")
        when = sorted(written(output / "undisturbed").values())
        round_s = statistics.median(b - a for a, b in zip(when, when[1:], strict=False)) / 1e9
        print(f"undisturbed: {rounds} rounds, {round_s:.2f} s each", flush=True)
        for seed in range(seeds):
            print(f"disturbed run {seed + 1}", flush=True)
            run = Run(nodes, output / f"disturbed-{seed}", [*options, f"run.name=disturbed-{seed}"])
            try:
                mine = disturb(run, faults, round_s, random.Random(seed))
                found = run.finish()
            finally:
                run.driver.kill()
            whole = rounds_in_mlflow(output, found["summary"]) == list(range(1, rounds + 1))
            apart = difference(found, expected)
            ends.append({"recovered": float(whole and apart == 0), "difference": apart,
                         "each round once in MLflow": float(whole)})
            rows += mine
        ray.shutdown()
        nodes.cluster.shutdown()
    print_table("fault", {kind: [{"lost rounds": max(row["lost"] for row in rows if row["fault"] == kind),
                                  **{f"recover_s {what}": pick([row["recover_s"] for row in rows
                                                                if row["fault"] == kind])
                                     for what, pick in (("median", statistics.median), ("max", max))}}]
                          for kind in faults})
    print_table("end", {f"disturbed run {seed + 1}": [end] for seed, end in enumerate(ends)})
    print(json.dumps({"lost_rounds_max": max(row["lost"] for row in rows),
                      **summarise([{"recovered": end["recovered"]} for end in ends]),
                      "max_difference": max(end["difference"] for end in ends), "round_s": round_s,
                      "quick": args.quick, "rows": rows}))


if __name__ == "__main__":
    main()
