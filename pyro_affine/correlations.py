"""The correlations of data: a stored triangular map, and the covariance that it is made of."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_affine.precision import product
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
        self.loc.copy_(data.mean(0, dtype=torch.float64))
        self.scale_tril.copy_(torch.linalg.cholesky(shrunk_covariance(data)))

    @property
    def is_new(self) -> bool:
        """Whether ``fit`` has not changed it."""
        return torch.equal(self.scale_tril, torch.eye(len(self.loc)).to(self.scale_tril))

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return product(x, self.scale_tril.T) + self.loc, self._log_det(x)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = (y - self.loc).reshape(-1, y.shape[-1])
        x = torch.linalg.solve_triangular(self.scale_tril.T, rows, upper=True, left=False)
        return x.reshape(y.shape), self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        return self.scale_tril.diagonal().log().sum().expand(x.shape[:-1])


_FARTHEST = 5.0  # of data in about unit scale
_ROWS_AT_ONCE = 4096
_SHARES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.9)


def shrunk_covariance(data: Tensor) -> Tensor:
    """Covariance of rows, its correlations drawn towards zero by as much as one half of the rows predicts of the other.

    covariance = (1 - s) sample covariance + s diag(sample variances), with the s, of a few from 1e-6 to 0.9, that gives
    each half of the rows the highest log-density under the Gaussian of the other half. Columns that are constant in one
    half have no say: that half tells nothing of the other. In float64.

    Args:
        data: rows. Shape: (N, D).

    >>> shrunk_covariance(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]))[0, 1] < 1
    tensor(True)
    """
    share = _best_share(data) if len(data) > 9 else _SHARES[-1]
    return _drawn(_Moments.of(data).covariance, share)


def _best_share(data: Tensor) -> float:
    varies = _varies(data[::2]) & _varies(data[1::2])
    if not varies.all():
        return _best_share(data[:, varies]) if varies.any() else _SHARES[-1]
    halves = _Moments.of(data[::2]), _Moments.of(data[1::2])
    return max(_SHARES, key=lambda s: _gain(*halves, s) + _gain(*halves[::-1], s))


def _varies(rows: Tensor) -> Tensor:
    low, high = rows.aminmax(dim=0)
    return low < high


class _Moments(NamedTuple):
    """Mean, (D,), and covariance, (D, D), of a number of rows."""

    mean: Tensor
    covariance: Tensor
    num_rows: int

    @classmethod
    def of(cls, rows: Tensor) -> _Moments:
        """In float64, though never of all rows at once: of 784 columns they would take a gigabyte."""
        loc = rows.mean(0)
        mean = rows.new_zeros(rows.shape[1], dtype=torch.float64)
        square = mean.new_zeros(len(mean), len(mean))
        for block in rows.split(_ROWS_AT_ONCE):
            offset = (block - loc).double()
            mean += offset.sum(0) / len(rows)
            square += offset.T @ offset
        covariance = (square - len(rows) * mean[:, None] * mean) / (len(rows) - 1)
        return cls(loc + mean, covariance, len(rows))


def _drawn(covariance: Tensor, share: float) -> Tensor:
    return (1 - share) * covariance + share * covariance.diagonal().diag()


def _gain(own: _Moments, others: _Moments, share: float) -> float:
    """Mean log-density of the others, but for a constant, under the Gaussian of the first."""
    factor, problem = torch.linalg.cholesky_ex(_drawn(own.covariance, share))
    if problem:
        return -math.inf
    offset = others.mean - own.mean
    square = (1 - 1 / others.num_rows) * others.covariance + offset[:, None] * offset
    return float(-torch.cholesky_solve(square, factor).trace() / 2 - factor.diagonal().log().sum())
