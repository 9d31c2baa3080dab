"""A layer that tames far-out values: the identity in the middle, a logarithm in the tails."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_affine.transform import FlowTransform


class LOFT(FlowTransform):
    """Log soft extension: entries pass unchanged up to a threshold t, and grow like a logarithm beyond it.

    y = sign(x) (min(|x|, t) + log(1 + max(|x| - t, 0))),  log|det dy/dx| = -sum log(1 + max(|x| - t, 0)),
    x = sign(y) (min(|y|, t) + exp(max(|y| - t, 0)) - 1).

    Behind a stack of couplings it keeps a rare far-out draw from reaching the model as 1e10: 1e10 becomes t + 23.
    It is continuous with its derivative. It makes tails lighter, so it is a guard, not a model of heavy tails; and
    it costs nothing where no draw passes t.

    Args:
        event_shape: shape of one event, or None for entries of any shape.
        threshold: t, positive. The default 100 is far outside of anything that a fit in units of posterior
            standard deviations should reach.

    Raises:
        ValueError: if ``threshold`` is not positive and finite.

    Source: Stable training of normalizing flows for high-dimensional variational inference (Andrade, 2024).

    >>> layer = LOFT((3,), threshold=10.0)
    >>> layer(torch.tensor([-5.0, 10.0, 1e10]))
    tensor([-5.0000, 10.0000, 33.0258])
    """

    def __init__(self, event_shape: Sequence[int] | None, threshold: float = 100.0, *, cache_size: int = 1) -> None:
        super().__init__(None if event_shape is None else tuple(event_shape), cache_size=cache_size)
        if not 0 < threshold < float("inf"):
            raise ValueError(f"threshold must be positive and finite, got {threshold}; 100 is the default")
        self.threshold = float(threshold)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        growth = self._excess(x).log1p()
        return x.clamp(-self.threshold, self.threshold) + x.sign() * growth, self._total(-growth)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        growth = self._excess(y)
        return y.clamp(-self.threshold, self.threshold) + y.sign() * growth.expm1(), self._total(-growth)

    def _excess(self, value: Tensor) -> Tensor:
        return torch.relu(value.abs() - self.threshold)

    def _total(self, log_slope: Tensor) -> Tensor:
        rank = len(self.event_shape or ())
        return log_slope.flatten(-rank).sum(-1) if rank else log_slope

    def extra_repr(self) -> str:
        """Threshold, for ``repr``."""
        return f"threshold={self.threshold}"
