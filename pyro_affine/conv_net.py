"""Conditioners for images: convolutional networks under the contract of ``conditioners``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Size, Tensor, nn

from pyro_affine.conditioners import _make_activation, _VectorConditioner
from pyro_affine.convolutions import ImageContext, ImageNetwork, Residual, VectorContext, convolution, start_at_zero
from pyro_affine.partition import Partition

__all__ = ["ConvNet", "ResidualConvNet"]


class _ImageConditioner(_VectorConditioner):
    """What the networks for images share: from flat kept entries to an image, and from its outputs to flat results."""

    def __init__(
        self,
        mask: Tensor,
        event_shape: Sequence[int] | None,
        context_dim: int,
        context_shape: Sequence[int] | None,
    ) -> None:
        shape = Size(mask.shape if event_shape is None else event_shape)
        if len(shape) != 3:
            raise ValueError(
                f"images have event shape (C, H, W), got {tuple(shape)}; give event_shape=(C, H, W) beside a mask that "
                "broadcasts, and for vectors use MLP"
            )
        partition = Partition(mask, shape)
        if partition.num_kept == 0:
            raise ValueError(
                "mask must keep some entry for a convolution to read, got none kept (True = kept); keep some, or use "
                "MLP with a context"
            )
        super().__init__(partition.num_kept, partition.num_moved, _context_size(context_dim, context_shape))
        self.partition = partition
        self.context_shape = None if context_shape is None else Size(context_shape)
        channels = partition.mask.flatten(1)
        self.by_channel = bool((channels == channels[:, :1]).all())
        self.num_read = int(channels[:, 0].sum()) if self.by_channel else shape[0]
        self.num_written = shape[0] - self.num_read if self.by_channel else shape[0]

    def forward(self, kept: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As of ``MLP``; the results have the dtype of ``kept``, under autocast too."""
        if not torch.jit.is_tracing():  # type: ignore[attr-defined]
            self._check_kept(kept)
            self._check_context(kept, context)
        image = self._image(kept)
        results = self._moved(self.network(image, context).to(kept.dtype))
        if self.raw_network is not None:
            results += self._moved(self.raw_network(image, context).to(kept.dtype))
        return results[0], None if self.shift_only else results[1]

    def _image(self, kept: Tensor) -> Tensor:
        """The kept channels; or, where the mask cuts through channels, the whole image with zeros for what moves."""
        if self.by_channel:
            image: Tensor = kept.unflatten(-1, (self.num_read, *self.partition.event_shape[1:]))
            return image
        return self.partition.merge(kept, kept.new_zeros((*kept.shape[:-1], self.output_dim)))

    def _moved(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Each result of a network at the entries that move, flat."""
        results = outputs.unflatten(-3, (-1, self.num_written))
        flat = results.flatten(-3) if self.by_channel else self.partition.split(results)[1]
        shift_and_raw: tuple[Tensor, ...] = flat.unbind(-2)
        return shift_and_raw

    def _network(self, hidden_channels: int, layers: list[nn.Module], weight_norm: bool) -> nn.Module:
        """A convolution of image and context, then ``layers``, of which the last starts at zero."""
        reader: nn.Module | None = None
        if self.context_shape is not None:
            reader = ImageContext(self.context_shape, hidden_channels, self.partition.event_shape[1:])
        elif self.context_dim:
            reader = VectorContext(self.context_dim, hidden_channels)
        start_at_zero(layers[-1])
        return ImageNetwork(convolution(self.num_read, hidden_channels, 3, weight_norm), reader, layers)

    def _check_kept(self, kept: Tensor) -> None:
        if kept.shape[-1:] != (self.input_dim,):
            raise ValueError(
                f"{type(self).__name__} reads kept entries of images {tuple(self.partition.event_shape)} as vectors, "
                f"shape batch + ({self.input_dim},), got {tuple(kept.shape)}; build it with the mask and event shape "
                "of the coupling"
            )


class ConvNet(_ImageConditioner):
    """Convolutional network that emits the shift and raw scale of a coupling on images.

    hidden = 3x3 convolution of the image (plus a linear map of the context); then activation, 1x1 convolution,
    activation, and a 3x3 convolution that starts at zero. The size of the image stays, its borders are padded by
    zeros.

    Of a mask that keeps whole channels, the network reads the kept channels and computes only the others. Of any
    other mask, such as a checkerboard, it reads the image with zeros at the places that move, and its results at
    kept places are dropped.

    Args:
        mask: that of the coupling: boolean, True = kept, broadcastable to the event.
        event_shape: shape of one image, (C, H, W); default: the shape of the mask.
        hidden_channels: number of channels of both hidden layers.
        context_dim: size of a context vector, 0 for none.
        context_shape: shape of a context image, (C', H', W'), in place of ``context_dim``. The context comes flat,
            shape: batch + (C' * H' * W',); where its size is not that of the event, it is averaged to that size.
        activation: class or factory of a module, called without arguments once for each hidden layer. The default
            SiLU is smooth.
        weight_norm: True keeps length and direction of each filter as separate parameters.
        separate: True builds two networks, one for each result; False one network with both.
        shift_only: True emits no raw scale, for ``AdditiveScale``; ``separate`` then changes nothing.

    Raises:
        ValueError: for an event that is no image, a mask that does not fit or keeps nothing, a size out of range,
            or if ``activation`` does not make a module.

    Source: Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma and Dhariwal, 2018), without the
    normalisation inside; weight normalisation: Salimans and Kingma (2016).

    >>> from pyro_affine.coupling import AffineCoupling
    >>> from pyro_affine.masks import checkerboard_mask
    >>> mask, shape = checkerboard_mask(8, 6), (3, 8, 6)
    >>> layer = AffineCoupling(mask, ConvNet(mask, shape, 16), event_shape=shape)
    >>> layer(torch.ones(5, 3, 8, 6)).shape
    torch.Size([5, 3, 8, 6])
    """

    def __init__(
        self,
        mask: Tensor,
        event_shape: Sequence[int] | None = None,
        hidden_channels: int = 64,
        *,
        context_dim: int = 0,
        context_shape: Sequence[int] | None = None,
        activation: Callable[[], nn.Module] = nn.SiLU,
        weight_norm: bool = False,
        separate: bool = False,
        shift_only: bool = False,
    ) -> None:
        super().__init__(mask, event_shape, context_dim, context_shape)
        _require_positive(hidden_channels=hidden_channels)

        def make_network(num_outputs: int) -> nn.Module:
            num_written = num_outputs // self.output_dim * self.num_written
            layers = [
                _make_activation(activation),
                convolution(hidden_channels, hidden_channels, 1, weight_norm),
                _make_activation(activation),
                convolution(hidden_channels, num_written, 3, weight_norm),
            ]
            return self._network(hidden_channels, layers, weight_norm)

        self._build(make_network, separate, shift_only)


class ResidualConvNet(_ImageConditioner):
    """Residual convolutional network that emits the shift and raw scale of a coupling on images.

    hidden = 3x3 convolution of the image (plus a linear map of the context); then ``num_blocks`` times
    hidden + conv(activation(conv(activation(hidden)))), both 3x3; then an activation and a 1x1 convolution that
    starts at zero. Each result sees 4 * num_blocks + 3 pixels across. Masks and borders as in ``ConvNet``.

    Args:
        num_blocks: number of residual blocks, two convolutions each.
        mask, event_shape, hidden_channels, context_dim, context_shape, activation, weight_norm, separate, shift_only:
            as in ``ConvNet``.

    Raises:
        ValueError: as of ``ConvNet``.

    Source: Density estimation using Real NVP (Dinh et al., 2017), without its batch normalisation.

    >>> from pyro_affine.masks import channel_mask
    >>> conditioner = ResidualConvNet(channel_mask(3), (3, 4, 4), 8, context_dim=2)
    >>> shift, raw = conditioner(torch.ones(100, 7, 1 * 4 * 4), torch.ones(7, 2))
    >>> shift.shape, raw.shape
    (torch.Size([100, 7, 32]), torch.Size([100, 7, 32]))
    """

    def __init__(
        self,
        mask: Tensor,
        event_shape: Sequence[int] | None = None,
        hidden_channels: int = 64,
        num_blocks: int = 2,
        *,
        context_dim: int = 0,
        context_shape: Sequence[int] | None = None,
        activation: Callable[[], nn.Module] = nn.SiLU,
        weight_norm: bool = False,
        separate: bool = False,
        shift_only: bool = False,
    ) -> None:
        super().__init__(mask, event_shape, context_dim, context_shape)
        _require_positive(hidden_channels=hidden_channels, num_blocks=num_blocks)

        def make_block() -> nn.Module:
            layers: list[nn.Module] = []
            for _ in range(2):
                layers += [_make_activation(activation), convolution(hidden_channels, hidden_channels, 3, weight_norm)]
            return Residual(*layers)

        def make_network(num_outputs: int) -> nn.Module:
            num_written = num_outputs // self.output_dim * self.num_written
            layers: list[nn.Module] = [make_block() for _ in range(num_blocks)]
            layers += [_make_activation(activation), convolution(hidden_channels, num_written, 1, weight_norm)]
            return self._network(hidden_channels, layers, weight_norm)

        self._build(make_network, separate, shift_only)


def _require_positive(**sizes: int) -> None:
    if min(sizes.values()) < 1:
        raise ValueError(f"{' and '.join(sizes)} must be 1 or more, got {sizes}; the default is a good start")


def _context_size(context_dim: int, context_shape: Sequence[int] | None) -> int:
    if context_shape is None:
        return context_dim
    size = Size(context_shape).numel()
    if len(context_shape) != 3 or size < 1 or context_dim not in (0, size):
        raise ValueError(
            "a context is a vector of context_dim entries or an image of context_shape (C, H, W), got context_dim="
            f"{context_dim} and context_shape={tuple(context_shape)}; give one of the two"
        )
    return size
