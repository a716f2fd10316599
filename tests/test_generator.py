from dataclasses import replace

import pytest
import torch

from actors.generator import Generator
from actors.trunk_store import Blueprint, to_arrays
from grpo.config import (
    Config,
    DataSection,
    DenoiseSection,
    GrpoSection,
    ModelSection,
    RewardSection,
    RunSection,
    SamplerSection,
)
from grpo.model import GPT
from grpo.tokenizer import Vocabulary
from grpo.trajectory import credited, trajectory_logprobs

torch.set_num_threads(1)
T, P, G = 12, 4, 3
PROMPTS = torch.randint(0, 12, (4, T), generator=torch.Generator().manual_seed(2))
REAL = torch.ones_like(PROMPTS, dtype=torch.bool)
CONFIG = Config(
    run=RunSection(seed=3, threads=1),
    data=DataSection(block_size=T),
    sampler=SamplerSection(min_neighbors_ratio=0.1),
    denoise=DenoiseSection(steps=3),
    grpo=GrpoSection(prompt_tokens=P, group_size=G, residual=4, policy_tokens="all"),
)


def make(causal=False, remasking="random", **sections):
    torch.manual_seed(0)
    kind = dict(attention="causal", critic=False, sampler=False) if causal else {}
    section = ModelSection(n_layer=1, n_head=2, n_embd=16, **kind)
    model = GPT(section, Vocabulary(12), block_size=T).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    trunk = to_arrays(model.trunk.state_dict())
    model.untie(4)
    heads = to_arrays(model.heads.state_dict())
    blueprint = Blueprint(model=section, vocabulary=Vocabulary(12), block_size=T, reward=RewardSection())
    return Generator(blueprint, trunk, heads, config=replace(CONFIG, **sections), remasking=remasking), heads


def roll(generator, heads, prompts=slice(None), *, round=0, version=0):
    return generator.roll_out(heads, version, 0.0, round, torch.arange(4)[prompts], PROMPTS[prompts], REAL[prompts])


@pytest.mark.parametrize(
    "kind",
    [
        {},
        dict(causal=True),
        dict(remasking="self", denoise=DenoiseSection(steps=3, randomness=0.5, sampler=True)),
    ],
)
def test_how_many_actors_share_the_prompts_changes_nothing(kind):
    generator, heads = make(**kind)
    whole = roll(generator, heads)
    assert whole.tokens.shape == (4 * G, T)
    for part in (slice(0, 1), slice(1, 4)):
        mine = roll(make(**kind)[0], heads, part)
        rows = slice(part.start * G, part.stop * G)
        assert torch.equal(mine.tokens, whole.tokens[rows])
        of = (credited(whole, "rows") >= rows.start) & (credited(whole, "rows") < rows.stop)
        torch.testing.assert_close(credited(mine, "logprobs"), credited(whole, "logprobs")[of], rtol=1e-5, atol=1e-6)
    for n in range(4):
        assert (whole.tokens[n * G : n * G + G, :P] == PROMPTS[n, :P]).all()


def test_rounds_samples_and_seeds_draw_their_own_noise_and_repeat():
    generator, heads = make()
    first = roll(generator, heads).tokens
    assert torch.equal(roll(generator, heads).tokens, first)
    assert not torch.equal(roll(generator, heads, round=1).tokens, first)
    assert not torch.equal(roll(make(run=RunSection(seed=4, threads=1))[0], heads).tokens, first)
    assert len(first.unique(dim=0)) == 4 * G


def test_a_restarted_actor_acts_with_the_heads_of_the_call():
    generator, heads = make()
    new = {name: array * 1.5 for name, array in heads.items()}
    moved = roll(generator, new, version=5)
    assert moved.policy_version == 5
    restarted, _ = make()
    assert torch.equal(roll(restarted, new, version=5).tokens, moved.tokens)
    assert not torch.equal(roll(restarted, heads, version=6).tokens, moved.tokens)
    same = roll(restarted, new, version=6)  # the version says that nothing is new
    assert not torch.equal(same.tokens, moved.tokens)


def test_the_rollouts_logprobs_are_those_of_the_heads_that_came_along():
    settings = DenoiseSection(steps=3, temperature=0.8, top_p=0.9)
    generator, heads = make(denoise=settings)
    rollout = roll(generator, {name: array * 1.2 for name, array in heads.items()}, version=1)
    other, _ = make(denoise=settings)
    with torch.no_grad():
        stale = trajectory_logprobs(other.model, rollout)
        fresh = trajectory_logprobs(generator.model, rollout)
    torch.testing.assert_close(fresh, rollout.logprobs, rtol=1e-6, atol=1e-6)
    assert (stale - rollout.logprobs).abs().max() > 1e-2
    assert replace(rollout).tokens.device.type == "cpu"


def test_the_learners_mask_bias_reaches_the_choices():
    generator, heads = make(remasking="self", denoise=DenoiseSection(steps=3, randomness=0.5))
    rollout = generator.roll_out(heads, 0, 2.5, 0, torch.arange(4), PROMPTS, REAL)
    assert rollout.choices.mask_bias == 2.5
