"""Transforms of Pyro and torch as parts of our stacks: each keeps the contract of a layer of ours."""

from __future__ import annotations

import copy
import pickle

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from torch import nn
from torch.distributions import (
    AffineTransform,
    CatTransform,
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    SigmoidTransform,
    StickBreakingTransform,
    constraints,
)

from pyro_affine import ComposeFlow, real_nvp
from pyro_affine.foreign import Foreign

ORDER = torch.tensor([2, 0, 3, 1])


def lower_triangular():
    return T.LowerCholeskyAffine(torch.randn(4), torch.eye(4) + 0.3 * torch.randn(4, 4).tril(-1))


MODULES = {
    "BatchNorm": lambda: T.BatchNorm(4),
    "Spline": lambda: T.Spline(4),
    "Spline quadratic": lambda: T.Spline(4, order="quadratic"),
    "SplineCoupling": lambda: T.spline_coupling(4, hidden_dims=[8]),
    "AffineAutoregressive": lambda: T.affine_autoregressive(4, hidden_dims=[8]),
    "AffineAutoregressive stable": lambda: T.affine_autoregressive(4, hidden_dims=[8], stable=True),
    "AffineCoupling of Pyro": lambda: T.affine_coupling(4, hidden_dims=[8]),
    "Householder": lambda: T.householder(4, 2),
}
PLAIN = {
    "Permute": lambda: T.Permute(torch.randperm(4)),
    "LowerCholeskyAffine": lower_triangular,
    "AffineTransform": lambda: AffineTransform(torch.randn(4), 0.5 + torch.rand(4)),
    "AffineTransform of numbers": lambda: AffineTransform(1.0, -2.0, event_dim=1),
}
BOUNDED = {
    "SigmoidTransform": lambda: SigmoidTransform(),
    "StickBreakingTransform": lambda: StickBreakingTransform(),
}
PARTS = {**MODULES, **PLAIN, **BOUNDED}

parts = pytest.mark.parametrize("make", PARTS.values(), ids=PARTS)
modules = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


def jitter(module):
    for parameter in module.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return module


def ours():
    return jitter(real_nvp(4, num_layers=2, hidden_dims=(8,)))


def in_a_list(part):
    return (
        [ours(), part] if any(isinstance(part, type(make())) for make in BOUNDED.values()) else [ours(), part, ours()]
    )


def chain(transforms):
    return ComposeFlow(transforms).eval()  # BatchNorm's inverse in training is no inverse


def stack(part):
    return chain(in_a_list(part))


def log_prob(flow, value):
    return dist.TransformedDistribution(dist.Normal(torch.zeros(4), 1.0).to_event(1), [flow]).log_prob(value)


@parts
def test_round_trip_both_ways(make):
    flow, x = stack(make()), torch.randn(5, 4)
    y = flow(x).detach().clone()
    assert torch.allclose(flow.inv(y), x, atol=1e-9)
    assert torch.allclose(flow(flow.inv(y).detach().clone()), y, atol=1e-9)


@parts
def test_log_det_is_that_of_the_jacobian(make):
    flow, x = stack(make()), torch.randn(5, 4)
    y, log_det = flow._forward(x)
    if y.shape == x.shape:
        jacobians = torch.stack([torch.autograd.functional.jacobian(lambda v: flow._forward(v)[0], v) for v in x])
        expected = torch.linalg.slogdet(jacobians).logabsdet
    else:
        expected = ComposeTransform(list(flow.parts)).log_abs_det_jacobian(x, flow(x))
    assert log_det.shape == (5,)
    assert torch.allclose(log_det, expected, atol=1e-8)
    assert torch.allclose(flow._backward(y)[1], expected, atol=1e-8)


