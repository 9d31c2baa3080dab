"""Plain functions of weighted draws: means, resampling, names of entries."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["entry_labels", "resampled_positions", "weighted_mean"]


def weighted_mean(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted mean over the leading axis: sum_s w_s x_s.

    Args:
        weights: weights that sum to 1. Shape: (S,).
        values: values at the draws. Shape: (S, *shape).

    Returns:
        The mean, shape: shape.

    >>> weighted_mean(torch.tensor([0.25, 0.75]), torch.tensor([[0.0, 4.0], [4.0, 0.0]]))
    tensor([3., 1.])
    """
    mean: Tensor = torch.tensordot(weights, values, dims=1)
    return mean


def resampled_positions(weights: Tensor, num_draws: int) -> Tensor:
    """Positions of draws chosen by systematic resampling, with replacement and in random order.

    The draw of weight w is chosen floor(n w) or ceil(n w) times, n w in the mean.

    Args:
        weights: weights that sum to 1. Shape: (S,).
        num_draws: number n of draws to choose.

    Returns:
        Positions between 0 and S - 1, shape: (n,).

    Raises:
        ValueError: if ``num_draws`` is below 1.

    Source: Monte Carlo Filter and Smoother for Non-Gaussian Nonlinear State Space Models (Kitagawa, 1996).

    >>> resampled_positions(torch.tensor([0.5, 0.0, 0.5]), 4).sort().values
    tensor([0, 0, 2, 2])
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be 1 or more, got {num_draws}")
    levels = weights.to(torch.float64).cumsum(0)
    steps = torch.arange(num_draws, dtype=torch.float64, device=levels.device)
    points = (steps + torch.rand((), dtype=torch.float64, device=levels.device)) / num_draws
    chosen = torch.searchsorted(levels / levels[-1], points, right=True).clamp(max=len(weights) - 1)
    return chosen[torch.randperm(num_draws, device=chosen.device)]


def entry_labels(name: str, shape: torch.Size) -> list[str]:
    """Names of the entries of a site, in the order of ``flatten``.

    >>> entry_labels("theta", torch.Size([2])), entry_labels("L", torch.Size([1, 2]))
    (['theta[0]', 'theta[1]'], ['L[0, 0]', 'L[0, 1]'])
    """
    if not shape:
        return [name]
    positions = torch.cartesian_prod(*[torch.arange(size) for size in shape]).reshape(-1, len(shape))
    return [f"{name}[{', '.join(map(str, position))}]" for position in positions.tolist()]
