"""Flows as distributions inside Pyro models: plates, expand, to_event, mask, validation, and as priors."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule
from pyro.poutine import block, trace
from torch.distributions import SigmoidTransform, StickBreakingTransform

from pyro_affine import (
    ComposeFlow,
    ConditionalComposeFlow,
    NormalizingFlow,
    conditional_real_nvp,
    real_nvp,
)
from pyro_affine.linear import LowerTriangularAffine

SMALL = {"num_layers": 2, "hidden_dims": (8,)}


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


def jitter(module):
    for parameter in module.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return module


def onto(end, event_shape=(3,)):
    """A flow whose draws lie in the reals, in the unit interval or on a simplex."""
    ends = {"reals": [], "unit interval": [SigmoidTransform()], "simplex": [StickBreakingTransform()]}
    return jitter(NormalizingFlow(ComposeFlow([real_nvp(event_shape, **SMALL), *ends[end]]), event_shape))


def conditional_flow(event_shape=(3,)):
    return jitter(NormalizingFlow(conditional_real_nvp(event_shape, 3, **SMALL), event_shape))


EVENT_SHAPES = {"1": (1,), "3": (3,), "2, 4, 4": (2, 4, 4)}
event_shapes = pytest.mark.parametrize("event_shape", EVENT_SHAPES.values(), ids=EVENT_SHAPES)


# ---- the distribution
@event_shapes
def test_expand_to_event_and_mask(event_shape):
    q = conditional_flow(event_shape)(torch.randn(7, 3))
    y = q.sample((5,))
    scores = q.log_prob(y)
    assert torch.allclose(q.expand((5, 7)).log_prob(y), scores)
    assert q.expand((5, 7)).sample((2,)).shape == (2, 5, 7, *event_shape)
    assert torch.allclose(q.to_event(1).log_prob(y), scores.sum(-1))
    mask = torch.arange(7) % 2 == 0
    assert torch.allclose(q.mask(mask).log_prob(y), scores * mask)


@event_shapes
def test_unconditional_expand(event_shape):
    q = jitter(NormalizingFlow(real_nvp(event_shape, **SMALL), event_shape))()
    y = q.expand((5, 2)).sample()
    assert y.shape == (5, 2, *event_shape)
    assert torch.allclose(q.expand((5, 2)).to_event(2).log_prob(y), q.log_prob(y).sum())


@pytest.mark.parametrize("context_shape", [(3,), (1, 3), (7, 3), (5, 1, 3)], ids=str)
@pytest.mark.parametrize("sample_shape", [(), (100,), (2, 4)], ids=str)
def test_batch_shape_is_that_of_the_context(context_shape, sample_shape):
    q = conditional_flow()(torch.randn(context_shape))
    assert q.batch_shape == context_shape[:-1]
    y = q.sample(sample_shape)
    assert y.shape == sample_shape + context_shape[:-1] + (3,)
    assert q.log_prob(y).shape == sample_shape + context_shape[:-1]


@pytest.mark.parametrize("end", ["unit interval", "simplex"])
def test_values_outside_the_support_are_refused(end):
    flow = onto(end)
    q = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [flow.chain], validate_args=True)
    inside = q.sample()
    assert q.log_prob(inside).isfinite()
    with pytest.raises(ValueError, match="support"):
        q.log_prob(inside + 2)


# ---- in a model
@event_shapes
@pytest.mark.parametrize("end", ["reals", "unit interval"])
def test_plates(end, event_shape):
    flow, y = onto(end, event_shape), 0.5 + 0.1 * torch.rand(4, 7, *event_shape)

    def model():
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 7, dim=-1):
            return pyro.sample("y", flow(), obs=y)

    tr = trace(model).get_trace()
    assert torch.allclose(tr.log_prob_sum(), flow.log_prob(y).sum())
    assert tr.nodes["y"]["fn"].batch_shape == (4, 7)


def test_plate_with_a_context_for_each_row_and_subsampling():
    flow, contexts, y = conditional_flow(), torch.randn(7, 3), torch.randn(7, 3)

    def model(subsample_size=None):
        with pyro.plate("rows", 7, subsample_size) as rows:
            pyro.sample("y", flow(contexts[rows]), obs=y[rows])

    assert torch.allclose(trace(model).get_trace().log_prob_sum(), flow.log_prob(y, contexts).sum())
    tr = trace(model).get_trace(subsample_size=3)
    rows = tr.nodes["rows"]["value"]
    assert torch.allclose(tr.log_prob_sum(), flow.log_prob(y[rows], contexts[rows]).sum() * 7 / 3)


def test_a_latent_of_the_model_as_the_context():
    flow = conditional_flow()

    def model():
        context = pyro.sample("context", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", 5):
            pyro.sample("y", flow(context), obs=torch.ones(5, 3))

    draws = Predictive(model, num_samples=4, parallel=True)()
    assert draws["context"].reshape(4, 3).shape == (4, 3)
    guide = AutoDelta(block(model, hide=["y"]))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step() for _ in range(30)]
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in flow.parameters())


def test_predictive_draws_in_parallel_as_one_after_the_other():
    flow = onto("reals")

    def model():
        with pyro.plate("rows", 4):
            pyro.sample("y", flow())

    for parallel in (True, False):
        assert Predictive(model, num_samples=6, parallel=parallel)()["y"].shape == (6, 4, 3)


def test_module_puts_all_parameters_into_the_store_and_svi_trains_them():
    flow, data = NormalizingFlow(real_nvp(3, **SMALL), 3), 2 + 0.5 * torch.randn(200, 3)
    before = flow.log_prob(data).mean().item()

    def model(batch):
        pyro.module("flow", flow)
        with pyro.plate("rows", len(batch)):
            pyro.sample("y", flow(), obs=batch)

    svi = SVI(model, lambda batch: None, pyro.optim.ClippedAdam({"lr": 0.02}), Trace_ELBO())
    for _ in range(100):
        loss = svi.step(data)
    assert len(pyro.get_param_store()) == len(list(flow.parameters()))
    # the same tensor of data in each step: a stale score would never move
    assert loss == pytest.approx(-flow.log_prob(data).sum().item(), abs=20)
    assert flow.log_prob(data).mean() > before + 1


def test_lives_in_a_pyro_module():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.flow = onto("reals")

        def forward(self):
            with pyro.plate("rows", 5):
                return pyro.sample("y", self.flow())

    model = Model()
    assert model().shape == (5, 3)
    assert len(list(model.parameters())) == len(list(model.flow.parameters()))


# ---- as a prior
PRIORS = ["reals", "unit interval", "simplex"]


def prior_model(flow):
    def model():
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z[..., 0], 0.1), obs=torch.tensor(0.3))

    return model


@pytest.mark.parametrize("end", PRIORS)
def test_nuts_stays_in_the_support_and_finds_the_posterior(end):
    flow = onto(end)
    mcmc = MCMC(NUTS(prior_model(flow), max_tree_depth=3), num_samples=50, warmup_steps=40, disable_progbar=True)
    mcmc.run()
    z = mcmc.get_samples()["z"]
    assert flow().support.check(z).all()
    prior = flow.sample((20_000,))
    weights = torch.softmax(dist.Normal(prior[:, 0], 0.1).log_prob(torch.tensor(0.3)), 0)
    assert abs(z[:, 0].mean() - weights @ prior[:, 0]) < 0.06  # four standard errors of 50 draws of sd 0.1
    assert len({tuple(row.tolist()) for row in z}) > 30


@pytest.mark.parametrize("end", PRIORS)
def test_auto_normal_takes_it_as_a_prior(end):
    flow = onto(end)
    guide = AutoNormal(prior_model(flow))
    svi = SVI(prior_model(flow), guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(100):
        svi.step()
    z = Predictive(guide.model, guide=guide, num_samples=200)()["z"].reshape(200, -1)
    assert flow().support.check(z).all()
    assert abs(z[:, 0].mean() - 0.3) < 0.1


def test_conditional_flow_with_a_bounded_end_as_a_prior():
    parts = [conditional_real_nvp(3, 2, **SMALL), LowerTriangularAffine(torch.zeros(3)), SigmoidTransform()]
    flow, context = NormalizingFlow(ConditionalComposeFlow(parts), 3), torch.randn(4, 2)

    def model():
        with pyro.plate("rows", 4):
            z = pyro.sample("z", flow(context))
            pyro.sample("y", dist.Normal(z.sum(-1), 0.1), obs=torch.ones(4))

    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=10, warmup_steps=10, disable_progbar=True)
    mcmc.run()
    z = mcmc.get_samples()["z"]
    assert z.shape == (10, 4, 3) and ((z > 0) & (z < 1)).all()
    guide = AutoNormal(model)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert guide()["z"].shape == (4, 3)
