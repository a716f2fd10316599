"""Cached generation is the uncached loop, token for token."""

import pytest
import torch
from torch import nn

from grpo.autoregress import generate
from grpo.config import ModelSection
from grpo.model import GPT
from grpo.noise import PROPOSE, uniforms
from grpo.tokenizer import Vocabulary

torch.set_num_threads(1)
VOCABULARY = Vocabulary(30)
B, P, NEW = 4, 3, 9
SEEDS = torch.arange(100, 100 + B)


def make(position="rotary"):
    torch.manual_seed(0)
    section = ModelSection(
        n_layer=2, n_head=2, n_embd=16, attention="causal", position=position, critic=False, sampler=False
    )
    model = GPT(section, VOCABULARY, block_size=P + NEW)
    for parameter in model.trunk.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.double()


def prompts(rows=B):
    return torch.randint(0, VOCABULARY.base_size, (rows, P), generator=torch.Generator().manual_seed(1))


def uncached(model, tokens, temperature, top_p):
    """Row by row, token by token: softmax, nucleus by adding up, inverse distribution function by walking."""
    texts, logprobs = [], []
    for row, text in enumerate(tokens.tolist()):
        for position in range(len(text), len(text) + NEW):
            logits = model(torch.tensor([text]))[0, -1, : VOCABULARY.base_size] / temperature
            probabilities = logits.softmax(-1).tolist()
            kept, mass = set(), 0.0
            for token in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
                if mass < top_p:
                    kept.add(token)
                    mass += probabilities[token]
            target = uniforms(SEEDS[row], 0, PROPOSE, position).item() * sum(probabilities[i] for i in kept)
            below = 0.0
            for token in sorted(kept):
                below += probabilities[token]
                if target < below:
                    break
            text.append(token)
            logprobs.append(torch.tensor(probabilities[token] / sum(probabilities[i] for i in kept)).log())
        texts.append(text)
    return torch.tensor(texts), torch.stack(logprobs)


@pytest.mark.parametrize("position", ["rotary", "learned"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
@torch.no_grad()
def test_cached_generation_equals_the_uncached_loop(position, temperature, top_p):
    model = make(position)
    expected, logprobs = uncached(model, prompts(), temperature, top_p)
    settings = {"num_new": NEW, "temperature": temperature, "top_p": top_p, "seeds": SEEDS}
    assert torch.equal(generate(model, prompts(), **settings), expected)
    record = generate(model, prompts(), **settings, record=True)
    assert torch.equal(record.tokens, expected)
    torch.testing.assert_close(record.logprobs.float(), logprobs, rtol=1e-5, atol=1e-5)


def test_each_token_is_read_and_told_once():
    model, read, told = make(), [], []
    model.trunk.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape[1]))
    generate(model, prompts(), num_new=NEW, seeds=SEEDS, on_token=told.append)
    assert read == [P] + [1] * (NEW - 1) and told == list(range(1, NEW + 1))


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@torch.no_grad()
def test_recorded_states_are_those_of_a_replay_through_the_whole_model(top_p):
    model = make()
    record = generate(model, prompts(), num_new=NEW, temperature=0.9, top_p=top_p, seeds=SEEDS, record=True)
    replayed = model.encode(record.tokens)[:, P - 1 : -1].flatten(0, 1)
    torch.testing.assert_close(record.hidden, replayed, rtol=0, atol=1e-10)
    logits = model.heads["lm"](replayed)[:, : VOCABULARY.base_size] / 0.9
    if top_p < 1:
        logits = logits.masked_fill(~record.support, float("-inf"))
    actions = record.proposals[record.masked]
    expected = logits.log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    torch.testing.assert_close(record.logprobs, expected, rtol=0, atol=1e-10)
    assert (record.support is None) == (top_p == 1)
    assert record.masked.sum() == B * NEW and not record.masked[:, :P].any()


@torch.no_grad()
def test_a_text_does_not_depend_on_its_batch_mates():
    model = make()
    together = generate(model, prompts(), num_new=NEW, seeds=SEEDS)
    for row in range(B):
        alone = generate(model, prompts()[row : row + 1], num_new=NEW, seeds=SEEDS[row : row + 1])
        assert torch.equal(alone[0], together[row])
    assert len(together.unique(dim=0)) == B


@torch.no_grad()
def test_special_ids_are_never_generated():
    model = make()
    model.untie()
    with torch.no_grad():
        model.heads["lm"].matrix[VOCABULARY.base_size :] *= 100  # specials would win every draw
    texts = generate(model, prompts(64), num_new=NEW, temperature=3.0, seeds=torch.arange(64))
    assert (texts < VOCABULARY.base_size).all()


@torch.no_grad()
def test_drawn_frequencies_are_the_models_probabilities():
    model, rows = make(), 20000
    expected = model(prompts(1))[0, -1, : VOCABULARY.base_size].softmax(-1)
    drawn = generate(model, prompts(1).expand(rows, -1), num_new=1, seeds=torch.arange(rows))[:, -1]
    found = torch.bincount(drawn, minlength=VOCABULARY.base_size) / rows
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / rows).sqrt() + 1e-9).all()


def test_wrong_use_is_explained():
    bidirectional = GPT(ModelSection(n_layer=1, n_head=1, n_embd=8), VOCABULARY, block_size=8)
    with pytest.raises(ValueError, match="model.attention must be causal"):
        generate(bidirectional, prompts(), num_new=1, seeds=SEEDS)
    with pytest.raises(ValueError, match="at least one prompt token"):
        generate(make(), prompts()[:, :0], num_new=1, seeds=SEEDS)


@torch.no_grad()
def test_a_group_equals_its_prompt_continued_row_by_row():
    model, seeds = make(), torch.arange(200, 200 + 2 * B)
    group = generate(model, prompts(), num_new=NEW, seeds=seeds, record=True)
    alone = generate(model, prompts().repeat_interleave(2, 0), num_new=NEW, seeds=seeds, record=True)
    assert torch.equal(group.tokens, alone.tokens)
    torch.testing.assert_close(group.hidden, alone.hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(group.logprobs, alone.logprobs, rtol=1e-6, atol=1e-6)
