"""The latents of a model side by side in a vector: unconstrained, in the order of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint


class LatentLayout:
    """Where each site lies in a vector of D unconstrained entries, and the way there and back.

    u = concatenation of the flattened biject_to(support)^-1(z), site by site.

    Args:
        shapes: shape of one draw of each site.
        supports: support of each site, the same for all draws.

    Attributes:
        size: the number D of unconstrained entries; a simplex of K entries has K - 1.

    >>> from torch.distributions import constraints
    >>> layout = LatentLayout({"scale": torch.Size([2])}, {"scale": constraints.positive})
    >>> layout.constrain(torch.zeros(5, 2))["scale"].shape
    torch.Size([5, 2])
    """

    def __init__(self, shapes: Mapping[str, Size], supports: Mapping[str, Constraint]) -> None:
        self.shapes = dict(shapes)
        self._maps: dict[str, Any] = {name: biject_to(supports[name]) for name in shapes}
        self._supports = dict(supports)
        self._inner = {name: Size(self._maps[name].inverse_shape(shape)) for name, shape in self.shapes.items()}
        self.size = sum(shape.numel() for shape in self._inner.values())

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The vector of some values. Shapes: batch + shape of the site, for each; result: batch + (D,)."""
        pieces = []
        for name, shape in self.shapes.items():
            batch = values[name].shape[: values[name].dim() - len(shape)]
            pieces.append(self._maps[name].inv(values[name]).reshape(*batch, -1))
        batch = torch.broadcast_shapes(*(piece.shape[:-1] for piece in pieces))
        return torch.cat([piece.expand(*batch, -1) for piece in pieces], -1)

    def constrain(self, latents: Tensor) -> dict[str, Tensor]:
        """The values of a vector. Shape: batch + (D,); result: batch + shape of the site, for each."""
        return {name: self._maps[name](inner) for name, inner in self._split(latents).items()}

    def log_det(self, latents: Tensor) -> Tensor:
        """log|det dz/du| of the constraints, in nats. Shape: batch + (D,) to batch."""
        total = latents.new_zeros(latents.shape[:-1])
        for name, inner in self._split(latents).items():
            terms = self._maps[name].log_abs_det_jacobian(inner, self._maps[name](inner))
            total = total + terms.reshape(*total.shape, -1).sum(-1)
        return total

    def contains(self, values: Mapping[str, Tensor]) -> Tensor:
        """Whether all sites lie in their supports. Shape: batch."""
        inside = torch.ones((), dtype=torch.bool)
        for name, shape in self.shapes.items():
            batch = values[name].shape[: values[name].dim() - len(shape)]
            inside = inside & self._supports[name].check(values[name]).reshape(*batch, -1).all(-1)
        return inside

    def require_values(self, values: Mapping[str, Tensor]) -> None:
        """Refuse values that lack a site or have another shape.

        Raises:
            ValueError: naming the site.
        """
        for name, shape in self.shapes.items():
            if name not in values:
                raise ValueError(f"values must hold each of {list(self.shapes)}, got none for site '{name}'")
            found = values[name].shape
            if found[max(len(found) - len(shape), 0) :] != shape:
                raise ValueError(
                    f"a value must have shape batch + shape of its site, got {tuple(found)} for site '{name}' of "
                    f"shape {tuple(shape)}"
                )

    def _split(self, latents: Tensor) -> dict[str, Tensor]:
        sizes = [shape.numel() for shape in self._inner.values()]
        parts = latents.split(sizes, -1)
        return {
            name: part.reshape(latents.shape[:-1] + shape)
            for part, (name, shape) in zip(parts, self._inner.items(), strict=True)
        }
