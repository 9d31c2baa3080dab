"""Amortised posteriors beside exact ones; simulations in plates beside single runs; what is refused, and how."""

from __future__ import annotations

import copy
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

from pyro_affine import DeepSets, NeuralPosterior, Simulations, fit_posterior, load, save
from pyro_affine.amortised_density import AmortisedDensity
from pyro_affine.calibration import _positions
from pyro_affine.data_encoder import DataEncoder, _centre_and_width
from pyro_affine.early_dropout import EarlyDropout
from pyro_affine.latent_layout import LatentLayout
from pyro_affine.regression import ridge
from pyro_affine.simulate import _cut, _num_steps
from pyro_affine.simulations import Simulator
from pyro_affine.support_check import _agree
from pyro_affine.truncated_prior import TruncatedPrior
from pyro_affine.weight_decay import decay_groups

TRIL = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
SMALL = {"num_layers": 2, "hidden_dims": (16,)}


def gaussian(y=None, num_rows=5):
    """The posterior of loc is N(n mean(y) / (n + 1), Sigma / (n + 1)), Sigma = L L^T."""
    loc = pyro.sample("loc", dist.MultivariateNormal(torch.zeros(2), scale_tril=TRIL))
    with pyro.plate("rows", num_rows):
        pyro.sample("y", dist.MultivariateNormal(loc, scale_tril=TRIL), obs=y)


def trained(model, *, num_simulations=10_000, num_steps=1, observed=("y",), **options):
    npe = NeuralPosterior(model, observed, **{**SMALL, **options})
    fit_posterior(npe, num_simulations=num_simulations, num_steps=num_steps, seed=0, progress=False)
    return npe


def constrained(y=None):
    """Sites of many supports and shapes, in a plate and out of one."""
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 0.5))
    shares = pyro.sample("shares", dist.Dirichlet(torch.full((3,), 2.0)))
    with pyro.plate("group", 2):
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        pyro.sample("y", dist.Normal(share + shares[..., 0], scale), obs=y)


def test_posterior_of_200_data_sets_is_the_exact_one():
    npe = trained(gaussian, num_simulations=20_000)
    data = npe.simulate(200, seed=1).data
    draws = npe.condition(data).sample(4000, seed=0)["loc"]
    error = (draws - 5 / 6 * data["y"].mean(1)) @ torch.linalg.inv(TRIL).T * math.sqrt(6)
    assert error.mean(0).square().mean().sqrt() < 0.05
    assert (error.std(0) - 1).square().mean().sqrt() < 0.05
    assert (error[..., 0] * error[..., 1]).mean().abs() < 0.05


def test_training_finds_what_a_linear_start_can_not():
    def model(y=None):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.square(), 0.5).to_event(1), obs=y)

    npe = NeuralPosterior(model, ["y"], num_layers=4, hidden_dims=(32,))
    fit = fit_posterior(npe, num_simulations=4000, num_steps=150, learning_rate=5e-3, seed=0, progress=False)
    assert fit.chosen != "start" and fit.best > -fit.validation_losses[0] and len(fit.losses) == 150
    draws = npe.condition({"y": torch.tensor([4.0, 4.0])}).sample(2000, seed=0)["z"]
    assert draws.abs().mean() > 1.25  # 0.8 at the start, 2 in truth
    again = fit_posterior(npe, num_simulations=500, num_steps=1, seed=1, progress=False)
    assert again.best > fit.best - 0.5  # units and weights stay


@pytest.mark.parametrize(("num_batches", "num_steps"), [(1, 300), (4, 400), (40, 4000), (200, 10_000), (4000, 80_000)])
def test_default_budget_is_a_hundred_passes_within_limits(num_batches, num_steps):
    assert _num_steps(num_batches) == num_steps


