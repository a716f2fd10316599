"""Data parallelism inside a Ray Train worker.

1. Learners know no ranks: they get `wrap`, which makes a module data-parallel, and `all_reduce`.
2. A world of one needs neither, so it has neither.
3. What one rank alone would leave at, all ask each other before (`agreed`): the others would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.torch_setup import set_up_torch, worker_threads


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Data parallelism as a loop sees it: a rank among others, what wraps a module, what reduces a tensor."""

    rank: int = 0
    world: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    all_reduce: Callable[..., Tensor] = lambda tensor, op="sum": tensor
    device: str = "cpu"


def worker_ranks(threads: int) -> Ranks:
    """The ranks of this Ray Train worker; sets it up, threads on a CPU alone (`threads`; 0 shares out the cores)."""
    import ray.train
    import ray.train.torch

    context, device = ray.train.get_context(), ray.train.torch.get_device()
    set_up_torch(device, worker_threads(threads, context.get_local_world_size()) if device.type == "cpu" else None)
    rank, world = context.get_world_rank(), context.get_world_size()
    if world == 1:
        return Ranks(device=str(device))
    return Ranks(rank=rank, world=world, wrap=_data_parallel, all_reduce=_all_reduce, device=str(device))


def agreed(value: int, ranks: Ranks) -> int:
    """The largest of all ranks' values."""
    return int(ranks.all_reduce(torch.tensor(value, device=ranks.device), "max"))


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Raise a ValueError, on every rank, unless each sees what the driver has begun in a run's folder.

    A rank elsewhere would make the folder on its own node's disk, train to the end, and leave the model there.
    """
    if agreed(int(not (folder / "config.yaml").exists()), ranks):
        raise ValueError(f"run.output, run.cache: not every process of the run sees {folder}: set them to storage that "
                         "all nodes share")


def _data_parallel(module: nn.Module) -> nn.Module:
    """DDP that lets heads which have not joined yet go without gradients."""
    return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)


def _all_reduce(tensor: Tensor, op: str = "sum") -> Tensor:
    dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return tensor
