import copy

import pytest
import torch
from torch import nn

from grpo.checkpoint import load_model, save_checkpoint
from grpo.config import GrpoSection, ModelSection
from grpo.lora import (
    HEADS,
    Adapter,
    Trainable,
    load_policy_state,
    merged_state,
    policy_state,
    train_below_heads,
    trainable_modules,
)
from grpo.model import GPT
from grpo.tokenizer import Vocabulary

torch.set_num_threads(1)
LORA = Trainable(kind="lora", rank=3, alpha=6.0)
TOKENS = torch.randint(0, 12, (3, 8), generator=torch.Generator().manual_seed(1))


def a_model(trainable=None, *, moved=False, **section):
    torch.manual_seed(0)
    model = GPT(ModelSection(n_layer=2, n_head=2, n_embd=16, **section), Vocabulary(12), block_size=8).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.5 if "heads" in name else 0.2)
    model.untie(4)
    model.freeze_trunk()
    if trainable is not None:
        train_below_heads(model.trunk, trainable, seed=7)
    if moved:
        with torch.no_grad():
            for name, parameter in model.trunk.named_parameters():
                if name.endswith("adapter.up"):
                    parameter.normal_(std=0.3)
    return model


def bits(model):
    return {name: tensor.clone() for name, tensor in model.trunk.state_dict().items() if ".adapter." not in name}


@pytest.mark.parametrize("bias", [False, True])
def test_adapters_start_at_the_bits_of_the_base(bias):
    base, adapted = a_model(bias=bias), a_model(LORA, bias=bias)
    with torch.no_grad():
        assert torch.equal(adapted(TOKENS), base(TOKENS))
    adapters = [m for m in adapted.modules() if isinstance(m, Adapter)]
    assert len(adapters) == 2 * 4  # qkv, out, up and down of each block
    assert all((a.up == 0).all() and a.down.std() > 0.05 for a in adapters)
    assert not torch.equal(adapters[0].down, adapters[4].down)
    again = [m for m in a_model(LORA).modules() if isinstance(m, Adapter)]
    assert all(torch.equal(x.down, y.down) for x, y in zip(adapters, again, strict=True))


def test_an_adapted_layer_is_the_equation():
    model = a_model(LORA, moved=True)
    layer = model.trunk.blocks[0].attention.qkv
    x = torch.randn(5, 16)
    expected = layer.base(x) + 6 / 3 * x @ layer.adapter.down.T @ layer.adapter.up.T
    torch.testing.assert_close(layer(x), expected)


def test_training_moves_adapters_and_no_bit_of_the_base():
    model = a_model(LORA)
    before = bits(model)
    modules = {**dict(model.heads.items()), **trainable_modules(model.trunk)}
    parameters = [p for m in modules.values() for p in m.parameters()]
    assert not {id(p) for p in parameters} & {id(p) for n, p in model.trunk.named_parameters() if "adapter" not in n}
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    start = policy_state(model.trunk, model.heads)
    start = {name: tensor.clone() for name, tensor in start.items()}
    for _ in range(2):
        model(TOKENS).square().sum().backward()
        optimizer.step()
    after = bits(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    now = policy_state(model.trunk, model.heads)
    assert all(not torch.equal(now[name], start[name]) for name in start if "adapter" in name)


def test_what_trains_is_named_and_comes_back():
    for trainable, expected in ((None, set()), (LORA, {"adapters"}), (Trainable(kind="all"), {"trunk"})):
        model = a_model(trainable, moved=True)
        assert trainable_modules(model.trunk).keys() == expected
        state = {name: tensor + 1 for name, tensor in policy_state(model.trunk, model.heads).items()}
        below = {name for name in state if name.startswith("trunk.")}
        whole = {f"trunk.{name}" for name in model.trunk.state_dict()}
        wanted = {name for name in whole if ".adapter." in name} if trainable == LORA else whole
        assert below == (wanted if expected else set())
        for assign in (False, True):
            other = a_model(trainable)
            load_policy_state(other.trunk, other.heads, state, assign=assign)
            found = policy_state(other.trunk, other.heads)
            assert found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)
            shared = all(found[n].data_ptr() == state[n].data_ptr() for n in state)
            assert shared == assign
    with pytest.raises(ValueError, match="the weights are not of what trains here: 16 names differ"):
        load_policy_state(a_model().trunk, a_model().heads, policy_state(a_model(LORA).trunk, a_model().heads))


def test_a_trunk_that_trains_is_a_copy():
    base = a_model()
    shared = copy.copy(base.trunk.wte.weight.data)
    model = a_model()
    model.trunk.load_state_dict(base.trunk.state_dict(), assign=True)
    train_below_heads(model.trunk, Trainable(kind="all"), seed=0)
    assert model.trunk.wte.weight.data_ptr() != base.trunk.wte.weight.data_ptr()
    assert all(p.requires_grad for p in model.trunk.parameters()) and not model.trunk.training
    with torch.no_grad():
        model.trunk.wte.weight.add_(1)
    assert torch.equal(base.trunk.wte.weight, shared)


@pytest.mark.parametrize("trainable", [LORA, Trainable(kind="all")], ids=["lora", "all"])
def test_a_checkpoint_gives_the_generator_back_without_adapters(trainable, tmp_path):
    model = a_model(trainable, moved=True)
    save_checkpoint(tmp_path / "c", model, config={})
    back = load_model(tmp_path / "c").eval()
    assert set(back.state_dict()) == set(a_model().state_dict()) == set(merged_state(model))
    with torch.no_grad():
        torch.testing.assert_close(back(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)
        if trainable == LORA:
            assert (back(TOKENS) - a_model()(TOKENS)).abs().max() > 0.1


def test_the_config_says_what_trains():
    assert Trainable.of(GrpoSection(trainable="lora", lora_rank=4, lora_alpha=2.0)) == Trainable(
        kind="lora", rank=4, alpha=2.0
    )
    assert Trainable.of(GrpoSection()) == HEADS  # what is not HEADS replays its trajectories
    with pytest.raises(ValueError, match="grpo.trainable must be one of heads, lora, all"):
        GrpoSection(trainable="adapters")
    with pytest.raises(ValueError, match="grpo.replay_steps must be 0 where grpo.trainable is heads"):
        GrpoSection(replay_steps=2)
    with pytest.raises(ValueError, match="grpo.replay_steps must be 0 where"):
        GrpoSection(trainable="all", loss="gspo", replay_steps=2)
