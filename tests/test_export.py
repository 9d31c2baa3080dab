from __future__ import annotations

import importlib.util
import math
import sys
import types

import arviz
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_mean

from pyro_affine import inference_data as inference_data_module
from pyro_affine.diagnostics import PSISResult, psis
from pyro_affine.export import to_arviz
from pyro_affine.inference_data import inference_data

SCORES = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
SCHOOLS = {"school": list("ABCDEFGH")}
ARVIZ_1 = int(arviz.__version__.split(".")[0]) >= 1


@pytest.fixture(autouse=True)
def fresh_start():
    pyro.clear_param_store()
    torch.manual_seed(0)


def eight_schools(scores):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("score", dist.Normal(theta, ERRORS), obs=scores)


def conjugate(data):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(data)):
        pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)


def groups_of(data):
    return list(data.children) if ARVIZ_1 else data.groups()


def schools_guide():
    guide = AutoMultivariateNormal(eight_schools, init_scale=0.5)
    guide(SCORES)
    return guide


@pytest.fixture(scope="module")
def exported():
    """Everything there is, for eight schools."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    result = psis(eight_schools, schools_guide(), SCORES, num_draws=300, seed=0)
    options = {"resample": False, "prior": True, "predictive": True, "coords": SCHOOLS, "seed": 1}
    return result, to_arviz(eight_schools, result, SCORES, **options)


def test_groups_and_names_of_dimensions(exported):
    _, data = exported
    assert set(groups_of(data)) == {
        "posterior",
        "posterior_predictive",
        "sample_stats",
        "log_likelihood",
        "prior",
        "prior_predictive",
        "observed_data",
    }
    assert set(data.posterior.data_vars) == set(data.prior.data_vars) == {"mu", "tau", "eta", "theta"}
    for variable in (
        data.posterior["eta"],
        data.posterior["theta"],
        data.prior["theta"],
        data.log_likelihood["score"],
        data.posterior_predictive["score"],
        data.prior_predictive["score"],
    ):
        assert variable.dims == ("chain", "draw", "school")
        assert variable.shape == (1, 300, 8)
        assert list(variable["school"].values) == SCHOOLS["school"]
    assert data.posterior["mu"].shape == (1, 300)
    assert data.observed_data["score"].dims == ("school",)


def test_draws_weights_and_densities_are_those_of_the_result(exported):
    result, data = exported
    posterior, stats = data.posterior, data.sample_stats
    for name, draws in result.draws.items():
        np.testing.assert_array_equal(posterior[name].values[0], draws.numpy())
    theta = result.draws["mu"][:, None] + result.draws["tau"][:, None] * result.draws["eta"]
    np.testing.assert_allclose(posterior["theta"].values[0], theta, rtol=1e-5)
    log_likelihood = dist.Normal(theta, ERRORS).log_prob(SCORES)
    np.testing.assert_allclose(data.log_likelihood["score"].values[0], log_likelihood, rtol=1e-4)
    log_joint = log_likelihood.sum(-1) + dist.Normal(0.0, 5.0).log_prob(result.draws["mu"])
    log_joint += dist.HalfCauchy(5.0).log_prob(result.draws["tau"])
    log_joint += dist.Normal(0.0, 1.0).log_prob(result.draws["eta"]).sum(-1)
    np.testing.assert_allclose(stats["lp"].values[0], log_joint, rtol=1e-4)
    np.testing.assert_array_equal(stats["log_weight"].values[0], result.log_weights)
    np.testing.assert_array_equal(stats["log_weight_smoothed"].values[0], result.smoothed_log_weights)
    np.testing.assert_array_equal(data.observed_data["score"].values, SCORES)
    assert stats.attrs["khat"] == result.khat
    assert stats.attrs["ess"] == result.ess
    assert stats.attrs["verdict"] == result.verdict
    assert "without weights" in posterior.attrs["draws"]


def test_predictions_spread_about_the_draws(exported):
    _, data = exported
    for predicted, drawn in (("posterior_predictive", "posterior"), ("prior_predictive", "prior")):
        errors = (data[predicted]["score"] - data[drawn]["theta"]).values[0] / ERRORS.numpy()
        assert errors.mean() == pytest.approx(0.0, abs=0.1)
        assert errors.std() == pytest.approx(1.0, abs=0.1)
    assert data.prior["eta"].values.std() == pytest.approx(1.0, abs=0.1)
    assert data.prior["mu"].values.std() == pytest.approx(5.0, abs=0.7)
    assert np.median(data.prior["tau"].values) == pytest.approx(5.0, abs=1.2)
    assert len(np.unique(data.posterior_predictive["score"].values)) == 2400


@pytest.mark.parametrize("num_draws", [None, 500])
def test_draws_chosen_by_weight(num_draws):
    result = psis(eight_schools, schools_guide(), SCORES, num_draws=300, seed=0)
    data = to_arviz(eight_schools, result, SCORES, resample=True, num_draws=num_draws, seed=7)
    chosen = result.resampled_positions(num_draws, seed=7)
    np.testing.assert_array_equal(data.sample_stats["source"].values[0], chosen)
    np.testing.assert_array_equal(data.posterior["mu"].values[0], result.draws["mu"][chosen])
    np.testing.assert_array_equal(data.sample_stats["log_weight"].values[0], result.log_weights[chosen])
    assert "chosen by importance weight" in data.posterior.attrs["draws"]


def test_weights_are_used_by_default_where_they_are_good():
    z = torch.randn(200, generator=torch.Generator().manual_seed(0))
    good = PSISResult({"loc": z}, 0.3 * z.double())
    bad = PSISResult({"loc": z}, -2.0 * z.double().abs().log())
    assert good.good
    assert not bad.good
    data = torch.zeros(3)
    assert "chosen by importance weight" in to_arviz(conjugate, good, data).posterior.attrs["draws"]
    raw = to_arviz(conjugate, bad, data)
    assert "without weights" in raw.posterior.attrs["draws"]
    np.testing.assert_array_equal(raw.posterior["loc"].values[0], z)
    assert raw.sample_stats.attrs["good"] == 0


def test_a_guide_is_weighed_first_and_the_seed_repeats():
    guide = AutoMultivariateNormal(conjugate, init_to_mean, init_scale=0.5)
    first, second = (to_arviz(conjugate, guide, torch.zeros(3), seed=2, predictive=True) for _ in range(2))
    assert first.posterior["loc"].shape == (1, 1000)
    assert first.sample_stats.attrs["ess"] > 990
    for group in groups_of(first):
        assert first[group].equals(second[group])
    few = to_arviz(conjugate, guide, torch.zeros(3), num_draws=50, log_likelihood=False)
    assert few.posterior["loc"].shape == (1, 50)
    assert set(groups_of(few)) == {"posterior", "sample_stats", "observed_data"}


def test_saves_and_loads_equal(exported, tmp_path):
    _, data = exported
    path = str(tmp_path / "posterior.nc")
    data.to_netcdf(path)
    loaded = arviz.from_netcdf(path)
    assert set(groups_of(loaded)) == set(groups_of(data))
    for group in groups_of(data):
        assert loaded[group].equals(data[group])
        # ArviZ 1 adds a list, which comes back as an array
        attrs = {key: value for key, value in data[group].attrs.items() if key != "sample_dims"}
        assert {key: loaded[group].attrs[key] for key in attrs} == attrs


@pytest.mark.filterwarnings("ignore::UserWarning:arviz")
def test_arviz_summaries(exported):
    _, data = exported
    summary = arviz.summary(data, kind="stats")
    assert "r_hat" not in summary.columns
    assert "theta[A]" in summary.index
    assert summary.loc["mu", "mean"] == pytest.approx(float(data.posterior["mu"].mean()), abs=1e-3)
    loo = arviz.loo(data)
    assert math.isfinite(loo.elpd if ARVIZ_1 else loo.elpd_loo)
    assert ARVIZ_1 or math.isfinite(arviz.waic(data).elpd_waic)


PLOTS = {
    "posterior": lambda data: arviz.plot_posterior(data, var_names=["mu", "tau"]),
    "pair": lambda data: arviz.plot_pair(data, var_names=["mu", "tau"]),
    "forest": lambda data: arviz.plot_forest(data, var_names=["theta"]),
    "ppc": lambda data: arviz.plot_ppc(data, num_pp_samples=20),
    "prior ppc": lambda data: arviz.plot_ppc(data, group="prior", num_pp_samples=20),
    "prior against posterior": lambda data: arviz.plot_dist_comparison(data, var_names=["mu"]),
    "loo pit": lambda data: arviz.plot_loo_pit(data, y="score"),
}
if ARVIZ_1:  # where several have other names
    PLOTS |= {
        "posterior": lambda data: arviz.plot_dist(data, var_names=["mu", "tau"]),
        "ppc": lambda data: arviz.plot_ppc_dist(data, num_samples=20),
        "prior ppc": lambda data: arviz.plot_ppc_dist(data, group="prior_predictive", num_samples=20),
        "prior against posterior": lambda data: arviz.plot_prior_posterior(data, var_names=["mu"]),
        "loo pit": lambda data: arviz.plot_loo_pit(data, var_names=["score"]),
    }


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)
def test_arviz_plots(plot, exported):
    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    try:
        assert plot(exported[1]) is not None
    finally:
        matplotlib.pyplot.close("all")
        matplotlib.use(before)


# ---------------------------------------------------------------- other models


def regression(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    loc = weight @ x.T
    pyro.deterministic("loc", loc, event_dim=1)
    pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=y)


def multivariate(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("row", len(x)):
        pyro.sample("y", dist.MultivariateNormal(weight + 0 * x, torch.eye(2)), obs=x)


def masked_scaled(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    hidden = torch.arange(len(y)) >= 2
    loc = (weight * x).sum(-1)
    with poutine.scale(scale=3.0), poutine.mask(mask=hidden), pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    pyro.factor("tilt", -weight.square().sum(-1))


def by_hand(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ weight, 1.0).to_event(1), obs=y)  # for one draw only


X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([1.0, -1.0])


def export(model, **options):
    guide = AutoNormal(model)
    guide(X, Y)
    return to_arviz(model, guide, X, Y, num_draws=40, resample=False, seed=0, **options)


def weights_of(data):
    return torch.as_tensor(data.posterior["weight"].values[0])


def test_observations_in_one_event_have_a_log_likelihood_each():
    data = export(regression, dims={"y": ["row"], "loc": ["row"]})
    expected = dist.Normal(weights_of(data) @ X.T, 1.0).log_prob(Y)
    assert data.log_likelihood["y"].dims == data.posterior["loc"].dims == ("chain", "draw", "row")
    np.testing.assert_allclose(data.log_likelihood["y"].values[0], expected, rtol=1e-4, atol=1e-5)


def test_multivariate_observations_have_one_log_likelihood_for_a_row():
    data = export(multivariate, predictive=True)
    expected = dist.MultivariateNormal(weights_of(data)[:, None], torch.eye(2)).log_prob(X)
    assert data.log_likelihood["y"].dims == ("chain", "draw", "row")
    assert data.observed_data["y"].dims == ("row", "y_dim_1")
    assert data.posterior_predictive["y"].dims == ("chain", "draw", "row", "y_dim_1")
    np.testing.assert_allclose(data.log_likelihood["y"].values[0], expected, rtol=1e-4, atol=1e-5)


def test_masked_observations_count_nothing_scales_are_left_out_and_factors_are_no_data():
    data = export(masked_scaled, predictive=True, prior=True)
    expected = dist.Normal(weights_of(data) @ X.T, 1.0).log_prob(Y)
    expected[:, :2] = 0.0
    assert list(data.log_likelihood.data_vars) == list(data.observed_data.data_vars) == ["y"]
    assert list(data.prior.data_vars) == ["weight"]
    np.testing.assert_allclose(data.log_likelihood["y"].values[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the model cannot be run at many draws")
def test_a_model_for_one_draw_gives_the_same_as_its_twin_for_many():
    one, many = export(by_hand, predictive=True, prior=True), export(regression, predictive=True, prior=True)
    np.testing.assert_allclose(one.log_likelihood["y"], many.log_likelihood["y"], rtol=1e-4, atol=1e-5)
    for group in ("prior_predictive", "posterior_predictive"):
        assert one[group]["y"].shape == many[group]["y"].shape
    errors = one.posterior_predictive["y"].values[0] - (weights_of(one) @ X.T).numpy()
    assert errors.std() == pytest.approx(1.0, abs=0.2)
    assert one.prior["weight"].values.std() == pytest.approx(1.0, abs=0.25)


def refuses_negative(data):
    z = pyro.sample("z", dist.Normal(0.5, 1.0))
    scale = torch.where(z > 0, z, torch.nan)
    pyro.deterministic("scale", scale)
    pyro.sample("y", dist.Normal(0.0, scale, validate_args=True), obs=data)


def test_draws_that_the_model_refuses_are_blank():
    guide = AutoMultivariateNormal(refuses_negative, lambda site: torch.tensor(0.5), init_scale=1.0)
    data = to_arviz(refuses_negative, guide, torch.tensor(0.1), num_draws=100, resample=False, prior=True, seed=0)
    refused = data.posterior["z"].values <= 0
    assert 10 < refused.sum() < 60
    assert (np.isneginf(data.sample_stats["lp"].values) == refused).all()
    assert (np.isnan(data.log_likelihood["y"].values) == refused).all()
    assert (np.isnan(data.prior["z"].values) == np.isnan(data.prior_predictive["y"].values)).all()
    chosen = to_arviz(refuses_negative, guide, torch.tensor(0.1), num_draws=100, resample=True, seed=0)
    assert np.isfinite(chosen.log_likelihood["y"].values).all()


def plate_named_draw(data):
    with pyro.plate("draw", len(data)):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)


def test_a_plate_named_draw_does_not_clash_with_arviz():
    data = to_arviz(plate_named_draw, AutoNormal(plate_named_draw), torch.zeros(3), num_draws=30)
    assert data.posterior["loc"].dims == ("chain", "draw", "draw_dim")
    assert data.log_likelihood["obs"].dims == ("chain", "draw", "draw_dim")


def improper(data):
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(z, 1.0), obs=data)


def test_bad_requests_are_refused():
    guide, data = AutoMultivariateNormal(conjugate, init_to_mean), torch.zeros(3)
    with pytest.raises(ValueError, match=r"\['nonsense'\]; the model has \['loc', 'obs'\]"):
        to_arviz(conjugate, guide, data, dims={"nonsense": ["row"]})
    result = psis(conjugate, guide, data, num_draws=30)
    with pytest.raises(ValueError, match="must not exceed the 30 weighted draws, got 31"):
        to_arviz(conjugate, result, data, num_draws=31, resample=False)
    pyro.clear_param_store()
    guide = AutoMultivariateNormal(improper, lambda site: torch.tensor(0.0))
    with pytest.raises(ValueError, match="leave prior=False"):
        to_arviz(improper, guide, torch.tensor(0.0), num_draws=30, prior=True)


# ---------------------------------------------------------------- the container

GROUPS = {
    "posterior": {"mu": np.zeros((1, 5)), "theta": np.zeros((1, 5, 2))},
    "observed_data": {"y": np.zeros(2)},
    "prior": {},
}
LABELS = {"coords": {"school": ["A", "B"]}, "dims": {"theta": ("school",), "y": ("school",)}}
ATTRS = {"posterior": {"draws": "all"}, "prior": {"left": "out"}}


def test_container_of_the_installed_arviz():
    data = inference_data(GROUPS, **LABELS, attrs=ATTRS)
    assert list(data["posterior"]["theta"].coords["school"].values) == ["A", "B"]
    assert data["posterior"].attrs["draws"] == "all"
    assert "prior" not in data


def test_container_of_arviz_1_is_asked_for_in_its_own_way(monkeypatch):
    asked = {}

    def from_dict(data, *, coords=None, dims=None, attrs=None):
        asked.update(data=data, coords=coords, dims=dims, attrs=attrs)
        return "a tree"

    monkeypatch.setitem(sys.modules, "arviz", types.SimpleNamespace(__version__="1.3.0", from_dict=from_dict))
    assert inference_data(GROUPS, **LABELS, attrs=ATTRS) == "a tree"
    assert asked["data"].keys() == {"posterior", "observed_data"}
    assert asked["coords"] == LABELS["coords"]
    assert asked["dims"] == {"theta": ["school"], "y": ["school"]}
    assert asked["attrs"] == {"posterior": {"draws": "all"}}


def test_container_needs_numpy_alone():
    """It can be loaded where torch and Pyro are missing, as beside an ArviZ that torch's Python is too old for."""
    spec = importlib.util.spec_from_file_location("alone", inference_data_module.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    imported = {value.__name__ for value in vars(module).values() if isinstance(value, types.ModuleType)}
    assert imported == {"numpy"}
