"""Rewards that a user writes: functions from texts to numbers, named `module:function` in `grpo.rewards`.

1. A function is given decoded completions, without their prompts, and returns one finite number per text. It is called
   with the texts of one actor at a time (whole groups), so a number must depend on its own text alone.
2. Names travel, functions do not: each process looks its modules up like any other, and in the current folder.
3. `grpo/example_rewards.py` holds some to start from.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

RewardFunction = Callable[[list[str]], Sequence[float]]


class RewardFunctionError(ValueError):
    """A reward function failed on some texts; it would fail again."""


def resolve_rewards(names: Iterable[str]) -> dict[str, RewardFunction]:
    """Import functions by `module:function`.

    Raises:
        ValueError: one line naming key, value and remedy.
    """
    names = list(names)
    logged = Counter(f"{reward_figure(name)}{of}" for name in names for of in ("", "_std"))
    for figure in [figure for figure, times in logged.items() if times > 1]:
        raise ValueError(f"grpo.rewards: {figure} would be logged of two functions: rename one")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nobody's random.py takes the standard library's place
    return {name: _resolve(name) for name in names}


def _resolve(name: str) -> RewardFunction:
    module_name, _, function_name = name.partition(":")
    wrong = f"grpo.rewards must name functions as module:function, got {name!r}: "
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        where = "" if error.name and not module_name.startswith(error.name) else " in the current folder or PYTHONPATH"
        raise ValueError(f"{wrong}no module {error.name}{where}") from None
    except (Exception, SystemExit) as error:  # SystemExit: a script that parses its command line, say
        raise ValueError(f"{wrong}importing {module_name} raised {type(error).__name__}: {_line(error)}") from None
    function = getattr(module, function_name, None)
    if callable(function):
        return function
    near = difflib.get_close_matches(function_name, [key for key in dir(module) if callable(getattr(module, key))], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{wrong}{module_name} has no function {function_name}{hint}")


def score_texts(functions: dict[str, RewardFunction], texts: Sequence[str]) -> dict[str, Tensor]:
    """What each function says of the texts.

    Returns:
        [B] float32 by name.

    Raises:
        RewardFunctionError: a function raised, or did not return one finite number per text; names it.
    """
    return {name: _score(name, function, texts) for name, function in functions.items()}


def reward_figure(name: str) -> str:
    """Under which name the mean of a reward is logged."""
    return f"rewards/{name.replace(':', '.')}"


def _score(name: str, function: RewardFunction, texts: Sequence[str]) -> Tensor:
    try:
        values = function(list(texts))
        if isinstance(values, Iterator):
            values = list(values)  # a generator computes here
    except Exception as error:
        raised = f"{type(error).__name__}: {_line(error)}"
        raise RewardFunctionError(f"reward function {name} raised {raised} ({_where(function, error)})") from error
    try:
        scores = torch.tensor([float(value) for value in values], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        kind = type(values).__name__
        raise RewardFunctionError(f"reward function {name} must return a list of floats, got {kind}") from None
    if len(scores) != len(texts):
        raise RewardFunctionError(
            f"reward function {name} must return one number per text ({len(texts)}), got {len(scores)}"
        )
    if not bool(scores.isfinite().all()):
        index = int((~scores.isfinite()).nonzero()[0])
        raise RewardFunctionError(
            f"reward function {name} must return finite numbers, got {values[index]} for {texts[index]!r}"
        )
    return scores


def _where(function: RewardFunction, error: Exception) -> str:
    """File and line of the last call in the function's own file, or of what it called where it has none."""
    calls = traceback.extract_tb(error.__traceback__)
    own = getattr(sys.modules.get(getattr(function, "__module__", "")), "__file__", None)
    last = next((call for call in reversed(calls) if call.filename == own), calls[-1])
    return f"{last.filename}:{last.lineno}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
