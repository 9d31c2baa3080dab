"""LOFT: the identity inside, an exact inverse and log-determinant everywhere, in float32 too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_affine.tails import LOFT

WIDE = torch.tensor([-1e30, -3e4, -7.0, -2.0, -1.999, -0.3, 0.0, 1e-30, 1.5, 2.0, 2.001, 40.0, 1e10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_and_the_same_log_det_both_ways(dtype: torch.dtype) -> None:
    layer, x = LOFT(None, 2.0), WIDE.to(dtype)
    y, log_det = layer._forward(x)
    back, log_det_back = layer._backward(y)
    assert y.isfinite().all() and log_det.isfinite().all()
    assert torch.allclose(log_det, log_det_back, rtol=1e-6, atol=1e-6)
    # beyond t an error of y is multiplied by the slope of the inverse, 1 + |x| - t
    assert torch.allclose(back, x, rtol=80 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("threshold", [0.5, 20.0, 100.0])
def test_the_identity_up_to_the_threshold_to_the_last_bit(threshold: float) -> None:
    x = torch.linspace(-threshold, threshold, 1001)
    y, log_det = LOFT((1001,), threshold)._forward(x)
    assert torch.equal(y, x) and log_det == 0


def test_formula_beyond_the_threshold() -> None:
    y, log_det = LOFT((2,), 3.0)._forward(torch.tensor([5.0, -9.0], dtype=torch.float64))
    assert torch.allclose(y, torch.tensor([3 + math.log(3), -3 - math.log(7)], dtype=torch.float64))
    assert math.isclose(float(log_det), -math.log(3) - math.log(7))


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 3)], ids=str)
def test_log_det_is_that_of_autograd(event_shape: tuple[int, ...]) -> None:
    layer = LOFT(event_shape, 1.0)
    x = 3 * torch.randn(5, *event_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def flat(value: Tensor) -> Tensor:
        return layer._forward(value.reshape(event_shape))[0].reshape(-1)

    size = math.prod(event_shape)
    expected = [torch.autograd.functional.jacobian(flat, row.reshape(-1)).reshape(size, size).logdet() for row in x]
    assert torch.allclose(layer.log_abs_det_jacobian(x, layer(x)), torch.stack(expected))


def test_the_slope_is_continuous_and_finite_everywhere() -> None:
    x = torch.tensor([0.0, 2.0, 2.0 + 1e-7, -2.0, 1e30], requires_grad=True)
    LOFT((5,), 2.0)(x).sum().backward()
    assert torch.allclose(x.grad, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), atol=1e-6)


def test_gradients_of_the_log_det_are_finite() -> None:
    x = WIDE.clone().requires_grad_()
    LOFT((len(x),), 2.0)._forward(x)[1].backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.inf, math.nan])
def test_a_threshold_must_be_positive_and_finite(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold must be positive and finite, got .*; 100 is the default"):
        LOFT((2,), threshold)
