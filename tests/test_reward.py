import sys

import pytest
import torch

from actors.reward import Reward
from actors.trunk_store import Blueprint, to_arrays
from grpo.config import ModelSection, RewardSection
from grpo.model import GPT
from grpo.tokenizer import Vocabulary, build_tokenizer
from grpo.trajectory import Rollout
from tests.learner_world import CONFIG, World

torch.set_num_threads(1)
SECTION = ModelSection(n_layer=2, n_head=2, n_embd=16)
BLUEPRINT = Blueprint(
    model=SECTION,
    vocabulary=Vocabulary(12),
    block_size=10,
    reward=RewardSection(hidden=8, layers=(1, -1), pooling="both"),
)


def make():
    torch.manual_seed(0)
    base = GPT(SECTION, Vocabulary(12), block_size=10).eval()
    for parameter in base.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    heads = to_arrays(BLUEPRINT.build("reward").heads.state_dict())
    return Reward(BLUEPRINT, to_arrays(base.trunk.state_dict()), heads, threads=1), heads, base


def rollout(tokens, real):
    completion = real.clone()
    completion[:, :3] = False
    nothing = torch.zeros(0, dtype=torch.int64)
    return Rollout(
        tokens=tokens,
        attention_mask=real,
        completion_mask=completion,
        group_size=2,
        temperature=1.0,
        policy_version=0,
        hidden=torch.zeros(0, 16),
        actions=nothing,
        rows=nothing,
        positions=nothing,
        steps=nothing,
        logprobs=torch.zeros(0),
        entropies=torch.zeros(0),
    )


def texts():
    tokens = torch.randint(0, 12, (4, 10), generator=torch.Generator().manual_seed(3))
    real = torch.arange(10) < torch.tensor([[10], [10], [7], [8]])
    return tokens.masked_fill(~real, 13), real


def test_scores_are_the_reward_models_own_on_the_generators_trunk():
    reward, heads, base = make()
    tokens, real = texts()
    scores = reward.score(heads, 4, rollout(tokens, real))
    completion = real.clone()
    completion[:, :3] = False
    direct = BLUEPRINT.build("reward").eval()
    direct.trunk.load_state_dict(base.trunk.state_dict())
    direct.heads.load_state_dict({name: torch.from_numpy(array) for name, array in heads.items()})
    with torch.no_grad():
        expected = direct.reward_scores(tokens, completion, real)
        features = direct.reward_features(tokens, completion, real)
        probabilities = direct(tokens, attention_mask=real, positions=completion)
    assert torch.equal(scores.logits, expected.logits) and torch.equal(scores.token_logits, expected.token_logits)
    assert torch.equal(scores.features, features)
    torch.testing.assert_close(scores.logits.softmax(-1), probabilities)
    assert (scores.token_logits[~completion] == 0).all() and (scores.token_logits[completion] != 0).all()


def test_neither_pads_nor_batch_mates_change_a_score():
    reward, heads, _ = make()
    tokens, real = texts()
    before = reward.score(heads, 0, rollout(tokens, real))
    after = reward.score(heads, 0, rollout(tokens.masked_fill(~real, 5), real))
    torch.testing.assert_close(after.logits, before.logits)
    torch.testing.assert_close(after.token_logits, before.token_logits)
    alone = reward.score(heads, 0, rollout(tokens[2:3], real[2:3]))
    torch.testing.assert_close(alone.logits, before.logits[2:3], rtol=1e-4, atol=1e-5)
    tokens[2, 4] = (tokens[2, 4] + 1) % 12
    assert not torch.equal(reward.score(heads, 0, rollout(tokens, real)).logits[2], before.logits[2])


def test_the_head_of_the_call_scores_a_whole_call():
    reward, heads, _ = make()
    tokens, real = texts()
    before = reward.score(heads, 1, rollout(tokens, real))
    new = {name: array * 2 for name, array in heads.items()}
    moved = reward.score(new, 2, rollout(tokens, real))
    assert (moved.logits != before.logits).any(1).all() and torch.equal(moved.features, before.features)
    restarted, _, _ = make()
    assert torch.equal(restarted.score(new, 2, rollout(tokens, real)).logits, moved.logits)


def test_the_users_functions_read_completions_without_prompts_and_pads(tmp_path, monkeypatch):
    (tmp_path / "noting.py").write_text("seen = []\ndef length(texts):\n    seen.extend(texts)\n"
                                        "    return [len(text) for text in texts]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    tokenizer = build_tokenizer("bytes")
    reward = Reward(BLUEPRINT, {}, {}, threads=1, functions=["noting:length"], tokenizer=tokenizer)
    texts = ["ab: long", "cd: hi"]
    tokens = torch.full((2, 10), tokenizer.vocabulary.pad_id)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(tokenizer.encode(text))
    scores = reward.score({}, 0, rollout(tokens, tokens != tokenizer.vocabulary.pad_id))
    assert sys.modules["noting"].seen == [" long", " hi"]  # three tokens of each are the prompt
    assert scores.users["noting:length"].tolist() == [5, 3]
    assert scores.logits is None and scores.token_logits is None and scores.features is None  # there is no adversary


def test_a_round_without_text_to_judge_leaves_the_number_of_reward_steps():
    discriminator = World(CONFIG).learner.discriminator
    discriminator.steer(0.99)
    fewer = discriminator.num_steps
    discriminator.steer(None)
    assert discriminator.num_steps == fewer < discriminator.config.reward.max_steps


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_first_round_of_hardly_any_text_leaves_finite_features(tokens):
    discriminator = World(CONFIG).learner.discriminator
    features = torch.randn(4, 6, discriminator.head.shift.numel())
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, :tokens] = True
    discriminator._calibrate(features, mask)
    assert discriminator.head.shift.isfinite().all() and (discriminator.head.scale == 1).all()
