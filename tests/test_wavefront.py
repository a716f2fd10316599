import math

import pytest
import torch

from grpo.config import ModelSection
from grpo.corruption import corrupt, stratified_rows
from grpo.model import GPT
from grpo.noise import PROPOSE, SEED, row_seeds, uniforms
from grpo.sliced_loss import LOGITS_AT_ONCE
from grpo.tokenizer import Vocabulary
from grpo.wavefront import (
    nucleus,
    proposal_logits,
    proposal_logprobs,
    sample_tokens,
    sampler_loss,
    wavefront_fill,
)

torch.set_num_threads(1)
BASE = 24


def make_model(dtype=torch.float64, base=BASE):
    torch.manual_seed(0)
    model = GPT(ModelSection(n_layer=2, n_head=2, n_embd=16), Vocabulary(base), block_size=24).eval().to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.5 if "sampler" in name else 0.5)
    return model


def some_masked(model, rows, columns, seed=0):
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.vocabulary.base_size, (rows, columns), generator=rng)
    rate = torch.linspace(0.1, 1.0, rows)[:, None]
    return tokens.masked_fill(torch.rand(rows, columns, generator=rng) < rate, model.vocabulary.mask_id)


def fill_by_loop(model, hidden, row, seed, step, temperature, top_p, ratio):
    """The definition, one row and one position at a time; returns tokens, waves, seeds and what each position saw."""
    mask_id, base = model.vocabulary.mask_id, model.vocabulary.base_size
    row, saw, log_probability, seeds, waves = row.tolist(), {}, {}, [], 0
    known = lambda i: 0 <= i < len(row) and row[i] < base  # noqa: E731
    while mask_id in row:
        waves += 1
        masks = [i for i, token in enumerate(row) if token == mask_id]
        ready = [i for i in masks if known(i - 1) or known(i + 1)]
        now = [i for i in ready if i - 1 not in ready]
        if not ready:
            score = {}
            for i in masks:
                best = model.heads["lm"](hidden[i])[:base].log_softmax(-1).max().double().item()
                score[i] = round(best * 1024) + uniforms(torch.tensor(seed), step, SEED, i).item()
            peaks = [i for i in masks if score[i] > max(score.get(i - 1, -1e9), score.get(i + 1, -1e9))]
            now = sorted(peaks, key=lambda i: -score[i])[: max(1, int(ratio * len(masks)))]
            seeds += now
        drawn = {}
        for i in now:
            state = hidden[i]
            saw[i] = tuple(row[j] if known(j) else -1 for j in (i - 1, i + 1))
            if i not in seeds:
                left, right = (
                    model.trunk.wte.weight[j] if j >= 0 else torch.zeros_like(state) for j in saw[i]
                )
                state = model.heads["sampler"](state, left, right)
            p = (model.heads["lm"](state)[:base].double() / temperature).softmax(-1)
            order, mass, kept = p.argsort(descending=True).tolist(), 0.0, set()
            for token in order:
                if mass < top_p:
                    kept.add(token)
                mass += p[token].item()
            total = sum(p[token].item() for token in kept)
            u, below = uniforms(torch.tensor(seed), step, PROPOSE, i).item() * total, 0.0
            for token in range(base):
                if token in kept:
                    below += p[token].item()
                    if below > u:
                        drawn[i] = token
                        log_probability[i] = math.log(p[token].item() / total)
                        break
        for i, token in drawn.items():
            row[i] = token
    return row, waves, seeds, saw, log_probability


