"""Pareto smoothing of importance weights, on plain tensors.

The largest weights of an importance sample follow a generalised Pareto distribution. Its shape k-hat tells
how far the weights can be trusted, and its quantiles replace the largest weights by values of lower variance.

Sources: A New and Efficient Estimation Method for the Generalized Pareto Distribution (Zhang and Stephens,
2009); Pareto Smoothed Importance Sampling (Vehtari et al., 2024).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "fit_generalized_pareto",
    "generalized_pareto_quantile",
    "importance_ess",
    "khat_threshold",
    "pareto_khat",
    "pareto_khat_of_mean",
    "pareto_smooth",
]

_MIN_TAIL = 5  # exceedances; below this a fit of two parameters says nothing
_LOG_TINY = math.log(torch.finfo(torch.float64).tiny)


def fit_generalized_pareto(exceedances: Tensor) -> tuple[float, float]:
    """Shape and scale of a generalised Pareto distribution, by the posterior mean of Zhang and Stephens.

    With x sorted, n values, and theta = -k / scale on a grid of m = 30 + floor(sqrt(n)) points,

        theta_j = 1 / x_n + (1 - sqrt(m / (j - 1/2))) / (3 x_q),  q = floor(n/4 + 1/2),
        k(theta) = mean log(1 - theta x),  l(theta) = n (log(-theta / k(theta)) - k(theta) - 1),

    theta is the mean of the grid under the weights softmax(l); k = k(theta), scale = -k / theta. The shape is
    then drawn towards 0.5 by ten prior observations, k <- (n k + 5) / (n + 10), which steadies short tails.

    Args:
        exceedances: positive values above the threshold, sorted upwards. Shape: (n,).

    Returns:
        The pair (k, scale). Either is NaN where the values have no spread that can be fitted.

    Source: Zhang and Stephens (2009); the prior on the shape: Vehtari et al. (2024).

    >>> probs = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    >>> k, scale = fit_generalized_pareto(generalized_pareto_quantile(probs, 0.3, 2.0))
    >>> round(k, 1), round(scale, 1)
    (0.3, 2.0)
    """
    x = exceedances.to(torch.float64)
    n = len(x)
    num_points = 30 + int(math.sqrt(n))
    j = torch.arange(1, num_points + 1, dtype=torch.float64, device=x.device)
    theta = 1 / x[-1] + (1 - (num_points / (j - 0.5)).sqrt()) / (3 * x[int(n / 4 + 0.5) - 1])
    k = torch.log1p(-theta[:, None] * x).mean(-1)
    log_likelihood = n * ((-theta / k).log() - k - 1)
    weights = torch.softmax(log_likelihood.nan_to_num(nan=-math.inf), dim=0)
    theta_mean = (weights * theta).sum()
    k_mean = torch.log1p(-theta_mean * x).mean()
    return float((n * k_mean + 5) / (n + 10)), float(-k_mean / theta_mean)


def generalized_pareto_quantile(probs: Tensor, k: float, scale: float) -> Tensor:
    """Quantiles of the generalised Pareto distribution.

    scale ((1 - p)^-k - 1) / k, or -scale log(1 - p) at k = 0.

    Args:
        probs: probabilities in [0, 1). Any shape.
        k: shape; the mean is finite below 1, the variance below 1/2.
        scale: scale, positive.

    Returns:
        Quantiles, the shape of ``probs``.

    >>> generalized_pareto_quantile(torch.tensor([0.0, 0.5]), 1.0, 2.0)
    tensor([0., 2.])
    """
    log_survival = torch.log1p(-probs)
    if abs(k) < torch.finfo(torch.float64).eps:
        return -scale * log_survival
    return scale * torch.expm1(-k * log_survival) / k


def pareto_smooth(log_weights: Tensor, *, relative_efficiency: float = 1.0) -> tuple[Tensor, float]:
    """Pareto-smoothed importance weights and the shape k-hat of their tail.

    The M = ceil(min(S / 5, 3 sqrt(S / relative_efficiency))) largest of S weights are fitted by a generalised
    Pareto distribution; the i-th smallest of them becomes its quantile at (i - 1/2) / M; none grows above the
    largest raw weight.

    Args:
        log_weights: raw log-weights, in nats, up to any constant; -inf is a weight of 0. Shape: (S,).
        relative_efficiency: effective over actual sample size of the draws, 1 for independent draws.

    Returns:
        The pair of smoothed log-weights, up to the same constant, shape (S,), float64; and k-hat. Where the
        tail cannot be fitted (fewer than 5 values above the threshold, or no spread) the weights stay raw
        and k-hat is inf.

    Raises:
        ValueError: if ``log_weights`` is not a vector, or holds NaN or +inf.

    Source: Vehtari et al. (2024).

    >>> torch.manual_seed(0)
    <...>
    >>> raw = torch.randn(1000)
    >>> smoothed, khat = pareto_smooth(raw)
    >>> bool(smoothed.max() <= raw.max()), khat < khat_threshold(1000)
    (True, True)
    """
    _check_log_weights(log_weights)
    raw = log_weights.to(torch.float64)
    largest = raw.max()
    if largest == -math.inf:
        return raw.clone(), math.inf
    smoothed = raw - largest
    tail, cutoff = _upper_tail(smoothed, relative_efficiency)
    k, scale = _fit_tail(smoothed[tail], cutoff)
    if math.isfinite(k):
        probs = (torch.arange(len(tail), dtype=torch.float64, device=raw.device) + 0.5) / len(tail)
        quantiles = generalized_pareto_quantile(probs, k, scale)
        smoothed[tail] = (quantiles + math.exp(cutoff)).log().clamp(max=0.0)
    return smoothed + largest, k


def pareto_khat(log_values: Tensor, *, relative_efficiency: float = 1.0) -> float:
    """Shape k-hat of the upper tail of positive values given by their logarithms.

    Args:
        log_values: logarithms, such as log-weights or log(weight * abs(f)); -inf is a value of 0.
            Shape: (S,).
        relative_efficiency: effective over actual sample size of the draws, 1 for independent draws.

    Returns:
        k-hat; inf where the tail cannot be fitted.

    Raises:
        ValueError: if ``log_values`` is not a vector, or holds NaN or +inf.

    >>> pareto_khat(torch.zeros(100))  # no tail at all
    inf
    """
    _check_log_weights(log_values)
    if log_values.max() == -math.inf:
        return math.inf
    scaled = (log_values - log_values.max()).to(torch.float64)
    tail, cutoff = _upper_tail(scaled, relative_efficiency)
    return _fit_tail(scaled[tail], cutoff)[0]


def pareto_khat_of_mean(log_weights: Tensor, values: Tensor) -> Tensor:
    """k-hat of the self-normalised estimate of E[f]: the larger of those of the tails of w and of w |f|.

    Args:
        log_weights: raw log-weights, in nats, up to any constant; -inf is a weight of 0. Shape: (S,).
        values: f at the draws. Shape: (S, *shape). An entry with at most two different values has the k-hat
            of w.

    Returns:
        k-hat of each entry, shape: shape, float64; inf where a value is not finite, or a tail cannot be
        fitted.

    Raises:
        ValueError: if ``log_weights`` is not a vector, or holds NaN or +inf.

    Source: Vehtari et al. (2024).

    >>> log_weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    >>> far = torch.randn(1000, generator=torch.Generator().manual_seed(1)).exp() ** 3
    >>> bool(pareto_khat_of_mean(log_weights, far) > pareto_khat(log_weights))
    True
    """
    khat = pareto_khat(log_weights)
    entries = values.to(torch.float64).reshape(len(values), -1).unbind(1)
    khats = [max(khat, _product_khat(log_weights, entry)) for entry in entries]
    return torch.tensor(khats, dtype=torch.float64).reshape(values.shape[1:])


def khat_threshold(num_draws: int) -> float:
    """Largest k-hat at which estimates from this many draws can be trusted: min(1 - 1 / log10(S), 0.7).

    Args:
        num_draws: number of draws S, 11 or more (below, no k-hat is low enough).

    Raises:
        ValueError: if ``num_draws`` is below 11.

    Source: Vehtari et al. (2024).

    >>> [round(khat_threshold(s), 2) for s in (100, 320, 1000, 10000)]
    [0.5, 0.6, 0.67, 0.7]
    """
    if num_draws < 11:
        raise ValueError(f"num_draws must be 11 or more for a threshold above 0, got {num_draws}; draw more")
    return min(1 - 1 / math.log10(num_draws), 0.7)


def importance_ess(log_weights: Tensor) -> float:
    """Effective sample size of importance weights: (sum w)^2 / sum w^2, between 1 and the number of draws.

    Args:
        log_weights: log-weights, in nats, up to any constant; -inf is a weight of 0. Shape: (S,).

    Returns:
        The number of equally weighted draws worth as much; 0 where every weight is 0.

    Source: A Note on Importance Sampling Using Standardized Weights (Kong, 1992).

    >>> importance_ess(torch.tensor([0.0, 0.0, -torch.inf]))
    2.0
    """
    if log_weights.max() == -math.inf:
        return 0.0
    weights = (log_weights - log_weights.max()).to(torch.float64).exp()
    return float(weights.sum() ** 2 / weights.square().sum())


def _upper_tail(scaled: Tensor, relative_efficiency: float) -> tuple[Tensor, float]:
    """Indices of the values above the threshold, sorted upwards, and the threshold; the maximum is 0."""
    size = len(scaled)
    tail_size = math.ceil(min(size / 5, 3 * math.sqrt(size / relative_efficiency)))
    order = scaled.argsort(stable=True)
    cutoff = max(float(scaled[order[-min(tail_size + 1, size)]]), _LOG_TINY)
    return order[scaled[order] > cutoff], cutoff


def _fit_tail(log_tail: Tensor, cutoff: float) -> tuple[float, float]:
    if len(log_tail) < _MIN_TAIL:
        return math.inf, math.nan
    k, scale = fit_generalized_pareto(log_tail.exp() - math.exp(cutoff))
    return (k, scale) if math.isfinite(k) and scale > 0 else (math.inf, math.nan)


def _product_khat(log_weights: Tensor, values: Tensor) -> float:
    if not values.isfinite().all():
        return math.inf
    return pareto_khat(log_weights + values.abs().log()) if len(values.unique()) > 2 else -math.inf


def _check_log_weights(log_weights: Tensor) -> None:
    if log_weights.dim() != 1 or log_weights.numel() == 0 or log_weights.is_complex():
        got = f"{log_weights.dtype} of shape {tuple(log_weights.shape)}"
        raise ValueError(f"log-weights must be a vector with one real value for each draw, got {got}")
    num_bad = int((log_weights.isnan() | (log_weights == math.inf)).sum())
    if num_bad:
        raise ValueError(f"log-weights must not be NaN or +inf, got {num_bad} such values; drop those draws")
