"""A small GPT, far from its initial weights, and tokens for it."""


import torch
from torch import nn

from grpo.config import ModelSection
from grpo.model import GPT
from grpo.tokenizer import Vocabulary

VOCABULARY = Vocabulary(30)
B, T = 3, 9
CAUSAL = {"attention": "causal", "critic": False, "sampler": False}


def make(seed=0, mode="generator", reward=None, **section):
    torch.manual_seed(seed)
    section = ModelSection(**{"n_layer": 2, "n_head": 2, "n_embd": 16, **section})
    model = GPT(section, VOCABULARY, mode=mode, block_size=T, reward=reward)
    for parameter in model.trunk.parameters():  # far from the initial near-zero weights, so that wrong wiring shows
        nn.init.normal_(parameter, std=0.4)
    return model


def tokens(seed=1, rows=B):
    return torch.randint(0, VOCABULARY.base_size, (rows, T), generator=torch.Generator().manual_seed(seed))