@parts
def test_a_list_of_transforms_is_the_same_distribution(make):
    base = dist.Normal(torch.zeros(4), 1.0).to_event(1)
    transforms = in_a_list(make())
    chained = dist.TransformedDistribution(base, [chain(transforms)])
    listed = dist.TransformedDistribution(base, transforms)
    value = chained.sample((5,))
    assert chained.event_shape == listed.event_shape == value.shape[1:]
    assert repr(chained.support) == repr(listed.support)
    assert chained.support.check(value).all()
    assert torch.allclose(chained.log_prob(value.clone()), listed.log_prob(value.clone()), atol=1e-9)


@modules
@pytest.mark.parametrize("inverted", [False, True], ids=["", "inv"])
def test_gradients_reach_every_parameter(make, inverted):
    part = make()
    flow = stack(part.inv if inverted else part)
    assert {id(p) for p in part.parameters()} <= {id(p) for p in flow.parameters()}
    flow.inv(torch.randn(50, 4)).pow(2).sum().backward()
    for name, parameter in part.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@modules
def test_score_is_not_stale_after_a_step_of_the_optimiser(make):
    part = make()
    flow, y = stack(part), torch.randn(20, 4)
    optimiser, seen = torch.optim.Adam(part.parameters(), lr=0.1), []
    for _ in range(2):
        score = log_prob(flow, y)
        seen.append(score.detach())
        optimiser.zero_grad()
        (-score.mean()).backward()
        with torch.no_grad():
            draw = flow(torch.randn(4))
        optimiser.step()
    with torch.no_grad():
        assert torch.equal(log_prob(flow, draw), log_prob(copy.deepcopy(flow), draw))
    now = log_prob(flow, y)
    assert torch.equal(now, log_prob(copy.deepcopy(flow), y))
    assert all((now - before).abs().max() > 1e-3 for before in seen)


@parts
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("part_alone", [True, False], ids=["made by the part", "made by the stack"])
def test_copy_after_use_is_the_same_density(make, copied, part_alone):
    part = make()
    flow, x = stack(part), torch.randn(5, 4)
    y = flow(x)
    log_prob(flow, y).sum().backward()
    if part_alone:
        part(x)  # leaves a graph in the caches of the part
    twin, y = copied(flow), y.detach().clone()
    assert torch.equal(log_prob(twin, y), log_prob(flow, y))
    jitter(twin)
    assert not torch.equal(log_prob(twin, y), log_prob(flow, y))


@parts
def test_state_dict_carries_the_density_over(make):
    torch.manual_seed(1)
    flow = stack(make())
    torch.manual_seed(2)
    fresh = stack(make())
    y = flow(torch.randn(5, 4)).detach()
    log_prob(fresh, y), fresh(torch.randn(4))  # used before it is loaded
    missing, unexpected = fresh.load_state_dict(flow.state_dict())
    assert not missing and not unexpected
    assert torch.equal(log_prob(fresh, y), log_prob(flow, y))
    assert torch.equal(fresh._forward(y[:, :4])[0], flow._forward(y[:, :4])[0])


@parts
@pytest.mark.parametrize("move", [lambda t: t.double(), lambda t: t.to(torch.float64)], ids=["double", "to"])
@pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
def test_moves_to_another_dtype(make, move, used):
    torch.set_default_dtype(torch.float32)
    flow, x = stack(make()), torch.randn(5, 4)
    before = flow._forward(x)
    flow.inv(before[0].detach()) if used else None
    torch.set_default_dtype(torch.float64)  # Pyro's autoregressive inverse makes zeros of the default dtype
    after = move(flow)._forward(x.double())
    for old, new in zip(before, after, strict=True):
        assert new.dtype == torch.float64
        assert torch.allclose(old.double(), new, atol=1e-4)
    assert flow.inv(after[0].detach()).dtype == torch.float64


@modules
def test_inverse_of_a_module_is_its_inverse(make):
    part = make().eval()
    flow, x = ComposeFlow([part.inv]), torch.randn(5, 4)
    y = part(x).detach().clone()
    assert torch.allclose(flow(y), x, atol=1e-9)
    assert torch.allclose(flow._forward(y)[1], -Foreign(part)._forward(x)[1], atol=1e-8)
    assert len(list(flow.parameters())) == len(list(part.parameters()))


