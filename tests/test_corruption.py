import pytest
import torch

from grpo.corruption import corrupt, mask_only, ramp, stratified_rows
from grpo.tokenizer import Vocabulary

torch.set_num_threads(1)
VOCABULARY = Vocabulary(10)


def make_batch(num_rows=64, num_tokens=40, num_pads=8):
    clean = torch.randint(0, 10, (num_rows, num_tokens), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(clean, dtype=torch.bool)
    if num_pads:
        attention_mask[::2, -num_pads:] = False
    return clean.masked_fill(~attention_mask, VOCABULARY.pad_id), attention_mask


def corrupt_rows(clean, attention_mask, rows=None, batch_size=None, step=0, **changes):
    rows = torch.arange(len(clean)) if rows is None else rows
    seeds, times = stratified_rows(0, 1, step, rows, batch_size or len(clean))
    settings = {"remask_ratio": 1.0, "guaranteed_correct": 0.01} | changes
    return corrupt(
        clean, vocabulary=VOCABULARY, attention_mask=attention_mask, seeds=seeds, times=times, **settings
    )


def test_each_position_is_masked_replaced_kept_or_padding_and_its_fields_agree():
    clean, attention_mask = make_batch()
    c = corrupt_rows(clean, attention_mask)
    for b in range(clean.shape[0]):
        for t in range(clean.shape[1]):
            token, truth, target = c.inputs[b, t].item(), clean[b, t].item(), c.targets[b, t].item()
            if not attention_mask[b, t]:
                assert token == truth == VOCABULARY.pad_id
                assert not (c.loss_mask[b, t] or c.masked[b, t] or c.replaced[b, t] or c.kept[b, t])
            elif token == VOCABULARY.mask_id:
                assert c.masked[b, t] and not c.replaced[b, t] and not c.kept[b, t] and target == truth
            elif token != truth:
                assert c.replaced[b, t] and not c.kept[b, t] and target == VOCABULARY.mask_id and token < 10
            else:
                assert c.kept[b, t] and not c.replaced[b, t] and target == truth
    assert torch.equal(c.clean, clean)


def test_replacements_are_uniform_over_the_other_base_tokens():
    clean = torch.full((2000, 40), 3)
    c = corrupt_rows(clean, torch.ones_like(clean, dtype=torch.bool))
    counts = torch.bincount(c.inputs[c.replaced], minlength=12)
    assert counts[3] == 0 and counts[10:].sum() == 0
    others = counts[[0, 1, 2, 4, 5, 6, 7, 8, 9]].double()
    chi2 = ((others - others.mean()) ** 2 / others.mean()).sum()
    assert chi2 < 26.1  # 8 degrees of freedom, 99.9th percentile


def test_rates_follow_the_design():
    clean = torch.zeros(4000, 50, dtype=torch.int64)
    c = corrupt_rows(clean, torch.ones_like(clean, dtype=torch.bool), guaranteed_correct=0.2, remask_ratio=0.6)
    assert c.rate.max() < 0.8 and c.rate.mean().item() == pytest.approx(0.4, abs=1e-3)
    assert (c.masked | c.replaced).double().mean().item() == pytest.approx(0.4, abs=0.005)
    assert c.replaced.double().mean().item() == pytest.approx(0.4 * 0.3, abs=0.005)
    low, high = c.rate < 0.2, c.rate > 0.6  # the rate is the row's own
    assert (c.masked | c.replaced)[low].double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (c.masked | c.replaced)[high].double().mean().item() == pytest.approx(0.7, abs=0.01)


def test_curriculum_starts_without_replacements():
    clean, attention_mask = make_batch()
    assert not corrupt_rows(clean, attention_mask, remask_ratio=0.0).replaced.any()
    assert corrupt_rows(clean, attention_mask, remask_ratio=1.0).replaced.any()


def test_ramp_is_a_function_of_the_step():
    assert [ramp(step, 0, 2000, 1.0) for step in (0, 500, 2000, 9000)] == [0.0, 0.25, 1.0, 1.0]
    assert [ramp(step, 500, 1000, 0.5) for step in (0, 500, 750, 1000)] == [0.0, 0.0, 0.25, 0.5]
    assert [ramp(step, 3, 3, 0.5) for step in (2, 3)] == [0.0, 0.5]
    assert ramp(0, 0, 0, 0.5) == 0.5


def test_own_predictions_replace_only_where_they_are_wrong_words():
    clean = torch.zeros(500, 40, dtype=torch.int64)
    attention_mask = torch.ones_like(clean, dtype=torch.bool)
    own = torch.full_like(clean, 7)
    own[:, ::2] = 0  # right: no error to learn from
    own[:, 1::4] = VOCABULARY.mask_id
    plain = corrupt_rows(clean, attention_mask)
    c = corrupt_rows(clean, attention_mask, own_predictions=own, own_share=1.0)
    assert torch.equal(c.replaced, plain.replaced)  # the rate does not depend on the model
    takes_own = torch.zeros_like(c.replaced)
    takes_own[:, 3::4] = True
    assert (c.inputs[c.replaced & takes_own] == 7).all()
    assert torch.equal(c.inputs[~takes_own], plain.inputs[~takes_own])
    half = corrupt_rows(clean, attention_mask, own_predictions=torch.full_like(clean, 7), own_share=0.5)
    assert (half.inputs[half.replaced] == 7).double().mean().item() == pytest.approx(0.5 + 0.5 / 9, abs=0.02)


def test_any_split_over_ranks_gives_the_same_rows():
    clean, attention_mask = make_batch(16)
    whole = corrupt_rows(clean, attention_mask)
    for rows in (torch.arange(0, 16, 2), torch.tensor([11, 3])):
        part = corrupt_rows(clean[rows], attention_mask[rows], rows=rows, batch_size=16)
        assert torch.equal(part.inputs, whole.inputs[rows]) and torch.equal(part.rate, whole.rate[rows])


def test_steps_differ():
    clean, attention_mask = make_batch(16)
    first, second = (corrupt_rows(clean, attention_mask, step=step).inputs for step in (0, 1))
    assert not torch.equal(first, second)


def test_times_fill_every_stratum_of_the_batch_once():
    _, times = stratified_rows(0, 1, 5, torch.arange(50), 50)
    assert (times * 50).long().sort().values.tolist() == list(range(50))
    assert not torch.equal(times, times.sort().values)


def test_time_of_a_fixed_row_is_uniform_over_steps():
    times = torch.stack([stratified_rows(0, 1, step, torch.tensor([3]), 4)[1][0] for step in range(2000)])
    assert times.mean().item() == pytest.approx(0.5, abs=0.03) and times.var().item() == pytest.approx(1 / 12, abs=0.01)


def test_mask_only_masks_exactly_the_reported_share_of_real_tokens():
    clean, attention_mask = make_batch(32)
    attention_mask[5] = False
    seeds, times = stratified_rows(0, 1, 0, torch.arange(32), 32)
    c = mask_only(clean, vocabulary=VOCABULARY, attention_mask=attention_mask, seeds=seeds, times=times)
    for b in range(32):
        num_tokens, num_masked = attention_mask[b].sum().item(), c.masked[b].sum().item()
        assert not (c.masked[b] & ~attention_mask[b]).any()
        if num_tokens == 0:
            assert num_masked == 0 and c.rate[b] == 1
        else:
            assert (num_masked - 1) / num_tokens < times[b] <= num_masked / num_tokens == c.rate[b]
    assert torch.equal(c.inputs == VOCABULARY.mask_id, c.masked) and not c.replaced.any()
    assert torch.equal(c.targets, clean)


def test_mask_only_masks_positions_evenly():
    clean = torch.zeros(8000, 6, dtype=torch.int64)
    seeds, times = stratified_rows(0, 1, 0, torch.arange(8000), 8000)
    mask = torch.ones_like(clean, dtype=torch.bool)
    c = mask_only(clean, vocabulary=VOCABULARY, attention_mask=mask, seeds=seeds, times=times)
    counts = torch.bincount(c.masked.sum(1), minlength=7).double() / 8000
    assert counts[0] == 0 and (counts[1:] - 1 / 6).abs().max() < 1e-3  # k is uniform on 1..n, and stratified
    assert (c.masked.double().mean(0) - 7 / 12).abs().max() < 0.03