def num_seeds(result, masked):
    """Positions of each row that were seeds."""
    return torch.zeros_like(masked).masked_scatter(masked, result.by_lm).sum(1).tolist()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_wavefront_matches_a_per_position_loop(temperature, top_p):
    model = make_model()
    tokens = some_masked(model, 24, 21)
    seeds = row_seeds(3, 0, 0, torch.arange(24))
    with torch.no_grad():
        hidden = model.encode(tokens)
        result = wavefront_fill(model, hidden, tokens, seeds=seeds, step=2, temperature=temperature, top_p=top_p,
                                min_neighbors_ratio=0.15, record=True)
        masked = tokens == model.vocabulary.mask_id
        at = 0
        for b in range(24):
            row, waves, boot, saw, logp = fill_by_loop(
                model, hidden[b], tokens[b], seeds[b].item(), 2, temperature, top_p, 0.15
            )
            assert result.tokens[b].tolist() == row
            assert result.waves[b] == waves
            for i in masked[b].nonzero()[:, 0].tolist():
                assert tuple(result.neighbors[at].tolist()) == saw[i]
                assert result.by_lm[at].item() == (i in boot)
                assert result.sampled.logprobs[at].item() == pytest.approx(logp[i], abs=1e-12)
                at += 1
        assert at == len(result.neighbors)
        recomputed = proposal_logprobs(
            proposal_logits(model, hidden[masked], result.neighbors, result.by_lm), temperature, result.sampled.support
        )
        chosen = recomputed.gather(1, result.sampled.tokens[:, None])[:, 0]
        torch.testing.assert_close(chosen, result.sampled.logprobs, rtol=0, atol=1e-12)
        assert num_seeds(result, masked)[-1] == 3  # 15 % of 21: the last row has nothing known


def test_no_two_adjacent_masks_are_filled_blind_to_each_other():
    model = make_model()
    tokens = some_masked(model, 64, 24, seed=1)
    result = wavefront_fill(model, model.encode(tokens), tokens, seeds=torch.arange(64), step=0,
                            min_neighbors_ratio=0.3, record=True)
    masked = tokens == model.vocabulary.mask_id
    saw_right = torch.zeros_like(masked).masked_scatter(masked, result.neighbors[:, 1] >= 0)
    saw_left = torch.zeros_like(masked).masked_scatter(masked, result.neighbors[:, 0] >= 0)
    pair = masked[:, :-1] & masked[:, 1:]
    assert (saw_right[:, :-1] ^ saw_left[:, 1:])[pair].all()  # exactly one of two adjacent masks saw the other


def test_a_row_does_not_depend_on_its_batch_mates():
    model = make_model()
    tokens = some_masked(model, 16, 20, seed=2)
    seeds = row_seeds(0, 0, 0, torch.arange(16))
    fill = lambda rows: wavefront_fill(  # noqa: E731
        model, model.encode(tokens[rows]), tokens[rows], seeds=seeds[rows], step=0, min_neighbors_ratio=0.1
    ).tokens
    together = fill(torch.arange(16))
    for row in range(16):
        assert torch.equal(fill(torch.tensor([row]))[0], together[row])
    assert torch.equal(fill(torch.arange(15, -1, -1)), together.flip(0))


def test_one_seeded_row_does_not_starve_rows_without_any_known_token():
    model = make_model()
    tokens = torch.full((6, 24), model.vocabulary.mask_id)
    tokens[0, 5] = 3
    result = wavefront_fill(model, model.encode(tokens), tokens, seeds=torch.arange(6), step=0)
    assert (result.tokens < BASE).all()
    assert num_seeds(result, tokens == model.vocabulary.mask_id) == [0, 1, 1, 1, 1, 1]
    assert result.waves[0] == 18  # from position 5 to the right edge


def test_pads_are_neither_filled_nor_neighbors_and_part_the_row():
    model = make_model()
    vocabulary = model.vocabulary
    tokens = torch.full((2, 12), vocabulary.mask_id)
    tokens[0, 2] = 1
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, 5:7] = real[0, 11] = real[1, 9:] = False  # row 0: a run with a known token, a pad, a run without
    tokens[~real] = vocabulary.pad_id
    for text_in_pads in (vocabulary.pad_id, 4, vocabulary.mask_id):
        inputs = torch.where(real, tokens, text_in_pads)
        result = wavefront_fill(model, model.encode(inputs, real), inputs, seeds=torch.arange(2), step=0,
                                attention_mask=real, record=True)
        assert (result.tokens[real] < BASE).all() and (result.tokens[~real] == text_in_pads).all()
        assert num_seeds(result, real & (tokens == vocabulary.mask_id)) == [1, 1]
        if text_in_pads == vocabulary.pad_id:
            reference = result
        assert torch.equal(result.tokens[real], reference.tokens[real])


