"""One frozen trunk in the object store, mapped and not copied by every actor of a node; heads travel by themselves.

1. Tensors are stored as numpy arrays, which Ray maps read-only without a copy; bfloat16 travels as uint16, because
   numpy has no such type.
2. An actor builds its model on the meta device and assigns the mapped arrays, so the trunk's memory is never allocated.
   `assign=True` makes parameters that require gradients; they are frozen again at once. torch can write into mapped
   memory and everyone would see it: the trunk belongs to nobody's optimiser, and no DDP constructor sees it.
3. Heads change every round. Whoever only reads them maps them too: an untied lm matrix over 50,000 tokens is a third of
   a GPT-2. Where they train they are copied (`own_heads`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from grpo.config import ModelSection, RewardSection
from grpo.lora import HEADS, Trainable, load_policy_state, train_below_heads
from grpo.model import GPT
from grpo.tokenizer import Vocabulary

Arrays = dict[str, np.ndarray]

FETCH_TIMEOUT_S = 600.0
"""Seconds that an actor waits for the published trunk."""


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What is needed to build a GPT without its weights."""

    model: ModelSection
    vocabulary: Vocabulary
    block_size: int
    reward: RewardSection
    gelu: str = "none"

    def build(self, mode: str) -> GPT:
        """A GPT of these shapes with initial weights; a generator's lm head is tied."""
        return GPT(
            self.model,
            self.vocabulary,
            mode=mode,
            block_size=self.block_size,
            reward=self.reward,
            gelu=self.gelu,
        )


def to_arrays(state: dict[str, Tensor]) -> Arrays:
    """CPU arrays that share a contiguous CPU tensor's memory; bfloat16 as uint16."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return {name: (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy() for name, t in plain.items()}


def to_tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Tensors on the same memory as the arrays; tensors as they are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        tensors = {name: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for name, a in arrays.items()}
    return {name: t.view(torch.bfloat16) if t.dtype == torch.uint16 else t for name, t in tensors.items()}


def publish(state: dict[str, Tensor]) -> Any:
    """Put a state dict into the object store once; the caller keeps the reference alive."""
    import ray

    return ray.put(to_arrays(state))


def seal(reference: Any) -> bytes:
    """A reference that Ray does not see as an argument, so that an actor can be restarted with it; pins the object."""
    import ray

    return ray.cloudpickle.dumps(reference)


def fetch(given: Arrays | bytes) -> Arrays:
    """Arrays, or those behind a sealed reference, mapped."""
    if isinstance(given, dict):
        return given
    import ray

    return ray.get(ray.cloudpickle.loads(given), timeout=FETCH_TIMEOUT_S)


def attach(trunk: Arrays, device: str) -> dict[str, Tensor]:
    """The trunk for several models of one process: the mapped memory on a CPU, else one copy on the device."""
    return {name: tensor.to(device) for name, tensor in to_tensors(trunk).items()}


def share_on_gpus(actors: list[Any], timeout_s: float) -> int:
    """Let the actors of one GPU use one copy of the trunk, which the first of them lends by CUDA IPC.

    Ray Direct Transport, which Ray 2.60 calls alpha. Whoever cannot borrow keeps its own copy; so does an actor that
    is started again. The memory is the lender's: if it dies, its borrowers fail, and the run with them.

    Args:
        actors: handles with `place`, `lend` and `borrow`, made with `enable_tensor_transport`; their trunks are frozen.

    Returns:
        How many borrow.
    """
    import ray

    places, borrowed = ray.get([actor.place.remote() for actor in actors], timeout=timeout_s), 0
    for place in dict.fromkeys(places):
        lender, *others = [actor for actor, where in zip(actors, places, strict=True) if where == place]
        lent = lender.lend.options(tensor_transport="cuda_ipc").remote()
        for answer in [actor.borrow.remote(lent) for actor in others]:
            try:
                ray.get(answer, timeout=timeout_s)
                borrowed += 1
            except ray.exceptions.RayError:
                continue
    return borrowed


class Tenant:
    """What `share_on_gpus` asks of an actor that has a `model`."""

    model: GPT

    def place(self) -> tuple[str, ...]:
        """Node id and the node's ids of the GPUs that this actor may use."""
        import ray

        return (ray.get_runtime_context().get_node_id(), *map(str, ray.get_gpu_ids()))

    def lend(self) -> dict[str, Tensor]:
        """The trunk's tensors, on the GPU."""
        return dict(self.model.trunk.state_dict())

    def borrow(self, trunk: dict[str, Tensor]) -> None:
        """Work on another actor's tensors; the own copy is freed."""
        self.model.trunk.load_state_dict(trunk, assign=True)
        self.model.freeze_trunk()
        torch.cuda.empty_cache()  # what the own copy took


class _Undrawn(TorchFunctionMode):
    """Random initialisation does nothing: on the meta device it would load sympy, 67 MB and 1.7 s in every actor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = getattr(func, "__module__", "") == "torch.nn.init"
        return kwargs["tensor"] if drawn else func(*args, **kwargs)


def mount(
    blueprint: Blueprint,
    mode: str,
    trunk: Arrays | dict[str, Tensor],
    heads: Arrays,
    *,
    lm_residual: int = 0,
    device: str = "cpu",
    trainable: Trainable = HEADS,
    seed: int = 0,
) -> GPT:
    """A model that lies in the given (mapped) arrays, frozen.

    Args:
        blueprint: shapes.
        mode: `generator` or `reward`.
        trunk: `model.trunk.state_dict()` as arrays, or from `attach`.
        heads: `model.heads.state_dict()` as arrays; a generator's lm head must be untied (own its matrix).
        device: where the model works; on another device than the CPU it is copied there once.
        trainable: what trains below the heads; a trunk that trains is a copy.
        seed: of the adapters' first values.
    """
    with torch.device("meta"), _Undrawn():
        model = blueprint.build(mode)
        if mode == "generator":
            model.untie(lm_residual)
    model.trunk.load_state_dict(to_tensors(trunk), assign=True)
    model.heads.load_state_dict(to_tensors(heads), assign=True)
    model.freeze_trunk()
    model.heads.requires_grad_(False)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"still on the meta device: {left}"
    model.to(device)
    train_below_heads(model.trunk, trainable, seed)
    return model.eval()


def own_heads(model: GPT) -> GPT:
    """Copy a mounted model's heads, which may change and train from then on."""
    own = {name: tensor.clone() for name, tensor in model.heads.state_dict().items()}
    model.heads.load_state_dict(own, assign=True)
    model.heads.requires_grad_(True)
    return model


def load_heads(model: GPT, heads: Arrays) -> None:
    """Give a model that only infers new heads, and what else its policy trains (`policy_state`): mapped like the trunk
    on a CPU, copied to another device."""
    mapped = next(model.heads.parameters()).device.type == "cpu"
    load_policy_state(model.trunk, model.heads, to_tensors(heads), assign=mapped)
    model.requires_grad_(False)
