"""The trunk against attention written out."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

import grpo.trunk
from grpo.config import ModelSection
from grpo.kv_cache import KVCache
from grpo.model import GPT
from tests.small_gpt import CAUSAL, VOCABULARY, B, T, make, tokens

torch.set_num_threads(1)


def naive_trunk(trunk, ids, mask=None):
    """The trunk with explicit attention matrices and a rotation written out pair by pair, in float64."""
    trunk = copy.deepcopy(trunk).double()
    x = trunk.wte.weight[ids]
    length, width = ids.shape[1], x.shape[-1]
    if trunk.wpe is not None:
        x = x + trunk.wpe.weight[:length]
    states = []
    for block in trunk.blocks:
        heads, size = block.attention.num_heads, width // block.attention.num_heads
        q, k, v = (t.unflatten(-1, (heads, size)) for t in block.attention.qkv(block.attention_norm(x)).chunk(3, -1))
        if trunk.wpe is None:
            q, k = q.clone(), k.clone()
            for t in range(length):
                for i in range(size // 2):
                    angle = t * 10000 ** (-2 * i / size)
                    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
                    for z in (q, k):
                        z[:, t, :, 2 * i : 2 * i + 2] = z[:, t, :, 2 * i : 2 * i + 2] @ turn.double().T
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(size)
        if trunk.causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -math.inf)
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        x = x + block.attention.out(y)
        x = x + block.mlp.down(F.gelu(block.mlp.up(block.mlp_norm(x))))
        states.append(x)
    return trunk.norm(x), states


@pytest.mark.parametrize("rows_at_once", [1, 2, 3])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@torch.no_grad()
def test_rows_read_in_parts_and_states_at_some_places_are_those_of_the_whole(attention, rows_at_once, monkeypatch):
    model = make(attention=attention, critic=False, sampler=False).double()
    ids, mask = tokens(), torch.arange(T) < torch.tensor([[T], [T - 3], [4]])
    expected = model.trunk(ids, mask, (1, -1))
    monkeypatch.setattr(grpo.trunk, "READ_AT_ONCE", rows_at_once * T * 16)
    torch.testing.assert_close(model.trunk(ids, mask, (1, -1)), expected, rtol=1e-12, atol=1e-12)
    for places in (torch.tensor([0, 3, T, T + 1, 2 * T + 3]), torch.tensor([T + 2]), torch.arange(0)):
        found = model.encode(ids, mask, at=places)
        torch.testing.assert_close(found, expected[..., 16:].flatten(0, 1)[places], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("position", ["rotary", "learned"])
@torch.no_grad()
def test_trunk_equals_attention_written_out(attention, position):
    model = make(attention=attention, position=position, bias=True, critic=False, sampler=False)
    final, states = naive_trunk(model.trunk, tokens())
    torch.testing.assert_close(model.encode(tokens()).double(), final, rtol=0, atol=1e-4)
    found = model.trunk(tokens(), None, (2, -1, 1)).double()
    torch.testing.assert_close(found, torch.cat((states[1], final, states[0]), -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("section", [{}, CAUSAL], ids=["bidirectional", "causal"])
@torch.no_grad()
def test_padding_is_never_attended_to(section):
    model, ids = make(**section), tokens()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 6:] = mask[1, :2] = mask[2] = False  # padded right, padded left, nothing but pads
    other_pads = torch.where(mask, ids, (ids + 7) % VOCABULARY.base_size)
    found = model.encode(ids, mask)
    assert found.isfinite().all()
    allowed, _ = model.trunk._allowed(ids, mask, 0)
    assert allowed.any(-1).all()  # not every SDPA kernel forgives a query without a key
    assert torch.equal(found[mask], model.encode(other_pads, mask)[mask])
    other_word = ids.clone()
    other_word[0, 2] = (ids[0, 2] + 1) % VOCABULARY.base_size
    assert not torch.equal(found[0, 5], model.encode(other_word, mask)[0, 5])
    expected, _ = naive_trunk(model.trunk, ids[:1], mask[:1])
    torch.testing.assert_close(found[0, :6].double(), expected[0, :6], rtol=0, atol=1e-4)
    torch.testing.assert_close(model.encode(ids, torch.ones_like(mask)), model.encode(ids), rtol=0, atol=1e-5)


@torch.no_grad()
def test_causal_states_ignore_the_future_and_bidirectional_ones_do_not():
    ids = tokens()
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % VOCABULARY.base_size
    causal, both = make(**CAUSAL), make()
    assert torch.equal(causal.encode(ids)[:, :-1], causal.encode(other)[:, :-1])
    assert not torch.equal(both.encode(ids)[:, 0], both.encode(other)[:, 0])


@pytest.mark.parametrize("position", ["rotary", "learned"])
@torch.no_grad()
def test_cached_pieces_equal_one_pass(position):
    model, ids = make(position=position, **CAUSAL), tokens()
    cache, pieces = KVCache(T), []
    for piece in ids.split((4, 1, 3, 1), dim=1):
        pieces.append(model.trunk(piece, cache=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), model.encode(ids), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="KV cache holds 2 tokens, got 3"):
        model.trunk(ids[:, :3], cache=KVCache(2))


def test_initialisation_follows_gpt2():
    torch.manual_seed(0)
    section = ModelSection(n_layer=8, n_head=4, n_embd=128, bias=True)
    trunk = GPT(section, VOCABULARY, block_size=T).trunk
    for name, parameter in trunk.named_parameters():
        if parameter.dim() == 2:
            scaled = name.endswith(("attention.out.weight", "mlp.down.weight"))
            assert abs(parameter.std().item() / (0.02 / 4 if scaled else 0.02) - 1) < 0.05, name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


def test_rotations_first_computed_in_inference_mode_serve_training():
    grpo.trunk._rotations.cache_clear()
    model = make()
    with torch.inference_mode():
        model(tokens())
    model(tokens()).sum().backward()
    assert model.trunk.blocks[0].attention.qkv.weight.grad is not None


def test_learned_positions_end_at_the_block_size():
    with pytest.raises(ValueError, match="data.block_size = 9, got 10"):
        make(position="learned").encode(torch.zeros(1, T + 1, dtype=torch.int64))
