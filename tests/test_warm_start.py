"""The start of a flow guide: a Gaussian chosen by ELBO, from a density that may refuse draws, in a small budget."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from torch import Tensor
from torch.distributions import constraints

from pyro_affine.gaussian import DiagonalGaussian, Gaussian, elbos, refine, refine_diagonal
from pyro_affine.guides import AutoRealNVP, capacity
from pyro_affine.latent_density import LatentDensity
from pyro_affine.latent_elbo import LatentELBO
from pyro_affine.low_rank import LowRankAffine
from pyro_affine.particles import Pair
from pyro_affine.pathfinder import climb
from pyro_affine.random_state import seeded
from pyro_affine.warm_start import (
    _SLOW,
    _SLOW_FEW,
    _SLOW_ROWS,
    _THOROUGH,
    Allowance,
    _effort,
    _limit,
    find_gaussian,
)
from pyro_affine.whitening import DiagonalWhitening, Whitening


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


# ---- models

# unlike scales, and a correlation near 1
FACTOR = torch.tensor([[300.0, 0.0, 0.0], [2.0, 0.01, 0.0], [-1.0, 0.02, 0.5]], dtype=torch.float64)
CENTRE = torch.tensor([1000.0, 3.0, -1.0], dtype=torch.float64)
DATA = torch.tensor([1.8, 2.9, -0.4, 1.0], dtype=torch.float64)


def gaussian() -> None:
    dtype = torch.get_default_dtype()
    pyro.sample("z", dist.MultivariateNormal(CENTRE.to(dtype), scale_tril=FACTOR.to(dtype)))


def plates(data: Tensor = DATA, size: int | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("groups", 4, subsample_size=size) as index:
        pyro.sample("y", dist.Normal(mu + share[..., 0], tau), obs=data[index])


def branching() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    if z[0] > 0:  # cannot run at many draws at once
        z = z + 1
    pyro.sample("y", dist.Normal(z[1], 0.5), obs=torch.tensor(0.7))


def touchy() -> None:
    """Raises, or is NaN, away from its mode."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    if (z > 2.5).any():
        raise ValueError("z is too large")
    pyro.factor("likelihood", -((z - 0.5) ** 2).sum(-1) / 0.02 + (z + 2).log().sum(-1) * 0)


def two_modes() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    away = torch.stack([(z - 1.5).square().sum(-1), (z + 1.5).square().sum(-1)])
    pyro.factor("likelihood", (-8 * away).logsumexp(0))


def banana() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.3))


MODELS: dict[str, Callable[..., None]] = {"gaussian": gaussian, "plates": plates, "touchy": touchy, "banana": banana}


def make_guide(model: Any, *args: Any, **options: Any) -> AutoRealNVP:
    guide = AutoRealNVP(model, **{"num_layers": 2, "hidden_dims": (6,), **options})
    guide(*args)
    return guide


def make_density(model: Any, guide: Any = None, *args: Any) -> LatentDensity:
    guide = make_guide(model, *args) if guide is None else guide
    return LatentDensity(model, guide, args, nesting=Pair(model, guide, args).find_nesting()[0])


# ---- the density


@pytest.mark.parametrize("model", [gaussian, plates, banana, branching])
def test_density_is_that_of_model_and_constraints(model: Any) -> None:
    guide = AutoMultivariateNormal(model, init_scale=0.3)
    guide()
    density = make_density(model, guide)
    assert (density.nesting is None) == (model is branching)
    latents = guide.get_posterior().sample((6,))
    values, scores = density.value_and_score(latents)
    for latent, value in zip(latents, values, strict=True):
        guide_trace = poutine.trace(poutine.condition(guide, {"_AutoMultivariateNormal_latent": latent})).get_trace()
        model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace()
        deltas = guide_trace.log_prob_sum() - guide.get_posterior().log_prob(latent)
        assert math.isclose(float(value), float((model_trace.log_prob_sum() - deltas).detach()), rel_tol=1e-10)
    leaf = latents.clone().requires_grad_()
    assert torch.allclose(scores, torch.autograd.grad(density(leaf).sum(), leaf)[0], rtol=1e-10)


