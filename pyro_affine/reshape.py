"""Layers that change the shape of an image: space to channels, and channels that leave level by level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import ConditionalTransformModule
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_affine.transform import FlowTransform


class _OntoImages(FlowTransform):
    """A transform whose y side are images of another shape than its events on the x side."""

    def __init__(self, event_shape: Sequence[int], image_shape: Size, *, cache_size: int = 1) -> None:
        super().__init__(tuple(event_shape), cache_size=cache_size)
        self.image_shape = image_shape

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(constraints.real, 3)

    def forward_shape(self, shape: Size) -> Size:
        """Shape of y given the shape of x."""
        shape = super().forward_shape(shape)
        return shape[: len(shape) - len(self.event_shape or ())] + self.image_shape

    def inverse_shape(self, shape: Size) -> Size:
        """Shape of x given the shape of y."""
        if shape[-3:] != self.image_shape:
            raise ValueError(
                f"{type(self).__name__} takes images of shape {tuple(self.image_shape)} on its y side, got a tensor of "
                f"shape {tuple(shape)}; reshape it, or build the transform for this shape"
            )
        return super().forward_shape(shape[:-3] + (self.event_shape or Size()))


class Squeeze(_OntoImages):
    """Space to channels: each square of factor x factor pixels is one pixel of factor^2 times as many channels.

    A reordering of entries: y[c, f i + a, f j + b] = x[f^2 c + f a + b, i, j] with f = factor, and
    log|det dy/dx| = 0. The base side x is the squeezed one, shape (f^2 C, H / f, W / f), the data side y the image,
    shape (C, H, W): the inverse squeezes data on their way to the base. For the other direction take ``.inv``.

    Args:
        image_shape: shape of the image, (C, H, W).
        factor: side of the squares, f.

    Raises:
        ValueError: for a shape of another rank, or a height or width that the factor does not divide.

    Source: Density estimation using Real NVP (Dinh et al., 2017), section 3.6.

    >>> squeeze = Squeeze((1, 2, 4))
    >>> squeeze.inv(torch.arange(8.0).reshape(1, 2, 4)).squeeze(1)
    tensor([[0., 2.],
            [1., 3.],
            [4., 6.],
            [5., 7.]])
    """

    def __init__(self, image_shape: Sequence[int], factor: int = 2, *, cache_size: int = 1) -> None:
        shape = _require_image(image_shape)
        channels, height, width = shape
        if factor < 1 or height % factor or width % factor:
            raise ValueError(
                f"height and width must be multiples of the factor, got images {tuple(shape)} and factor {factor}; pad "
                f"or crop the images, or take factor {_common_divisor(height, width)}"
            )
        squeezed = (channels * factor**2, height // factor, width // factor)
        super().__init__(squeezed, shape, cache_size=cache_size)
        self.factor = factor

    @property
    def sign(self) -> int:
        """+1 for an even reordering, as by each even factor, -1 for an odd one."""
        channels, factor = self.image_shape[0], self.factor
        height, width = self.image_shape[1] // factor, self.image_shape[2] // factor
        # exchanging two neighbouring axes of m and n entries inverts (pairs of m) * (pairs of n) pairs of entries,
        # once for each entry of the axes before, k^2 times for k entries in the axes after; two exchanges cancel
        num_odd = channels * height * factor * _num_pairs(factor) * _num_pairs(width)
        return -1 if num_odd % 2 else 1

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # torch's pixel_unshuffle gets the shape of empty batches wrong
        squares = x.unflatten(-3, (self.image_shape[0], self.factor, self.factor))  # channel, a, b, i, j
        squares = squares.transpose(-3, -2).transpose(-4, -3).transpose(-2, -1)  # channel, i, a, j, b
        return squares.reshape(x.shape[:-3] + self.image_shape), x.new_zeros(()).expand(x.shape[:-3])

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        squares = y.unflatten(-1, (-1, self.factor)).unflatten(-3, (-1, self.factor))
        squares = squares.transpose(-2, -1).transpose(-4, -3).transpose(-3, -2)
        return squares.flatten(-5, -3), y.new_zeros(()).expand(y.shape[:-3])

    def extra_repr(self) -> str:
        """Shape of the image and the factor, for ``repr``."""
        return f"{tuple(self.image_shape)}, factor={self.factor}"


class MultiScale(_OntoImages):
    """Images from a flat latent, level by level: after each level but the last half of the channels are latents.

    From data to base, level by level from the first on: the image goes through the level; of the c channels that come
    out, the first c - c // 2 are the image of the next level and the last c // 2 go into the latent. The
    last level keeps all. log|det dy/dx| is the sum over the levels.

    The flat latent holds the pieces of the last, coarsest level first and those of the first, finest level last, each
    in the order channel, row, column. ``split`` and ``merge`` go between the latent and its pieces.

    A level is any transform of images whose y side has the shape of its image; its x side may have another, as in
    ``ComposeFlow([*layers after squeezing, Squeeze(shape), *layers before])`` (base side first). With only the first
    kind of layers that is a level of Glow, with both one of RealNVP.

    Args:
        levels: transforms of images, each between events of rank 3; the first one, next to the data, is the finest.

    Raises:
        ValueError: for no level, a level that is no ``FlowTransform`` of images of known shape, levels that do not fit
            together, or one channel that would have to be halved.

    Source: Density estimation using Real NVP (Dinh et al., 2017), section 3.6.

    >>> flow = MultiScale([Squeeze((1, 4, 6)), Squeeze((2, 2, 3), factor=1)])
    >>> flow(torch.zeros(5, 24)).shape, [tuple(piece) for piece in flow.piece_shapes]
    (torch.Size([5, 1, 4, 6]), [(2, 2, 3), (2, 2, 3)])
    """

    def __init__(self, levels: Sequence[FlowTransform], *, cache_size: int = 1) -> None:
        shapes = [_shapes(index, level) for index, level in enumerate(levels)]
        if not shapes:
            raise ValueError("MultiScale needs at least one level, got none; a level is a transform of images")
        self.piece_shapes = list(reversed(_factor_out(shapes)))
        super().__init__((sum(p.numel() for p in self.piece_shapes),), shapes[0][1], cache_size=cache_size)
        self.levels: Any = nn.ModuleList(levels)
        self.batch_shape = torch.broadcast_shapes(*(level.batch_shape for level in levels))

    @property
    def sign(self) -> int:
        sign = 1  # channels come first, so joining them is joining the flat pieces: no reordering
        for level in self.levels:
            sign = sign * level.sign
        return sign

    def split(self, x: Tensor) -> list[Tensor]:
        """The pieces of a flat latent, coarsest first. Shapes: batch + those in ``piece_shapes``."""
        pieces = x.split([shape.numel() for shape in self.piece_shapes], -1)
        return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, self.piece_shapes, strict=True)]

    def merge(self, pieces: Sequence[Tensor]) -> Tensor:
        """The flat latent of these pieces, coarsest first. Shape: batch + (C * H * W,)."""
        return torch.cat([piece.flatten(-3) for piece in pieces], -1)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch_shape = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)
        pieces = self.split(x.expand(*batch_shape, -1))
        y, total = pieces[0], x.new_zeros(())
        for index, level in enumerate(reversed(self.levels)):
            y, log_det = level._forward(torch.cat([y, pieces[index]], -3) if index else y)
            total = total + log_det
        return y, total

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        batch_shape = torch.broadcast_shapes(y.shape[:-3], self.batch_shape)
        x, total, pieces = y.expand(*batch_shape, -1, -1, -1), y.new_zeros(()), []
        for level, piece_shape in zip(self.levels, self.piece_shapes[::-1], strict=True):
            x, log_det = level._backward(x)
            total = total + log_det
            x, piece = x.split((x.shape[-3] - piece_shape[0], piece_shape[0]), -3)
            pieces.append(piece)
        return self.merge(pieces[::-1]), total


class ConditionalMultiScale(ConditionalTransformModule):
    """``MultiScale`` with levels that depend on a context: ``condition(context)`` gives the ``MultiScale`` there.

    It shares all parameters with this module, and its batch shape is that of the context.

    Args:
        levels: as of ``MultiScale``; each may be conditional, such as a ``ConditionalComposeFlow``.

    Raises:
        ValueError: from ``condition``, as from ``MultiScale``.

    >>> from pyro_affine.conditioners import MLP
    >>> from pyro_affine.coupling import ConditionalAffineCoupling
    >>> from pyro_affine.masks import checkerboard_mask
    >>> mask = checkerboard_mask(2, 2)[None]
    >>> flow = ConditionalMultiScale([ConditionalAffineCoupling(mask, MLP(2, 2, context_dim=3))])
    >>> flow.condition(torch.zeros(7, 3))(torch.zeros(4)).shape
    torch.Size([7, 1, 2, 2])
    """

    bijective = True

    def __init__(self, levels: Sequence[nn.Module], *, cache_size: int = 1) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self._options = {"cache_size": cache_size}

    @property
    def domain(self) -> constraints.Constraint:
        """Real vectors."""
        return constraints.real_vector

    @property
    def codomain(self) -> constraints.Constraint:
        """Real images."""
        return constraints.independent(constraints.real, 3)

    def condition(self, context: Tensor) -> MultiScale:
        """The transform at this context. Context shape: batch + (context_dim,)."""
        levels: list[Any] = list(self.levels)
        at_context = [lev if isinstance(lev, FlowTransform) else lev.condition(context) for lev in levels]
        flow = MultiScale(at_context, **self._options)
        flow.batch_shape = torch.broadcast_shapes(flow.batch_shape, context.shape[:-1])
        return flow


def _require_image(shape: Sequence[int]) -> Size:
    shape = Size([shape] if isinstance(shape, int) else shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"images have shape (C, H, W) with one entry at least, got {tuple(shape)}; for grey use C = 1")
    return shape


def _shapes(index: int, level: FlowTransform) -> tuple[Size, Size]:
    """Shape of an event on the x side and on the y side of a level."""
    shape = level.event_shape if isinstance(level, FlowTransform) else None
    if shape is None or (len(shape), level.codomain.event_dim) != (3, 3):
        raise ValueError(
            f"a level must be a FlowTransform between images of known shape, got {type(level).__name__} as level "
            f"{index} with event_shape={shape if shape is None else tuple(shape)}; put its layers into a ComposeFlow, "
            "one of them with event_shape=(C, H, W)"
        )
    return shape, level.forward_shape(shape)[-3:]


def _factor_out(shapes: list[tuple[Size, Size]]) -> list[Size]:
    """Shape of the piece that each level leaves in the latent, the first level first."""
    pieces = []
    for index, (squeezed, _) in enumerate(shapes[:-1]):
        channels, *pixels = squeezed
        if channels < 2:
            raise ValueError(
                f"a level must leave two channels or more to be halved, got {tuple(squeezed)} out of level {index}; "
                "begin its base side with a Squeeze"
            )
        wanted, found = Size([channels - channels // 2, *pixels]), shapes[index + 1][1]
        if found != wanted:
            raise ValueError(
                f"level {index + 1} must take images of shape {tuple(wanted)}, what level {index} leaves over, got one "
                f"for {tuple(found)}; build it for that shape"
            )
        pieces.append(Size([channels // 2, *pixels]))
    return [*pieces, shapes[-1][0]]


def _common_divisor(height: int, width: int) -> str:
    divisors = [str(d) for d in range(2, min(height, width) + 1) if height % d == 0 and width % d == 0]
    return " or ".join(divisors[:3]) or "1, which leaves them as they are"


def _num_pairs(size: int) -> int:
    return size * (size - 1) // 2
