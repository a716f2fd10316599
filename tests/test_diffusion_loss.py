import itertools
import math

import pytest
import torch

from grpo.corruption import Corrupted, corrupt, mask_only, stratified_rows
from grpo.diffusion_loss import (
    corrective_denominator,
    corrective_loss,
    mdlm_denominator,
    mdlm_loss,
    nelbo,
    next_token_counted,
    next_token_loss,
    ratio_with_error,
)
from grpo.metrics import means, merge_sums
from grpo.tokenizer import Vocabulary

torch.set_num_threads(1)
VOCABULARY = Vocabulary(6)
MASK, PAD = VOCABULARY.mask_id, VOCABULARY.pad_id
WEIGHTS = {"weight_unmask": 1.5, "weight_remask": 0.7}


def make_case(num_rows=8, num_tokens=12, seed=0, make=None):
    rng = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, 6, (num_rows, num_tokens), generator=rng)
    attention_mask = torch.arange(num_tokens) < torch.randint(5, num_tokens + 1, (num_rows, 1), generator=rng)
    clean = clean.masked_fill(~attention_mask, PAD)
    seeds, times = stratified_rows(seed, 1, 0, torch.arange(num_rows), num_rows)
    common = {"vocabulary": VOCABULARY, "attention_mask": attention_mask, "seeds": seeds, "times": times}
    if make is mask_only:
        corrupted = mask_only(clean, **common)
    else:
        corrupted = corrupt(clean, **common, remask_ratio=1.0, guaranteed_correct=0.01)
    logits = torch.randn(num_rows, num_tokens, VOCABULARY.size, generator=rng, dtype=torch.float64) * 2
    return corrupted, logits.requires_grad_()


def rows_of(corrupted, rows):
    return Corrupted(**{name: tensor[rows] for name, tensor in vars(corrupted).items()})


def corrective(logits, corrupted, denominator=None, penalty=0.5, mask_bias=1.2, applies_to="sampling", **weights):
    weights = WEIGHTS | weights
    if denominator is None:
        denominator = corrective_denominator(corrupted, **weights)
    return corrective_loss(
        logits, corrupted, vocabulary=VOCABULARY, denominator=denominator, penalty=penalty, mask_bias=mask_bias,
        applies_to=applies_to, **weights,
    )


@pytest.mark.parametrize("applies_to", ["sampling", "loss"])
def test_corrective_loss_equals_a_loop_over_positions(applies_to):
    corrupted, logits = make_case()
    loss, metrics = corrective(logits, corrupted, applies_to=applies_to)
    total = weight_total = 0.0
    signal = []
    for b in range(8):
        inputs, clean = corrupted.inputs[b].tolist(), corrupted.clean[b].tolist()
        visible = [t for t in range(12) if clean[t] != PAD and inputs[t] != MASK]
        rate = sum(inputs[t] != clean[t] for t in visible) / max(len(visible), 1)
        for t in range(12):
            if clean[t] == PAD:
                continue
            exponentials = [math.exp(x) for x in logits[b, t, : MASK + 1].tolist()]
            biased = exponentials[:MASK] + [exponentials[MASK] * math.exp(1.2)]
            seen = biased if applies_to == "loss" else exponentials
            p = [x / sum(seen) for x in seen]
            if inputs[t] == MASK:
                weight, target, static = 1.5, clean[t], 1.5
                signal.append(biased[MASK] / sum(biased))
            elif inputs[t] != clean[t]:
                weight, target, static = 0.7, MASK, 0.7
            else:
                weight, target, static = 1 - p[MASK] * (1 - 0.5 * (1 - rate)), clean[t], 1.0
            total -= weight * math.log(p[target])
            weight_total += static
    assert loss.item() == pytest.approx(total / weight_total, rel=1e-6)
    assert means(metrics)["p_mask_unmask"] == pytest.approx(sum(signal) / len(signal), rel=1e-6)
    assert metrics["p_mask_unmask"][1] == len(signal)


