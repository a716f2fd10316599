import pytest
import torch

from grpo.checkpoint import save_checkpoint
from grpo.completion import complete
from grpo.config import Config, DataSection, DenoiseSection, ModelSection
from grpo.config_file import to_dict
from grpo.data import Batch
from grpo.model import GPT
from grpo.text_generator import TextGenerator
from grpo.tokenizer import build_tokenizer

CONFIG = Config(
    data=DataSection(block_size=24),
    model=ModelSection(n_layer=1, n_head=2, n_embd=16, critic=False, sampler=False),
    denoise=DenoiseSection(steps=3, temperature=0.8, remasking="self", randomness=0.5),
)


def checkpoint(folder, config=CONFIG):
    tokenizer = build_tokenizer("bytes")
    torch.manual_seed(0)
    model = GPT(config.model, tokenizer.vocabulary, block_size=config.data.block_size)
    torch.nn.init.normal_(model.trunk.wte.weight, std=1.0)
    state = {"mask_bias": {"bias": 1.5}}
    save_checkpoint(folder / "model", model, config=to_dict(config), tokenizer=tokenizer, state=state)
    return folder / "model", model, tokenizer


def test_texts_are_those_of_the_checkpoint_and_its_settings(tmp_path):
    folder, model, tokenizer = checkpoint(tmp_path)
    texts = TextGenerator(folder)("the ", num=3, seed=7)
    rows = torch.zeros(3, 24, dtype=torch.int64)
    rows[:, :4] = torch.tensor(tokenizer.encode("the "))
    batch = Batch(rows, torch.ones(3, 24, dtype=torch.bool))
    expected = complete(model.eval(), batch, CONFIG.denoise, prompt_tokens=4, seed=7, mask_bias=1.5)
    assert texts == [tokenizer.decode(row) for row in expected.tolist()] and len(set(texts)) == 3
    assert all(text.startswith("the ") for text in texts)


def test_more_texts_change_none_of_the_earlier(tmp_path):
    generator = TextGenerator(checkpoint(tmp_path)[0])
    assert generator("a", num=5)[:2] == generator("a", num=2) != generator("a", num=2, seed=1)


def test_a_prompt_that_leaves_nothing_to_write_is_refused(tmp_path):
    generator = TextGenerator(checkpoint(tmp_path)[0])
    with pytest.raises(ValueError, match="0 to 23 tokens, got 24"):
        generator("x" * 24)
