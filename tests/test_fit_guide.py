"""``fit_guide``: it reaches known optima, finds out how particles run, trains what Pyro trains, and loses nothing."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from pyro.infer.autoguide.initialization import init_to_mean
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_affine.conditional_guide import AutoConditionalRealNVP
from pyro_affine.fit import fit_guide
from pyro_affine.fit_result import FitResult, NonFiniteError
from pyro_affine.flows import real_nvp
from pyro_affine.guide_task import GuideTask
from pyro_affine.guides import AutoRealNVP
from pyro_affine.particles import Pair
from pyro_affine.random_state import seeded

DATA = torch.tensor([1.2, 0.3, 2.1, 1.7])
# z ~ N(0, 1), each datum ~ N(z, 1): posterior N(sum / 5, 1 / 5), evidence in closed form.
POSTERIOR_MEAN, POSTERIOR_SD = DATA.sum().item() / 5, math.sqrt(1 / 5)
LOG_EVIDENCE = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 1).log_prob(DATA).item()


@pytest.fixture(autouse=True)
def clean_store() -> Iterator[None]:
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


def conjugate(data: Tensor = DATA) -> None:
    pyro.sample("idle", dist.Normal(0.0, 1.0))  # gives a flow two latents to couple; does not change the evidence
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=data)


def single() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


def small_flow(model: Callable[..., Any]) -> AutoRealNVP:
    return AutoRealNVP(model, num_layers=2, hidden_dims=(8,))


def fit(model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **options: Any) -> FitResult:
    options = {"num_steps": 20, "num_particles": 8, "seed": 0, "progress": False, **options}
    return fit_guide(model, guide, args, **options)


# ---- it fits


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal, small_flow], ids=lambda m: m.__name__)
def test_elbo_reaches_the_known_evidence(make: Any) -> None:
    guide = make(conjugate)
    result = fit(conjugate, guide, num_steps=150, learning_rate=0.05)
    assert result.best == pytest.approx(LOG_EVIDENCE, abs=0.03)
    draws = torch.stack([guide()["z"] for _ in range(500)])
    assert draws.mean().item() == pytest.approx(POSTERIOR_MEAN, abs=0.1)
    assert draws.std().item() == pytest.approx(POSTERIOR_SD, abs=0.06)


def test_float64_is_kept() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    guide = small_flow(model)
    fit(model, guide)
    assert {p.dtype for p in guide.parameters()} == {torch.float64}


def test_it_just_works_without_arguments() -> None:
    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 1.0))

    result = fit_guide(single, guide)
    assert result.reason == "plateau"
    assert result.num_steps < 5000
    assert result.best == pytest.approx(0.0, abs=0.01)


def test_budget_in_seconds() -> None:
    result = fit_guide(conjugate, AutoNormal(conjugate), seconds=0.3, progress=False)
    assert result.reason == "seconds"
    assert result.num_steps >= 1 and result.times[-1] >= 0.15  # up to half is kept for the scores at the end


def test_arguments_reach_model_and_guide() -> None:
    guide = AutoNormal(conjugate)
    fit_guide(conjugate, guide, (), {"data": DATA + 100}, num_steps=20, learning_rate=1.0, seed=0, progress=False)
    assert guide.median()["z"] > 5


def test_histories_have_one_entry_a_step() -> None:
    result = fit(conjugate, AutoNormal(conjugate), evaluate_every=5)
    assert len(result.losses) == len(result.gradient_norms) == len(result.times) == result.num_steps == 20
    assert result.validation_steps == [0, 5, 10, 15, 20] and len(result.validation_losses) == 5
    assert result.times == sorted(result.times)


def test_stock_elbo_and_its_score_parts_hook_are_used() -> None:
    calls = []

    class Counted(dist.Normal):
        def score_parts(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return super().score_parts(*args, **kwargs)

        def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
            return Counted(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def guide() -> None:
        pyro.sample("z", Counted(pyro.param("loc", torch.zeros(())), torch.tensor(1.0)))

    fit(single, guide, num_steps=5)
    assert len(calls) >= 5


# ---- seeds


def test_a_seed_makes_the_fit_reproducible_and_leaves_the_random_state_alone() -> None:
    results = []
    for _ in range(2):
        pyro.clear_param_store()
        torch.rand(7)
        state = torch.get_rng_state()
        results.append(fit(conjugate, AutoNormal(conjugate), seed=3))
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0].losses == results[1].losses and results[0].best == results[1].best
    pyro.clear_param_store()
    assert fit(conjugate, AutoNormal(conjugate), seed=4).losses != results[0].losses


def task_of(pair: Pair, num_particles: int | None = None) -> GuideTask:
    nesting, reason = pair.find_nesting()
    return GuideTask(pair, num_particles, nesting=nesting, reason=reason)


def test_evaluation_uses_the_same_draws_each_time_and_fresh_ones_at_the_end() -> None:
    pair = Pair(conjugate, AutoNormal(conjugate))
    pair.prototype()
    task = task_of(pair, 8)
    state = torch.get_rng_state()
    first, second, final = task.scores(), task.scores(), task.final_scores()
    assert torch.equal(first, second) and not torch.equal(first, final)
    assert first.shape == (1024,)
    assert torch.equal(torch.get_rng_state(), state)


# ---- particles: at once or one by one


def no_latent_plate() -> None:
    conjugate()


def plate_in_plate() -> None:
    rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
    with columns:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with rows, columns:
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(2, 3))


def subsampled() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 40, subsample_size=10) as index:
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.arange(40.0)[index] / 40)


def with_factor_and_deterministic() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    total = pyro.deterministic("total", z.sum(-1))
    pyro.factor("penalty", -(total**2))


def branches() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(1.0 if z > 0 else -1.0, 1.0), obs=torch.tensor(0.5))


def indexes_from_the_left() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z[0], 1.0), obs=torch.tensor(0.5))


def sums_over_all() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(0.5))


def python_number() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("x", torch.tensor(-(z.item() ** 2)) + 0 * z)


AT_ONCE = [no_latent_plate, plate_in_plate, subsampled, with_factor_and_deterministic]
ONE_BY_ONE = [branches, indexes_from_the_left, sums_over_all, python_number]


@pytest.mark.parametrize("model", AT_ONCE, ids=lambda m: m.__name__)
@pytest.mark.parametrize("make", [AutoNormal, small_flow, AutoDelta], ids=lambda m: m.__name__)
def test_models_that_allow_it_run_at_once_and_silently(model: Any, make: Any) -> None:
    pair = Pair(model, make(model))
    pair.prototype()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = task_of(pair)
    assert task.nesting is not None and task.num_particles == 64


@pytest.mark.parametrize("model", ONE_BY_ONE, ids=lambda m: m.__name__)
def test_models_that_do_not_run_one_by_one_with_a_warning(model: Any) -> None:
    with pytest.warns(UserWarning, match=r"8 particles of a step run one by one: .*pyro\.plate"):
        result = fit(model, AutoNormal(model), num_steps=3, num_particles=None)
    assert result.num_steps == 3 and math.isfinite(result.best)


@pytest.mark.parametrize("model", [m for m in AT_ONCE if m is not subsampled], ids=lambda m: m.__name__)
def test_log_weights_are_the_elbo_of_single_draws(model: Any) -> None:
    pair = Pair(model, AutoMultivariateNormal(model))
    pair.prototype()
    nesting, _ = pair.find_nesting()
    with seeded(1):
        at_once = pair.log_weights(4000, nesting)
    with seeded(2):
        one_by_one = pair.log_weights(200, None)
    error = math.hypot(at_once.std().item() / 4000**0.5, one_by_one.std().item() / 200**0.5)
    assert at_once.mean().item() == pytest.approx(one_by_one.mean().item(), abs=4 * error)
    with seeded(1), torch.no_grad():
        loss = Trace_ELBO(4000, max_plate_nesting=nesting, vectorize_particles=True).loss(model, pair.guide)
    assert -loss == pytest.approx(at_once.mean().item(), abs=8 * error)


def test_a_latent_that_the_guide_lacks_is_an_error() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("coin", dist.Bernoulli(0.5))

    guide = AutoNormal(poutine.block(model, hide=["coin"]))
    with pytest.raises(ValueError, match=r"must be in the guide, got none for \['coin'\]"):
        fit(model, guide)


# ---- what is trained


def test_pyro_param_in_the_model_is_trained() -> None:
    def model() -> None:
        spread = pyro.param("spread", torch.tensor(5.0), constraint=dist.constraints.positive)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(z, spread), obs=DATA)

    fit(model, AutoNormal(model), num_steps=100, learning_rate=0.05)
    assert pyro.param("spread") < 4.0


def test_modules_registered_with_pyro_are_trained() -> None:
    net = nn.Linear(1, 1)

    def model() -> None:
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=torch.tensor([20.0]))

    before = net.bias.item()
    fit(model, AutoNormal(model), learning_rate=0.1)
    assert net.bias.item() > before + 1


class Regression(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.linear(x)[..., 0] * self.frozen
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.filterwarnings("ignore:the 8 particles")
def test_parameters_of_a_pyro_module_are_trained_and_frozen_ones_are_not() -> None:
    model = Regression()
    bias = model.linear.bias.item()
    x = torch.randn(20, 2)
    fit(model, AutoNormal(model), x, x.sum(-1) + 10, learning_rate=0.1)
    assert model.linear.bias.item() > bias + 1
    assert model.frozen.item() == 1.0


def test_the_param_store_is_not_cleared() -> None:
    other = pyro.param("of another", torch.tensor(7.0))
    fit(conjugate, AutoNormal(conjugate))
    assert pyro.param("of another") is other and other.item() == 7.0


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="must be something to train"):
        fit(single, single)


def test_a_second_flow_guide_is_trained_and_the_first_keeps_its_weights() -> None:
    first = small_flow(conjugate)
    fit(conjugate, first)
    kept = [p.detach().clone() for p in first.parameters()]
    second = small_flow(conjugate)
    second()
    before = [p.detach().clone() for p in second.parameters()]
    fit(conjugate, second)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), kept, strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(second.parameters(), before, strict=True))


def test_a_guide_that_takes_over_weights_from_the_store_is_reported() -> None:
    fit(conjugate, first := AutoNormal(conjugate))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(conjugate, first)
    with pytest.warns(UserWarning, match=r"took over 4 parameters from Pyro's param store, AutoNormal\.locs\.idle"):
        fit(conjugate, AutoNormal(conjugate))


def test_any_torch_optimizer() -> None:
    guide = AutoNormal(conjugate)
    fit(conjugate, guide, num_steps=300, optimizer=partial(torch.optim.SGD, momentum=0.5), learning_rate=0.02)
    assert guide.median()["z"].item() == pytest.approx(POSTERIOR_MEAN, abs=0.1)


# ---- what goes wrong


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_particles": 0}, "num_particles must be at least 1"),
        ({"num_steps": 0}, "num_steps must be positive"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"optimizer": pyro.optim.Adam({"lr": 0.1})}, "must be a factory"),
        ({"decay": 2.0}, "decay must be in"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1"),
        ({"args": torch.zeros(1, 2)}, r"must be a tuple .*got Tensor and dict; write \(data,\)"),
        ({"kwargs": torch.zeros(2)}, "kwargs a dict, got tuple and Tensor"),
    ],
    ids=["num_particles", "num_steps", "learning_rate", "optimizer", "decay", "evaluate_every", "args", "kwargs"],
)
def test_arguments_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit_guide(conjugate, AutoNormal(conjugate), progress=False, **options)


@pytest.mark.parametrize(
    "options",
    [{"num_particles": 0}, {"learning_rate": -1.0}, {"optimizer": pyro.optim.Adam({"lr": 0.1})}],
    ids=["num_particles", "learning_rate", "optimizer"],
)
def test_arguments_are_checked_before_anything_is_run(options: dict[str, Any]) -> None:
    def model() -> None:
        raise RuntimeError("run")

    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        fit(model, small_flow(model), **options)


def with_coin() -> None:
    conjugate()
    pyro.sample("coin", dist.Bernoulli(0.5))


def moving_support() -> None:
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    pyro.sample("b", dist.Uniform(0.0, 1 - a))


def a_latent_a_row() -> None:
    with pyro.plate("rows", 8, subsample_size=2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(2))


REFUSED: dict[str, tuple[Callable[[], None], dict[str, Any], str]] = {
    "discrete latent": (with_coin, {}, "cannot handle discrete sample site 'coin'"),
    "moving support": (moving_support, {}, "support of a site must not depend on other latents, got site 'b'"),
    "part of a plate": (a_latent_a_row, {}, "got 2 of 8 of plate 'rows' at site 'z'"),
    "one layer": (conjugate, {"num_layers": 1}, "every entry must be moved"),
    "context": (conjugate, {"context_fn": lambda: torch.zeros(2, 2)}, "context_fn must give a vector"),
}


@pytest.mark.parametrize(("model", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_a_refused_model_is_refused_in_the_same_words_each_time(model: Any, options: Any, words: str) -> None:
    make: Any = AutoConditionalRealNVP if "context_fn" in options else AutoRealNVP
    guide = make(model, **options)
    for call in (lambda: fit(model, guide), guide):
        with pytest.raises(ValueError, match=words):
            call()


def test_an_error_in_the_model_is_raised_as_it_is() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=torch.zeros(2))

    with pytest.raises(ValueError, match=r"shape|broadcast"):
        fit(model, lambda: pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0)))


class Failing:
    """The conjugate model that turns bad at its nth call with a graph; ``how`` makes the scale of x."""

    def __init__(self, first: int, how: Callable[[Tensor], Tensor]) -> None:
        self.first, self.how, self.calls = first, how, 0

    def __call__(self) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        self.calls += torch.is_grad_enabled()
        scale = torch.ones_like(z) if self.calls < self.first else self.how(z)
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(z, scale), obs=DATA)


@pytest.mark.filterwarnings("ignore:20 steps in a row:RuntimeWarning")
@pytest.mark.parametrize("validate", [True, False], ids=["validated", "not validated"])
def test_nan_from_the_model_names_step_and_site_and_loses_nothing(validate: bool) -> None:
    model = Failing(180, lambda z: z * math.nan)
    guide = AutoNormal(model)
    with pyro.validation_enabled(validate), pytest.raises(NonFiniteError) as error:
        fit(model, guide, num_steps=1000, learning_rate=0.1)
    result, message = error.value.result, str(error.value)
    assert f"step {result.num_steps}: the log-density of site 'x' in the model is not finite" in message
    assert "init_scale" in message and "float64" in message
    assert 150 < result.num_steps < 250 and result.num_nonfinite == 60
    assert guide.median()["z"].item() == pytest.approx(POSTERIOR_MEAN, abs=0.15)


@pytest.mark.filterwarnings("ignore:20 steps in a row:RuntimeWarning")
def test_a_model_that_raises_is_named_with_the_site_before() -> None:
    def how(z: Tensor) -> Tensor:
        raise ValueError("no such scale")

    model = Failing(100, how)
    with pytest.raises(NonFiniteError, match=r"the model raised after site 'z': no such scale"):
        fit(model, AutoNormal(model), num_steps=1000)


@pytest.mark.filterwarnings("ignore:20 steps in a row:RuntimeWarning")
def test_a_gradient_that_is_not_finite_is_named_by_its_parameter() -> None:
    model = Failing(100, lambda z: 1 + (z * 0).abs().sqrt())
    with pytest.raises(NonFiniteError, match=r"the gradient of guide\.\S*z\S* is not finite"):
        fit(model, AutoNormal(model), num_steps=1000)


def test_draws_that_the_model_refuses_are_survived_and_counted() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(z, torch.where(z < 2.0, 1.0, math.nan)), obs=DATA)

    guide = AutoNormal(model)
    result = fit(model, guide, num_steps=200, learning_rate=0.05, num_particles=4)
    assert 1 <= result.num_nonfinite < 100
    assert result.reason == "num_steps"
    assert f"{result.num_nonfinite} of them as non-finite" in str(result)
    assert guide.median()["z"].item() == pytest.approx(POSTERIOR_MEAN, abs=0.15)


def one_half() -> None:
    """A model that refuses half of all draws that an untrained guide makes of it."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(torch.where(z >= 0, z, torch.nan), 1.0), obs=torch.tensor(30.0))


