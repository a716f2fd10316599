import pytest
import torch

import grpo.features
from grpo.config import ModelSection
from grpo.features import feature_width, reward_features
from grpo.model import GPT
from grpo.tokenizer import Vocabulary

torch.set_num_threads(1)
BASE, C = 10, 8


def make(causal=False):
    torch.manual_seed(0)
    kind = dict(attention="causal", critic=False, sampler=False) if causal else {}
    model = GPT(ModelSection(n_layer=2, n_head=2, n_embd=C, **kind), Vocabulary(BASE), block_size=9).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def texts():
    tokens = torch.randint(0, BASE, (3, 9), generator=torch.Generator().manual_seed(1))
    real = torch.arange(9) < torch.tensor([[9], [7], [9]])
    tokens[~real] = Vocabulary(BASE).pad_id
    completion = real.clone()
    completion[:, :3] = False
    return tokens, real, completion


@torch.no_grad()
def features(model, passes, *, layers=(1, -1), tokens=None, attention_mask="own"):
    own, real, completion = texts()
    return reward_features(
        model.trunk,
        model.vocabulary,
        own if tokens is None else tokens,
        completion,
        attention_mask=real if attention_mask == "own" else attention_mask,
        layers=layers,
        masked_passes=passes,
    )


@torch.no_grad()
@pytest.mark.parametrize("passes", [2, 3])
def test_features_match_a_slow_loop(passes):
    model = make()
    tokens, real, completion = texts()
    found = features(model, passes)
    assert found.shape == (3, 9, feature_width(C, 2, passes)) == (3, 9, 2 * C + 2 * C + 2)
    visible = model.trunk(tokens, real, (1, -1))
    torch.testing.assert_close(found[..., : 2 * C], visible)
    for b in range(3):
        for t in range(9):
            rest = found[b, t, 2 * C :]
            if not completion[b, t]:
                assert (rest == 0).all()
                continue
            blank = tokens[b].clone()
            for s in range(9):
                if completion[b, s] and s % passes == t % passes:
                    blank[s] = model.vocabulary.mask_id
            state = model.encode(blank[None], real[b : b + 1])[0, t]
            logprobs = (model.trunk.wte.weight[:BASE] @ state).log_softmax(0)
            own = tokens[b, t]
            expected = torch.cat(
                [state, model.trunk.wte.weight[own], logprobs[own][None], -(logprobs.exp() * logprobs).sum()[None]]
            )
            torch.testing.assert_close(rest, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_texts_read_in_slices_have_the_features_of_the_whole(causal, monkeypatch):
    expected = features(make(causal), 2)
    monkeypatch.setitem(grpo.features.LOGITS_AT_ONCE, "cpu", 2 * 9 * BASE)
    torch.testing.assert_close(features(make(causal), 2), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_causal_trunk_predicts_from_the_state_before_and_needs_no_more_passes():
    model = make(causal=True)
    tokens, real, completion = texts()
    calls = []
    hook = model.trunk.register_forward_hook(lambda *_: calls.append(1))
    found = features(model, 2)
    hook.remove()
    assert len(calls) == 1
    for b in range(3):
        for t in completion[b].nonzero()[:, 0].tolist():
            state = model.encode(tokens[b : b + 1, :t])[0, -1]  # the prefix alone: nothing later is seen
            torch.testing.assert_close(found[b, t, 2 * C : 3 * C], state)
            logprob = (model.trunk.wte.weight[:BASE] @ state).log_softmax(0)[tokens[b, t]]
            assert found[b, t, -2].item() == pytest.approx(logprob.item(), abs=1e-5)


def test_a_prediction_state_never_sees_its_own_token():
    model = make()
    tokens, _, completion = texts()
    before = features(model, 2)
    for t in (4, 8):
        changed = tokens.clone()
        changed[0, t] = (tokens[0, t] + 1) % BASE
        after = features(model, 2, tokens=changed)
        state = slice(2 * C, 3 * C)
        assert torch.equal(after[0, t, state], before[0, t, state])
        assert not torch.equal(after[0, t, : 2 * C], before[0, t, : 2 * C])  # the visible state does
        assert not torch.equal(after[0, t - 1, state], before[0, t - 1, state])  # and so do its neighbours'
        assert torch.equal(after[1:], before[1:])


def test_what_stands_in_pads_and_how_many_passes_without_prediction():
    model = make()
    tokens, real, completion = texts()
    torch.testing.assert_close(
        features(model, 2, tokens=tokens.masked_fill(~real, 3))[completion], features(model, 2)[completion]
    )
    assert torch.equal(features(model, 0), model.trunk(tokens, real, (1, -1)).detach())
    assert feature_width(C, 2, 0) == 2 * C


def test_heads_cannot_move_features():
    model = make()
    before = features(model, 2)
    model.untie(4)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(1.0)
    assert torch.equal(features(model, 2), before)
