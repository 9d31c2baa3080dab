"""Larger hierarchical models with plates, on data read from beside the repository."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from targets import DATA, Draws, Target
from torch import Tensor

Data = dict[str, Tensor]


def _radon_scales() -> tuple[Tensor, ...]:
    means = [pyro.sample(f"mu_{name}", dist.Normal(0.0, 10.0)) for name in ("alpha", "beta")]
    return (*means, *(pyro.sample(f"sigma_{name}", dist.HalfNormal(1.0)) for name in ("alpha", "beta", "y")))


def _radon_likelihood(data: Data, alpha: Tensor, beta: Tensor, sigma: Tensor) -> None:
    loc = alpha[..., data["county_idx"]] + beta[..., data["county_idx"]] * data["floor_measure"]
    with pyro.plate("home", len(data["log_radon"])):
        pyro.sample("log_radon", dist.Normal(loc, sigma), obs=data["log_radon"])


def radon_centered(data: Data) -> None:
    """Radon in homes: intercept and slope of each county, centred."""
    mu_alpha, mu_beta, sigma_alpha, sigma_beta, sigma_y = _radon_scales()
    with pyro.plate("county", 85):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
        beta = pyro.sample("beta", dist.Normal(mu_beta, sigma_beta))
    _radon_likelihood(data, alpha, beta, sigma_y)


def radon_noncentered(data: Data) -> None:
    """The same model, written in deviations from the mean county."""
    mu_alpha, mu_beta, sigma_alpha, sigma_beta, sigma_y = _radon_scales()
    with pyro.plate("county", 85):
        alpha_raw = pyro.sample("alpha_raw", dist.Normal(0.0, 1.0))
        beta_raw = pyro.sample("beta_raw", dist.Normal(0.0, 1.0))
    _radon_likelihood(data, mu_alpha + sigma_alpha * alpha_raw, mu_beta + sigma_beta * beta_raw, sigma_y)


def _to_centered(draws: Draws) -> Draws:
    draws = dict(draws)
    for name in ("alpha", "beta"):
        mean, scale = draws[f"mu_{name}"][:, None], draws[f"sigma_{name}"][:, None]
        draws[name] = mean + scale * draws.pop(f"{name}_raw")
    return draws


def rats(data: Data) -> None:
    """Growth curve of each rat; flat priors of the scales."""
    flat = dist.LogNormal(0.0, 1.0).mask(False)  # density 1 on the positive half, and can be drawn from
    means = [pyro.sample(f"mu_{name}", dist.Normal(0.0, 100.0)) for name in ("alpha", "beta")]
    scales = [pyro.sample(f"sigma_{name}", flat) for name in ("alpha", "beta", "y")]
    with pyro.plate("rat", 30):
        alpha = pyro.sample("alpha", dist.Normal(means[0], scales[0]))
        beta = pyro.sample("beta", dist.Normal(means[1], scales[1]))
    loc = alpha[..., data["rat"]] + beta[..., data["rat"]] * (data["x"] - data["xbar"])
    with pyro.plate("weighing", len(data["y"])):
        pyro.sample("y", dist.Normal(loc, scales[2]), obs=data["y"])


def irt_2pl(data: Data) -> None:
    """Item response: ability of each person, discrimination and difficulty of each item."""
    names = ("s_theta", "s_a", "s_b")
    s_theta, s_a, s_b = (pyro.sample(name, dist.HalfCauchy(2.0)) for name in names)
    mu_b = pyro.sample("mu_b", dist.Normal(0.0, 5.0))
    persons, items = pyro.plate("person", 100, dim=-1), pyro.plate("item", 20, dim=-2)
    with persons:
        theta = pyro.sample("theta", dist.Normal(0.0, s_theta))
    with items:
        a = pyro.sample("a", dist.LogNormal(0.0, s_a))
        b = pyro.sample("b", dist.Normal(mu_b, s_b))
    with items, persons:
        pyro.sample("y", dist.Bernoulli(logits=a * (theta - b)), obs=data["y"])


_GROUPS = {"age": 4, "edu": 4, "age_edu": 16, "state": 51, "region_full": 5}


def election88(data: Data) -> None:
    """Votes in 1988: logistic regression with effects of age, education, both, state and region."""
    beta = pyro.sample("beta", dist.Normal(0.0, 100.0).expand([5]).to_event(1))
    terms = (torch.ones_like(data["y"]), data["black"], data["female"], data["v_prev_full"])
    columns = torch.stack([*terms, data["female"] * data["black"]], -1)
    logits = beta @ columns.T  # with draws at once: (draws, 1, voters)
    logits = logits.squeeze(-2) if logits.dim() > 1 else logits
    for name, size in _GROUPS.items():
        scale = pyro.sample(f"sigma_{name}", dist.Uniform(0.0, 100.0))
        with pyro.plate(f"plate_{name}", size):
            effect = pyro.sample(f"effect_{name}", dist.Normal(0.0, scale))
        logits = logits + effect[..., data[name]]
    with pyro.plate("voter", len(data["y"])):
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=data["y"])


def ovarian(data: Data) -> None:
    """Logistic regression with more predictors than rows and a regularised horseshoe prior."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, data["scale_icept"]))
    tau = pyro.sample("tau", dist.HalfCauchy(2 * data["scale_global"]))
    slab = pyro.sample("slab", dist.InverseGamma(data["slab_df"] / 2, data["slab_df"] / 2))
    with pyro.plate("predictor", data["x"].shape[1]):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        local = pyro.sample("local", dist.HalfCauchy(1.0))
    slab_variance = data["slab_scale"] ** 2 * slab
    shrunk = local * (slab_variance / (slab_variance + tau.square() * local.square())).sqrt()
    with pyro.plate("row", len(data["y"])):
        logits = intercept + (z * shrunk * tau) @ data["x"].T
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=data["y"])


_INDICES = ("county_idx", "rat", *_GROUPS)  # in the files they count from 1


def _load(file: str) -> Callable[[], tuple[Data]]:
    def load() -> tuple[Data]:
        raw: dict[str, Any] = json.loads((DATA / "hierarchical" / f"{file}.json").read_text())
        dtype = torch.get_default_dtype()
        return ({k: torch.tensor(v) - 1 if k in _INDICES else torch.tensor(v, dtype=dtype) for k, v in raw.items()},)

    return load


def hierarchical() -> list[Target]:
    """All hierarchical targets; none where the data are missing."""
    if not (DATA / "hierarchical").exists():
        return []
    rows: list[tuple[str, Callable[..., Any], str, str, dict[str, Any]]] = [
        ("radon_noncentered", radon_noncentered, "radon_mn", "175 latents", {"chains_of": "radon_noncentered"}),
        (
            "radon_centered",
            radon_centered,
            "radon_mn",
            "175 latents, funnels",
            {"chains_of": "radon_noncentered", "from_chains": _to_centered},
        ),
        ("rats", rats, "rats_data", "65 latents, unscaled", {"chains_of": "rats"}),
        ("irt_2pl", irt_2pl, "irt_2pl", "144 latents, crossed effects", {"chains_of": "irt_2pl", "nesting": 2}),
        ("election88", election88, "election88", "90 latents, 11566 rows", {"chains_of": "election88"}),
        ("ovarian", ovarian, "ovarian", "3075 latents, regularised horseshoe", {}),
    ]
    return [
        Target(name, "hierarchical", model, character, load_args=_load(file), **{"nesting": 1, **options})
        for name, model, file, character, options in rows
    ]
