import itertools
import math

import pytest
import torch

from grpo.config import ModelSection
from grpo.denoise import denoise
from grpo.model import GPT
from grpo.noise import row_seeds, uniforms
from grpo.remasking import (
    POLICIES,
    Filled,
    choose,
    draw_log_probs,
    draw_turns,
    forwards,
    log_wrong_from_states,
    plackett_luce_weights,
    resolve_policy,
    steps_within,
)
from grpo.tokenizer import Vocabulary

torch.set_num_threads(1)
BASE = 20


def plackett_luce_logprob(log_weights, eligible, order):
    """Log-probability [B] of whole choices: the sum of their draws."""
    choice, draw = (order >= 0).nonzero(as_tuple=True)
    table = draw_log_probs(log_weights, draw_turns(eligible, order), choice, draw)
    drawn = table.gather(1, order[choice, draw][:, None])[:, 0]
    return torch.zeros(len(order), dtype=torch.float64).index_add(0, choice, drawn)


def make_model(mode="generator", **options):
    torch.manual_seed(0)
    section = ModelSection(n_layer=1, n_head=2, n_embd=16, **options)
    model = GPT(section, Vocabulary(BASE), block_size=12, mode=mode).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def a_filled_text(model, **changes):
    tokens = torch.randint(0, BASE, (3, 8), generator=torch.Generator().manual_seed(1))
    eligible = torch.rand(3, 8, generator=torch.Generator().manual_seed(2)) < 0.6
    facts = dict(
        model=model,
        tokens=tokens,
        attention_mask=None,
        eligible=eligible,
        num_eligible=int(eligible.sum()),
        confidences=torch.zeros(3, 8),
        mask_bias=0.0,
        remasking_model=None,
    )
    return Filled(**(facts | changes))


def test_the_first_available_policy_decides_unless_one_is_named():
    classifier = make_model("token_classifier")
    critic, bare = make_model(), make_model(critic=False)
    assert list(POLICIES) == ["model", "critic", "self", "confidence", "random"]
    assert resolve_policy("auto", critic, classifier) == "model"
    assert resolve_policy("auto", critic, None) == "critic"
    assert resolve_policy("auto", bare, None) == "self"
    for name in POLICIES:
        assert resolve_policy(name, critic, classifier) == name
    for name, model, other in (("model", critic, None), ("critic", bare, classifier), ("best", critic, None)):
        with pytest.raises(ValueError, match="denoise.remasking"):
            resolve_policy(name, model, other)


@torch.no_grad()
def test_each_policy_gives_the_log_probability_of_wrong():
    model, classifier = make_model(), make_model("token_classifier")
    filled = a_filled_text(
        model, mask_bias=1.5, remasking_model=classifier, confidences=torch.linspace(-9, 0, 24).view(3, 8)
    )
    logits = model(filled.tokens).double()[..., : BASE + 1]
    logits[..., BASE] += 1.5
    expected = {
        "model": classifier(filled.tokens).double().softmax(-1)[..., 1],
        "critic": model.critic_scores(filled.tokens).double().sigmoid(),
        "self": logits.softmax(-1)[..., BASE],
        "confidence": 1 - filled.confidences.double().exp(),
        "random": torch.ones(3, 8, dtype=torch.float64),
    }
    for name, policy in POLICIES.items():
        verdict = policy(filled)
        assert verdict.log_wrong.dtype == torch.float64 and verdict.log_wrong.isfinite().all()
        torch.testing.assert_close(
            verdict.log_wrong.exp()[filled.eligible], expected[name][filled.eligible], rtol=1e-5, atol=1e-11
        )
        if name in ("self", "critic"):
            again = log_wrong_from_states(name, model, verdict.hidden, 1.5)
            torch.testing.assert_close(again, verdict.log_wrong[filled.eligible], rtol=0, atol=0)
        else:
            assert verdict.hidden is None


def test_exactly_k_are_chosen_and_protected_positions_never_are():
    rows, columns = 200, 12
    noise = uniforms(torch.arange(rows)[:, None], torch.arange(columns))
    log_wrong = torch.randn(rows, columns, dtype=torch.float64) - 5
    eligible = torch.rand(rows, columns) < 0.4
    log_wrong[~eligible] = 100.0  # a protected position that looks wrong must not take a place
    k = torch.randint(0, columns + 1, (rows,))
    for randomness in (0.0, 0.3, 1.0):
        remask, order = choose(log_wrong, k, eligible, randomness=randomness, noise=noise)
        assert torch.equal(remask.sum(1), k.minimum(eligible.sum(1)))
        assert not (remask & ~eligible).any()
        listed = torch.zeros(rows, columns + 1, dtype=torch.long).scatter_add(
            1, order.where(order >= 0, columns), torch.ones_like(order)
        )
        assert torch.equal(listed[:, :columns], remask.long())


