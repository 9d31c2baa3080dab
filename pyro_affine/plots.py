"""Pictures of posterior draws and of their importance weights."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_affine.psis_result import PSISResult
from pyro_affine.weighted import entry_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_pairs", "plot_weights"]

_BLUE, _ORANGE, _GRAY = "#0072B2", "#D55E00", "#999999"  # Okabe and Ito: told apart by colour-blind eyes
_MAX_DOTS = 1000  # more make a blot
_MASSES = (0.9, 0.5)  # share of the draws inside each contour
_GRID = 60  # cells of the density along each axis
_LEAST_WEIGHT = 1e-4  # of the mean weight; smaller ones change no estimate
_SHOWN = (0.01, 0.99)  # quantiles at which an axis ends, so that one far draw does not flatten the rest


def plot_pairs(
    draws: Any,
    reference: Any = None,
    *,
    sites: Sequence[str] | None = None,
    max_entries: int = 6,
    labels: tuple[str, str] = ("draws", "reference"),
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Pair plot of posterior draws, over those of a reference where there is one.

    Below the diagonal: dots and the contours that hold 50 % and 90 % of the draws of each pair of entries. On the
    diagonal: the density of each entry.

    Args:
        draws: tensors or arrays by site, each of shape (draws, *shape of the site), such as ``PSISResult.draws``
            or what ``resample()`` gives; or an ArviZ container with a posterior.
        reference: the same of other draws, such as a long run of NUTS.
        sites: names of the sites to show, in this order; default: all of ``draws``, in their order.
        max_entries: show no more entries than this, the first ones.
        labels: names of the two in the legend.
        path: file to save the picture to, such as "pairs.png"; None to save nothing.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: if a site is missing or its shape differs in the reference, or nothing is left to show.

    >>> figure = plot_pairs({"mu": torch.randn(500), "theta": torch.randn(500, 2)})
    >>> [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]
    ['mu', 'theta[0]', 'theta[1]']
    """
    from matplotlib.figure import Figure

    arrays = _sites(draws)
    chosen = list(arrays) if sites is None else list(sites)
    names, columns = _entries(arrays, chosen)
    layers = [columns]
    if reference is not None:
        others, columns = _entries(_sites(reference), chosen)
        if others != names:
            raise ValueError(f"the reference must have the entries of the draws, {names}, got {others}")
        layers.append(columns)
    shown = min(len(names), max_entries)
    if shown < 1:
        raise ValueError(f"there must be an entry to show, got {len(names)} entries and max_entries={max_entries}")
    limits = [_limits([columns[:, i] for columns in layers]) for i in range(shown)]
    side = 1.2 + 1.7 * max(shown, 2)
    figure = Figure(figsize=(side, side), layout="constrained")
    grid: Any = figure.subplots(shown, shown, squeeze=False)
    for row, column in np.ndindex(shown, shown):
        axes = grid[row, column]
        if column > row:
            axes.set_visible(False)
        elif column == row:
            _draw_density(axes, [columns[:, row] for columns in layers], limits[row])
        else:
            _draw_pair(axes, [columns[:, [column, row]] for columns in layers], (limits[column], limits[row]))
        _label(axes, names[column] if row == shown - 1 else "", names[row] if column == 0 and row else "")
    _legend(figure, labels[: len(layers)], [len(columns) for columns in layers], shown, len(names))
    return _saved(figure, path)


def plot_weights(result: PSISResult, *, path: str | os.PathLike[str] | None = None) -> Figure:
    """Importance weights of the draws of a guide, largest first, against equal weights.

    Both axes are logarithmic: at the left the heaviest weights, of which the smoothed ones are quantiles of the
    generalised Pareto distribution of shape k-hat. The unit is the mean weight: at 1 all draws count the same.

    Args:
        result: what ``psis`` gives.
        path: file to save the picture to, such as "weights.png"; None to save nothing.

    Returns:
        The matplotlib figure.

    >>> z = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    >>> figure = plot_weights(PSISResult({"z": z}, 0.5 * z.double()))
    >>> print(figure.axes[0].get_title())
    k-hat 0.28 (good below 0.67), ESS 733 of 1000 draws
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    _draw_weights(axes, result)
    axes.axhline(1, color="black", linewidth=1, linestyle="--", label="equal weights")
    low, high = axes.get_ylim()
    axes.set_ylim(min(max(low, _LEAST_WEIGHT), 0.1), max(high, 10))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set(xlabel="rank of the draw, largest weight first", ylabel="weight (1 = mean weight)")
    quality = f"k-hat {result.khat:.2f} (good below {result.threshold:.2f})"
    axes.set_title(f"{quality}, ESS {result.ess:.0f} of {result.num_draws} draws")
    axes.legend(frameon=False, loc="lower left")
    _clean(axes)
    return _saved(figure, path)


def _draw_weights(axes: Axes, result: PSISResult) -> None:
    size = result.num_draws
    raw = _falling(result.log_weights - result.log_evidence)
    smoothed = _falling(result.smoothed_log_weights + math.log(size))
    hidden = f", {size - len(raw)} of weight 0 not shown" if len(raw) < size else ""
    rank = np.arange(1, size + 1)
    axes.loglog(rank[: len(raw)], raw, ".", color=_GRAY, markersize=5, label=f"raw weights{hidden}")
    axes.loglog(rank[: len(smoothed)], smoothed, color=_BLUE, label="smoothed weights")
    if math.isfinite(result.khat):
        tail = math.ceil(min(size / 5, 3 * math.sqrt(size)))
        label = f"Pareto tail, {tail} draws"
        axes.loglog(rank[:tail], smoothed[:tail], color=_ORANGE, linewidth=2.5, label=label)


def _sites(draws: Any) -> dict[str, np.ndarray]:
    """Arrays by site, draws as the leading axis."""
    posterior = getattr(draws, "posterior", None)
    if posterior is not None:  # an ArviZ container: chains and draws become one axis
        return {str(name): x.values.reshape((-1, *x.shape[2:])) for name, x in posterior.data_vars.items()}
    return {name: torch.as_tensor(value).detach().cpu().double().numpy() for name, value in draws.items()}


def _entries(arrays: dict[str, np.ndarray], sites: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Names of the entries and their draws. Shape: (draws, entries)."""
    missing = sorted(set(sites) - arrays.keys())
    if missing:
        raise ValueError(f"sites must be among {sorted(arrays)}, got {missing}; name others, or leave sites out")
    sizes = {site: len(arrays[site]) for site in sites}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"all sites must have the same number of draws, the leading axis, got {sizes}")
    names = [label for site in sites for label in entry_labels(site, torch.Size(arrays[site].shape[1:]))]
    flat = [arrays[site].reshape(sizes[site], -1) for site in sites]
    columns = np.concatenate(flat, axis=1) if flat else np.zeros((0, 0))
    for name, column in zip(names, columns.T, strict=True):
        if not np.isfinite(column).any():
            raise ValueError(f"each entry needs finite draws, got none at {name!r}; leave its site out")
    return names, columns


