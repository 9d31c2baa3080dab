"""Picture of the speed benchmark: time beside that of the networks alone, one row a model, one dot a size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speed_models import BOUND

Row = dict[str, Any]
_MARKERS = "osD^v"


def save_picture(rows: list[Row], path: Path) -> None:
    """A panel for each action; the axis is logarithmic, 1 is the bound."""
    from matplotlib.figure import Figure

    actions = list(dict.fromkeys(row["action"] for row in rows))
    figure = Figure(figsize=(3.1 * len(actions), 3.6), layout="constrained")
    panels = figure.subplots(1, len(actions), sharey=True, squeeze=False)[0]
    for axes, action in zip(panels, actions, strict=True):
        _panel(axes, [row for row in rows if row["action"] == action], action)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle("time, as a multiple of running the conditioner networks alone", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _panel(axes: Any, rows: list[Row], title: str) -> None:
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    names = [name for name in dict.fromkeys(row["model"] for row in rows) if name != BOUND][::-1]
    for index, size in enumerate(dict.fromkeys(row["size"] for row in rows)):
        ratios = {row["model"]: row["ratio"] for row in rows if row["size"] == size}
        heights = [names.index(name) + 0.12 * (2 - index) for name in names]
        axes.plot([ratios[name] for name in names], heights, _MARKERS[index % 5], markersize=5, label=size)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks([1, 1.5, 2, 3, 4, 6])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", alpha=0.3)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(title, fontsize=10)
