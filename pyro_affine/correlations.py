"""The correlations of data: a stored triangular map, and the covariance that it is made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_affine.transform import FlowTransform


class Correlations(FlowTransform):
    """Affine map y = loc + L x with a stored, not trained, lower-triangular L: the Gaussian of the data.

    log|det dy/dx| = sum log L_ii. It starts as the identity. ``Whitening`` is the same for guides, in the form that
    Pyro's param store keeps.

    Args:
        num_entries: D, the number of entries of an event.

    >>> layer = Correlations(2)
    >>> layer.fit(torch.tensor([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0]]))
    >>> layer(torch.zeros(2))
    tensor([1., 1.])
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, num_entries: int, *, cache_size: int = 1) -> None:
        super().__init__((num_entries,), cache_size=cache_size)
        self.register_buffer("loc", torch.zeros(num_entries))
        self.register_buffer("scale_tril", torch.eye(num_entries))

    def fit(self, data: Tensor) -> None:
        """Store the mean and the factor of ``shrunk_covariance``, outliers drawn in to 5. Data shape: (N, D)."""
        data = data.clamp(-_FARTHEST, _FARTHEST)
        self.loc.copy_(data.double().mean(0))
        self.scale_tril.copy_(torch.linalg.cholesky(shrunk_covariance(data)))

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.scale_tril.T + self.loc, self._log_det(x)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = (y - self.loc).reshape(-1, y.shape[-1])
        x = torch.linalg.solve_triangular(self.scale_tril.T, rows, upper=True, left=False)
        return x.reshape(y.shape), self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        return self.scale_tril.diagonal().log().sum().expand(x.shape[:-1])


_FARTHEST = 5.0  # of data in about unit scale
_SHARES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.9)


def shrunk_covariance(data: Tensor) -> Tensor:
    """Covariance of rows, its correlations drawn towards zero by as much as one half of the rows predicts of the other.

    covariance = (1 - s) sample covariance + s diag(sample variances), with the s, of a few from 1e-6 to 0.9, that gives
    each half of the rows the highest log-density under the Gaussian of the other half. In float64.

    Args:
        data: rows. Shape: (N, D).

    >>> shrunk_covariance(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]))[0, 1] < 1
    tensor(True)
    """
    rows = data.double()
    scale = rows.std(0)
    scores = (rows - rows.mean(0)) / scale
    halves = scores[::2], scores[1::2]
    share = max(_SHARES, key=lambda s: _gain(*halves, s) + _gain(*halves[::-1], s)) if len(rows) > 9 else _SHARES[-1]
    return _drawn(scores, share) * scale[:, None] * scale


def _drawn(scores: Tensor, share: float) -> Tensor:
    covariance = scores.T.cov()
    return (1 - share) * covariance + share * covariance.diagonal().diag()


def _gain(rows: Tensor, others: Tensor, share: float) -> float:
    """Mean log-density of the others, but for a constant, under the Gaussian of the rows."""
    factor, problem = torch.linalg.cholesky_ex(_drawn(rows, share))
    if problem:
        return -math.inf
    x = torch.linalg.solve_triangular(factor, (others - rows.mean(0)).T, upper=False)
    return float(-(x**2).sum(0).mean() / 2 - factor.diagonal().log().sum())
