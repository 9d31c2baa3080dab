"""Rounds of simulations near the data: against an exact posterior, and what a truncated prior draws."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_affine import NeuralPosterior, fit_posterior, fit_posterior_at, load, save
from pyro_affine.truncated_prior import Region, TruncatedPrior

SMALL = {"num_layers": 2, "hidden_dims": (16,)}


def curved():
    """Conjugate in t; the data are a function of t that bends over the prior, and hardly over the posterior."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    t = pyro.sample("t", dist.Normal(z, 0.2).to_event(1))
    pyro.deterministic("y", (t / 10).exp(), event_dim=1)


def straight():
    z = pyro.sample("z", dist.Normal(0.0, 10.0))
    pyro.sample("y", dist.Normal(z, 1.0))


def linear(model=straight):
    """Its density starts at the exact posterior."""
    npe = NeuralPosterior(model, ["y"], latents=["z"], **SMALL)
    fit_posterior(npe, num_simulations=5000, num_steps=1, seed=0, progress=False)
    return npe


def test_rounds_come_closer_to_the_exact_posterior_than_one_of_as_many_simulations():
    t = torch.tensor([4.0, -3.0])
    precision = 1 / 0.2**2 + 1 / 5.0**2
    mean, sd, data = t / 0.2**2 / precision, precision**-0.5, {"y": (t / 10).exp()}

    def errors(npe):
        z = (npe.condition(data).sample(5000, seed=1)["z"] - mean) / sd
        return float(z.mean(0).abs().max()), float(z.std(0).log().abs().max())

    npe, one = (NeuralPosterior(curved, ["y"], latents=["z"], **SMALL) for _ in range(2))
    options = {"num_steps": 1, "seed": 0, "progress": False}  # the start, a linear regression, is all that is needed
    rounds = fit_posterior_at(npe, data, num_rounds=4, num_simulations=300, **options)
    fit_posterior(one, num_simulations=1200, **options)
    assert errors(npe)[0] < 0.4 and errors(npe)[1] < 0.3
    assert errors(one)[0] > 2 and errors(one)[1] > 1.5
    shares = [each.share for each in rounds]
    assert shares[0] == 1.0 > shares[1] > shares[2] > shares[3] and not any(each.resampled for each in rounds)
    assert [each.num_new for each in rounds] == [300] * 4 and rounds[0].num_kept == 0 < rounds[3].num_kept < 300


@pytest.mark.parametrize("resampled", [False, True], ids=["rejection", "resampling"])
def test_truncated_prior_is_the_prior_within_the_region(resampled):
    posterior = linear().condition({"y": 8.0})
    torch.manual_seed(0)
    region = Region.of(posterior, 1e-3)
    prior = TruncatedPrior(linear().simulator, [region], least_acceptance=1.0 if resampled else 1e-4)
    found = prior.draw(2000, at_once=True, progress=False)
    z = found.latents["z"]
    assert prior.resampled == resampled and region.contains(found.latents).all()
    # For a Gaussian posterior the region is an interval, 3.29 standard deviations to each side.
    exact = 10 / math.sqrt(101)
    lower, upper = 8 * 100 / 101 - 3.29 * exact, 8 * 100 / 101 + 3.29 * exact
    assert abs(z.min() - lower) < 0.4 and abs(z.max() - upper) < 0.4
    inside = stats.truncnorm(float(z.min()) / 10, float(z.max()) / 10, scale=10)
    assert stats.kstest(z.numpy(), inside.cdf).pvalue > 0.05
    assert abs(prior.acceptance / (stats.norm.cdf(upper / 10) - stats.norm.cdf(lower / 10)) - 1) < 0.1
    assert abs((found.data["y"] - z).std() - 1) < 0.06  # the rest of the model is run at these latents


def test_model_runs_to_its_end_only_for_what_is_kept():
    ends = []

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        loc = pyro.deterministic("loc", z + 0.0)
        ends.append(1)
        pyro.sample("y", dist.Normal(loc, 1.0))

    npe = linear(model)
    prior = TruncatedPrior(npe.simulator, [Region.of(npe.condition({"y": 20.0}), 1e-3)])
    ends.clear()
    assert len(prior.draw(20, at_once=False, progress=False)) == 20 and prior.acceptance < 0.3
    assert len(ends) <= 25  # twenty, and the probes of the replay


def in_a_plate():
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.1))


def in_a_loop():
    z = [pyro.sample(f"z{index}", dist.Normal(0.0, 1.0)) for index in pyro.plate("rows", 3)]
    z = torch.stack(z, -1)
    pyro.sample("y", dist.Normal(z, 0.1).to_event(1))


