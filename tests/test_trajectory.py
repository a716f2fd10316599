import itertools
import math
import weakref
from dataclasses import fields, replace

import pytest
import torch

from grpo import trajectory
from grpo.actions import most_actions
from grpo.config import DenoiseSection
from grpo.metrics import means
from grpo.noise import row_seeds
from grpo.trajectory import (
    choice_log_probs,
    credited,
    policy_log_probs,
    roll_out,
    trajectory_logprobs,
    wavefront_figures,
)
from tests.small_rollouts import KINDS, large, make_model, rolled
from tests.test_wavefront import fill_by_loop

torch.set_num_threads(1)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_states_give_the_rollouts_logprobs_with_temperature_and_nucleus(kind):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        model, rollout = large(kind, dtype=dtype)
        with torch.no_grad():
            again = trajectory_logprobs(model, rollout)
        before = credited(rollout, "logprobs")
        assert ((again - before).abs() <= tolerance * before.abs().clamp(min=1)).all()
        ratio = (again - before).exp()
        assert (ratio - 1).abs().max() < 10 * tolerance  # the first iteration's: 1, up to rounding
        assert (rollout.choices is None) == (kind in ("parallel", "kept", "causal"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kept"])
def test_cached_states_equal_a_replay_through_the_full_model(kind):
    """Rebuild each step's input from the actions alone, run the whole model on it, and compare log-probabilities."""
    model, rollout = large(kind)
    positions, rows = rollout.positions, rollout.rows
    text = torch.zeros(12, 16, dtype=torch.int64)
    text[:, 4:] = 20
    with torch.no_grad():
        for step in range(int(rollout.steps.max()) + 1):
            now = rollout.steps == step
            r, p = rows[now], positions[now]
            if kind == "causal":
                states = model.encode(rollout.tokens)[r, p - 1]
            else:
                text[r, p] = 20
                assert (text == 20).sum() == now.sum()
                states = model.encode(text)[r, p]
            torch.testing.assert_close(states, rollout.hidden[now], rtol=1e-5, atol=1e-5)
            if kind != "wavefront":
                logits = model.heads["lm"](states)[:, :20] / 0.7
                logits[~rollout.support[now]] = -math.inf
                logprobs = logits.log_softmax(-1).gather(1, rollout.actions[now][:, None])[:, 0]
                torch.testing.assert_close(logprobs, rollout.logprobs[now], rtol=1e-5, atol=1e-5)
                mass = (model.heads["lm"](states)[:, :20] / 0.7).softmax(-1).mul(rollout.support[now]).sum(-1)
                assert (mass >= 0.8 - 1e-6).all()
            text[r, p] = rollout.actions[now]
            if rollout.choices is not None and step < 3:
                again = rollout.choices.steps == step
                text_now, after = text.clone(), text.clone()
                after[rollout.choices.rows[again], rollout.choices.actions[again]] = 20
                if kind in ("self", "wavefront", "critic"):
                    e = rollout.choices.eligible[12 * step : 12 * step + 12]
                    start = int(rollout.choices.eligible[: 12 * step].sum())
                    judged = rollout.choices.hidden[start : start + int(e.sum())]
                    torch.testing.assert_close(model.encode(text_now)[e], judged, rtol=1e-5, atol=1e-5)
                text = after
    assert torch.equal(text, rollout.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trajectory_does_not_depend_on_its_batch(kind):
    model, together = large(kind)
    for row in (0, 5, 11):
        _, alone = large(kind, torch.tensor([row]))
        assert torch.equal(alone.tokens[0], together.tokens[row])
        mine = credited(together, "rows") == row
        torch.testing.assert_close(
            credited(alone, "logprobs"), credited(together, "logprobs")[mine], rtol=1e-5, atol=1e-6
        )
        with torch.no_grad():
            torch.testing.assert_close(
                trajectory_logprobs(model, alone), trajectory_logprobs(model, together)[mine], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("kind", ["critic", "self", "confidence"])
def test_choices_hold_nothing_that_grows_with_draws_times_positions(kind):
    model, rollout = large(kind, steps=8)
    choices = rollout.choices
    assert len(choices.draw) > 3 * len(choices.turns)  # several draws a choice
    held = {f.name: getattr(choices, f.name) for f in fields(choices) if f.name != "hidden"}
    assert max(value.numel() for value in held.values() if isinstance(value, torch.Tensor)) <= 2 * choices.turns.numel()


@pytest.mark.parametrize(("policy", "positions"), [("random", False), ("critic", False), ("critic", True)])
def test_of_a_step_nothing_outlives_it_but_what_is_credited(policy, positions, monkeypatch):
    refs, alive, of_step = [], [], trajectory._actions

    def noted(record, *credited):
        alive.append([ref() is not None for ref in refs])
        refs.extend(weakref.ref(table) for table in (record.hidden, record.support))
        if record.judged is not None and not positions:
            refs.append(weakref.ref(record.judged))
        return {name: None if value is None else value.clone() for name, value in of_step(record, *credited).items()}

    monkeypatch.setattr(trajectory, "_actions", noted)
    credits = {"policy_tokens": "kept" if policy == "random" else "all", "positions": positions}
    rollout = rolled(make_model(20, block_size=16), torch.arange(4), remasking=policy, randomness=0.5, top_p=0.9,
                     steps=4, length=16, prompt=4, **credits)
    assert len(refs) >= 8 and not any(map(any, alive))
    assert positions == (rollout.choices is not None and rollout.choices.hidden is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_normalised_over_possible_actions(kind):
    model, rollout = large(kind)
    tokens = policy_log_probs(model, rollout)
    positions = [] if rollout.choices is None else [choice_log_probs(model, rollout.choices)]
    for table in (tokens, *positions):
        torch.testing.assert_close(table.exp().sum(-1), torch.ones(len(table), dtype=table.dtype))
    assert torch.equal(tokens > -math.inf, rollout.support)
    if rollout.choices is not None:
        drawn = rollout.choices
        assert (positions[0].gather(1, drawn.actions[:, None]) > -math.inf).all()
        assert torch.equal(credited(rollout, "positions")[len(rollout.positions) :], drawn.actions)


@pytest.mark.parametrize("kind", KINDS)
def test_most_actions_is_what_a_full_sample_has(kind):
    for steps, schedule in ((1, "linear"), (3, "linear"), (4, "cosine")):
        model, rollout = large(kind, steps=steps, schedule=schedule)
        counts = torch.bincount(credited(rollout, "rows"), minlength=12)
        most = most_actions(
            12,
            DenoiseSection(steps=steps, schedule=schedule),
            causal=model.trunk.causal,
            policy_tokens=KINDS[kind].get("policy_tokens", "all"),
            positions="positions" in KINDS[kind],
        )
        assert counts.tolist() == [most] * 12


def test_samples_of_a_group_lie_side_by_side_and_pads_are_never_actions():
    model = make_model(20, block_size=10)
    prompts = torch.arange(30).view(3, 10) % 20
    real = torch.arange(10) < torch.tensor([[10], [7], [4]])
    rollout = roll_out(
        model,
        prompts,
        real,
        prompt_tokens=3,
        group_size=4,
        seeds=row_seeds(0, 0, 0, torch.arange(12)),
        settings=DenoiseSection(steps=3, remasking="self", randomness=0.5),
        remasking="self",
        policy_tokens="all",
        positions=True,
        mask_bias=0.0,
        min_neighbors_ratio=0.01,
        policy_version=7,
    )
    for n, g in itertools.product(range(3), range(4)):
        row = rollout.tokens[4 * n + g]
        assert torch.equal(row[:3], prompts[n, :3]) and torch.equal(row[~real[n]], prompts[n][~real[n]])
    assert len(rollout.tokens[:4].unique(dim=0)) == 4
    assert rollout.completion_mask.sum(1).tolist() == [7] * 4 + [4] * 4 + [1] * 4
    assert rollout.completion_mask[credited(rollout, "rows"), credited(rollout, "positions")].all()
    assert not (rollout.choices.eligible & ~rollout.completion_mask.repeat(2, 1)).any()
    assert rollout.policy_version == 7 and rollout.group_size == 4


def test_wavefront_figures_are_those_of_a_per_position_loop():
    model, rows = make_model(20, block_size=16), torch.arange(6)
    rollout = rolled(model, rows, length=16, steps=3, remasking="self", randomness=0.5, sampler=True, replay=True)
    waves, num_seeds, filled = [], 0, 0
    with torch.no_grad():
        for step, inputs in enumerate(rollout.inputs):  # the first holds nothing but [MASK]s
            hidden = model.encode(inputs)
            for row, seed in enumerate(row_seeds(1, 0, 0, rows).tolist()):
                _, taken, boot, *_ = fill_by_loop(model, hidden[row], inputs[row], seed, step, 1.0, 1.0, 0.01)
                waves.append(taken)
                num_seeds += len(boot)
                filled += int((inputs[row] == model.vocabulary.mask_id).sum())
    assert num_seeds == 6 and means(wavefront_figures(rollout)) == {
        "wavefront/waves": pytest.approx(sum(waves) / 18),
        "wavefront/bootstraps": 1.0,
        "wavefront/tokens_per_wave": pytest.approx(filled / sum(waves)),
    }
    for kind in ("self", "causal"):
        assert wavefront_figures(large(kind)[1]) == {}


def test_a_rollout_moves_as_a_whole():
    _, rollout = large("self")
    moved = rollout.to("meta")
    assert moved.hidden.is_meta and moved.choices.hidden.is_meta and moved.neighbors is None
    assert replace(moved, choices=None).to("meta").choices is None


def test_policy_log_probs_are_those_of_the_sampling_temperature():
    model, rollout = large("parallel", top_p=1.0)
    expected = (model.heads["lm"](rollout.hidden)[:, :20] / 0.7).log_softmax(-1)
    torch.testing.assert_close(policy_log_probs(model, rollout), expected)
    assert rollout.support is None
