import pytest
import torch

from grpo import critic, wavefront
from grpo.corruption import Corrupted, corrupt, stratified_rows
from grpo.critic import critic_counted, critic_loss, critic_targets, fill, fill_masks
from grpo.metrics import means
from grpo.noise import row_seeds
from grpo.tokenizer import Vocabulary
from grpo.wavefront import sample_tokens
from tests.small_gpt import make, tokens

torch.set_num_threads(1)
VOCABULARY = Vocabulary(6)
MASK, PAD = VOCABULARY.mask_id, VOCABULARY.pad_id


def make_case(num_rows=8, num_tokens=12):
    rng = torch.Generator().manual_seed(0)
    attention_mask = torch.arange(num_tokens) < torch.randint(5, num_tokens + 1, (num_rows, 1), generator=rng)
    clean = torch.randint(0, 6, (num_rows, num_tokens), generator=rng).masked_fill(~attention_mask, PAD)
    seeds, times = stratified_rows(0, 1, 0, torch.arange(num_rows), num_rows)
    corrupted = corrupt(
        clean, vocabulary=VOCABULARY, attention_mask=attention_mask, seeds=seeds, times=times, remask_ratio=1.0,
        guaranteed_correct=0.01,
    )
    logits = torch.randn(num_rows, num_tokens, VOCABULARY.size, generator=rng)
    return corrupted, logits, seeds


def test_fills_follow_the_softmax_over_words_alone():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0])
    all_columns = torch.full((VOCABULARY.size,), 40.0)  # [MASK], pad and padding columns would win every draw
    all_columns[:6] = logits
    inputs = torch.full((400, 100), MASK)
    filled = fill_masks(
        inputs, all_columns.expand(400, 100, -1), vocabulary=VOCABULARY, seeds=row_seeds(0, 0, 0, torch.arange(400))
    )
    frequency = torch.bincount(filled.flatten(), minlength=6) / filled.numel()
    assert frequency.shape == (6,) and (frequency - logits.softmax(0)).abs().max() < 0.01


def test_fills_leave_visible_tokens_and_do_not_depend_on_batch_mates():
    corrupted, logits, seeds = make_case()
    filled = fill_masks(corrupted.inputs, logits, vocabulary=VOCABULARY, seeds=seeds)
    assert torch.equal(filled[~corrupted.masked], corrupted.inputs[~corrupted.masked])
    assert (filled[corrupted.masked] < 6).all()
    alone = fill_masks(corrupted.inputs[3:4], logits[3:4], vocabulary=VOCABULARY, seeds=seeds[3:4])
    assert torch.equal(alone, filled[3:4])


