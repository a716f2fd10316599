"""What does sharing one frozen trunk save, in memory, in start-up and per round?

A GPT-2-sized trunk (12 layers, width 768, 50,257 tokens: 123.7 M parameters) and four actors on one node, as a run has
them: two generators and two reward models.

1. Memory. Proportional set size (PSS: a page that n processes map counts 1/n in each) of the actors, the driver and the
   raylet, before the trunk is published and after all four actors have mounted it and touched every page. The growth,
   over the trunk's bytes, is `pss_copies`; the published heads (the untied lm matrix alone is a third of the trunk) are
   counted apart, in `pss_copies_with_heads`. Then each actor copies the trunk into a model of its own.
2. Start-up. Mounting the mapped arrays, against the cheapest copying load (memory allocated but not initialised, then
   copied from the same mapped arrays) and against reading a safetensors file into such a model. A B C A B C in the same
   actor; the quickest of each, because other work on the machine only adds.
3. Per round. `ray.put` of the heads and their arrival in a generator and a reward actor, against the whole model.

--quick: 4 layers, width 256. Linux only (PSS).
Run: python benchmarks/trunk_sharing.py [--quick] [--seeds N]. The last line is one JSON object: `pss_copies`,
`attach_speedup`, `heads_bytes`, `model_bytes`, and the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch

from actors.trunk_store import Blueprint, fetch, load_heads, mount, publish, seal, to_arrays, to_tensors
from benchmarks.models import print_table, summarise
from grpo.checkpoint import load_checkpoint, save_checkpoint
from grpo.config import ModelSection, RewardSection
from grpo.model import GPT
from grpo.tokenizer import Vocabulary
from pipelines.launch import quiet, start_ray

KINDS = ("generator", "generator", "reward", "reward")
RESIDUAL = 256
REPEATS = 5


class Holder:
    """An actor's process: mounts, copies, takes heads, and says how long that took and what memory it holds."""

    def __init__(self, blueprint: Blueprint, kind: str, dtype: torch.dtype) -> None:
        torch.set_num_threads(1)
        self.blueprint, self.kind, self.dtype = blueprint, kind, dtype
        self.residual = RESIDUAL if kind == "generator" else 0
        tiny = replace(blueprint, model=ModelSection(n_layer=1, n_head=1, n_embd=8), vocabulary=Vocabulary(8))
        self.model = tiny.build(kind)  # what every process loads once is loaded now, and counts for nobody
        self.touch()

    def pid(self) -> int:
        return os.getpid()

    def mount(self, trunk: bytes, heads: bytes) -> float:
        """Seconds from the reference to a model that can run."""
        self.model = None  # freeing the one before is not counted
        started = time.perf_counter()
        self.model = mount(self.blueprint, self.kind, fetch(trunk), fetch(heads), lm_residual=self.residual)
        return time.perf_counter() - started

    def touch(self) -> float:
        """Read every page of the model, so that it counts."""
        return sum(float(tensor.sum()) for tensor in (*self.model.parameters(), *self.model.buffers()))

    def own(self) -> GPT:
        """A model on memory of its own, not initialised."""
        with torch.device("meta"):
            model = self.blueprint.build(self.kind)
            if self.kind == "generator":
                model.untie(self.residual)
        model.trunk.to(self.dtype)
        return model.to_empty(device="cpu")

    def copy(self, trunk: bytes, heads: bytes) -> float:
        """The same from the same reference, copied."""
        self.model = None  # freeing the one before is not counted
        started = time.perf_counter()
        model = self.own()
        model.trunk.load_state_dict(to_tensors(fetch(trunk)))
        model.heads.load_state_dict(to_tensors(fetch(heads)))
        self.model = model
        return time.perf_counter() - started

    def read(self, folder: str) -> float:
        """The same from a checkpoint on disk (in the page cache), copied."""
        self.model = None  # freeing the one before is not counted
        started = time.perf_counter()
        model = self.own()
        model.load_state_dict(load_checkpoint(Path(folder)).tensors)
        self.model = model
        return time.perf_counter() - started

    def receive_heads(self, heads: Any) -> float:
        started = time.perf_counter()
        load_heads(self.model, heads)
        return time.perf_counter() - started

    def receive_model(self, trunk: Any, heads: Any) -> float:
        """What a system that publishes whole models does with one: copy it into the model that it has."""
        started = time.perf_counter()
        self.model.trunk.load_state_dict(to_tensors(trunk))
        self.model.heads.load_state_dict(to_tensors(heads))
        return time.perf_counter() - started


def pss(pids: list[int]) -> int:
    return sum(psutil.Process(pid).memory_full_info().pss for pid in pids)


def size(state: dict[str, Any]) -> int:
    return sum(array.nbytes for array in to_arrays(state).values())