def test_batch_norm_in_training_learns_its_moments_while_it_scores():
    part = T.BatchNorm(4, momentum=0.5)
    flow, y = ComposeFlow([part]).train(), 5 + 2 * torch.randn(100, 4)
    first, second = log_prob(flow, y), log_prob(flow, y)
    assert torch.equal(first, second)  # scores the batch by its own moments
    assert torch.allclose(part.moving_mean, 0.75 * y.mean(0))
    flow.eval()
    assert (log_prob(flow, y) - first).abs().max() > 0.1


NESTED = {
    "ComposeTransform": lambda t: ComposeTransform([t, AffineTransform(0.0, 2.0)]),
    "ComposeTransformModule": lambda t: T.ComposeTransformModule([t, T.Permute(ORDER)]),
    "IndependentTransform": lambda t: IndependentTransform(t, 1),
    "IndependentTransform in ComposeTransformModule": lambda t: T.ComposeTransformModule([IndependentTransform(t, 1)]),
    "CatTransform": lambda t: CatTransform([ExpTransform(), t], dim=-1, lengths=[1, 3]),
    "inverse of ComposeTransform": lambda t: ComposeTransform([t, AffineTransform(0.0, 2.0)]).inv,
    "inverse of IndependentTransform": lambda t: IndependentTransform(t, 1).inv,
}


class Shift(dist.TransformModule):
    """A Module with a parameter that is an elementwise transform and accepts ``with_cache``."""

    domain = codomain = constraints.real
    bijective = True

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.randn(()))

    def _call(self, x):
        return x + self.loc

    def _inverse(self, y):
        return y - self.loc

    def log_abs_det_jacobian(self, x, y):
        return torch.zeros_like(x)


@pytest.mark.parametrize("nest", NESTED.values(), ids=NESTED)
def test_nested_transforms_hide_nothing(nest):
    flow, fresh = (ComposeFlow([nest(Shift())]) for _ in range(2))
    x = torch.rand(3, 4)
    assert len(list(flow.parameters())) == 1
    assert sum("loc" in name for name in flow.state_dict()) == 1
    fresh.load_state_dict(flow.state_dict())
    assert torch.equal(fresh(x), flow(x))
    assert torch.equal(copy.deepcopy(flow)(x), flow(x))


def test_permute_used_before_it_is_wrapped_has_the_same_state():
    used = T.Permute(ORDER)
    used.inv(torch.zeros(4))
    assert list(ComposeFlow([used]).state_dict()) == list(ComposeFlow([T.Permute(ORDER)]).state_dict())


def test_parameter_of_a_plain_transform_is_registered_and_trained():
    loc = nn.Parameter(torch.zeros(4))
    flow, y = ComposeFlow([AffineTransform(loc, 2.0, event_dim=1)]), torch.ones(4)
    assert [id(p) for p in flow.parameters()] == [id(loc)]
    before = log_prob(flow, y)
    before.backward()
    with torch.no_grad():
        loc += loc.grad
    assert log_prob(flow, y) > before


def test_tensors_with_a_history_are_used_and_get_gradients():
    raw = torch.zeros(4, requires_grad=True)
    flow = ComposeFlow([AffineTransform(raw + 1, raw.exp(), event_dim=1)])
    flow(torch.ones(4)).sum().backward()
    assert torch.equal(raw.grad, torch.full((4,), 2.0))


def test_functional_call_swaps_constants_and_parameters_of_plain_transforms():
    loc = nn.Parameter(torch.zeros(4))
    flow, y = ComposeFlow([AffineTransform(loc, torch.ones(4), event_dim=1)]), torch.ones(4)
    swapped = {"parts.0.loc_0": torch.full((4,), 3.0), "parts.0.scale_0": torch.full((4,), 2.0)}
    assert torch.equal(torch.func.functional_call(flow, swapped, (y,)), torch.full((4,), 5.0))
    assert torch.equal(flow(y), y)
