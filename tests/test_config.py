import dataclasses
from pathlib import Path

import pytest

from grpo.config import Config, GrpoSection
from grpo.config_file import config_hash, from_dict, load_config, save_config, to_dict, with_values

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    assert isinstance(load_config(path), Config)


def test_a_config_that_is_named_for_a_corpus_asks_for_it():
    named = [load_config(path).data.source for path in CONFIGS if path.stem.startswith("shakespeare")]
    assert named == ["input.txt", "input.txt"]


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("grpo:\n  group_size: 4\n  prompts: 8\n")
    config = load_config(file, ["grpo.group_size=16", "reward.smoothing=0.2", "reward.layers=[1,-1]"])
    assert (config.grpo.group_size, config.grpo.prompts, config.reward.smoothing) == (16, 8, 0.2)
    assert tuple(config.reward.layers) == (1, -1)


@pytest.mark.parametrize("text, value", [
    ("1.10", "1.10"), ("007", "007"), ("12:30", "12:30"), ("yes", "yes"), ("|", "|"), ("*.txt", "*.txt"), ("", ""),
    ("{a,b}.txt", "{a,b}.txt"), ("a=b", "a=b"), ('"\\n"', "\n"), ("'it''s'", "it's"), ("null", "null"),
])
def test_a_text_is_taken_as_it_stands_unless_it_is_quoted(text, value):
    config = load_config(None, [f"data.separator={text}", f"run.name={text}"])
    assert (config.data.separator, config.run.name) == (value, value)


@pytest.mark.parametrize("overrides, rewards", [
    ([], {"one.module:f": 1.0}),
    (['grpo.rewards={"mine:f": 0.5}'], {"mine:f": 0.5}),
    (["grpo.rewards.a.mine:f=0.5"], {"one.module:f": 1.0, "a.mine:f": 0.5}),
    (["grpo.rewards[a.mine:f]=0.5"], {"one.module:f": 1.0, "a.mine:f": 0.5}),
    (["grpo.rewards.one.module:f=2", "grpo.rewards.b:g=0"], {"one.module:f": 2.0, "b:g": 0.0}),
    (["grpo.rewards={}", "grpo.rewards.b:g=3"], {"b:g": 3.0}),
])
def test_what_is_given_for_a_mapping_replaces_it_and_a_key_below_adds_to_it(tmp_path, overrides, rewards):
    file = tmp_path / "a.yaml"
    file.write_text("grpo:\n  rewards:\n    one.module:f: 1.0\nsweep:\n  space:\n    grpo.kl: {grid: [0.1, 0.2]}\n")
    before = load_config(None, ["grpo.rewards={x:f: 1}", "sweep.space={grpo.ema: {grid: [0.5]}}"])
    for start in (None, before):
        config = load_config(file, overrides, start)
        assert config.grpo.rewards == rewards and config.sweep.space == {"grpo.kl": {"grid": [0.1, 0.2]}}
    more = load_config(file, ["sweep.space.critic.alpha={uniform: [0, 1]}"]).sweep.space
    assert more == {"grpo.kl": {"grid": [0.1, 0.2]}, "critic.alpha": {"uniform": [0, 1]}}
    assert before.grpo.rewards == {"x:f": 1.0}


