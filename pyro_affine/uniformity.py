"""Whether numbers are uniform between 0 and 1: the Kolmogorov-Smirnov test."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TERMS = 100  # of a series whose terms fall as exp(-2 k^2 t^2)


def uniformity_p_value(values: Tensor) -> Tensor:
    """Probability that uniform numbers lie as far from uniform as these, by the Kolmogorov-Smirnov distance.

    p = 2 sum_k (-1)^(k-1) exp(-2 k^2 t^2),  t = (sqrt(n) + 0.12 + 0.11 / sqrt(n)) d,  d = sup |F_n(u) - u|.

    Args:
        values: in [0, 1]. Shape: (n,) + shape.

    Returns:
        p, float64, shape: shape.

    Source: EDF Statistics for Goodness of Fit and Some Comparisons (Stephens, 1974).

    >>> bool(uniformity_p_value(torch.linspace(0.05, 0.95, 10)) > 0.99)
    True
    """
    n = len(values)
    ordered = values.to(torch.float64).sort(0).values
    steps = torch.arange(n + 1, dtype=torch.float64).reshape(-1, *[1] * (values.dim() - 1)) / n
    distance = torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).amax(0)
    t = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    k = torch.arange(1, _TERMS + 1, dtype=torch.float64)
    terms = (-1) ** (k - 1) * torch.exp(-2 * k.square() * t[..., None].square())
    return torch.where(t < 0.2, 1.0, 2 * terms.sum(-1)).clamp(0, 1)  # the series is 1 to 12 digits below 0.2


def uniform_band(n: int, level: float = 0.95) -> float:
    """Distance from uniform within which n uniform numbers stay with a probability of ``level``.

    >>> round(uniform_band(100), 3)
    0.134
    """
    low, high = 0.0, 3.0
    for _ in range(50):
        t = (low + high) / 2
        p = 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * t * t) for k in range(1, _TERMS)) if t > 0.2 else 1.0
        low, high = (t, high) if p > 1 - level else (low, t)
    return t / (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n))
