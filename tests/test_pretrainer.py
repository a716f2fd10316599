from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from actors.pretrainer import OBJECTIVE_STREAM, VALIDATION_SEED, Pretrainer, causal_nll, critic_quality
from grpo.config import (
    Config,
    CorruptionSection,
    CriticSection,
    DataSection,
    GrpoSection,
    LossSection,
    ModelSection,
    PretrainSection,
    SamplerSection,
)
from grpo.corruption import corrupt, stratified_rows
from grpo.data import Batch
from grpo.model import GPT
from grpo.tokenizer import Vocabulary

torch.set_num_threads(1)
T = 12
CONFIG = Config(
    model=ModelSection(n_layer=2, n_head=2, n_embd=16), data=DataSection(block_size=T, layout="documents"),
    corruption=CorruptionSection(proofreading_warmup=4), loss=LossSection(masking_warmup=4),
    critic=CriticSection(start=4, end=6), sampler=SamplerSection(start=2), grpo=GrpoSection(prompt_tokens=4),
    pretrain=PretrainSection(steps=8, batch_size=8, learning_rate=1e-2, warmup=2))
CAUSAL = replace(CONFIG, model=replace(CONFIG.model, attention="causal", critic=False, sampler=False))


def batch(step, rows=slice(None), num=8):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 40, (num, T), generator=generator)
    length = torch.randint(2, T + 1, (num, 1), generator=generator)
    length[: num // 4] = T
    attention_mask = torch.arange(T) < length
    return Batch(tokens.masked_fill(~attention_mask, Vocabulary(40).pad_id)[rows], attention_mask[rows])


def make_trainer(config=CONFIG, dtype=torch.float32, **distribution):
    torch.manual_seed(0)
    return Pretrainer(GPT(config.model, Vocabulary(40), block_size=T).to(dtype), config, **distribution)


def trained(config, dtype=torch.float32, steps=range(8), trainer=None):
    trainer = trainer or make_trainer(config, dtype)
    for step in steps:
        figures = trainer.step(step, batch(step, trainer.rows()))
    return trainer, trainer.read(figures)


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_micro_batches_change_nothing_and_the_controller_moves_once_per_step():
    (whole, figures), (parts, same) = (
        trained(replace(CONFIG, pretrain=replace(CONFIG.pretrain, micro_batches=n)), torch.float64) for n in (1, 4))
    for name, expected in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], expected, rtol=1e-6, atol=1e-8, msg=name)
    assert parts.mask_bias.num_signals == whole.mask_bias.num_signals == 8
    assert same == pytest.approx(figures, rel=1e-6)


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    def all_reduce(tensor, op="sum"):
        dist.all_reduce(tensor)
        return tensor

    config = replace(CONFIG, pretrain=replace(CONFIG.pretrain, micro_batches=2))
    trainer = make_trainer(config, torch.float64, rank=rank, world=2, all_reduce=all_reduce,
                           wrap=lambda module: DistributedDataParallel(module, find_unused_parameters=True))
    trainer, figures = trained(config, trainer=trainer)
    torch.save((weights(trainer), figures, trainer.mask_bias.state_dict()), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_ranks_train_as_one(tmp_path):
    """Rows of unequal length give the ranks unequal counts: a mean of means would differ."""
    trainer, figures = trained(CONFIG, torch.float64)
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    for name, expected in weights(trainer).items():
        torch.testing.assert_close(ranks[0][0][name], expected, rtol=1e-6, atol=1e-8, msg=name)
        assert ranks[0][0][name].equal(ranks[1][0][name])
    assert ranks[0][1] == pytest.approx(figures, rel=1e-6)
    assert ranks[0][2] == ranks[1][2] == pytest.approx(trainer.mask_bias.state_dict(), rel=1e-9)


@pytest.mark.parametrize("config", [CONFIG, CAUSAL, replace(CONFIG, loss=LossSection(objective="mdlm"))])
def test_a_resumed_run_is_bitwise_the_undisturbed_one(config):
    config = replace(config, model=replace(config.model, dropout=0.2))
    whole, figures = trained(config)
    for stop in (1, 3, 5):
        first, _ = trained(config, steps=range(stop))
        torch.manual_seed(stop)  # whatever else draws numbers
        second = Pretrainer(GPT(config.model, Vocabulary(40), block_size=T), config)
        second.model.load_state_dict(first.model.state_dict())
        second.load(first.tensors(), first.mask_bias.state_dict())
        second, same = trained(config, trainer=second, steps=range(stop, 8))
        assert all(weights(second)[name].equal(expected) for name, expected in weights(whole).items())
        assert same == figures


def test_each_step_draws_other_dropout():
    config = replace(CONFIG, model=replace(CONFIG.model, dropout=0.5))
    losses = []
    for step in (0, 1, 1):
        trainer = make_trainer(config)
        trainer.model.train()
        trainer.step(step, batch(0))
        losses.append(torch.rand(1))  # the state in which the step leaves the generator
    assert losses[1].equal(losses[2]) and not losses[0].equal(losses[1])


def test_bfloat16_trains_float32_weights_close_to_float32():
    full, _ = trained(CONFIG)
    half, _ = trained(replace(CONFIG, pretrain=replace(CONFIG.pretrain, dtype="bfloat16")))
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    start = weights(make_trainer())
    for name, end in weights(full).items():
        if end.dim() == 2:
            moved, apart = (end - start[name]).norm(), (end - weights(half)[name]).norm()
            assert 0 < apart < 0.5 * moved, name


def test_the_likelihood_of_a_causal_model_is_a_sum_over_its_tokens():
    trainer, _ = trained(CAUSAL)
    rows = batch(99, num=200)  # more rows than are read at once
    nats, error = causal_nll(trainer.model.eval(), rows)
    each = []
    with torch.no_grad():
        for row, mask in zip(rows.tokens, rows.attention_mask, strict=True):
            text = row[mask][None]
            each.append(F.cross_entropy(trainer.model(text)[0, :-1, :40].double(), text[0, 1:], reduction="none"))
    assert float(nats) == pytest.approx(float(torch.cat(each).mean()), rel=1e-6)
    by_row = torch.stack([nats_of.sum() for nats_of in each])
    spread = (by_row - nats * torch.tensor([len(nats_of) for nats_of in each])).std()
    assert float(error) == pytest.approx(float(spread) * 200**0.5 / sum(map(len, each)), rel=1e-2)


def test_validation_repeats_itself_and_leaves_training_alone():
    trainer, _ = trained(CONFIG)
    before = weights(trainer)
    first, again = trainer.validate(batch(99), 1.0), trainer.validate(batch(99), 1.0)
    parts = {f"val_{kind}_{task}" for kind in ("loss", "p_mask") for task in ("unmask", "remask", "keep")}
    assert first == again and set(first) == parts | {
        "val_loss_sampler", "val_nelbo_nats", "val_nelbo_se", "val_bpb", "critic_auroc", "critic_ece"}
    assert all(p.equal(before[name]) for name, p in weights(trainer).items())
    trainer.mask_bias.bias += 3.0  # no figure sees the moving bias
    assert trainer.validate(batch(99), 1.0) == first


def test_validated_between_any_two_steps_training_keeps_its_bits():
    config = replace(CONFIG, model=replace(CONFIG.model, dropout=0.2))
    (plain, figures), validated = trained(config), make_trainer(config)
    for step in range(8):
        drawn = torch.get_rng_state()
        validated.validate(batch(99), 1.0)
        assert torch.get_rng_state().equal(drawn)
        _, same = trained(config, trainer=validated, steps=[step])
    assert all(weights(validated)[name].equal(expected) for name, expected in weights(plain).items())
    assert same == figures


@torch.no_grad()
def test_the_held_out_objective_is_that_of_one_corruption_at_the_curriculum_s_end():
    """Far from the end of every ramp, and with replacements of the model's own, against plain torch on whole tables."""
    config = replace(CONFIG, sampler=SamplerSection(start=2, side_dropout=0.0), loss=LossSection(masking_warmup=10**6),
                     corruption=CorruptionSection(proofreading_warmup=10**6, own_predictions=1.0))
    with torch.enable_grad():
        trainer, _ = trained(config)
    model, rows, vocabulary = trainer.model, batch(99, num=200), Vocabulary(40)  # more rows than are read at once
    figures = trainer.validate(rows, 1.0)
    seeds, times = stratified_rows(VALIDATION_SEED, OBJECTIVE_STREAM, 0, torch.arange(200), 200)
    inputs = corrupt(rows.tokens, vocabulary=vocabulary, attention_mask=rows.attention_mask, seeds=seeds, times=times,
                     remask_ratio=1.0, guaranteed_correct=0.01).inputs
    masked = inputs == 40
    tasks = {"unmask": masked, "remask": ~masked & (inputs != rows.tokens), "keep": rows.attention_mask & ~masked}
    tasks["keep"] &= inputs == rows.tokens
    hidden = model.encode(inputs, rows.attention_mask)
    logprobs = model.heads["lm"](hidden)[..., :41].double().log_softmax(-1)
    for task, where in tasks.items():
        targets = torch.full_like(rows.tokens, 40) if task == "remask" else rows.tokens
        losses = -logprobs[where].gather(-1, targets[where][:, None])
        assert where.sum() > 100 and figures[f"val_loss_{task}"] == pytest.approx(float(losses.mean()), rel=1e-5)
        p_mask = logprobs[where][:, 40].exp().mean()
        assert figures[f"val_p_mask_{task}"] == pytest.approx(float(p_mask), rel=1e-4)
    states = model.heads["sampler"](hidden, *model.neighbor_embeddings(rows.tokens))[masked]
    sampler = F.cross_entropy(model.heads["lm"](states)[:, :40].double(), rows.tokens[masked])
    assert figures["val_loss_sampler"] == pytest.approx(float(sampler), rel=1e-5)


@torch.no_grad()
def test_the_held_out_objective_depends_on_the_model_alone():
    """Not on the step, nor on ramps; the sampler's loss is there if it ever trains."""
    rows, pretrain = batch(99), replace(CONFIG.pretrain, steps=3)
    expected = make_trainer().validate(rows, 1.0)
    for corruption in (CorruptionSection(proofreading_warmup=0), CorruptionSection(proofreading_warmup=10**6)):
        for start in (2, 3):
            config = replace(CONFIG, corruption=corruption, sampler=SamplerSection(start=start), pretrain=pretrain)
            figures = make_trainer(config).validate(rows, 1.0)
            assert ("val_loss_sampler" in figures) == (start == 2)
            assert figures.items() <= expected.items()
    mdlm = make_trainer(replace(CONFIG, loss=LossSection(objective="mdlm"))).validate(rows, 1.0)
    assert {"val_loss_unmask", "val_loss_sampler"} <= mdlm.keys() and not {"val_nelbo", "val_loss_keep"} & mdlm.keys()
    assert not any(name.startswith("val_loss") for name in make_trainer(CAUSAL).validate(rows, 1.0))


@pytest.mark.parametrize("knows, auroc", [(8.0, 1.0), (-8.0, 0.0), (0.0, 0.5)])
def test_the_critic_is_judged_by_the_generators_own_errors(monkeypatch, knows, auroc):
    trainer, rows = make_trainer(), batch(99, num=200)

    def oracle(filled, mask):
        clean = rows.tokens[: len(filled)] if len(filled) == 128 else rows.tokens[128:]
        return torch.where(filled != clean, knows, -knows)

    monkeypatch.setattr(trainer.model, "critic_scores", oracle)
    with torch.no_grad():
        assert critic_quality(trainer.model.eval(), rows)["critic_auroc"] == pytest.approx(auroc, abs=1e-9)


def test_heads_are_clipped_each_by_itself():
    config = replace(CONFIG, pretrain=replace(CONFIG.pretrain, grad_clip=1e-3))
    trainer = make_trainer(config)
    trainer.step(7, batch(7))
    for name, parameters in trainer.parts.items():
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-3), name
    assert set(trainer.parts) == {"generator", "critic", "sampler"}
    owned = [id(p) for parameters in trainer.parts.values() for p in parameters]
    assert sorted(owned) == sorted(id(p) for p in trainer.model.parameters())


def test_the_mask_bias_controller_is_steered_by_the_steps_own_p_mask():
    trainer = make_trainer()
    figures = trainer.read(trainer.step(7, batch(7)))
    assert float(trainer.mask_bias.ema) == pytest.approx(figures["p_mask_unmask"], rel=1e-6)