def test_dropout_ends_when_the_learning_rate_falls(monkeypatch):
    npe, shares = NeuralPosterior(gaussian, ["y"], dropout=0.2, **SMALL), []
    layers = [module for module in npe.density.modules() if isinstance(module, EarlyDropout)]
    follow = AmortisedDensity.follow

    def watched(self, step_size):
        follow(self, step_size)
        shares.append({layer.p for layer in layers})

    monkeypatch.setattr(AmortisedDensity, "follow", watched)
    for seed in (0, 1):  # a second fit has it anew
        shares.clear()
        fit_posterior(npe, num_simulations=200, num_steps=50, patience=99, seed=seed, progress=False)
        found = [next(iter(share)) for share in shares]
        assert len(layers) == 2 and all(len(share) == 1 for share in shares) and len(found) == 50
        assert found == [0.0] * 4 + [0.2] * 32 + [0.0] * 14  # warm-up, full learning rate, decay
    assert not npe.density.training


def test_dropout_leaves_the_mean_and_nothing_of_some():
    layer, x = EarlyDropout(0.25), torch.ones(100_000)
    y = layer(x)
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)] and abs((y == 0).float().mean() - 0.25) < 0.01
    assert torch.equal(layer.eval()(x), x)


def test_no_dropout_and_what_is_none():
    density = NeuralPosterior(gaussian, ["y"], dropout=0.0, **SMALL).density
    assert not any(isinstance(module, nn.Dropout) for module in density.modules())
    with pytest.raises(ValueError, match=r"dropout must be a share in \[0, 1\), got 1"):
        NeuralPosterior(gaussian, ["y"], dropout=1.0, **SMALL)


def test_far_values_are_less_likely_but_not_impossible():
    posterior = trained(gaussian, num_simulations=500, num_steps=20).condition({"y": torch.zeros(5, 2)})
    rays = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])[:, None] * 10.0 ** torch.arange(1.0, 9.0)[:, None]
    log_prob = posterior.log_prob({"loc": rays})
    assert log_prob.isfinite().all() and (log_prob.diff() < 0).all()
    assert log_prob[:, -1].min() > -1e5  # a normal is at -1e16


def test_default_budget_gives_way_to_any_other():
    npe = NeuralPosterior(gaussian, ["y"], **SMALL)
    options = {"num_simulations": 100, "seed": 0, "progress": False}
    assert fit_posterior(npe, num_epochs=2, **options).num_steps == 2
    assert fit_posterior(npe, seconds=0.1, **options).reason == "seconds"


def test_weights_and_evidence_with_the_likelihood():
    npe = trained(gaussian)
    y = npe.simulate(1, seed=3).data["y"][0]
    posterior = npe.condition({"y": y})
    result = posterior.psis(500, seed=0, progress=False)
    rows = torch.linalg.solve_triangular(TRIL, y.T, upper=False)
    joint = dist.MultivariateNormal(torch.zeros(5), torch.ones(5, 5) + torch.eye(5))
    evidence = joint.log_prob(rows).sum() - 5 * TRIL.det().log()
    assert result.good and result.ess > 400
    assert abs(result.log_evidence - evidence) < 0.05
    draws = {"loc": result.draws["loc"][:7]}
    by_model = pyro.poutine.condition(gaussian, data={"y": y, "loc": draws["loc"][0]})
    log_p = pyro.poutine.trace(by_model).get_trace().log_prob_sum()
    assert torch.allclose(log_p - posterior.log_prob(draws)[0], result.log_weights[0].float(), atol=1e-3)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_draws_have_the_sites_of_the_model(batch):
    npe = NeuralPosterior(constrained, ["y"], **SMALL)
    posterior = npe.condition({"y": torch.randn(*batch, 2)})
    draws = posterior.sample((4,), seed=0)
    shapes = {"scale": (), "shares": (3,), "share": (2,)}
    assert {name: tuple(x.shape) for name, x in draws.items()} == {n: (4, *batch, *s) for n, s in shapes.items()}
    assert posterior.batch_shape == batch and posterior.log_prob(draws).shape == (4, *batch)
    assert (draws["scale"] > 0).all() and torch.allclose(draws["shares"].sum(-1), torch.ones(()))
    assert torch.equal(draws["share"], posterior.sample(4, seed=0)["share"])