def nowhere_near_the_start() -> None:
    """A model that refuses all draws of an untrained guide, and accepts its centre and most draws from the prior."""
    z = pyro.sample("z", dist.Uniform(torch.zeros(2), 1.0).to_event(1))
    off = (z - 0.5).norm(dim=-1)
    accepted = (off > 0.2) | (off < 1e-6)
    pyro.sample("y", dist.Normal(torch.where(accepted, z[..., 0], torch.nan), 0.1), obs=torch.tensor(0.9))


@pytest.mark.parametrize("model", [one_half, nowhere_near_the_start])
def test_a_start_that_the_model_refuses_neither_ends_a_fit_nor_slows_it_down(model: Callable[[], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as that draws run one by one
        result = fit_guide(model, AutoRealNVP(model, init_loc_fn=init_to_mean), num_steps=200, seed=0, progress=False)
    assert math.isfinite(result.best)


def test_a_bad_draw_spoils_no_other_in_the_evaluation() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, torch.where(z < 1.0, 1.0, math.nan)), obs=torch.tensor(0.0))

    pair = Pair(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    weights = pair.log_weights(1000, 0)
    assert 0.1 < weights.isnan().double().mean() < 0.22


def counts(link: Callable[[Tensor], Tensor]) -> None:
    rate = pyro.sample("rate", dist.Normal(0.5, 0.3))
    with pyro.plate("data", 4):
        pyro.sample("count", dist.Poisson(link(rate)), obs=torch.zeros(4))


@pytest.mark.parametrize("link", [lambda rate: rate, torch.exp], ids=["identity", "exp"])
def test_draws_that_only_a_validated_model_refuses_are_warned_of(link: Any) -> None:
    model = partial(counts, link)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, small_flow(model))
    words = [str(warning.message) for warning in caught if "psis gives them no weight" in str(warning.message)]
    assert len(words) == (link is not torch.exp)
    assert all(re.search(r"refuses \d+ of 64 draws .*Poisson.*satisfy the constraint", message) for message in words)


