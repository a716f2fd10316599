"""Heads, modes and the frozen-trunk promises."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from grpo.config import RewardSection
from grpo.heads import RewardHead, pool
from grpo.model import text_logits
from tests.small_gpt import CAUSAL, VOCABULARY, B, T, make, tokens

torch.set_num_threads(1)


def test_each_mode_has_its_heads_and_output():
    ids, width = tokens(), 16
    generator = make()
    assert set(generator.heads) == {"lm", "critic", "sampler"} and generator.mode == "language_model"
    assert generator(ids).shape == (B, T, VOCABULARY.size)
    outputs = generator(ids, ("critic", "sampler"))
    assert outputs["critic"].shape == (B, T) and outputs["sampler"].shape == (B, T, width)
    probabilities = make(mode="reward")(ids)
    assert probabilities.shape == (B, 2)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(B))
    assert make(mode="token_classifier")(ids).shape == (B, T, 2)
    scores = make(mode="sequence_scorer")(ids)
    assert scores.shape == (B,) and ((scores > 0) & (scores < 1)).all()
    with pytest.raises(ValueError, match="mode must be one of generator"):
        make(mode="generater")


def test_several_heads_share_one_trunk_pass():
    model, calls = make(), []
    model.trunk.register_forward_hook(lambda *_: calls.append(1))
    outputs = model(tokens(), ("lm", "critic"))
    assert len(calls) == 1
    assert torch.equal(outputs["critic"], model.critic_scores(tokens()))


def test_unknown_and_absent_heads_are_named_with_those_that_exist():
    with pytest.raises(ValueError, match="'critc'.*it has: lm, critic, sampler"):
        make()(tokens(), "critc")
    with pytest.raises(ValueError, match="'critic'.*it has: lm, sampler"):
        make(critic=False).critic_scores(tokens())
    with pytest.raises(ValueError, match="'lm'.*it has: reward"):
        make(mode="reward")(tokens(), "lm")


def test_positions_give_the_same_logits_and_no_others():
    model, ids = make(), tokens()
    positions = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.4
    with torch.no_grad():
        nn.init.normal_(model.heads["sampler"].layers[-1].weight)
    for head in ("lm", "critic", "sampler"):
        found = model(ids, head, positions=positions)
        assert len(found) == positions.sum()
        torch.testing.assert_close(found, model(ids, head)[positions], rtol=1e-5, atol=1e-5)


def test_pooling_equals_a_loop_over_rows():
    features = torch.randn(4, T, 5)
    mask = torch.rand(4, T) < 0.5
    mask[0] = False  # no completion at all
    mask[1], mask[1, 3] = False, True
    for row in range(4):
        chosen = features[row][mask[row]]
        last = chosen[-1] if len(chosen) else torch.zeros(5)
        mean = chosen.mean(0) if len(chosen) else torch.zeros(5)
        for pooling, expected in (("last", last), ("mean", mean), ("both", torch.cat((last, mean)))):
            torch.testing.assert_close(pool(features, mask, pooling)[row], expected)


@pytest.mark.parametrize("pooling", ["last", "mean", "both"])
def test_reward_reads_the_completion_only(pooling):
    model = make(mode="reward", reward=RewardSection(layers=(1, -1), pooling=pooling))
    completion = torch.zeros(B, T, dtype=torch.bool)
    completion[:, 4:7] = True
    features = model.reward_features(tokens(), completion)
    output = model.heads["reward"](features, completion)
    changed = torch.where(completion[..., None], features, torch.randn_like(features))
    again = model.heads["reward"](changed, completion)
    assert torch.equal(output.logits, again.logits) and torch.equal(output.token_logits, again.token_logits)
    assert (output.token_logits[~completion] == 0).all() and (output.token_logits[completion] != 0).all()
    direct = model.reward_scores(tokens(), completion)
    assert torch.equal(direct.logits, output.logits) and torch.equal(direct.token_logits, output.token_logits)
    torch.testing.assert_close(model(tokens(), positions=completion), output.logits.softmax(-1))


def test_a_tokens_score_reads_its_neighbours_as_a_loop_over_positions_does():
    torch.manual_seed(0)
    features, identity, reach = 9, 4, 2
    head = RewardHead(features, hidden=8, pooling="mean", spectral=False, reach=reach, identity=identity)
    head.calibrate(torch.randn(features), torch.rand(features) + 0.5)
    states = torch.randn(B, T, features)
    mask = torch.rand(B, T) < 0.7
    found = head(states, mask).token_logits
    normal = (states - head.shift) * head.scale
    for row in range(B):
        for at in range(T):
            parts = [normal[row, at]]
            for other in (at - 2, at - 1, at + 1, at + 2):
                there = 0 <= other < T and mask[row, other]
                parts.append(normal[row, other, -identity:] if there else torch.zeros(identity))
            expected = head.token(torch.cat(parts))[0] if mask[row, at] else torch.zeros(())
            torch.testing.assert_close(found[row, at], expected)


def test_spectral_norm_bounds_each_matrix():
    torch.manual_seed(0)
    head = RewardHead(16, hidden=32, pooling="mean", spectral=True)
    features, mask = torch.randn(B, T, 16), torch.ones(B, T, dtype=torch.bool)
    for _ in range(50):  # power iterations
        head(features, mask)
    head.eval()
    for layer in (head.pooled[0], head.pooled[2], head.token[0], head.token[2]):
        torch.testing.assert_close(torch.linalg.matrix_norm(layer.weight, 2), torch.tensor(1.0), rtol=1e-3, atol=0)


def test_reward_layers_beyond_the_trunk_are_refused():
    with pytest.raises(ValueError, match=r"reward.layers must be -1 or between 1 and model.n_layer \(2\), got 3"):
        make(mode="reward", reward=RewardSection(layers=(3,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untied_head_with_residual_starts_bit_identical(dtype):
    model, ids = make().to(dtype), tokens()
    before = model(ids)
    model.untie(24)
    assert torch.equal(model(ids), before)
    assert not model.heads["lm"].tied and model.heads["lm"].weight.dtype == dtype


def test_no_trunk_bit_moves_when_the_heads_of_a_frozen_trunk_train():
    model, ids = make(dropout=0.3), tokens()
    model.untie(24)
    model.freeze_trunk()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.trunk.state_dict().items()}
    features = model.trunk(ids, None, (1, -1))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        outputs = model(ids, ("lm", "critic", "sampler"))
        loss = sum(output.square().mean() for output in outputs.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.trunk.state_dict().items())
    assert torch.equal(model.trunk(ids, None, (1, -1)), features)
    assert not torch.equal(model.heads["lm"].weight, model.trunk.wte.weight)


def test_dropout_acts_in_training_and_never_in_a_frozen_trunk():
    model, ids = make(dropout=0.5), tokens()
    model.train()
    assert not torch.equal(model.encode(ids), model.encode(ids))
    model.freeze_trunk()
    model.train()
    assert torch.equal(model.encode(ids), model.encode(ids))
    model.unfreeze_trunk()
    assert not torch.equal(model.encode(ids), model.encode(ids))
    assert all(p.requires_grad for p in model.parameters())


def test_parameter_counts_by_part():
    model = make()
    width, blocks = 16, 2 * (2 * 16 + 12 * 16 * 16)
    trunk = VOCABULARY.size * width + blocks + width
    critic = width * width + width + width + 1
    sampler = 3 * width * width + width + 2 * width + width * width + width
    expected = {"trunk": trunk, "heads.lm": 0, "heads.critic": critic, "heads.sampler": sampler}
    total = sum(expected.values())
    assert model.parameter_counts() == {**expected, "total": total, "trainable": total}
    model.freeze_trunk()
    counts = model.parameter_counts()
    assert counts["heads.lm"] == VOCABULARY.size * width and counts["trainable"] == counts["total"] - trunk


def test_meta_model_with_assigned_trunk_equals_the_original():
    reward = RewardSection(layers=(1, -1), spectral_norm=True)
    original, ids = make(mode="reward", reward=reward), tokens()
    with torch.device("meta"):
        built = make(mode="reward", reward=reward)
    arrays = {name: tensor.detach().numpy().copy() for name, tensor in original.trunk.state_dict().items()}
    for array in arrays.values():
        array.flags.writeable = False
    built.trunk.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, assign=True)
    built.heads.load_state_dict(original.heads.state_dict(), assign=True)
    built.freeze_trunk()
    assert not any(tensor.is_meta for tensor in (*built.parameters(), *built.buffers()))
    assert torch.equal(built.eval()(ids), original.eval()(ids))
    for name, tensor in built.trunk.state_dict().items():
        assert tensor.data_ptr() == arrays[name].ctypes.data, name


def test_tie_survives_assigning_the_trunk_and_copying_the_model():
    model = make()
    model.trunk.load_state_dict({k: v + 1 for k, v in model.trunk.state_dict().items()}, assign=True)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        assert one.heads["lm"].weight is one.trunk.wte.weight
    assert twin.trunk.wte.weight is not model.trunk.wte.weight


def test_neighbors_are_zero_at_edges_masks_and_pads():
    model, ids = make(), tokens(rows=1)
    ids[0, 3], ids[0, 6] = VOCABULARY.mask_id, VOCABULARY.pad_id
    left, right = model.neighbor_embeddings(ids)
    for t in range(T):
        for found, neighbor in ((left[0, t], t - 1), (right[0, t], t + 1)):
            known = 0 <= neighbor < T and neighbor not in (3, 6)
            expected = model.trunk.wte.weight[ids[0, neighbor]] if known else torch.zeros(16)
            assert torch.equal(found, expected)
    assert (model.embed_known(torch.tensor([-1])) == 0).all()


def test_untrained_sampler_is_the_lm_head_and_a_trained_one_sees_its_neighbours():
    model, ids = make(), tokens()
    assert torch.equal(model(ids, "sampler"), model.encode(ids))
    nn.init.normal_(model.heads["sampler"].layers[-1].weight)
    hidden = model.encode(ids)
    left, right = model.neighbor_embeddings(ids)
    changed = ids.clone()
    changed[0, 4] = (ids[0, 4] + 1) % VOCABULARY.base_size
    other = model.heads["sampler"](hidden, *model.neighbor_embeddings(changed))
    differs = (other != model.heads["sampler"](hidden, left, right)).any(-1).nonzero().tolist()
    assert differs == [[0, 3], [0, 5]]


@pytest.mark.parametrize("mode", ["generator", "reward"])
def test_float32_heads_read_a_bfloat16_trunk(mode):
    model, ids = make(mode=mode), tokens()
    exact = model(ids)
    model.trunk.to(torch.bfloat16)
    if mode == "generator":
        model.untie()
        model.heads.float()
    found = model(ids)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.2 * exact.abs().max()


def test_bfloat16_follows_float32():
    model, ids = make(), tokens()
    exact, found = model(ids), copy.deepcopy(model).bfloat16()(ids)
    assert found.dtype == torch.bfloat16
    assert F.cosine_similarity(found.float(), exact, dim=-1).min() > 0.99


def test_text_logits_leave_out_special_ids():
    logits = torch.arange(float(VOCABULARY.size))
    assert text_logits(logits, VOCABULARY).tolist() == list(range(30))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("section", [{}, CAUSAL], ids=["bidirectional", "causal"])
@torch.no_grad()
def test_cuda_equals_cpu(section):
    model, ids = make(**section), tokens()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 6:] = mask[2] = False
    expected = [model(ids), model(ids, attention_mask=mask)[mask]]
    model, ids, mask = model.cuda(), ids.cuda(), mask.cuda()
    for found, cpu in zip([model(ids), model(ids, attention_mask=mask)[mask]], expected, strict=True):
        torch.testing.assert_close(found.cpu(), cpu, rtol=0, atol=1e-3)
