import math
from collections import Counter

import pytest
import torch

from grpo.config import ModelSection
from grpo.denoise import denoise, num_masked_after
from grpo.model import GPT
from grpo.noise import row_seeds
from grpo.remasking import (
    FRESH_ONLY,
    POLICIES,
    draw_log_probs,
    draw_turns,
    log_mask_probability,
    plackett_luce_weights,
)
from grpo.tokenizer import Vocabulary
from grpo.wavefront import proposal_logits, proposal_logprobs

torch.set_num_threads(1)
BASE, MASK = 20, 20


def plackett_luce_logprob(log_weights, eligible, order):
    """Log-probability [B] of whole choices: the sum of their draws."""
    choice, draw = (order >= 0).nonzero(as_tuple=True)
    table = draw_log_probs(log_weights, draw_turns(eligible, order), choice, draw)
    drawn = table.gather(1, order[choice, draw][:, None])[:, 0]
    return torch.zeros(len(order), dtype=torch.float64).index_add(0, choice, drawn)


def make_model(mode="generator", base=BASE, std=0.5, dtype=torch.float32):
    torch.manual_seed(0)
    model = GPT(ModelSection(n_layer=1, n_head=2, n_embd=16), Vocabulary(base), block_size=12, mode=mode)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval().to(dtype)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def classifier():
    return make_model("token_classifier")


def prompts(rows=6, columns=12, given=3):
    tokens = torch.randint(0, BASE, (rows, columns), generator=torch.Generator().manual_seed(5))
    tokens[:, given:] = MASK
    return tokens


def run(model, tokens, **options):
    records = []
    seeds = options.pop("seeds", row_seeds(0, 0, 0, torch.arange(len(tokens))))
    options = dict(steps=4, on_step=records.append) | options
    return denoise(model, tokens, seeds=seeds, **options), records


