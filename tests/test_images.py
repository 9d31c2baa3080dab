"""Bytes to floats, floats to reals, and bits per dimension: exact where they can be."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from cases import assert_close

from pyro_affine import ComposeFlow, LogitImages, NormalizingFlow, bits_per_dim, dequantize, real_nvp

ALPHAS = [1e-6, 0.01, 0.05, 0.25, 0.49]
every_alpha = pytest.mark.parametrize("alpha", ALPHAS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int64], ids=str)
@pytest.mark.parametrize("levels", [2, 17, 32, 256])
def test_dequantized_images_stay_within_their_level(levels, kind):
    images = torch.arange(levels).to(kind).repeat(500, 1)
    y = dequantize(images, levels, generator=generator())
    assert y.shape == images.shape and y.dtype == torch.get_default_dtype()
    floats = images.to(y.dtype)
    assert (y >= floats / levels).all() and (y < (floats + 1) / levels).all()
    uniform = (y * levels - floats).double()
    assert abs(float(uniform.mean()) - 0.5) < 0.02 and abs(float(uniform.std()) - 12**-0.5) < 0.02


def test_no_noise_lifts_a_pixel_to_the_next_level(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, 1 - 2**-24))
    images = torch.arange(256, dtype=torch.uint8)
    y = dequantize(images)
    assert torch.equal((y * 256).floor(), images.float()) and y.max() < 1


def test_dequantize_is_seeded_by_a_generator_alone():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    first = dequantize(images, generator=generator(3))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(dequantize(images, generator=generator(3)), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(dequantize(images, generator=generator(4)), first)
    assert dequantize(images[:0]).shape == (0, 3, 8, 8)


@every_alpha
def test_logit_images_reach_black_and_white_at_finite_points(alpha):
    layer = LogitImages(alpha, (1, 1, 2)).double()
    x = layer.inv(torch.tensor([[[0.0, 1.0]]], dtype=torch.float64))
    end = math.log((1 - alpha) / alpha)
    assert_close(x, torch.tensor([[[-end, end]]], dtype=torch.float64), 1e-9)
    assert_close(layer(x), torch.tensor([[[0.0, 1.0]]], dtype=torch.float64), 1e-12)


@every_alpha
@every_dtype
def test_logit_images_are_stable_at_the_ends(alpha, dtype):
    layer = LogitImages(alpha, (1, 1, 9))
    x = torch.tensor([-200.0, -90, -30, -5, 0, 5, 30, 90, 200], dtype=dtype).reshape(1, 1, 9).requires_grad_()
    y = layer(x)
    log_det = layer.log_abs_det_jacobian(x, y)
    expected = sum(-abs(v) - 2 * math.log1p(math.exp(-abs(v))) for v in x.flatten().tolist()) - 9 * math.log1p(
        -2 * alpha
    )
    assert layer.codomain.check(y).all()
    assert_close(log_det.detach().double(), torch.tensor(expected, dtype=torch.float64), 1e-5)
    (grad,) = torch.autograd.grad(y.sum() + log_det, x)
    assert grad.isfinite().all()


@every_dtype
def test_logit_keeps_its_precision_near_white_as_near_black(dtype):
    layer = LogitImages(1e-6, (1, 1, 3))
    near = torch.tensor([2.0**-20, 2.0**-10, 0.125], dtype=dtype)  # 1 - near is exact
    x = layer.inv(torch.stack([near, 1 - near])[:, None, None])
    assert_close(x[0], -x[1], 1e-6 if dtype == torch.float32 else 1e-14)


@every_alpha
def test_codomain_is_what_the_layer_reaches(alpha):
    layer = LogitImages(alpha, (2, 2, 2))
    interval = layer.codomain.base_constraint
    ends = layer(torch.stack([torch.full((2, 2, 2), -60.0), torch.full((2, 2, 2), 60.0)]).double())
    assert_close(
        ends[:, 0, 0, 0], torch.tensor([interval.lower_bound, interval.upper_bound], dtype=torch.float64), 1e-12
    )
    assert interval.lower_bound < 0 and interval.upper_bound > 1
    assert repr(layer.domain.base_constraint) == "Real()" and layer.domain.event_dim == layer.codomain.event_dim == 3


@pytest.mark.parametrize("event_shape", [(1, 3, 5), (3, 2, 2), (4,)], ids=str)
@pytest.mark.parametrize("batch_shape", [(), (0,), (2, 3)], ids=str)
def test_log_det_sums_over_the_event(event_shape, batch_shape):
    layer = LogitImages(0.05, event_shape)
    x = torch.randn(*batch_shape, *event_shape, dtype=torch.float64).requires_grad_()
    y = layer(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    expected = slope.log().flatten(len(batch_shape)).sum(-1)
    assert layer._forward(x)[1].shape == batch_shape
    assert_close(layer._forward(x)[1], expected, 1e-10)
    assert_close(layer._backward(y)[1], expected, 1e-10)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("event_shape", [(1, 8, 8), (3, 5, 7)], ids=str)
def test_a_uniform_density_costs_the_bits_of_the_levels(event_shape, levels):
    uniform = dist.Uniform(torch.zeros(event_shape), 1.0).to_event(3)
    images = torch.randint(0, levels, (6, *event_shape))
    bits = bits_per_dim(uniform.log_prob(dequantize(images, levels)), event_shape, levels)
    assert_close(bits, torch.full((6,), math.log2(levels)), 1e-6)


def test_bits_of_a_density_that_knows_half_of_the_range():
    half = dist.Uniform(torch.zeros(2, 4, 4), 0.5).to_event(3)  # the upper bit of each byte is always 0
    y = dequantize(torch.randint(0, 128, (5, 2, 4, 4)))
    assert_close(bits_per_dim(half.log_prob(y), (2, 4, 4)), torch.full((5,), 7.0), 1e-6)


def test_a_logistic_base_makes_the_uniform_density_of_the_whole_codomain():
    layer = LogitImages(0.05, (1, 2, 2))
    y = torch.rand(1000, 1, 2, 2, generator=generator(), dtype=torch.float64)
    x, log_det = layer._backward(y)
    logistic = (torch.nn.functional.logsigmoid(x) + torch.nn.functional.logsigmoid(-x)).flatten(1).sum(-1)
    expected = 8 - math.log2(1 - 2 * 0.05)  # uniform on an interval of length 1 / (1 - 2 alpha)
    assert_close(bits_per_dim(logistic - log_det, (1, 2, 2)), torch.full((1000,), expected, dtype=y.dtype), 1e-9)


def test_the_last_layer_of_a_flow_of_images():
    couplings = real_nvp((1, 4, 4), num_layers=2, hidden_dims=(6,))
    flow = NormalizingFlow(ComposeFlow([couplings, LogitImages(0.05, (1, 4, 4))]), (1, 4, 4))
    y = dequantize(torch.randint(0, 256, (3, 1, 4, 4)))
    assert flow.log_prob(y).shape == (3,) and flow().support.check(flow.sample((50,))).all()


REFUSED = {
    "floats": (lambda: dequantize(torch.rand(3)), "integers from 0 to 255, got torch.float32"),
    "booleans": (lambda: dequantize(torch.ones(3, dtype=torch.bool)), "got torch.bool"),
    "negative": (lambda: dequantize(torch.tensor([-1, 3])), "between 0 and 255, got -1 to 3"),
    "above the levels": (lambda: dequantize(torch.tensor([0, 16]), 16), "between 0 and 15, got 0 to 16.*levels=17"),
    "bytes above the levels": (
        lambda: dequantize(torch.tensor([255], dtype=torch.uint8), 32), "between 0 and 31, got 255"
    ),
    "one level": (lambda: dequantize(torch.tensor([0]), 1), "levels must be 2 or more, got 1"),
    "alpha 0": (lambda: LogitImages(0.0, (1, 2, 2)), "between 0 and 0.5, got 0.0; .*infinitely far"),
    "alpha 0.5": (lambda: LogitImages(0.5, (1, 2, 2)), "got 0.5"),
    "alpha nan": (lambda: LogitImages(math.nan, (1, 2, 2)), "got nan"),
    "image of another shape": (lambda: LogitImages(0.1, (1, 2, 2))(torch.zeros(1, 2, 3)), r"\(1, 2, 2\).*\(1, 2, 3\)"),
    "bits of one level": (lambda: bits_per_dim(torch.zeros(1), (1, 2, 2), 1), "levels must be 2 or more, got 1"),
    "bits of no entry": (lambda: bits_per_dim(torch.zeros(1), (0, 2, 2)), r"one entry at least, got \(0, 2, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize("do, message", REFUSED.values(), ids=REFUSED)
def test_refusals_say_the_rule_and_what_came(do, message):
    with pytest.raises(ValueError, match=message):
        do()