def test_log_density_of_constrained_sites_integrates_to_one():
    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        share = pyro.sample("share", dist.Beta(3.0, 3.0))
        pyro.sample("y", dist.Normal(scale + share, 1.0))

    posterior = trained(model, num_simulations=1000).condition({"y": torch.tensor(1.0)})
    scale, share = torch.linspace(0.005, 5.995, 600), torch.linspace(0.0025, 0.9975, 200)
    grid = torch.cartesian_prod(scale, share).T
    log_prob = posterior.log_prob({"scale": grid[0], "share": grid[1]})
    assert abs(log_prob.exp().sum() * 0.01 * 0.005 - 1) < 0.01
    outside = {"scale": torch.tensor([-1.0, 1.0, 1.0]), "share": torch.tensor([0.5, 1.5, 0.5])}
    assert torch.equal(posterior.log_prob(outside).isfinite(), torch.tensor([False, False, True]))


LAYOUTS = {
    "real": (constraints.real, (3,), 3),
    "positive": (constraints.positive, (2, 2), 4),
    "simplex": (constraints.simplex, (4,), 3),
    "correlations": (constraints.corr_cholesky, (3, 3), 3),
    "interval": (constraints.interval(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 5.0])), (2,), 2),
}


@pytest.mark.parametrize(("support", "shape", "size"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=str)
def test_layout_goes_there_and_back(support, shape, size, batch):
    torch.set_default_dtype(torch.float64)
    layout = LatentLayout({"a": torch.Size(shape), "b": torch.Size([])}, {"a": support, "b": constraints.positive})
    u = torch.randn(*batch, size + 1)
    values = layout.constrain(u)
    assert layout.size == size + 1 and values["a"].shape == (*batch, *shape)
    assert torch.allclose(layout.unconstrain(values), u)
    assert layout.log_det(u).shape == batch and layout.contains(values).all()
    expected = torch.distributions.biject_to(support)
    first = u[..., :size].reshape(*batch, *expected.inverse_shape(shape))
    terms = expected.log_abs_det_jacobian(first, expected(first)).reshape(*batch, -1).sum(-1)
    assert torch.allclose(layout.log_det(u), terms + u[..., -1])


def test_data_of_any_number_of_rows():
    npe = NeuralPosterior(gaussian, ["y"], summary=DeepSets(2, 8, hidden_dim=32), kwargs={"num_rows": 12}, **SMALL)
    options = {"num_simulations": 4000, "sizes": (1, 12), "num_steps": 200, "learning_rate": 5e-3}
    fit_posterior(npe, seed=0, progress=False, **options)
    for num_rows in (3, 10):
        y = npe.simulate(100, seed=1).data["y"][:, :num_rows]
        draws = npe.condition({"y": y}).sample(500, seed=0)["loc"]
        error = draws - y.sum(1) / (num_rows + 1)
        sd = (num_rows + 1) ** -0.5
        assert (error.mean(0)[..., 0] / sd).square().mean().sqrt() < 0.25
        assert abs(math.log(error.std(0).mean() / sd)) < 0.15
    shuffled = npe.condition({"y": y[:, torch.randperm(10)]}).sample(500, seed=0)["loc"]
    assert torch.allclose(shuffled, draws, atol=1e-3)
    one = npe.condition({"y": y[0]}, kwargs={"num_rows": 10}).psis(200, seed=0, progress=False)
    assert one.ess > 100
    with pytest.raises(ValueError, match=r"'y' of shape \(12, 2\) and data of shape \(1, 2\); .* kwargs="):
        npe.condition({"y": y[0, :1]}).psis(10, progress=False)


def test_several_sites_with_a_summary_each_and_counts_as_data():
    def model():
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("image", 4, dim=-2), pyro.plate("column", 3, dim=-1):
            pyro.sample("picture", dist.Normal(rate[..., None, None] if rate.dim() else rate, 1.0))
        pyro.sample("count", dist.Poisson(rate))

    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    npe = trained(model, num_simulations=200, observed=("picture", "count"), summary={"picture": network})
    assert npe.density.encoder.context_dim == 3
    one = npe.condition({"picture": torch.ones(4, 3), "count": 2})
    assert one.sample(5)["rate"].shape == (5,)
    assert npe.condition({"picture": torch.ones(4, 3), "count": torch.tensor([1, 2])}).batch_shape == (2,)


@pytest.mark.parametrize("tosses", [[True, False, True], torch.tensor([1, 0, 1]), [1.0, 0.0, 1.0]], ids=str)
def test_data_get_the_dtype_that_the_likelihood_takes(tosses):
    def coin():
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("toss", 3):
            pyro.sample("hit", dist.Bernoulli(share))

    posterior = NeuralPosterior(coin, ["hit"], **SMALL).condition({"hit": tosses})
    result = posterior.psis(1000, seed=0, progress=False)
    assert abs(result.log_evidence - math.log(0.1)) < 0.02  # B(4, 3) / B(2, 2)
    assert posterior.to_arviz(30, predictive=True, progress=False)["observed_data"]["hit"].sum() == 2


def test_rows_that_are_counts_are_cut_to_sizes():
    def kinds():
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", 6):
            pyro.sample("kind", dist.Categorical(torch.stack([share, 1 - share], -1)))

    options = {"num_simulations": 100, "num_steps": 1, "seed": 0, "progress": False}
    npe = NeuralPosterior(kinds, ["kind"], summary=DeepSets(1, 4, hidden_dim=8), **SMALL)
    fit_posterior(npe, sizes=(1, 6), **options)
    assert npe.condition({"kind": torch.tensor([1, 0])}).sample(3)["share"].shape == (3,)


def test_latents_of_two_dtypes():
    def model(y=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("y", dist.Normal(a + b.float(), 1.0), obs=y)

    posterior = trained(model, num_simulations=100).condition({"y": 0.3})
    draws = posterior.sample(5)
    assert draws["b"].dtype == torch.float64 and posterior.log_prob(draws).isfinite().all()


def test_closed_boundaries_have_no_density():
    def model():
        pyro.sample("y", dist.Normal(pyro.sample("size", dist.HalfNormal(1.0)), 1.0))

    log_prob = NeuralPosterior(model, ["y"], **SMALL).condition({"y": 0.3}).log_prob({"size": torch.tensor([0.0, 1.0])})
    assert log_prob[0] == -torch.inf and log_prob[1].isfinite()


def test_saved_density_gives_the_same_posterior(tmp_path):
    npe = trained(gaussian, num_simulations=500, summary=DeepSets(2, 4, hidden_dim=8))
    save(tmp_path / "posterior.pt", npe.density)
    again = NeuralPosterior(gaussian, ["y"], density=load(tmp_path / "posterior.pt"))
    data = {"y": torch.ones(5, 2)}
    assert torch.equal(again.condition(data).sample(5, seed=0)["loc"], npe.condition(data).sample(5, seed=0)["loc"])

    def renamed():
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", 5):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"for latents \{'mean': \(2,\)\}.*, got one for latents \{'loc': \(2,\)\}"):
        NeuralPosterior(renamed, ["y"], density=again.density)


def test_arviz_with_and_without_a_likelihood():
    def black_box():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        noise = pyro.sample("noise", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("y", loc + noise, event_dim=1)

    full = trained(gaussian, num_simulations=500).condition({"y": torch.ones(5, 2)})
    groups = full.to_arviz(30, seed=0, predictive=True, progress=False)
    assert groups["posterior_predictive"]["y"].shape == (1, 30, 5, 2) and groups["log_likelihood"]["y"].shape[1] == 30
    npe = trained(black_box, num_simulations=500, latents=["loc"])
    alone = npe.condition({"y": torch.ones(2)})
    assert alone.to_arviz(30, seed=0)["posterior"]["loc"].shape == (1, 30, 2)
    with pytest.raises(ValueError, match=r"\['noise'\] are averaged over"):
        alone.psis()
    with pytest.raises(ValueError, match="predictive"):
        alone.to_arviz(predictive=True)


def test_float64_model():
    torch.set_default_dtype(torch.float64)
    npe = NeuralPosterior(constrained, ["y"], **SMALL)
    fit_posterior(npe, num_simulations=200, num_steps=1, seed=0, progress=False)
    assert npe.condition({"y": torch.ones(2)}).sample(3)["scale"].dtype == torch.float64


def test_start_leans_on_nothing_that_training_changes():
    options = {"num_simulations": 500, "summary": DeepSets(2, 8)}
    density = trained(gaussian, **options).density
    linear = density.regression.coupling.conditioner.network.from_context
    assert density.encoder.is_fixed.tolist() == [True] * 5 + [False] * 8  # means, mean squares, number; the summary
    assert linear.weight[:, 5:].abs().max() < 1e-3 < linear.weight[:, :2].abs().max()


def test_start_does_not_decay():
    density = trained(gaussian, num_simulations=100).density
    parameters = dict(density.named_parameters())
    decayed, _ = (group["params"] for group in decay_groups(density, parameters, 0.1))
    names = [name for name, p in parameters.items() if any(p is other for other in decayed)]
    assert names and not any("regression" in name for name in names)


def test_summaries_of_many_data_sets_are_made_in_pieces(monkeypatch):
    sizes = []

    class Watched(DeepSets):
        def forward(self, rows, mask=None):
            sizes.append(len(rows))
            return super().forward(rows, mask)

    torch.manual_seed(0)
    npe = NeuralPosterior(gaussian, ["y"], summary=Watched(2, 4, hidden_dim=8), **SMALL)
    pairs, whole = npe.pairs(npe.simulate(100, seed=0)), copy.deepcopy(npe.density)
    whole.store_units(*pairs)
    monkeypatch.setattr("pyro_affine.data_encoder._ENTRIES_AT_ONCE", 10 * npe.density.encoder.width)
    sizes.clear()
    npe.density.store_units(*pairs)
    assert sizes == [10] * 20
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(npe.density.state_dict()[name], tensor, atol=1e-4), name


def test_encoder_keeps_outliers_from_drowning_the_rest():
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Cauchy(loc, 0.1))

    encoder = trained(model, num_simulations=2000).density.encoder
    z = encoder(torch.tensor([[-1.0], [0.0], [1.0], [1e6]]))
    assert (z[2] - z[0]) > 1.0 and z.abs().max() < 25 and z[3] > z[2]


WITHOUT_A_DEVICE = {
    "regression": lambda: ridge(X, X[:, :1]),
    "units of data": lambda: _centre_and_width(X),
    "cut to sizes": lambda: _cut(Simulations({"z": X}, {"y": X[:, :, None]}), SETS, (1, 2)),
    "truncated prior": lambda: TruncatedPrior.contains(type("Prior", (), {"regions": [Inside()]}), {"z": X}),
    "positions": lambda: _positions(X > 0, X == 0),
    "supports": lambda: _agree(UNIFORM, UNIFORM),
}
X = torch.linspace(-1, 1, 40).reshape(20, 2).square() + torch.eye(20, 2)
SETS = DataEncoder({"y": torch.Size([2, 1])}, {"y": DeepSets(1, 2, hidden_dim=4)})
UNIFORM = {"fn": dist.Uniform(torch.zeros(2), torch.ones(2)), "value": torch.zeros(2)}


class Inside:
    def contains(self, values):
        return values["z"][:, 0] > 0


@pytest.mark.parametrize("call", WITHOUT_A_DEVICE.values(), ids=WITHOUT_A_DEVICE)
def test_tensors_are_made_where_those_given_are(call):
    """Another default device stands in for data on a GPU: what is made without a device does not fit with them."""
    with torch.device("meta"):
        call()


# Simulations


def counted(model):
    runs = []

    def wrapped():
        runs.append(1)
        model()

    return wrapped, runs


def branches():
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(loc if loc > 0 else 3 * loc, 1.0))


def hidden_noise():
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.deterministic("y", loc + torch.randn(2), event_dim=1)


def test_many_runs_at_once_are_those_of_single_runs():
    model, runs = counted(constrained)
    simulator = Simulator(model, ["y"])
    together, num_runs = simulator.draw(3000, seed=0), len(runs)
    alone = simulator.draw(1000, seed=0, at_once=False)
    assert num_runs < 60 and len(runs) > 1000
    for name in ("scale", "shares", "share"):
        means = together.latents[name].mean(0), alone.latents[name].mean(0)
        assert torch.allclose(*means, atol=0.06)
    fixed = together.latents["shares"][:, :1] + together.latents["share"]
    z = (together.data["y"] - fixed) / together.latents["scale"][:, None]
    assert abs(z.mean()) < 0.06 and abs(z.std() - 1) < 0.06 and abs(torch.corrcoef(z.T)[0, 1]) < 0.08


def other_sites():
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    if pyro.sample("side", dist.Bernoulli(0.5)) > 0:
        pyro.sample("extra", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(loc, 1.0))


def test_model_of_other_sites_in_each_run_is_run_one_by_one_with_a_warning():
    simulator = Simulator(other_sites, ["y"], ["loc"])
    with pytest.warns(UserWarning, match="differ from run to run.* draw by draw"):
        assert len(simulator.draw(20, seed=0)) == 20


@pytest.mark.parametrize("model", [branches, hidden_noise], ids=["branches", "hidden noise"])
def test_model_that_can_not_run_at_once_is_run_one_by_one(model):
    with pytest.warns(UserWarning, match="draw by draw"):
        simulations = Simulator(model, ["y"]).draw(200, seed=0)
    loc, y = simulations.latents["loc"], simulations.data["y"]
    residual = y - torch.where(loc > 0, loc, 3 * loc) if y.dim() == 1 else y - loc[:, None]
    assert abs(residual.std() - 1) < 0.15 and len(simulations) == 200


def test_observed_values_in_the_model_are_drawn():
    model = NeuralPosterior(gaussian, ["y"], args=(torch.zeros(5, 2),), **SMALL)
    assert model.simulate(50, seed=0).data["y"].std() > 0.5


def test_runs_that_fail_or_give_no_number_are_left_out():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, z.new_tensor(1.0) if z > -1 else z))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        simulator = Simulator(model, ["y"])
        with pytest.warns(UserWarning, match="raised an error in"):
            simulations = simulator.draw(200, seed=0, at_once=False)
    assert 120 < len(simulations) < 200 and simulations.latents["z"].min() > -1
    npe = NeuralPosterior(gaussian, ["y"], **SMALL)
    pairs = npe.simulate(20, seed=0)
    pairs.data["y"][3] = torch.inf
    with pytest.warns(UserWarning, match="1 of 20 simulations are not finite"):
        latents, packed = npe.pairs(pairs)
    assert len(latents) == len(packed) == 19


