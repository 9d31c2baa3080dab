"""A saved guide knows its model again: the same draws to the last bit, and no other model is taken for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_affine
from pyro_affine.flows import real_nvp
from pyro_affine.guides import AutoRealNVP
from pyro_affine.serialize import load, load_guide, save


@pytest.fixture(autouse=True)
def _seed_and_store() -> Iterator[None]:
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def run_python(code: str, *paths: Path) -> Any:
    """What a fresh process that runs the code writes to the last of the paths."""
    folder = Path(pyro_affine.__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return torch.load(paths[-1], weights_only=True)


def model(data: Tensor | None = None, *, names: tuple[str, ...] = ("mu", "tau"), groups: int = 5) -> None:
    values = {
        "mu": dist.Normal(0.0, 5.0),
        "tau": dist.HalfCauchy(torch.tensor(5.0)),
        "rate": dist.Uniform(0.0, 3.0),
        "slope": dist.Normal(0.0, 5.0),
    }
    drawn = [pyro.sample(name, values[name]) for name in names]
    with pyro.plate("groups", groups):
        theta = pyro.sample("theta", dist.Normal(drawn[0], 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=data)


def fitted_guide(data: Tensor, num_steps: int = 20, **options: Any) -> AutoRealNVP:
    guide = AutoRealNVP(model, num_layers=2, hidden_dims=(8,), **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(num_steps):
        svi.step(data)
    return guide


SAME = {"mu": True, "tau": True, "theta": True}
DATA = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0])

IN_FRESH_PROCESS = """
import sys, torch, pyro, pyro_affine
import pyro.distributions as dist
from pyro_affine.serialize import load_guide
torch.set_num_threads(1)
def model(data):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
    with pyro.plate("groups", 5):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=data)
data = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0])
results = []
for path in sys.argv[1:-1]:
    guide = load_guide(path, model, (data,))
    torch.manual_seed(1)
    with torch.no_grad():
        draws = dict(guide(data))
        log_prob = guide.get_posterior(data).log_prob(torch.linspace(-1, 1, 7))
        medians = guide.median(data)
    results.append({"draws": draws, "log_prob": log_prob, "medians": medians})
