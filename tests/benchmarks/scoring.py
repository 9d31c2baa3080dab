"""Errors of weighted draws against reference draws, in units of the posterior."""

from __future__ import annotations

from typing import Any

import torch
from targets import Draws
from torch import Tensor
from torch.distributions import biject_to

_LOWER, _UPPER = 0.158655, 0.841345  # one standard deviation to each side of a normal median


def errors(
    draws: Draws, weights: Tensor, reference: Draws, supports: dict[str, Any], *, heavy: bool
) -> dict[str, float]:
    """Largest errors over all entries of all sites, on the constrained and on the unconstrained scale.

    For entry i with reference location m_i and scale s_i:  max |m'_i - m_i| / s_i  and  max |log(s'_i / s_i)|.
    Location and scale are mean and standard deviation; median and half the central 68 % if ``heavy``.

    Args:
        draws: constrained draws by site, each of shape (S, *shape of the site).
        weights: their weights, which sum to 1. Shape: (S,).
        reference: draws of the posterior by site.
        supports: support of each site.
        heavy: whether moments mean little for this target.

    Returns:
        The larger of both scales as "mean" and "sd", and each: "mean_constrained", "mean_unconstrained", and so on.
    """
    found: dict[str, float] = {}
    for scale, convert in {"constrained": _same, "unconstrained": _unconstrain}.items():
        names = list(supports)
        ours = _columns([convert(draws[name], supports[name]) for name in names])
        theirs = _columns([convert(reference[name], supports[name]) for name in names])
        even = torch.full((len(theirs),), 1 / len(theirs), dtype=torch.float64)
        summary = _quantile_summary if heavy else _moments
        (loc, width), (true_loc, true_width) = summary(ours, weights), summary(theirs, even)
        found[f"mean_{scale}"] = _largest((loc - true_loc).abs() / true_width)
        found[f"sd_{scale}"] = _largest((width / true_width).log().abs())
    for name in ("mean", "sd"):
        found[name] = max(found[f"{name}_constrained"], found[f"{name}_unconstrained"])
    return found


def floor(reference: Draws, supports: dict[str, Any], *, heavy: bool) -> dict[str, float]:
    """The same errors of as many exact draws as the reference has, estimated from its two halves."""
    size = len(next(iter(reference.values()))) // 2
    first = {name: value[:size] for name, value in reference.items()}
    second = {name: value[size : 2 * size] for name, value in reference.items()}
    even = torch.full((size,), 1 / size, dtype=torch.float64)
    halves = errors(first, even, second, supports, heavy=heavy)
    return {name: value / 2**0.5 for name, value in halves.items()}  # halves have half as many draws


def _same(value: Tensor, support: Any) -> Tensor:
    return value


def _unconstrain(value: Tensor, support: Any) -> Tensor:
    unconstrained: Tensor = biject_to(support).inv(value)
    return unconstrained


def _columns(values: list[Tensor]) -> Tensor:
    return torch.cat([value.detach().double().reshape(len(value), -1) for value in values], -1)


def _largest(values: Tensor) -> float:
    return float(values.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def _moments(columns: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    mean = weights @ columns
    return mean, (weights @ (columns - mean).square()).sqrt()


def _quantile_summary(columns: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    ordered, order = columns.sort(0)
    levels = weights[order].cumsum(0)

    def quantile(level: float) -> Tensor:
        position = (levels < level).sum(0).clamp(max=len(columns) - 1)
        return ordered.gather(0, position[None])[0]

    return quantile(0.5), (quantile(_UPPER) - quantile(_LOWER)) / 2
