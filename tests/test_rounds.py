import time
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

from grpo.checkpoint import load_checkpoint, load_model, save_checkpoint
from grpo.config import (
    ClusterSection,
    Config,
    DataSection,
    DenoiseSection,
    GrpoSection,
    ModelSection,
    RewardSection,
    RunSection,
)
from grpo.data import make_dataset, open_dataset
from grpo.model import GPT
from grpo.reward_functions import RewardFunctionError
from grpo.run_checkpoints import latest_checkpoint
from pipelines.grpo import Paths, check_base, start_actors
from pipelines.progress import start_board
from pipelines.ranks import Ranks
from pipelines.rollouts import publish, shared_by
from pipelines.rounds import _remedy, train
from pipelines.run_folder import check_same

pytestmark = pytest.mark.ray
ROUNDS, WARMUP, STOP = 7, 2, 5
VOWELS = "rewards/grpo.example_rewards.vowel_share"
WALL = ("seconds/", "time/", "tokens_per_s")


@pytest.fixture(scope="module")
def paths(tmp_path_factory, ray_session):
    folder = tmp_path_factory.mktemp("rounds")
    text = "".join(f"{number} times {number} is {number * number}. " for number in range(2000))
    make_dataset([text], DataSection(block_size=16), folder / "data")
    torch.manual_seed(0)
    tokenizer = open_dataset(folder / "data").tokenizer
    base = GPT(ModelSection(n_layer=1, n_head=2, n_embd=16), tokenizer.vocabulary, block_size=16)
    save_checkpoint(folder / "base", base, config={}, tokenizer=tokenizer)
    return Paths(dataset=folder / "data", base=folder / "base", judge=folder)


def configure(**grpo):
    settings = {"rounds": ROUNDS, "prompts": 4, "group_size": 4, "prompt_tokens": 4, "residual": 8, "micro_batch": 8,
                "learning_rate": 1e-2, "rollout_actors": 2, "rewards": {"grpo.example_rewards:vowel_share": 1.0}}
    return Config(
        run=RunSection(threads=1, timeout_s=300), data=DataSection(block_size=16),
        model=ModelSection(n_layer=1, n_head=2, n_embd=16), denoise=DenoiseSection(steps=2),
        grpo=GrpoSection(**settings | grpo),
        reward=RewardSection(hidden=8, batch_size=16, warmup_rounds=WARMUP, warmup_steps=2, min_steps=1, max_steps=2,
                             replay_rounds=2),
    )


def run(config, paths, folder, stop_at=None):
    """Train in this process with real actors; once more from the checkpoint if it stops in between."""
    def go(job):
        return train(job, Ranks(), lambda figures, step: None, lambda done, total, figures: done == stop_at)

    with start_actors(config, paths, folder) as job:
        result = go(job)
    if stop_at:
        assert result["stopped"] == stop_at
        stop_at = None
        with start_actors(config, paths, folder) as job:
            result = go(job)
    kept = [{name: value for name, value in row.items() if not name.startswith(WALL)} for row in result["history"]]
    newest = load_checkpoint(latest_checkpoint(folder / "checkpoints"))
    policy = {name: tensor for name, tensor in newest.state["learner"].items() if name.startswith("policy.")}
    return kept, newest.tensors | policy


def test_a_trunk_in_bfloat16_stays_so_under_heads_in_float32(paths, tmp_path):
    config = configure(trunk_dtype="bfloat16", rounds=2)
    history, tensors = run(config, paths, tmp_path)
    base = load_checkpoint(paths.base).tensors
    assert len(history) == 2 + WARMUP and all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in history)
    trunk = {name: tensor for name, tensor in base.items() if name.startswith("trunk.")}
    final = load_model(tmp_path / "final")
    for name, tensor in trunk.items():
        kept = final.state_dict()[name]
        assert kept.dtype == torch.bfloat16 and torch.equal(kept, tensor.bfloat16())
    assert {parameter.dtype for parameter in final.heads.parameters()} == {torch.float32}
    assert not torch.equal(final.heads["lm"].matrix, base["trunk.wte.weight"])
    saved = {name: tensor for name, tensor in tensors.items() if not name.startswith("policy.")}
    assert all(torch.equal(saved[name], tensor) for name, tensor in load_checkpoint(tmp_path / "final").tensors.items())
    assert not torch.equal(tensors["policy.lm.matrix"], saved["heads.lm.matrix"])  # but the average
    with pytest.raises(ValueError, match="grpo.trunk_dtype must be float32 unless grpo.trainable is heads, got 'bfl"):
        configure(trunk_dtype="bfloat16", trainable="lora")