def test_files_are_read_again_and_more_are_added(tmp_path):
    model, runs = counted(gaussian)
    simulator = Simulator(model, ["y"])
    first = simulator.draw(1500, path=tmp_path / "sims", seed=3)
    before = len(runs)
    again = simulator.draw(1500, path=tmp_path / "sims")
    assert len(first) == 1500 and torch.equal(first.data["y"], again.data["y"])
    assert len(runs) - before < 30  # to find out about plates, no more
    more = simulator.draw(2500, path=tmp_path / "sims", seed=3)
    assert torch.equal(more[:1500].latents["loc"], first.latents["loc"]) and len(list(tmp_path.rglob("*.pt"))) == 4
    assert len(more.latents["loc"].unique(dim=0)) == 2500
    with pytest.raises(ValueError, match="use another folder"):
        simulator.draw(10, path=tmp_path / "sims", seed=4)
    with pytest.raises(ValueError, match="use another folder"):
        Simulator(constrained, ["y"]).draw(10, path=tmp_path / "sims")
    (tmp_path / "sims" / "simulations-000000.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged; delete it"):
        simulator.draw(10, path=tmp_path / "sims")


# What is refused


def discrete():
    kind = pyro.sample("kind", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(kind + pyro.sample("loc", dist.Normal(0.0, 1.0)), 1.0))