def test_an_improper_prior_with_an_event_shape_has_one_jacobian_a_draw() -> None:
    def model() -> None:
        scales = pyro.sample("scales", dist.ImproperUniform(constraints.positive, (), (3,)))
        pyro.sample("y", dist.Normal(torch.zeros(3), scales).to_event(1), obs=torch.ones(3))

    guide = make_guide(model, init_loc_fn=init_to_value(values={"scales": torch.ones(3)}))
    latents = torch.randn(5, 3)
    expected = (dist.Normal(0.0, latents.exp()).log_prob(torch.ones(())) + latents).sum(-1)
    for nesting in (0, None):
        assert torch.allclose(LatentDensity(model, guide, nesting=nesting)(latents), expected)


def test_a_model_with_many_rows_is_run_at_fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = make_guide(plates)
    latents = torch.randn(20, guide.latent_dim)
    expected = make_density(plates, guide).value_and_score(latents)
    monkeypatch.setattr("pyro_affine.traces._MAX_ENTRIES", 100)
    monkeypatch.setattr("pyro_affine.latent_density._SMALL_ENTRIES", 50)
    density, pair = make_density(plates, guide), Pair(plates, guide)
    assert [len(rows) for rows in density.pieces(latents)] == [11, 9]  # of nine entries each
    for found, whole in zip(density.value_and_score(latents), expected, strict=True):
        assert torch.allclose(found, whole)
    with seeded(1):
        first = pair.log_weights(30, 1)
    with seeded(1):
        again = pair.log_weights(30, 1)  # the number of draws at once is known by now
    assert pair._draws_at_once == 11 and torch.equal(first, again)


def test_small_models_run_at_more_draws() -> None:
    density = make_density(plates)
    assert [len(rows) for rows in density.pieces(torch.zeros(1500, density._guide.latent_dim))] == [1024, 476]


