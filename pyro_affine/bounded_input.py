"""A conditioner that sees no far-out values: beyond the data it is constant, so the flow is affine there."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BoundedInput(nn.Module):
    """A conditioner of b tanh(kept / b) in place of kept.

    A network goes on along straight lines where it has seen no data, and a stack of couplings can then bring a far
    point back among the likely ones. With bounded inputs shift and scale level off.
    Within a third of b the input is changed by less than 4 %.

    Args:
        conditioner: what reads the bounded entries, and the context as it is.
        bound: b, positive. Inputs of a coupling have about unit scale: 4 bends them only in the tails of the data.

    Raises:
        ValueError: if ``bound`` is not positive.

    >>> from pyro_affine.conditioners import MLP
    >>> BoundedInput(MLP(2, 3))(torch.ones(5, 2))[0].shape
    torch.Size([5, 3])
    """

    def __init__(self, conditioner: nn.Module, bound: float = 4.0) -> None:
        super().__init__()
        if not bound > 0:
            raise ValueError(f"bound must be positive, got {bound}; 4 suits entries of unit scale")
        self.conditioner, self.bound = conditioner, float(bound)
        self.context_dim = getattr(conditioner, "context_dim", None)

    def forward(self, kept: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Shift and raw scale, as the conditioner gives them."""
        bounded = torch.tanh(kept / self.bound) * self.bound
        result: tuple[Tensor, Tensor | None] = self.conditioner(bounded, context)
        return result

    def __repr__(self) -> str:
        """One line, as the constructor takes it."""
        return f"{type(self).__name__}({self.conditioner!r}, bound={self.bound})"
