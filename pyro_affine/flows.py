"""Builders of whole flows, and the Module that owns a flow and its base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Size, Tensor, nn
from torch.distributions import Transform, constraints

from pyro_affine.audit import require_all_moved
from pyro_affine.compose import ComposeFlow, ConditionalComposeFlow
from pyro_affine.conditioners import MLP
from pyro_affine.coupling import AffineCoupling, ConditionalAffineCoupling, default_scale
from pyro_affine.linear import Permutation, Standardization
from pyro_affine.masks import half_mask
from pyro_affine.scales import ScaleMap


def real_nvp(
    event_shape: int | Sequence[int],
    *,
    num_layers: int = 8,
    hidden_dims: Sequence[int] = (64, 64),
    scale: ScaleMap | None = None,
    activation: Callable[[], nn.Module] = nn.SiLU,
    seed: int = 0,
    guard: bool = False,
) -> ComposeFlow:
    """RealNVP: affine couplings that move the two halves of the event in turn, reordered after each pair.

    It starts at the identity. An event of one entry has no half to condition on; for it the flow is a monotone
    rational spline (Pyro's ``Spline``) that starts at the identity too.

    Args:
        event_shape: shape of one event, or its number of entries.
        num_layers: number of couplings, two at least.
        hidden_dims: widths of the hidden layers of each conditioner.
        scale: map from raw to log-scale; default ``default_scale(num_layers)``.
        activation: factory of the activation Module; the smooth default suits HMC and heavy tails.
        seed: seeds the fixed reorderings, which are saved with the flow. The networks draw their first weights from
            torch's global random state, as all Modules do.
        guard: raise at the first layer whose value is not finite, naming it.

    Returns:
        A ``ComposeFlow`` from the base to the data side.

    Raises:
        ValueError: if some entry would never move, as with one layer.

    Source: Density estimation using Real NVP (Dinh et al., 2017).

    >>> real_nvp(4)(torch.ones(2, 4)).shape
    torch.Size([2, 4])
    """
    shape = _require_entries(event_shape)
    if shape.numel() == 1:
        return ComposeFlow(_spline(shape), guard=guard)

    def coupling(mask: Tensor, num_kept: int, num_moved: int) -> AffineCoupling:
        network = MLP(num_kept, num_moved, hidden_dims, activation=activation, shift_only=not scale_map.uses_raw)
        return AffineCoupling(mask, network, scale_map, event_shape=shape)

    scale_map = default_scale(max(num_layers, 1)) if scale is None else scale
    flow = ComposeFlow(_alternate(coupling, shape, num_layers, seed), guard=guard)
    require_all_moved(flow, shape)
    return flow


def conditional_real_nvp(
    event_shape: int | Sequence[int],
    context_dim: int,
    *,
    num_layers: int = 8,
    hidden_dims: Sequence[int] = (64, 64),
    scale: ScaleMap | None = None,
    activation: Callable[[], nn.Module] = nn.SiLU,
    seed: int = 0,
    guard: bool = False,
) -> ConditionalComposeFlow:
    """RealNVP whose conditioners also read a context; ``condition(context)`` gives the flow at that context.

    For events of one entry: a spline, then a shift and scale that depend on the context alone.

    Args:
        context_dim: size of the context.
        event_shape, num_layers, hidden_dims, scale, activation, seed, guard: as in ``real_nvp``.

    Raises:
        ValueError: if some entry would never move, as with one layer.

    >>> conditional_real_nvp(3, context_dim=2).condition(torch.zeros(7, 2)).batch_shape
    torch.Size([7])
    """
    shape = _require_entries(event_shape)
    scale_map = default_scale(max(num_layers, 1)) if scale is None else scale

    def coupling(mask: Tensor, num_kept: int, num_moved: int) -> ConditionalAffineCoupling:
        options: dict[str, Any] = {"activation": activation, "shift_only": not scale_map.uses_raw}
        network = MLP(num_kept, num_moved, hidden_dims, context_dim=context_dim, **options)
        return ConditionalAffineCoupling(mask, network, scale_map, event_shape=shape)

    if shape.numel() == 1:
        alone = coupling(torch.zeros(shape, dtype=torch.bool), 0, 1)
        return ConditionalComposeFlow([*_spline(shape), alone], guard=guard)
    flow = ConditionalComposeFlow(_alternate(coupling, shape, num_layers, seed), guard=guard)
    require_all_moved(flow.condition(torch.zeros(context_dim)), shape)
    return flow


class NormalizingFlow(nn.Module):
    """A density: a flow, the standard normal base that it starts from, and the units of the data.

    ``flow()`` or ``flow(context)`` gives a Pyro ``TransformedDistribution``, to be used in ``pyro.sample`` or by
    itself; ``log_prob``, ``sample`` and ``rsample`` are shortcuts. log p(y) = log N(x; 0, I) - log|det dy/dx|.

    Where the transform ends in the whole real line, its data have units: ``standardize`` stores their means and
    standard deviations. Other supports, such as that of a last ``SigmoidTransform``, have none.

    Args:
        transform: any bijective transform, or a conditional one; base to data.
        event_shape: shape of one event of the base, or its number of entries.

    Raises:
        ValueError: if ``transform`` is no transform or takes other events; on call, if a context is missing or not
            wanted.

    >>> flow = NormalizingFlow(real_nvp(3), 3)
    >>> flow.log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    >>> flow().sample((5,)).shape
    torch.Size([5, 3])
    """

    loc: Tensor
    scale: Tensor
    chain: Any  # a ComposeFlow or a ConditionalComposeFlow

    def __init__(self, transform: Transform | ConditionalTransform, event_shape: int | Sequence[int]) -> None:
        super().__init__()
        self.event_shape = _as_shape(event_shape)
        self.conditional = isinstance(transform, ConditionalTransform)
        compose = ConditionalComposeFlow if self.conditional else ComposeFlow
        units: list[Any] = [Standardization(self.event_shape)] if _ends_in_reals(transform) else []
        self.chain = compose([transform, *units])
        if not self.conditional:
            self.chain.forward_shape(self.event_shape)
        self.register_buffer("loc", torch.zeros(self.event_shape))
        self.register_buffer("scale", torch.ones(self.event_shape))

    @property
    def transform(self) -> nn.Module:
        """The flow between the base and the standardised data."""
        return self.chain.parts[0]  # type: ignore[no-any-return]

    def forward(self, context: Tensor | None = None) -> dist.TransformedDistribution:
        """The distribution; its batch shape is that of the context. Context shape: batch + (context_dim,)."""
        return dist.TransformedDistribution(self._base(), [self._chain(context)])

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density of each event, in nats. Value shape: batch + event_shape; result: batch."""
        chain = self._chain(context)
        chain._check(value, chain.inverse_shape)
        x, log_det = chain._backward(value)
        return self._base().log_prob(x) - log_det

    def sample(self, sample_shape: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """Draws without gradients. Shape: sample_shape + context batch + event_shape."""
        return self(context).sample(_as_shape(sample_shape))  # type: ignore[no-any-return]

    def rsample(self, sample_shape: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """Draws with gradients with respect to the parameters. Shape as of ``sample``."""
        return self(context).rsample(_as_shape(sample_shape))  # type: ignore[no-any-return]

    def standardize(self, data: Tensor) -> None:
        """Store mean and standard deviation of the data, (N,) + event_shape, so that the flow sees unit scales."""
        if len(self.chain.parts) == 1:
            raise ValueError(
                f"data with units live on the whole real line, got a flow onto {self.transform.codomain}; leave them "
                "as they are"
            )
        self.chain.parts[1].fit(data)

    def _base(self) -> dist.TorchDistribution:
        unvalidated = dist.Normal(self.loc, self.scale, validate_args=False)  # validation does not compile
        return dist.Independent(unvalidated, len(self.event_shape), validate_args=False)

    def _chain(self, context: Tensor | None) -> ComposeFlow:
        if self.conditional != (context is not None):
            raise ValueError(
                "a conditional flow needs a context and an unconditional one takes none, got "
                f"{'no context' if context is None else 'a context'} for a flow that is "
                f"{'conditional' if self.conditional else 'not conditional'}; see conditional_real_nvp"
            )
        return self.chain.condition(context) if self.conditional else self.chain  # type: ignore[no-any-return]


def _ends_in_reals(transform: Transform | ConditionalTransform) -> bool:
    constraint = getattr(transform, "codomain", constraints.real)
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return isinstance(constraint, type(constraints.real))


def _as_shape(shape: int | Sequence[int]) -> Size:
    return Size([shape] if isinstance(shape, int) else shape)


def _require_entries(event_shape: int | Sequence[int]) -> Size:
    shape = _as_shape(event_shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"an event needs one dimension and one entry at least, got {tuple(shape)}; use (1,) for one")
    return shape


def _alternate(
    coupling: Callable[[Tensor, int, int], nn.Module], shape: Size, num_layers: int, seed: int
) -> list[nn.Module]:
    """Couplings that keep first one half, then the other, with a fixed random reordering after each pair."""
    size = shape.numel()
    generator = torch.Generator().manual_seed(seed)
    mask = half_mask(size).reshape(shape)
    parts: list[nn.Module] = []
    for index in range(num_layers):
        num_kept = int(mask.sum())
        parts.append(coupling(mask, num_kept, size - num_kept))
        mask = ~mask
        if index % 2 == 1 and size > 2 and index + 1 < num_layers:
            parts.append(Permutation(torch.randperm(size, generator=generator), shape))
    return parts


def _spline(shape: Size) -> list[Transform]:
    """Monotone rational spline of one entry; it starts at the identity, and stays so beyond six base sds."""
    spline = dist.transforms.Spline(1, count_bins=16, bound=6.0)
    slope_one = torch.tensor(1.0 - 1e-3).expm1().log()  # Pyro's slope is 1e-3 + softplus of this
    with torch.no_grad():
        for name, parameter in spline.named_parameters():
            parameter.fill_(slope_one if name == "unnormalized_derivatives" else 0.0)
    return [spline, Permutation(torch.zeros(1, dtype=torch.long), shape)]  # the latter sets the event's rank
