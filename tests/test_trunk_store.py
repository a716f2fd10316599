import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.reward import Reward
from actors.trunk_store import (
    Blueprint,
    Tenant,
    attach,
    fetch,
    load_heads,
    mount,
    own_heads,
    share_on_gpus,
    to_arrays,
    to_tensors,
)
from grpo.config import ModelSection, RewardSection
from grpo.model import GPT
from grpo.tokenizer import Vocabulary

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
SECTION = ModelSection(n_layer=1, n_head=2, n_embd=16)
BLUEPRINT = Blueprint(model=SECTION, vocabulary=Vocabulary(12), block_size=8, reward=RewardSection(hidden=8))


def a_model(residual=4, dtype=torch.float32):
    torch.manual_seed(0)
    model = GPT(SECTION, Vocabulary(12), block_size=8).eval()
    model.trunk.to(dtype)
    model.untie(residual)
    return model


def parts(model):
    """A published trunk, read-only as the object store gives it, and heads."""
    trunk = {name: array.copy() for name, array in to_arrays(model.trunk.state_dict()).items()}
    for array in trunk.values():
        array.flags.writeable = False
    return trunk, to_arrays(model.heads.state_dict())


TOKENS = torch.randint(0, 12, (3, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [0, 4])
def test_a_mounted_model_is_the_published_one_on_the_published_memory(dtype, residual):
    model = a_model(residual, dtype)
    trunk, heads = parts(model)
    mounted = mount(BLUEPRINT, "generator", trunk, heads, lm_residual=residual)
    with torch.no_grad():
        for head in ("lm", "critic"):
            assert torch.equal(mounted(TOKENS, head), model(TOKENS, head))
    for name, parameter in mounted.trunk.named_parameters():
        assert parameter.data_ptr() == trunk[name].__array_interface__["data"][0], name
        assert parameter.dtype == dtype and not parameter.requires_grad
    assert not mounted.training and mounted.trunk.frozen and not mounted.heads["lm"].tied
    for name, parameter in mounted.heads.named_parameters():
        assert parameter.data_ptr() == heads[name].__array_interface__["data"][0] and not parameter.requires_grad


def test_arrays_and_tensors_are_the_same_memory_and_bits():
    tensor = torch.randn(5, 3).bfloat16()
    arrays = to_arrays({"x": tensor, "y": torch.arange(3.0)})
    assert arrays["x"].dtype == np.uint16 and arrays["x"].__array_interface__["data"][0] == tensor.data_ptr()
    back = to_tensors(arrays)
    assert (
        torch.equal(back["x"], tensor) and back["x"].data_ptr() == tensor.data_ptr() and back["y"].tolist() == [0, 1, 2]
    )


def test_a_reward_model_stands_on_the_generators_trunk():
    model = a_model()
    trunk, _ = parts(model)
    scoring = BLUEPRINT.build("reward").heads.state_dict()
    reward = mount(BLUEPRINT, "reward", trunk, to_arrays(scoring))
    assert reward.trunk.wte.weight.data_ptr() == trunk["wte.weight"].__array_interface__["data"][0]
    assert torch.equal(reward.encode(TOKENS), model.encode(TOKENS))
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    assert reward.reward_scores(TOKENS, mask).logits.shape == (3, 2)


def test_new_heads_are_mapped_and_the_trunk_stays():
    trunk, heads = parts(a_model())
    mounted = mount(BLUEPRINT, "generator", trunk, heads, lm_residual=4)
    addresses = [p.data_ptr() for p in mounted.trunk.parameters()]
    assert mounted.heads["lm"].matrix.data_ptr() == heads["lm.matrix"].__array_interface__["data"][0]
    new = {name: array + 1 for name, array in heads.items()}
    load_heads(mounted, new)
    assert [p.data_ptr() for p in mounted.trunk.parameters()] == addresses
    for name, value in mounted.heads.state_dict().items():
        assert value.data_ptr() == new[name].__array_interface__["data"][0]
        assert np.array_equal(value.numpy(), new[name])
    assert not any(parameter.requires_grad for parameter in mounted.parameters())
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_heads(mounted, heads | {"lm.matrix": np.zeros((3, 3), np.float32)})


def test_own_heads_are_copies_that_train():
    trunk, heads = parts(a_model())
    mounted = own_heads(mount(BLUEPRINT, "generator", trunk, heads, lm_residual=4))
    for name, parameter in mounted.heads.named_parameters():
        assert parameter.requires_grad and parameter.detach().numpy().tobytes() == heads[name].tobytes()
        assert parameter.data_ptr() != heads[name].__array_interface__["data"][0]
    assert not any(parameter.requires_grad for parameter in mounted.trunk.parameters())


def test_wrong_names_and_shapes_are_refused():
    trunk, heads = parts(a_model())
    with pytest.raises(RuntimeError, match="wte.weight"):
        mount(BLUEPRINT, "generator", {k: v for k, v in trunk.items() if k != "wte.weight"}, heads, lm_residual=4)
    with pytest.raises(RuntimeError, match="residual"):
        mount(BLUEPRINT, "generator", trunk, heads, lm_residual=0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        mount(BLUEPRINT, "generator", trunk, heads | {"lm.matrix": np.zeros((3, 3), np.float32)}, lm_residual=4)


def test_plain_arrays_are_fetched_as_they_are():
    trunk, _ = parts(a_model())
    assert fetch(trunk) is trunk


def test_mounting_loads_no_symbolic_algebra():
    """torch's Python kernels for random numbers on the meta device import sympy: 67 MB in every actor."""
    script = """
import sys
from tests.test_trunk_store import BLUEPRINT, a_model, mount, parts
before = "sympy" in sys.modules
trunk, heads = parts(a_model())
mount(BLUEPRINT, "generator", trunk, heads, lm_residual=4)
mount(BLUEPRINT, "reward", trunk, {f"reward.{n}": t.numpy() for n, t in
      BLUEPRINT.build("reward").heads["reward"].state_dict().items()})
print(before, "sympy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stdout + done.stderr


def test_models_of_one_process_share_what_is_attached():
    trunk, heads = parts(a_model())
    attached = attach(trunk, "cpu")
    models = [mount(BLUEPRINT, "generator", attached, heads, lm_residual=4) for _ in range(2)]
    for name, array in trunk.items():
        addresses = {model.trunk.state_dict()[name].data_ptr() for model in models}
        assert addresses == {array.__array_interface__["data"][0]}


def test_a_borrowed_trunk_is_the_lenders_memory_and_frozen():
    trunk, heads = parts(a_model())
    lender, borrower = Tenant(), Tenant()
    for tenant, own in ((lender, trunk), (borrower, {name: array.copy() for name, array in trunk.items()})):
        tenant.model = mount(BLUEPRINT, "generator", own, heads, lm_residual=4)
    borrower.borrow(lender.lend())
    for own, lent in zip(borrower.model.trunk.parameters(), lender.model.trunk.parameters(), strict=True):
        assert own.data_ptr() == lent.data_ptr() and not own.requires_grad
    assert torch.equal(borrower.model.encode(TOKENS), lender.model.encode(TOKENS)) and borrower.model.trunk.frozen


@pytest.mark.ray
def test_actors_that_cannot_borrow_keep_their_own_trunk(ray_session):
    """Without CUDA the transfer itself fails, as it does between two GPUs."""
    import ray

    trunk, _ = parts(a_model())
    remote = ray.remote(enable_tensor_transport=True, num_cpus=0)(Reward)
    scoring = to_arrays(BLUEPRINT.build("reward").heads.state_dict())
    actors = [remote.remote(BLUEPRINT, trunk, scoring, threads=1) for _ in range(2)]
    assert share_on_gpus(actors, 300) == 0
    for own in ray.get([actor.lend.remote() for actor in actors], timeout=300):
        assert all(np.array_equal(own[name].numpy(), array) for name, array in trunk.items())
    for actor in actors:
        ray.kill(actor)
