"""Builders of flows of images: RealNVP with convolutions, Glow, and Glow that depends on a context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn

from pyro_affine.actnorm import ActNorm
from pyro_affine.compose import ComposeFlow, ConditionalComposeFlow
from pyro_affine.conditioners import MLP
from pyro_affine.conv_net import ConvNet, ResidualConvNet
from pyro_affine.coupling import AffineCoupling, ConditionalAffineCoupling, default_scale
from pyro_affine.images import LogitImages
from pyro_affine.invertible_linear import invertible_conv1x1
from pyro_affine.masks import channel_mask, checkerboard_mask
from pyro_affine.memory import Memory
from pyro_affine.reshape import ConditionalMultiScale, MultiScale, Squeeze
from pyro_affine.scales import ScaleMap

_MOST_HALVINGS = 3  # by default: 32 x 32 images end at 4 x 4, as in both papers
_MakeCoupling = Callable[[Tensor, Size], nn.Module]


def image_real_nvp(
    event_shape: Sequence[int],
    num_levels: int | None = None,
    *,
    num_layers: int = 3,
    hidden_channels: int = 64,
    num_blocks: int = 2,
    alpha: float | None = 0.05,
    scale: ScaleMap | None = None,
    activation: Callable[[], nn.Module] = nn.SiLU,
    guard: bool = False,
    memory: Memory = "full",
) -> ComposeFlow:
    """RealNVP of images: what ``real_nvp`` builds for events (C, H, W), with more to choose.

    From a flat latent of C * H * W numbers onto images. Seen from the data: the logit; then at each level couplings
    under checkerboards, a squeeze, couplings that move the two halves of the channels in turn, and half of the channels
    leave into the latent. The last level has checkerboards only, one more. Each coupling stands behind an ``ActNorm``,
    in place of the batch normalisation of the source; ``fit_density`` starts these from the data. Until then the flow
    is the identity but for the logit and the order of the entries.

    Args:
        event_shape: shape of one image, (C, H, W).
        num_levels: each but the last halves height and width. Default: down to 4 x 4 or an odd size, four at most.
        num_layers: couplings of each kind at each level, two at least.
        hidden_channels, num_blocks: width and blocks of the networks, ``ResidualConvNet``.
        alpha: margin of ``LogitImages``, for images in [0, 1]; None for images of all reals.
        scale: map from raw to log-scale; default ``default_scale`` of the number of couplings.
        activation: factory of the activation Module.
        guard: raise at the first layer whose value is not finite, naming it.
        memory: what is kept for the backward pass of each level, as in ``ComposeFlow``.

    Raises:
        ValueError: for an event of another rank, sizes that cannot be halved as often, or fewer than two layers.

    Source: Density estimation using Real NVP (Dinh et al., 2017), sections 3.6 and 4.1.

    >>> flow = image_real_nvp((1, 8, 8), hidden_channels=8)
    >>> flow(torch.zeros(5, 64)).shape
    torch.Size([5, 1, 8, 8])
    """
    shape = _require_image(event_shape)
    num_squeezes = _num_halvings(shape, smallest=8) if num_levels is None else num_levels - 1
    _require_halvings(shape, num_squeezes, num_squeezes + 1)
    if num_layers < 2:
        raise ValueError(f"num_layers must be 2 or more, got {num_layers}; with one, half of the entries never move")
    num_couplings = 2 * num_layers * num_squeezes + num_layers + 1
    scale_map = default_scale(num_couplings) if scale is None else scale

    def couple(mask: Tensor, shape: Size) -> AffineCoupling:
        options: dict[str, Any] = {"activation": activation, "shift_only": not scale_map.uses_raw}
        network = ResidualConvNet(mask, shape, hidden_channels, num_blocks, **options)
        return AffineCoupling(mask, network, scale_map, event_shape=shape)

    chain = partial(ComposeFlow, guard=guard, memory=memory)
    levels = []
    for _ in range(num_squeezes):
        squeezed = _squeezed(shape)
        channels = _alternate(couple, channel_mask(squeezed[0]), squeezed, num_layers)
        pixels = _alternate(couple, checkerboard_mask(*shape[1:]), shape, num_layers)
        levels.append(chain([*channels, Squeeze(shape), *pixels]))
        shape = _next_image(squeezed)
    levels.append(chain(_alternate(couple, checkerboard_mask(*shape[1:]), shape, num_layers + 1)))
    return ComposeFlow([MultiScale(levels), *_logit(alpha, Size(event_shape))], guard=guard)


def glow(
    event_shape: Sequence[int],
    num_levels: int | None = None,
    num_steps: int = 8,
    hidden_channels: int = 64,
    *,
    alpha: float | None = 0.05,
    scale: ScaleMap | None = None,
    activation: Callable[[], nn.Module] = nn.SiLU,
    seed: int | None = None,
    guard: bool = False,
    memory: Memory = "full",
) -> ComposeFlow:
    """Glow: from a flat latent of C * H * W numbers onto images.

    Seen from the data: the logit; then at each level a squeeze and ``num_steps`` times an ``ActNorm``, an invertible
    1x1 convolution and a coupling that moves one half of the channels; half of the channels leave into the latent.
    ``fit_density`` starts each ``ActNorm`` from the data. Until then the flow is a rotation, but for the logit.

    Args:
        event_shape: shape of one image, (C, H, W).
        num_levels: each halves height and width. Default: down to 2 x 2 or an odd size, three at most.
        num_steps: steps at each level.
        hidden_channels: width of the networks, ``ConvNet``; 512 in the source, for 32 steps on colour images.
        seed: of the rotations; None for torch's global generator, as of all first weights.
        alpha, scale, activation, guard, memory: as in ``image_real_nvp``.

    Raises:
        ValueError: for an event of another rank, sizes that cannot be halved as often, or no step.

    Source: Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma and Dhariwal, 2018).

    >>> flow = glow((1, 8, 8), num_levels=2, num_steps=2, hidden_channels=8)
    >>> flow(torch.zeros(5, 64)).shape
    torch.Size([5, 1, 8, 8])
    """
    shape = _require_image(event_shape)
    num_levels = _require_levels(shape, num_levels, num_steps)
    scale_map = default_scale(num_levels * num_steps) if scale is None else scale

    def couple(mask: Tensor, shape: Size) -> AffineCoupling:
        options: dict[str, Any] = {"activation": activation, "shift_only": not scale_map.uses_raw}
        return AffineCoupling(mask, ConvNet(mask, shape, hidden_channels, **options), scale_map, event_shape=shape)

    chain = partial(ComposeFlow, guard=guard, memory=memory)
    levels = [chain(parts) for parts in _glow_levels(couple, shape, num_levels, num_steps, seed)]
    return ComposeFlow([MultiScale(levels), *_logit(alpha, shape)], guard=guard)


def conditional_glow(
    event_shape: Sequence[int],
    context_dim: int,
    num_levels: int | None = None,
    num_steps: int = 8,
    hidden_channels: int = 64,
    *,
    alpha: float | None = 0.05,
    scale: ScaleMap | None = None,
    activation: Callable[[], nn.Module] = nn.SiLU,
    seed: int | None = None,
    guard: bool = False,
    memory: Memory = "full",
) -> ConditionalComposeFlow:
    """Glow that depends on a context, a vector or a class; ``condition(context)`` gives the flow at that context.

    Each network reads the context, and the latent has a mean and a scale that depend on the context alone. A class goes
    in as a vector of zeros and a one, ``torch.nn.functional.one_hot(labels, context_dim).float()``.

    Args:
        context_dim: size of the context, or number of classes.
        event_shape, num_levels, num_steps, hidden_channels, alpha, scale, activation, seed, guard, memory: as in
            ``glow``.

    Raises:
        ValueError: as of ``glow``, or for a ``context_dim`` below 1.

    >>> flow = conditional_glow((1, 4, 4), context_dim=10, num_steps=2, hidden_channels=8)
    >>> flow.condition(torch.eye(10))(torch.zeros(16)).shape
    torch.Size([10, 1, 4, 4])
    """
    shape = _require_image(event_shape)
    num_levels = _require_levels(shape, num_levels, num_steps)
    if context_dim < 1:
        raise ValueError(f"context_dim must be 1 or more, got {context_dim}; without a context use glow")
    scale_map = default_scale(num_levels * num_steps) if scale is None else scale
    options: dict[str, Any] = {"activation": activation, "shift_only": not scale_map.uses_raw}

    def couple(mask: Tensor, shape: Size) -> ConditionalAffineCoupling:
        network = ConvNet(mask, shape, hidden_channels, context_dim=context_dim, **options)
        return ConditionalAffineCoupling(mask, network, scale_map, event_shape=shape)

    size, chain = shape.numel(), partial(ConditionalComposeFlow, guard=guard, memory=memory)
    levels = [chain(parts) for parts in _glow_levels(couple, shape, num_levels, num_steps, seed)]
    latent_network = MLP(0, size, (hidden_channels,), context_dim=context_dim, **options)
    latent = ConditionalAffineCoupling(torch.zeros(size, dtype=torch.bool), latent_network, scale_map)
    return ConditionalComposeFlow([latent, ConditionalMultiScale(levels), *_logit(alpha, shape)], guard=guard)


def _glow_levels(
    couple: _MakeCoupling, shape: Size, num_levels: int, num_steps: int, seed: int | None
) -> list[list[nn.Module]]:
    """The layers of each level, the finest first."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    levels = []
    for _ in range(num_levels):
        squeezed = _squeezed(shape)
        mask, parts = channel_mask(squeezed[0]), list[nn.Module]()
        for _ in range(num_steps):
            parts += [couple(mask, squeezed), invertible_conv1x1(squeezed, seed=generator), ActNorm(squeezed)]
        levels.append([*parts, Squeeze(shape)])
        shape = _next_image(squeezed)
    return levels


