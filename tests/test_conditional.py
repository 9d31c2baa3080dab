"""Conditional chains, ours and Pyro's mixed: shapes for any context batch, parameters in sight, copies, state."""

from __future__ import annotations

import copy
import pickle

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch

from pyro_affine import ComposeFlow, ConditionalComposeFlow, conditional_affine_coupling, conditional_real_nvp
from pyro_affine.linear import LowerTriangularAffine, Permutation


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


def jitter(module):
    for parameter in module.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return module


def standard_normal():
    return dist.Normal(torch.zeros(4), 1.0).to_event(1)


CONDITIONAL = {
    "ours": lambda: conditional_affine_coupling(4, 3),
    "ours inverted": lambda: conditional_affine_coupling(4, 3).inv,
    "AffineAutoregressive": lambda: T.conditional_affine_autoregressive(4, 3, hidden_dims=[8]),
    "AffineAutoregressive inverted": lambda: T.conditional_affine_autoregressive(4, 3, hidden_dims=[8]).inv,
    "Spline": lambda: T.conditional_spline(4, 3, hidden_dims=[8]),
    "AffineCoupling of Pyro": lambda: T.conditional_affine_coupling(4, 3, hidden_dims=[8]),
    "Householder": lambda: T.conditional_householder(4, 3, hidden_dims=[8]),
    "compose of Pyro": lambda: dist.conditional.ConditionalComposeTransformModule(
        [CONDITIONAL["Spline"](), T.Permute(torch.tensor([1, 3, 0, 2])), conditional_affine_coupling(4, 3)]
    ),
}
conditional = pytest.mark.parametrize("make", CONDITIONAL.values(), ids=CONDITIONAL)


def conditional_chain(part, where="first"):
    ours, plain = conditional_real_nvp(4, 3, num_layers=2, hidden_dims=(8,)), LowerTriangularAffine(torch.zeros(4))
    parts = {"first": [part, ours, plain], "last": [ours, plain, part], "without ours": [part, plain]}
    return jitter(ConditionalComposeFlow(parts[where]))


places = pytest.mark.parametrize("where", ["first", "last", "without ours"])


@conditional
@places
@pytest.mark.parametrize("sample_shape", [(), (100,), (2, 5)], ids=str)
def test_conditional_chain_draws_and_scores_for_any_sample_shape(make, where, sample_shape):
    chain = conditional_chain(make(), where).condition(torch.randn(7, 3))
    q = dist.TransformedDistribution(standard_normal(), [chain])
    y = q.sample(sample_shape)
    assert chain.batch_shape == q.batch_shape == (7,)
    assert y.shape == (*sample_shape, 7, 4)
    assert q.log_prob(y).shape == (*sample_shape, 7)


@conditional
@places
def test_conditional_chain_at_each_context_is_the_chain_at_that_context(make, where):
    flow, contexts = conditional_chain(make(), where), torch.randn(7, 3)
    y = torch.randn(4)
    for method in ("_forward", "_backward"):
        together = getattr(flow.condition(contexts), method)(y)
        for k, context in enumerate(contexts):
            alone = getattr(flow.condition(context), method)(y)
            assert all(torch.allclose(one, all_[k], atol=1e-9) for one, all_ in zip(alone, together, strict=True))


@conditional
def test_conditioned_chain_shows_all_parameters_and_gradients_reach_them(make):
    flow = conditional_chain(make())
    chain = flow.condition(torch.randn(50, 3))
    assert {id(p) for p in chain.parameters()} == {id(p) for p in flow.parameters()}
    x, log_det = chain._backward(torch.randn(50, 4))
    (x.pow(2).sum() + log_det.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.parameters() if p.numel() > 1)


@conditional
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
def test_conditional_chain_and_conditioned_chain_can_be_copied_after_use(make, copied):
    flow, context, y = conditional_chain(make()), torch.randn(7, 3), torch.randn(7, 4)
    chain = flow.condition(context)
    x = chain._backward(y)[0]
    assert torch.equal(copied(chain)._backward(y)[0], x)
    assert torch.equal(copied(flow).condition(context)._backward(y)[0], x)


@conditional
def test_state_dict_of_a_conditional_chain(make):
    flow, fresh = conditional_chain(make()), conditional_chain(make())
    context, y = torch.randn(7, 3), torch.randn(7, 4)
    fresh.load_state_dict(flow.state_dict())
    assert torch.equal(fresh.condition(context)._backward(y)[0], flow.condition(context)._backward(y)[0])


def test_chain_of_conditioned_parts_has_their_batch_shapes_broadcast():
    parts = [conditional_affine_coupling(4, 3).condition(torch.zeros(shape)) for shape in ((5, 1, 3), (7, 3))]
    assert ComposeFlow(parts).batch_shape == (5, 7)
    assert ComposeFlow(parts)(torch.zeros(4)).shape == (5, 7, 4)


def test_order_inside_a_conditional_compose_of_pyro_is_saved():
    flow = ConditionalComposeFlow([CONDITIONAL["compose of Pyro"]()])
    assert any("permutation" in name for name in flow.state_dict())


def test_ours_in_pyros_conditional_distribution():
    flow, context = conditional_chain(CONDITIONAL["ours"]()), torch.randn(7, 3)
    pyros = dist.ConditionalTransformedDistribution(standard_normal(), [flow, Permutation(torch.tensor([1, 0, 3, 2]))])
    q = pyros.condition(context)
    y = q.sample((100,))
    assert y.shape == (100, 7, 4) and q.sample().shape == (7, 4)
    expected = dist.TransformedDistribution(standard_normal(), [flow.condition(context)])
    assert torch.allclose(q.log_prob(y), expected.log_prob(y[..., [1, 0, 3, 2]]))


def test_inverse_of_a_conditional_chain():
    flow, context, x = conditional_chain(CONDITIONAL["ours"]()), torch.randn(7, 3), torch.randn(7, 4)
    y = flow.condition(context)(x).detach().clone()
    assert torch.allclose(flow.inv.condition(context)(y), x)
    assert {id(p) for p in flow.inv.parameters()} == {id(p) for p in flow.parameters()}


def test_a_context_that_is_a_parameter_gets_its_gradient():
    flow, y, found = conditional_chain(CONDITIONAL["ours"]()), torch.randn(7, 4), []
    weight = torch.nn.Embedding(7, 3).weight
    for context in (weight, 1 * weight):
        x, log_det = flow.condition(context)._backward(y)
        found += torch.autograd.grad(x.square().sum() + log_det.sum(), weight)
    assert torch.allclose(*found) and found[0].any()
    assert not any(parameter is weight for parameter in flow.parameters())
