"""Ranks and coverage: uniform for a posterior that is right, and only for that."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_affine import NeuralPosterior, expected_coverage, fit_posterior, plot_sbc, sbc_ranks
from pyro_affine.calibration import Coverage, Ranks
from pyro_affine.uniformity import uniform_band, uniformity_p_value


def model():
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(loc[..., 0], 1.0))
    pyro.sample("y", dist.Normal(loc.sum(-1), 0.3))
    pyro.sample("log_y", dist.Normal(scale.log(), 0.5))


@pytest.fixture(scope="module")
def npe():
    torch.manual_seed(0)
    npe = NeuralPosterior(model, ["y", "log_y"], num_layers=2, hidden_dims=(8,))
    fit_posterior(npe, num_simulations=50_000, num_steps=1, seed=0, progress=False)  # its start is exact
    return npe


FAULTS = {
    "too narrow": lambda density: density.noise.log_scale.sub_(0.4),
    "too wide": lambda density: density.noise.log_scale.add_(0.4),
    "biased": lambda density: density.regression.coupling.conditioner.network.from_context.bias.add_(0.2),
    "correlations of the wrong sign": lambda density: density.noise.below.neg_(),
}


@pytest.fixture(params=FAULTS.values(), ids=FAULTS)
def faulty(npe, request):
    kept = {name: value.clone() for name, value in npe.density.state_dict().items()}
    with torch.no_grad():
        request.param(npe.density)
    yield npe, request.node.callspec.id
    npe.density.load_state_dict(kept)


def test_right_posterior_passes(npe):
    ranks, coverage = sbc_ranks(npe, 400, seed=1), expected_coverage(npe, 400, seed=2)
    assert {name: tuple(u.shape) for name, u in ranks.values.items()} == {"loc": (400, 2), "scale": (400,)}
    assert ranks.p_value > 0.05 and coverage.p_value > 0.05
    assert "No sign" in str(ranks) and abs(coverage(0.8) - 0.8) < 0.06


def test_wrong_posterior_is_seen(faulty):
    npe, fault = faulty
    ranks, coverage = sbc_ranks(npe, 400, seed=1), expected_coverage(npe, 400, seed=2)
    if fault == "correlations of the wrong sign":
        assert coverage.p_value < 1e-3
    else:
        assert ranks.p_value < 1e-3 and "Not calibrated" in str(ranks)
    if fault.startswith("too"):
        assert (coverage(0.8) < 0.7) if fault == "too narrow" else (coverage(0.8) > 0.9)
        middle = ((ranks.values["scale"] - 0.5).abs() < 0.25).double().mean()
        assert (middle < 0.45) if fault == "too narrow" else (middle > 0.55)


def test_same_seed_same_ranks_and_given_simulations(npe):
    simulations = npe.simulate(50, seed=7)
    first, second = (sbc_ranks(npe, simulations=simulations, num_draws=20, seed=3).values for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first) and len(first["scale"]) == 50


@pytest.mark.parametrize("n", [20, 500])
def test_p_value_is_that_of_kolmogorov_and_smirnov(n):
    stats = pytest.importorskip("scipy.stats")
    for shift in (1.0, 1.1, 1.5):
        values = torch.rand(n, 2, dtype=torch.float64) ** shift
        expected = torch.tensor([stats.kstest(column.numpy(), "uniform").pvalue for column in values.T])
        assert torch.allclose(uniformity_p_value(values), expected, atol=0.03)  # 0.02 off for 20 numbers


def test_p_value_is_uniform_for_uniform_numbers_and_the_band_holds_their_share():
    values = torch.rand(200, 2000)
    p = uniformity_p_value(values)
    assert abs((p < 0.05).double().mean() - 0.05) < 0.015 and abs((p < 0.5).double().mean() - 0.5) < 0.04
    steps = torch.arange(1, 201)[:, None] / 200
    ordered = values.sort(0).values
    distance = torch.maximum(steps - ordered, ordered - steps + 1 / 200).amax(0)
    assert abs((distance < uniform_band(200)).double().mean() - 0.95) < 0.015


def test_picture_has_a_curve_for_each_entry_and_the_band(npe, tmp_path):
    ranks = sbc_ranks(npe, 50, num_draws=20, seed=0)
    figure = plot_sbc(ranks, path=tmp_path / "ranks.png")
    assert [axis.get_title() for axis in figure.axes] == ["loc", "scale"]
    assert [len(axis.lines) for axis in figure.axes] == [2, 1]
    assert (tmp_path / "ranks.png").stat().st_size > 1000


def test_direction_of_a_bias_in_the_picture():
    too_high = Ranks({"loc": torch.rand(100, dtype=torch.float64) ** 2}, num_draws=10)  # truths lie low among draws
    assert plot_sbc(too_high).axes[0].lines[0].get_ydata().max() > 0.15


def test_levels_count_what_is_covered():
    coverage = Coverage(torch.tensor([0.1, 0.3, 0.6, 0.9]))
    assert [coverage(level) for level in (0.05, 0.5, 1.0)] == [0.0, 0.5, 1.0]
    assert "50 % at 50 %" in str(coverage)


@pytest.mark.parametrize(("num_datasets", "num_draws"), [(5, 10), (100, 0)], ids=str)
def test_too_few_are_refused(npe, num_datasets, num_draws):
    with pytest.raises(ValueError, match="10 or more"):
        sbc_ranks(npe, num_datasets, num_draws=num_draws)


@pytest.mark.parametrize("prior", [dist.LKJCholesky, dist.LKJ], ids=["LKJCholesky", "LKJ"])
def test_entries_that_never_change_are_ties(prior):
    def correlated():
        matrix = pyro.sample("matrix", prior(3, torch.tensor(2.0)))
        pyro.sample("y", dist.Normal(matrix[..., 1, 0], 1.0))

    untrained = NeuralPosterior(correlated, ["y"], num_layers=2, hidden_dims=(8,))
    simulations = untrained.simulate(200, seed=0, at_once=prior is dist.LKJCholesky)
    p = sbc_ranks(untrained, simulations=simulations, num_draws=50, seed=1).p_values()["matrix"]
    fixed = p.diagonal() if prior is dist.LKJ else torch.stack([p[0, 0], p[0, 1], p[0, 2], p[1, 2]])
    assert (fixed > 1e-3).all()


def test_data_sets_that_training_leaves_out_are_left_out():
    def sometimes():
        z, noise = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("z", "noise"))
        pyro.deterministic("y", torch.where(z > 1, torch.nan, z + noise))

    untrained = NeuralPosterior(sometimes, ["y"], latents=["z"], num_layers=2, hidden_dims=(8,))
    for check, number in ((sbc_ranks, lambda ranks: ranks.num_datasets), (expected_coverage, lambda c: len(c.levels))):
        with pytest.warns(UserWarning, match="of 100 simulations are not finite and left out"):
            assert 70 < number(check(untrained, 100, num_draws=20, seed=0)) < 95
    simulations = untrained.simulate(100, seed=0)
    bad = simulations[simulations.latents["z"] > 0.9]
    with (
        pytest.warns(UserWarning, match="not finite"),
        pytest.raises(ValueError, match="10 or more, got 200 and"),
    ):
        sbc_ranks(untrained, simulations=bad)
