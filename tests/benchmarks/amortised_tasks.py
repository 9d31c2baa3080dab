"""Simulators in Pyro whose posteriors can be drawn from: Gaussian linear, two moons, SLCP, SIR.

Formulas and constants from Benchmarking Simulation-Based Inference (Lueckmann et al., 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """A model, its prior as one distribution of a flat vector, and exact posterior draws.

    Args:
        model: draws the sites ``latents`` and the site "y".
        latents: names of the sites, whose flattened values side by side are theta.
        prior: of theta; for methods that do not read Pyro models.
        reference: number of draws and data to posterior draws of theta. Shape: (n, size of theta).
    """

    model: Callable[[], Any]
    latents: Sequence[str]
    prior: torch.distributions.Distribution
    reference: Callable[[int, Tensor], Tensor]


def gaussian_linear() -> None:
    """Ten means with a Gaussian prior, one observation of each."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(10), math.sqrt(0.1)).to_event(1))
    pyro.sample("y", dist.Normal(theta, math.sqrt(0.1)).to_event(1))


def _gaussian_reference(n: int, y: Tensor) -> Tensor:
    return y / 2 + math.sqrt(0.05) * torch.randn(n, 10)


def _box(size: int, bound: float) -> dist.TorchDistribution:
    return dist.Uniform(torch.full((size,), -bound), bound).to_event(1)


def two_moons() -> None:
    """Two crescents: a point on a noisy half circle, moved by theta up to a sign."""
    theta = pyro.sample("theta", _box(2, 1.0))
    angle = pyro.sample("angle", dist.Uniform(-math.pi / 2, math.pi / 2))
    radius = pyro.sample("radius", dist.Normal(0.1, 0.01))
    moved = torch.stack([-(theta.sum(-1).abs()), theta[..., 1] - theta[..., 0]], -1) / math.sqrt(2)
    point = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)
    pyro.deterministic("y", point + moved, event_dim=1)


def _moons_reference(n: int, y: Tensor) -> Tensor:
    """The point on the half circle is drawn, and theta solved for: exact, as the prior is flat."""
    angle = (torch.rand(20 * n) - 0.5) * math.pi
    radius = 0.1 + 0.01 * torch.randn(20 * n)
    total = radius * angle.cos() + 0.25 - y[0]
    difference = y[1] - radius * angle.sin()
    signed = total * (2 * torch.randint(2, total.shape) - 1)
    theta = torch.stack([signed - difference, signed + difference], -1) / math.sqrt(2)
    return theta[(total >= 0) & (theta.abs() <= 1).all(-1)][:n]


def slcp() -> None:
    """Simple likelihood, complex posterior: four points of a bivariate Gaussian with squares and a tanh in it."""
    theta = pyro.sample("theta", _box(5, 3.0))
    loc, tril = _slcp_gaussian(theta)
    pyro.sample(
        "y",
        dist.MultivariateNormal(loc[..., None, :], scale_tril=tril[..., None, :, :])
        .expand([*theta.shape[:-1], 4])
        .to_event(1),
    )


def _slcp_gaussian(theta: Tensor) -> tuple[Tensor, Tensor]:
    first, second, rho = theta[..., 2].square() + 1e-6, theta[..., 3].square() + 1e-6, theta[..., 4].tanh()
    below = torch.stack([rho * second, second * (1 - rho.square()).clamp(min=1e-8).sqrt()], -1)
    tril = torch.stack([torch.stack([first, torch.zeros_like(first)], -1), below], -2)
    return theta[..., :2], tril


