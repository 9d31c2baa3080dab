"""One guide for many data sets, and a conditional flow for the latents of each datum: beside exact posteriors."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_affine import (
    AutoConditionalRealNVP,
    NormalizingFlow,
    conditional_real_nvp,
    load_guide,
    save,
)

TRIL = torch.tensor([[1.0, 0.0], [0.8, 0.6]])


def gaussian(y):
    """The posterior of loc is N(n mean(y) / (n + 1), Sigma / (n + 1)), Sigma = L L^T."""
    loc = pyro.sample("loc", dist.MultivariateNormal(torch.zeros(2), scale_tril=TRIL))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MultivariateNormal(loc, scale_tril=TRIL), obs=y)


def positive(y):
    rate = pyro.sample("rate", RATES)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)


RATES = dist.Gamma(torch.full((2,), 3.0), 2.0).to_event(1)


def new_data(num_rows=4):
    return (torch.randn(2) + torch.randn(num_rows, 2)) @ TRIL.T


def small(model, context_fn, **options):
    return AutoConditionalRealNVP(model, context_fn, num_layers=2, hidden_dims=(8,), **options)


def train(model, guide, make_data, num_steps, lr=0.1):
    rates = {"lr": lr, "lrd": 0.02 ** (1 / num_steps)}
    svi = SVI(
        model, guide, pyro.optim.ClippedAdam(rates), Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=1)
    )
    for _ in range(num_steps):
        svi.step(make_data())


def test_one_training_gives_the_posteriors_of_many_data_sets():
    guide = small(gaussian, lambda y: y.mean(0), init_scale=0.5)
    train(gaussian, guide, new_data, 200)
    errors, covariances = [], []
    for _ in range(20):
        y = new_data()
        draws = guide.get_posterior(y).sample((2000,))
        whitened = torch.linalg.solve_triangular(TRIL, (draws - 4 * y.mean(0) / 5).T, upper=False) * math.sqrt(5)
        errors.append(whitened.mean(1))
        covariances.append(torch.cov(whitened))
    assert torch.stack(errors).square().mean().sqrt() < 0.2
    assert (torch.stack(covariances).mean(0) - torch.eye(2)).abs().max() < 0.15


def test_constrained_latents_and_predictions_for_other_data():
    guide = small(positive, lambda y: 2 * (y.mean(0).sqrt() - 1.2), init_scale=0.3)
    train(positive, guide, lambda: dist.Poisson(RATES.sample()).sample((10,)), 200)
    y = torch.tensor([0.8, 2.5]).expand(10, 2)
    exact = dist.Gamma(3.0 + y.sum(0), 12.0)
    draws = Predictive(positive, guide=guide, num_samples=500)(y)["rate"].squeeze()
    assert ((draws.mean(0) - exact.mean) / exact.stddev).abs().max() < 0.3
    assert (draws.std(0) / exact.stddev).log().abs().max() < 0.3
    assert torch.allclose(guide.median(y)["rate"], draws.median(0).values, rtol=0.1)
    assert guide.quantiles([0.1, 0.9], y)["rate"].shape == (2, 2)


def test_a_module_as_context_is_trained_with_the_flow():
    embed = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    guide = small(gaussian, lambda y: embed(y).mean(0))
    guide.embed = embed
    module = small(gaussian, _MeanOf(embed))
    for one in (guide, module):
        pyro.clear_param_store()
        before = embed[0].weight.clone()
        train(gaussian, one, new_data, 3)
        assert any("weight" in name for name in pyro.get_param_store())
        if one is module:
            assert not torch.equal(embed[0].weight, before)


class _MeanOf(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, y):
        return self.network(y).mean(0)


def test_local_latents_in_a_plate_that_subsamples():
    """As in the docstring of the guide. The posterior of z is N(y / (1 + s^2), s^2 / (1 + s^2)), s the noise."""
    noise, size = 0.5, 16
    data = torch.randn(64, 2) * math.sqrt(1 + noise**2)
    flow = NormalizingFlow(conditional_real_nvp(2, context_dim=2, num_layers=2, hidden_dims=(16,)), 2)

    def model(data):
        with pyro.plate("row", len(data), subsample_size=size) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, noise).to_event(1), obs=data[index])

    def guide(data):
        pyro.module("flow", flow)
        with pyro.plate("row", len(data), subsample_size=size) as index:
            pyro.sample("z", flow(data[index]))

    train(model, guide, lambda: data, 200, lr=0.03)
    q = flow(data)
    draws = q.sample((2000,))
    sd = noise / math.sqrt(1 + noise**2)
    assert ((draws.mean(0) - data / (1 + noise**2)) / sd).square().mean().sqrt() < 0.2
    assert (draws.std(0) / sd).log().abs().mean() < 0.15
    losses = torch.tensor([Trace_ELBO().loss(model, guide, data) for _ in range(50)])
    evidence = dist.Normal(0.0, math.sqrt(1 + noise**2)).log_prob(data).sum()
    assert abs(-losses.mean() - evidence) < 4 * losses.std() / math.sqrt(50) + 3.0


def test_gradients_reach_all_parameters():
    guide = small(gaussian, lambda y: y.mean(0), init_scale=0.5)
    guide(new_data())
    for parameter in guide.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    Trace_ELBO(16, vectorize_particles=True).differentiable_loss(gaussian, guide, new_data()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in guide.parameters())


def test_every_latent_moves_and_depends_on_the_context():
    guide = small(gaussian, lambda y: y.mean(0))
    y = new_data()
    guide(y)
    for parameter in guide.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = torch.zeros(2)
    assert (guide.get_transform(y)(x) != guide.get_transform(y + 1)(x)).all()


def test_saved_guide_is_the_same_once_it_has_its_function_again(tmp_path):
    guide, y = small(gaussian, _mean), new_data()
    train(gaussian, guide, lambda: y, 2)
    save(tmp_path / "guide.pt", guide)
    again = load_guide(tmp_path / "guide.pt", gaussian, (y,))
    with pytest.raises(ValueError, match="context_fn was the function"):
        again(y)
    again.context_fn = _mean
    assert torch.equal(again.median(y)["loc"], guide.median(y)["loc"])


def _mean(y):
    return y.mean(0)


def depends(y):
    low = pyro.sample("low", dist.Uniform(0.0, 1.0))
    pyro.sample("high", dist.Uniform(low, 2.0))


BAD = {
    "init_scale": (lambda: small(gaussian, _mean, init_scale=0.0), "init_scale must be positive"),
    "context_fn": (lambda: AutoConditionalRealNVP(gaussian, torch.zeros(2)), "context_fn must be callable"),
    "context of two dimensions": (lambda: small(gaussian, lambda y: y)(new_data()), r"a vector .* got shape \(4, 2\)"),
    "context of no dimension": (lambda: small(gaussian, lambda y: y.mean())(new_data()), r"got shape \(\)"),
    "no tensor": (lambda: small(gaussian, lambda y: 1.0)(new_data()), "got float"),
    "support": (lambda: small(depends, _mean)(new_data()), "support of a site"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_context_that_changes_its_size_is_refused():
    guide = small(gaussian, lambda y: y.flatten())
    guide(new_data(4))
    with pytest.raises(ValueError, match=r"a vector of 8 entries .* got shape \(10,\)"):
        guide(new_data(5))


def test_elbo_that_drops_the_jacobian_is_refused():
    guide = small(positive, lambda y: y[0])
    with pytest.raises(ValueError, match="use Trace_ELBO"):
        TraceMeanField_ELBO().loss(positive, guide, torch.ones(3, 2))
