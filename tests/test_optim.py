import copy
import math

import pytest
import torch
from torch import nn

from grpo.checkpoint import load_checkpoint, save_checkpoint
from grpo.config import ModelSection
from grpo.model import GPT
from grpo.optim import (
    clip_parts,
    cosine_learning_rate,
    flat_state,
    load_flat_state,
    make_optimizer,
    set_learning_rate,
    trainable_parts,
)
from grpo.tokenizer import Vocabulary

torch.set_num_threads(1)


def modules():
    torch.manual_seed(0)
    return {"a": nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "b": nn.Linear(4, 2)}


def a_step(parts, optimizer, seed, only=None):
    generator = torch.Generator().manual_seed(seed)
    for name, parameters in parts.items():
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator) if only in (None, name) else None
    optimizer.step()


def test_steps_equal_adamw_by_hand_and_only_matrices_decay():
    parts = trainable_parts(modules())
    optimizer = make_optimizer(parts, learning_rate=0.01, weight_decay=0.1)
    before = {p: p.detach().clone() for ps in parts.values() for p in ps}
    first, second = (dict.fromkeys(before, 0.0) for _ in range(2))
    for step in (1, 2, 3):
        a_step(parts, optimizer, step)
        for p, value in before.items():
            first[p] = 0.9 * first[p] + 0.1 * p.grad
            second[p] = 0.95 * second[p] + 0.05 * p.grad.square()
            value *= 1 - 0.01 * (0.1 if p.dim() == 2 else 0.0)
            value -= 0.01 * (first[p] / (1 - 0.9**step)) / ((second[p] / (1 - 0.95**step)).sqrt() + 1e-8)
    for p, value in before.items():
        torch.testing.assert_close(p.detach(), value, rtol=1e-5, atol=1e-6)


def test_parts_are_clipped_each_by_its_own_norm():
    parts = trainable_parts(modules())
    for scale, name in ((100.0, "a"), (0.01, "b")):
        for p in parts[name]:
            p.grad = torch.full_like(p, scale)
    small = [p.grad.clone() for p in parts["b"]]
    norms = clip_parts(parts, 1.0)
    counts = {name: sum(p.numel() for p in ps) for name, ps in parts.items()}
    assert norms["a"].item() == pytest.approx(100 * math.sqrt(counts["a"]), rel=1e-5)
    assert norms["b"].item() == pytest.approx(0.01 * math.sqrt(counts["b"]), rel=1e-5)
    assert all(torch.equal(p.grad, g) for p, g in zip(parts["b"], small, strict=True))  # the large part leaves it alone
    assert sum(p.grad.square().sum() for p in parts["a"]).sqrt().item() == pytest.approx(1, rel=1e-4)


def test_a_part_without_gradients_is_left_untouched_with_its_moments():
    parts = trainable_parts(modules())
    optimizer = make_optimizer(parts, learning_rate=0.01, weight_decay=0.1)
    a_step(parts, optimizer, 0)
    values = [p.detach().clone() for p in parts["b"]]
    moments = copy.deepcopy([optimizer.state[p] for p in parts["b"]])
    a_step(parts, optimizer, 1, only="a")
    assert "b" not in clip_parts(parts, 1.0)
    assert all(torch.equal(p, v) for p, v in zip(parts["b"], values, strict=True))
    for p, old in zip(parts["b"], moments, strict=True):
        assert all(torch.equal(optimizer.state[p][k], old[k]) for k in old)


def test_a_shared_parameter_belongs_to_the_first_part_and_frozen_ones_to_none():
    model = GPT(ModelSection(n_layer=1, n_head=2, n_embd=8), Vocabulary(5), block_size=4)
    parts = trainable_parts(
        {
            "generator": [*model.trunk.parameters(), *model.heads["lm"].parameters()],
            "critic": model.heads["critic"],
            "again": model.trunk,
        }
    )
    assert list(parts) == ["generator", "critic"]
    assert len({id(p) for ps in parts.values() for p in ps}) == sum(len(ps) for ps in parts.values())
    model.freeze_trunk()
    frozen = {id(p) for p in model.trunk.parameters()}
    parts = trainable_parts({"trunk": model.trunk, **model.heads})
    assert list(parts) == ["lm", "critic", "sampler"]
    assert not frozen & {id(p) for ps in parts.values() for p in ps}


def test_a_reloaded_state_continues_bit_for_bit(tmp_path):
    runs = []
    for resumed in (False, True):
        network = modules()
        parts = trainable_parts(network)
        optimizer = make_optimizer(parts, learning_rate=0.01, weight_decay=0.1)
        a_step(parts, optimizer, 0)
        a_step(parts, optimizer, 1, only="a")  # part b has lived through fewer steps
        if resumed:
            tensors = flat_state(optimizer)
            model = GPT(ModelSection(n_layer=1, n_head=2, n_embd=8), Vocabulary(5), block_size=4)
            save_checkpoint(tmp_path / "x", model, config={}, tokenizer=None, state={"optimizer": tensors})
            tensors = load_checkpoint(tmp_path / "x").state["optimizer"]
            network = copy.deepcopy(network)
            parts = trainable_parts(network)
            optimizer = make_optimizer(parts, learning_rate=0.01, weight_decay=0.1)
            load_flat_state(optimizer, tensors)
        a_step(parts, optimizer, 2)
        runs.append([p.detach() for ps in parts.values() for p in ps])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_an_optimizer_that_never_stepped_has_no_state():
    optimizer = make_optimizer(trainable_parts(modules()), learning_rate=0.1)
    assert flat_state(optimizer) == {}
    load_flat_state(optimizer, {})


def test_learning_rate_by_hand():
    rate = lambda step: cosine_learning_rate(step, peak=2.0, warmup=4, steps=12)  # noqa: E731
    assert [rate(s) for s in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate(4) == 2.0 and rate(8) == pytest.approx(1.1) and rate(12) == pytest.approx(0.2) == rate(1000)
    optimizer = make_optimizer(trainable_parts(modules()), learning_rate=1.0)
    set_learning_rate(optimizer, rate(8))
    assert {group["lr"] for group in optimizer.param_groups} == {rate(8)}