@pytest.mark.parametrize("nesting", [1, None])
def test_draws_without_a_density_are_not_counted_as_refused(nesting: int | None) -> None:
    def guide() -> None:
        pyro.sample("rate", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    assert 20 < len(Pair(partial(counts, lambda rate: rate), guide).refusals(64, nesting)) < 44
    assert Pair(one_half, guide).refusals(64, nesting) == []  # NaN


def test_scores_are_on_the_cpu_whatever_the_default_device() -> None:
    zero, one = torch.zeros(()), torch.ones(())

    def model() -> None:
        z = pyro.sample("z", dist.Normal(zero, one))
        if z > 0:
            raise ValueError("refused")

    with torch.device("meta"):
        weights = Pair(model, lambda: pyro.sample("z", dist.Normal(zero, one))).log_weights(20, None)
        assert 0 < weights.isnan().sum() < 20
        observed = Pair(lambda: pyro.sample("x", dist.Normal(zero, one), obs=one), lambda: None)
        assert observed.log_weights(2, 0).isfinite().all()


# ---- interruption and resumption in one process


def interrupting(call: int) -> Callable[[], None]:
    calls = [0]

    def model() -> None:
        conjugate()
        calls[0] += torch.is_grad_enabled()
        if calls[0] == call and torch.is_grad_enabled():
            raise KeyboardInterrupt

    return model


def final_weights(guide: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in guide.parameters()]


@pytest.mark.parametrize("make", [AutoNormal, small_flow], ids=lambda m: m.__name__)
def test_an_interrupted_fit_goes_on_to_the_same_weights(make: Any, tmp_path: Path) -> None:
    options = {"num_steps": 60, "evaluate_every": 7, "every": 11}
    whole = fit(conjugate, guide := make(conjugate), **options)
    expected = final_weights(guide)
    pyro.clear_param_store()
    path = tmp_path / "folder" / "fit.ckpt"
    model = interrupting(60 if make is AutoNormal else 78)  # a flow has a start to look for first
    broken = fit(model, make(model), checkpoint=path, **options)
    assert broken.reason == "interrupted" and 10 < broken.num_steps < 60
    pyro.clear_param_store()
    resumed = fit(conjugate, guide := make(conjugate), checkpoint=path, **options)
    assert all(torch.equal(p, q) for p, q in zip(final_weights(guide), expected, strict=True))
    assert resumed.losses == whole.losses and resumed.best == whole.best
    assert resumed.validation_losses == whole.validation_losses and resumed.chosen == whole.chosen


def test_a_finished_fit_is_loaded_and_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "fit.ckpt"
    first = fit(conjugate, guide := AutoNormal(conjugate), checkpoint=path)
    expected = final_weights(guide)
    pyro.clear_param_store()
    model = interrupting(40)  # met while setting up at the most
    again = fit(model, guide := AutoNormal(model), checkpoint=path)
    assert (again.reason, again.losses) == ("num_steps", first.losses)
    assert all(torch.equal(p, q) for p, q in zip(final_weights(guide), expected, strict=True))


def test_a_finished_fit_is_not_searched_a_start_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(AutoRealNVP, "warm_start", lambda *_, num_runs, **__: found.append(num_runs))
    for _ in range(2):
        fit(conjugate, small_flow(conjugate), num_steps=40, checkpoint=tmp_path / "fit.ckpt")
        pyro.clear_param_store()
    assert found == [6, 1]


def test_a_fit_is_resumed_whatever_the_clock_says_of_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"seconds": 1000.0, "num_particles": None, "checkpoint": tmp_path / "fit.ckpt"}
    monkeypatch.setattr(GuideTask, "grow_if_cheap", lambda task, seconds: task.grow())
    first = fit(conjugate, AutoNormal(conjugate), **options)
    pyro.clear_param_store()
    monkeypatch.setattr(GuideTask, "grow_if_cheap", lambda task, seconds: None)
    assert fit(conjugate, AutoNormal(conjugate), **options).losses == first.losses


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_steps": 21}, "num_steps: 20 in the file, 21 here"),
        ({"num_particles": 9}, "num_particles: 8 in the file, 9 here"),
        ({"seed": 1}, "seed: 0 in the file, 1 here"),
        ({"learning_rate": 0.5}, "learning_rate: None in the file, 0.5 here"),
    ],
    ids=str,
)
def test_other_arguments_than_those_of_the_file_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "fit.ckpt"
    fit(conjugate, AutoNormal(conjugate), checkpoint=path)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=words):
        fit(conjugate, AutoNormal(conjugate), checkpoint=path, **change)


