"""Between the bytes of an image and unconstrained numbers, and the unit in which image densities are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyro_affine.transform import FlowTransform


def dequantize(images: Tensor, levels: int = 256, *, generator: torch.Generator | None = None) -> Tensor:
    """Integer grey levels as floats in [0, 1), with uniform noise that fills the gap to the next level.

    y = (images + u) / levels,  u uniform in [0, 1). A density of y then bounds the probability of the integers: the
    mean of log p(y) + D log(1 / levels) over u is at most log P(images), D = number of entries. Each y stays below the
    next level also where the sum rounds up, so ``(y * levels).floor()`` gives the integers back if levels is a
    power of 2.

    Args:
        images: integers from 0 to levels - 1, such as bytes. Any shape.
        levels: number of grey levels.
        generator: draws the noise; default: torch's global one. Draw it anew for each pass over the data.

    Returns:
        Floats of the default dtype, same shape.

    Raises:
        ValueError: for images that are not integers or out of range, or fewer than 2 levels.

    Source: RNADE: the real-valued neural autoregressive density-estimator (Uria et al., 2013); A note on the
    evaluation of generative models (Theis et al., 2016).

    >>> y = dequantize(torch.tensor([0, 255], dtype=torch.uint8), generator=torch.Generator().manual_seed(0))
    >>> (y * 256).floor()
    tensor([  0., 255.])
    """
    _require_levels(levels)
    if images.is_floating_point() or images.is_complex() or images.dtype == torch.bool:
        raise ValueError(
            f"images must be integers from 0 to {levels - 1}, got {images.dtype}; floats need no noise if they are "
            "measured so, else turn them into integers by (images * (levels - 1)).round().long()"
        )
    lowest, highest = (int(images.min()), int(images.max())) if images.numel() else (0, 0)
    if lowest < 0 or highest >= levels:
        raise ValueError(
            f"images must lie between 0 and {levels - 1}, got {lowest} to {highest}; pass the "
            "number of grey levels, such as levels=17 for 0 to 16"
        )
    floats = images.to(torch.get_default_dtype())
    noise = torch.rand(images.shape, generator=generator, dtype=floats.dtype, device=images.device)
    below_next = torch.nextafter((floats + 1) / levels, torch.zeros_like(floats))
    return torch.minimum((floats + noise) / levels, below_next)


class LogitImages(FlowTransform):
    """Elementwise map from all reals onto images in [0, 1] and a margin: the last layer of a flow of images.

    y = (sigmoid(x) - alpha) / (1 - 2 alpha),  log|dy/dx| = log sigmoid(x) + log sigmoid(-x) - log(1 - 2 alpha).

    So 0 and 1 are reached at finite x = -+ log((1 - alpha) / alpha), and black and white pixels have a finite density.
    The codomain is the interval from -alpha / (1 - 2 alpha) to (1 - alpha) / (1 - 2 alpha), a little more than
    [0, 1]: samples may be slightly darker than black. Clamp them for the eye, not before scoring. From y the logit
    is taken of alpha + (1 - 2 alpha) y and of its complement, each by itself, so both ends are alike in
    precision.

    Args:
        alpha: margin, between 0 and 0.5; 0.05 in the source, 1e-6 for MNIST in later work. Log-densities of images in
            [0, 1] compare across alphas.
        event_shape: shape of one image, such as (C, H, W).

    Raises:
        ValueError: for an alpha out of range.

    Source: Density estimation using Real NVP (Dinh et al., 2017), section 4.1; the two-sided margin from Masked
    Autoregressive Flow for Density Estimation (Papamakarios et al., 2017).

    >>> layer = LogitImages(0.25, (1, 1, 3))
    >>> layer.inv(torch.tensor([[[0.0, 0.5, 1.0]]]))
    tensor([[[-1.0986,  0.0000,  1.0986]]])
    """

    def __init__(self, alpha: float, event_shape: Sequence[int], *, cache_size: int = 1) -> None:
        super().__init__(tuple(event_shape), cache_size=cache_size)
        if not 0 < alpha < 0.5:
            raise ValueError(
                f"alpha must lie between 0 and 0.5, got {alpha}; with 0 black and white pixels would be infinitely far "
                "away, take 1e-6 for a narrow margin"
            )
        self.alpha = alpha

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(constraints.interval(*self._ends()), len(self.event_shape or ()))

    def _ends(self) -> tuple[float, float]:
        return -self.alpha / (1 - 2 * self.alpha), (1 - self.alpha) / (1 - 2 * self.alpha)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = (x.sigmoid() - self.alpha) / (1 - 2 * self.alpha)
        return y.clamp(*self._ends()), self._log_det(-softplus(x) - softplus(-x))  # rounding alone can pass an end

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        width = 1 - 2 * self.alpha
        up, down = (self.alpha + width * y).log(), (self.alpha + width * (1 - y)).log()  # log sigmoid of x and of -x
        return up - down, self._log_det(up + down)

    def _log_det(self, log_slope: Tensor) -> Tensor:
        """From the log-slope of the sigmoid, entry by entry."""
        log_slope, rank = log_slope - math.log1p(-2 * self.alpha), len(self.event_shape or ())
        return log_slope.flatten(log_slope.dim() - rank).sum(-1) if rank else log_slope

    def extra_repr(self) -> str:
        """Margin and event shape, for ``repr``."""
        return f"alpha={self.alpha:g}, {tuple(self.event_shape or ())}"


def bits_per_dim(log_prob: Tensor, event_shape: Sequence[int], levels: int = 256) -> Tensor:
    """Negative log-likelihood of grey levels per entry of an image, in bits.

    From the log-density of images scaled to [0, 1]:  (log(levels) - log_prob / D) / log(2),  D = number of entries.
    One grey level is 1 / levels wide, so a uniform density costs log2(levels) bits: 8 for bytes.

    Args:
        log_prob: log-densities of images in [0, 1], in nats, as from ``NormalizingFlow.log_prob`` for what
            ``dequantize`` gives. Shape: batch.
        event_shape: shape of one image, such as (C, H, W).
        levels: number of grey levels.

    Returns:
        Bits per dimension; lower is better. Shape: batch.

    Raises:
        ValueError: for fewer than 2 levels, or an event of no entry.

    Source: Density estimation using Real NVP (Dinh et al., 2017), section 4.

    >>> bits_per_dim(torch.tensor([0.0, 48.0]).log1p(), (3, 1, 1), levels=2)
    tensor([ 1.0000, -0.8716])
    """
    _require_levels(levels)
    num_entries = math.prod(event_shape)
    if num_entries < 1:
        raise ValueError(f"an event needs one entry at least, got {tuple(event_shape)}; pass the shape of one image")
    return (math.log(levels) - log_prob / num_entries) / math.log(2)


def _require_levels(levels: int) -> None:
    if levels < 2:
        raise ValueError(f"levels must be 2 or more, got {levels}; bytes have 256, black and white images 2")
