"""Trained linear maps of channels, kept as P L U: exact determinant, inverse by triangular solves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_affine.transform import FlowTransform


class InvertibleLinear(FlowTransform):
    """Trained invertible matrix that mixes the entries of a vector, or the channels of an image at each pixel.

    y = W x,  W = P L U,  log|det dy/dx| = (pixels) * sum log|U_ii|.

    P is a fixed permutation, L lower triangular with a unit diagonal, U upper triangular. W starts as a random
    rotation; as P and the signs of U's diagonal are fixed, W stays invertible and det W > 0: ``sign`` is 1. The inverse
    is two triangular solves. Products are made in the precision of the parameters, under autocast too.

    Args:
        event_shape: shape of one event, or its number of entries D: the first dimension counts the channels that are
            mixed, as in (D,) or (C, H, W).
        event_dim: rank of the events, where ``event_shape`` is a number of channels and the sizes of the other
            dimensions are left open: 3 for images of any height and width. Default 1.
        seed: of the rotation: a number, a generator, or None for torch's global generator.

    Raises:
        ValueError: for an event of no entry, or an ``event_dim`` that does not fit ``event_shape``.

    Source: Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma and Dhariwal, 2018), section 3.2.

    >>> layer = InvertibleLinear(3, seed=0)
    >>> x = torch.tensor([3.0, 0.0, 4.0])
    >>> torch.allclose(layer(x).norm(), x.norm())  # a rotation, until it is trained
    True
    """

    order: Tensor
    inverse_order: Tensor
    signs: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        event_dim: int | None = None,
        seed: int | torch.Generator | None = None,
        cache_size: int = 1,
    ) -> None:
        sizes = Size([event_shape] if isinstance(event_shape, int) else event_shape)
        rank = len(sizes) if event_dim is None else event_dim
        is_open = len(sizes) == 1 and rank > 1
        if not sizes or min(sizes) < 1 or (rank != len(sizes) and not is_open):
            raise ValueError(
                "an event needs a first dimension of one channel at least, and event_dim its rank, got event_shape="
                f"{event_shape} and event_dim={event_dim}; use (D,), (C, H, W), or C with event_dim=3"
            )
        super().__init__(None if is_open else sizes, cache_size=cache_size)
        self.num_channels, self.rank = sizes[0], rank
        permutation, lower, upper = torch.linalg.lu(_rotation(self.num_channels, seed))
        diagonal = upper.diagonal()
        packed = lower.tril(-1) + upper.triu(1) + diagonal.abs().log().diag()
        # one matrix as in LAPACK, so that each of its entries is read: L below, log|U_ii| on, U above the diagonal
        self.lower_upper = nn.Parameter(packed.to(torch.get_default_dtype()))
        self.register_buffer("signs", diagonal.sign().to(torch.get_default_dtype()))
        self.register_buffer("order", permutation.argmax(1))
        self.register_buffer("inverse_order", self.order.argsort(), persistent=False)

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(constraints.real, self.rank)

    @property
    def weight(self) -> Tensor:
        """The matrix W. Shape: (num_channels, num_channels)."""
        with torch.autocast(self.lower_upper.device.type, enabled=False):
            return products(self.lower_upper, self.signs, self.order)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._mixed(self.weight, x), self._log_det(x)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._mixed(inverses(self.lower_upper, self.signs, self.order), y), self._log_det(y)

    def _mixed(self, matrix: Tensor, events: Tensor) -> Tensor:
        with torch.autocast(events.device.type, enabled=False):
            events = events.to(matrix)
            if self.rank == 1:
                return events @ matrix.T
            return (matrix @ events.flatten(1 - self.rank)).reshape(events.shape)

    def _log_det(self, x: Tensor) -> Tensor:
        batch_rank = x.dim() - self.rank
        num_pixels = math.prod(x.shape[batch_rank + 1 :])  # Pyro's ProvenanceTensor has a tuple for a shape
        return (self.lower_upper.diagonal().sum() * num_pixels).expand(x.shape[:batch_rank])

    def forward_shape(self, shape: Size) -> Size:
        """Shape of y given the shape of x."""
        if self.event_shape is None and (len(shape) < self.rank or shape[-self.rank] != self.num_channels):
            raise ValueError(
                f"{type(self).__name__} takes events of {self.num_channels} channels in dimension {-self.rank}, got a "
                f"tensor of shape {tuple(shape)}; reshape it, or build the layer for this number of channels"
            )
        return super().forward_shape(shape)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.inverse_order = self.order.argsort()

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"{tuple(self.event_shape or (self.num_channels, *['any'] * (self.rank - 1)))}"


def products(packed: Tensor, signs: Tensor, order: Tensor) -> Tensor:
    """The matrices W = P L U of layers.

    Args:
        packed, signs, order: ``lower_upper`` and the buffers of one layer, or those of several stacked.

    >>> layer = InvertibleLinear(3, seed=0)
    >>> matrix = products(layer.lower_upper, layer.signs, layer.order)
    >>> torch.allclose(matrix @ matrix.T, torch.eye(3), atol=1e-6)  # a rotation, until it is trained
    True
    """
    upper = _upper(packed, signs)
    return _permutations(packed, order) @ (upper + packed.tril(-1) @ upper)


def inverses(packed: Tensor, signs: Tensor, order: Tensor) -> Tensor:
    """The inverses of ``products``, by two triangular solves."""
    undone = _permutations(packed, order).mT
    solved: Tensor = torch.linalg.solve_triangular(packed, undone, upper=False, unitriangular=True)
    solved = torch.linalg.solve_triangular(_upper(packed, signs), solved, upper=True)
    return solved


def _upper(packed: Tensor, signs: Tensor) -> Tensor:
    """U."""
    diagonal = packed.diagonal(dim1=-2, dim2=-1).exp() * signs
    return torch.diagonal_scatter(packed, diagonal, dim1=-2, dim2=-1).triu()


def _permutations(packed: Tensor, order: Tensor) -> Tensor:
    """P."""
    return torch.eye(packed.shape[-1], dtype=packed.dtype, device=packed.device)[order]


def invertible_conv1x1(
    num_channels: int | Sequence[int], *, seed: int | torch.Generator | None = None, cache_size: int = 1
) -> InvertibleLinear:
    """An ``InvertibleLinear`` for images: an invertible 1x1 convolution, the same mix of channels at each pixel.

    Args:
        num_channels: number of channels, for images of any height and width; or the event shape (C, H, W).
        seed, cache_size: as in ``InvertibleLinear``.

    Raises:
        ValueError: for no channel, or an event shape of another rank.

    Source: Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma and Dhariwal, 2018), section 3.2.

    >>> layer = invertible_conv1x1(3, seed=0)
    >>> layer(torch.zeros(5, 3, 8, 6)).shape, layer(torch.zeros(3, 7, 7)).shape
    (torch.Size([5, 3, 8, 6]), torch.Size([3, 7, 7]))
    """
    if not isinstance(num_channels, int) and len(num_channels) != 3:
        raise ValueError(
            f"images have event shape (C, H, W), got {tuple(num_channels)}; for events of another rank use "
            "InvertibleLinear"
        )
    event_dim = 3 if isinstance(num_channels, int) else None
    return InvertibleLinear(num_channels, event_dim=event_dim, seed=seed, cache_size=cache_size)


def _rotation(size: int, seed: int | torch.Generator | None) -> Tensor:
    """A matrix drawn uniformly from all rotations, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    device = "cpu" if generator is None else generator.device
    draw = torch.randn(size, size, dtype=torch.float64, generator=generator, device=device).cpu()
    q: Tensor
    q, r = torch.linalg.qr(draw)
    q = q * r.diagonal().sign()  # else the draw is not uniform
    if torch.linalg.det(q) < 0:
        q[:, 0] = -q[:, 0]
    return q
