"""Builders of whole flows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform

from pyro_affine.audit import require_all_moved
from pyro_affine.bounded_input import BoundedInput
from pyro_affine.compose import ComposeFlow, ConditionalComposeFlow
from pyro_affine.conditioners import MLP, ResidualMLP
from pyro_affine.coupling import AffineCoupling, ConditionalAffineCoupling, default_scale
from pyro_affine.image_flows import image_real_nvp
from pyro_affine.linear import Permutation
from pyro_affine.masks import half_mask
from pyro_affine.normalizing_flow import NormalizingFlow as NormalizingFlow
from pyro_affine.scales import ScaleMap


def real_nvp(
    event_shape: int | Sequence[int],
    *,
    num_layers: int | None = None,
    hidden_dims: Sequence[int] | None = None,
    hidden_dim: int = 96,
    num_blocks: int = 1,
    input_bound: float = 4.0,
    scale: ScaleMap | None = None,
    activation: Callable[[], nn.Module] = nn.SiLU,
    dropout: float = 0.0,
    seed: int = 0,
    guard: bool = False,
) -> ComposeFlow:
    """RealNVP: affine couplings that move the two halves of the event in turn, reordered after each pair.

    An event (C, H, W) is an image in [0, 1]: for it the flow is ``image_real_nvp``, with convolutions and several
    scales, from a flat latent. With ``hidden_dims`` its entries are any numbers, and moved as those of a vector are.

    It starts at the identity. An event of one entry has no half to condition on; for it the flow is a monotone
    rational spline (Pyro's ``Spline``) that starts at the identity too.

    Args:
        event_shape: shape of one event, or its number of entries.
        num_layers: number of couplings, two at least; default 8. For images, of each kind at each level; default 3.
        hidden_dims: widths of the hidden layers of plain conditioners, ``MLP``. Default: residual ones.
        hidden_dim, num_blocks: width and blocks of residual conditioners, ``ResidualMLP``, for images
            ``ResidualConvNet``. In 60 s on real tables they reach more than plain ones of the same cost.
        input_bound: b, in residual conditioners, which read b tanh(kept / b): far beyond the data, some times b base
            units out, each coupling is then an affine map, so that farther means less likely.
        scale: map from raw to log-scale; default ``default_scale(num_layers)``.
        activation: factory of the activation Module; the smooth default suits HMC and heavy tails.
        dropout: share of hidden values that the conditioners drop in training mode, as in ``MLP`` and ``ResidualMLP``;
            ``flow.eval()`` switches it off. Vectors only.
        seed: seeds the fixed reorderings, which are saved with the flow. The networks draw their first weights from
            torch's global random state, as all Modules do.
        guard: raise at the first layer whose value is not finite, naming it.

    Returns:
        A ``ComposeFlow`` from the base to the data side.

    Raises:
        ValueError: if some entry would never move, as with one layer, or for dropout in a flow of images.

    Source: Density estimation using Real NVP (Dinh et al., 2017).

    >>> real_nvp(4)(torch.ones(2, 4)).shape
    torch.Size([2, 4])
    """
    shape = _require_entries(event_shape)
    if shape.numel() == 1:
        return ComposeFlow(_spline(shape), guard=guard)
    if len(shape) == 3 and hidden_dims is None:
        if dropout:
            raise ValueError(f"dropout is for vectors, got {dropout} for images of shape {tuple(shape)}; leave it out")
        sizes: dict[str, Any] = {"hidden_channels": hidden_dim, "num_blocks": num_blocks}
        num_layers = 3 if num_layers is None else num_layers
        return image_real_nvp(shape, num_layers=num_layers, **sizes, scale=scale, activation=activation, guard=guard)
    num_layers = 8 if num_layers is None else num_layers

    def coupling(mask: Tensor, num_kept: int, num_moved: int) -> AffineCoupling:
        options: dict[str, Any] = {"activation": activation, "shift_only": not scale_map.uses_raw, "dropout": dropout}
        if hidden_dims is None:
            inner = ResidualMLP(num_kept, num_moved, hidden_dim, num_blocks, **options)
            network: nn.Module = BoundedInput(inner, input_bound)
        else:
            network = MLP(num_kept, num_moved, hidden_dims, **options)
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

    For events of one entry: splines, one for each four layers, between affine maps that depend on the context alone;
    where they move and stretch what a spline bends, the shape depends on the context too. The networks are plain ones,
    ``MLP``, for events of any shape; for images with convolutions there is ``conditional_glow``.

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
        moves_it = torch.zeros(shape, dtype=torch.bool)
        parts: list[Any] = [coupling(moves_it, 0, 1)]
        for _ in range(max(num_layers // 4, 1)):
            parts += [*_spline(shape), coupling(moves_it, 0, 1)]
        return ConditionalComposeFlow(parts, guard=guard)
    flow = ConditionalComposeFlow(_alternate(coupling, shape, num_layers, seed), guard=guard)
    require_all_moved(flow.condition(torch.zeros(context_dim)), shape)
    return flow


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
            order = torch.randperm(size, generator=generator, device="cpu")  # where the generator is
            parts.append(Permutation(order.to(mask.device), shape))
    return parts


def _spline(shape: Size) -> list[Transform]:
    """Monotone rational spline of one entry; it starts at the identity, and stays so beyond six base sds."""
    spline = dist.transforms.Spline(1, count_bins=16, bound=6.0)
    slope_one = torch.tensor(1.0 - 1e-3).expm1().log()  # Pyro's slope is 1e-3 + softplus of this
    with torch.no_grad():
        for name, parameter in spline.named_parameters():
            parameter.fill_(slope_one if name == "unnormalized_derivatives" else 0.0)
    return [spline, Permutation(torch.zeros(1, dtype=torch.long), shape)]  # the latter sets the event's rank
