"""Rollouts of a model so small that all of its trajectories can be counted, and larger ones of every kind."""

import torch

from grpo.config import DenoiseSection, ModelSection
from grpo.model import GPT
from grpo.noise import row_seeds
from grpo.tokenizer import Vocabulary
from grpo.trajectory import roll_out

V = T = 3
BIAS = 0.7
KINDS = {
    "parallel": dict(remasking="random"),
    "kept": dict(remasking="random", policy_tokens="kept"),
    "confidence": dict(remasking="confidence", randomness=0.5, positions=True),
    "critic": dict(remasking="critic", randomness=0.5, positions=True),
    "self": dict(remasking="self", randomness=0.5, positions=True),
    "wavefront": dict(remasking="self", randomness=0.5, positions=True, sampler=True),
    "causal": dict(causal=True),
}


def make_model(base=V, *, causal=False, block_size=T, dtype=torch.float64):
    torch.manual_seed(0)
    kind = dict(attention="causal", critic=False, sampler=False) if causal else {}
    section = ModelSection(n_layer=1, n_head=2, n_embd=8, position="learned", **kind)
    model = GPT(section, Vocabulary(base), block_size=block_size)
    model.untie(4)
    model.eval().to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.18 if "heads.lm" in name else 0.3 if "heads" in name else 0.5)
    model.freeze_trunk()
    return model


def rolled(model, rows, *, remasking="random", positions=False, policy_tokens="all", length=T, prompt=0, replay=False,
           **settings):
    """One sample for each seed in `rows`, of prompts of zeros."""
    prompts = torch.zeros(len(rows), length, dtype=torch.int64)
    return roll_out(
        model,
        prompts,
        torch.ones_like(prompts, dtype=torch.bool),
        prompt_tokens=prompt,
        group_size=1,
        seeds=row_seeds(1, 0, 0, rows),
        settings=DenoiseSection(**{"steps": 2, **settings}),
        remasking=remasking,
        policy_tokens=policy_tokens,
        positions=positions,
        replay=replay,
        mask_bias=BIAS,
        min_neighbors_ratio=0.01,
        policy_version=0,
    )


def large(kind, rows=None, dtype=torch.float32, **settings):
    options = dict(KINDS[kind])
    model = make_model(20, causal=options.pop("causal", False), block_size=16, dtype=dtype)
    rows = torch.arange(12) if rows is None else rows
    settings = {"steps": 4, "temperature": 0.7, "top_p": 0.8, **settings}
    return model, rolled(model, rows, length=16, prompt=4, **options, **settings)


def gradient(model, total):
    parameters = list(model.heads.parameters())
    parts = torch.autograd.grad(total, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, parts, strict=True)]
    )


def relative(found, exact):
    return ((found - exact).norm() / exact.norm()).item()