def _slcp_reference(n: int, y: Tensor) -> Tensor:
    """Importance resampling of the scales, with the mean integrated out: given the scales it is a Gaussian."""
    scales = 6 * torch.rand(500_000, 3) - 3
    _, tril = _slcp_gaussian(torch.cat([torch.zeros(len(scales), 2), scales], -1))
    centred = (y - y.mean(0)).T.expand(len(scales), 2, 4)
    z = torch.linalg.solve_triangular(tril, centred, upper=False)
    log_weight = -3 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1) - z.square().sum((-2, -1)) / 2
    chosen = torch.multinomial((log_weight - log_weight.max()).exp().double(), 40 * n, replacement=True)
    loc = y.mean(0) + (tril[chosen] @ torch.randn(40 * n, 2, 1)).squeeze(-1) / 2
    theta = torch.cat([loc, scales[chosen]], -1)
    return theta[(loc.abs() <= 3).all(-1)][:n]


_PEOPLE, _DAYS, _SEEN = 1e6, 160, 10


def sir() -> None:
    """An epidemic: contact rate, recovery rate, and the infected among 1000 people on ten days."""
    beta = pyro.sample("beta", dist.LogNormal(math.log(0.4), 0.5))
    gamma = pyro.sample("gamma", dist.LogNormal(math.log(0.125), 0.2))
    pyro.sample("y", dist.Binomial(1000, probs=_infected(beta, gamma)).to_event(1))


def _infected(beta: Tensor, gamma: Tensor) -> Tensor:
    """Share of the infected on ten days, by the classical Runge-Kutta rule of one-day steps."""
    state = torch.stack(torch.broadcast_tensors(torch.ones_like(beta) - 1 / _PEOPLE, torch.ones_like(beta) / _PEOPLE))

    def slope(state: Tensor) -> Tensor:
        new = beta * state[0] * state[1]
        return torch.stack([-new, new - gamma * state[1]])

    seen = []
    for day in range(1, _DAYS + 1):
        first = slope(state)
        second = slope(state + first / 2)
        third = slope(state + second / 2)
        state = (state + (first + 2 * second + 2 * third + slope(state + third)) / 6).clamp(0, 1)
        if day % (_DAYS // _SEEN) == 0:
            seen.append(state[1])
    return torch.stack(seen, -1).clamp(1e-7, 1 - 1e-7)


def _sir_reference(n: int, y: Tensor) -> Tensor:
    """Draws from a grid in the logarithms, refined three times around where the posterior is."""
    centre, width = torch.tensor([0.4, 0.125]).log().double(), torch.tensor([2.0, 0.8]).double()
    for _ in range(4):
        axes = [c + w * torch.linspace(-1, 1, 121, dtype=torch.float64) for c, w in zip(centre, width, strict=True)]
        grid = torch.cartesian_prod(*axes)
        beta, gamma = grid.exp().T
        log_p = dist.Binomial(1000, probs=_infected(beta, gamma)).log_prob(y.double()).sum(-1)
        log_p = (
            log_p
            - ((grid[:, 0] - math.log(0.4)) / 0.5).square() / 2
            - ((grid[:, 1] - math.log(0.125)) / 0.2).square() / 2
        )
        held = grid[log_p > log_p.max() - 12]
        step = width / 60
        centre, width = (held.amax(0) + held.amin(0)) / 2, (held.amax(0) - held.amin(0)) / 2 + step
    chosen = torch.multinomial((log_p - log_p.max()).exp(), n, replacement=True)
    return (grid[chosen] + step * (torch.rand(n, 2, dtype=torch.float64) - 0.5)).exp().float()


_SIR_PRIOR = dist.LogNormal(torch.tensor([0.4, 0.125]).log(), torch.tensor([0.5, 0.2])).to_event(1)
TASKS = {
    "gaussian linear": Task(
        gaussian_linear, ["theta"], dist.Normal(torch.zeros(10), math.sqrt(0.1)).to_event(1), _gaussian_reference
    ),
    "two moons": Task(two_moons, ["theta"], _box(2, 1.0), _moons_reference),
    "slcp": Task(slcp, ["theta"], _box(5, 3.0), _slcp_reference),
    "sir": Task(sir, ["beta", "gamma"], _SIR_PRIOR, _sir_reference),
}
