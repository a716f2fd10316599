from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from actors.phase import objective
from grpo.config import (
    Config,
    CorruptionSection,
    CriticSection,
    DataSection,
    GrpoSection,
    LossSection,
    ModelSection,
    SamplerSection,
)
from grpo.corruption import stratified_rows
from grpo.critic import critic_loss
from grpo.diffusion_loss import corrective_loss
from grpo.model import GPT
from grpo.multitask import Stage, corrupt_batch, counts, multitask_loss, stage
from grpo.tokenizer import Vocabulary
from grpo.wavefront import sampler_loss

torch.set_num_threads(1)
B, T = 8, 12
LATE = 1 << 40
CONFIG = Config(
    model=ModelSection(n_layer=2, n_head=2, n_embd=16), data=DataSection(block_size=T, layout="documents"),
    corruption=CorruptionSection(proofreading_warmup=100), loss=LossSection(masking_warmup=50),
    critic=CriticSection(start=20, end=40, alpha=0.5), sampler=SamplerSection(start=10),
    grpo=GrpoSection(prompt_tokens=4))
CAUSAL = replace(CONFIG, model=replace(CONFIG.model, attention="causal", critic=False, sampler=False))
OBJECTIVES = {"corrective": CONFIG, "mdlm": replace(CONFIG, loss=LossSection(objective="mdlm")), "causal": CAUSAL}


def make_model(config):
    torch.manual_seed(0)
    model = GPT(config.model, Vocabulary(40), block_size=T).double()
    with torch.no_grad():  # zero-initialised layers would hide what flows through them
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def rows(seed=0, pads=True):
    tokens = torch.randint(0, 40, (B, T), generator=torch.Generator().manual_seed(seed))
    length = torch.tensor([T, 5, T, 9, T, 2, T, 7]) if pads else torch.full((B,), T)
    attention_mask = torch.arange(T) < length[:, None]
    return tokens.masked_fill(~attention_mask, Vocabulary(40).pad_id), attention_mask


def corrupted_rows(model, config, now, tokens, attention_mask, part=slice(None)):
    seeds, times = stratified_rows(0, 1, 3, torch.arange(B), B)
    corrupted = corrupt_batch(model, objective(config), now, tokens[part], attention_mask[part], seeds=seeds[part],
                              times=times[part])
    return corrupted, seeds[part]


def gradient(config, parts, tokens, attention_mask, step=LATE):
    model, now = make_model(config), stage(objective(config), step)
    examples = [corrupted_rows(model, config, now, tokens, attention_mask, part) for part in parts]
    totals = sum(counts(objective(config), corrupted) for corrupted, _ in examples)
    loss = 0.0
    for corrupted, seeds in examples:
        part, _ = multitask_loss(model, objective(config), now, corrupted, seeds=seeds, totals=totals, mask_bias=0.3)
        part.backward()
        loss += float(part.detach())
    return loss, {name: p.grad for name, p in model.named_parameters()}