torch.save(results, sys.argv[-1])
"""


def test_a_guide_draws_the_same_bits_in_a_fresh_process(tmp_path: Path) -> None:
    guides = [fitted_guide(DATA, gradient=gradient) for gradient in ("path", "total")]
    paths = [tmp_path / f"{index}.pt" for index in range(len(guides))]
    for path, guide in zip(paths, guides, strict=True):
        save(path, guide)
    results = run_python(IN_FRESH_PROCESS, *paths, tmp_path / "results.pt")
    for guide, result in zip(guides, results, strict=True):
        torch.manual_seed(1)
        with torch.no_grad():
            draws = dict(guide(DATA))
            assert torch.equal(guide.get_posterior(DATA).log_prob(torch.linspace(-1, 1, 7)), result["log_prob"])
            medians = guide.median(DATA)
        for expected, values in ((draws, result["draws"]), (medians, result["medians"])):
            assert {name: torch.equal(value, values[name]) for name, value in expected.items()} == SAME


def test_saving_and_loading_disturb_nothing(tmp_path: Path) -> None:
    guide = fitted_guide(DATA)
    before = torch.get_rng_state()
    save(tmp_path / "guide.pt", guide)
    assert guide.model is not None and set(guide(DATA)) == {"mu", "tau", "theta"}
    torch.set_rng_state(before)
    pyro.clear_param_store()

    def noisy(data: Tensor) -> None:
        model(data + 0 * torch.rand(5))

    loaded = load_guide(tmp_path / "guide.pt", noisy, (DATA,))
    assert torch.equal(before, torch.get_rng_state()) and not list(pyro.get_param_store().keys())
    assert type(loaded) is AutoRealNVP and loaded.gradient == guide.gradient
    assert list(loaded.state_dict()) == list(guide.state_dict())


def test_a_loaded_guide_can_be_trained_and_saved_again(tmp_path: Path) -> None:
    save(tmp_path / "guide.pt", fitted_guide(DATA, num_steps=2))
    pyro.clear_param_store()
    guide = load_guide(tmp_path / "guide.pt", model, kwargs={"data": DATA})
    before = guide.transform.parts[1].loc.detach().clone()
    svi = SVI(
        model,
        guide,
        pyro.optim.Adam({"lr": 0.02}),
        Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    )
    svi.step(DATA)
    assert not torch.equal(before, guide.transform.parts[1].loc)
    save(tmp_path / "again.pt", guide)
    again = load_guide(tmp_path / "again.pt", model, (DATA,))
    z = torch.zeros(7)
    assert torch.equal(again.get_posterior().log_prob(z), guide.get_posterior().log_prob(z))


def test_functions_among_the_options_of_a_guide_say_so_when_called(tmp_path: Path) -> None:
    guide = fitted_guide(DATA, num_steps=1, activation=lambda: nn.LeakyReLU(0.1))
    save(tmp_path / "guide.pt", guide)
    loaded = load_guide(tmp_path / "guide.pt", model, (DATA,))
    save(tmp_path / "guide.pt", loaded)
    loaded = load_guide(tmp_path / "guide.pt", model, (DATA,))
    assert torch.equal(loaded.median()["mu"], guide.median()["mu"])
    with pytest.raises(ValueError, match=r"guide._flow_options\['activation'\] was the function .*<lambda>"):
        loaded._flow_options["activation"]()


def test_float64_guide(tmp_path: Path) -> None:
    data = DATA.double()

    def double_model() -> None:
        pyro.sample("z", dist.Normal(data, 1.0).to_event(1))

    guide = AutoRealNVP(double_model, num_layers=2)
    guide()
    save(tmp_path / "guide.pt", guide)
    loaded = load_guide(tmp_path / "guide.pt", double_model)
    z = torch.ones(5, dtype=torch.float64)
    assert torch.equal(loaded.get_posterior().log_prob(z), guide.get_posterior().log_prob(z))


OTHER_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "a site is missing": ({"names": ("mu",)}, r"name of latent 1 is tau in the file and theta in the model"),
    "a site too many": ({"names": ("mu", "tau", "rate")}, r"name of latent 2 is theta in the file and rate"),
    "another order": ({"names": ("tau", "mu")}, r"name of latent 0 is mu in the file and tau in the model"),
    "another shape": ({"groups": 6}, r"shape of site 'theta' is \(5,\) in the file and \(6,\) in the model"),
}


@pytest.mark.parametrize(("options", "words"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_another_model_is_refused_by_site(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    save(tmp_path / "guide.pt", fitted_guide(DATA, num_steps=1))
    data = torch.zeros(options.get("groups", 5))
    with pytest.raises(ValueError, match=words):
        load_guide(tmp_path / "guide.pt", model, (data,), options)


SUPPORTS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "kind": (lambda: dist.LogNormal(0.0, 1.0), lambda: dist.Normal(0.0, 1.0), r"GreaterThan\(0\) .* and Real\(\)"),
    "bound": (lambda: dist.Uniform(0.0, 1.0), lambda: dist.Uniform(0.0, 10.0), r"Interval\(0, 1\) .*Interval\(0, 10\)"),
    "bounds": (
        lambda: dist.Uniform(torch.zeros(2), torch.ones(2)).to_event(1),
        lambda: dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1),
        r"0 to 0, 1 to 1\), 1\) .* 1 to 2\), 1\)",
    ),
    "rank": (
        lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1),
        lambda: dist.Normal(torch.zeros(2), 1.0).expand([2]).to_event(1).mask(True),
        "",
    ),
}


@pytest.mark.parametrize(("first", "second", "words"), SUPPORTS.values(), ids=SUPPORTS)
def test_another_support_is_refused(
    first: Callable[[], Any], second: Callable[[], Any], words: str, tmp_path: Path
) -> None:
    guide = AutoRealNVP(lambda: pyro.sample("z", first()), num_layers=2)
    guide()
    save(tmp_path / "guide.pt", guide)
    if not words:  # the same support by another road
        load_guide(tmp_path / "guide.pt", lambda: pyro.sample("z", second()))
        return
    with pytest.raises(ValueError, match=f"support of site 'z' is .*{words}"):
        load_guide(tmp_path / "guide.pt", lambda: pyro.sample("z", second()))


def test_the_model_starts_where_the_guide_did(tmp_path: Path) -> None:
    """A model that fails at the values that Pyro would choose by itself still loads."""

    def touchy() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if not torch.equal(z, torch.full((2,), 7.0)):
            raise RuntimeError("z is not 7")

    guide = AutoRealNVP(touchy, num_layers=2, init_loc_fn=lambda site: torch.full((2,), 7.0))
    guide()
    save(tmp_path / "guide.pt", guide)
    assert torch.equal(load_guide(tmp_path / "guide.pt", touchy).median()["z"], guide.median()["z"])


def test_flows_and_guides_are_told_apart(tmp_path: Path) -> None:
    save(tmp_path / "flow.pt", real_nvp(2, num_layers=2))
    with pytest.raises(ValueError, match=r"must hold a guide, got a flow; load\(path\) reads it"):
        load_guide(tmp_path / "flow.pt", model)
    save(tmp_path / "guide.pt", fitted_guide(DATA, num_steps=1))
    with pytest.raises(ValueError, match=r"must hold a flow, got a guide; load_guide\(path, model\) reads it"):
        load(tmp_path / "guide.pt")


def test_an_error_of_the_model_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    save(tmp_path / "guide.pt", fitted_guide(DATA, num_steps=1))
    with pytest.raises(TypeError):
        load_guide(tmp_path / "guide.pt", model, (1, 2, 3))
