import pytest
import torch

from grpo.completion import complete
from grpo.config import DenoiseSection, ModelSection
from grpo.data import Batch
from grpo.model import GPT
from grpo.tokenizer import Vocabulary

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


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_rows_at_once_change_no_text(attention):
    model, prompts = case(attention)
    settings = {"prompt_tokens": PROMPT, "seed": 1}
    whole = complete(model, prompts, DenoiseSection(steps=3), **settings)
    assert torch.equal(complete(model, prompts, DenoiseSection(steps=3), batch_size=2, **settings), whole)