@pytest.mark.parametrize("model", [in_a_plate, in_a_loop])
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "one by one"])
def test_a_run_that_is_stopped_leaves_its_plates(model, at_once):
    prior = TruncatedPrior(NeuralPosterior(model, ["y"], **SMALL).simulator)
    found = prior.draw(20, at_once=at_once, progress=False)
    z = torch.cat([x.reshape(20, -1) for x in found.latents.values()], -1)
    assert z.shape == (20, 3) and z.std() > 0.5 and (found.data["y"] - z).std() < 0.2
    assert not pyro.poutine.runtime._PYRO_STACK


def early():
    w = pyro.sample("w", dist.Normal(0.0, 10.0))
    pyro.sample("z", dist.Normal(w, 0.1))
    pyro.sample("y", dist.Normal(w, 0.1))


def test_sites_before_the_latents_keep_the_values_that_these_came_from():
    npe = linear(early)
    regions = [Region.of(npe.condition({"y": 5.0}), 1e-3)]
    found = TruncatedPrior(npe.simulator, regions).draw(200, at_once=True, progress=False)
    assert (found.data["y"] - found.latents["z"]).std() < 0.2  # 10 if w were drawn anew
    with pytest.raises(ValueError, match=r"no other site before its latents, got \['w'\]"):
        TruncatedPrior(npe.simulator, regions, least_acceptance=1.0).draw(10, at_once=True, progress=False)


@pytest.mark.parametrize("y", [7.0, 20.0], ids=["regions that overlap a little", "not at all"])
def test_too_few_candidates_are_refused(y):
    npe = linear()
    regions = [Region.of(npe.condition({"y": at}), 1e-4) for at in (0.0, y)]
    with pytest.raises(ValueError, match=r"candidates worth [1-9]" if y < 10 else "candidates worth 0"):
        TruncatedPrior(npe.simulator, regions, least_acceptance=1.0).draw(3000, at_once=True, progress=False)


def test_trained_one_begins_where_its_posterior_is_and_seeds_repeat():
    npe, state = linear(), torch.get_rng_state()
    again = copy.deepcopy(npe)
    options = {"num_rounds": 1, "num_simulations": 100, "num_steps": 5, "seed": 3, "progress": False}
    rounds = [fit_posterior_at(each, {"y": 8.0}, **options)[0] for each in (npe, again)]
    assert 0.1 < rounds[0].share < 0.4 and rounds[0].fit.losses == rounds[1].fit.losses
    assert torch.equal(torch.get_rng_state(), state)


def test_region_leaves_out_draws_that_rounding_takes_out_of_the_support():
    class Posterior:
        def sample(self, num_draws):
            return {"z": torch.linspace(0, 1, num_draws)}

        def log_prob(self, values):
            return torch.where(values["z"] < 0.01, -torch.inf, values["z"])

    assert abs(Region.of(Posterior(), 1e-3).threshold - 0.011) < 1e-3


def test_round_that_fails_leaves_the_density_of_the_last(monkeypatch):
    npe, densities = linear(), []

    def fit_once(npe, **options):
        if densities:
            raise ValueError("the second fit fails")
        densities.append(npe.density)
        return fit_posterior(npe, **options)

    monkeypatch.setattr("pyro_affine.rounds.fit_posterior", fit_once)
    with pytest.raises(ValueError, match="the second fit fails"):
        fit_posterior_at(npe, {"y": 8.0}, num_rounds=2, num_simulations=50, num_steps=1, seed=0, progress=False)
    assert npe.density is densities[0] and npe.density.standardized


def test_round_in_words():
    fit_of = fit_posterior_at(
        linear(), {"y": 80.0}, num_rounds=1, num_simulations=50, least_acceptance=1.0, num_steps=5, progress=False
    )
    assert "% of the prior by resampling: held-out log-density" in str(fit_of[0])


def branching():
    side = pyro.sample("side", dist.Bernoulli(0.5))
    if side > 0:
        pyro.sample("extra", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0))


def loaded(tmp_path):
    save(tmp_path / "density.pt", linear().density)
    return NeuralPosterior(straight, ["y"], density=load(tmp_path / "density.pt"))


BAD = {
    "no rounds": (straight, {"num_rounds": 0}, "num_rounds must be 1 or more"),
    "epsilon of 1": (straight, {"epsilon": 1.0}, "epsilon between 0 and 1"),
    "batch of data sets": (straight, {"data": {"y": torch.zeros(3)}}, r"batch of shape \(3,\)"),
    "data of another site": (straight, {"data": {"x": torch.zeros(())}}, "none for 'y'|got \\['x'\\]"),
    "checkpoint": (straight, {"checkpoint": "fit.pt"}, r"got \['checkpoint'\]"),
    "branches before the latents": (branching, {}, "draw after the latents what is not in every run"),
}


@pytest.mark.parametrize(("model", "options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(model, options, message):
    npe = NeuralPosterior(model, ["y"], latents=["z"], **SMALL)
    call = {"data": {"y": 0.0}, "num_simulations": 10, "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        fit_posterior_at(npe, call.pop("data"), **call)


def test_density_that_came_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="was built with a trained one"):
        fit_posterior_at(loaded(tmp_path), {"y": 0.0})