@pytest.fixture(scope="module")
def steady(paths, tmp_path_factory):
    """Undisturbed runs by staleness."""
    return {age: run(configure(max_staleness=age), paths, tmp_path_factory.mktemp(f"age{age}")) for age in (0, 1)}


@pytest.mark.parametrize("age", [0, 1])
def test_a_stopped_run_goes_on_bit_for_bit_with_several_actors(steady, paths, tmp_path, age):
    history, tensors = run(configure(max_staleness=age), paths, tmp_path, stop_at=STOP)
    assert history == steady[age][0] and len(history) == ROUNDS + WARMUP
    assert all(torch.equal(tensors[name], steady[age][1][name]) for name in tensors)


@pytest.mark.parametrize("age", [0, 1])
def test_rounds_that_are_added_later_are_those_of_one_run(steady, paths, tmp_path, age):
    run(configure(max_staleness=age, rounds=STOP - WARMUP), paths, tmp_path)
    history, tensors = run(configure(max_staleness=age), paths, tmp_path)
    assert history == steady[age][0] and all(torch.equal(tensors[name], steady[age][1][name]) for name in tensors)


def test_rollouts_are_one_update_old_where_that_is_allowed(steady):
    ages = [row["staleness"] for row in steady[1][0]]
    assert ages == [0] * (WARMUP + 1) + [1] * (ROUNDS - 1) and {row["staleness"] for row in steady[0][0]} == {0}
    assert [row["policy_version"] for row in steady[1][0]][WARMUP:] == [0, *range(ROUNDS - 1)]
    fresh, late = ([row[VOWELS] for row in steady[age][0][WARMUP:]] for age in (0, 1))
    assert fresh[0] == late[0] and fresh != late


