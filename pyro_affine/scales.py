"""Scale maps: from the raw output of a conditioner to the log-scale of an affine coupling.

The scale is always ``exp(log_scale)``, so forward, inverse and log-determinant cannot disagree. A raw output
of 0 gives the log-scale 0: a flow whose conditioners end in zeros starts at the identity. Each map is
elementwise and monotone, with true derivatives everywhere: no hard clamp, no straight-through gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "AdditiveScale", "AtanScale", "ExpScale", "ScaleMap", "SigmoidScale", "SoftplusScale", "TanhScale",
]  # fmt: skip

# exp(-40) is lost beside 1 in float64: past 40, softplus(r) = r; before -40, log softplus(r) = r.
_SOFTPLUS_TAIL = 40.0


class ScaleMap(nn.Module):
    """Base class of the maps from a raw output to a log-scale, elementwise: ``forward(raw) -> log_scale``.

    Attributes:
        uses_raw: False if the log-scale does not depend on ``raw``; the conditioner then need not compute it.
        range: lower and upper end of the scale (not of the log-scale).
    """

    uses_raw: bool = True
    range: tuple[float, float] = (0.0, math.inf)

    def forward(self, raw: Tensor) -> Tensor:
        """Log-scale of a raw output, same shape as ``raw``."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(raw) -> log_scale")


class ExpScale(ScaleMap):
    """Unbounded log-scale.

    log_scale = raw,  scale in (0, inf).

    A few layers of it can overflow; :class:`TanhScale` and :class:`AtanScale` bound what one layer can do.

    Source: Density estimation using Real NVP (Dinh et al., 2017).

    >>> ExpScale()(torch.tensor([-1.0, 0.0, 5.0]))
    tensor([-1.,  0.,  5.])
    """

    def forward(self, raw: Tensor) -> Tensor:
        """Log-scale of a raw output, the tensor itself."""
        return raw


class TanhScale(ScaleMap):
    """Log-scale bounded by a hyperbolic tangent.

    log_scale = bound * tanh(raw / bound),  scale in (exp(-bound), exp(bound)),  slope 1 at 0.

    Args:
        bound: largest absolute log-scale. The default 2.0 keeps the scale within [0.14, 7.4] per layer.

    Raises:
        ValueError: if ``bound`` is not positive, or its exp is not finite.

    Source: Density estimation using Real NVP (Dinh et al., 2017), with the slope at 0 set to 1.

    >>> TanhScale(bound=2.0)(torch.tensor([-100.0, 0.0, 100.0]))
    tensor([-2.,  0.,  2.])
    """

    def __init__(self, bound: float = 2.0) -> None:
        super().__init__()
        self.bound = _checked_bound("bound", bound)
        self.range = (math.exp(-self.bound), math.exp(self.bound))

    def forward(self, raw: Tensor) -> Tensor:
        """Log-scale of a raw output, same shape as ``raw``."""
        return torch.tanh(raw / self.bound) * self.bound

    def extra_repr(self) -> str:
        """Parameters of the map, as its constructor takes them."""
        return f"bound={self.bound}"


class AtanScale(ScaleMap):
    """Log-scale bounded by an arc tangent, with one bound for growing and one for shrinking.

    log_scale = (2 a / pi) * atan(pi * raw / (2 a)),  a = upper for raw >= 0, a = lower for raw < 0,
    scale in (exp(-lower), exp(upper)),  slope 1 at 0 from both sides: twice continuously differentiable.

    The gradient fades as 1 / raw^2, more slowly than that of :class:`TanhScale`. With
    ``lower=2.0, upper=0.1`` a deep flow can shrink a lot but grow only a little per layer.

    Args:
        lower: the log-scale stays above ``-lower``. The default 2.0 keeps the scale above 0.14 per layer.
        upper: the log-scale stays below ``upper``. The default 2.0 keeps the scale below 7.4 per layer.

    Raises:
        ValueError: if a bound is not positive, or its exp is not finite.

    Source: Andrade (2024), doi 10.1088/2632-2153/ad9a39, for the two bounds; Guided Image Generation with
    Conditional Invertible Neural Networks (Ardizzone et al., 2019) for the soft clamp. There the argument is
    raw / a and the slope at 0 is 2 / pi.

    >>> AtanScale(lower=2.0, upper=0.5)(torch.tensor([-1e6, 0.0, 1e6]))
    tensor([-2.0000,  0.0000,  0.5000])
    """

    def __init__(self, lower: float = 2.0, upper: float = 2.0) -> None:
        super().__init__()
        self.lower = _checked_bound("lower", lower)
        self.upper = _checked_bound("upper", upper)
        self.range = (math.exp(-self.lower), math.exp(self.upper))

    def forward(self, raw: Tensor) -> Tensor:
        """Log-scale of a raw output, same shape as ``raw``."""
        gain = math.pi / (2 * self.upper)
        if self.lower == self.upper:
            return torch.atan(raw * gain) / gain
        # leaky_relu gives each side its gain: half the time of two branches, and no where to spoil gradients
        angle = torch.atan(F.leaky_relu(raw * gain, self.upper / self.lower))
        return F.leaky_relu(angle / gain, self.lower / self.upper)

    def extra_repr(self) -> str:
        """Parameters of the map, as its constructor takes them."""
        return f"lower={self.lower}, upper={self.upper}"