@pytest.mark.parametrize("sampler", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_ends_with_text_and_keeps_the_prompt(model, classifier, policy, sampler):
    tokens = prompts()
    text, records = run(model, tokens, remasking=policy, remasking_model=classifier, sampler=sampler, randomness=0.5)
    assert (text < BASE).all() and torch.equal(text[:, :3], tokens[:, :3])
    assert [record.masked.sum(1).unique().tolist() for record in records] == [[9], [6], [4], [2]]
    for before, after in zip(records, records[1:], strict=False):
        assert torch.equal(after.inputs, before.proposals.masked_fill(before.remask, MASK))
        assert torch.equal(after.masked, before.remask)
        if policy in FRESH_ONLY:
            assert not (before.remask & ~before.masked).any()
    if policy not in FRESH_ONLY:
        assert any((r.remask & ~r.masked).any() for r in records)  # they may take back older tokens
    assert not records[-1].remask.any()


@pytest.mark.parametrize(("policy", "expected"), [("random", 4), ("confidence", 4), ("critic", 7), ("self", 7)])
@pytest.mark.parametrize("sampler", [False, True])
def test_trunk_forwards_per_step(model, policy, expected, sampler):
    calls = []
    hook = model.trunk.register_forward_hook(lambda *_: calls.append(1))
    run(model, prompts(), remasking=policy, sampler=sampler, randomness=0.5)
    hook.remove()
    assert len(calls) == expected  # one per step, a second one on all but the last where the filled text is read


def test_the_remasking_model_costs_its_own_forward_and_none_of_the_generators(model, classifier):
    calls = Counter()
    hooks = [
        m.trunk.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, m in (("generator", model), ("classifier", classifier))
    ]
    run(model, prompts(), remasking="auto", remasking_model=classifier, randomness=0.5)
    for hook in hooks:
        hook.remove()
    assert calls == {"generator": 4, "classifier": 3}


def test_head_logits_are_computed_at_masks_only(model):
    rows = []
    hook = model.heads["lm"].register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    run(model, prompts(), remasking="critic")
    hook.remove()
    assert rows == [6 * 9, 6 * 6, 6 * 4, 6 * 2]


def test_schedules_leave_the_stated_numbers():
    n = torch.tensor([0, 1, 7, 8])
    linear = [num_masked_after(s, 4, n, "linear").tolist() for s in range(4)]
    assert linear == [[0, 0, 5, 6], [0, 0, 3, 4], [0, 0, 1, 2], [0, 0, 0, 0]]
    cosine = [num_masked_after(s, 4, torch.tensor([100]), "cosine").item() for s in range(4)]
    assert cosine == [math.floor(100 * math.cos(math.pi * (s + 1) / 8)) for s in range(3)] + [0] == [92, 70, 38, 0]
    with pytest.raises(ValueError, match="denoise.schedule"):
        num_masked_after(0, 4, n, "square")


@pytest.mark.parametrize("policy", ["critic", "random"])
def test_rows_with_different_numbers_of_masks_follow_their_own_schedule(model, policy):
    tokens = prompts(4)
    tokens[1, 6:], tokens[2], tokens[3] = 1, 2, MASK  # 3, 0 and 12 masks
    text, records = run(model, tokens, remasking=policy, steps=3)
    assert [record.masked.sum(1).tolist() for record in records] == [[9, 3, 0, 12], [6, 2, 0, 8], [3, 1, 0, 4]]
    assert (text < BASE).all() and torch.equal(text[2], tokens[2])


def test_an_unprotected_text_is_revised_where_the_policy_may_take_tokens_back(model):
    tokens = torch.randint(0, BASE, (4, 12))
    free = torch.zeros(4, 12, dtype=torch.bool)
    revised, records = run(model, tokens, remasking="critic", protected=free, randomness=0.0)
    assert [record.masked.sum().item() for record in records] == [0, 4 * 9, 4 * 6, 4 * 3]
    assert (revised != tokens).any()
    kept, _ = run(model, tokens, remasking="random", protected=free)
    assert torch.equal(kept, tokens)  # nothing was filled, so nothing can be taken back


def test_pads_stay_and_do_not_matter(model):
    vocabulary = model.vocabulary
    tokens, real = prompts(), torch.ones(6, 12, dtype=torch.bool)
    real[::2, 9:] = False
    results = []
    for sampler in (False, True):
        for content in (vocabulary.pad_id, MASK, 3):
            inputs = torch.where(real, tokens, content)
            text, records = run(model, inputs, attention_mask=real, remasking="critic", sampler=sampler)
            assert (text[~real] == content).all() and (text[real] < BASE).all()
            assert not any((record.remask & ~real).any() for record in records)
            results.append(text[real])
        assert torch.equal(results[-1], results[-2]) and torch.equal(results[-1], results[-3])


@pytest.mark.parametrize("policy", ["self", "confidence"])
@pytest.mark.parametrize("sampler", [False, True])
def test_same_seed_same_text_whatever_the_batch(policy, sampler):
    model = make_model(dtype=torch.float64)
    tokens, seeds = prompts(8), row_seeds(1, 2, 3, torch.arange(8))
    options = dict(remasking=policy, sampler=sampler, randomness=0.5, temperature=0.9, top_p=0.9)
    together, _ = run(model, tokens, seeds=seeds, **options)
    for part in (slice(0, 1), slice(3, 6), slice(7, None)):
        assert torch.equal(run(model, tokens[part], seeds=seeds[part], **options)[0], together[part])
    assert not torch.equal(run(model, tokens, seeds=seeds + 1, **options)[0], together)


def test_specials_are_never_proposed(model):
    loud = make_model()
    loud.untie()
    with torch.no_grad():
        loud.heads["lm"].matrix[BASE:] *= 50
    for sampler in (False, True):
        _, records = run(loud, prompts(32), remasking="self", sampler=sampler, randomness=0.5)
        assert all((record.proposals < BASE).all() for record in records)


@pytest.mark.parametrize("sampler", [False, True])
def test_recorded_states_give_the_recorded_logprobs_and_equal_a_replay(sampler):
    model = make_model(dtype=torch.float64)
    _, records = run(model, prompts(), remasking="self", sampler=sampler, temperature=0.7, top_p=0.8, mask_bias=0.5,
                     randomness=0.5)
    with torch.no_grad():
        for record in records:
            logits = proposal_logits(model, record.hidden, record.neighbors, record.by_lm)
            logprobs = proposal_logprobs(logits, 0.7, record.support)
            chosen = logprobs.gather(1, record.proposals[record.masked][:, None])[:, 0]
            torch.testing.assert_close(chosen, record.logprobs, rtol=0, atol=1e-12)
            torch.testing.assert_close(model.encode(record.inputs)[record.masked], record.hidden, rtol=0, atol=1e-12)
            if record.scores is not None:
                scores = log_mask_probability(model, record.judged, 0.5)
                torch.testing.assert_close(scores, record.scores[record.eligible], rtol=0, atol=1e-12)


def test_a_full_records_likelihood_ratio_is_exactly_one(model):
    _, records = run(model, prompts(), remasking="random", temperature=0.7, top_p=0.8)
    with torch.no_grad():
        for record in records:
            logprobs = proposal_logprobs(proposal_logits(model, record.hidden), 0.7, record.support)
            chosen = logprobs.gather(1, record.proposals[record.masked][:, None])[:, 0]
            assert torch.equal((chosen - record.logprobs).exp(), torch.ones_like(chosen))


@pytest.mark.parametrize("sampler", [False, True])
@pytest.mark.parametrize("randomness", [0.0, 0.5])
@pytest.mark.parametrize("policy", POLICIES)
def test_probabilities_of_all_trajectories_sum_to_one(policy, randomness, sampler):
    """V = 3, T = 3, 2 steps: 30,000 rows visit every trajectory; their recorded probabilities must sum to 1.

    Under the wavefront a known fourth token stands at the right, for the seeds of a blank row depend on its noise.
    """
    model = make_model(base=3, std=0.12, dtype=torch.float64)
    classifier = make_model("token_classifier", base=3, std=0.3, dtype=torch.float64)
    rows = 30_000
    tokens = torch.full((rows, 4 if sampler else 3), model.vocabulary.mask_id)
    tokens[:, 3:] = 1
    records = []
    denoise(
        model,
        tokens,
        seeds=row_seeds(0, 0, 0, torch.arange(rows)),
        steps=2,
        remasking=policy,
        randomness=randomness,
        sampler=sampler,
        mask_bias=1.0,
        remasking_model=classifier,
        on_step=records.append,
    )
    randomness = 1.0 if policy == "random" else randomness
    logprob = torch.zeros(rows, dtype=torch.float64)
    for record in records:
        logprob += (
            torch.zeros(record.masked.shape, dtype=torch.float64).masked_scatter(record.masked, record.logprobs).sum(1)
        )
        if record.scores is not None and randomness > 0:
            weights = plackett_luce_weights(record.scores, randomness)
            logprob += plackett_luce_logprob(weights, record.eligible, record.remask_order)
    trajectory = torch.cat([records[0].proposals, records[0].remask_order, records[1].proposals], dim=1)
    distinct, index = trajectory.unique(dim=0, return_inverse=True)
    probability = torch.zeros(len(distinct), dtype=torch.float64).index_put((index,), logprob.exp())
    assert (probability[index] - logprob.exp()).abs().max() < 1e-12  # one probability per trajectory
    assert len(distinct) == 27 * 3 * (1 if randomness == 0 else 3)
    assert probability.sum().item() == pytest.approx(1, abs=1e-10)
    frequency = torch.bincount(index) / rows
    assert ((frequency - probability).abs() / (probability / rows).sqrt()).max() < 5