def test_fills_are_drawn_in_slices_and_depend_on_none(monkeypatch):
    corrupted, logits, seeds = make_case()
    whole, sizes = fill_masks(corrupted.inputs, logits, vocabulary=VOCABULARY, seeds=seeds), []
    monkeypatch.setattr(critic, "sample_tokens", lambda logits, noise: sizes.append(len(logits)) or sample_tokens(
        logits, noise))
    for rows, at_once in ((1, 1), (1, 3 * VOCABULARY.size), (2, 1)):
        monkeypatch.setattr(wavefront, "_LEAST_ROWS", rows)
        monkeypatch.setitem(wavefront._LOGITS_AT_ONCE, "cpu", at_once)
        sizes.clear()
        assert torch.equal(fill_masks(corrupted.inputs, logits, vocabulary=VOCABULARY, seeds=seeds), whole)
        assert max(sizes) == max(rows, at_once // VOCABULARY.size)
    nothing = whole.where(corrupted.loss_mask, 0)
    assert torch.equal(fill_masks(nothing, logits, vocabulary=VOCABULARY, seeds=seeds), nothing)


def test_a_model_s_own_fills_are_those_of_its_logits_and_depend_on_no_slice(monkeypatch):
    monkeypatch.setattr(wavefront, "_LEAST_ROWS", 1)
    model, clean = make().double().eval(), tokens()
    inputs = clean.masked_fill(torch.rand(clean.shape) < 0.5, model.vocabulary.mask_id)
    mask = torch.arange(clean.shape[1]) < torch.tensor([[9], [7], [4]])
    seeds = row_seeds(0, 0, 0, torch.arange(3))
    for visible in (None, mask):
        inputs = inputs if visible is None else inputs.masked_fill(~visible, model.vocabulary.pad_id)
        logits = model(inputs, attention_mask=visible)
        expected = fill_masks(inputs, logits, vocabulary=model.vocabulary, seeds=seeds)
        for at_once in (1 << 20, 1):
            monkeypatch.setitem(wavefront._LOGITS_AT_ONCE, "cpu", at_once)
            assert torch.equal(fill(model, inputs, visible, seeds), expected)
    whole = fill(model, torch.where(mask, clean, 0), None, seeds)  # nothing is masked
    assert torch.equal(whole, torch.where(mask, clean, 0))


def test_a_certain_word_is_always_drawn_and_an_impossible_one_never():
    inputs = torch.full((50, 50), MASK)
    logits = torch.full((50, 50, VOCABULARY.size), -torch.inf)
    logits[..., 5] = 0.0
    seeds = row_seeds(0, 0, 0, torch.arange(50))
    assert (fill_masks(inputs, logits, vocabulary=VOCABULARY, seeds=seeds) == 5).all()
    logits[..., 2] = 0.0
    drawn = fill_masks(inputs, logits, vocabulary=VOCABULARY, seeds=seeds)
    assert set(drawn.unique().tolist()) == {2, 5}


def test_truth_is_the_clean_token_so_visible_replacements_are_wrong():
    corrupted, logits, seeds = make_case()
    perfect = torch.where(corrupted.masked, corrupted.clean, corrupted.inputs)
    wrong = critic_targets(perfect, corrupted.clean)
    assert torch.equal(wrong, corrupted.replaced) and wrong.any()  # the training target there is [MASK]
    assert not critic_targets(corrupted.clean, corrupted.clean).any()


@pytest.mark.parametrize("scope", ["all", "masked_only"])
def test_critic_loss_equals_a_loop_over_counted_positions(scope):
    corrupted, logits, seeds = make_case()
    filled = fill_masks(corrupted.inputs, logits, vocabulary=VOCABULARY, seeds=seeds)
    scores = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    losses, errors = [], []
    for b in range(8):
        for t in range(12):
            is_counted = corrupted.inputs[b, t] == MASK if scope == "masked_only" else corrupted.clean[b, t] != PAD
            if is_counted:
                wrong = filled[b, t].item() != corrupted.clean[b, t].item()
                p = torch.sigmoid(scores[b, t].double()).item()
                losses.append(-torch.log(torch.tensor(p if wrong else 1 - p, dtype=torch.float64)).item())
                errors.append(wrong)
    denominator = critic_counted(corrupted, scope).sum()
    assert denominator == len(losses)
    loss, metrics = critic_loss(scores, filled, corrupted, scope=scope, denominator=denominator)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert means(metrics)["critic_error_rate"] == pytest.approx(sum(errors) / len(errors))


def test_scores_out_of_scope_get_no_gradient_and_may_be_infinite():
    corrupted, logits, seeds = make_case()
    filled = fill_masks(corrupted.inputs, logits, vocabulary=VOCABULARY, seeds=seeds)
    for scope in ("all", "masked_only"):
        counted = critic_counted(corrupted, scope)
        scores = torch.zeros(8, 12).masked_fill(~counted, 1e30).requires_grad_()
        loss, _ = critic_loss(scores, filled, corrupted, scope=scope, denominator=counted.sum())
        loss.backward()
        assert torch.equal(scores.grad != 0, counted)


def test_split_batch_gives_same_gradient():
    corrupted, logits, seeds = make_case()
    filled = fill_masks(corrupted.inputs, logits, vocabulary=VOCABULARY, seeds=seeds)
    scores = torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
    denominator = critic_counted(corrupted, "all").sum()
    settings = {"scope": "all", "denominator": denominator}
    (whole,) = torch.autograd.grad(critic_loss(scores, filled, corrupted, **settings)[0], scores)
    parts = torch.zeros_like(whole)
    for rows in (slice(0, 3), slice(3, 8)):
        part = Corrupted(**{name: tensor[rows] for name, tensor in vars(corrupted).items()})
        parts += torch.autograd.grad(critic_loss(scores[rows], filled[rows], part, **settings)[0], scores)[0]
    assert torch.allclose(parts, whole, rtol=1e-12)


def test_the_generator_gets_no_gradient_through_the_fill():
    corrupted, logits, seeds = make_case()
    filled = fill_masks(corrupted.inputs, logits.requires_grad_(), vocabulary=VOCABULARY, seeds=seeds)
    assert not filled.requires_grad and filled.dtype == torch.int64
