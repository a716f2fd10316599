import pytest

from pipelines.metric_names import MetricNames, flatten, metric_name, params


@pytest.mark.parametrize("name", ["loss", "reward/p natural", "a-b.c_d/e"])
def test_good_names_stay(name):
    assert metric_name(name) == name


@pytest.mark.parametrize("name, clean", [("tokens@s", "tokens_s"), ("/a//b/", "a/b"), ("../x", "x"),
                                         ("k\u00fcrze", "k_rze"), ("a" * 300, "a" * 250),
                                         ("reward/my_module:score", "reward/my_module_score")])
def test_bad_names_become_names_that_mlflow_takes(name, clean):
    from mlflow.utils.validation import _validate_metric_name

    assert metric_name(name) == clean
    _validate_metric_name(clean)


@pytest.mark.parametrize("first, second", [("loss", "loss/policy"), ("loss/policy", "loss"), ("a/b", "a/b/c/d")])
def test_a_name_that_is_anothers_folder_is_refused(first, second):
    names = MetricNames()
    names(first)
    assert names(first) == first
    with pytest.raises(ValueError, match=r"is also the folder of .*rename one"):
        names(second)


def test_two_names_that_become_one_are_refused():
    names = MetricNames()
    names("a:b")
    with pytest.raises(ValueError, match="both 'a_b'"):
        names("a_b")
    with pytest.raises(ValueError, match="rename"):
        names("//")


def test_a_param_is_named_as_every_server_takes_it():
    assert params({"grpo": {"rewards": {"my_module:score": 1.0}}}) == {"grpo.rewards.my_module_score": "1.0"}


def test_config_is_flattened_and_long_values_are_cut():
    config = {"a": {"b": 1, "c": {"d": [1, 2]}}, "e": "x" * 9000}
    assert flatten(config) == {"a.b": 1, "a.c.d": [1, 2], "e": "x" * 9000} == flatten(flatten(config))
    assert params(config) == {"a.b": "1", "a.c.d": "[1, 2]", "e": "x" * 497 + "..."}
