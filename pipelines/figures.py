"""Figures of a run, from series by metric name; drawn without a display.

1. Small multiples share the axis of rounds or steps and never a second y axis: reward beside discriminator accuracy,
   KL beside entropy, the mask bias beside p(MASK), losses by task, seconds by phase as stacked areas. Dashed lines are
   what a controller aims at.
2. A metric that a run did not log leaves its line out; a panel without any line says so.
3. A denoising's order is the number in each token's cell; the colour is what the critic makes of the finished text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Series = tuple[Sequence[float], Sequence[float]]
"""Steps and values of one metric."""

PANELS = {
    "reward": "reward",
    "reward_accuracy": "discriminator accuracy, held out",
    "kl": "KL to the base, nats per action",
    "entropy": "entropy, nats per action",
    "mask_bias": "mask bias",
    "p_mask_unmask": "p(MASK) at masked positions",
}
"""Metric and title of each panel of a GRPO run, in reading order."""
PRETRAIN_PANELS = {
    "p_mask_unmask": "p(MASK) at masked positions",
    "mask_bias": "mask bias",
    "val_nelbo_nats": "bound on validation text, nats per token",
    "critic_auroc": "critic's AUROC on its own samples",
}
"""The same of pretraining."""
LOSSES = {
    "loss_unmask": "unmask",
    "loss_remask": "re-mask",
    "loss_keep": "keep",
    "loss_next": "next token",
    "loss_critic": "critic",
    "loss_sampler": "sampler",
}
"""Losses by task, on natural text; nats, before their weights."""
CELLS = 128
"""Tokens of a text that `denoising_figure` shows."""
SECONDS = "seconds/"
"""Prefix of the metrics that say how long each phase of a round took."""


def series(history: Sequence[Mapping[str, float]]) -> dict[str, Series]:
    """Series by metric name from one mapping per round, each with its `step`; a metric may be absent from some."""
    names = dict.fromkeys(name for row in history for name in row if name != "step")
    return {name: ([row["step"] for row in history if name in row], [row[name] for row in history if name in row])
            for name in names}


def grpo_figure(history: Mapping[str, Series], *, targets: Mapping[str, Sequence[float]] | None = None) -> Figure:
    """A GRPO run at a glance: small multiples over rounds, and seconds by phase.

    Args:
        history: steps and values by metric name; those not in `PANELS` and not `seconds/...` are ignored.
        targets: dashed levels by metric name, such as the accuracy's band and the target of p(MASK).
    """
    figure, grid, first = _panels(history, PANELS, targets or {}, rows=5)
    _losses(figure.add_subplot(grid[3, :], sharex=first), history)
    phases = figure.add_subplot(grid[4, :], sharex=first)
    _phases(phases, history)
    phases.set_xlabel("round")
    return figure


def pretrain_figure(history: Mapping[str, Series], *, target: float) -> Figure:
    """A pretraining at a glance: p(MASK) against its target beside the bias, the bound, the critic, losses by task.

    Args:
        history: steps and values by metric name; others than those shown are ignored.
        target: of p(MASK).
    """
    figure, grid, first = _panels(history, PRETRAIN_PANELS, {"p_mask_unmask": (target,)}, rows=3)
    losses = figure.add_subplot(grid[2, :], sharex=first)
    _losses(losses, history)
    losses.set_xlabel("step")
    return figure


def nfe_figure(rows: Sequence[Mapping[str, Any]], natural: Mapping[str, float]) -> Figure:
    """Quality against cost: judge NLL at natural text's token entropy over forwards per text, by model and kind.

    The entropy is met by interpolating between temperatures; settings whose temperatures do not enclose it are left
    out.

    Args:
        rows: as for `frontier_figure`, with `nfe`.
        natural: `judge_nll` and `entropy` of natural text.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.add_subplot()
    lines: dict[str, list[tuple[float, float]]] = {}
    for (model, nfe, *kind), line in _lines(rows, "nfe").items():
        pairs = sorted((row["entropy"], row["judge_nll"]) for row in line)
        if pairs[0][0] <= natural["entropy"] <= pairs[-1][0]:
            quality = float(np.interp(natural["entropy"], *zip(*pairs, strict=True)))
            lines.setdefault(", ".join([model, *kind]), []).append((nfe, quality))
    for label, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=label)
    axis.axhline(natural["judge_nll"], color="0.4", linestyle="--", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("trunk forwards per text")
    axis.set_ylabel("judge NLL at natural text's entropy, nats per token")
    axis.grid(alpha=0.25)
    if lines:
        axis.legend(fontsize=8, frameon=False)
    return figure


def denoising_figure(texts: Sequence[Mapping[str, Any]], *, steps: int) -> Figure:
    """Texts in reading order, a cell per token with the step that last filled it below, coloured by P(wrong).

    Args:
        texts: `pieces`, `steps` and `p_wrong` of each, as `measure` returns them; without `p_wrong` the step is the
            colour. Prompts (step 0) stay white. Of long texts the first `CELLS` tokens are shown.
        steps: S.
    """
    texts = [{name: values and values[:CELLS] for name, values in text.items()} for text in texts]
    pieces = [[piece.strip("\n\t ") or piece[:1] for piece in text["pieces"]] for text in texts]
    columns = 32 if max(len(piece) for row in pieces for piece in row) <= 2 else 12
    lines = [-(-len(row) // columns) for row in pieces]
    judged = texts[0]["p_wrong"] is not None
    figure = Figure(figsize=(10, 0.45 * sum(lines) + 0.4 * len(texts)), layout="constrained")
    axes = figure.subplots(len(texts), squeeze=False, height_ratios=lines)[:, 0]
    for text, row, axis, num_lines in zip(texts, pieces, axes, lines, strict=True):
        values = np.full(num_lines * columns, np.nan)
        values[: len(row)] = text["p_wrong"] if judged else text["steps"]
        values[: len(row)][np.array(text["steps"]) == 0] = np.nan
        grid = axis.pcolormesh(
            values.reshape(num_lines, columns), edgecolors="0.9", linewidth=0.5, vmin=0,
            vmax=1 if judged else steps, cmap="Oranges" if judged else "Blues",
        )
        for index, (piece, step) in enumerate(zip(row, text["steps"], strict=True)):
            x, y = index % columns + 0.5, index // columns
            shade = values[index] / grid.get_clim()[1]
            style = {"ha": "center", "va": "center", "color": "w" if shade > 0.6 else "k", "parse_math": False,
                     "in_layout": False}  # whose many boxes take most of the time
            axis.text(x, y + 0.38, piece, fontsize=min(11, 1000 / columns / max(1, len(piece))), **style)
            if step:
                axis.text(x, y + 0.8, str(step), fontsize=6, **style)
        axis.invert_yaxis()
        axis.set_axis_off()
    title = f"tokens and the step of {steps} that last filled them; prompts are white"
    axes[0].set_title(title, fontsize=10, loc="left")
    label = "critic's P(wrong)" if judged else "step"
    figure.colorbar(grid, ax=list(axes), label=label, fraction=0.03, pad=0.01)
    return figure


def frontier_figure(rows: Sequence[Mapping[str, Any]], natural: Mapping[str, float]) -> Figure:
    """Quality against diversity: judge NLL over token entropy, a line per model and kind of sampling, by temperature.

    Args:
        rows: `model`, `steps`, `remasking`, `sampler`, `top_p`, `temperature`, `judge_nll`, `entropy` of each setting.
        natural: `judge_nll` and `entropy` of natural text.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.add_subplot()
    models = list(dict.fromkeys(row["model"] for row in rows))
    steps = sorted({row["steps"] for row in rows})
    for (model, number, *extras), line in _lines(rows, "steps").items():
        line = sorted(line, key=lambda row: row["temperature"])
        axis.plot(
            [row["entropy"] for row in line], [row["judge_nll"] for row in line], marker="o", markersize=4,
            linestyle=("-", "--", ":", "-.")[models.index(model) % 4], color=f"C{steps.index(number) % 10}",
            label=", ".join([model, f"{number} steps", *extras]),
        )
    axis.plot([natural["entropy"]], [natural["judge_nll"]], marker="*", markersize=14, color="k", linestyle="none",
              label="natural text")
    axis.set_xlabel("token entropy, nats (diversity)")
    axis.set_ylabel("judge NLL, nats per token (lower is better)")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _lines(rows: Sequence[Mapping[str, Any]], cost: str) -> dict[tuple, list[Mapping[str, Any]]]:
    """Rows by model, cost and kind of sampling, of which what never varies is not named."""
    kinds = [name for name in ("remasking", "sampler", "top_p") if len({row[name] for row in rows}) > 1]
    lines: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["model"], row[cost], *(f"{name} {row[name]}" for name in kinds)), []).append(row)
    return lines


def _panels(
    history: Mapping[str, Series], panels: Mapping[str, str], targets: Mapping[str, Sequence[float]], *, rows: int
) -> tuple[Figure, Any, Any]:
    """Two panels to a row, on a grid of `rows`; returns figure, grid and the axis whose x all share."""
    figure = Figure(figsize=(10, 2.25 * rows), layout="constrained")
    grid, first = figure.add_gridspec(rows, 2), None
    for index, (name, title) in enumerate(panels.items()):
        axis = figure.add_subplot(grid[index // 2, index % 2], sharex=first)
        first = first or axis
        logged = name in history and len(history[name][0]) > 0
        if logged:
            axis.plot(*history[name], linewidth=1.5, marker="." if len(history[name][0]) < 3 else None)
        for level in targets.get(name, ()):
            axis.axhline(level, color="0.4", linestyle="--", linewidth=1)
        _finish(axis, title, logged)
        axis.tick_params(labelbottom=False)
    return figure, grid, first


def _losses(axis: Any, history: Mapping[str, Series]) -> None:
    logged = [name for name in LOSSES if name in history]
    for name in logged:
        axis.plot(*history[name], linewidth=1.5, label=LOSSES[name])
    if logged:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _finish(axis, "losses by task, nats", bool(logged))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _phases(axis: Any, history: Mapping[str, Series]) -> None:
    """Stacked seconds by phase; a phase that a round did without took no time."""
    timed = {name.removeprefix(SECONDS): dict(zip(*values, strict=True))
             for name, values in history.items() if name.startswith(SECONDS)}
    steps = sorted(set().union(*timed.values()))
    if steps:
        seconds = [[taken.get(step, 0.0) for step in steps] for taken in timed.values()]
        axis.stackplot(steps, seconds, labels=list(timed))
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _finish(axis, "seconds by phase", bool(steps))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _finish(axis: Any, title: str, logged: bool) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if not logged:
        axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", va="center", color="0.5")
