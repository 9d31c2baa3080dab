"""NUTS through a guide: is it the exact posterior, on the model's sites, with honest diagnostics?"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_affine.fit import fit_guide
from pyro_affine.guides import AutoRealNVP
from pyro_affine.inference_data import inference_data
from pyro_affine.neutra import NeutraResult, neutra
from pyro_affine.warped_model import WarpedModel

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
COUNTS = torch.tensor([0.0, 3.0, 9.0])
# too few draws to pay for compiling
SMALL: dict[str, Any] = {"num_samples": 10, "num_warmup": 10, "num_chains": 2, "jit": False, "progress": False}


def eight_schools(effects: Tensor, errors: Tensor) -> None:
    """Centred: a funnel in theta and tau."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(1.5, 0.5))
    with pyro.plate("school", len(effects)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, errors), obs=effects)
    pyro.deterministic("shrunk", theta - mu)


def exact_moments() -> dict[str, tuple[float, float]]:
    """Mean and sd of mu, tau and the first theta: all but tau is Gaussian and integrates by hand."""
    tau = torch.linspace(-1.5, 4.5, 2000).double().exp()
    variance = ERRORS.double() ** 2 + tau[:, None] ** 2
    marginal = dist.MultivariateNormal(torch.zeros(8).double(), variance.diag_embed() + 25.0)
    log_tau = dist.Normal(1.5, 0.5).log_prob(tau.log())  # the grid is even in log tau
    weight = (marginal.log_prob(EFFECTS.double()) + log_tau).softmax(0)
    mu_variance = 1 / (1 / 25 + (1 / variance).sum(-1))
    mu = mu_variance * (EFFECTS / variance).sum(-1)
    kept = tau**2 / variance[:, 0]  # theta_0 = mu + kept (y_0 - mu) + noise
    theta, theta_variance = mu + kept * (EFFECTS[0] - mu), kept * ERRORS[0] ** 2 + (1 - kept) ** 2 * mu_variance

    def moments(mean: Tensor, variance: Tensor) -> tuple[float, float]:
        centre = (weight * mean).sum()
        return centre.item(), (weight * (variance + (mean - centre) ** 2)).sum().sqrt().item()

    return {
        "mu": moments(mu, mu_variance),
        "tau": moments(tau, 0 * tau),
        "theta": moments(theta, theta_variance),
    }


def gamma_poisson(counts: Tensor) -> None:
    with pyro.plate("rates", len(counts)):
        rate = pyro.sample("rate", dist.Gamma(counts.new_tensor(2.0), counts.new_tensor(1.0)))
        pyro.sample("count", dist.Poisson(rate), obs=counts)