def test_nothing_masked_is_nothing_done():
    model = make_model()
    tokens = torch.randint(0, BASE, (2, 8))
    result = wavefront_fill(model, model.encode(tokens), tokens, seeds=torch.arange(2), step=0, top_p=0.5, record=True)
    assert torch.equal(result.tokens, tokens) and result.waves.tolist() == [0, 0] and result.neighbors.shape == (0, 2)


def test_a_zero_initialised_sampler_proposes_as_the_lm_head():
    torch.manual_seed(0)
    model = GPT(ModelSection(n_layer=1, n_head=2, n_embd=16), Vocabulary(BASE), block_size=8).eval()
    hidden, neighbors = torch.randn(5, 16), torch.randint(-1, BASE, (5, 2))
    assert torch.equal(proposal_logits(model, hidden, neighbors), proposal_logits(model, hidden))


def test_sampled_frequencies_follow_the_tempered_nucleus_and_never_a_special():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0], dtype=torch.float64)
    num = 40_000
    noise = uniforms(row_seeds(0, 0, 0, torch.arange(num)), 1)
    sampled = sample_tokens(logits.expand(num, -1), noise, temperature=0.5, top_p=0.9)
    expected = torch.tensor([math.exp(4), math.exp(2), 0, 0, 0], dtype=torch.float64)  # 0.865 + 0.117 reaches 0.9
    expected /= expected.sum()
    frequency = torch.bincount(sampled.tokens, minlength=5) / num
    assert (frequency - expected).abs().max() < 0.006
    assert sampled.support[0].tolist() == [True, True, False, False, False]
    torch.testing.assert_close(sampled.logprobs, expected.log()[sampled.tokens])
    torch.testing.assert_close(sampled.confidences, logits.log_softmax(0)[sampled.tokens])


def test_noise_at_either_end_draws_a_possible_token():
    logits = torch.tensor([[-1e9, 0.0, 0.0, -1e9]] * 3, dtype=torch.float64)
    noise = torch.tensor([2.0**-54, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    assert sample_tokens(logits, noise).tokens.tolist() == [1, 2, 2]


def test_specials_are_never_sampled_even_when_they_are_the_likeliest():
    model = make_model(base=10)
    model.heads["lm"].untie()
    with torch.no_grad():
        model.heads["lm"].matrix[10:] *= 100
    tokens = some_masked(model, 32, 24)
    assert (wavefront_fill(model, model.encode(tokens), tokens, seeds=torch.arange(32), step=0).tokens < 10).all()


def test_the_nucleus_is_the_smallest_set_that_reaches_its_mass():
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]], dtype=torch.float64)
    assert nucleus(probabilities.log(), 0.7).tolist() == [[False, True, False, True], [True, False, False, False]]
    assert nucleus(probabilities.log(), 1e-9).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("at_once", [1 << 21, 40])
def test_sampler_loss_reaches_no_other_parameter(untied, at_once, monkeypatch):
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", at_once)
    model = make_model()
    if untied:
        model.untie(8)
    clean = torch.randint(0, BASE, (4, 12))
    inputs = clean.masked_fill(torch.rand(4, 12) < 0.5, model.vocabulary.mask_id)
    hidden = model.encode(inputs)
    loss, _ = sampler_loss(model, hidden, clean, inputs == model.vocabulary.mask_id, seeds=torch.arange(4),
                           side_dropout=0.3, denominator=1.0)
    loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in model.named_parameters() if name.startswith("heads.sampler.")}
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in reached)