def test_corrective_loss_of_a_hand_worked_row():
    # Uniform logits over 6 words and [MASK]: every cross-entropy is log 7, p_mask = 1/7. One of the three visible
    # inputs is wrong: e = 0.5 x 2/3 = 1/3, keep weight = 1 - 1/7 x 2/3 = 19/21.
    clean = torch.tensor([[0, 1, 2, 3]])
    masked, replaced = torch.tensor([[True, False, False, False]]), torch.tensor([[False, True, False, False]])
    corrupted = Corrupted(
        inputs=torch.tensor([[MASK, 5, 2, 3]]), targets=torch.tensor([[0, MASK, 2, 3]]), clean=clean,
        loss_mask=torch.ones_like(masked), masked=masked, replaced=replaced, rate=torch.tensor([0.5]),
    )
    loss, metrics = corrective(
        torch.zeros(1, 4, VOCABULARY.size), corrupted, mask_bias=0.0, weight_unmask=1.0, weight_remask=1.0
    )
    assert loss.item() == pytest.approx((2 + 2 * 19 / 21) / 4 * math.log(7), rel=1e-6)
    assert means(metrics)["keep_weight"] == pytest.approx(19 / 21)
    assert means(metrics)["p_mask_remask"] == pytest.approx(1 / 7)


def losses_of(name, logits, corrupted, denominator=None):
    """(loss, metrics, denominator) of one of the three losses on a batch or a part of it."""
    if name == "corrective":
        denominator = corrective_denominator(corrupted, **WEIGHTS) if denominator is None else denominator
        return *corrective(logits, corrupted, denominator), denominator
    if name == "mdlm":
        denominator = mdlm_denominator(corrupted) if denominator is None else denominator
        return *mdlm_loss(logits, corrupted, vocabulary=VOCABULARY, denominator=denominator), denominator
    if denominator is None:
        denominator = next_token_counted(corrupted.loss_mask).sum()
    loss = next_token_loss(
        logits, corrupted.clean, attention_mask=corrupted.loss_mask, vocabulary=VOCABULARY, denominator=denominator
    )
    return *loss, denominator


NAMES = ["corrective", "mdlm", "next_token"]