def _alternate(couple: _MakeCoupling, mask: Tensor, shape: Size, num_layers: int) -> list[nn.Module]:
    """Couplings that keep first one half, then the other, each with an ``ActNorm`` at its data side."""
    masks = [~mask if index % 2 else mask for index in range(num_layers)]
    return [layer for mask in masks for layer in (couple(mask, shape), ActNorm(shape))]


def _logit(alpha: float | None, shape: Size) -> list[nn.Module]:
    return [] if alpha is None else [LogitImages(alpha, shape)]


def _squeezed(shape: Size) -> Size:
    return Size([4 * shape[0], shape[1] // 2, shape[2] // 2])


def _next_image(squeezed: Size) -> Size:
    """What is left when half of the channels have gone into the latent."""
    return Size([squeezed[0] - squeezed[0] // 2, *squeezed[1:]])


def _num_halvings(shape: Size, smallest: int) -> int:
    """How often height and width can be halved, from sizes of ``smallest`` or more."""
    sizes, halvings = shape[1:], 0
    while min(sizes) >= smallest and not any(size % 2 for size in sizes) and halvings < _MOST_HALVINGS:
        sizes, halvings = Size(size // 2 for size in sizes), halvings + 1
    return halvings


def _require_image(event_shape: Sequence[int]) -> Size:
    shape = Size([event_shape] if isinstance(event_shape, int) else event_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"images have event shape (C, H, W), got {tuple(shape)}; for grey images use C = 1, for vectors real_nvp"
        )
    return shape


def _require_levels(shape: Size, num_levels: int | None, num_steps: int) -> int:
    num_levels = max(1, _num_halvings(shape, smallest=4)) if num_levels is None else num_levels
    _require_halvings(shape, num_levels, num_levels)
    if num_steps < 1:
        raise ValueError(f"num_steps must be 1 or more, got {num_steps}; 8 is a good start, Glow has 32")
    return num_levels


def _require_halvings(shape: Size, num_halvings: int, num_levels: int) -> None:
    if num_levels < 1:
        raise ValueError(f"num_levels must be 1 or more, got {num_levels}; leave it out for the default")
    factor = 2**num_halvings
    if any(size % factor for size in shape[1:]):
        wanted = [-(-size // factor) * factor for size in shape[1:]]
        raise ValueError(
            f"{num_levels} levels need height and width that are multiples of {factor}, got images {tuple(shape)}; pad "
            f"them to {(shape[0], *wanted)} or crop them, take fewer levels, or flatten them for real_nvp(D)"
        )
    if num_halvings < num_levels and shape[1:].numel() // factor**2 < 2:
        raise ValueError(
            f"the last level needs two pixels for its checkerboards, got images {tuple(shape)} and {num_levels} "
            "levels; take fewer levels, or flatten the images for real_nvp(D)"
        )
