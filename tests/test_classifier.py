from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from actors.classifier import SequenceScorer, Teacher, TokenClassifier
from grpo.checkpoint import save_checkpoint
from grpo.config import Config, DataSection, DenoiseSection, GrpoSection, ModelSection, PretrainSection
from grpo.data import Batch
from grpo.metrics import auroc
from grpo.model import GPT
from grpo.remasking import Filled, by_model
from grpo.tokenizer import build_tokenizer

torch.set_num_threads(1)
T = 16
TOKENIZER = build_tokenizer("bytes")
CONFIG = Config(
    model=ModelSection(n_layer=2, n_head=2, n_embd=32), data=DataSection(block_size=T, layout="documents"),
    grpo=GrpoSection(prompt_tokens=4), denoise=DenoiseSection(steps=2),
    pretrain=PretrainSection(steps=60, batch_size=16, learning_rate=3e-3, warmup=5))


def alphabet(step, num=16):
    """Rows that count through the alphabet, of unequal length: what does not fit is plain to see."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(26, (num, 1), generator=generator)
    length = torch.randint(8, T + 1, (num, 1), generator=generator)
    attention_mask = torch.arange(T) < length
    tokens = 97 + (start + torch.arange(T)) % 26
    return Batch(tokens.masked_fill(~attention_mask, TOKENIZER.vocabulary.pad_id), attention_mask)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    torch.manual_seed(1)
    model = GPT(CONFIG.model, TOKENIZER.vocabulary, block_size=T)
    folder = tmp_path_factory.mktemp("teacher") / "best"
    return save_checkpoint(folder, model, config={}, tokenizer=TOKENIZER, state={"mask_bias": {"bias": 1.5}})


def learner(kind, mode, folder, config=CONFIG):
    config = replace(config, pretrain=replace(config.pretrain, mode=mode, teacher=str(folder)))
    torch.manual_seed(0)
    model = GPT(config.model, TOKENIZER.vocabulary, mode=mode, block_size=T)
    return kind(model, config, Teacher(str(folder), TOKENIZER, "cpu"))


def trained(trainer):
    before = {name: p.clone() for name, p in trainer.teacher.model.named_parameters()}
    for step in range(trainer.config.pretrain.steps):
        figures = trainer.read(trainer.step(step, alphabet(step)))
    assert all(p.equal(before[name]) for name, p in trainer.teacher.model.named_parameters())
    return trainer, figures


def test_the_token_classifier_starts_from_its_teachers_trunk(teacher_folder):
    trainer = learner(TokenClassifier, "token_classifier", teacher_folder)
    for name, p in trainer.model.trunk.named_parameters():
        assert p.equal(trainer.teacher.model.trunk.get_parameter(name)) and p.requires_grad
    assert trainer.teacher.mask_bias == 1.5 and set(trainer.parts) == {"classifier"}


def test_the_token_classifier_learns_to_see_errors_and_serves_as_remasking_model(teacher_folder):
    trainer, figures = trained(learner(TokenClassifier, "token_classifier", teacher_folder))
    rows = alphabet(999, num=64)
    quality = trainer.validate(rows, 1.0)
    assert quality["val_auroc"] > 0.95 and quality["val_loss"] < 0.4 and 0.2 < quality["val_error_rate"] < 0.8
    assert {"loss_right", "loss_wrong", "error_rate", "grad_norm_classifier"} == set(figures)
    wrong = torch.rand(rows.tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    wrong &= rows.attention_mask
    filled = torch.where(wrong, 128 + rows.tokens, rows.tokens)
    verdict = by_model(Filled(
        model=trainer.teacher.model, tokens=filled, attention_mask=rows.attention_mask, eligible=rows.attention_mask,
        num_eligible=int(rows.attention_mask.sum()), confidences=torch.zeros(filled.shape), mask_bias=0.0,
        remasking_model=trainer.model.eval()))
    real = rows.attention_mask
    assert auroc(verdict.log_wrong.detach()[real], (filled != rows.tokens)[real]) > 0.9


def test_right_and_wrong_tokens_weigh_the_same_however_many_there_are(teacher_folder):
    trainer = learner(TokenClassifier, "token_classifier", teacher_folder)
    rows = alphabet(0)
    wrong = torch.zeros_like(rows.attention_mask)
    wrong[2, 3] = wrong[5, 0] = wrong[5, 7] = True
    example = trainer.example(0, rows.tokens, rows.attention_mask, rows=torch.arange(16),
                              seeds=torch.arange(16), times=torch.full((16,), 0.01).double())._replace(wrong=wrong)
    loss, _ = trainer.losses(0, example, trainer.counts(0, example))
    with torch.no_grad():
        logprobs = trainer.model(example.tokens, attention_mask=rows.attention_mask).log_softmax(-1)
    expected = -0.5 * (logprobs[wrong][:, 1].mean() + logprobs[rows.attention_mask & ~wrong][:, 0].mean())
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_the_sequence_scorer_learns_which_texts_are_natural(teacher_folder):
    trainer, figures = trained(learner(SequenceScorer, "sequence_scorer", teacher_folder))
    quality = trainer.validate(alphabet(999, num=64), 1.0)
    assert quality["val_accuracy"] > 0.95 and quality["val_auroc"] > 0.99
    assert {"loss_scorer", "accuracy", "grad_norm_scorer"} == set(figures)


def test_the_scorers_texts_share_prompt_length_and_tokens(teacher_folder):
    trainer = learner(SequenceScorer, "sequence_scorer", teacher_folder)
    rows = alphabet(3)
    texts = trainer.example(0, rows.tokens, rows.attention_mask, rows=torch.arange(16), seeds=torch.arange(16),
                            times=torch.full((16,), 0.5).double())
    assert texts.natural.tolist() == [True, False] * 8
    assert texts.tokens[::2].equal(rows.tokens[::2]) and not texts.tokens[1::2].equal(rows.tokens[1::2])
    assert texts.tokens[:, :4].equal(rows.tokens[:, :4])
    assert texts.tokens[~rows.attention_mask].equal(rows.tokens[~rows.attention_mask])
    assert texts.tokens[rows.attention_mask].max() < 256  # no [MASK] is left
    assert not texts.completion[:, :4].any() and texts.completion[:, 4:].equal(rows.attention_mask[:, 4:])
    with torch.no_grad():
        score = trainer.model(texts.tokens, attention_mask=rows.attention_mask, positions=texts.completion)
    loss, _ = trainer.losses(0, texts, trainer.counts(0, texts))
    expected = F.binary_cross_entropy(score.double(), texts.natural.double())
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("kind, mode", [(TokenClassifier, "token_classifier"), (SequenceScorer, "sequence_scorer")])
def test_validation_does_not_depend_on_how_many_rows_are_read_at_once(teacher_folder, monkeypatch, kind, mode):
    trainer = learner(kind, mode, teacher_folder)
    whole = trainer.validate(alphabet(999, num=64), 1.0)
    monkeypatch.setattr("actors.pretrainer.rows_at_once", lambda model, rows: 7)
    assert trainer.validate(alphabet(999, num=64), 1.0) == pytest.approx(whole, rel=1e-4)


def test_a_teacher_that_cannot_teach_is_refused(teacher_folder, tmp_path):
    causal = replace(CONFIG.model, attention="causal", critic=False, sampler=False)
    model = GPT(causal, TOKENIZER.vocabulary, block_size=T)
    save_checkpoint(tmp_path / "causal", model, config={}, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="is no masked-diffusion generator"):
        Teacher(str(tmp_path / "causal"), TOKENIZER, "cpu")
    with pytest.raises(ValueError, match="reads other tokens than the data"):
        Teacher(str(teacher_folder), build_tokenizer("bpe:300", ["some text " * 50]), "cpu")
    wide = replace(CONFIG, model=replace(CONFIG.model, n_embd=64))
    with pytest.raises(ValueError, match=r"^pretrain.teacher=.*expected shape \[64, 64\], found \[32, 32\]"):
        learner(TokenClassifier, "token_classifier", teacher_folder, wide)
