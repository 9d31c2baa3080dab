"""``AutoRealNVP`` under Pyro's own machinery: its start, every ELBO, latents of all kinds, draws, copies, stores."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.reparam import NeuTraReparam
from torch.distributions import biject_to

from pyro_affine import AutoRealNVP

SMALL = {"num_layers": 2, "hidden_dims": (8,)}


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


# ---- models: latents of all kinds; one latent; and one whose posterior and evidence are known
START = {
    "loc": torch.tensor(0.3),
    "positive": torch.tensor(2.0),
    "interval": torch.tensor(-0.4),
    "simplex": torch.tensor([0.2, 0.3, 0.5]),
    "ordered": torch.tensor([-1.0, 0.5, 0.7]),
    "rows": torch.linspace(-1, 1, 6),
    "cells": torch.linspace(0.1, 0.9, 12).reshape(2, 6),
}
SUPPORTS = {
    **dict.fromkeys(("positive", "z"), constraints.positive),
    "interval": constraints.interval(-1.0, 2.0),
    "simplex": constraints.simplex,
    "ordered": constraints.ordered_vector,
    "cells": constraints.unit_interval,
}


def all_kinds():
    normal = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    ordered = dist.TransformedDistribution(normal, [dist.transforms.OrderedTransform()])
    loc = pyro.sample("loc", dist.Normal(torch.zeros(()), 1.0))
    positive = pyro.sample("positive", dist.HalfNormal(torch.ones(())))
    interval = pyro.sample("interval", dist.Uniform(torch.tensor(-1.0), 2.0))
    simplex = pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    cuts = pyro.sample("ordered", ordered)
    with pyro.plate("columns", 6, dim=-1):
        rows = pyro.sample("rows", dist.Normal(loc, positive))
        with pyro.plate("lines", 2, dim=-2):
            cells = pyro.sample("cells", dist.Beta(torch.tensor(2.0), 2.0))
            pyro.sample(
                "y", dist.Normal(rows + simplex[..., 0] * interval + cuts[..., 0] + cells, 1.0), obs=torch.ones(2, 6)
            )


def one_latent():
    z = pyro.sample("z", dist.Gamma(torch.tensor(2.0), 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.5))


Y = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
LOG_EVIDENCE = dist.Normal(torch.zeros_like(Y), 1.25**0.5).log_prob(Y).sum().item()
LOG_POSTERIOR = {"loc": 0.8 * Y, "scale": 0.2**0.5}


def log_normal():
    """log z ~ N(0, 1), y ~ N(log z, 0.5): the posterior of log z is a Gaussian, as the guide is at its start."""
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(3), 1.0))
        pyro.sample("y", dist.Normal(z.log(), 0.5), obs=Y)


def no_constraint():
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(torch.zeros(3), 1.0)), 0.5), obs=Y)


def posterior_of(model, **options):
    """A guide that is the posterior of ``log_normal`` or ``no_constraint``."""
    mean = LOG_POSTERIOR["loc"] if model is no_constraint else LOG_POSTERIOR["loc"].exp()
    options |= {"init_loc_fn": init_to_value(values={"z": mean}), "init_scale": LOG_POSTERIOR["scale"]}
    return AutoRealNVP(model, **SMALL, **options)


def fit(guide, model, elbo=None, num_steps=5, lr=0.02):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo or Trace_ELBO())
    return [svi.step() for _ in range(num_steps)]


def posterior_log_prob(guide, points):
    return guide.get_posterior().log_prob(points).detach()


# ---- start
@pytest.mark.parametrize("init_scale", [0.05, 0.5])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-2), (torch.float64, 1e-8)], ids=str)
@pytest.mark.parametrize("model, start", [(all_kinds, START), (one_latent, {"z": torch.tensor(3.0)})])
def test_starts_as_the_diagonal_gaussian_at_the_initial_values(model, start, init_scale, dtype, atol):
    torch.set_default_dtype(dtype)
    values = {name: value.to(dtype) for name, value in start.items()}
    guide = AutoRealNVP(model, init_loc_fn=init_to_value(values=values), init_scale=init_scale, **SMALL)
    guide()
    loc = torch.cat([biject_to(SUPPORTS.get(n, constraints.real)).inv(v).flatten() for n, v in values.items()])
    expected = dist.Normal(loc, init_scale).to_event(1)
    points = loc + init_scale * torch.randn(20, len(loc))
    found = posterior_log_prob(guide, points)
    assert found.dtype == dtype and torch.allclose(found, expected.log_prob(points), atol=atol)


def test_parameters_are_there_after_the_first_call_and_all_of_them_are_in_the_store():
    guide = AutoRealNVP(all_kinds, **SMALL)
    guide()
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    assert sum(p.numel() for p in before.values()) > 100
    fit(guide, all_kinds)
    assert len(pyro.get_param_store()) == len(before)
    assert {id(p) for p in pyro.get_param_store().values()} == {id(p) for p in guide.parameters()}
    moved = {name for name, p in guide.named_parameters() if not torch.equal(p, before[name])}
    assert before.keys() - moved == {"transform.parts.2.loc_stored", "transform.parts.2.scale_tril_stored"}


# ---- ELBOs
MANY = {"num_particles": 8, "vectorize_particles": True, "max_plate_nesting": 1}
ELBOS = {  # name: (ELBO, gradients of the guide)
    "Trace": (lambda: Trace_ELBO(), ("path", "total")),
    "Trace, vectorised": (lambda: Trace_ELBO(**MANY), ("path", "total")),
    "Trace, many": (lambda: Trace_ELBO(num_particles=2), ("path",)),
    "TraceGraph": (lambda: TraceGraph_ELBO(), ("path", "total")),
    "JitTrace": (lambda: JitTrace_ELBO(ignore_jit_warnings=True), ("path", "total")),
    "JitTrace, vectorised": (lambda: JitTrace_ELBO(ignore_jit_warnings=True, **MANY), ("path", "total")),
}
BOTH = [pytest.param(make, g, id=f"{name}, {g}") for name, (make, gradients) in ELBOS.items() for g in gradients]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
@pytest.mark.parametrize("make_elbo, gradient", BOTH)
def test_stock_elbos_are_the_evidence_where_the_guide_is_the_posterior(make_elbo, gradient):
    guide = posterior_of(log_normal, gradient=gradient)
    # exact for every draw; and off by sum log z if the Jacobian of the constraint were not in
    losses = fit(guide, log_normal, make_elbo(), lr=0.05)
    assert losses[0] == pytest.approx(-LOG_EVIDENCE, abs=1e-8) and abs(losses[-1] + LOG_EVIDENCE) < 2


@pytest.mark.parametrize("gradient", ["path", "total"])
def test_fit_from_another_start_reaches_the_posterior(gradient):
    guide = AutoRealNVP(log_normal, gradient=gradient, init_scale=0.5, **SMALL)
    losses = fit(guide, log_normal, Trace_ELBO(**MANY), num_steps=120, lr=0.03)
    assert sum(losses[-20:]) / 20 == pytest.approx(-LOG_EVIDENCE, abs=0.3)
    assert torch.allclose(guide.median()["z"].log(), LOG_POSTERIOR["loc"], atol=0.3)


@pytest.mark.parametrize("elbo", [Trace_ELBO(), Trace_ELBO(**{**MANY, "max_plate_nesting": 2})], ids=["", "vectorised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_latents_of_all_kinds_are_fitted_in_both_float_types(elbo, dtype):
    torch.set_default_dtype(dtype)
    guide = AutoRealNVP(all_kinds, **SMALL)
    losses = fit(guide, all_kinds, elbo, num_steps=60)
    assert sum(losses[-10:]) < sum(losses[:10])
    assert {p.dtype for p in guide.parameters()} == {dtype}
    for name, value in guide().items():
        assert value.shape == START[name].shape and value.dtype == dtype
        assert SUPPORTS.get(name, constraints.real).check(value).all()


@pytest.mark.filterwarnings("ignore:Ambiguous kl_divergence")
def test_the_mean_field_elbo_which_drops_jacobians_is_refused_where_there_is_one():
    with pytest.raises(ValueError, match=r"TraceMeanField_ELBO drops the Jacobian.*use Trace_ELBO"):
        fit(AutoRealNVP(log_normal, **SMALL), log_normal, TraceMeanField_ELBO())
    losses = fit(posterior_of(no_constraint), no_constraint, TraceMeanField_ELBO(), num_steps=1)
    assert losses[0] == pytest.approx(-LOG_EVIDENCE, abs=1e-8)


def test_every_latent_moves():
    far_away = partial(pyro.sample, "z", dist.Normal(10 * torch.ones(4), 1.0).to_event(1))
    start = init_to_value(values={"z": torch.zeros(4)})
    guide = AutoRealNVP(far_away, init_loc_fn=start, init_scale=1.0, **SMALL)
    fit(guide, far_away, Trace_ELBO(**MANY), num_steps=150, lr=0.03)
    assert (guide.median()["z"] - 10).abs().max() < 0.4


def test_one_latent_finds_a_skewed_posterior():
    guide = AutoRealNVP(one_latent)
    fit(guide, one_latent, Trace_ELBO(**{**MANY, "num_particles": 20}), num_steps=120, lr=0.05)
    z = torch.linspace(1e-4, 12, 40_001)
    density = (dist.Gamma(2.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(torch.tensor(1.5))).exp()
    cumulative = torch.cumulative_trapezoid(density, z) / torch.trapezoid(density, z)
    for probability, value in zip((0.1, 0.5, 0.9), guide.quantiles([0.1, 0.5, 0.9])["z"], strict=True):
        assert value == pytest.approx(z[torch.searchsorted(cumulative, probability)].item(), abs=0.15)


# ---- draws
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    guide = AutoRealNVP(all_kinds, **SMALL)
    guide()
    draws = Predictive(all_kinds, guide=guide, num_samples=7, parallel=parallel)()
    for name, value in START.items():
        assert draws[name].numel() == 7 * value.numel()
        assert SUPPORTS.get(name, constraints.real).check(draws[name]).all()


def test_median_and_quantiles_are_those_of_draws():
    guide = AutoRealNVP(all_kinds, **SMALL)
    fit(guide, all_kinds, num_steps=20)
    state = torch.get_rng_state()
    quantiles, median = guide.quantiles([0.1, 0.5, 0.9]), guide.median()
    assert torch.equal(torch.get_rng_state(), state)
    draws = Predictive(all_kinds, guide=guide, num_samples=4000, parallel=True)()
    for name, value in START.items():
        assert quantiles[name].shape == (3, *value.shape) and median[name].shape == value.shape
        assert torch.equal(quantiles[name][1], median[name])
        if name in ("simplex", "ordered"):
            continue  # taken entry by entry in unconstrained space, which is not that of the draws
        below = (draws[name].reshape(4000, 1, *value.shape) < quantiles[name]).double().mean(0).reshape(3, -1)
        assert (below - torch.tensor([[0.1], [0.5], [0.9]])).abs().max() < 0.04


def test_neutra_samples_the_posterior():
    guide = posterior_of(log_normal)
    guide()
    neutra = NeuTraReparam(guide.requires_grad_(False))
    mcmc = MCMC(NUTS(neutra.reparam(log_normal), max_tree_depth=3), 100, 20, disable_progbar=True)
    mcmc.run()
    log_z = neutra.transform_sample(mcmc.get_samples()["z_shared_latent"][:, None])["z"].reshape(100, 3).log()
    assert (log_z.mean(0) - LOG_POSTERIOR["loc"]).abs().max() < 0.2
    assert (log_z.std(0) - LOG_POSTERIOR["scale"]).abs().max() < 0.15


# ---- copies and stores
def reloaded(guide):
    fresh = AutoRealNVP(all_kinds, **SMALL)
    fresh()
    fresh.load_state_dict(guide.state_dict())
    return fresh


COPIES = {
    "state_dict": reloaded,
    "deepcopy": copy.deepcopy,
    "pickle": lambda guide: pickle.loads(pickle.dumps(guide)),
    "moving average": lambda guide: torch.optim.swa_utils.AveragedModel(guide).module,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_after_steps_have_the_same_posterior_and_a_life_of_their_own(copied):
    guide = AutoRealNVP(all_kinds, **SMALL)
    fit(guide, all_kinds)
    twin, points = copied(guide), torch.randn(5, guide.latent_dim)
    before = posterior_log_prob(guide, points)
    assert torch.equal(posterior_log_prob(twin, points), before)
    fit(guide, all_kinds)
    assert torch.equal(posterior_log_prob(twin, points), before)
    assert not torch.equal(posterior_log_prob(guide, points), before)


def test_parameter_store_saved_and_loaded(tmp_path):
    start = init_to_value(values={"z": torch.ones(3)})
    guide = AutoRealNVP(log_normal, init_loc_fn=start, **SMALL)
    fit(guide, log_normal)
    points = torch.randn(5, 3)
    before = posterior_log_prob(guide, points)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    fresh = AutoRealNVP(log_normal, init_loc_fn=start, **SMALL)
    fit(fresh, log_normal, num_steps=1)
    assert not torch.equal(posterior_log_prob(fresh, points), before)
    pyro.get_param_store().load(tmp_path / "store")
    pyro.module("AutoRealNVP.transform", fresh.transform, update_module_params=True)
    assert torch.equal(posterior_log_prob(fresh, points), before)


REFUSED = {
    "init_scale": ({"init_scale": 0.0}, "init_scale must be positive, got 0.0"),
    "gradient": ({"gradient": "score"}, "gradient must be .*got 'score'"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_refusals_say_the_rule_and_what_came(options, message):
    with pytest.raises(ValueError, match=message):
        AutoRealNVP(log_normal, **options)()
