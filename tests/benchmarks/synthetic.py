"""Synthetic targets: densities with a known integral and exact draws, and a horseshoe regression on made-up data."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from targets import Draws, Target
from torch import Tensor

_NUM_ROWS, _NUM_PREDICTORS = 100, 50  # of the horseshoe regression: 102 latents


def _funnel(num_entries: int) -> tuple[Callable[[], None], Callable[[int], Draws]]:
    """Neal's funnel: log-variance v ~ N(0, 3), and x | v ~ N(0, exp(v / 2)) in each other entry."""
    zeros = torch.zeros(num_entries - 1)

    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        scale = (v / 2).exp()[..., None].expand(v.shape + zeros.shape)
        pyro.sample("x", dist.Normal(0.0, scale).to_event(1))

    def draw(num_draws: int) -> Draws:
        v = 3 * torch.randn(num_draws)
        return {"v": v, "x": torch.randn(num_draws, num_entries - 1) * (v / 2).exp()[:, None]}

    return model, draw


def _banana_model() -> None:
    first = pyro.sample("first", dist.Normal(0.0, 10.0))
    pyro.sample("second", dist.Normal(0.03 * (first.square() - 100), 1.0))


def _banana_draws(num_draws: int) -> Draws:
    first = 10 * torch.randn(num_draws)
    return {"first": first, "second": 0.03 * (first.square() - 100) + torch.randn(num_draws)}


def _student(df: float, num_entries: int = 10) -> tuple[Callable[[], None], Callable[[int], Draws]]:
    """Independent Student t entries."""

    def density() -> dist.TorchDistribution:
        return dist.StudentT(torch.tensor(df), 0.0, 1.0).expand([num_entries]).to_event(1)

    def model() -> None:
        pyro.sample("x", density())

    return model, lambda num_draws: {"x": density().sample((num_draws,))}


def _mixture() -> dist.TorchDistribution:
    """Three standard Gaussians of equal weight on a line through ten dimensions, neighbours 6 apart."""
    locs = torch.tensor([-6.0, 0.0, 6.0])[:, None] / 10**0.5 * torch.ones(10)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), dist.Normal(locs, 1.0).to_event(1))


def _mixture_model() -> None:
    # Flat, with the mixture as a factor: as the density of a site, its support has no transform in torch.
    x = pyro.sample("x", dist.Normal(torch.zeros(10), 1.0).to_event(1).mask(False))
    pyro.factor("mixture", _mixture().log_prob(x))


def _horseshoe_data() -> tuple[Tensor, Tensor]:
    """Standard normal predictors, of which the first five matter, and labels."""
    generator = torch.Generator().manual_seed(0)
    predictors = torch.randn(_NUM_ROWS, _NUM_PREDICTORS, generator=generator, dtype=torch.float64)
    weights = torch.tensor([3.0, -2.0, 2.0, 1.5, -1.5] + [0.0] * (_NUM_PREDICTORS - 5), dtype=torch.float64)
    uniform = torch.rand(_NUM_ROWS, generator=generator, dtype=torch.float64)
    labels = uniform < (predictors @ weights).sigmoid()
    return predictors.to(torch.get_default_dtype()), labels.to(torch.get_default_dtype())


def _horseshoe_model(predictors: Tensor, labels: Tensor) -> None:
    zeros = predictors.new_zeros(_NUM_PREDICTORS)
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    shrinkage = pyro.sample("shrinkage", dist.HalfCauchy(1.0))
    local = pyro.sample("local", dist.HalfCauchy(zeros + 1).to_event(1))
    direction = pyro.sample("direction", dist.Normal(zeros, 1.0).to_event(1))
    weights = direction * local * shrinkage[..., None]
    pyro.sample("y", dist.Bernoulli(logits=intercept[..., None] + weights @ predictors.T).to_event(1), obs=labels)


def synthetic() -> list[Target]:
    """All synthetic targets; that with data has stored NUTS chains as its reference."""
    funnel_10, funnel_100, student_15, student_25 = _funnel(10), _funnel(100), _student(1.5), _student(2.5)
    exact = [
        ("funnel_10", *funnel_10, "Neal's funnel, log-variance of sd 3", True),
        ("funnel_100", *funnel_100, "Neal's funnel, log-variance of sd 3", True),
        ("banana", _banana_model, _banana_draws, "curved ridge", False),
        ("student_1.5", *student_15, "heavy tails, no variance", True),
        ("student_2.5", *student_25, "heavy tails", True),
        ("mixture_3", _mixture_model, lambda n: {"x": _mixture().sample((n,))}, "three modes", False),
    ]
    targets = [
        Target(name, "synthetic", model, character, draw_exactly=draw, log_evidence=0.0, heavy=heavy)
        for name, model, draw, character, heavy in exact
    ]
    horseshoe = Target(
        "horseshoe",
        "synthetic",
        _horseshoe_model,
        "logistic regression, half-Cauchy scales",
        load_args=_horseshoe_data,
        chains_of="horseshoe",
        heavy=True,
    )
    return [*targets, horseshoe]
