"""Pieces of convolutional networks: batches of any rank, contexts, weight normalisation, residual blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F


class ImageNetwork(nn.Module):
    """A convolution of the image, the context added to it, then ``layers``; batches of any rank.

    Args:
        from_image: first convolution.
        from_context: what makes an image, or one value for each channel, of the context; None for no context.
        layers: the rest.

    >>> network = ImageNetwork(convolution(1, 4, 3), VectorContext(2, 4), [nn.SiLU(), convolution(4, 1, 1)])
    >>> network(torch.zeros(100, 7, 1, 5, 5), torch.zeros(7, 2)).shape
    torch.Size([100, 7, 1, 5, 5])
    """

    def __init__(self, from_image: nn.Module, from_context: nn.Module | None, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.from_image, self.from_context = from_image, from_context
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor, context: Tensor | None) -> Tensor:
        """The last layer's images. Shapes: batch + (C, H, W), context_batch + (context_dim,)."""
        hidden = _over_batch(self.from_image, image)
        if self.from_context is not None:
            hidden = hidden + self.from_context(context)
        return _over_batch(self.layers, hidden)


class VectorContext(nn.Linear):
    """One linear map of the context, the same at each pixel. Result shape: batch + (hidden_channels, 1, 1)."""

    def __init__(self, context_dim: int, hidden_channels: int) -> None:
        super().__init__(context_dim, hidden_channels, bias=False)

    def forward(self, context: Tensor) -> Tensor:
        """Context shape: batch + (context_dim,)."""
        return super().forward(context)[..., None, None]


class ImageContext(nn.Module):
    """A 3x3 convolution of a flat context image, averaged to the size of the event first where it has another."""

    def __init__(self, context_shape: Size, hidden_channels: int, image_size: Size) -> None:
        super().__init__()
        self.context_shape, self.image_size = context_shape, image_size
        self.conv = nn.Conv2d(context_shape[0], hidden_channels, 3, padding=1, bias=False)

    def forward(self, context: Tensor) -> Tensor:
        """Context shape: batch + (context_dim,); result: batch + (hidden_channels, H, W)."""
        return _over_batch(self._read, context.unflatten(-1, self.context_shape))

    def _read(self, image: Tensor) -> Tensor:
        if image.shape[-2:] != self.image_size:
            image = F.adaptive_avg_pool2d(image, (self.image_size[0], self.image_size[1]))
        result: Tensor = self.conv(image)
        return result


class Residual(nn.Sequential):
    """image + layers(image)."""

    def forward(self, image: Tensor) -> Tensor:
        """Shape of the image: as the layers take it, and leave it."""
        result: Tensor = image + super().forward(image)
        return result


class WeightNormConv2d(nn.Conv2d):
    """Convolution whose filters are gain * weight / |weight|. A layer under torch's own weight_norm cannot be pickled.

    Source: Weight Normalization (Salimans and Kingma, 2016).
    """

    def __init__(self, num_inputs: int, num_outputs: int, size: int) -> None:
        super().__init__(num_inputs, num_outputs, size, padding=size // 2)
        self.gain = nn.Parameter(self._length().detach())

    def _length(self) -> Tensor:
        return self.weight.square().sum((1, 2, 3), keepdim=True).sqrt()

    def forward(self, image: Tensor) -> Tensor:
        """Shape: (B, C, H, W)."""
        result: Tensor = self._conv_forward(image, self.weight * (self.gain / self._length()), self.bias)
        return result


def convolution(num_inputs: int, num_outputs: int, size: int, weight_norm: bool = False) -> nn.Conv2d:
    """A convolution that leaves the size of the image as it is; the borders are padded by zeros."""
    if weight_norm:
        return WeightNormConv2d(num_inputs, num_outputs, size)
    return nn.Conv2d(num_inputs, num_outputs, size, padding=size // 2)


@torch.no_grad()
def start_at_zero(conv: nn.Module) -> None:
    """Let a convolution return zeros until it is trained."""
    for name, parameter in conv.named_parameters():
        if not (name == "weight" and isinstance(conv, WeightNormConv2d)):  # of which only the direction counts
            parameter.zero_()


def _over_batch(function: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    results = function(image.reshape(-1, *image.shape[-3:]))  # conv2d takes one batch dim: (B, C, H, W)
    return results.reshape(*image.shape[:-3], *results.shape[1:])
