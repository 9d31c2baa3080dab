"""Every layer, scale map, mask and event shape as a named case: a function that makes a fresh transform."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as pyro_transforms
from torch import nn
from torch.distributions import AffineTransform, SigmoidTransform, biject_to

from pyro_affine.actnorm import ActNorm
from pyro_affine.compose import ComposeFlow, ConditionalComposeFlow
from pyro_affine.conditioners import MLP, ResidualMLP
from pyro_affine.conv_net import ConvNet, ResidualConvNet
from pyro_affine.coupling import (
    AffineCoupling,
    ConditionalAffineCoupling,
    affine_coupling,
    conditional_affine_coupling,
)
from pyro_affine.flows import conditional_real_nvp, real_nvp
from pyro_affine.images import LogitImages
from pyro_affine.invertible_linear import InvertibleLinear, invertible_conv1x1
from pyro_affine.linear import LowerTriangularAffine, Permutation, Standardization
from pyro_affine.masks import alternating_mask, channel_mask, checkerboard_mask, half_mask, random_mask
from pyro_affine.reshape import ConditionalMultiScale, MultiScale, Squeeze
from pyro_affine.scales import AdditiveScale, AtanScale, ExpScale, SigmoidScale, SoftplusScale, TanhScale

CONTEXT = torch.tensor([0.3, -1.2], dtype=torch.float64)
SMALL = {"num_layers": 3, "hidden_dims": (6,)}


def coupling(mask, event_shape=None, scale=None, make=MLP, **options):
    shape = torch.Size(mask.shape if event_shape is None else event_shape)
    num_kept = int(mask.expand(shape).sum())
    sizes = {"hidden_dim": 6} if make is ResidualMLP else {"hidden_dims": (6,)}
    network = make(num_kept, shape.numel() - num_kept, **sizes, **options)
    return AffineCoupling(mask, network, scale, event_shape=shape)


def image_coupling(mask, event_shape, make=ConvNet, **options):
    return AffineCoupling(mask, make(mask, event_shape, 3, **options), event_shape=event_shape)


def image_conditioned(mask, event_shape, context=CONTEXT, **options):
    network = ConvNet(mask, event_shape, 3, **(options or {"context_dim": 2}))
    return ConditionalAffineCoupling(mask, network, event_shape=event_shape).double().condition(context)


def conditional_coupling(mask):
    num_kept = int(mask.sum())
    network = MLP(num_kept, mask.numel() - num_kept, (6,), context_dim=2)
    return ConditionalAffineCoupling(mask, network)


def conditioned(mask, context=CONTEXT):
    return conditional_coupling(mask).double().condition(context)


def plain(*size):
    return torch.linspace(-1, 2, torch.Size(size).numel(), dtype=torch.float64).reshape(size)


def standardization(*event_shape):
    layer = Standardization(event_shape).double()
    layer.fit(torch.stack([plain(*event_shape), 3 + 2 * plain(*event_shape).flip(0) ** 2, plain(*event_shape).exp()]))
    return layer


def batch_norm(size):
    layer = pyro_transforms.BatchNorm(size).double().eval()
    layer.moving_mean, layer.moving_variance = plain(size), 1 + plain(size) ** 2
    return layer


def mixed():
    return ComposeFlow([
        coupling(half_mask(5)), Permutation(torch.randperm(5)), coupling(alternating_mask(5), scale=AtanScale()),
        LowerTriangularAffine(torch.zeros(5)), standardization(5),
    ])  # fmt: skip


def glow_step(shape):
    parts = [image_coupling(channel_mask(shape[0]), shape), invertible_conv1x1(shape), ActNorm(shape)]
    return ComposeFlow(parts)


def multi_scale(*, conditional=False):
    """RealNVP for images (1, 4, 6): both kinds of couplings, then channels alone at the second level."""
    checkerboard, channels = checkerboard_mask(4, 6).expand(1, 4, 6), channel_mask(4).expand(4, 2, 3)
    middle = conditional_coupling(channels) if conditional else coupling(channels)
    first = [middle, Squeeze((1, 4, 6)), coupling(checkerboard), coupling(~checkerboard)]
    chain, kind = (ConditionalComposeFlow, ConditionalMultiScale) if conditional else (ComposeFlow, MultiScale)
    return kind([chain(first), coupling(channel_mask(2), (2, 2, 3))])


def glow():
    """Two levels of one step each, for images (1, 4, 4)."""
    first = ComposeFlow([*glow_step((4, 2, 2)).parts, Squeeze((1, 4, 4))])
    return MultiScale([first, ComposeFlow([*glow_step((8, 1, 1)).parts, Squeeze((2, 2, 2))])])


def with_foreign(*parts):
    return ComposeFlow([coupling(half_mask(5)), *parts, coupling(half_mask(5, keep_first=False))])


def conditional_mix():
    parts = [
        conditional_affine_coupling(5, 2, [6]),
        pyro_transforms.conditional_affine_autoregressive(5, 2, [8]),
        coupling(half_mask(5, keep_first=False)),
    ]
    return ConditionalComposeFlow(parts).double()


def _any_seed():
    return int(torch.randint(1000, ()))


# what draws at random (masks, orders) draws from the global generator: another process makes another flow
COUPLINGS = {
    "half (2,)": lambda: coupling(half_mask(2)),
    "half (5,)": lambda: coupling(half_mask(5)),
    "other half (5,)": lambda: coupling(half_mask(5, keep_first=False)),
    "half (3, 4)": lambda: coupling(half_mask(12).reshape(3, 4)),
    "alternating (2,)": lambda: coupling(alternating_mask(2, keep_first=False)),
    "alternating (5,)": lambda: coupling(alternating_mask(5)),
    "alternating over columns (3, 4)": lambda: coupling(alternating_mask(4), (3, 4)),
    "random (5,)": lambda: coupling(random_mask(5)),
    "random (3, 4)": lambda: coupling(random_mask(12, num_kept=5).reshape(3, 4)),
    "checkerboard (3, 4)": lambda: coupling(checkerboard_mask(3, 4)),
    "checkerboard over channels (2, 4, 4)": lambda: coupling(checkerboard_mask(4, 4, keep_first=False), (2, 4, 4)),
    "channel (2, 4, 4)": lambda: coupling(channel_mask(2), (2, 4, 4)),
    "other channel (2, 4, 4)": lambda: coupling(channel_mask(2, keep_first=False), (2, 4, 4)),
    "exp scale": lambda: coupling(random_mask(5), scale=ExpScale()),
    "tanh scale": lambda: coupling(random_mask(5), scale=TanhScale()),
    "atan scale, tight above": lambda: coupling(random_mask(5), scale=AtanScale(2.0, 0.1)),
    "sigmoid scale": lambda: coupling(random_mask(5), scale=SigmoidScale()),
    "softplus scale": lambda: coupling(random_mask(5), scale=SoftplusScale()),
    "additive scale": lambda: coupling(random_mask(5), scale=AdditiveScale(), shift_only=True),
    "two networks": lambda: coupling(half_mask(5), separate=True),
    "residual network": lambda: coupling(half_mask(5), make=ResidualMLP),
    "leaky ReLU": lambda: coupling(half_mask(5), activation=nn.LeakyReLU),
    "helper (5,)": lambda: affine_coupling(5, [6]),
    "helper (2, 4, 4)": lambda: affine_coupling([2, 4, 4], [6], dim=-3),
    "conditioned (5,)": lambda: conditioned(half_mask(5)),
    "conditioned (3, 4)": lambda: conditioned(checkerboard_mask(3, 4)),
    "conditioned, no entry kept (1,)": lambda: conditioned(torch.zeros(1, dtype=torch.bool)),
    "conditioned helper (2,)": lambda: conditional_affine_coupling(2, 2, [6]).double().condition(CONTEXT),
}
IMAGE_COUPLINGS = {
    "conv, checkerboard (1, 3, 3)": lambda: image_coupling(checkerboard_mask(3, 3), (1, 3, 3)),
    "conv, other checkerboard (2, 2, 3)": lambda: image_coupling(checkerboard_mask(2, 3, keep_first=False), (2, 2, 3)),
    "conv, channel (3, 3, 2)": lambda: image_coupling(channel_mask(3), (3, 3, 2)),
    "conv, other channel (2, 1, 4)": lambda: image_coupling(channel_mask(2, keep_first=False), (2, 1, 4)),
    "conv, alternating channels (3, 2, 2)": lambda: image_coupling(alternating_mask(3)[:, None, None], (3, 2, 2)),
    "conv, random (2, 3, 3)": lambda: image_coupling(random_mask(18).reshape(2, 3, 3), (2, 3, 3)),
    "conv, weight norm (1, 2, 4)": lambda: image_coupling(checkerboard_mask(2, 4), (1, 2, 4), weight_norm=True),
    "conv, two networks (2, 3, 2)": lambda: image_coupling(channel_mask(2), (2, 3, 2), separate=True),
    "residual conv (1, 3, 4)": lambda: image_coupling(checkerboard_mask(3, 4), (1, 3, 4), ResidualConvNet),
    "conditioned conv, checkerboard (1, 3, 3)": lambda: image_conditioned(checkerboard_mask(3, 3), (1, 3, 3)),
    "conditioned conv, channel (2, 2, 3)": lambda: image_conditioned(channel_mask(2), (2, 2, 3)),
    "conditioned conv on an image (1, 4, 3)": lambda: image_conditioned(
        checkerboard_mask(4, 3), (1, 4, 3), plain(24), context_shape=(2, 4, 3)
    ),
}
COUPLINGS = {**COUPLINGS, **IMAGE_COUPLINGS}
LINEAR = {
    "permutation (1,)": lambda: Permutation(torch.zeros(1, dtype=torch.long)),
    "permutation (2,)": lambda: Permutation(torch.tensor([1, 0])),
    "permutation (5,)": lambda: Permutation(torch.randperm(5)),
    "permutation (3, 4)": lambda: Permutation(torch.randperm(12), (3, 4)),
    "lower triangular (2,)": lambda: LowerTriangularAffine(torch.zeros(2)),
    "lower triangular (5,)": lambda: LowerTriangularAffine(torch.zeros(5)),
    "standardization (1,)": lambda: Standardization((1,)),
    "standardization (2, 4, 4)": lambda: Standardization((2, 4, 4)),
    "actnorm (1,)": lambda: ActNorm(1),
    "actnorm (5,)": lambda: ActNorm(5),
    "actnorm (1, 3, 3)": lambda: ActNorm((1, 3, 3)),
    "actnorm (3, 2, 4)": lambda: ActNorm((3, 2, 4)),
}
RESHAPES = {
    "squeeze, a permutation of (1, 4, 6)": lambda: Squeeze((1, 4, 6)),
    "squeeze by 3, an odd permutation of (1, 3, 9)": lambda: Squeeze((1, 3, 9), 3),
    "inverse of squeeze, a permutation of (3, 2, 2)": lambda: Squeeze((3, 2, 2)).inv,
    "multi-scale (1, 4, 6)": multi_scale,
    "inverse of multi-scale (1, 4, 6)": lambda: multi_scale().inv,
    "conditioned multi-scale (1, 4, 6)": lambda: multi_scale(conditional=True).double().condition(CONTEXT),
}
FLOWS = {
    "compose (5,)": lambda: ComposeFlow([coupling(half_mask(5)), coupling(random_mask(5))]),
    **{
        f"compose, memory={memory} (5,)": lambda memory=memory: ComposeFlow(
            [coupling(half_mask(5)), coupling(random_mask(5))], memory=memory
        )
        for memory in ("checkpoint", "invertible")
    },
    "real_nvp (2,)": lambda: real_nvp(2, **SMALL, seed=_any_seed()),
    "real_nvp (5,)": lambda: real_nvp(5, **SMALL, seed=_any_seed()),
    "real_nvp (3, 4)": lambda: real_nvp((3, 4), **SMALL, seed=_any_seed()),
    "real_nvp (2, 4, 4)": lambda: real_nvp((2, 4, 4), **SMALL, seed=_any_seed()),
    "real_nvp (5,), additive": lambda: real_nvp(5, **SMALL, scale=AdditiveScale(), seed=_any_seed()),
    "conditional_real_nvp (5,)": lambda: conditional_real_nvp(5, 2, **SMALL).double().condition(CONTEXT),
    "inverse of a coupling": lambda: coupling(random_mask(5)).inv,
    "inverse of real_nvp (3, 4)": lambda: real_nvp((3, 4), **SMALL).inv,
    "compose with an inverse": lambda: ComposeFlow([coupling(half_mask(5)), real_nvp(5, **SMALL).inv]),
}
ONE_ENTRY = {
    "real_nvp (1,)": lambda: real_nvp(1),
    "conditional_real_nvp (1,)": lambda: conditional_real_nvp(1, 2, **SMALL).double().condition(CONTEXT),
}
OFF_IDENTITY = {
    "mixed (5,)": mixed,
    "inverse of mixed (5,)": lambda: mixed().inv,
    "glow (1, 4, 4)": glow,
    "logit of images (1, 3, 4)": lambda: ComposeFlow(
        [coupling(half_mask(12).reshape(1, 3, 4)), LogitImages(0.05, (1, 3, 4))]
    ),
    # Pyro's unconditional AffineAutoregressive is left out: its inverse makes float32 zeros
    "lower triangular at a place": lambda: LowerTriangularAffine(plain(5), 0.5 + plain(5) ** 2),
    "standardization of data (3, 4)": lambda: standardization(3, 4),
    "invertible linear (1,)": lambda: InvertibleLinear(1),
    "invertible linear (2,)": lambda: InvertibleLinear(2),
    "invertible linear (5,)": lambda: InvertibleLinear(5),
    "invertible 1x1 convolution (1, 3, 3)": lambda: invertible_conv1x1((1, 3, 3)),
    "invertible 1x1 convolution (3, 3, 2)": lambda: invertible_conv1x1((3, 3, 2)),
    "Glow step (3, 2, 3)": lambda: glow_step((3, 2, 3)),
    "torch's affine": lambda: with_foreign(AffineTransform(plain(5), -1 - plain(5) ** 2)),
    "torch's sigmoid": lambda: ComposeFlow([coupling(half_mask(5)), SigmoidTransform()]),
    "Pyro's Permute": lambda: with_foreign(pyro_transforms.permute(5)),
    "Pyro's Householder": lambda: with_foreign(pyro_transforms.householder(5)),
    "Pyro's BatchNorm": lambda: with_foreign(batch_norm(5)),
    "Pyro's LowerCholeskyAffine": lambda: with_foreign(
        pyro_transforms.LowerCholeskyAffine(plain(5), 2 * torch.eye(5, dtype=torch.float64) + plain(5, 5).tril())
    ),
    "Pyro's ConditionalAffineAutoregressive": lambda: conditional_mix().condition(CONTEXT),
    "Pyro's Spline": lambda: with_foreign(pyro_transforms.spline(5)),
    "Pyro's SplineCoupling": lambda: with_foreign(pyro_transforms.spline_coupling(5, hidden_dims=[6])),
}


IDENTITIES = {**COUPLINGS, **LINEAR, **RESHAPES, **FLOWS, **ONE_ENTRY}
CASES = {**IDENTITIES, **OFF_IDENTITY}


def randomised(transform, seed=0):
    """The same transform in float64 with jittered parameters: a fresh flow is the identity and hides its errors."""
    generator = torch.Generator().manual_seed(seed)
    transform = transform.double()
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return transform


def x_points(transform, batch_shape, seed=1):
    return _points(event_shape(transform), transform.domain, batch_shape, seed)


def y_points(transform, batch_shape, seed=2):
    return _points(data_shape(transform), transform.codomain, batch_shape, seed)


def event_shape(transform):
    return torch.Size([5]) if transform.event_shape is None else transform.event_shape


def data_shape(transform):
    """Shape of an event on the y side."""
    shape = transform.forward_shape(event_shape(transform))
    return shape[len(shape) - transform.codomain.event_dim :]


def _points(shape, constraint, batch_shape, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = torch.Size(batch_shape) + shape
    return biject_to(constraint)(torch.randn(shape, generator=generator, dtype=torch.float64))


def density(t):
    """The stock distribution of t(x), x standard normal."""
    zeros = torch.zeros(event_shape(t), dtype=torch.float64)
    return dist.TransformedDistribution(dist.Normal(zeros, 1.0).to_event(t.domain.event_dim), [t])


def each(cases, *, leave_out=()):
    """Run a test on each case but those whose names hold one of the given words."""
    cases = {name: make for name, make in cases.items() if not any(word in name for word in leave_out)}
    return pytest.mark.parametrize("make", cases.values(), ids=cases)


def assert_close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, rtol=atol, atol=atol)