def measure(section: ModelSection, dtype: torch.dtype, seed: int, scratch: Path) -> dict[str, float]:
    """All figures, in a Ray of their own: pages that were mapped once stay mapped, and would count."""
    import ray

    start_ray()
    blueprint = Blueprint(model=section, vocabulary=Vocabulary(50257), block_size=256, reward=RewardSection())
    torch.manual_seed(seed)
    base = blueprint.build("generator")
    base.untie(RESIDUAL)
    base.trunk.to(dtype)
    scoring = blueprint.build("reward").heads.state_dict()
    sizes = {"trunk": size(base.trunk.state_dict()), "heads": size(base.heads.state_dict()) + size(scoring)}
    checkpoint = scratch / f"{dtype}-{seed}".replace(".", "-")
    save_checkpoint(checkpoint, base, config={})
    actors = [ray.remote(num_cpus=0)(Holder).remote(blueprint, kind, dtype) for kind in KINDS]
    pids = [os.getpid(), *ray.get([actor.pid.remote() for actor in actors]),
            *(child.pid for child in psutil.Process().children(recursive=True) if "raylet" == child.name())]
    before = pss(pids)
    heads = {"generator": publish(base.heads.state_dict()), "reward": publish(scoring)}
    trunk = publish(base.trunk.state_dict())
    sealed = {kind: (seal(trunk), seal(heads[kind])) for kind in heads}
    ray.get([actor.mount.remote(*sealed[kind]) for actor, kind in zip(actors, KINDS, strict=True)])
    ray.get([actor.touch.remote() for actor in actors])
    shared = pss(pids) - before
    ray.get([actor.copy.remote(*sealed[kind]) for actor, kind in zip(actors, KINDS, strict=True)])
    ray.get([actor.touch.remote() for actor in actors])
    copied = pss(pids) - before

    print(f"{dtype}: shared {shared / sizes['trunk']:.2f} and copied {copied / sizes['trunk']:.2f} trunks", flush=True)
    ways = {"mount": lambda: actors[0].mount.remote(*sealed["generator"]),
            "copy": lambda: actors[0].copy.remote(*sealed["generator"]),
            "read": lambda: actors[0].read.remote(str(checkpoint))}
    seconds = {way: [] for way in ways}
    for _ in range(REPEATS):
        for way, start in ways.items():
            seconds[way].append(ray.get(start()))
    attach = {way: min(times) for way, times in seconds.items()}

    def publish_heads() -> None:
        new = {kind: publish(state) for kind, state in (("generator", base.heads.state_dict()), ("reward", scoring))}
        ray.get([actors[0].receive_heads.remote(new["generator"]), actors[2].receive_heads.remote(new["reward"])])

    def publish_model() -> None:
        new = {kind: publish(state) for kind, state in (("generator", base.heads.state_dict()), ("reward", scoring))}
        whole = publish(base.trunk.state_dict())
        ray.get([actors[0].receive_model.remote(whole, new["generator"]),
                 actors[2].receive_model.remote(whole, new["reward"])])

    ray.get([actors[0].mount.remote(*sealed["generator"]), actors[2].mount.remote(*sealed["reward"])])
    heads_ms = [_timed(publish_heads) for _ in range(REPEATS)]
    ray.get([actors[0].copy.remote(*sealed["generator"]), actors[2].copy.remote(*sealed["reward"])])
    model_ms = [_timed(publish_model) for _ in range(REPEATS)]
    ray.shutdown()
    return {
        "trunk_bytes": sizes["trunk"], "heads_bytes": sizes["heads"], "model_bytes": sizes["trunk"] + sizes["heads"],
        "pss_copies": (shared - sizes["heads"]) / sizes["trunk"], "pss_copies_with_heads": shared / sizes["trunk"],
        "pss_copies_when_copying": copied / sizes["trunk"],
        **{f"{way}_ms": 1000 * value for way, value in attach.items()},
        "attach_speedup": attach["copy"] / attach["mount"],
        "publish_heads_ms": statistics.median(heads_ms), "publish_model_ms": statistics.median(model_ms),
    }


def _timed(call: Any) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a trunk of 16 M parameters")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with this many seeds")
    args = parser.parse_args()
    if not hasattr(psutil.Process().memory_full_info(), "pss"):
        sys.exit("error: this system does not report PSS; run on Linux")
    print(__doc__.splitlines()[0], flush=True)
    quiet()
    size = {"n_layer": 4, "n_head": 4, "n_embd": 256} if args.quick else {"n_layer": 12, "n_head": 12, "n_embd": 768}
    tables = {}
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in (torch.float32, torch.bfloat16):
            tables[str(dtype).removeprefix("torch.")] = [measure(ModelSection(**size), dtype, seed, Path(scratch))
                                                         for seed in range(args.seeds)]
    figures = list(tables["float32"][0])
    print_table("memory", _columns(tables, [name for name in figures if "pss" in name]))
    print_table("start-up", _columns(tables, ["mount_ms", "copy_ms", "read_ms", "attach_speedup"]))
    print_table("per round", _columns(tables, [name for name in figures if "publish" in name or "bytes" in name]))
    print(json.dumps({**summarise(tables["float32"]), "seeds": args.seeds, "quick": args.quick,
                      "rows": {name: summarise(runs) for name, runs in tables.items()}}))


def _columns(tables: dict[str, list[dict[str, float]]], names: list[str]) -> dict[str, list[dict[str, float]]]:
    return {row: [{name: run[name] for name in names} for run in runs] for row, runs in tables.items()}


if __name__ == "__main__":
    main()
