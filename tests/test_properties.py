"""What every transform must be: invertible, with a true log-determinant, trainable, vectorised, compilable."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import (
    CASES,
    COUPLINGS,
    IDENTITIES,
    ONE_ENTRY,
    assert_close,
    coupling,
    data_shape,
    density,
    each,
    event_shape,
    randomised,
    x_points,
    y_points,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import constraints
from torch.func import functional_call, jacrev, vmap

from pyro_affine.coupling import AffineCoupling
from pyro_affine.flows import NormalizingFlow

BATCH_SHAPES = [(), (1,), (4,), (2, 3)]
every_batch_shape = pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)
PLAIN = {"curves": 0, "whiten": False}  # else the base has heavier tails


def jacobian_log_det(function, points, event_dim):
    """Sign and log|det| of the Jacobian at each point, one backward pass for each entry of the event."""
    points = points.detach().requires_grad_()
    values = function(points).flatten(points.dim() - event_dim)
    rows = [torch.autograd.grad(v.sum(), points, retain_graph=True)[0] for v in values.unbind(-1)]
    return torch.linalg.slogdet(torch.stack([row.flatten(points.dim() - event_dim) for row in rows], -2))


@each(CASES)
@every_batch_shape
def test_round_trip(make, batch_shape):
    t = randomised(make()).with_cache(0)
    x, y = x_points(t, batch_shape), y_points(t, batch_shape)
    assert_close(t.inv(t(x)), x, 1e-9)
    assert_close(t(t.inv(y)), y, 1e-9)


@each(CASES)
@every_batch_shape
def test_log_det_is_that_of_the_jacobian(make, batch_shape):
    t = randomised(make())
    x, y = x_points(t, batch_shape), y_points(t, batch_shape)
    _, log_det = jacobian_log_det(t, x, t.domain.event_dim)
    _, inverse_log_det = jacobian_log_det(t.inv, y, t.codomain.event_dim)
    for twin in (t, t.with_cache(0)):  # from the pair of the cache, and anew
        forth, back = twin(x), twin.inv(y)
        assert_close(twin.log_abs_det_jacobian(x, forth), log_det, 1e-8)
        assert_close(twin.inv.log_abs_det_jacobian(forth, x), -log_det, 1e-8)
        assert_close(twin.inv.log_abs_det_jacobian(y, back), inverse_log_det, 1e-8)
        assert_close(twin.log_abs_det_jacobian(back, y), -inverse_log_det, 1e-8)


@each(CASES)
@every_batch_shape
def test_shapes_and_dtypes(make, batch_shape):
    t = randomised(make())
    x = x_points(t, batch_shape)
    y = t(x)
    log_det = t.log_abs_det_jacobian(x, y)
    assert y.shape == t.forward_shape(x.shape) == t.inv.inverse_shape(x.shape)
    assert x.shape == t.inverse_shape(y.shape) == t.inv.forward_shape(y.shape)
    assert log_det.shape == batch_shape
    assert y.dtype == log_det.dtype == x.dtype
    assert t.domain.check(x).all() and t.codomain.check(y).all()


@each(COUPLINGS)
@every_batch_shape
def test_kept_entries_pass_bit_for_bit_and_the_others_move(make, batch_shape):
    t = randomised(make())
    x = x_points(t, batch_shape)
    for value in (t(x), t.inv(x)):
        assert torch.equal(value[..., t.mask], x[..., t.mask])
        assert (value[..., ~t.mask] != x[..., ~t.mask]).all()


@each(IDENTITIES)
@every_batch_shape
def test_start_at_the_identity_up_to_the_order_of_entries(make, batch_shape):
    t = make().double()
    x = x_points(t, batch_shape)
    y = t(x)
    as_it_was = isinstance(t, AffineCoupling)
    expected, actual = (v if as_it_was else v.flatten(len(batch_shape)).sort().values for v in (x, y))
    atol = 1e-6 if make in ONE_ENTRY.values() else 1e-12  # the splines of one entry are made in float32
    assert_close(actual, expected, atol)
    assert_close(t.log_abs_det_jacobian(x, y), torch.zeros(batch_shape, dtype=x.dtype), atol)


@each(CASES, leave_out=["permutation", "standardization"])
def test_gradients_reach_every_parameter(make):
    t = randomised(make())
    x, y = x_points(t, (4,)), y_points(t, (4,))
    weights = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype)
    forth, back = t(x), t.inv(y)
    for value, log_det in ((forth, t.log_abs_det_jacobian(x, forth)), (back, t.log_abs_det_jacobian(back, y))):
        t.zero_grad()
        ((value.flatten() * weights).sum() + log_det.sum()).backward(retain_graph=True)
        for name, parameter in t.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name


@each(CASES, leave_out=["(2, 4, 4)", "two networks"])
def test_gradients_match_finite_differences(make):
    t = randomised(make())
    names, parameters = zip(*t.named_parameters(), strict=True) if any(True for _ in t.parameters()) else ((), ())

    def both(direction):
        def function(points, *parameters):
            values = dict(zip(names, parameters, strict=True))
            return functional_call(_WithLogDet(t, direction), {f"t.{k}": v for k, v in values.items()}, (points,))

        return function

    leaves = [p.detach().clone().requires_grad_() for p in parameters]
    for direction, points in (("forward", x_points(t, (2,))), ("inverse", y_points(t, (2,)))):
        assert torch.autograd.gradcheck(both(direction), (points.requires_grad_(), *leaves), fast_mode=True)


class _WithLogDet(torch.nn.Module):
    def __init__(self, t, direction):
        super().__init__()
        self.t, self.direction = t, direction

    def forward(self, points):
        t = self.t if self.direction == "forward" else self.t.inv
        value = t(points)
        return value, t.log_abs_det_jacobian(points, value)


# Pyro does not say the sign of these
@each(CASES, leave_out=["Pyro's", "real_nvp (1,)", "torch's affine"])
def test_sign_is_that_of_the_determinant(make):
    t = randomised(make())
    sign, _ = jacobian_log_det(t, x_points(t, (3,)), t.domain.event_dim)
    assert (sign == t.sign).all() and t.inv.sign == t.sign


# Pyro's Spline and BatchNorm choose by values or write in place, which vmap and one graph do not allow; so real_nvp(1)
# does not either
NOT_FUNCTIONAL = ["(1,)", "Spline", "Householder", "BatchNorm"]


@each(CASES, leave_out=NOT_FUNCTIONAL)
def test_vmap_and_jacrev(make):
    t = randomised(make())
    x = x_points(t, (4,))
    size = event_shape(t).numel()
    with_log_det = _WithLogDet(t, "forward")
    for actual, expected in zip(vmap(with_log_det)(x), with_log_det(x), strict=True):
        assert_close(actual, expected, 1e-12)
    jacobian = vmap(jacrev(t))(x).reshape(4, size, size)
    assert_close(torch.linalg.slogdet(jacobian)[1], with_log_det(x)[1], 1e-8)
    back = vmap(_WithLogDet(t, "inverse"))(y_points(t, (4,)))
    assert_close(back[0], t.inv(y_points(t, (4,))), 1e-12)


@each(CASES)
def test_log_prob_of_a_stock_distribution(make):
    t = randomised(make())
    y = y_points(t, (4,))
    x, log_det = t._backward(y)
    expected = dist.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(-1) - log_det
    assert_close(density(t).log_prob(y), expected, 1e-12)
    assert density(t).event_shape == data_shape(t) and density(t).support.check(y).all()
    if t.codomain.check(-1e9 * torch.ones_like(y)).all() and event_shape(t) == data_shape(t):
        flow = NormalizingFlow(t, event_shape(t), **PLAIN).double()
        assert_close(flow.log_prob(y), expected, 1e-12)
        assert_close(flow().log_prob(y), expected, 1e-12)


COMPILED = [
    "checkerboard over channels (2, 4, 4)", "softplus scale", "conditional_real_nvp (5,)", "inverse of mixed (5,)",
    "torch's affine",
]  # fmt: skip


@each({name: CASES[name] for name in COMPILED})
def test_log_prob_compiles_to_one_graph(make):
    t = randomised(make())
    y = y_points(t, (4,))
    flow = NormalizingFlow(t, event_shape(t), **PLAIN).double()
    expected = density(t).log_prob(y).detach()
    pyro.enable_validation(False)  # as torch's compiler does it, once in a process; validation is not compiled
    for function in (flow.log_prob, density(t).log_prob):
        compiled = torch.compile(function, fullgraph=True, backend="eager")(y)
        assert_close(compiled, expected, 1e-12)
    torch.compiler.reset()


@st.composite
def events(draw):
    event = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda s: torch.Size(s).numel() > 1))
    size = torch.Size(event).numel()
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(lambda m: 0 < sum(m) < size))
    return torch.tensor(mask).reshape(event), tuple(draw(st.lists(st.integers(0, 3), max_size=3)))


@given(events())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_any_mask_event_shape_and_batch_shape(event):
    mask, batch_shape = event
    t = randomised(coupling(mask))
    x = x_points(t, batch_shape)
    y = t(x)
    log_det = t.log_abs_det_jacobian(x, y)
    assert y.shape == x.shape and log_det.shape == batch_shape
    assert torch.equal(y[..., mask], x[..., mask])
    assert_close(t.with_cache(0).inv(y), x, 1e-9)
    # where the kept entries stay, each moved one is scaled and shifted: the log-determinant is seen by difference
    h = 0.5
    nudged = t(torch.where(mask, x, x + h))
    assert_close(((nudged - y) / h)[..., ~mask].abs().log().sum(-1), log_det, 1e-8)
    assert t.domain.event_dim == mask.dim() and constraints.is_dependent(t.domain) is False