def test_a_file_of_another_guide_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "fit.ckpt"
    fit(conjugate, AutoNormal(conjugate), checkpoint=path)
    with pytest.raises(
        ValueError, match=r"architecture must be the same, but: guide\.\S+: float32 \S+ in the file, absent"
    ):
        fit(conjugate, AutoMultivariateNormal(conjugate), checkpoint=path)


# ---- the shorter way to the loss, and how many draws it takes


def with_parameter() -> None:
    scale = pyro.param("model_scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(0.5))


@pytest.mark.parametrize(
    ("model", "make", "direct"),
    [
        (with_factor_and_deterministic, small_flow, True),
        (plate_in_plate, small_flow, True),
        (indexes_from_the_left, small_flow, True),
        (plate_in_plate, AutoNormal, False),
        (subsampled, small_flow, False),
        (with_parameter, small_flow, False),
    ],
)
def test_pyro_traces_the_guide_only_where_it_must(model: Any, make: Any, direct: bool) -> None:
    pair = Pair(model, make(model))
    pair.prototype()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = task_of(pair)
    store = pyro.get_param_store().named_parameters()
    task.use_direct_loss([*pair.guide.parameters(), *(value for _, value in store)])
    assert (task._direct is not None) is direct
    assert math.isfinite(task.loss().item())


@pytest.mark.parametrize(
    "make",
    [
        AutoLaplaceApproximation,
        AutoIAFNormal,
        lambda model: AutoNormalizingFlow(model, lambda size: real_nvp(size, num_layers=2, hidden_dims=(8,))),
        lambda model: AutoConditionalRealNVP(model, lambda x: x, num_layers=2, hidden_dims=(8,)),
        lambda model: AutoConditionalRealNVP(model, lambda *args: args[0], num_layers=2, hidden_dims=(8,)),
    ],
    ids=["laplace", "iaf", "pyro's flow guide with ours", "conditional", "conditional on any arguments"],
)
def test_any_autoguide_is_fitted(make: Any) -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=x.sum())

    result = fit(model, make(model), torch.tensor([0.5, 0.5]), num_steps=20)
    assert result.num_steps == 20 and math.isfinite(result.best)


