from dataclasses import replace

import pytest
import torch

from grpo import completion
from grpo.checkpoint import save_checkpoint
from grpo.completion import complete, load_remasking_model
from grpo.config import DenoiseSection, ModelSection
from grpo.data import Batch
from grpo.model import GPT
from grpo.tokenizer import Vocabulary, build_tokenizer

PROMPT = 4


def case(attention):
    torch.manual_seed(0)
    own_heads = attention == "bidirectional"
    section = ModelSection(n_layer=1, n_head=2, n_embd=16, attention=attention, critic=own_heads, sampler=own_heads)
    model = GPT(section, Vocabulary(20), block_size=12).eval()
    mask = torch.ones(6, 12, dtype=torch.bool)
    mask[2, 9:] = False
    tokens = torch.randint(20, (6, 12)).masked_fill(~mask, model.vocabulary.pad_id)
    return model, Batch(tokens, mask)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_prompts_and_pads_stay_and_completions_are_text(attention):
    model, prompts = case(attention)
    texts = complete(model, prompts, DenoiseSection(steps=3), prompt_tokens=PROMPT, seed=1)
    assert torch.equal(texts[:, :PROMPT], prompts.tokens[:, :PROMPT])
    assert torch.equal(texts[~prompts.attention_mask], prompts.tokens[~prompts.attention_mask])
    assert (texts[prompts.attention_mask] < 20).all()
    assert not torch.equal(texts, prompts.tokens)


def test_a_remasking_model_reads_the_generators_tokens(tmp_path):
    for name in ("bytes", "bpe:260"):
        tokenizer = build_tokenizer(name, ["some text and some more text " * 9])
        section = ModelSection(n_layer=1, n_head=2, n_embd=16)
        model = GPT(section, tokenizer.vocabulary, mode="token_classifier", block_size=12)
        save_checkpoint(tmp_path / name, model, config={}, tokenizer=tokenizer)
    settings, own = DenoiseSection(remasking="model", remasking_model=str(tmp_path / "bytes")), build_tokenizer("bytes")
    assert load_remasking_model(settings, tokenizer=own).mode == "token_classifier"
    with pytest.raises(ValueError, match="denoise.remasking_model .*bpe:260 reads other tokens than the data"):
        load_remasking_model(replace(settings, remasking_model=str(tmp_path / "bpe:260")), tokenizer=own)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_rows_at_once_change_no_text(attention):
    model, prompts = case(attention)
    settings = {"prompt_tokens": PROMPT, "seed": 1}
    whole = complete(model, prompts, DenoiseSection(steps=3), **settings)
    assert torch.equal(complete(model, prompts, DenoiseSection(steps=3), batch_size=2, **settings), whole)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_texts_are_written_as_the_settings_say(attention, monkeypatch):
    model, rows = case(attention)
    given, asked = {}, DenoiseSection(steps=3, schedule="cosine", temperature=0.7, top_p=0.8, remasking="self",
                                      randomness=0.4)
    writer = "generate" if attention == "causal" else "denoise"
    write = getattr(completion, writer)
    monkeypatch.setattr(completion, writer, lambda *args, **named: given.update(named) or write(*args, **named))
    complete(model, rows, asked, prompt_tokens=PROMPT, seed=1, mask_bias=1.5, min_neighbors_ratio=0.2)
    told = {"temperature": 0.7, "top_p": 0.8}
    if attention == "bidirectional":
        told |= {"steps": 3, "schedule": "cosine", "remasking": "self", "randomness": 0.4, "sampler": False,
                 "mask_bias": 1.5, "min_neighbors_ratio": 0.2}
    assert told.items() <= given.items()