def test_a_density_that_only_rounding_makes_so_high_is_none() -> None:
    """As that of a low-rank Gaussian whose variances underflow, 1e55 nats in float64."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("rounding", torch.where(z[..., 0] > 3, 1e15 * z[..., 0], 0.0))

    density = make_density(model)
    values, scores = density.value_and_score(torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
    assert values.isfinite().tolist() == [True, False] and scores.isfinite().all(-1).tolist() == [True, False]
    found = find_gaussian(density, torch.zeros(2), 0.1)
    assert float(found.loc.abs().max()) < 0.1 and elbos([found], density.value_and_score, torch.randn(64, 2))[0] < 0.1


def test_rows_that_the_model_refuses_are_nan_and_the_others_are_not() -> None:
    density = make_density(touchy)
    latents = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.1, -0.2], [-2.5, 0.0], [0.0, 2.6], [1.0, 1.0]])
    values, scores = density.value_and_score(latents)
    assert values.isfinite().tolist() == [True, False, True, False, False, True]
    assert scores.isfinite().all(-1).tolist() == [True, False, True, False, False, True]


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64])
def test_log_density_is_summed_in_float64(model_dtype: torch.dtype) -> None:
    torch.set_default_dtype(model_dtype)
    density = make_density(plates, None, DATA.to(model_dtype))
    values, scores = density.value_and_score(torch.zeros(3, density._guide.latent_dim))
    assert values.dtype is scores.dtype is torch.float64


def test_random_densities_are_recognised() -> None:
    @config_enumerate
    def mixture() -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        which = pyro.sample("which", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(loc[..., 0] + which, 1.0), obs=torch.tensor(1.0))

    hidden = AutoRealNVP(poutine.block(mixture, hide=["which"]))
    hidden()
    assert LatentDensity(mixture, hidden, nesting=0).is_random()
    assert LatentDensity(plates, make_guide(plates), (DATA, 2), nesting=1).is_random()
    assert not LatentDensity(plates, make_guide(plates), (DATA,), nesting=1).is_random()


# ---- Gaussians


def log_normal(latents: Tensor) -> tuple[Tensor, Tensor]:
    leaf = latents.detach().requires_grad_()
    values = dist.MultivariateNormal(CENTRE, scale_tril=FACTOR).log_prob(leaf)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def test_elbo_of_a_gaussian_is_minus_its_divergence() -> None:
    other = Gaussian(CENTRE + 1, 2 * FACTOR)
    noise = torch.randn(20_000, 3)
    exact = dist.MultivariateNormal(CENTRE, scale_tril=FACTOR)
    divergence = torch.distributions.kl_divergence(
        dist.MultivariateNormal(other.loc, scale_tril=other.scale_tril), exact
    )
    same, apart = elbos([Gaussian(CENTRE, FACTOR), other], log_normal, noise)
    assert abs(same) < 1e-8 and abs(apart + divergence) < 0.02 * divergence


def test_elbo_counts_draws_without_a_density_against_it() -> None:
    density = make_density(touchy).value_and_score
    noise = torch.randn(200, 2)
    narrow, wide, far = (Gaussian(torch.zeros(2), sd * torch.eye(2)) for sd in (0.1, 1.3, 50.0))
    for gaussian in (DiagonalGaussian(torch.zeros(2), torch.full((2,), 0.1)), narrow):
        assert math.isclose(elbos([gaussian], density, noise)[0], elbos([narrow], density, noise)[0])
    scores = elbos([narrow, wide, far], density, noise)
    assert scores[0] > scores[1] > scores[2] == -math.inf


def test_refining_with_independent_entries_finds_the_mean_field_optimum() -> None:
    covariance = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1e4]])
    target = dist.MultivariateNormal(CENTRE, covariance)

    def density(latents: Tensor) -> tuple[Tensor, Tensor]:
        leaf = latents.detach().requires_grad_()
        values = target.log_prob(leaf)
        return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]

    start = Gaussian(CENTRE - torch.tensor([3.0, -3.0, 50.0]), torch.diag(torch.tensor([0.1, 0.1, 10.0])))
    found = refine_diagonal(start, density, num_draws=64, may_go_on=lambda elbos: len(elbos) < 1000)
    assert torch.allclose(found.scale, covariance.inverse().diagonal() ** -0.5, rtol=0.1)
    assert ((found.loc - CENTRE).abs() < 0.4 * found.scale).all()


def test_refining_meets_a_gaussian_density() -> None:
    start = Gaussian(torch.zeros(3), torch.eye(3))
    found = refine(start, log_normal, num_draws=64, may_go_on=lambda elbos: len(elbos) < 300)
    assert abs(elbos([found], log_normal, torch.randn(1000, 3))[0]) < 1e-3


def test_refining_survives_draws_without_a_density() -> None:
    density = make_density(touchy).value_and_score
    start = Gaussian(torch.full((2,), 2.3), 3 * torch.eye(2))
    found = refine(start, density, num_draws=32, may_go_on=lambda elbos: len(elbos) < 100)
    assert torch.allclose(found.loc, torch.full((2,), 0.5), atol=0.05) and found.scale_tril.diagonal().max() < 0.2


def test_an_ascent_does_not_stand_still_where_a_newton_step_leads_too_far() -> None:
    def ramp(points: Tensor) -> tuple[Tensor, Tensor]:
        """A slope without curvature at the start, and a cliff beyond its end: highest at (0, 50)."""
        x, y = points.unbind(-1)
        cliff = (y - 50).exp()
        return y - cliff - 0.5 * x.square(), torch.stack([-x, 1 - cliff], -1)

    start = torch.zeros(1, 2, dtype=torch.float64)
    lengths = (1.0, 0.5, 2.0, 0.2, 0.05, 0.01, 1e-3, 1e-5)
    (path,) = climb(start, ramp, step_sizes=lengths, num_draws=4, spacing=1e-5, may_go_on=lambda step, *_: step < 100)
    assert path.value == pytest.approx(49.0, abs=1e-3)


@pytest.mark.parametrize("spacing", [None, 1e-5])
def test_climbing_ends_at_the_modes(spacing: float | None) -> None:
    def rosenbrock(latents: Tensor) -> tuple[Tensor, Tensor]:
        leaf = latents.detach().requires_grad_()
        values = -((1 - leaf[:, 0]) ** 2) - 100 * (leaf[:, 1] - leaf[:, 0] ** 2) ** 2
        values = torch.where(leaf[:, 1] > 50, torch.nan, values)  # no density far out
        return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]

    starts = torch.tensor([[-1.2, 1.0], [2.0, 3.0], [0.0, 60.0]])
    options: dict[str, Any] = {"step_sizes": (1.0, 0.3, 0.1, 0.01, 1e-4), "num_draws": 8, "spacing": spacing}
    paths = climb(starts, rosenbrock, may_go_on=lambda step, *_: step < 200, **options)
    assert len(paths) == 2  # the third start has no density
    for path in paths:
        assert path.done and torch.allclose(path.point, torch.ones(2), atol=1e-3)
        hessian = torch.tensor([[802.0, -400.0], [-400.0, 200.0]])
        assert torch.allclose(path.inverse, torch.linalg.inv(hessian), rtol=0.2)
        assert path.best is not None and path.best_elbo > -5


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_found_gaussian_is_as_good_as_a_long_fit(model: Any) -> None:
    density = make_density(model)
    found = find_gaussian(density, density._guide._init_loc(), 0.1)
    noise = torch.randn(4000, len(found.loc))
    elbo = elbos([found], density.value_and_score, noise)[0]
    best = refine(found, density.value_and_score, num_draws=2000, may_go_on=lambda elbos: len(elbos) < 40)
    assert math.isfinite(elbo) and elbo > elbos([best], density.value_and_score, noise)[0] - 0.1
    assert density.num_runs < 700


def test_a_model_that_runs_draw_by_draw_gets_a_gaussian_too() -> None:
    density = make_density(branching)
    start = Gaussian(density._guide._init_loc(), 0.1 * torch.eye(2))
    found = find_gaussian(density, start.loc, 0.1, num_runs=600)
    noise = torch.randn(200, 2)
    before, after = elbos([start, found], density.value_and_score, noise)
    assert after > before + 1


@pytest.mark.parametrize("num_runs", [1, 10, 60])
def test_budget_in_runs_is_kept_and_something_finite_comes_back(num_runs: int) -> None:
    for model in (plates, branching):
        density = make_density(model)
        found = find_gaussian(density, density._guide._init_loc(), 0.1, num_runs=num_runs)
        assert found.loc.isfinite().all() and found.scale_tril.isfinite().all()
        overhead = 60 if model is branching else 20  # one round of each phase
        assert density.num_runs <= 2.7 * num_runs + overhead  # while ascents rise


def groups() -> None:
    """A centred hierarchy: its density has no maximum, as it rises without end towards a scale of 0."""
    mu, scale = pyro.sample("mu", dist.Normal(0.0, 10.0)), pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("group", 20):
        theta = pyro.sample("theta", dist.Normal(mu, scale))
        pyro.sample("y", dist.Normal(theta, 0.3), obs=torch.linspace(1.0, 3.0, 20))


def test_a_peak_without_end_keeps_no_ascent_going_and_a_gaussian_is_refined_as_long_as_it_rises() -> None:
    density = make_density(groups)
    loc = density._guide._init_loc()
    evidences: list[float] = []

    def may_go_on(step: int, elbo: float, evidence: float) -> bool:
        evidences.append(evidence)
        return step < 60

    in_the_neck = torch.cat([torch.tensor([2.0, -3.0]), torch.full((20,), 2.0)])[None]
    options: dict[str, Any] = {"step_sizes": [1.0, 0.5, 0.1], "num_draws": 8, "spacing": 1e-5}
    (path,) = climb(in_the_neck, density.value_and_score, may_go_on=may_go_on, **options)
    assert path.value > 50 and torch.tensor(evidences[30:]).median() < -25  # the true one is -24.7
    few, many = (find_gaussian(density, loc, 0.1, num_runs=num_runs) for num_runs in (20, None))
    low, high = elbos([few, many], density.value_and_score, torch.randn(1000, len(loc)))
    assert low > high - 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], 0.3), ([-math.inf], 0.3), ([1.0, 1.1], 0.3), ([1.0, 3.0], 2.0), ([0.0, 1, 2, 3, 4, 9], 4.0)],
    ids=["none", "no density", "slow", "rises", "far"],
)
def test_a_search_may_spend_more_as_long_as_it_rises(values: list[float], expected: float) -> None:
    assert _limit(values, 0.3) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [((1e-3, 2e-3), _THOROUGH), ((1.0, 1.2), _SLOW), ((3e-3, 9e-3), _SLOW_FEW), ((1.0, 8.0), _SLOW_ROWS)],
    ids=["fast", "slow", "many rows", "many slow rows"],
)
def test_how_thorough_a_search_is_goes_by_what_rows_cost(
    seconds: tuple[float, float], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one start wherever it can be afforded, so that modes are found."""
    clock = itertools.accumulate((0.0, 0.0, *seconds))
    monkeypatch.setattr("pyro_affine.warm_start.time.perf_counter", lambda: next(clock))
    density = make_density(plates)
    start = Gaussian(density._guide._init_loc(), torch.eye(density._guide.latent_dim))
    assert _effort(start, density.value_and_score, Allowance(density, 1.0, None)) is expected


