"""A device that this machine lacks: tensors that say they lie elsewhere, are computed on the CPU, and refuse to mix.

1. Code asks for `cuda` and gets it. Such a tensor wraps one of the CPU, so results are the CPU's. The device type that
   it tells is `lazy`, which torch's autograd serves on the calling thread.
2. What CUDA refuses, operations on tensors of both places, is refused here. What CUDA lets through is let through:
   CPU scalars of no dimension, and CPU indices, which it uploads.
3. `waits` counts where in the project the host would wait for the device: reads, masks whose size decides a shape
   (boolean indices are such), indices that are uploaded. Uploads of data (`to`, `torch.tensor`) are not counted.
4. Not shown: streams, kernels, autocast, memory.
"""

import contextlib
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from grpo import features, sliced_loss, trajectory, wavefront

ROOT = str(Path(__file__).resolve().parent.parent)
ELSEWHERE = torch.device("lazy", 0)
aten = torch.ops.aten
TAKES_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
SIZED_BY_DATA = {aten.nonzero.default, aten._unique2.default, aten.masked_select.default, aten.equal.default}
waits = Counter()


class Elsewhere(torch.Tensor):
    """A tensor of the device; `held` is the CPU's."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=ELSEWHERE,
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self, **_):
        return f"elsewhere: {self.held}"

    def __format__(self, spec):
        return format(self.held, spec)

    def tolist(self):
        _waits()
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), named=None):
        return _dispatch(operation, arguments, named or {})


def _waits():
    ours = (f for f in reversed(traceback.extract_stack()) if f.filename.startswith(ROOT) and ".venv" not in f.filename)
    frame = next(frame for frame in ours if frame.filename != __file__)
    waits[f"{frame.filename.removeprefix(ROOT + '/')}:{frame.name}"] += 1


def _is_elsewhere(device):
    return device is not None and torch.device(device).type in ("cuda", ELSEWHERE.type)


def _there(value):
    """A function's argument, with the device in the place of CUDA."""
    return ELSEWHERE if isinstance(value, torch.device | str) and str(value) == "cuda" else value


def _held(value):
    if isinstance(value, Elsewhere):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) and _is_elsewhere(value) else value


def _is_mask(index):
    """Whether CUDA looks up where an index is True, whose number decides a shape."""
    return isinstance(index, Elsewhere) and index.dtype == torch.bool


def _dispatch(operation, arguments, named):
    tensors = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, torch.Tensor)]
    there = [isinstance(tensor, Elsewhere) for tensor in tensors]
    device = named.get("device")
    goes = any(there) if device is None else _is_elsewhere(device)
    compute = lambda: operation(*tree_map(_held, arguments), **tree_map(_held, named))  # noqa: E731
    if operation is aten._to_copy.default:
        if there[0] and not goes:
            _waits()
        copied = compute()
        return Elsewhere(copied) if goes else copied
    if operation is aten.copy_.default:
        if there == [False, True]:
            _waits()
        compute()
        return arguments[0]
    if operation is aten._local_scalar_dense.default:
        if there[0]:
            _waits()
        return compute()
    if any(there):
        if operation in SIZED_BY_DATA or operation in TAKES_INDICES and any(map(_is_mask, arguments[1])):
            _waits()
        foreign = [tensor for tensor, elsewhere in zip(tensors, there, strict=True) if tensor.dim() and not elsewhere]
        if foreign and operation in TAKES_INDICES and there[0]:
            _waits()
        elif foreign:
            raise RuntimeError(f"{operation}: tensors on two devices, {[tuple(t.shape) for t in foreign]} on the CPU")
    made = compute()
    if goes:
        made = tree_map_only(torch.Tensor, lambda x: x if isinstance(x, Elsewhere) else Elsewhere(x), made)
    return return_and_correct_aliasing(operation, arguments, named, made) if goes and any(there) else made


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        return _dispatch(operation, arguments, named or {})


class _Functions(TorchFunctionMode):
    """Functions that go past the dispatcher."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = named or {}
        if any(isinstance(argument, torch.device | str) for argument in (*arguments, *named.values())):
            arguments, named = tree_map(_there, (arguments, named))
        if function in (torch.tensor, torch.as_tensor) and _is_elsewhere(named.get("device")):
            return function(*arguments, **{**named, "device": "cpu"}).to(ELSEWHERE)
        if function is torch.Tensor.new_tensor and isinstance(arguments[0], Elsewhere):
            return torch.tensor(arguments[1], **{"dtype": arguments[0].dtype, **named}).to(ELSEWHERE)
        return function(*arguments, **named)


@pytest.fixture
def elsewhere(monkeypatch):
    """The device's name, for the length of a test: `cuda`, which is there as far as code can tell."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tables = (features.LOGITS_AT_ONCE, sliced_loss.LOGITS_AT_ONCE, trajectory.TABLE, wavefront._LOGITS_AT_ONCE)
    for sizes in tables:
        monkeypatch.setitem(sizes, ELSEWHERE.type, sizes["cuda"])
    autocast, no_grad = torch.autocast, torch.no_grad
    monkeypatch.setattr(torch, "autocast", lambda device, *rest, **named: autocast(
        "cpu" if _is_elsewhere(device) else device, *rest, **named))
    monkeypatch.setattr(torch, "inference_mode", lambda mode=True: no_grad() if mode else contextlib.nullcontext())
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_: None)
    waits.clear()
    with _Functions(), _Operations():
        yield "cuda"
