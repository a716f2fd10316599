"""Figures of a run, from series by metric name; drawn without a display.

1. Small multiples share the round axis and never a second y axis: reward beside discriminator accuracy, KL beside
   entropy, the mask bias above p(MASK) and its target, and seconds by phase as stacked areas.
2. A metric that a run did not log leaves its line out; a panel without any line says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Series = tuple[Sequence[float], Sequence[float]]
"""Steps and values of one metric."""

LINES: dict[str, dict[str, str]] = {
    "reward": {"reward/mean": "mean reward"},
    "discriminator accuracy (held out)": {"reward/accuracy": "accuracy", "reward/band_low": "band",
                                          "reward/band_high": "band, upper"},
    "KL to the base, nats per action": {"kl": "KL"},
    "entropy, nats": {"entropy": "entropy"},
    "mask bias": {"mask_bias/bias": "bias"},
    "p(MASK)": {"mask_bias/signal": "p(MASK), average", "mask_bias/target": "target"},
}
"""Panels in reading order: title, then metric name and legend."""
BOUNDS = {"reward/band_low", "reward/band_high", "mask_bias/target"}
SECONDS = "seconds/"
"""Prefix of the metrics that say how long each phase of a round took."""


def grpo_figure(history: Mapping[str, Series], lines: Mapping[str, Mapping[str, str]] = LINES) -> Figure:
    """A GRPO run at a glance: small multiples over rounds, and seconds by phase.

    Args:
        history: steps and values by metric name; extra ones are ignored.
        lines: panels, as in `LINES`.
    """
    panels = len(lines) + 1
    rows = (panels + 1) // 2
    figure = Figure(figsize=(10, 2.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False).flatten()
    for axis, (title, names) in zip(axes, lines.items(), strict=False):
        drawn = [name for name in names if len(history.get(name, ((), ()))[0])]
        for name in drawn:
            bound = {"color": "0.5", "linestyle": "--"} if name in BOUNDS else {"linewidth": 1.5}
            axis.plot(*history[name], label=names[name], **bound)
        _finish(axis, title, len(drawn))
    _phases(axes[panels - 1], history)
    for axis in axes[panels:]:
        axis.set_visible(False)
    for axis in axes[max(0, panels - 2): panels]:
        axis.set_xlabel("round")
        axis.tick_params(labelbottom=True)
    return figure


def _phases(axis: Any, history: Mapping[str, Series]) -> None:
    """Stacked seconds by phase, at the steps at which every phase was timed."""
    timed = {name.removeprefix(SECONDS): dict(zip(*series, strict=True))
             for name, series in history.items() if name.startswith(SECONDS)}
    steps = sorted(set.intersection(*map(set, timed.values()))) if timed else []
    if steps:
        axis.stackplot(steps, [[values[step] for step in steps] for values in timed.values()], labels=list(timed))
    _finish(axis, "seconds by phase", len(timed) if steps else 0)


def _finish(axis: Any, title: str, num_lines: int) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if num_lines == 0:
        axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", va="center", color="0.5")
    if num_lines > 1:
        axis.legend(fontsize=8, frameon=False)
