"""InvertibleLinear: a rotation at the start, det W > 0 for ever, the same density after any copy, path gradients."""

from __future__ import annotations

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from cases import assert_close, density, glow_step, image_coupling, plain, randomised
from torch.nn import functional as F

from pyro_affine.actnorm import ActNorm
from pyro_affine.audit import audit
from pyro_affine.compose import ComposeFlow
from pyro_affine.conv_net import ResidualConvNet
from pyro_affine.gradients import PathGradientDistribution, push_score
from pyro_affine.invertible_linear import InvertibleLinear, invertible_conv1x1
from pyro_affine.masks import checkerboard_mask
from pyro_affine.serialize import load, save

F64 = torch.float64
SHAPES = [(1,), (2,), (7,), (3, 4), (1, 3, 3), (4, 3, 2), (3, 1, 5)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def points(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 2, 3, 8, 48])
@pytest.mark.parametrize("seed", range(4))
def test_starts_as_a_rotation_and_keeps_a_positive_determinant(size, seed):
    torch.set_default_dtype(F64)
    t = InvertibleLinear(size, seed=seed)
    torch.set_default_dtype(torch.float32)
    assert_close(t.weight @ t.weight.T, torch.eye(size, dtype=F64), 1e-12)
    x = points(5, size)
    assert_close(t(x).norm(dim=-1), x.norm(dim=-1), 1e-12)
    assert_close(t.log_abs_det_jacobian(x, t(x)), torch.zeros(5, dtype=F64), 1e-12)
    for step in range(3):
        with torch.no_grad():
            t.lower_upper += 0.5 / size**0.5 * points(size, size, seed=step)
        sign, log_det = torch.linalg.slogdet(t.weight)
        assert sign == t.sign == t.inv.sign == 1
        assert_close(t.log_abs_det_jacobian(x, t(x)), log_det.expand(5), 1e-9)


def test_rotations_are_drawn_without_a_preferred_direction():
    generator = torch.Generator().manual_seed(0)
    corners = torch.stack([InvertibleLinear(2, seed=generator).weight for _ in range(2000)])
    angles = torch.atan2(corners[:, 1, 0], corners[:, 0, 0])
    moments = [f(k * angles).mean().abs() for k in (1, 2, 3) for f in (torch.cos, torch.sin)]
    assert max(moments) < 4 * 0.5**0.5 / 2000**0.5  # four standard errors