def test_one_actor_or_two_give_the_same_figures(steady, paths, tmp_path):
    """Here to the bit: the micro-batch divides each actor's share, so that the sums are the same ones."""
    config = configure(rollout_actors=1)
    booked = ClusterSection(generator_cpus=0.5, reward_cpus=0.5, placement="STRICT_PACK")
    alone, tensors = run(replace(config, cluster=booked), paths, tmp_path)
    for mine, theirs in zip(alone, steady[0][0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    for name, value in steady[0][1].items():
        torch.testing.assert_close(tensors[name], value, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize(("what", "age"), [("lora", 1), ("all", 0)])
def test_what_trains_below_the_heads_travels_and_resumes(paths, tmp_path, what, age):
    config = configure(trainable=what, lora_rank=2, max_staleness=age, replay_steps=1, micro_batch=3, rounds=4,
                       num_iterations=1)
    history, tensors = run(config, paths, tmp_path / "steady")
    assert history[-1]["kl"] > 0 and ("importance" in history[-1]) == bool(age)
    if age:
        stopped, same = run(config, paths, tmp_path / "stopped", stop_at=4)
        assert stopped == history and all(torch.equal(tensors[name], same[name]) for name in same)
    else:
        assert history[-1]["ratio"] == pytest.approx(1, abs=1e-4)  # the actors act with the learner's trunk
    model, base = load_model(latest_checkpoint(tmp_path / "steady" / "checkpoints")), load_model(paths.base)
    assert model.trunk.state_dict().keys() == base.trunk.state_dict().keys()
    assert not torch.equal(model.trunk.blocks[0].mlp.up.weight, base.trunk.blocks[0].mlp.up.weight)


def test_a_users_reward_can_do_without_an_adversary(paths, tmp_path):
    history, tensors = run(configure(adversary=0.0), paths, tmp_path, stop_at=3)
    assert len(history) == ROUNDS and "reward_accuracy" not in history[0]
    assert all(row["reward"] == pytest.approx(row[VOWELS]) for row in history)
    undisturbed, same = run(configure(adversary=0.0), paths, tmp_path / "again")
    assert undisturbed == history and all(torch.equal(tensors[name], same[name]) for name in same)


def test_a_checkpoint_of_rounds_holds_the_provenance_of_both_its_texts(paths, tmp_path):
    tokenizer, base = open_dataset(paths.dataset).tokenizer, load_model(paths.base)
    earlier = {"sources": ["of the base"], "held_out": "there"}
    save_checkpoint(tmp_path / "base", base, config={}, tokenizer=tokenizer, provenance=[earlier])
    run(configure(rounds=1), replace(paths, base=tmp_path / "base"), tmp_path / "run")
    expected = [earlier, open_dataset(paths.dataset).provenance]
    assert load_checkpoint(tmp_path / "run" / "final").provenance == expected


def test_a_base_that_writes_no_text_is_refused(paths, tmp_path):
    data = open_dataset(paths.dataset)
    model = GPT(ModelSection(n_layer=1, n_head=2, n_embd=16), data.vocabulary, block_size=16, mode="token_classifier")
    save_checkpoint(tmp_path / "base", model, config={}, tokenizer=data.tokenizer)
    with pytest.raises(ValueError, match="^grpo.base .* is a token_classifier: give the checkpoint of a generator"):
        check_base(tmp_path / "base", configure(), paths.dataset)


def test_a_wavefront_needs_a_base_with_a_sampler(paths, tmp_path):
    data = open_dataset(paths.dataset)
    model = GPT(ModelSection(n_layer=1, n_head=2, n_embd=16, sampler=False), data.vocabulary, block_size=16)
    save_checkpoint(tmp_path / "base", model, config={}, tokenizer=data.tokenizer)
    config = configure()
    config = replace(config, denoise=replace(config.denoise, sampler=True))
    with pytest.raises(ValueError, match="^denoise.sampler must be false, for grpo.base .* has no sampler head"):
        check_base(tmp_path / "base", config, paths.dataset)


def test_a_folder_says_which_key_differs_before_what_follows_from_it(tmp_path):
    before = {"grpo": {"kl": 0.1, "loss": "dapo"}, "base": "a" * 64, "dataset": "data-1"}
    check_same(tmp_path, before, partly=True)
    assert not (tmp_path / "decides.json").exists()
    check_same(tmp_path, before)
    check_same(tmp_path, {"grpo": {"kl": 0.2}}, partly=True)  # nothing is there yet that it would spoil
    (tmp_path / "best").mkdir()
    check_same(tmp_path, {"grpo": {"kl": 0.1}}, partly=True)
    check_same(tmp_path, before)
    both = before | {"base": "b", "grpo": {"kl": 1, "loss": "dapo"}}
    for now, partly, message in (({"grpo": {"kl": 0.2}}, True, "a run with grpo.kl=0.1, not 0.2: choose another"),
                                 ({"dataset": "data-2"}, True, "a run with another dataset .data-1, not data-2.: ch"),
                                 (both, False, "a run with grpo.kl=0.1, not 1: choose another"),
                                 (before | {"base": "b"}, False, f"another base .{'a' * 20}, not b.: choose another")):
        with pytest.raises(ValueError, match=message):
            check_same(tmp_path, now, partly=partly)


def test_what_helps_after_an_error():
    assert _remedy(RewardFunctionError("f raised"), 3) == "the same command goes on after round 3"
    assert _remedy(FloatingPointError("not finite"), 3).startswith("lower grpo.learning_rate and choose another")


def test_a_reward_function_that_fails_ends_the_run_with_its_name(paths, tmp_path):
    config = configure(rewards={"statistics:fmean": 1.0})
    with pytest.raises(RewardFunctionError, match="reward function statistics:fmean raised"):
        run(config, paths, tmp_path)


def test_heads_leave_the_object_store_when_newer_ones_have_taken_their_place(ray_session):
    board = start_board()
    first, second = Ranks(rank=0, world=2), Ranks(rank=1, world=2)
    held, old = ray._private.worker.global_worker.core_worker.get_all_reference_counts, set()
    for round in range(3):
        heads = {"round": round, "version": round, "mask_bias": 0.0,
                 "generator": {"lm": np.full(10, round)}, "reward": {"reward": np.full(10, -round)}}
        published = [
            publish(heads, Ranks()), *(publish(heads, rank, shared_by(board, rank, 60)) for rank in (first, second))
        ]
        assert published[1] == published[2]
        assert ray.get(published[2].generator)["lm"][0] == ray.get(published[0].generator)["lm"][0] == round
        deadline = time.monotonic() + 10
        while old & held().keys() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not old & held().keys()
        old = {reference.hex().encode() for each in published[:2] for reference in (each.generator, each.reward)}
        assert old <= held().keys()
    ray.kill(board)