def test_single_draws_that_the_model_refuses_are_left_out_and_counted() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = torch.where(z.sum(-1) < 3.0, 1.0, math.nan)
        pyro.sample("x", dist.Normal(z.sum(-1), scale), obs=torch.tensor(1.0))

    result = fit(model, small_flow(model), num_steps=100)
    assert result.num_dropped > 0 and result.num_nonfinite == 0
    assert f"{result.num_dropped} single draws were left out" in str(result)


def test_draws_from_before_the_first_step_are_not_counted_as_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = torch.where((100 * z.sum(-1)).cos() > -0.5, 1.0, math.nan)  # a third is refused, wherever draws are
        pyro.sample("x", dist.Normal(z.sum(-1), scale), obs=torch.tensor(0.0))

    seconds, times = GuideTask._seconds, iter((1.0, 9.0))  # 256 draws are tried, and left to be 64
    monkeypatch.setattr(GuideTask, "_seconds", lambda *args: seconds(*args) * 0.0 + next(times))
    result = fit(model, small_flow(model), num_steps=1, seconds=1000.0, num_particles=None)
    assert math.isfinite(result.losses[0]) and 0 < result.num_dropped < 32  # a finite loss is of more than half


def test_a_prior_that_cannot_be_sampled_starts_in_the_middle() -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
        data = torch.linspace(-2.0, 4.0, 20)
        pyro.sample("x", dist.Normal(loc[..., :1], scale[..., None] + loc[..., 1:].square()).to_event(1), obs=data)

    guide = small_flow(model)
    guide()
    assert torch.equal(guide._init_loc(), torch.zeros(3))
    assert fit(model, guide, num_steps=20).num_steps == 20