def fresh(model: Callable[..., Any], *args: Any, make: Callable[..., Any] = AutoMultivariateNormal) -> Any:
    """A guide that was called but not fitted."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        guide = make(model)
        guide(*args)
    return guide


@pytest.fixture(scope="module")
def schools() -> NeutraResult:
    pyro.clear_param_store()
    guide = AutoRealNVP(eight_schools, num_layers=4, hidden_dims=(16,))
    fit_guide(eight_schools, guide, (EFFECTS, ERRORS), num_steps=300, seed=0, progress=False)
    numbers: dict[str, Any] = {"num_samples": 250, "num_warmup": 75, "num_chains": 2}
    return neutra(eight_schools, guide, EFFECTS, ERRORS, seed=0, progress=False, **numbers)


def test_eight_schools_mix_and_agree_with_exact_moments(schools: NeutraResult) -> None:
    assert schools.rhat < 1.05
    assert schools.num_divergences < 10  # 2 % of the draws
    first = schools.draws | {"theta": schools.draws["theta"][..., 0]}
    for name, (mean, sd) in exact_moments().items():  # about 250 effective draws: 0.4 sd is six standard errors
        assert first[name].mean().item() == pytest.approx(mean, abs=0.4 * sd), name
        assert first[name].std().item() == pytest.approx(sd, rel=0.35), name


def test_draws_lie_on_the_sites_of_the_model(schools: NeutraResult) -> None:
    assert {name: tuple(value.shape) for name, value in schools.draws.items()} == {
        "mu": (2, 250),
        "tau": (2, 250),
        "theta": (2, 250, 8),
    }
    assert schools.diverging.shape == (2, 250)
    assert (schools.draws["tau"] > 0).all()


def test_arviz_container_holds_all_that_arviz_asks_for(schools: NeutraResult) -> None:
    posterior = schools.data["posterior"]
    assert posterior["theta"].dims == ("chain", "draw", "school")
    for name, value in schools.draws.items():
        assert np.array_equal(posterior[name].values, value.numpy())
    shrunk = schools.draws["theta"] - schools.draws["mu"][..., None]
    assert np.allclose(posterior["shrunk"].values, shrunk.numpy())
    likelihood = dist.Normal(schools.draws["theta"], ERRORS).log_prob(EFFECTS)
    assert np.allclose(schools.data["log_likelihood"]["effect"].values, likelihood.numpy(), atol=1e-5)
    assert np.array_equal(schools.data["sample_stats"]["diverging"].values, schools.diverging.numpy())
    assert np.array_equal(schools.data["observed_data"]["effect"].values, EFFECTS.numpy())


def test_rhat_and_ess_are_those_of_arviz(schools: NeutraResult) -> None:
    table = az.summary(schools.data, round_to="none").drop([f"shrunk[{i}]" for i in range(8)])
    assert schools.rhat == pytest.approx(table["r_hat"].max(), abs=1e-6)
    assert schools.ess == pytest.approx(min(table["ess_bulk"].min(), table["ess_tail"].min()), rel=1e-6)
    assert list(table.index) == [name for name in schools.summary.index if "shrunk" not in name]


def test_a_poor_guide_gives_the_exact_posterior() -> None:
    guide = fresh(gamma_poisson, COUNTS)
    with torch.no_grad():
        guide.loc.copy_(torch.tensor([1.0, 0.0, 1.0]))
        guide.scale.mul_(3)
    numbers = {"num_samples": 200, "num_warmup": 100, "num_chains": 2}
    rate = neutra(gamma_poisson, guide, COUNTS, seed=0, progress=False, **numbers).draws["rate"]
    mean, sd = (2 + COUNTS) / 2, (2 + COUNTS).sqrt() / 2  # conjugate: Gamma(2 + count, 2)
    assert torch.allclose(rate.mean((0, 1)), mean, atol=0.4 * sd.min().item(), rtol=0)
    assert torch.allclose(rate.std((0, 1)), sd, rtol=0.4)


def ordered() -> None:
    top = pyro.sample("top", dist.Uniform(0.0, 1.0))
    below = pyro.sample("below", dist.Uniform(0.0, top))
    pyro.sample("seen", dist.Normal(below, 1.0), obs=torch.tensor(0.5))


def test_supports_that_depend_on_other_sites() -> None:
    result = neutra(ordered, fresh(ordered), seed=0, **SMALL | {"num_samples": 60})
    share = result.draws["below"] / result.draws["top"]
    assert share.min() > 0 and share.max() < 1
    assert share.mean().item() == pytest.approx(0.5, abs=0.1)


def shifted() -> None:
    """A model that refuses a third of the starts."""
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    pyro.sample("seen", dist.Normal(0.0, 0.5 + shift), obs=torch.tensor(0.3))


@pytest.mark.parametrize("jit", [False, True])
def test_places_that_the_model_refuses_have_no_density(jit: bool) -> None:
    guide = fresh(shifted, make=lambda model: AutoMultivariateNormal(model, init_scale=1.0))
    found = neutra(shifted, guide, seed=0, **SMALL | {"num_chains": 4, "jit": jit}).draws["shift"]
    assert (found > -0.5).all()


GUIDES: dict[str, Callable[..., Any]] = {
    "real nvp": lambda model: AutoRealNVP(model, num_layers=2, hidden_dims=(4,)),
    "dense normal": AutoMultivariateNormal,
    "autoregressive": AutoIAFNormal,
}


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_the_guide_and_the_random_state_stay_as_they_are(make: Callable[..., Any]) -> None:
    guide = fresh(gamma_poisson, COUNTS, make=make)
    first = next(guide.parameters()).requires_grad_(False)  # one that was frozen before stays frozen
    guide.eval()
    before, state = copy.deepcopy(guide.state_dict()), torch.get_rng_state()
    result = neutra(gamma_poisson, guide, COUNTS, seed=0, **SMALL)
    assert result.draws["rate"].shape == (2, 10, 3) and (result.draws["rate"] > 0).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in guide.state_dict().items())
    assert all(parameter.grad is None for parameter in guide.parameters())
    assert not guide.training and not first.requires_grad
    assert all(parameter.requires_grad for parameter in guide.parameters() if parameter is not first)


def test_the_guide_is_released_after_an_error() -> None:
    def broken(counts: Tensor) -> None:
        gamma_poisson(counts)
        raise ArithmeticError("in the model")

    guide = fresh(gamma_poisson, COUNTS)
    with pytest.raises(ArithmeticError, match="in the model"):
        neutra(broken, guide, COUNTS, **SMALL)
    assert guide.training and all(parameter.requires_grad for parameter in guide.parameters())


def test_the_seed_decides_alone() -> None:
    guide = fresh(gamma_poisson, COUNTS)
    one, again, other = (neutra(gamma_poisson, guide, COUNTS, seed=seed, **SMALL) for seed in (1, 1, 2))
    assert torch.equal(one.draws["rate"], again.draws["rate"])
    assert not torch.equal(one.draws["rate"], other.draws["rate"])
    assert not torch.equal(one.draws["rate"][0], one.draws["rate"][1])
    torch.manual_seed(5)
    first = neutra(gamma_poisson, guide, COUNTS, **SMALL)
    torch.manual_seed(5)
    assert torch.equal(first.draws["rate"], neutra(gamma_poisson, guide, COUNTS, **SMALL).draws["rate"])


def test_double_precision_and_loaded_guides() -> None:
    counts = COUNTS.double()
    guide = fresh(gamma_poisson, counts, make=GUIDES["real nvp"])
    del guide.plates  # which Pyro makes anew in each process
    assert neutra(gamma_poisson, guide, counts, seed=0, **SMALL).draws["rate"].dtype == torch.float64


def branching() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("seen", dist.Normal(0.0, 1.0 if z > 0 else 3.0), obs=torch.tensor(2.0))


def warped(model: Callable[..., Any], *args: Any, make: Callable[..., Any] = AutoMultivariateNormal) -> WarpedModel:
    return WarpedModel(model, fresh(model, *args, make=make).requires_grad_(False), args, {})


def test_the_compiled_density_is_the_density_of_the_model() -> None:
    view = warped(eight_schools, EFFECTS, ERRORS, make=GUIDES["real nvp"])
    compiled = view.compiled()
    assert compiled is not None
    latent = torch.linspace(-2.0, 2.0, 10)
    transform, site = view._guide.get_transform(), {name: value[0] for name, value in view.sites(latent[None]).items()}
    trace = poutine.trace(poutine.condition(eight_schools, data=site)).get_trace(EFFECTS, ERRORS)
    jacobian = transform.log_abs_det_jacobian(latent, transform(latent)) + site["tau"].log()
    expected = -trace.log_prob_sum() - jacobian
    for potential in (compiled, view.potential()):
        assert potential({view.name: latent}).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_density_with_branches_is_not_compiled() -> None:
    view = warped(branching, make=lambda model: AutoMultivariateNormal(model, init_scale=1.0))
    assert view.compiled() is None


def test_branches_that_show_only_at_the_draws_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = fresh(branching)
    monkeypatch.setattr(WarpedModel, "compiled", lambda view: lambda at: 0.5 * at[view.name].square().sum())
    with pytest.warns(UserWarning, match="changes when it is compiled"):
        found = neutra(branching, guide, seed=0, **SMALL | {"jit": True}).draws["z"]
    monkeypatch.undo()
    assert torch.isfinite(found).all() and found.std() > 0.3  # the guide's own draws have a sd of 0.1


def made_up(draws: np.ndarray, num_divergences: int = 0) -> NeutraResult:
    diverging = torch.arange(draws.size).reshape(draws.shape) < num_divergences
    return NeutraResult({"z": torch.tensor(draws)}, diverging, inference_data({"posterior": {"z": draws}}))


NOISE = np.random.default_rng(0).normal(size=(4, 1000))
VERDICTS: dict[str, tuple[Callable[[], NeutraResult], str]] = {
    "good": (lambda: made_up(NOISE), "Trust the draws"),
    "few": (lambda: made_up(NOISE[:, :80]), "take more of them"),
    "apart": (lambda: made_up(NOISE + np.arange(4)[:, None]), "Do not trust the draws yet"),
    "divergences": (lambda: made_up(NOISE, 3), "3 of 4000 draws diverged.*target_accept"),
    "one chain": (lambda: made_up(NOISE[:1]), "Undecided.*num_chains=4"),
}


@pytest.mark.parametrize(("make", "words"), VERDICTS.values(), ids=VERDICTS)
@pytest.mark.filterwarnings("ignore")  # ArviZ's words on one chain
def test_verdict(make: Callable[[], NeutraResult], words: str) -> None:
    result = make()
    assert re.search(words, result.verdict), result.verdict
    assert result.good == result.verdict.startswith("Trust")
    assert str(result).endswith(result.verdict)


def unfinished() -> Any:
    guide = fresh(gamma_poisson, COUNTS)
    guide.loc.data[0] = math.nan
    return guide


def impossible(counts: Tensor) -> None:
    gamma_poisson(counts)
    pyro.factor("never", torch.tensor(-math.inf))


def with_more(counts: Tensor) -> None:
    gamma_poisson(counts)
    pyro.sample("more", dist.Normal(0.0, 1.0))


MISUSE: dict[str, tuple[Callable[[], Any], str]] = {
    "no flow": (lambda: neutra(gamma_poisson, fresh(gamma_poisson, COUNTS, make=AutoNormal)), "AutoContinuous"),
    "not called": (lambda: neutra(gamma_poisson, AutoMultivariateNormal(gamma_poisson)), "never called"),
    "not finite": (lambda: neutra(gamma_poisson, unfinished(), COUNTS), "finite, got others in loc"),
    "no draws": (
        lambda: neutra(gamma_poisson, fresh(gamma_poisson, COUNTS), COUNTS, num_samples=3),
        "num_samples must be 4",
    ),
    "no chain": (
        lambda: neutra(gamma_poisson, fresh(gamma_poisson, COUNTS), COUNTS, num_chains=0),
        "num_chains must be 1",
    ),
    "a latent left": (lambda: neutra(with_more, fresh(gamma_poisson, COUNTS), COUNTS, **SMALL), r"none for \['more'\]"),
    "no density": (lambda: neutra(impossible, fresh(gamma_poisson, COUNTS), COUNTS, **SMALL), "finite density"),
}


@pytest.mark.parametrize(("misuse", "words"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_told_in_words(misuse: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        misuse()
