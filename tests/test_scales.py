"""Properties of the scale maps: formula, range, identity at 0, true and stable derivatives, copies, cost."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_affine.scales import (
    AdditiveScale,
    AtanScale,
    ExpScale,
    ScaleMap,
    SigmoidScale,
    SoftplusScale,
    TanhScale,
)


def _atan(lower, upper):
    def formula(r):
        a = np.where(r >= 0, upper, lower)
        return 2 * a / np.pi * np.arctan(np.pi * r / (2 * a))

    return formula


def _sigmoid(low, high):
    return lambda r: np.log(low + (high - low) * expit(r + np.log((1 - low) / (high - 1))))


def _softplus(r):
    s = r + np.log(np.e - 1)
    tail = s + np.log1p(-np.exp(np.minimum(s, -30)) / 2)
    return np.where(s < -30, tail, np.log(np.logaddexp(0, np.maximum(s, -30))))


# name: (map, formula in NumPy, range of the scale)
CASES = {
    "exp": (ExpScale(), lambda r: r, (0, math.inf)),
    "tanh": (TanhScale(), lambda r: 2 * np.tanh(r / 2), (math.exp(-2), math.exp(2))),
    "tanh narrow": (TanhScale(bound=0.3), lambda r: 0.3 * np.tanh(r / 0.3), (math.exp(-0.3), math.exp(0.3))),
    "atan": (AtanScale(), _atan(2.0, 2.0), (math.exp(-2), math.exp(2))),
    "atan tight above": (AtanScale(lower=2.0, upper=0.1), _atan(2.0, 0.1), (math.exp(-2), math.exp(0.1))),
    "atan tight below": (AtanScale(0.25, 4.0), _atan(0.25, 4.0), (math.exp(-0.25), math.exp(4))),
    "sigmoid": (SigmoidScale(), _sigmoid(0.001, 10.0), (0.001, 10)),
    "sigmoid narrow": (SigmoidScale(min_scale=0.5, max_scale=1.5), _sigmoid(0.5, 1.5), (0.5, 1.5)),
    "softplus": (SoftplusScale(), _softplus, (0, math.inf)),
    "additive": (AdditiveScale(), np.zeros_like, (1, 1)),
}
all_cases = pytest.mark.parametrize("scale, formula, scale_range", CASES.values(), ids=CASES)
all_maps = pytest.mark.parametrize("scale", [case[0] for case in CASES.values()], ids=CASES)
READ_RAW = {name: scale for name, (scale, _, _) in CASES.items() if name != "additive"}
all_that_read_raw = pytest.mark.parametrize("scale", READ_RAW.values(), ids=READ_RAW)

GRID = torch.linspace(-60, 60, 2401, dtype=torch.float64)
FAR = torch.tensor([-1e4, -200.0, 200.0, 1e4], dtype=torch.float64)
# where a formula changes branch, or a kernel of torch does: the sign, and the tails of softplus
SEAMS = [seam - shift for seam in (0.0, -40.0, -20.0, 20.0, 40.0) for shift in (0.0, math.log(math.e - 1))]


def _derivative(scale, raw):
    raw = raw.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scale(raw).sum(), raw)
    return gradient


@all_cases
def test_formula(scale, formula, scale_range):
    raw = torch.cat([GRID, FAR])
    expected = torch.as_tensor(formula(raw.numpy()))
    torch.testing.assert_close(scale(raw), expected, rtol=1e-12, atol=1e-14)


@all_maps
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_raw_zero_means_scale_one(scale, dtype):
    log_scale = scale(torch.zeros(3, dtype=dtype))
    assert log_scale.abs().max() <= 2 * torch.finfo(dtype).eps


@all_that_read_raw
def test_increasing(scale):
    assert (scale(GRID).diff() >= 0).all()
    near_zero = torch.linspace(-3, 3, 101, dtype=torch.float64)
    assert (scale(near_zero).diff() > 0).all()


@all_cases
def test_range(scale, formula, scale_range):
    assert scale.range == pytest.approx(scale_range, rel=1e-15)
    low, high = scale.range
    reached = scale(torch.cat([GRID, FAR])).exp()
    rounding = 4 * torch.finfo(torch.float64).eps
    assert (reached >= low * (1 - rounding)).all() and (reached <= high * (1 + rounding)).all()
    ends = scale(torch.tensor([-1e30, 1e30], dtype=torch.float64)).exp().clamp(max=1e29)
    expected = torch.tensor([low, min(high, 1e29)], dtype=torch.float64)
    torch.testing.assert_close(ends, expected, rtol=1e-12, atol=0)


@all_maps
def test_float32_values_are_those_of_float64(scale):
    for raw in (FAR, GRID):
        log_scale = scale(raw.float())
        assert log_scale.isfinite().all()
        torch.testing.assert_close(log_scale.double(), scale(raw.float().double()), rtol=1e-6, atol=5e-7)


@all_that_read_raw
def test_float32_derivatives_are_those_of_float64(scale):
    for raw, tiny in ((FAR, 1e-12), (GRID, 1e-6)):
        raw = raw.float()
        expected = _derivative(scale, raw.double())
        torch.testing.assert_close(_derivative(scale, raw).double(), expected, rtol=2e-6, atol=tiny)


@all_that_read_raw
def test_gradients_stay_finite_at_the_largest_numbers(scale):
    raw = torch.tensor([-3e38, -1e30, -0.0, 0.0, 1e-45, 1e30, 3e38])
    gradient = _derivative(scale, raw)
    assert gradient.isfinite().all() and (gradient >= 0).all()


@all_that_read_raw
def test_first_and_second_derivatives_are_true(scale):
    raw = torch.tensor([*SEAMS, -100.0, -3.0, -0.7, 0.4, 2.5, 100.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(scale, raw, eps=1e-6, atol=1e-8, rtol=1e-6)
    # the third derivative may jump at 0, which is all that a finite difference there would see
    away_from_zero = raw[raw != 0].detach().requires_grad_()
    assert gradgradcheck(scale, away_from_zero, eps=1e-6, atol=1e-8, rtol=1e-6)


@all_that_read_raw
def test_no_step_in_value_or_slope_at_the_seams(scale):
    seams = torch.tensor(SEAMS, dtype=torch.float64)
    left, right = (torch.nextafter(seams, torch.full_like(seams, end)) for end in (-math.inf, math.inf))
    torch.testing.assert_close(scale(left), scale(right), rtol=1e-14, atol=1e-14)
    slope = _derivative(scale, seams)
    for side in (left, right):
        torch.testing.assert_close(_derivative(scale, side), slope, rtol=1e-12, atol=1e-15)


SLOPE_ONE = ["exp", "tanh", "tanh narrow", "atan", "atan tight above", "atan tight below"]


@pytest.mark.parametrize("scale", [CASES[name][0] for name in SLOPE_ONE], ids=SLOPE_ONE)
def test_slope_at_zero_is_one_from_both_sides(scale):
    raw = torch.tensor([-1e-12, -0.0, 0.0, 1e-12], dtype=torch.float64)
    torch.testing.assert_close(_derivative(scale, raw), torch.ones_like(raw), rtol=0, atol=1e-15)


@pytest.mark.parametrize("scale", [CASES[name][0] for name in SLOPE_ONE], ids=SLOPE_ONE)
def test_curvature_at_zero_is_zero_from_both_sides(scale):
    raw = torch.tensor([-1e-12, 0.0, 1e-12], dtype=torch.float64)
    curvature = torch.func.vmap(torch.func.grad(torch.func.grad(scale)))(raw)
    torch.testing.assert_close(curvature, torch.zeros_like(raw), rtol=0, atol=1e-8)


def test_softplus_tails():
    raw = torch.tensor([-1e6, -200.0, -100.0])
    torch.testing.assert_close(SoftplusScale()(raw), raw + math.log(math.e - 1))
    torch.testing.assert_close(SoftplusScale()(-raw), torch.log(-raw + math.log(math.e - 1)))
    torch.testing.assert_close(_derivative(SoftplusScale(), raw), torch.ones(3))


@all_maps
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shape_and_dtype(scale, shape, dtype):
    log_scale = scale(torch.randn(shape, dtype=dtype))
    assert log_scale.shape == shape and log_scale.dtype == dtype


@all_maps
def test_uses_raw_says_whether_raw_matters(scale):
    assert scale.uses_raw == scale(torch.tensor([-1.0, 1.0])).all()


def test_additive_map_takes_any_tensor():
    assert not AdditiveScale()(torch.tensor([math.nan, math.inf, 1e30])).any()


@all_that_read_raw
def test_vmap_of_the_gradient(scale):
    raw = torch.linspace(-50, 50, 101, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(scale)(raw), scale(raw))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(scale))(raw), _derivative(scale, raw))
    tangent = torch.func.jvp(scale, (raw,), (torch.ones_like(raw),))[1]
    torch.testing.assert_close(tangent, _derivative(scale, raw))


@all_maps
def test_compiles_to_one_graph(scale):
    torch._dynamo.reset()
    raw = torch.linspace(-50, 50, 11)
    assert torch.equal(torch.compile(scale, fullgraph=True, backend="eager")(raw), scale(raw))


REBUILT = {
    "pickle": lambda scale: pickle.loads(pickle.dumps(scale)),
    "deepcopy": copy.deepcopy,
    "repr": lambda scale: eval(repr(scale)),
}


@all_maps
@pytest.mark.parametrize("rebuild", REBUILT.values(), ids=REBUILT)
def test_copies_and_repr_give_the_same_map(scale, rebuild):
    other = rebuild(scale)
    assert type(other) is type(scale) and other.range == scale.range
    assert torch.equal(other(GRID), scale(GRID))
    assert repr(other) == repr(scale)


@all_maps
def test_holds_no_tensors(scale):
    assert not list(scale.parameters()) and not list(scale.buffers()) and not scale.state_dict()


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


COSTS = {
    "exp": (ExpScale(), []),
    "tanh": (TanhScale(), ["div", "tanh", "mul"]),
    "atan, equal bounds": (AtanScale(), ["mul", "atan", "div"]),
    "atan, two bounds": (AtanScale(2.0, 0.1), ["mul", "leaky_relu", "atan", "div", "leaky_relu"]),
    "sigmoid": (SigmoidScale(), ["add", "sigmoid", "mul", "add", "log"]),
    "additive": (AdditiveScale(), ["zeros_like"]),
}


@pytest.mark.parametrize("scale, operations", COSTS.values(), ids=COSTS)
def test_costs_elementwise_operations_only(scale, operations):
    raw = torch.randn(4)
    with _Operations() as seen:
        scale(raw)
    assert seen.names == operations


REFUSED = {
    "tanh zero": (lambda: TanhScale(0.0), "bound must be positive.*bound=0.0; take 2.0"),
    "tanh negative": (lambda: TanhScale(bound=-1), "bound=-1"),
    "tanh infinite": (lambda: TanhScale(math.inf), "finite.*bound=inf;.*ExpScale"),
    "tanh nan": (lambda: TanhScale(math.nan), "bound=nan"),
    "tanh too wide": (lambda: TanhScale(710.0), "finite.*bound=710.0"),
    "atan lower": (lambda: AtanScale(lower=0.0), "lower must be positive.*lower=0.0"),
    "atan upper": (lambda: AtanScale(2.0, math.inf), "upper must be positive.*upper=inf"),
    "sigmoid min zero": (lambda: SigmoidScale(min_scale=0.0), "min_scale=0.0.*SoftplusScale"),
    "sigmoid min one": (lambda: SigmoidScale(min_scale=1.0), "0 < min_scale < 1 < max_scale"),
    "sigmoid max one": (lambda: SigmoidScale(max_scale=1.0), "max_scale=1.0"),
    "sigmoid max infinite": (lambda: SigmoidScale(max_scale=math.inf), "max_scale=inf"),
    "sigmoid nan": (lambda: SigmoidScale(max_scale=math.nan), "max_scale=nan"),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_refuses_bounds_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_map_without_forward_says_so():
    class Unfinished(ScaleMap):
        pass

    with pytest.raises(NotImplementedError, match="Unfinished must define forward"):
        Unfinished()(torch.zeros(1))