def test_seed():
    first, again, other = (InvertibleLinear(5, seed=seed).weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    generator = torch.Generator().manual_seed(0)
    drawn = [InvertibleLinear(5, seed=generator).weight for _ in range(2)]
    assert torch.equal(drawn[0], first) and not torch.equal(*drawn)
    torch.manual_seed(0)
    assert torch.equal(InvertibleLinear(5).weight, first)
    state = torch.get_rng_state()
    InvertibleLinear(5, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


@each_shape
@pytest.mark.parametrize("batch_shape", [(), (0,), (4,), (2, 3)], ids=str)
def test_formula(shape, batch_shape):
    t = randomised(InvertibleLinear(shape, seed=1))
    x = points(*batch_shape, *shape)
    y = t(x)
    mixed = torch.tensordot(x, t.weight, dims=([-len(shape)], [1])).movedim(-1, -len(shape))
    assert_close(y, mixed, 1e-12)
    assert_close(t.with_cache(0).inv(y), x, 1e-9)
    pixels = torch.Size(shape[1:]).numel()
    expected = pixels * torch.linalg.slogdet(t.weight)[1]
    assert_close(t.log_abs_det_jacobian(x, y), expected.expand(batch_shape), 1e-10)


def test_weight_is_the_product_of_its_factors():
    t = randomised(InvertibleLinear(6, seed=2))
    packed, eye = t.lower_upper, torch.eye(6, dtype=F64)
    lower, upper = packed.tril(-1) + eye, packed.triu(1) + (packed.diagonal().exp() * t.signs).diag()
    assert_close(t.weight, eye[t.order] @ lower @ upper, 1e-12)


def test_convolution_of_images_of_any_size():
    t = randomised(invertible_conv1x1(3, seed=0))
    assert t.event_shape is None and t.domain.event_dim == t.codomain.event_dim == 3
    for height, width, batch_shape in ((4, 4, (2,)), (3, 5, ()), (1, 1, (2, 3)), (7, 2, (4,))):
        x = points(*batch_shape, 3, height, width)
        y = t(x)
        flat = F.conv2d(x.reshape(-1, 3, height, width), t.weight[:, :, None, None])
        assert_close(y, flat.reshape(x.shape), 1e-12)
        assert_close(t.inv(y + 0), x, 1e-9)
        log_det = height * width * torch.linalg.slogdet(t.weight)[1]
        assert_close(t.log_abs_det_jacobian(x, y), log_det.expand(batch_shape), 1e-10)
    chain = ComposeFlow([t, ActNorm((3, 2, 5))])
    assert chain.event_shape == (3, 2, 5) and chain(points(6, 3, 2, 5)).shape == (6, 3, 2, 5)


def test_gradient_of_the_log_determinant_is_the_inverse_transposed():
    t = randomised(InvertibleLinear(4, seed=0))
    weight = t.weight.detach().requires_grad_()
    torch.linalg.slogdet(weight)[1].backward()
    through = torch.autograd.grad(t.weight, t.lower_upper, weight.grad)[0]
    x = points(4)
    (direct,) = torch.autograd.grad(t.log_abs_det_jacobian(x, t(x)), t.lower_upper)
    assert_close(through, direct, 1e-10)


@pytest.mark.parametrize("shape", [(6,), (4, 3, 2)], ids=str)
def test_copies_files_and_states_are_the_same_to_the_last_bit(shape, tmp_path):
    t = randomised(InvertibleLinear(shape, seed=0))
    other = InvertibleLinear(shape, seed=1).double()
    assert not torch.equal(other.order, t.order) or not torch.equal(other.signs, t.signs)
    other.load_state_dict(t.state_dict())
    save(tmp_path / "flow.pt", t)
    x = points(5, *shape)
    for twin in (other, copy.deepcopy(t), pickle.loads(pickle.dumps(t)), load(tmp_path / "flow.pt")):
        assert torch.equal(twin.with_cache(0).inv(x), t.with_cache(0).inv(x))
        assert torch.equal(density(twin).log_prob(x), density(t).log_prob(x)) and torch.equal(twin(x), t(x))
    assert sorted(t.state_dict()) == ["lower_upper", "order", "signs"]


@pytest.mark.parametrize("shape", [(6,), (4, 3, 2)], ids=str)
def test_autocast_does_not_blur_it(shape):
    t = randomised(InvertibleLinear(shape, seed=0)).float().with_cache(0)
    x = points(5, *shape).float()
    y = t(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(t(x), y) and torch.equal(t.inv(y), t.with_cache(0).inv(y))
        assert t.log_abs_det_jacobian(x, y).dtype == torch.float32
        assert_close(t.inv(t(x)), x, 1e-4)
        assert t(x.bfloat16()).dtype == torch.float32


def test_round_trip_of_many_layers_in_single_precision():
    flow = ComposeFlow([InvertibleLinear((12, 2, 2), seed=seed) for seed in range(32)], cache_size=0)
    x = points(16, 12, 2, 2).float()
    assert_close(flow.inv(flow(x)), x, 1e-4)
    assert_close(flow(flow.inv(x)), x, 1e-4)


def test_audit_sees_all_channels_of_a_pixel_interact():
    report = audit(invertible_conv1x1((2, 1, 2), seed=0))
    assert report.unmoved == []
    assert report.uncoupled == [  # the two pixels do not
        ((0, 0, 0), (0, 0, 1)), ((0, 0, 0), (1, 0, 1)), ((0, 0, 1), (1, 0, 0)), ((1, 0, 0), (1, 0, 1)),
    ]  # fmt: skip
    assert audit(invertible_conv1x1(2, seed=0), (2, 1, 1)).ok


REFUSED = {
    "no channel": (lambda: InvertibleLinear(0), "one channel at least"),
    "no dimension": (lambda: InvertibleLinear(()), "one channel at least"),
    "an empty dimension": (lambda: InvertibleLinear((3, 0, 2)), "one channel at least"),
    "two ranks": (lambda: InvertibleLinear((3, 2), event_dim=3), "event_dim=3"),
    "no rank": (lambda: InvertibleLinear(3, event_dim=0), "C with event_dim=3"),
    "a matrix for a convolution": (lambda: invertible_conv1x1((3, 4)), r"\(C, H, W\).*InvertibleLinear"),
    "another size": (lambda: InvertibleLinear(3)(torch.zeros(4)), "build the transform for this event shape"),
    "other images": (lambda: invertible_conv1x1((3, 2, 2)).inv(torch.zeros(3, 2, 3)), r"\(3, 2, 2\)"),
    "other channels": (lambda: invertible_conv1x1(3)(torch.zeros(5, 4, 2, 2)), "for this number of channels"),
    "other channels, back": (lambda: invertible_conv1x1(3).inv(torch.zeros(4, 2, 2)), "3 channels in dimension -3"),
    "too few dimensions": (lambda: invertible_conv1x1(3)(torch.zeros(3, 2)), "3 channels in dimension -3"),
    "another type": (lambda: InvertibleLinear(3)(torch.zeros(3, dtype=F64)), "agree in dtype"),
}


@pytest.mark.parametrize("call, words", REFUSED.values(), ids=REFUSED)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- path gradients through the layers for images

PATHS = {
    "invertible linear (5,)": lambda: InvertibleLinear(5, seed=0),
    "invertible 1x1 convolution (3, 3, 2)": lambda: invertible_conv1x1((3, 3, 2), seed=0),
    "actnorm (3, 3, 2)": lambda: ActNorm((3, 3, 2)),
    "conv on a checkerboard (2, 3, 3)": lambda: image_coupling(checkerboard_mask(3, 3), (2, 3, 3)),
    "residual conv (1, 3, 4)": lambda: image_coupling(checkerboard_mask(3, 4), (1, 3, 4), ResidualConvNet),
    "Glow steps (3, 3, 2)": lambda: ComposeFlow([glow_step((3, 3, 2)), glow_step((3, 3, 2))]),
    "vectors (5,)": lambda: ComposeFlow([InvertibleLinear(5, seed=0), ActNorm(5), InvertibleLinear(5, seed=1)]),
}


@pytest.mark.parametrize("make", PATHS.values(), ids=PATHS)
def test_path_gradients_equal_the_inverse_form(make):
    t = randomised(make())
    base = dist.Normal(torch.zeros(t.event_shape, dtype=F64), 1.5).to_event(len(t.event_shape))
    x = points(6, *t.event_shape)
    y, log_det, score = push_score(t, x, -x / 1.5**2)
    leaf = y.detach().requires_grad_()
    q = dist.TransformedDistribution(base, [t.with_cache(0)])
    (expected,) = torch.autograd.grad(q.log_prob(leaf).sum(), leaf)
    assert_close(score, expected, 1e-10)
    assert_close(base.log_prob(x) - log_det, q.log_prob(leaf), 1e-10)

    path = PathGradientDistribution(base, [t])
    z = path.rsample((6,))
    entropy = path.score_parts(z).entropy_term
    parameters = list(t.parameters())
    weights = plain(6)  # one of the draws must not stand for all
    actual = torch.autograd.grad((weights * entropy).sum(), parameters, retain_graph=True)
    frozen = copy.deepcopy(t)
    x_again, log_det = frozen.requires_grad_(False)._backward(z)
    inverse_form = torch.autograd.grad((weights * (base.log_prob(x_again) - log_det)).sum(), parameters)
    for got, wanted in zip(actual, inverse_form, strict=True):
        assert_close(got, wanted, 1e-10)
        assert wanted.any()
