"""Ridge regression with a penalty chosen on held-out rows: where conditional flows start from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_PENALTIES = (1e-6, 1e-3, 1e-2, 0.1, 1.0, 10.0)  # in units of the mean variance of the inputs
_HELD_OUT = 5  # one row in five


def ridge(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Linear regression outputs = W inputs + b + L e, e standard normal, by penalised least squares, in float64.

    W minimises mean |outputs - W inputs - b|^2 + penalty * |W|^2. Of the penalties whose error in every fifth row is
    the least, up to a standard error, the largest is taken; L is the Cholesky factor of the covariance of these errors.

    Args:
        inputs: shape (N, C).
        outputs: shape (N, D).

    Returns:
        W of shape (D, C), b of shape (D,), L lower triangular of shape (D, D).

    >>> x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    >>> weight, bias, _ = ridge(x, x[:, :1] * 2 + 1)
    >>> round(float(weight[0, 0]), 2), round(float(bias), 2)
    (2.0, 1.0)
    """
    inputs, outputs = inputs.double(), outputs.double()
    held_out = torch.arange(len(inputs), device=inputs.device) % _HELD_OUT == 0
    trained = inputs[~held_out], outputs[~held_out]
    errors = {}
    for penalty in _PENALTIES:
        weight, bias = _solve(*trained, penalty)
        errors[penalty] = outputs[held_out] - inputs[held_out] @ weight.T - bias
    chosen = _largest_of_the_best({penalty: error.square().mean(1) for penalty, error in errors.items()})
    return *_solve(inputs, outputs, chosen), _tril(errors[chosen])


def _largest_of_the_best(errors: dict[float, Tensor]) -> float:
    """Small weights are less shaken when the network behind the inputs is trained."""
    best = min(errors.values(), key=lambda error: float(error.mean()))
    excess = {penalty: error - best for penalty, error in errors.items()}
    return max(p for p, x in excess.items() if float(x.mean()) <= float(x.std()) / math.sqrt(len(x)))


def _solve(inputs: Tensor, outputs: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    centre, mean = inputs.mean(0), outputs.mean(0)
    x, y = inputs - centre, outputs - mean
    gram = x.T @ x / len(x)
    gram.diagonal().add_(penalty * gram.diagonal().mean().clamp(min=1e-12))
    weight = torch.linalg.solve(gram, x.T @ y / len(x)).T
    return weight, mean - weight @ centre


def _tril(errors: Tensor) -> Tensor:
    """Cholesky factor of the errors' mean squares, shrunk to its diagonal where rows are few."""
    covariance = errors.T @ errors / len(errors)
    share = min(errors.shape[1] / len(errors), 1.0)
    diagonal = covariance.diagonal().clamp(min=1e-8).diag()
    tril: Tensor = torch.linalg.cholesky((1 - share) * covariance + share * diagonal)
    return tril
