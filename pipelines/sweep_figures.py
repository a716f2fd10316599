"""Figures of a sweep: all trials at a glance, what answers to which key, and how p(MASK) came to its target.

1. A key with a `loguniform` range has a logarithmic axis; one with listed values has them at equal distances.
2. Beside each response stands Spearman's rank correlation, which asks for no shape but a direction. With 16 trials,
   0.5 is reached by chance once in twenty times.
3. Trials that failed have no figures and are left out; those that were stopped are drawn pale, with their last ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from scipy.stats import spearmanr

Ranges = Mapping[str, tuple[str, Sequence[Any]]]
"""Kind and values of each swept key's range (`SweepSection.ranges`)."""
Trials = Sequence[Mapping[str, Any]]
"""Records of trials: `values`, `status`, `reports`."""
COLORS = colormaps["viridis"]


def parallel_coordinates(trials: Trials, ranges: Ranges, objective: str, mode: str = "min") -> Figure:
    """A line per trial through its values to its objective, which colours it; the best one is thick."""
    measured = [trial for trial in trials if trial["reports"]]
    figure, axis = _figure(1.6 * len(ranges) + 4, 5)
    names = [*ranges, objective]
    results = np.array([trial["reports"][-1][objective] for trial in measured])
    norm = _norm(results)
    if len(results):
        best = results.argmin() if mode == "min" else results.argmax()
        for index, trial in enumerate(measured):
            heights = [_place(trial["values"][key], *ranges[key]) for key in ranges] + [norm(results[index])]
            axis.plot(range(len(names)), heights, color=COLORS(norm(results[index])),
                      linewidth=3 if index == best else 1.2, alpha=1 if trial["status"] == "finished" else 0.3)
    for place, key in enumerate(ranges):
        axis.axvline(place, color="0.3", linewidth=1)
        for value in ranges[key][1]:
            axis.text(place + 0.03, _place(value, *ranges[key]), f"{value:g}" if _number(value) else str(value),
                      fontsize=8, va="center")
    axis.axvline(len(ranges), color="0.3", linewidth=1)
    axis.set_xticks(range(len(names)), names, fontsize=9)
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    if len(results):
        figure.colorbar(ScalarMappable(norm, COLORS), ax=axis, label=objective)
    return figure


def responses(trials: Trials, ranges: Ranges, figures: Sequence[str]) -> Figure:
    """A row per figure, a column per swept key: what a figure answers when a key changes, other keys at random."""
    measured = [trial for trial in trials if trial["reports"]]
    shown = [name for name in figures if any(name in trial["reports"][-1] for trial in measured)]
    figure = Figure(figsize=(3 * len(ranges) + 1, 2.4 * max(len(shown), 1) + 0.5), layout="constrained")
    grid = figure.subplots(max(len(shown), 1), len(ranges), squeeze=False, sharey="row")
    for row, name in enumerate(shown):
        rows = [trial for trial in measured if name in trial["reports"][-1]]
        for column, (key, (kind, values)) in enumerate(ranges.items()):
            axis, finished = grid[row][column], np.array([trial["status"] == "finished" for trial in rows])
            listed = kind in ("choice", "grid")
            across = np.array([values.index(t["values"][key]) if listed else t["values"][key] for t in rows], float)
            up = np.array([trial["reports"][-1][name] for trial in rows])
            axis.scatter(across, up, s=22, color=np.where(finished, "C0", "0.75"))
            if kind == "loguniform":
                axis.set_xscale("log")
            if listed:
                axis.set_xticks(range(len(values)), [str(value) for value in values])
            if np.ptp(across) and np.ptp(up):
                axis.set_title(f"rank correlation {spearmanr(across, up).statistic:+.2f}", fontsize=8, loc="right")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if row == len(shown) - 1:
                axis.set_xlabel(key)
        grid[row][0].set_ylabel(name, fontsize=9)
    return figure


def approaches(curves: Sequence[tuple[Sequence[float], Sequence[float], float]], *, key: str, target: float,
               log: bool) -> Figure:
    """p(MASK) at masked positions over the steps of pretraining, a line per trial, coloured by one key.

    Args:
        curves: steps, p(MASK), and the key's value of each trial.
        log: colour by the logarithm of the value.
    """
    figure, axis = _figure(9, 5)
    norm = (LogNorm if log else Normalize)(*_ends([value for *_, value in curves]))
    for steps, signal, value in curves:
        axis.plot(steps, signal, color=COLORS(norm(value)), linewidth=1.2)
    axis.axhline(target, color="0.4", linestyle="--", linewidth=1)
    axis.set_xlabel("step of pretraining")
    axis.set_ylabel("p(MASK) at masked positions")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.colorbar(ScalarMappable(norm, COLORS), ax=axis, label=key)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _place(value: Any, kind: str, values: Sequence[Any]) -> float:
    """Height in [0, 1] of a value on its key's axis."""
    if kind in ("choice", "grid"):
        return values.index(value) / max(len(values) - 1, 1)
    low, high, value = np.log([*values, value]) if kind == "loguniform" else (*values, value)
    return float((value - low) / (high - low))


def _norm(values: Sequence[float]) -> Normalize:
    return Normalize(*_ends(values))


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if len(values) else (0.0, 1.0)
    return (low, high) if high > low else (low, low + abs(low) * 1e-6 + 1e-12)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