def dependent():
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    pyro.sample("y", dist.Normal(pyro.sample("b", dist.Uniform(0.0, 1 - a)), 1.0))


def growing():
    size = int(pyro.sample("size", dist.Poisson(5.0)))
    pyro.sample("y", dist.Normal(pyro.sample("loc", dist.Normal(0.0, 1.0)), 1.0).expand([size]).to_event(1))


def subsampled():
    with pyro.plate("rows", 10, subsample_size=5):
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0))


def covariance():
    matrix = pyro.sample("matrix", dist.Wishart(torch.tensor(3.0), torch.eye(2)))
    pyro.sample("y", dist.Normal(matrix[..., 0, 0], 1.0))


def conditioned():
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("other", dist.Normal(loc, 1.0), obs=torch.tensor(0.3))
    pyro.sample("y", dist.Normal(loc, 1.0))


BAD_MODELS = {
    "unknown observed site": (
        lambda: NeuralPosterior(gaussian, ["x"]),
        r"got \['x'\]; it has \['loc', 'y'\]",
    ),
    "a name alone": (lambda: NeuralPosterior(gaussian, "y"), r"write \('y',\)"),
    "unknown latent": (lambda: NeuralPosterior(gaussian, ["y"], latents=["mu"]), r"latents .* got \['mu'\]"),
    "all observed": (lambda: NeuralPosterior(gaussian, ["y", "loc"]), "latents must be a sequence of names"),
    "discrete latent": (lambda: NeuralPosterior(discrete, ["y"]), "discrete site 'kind'; leave it out of latents="),
    "dependent support": (lambda: NeuralPosterior(dependent, ["y"]), "site 'b' with another support"),
    "no one-to-one map": (
        lambda: NeuralPosterior(covariance, ["y"]),
        "site 'matrix' on PositiveDefinite.* LKJCholesky",
    ),
    "summary of no vector": (
        lambda: NeuralPosterior(gaussian, ["y"], summary=nn.Linear(2, 3)),
        r"a vector for each data set, got shape \(2, 5, 3\) for two data sets at site 'y'",
    ),
    "summary of several results": (
        lambda: NeuralPosterior(gaussian, ["y"], summary=nn.LSTM(2, 3, batch_first=True)),
        "a vector for each data set, got tuple",
    ),
    "data of no fixed size": (lambda: NeuralPosterior(growing, ["y"], latents=["loc"]), "site 'y' missing or of"),
    "subsampled plate": (lambda: NeuralPosterior(subsampled, ["y"]), "5 of 10 of plate 'rows'"),
    "conditioned elsewhere": (lambda: NeuralPosterior(conditioned, ["y"]), r"\['other'\] left"),
    "summary of another site": (lambda: NeuralPosterior(gaussian, ["y"], summary={"x": nn.Flatten()}), r"\['x'\]"),
    "one summary for two sites": (
        lambda: NeuralPosterior(discrete, ["y", "kind"], summary=nn.Flatten()),
        "summary={site: module}",
    ),
    "density of another model": (
        lambda: NeuralPosterior(constrained, ["y"], density=NeuralPosterior(gaussian, ["y"], **SMALL).density),
        "the model that it was trained for",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_model_is_refused_with_the_site_and_the_way_out(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_discrete_sites_can_be_averaged_over():
    npe = trained(discrete, num_simulations=500, latents=["loc"])
    assert set(npe.condition({"y": torch.tensor(0.5)}).sample(3)) == {"loc"}


BAD_DATA = {
    "missing": ({}, "got none for 'y'"),
    "unknown": ({"y": torch.zeros(5, 2), "x": torch.zeros(3)}, r"got \['x'\]"),
    "other shape": ({"y": torch.zeros(5, 3)}, r"site 'y' must have shape batch \+ \(5, 2\).* got \(5, 3\)"),
    "NaN": ({"y": torch.full((5, 2), torch.nan)}, r"NaN or inf in site \['y'\]"),
    "too few dimensions": ({"y": torch.zeros(2)}, r"got \(2,\)"),
    "no dict": (torch.zeros(5, 2), r"a dict of values by site, got Tensor; its keys are \['y'\]"),
    "no value": ({"y": None}, "site 'y' must be numbers .* got NoneType"),
    "words": ({"y": "abc"}, "site 'y' must be numbers .* got str"),
    "rows of unequal length": ({"y": [[0.0, 0.0], [1.0]]}, "site 'y' must be numbers .* got list"),
}


@pytest.mark.parametrize(("data", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_are_refused_with_the_site(data, message):
    with pytest.raises(ValueError, match=message):
        NeuralPosterior(gaussian, ["y"], **SMALL).condition(data)


def test_bad_values_sizes_and_batches_are_refused():
    npe = NeuralPosterior(gaussian, ["y"], **SMALL)
    posterior = npe.condition({"y": torch.zeros(3, 5, 2)})
    with pytest.raises(ValueError, match="got none for site 'loc'"):
        posterior.log_prob({})
    with pytest.raises(ValueError, match=r"got \(3,\) for site 'loc'"):
        posterior.log_prob({"loc": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"batch of shape \(3,\); condition on one"):
        posterior.psis()
    with pytest.raises(ValueError, match="set summary such as DeepSets"):
        fit_posterior(npe, num_simulations=10, sizes=(1, 3), progress=False)
    with pytest.raises(ValueError, match="num_simulations must be 1 or more"):
        npe.simulate(0)
    with pytest.raises(ValueError, match="at most 5 rows"):
        many = NeuralPosterior(gaussian, ["y"], summary=DeepSets(2), **SMALL)
        many.condition({"y": torch.zeros(6, 2)})


BAD_SIMULATIONS = {
    "no latent": ({"z": torch.zeros(20, 2)}, {"y": torch.zeros(20, 5, 2)}, "got none for site 'loc'"),
    "no data": ({"loc": torch.zeros(20, 2)}, {"x": torch.zeros(20, 5, 2)}, "none for 'y'|got \\['x'\\]"),
    "latent of another shape": (
        {"loc": torch.zeros(20, 3)},
        {"y": torch.zeros(20, 5, 2)},
        r"got \(20, 3\) for site 'loc'",
    ),
    "data of another shape": ({"loc": torch.zeros(20, 2)}, {"y": torch.zeros(20, 5, 3)}, "site 'y' must have shape"),
    "unequal numbers": ({"loc": torch.zeros(20, 2)}, {"y": torch.zeros(19, 5, 2)}, "'loc': 20, 'y': 19"),
    "none finite": ({"loc": torch.zeros(20, 2)}, {"y": torch.full((20, 5, 2), torch.nan)}, "got 0 of 20"),
    "too few": ({"loc": torch.zeros(10, 2)}, {"y": torch.zeros(10, 5, 2)}, "11 simulations at least .* got 10 of 10"),
}


@pytest.mark.parametrize(("latents", "data", "message"), BAD_SIMULATIONS.values(), ids=BAD_SIMULATIONS)
def test_bad_simulations_are_refused_with_the_site(latents, data, message):
    with pytest.raises(ValueError, match=message):
        fit_posterior(NeuralPosterior(gaussian, ["y"], **SMALL), simulations=Simulations(latents, data), progress=False)
