"""Activation normalisation: a trained scale and shift for each channel, started from data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Size, Tensor, nn

from pyro_affine.transform import FlowTransform

_ROUNDINGS = 8  # a channel whose standard deviation is this many roundings of its largest value has no spread


class ActNorm(FlowTransform):
    """Affine map with one scale and one shift for each channel of an image, or each entry of a vector.

    y = x * exp(log_scale) + shift,  log|det dy/dx| = (entries of a channel) * sum log_scale.

    It is the identity until ``initialize(data)`` sets shift and log_scale to the means and log standard deviations
    of y, so that x, on the base side, has mean 0 and standard deviation 1 in each channel. From there on both are
    trained. No call of the layer changes them, in training mode or not. ``initialized`` is a buffer: a reloaded
    layer knows.

    Args:
        event_shape: shape of one event, or its number of entries: the first dimension counts the channels, as in
            (C, H, W); in (D,) each entry is a channel of its own.

    Raises:
        ValueError: for an event of no entry.

    Source: Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma and Dhariwal, 2018), section 3.1.

    >>> layer = ActNorm((1, 1, 2))
    >>> layer.initialize(torch.tensor([[[[1.0, 3.0]]], [[[1.0, 3.0]]]]))
    >>> layer.shift.flatten()
    tensor([2.], grad_fn=<ViewBackward0>)
    """

    initialized: Tensor
    _awaits_data = False

    def __init__(self, event_shape: int | Sequence[int], *, cache_size: int = 1) -> None:
        shape = Size([event_shape] if isinstance(event_shape, int) else event_shape)
        if not shape or min(shape) < 1:
            raise ValueError(
                f"an event needs one dimension and one entry at least, got {tuple(shape)}; use (C, H, W) or (D,)"
            )
        super().__init__(shape, cache_size=cache_size)
        channels = (shape[0], *[1] * (len(shape) - 1))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, data: Tensor) -> None:
        """Set shift and log_scale such that these data, on the y side, become standardised on the x side.

        Args:
            data: values of y, at least two for each channel. Shape: batch + event_shape.

        Raises:
            ValueError: for data of another shape, or a channel that is not finite or has no spread, which is named.
        """
        rank = len(self.event_shape or ())
        self._check(data, self.inverse_shape)
        values = data.double().flatten(0, data.dim() - rank - 1) if data.dim() > rank else data.double()[None]
        values = values.transpose(0, 1).flatten(1)
        if values.shape[1] < 2:
            raise ValueError(
                f"data must hold two values for each channel, got a tensor of shape {tuple(data.shape)}; give a batch"
            )
        mean, spread = values.mean(1), values.std(1)
        rounding = _ROUNDINGS * torch.finfo(data.dtype).eps * values.abs().amax(1)
        _require_spread(spread, rounding)
        self.shift.copy_(mean.reshape(self.shift.shape))
        self.log_scale.copy_(spread.log().reshape(self.log_scale.shape))
        self.initialized.fill_(True)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp() + self.shift, self._log_det(x)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if self._awaits_data:
            self.initialize(y)
        return (y - self.shift) * (-self.log_scale).exp(), self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        shape = self.event_shape or Size()
        return (self.log_scale.sum() * shape[1:].numel()).expand(x.shape[: x.dim() - len(shape)])

    def extra_repr(self) -> str:
        """Event shape, for ``repr``."""
        return f"{tuple(self.event_shape or ())}"


@torch.no_grad()
def initialize_actnorms(transform: FlowTransform, data: Tensor) -> Tensor:
    """Initialise each ``ActNorm`` in a flow from the data as they arrive at it; those that are initialised stay.

    The data run once from the data side to the base side, through chains and whatever else holds layers; so each
    ``ActNorm`` sees them as mapped back by the layers after it.

    Args:
        transform: the flow; a conditional one is conditioned first, on one context for each event.
        data: values of y. Shape: batch + event_shape.

    Returns:
        The data on the base side, x = t.inv(data).

    Raises:
        ValueError: as from ``ActNorm.initialize``; for an ``ActNorm`` that data never reach from its y side.

    >>> from torch.distributions import AffineTransform
    >>> from pyro_affine.compose import ComposeFlow
    >>> flow = ComposeFlow([ActNorm(2), AffineTransform(0.0, 10.0, event_dim=1)])
    >>> x = initialize_actnorms(flow, torch.tensor([[0.0, 20.0], [20.0, 80.0]]))
    >>> flow.parts[0].shift.data
    tensor([1., 5.])
    """
    transform._check(data, transform.inverse_shape)
    waiting = [m for m in transform.modules() if isinstance(m, ActNorm) and not m.initialized]
    try:
        for layer in waiting:
            layer._awaits_data = True
        x, _ = transform._backward(data)
    finally:
        for layer in waiting:
            del layer._awaits_data
    unseen = [layer for layer in waiting if not layer.initialized]
    if unseen:
        raise ValueError(
            f"data must reach each ActNorm from its y side, got {len(unseen)} that they do not, such as one in an "
            "inverse; call initialize of such a layer with the values on its y side first"
        )
    return x


def _require_spread(spread: Tensor, rounding: Tensor) -> None:
    bad = ~(spread.isfinite() & (spread > rounding))
    if bad.any():
        channel = int(bad.nonzero()[0])
        raise ValueError(
            f"each channel must be finite and vary, got standard deviation {spread[channel].item():g} in channel "
            f"{channel} of {len(spread)}; drop the channel, add noise to it (dequantise), or give more data"
        )