@pytest.mark.parametrize("name", NAMES)
def test_split_batch_gives_same_gradient_and_metrics(name):
    corrupted, logits = make_case(make=mask_only if name == "mdlm" else None)
    loss, metrics, denominator = losses_of(name, logits, corrupted)
    (whole,) = torch.autograd.grad(loss, logits)
    parts = torch.zeros_like(whole)
    merged = {}
    for rows in (slice(0, 1), slice(1, 6), slice(6, 8)):
        loss, part_metrics, _ = losses_of(name, logits[rows], rows_of(corrupted, rows), denominator)
        parts += torch.autograd.grad(loss, logits)[0]
        merged = merge_sums(merged, part_metrics)
    assert torch.allclose(parts, whole, rtol=1e-9, atol=1e-12) and whole.abs().max() > 0
    assert means(merged) == pytest.approx(means(metrics), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_loss_does_not_scale_with_padding_nor_read_untrained_columns(name):
    corrupted, logits = make_case(make=mask_only if name == "mdlm" else None)
    loss, _, _ = losses_of(name, logits, corrupted)
    extra = {"inputs": PAD, "targets": PAD, "clean": PAD, "loss_mask": False, "masked": False, "replaced": False}
    padded = Corrupted(
        **{key: torch.nn.functional.pad(getattr(corrupted, key), (0, 20), value=value) for key, value in extra.items()},
        rate=corrupted.rate,
    )
    padded_logits = torch.nn.functional.pad(logits, (0, 0, 0, 20), value=3.0)
    changed = torch.cat([padded_logits[..., : MASK + 1], torch.full_like(padded_logits[..., MASK + 1 :], 60.0)], -1)
    assert losses_of(name, changed, padded)[0].item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("applies_to", ["sampling", "loss"])
def test_inputs_are_left_unchanged(applies_to):
    corrupted, logits = make_case()
    before = logits.detach().clone()
    corrective(logits, corrupted, applies_to=applies_to)[0].backward()
    assert torch.equal(logits.detach(), before)


def test_uniform_weight_does_not_scale_the_loss():
    corrupted, logits = make_case(make=mask_only)
    corrupted = Corrupted(**vars(corrupted) | {"loss_mask": corrupted.masked})  # no keep positions
    once, four = (corrective(logits, corrupted, weight_unmask=weight)[0] for weight in (1.0, 4.0))
    assert four.item() == pytest.approx(once.item(), rel=1e-12)


def test_bias_on_sampling_moves_the_signal_but_not_the_loss():
    corrupted, logits = make_case()
    for applies_to, same in (("sampling", True), ("loss", False)):
        (low, low_metrics), (high, high_metrics) = (
            corrective(logits, corrupted, mask_bias=bias, applies_to=applies_to) for bias in (-3.0, 3.0)
        )
        assert (low.item() == high.item()) is same
        assert means(low_metrics)["p_mask_unmask"] < 0.5 < means(high_metrics)["p_mask_unmask"]


def test_loss_of_a_row_without_masks_reports_no_signal():
    clean = torch.tensor([[0, 1, 2]])
    nothing, everything = torch.zeros_like(clean, dtype=torch.bool), torch.ones_like(clean, dtype=torch.bool)
    corrupted = Corrupted(
        inputs=clean, targets=clean, clean=clean, loss_mask=everything, masked=nothing, replaced=nothing,
        rate=torch.zeros(1),
    )
    _, metrics = corrective(torch.zeros(1, 3, VOCABULARY.size), corrupted)
    assert metrics["p_mask_unmask"].tolist() == [0.0, 0.0] and "p_mask_unmask" not in means(metrics)


def visible_batch(num_wrong, num_right):
    """Indistinguishable visible words, some of them wrong."""
    replaced = (torch.arange(num_wrong + num_right) < num_wrong)[None]
    inputs = torch.zeros_like(replaced, dtype=torch.int64)
    return Corrupted(
        inputs=inputs, targets=torch.where(replaced, MASK, inputs), clean=torch.where(replaced, 1, inputs),
        loss_mask=torch.ones_like(replaced), masked=torch.zeros_like(replaced), replaced=replaced,
        rate=torch.zeros(1),
    )


def mask_gradient(p, corrupted, penalty):
    """d loss / d [MASK] logit when every position gives [MASK] probability p, and the word 0 the rest."""
    x = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    words = torch.full((VOCABULARY.size,), -60.0, dtype=torch.float64)
    words[[0, MASK]] = 0.0
    logits = words + x * (torch.arange(VOCABULARY.size) == MASK)
    loss, _ = corrective(
        logits.expand(*corrupted.inputs.shape, -1), corrupted, penalty=penalty, weight_unmask=1.0, weight_remask=1.0
    )
    return torch.autograd.grad(loss, x)[0].item()


@pytest.mark.parametrize(("num_wrong", "penalty"), [(1, 0.0), (1, 0.5), (1, 1.0), (2, 0.0)])
def test_keep_discount_moves_the_minimum_from_r_toward_r_over_one_minus_r(num_wrong, penalty):
    r = num_wrong / 5
    e = penalty * (1 - r)
    # -r (1 - p) + (1 - r) p (1 - p (1 - e)) = 0, the root below 1
    a, b, c = -(1 - r) * (1 - e), 1.0, -r
    p = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
    if penalty == 0:
        assert p == pytest.approx(r / (1 - r))
    corrupted = visible_batch(num_wrong, 5 - num_wrong)
    assert abs(mask_gradient(p, corrupted, penalty)) < 1e-9
    assert mask_gradient(p - 0.02, corrupted, penalty) < 0 < mask_gradient(p + 0.02, corrupted, penalty)


def test_without_penalty_destroying_a_right_word_costs_nothing_and_with_it_something():
    corrupted = visible_batch(0, 4)
    p = 1 - 1e-6
    assert mask_gradient(p, corrupted, 0.0) == pytest.approx(1e-6, rel=1e-3)  # the weight is 1 - p: nothing holds
    assert mask_gradient(p, corrupted, 0.5) == pytest.approx(0.5, rel=1e-3)
    assert mask_gradient(p, corrupted, 1.0) == pytest.approx(1.0, rel=1e-3)


def test_keep_discount_is_detached_and_follows_the_probability_not_the_argmax():
    corrupted = visible_batch(0, 1)
    for p in (0.49, 0.51):  # an arg-max would jump between them
        weight = 1 - p * 0.5
        assert mask_gradient(p, corrupted, 0.5) == pytest.approx(weight * p, rel=1e-6)


def joint_distribution(seed=0):
    """A random joint p(x1, x2, x3) over three words, float64."""
    return torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).flatten().softmax(
        0
    ).view(3, 3, 3)


def exact_conditionals(joint, tokens, mask_id, size):
    """Logits log p(x_t | visible) of a joint over three positions, [3] -> [3, V]; [MASK] and padding columns high."""
    visible = joint
    for t, token in enumerate(tokens.tolist()):
        if token != mask_id:
            visible = visible.index_select(t, torch.tensor([token]))
    logits = torch.full((3, size), 5.0, dtype=torch.float64)
    for t, token in enumerate(tokens.tolist()):
        if token == mask_id:
            logits[t, :3] = visible.sum([d for d in range(3) if d != t]).log()
    return logits


