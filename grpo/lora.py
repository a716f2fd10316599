"""What trains below the generator's heads: nothing, low-rank adapters, or the whole trunk.

    adapted(x) = W x + b + (alpha / rank) B A x          (LoRA, arXiv:2106.09685)

1. A is drawn as the source draws it, from a seed of its own; B is zero. Both are made after the model's own
   initialisation, so that nothing draws B again, and the adapted trunk starts at the base's bits.
2. Every linear layer of the blocks is adapted. The base weights stay frozen, and stay where they are: their memory may
   be shared by other processes. A trunk that trains as a whole is a copy of its own.
3. A checkpoint holds the plain trunk, W + (alpha / rank) B A, so that whoever reads it needs to know no adapters; the
   adapters themselves belong to the training state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo.config import GrpoSection
from grpo.noise import uniforms
from grpo.products import linear

ADAPTER = ".adapter."
"""Part of the name of each adapter's parameters."""


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """What trains in the generator."""

    kind: str = "heads"
    """`heads`, `lora` (and heads) or `all`."""
    rank: int = 0
    """Of the adapters."""
    alpha: float = 0.0
    """Scale of the adapters, times their rank."""

    @classmethod
    def of(cls, grpo: GrpoSection) -> Trainable:
        """What a config says; without adapters their size does not count, so that heads are `HEADS`."""
        if grpo.trainable != "lora":
            return cls(kind=grpo.trainable)
        return cls(kind=grpo.trainable, rank=grpo.lora_rank, alpha=grpo.lora_alpha)


HEADS = Trainable()


class Adapter(nn.Module):
    """(alpha / rank) B A, by itself, so that what is data-parallel or optimised holds no base weight."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.scale = alpha / rank
        where = {"device": base.weight.device, "dtype": torch.promote_types(base.weight.dtype, torch.float32)}
        seeds = torch.full((rank, base.in_features), seed, dtype=torch.int64, device=base.weight.device)
        drawn = uniforms(seeds, torch.arange(seeds.numel(), device=seeds.device).view_as(seeds))
        self.down = nn.Parameter(((2 * drawn - 1) / base.in_features**0.5).to(where["dtype"]))  # Kaiming, a = sqrt(5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, **where))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the adapter's own dtype."""
        return linear(linear(x.to(self.down.dtype), self.down) * self.scale, self.up)

    def product(self) -> Tensor:
        """[out, in], what merging adds to the base's weight."""
        return self.scale * self.up @ self.down


class AdaptedLinear(nn.Module):
    """A frozen linear layer and what is added to it."""

    def __init__(self, base: nn.Linear, adapter: Adapter) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.adapter(x).to(y.dtype)


def train_below_heads(trunk: nn.Module, trainable: Trainable, seed: int) -> None:
    """Give a frozen trunk adapters that train, or weights of its own that do; for `heads` change nothing.

    Args:
        trunk: `grpo.trunk.Trunk`, frozen, its weights in place.
        seed: of the adapters' first values.
    """
    if trainable.kind == "lora":
        layers = [(name, layer) for name, layer in trunk.blocks.named_modules() if isinstance(layer, nn.Linear)]
        for index, (name, layer) in enumerate(layers):
            parent, _, own = name.rpartition(".")
            adapter = Adapter(layer, trainable.rank, trainable.alpha, seed * len(layers) + index)
            setattr(trunk.blocks.get_submodule(parent), own, AdaptedLinear(layer, adapter))
    elif trainable.kind == "all":
        trunk.load_state_dict({name: tensor.clone() for name, tensor in trunk.state_dict().items()}, assign=True)
        trunk.requires_grad_(True)
        trunk.frozen = False


def trainable_modules(trunk: nn.Module) -> dict[str, nn.Module]:
    """The parts of a trunk that train, by name; none of them holds a frozen weight."""
    adapters = [module for module in trunk.modules() if isinstance(module, Adapter)]
    if adapters:
        return {"adapters": nn.ModuleList(adapters)}
    return {} if trunk.frozen else {"trunk": trunk}


def policy_state(trunk: nn.Module, heads: nn.Module) -> dict[str, Tensor]:
    """What a policy has of its own: heads by their names and, under `trunk.`, whatever of the trunk trains."""
    below = {name: tensor for name, tensor in trunk.state_dict().items() if ADAPTER in name or not trunk.frozen}
    return {**heads.state_dict(), **{f"trunk.{name}": tensor for name, tensor in below.items()}}


def load_policy_state(trunk: nn.Module, heads: nn.Module, state: dict[str, Tensor], *, assign: bool = False) -> None:
    """Give a policy the values of `policy_state`.

    Args:
        assign: take the given tensors themselves instead of copying them.

    Raises:
        ValueError: other parts of the trunk than those that train.
    """
    below = {name.removeprefix("trunk."): tensor for name, tensor in state.items() if name.startswith("trunk.")}
    heads.load_state_dict({n: tensor for n, tensor in state.items() if not n.startswith("trunk.")}, assign=assign)
    odd = {f"trunk.{name}" for name in below} ^ {n for n in policy_state(trunk, heads) if n.startswith("trunk.")}
    if odd:
        raise ValueError(f"the weights are not of what trains here: {len(odd)} names differ, one is {min(odd)}")
    trunk.load_state_dict(below, strict=False, assign=assign)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model without adapters that computes the same: `state_dict()`, adapters added to their bases."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ADAPTER not in f".{name}"}
    for name, layer in model.named_modules():
        if isinstance(layer, AdaptedLinear):
            for own in layer.base.state_dict():
                state[f"{name}.{own}"] = state.pop(f"{name}.base.{own}")
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = (weight.to(layer.adapter.up.dtype) + layer.adapter.product().detach()).to(weight)
    return state