@pytest.mark.parametrize(
    "override, words",
    [
        ("grpo.rewards.mine:f=much", ["grpo.rewards", "much"]),
        ("grpo.rewards=3", ["command line: grpo.rewards"]),
        ("grpo.grop_size=4", ["unknown key grpo.grop_size", "grpo.group_size"]),
        ("grppo.group_size=4", ["unknown key grppo", "grpo"]),
        ("grpo.group_size=many", ["grpo.group_size", "many"]),
        ("grpo.group_size=1", ["grpo.group_size must be at least 2", "got 1"]),
        ("group_size", ["section.key=value"]),
        ("denoise.remasking=magic", ["denoise.remasking", "critic", "magic"]),
        ("grpo.ema=0", ["grpo.entropy_floor must be 0 where grpo.ema is 0", "got 0.5"]),
        ("grpo.prompt_tokens=61", ["grpo.prompt_tokens must be at least 4 below data.block_size (64)"]),
        ("grpo.grad_clip=0", ["grpo.grad_clip must be positive"]),
        ("grpo.kl=.inf", ["grpo.kl must be finite, got inf"]),
        ("run.seed=-1", ["run.seed must be between 0 and"]),
        ("run.name=..", ["run.name must be a folder's name", "got '..'"]),
        ("run.output=s3://bucket/runs", ["run.output must be a folder's path, no URI", "got 's3://bucket/runs'"]),
        ("run.name=a/b", ["run.name must be a folder's name", "got 'a/b'"]),
        ("run.timeout_s=0", ["run.timeout_s must be positive"]),
        ("pretrain.warmup=-3", ["pretrain.warmup must be 0 or more"]),
        ("reward.replay_rounds=-1", ["reward.replay_rounds must be 0 or more"]),
        ("reward.hidden=0", ["reward.hidden must be at least 1"]),
        ("reward.learning_rate=-1", ["reward.learning_rate must be positive"]),
        ("reward.layers=[9]", ["reward.layers must be -1 or from 1 to model.n_layer (", "[9]"]),
        ("evaluation.samples=1", ["evaluation.samples must be at least 4"]),
        ("evaluation.judge_width=100", ["evaluation.judge_width must be a positive multiple of twice", "(4)"]),
        ("evaluation.judge_learning_rate=0", ["evaluation.judge_learning_rate must be positive"]),
        ("evaluation.steps=[a]", ["command line: evaluation.steps: an element could not be converted to Integer"]),
        ("evaluation.sampler=[maybe]", ["command line: evaluation.sampler: an element is not a valid bool"]),
        ("evaluation.steps={a: 1}", ["command line: evaluation.steps: Cannot merge"]),
    ],
)
def test_a_bad_override_is_one_line_with_the_full_key(override, words):
    with pytest.raises(ValueError) as error:
        load_config(None, [override])
    message = str(error.value)
    assert "\n" not in message and "$" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    "text, words",
    [
        ("grpo: [1,\n", "is not YAML"),
        ("grpo:\n  kl: 0.1\n  kl: 0.2\n", "is not YAML: .* found duplicate key kl"),
        ("- grpo\n", "must hold sections such as `model:` with keys in them, got a list"),
        ("text\n", "must hold sections .*, got text"),
        ("grpo:\n", "must hold sections .*, got grpo"),
        ("3\n", "must hold sections"),
        ("grpo: 3\n", "must hold sections .*, got grpo"),
        ("run:\n  name: ${\n", "is not YAML"),
        (None, "does not exist"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    if text:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"config file {path}.*{words}") as error:
        load_config(path)
    assert "\n" not in str(error.value)


def test_a_file_and_the_command_line_read_numbers_alike(tmp_path):
    file = tmp_path / "a.yaml"
    ranges = ["mask_bias.k_i: {loguniform: [1e-4, 1e-2]}", "pretrain.learning_rate: {choice: [1e-4, 3e-4]}"]
    file.write_text("sweep:\n  space:\n" + "".join(f"    {each}\n" for each in ranges))
    config = load_config(file)
    assert config == load_config(None, [f"sweep.space={{{', '.join(ranges)}}}"])
    assert config.sweep.ranges["pretrain.learning_rate"] == ("choice", [0.0001, 0.0003])


def test_saved_config_reads_back_equal(tmp_path):
    config = load_config(None, ["reward.layers=[1,2]", "run.name='1e-4'", "pretrain.learning_rate=1e-3"])
    assert config.run.name == "1e-4"
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config == from_dict(to_dict(config))


def test_a_value_below_a_mapping_is_set_by_its_dotted_key():
    config = load_config(None, ['grpo.rewards={"mine:f": 0.5}'])
    swept = with_values(config, {"grpo.rewards.a.mine:f": 2.0, "critic.alpha": 0.25}, "sweep.space")
    assert (swept.grpo.rewards, swept.critic.alpha) == ({"mine:f": 0.5, "a.mine:f": 2.0}, 0.25)
    with pytest.raises(ValueError, match="grpo.rewards must be keyed by module:function, got 'mine'"):
        with_values(config, {"grpo.rewards.mine": 1.0}, "sweep.space")


def test_hash_covers_the_named_sections_only():
    config = Config()
    other = dataclasses.replace(config, grpo=GrpoSection(rounds=3))
    assert config_hash(config.model, config.data) == config_hash(other.model, other.data)
    assert config_hash(config.grpo) != config_hash(other.grpo)