@pytest.mark.parametrize("at_once", [1 << 21, 40])
def test_sampler_loss_equals_a_loop_over_masked_positions(at_once, monkeypatch):
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", at_once)
    model = make_model()
    vocabulary = model.vocabulary
    clean = torch.randint(0, BASE, (3, 9))
    clean[1, 6:] = vocabulary.pad_id
    inputs = clean.masked_fill((torch.rand(3, 9) < 0.6) & (clean < BASE), vocabulary.mask_id)
    masked = inputs == vocabulary.mask_id
    hidden = model.encode(inputs)
    zero = torch.zeros(16, dtype=torch.float64)
    embed = lambda row, i: model.trunk.wte.weight[row[i]] if 0 <= i < 9 and row[i] < BASE else zero  # noqa: E731
    for dropout, sees in ((0.0, embed), (1.0, lambda row, i: zero)):
        total = 0.0
        for b, i in masked.nonzero().tolist():
            state = model.heads["sampler"](hidden[b, i], sees(clean[b], i - 1), sees(clean[b], i + 1))
            total -= model.heads["lm"](state)[:BASE].log_softmax(-1)[clean[b, i]]
        loss, _ = sampler_loss(model, hidden, clean, masked, seeds=torch.arange(3), side_dropout=dropout,
                               denominator=masked.sum())
        torch.testing.assert_close(loss, total / masked.sum(), rtol=0, atol=1e-12)


class SidesSeen(torch.nn.Module):
    """In the place of the sampler head: keeps which neighbours it was given."""

    def forward(self, hidden, left, right):
        self.left, self.right = (side.abs().sum(-1) > 0 for side in (left, right))
        return hidden


def sides_seen(clean, masked, seeds):
    model = make_model()
    model.heads["sampler"] = probe = SidesSeen()
    sampler_loss(model, torch.zeros(*clean.shape, 16, dtype=torch.float64), clean, masked, seeds=seeds,
                 side_dropout=0.3, denominator=1.0)
    return probe


def test_sides_are_hidden_independently_and_at_the_asked_rate():
    clean = torch.randint(0, BASE, (2000, 24))
    probe = sides_seen(clean, torch.ones_like(clean, dtype=torch.bool), row_seeds(0, 0, 0, torch.arange(2000)))
    left, right = probe.left.view(2000, 24), probe.right.view(2000, 24)
    assert not left[:, 0].any() and not right[:, -1].any()
    left, right = left[:, 1:-1].double(), right[:, 1:-1].double()
    assert abs(left.mean() - 0.7) < 0.01 and abs(right.mean() - 0.7) < 0.01
    assert abs((left * right).mean() - 0.49) < 0.01


def test_sides_are_hidden_alike_however_much_of_a_row_is_masked():
    """The dropout's noise is not that which masked the token."""
    clean = torch.randint(0, BASE, (4000, 24))
    everywhere = torch.ones_like(clean, dtype=torch.bool)
    seeds, times = stratified_rows(0, 0, 0, torch.arange(4000), 4000)
    masked = corrupt(clean, vocabulary=Vocabulary(BASE), attention_mask=everywhere, seeds=seeds, times=times,
                     remask_ratio=0.0, guaranteed_correct=0.0).masked
    masked[:, [0, -1]] = False  # nothing lies beyond
    rate = times[masked.nonzero()[:, 0]]
    probe = sides_seen(clean, masked, seeds)
    for few in (rate < 0.3, rate > 0.7):
        assert abs(probe.left[few].double().mean() - 0.7) < 0.02 and abs(probe.right[few].double().mean() - 0.7) < 0.02


def test_recorded_entropies_are_those_of_the_distribution_drawn_from():
    logits = torch.randn(5, 7, dtype=torch.float64)
    noise = torch.full((5,), 0.3, dtype=torch.float64)
    drawn = sample_tokens(logits, noise, temperature=0.5, top_p=0.8, record=True)
    p = (logits / 0.5).masked_fill(~drawn.support, -torch.inf).softmax(-1)
    torch.testing.assert_close(drawn.entropies, torch.special.entr(p).sum(-1))