def test_no_randomness_takes_the_likeliest_wrong_and_full_randomness_ignores_them():
    rows = 4000
    noise = uniforms(torch.arange(rows)[:, None], torch.arange(4))
    log_wrong = torch.tensor([-1.0, -8.0, -2.0, -8.0], dtype=torch.float64).expand(rows, -1)
    everywhere, two = torch.ones(rows, 4, dtype=torch.bool), torch.full((rows,), 2)
    _, order = choose(log_wrong, two, everywhere, randomness=0.0, noise=noise)
    assert (order[:, :2] == torch.tensor([0, 2])).all()
    remask, _ = choose(log_wrong, two, everywhere, randomness=1.0, noise=noise)
    assert (remask.double().mean(0) - 0.5).abs().max() < 0.03


def test_a_choice_does_not_depend_on_batch_mates():
    noise = uniforms(torch.arange(8)[:, None], torch.arange(6))
    log_wrong, k, everywhere = torch.randn(8, 6), torch.full((8,), 3), torch.ones(8, 6, dtype=torch.bool)
    call = lambda r: choose(  # noqa: E731
        log_wrong[r].double(), k[r], everywhere[r], randomness=0.5, noise=noise[r]
    )[1]
    together = call(slice(None))
    assert all(torch.equal(call(slice(i, i + 1))[0], together[i]) for i in range(8))


def test_turns_by_hand():
    eligible = torch.tensor([[True, True, False, True], [True, True, True, True]])
    order = torch.tensor([[3, 0, -1, -1], [-1, -1, -1, -1]])
    assert draw_turns(eligible, order).tolist() == [[1, 4, -1, 0], [4, 4, 4, 4]]


def test_plackett_luce_equals_enumeration():
    log_weights = torch.tensor([[0.3, -2.0, 1.1, 0.0, 5.0]], dtype=torch.float64)
    eligible = torch.tensor([[True, True, True, True, False]])
    weights = log_weights[0].exp()
    for k in range(4):
        total = 0.0
        for order in itertools.permutations(range(4), k):
            expected, left = 0.0, sum(weights[i].item() for i in range(4))
            for i in order:
                expected += math.log(weights[i].item() / left)
                left -= weights[i].item()
            padded = torch.tensor([[*order, *[-1] * (5 - k)]])
            got = plackett_luce_logprob(log_weights, eligible, padded).item()
            assert got == pytest.approx(expected, abs=1e-12)
            total += math.exp(got)
        assert total == pytest.approx(1, abs=1e-12)


def test_plackett_luce_gradient_is_finite_and_right():
    eligible = torch.tensor([[True, True, False, True], [False, True, False, True]])
    order = torch.tensor([[3, 0, -1, -1], [1, 3, -1, -1]])
    log_weights = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: plackett_luce_logprob(w, eligible, order), (log_weights,))


def test_randomness_is_an_exponent_of_the_probability_of_wrong():
    log_wrong = torch.tensor([[0.5, 0.1]], dtype=torch.float64).log()
    for randomness, expected in ((1.0, [1.0, 1.0]), (0.5, [0.5, 0.1]), (0.25, [0.125, 0.001])):
        torch.testing.assert_close(plackett_luce_weights(log_wrong, randomness).exp()[0].tolist(), expected)


def test_choices_follow_the_plackett_luce_law():
    rows, randomness = 60_000, 0.6
    log_wrong = torch.tensor([-0.5, -1.0, -2.5], dtype=torch.float64)
    everywhere = torch.ones(rows, 3, dtype=torch.bool)
    _, order = choose(
        log_wrong.expand(rows, -1),
        torch.full((rows,), 2),
        everywhere,
        randomness=randomness,
        noise=uniforms(torch.arange(rows)[:, None], torch.arange(3)),
    )
    weights = plackett_luce_weights(log_wrong, randomness)[None]
    for pair in itertools.permutations(range(3), 2):
        listed = torch.tensor([[*pair, -1]])
        expected = plackett_luce_logprob(weights, everywhere[:1], listed).exp().item()
        frequency = (order[:, :2] == torch.tensor(pair)).all(1).double().mean().item()
        assert abs(frequency - expected) < 4 * math.sqrt(expected / rows)


@pytest.mark.parametrize("randomness", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_forwards_are_those_that_denoising_takes(policy, randomness):
    model, classifier, passes = make_model(), make_model("token_classifier"), []
    for each in (model, classifier):
        each.trunk.register_forward_hook(lambda *_: passes.append(1))
    tokens = torch.full((3, 12), model.vocabulary.mask_id)
    denoise(model, tokens, seeds=row_seeds(0, 1, 0, torch.arange(3)), steps=5, remasking=policy,
            randomness=randomness, remasking_model=classifier if policy == "model" else None)
    assert len(passes) == forwards(policy, 5, randomness)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num", [1, 7, 8])
def test_steps_within_are_the_most_that_the_forwards_pay_for(policy, num):
    steps = steps_within(policy, num)
    assert forwards(policy, steps, 0.5) <= num < forwards(policy, steps + 1, 0.5)
