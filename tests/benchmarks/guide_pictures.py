"""Pictures of the guide benchmark: error and ELBO of each method on each target, one dot a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from guide_bars import MOST_ERROR_WEIGHTED, Field, grouped
from methods import ALL_METHODS, OURS, SAMPLERS

Row = dict[str, Any]

_FLOOR, _CEILING = 1e-3, 100.0  # errors and ELBO gaps beyond are drawn at the edge
_COLUMNS = 4


def save_pictures(rows: list[Row], folder: Path) -> list[Path]:
    """Save two pictures for each budget and kind of figure; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    guides = [row for row in rows if row["method"] in ALL_METHODS and row["method"] not in SAMPLERS]
    best = {name: Field(grouped(guides), {}).best_elbo(name) for name in {row["target"] for row in guides}}
    kinds = {
        "errors": ("largest error after PSIS (posterior sds)", _error, MOST_ERROR_WEIGHTED),
        "elbo": ("nats below the best ELBO", lambda row: best[row["target"]] - row["elbo"], 0.03),
    }
    files = []
    for seconds in sorted({row["seconds"] for row in guides}):
        chosen = [row for row in guides if row["seconds"] == seconds]
        for name, (label, figure, bar) in kinds.items():
            path = folder / f"guides_{name}_{seconds:g}s.png"
            _picture(chosen, figure, bar, f"{label}, {seconds:g} s; crosses: failed", path)
            files.append(path)
    return files


def _error(row: Row) -> float:
    return max(row["mean_psis"], row["sd_psis"]) if "mean_psis" in row else math.nan


def _picture(rows: list[Row], figure_of: Any, bar: float, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(row["target"] for row in rows))
    methods = [name for name in reversed(ALL_METHODS) if any(row["method"] == name for row in rows)]
    num_rows = math.ceil(len(targets) / _COLUMNS)
    size = (4 * min(_COLUMNS, len(targets)) + 2, num_rows * (0.22 * len(methods) + 0.9) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(num_rows, min(_COLUMNS, len(targets)), sharex=True, sharey=True, squeeze=False)
    for axes, target in zip(grid.flat, targets, strict=False):
        _panel(axes, [row for row in rows if row["target"] == target], methods, figure_of, bar)
        axes.set_title(target.partition("-")[0], fontsize=9)
    for axes in grid.flat[len(targets) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(len(targets) - grid.shape[1], 0) :]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _panel(axes: Any, rows: list[Row], methods: list[str], figure_of: Any, bar: float) -> None:
    for row in rows:
        height = methods.index(row["method"])
        color = "tab:red" if row["method"] in OURS else "tab:blue"
        value = figure_of(row) if row["status"] == "ok" else math.inf
        mark = "o" if row["status"] == "ok" else "x"
        if not math.isnan(value):
            axes.plot(min(max(value, _FLOOR), _CEILING), height, mark, color=color, markersize=4, alpha=0.7)
    axes.axvline(bar, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlim=(_FLOOR / 2, 2 * _CEILING), ylim=(-0.7, len(methods) - 0.3))
    axes.set_yticks(range(len(methods)), methods, fontsize=7)
    axes.grid(axis="y", linewidth=0.3)