def test_draws_grow_once_and_only_where_their_number_is_open() -> None:
    pair = Pair(conjugate, AutoNormal(conjugate))
    pair.prototype()
    task = task_of(pair)
    assert task.grow() and task.num_particles == 256
    assert not task.grow() and task.num_particles == 256
    resumed = task_of(pair)
    resumed.load_state_dict(task.state_dict())
    assert resumed.num_particles == 256 and not resumed.grow()
    assert not task_of(pair, 8).grow()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [((1.0, 1.1, 1.2), 1024), ((1.0, 1.9, 3.0), 256), ((1.0, 2.1), 64)],
    ids=["free", "cheap", "dear"],
)
def test_draws_grow_at_the_start_as_far_as_they_cost_little(
    seconds: tuple[float, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(conjugate, AutoNormal(conjugate))
    pair.prototype()
    task, times = task_of(pair), iter(seconds)
    monkeypatch.setattr(GuideTask, "_seconds", lambda *_: next(times))
    task.grow_if_cheap(10.0)
    assert task.num_particles == expected and task.grow() is (expected == 64)
    task_of(pair, 8).grow_if_cheap(10.0)  # the number is given: nothing is timed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_model_that_may_need_more_digits_is_told(dtype: Any) -> None:
    torch.set_default_dtype(dtype)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, torch.where(z < 2.0, 1.0, math.nan)), obs=torch.tensor(1.5))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(model, AutoNormal(model), num_steps=200, num_particles=4, learning_rate=0.05)
    told = any("often need float64" in str(warning.message) for warning in caught)
    assert result.num_nonfinite > 1 and told is (dtype == torch.float32)