def _limits(values: list[np.ndarray]) -> tuple[float, float]:
    finite = [x[np.isfinite(x)] for x in values]
    low, high = min(np.quantile(x, _SHOWN[0]) for x in finite), max(np.quantile(x, _SHOWN[1]) for x in finite)
    margin = 0.15 * (high - low) or 0.5
    if high > low:  # no room beyond the last draw, so that a positive site has no density below 0
        low, high = max(low - margin, min(x.min() for x in finite)), min(high + margin, max(x.max() for x in finite))
        return float(low), float(high)
    return float(low - margin), float(high + margin)


def _density(columns: np.ndarray, limits: Sequence[tuple[float, float]]) -> tuple[list[np.ndarray], np.ndarray]:
    """Centres of the cells along each axis, and a smoothed histogram that sums to 1."""
    counts, edges = np.histogramdd(columns, bins=_GRID, range=limits)
    for axis, (column, (low, high)) in enumerate(zip(columns.T, limits, strict=True)):
        spread = np.subtract(*np.nanquantile(column, [0.84, 0.16])) / 2 * _GRID / (high - low)
        width = max(spread * len(columns) ** (-1 / (len(limits) + 4)), 0.5)  # Scott's rule, in cells
        distance = np.arange(_GRID)[:, None] - np.arange(_GRID)
        kernel = np.exp(-0.5 * (distance / width) ** 2)
        counts = np.moveaxis(np.tensordot(kernel / kernel.sum(0), counts, (1, axis)), 0, axis)
    return [(edge[1:] + edge[:-1]) / 2 for edge in edges], counts / counts.sum()


def _draw_density(axes: Axes, values: list[np.ndarray], limits: tuple[float, float]) -> None:
    for column, color in zip(values, (_BLUE, _ORANGE), strict=False):
        (centres,), density = _density(column[:, None], [limits])
        axes.plot(centres, density, color=color)
        if color == _BLUE:
            axes.fill_between(centres, density, color=color, alpha=0.2, linewidth=0)
    axes.set(xlim=limits, yticks=[])
    axes.set_ylim(bottom=0)
    axes.spines["left"].set_visible(False)


def _draw_pair(axes: Axes, pairs: list[np.ndarray], limits: tuple[tuple[float, float], ...]) -> None:
    dots = pairs[0][:: max(1, math.ceil(len(pairs[0]) / _MAX_DOTS))]
    axes.plot(*dots.T, ".", color=_BLUE, alpha=0.3, markersize=3, markeredgewidth=0, rasterized=True)
    for pair, color in zip(pairs, (_BLUE, _ORANGE), strict=False):
        (x, y), density = _density(pair, limits)
        falling = np.sort(density, axis=None)[::-1]
        levels = [float(falling[np.searchsorted(falling.cumsum(), mass)]) for mass in _MASSES]
        axes.contour(x, y, density.T, levels=levels, colors=color, linewidths=1.2)
    axes.set(xlim=limits[0], ylim=limits[1])


def _label(axes: Axes, below: str, left: str) -> None:
    axes.set(xlabel=below, ylabel=left)
    axes.locator_params(nbins=3)
    axes.tick_params(labelbottom=bool(below), labelleft=bool(left), labelsize=8)
    _clean(axes)


def _legend(figure: Figure, labels: Sequence[str], sizes: list[int], shown: int, total: int) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=color) for color in (_BLUE, _ORANGE)]
    words = [f"{label} ({size})" for label, size in zip(labels, sizes, strict=True)]
    notes = ["contours hold 50 % and 90 %"] * (shown > 1) + [f"first {shown} of {total} entries"] * (shown < total)
    place: Any = "upper right" if shown > 1 else "outside upper center"  # above the diagonal there is room
    figure.legend(lines[: len(words)], words, title="\n".join(notes), loc=place, frameon=False)


def _falling(log_weights: torch.Tensor) -> np.ndarray:
    """Positive weights, largest first."""
    weights: np.ndarray = log_weights.exp().sort(descending=True).values.numpy()
    return weights[weights > 0]


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
