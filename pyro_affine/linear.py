"""Linear layers: a saved permutation, a lower-triangular affine map, and the standardisation of data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from pyro_affine.precision import product
from pyro_affine.transform import FlowTransform

_MOST_SHOWN = 20  # entries in a message


class Permutation(FlowTransform):
    """Fixed reordering of the entries of an event: y[i] = x[order[i]], log|det dy/dx| = 0.

    The order is a buffer, so that a reloaded flow is the same density.

    Args:
        order: the integers 0 to D - 1 in the new order, D = number of entries of an event.
        event_shape: shape of one event, flattened for the reordering; default (D,).

    Raises:
        ValueError: if ``order`` is no permutation of D entries.

    >>> Permutation(torch.tensor([2, 0, 1]))(torch.tensor([10.0, 20.0, 30.0]))
    tensor([30., 10., 20.])
    """

    order: Tensor
    inverse_order: Tensor

    def __init__(self, order: Tensor, event_shape: Sequence[int] | None = None, *, cache_size: int = 1) -> None:
        shape = Size(order.shape if event_shape is None else event_shape)
        super().__init__(shape, cache_size=cache_size)
        wanted = torch.arange(shape.numel(), device=order.device)
        if not shape or order.dim() != 1 or order.dtype != wanted.dtype or not torch.equal(order.sort().values, wanted):
            raise ValueError(
                f"order must be int64 and, for events of shape {tuple(shape)}, hold each integer from 0 to "
                f"{shape.numel() - 1} once, got {order.dtype} {order.tolist()}; for a random one use "
                f"torch.randperm({shape.numel()})"
            )
        self.register_buffer("order", order.clone())
        self.register_buffer("inverse_order", order.argsort(), persistent=False)

    @property
    def sign(self) -> int:
        """+1 for an even permutation, -1 for an odd one."""
        left, cycles = set(range(len(self.order))), 0
        order = self.order.tolist()
        while left:
            start = index = left.pop()
            while order[index] != start:
                index = order[index]
                left.remove(index)
            cycles += 1
        return 1 if (len(order) - cycles) % 2 == 0 else -1

    def _reorder(self, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        rank = len(self.event_shape or ())
        y = x.flatten(-rank).index_select(-1, order)
        return y.reshape(x.shape), x.new_zeros(()).expand(x.shape[: x.dim() - rank])

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._reorder(x, self.order)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._reorder(y, self.inverse_order)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.inverse_order = self.order.argsort()

    def extra_repr(self) -> str:
        """Size, for ``repr``."""
        return f"{len(self.order)}"


class LowerTriangularAffine(FlowTransform):
    """Dense affine map y = loc + L x with a lower-triangular L: all Gaussians, if x is standard normal.

    L = diag(exp(log_scale)) (I + N), N strictly lower triangular; so N and the steps of an optimiser on it are free
    of the units of y. log|det dy/dx| = sum log_scale. The inverse is a triangular solve.

    Args:
        loc: where x = 0 goes. Shape: (D,).
        scale: diagonal of L at the start, positive. Shape: (D,) or (); default 1.

    Raises:
        ValueError: if ``loc`` is no vector of floats or ``scale`` is not positive.

    >>> layer = LowerTriangularAffine(torch.tensor([1.0, 2.0]), torch.tensor(0.5))
    >>> layer(torch.ones(2))
    tensor([1.5000, 2.5000], grad_fn=<AddBackward0>)
    """

    def __init__(self, loc: Tensor, scale: Tensor | float = 1.0, *, cache_size: int = 1) -> None:
        if loc.dim() != 1 or not loc.is_floating_point():
            raise ValueError(f"loc must be a vector of floats, got {loc.dtype} of shape {tuple(loc.shape)}; use (D,)")
        super().__init__(loc.shape, cache_size=cache_size)
        log_scale = torch.as_tensor(scale, dtype=loc.dtype, device=loc.device).detach().log()
        if log_scale.shape not in ((), loc.shape) or not log_scale.isfinite().all():
            raise ValueError(
                f"scale must be positive and finite, of shape () or {tuple(loc.shape)}, got {scale}; it is the "
                "standard deviation of each entry at the start"
            )
        self.loc = nn.Parameter(loc.detach().clone())
        self.log_scale = nn.Parameter(log_scale.expand(loc.shape).clone())
        self.below = nn.Parameter(loc.new_zeros(len(loc), len(loc)))  # N; only its strictly lower part is read

    @property
    def scale_tril(self) -> Tensor:
        """The matrix L. Shape: (D, D)."""
        unit = self.below.tril(-1) + torch.eye(len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        return self.log_scale.exp()[:, None] * unit

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = (x + product(x, self.below.tril(-1).T)) * self.log_scale.exp() + self.loc
        return y, self.log_scale.sum().expand(x.shape[:-1])

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        whitened = (y - self.loc) * (-self.log_scale).exp()
        rows = whitened.reshape(-1, whitened.shape[-1])
        upper = self.below.tril(-1).T
        x = torch.linalg.solve_triangular(upper, rows, upper=True, left=False, unitriangular=True)
        return x.reshape(y.shape), self.log_scale.sum().expand(y.shape[:-1])


class Standardization(FlowTransform):
    """Elementwise map y = loc + scale * x with stored, not trained, constants: the units of the data.

    Put last in a flow, it lets the layers before it work on data of mean 0 and standard deviation 1, while
    log-densities stay those of the data as given: log|det dy/dx| = sum log scale.

    Args:
        event_shape: shape of one event. It starts as the identity.

    >>> layer = Standardization((2,))
    >>> layer.fit(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
    >>> layer.loc
    tensor([ 1., 20.])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, event_shape: Sequence[int], *, cache_size: int = 1) -> None:
        super().__init__(tuple(event_shape), cache_size=cache_size)
        self.register_buffer("loc", torch.zeros(tuple(event_shape)))
        self.register_buffer("scale", torch.ones(tuple(event_shape)))

    @property
    def is_new(self) -> bool:
        """Whether ``fit`` has not changed it."""
        return bool((self.loc == 0).all() & (self.scale == 1).all())

    def fit(self, data: Tensor) -> None:
        """Store mean and standard deviation of each entry. Data shape: (N,) + event_shape, N >= 2.

        Raises:
            ValueError: for data of another shape, not finite, or with an entry that never varies.
        """
        if data.shape[1:] != self.event_shape or len(data) < 2:
            raise ValueError(
                f"data must have shape (N,) + {tuple(self.event_shape or ())} with N >= 2, got {tuple(data.shape)}"
            )
        loc, scale = data.double().mean(0), data.double().std(0)
        bad = (~(scale.isfinite() & (scale > 0))).nonzero()
        if len(bad):
            entries = ", ".join(str(tuple(entry)) for entry in bad[:_MOST_SHOWN].tolist())
            more = f" and {len(bad) - _MOST_SHOWN} more" if len(bad) > _MOST_SHOWN else ""
            raise ValueError(
                "each entry of the training rows must be finite and vary, got standard deviation "
                f"{scale[tuple(bad[0])].item()} at entry {entries}{more}; drop such entries, or clean their rows"
            )
        self.loc.copy_(loc)
        self.scale.copy_(scale)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.scale + self.loc, self._log_det(x)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return (y - self.loc) / self.scale, self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        return self.scale.log().sum().expand(x.shape[: x.dim() - self.scale.dim()])
