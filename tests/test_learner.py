import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from actors.trunk_store import to_arrays
from grpo.config import DenoiseSection
from grpo.data import Batch
from grpo.reward_loss import log_odds
from tests.learner_world import (
    BUSY,
    CONFIG,
    PLAIN,
    VOCABULARY,
    G,
    N,
    P,
    T,
    World,
    assert_same,
    grpo_with,
    natural,
    policy_gradient,
    run_rank,
)

torch.set_num_threads(1)


# ---- ranks and resumes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, BUSY], ids=["random", "critic, wavefront, positions"])
def test_two_ranks_train_as_one(tmp_path, config):
    alone = World(config)
    metrics = [alone.round(round) for round in range(3)]
    mp.spawn(run_rank, (str(tmp_path), config), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    assert_same(ranks[0][0], ranks[1][0])
    assert_same(ranks[0][0], alone.state(), rtol=1e-5, atol=1e-5)
    for mine, first, second in zip(metrics, ranks[0][1], ranks[1][1], strict=True):
        assert first == second
        assert first == pytest.approx(mine, rel=1e-5, abs=1e-6)
    assert ranks[0][2]["mask_bias"] == pytest.approx(alone.learner.mask_bias.state_dict(), rel=1e-6)
    texts = {name: torch.cat([part[3][name] for part in ranks], 1) for name in ranks[0][3]}
    assert_same(texts, alone.learner.discriminator.texts())  # rank by rank is the order of the global index


def test_the_phase_tells_how_the_wavefront_filled_where_there_is_one():
    world = World(BUSY)
    rollouts, scores, _, prompts = world.roll(6)
    metrics = world.learner.generator_phase(6, rollouts, scores, prompts, world.prompts)
    waves = [taken for rollout in rollouts for taken in rollout.waves.flatten().tolist()]
    filled = sum(len(rollout.actions) for rollout in rollouts)
    assert 0 in waves  # short texts are whole before the last step, which then counts for nothing
    assert metrics["wavefront/waves"] == pytest.approx(sum(waves) / sum(taken > 0 for taken in waves))
    assert metrics["wavefront/tokens_per_wave"] == pytest.approx(filled / sum(waves))
    assert metrics["wavefront/bootstraps"] == 0  # prompts are known
    assert not any(name.startswith("wavefront") for name in World(CONFIG).round(0))


def test_one_rollout_actor_or_two_make_no_difference():
    """The actors are micro-batches of one update: gradients and credits must not depend on the split."""
    one, two = World(CONFIG), World(CONFIG)
    one.actors = one.actors[:1]
    for round in range(2):
        assert one.round(round) == pytest.approx(two.round(round), rel=1e-5, abs=1e-6)
    assert_same(one.state(), two.state(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config", [grpo_with(rollout_actors=1), grpo_with(BUSY, rollout_actors=1)], ids=["random", "critic"]
)
def test_a_resumed_learner_continues_bit_for_bit(config):
    steady, stopped = World(config), World(config)
    for world in (steady, stopped):
        world.actors = world.actors[:1]
        for round in range(4):
            world.round(round)
    saved = copy.deepcopy((stopped.state(), stopped.learner.discriminator.texts(), stopped.learner.numbers()))
    fresh = World(config)
    fresh.actors = fresh.actors[:1]
    fresh.learner.load(*saved)
    assert len(fresh.learner.discriminator.buffer) == config.reward.replay_rounds + 1
    for mine, other in zip(fresh.learner.discriminator.buffer, steady.learner.discriminator.buffer, strict=True):
        assert mine.round == other.round and torch.equal(mine.features, other.features)
        assert torch.equal(mine.mask, other.mask)
    for round in (4, 5):
        assert fresh.round(round) == steady.round(round)
    assert_same(fresh.state(), steady.state())
    assert fresh.learner.numbers() == steady.learner.numbers()


def test_the_critic_s_weight_moves_no_other_head_over_a_frozen_trunk_and_hardly_the_critic():
    """As `critic.alpha` says: AdamW takes the size out of a gradient that no other loss shares."""
    worlds = [World(replace(CONFIG, critic=replace(CONFIG.critic, alpha=alpha))) for alpha in (1.0, 0.1)]
    start = worlds[0].state()
    for world in worlds:
        for round in range(3):
            world.round(round)
    strong, weak = (world.state() for world in worlds)
    critic = {name for name in start if name.startswith("policy.critic.")}
    others = {name for name in start if name.startswith("policy.")} - critic
    assert_same({name: strong[name] for name in others}, {name: weak[name] for name in others})
    moved, apart = (
        torch.cat([(left[name] - right[name]).flatten() for name in sorted(critic)]).norm()
        for left, right in ((strong, start), (strong, weak))
    )
    assert 0 < apart < 0.05 * moved


# ---- the frozen trunk ------------------------------------------------------------------------------------------------


def test_no_phase_moves_a_bit_of_any_trunk():
    world = World(BUSY)
    learner = world.learner
    models = {
        "published": None,
        "policy": learner.model,
        "reference": learner.reference,
        **{f"generator {i}": g.model for i, (g, _) in enumerate(world.actors)},
        **{f"reward {i}": r.model for i, (_, r) in enumerate(world.actors)},
    }
    read = lambda model: world.trunk if model is None else to_arrays(model.trunk.state_dict())  # noqa: E731
    before = {name: {k: a.copy() for k, a in read(model).items()} for name, model in models.items()}
    reference_heads = {k: v.clone() for k, v in learner.reference.heads.state_dict().items()}
    rollouts, scores, share, prompts = world.roll(0)
    phases = [
        lambda: learner.discriminator.remember(
            0, rollouts, scores, share, learner.discriminator.natural_features(share)
        ),
        lambda: learner.generator_phase(0, rollouts, scores, prompts, world.prompts),
        lambda: learner.discriminator.train(0),
        lambda: world.round(1),
    ]
    for phase in phases:
        phase()
        for name, model in models.items():
            for key, array in read(model).items():
                assert np.array_equal(array.view(np.int32), before[name][key].view(np.int32)), (name, key)
    for name in ("lm.matrix", "critic.layers.0.weight", "sampler.layers.0.weight"):  # while every head did move
        assert not torch.equal(learner.model.heads.state_dict()[name], reference_heads[name]), name
    assert_same(reference_heads, dict(learner.reference.heads.state_dict()))
    assert not learner.model.heads["lm"].tied
    trained = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in learner.model.trunk.parameters()}
    address = world.trunk["wte.weight"].__array_interface__["data"][0]
    assert all(m.trunk.wte.weight.data_ptr() == address for m in models.values() if m is not None)  # one copy


def test_a_generator_step_does_not_move_the_reward_of_unchanged_text():
    world = World(CONFIG)
    rollouts, scores, share, prompts = world.roll(0)
    world.learner.discriminator.remember(
        0, rollouts, scores, share, world.learner.discriminator.natural_features(share)
    )
    scoring = world.learner.discriminator.scoring_heads()
    reward = world.actors[0][1]
    before = reward.score(scoring, 1, rollouts[0])
    for _ in range(2):
        world.learner.generator_phase(0, rollouts, scores, prompts, world.prompts)
    after = reward.score(world.learner.discriminator.scoring_heads(), 2, rollouts[0])
    for field in ("logits", "token_logits", "features"):
        assert torch.equal(getattr(before, field), getattr(after, field))


# ---- the generator phase ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neutral", [False, True])
def test_groups_of_equal_reward_give_exactly_no_policy_gradient(neutral):
    world = World(grpo_with(**PLAIN, neutral=neutral))
    rollouts, scores, _, prompts = world.roll(0, full=True)
    flat = [replace(s, token_logits=torch.full_like(s.token_logits, 0.1)) for s in scores]
    assert all(g is None or (g == 0).all() for g in policy_gradient(world, rollouts, flat, prompts).values())
    # one flat group among others contributes nothing: its actions could be anything
    some = [replace(scores[0], token_logits=scores[0].token_logits.clone()), scores[1]]
    some[0].token_logits[:G] = 0.1
    other = replace(rollouts[0], actions=torch.where(rollouts[0].rows < G, 3, rollouts[0].actions))
    left, right = (policy_gradient(world, [r, rollouts[1]], some, prompts) for r in (rollouts[0], other))
    assert left["lm.matrix"].abs().max() > 0
    for name in left:
        assert left[name] is None or torch.equal(left[name], right[name])


def test_the_phases_gradient_is_the_policy_gradient_of_a_slow_loop():
    config = grpo_with(**PLAIN, neutral=False, credit="sequence", normalize=False)
    world = World(config)
    rollouts, scores, _, prompts = world.roll(0)
    found = policy_gradient(world, rollouts, scores, prompts)
    model, total = copy.deepcopy(world.learner.model), 0.0
    for rollout, score in zip(rollouts, scores, strict=True):
        odds = log_odds(score.logits)
        for b in range(len(rollout.tokens)):
            group = range(b // G * G, b // G * G + G)
            advantage = odds[b] - sum(odds[g] for g in group) / G
            mine = rollout.rows == b
            logprobs = model.heads["lm"](rollout.hidden[mine])[:, :12].log_softmax(-1)
            total = total - advantage * logprobs.gather(1, rollout.actions[mine][:, None]).mean() / (N * G)
    for name, p in model.heads.named_parameters():
        expected = torch.autograd.grad(total, p, allow_unused=True, retain_graph=True)[0]
        if expected is not None:
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7, msg=name)


def test_a_neutral_update_leaves_the_temperature_alone_to_first_order():
    """The derivative of the policy loss along a scaling of the logits is zero, and is not without `neutral`."""
    slopes = {}
    for neutral in (False, True):
        world = World(grpo_with(**PLAIN, neutral=neutral))
        rollouts, scores, _, prompts = world.roll(0)
        g = policy_gradient(world, rollouts, scores, prompts)["lm.matrix"]
        slopes[neutral] = (g * world.learner.model.heads["lm"].matrix.detach()).sum().abs().item()  # d / d log scale
    assert slopes[True] < 1e-6 < 1e-4 < slopes[False]


def test_the_first_iteration_has_ratio_one_and_no_kl():
    for config in (CONFIG, BUSY, replace(CONFIG, denoise=replace(CONFIG.denoise, temperature=0.7, top_p=0.8))):
        world = World(grpo_with(config, num_iterations=1))
        metrics = world.round(0)
        assert metrics["ratio"] == pytest.approx(1, abs=1e-6) and metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
        assert metrics["kl"] == 0 and metrics["clip_low"] == metrics["clip_high"] == 0
        moved = world.round(1)
        assert moved["kl"] > 1e-6 and moved["ratio"] == pytest.approx(1, abs=1e-6)


def test_a_non_finite_gradient_stops_with_the_phase_and_the_head():
    world = World(CONFIG)
    rollouts, scores, share, prompts = world.roll(0)
    bad = replace(rollouts[0], hidden=rollouts[0].hidden * float("nan"))
    with pytest.raises(FloatingPointError, match="generator phase of round 7: the gradient of lm"):
        world.learner.generator_phase(7, [bad, rollouts[1]], scores, prompts, world.prompts)


# ---- the reward phase ------------------------------------------------------------------------------------------------


def test_the_reward_head_is_judged_on_texts_that_it_has_not_seen():
    """Labels without any signal: training accuracy rises above chance, the reported one cannot."""
    config = replace(CONFIG, reward=replace(CONFIG.reward, replay_rounds=0, learning_rate=1e-2))
    world = World(config)
    held_out, seen = [], []
    for round in range(12):
        rollouts, scores, share, _ = world.roll(round, full=True)
        generator = torch.Generator().manual_seed(round)
        noise = lambda x: torch.randn(x.shape, generator=generator)  # noqa: B023, E731
        scores = [replace(s, features=noise(s.features)) for s in scores]
        features = torch.cat([noise(s.features) for s in scores])[:, P:]
        held_out.append(
            world.learner.discriminator.remember(round, rollouts, scores, share, features)["reward_accuracy"]
        )
        seen.append(world.learner.discriminator.train(round, 40)["reward_accuracy_train"])
    assert sum(held_out) / 12 < 0.58 and sum(seen) / 12 > 0.8


def test_calibration_is_by_the_natural_text_of_all_ranks():
    world = World(CONFIG)
    rollouts, scores, share, _ = world.roll(0)
    features = world.learner.discriminator.natural_features(share)
    world.learner.discriminator.remember(0, rollouts, scores, share, features)
    chosen = features[share.attention_mask[:, P:]]
    for head in (world.learner.discriminator.head, world.learner.discriminator.average):
        torch.testing.assert_close(head.shift, chosen.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(head.scale, 1 / chosen.std(0).clamp(min=1e-4), rtol=1e-4, atol=1e-4)
    before = world.learner.discriminator.head.shift.clone()
    world.round(1)
    assert torch.equal(world.learner.discriminator.head.shift, before)  # fixed by the first round


def test_the_scoring_head_is_the_moving_average_and_the_buffer_forgets():
    ema = 0.9
    world = World(replace(CONFIG, reward=replace(CONFIG.reward, ema=ema)))
    for round in range(5):
        old = {k: v.clone() for k, v in world.learner.discriminator.average.named_parameters()}
        world.round(round)
        now = dict(world.learner.discriminator.head.named_parameters())
        for name, value in world.learner.discriminator.average.named_parameters():
            torch.testing.assert_close(value, ema * old[name] + (1 - ema) * now[name])
    assert [texts.round for texts in world.learner.discriminator.buffer] == [2, 3, 4]
    published = world.learner.discriminator.scoring_heads()
    assert np.array_equal(
        published["reward.token.0.weight"], world.learner.discriminator.average.token[0].weight.numpy()
    )


def test_an_averaged_head_that_scores_keeps_its_spectral_norms():
    world = World(replace(CONFIG, reward=replace(CONFIG.reward, ema=0.9, spectral_norm=True)))
    for round in range(3):
        world.round(round)
    average = copy.deepcopy(world.learner.discriminator.average).eval()
    for layer in (average.pooled[0], average.pooled[2], average.token[0], average.token[2]):
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=0.05)


# ---- does it learn? --------------------------------------------------------------------------------------------------

CAUSAL = replace(CONFIG, model=replace(CONFIG.model, attention="causal", critic=False, sampler=False))
SELF = replace(CONFIG, denoise=DenoiseSection(steps=3, remasking="self", randomness=0.5))


@pytest.mark.parametrize("credit", ["sequence", "token"])
@pytest.mark.parametrize("config", [CONFIG, CAUSAL, SELF, BUSY], ids=["diffusion", "causal", "self", "wavefront"])
def test_the_policy_climbs_a_known_reward(config, credit):
    """The reward is the share of one token; chance gives 1/12."""
    world = World(
        grpo_with(
            config,
            **PLAIN | dict(grad_clip=1.0),
            neutral=False,
            credit=credit,
            learning_rate=1e-2,
            policy_positions=config is BUSY,
        )
    )
    shares = []
    for round in range(30):
        rollouts, scores, _, prompts = world.roll(round, full=True)
        for i, rollout in enumerate(rollouts):
            wanted = (rollout.tokens == 7).float()
            share = wanted[:, P:].mean(1)
            scores[i] = replace(scores[i], logits=torch.stack([share, torch.zeros_like(share)], 1), token_logits=wanted)
        shares.append(torch.cat([r.tokens[:, P:] == 7 for r in rollouts]).float().mean().item())
        world.learner.generator_phase(round, rollouts, scores, prompts, world.prompts)
    assert sum(shares[:3]) / 3 < 0.2 and sum(shares[-3:]) / 3 > 0.5, shares


# ---- the result ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [0.98, 0.45, 0.0])
def test_the_result_is_the_mean_of_the_policies_by_round(ema):
    world = World(grpo_with(num_iterations=1, ema=ema, entropy_floor=0.0))
    policies = [world.state()]
    for round in range(3):
        world.round(round)
        policies.append(world.state())
    weights = {0.98: [0.1, 0.2, 0.3, 0.4], 0.45: [0.0675, 0.135, 0.2475, 0.55], 0.0: [0, 0, 0, 1]}[ema]
    for name in ("lm.matrix", "critic.layers.0.weight"):
        mean = sum(weight * state[f"policy.{name}"] for weight, state in zip(weights, policies, strict=True))
        torch.testing.assert_close(policies[-1][f"result.{name}"], mean)


# ---- collapse --------------------------------------------------------------------------------------------------------


def test_a_collapsed_policy_goes_back_to_the_average_and_learns_half_as_fast():
    world = World(grpo_with(num_iterations=1, entropy_floor=0.5))
    learner = world.learner
    assert world.round(0)["back_offs"] == 0
    with torch.no_grad():  # a policy that is sure of everything
        learner.model.heads["lm"].weight.mul_(100)
    metrics = world.round(1)
    assert metrics["entropy"] < 0.5 * learner.first_entropy and metrics["back_offs"] == 1
    policy, result = learner.model.heads.state_dict(), learner.result.heads.state_dict()
    assert all(torch.equal(policy[name], result[name]) for name in policy)
    assert metrics["learning_rate"] == world.config.grpo.learning_rate / 2
    assert not learner.optimizer.state
    again = World(world.config)
    again.learner.load(world.state(), learner.discriminator.texts(), learner.numbers())
    assert again.learner.optimizer.param_groups[0]["lr"] == world.config.grpo.learning_rate / 2


def test_without_a_floor_a_collapsed_policy_goes_on():
    world = World(grpo_with(num_iterations=1, entropy_floor=0.0))
    world.round(0)
    with torch.no_grad():
        world.learner.model.heads["lm"].weight.mul_(100)
    assert world.round(1)["back_offs"] == 0


def test_a_rollout_in_flight_at_a_collapse_is_no_second_one():
    world = World(grpo_with(num_iterations=1, entropy_floor=0.5, max_staleness=1))
    world.round(0)
    with torch.no_grad():
        world.learner.model.heads["lm"].weight.mul_(100)
    rollouts, scores, _, prompts = world.roll(1)
    for round in (1, 2):
        assert world.learner.generator_phase(round, rollouts, scores, prompts, world.prompts)["back_offs"] == 1


def test_a_round_of_texts_that_end_with_their_prompts_changes_no_heads(monkeypatch):
    full = natural(0, full=True)
    short = torch.arange(T).expand_as(full.tokens) < P
    rows = Batch(full.tokens.masked_fill(~short, VOCABULARY.pad_id), short)
    monkeypatch.setattr("tests.learner_world.natural", lambda round, full: rows)
    world = World(grpo_with(anchor=0.0))
    before = {name: value.clone() for name, value in world.learner.model.heads.state_dict().items()}
    rollouts, scores, _, prompts = world.roll(0)
    metrics = world.learner.generator_phase(0, rollouts, scores, prompts, world.prompts)
    assert "entropy" not in metrics and metrics["back_offs"] == 0
    assert all(torch.equal(before[name], value) for name, value in world.learner.model.heads.state_dict().items())
