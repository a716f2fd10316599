"""The section of a sweep: which keys, over which ranges, searched how, judged by what.

Fields and checks are written as in `grpo/config_model.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from grpo.config_model import check, one_of

RANGES = ("uniform", "loguniform", "choice", "grid")
DEFAULT_SPACE: dict[str, Any] = {
    "critic.alpha": {"uniform": [0.0, 1.0]},
    "mask_bias.k_i": {"loguniform": [0.003, 0.3]},
    "mask_bias.k_p": {"uniform": [0.0, 8.0]},
    "mask_bias.ema": {"choice": [0.9, 0.95, 0.98, 0.99]},
    "mask_bias.target": {"uniform": [0.2, 0.8]},
}
"""What is swept where a config names no keys: the critic's weight and the bias controller."""


@dataclass(frozen=True, kw_only=True)
class SweepSection:
    """What is swept, how it is searched, and which figure decides."""

    space: dict[str, Any] = field(default_factory=dict)
    """Swept keys, each with its range: `{uniform: [low, high]}`, `{loguniform: [low, high]}`, `{choice: [a, b]}`, or
    `{grid: [a, b]}`, whose values are all tried, crossed with other grids. An override replaces those of the file;
    `sweep.space.KEY={...}` adds one. Empty: `DEFAULT_SPACE`."""
    search: str = "random"
    """`random`, or `tpe` (Optuna's tree-structured Parzen estimator)."""
    trials: int = 16
    """Trials; with a grid, for each of its points; with nothing but grids, each point is tried once."""
    objective: str = "judge_nll_matched"
    """A figure of every measurement (`pipelines.trial.MEASURED`, and `PRETRAINED` where each trial pretrains a base),
    which chooses the best trial. The default: negative log-likelihood under the independent judge at the token entropy
    of natural text, nats per token."""
    mode: str = "min"
    """`min` or `max`."""
    stretches: int = 2
    """Equal parts of the adversarial rounds; a trial is measured before the first and after each."""
    asha: bool = True
    """Stop the worse half of the trials after each measurement (ASHA, arXiv:1810.05934)."""

    def __post_init__(self) -> None:
        one_of("sweep.search", self.search, ("random", "tpe"))
        one_of("sweep.mode", self.mode, ("min", "max"))
        for name in ("trials", "stretches"):
            check(getattr(self, name) >= 1, f"sweep.{name}", "at least 1", getattr(self, name))
        for key, given in self.space.items():
            _check_range(f"sweep.space.{key}", given)
        grids = [key for key, given in self.space.items() if "grid" in given]
        possible = self.search == "random" or not grids
        check(possible, "sweep.search", f"random where a key has a grid ({grids})", self.search)

    @property
    def ranges(self) -> dict[str, tuple[str, list[Any]]]:
        """Kind and values of each swept key's range."""
        return {key: next(iter(given.items())) for key, given in (self.space or DEFAULT_SPACE).items()}


def _check_range(key: str, given: Any) -> None:
    wanted = "one range such as {uniform: [0, 1]}, of " + ", ".join(RANGES)
    check(isinstance(given, dict) and len(given) == 1 and next(iter(given)) in RANGES, key, wanted, given)
    kind, values = next(iter(given.items()))
    check(isinstance(values, list) and len(values) >= 1, f"{key}.{kind}", "a list of values", values)
    if kind in ("uniform", "loguniform"):
        numbers = len(values) == 2 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        check(numbers and values[0] < values[1], f"{key}.{kind}", "[low, high] with low below high", values)
        check(kind == "uniform" or values[0] > 0, f"{key}.{kind}", "[low, high] above 0", values)
