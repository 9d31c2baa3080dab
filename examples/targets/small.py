"""Small targets for depth_and_width.py: a table of real data, and a density and posteriors whose truth is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

_MAGIC = Path(__file__).resolve().parents[3] / "shared" / "data" / "density" / "magic.npz"
_EFFECTS = torch.tensor([2.8, 0.8, -0.3, 0.7, -0.1, 0.1, 1.8, 1.2])
_ERRORS = torch.tensor([1.5, 1.0, 1.6, 1.1, 0.9, 1.1, 1.0, 1.8])
_NOISE = 0.1  # of the moons


def moons(num_points: int, seed: int) -> Tensor:
    """Two half circles, one upside down, with noise. Shape: (num_points, 2)."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(2, (num_points,), generator=generator)
    centres = _arcs(torch.pi * torch.rand(num_points, generator=generator))[which, torch.arange(num_points)]
    return centres + _NOISE * torch.randn(num_points, 2, generator=generator)


def moons_log_prob(points: Tensor) -> Tensor:
    """A sum over the angle, of steps much shorter than the noise. Shape: batch."""
    centres = _arcs(torch.pi * (torch.arange(300) + 0.5) / 300).flatten(0, 1)
    parts = -torch.cdist(points, centres).square() / (2 * _NOISE**2)
    return parts.logsumexp(-1) - math.log(len(centres) * 2 * math.pi * _NOISE**2)


def _arcs(angle: Tensor) -> Tensor:
    arc = torch.stack([angle.cos(), angle.sin()], -1)
    return torch.stack([arc, torch.tensor([1.0, 0.5]) - arc])


def best_of_one_layer(data: Tensor, truth: Tensor, num_bins: int = 200) -> float:
    """The least that one coupling can be off on the moons: its first entry is normal, the second normal given it."""
    first, second = ((data - data.mean(0)) / data.std(0)).T
    bins = second[first.argsort()][: len(first) // num_bins * num_bins].reshape(num_bins, -1)
    log_prob = -0.5 - bins.std(1).log().mean() - 0.5 - math.log(2 * math.pi) - data.std(0).log().sum()
    return float(truth.mean() - log_prob)


def table() -> tuple[str, Tensor, Tensor]:
    """Name, rows to train on, and rows to test of a table of ten columns.

    MAGIC gamma telescope (UCI 159) where it is at hand, else ten principal components of scikit-learn's digits.
    """
    if _MAGIC.exists():
        with np.load(_MAGIC) as parts:
            return "magic", torch.tensor(np.concatenate([parts["train"], parts["val"]])), torch.tensor(parts["test"])
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA

    rows = torch.tensor(PCA(10, random_state=0).fit_transform(load_digits().data)).float()
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return "digits", rows[:1400], rows[1400:]


def banana() -> None:
    """A parabola with noise; its log evidence is 0."""
    first = pyro.sample("first", dist.Normal(0.0, 1.0))
    pyro.sample("second", dist.Normal(first.square(), 0.3))


def ring() -> None:
    """A place of which only the distance is known, and that with an error."""
    place = pyro.sample("place", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    pyro.sample("distance", dist.Normal(place.norm(dim=-1), 0.3), obs=torch.tensor(3.0))


def ring_evidence() -> float:
    """A sum over the radius; the angle is uniform."""
    radius = torch.linspace(1e-4, 15.0, 20_001, dtype=torch.float64)
    log_joint = dist.Normal(radius, 0.3).log_prob(torch.tensor(3.0)) + radius.log() - radius**2 / 18 - math.log(9)
    return float(log_joint.logsumexp(0) + (radius[1] - radius[0]).log())


def schools() -> None:
    """Eight schools (Rubin, 1981), centred. Effects in tens of points, so that all latents are of size one."""
    mu = pyro.sample("mu", dist.Normal(0.0, 0.5))
    tau = pyro.sample("tau", dist.HalfCauchy(0.5))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, _ERRORS), obs=_EFFECTS)


def schools_evidence() -> float:
    """The effects of the schools drop out by algebra; a grid sums over the two latents that are left."""
    mu = torch.linspace(-4.0, 4.0, 401, dtype=torch.float64)
    log_tau = torch.linspace(-16.0, 7.0, 1501, dtype=torch.float64)[:, None]
    spread = (log_tau.exp()[..., None] ** 2 + _ERRORS**2).sqrt()
    log_joint = dist.Normal(mu[:, None], spread).log_prob(_EFFECTS).sum(-1) + dist.Normal(0.0, 0.5).log_prob(mu)
    log_joint = log_joint + dist.HalfCauchy(0.5).log_prob(log_tau.exp()) + log_tau
    return float(log_joint.flatten().logsumexp(0) + ((mu[1] - mu[0]) * (log_tau[1] - log_tau[0])).log())
