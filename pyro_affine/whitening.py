"""The units of a posterior: a fixed affine map that the layers before it need not learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_affine.precision import product
from pyro_affine.transform import FlowTransform


class Whitening(FlowTransform):
    """Affine map y = loc + L x with a stored, not trained, lower-triangular L.

    Put last in a flow, it lets the layers before it, and the steps of an optimiser on them, work in units of the
    standard deviations of y, correlations taken out. log|det dy/dx| = sum log L_ii. It starts as the identity.

    Args:
        num_entries: D, the number of entries of an event.

    >>> layer = Whitening(2)
    >>> layer.set(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
    >>> layer(torch.ones(2))
    tensor([2., 7.])
    """

    def __init__(self, num_entries: int, *, cache_size: int = 1) -> None:
        super().__init__((num_entries,), cache_size=cache_size)
        self.loc_stored = nn.Parameter(torch.zeros(num_entries))
        self.scale_tril_stored = nn.Parameter(torch.eye(num_entries))

    @property
    def loc(self) -> Tensor:
        """Where x = 0 goes. Shape: (D,)."""
        return self.loc_stored.detach()  # a Parameter, so that Pyro's param store keeps it, but never trained

    @property
    def scale_tril(self) -> Tensor:
        """L. Shape: (D, D)."""
        return self.scale_tril_stored.detach()

    @torch.no_grad()
    def set(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Store another map.

        Args:
            loc: where x = 0 goes. Shape: (D,).
            scale_tril: L, lower-triangular with a positive diagonal. Shape: (D, D).

        Raises:
            ValueError: for other shapes, or values that are not finite, or a diagonal that is not positive.
        """
        size = len(self.loc)
        if loc.shape != (size,) or scale_tril.shape != (size, size):
            raise ValueError(
                f"loc and scale_tril must have shapes ({size},) and ({size}, {size}), got {tuple(loc.shape)} and "
                f"{tuple(scale_tril.shape)}"
            )
        if not (loc.isfinite().all() and scale_tril.isfinite().all() and (scale_tril.diagonal() > 0).all()):
            raise ValueError("loc and scale_tril must be finite and the diagonal positive; drop such a candidate")
        self.loc_stored.copy_(loc)
        self.scale_tril_stored.copy_(scale_tril.tril())

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return product(x, self.scale_tril.T) + self.loc, self._log_det(x)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = (y - self.loc).reshape(-1, y.shape[-1])
        x = torch.linalg.solve_triangular(self.scale_tril.T, rows, upper=True, left=False)
        return x.reshape(y.shape), self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        return self.scale_tril.diagonal().log().sum().expand(x.shape[:-1])


class DiagonalWhitening(FlowTransform):
    """Affine map y = loc + scale * x with stored, not trained, constants, for events too long for a matrix.

    log|det dy/dx| = sum log scale. It starts as the identity.

    Args:
        num_entries: D, the number of entries of an event.

    >>> layer = DiagonalWhitening(2)
    >>> layer.set(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    >>> layer(torch.ones(2))
    tensor([4., 6.])
    """

    def __init__(self, num_entries: int, *, cache_size: int = 1) -> None:
        super().__init__((num_entries,), cache_size=cache_size)
        self.loc_stored = nn.Parameter(torch.zeros(num_entries))
        self.scale_stored = nn.Parameter(torch.ones(num_entries))

    @property
    def loc(self) -> Tensor:
        """Where x = 0 goes. Shape: (D,)."""
        return self.loc_stored.detach()

    @property
    def scale(self) -> Tensor:
        """Standard deviation of y for a standard normal x. Shape: (D,)."""
        return self.scale_stored.detach()

    @torch.no_grad()
    def set(self, loc: Tensor, scale: Tensor) -> None:
        """Store another map.

        Args:
            loc: where x = 0 goes. Shape: (D,).
            scale: positive. Shape: (D,).

        Raises:
            ValueError: for other shapes, values that are not finite, or a scale that is not positive.
        """
        if loc.shape != self.loc.shape or scale.shape != self.loc.shape:
            raise ValueError(
                f"loc and scale must have shape {tuple(self.loc.shape)}, got {tuple(loc.shape)} and "
                f"{tuple(scale.shape)}"
            )
        if not (loc.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
            raise ValueError("loc and scale must be finite and scale positive; drop such a candidate")
        self.loc_stored.copy_(loc)
        self.scale_stored.copy_(scale)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.scale + self.loc, self._log_det(x)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return (y - self.loc) / self.scale, self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        return self.scale.log().sum().expand(x.shape[:-1])