class SigmoidScale(ScaleMap):
    """Scale between two bounds by a logistic function.

    log_scale = log(min_scale + (max_scale - min_scale) * sigmoid(raw + offset)),
    offset = log((1 - min_scale) / (max_scale - 1)), so that raw = 0 gives scale 1,
    scale in (min_scale, max_scale).

    Args:
        min_scale: lower end of the scale, in (0, 1). The default 0.001 hardly binds: it keeps the inverse
            finite.
        max_scale: upper end of the scale, above 1. The default 10.0 lets a layer widen, which the scale of
            Glow, a sigmoid and so below 1, cannot.

    Raises:
        ValueError: unless 0 < ``min_scale`` < 1 < ``max_scale`` < inf.

    Source: Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma and Dhariwal, 2018), with a sigmoid
    for the scale.

    >>> SigmoidScale(min_scale=0.5, max_scale=2.0)(torch.tensor([-100.0, 100.0])).exp()
    tensor([0.5000, 2.0000])
    """

    def __init__(self, min_scale: float = 0.001, max_scale: float = 10.0) -> None:
        super().__init__()
        if not 0 < min_scale < 1 < max_scale < math.inf:
            raise ValueError(
                "the bounds must satisfy 0 < min_scale < 1 < max_scale < inf, as raw 0 means scale 1, "
                f"got min_scale={min_scale}, max_scale={max_scale}; without an upper bound use SoftplusScale"
            )
        self.min_scale, self.max_scale = float(min_scale), float(max_scale)
        self.range = (self.min_scale, self.max_scale)
        self._offset = math.log((1 - self.min_scale) / (self.max_scale - 1))

    def forward(self, raw: Tensor) -> Tensor:
        """Log-scale of a raw output, same shape as ``raw``."""
        width = self.max_scale - self.min_scale
        return torch.log(torch.sigmoid(raw + self._offset) * width + self.min_scale)

    def extra_repr(self) -> str:
        """Parameters of the map, as its constructor takes them."""
        return f"min_scale={self.min_scale}, max_scale={self.max_scale}"


class SoftplusScale(ScaleMap):
    """Scale that grows linearly with the raw output to the right and decays exponentially to the left.

    log_scale = log(softplus(raw + offset)),  offset = log(e - 1), so that raw = 0 gives scale 1,
    scale in (0, inf).

    Far left the log-scale is raw + offset, without underflow; far right it is log(raw), so that one large raw
    output does not make the flow overflow.

    >>> SoftplusScale()(torch.tensor([-200.0, 200.0]))
    tensor([-199.4587,    5.3010])
    """

    def forward(self, raw: Tensor) -> Tensor:
        """Log-scale of a raw output, same shape as ``raw``."""
        shifted = raw + math.log(math.e - 1)
        # clamp: the branch not taken by where must have a finite gradient
        right = F.softplus(shifted.clamp(min=-_SOFTPLUS_TAIL), threshold=_SOFTPLUS_TAIL)
        return torch.where(shifted < -_SOFTPLUS_TAIL, shifted, right.log())


class AdditiveScale(ScaleMap):
    """Scale fixed at 1: the coupling only shifts, and preserves volume.

    log_scale = 0. The conditioner needs one output per entry, not two.

    Source: NICE: Non-linear Independent Components Estimation (Dinh et al., 2015).

    >>> AdditiveScale()(torch.tensor([-3.0, 7.0]))
    tensor([0., 0.])
    """

    uses_raw = False
    range = (1.0, 1.0)

    def forward(self, raw: Tensor) -> Tensor:
        """Zeros of the shape of ``raw``, which may be any tensor of the right shape."""
        return torch.zeros_like(raw)


def _checked_bound(name: str, bound: float) -> float:
    limit = math.log(torch.finfo(torch.float64).max)
    if not 0 < bound < limit:
        raise ValueError(
            f"{name} must be positive, with a finite exp({name}), got {name}={bound}; "
            "take 2.0 for scales within [0.14, 7.4] per layer, or ExpScale for scales without bounds"
        )
    return float(bound)
