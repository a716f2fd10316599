import math
import pickle
import sys

import pytest
import torch

from grpo.example_rewards import balanced_brackets, vowel_share
from grpo.reward_functions import RewardFunctionError, resolve_rewards, score_texts

TEXTS = ["aXe", "", "xyz)"]


def test_functions_are_found_in_packages_and_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def length(texts):\n    return [len(text) for text in texts]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    functions = resolve_rewards(["my_rewards:length", "grpo.example_rewards:vowel_share"])
    scores = score_texts(functions, TEXTS)
    assert list(scores) == ["my_rewards:length", "grpo.example_rewards:vowel_share"]
    assert scores["my_rewards:length"].tolist() == [3, 0, 4]
    torch.testing.assert_close(scores["grpo.example_rewards:vowel_share"], torch.tensor([2 / 3, 0, 0]))


def test_two_functions_never_share_a_figure():
    with pytest.raises(ValueError, match="grpo.rewards: rewards/one.f_std would be logged of two functions"):
        resolve_rewards(["one:f", "one:f_std"])


@pytest.mark.parametrize("name, message", [
    ("nowhere:score", "got 'nowhere:score': no module nowhere in the current folder or PYTHONPATH"),
    ("grpo.nowhere:score", "no module grpo.nowhere in the current folder or PYTHONPATH"),
    ("grpo.example_rewards:vowels_share", "has no function vowels_share; did you mean vowel_share?"),
    ("grpo.example_rewards:BRACKETS", "grpo.example_rewards has no function BRACKETS"),
    ("broken_rewards:score", "importing broken_rewards raised ZeroDivisionError: division by zero"),
    ("script_rewards:score", "importing script_rewards raised SystemExit: 2"),
    ("needing_rewards:score", "got 'needing_rewards:score': no module absent_package"),
])
def test_a_wrong_name_is_one_line_with_key_value_and_remedy(tmp_path, monkeypatch, name, message):
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    (tmp_path / "script_rewards.py").write_text("raise SystemExit(2)")
    (tmp_path / "needing_rewards.py").write_text("import absent_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as error:
        resolve_rewards([name])
    assert str(error.value).startswith("grpo.rewards must name functions as module:function, got ")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("function, message", [
    (lambda texts: [1.0], "m:f must return one number per text (3), got 1"),
    (lambda texts: [0.0, math.nan, 1.0], "m:f must return finite numbers, got nan for ''"),
    (lambda texts: [0.0, 1.0, 1e300], "m:f must return finite numbers, got 1e+300 for 'xyz)'"),
    (lambda texts: None, "m:f must return a list of floats, got NoneType"),
    (lambda texts: ["high"] * 3, "m:f must return a list of floats, got list"),
    (lambda texts: texts.clear(), "m:f must return a list of floats, got NoneType"),
    (lambda texts: [10**400] * 3, "m:f must return a list of floats, got list"),
])
def test_a_function_that_fails_is_named_and_the_error_travels(function, message):
    texts = list(TEXTS)
    with pytest.raises(RewardFunctionError) as error:
        score_texts({"m:f": function}, texts)
    assert str(error.value) == f"reward function {message}" and texts == TEXTS
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@pytest.mark.parametrize("how", ["return", "yield"])
def test_a_function_that_raises_is_named_with_its_own_line(how, tmp_path, monkeypatch):
    (tmp_path / f"{how}ing.py").write_text(f"import json\ndef score(texts):\n    {how} json.loads('x')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardFunctionError) as error:
        score_texts(resolve_rewards([f"{how}ing:score"]), TEXTS)
    assert str(error.value) == (
        f"reward function {how}ing:score raised JSONDecodeError: Expecting value: line 1 column 1 (char 0) "
        f"({tmp_path / f'{how}ing.py'}:3)"
    )


def test_the_examples_say_what_they_promise():
    assert vowel_share(["aeiou", "AEIOU", "ax", ""]) == [1, 0, 0.5, 0]
    assert balanced_brackets(["f(a[0]) {}", "", "no"]) == [1, 1, 1]
    assert balanced_brackets(["(]", "((", ")(", "([)]"]) == [0, 0, 0, 0.5]
    assert balanced_brackets(["ab(d"]) == [0.75]