def test_stages_follow_their_ramps():
    none = Stage(remask_ratio=0.0, penalty=0.0, critic_weight=0.0, sampler=False)
    assert stage(objective(CONFIG), 0) == none
    assert stage(objective(CONFIG), 9) == replace(none, remask_ratio=0.09, penalty=0.09)
    assert stage(objective(CONFIG), 10) == replace(none, remask_ratio=0.1, penalty=0.1, sampler=True)
    assert stage(objective(CONFIG), 30) == Stage(remask_ratio=0.3, penalty=0.3, critic_weight=0.25, sampler=True)
    assert stage(objective(CONFIG), LATE) == Stage(remask_ratio=1.0, penalty=0.5, critic_weight=0.5, sampler=True)
    assert stage(objective(CAUSAL), LATE).critic_weight == 0.0 and not stage(objective(CAUSAL), LATE).sampler


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_split_of_the_batch_gives_the_same_gradient(name):
    text = rows()
    loss, whole = gradient(OBJECTIVES[name], [slice(0, 8)], *text)
    for parts in ([slice(0, 4), slice(4, 8)], [slice(0, 1), slice(1, 7), slice(7, 8)]):
        split_loss, split = gradient(OBJECTIVES[name], parts, *text)
        assert split_loss == pytest.approx(loss, rel=1e-9)
        for key, expected in whole.items():
            torch.testing.assert_close(split[key], expected, rtol=1e-7, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_stands_at_pads_changes_nothing(name):
    tokens, attention_mask = rows()
    other = torch.where(attention_mask, tokens, 63)  # no text, as every id above 40
    whole = [slice(0, 8)]
    loss, before = gradient(OBJECTIVES[name], whole, tokens, attention_mask)
    same, after = gradient(OBJECTIVES[name], whole, other, attention_mask)
    assert same == pytest.approx(loss, rel=1e-12)
    for key, expected in before.items():
        if key != "trunk.wte.weight":  # pads are embedded, and their rows receive exact zeros
            torch.testing.assert_close(after[key], expected, rtol=1e-9, atol=1e-12, msg=key)


def test_a_layout_without_pads_gives_the_loss_of_one_with_a_full_mask():
    text = rows(pads=False)
    blocks = replace(CONFIG, data=replace(CONFIG.data, layout="blocks"))
    (masked, _), (plain, _) = (gradient(config, [slice(0, 8)], *text) for config in (CONFIG, blocks))
    assert plain == pytest.approx(masked, rel=1e-12)


def test_the_causal_loss_is_plain_next_token_cross_entropy():
    tokens, attention_mask = rows()
    loss, _ = gradient(CAUSAL, [slice(0, 8)], tokens, attention_mask)
    model = make_model(CAUSAL)
    nats = []
    for row, mask in zip(tokens, attention_mask, strict=True):
        text = row[mask][None]
        logits = model(text)[0, :-1, :40]
        nats += F.cross_entropy(logits, text[0, 1:], reduction="none").tolist()
    assert loss == pytest.approx(sum(nats) / len(nats), rel=1e-9)


def test_heads_that_have_not_joined_get_no_gradient():
    text = rows()
    for step, joined in ((5, set()), (15, {"sampler"}), (30, {"sampler", "critic"})):
        _, gradients = gradient(CONFIG, [slice(0, 8)], *text, step=step)
        moved = {key.split(".")[1] for key, g in gradients.items() if key.startswith("heads.") and g is not None}
        assert moved == joined


def test_the_critic_reads_the_corrupted_text_with_its_masks_sampled_and_that_is_one_more_trunk_pass():
    model, now = make_model(CONFIG), stage(objective(CONFIG), LATE)
    read = []
    model.trunk.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    corrupted, seeds = corrupted_rows(model, CONFIG, now, *rows())
    totals = counts(objective(CONFIG), corrupted)
    for bias in (0.0, 5.0):
        multitask_loss(model, objective(CONFIG), now, corrupted, seeds=seeds, totals=totals, mask_bias=bias)
    assert len(read) == 4 and read[0].equal(corrupted.inputs)
    filled = read[1]
    assert filled[corrupted.masked].max() < 40 and corrupted.masked.sum() > 10
    assert filled[~corrupted.masked].equal(corrupted.inputs[~corrupted.masked])
    assert filled.equal(read[3])
    argmax = model(corrupted.inputs, attention_mask=corrupted.loss_mask)[..., :40].argmax(-1)
    assert not filled[corrupted.masked].equal(argmax[corrupted.masked])


def test_a_frozen_trunk_gets_no_gradient_and_its_heads_the_same_as_before():
    text, now = rows(), stage(objective(CONFIG), LATE)
    gradients = []
    for frozen in (False, True):
        model = make_model(CONFIG)
        model.untie()
        if frozen:
            model.freeze_trunk()
        corrupted, seeds = corrupted_rows(model, CONFIG, now, *text)
        totals = counts(objective(CONFIG), corrupted)
        loss, _ = multitask_loss(model, objective(CONFIG), now, corrupted, seeds=seeds, totals=totals, mask_bias=0.0)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    whole, heads = gradients
    for name, expected in whole.items():
        assert expected is not None
        if name.startswith("trunk."):
            assert heads[name] is None
        else:
            torch.testing.assert_close(heads[name], expected, rtol=1e-9, atol=1e-12, msg=name)


def test_replacements_can_be_the_models_own_predictions():
    model, now = make_model(CONFIG), stage(objective(CONFIG), LATE)
    model.untie()
    with torch.no_grad():  # a model that says 7 everywhere
        model.heads["lm"].matrix.zero_()
        model.heads["lm"].matrix[7] = 100 * model.encode(*rows()).mean((0, 1))
    own = replace(CONFIG, corruption=replace(CONFIG.corruption, own_predictions=1.0))
    text = rows()
    corrupted, _ = corrupted_rows(model, own, now, *text)
    uniform, _ = corrupted_rows(model, CONFIG, now, *text)
    assert corrupted.replaced.equal(uniform.replaced) and corrupted.replaced.sum() > 5
    wrong, clean = corrupted.inputs[corrupted.replaced], corrupted.clean[corrupted.replaced]
    assert (wrong != clean).all()
    share = (wrong == 7).double().mean()
    assert share > 2 * (uniform.inputs[uniform.replaced] == 7).double().mean() and share > 0.2


def test_own_predictions_are_drawn_without_dropout_and_training_goes_on():
    config = replace(CONFIG, model=replace(CONFIG.model, dropout=0.5),
                     corruption=replace(CONFIG.corruption, own_predictions=1.0))
    model, now = make_model(config), stage(objective(config), LATE)
    model.heads["critic"].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(1)
    first, _ = corrupted_rows(model, config, now, *rows())
    second, _ = corrupted_rows(model, config, now, *rows())
    assert torch.equal(first.inputs, second.inputs) and [module.training for module in model.modules()] == modes
    expected, _ = corrupted_rows(model.eval(), config, now, *rows())
    assert torch.equal(first.inputs, expected.inputs)


def test_the_total_is_the_weighted_sum_of_its_parts():
    config = replace(CONFIG, loss=LossSection(weight_unmask=2.0, weight_remask=0.5, masking_warmup=0),
                     mask_bias=replace(CONFIG.mask_bias, applies_to="loss"))
    model, now, asked = make_model(config), stage(objective(config), LATE), objective(config)
    corrupted, seeds = corrupted_rows(model, config, now, *rows())
    totals = counts(asked, corrupted)
    masked, replaced, kept = (float(each.sum()) for each in (corrupted.masked, corrupted.replaced, corrupted.kept))
    assert totals.tolist() == [2 * masked + 0.5 * replaced + kept, masked, masked]
    everywhere = replace(asked, critic=replace(asked.critic, scope="all"))
    assert counts(everywhere, corrupted)[2] == corrupted.loss_mask.sum()

    read = []
    model.trunk.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    found, metrics = multitask_loss(model, asked, now, corrupted, seeds=seeds, totals=totals, mask_bias=0.7)
    filled, hidden = read[1], model.encode(corrupted.inputs, corrupted.loss_mask)
    generator, own = corrective_loss(
        model.heads["lm"](hidden), corrupted, vocabulary=model.vocabulary, denominator=totals[0], weight_unmask=2.0,
        weight_remask=0.5, penalty=config.loss.penalty_mask_correct, mask_bias=0.7, applies_to="loss")
    sampler, _ = sampler_loss(model, hidden, corrupted.clean, corrupted.masked, seeds=seeds,
                              side_dropout=config.sampler.side_dropout, denominator=totals[1])
    critic, _ = critic_loss(model.critic_scores(filled, corrupted.loss_mask), filled, corrupted, scope="masked_only",
                            denominator=totals[2])
    torch.testing.assert_close(found, generator + sampler + 0.5 * critic, rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics["p_mask_unmask"], own["p_mask_unmask"])