def test_mdlm_loss_in_expectation_is_the_exact_likelihood_of_an_exact_model():
    vocabulary, joint = Vocabulary(3), joint_distribution()
    clean = torch.tensor([[2, 0, 1]])
    expected_loss = 0.0
    for k in (1, 2, 3):
        subsets = list(itertools.combinations(range(3), k))
        for subset in subsets:
            masked = torch.zeros(1, 3, dtype=torch.bool)
            masked[0, list(subset)] = True
            corrupted = Corrupted(
                inputs=clean.masked_fill(masked, 3), targets=clean, clean=clean, loss_mask=torch.ones_like(masked),
                masked=masked, replaced=torch.zeros_like(masked), rate=torch.tensor([k / 3], dtype=torch.float64),
            )
            logits = exact_conditionals(joint, corrupted.inputs[0], 3, vocabulary.size)[None]
            loss, metrics = mdlm_loss(logits, corrupted, vocabulary=vocabulary, denominator=torch.tensor(3.0))
            assert means(metrics)["nelbo"] == pytest.approx(loss.item())
            expected_loss += loss.item() / 3 / len(subsets)
    assert expected_loss == pytest.approx(-joint[2, 0, 1].log().item() / 3, rel=1e-12)


def exact_model(vocabulary, joint):
    def predict(tokens, attention_mask, positions):
        logits = [exact_conditionals(joint, row, vocabulary.mask_id, vocabulary.size) for row in tokens]
        return torch.stack(logits)[positions]

    return predict


def test_nelbo_of_an_exact_model_is_the_likelihood_whatever_the_batch_size():
    vocabulary, joint = Vocabulary(3), joint_distribution(1)
    draws = torch.multinomial(joint.flatten(), 200, replacement=True, generator=torch.Generator().manual_seed(0))
    clean = torch.stack([draws // 9, draws // 3 % 3, draws % 3], 1)
    settings = {
        "attention_mask": torch.ones_like(clean, dtype=torch.bool), "vocabulary": vocabulary, "seed": 0, "num_draws": 4
    }
    mean, error = nelbo(exact_model(vocabulary, joint), clean, batch_size=64, **settings)
    truth = -joint.flatten()[draws].log().mean().item() / 3
    assert abs(mean.item() - truth) < 0.03 and 0.005 < error.item() < 0.05
    again, _ = nelbo(exact_model(vocabulary, joint), clean, batch_size=7, **settings)
    assert again.item() == pytest.approx(mean.item(), rel=1e-12)


def test_nelbo_is_unbiased_over_draws_and_skips_padding():
    vocabulary, joint = Vocabulary(3), joint_distribution(2)
    clean = torch.tensor([[2, 0, 1], [1, 1, vocabulary.pad_id]])
    attention_mask = clean < 3
    # The padded row reads its third position as unknown: the marginal over it.
    truth = -(joint[2, 0, 1].log() + joint.sum(2)[1, 1].log()).item() / 5

    def predict(tokens, attention_mask, positions):
        return exact_model(vocabulary, joint)(tokens.masked_fill(~attention_mask, 3), attention_mask, positions)

    settings = {"attention_mask": attention_mask, "vocabulary": vocabulary, "num_draws": 400, "batch_size": 2}
    mean, _ = nelbo(predict, clean, seed=0, **settings)
    assert mean.item() == pytest.approx(truth, abs=0.03)


def test_next_token_loss_equals_a_loop():
    corrupted, logits = make_case()
    clean, attention_mask = corrupted.clean, corrupted.loss_mask
    loss, metrics = next_token_loss(
        logits, clean, attention_mask=attention_mask, vocabulary=VOCABULARY,
        denominator=next_token_counted(attention_mask).sum(),
    )
    losses = [
        -logits[b, t, :6].log_softmax(-1)[clean[b, t + 1]].item()
        for b in range(8)
        for t in range(11)
        if attention_mask[b, t + 1]
    ]
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert metrics["loss_next"][1] == len(losses)


def test_standard_error_of_the_ratio_matches_the_spread_over_resamples():
    rng = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 50, (4000, 40), generator=rng).double()
    totals = counts * (2 + 0.1 * torch.randn(4000, 40, generator=rng).double())
    results = [ratio_with_error(t, c) for t, c in zip(totals, counts, strict=True)]
    ratios, errors = (torch.stack(values) for values in zip(*results, strict=True))
    assert errors.mean().item() == pytest.approx(ratios.std().item(), rel=0.06)
    assert ratio_with_error(torch.tensor([2.0, 6.0]), torch.tensor([1.0, 3.0]))[1] == 0