def test_two_modes_are_warned_of_and_one_is_not() -> None:
    density = make_density(
        two_modes, make_guide(two_modes, init_loc_fn=init_to_value(values={"z": torch.full((2,), 1.4)}))
    )
    with pytest.warns(RuntimeWarning, match="the posterior may have more than one mode"):
        find_gaussian(density, density._guide._init_loc(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in MODELS.values():
            density = make_density(model)
            find_gaussian(density, density._guide._init_loc(), 0.1)


# ---- the guide


def log_weights(guide: AutoRealNVP, model: Any, noise: Tensor) -> Tensor:
    """log p - log q of the guide at the draws made from the noise."""
    z, log_det = guide.transform._forward(noise)
    return make_density(model, guide)(z) - guide.get_base_dist().log_prob(noise) + log_det


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [gaussian, plates, banana])
def test_at_step_0_the_elbo_of_the_guide_is_that_of_the_gaussian(model: Any, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    args = (DATA.to(dtype),) if model is plates else ()
    with torch.no_grad():
        guide = AutoRealNVP(model)
        guide(*args)
        density = make_density(model, guide, *args)
        torch.manual_seed(1)
        found = find_gaussian(density, guide._init_loc(), guide.init_scale)
        torch.manual_seed(1)
        guide.warm_start(model, args, nesting=density.nesting)
        noise = torch.randn(500, guide.latent_dim, dtype=dtype)
        z, log_det = guide.transform._forward(noise)
        mean = (density(z) - (guide.get_base_dist().log_prob(noise) - log_det)).mean()
        order = guide.transform.parts[0]._forward(noise)[0]  # the flow reorders, and does no more
        expected = elbos([found], density.value_and_score, order.double())[0]
    tolerance = 1e-9 if dtype is torch.float64 else 2e-2
    assert abs(float(mean) - expected) < tolerance


def test_warm_start_reaches_the_posterior_of_a_gaussian_model() -> None:
    guide = make_guide(gaussian)
    guide.warm_start(gaussian, nesting=0)
    assert abs(log_weights(guide, gaussian, torch.randn(1000, 3)).mean()) < 1e-3
    medians = guide.median()["z"]
    assert torch.allclose(medians, CENTRE, atol=20.0)


def test_a_trained_guide_is_left_alone() -> None:
    guide = make_guide(plates)
    with torch.no_grad():
        guide.transform.parts[1].loc += 0.1
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    guide.warm_start(plates, nesting=1)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"num_layers": 5}, {"base": "student"}], ids=str)
@pytest.mark.parametrize("model", [banana, lambda: pyro.sample("z", dist.Normal(3.0, 0.1))], ids=["two", "one latent"])
def test_a_guide_is_started_once(model: Any, options: dict[str, Any]) -> None:
    guide = AutoRealNVP(model, **options)
    guide()
    assert not guide._is_trained()
    guide.warm_start(model, nesting=0)
    before = guide.transform.parts[-1].loc.clone()
    assert guide._is_trained()
    guide.warm_start(model, nesting=0)
    assert torch.equal(before, guide.transform.parts[-1].loc)


