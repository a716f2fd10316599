"""Means over seeds, their intervals, and tables of them."""

from __future__ import annotations

import math
import statistics


def spread(values: list[float]) -> float | None:
    """Half width of the 95 % interval of the mean over seeds (Student's t); None for one seed, NaN beside a NaN."""
    if len(values) < 2:
        return None
    if not all(map(math.isfinite, values)):
        return math.nan
    from scipy import stats  # one seed, on a bare GPU machine, does without

    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def summarise(runs: list[dict[str, float]]) -> dict[str, float | None]:
    """Mean of each figure over seeds, and `<name>_ci95` where there are several."""
    means = {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}
    if len(runs) < 2:
        return means
    return means | {f"{name}_ci95": spread([run[name] for run in runs]) for name in runs[0]}


def print_table(title: str, rows: dict[str, list[dict[str, float]]]) -> None:
    """One line per row name: each figure's mean over seeds, and its interval where there are several."""
    columns = list(next(iter(rows.values()))[0])
    width = max(map(len, [title, *rows])) + 2
    print("\n" + title.ljust(width) + "".join(name.rjust(max(18, len(name) + 2)) for name in columns))
    for name, runs in rows.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs]
            half = spread(values)
            cells.append(f"{statistics.fmean(values):.4g}" + ("" if half is None else f" +-{half:.2g}"))
        print(name.ljust(width) + "".join(c.rjust(max(18, len(n) + 2)) for n, c in zip(columns, cells, strict=True)),
              flush=True)
