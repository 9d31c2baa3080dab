from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_mean,
    init_to_value,
)
from torch.distributions import biject_to, constraints

from pyro_affine.diagnostics import PSISResult, draw_posterior, psis
from pyro_affine.pareto import pareto_smooth
from pyro_affine.random_state import seeded
from pyro_affine.weighted import resampled_positions

SHARED_POSTERIORS = Path(__file__).resolve().parents[2] / "shared" / "data" / "posteriors"

SCORES = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


@pytest.fixture(autouse=True)
def fresh_start():
    pyro.clear_param_store()
    torch.manual_seed(0)


def numbers(like, *values):
    return torch.tensor(values, dtype=like.dtype).squeeze(0)


def eight_schools(scores):
    mu = pyro.sample("mu", dist.Normal(numbers(scores, 0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(numbers(scores, 5.0)))
    with pyro.plate("school", 8):
        eta = pyro.sample("eta", dist.Normal(numbers(scores, 0.0), 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("score", dist.Normal(theta, ERRORS.to(scores.dtype)), obs=scores)


def constrained(scores):
    shares = pyro.sample("shares", dist.Dirichlet(scores.new_ones(3)))
    factor = pyro.sample("factor", dist.LKJCholesky(2, numbers(scores, 1.0)))
    spread = pyro.sample("spread", dist.LogNormal(scores.new_zeros(2), 1.0).to_event(1))
    tril = spread[..., None] * factor
    rows = scores.reshape(4, 2) / 10
    with pyro.plate("row", 4):
        pyro.sample("rows", dist.MultivariateNormal(scores.new_zeros(2), scale_tril=tril), obs=rows)
    pyro.sample("kind", dist.Categorical(shares), obs=torch.tensor(1))


def nested_plates(scores):
    total = pyro.sample("total", dist.Normal(numbers(scores, 0.0), 1.0))
    with pyro.plate("row", 4, dim=-2):
        row = pyro.sample("row_effect", dist.Normal(total, 1.0))
    with pyro.plate("column", 2, dim=-1):
        column = pyro.sample("column_effect", dist.Normal(scores.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("row_again", 4, dim=-2):
            pyro.sample("cell", dist.Normal(row + column.sum(-1), 2.0), obs=scores.reshape(4, 2) / 10)


def events_only(scores):
    weight = pyro.sample("weight", dist.Normal(scores.new_zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.Exponential(numbers(scores, 1.0)))
    design = torch.stack([scores * 0 + 1, scores / 10, (scores / 10) ** 2], -1)
    loc = weight @ design.T
    pyro.deterministic("loc", loc, event_dim=1)
    pyro.sample("y", dist.Normal(loc, scale[..., None]).to_event(1), obs=scores / 10)


def undeclared_batch(scores):
    with poutine.mask(mask=torch.arange(8) < 6):
        z = pyro.sample("z", dist.Normal(scores.new_zeros(8), 1.0).mask(True))
    pyro.sample("y", dist.Normal(z, 1.0), obs=scores / 10)


def scaled_masked_factored(scores):
    z = pyro.sample("z", dist.Normal(numbers(scores, 0.0), 1.0))
    with pyro.plate("school", 8), poutine.scale(scale=0.5), poutine.mask(mask=scores > 0):
        pyro.sample("y", dist.Normal(z, 1.0), obs=scores / 10)
    pyro.factor("tilt", -(z**2))


def fixed_subsample(scores):
    z = pyro.sample("z", dist.Normal(numbers(scores, 0.0), 1.0))
    with pyro.plate("school", 8, subsample=torch.tensor([0, 3, 5])) as index:
        pyro.sample("y", dist.Normal(z, 1.0), obs=scores[index] / 10)


def sequential_plate(scores):
    z = pyro.sample("z", dist.Normal(numbers(scores, 0.0), 1.0))
    for i in pyro.plate("school", 3):
        pyro.sample(f"y_{i}", dist.Normal(z, 1.0), obs=scores[i] / 10)


MODELS = {
    "eight schools": eight_schools,
    "constrained sites": constrained,
    "nested plates": nested_plates,
    "events, no plates": events_only,
    "undeclared batch": undeclared_batch,
    "scale, mask and factor": scaled_masked_factored,
    "fixed subsample": fixed_subsample,
    "sequential plate": sequential_plate,
}


def python_branch(scores):
    z = pyro.sample("z", dist.Normal(numbers(scores, 0.0), 1.0))
    scale = 1.0 if z.item() > 0 else 2.0
    pyro.sample("y", dist.Normal(z, scale), obs=scores[0] / 10)


def mixes_draws(scores):
    z = pyro.sample("z", dist.Normal(numbers(scores, 0.0), 1.0))
    pyro.sample("y", dist.Normal(z.mean(), 1.0), obs=scores[0] / 10)


def mixes_many_draws(scores):
    z = pyro.sample("z", dist.Normal(numbers(scores, 0.0), 1.0))
    pyro.sample("y", dist.Normal(z if z.numel() < 20 else z.mean(), 1.0), obs=scores[0] / 10)


def expands_by_hand(scores):
    z = pyro.sample("z", dist.Normal(numbers(scores, 0.0), 1.0))
    pyro.sample("y", dist.Normal(z, 1.0).expand([8]).to_event(1), obs=scores / 10)


ONE_BY_ONE = {
    "python branch": python_branch,
    "draws mixed by a mean": mixes_draws,
    "mixed in large batches only": mixes_many_draws,
    "expanded by hand": expands_by_hand,
}

GUIDES = {
    "full rank": AutoMultivariateNormal,
    "low rank": AutoLowRankMultivariateNormal,
    "diagonal": AutoDiagonalNormal,
    "inverse autoregressive flow": AutoIAFNormal,
    "site by site": AutoNormal,
}


def prior_guide(scores):
    """A guide written by hand, for ``scaled_masked_factored``."""
    loc = pyro.param("loc", scores.new_tensor(0.3))
    pyro.sample("z", dist.Normal(loc, 0.7))


def ready(model, make=AutoMultivariateNormal, dtype=torch.float64):
    scores = SCORES.to(dtype)
    guide = make(model)
    guide(scores)
    return guide, scores


def expected_log_weights(model, guide, scores, result):
    """Draw by draw: Pyro's log-density of the model, and that of the guide by the change of variables."""
    log_weights, posterior = [], guide.get_posterior()
    for i in range(result.num_draws):
        one = {name: value[i] for name, value in result.draws.items()}
        log_p = poutine.trace(poutine.condition(model, data=one)).get_trace(scores).log_prob_sum()
        parts, log_q = [], 0.0
        for name, site in guide.prototype_trace.iter_stochastic_nodes():
            transform = biject_to(site["fn"].support)
            unconstrained = transform.inv(one[name])
            parts.append(unconstrained.reshape(-1))
            log_q = log_q - transform.log_abs_det_jacobian(unconstrained, one[name]).sum()
        log_weights.append((log_p - log_q - posterior.log_prob(torch.cat(parts))).detach())
    return torch.stack(log_weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_log_weights_are_those_of_single_draws(model, dtype):
    guide, scores = ready(model, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no model here needs to be run draw by draw
        result = psis(model, guide, scores, num_draws=40, seed=1)
    assert result.log_weights.dtype == torch.float64
    assert all(value.dtype == dtype for value in result.draws.values())
    expected = expected_log_weights(model, guide, scores, result).double()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(result.log_weights, expected, rtol=tolerance, atol=tolerance)


def many_observations(data):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(data)):
        pyro.sample("obs", dist.Normal(z, 0.1), obs=data)


def test_terms_of_a_float32_model_are_summed_in_float64():
    data = torch.linspace(-3, 3, 10_000)
    guide = AutoMultivariateNormal(many_observations, init_to_mean)
    result = psis(many_observations, guide, data, num_draws=30, seed=0)
    z = result.draws["z"]
    terms = dist.Normal(z[:, None], 0.1).log_prob(data)
    log_p = dist.Normal(0.0, 1.0).log_prob(z).double() + terms.double().sum(-1)
    exact = log_p - dist.Normal(0.0, 0.1).log_prob(z).double()
    assert float((result.log_weights - exact).abs().max()) < 1e-5
    assert float((terms.sum(-1) - terms.double().sum(-1)).abs().max()) > 1e-3  # what float32 would lose


@pytest.mark.parametrize("model", ONE_BY_ONE.values(), ids=ONE_BY_ONE)
def test_models_for_one_draw_are_found_out_and_still_right(model):
    guide, scores = ready(model)
    with pytest.warns(UserWarning, match="cannot be run at many draws at once") as caught:
        result = psis(model, guide, scores, num_draws=40, seed=1)
    assert caught[0].filename == __file__  # it points to the call, not into the package
    torch.testing.assert_close(result.log_weights, expected_log_weights(model, guide, scores, result))


def three_means(data):
    with pyro.plate("group", 3):
        loc = pyro.sample("loc", dist.Normal(data.new_tensor(0.0), 1.0))
        pyro.sample("obs", dist.Normal(loc, 0.5), obs=data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_every_guide_finds_the_evidence(make, dtype, default_dtype):
    """A guide wider than the posterior, Normal(0, 0.45), has bounded weights, so no fit is needed."""
    data = torch.zeros(3, dtype=default_dtype(dtype))
    wide = {} if make is AutoIAFNormal else {"init_scale": 0.7, "init_loc_fn": init_to_mean}
    guide = make(three_means, **wide)
    exact = 3 * float(dist.Normal(0.0, 1.25**0.5).log_prob(torch.tensor(0.0)))
    result = psis(three_means, guide, data, num_draws=4000, seed=0)
    assert result.elbo < result.log_evidence
    assert result.log_evidence == pytest.approx(exact, abs=0.15)


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()

    def set_to(dtype):
        torch.set_default_dtype(dtype)
        return dtype

    yield set_to
    torch.set_default_dtype(before)


def conjugate(data):
    loc = pyro.sample("loc", dist.Normal(data.new_tensor(0.0), 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)


def test_exact_guide_gives_equal_weights_and_the_exact_evidence():
    data = torch.zeros(3, dtype=torch.float64)
    guide = AutoMultivariateNormal(conjugate, init_to_mean, init_scale=0.5)  # the posterior is Normal(0, 0.5)
    result = psis(conjugate, guide, data, num_draws=500, seed=0)
    exact = -1.5 * math.log(2 * math.pi) - 0.5 * math.log(4.0)
    assert result.log_evidence == pytest.approx(exact, abs=1e-9)
    assert result.elbo == pytest.approx(exact, abs=1e-9)
    assert result.ess == pytest.approx(500)
    assert result.good
    assert "Trust the draws as they are" in result.verdict


def test_a_narrow_guide_is_not_good_and_a_wide_one_is_mended_by_the_weights():
    data = torch.zeros(3, dtype=torch.float64)
    narrow = AutoMultivariateNormal(conjugate, init_to_mean, init_scale=0.02)
    assert not psis(conjugate, narrow, data, num_draws=4000, seed=0).good
    pyro.clear_param_store()
    wide = AutoMultivariateNormal(conjugate, init_to_mean, init_scale=1.0)
    result = psis(conjugate, wide, data, num_draws=4000, seed=0)
    assert result.good
    assert float(result.draws["loc"].std()) == pytest.approx(1.0, abs=0.05)
    assert float(result.sd("loc")) == pytest.approx(0.5, abs=0.03)
    assert float(result.resample(seed=0)["loc"].std()) == pytest.approx(0.5, abs=0.03)


def refuses_negative(data):
    z = pyro.sample("z", dist.Normal(torch.tensor(0.5), 1.0))
    scale = torch.where(z > 0, z, torch.nan)
    pyro.sample("y", dist.Normal(torch.zeros_like(z), scale, validate_args=True), obs=data)


def nan_when_negative(data):
    z = pyro.sample("z", dist.Normal(torch.tensor(0.5), 1.0))
    scale = torch.where(z > 0, z, torch.nan)
    pyro.sample("y", dist.Normal(torch.zeros_like(z), scale, validate_args=False), obs=data)


def cholesky_when_positive(data):
    z = pyro.sample("z", dist.Normal(torch.tensor(0.5), 1.0))
    tril = torch.linalg.cholesky(z[..., None, None] * torch.eye(2))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril), obs=torch.zeros(2))


@pytest.mark.parametrize("model", [refuses_negative, cholesky_when_positive])
def test_draws_that_the_model_refuses_have_weight_zero(model):
    data = torch.tensor(0.1)
    guide = AutoMultivariateNormal(model, lambda site: torch.tensor(0.5), init_scale=1.0)
    result = psis(model, guide, data, num_draws=600, seed=0)
    negative = result.draws["z"] <= 0
    assert 100 < int(negative.sum()) < 300
    assert torch.equal(result.log_weights == -math.inf, negative)
    assert result.num_nonfinite == int(negative.sum())
    assert result.num_dropped == 0
    assert sorted(result.messages) == negative.nonzero().squeeze(-1).tolist()
    assert f"{int(negative.sum())} of weight 0" in result.verdict
    assert next(iter(result.messages.values())) in result.verdict
    assert f"{int(negative.sum())} of weight 0" in str(result)
    assert float(result.resample(2000, seed=0)["z"].min()) > 0
    assert result.elbo == -math.inf


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_nan_weights_are_dropped_and_said():
    guide = AutoMultivariateNormal(nan_when_negative, lambda site: torch.tensor(0.5), init_scale=1.0)
    result = psis(nan_when_negative, guide, torch.tensor(0.1), num_draws=600, seed=0)
    assert 100 < result.num_dropped < 300
    assert result.num_draws == len(result.draws["z"]) == 600 - result.num_dropped
    assert float(result.draws["z"].min()) > 0
    assert not result.good
    assert f"{result.num_dropped} left out as NaN or +inf" in result.verdict


def test_a_model_that_refuses_every_draw_says_why():
    guide = AutoMultivariateNormal(refuses_negative, lambda site: torch.tensor(0.5), init_scale=0.01)
    guide(torch.tensor(0.0))
    guide.loc.data.fill_(-5.0)
    with pytest.raises(ValueError, match=r"accepts none of 30 draws; first error: .*scale"):
        psis(refuses_negative, guide, torch.tensor(0.0), num_draws=30)


def test_errors_in_the_code_of_a_model_are_not_swallowed():
    def broken(data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if not torch.is_grad_enabled():
            raise KeyError("a bug")
        pyro.sample("y", dist.Normal(z, 1.0), obs=data)

    guide, scores = AutoMultivariateNormal(broken), torch.tensor(0.0)
    guide(scores)
    with pytest.raises(KeyError, match="a bug"):
        psis(broken, guide, scores, num_draws=30)


def test_same_seed_same_result_and_the_stream_is_left_alone():
    guide, scores = ready(eight_schools)
    before = torch.get_rng_state()
    first, second = (psis(eight_schools, guide, scores, num_draws=30, seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.log_weights, second.log_weights)
    drawn = draw_posterior(guide, scores, num_draws=30, seed=3)
    assert all(torch.equal(drawn[name], first.draws[name]) for name in drawn)
    other = psis(eight_schools, guide, scores, num_draws=30, seed=4)
    assert not torch.equal(first.log_weights, other.log_weights)


def test_a_guide_written_by_hand_and_a_list_of_guides():
    scores = SCORES.double()
    result = psis(scaled_masked_factored, prior_guide, scores, num_draws=300, seed=0)
    z = result.draws["z"]
    assert z.shape == (300,)
    for i in (0, 150, 299):
        model = poutine.condition(scaled_masked_factored, data={"z": z[i]})
        log_p = poutine.trace(model).get_trace(scores).log_prob_sum()
        assert float(log_p - dist.Normal(0.3, 0.7).log_prob(z[i])) == pytest.approx(float(result.log_weights[i]))
    parts = AutoGuideList(eight_schools)
    parts.append(AutoNormal(poutine.block(eight_schools, expose=["eta"])))
    parts.append(AutoMultivariateNormal(poutine.block(eight_schools, expose=["mu", "tau"])))
    assert psis(eight_schools, parts, scores, num_draws=50, seed=0).draws["eta"].shape == (50, 8)


def test_a_guide_for_one_draw_only_is_drawn_one_by_one():
    def guide(scores):
        z = pyro.sample("draw", dist.Normal(scores.new_tensor(0.3), 0.7), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(z - z.mean() + z.max()))  # the same as z for one draw

    scores = SCORES.double()
    with pytest.warns(UserWarning, match="the guide cannot be run at many draws"):
        draws = draw_posterior(guide, scores, num_draws=400, seed=0)
    assert float(draws["z"].mean()) == pytest.approx(0.3, abs=0.15)
    assert float(draws["z"].std()) == pytest.approx(0.7, abs=0.1)


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_draws_have_the_shape_and_support_of_their_sites(make, default_dtype):
    guide, scores = ready(constrained, make, default_dtype(torch.float64))
    draws = draw_posterior(guide, scores, num_draws=70)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        "shares": (70, 3),
        "factor": (70, 2, 2),
        "spread": (70, 2),
    }
    assert constraints.simplex.check(draws["shares"]).all()
    assert constraints.lower_cholesky.check(draws["factor"]).all()
    assert (draws["spread"] > 0).all()
    assert not any(value.requires_grad for value in draws.values())
    assert len(draws["spread"].unique()) == 140


def test_draws_follow_the_guide():
    guide, scores = ready(eight_schools)
    draws = draw_posterior(guide, scores, num_draws=4000, seed=0)
    levels = [0.1, 0.5, 0.9]
    for name, quantiles in guide.quantiles(levels, scores).items():
        for level, quantile in zip(levels, quantiles, strict=True):
            share = (draws[name] < quantile).double().mean(0)
            torch.testing.assert_close(share, torch.full_like(share, level), rtol=0, atol=0.03)


def test_a_single_draw_and_deterministic_sites():
    guide, scores = ready(eight_schools)
    for num_draws in (1, 300):
        draws = draw_posterior(guide, scores, num_draws=num_draws, model=eight_schools)
        expected = draws["mu"][:, None] + draws["tau"][:, None] * draws["eta"]
        torch.testing.assert_close(draws["theta"], expected)
    result = psis(eight_schools, guide, scores, num_draws=30, deterministics=True)
    assert result.deterministics["theta"].shape == (30, 8)
    assert "theta" not in result.draws
    assert "theta" in result.resample()
    assert psis(eight_schools, guide, scores, num_draws=30).deterministics == {}


def test_progress_bar_can_be_shown(monkeypatch, capsys):
    import tqdm.auto

    bar = tqdm.auto.tqdm
    monkeypatch.setattr(tqdm.auto, "tqdm", lambda *args, **kwargs: bar(*args, **kwargs | {"delay": 0.0}))
    guide, scores = ready(eight_schools)
    psis(eight_schools, guide, scores, num_draws=30)
    assert "model at 30 draws" in capsys.readouterr().err
    psis(eight_schools, guide, scores, num_draws=30, progress=False)
    assert capsys.readouterr().err == ""


def with_local_latents(scores):
    with pyro.plate("school", 8, subsample_size=3) as index:
        z = pyro.sample("z", dist.Normal(scores.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=scores[index])


def with_random_subsample(scores):
    z = pyro.sample("z", dist.Normal(scores.new_zeros(()), 1.0))
    with pyro.plate("school", 8, subsample_size=3) as index:
        pyro.sample("y", dist.Normal(z, 1.0), obs=scores[index])


def with_discrete_site(scores):
    pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("kind", dist.Bernoulli(0.5))


def only_z(scores):
    pyro.sample("z", dist.Normal(0.0, 1.0))


def z_and_more(scores):
    only_z(scores)
    pyro.sample("more", dist.Normal(0.0, 1.0))


REFUSED = {
    "point estimate": (eight_schools, AutoDelta, {}, "point estimate"),
    "Laplace before its time": (eight_schools, AutoLaplaceApproximation, {}, "laplace_approximation"),
    "latent site in a subsampling plate": (with_local_latents, AutoNormal, {}, "3 of 8 of plate 'school'"),
    "random subsample": (with_random_subsample, AutoMultivariateNormal, {}, "fix the plate with subsample="),
    "too few draws": (only_z, AutoMultivariateNormal, {"num_draws": 24}, "25 or more"),
    "no draws": (only_z, AutoMultivariateNormal, {"num_draws": 0}, "num_draws must be 1 or more"),
}


@pytest.mark.parametrize(("model", "make", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_weighed_is_refused(model, make, options, words):
    guide, scores = ready(model, make)
    with pytest.raises(ValueError, match=words):
        psis(model, guide, scores, **({"num_draws": 30} | options))


@pytest.mark.parametrize(
    ("model", "guided", "words"),
    [
        (z_and_more, only_z, r"\['more'\] in the model alone"),
        (only_z, z_and_more, r"\['more'\] in the guide alone"),
        (with_discrete_site, only_z, "sum discrete sites out"),
    ],
)
def test_model_and_guide_must_share_their_sites(model, guided, words):
    guide, scores = ready(guided)
    with pytest.raises(ValueError, match=words):
        psis(model, guide, scores, num_draws=30)


def test_a_guide_with_lost_parameters_says_so():
    guide, scores = ready(eight_schools)
    guide.loc.data.fill_(math.nan)
    with pytest.raises(ValueError, match="its parameters may not be finite"):
        psis(eight_schools, guide, scores, num_draws=30)


@pytest.mark.parametrize(("name", "init_scale"), [("eight_schools-eight_schools_noncentered", 1.0), ("arK-arK", 0.1)])
def test_means_of_real_posteriors(name, init_scale, default_dtype, monkeypatch):
    if not (SHARED_POSTERIORS / "models.py").exists():
        pytest.skip("no reference draws: ../shared/data/posteriors is missing")
    default_dtype(torch.float64)
    monkeypatch.syspath_prepend(str(SHARED_POSTERIORS))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    from models import POSTERIORS

    posterior = POSTERIORS[name]
    data = posterior.load_data()
    reference = {name: torch.as_tensor(x, dtype=torch.float64) for name, x in posterior.load_draws().items()}
    start = init_to_value(values={name: x.mean(0) for name, x in reference.items()})
    guide = AutoMultivariateNormal(posterior.model, start, init_scale)
    optimiser = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.1 ** (1 / 300)})
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(posterior.model, guide, optimiser, elbo)
    for _ in range(300):
        svi.step(data)
    result = psis(posterior.model, guide, data, num_draws=3000, seed=0)
    assert result.good
    assert result.ess > 300
    for site, x in reference.items():
        assert float(((result.mean(site) - x.mean(0)) / x.std(0)).abs().max()) < 0.25
        assert float((result.sd(site) / x.std(0)).log().abs().max()) < 0.25


# ---------------------------------------------------------------- the result alone


def weighted(num_draws=1000, slope=0.5):
    """Draws of Normal(0, 1), weighted to Normal(slope, 1)."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(num_draws, 2, generator=generator, dtype=torch.float64)
    return PSISResult({"z": z}, slope * z.sum(-1) - slope**2 + 7.0)


def test_estimates_are_those_of_the_smoothed_weights():
    result = weighted()
    smoothed, khat = pareto_smooth(result.log_weights)
    weights = (smoothed - smoothed.logsumexp(0)).exp()
    z = result.draws["z"]
    mean = (weights[:, None] * z).sum(0)
    assert result.khat == khat
    assert result.ess == pytest.approx(float(1 / weights.square().sum()))
    assert result.log_evidence == pytest.approx(float(smoothed.exp().mean().log()))
    assert float(result.smoothed_log_weights.exp().sum()) == pytest.approx(1.0)
    torch.testing.assert_close(result.mean("z"), mean)
    torch.testing.assert_close(result.mean()["z"], mean)
    torch.testing.assert_close(result.sd("z"), (weights[:, None] * (z - mean) ** 2).sum(0).sqrt())
    torch.testing.assert_close(result.mcse("z"), (weights[:, None] ** 2 * (z - mean) ** 2).sum(0).sqrt())
    torch.testing.assert_close(result.mean(lambda draws: draws["z"].square().sum(-1)), (weights @ z**2).sum())


def test_estimates_and_their_errors_are_right_in_repetition():
    """The posterior is Normal(0.5, 1) and the evidence exp(7): 200 results give the spread of the estimates."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200, 400, dtype=torch.float64, generator=generator)
    results = [PSISResult({"z": z}, 0.5 * z - 0.125 + 7.0) for z in draws]
    means = torch.stack([result.mean("z") for result in results])
    errors = torch.stack([result.mcse("z") for result in results])
    assert float(means.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(means.std() / errors.mean()) == pytest.approx(1.0, abs=0.2)
    evidence = torch.tensor([result.log_evidence for result in results])
    evidence_errors = torch.tensor([result.log_evidence_se for result in results])
    assert float(evidence.mean()) == pytest.approx(7.0, abs=0.01)
    assert float(evidence.std() / evidence_errors.mean()) == pytest.approx(1.0, abs=0.2)
    elbos = torch.tensor([result.elbo for result in results])
    elbo_errors = torch.tensor([result.elbo_se for result in results])
    assert float(elbos.mean()) == pytest.approx(7.0 - 0.125, abs=0.01)
    assert float(elbos.std() / elbo_errors.mean()) == pytest.approx(1.0, abs=0.2)


def test_khat_of_a_quantity_sees_its_tail():
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = PSISResult({"z": z}, 0.1 * z[:, 0])
    assert result.khat < 0.4
    assert (result.khat_of("z") < 0.6).all()
    assert result.khat_of()["z"].shape == (2,)
    # exp(z^2) has no mean under Normal(0, 1): its tail index is 2
    assert float(result.khat_of(lambda draws: -draws["z"][:, 1].square().exp())) > 1
    assert float(result.khat_of(lambda draws: (draws["z"][:, 0] > 0).double())) == result.khat
    assert float(result.khat_of(lambda draws: 1 / (draws["z"][:, 0] * 0))) == math.inf


@pytest.mark.parametrize("num_draws", [1, 40, 1000, 5000])
def test_resampling_chooses_by_weight(num_draws):
    result = weighted()
    chosen = result.resampled_positions(num_draws, seed=5)
    assert chosen.shape == (num_draws,)
    counts = torch.bincount(chosen, minlength=1000)
    expected = num_draws * result.smoothed_log_weights.exp()
    assert ((counts - expected).abs() < 1 + 1e-9).all()
    assert torch.equal(result.resample(num_draws, seed=5)["z"], result.draws["z"][chosen])
    if num_draws == 1000:
        assert len(result.resample(seed=5)["z"]) == 1000
        assert not torch.equal(chosen, chosen.sort().values)


def test_resampling_is_the_same_whatever_the_default_device():
    weights = torch.linspace(0, 1, 50) / 25
    with seeded(0):
        expected = resampled_positions(weights, 20)
    with seeded(0), torch.device("meta"):
        assert torch.equal(resampled_positions(weights, 20), expected)


def test_table_has_a_row_for_each_entry():
    result = PSISResult({"a": torch.randn(50), "b": torch.randn(50, 2)}, torch.zeros(50), {"c": torch.randn(50, 1, 2)})
    table = result.table()
    assert list(table.index) == ["a", "b[0]", "b[1]", "c[0, 0]", "c[0, 1]"]
    assert list(table.columns) == ["mean", "sd", "mcse", "khat", "guide_mean", "guide_sd"]
    assert table.loc["b[1]", "mean"] == pytest.approx(float(result.mean("b")[1]))
    assert table.loc["b[1]", "guide_sd"] == pytest.approx(float(result.draws["b"][:, 1].std()))


SOUND = {
    "even weights": (lambda z: 0.05 * z, "Trust the draws as they are"),
    "even weights, heavy tail": (lambda z: torch.log1p(0.002 * torch.linspace(0, 1, 2501)[1:] ** -0.95), "harmless"),
    "uneven but light": (lambda z: z, "Trust the weighted draws"),
    "few": (lambda z: torch.where(z > 2.0, z, -math.inf), "but they are few"),
}
UNSOUND = {
    "heavy": (lambda z: -0.85 * (z.abs() + 1e-9).log(), "a few of them carry"),
    "no mean": (lambda z: -2.0 * (z.abs() + 1e-9).log(), "has no mean"),
    "no tail": (lambda z: torch.where(torch.arange(len(z)) < 3, 0.0, -math.inf), "cannot be fitted"),
}


@pytest.mark.parametrize(("weigh", "words"), (SOUND | UNSOUND).values(), ids=SOUND | UNSOUND)
def test_verdict(weigh, words, request):
    z = torch.linspace(-1, 1, 2500, dtype=torch.float64)
    z = torch.erfinv(z * (1 - 1e-4)) * 2**0.5  # quantiles of Normal(0, 1)
    result = PSISResult({"z": z}, weigh(z))
    assert words in result.verdict
    assert result.good == (request.node.callspec.id in SOUND)
    assert f"{result.khat:.2f}" in result.verdict
    assert f"{result.ess:.0f} of 2500" in result.verdict
    assert result.verdict in str(result)
    assert "\n" not in result.verdict


def test_verdict_of_too_few_draws_asks_for_more():
    result = weighted(100, 0.1)
    object.__setattr__(result, "khat", 0.6)  # above the 0.5 of 100 draws, below the 0.7 of many
    object.__setattr__(result, "smoothed_log_weights", torch.randn(100))
    assert not result.good
    assert "take num_draws=2200" in result.verdict


def test_no_positive_weight_is_said_and_nothing_estimated():
    result = PSISResult({"z": torch.randn(50)}, torch.full((50,), -math.inf))
    assert not result.good
    assert result.ess == 0
    assert result.log_evidence == -math.inf
    assert "none has a positive weight" in result.verdict
    assert "ESS" in str(result)
    for call in (result.mean, result.resample, result.table):
        with pytest.raises(ValueError, match="some draw must have a positive weight"):
            call()


def test_draws_without_a_finite_value_do_not_spoil_the_mean_at_weight_zero():
    z = torch.randn(100, dtype=torch.float64)
    log_weights = torch.zeros(100, dtype=torch.float64)
    z[7], log_weights[7] = math.nan, -math.inf
    result = PSISResult({"z": z}, log_weights)
    assert float(result.mean("z")) == pytest.approx(float(z[z.isfinite()].mean()))
    assert math.isfinite(float(result.sd("z")))


def test_a_little_nan_is_tolerated_and_counted():
    z = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_weights = 0.5 * z
    log_weights[[3, 600]] = torch.tensor([math.nan, math.inf], dtype=torch.float64)
    result = PSISResult({"z": z}, log_weights)
    assert (result.num_draws, result.num_dropped, result.num_nonfinite) == (998, 2, 2)
    assert torch.equal(result.draws["z"], torch.cat([z[:3], z[4:600], z[601:]]))
    assert result.good
    assert "2 left out" in result.verdict


def test_result_is_frozen_and_short_in_a_shell():
    result = weighted()
    with pytest.raises(AttributeError):
        result.khat = 0.0
    assert repr(result) == f"PSISResult(num_draws=1000, khat={result.khat:.2f}, ess={result.ess:.0f}, good=True)"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PSISResult({"z": torch.zeros(30)}, torch.zeros(31)), "as many as log_weights"),
        (lambda: PSISResult({"z": torch.zeros(30)}, torch.zeros(30, 1)), "must be a vector"),
        (lambda: PSISResult({"z": torch.zeros(30)}, torch.full((30,), math.nan)), "got none in 30 draws"),
        (lambda: weighted().mean("theta"), r"one of \['z'\], got 'theta'"),
        (lambda: weighted().mean(lambda draws: draws["z"].mean()), "1000 draws leading"),
        (lambda: weighted().resample(0), "num_draws must be 1 or more"),
    ],
)
def test_bad_input_to_a_result_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