@pytest.mark.parametrize("part", [0, 1])
def test_any_trained_part_counts(part: int) -> None:
    guide = make_guide(banana)
    with torch.no_grad():
        for parameter in guide.transform.parts[part].parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    assert guide._is_trained()


def test_models_that_subsample_at_random_start_from_the_initial_values() -> None:
    guide = make_guide(plates, DATA, 2)
    guide.warm_start(plates, (DATA, 2), nesting=1)
    units = guide.transform.parts[-1]
    assert not guide._is_trained() or torch.equal(units.loc, guide._init_loc())


def test_many_latents_get_a_low_rank_map_that_is_cheap() -> None:
    def wide() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(400), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 0.1), obs=torch.tensor(3.0))

    guide = make_guide(wide, init_scale=0.5)
    guide.warm_start(wide, nesting=0)
    affine, units = guide.transform.parts[1:]
    assert isinstance(affine, LowRankAffine) and isinstance(units, DiagonalWhitening)
    assert sum(p.numel() for part in (affine, units) for p in part.parameters()) < 400 * 30
    assert torch.allclose(units.scale.mean(), torch.tensor(0.0995), rtol=0.1)  # 1 / sqrt(1 + 100), and not 0.5
    z = guide.get_posterior().sample((5,))
    assert torch.allclose(guide.get_posterior().log_prob(z), anew(guide).log_prob(z), atol=1e-8)
    first = LatentELBO(guide, make_density(wide, guide))(16)
    first.backward()
    assert first.isfinite() and affine.factor.grad.abs().sum() > 0


def anew(guide: AutoRealNVP) -> Any:
    return dist.TransformedDistribution(guide.get_base_dist(), [guide.transform.with_cache(0)])


# ---- the loss without a Pyro trace


def gradients_of(guide: AutoRealNVP) -> list[Tensor]:
    """Of all parameters but the two of the units, which are stored and not trained."""
    found = {name: parameter.grad for name, parameter in guide.named_parameters() if not name.endswith("_stored")}
    assert None not in found.values()
    return list(found.values())


@pytest.mark.parametrize("gradient", ["path", "total"])
@pytest.mark.parametrize("base", ["normal", "student"])
def test_loss_and_gradient_are_those_of_trace_elbo(gradient: Any, base: Any) -> None:
    guide = make_guide(plates, gradient=gradient, base=base)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    results = []
    elbo = Trace_ELBO(7, vectorize_particles=True, max_plate_nesting=1)
    direct = LatentELBO(guide, make_density(plates, guide))
    for make_loss in (
        lambda: elbo.differentiable_loss(plates, guide),
        lambda: direct(7),
    ):
        for parameter in guide.parameters():
            parameter.grad = None
        torch.manual_seed(2)
        loss = make_loss()
        loss.backward()
        results.append([loss.detach(), *gradients_of(guide)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_refused_draws_are_left_out_and_counted() -> None:
    guide = make_guide(touchy, init_scale=1.3)
    loss = LatentELBO(guide, make_density(touchy, guide))
    value = loss(64)
    value.backward()
    assert value.isfinite() and 0 < loss.num_dropped < 32
    assert all(gradient.isfinite().all() for gradient in gradients_of(guide))
    far = make_guide(touchy, init_scale=50.0)
    assert LatentELBO(far, make_density(touchy, far))(64).isnan()


# ---- affine layers


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_map_is_exact(rank: int) -> None:
    layer = LowRankAffine(torch.ones(6), torch.linspace(0.5, 2, 6), rank=rank)
    with torch.no_grad():
        layer.factor += torch.randn(6, rank)
    x = torch.randn(5, 6)
    y, log_det = layer._forward(x)
    back, log_det_back = layer._backward(y)
    matrix = torch.autograd.functional.jacobian(lambda v: layer._forward(v)[0], x[0])
    assert torch.allclose(back, x, atol=1e-10) and torch.allclose(log_det, log_det_back)
    assert torch.allclose(log_det[0], matrix.logdet(), atol=1e-10)


def test_low_rank_map_is_the_same_whatever_the_default_device() -> None:
    loc = torch.zeros(6)
    with torch.device("meta"):
        layer = LowRankAffine(loc)
    assert torch.equal(layer.factor, LowRankAffine(loc).factor)


def test_low_rank_map_starts_next_to_its_diagonal_and_saves_no_matrix() -> None:
    layer = LowRankAffine(torch.zeros(3000), 2.0)
    y, log_det = layer._forward(torch.ones(3000))
    assert torch.allclose(y, torch.tensor(2.0), atol=0.1) and abs(log_det - 3000 * math.log(2)) < 1
    assert sum(p.numel() for p in layer.parameters()) == 3000 * 57


@pytest.mark.parametrize(("arguments", "words"), [
    ((torch.zeros(2, 2),), "loc must be a vector"),
    ((torch.zeros(3), -1.0), "scale and rank must be positive"),
])  # fmt: skip
def test_low_rank_refuses(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LowRankAffine(*arguments)


def test_whitening_is_exact_and_refuses_what_is_no_factor() -> None:
    layer = Whitening(3)
    layer.set(CENTRE, FACTOR)
    x = torch.randn(5, 3)
    y, log_det = layer._forward(x)
    assert torch.allclose(y, CENTRE + x @ FACTOR.T) and torch.allclose(layer._backward(y)[0], x, atol=1e-9)
    assert torch.allclose(log_det, FACTOR.logdet().expand(5)) and torch.equal(log_det, layer._backward(y)[1])
    diagonal = DiagonalWhitening(3)
    diagonal.set(CENTRE, FACTOR.diagonal())
    y, log_det = diagonal._forward(x)
    assert torch.allclose(y, CENTRE + x * FACTOR.diagonal()) and torch.allclose(diagonal._backward(y)[0], x, atol=1e-9)
    assert torch.allclose(log_det, FACTOR.logdet().expand(5))
    for scale in (-FACTOR.diagonal(), FACTOR.diagonal()[:2]):
        with pytest.raises(ValueError, match="must"):
            diagonal.set(CENTRE, scale)
    for loc, scale_tril in ((CENTRE, -FACTOR), (CENTRE * math.nan, FACTOR), (CENTRE[:2], FACTOR)):
        with pytest.raises(ValueError, match="must"):
            layer.set(loc, scale_tril)


# ---- what the guide refuses, and its size


def dynamic() -> None:
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    pyro.sample("b", dist.Uniform(0.0, 1 - a))


def improper() -> None:
    flat = dist.ImproperUniform(constraints.positive, (), ())
    scale = pyro.sample("scale", flat)
    pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(1.0))


def test_supports_that_move_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"support of a site must not depend on other latents, got site 'b'.*fraction"):
        make_guide(dynamic)


def test_fixed_supports_are_taken_also_of_improper_priors() -> None:
    make_guide(improper, init_loc_fn=init_to_value(values={"scale": torch.tensor(2.0)}))
    make_guide(lambda: pyro.sample("z", dist.Uniform(torch.tensor([0.0, 3.0]), 5.0).to_event(1)))
    make_guide(plates)


def test_a_model_that_does_not_run_elsewhere_is_taken_as_it_is() -> None:
    def stubborn() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if not torch.equal(z, torch.ones(2)):
            raise RuntimeError("only at 1")

    make_guide(stubborn, init_loc_fn=init_to_value(values={"z": torch.ones(2)}))


def test_mean_field_elbo_is_refused_where_it_would_be_wrong() -> None:
    guide = make_guide(plates)
    with pytest.raises(ValueError, match=r"TraceMeanField_ELBO drops the Jacobian .*; use Trace_ELBO"):
        TraceMeanField_ELBO().loss(plates, guide)
    real = make_guide(banana)
    torch.manual_seed(0)
    expected = Trace_ELBO().loss(banana, real)
    torch.manual_seed(0)
    assert math.isclose(TraceMeanField_ELBO().loss(banana, real), expected)


def test_size_sets_capacity_and_arguments_override_it() -> None:
    counts = []
    for size in ("small", "base", "large"):
        guide = AutoRealNVP(plates, size=size)
        guide()
        counts.append(sum(p.numel() for p in guide.parameters()))
    assert counts[0] < counts[1] < counts[2]
    guide = AutoRealNVP(plates, size="large", num_layers=2)
    guide()
    couplings = [part for part in guide.modules() if type(part).__name__ == "AffineCoupling"]
    assert len(couplings) == 2
    widths = [capacity(size)["hidden_dims"][0] for size in (2, 10, 100, 300)]
    assert widths == sorted(widths) and widths[-1] <= 128 and capacity(3000)["hidden_dims"][0] == 32


@pytest.mark.parametrize(
    "options", [{"size": "huge"}, {"base": "cauchy"}, {"gradient": "none"}, {"init_scale": 0.0}], ids=str
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be"):
        AutoRealNVP(plates, **options)


def test_student_base_is_trained_and_has_quantiles() -> None:
    guide = make_guide(plates, base="student")
    assert torch.allclose(guide.get_base_dist().base_dist.df, torch.tensor(30.0))
    Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1).differentiable_loss(plates, guide).backward()
    assert guide.raw_df.grad.abs().sum() > 0
    low, high = guide.quantiles([0.1, 0.9])["mu"]
    assert low < high


COSTS = {"fast model": (1e-5, 1e-7, 8), "slow model": (0.05, 1e-5, 16), "many data": (1e-3, 1e-3, 1)}


@pytest.mark.parametrize(("of_run", "of_row", "num_starts"), COSTS.values(), ids=COSTS)
def test_ascents_are_as_many_as_their_rows_are_cheap(
    of_run: float, of_row: float, num_starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    density = make_density(banana)
    score, now, sizes = density.value_and_score, [0.0], list[int]()

    def timed(latents: Tensor) -> tuple[Tensor, Tensor]:
        now[0] += of_run + of_row * len(latents)
        sizes.append(len(latents))
        return score(latents)

    monkeypatch.setattr(density, "value_and_score", timed)
    monkeypatch.setattr("pyro_affine.warm_start.time.perf_counter", lambda: now[0])
    gaussian = find_gaussian(density, torch.zeros(2), 0.1, seconds=1.5)
    assert sizes[2] == num_starts  # after two trials of how long an iteration takes
    assert gaussian.loc.isfinite().all()


class Ramp:
    """A density that rises along a line; next to it, where draws fall, it is the same everywhere."""

    nesting, num_runs, furthest = None, 0, 0.0

    def is_random(self) -> bool:
        return False

    def value_and_score(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        self.num_runs += 1
        on_line = latents[:, 1] == 0
        self.furthest = max(self.furthest, float((latents[:, 0] * on_line).max()))
        score = torch.tensor([10.0, 0.0], dtype=latents.dtype) * on_line[:, None]
        return torch.where(on_line, 10 * latents[:, 0], -1e4), score


def test_ascents_go_on_while_the_density_rises_though_the_elbo_does_not() -> None:
    density: Any = Ramp()
    find_gaussian(density, torch.zeros(2), 0.1, num_runs=100)
    assert density.furthest > 60  # one unit an iteration, where a quarter of the runs is meant for ascents
