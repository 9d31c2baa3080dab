"""Whether an amortised posterior is calibrated: ranks and coverage on simulated data whose latents are known."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_affine.random_state import seeded
from pyro_affine.simulate import NeuralPosterior
from pyro_affine.simulations import Simulations
from pyro_affine.uniformity import uniform_band, uniformity_p_value
from pyro_affine.weighted import entry_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ENTRIES_AT_ONCE = 10_000_000  # of draws: 40 MB in float32
_FEWEST_DATASETS = 10
_ROUNDING = 1e-6  # relative: so near, a draw is a tie, as is the diagonal of a matrix of correlations


@dataclass(frozen=True)
class Ranks:
    """Positions of true values among draws, as numbers that are uniform in [0, 1] for the right posterior.

    With r of L draws below the true value and s equal to it, u = (r + v (s + 1)) / (L + 1), v ~ Uniform(0, 1).

    Args:
        values: u by site, each of shape (number of data sets,) + shape of the site.
        num_draws: the number L.

    >>> print(Ranks({"loc": torch.linspace(0.001, 0.05, 50)}, num_draws=100))
    Not calibrated (p = 3.9e-41, 50 data sets, 100 draws each), most of all site 'loc': look at ...
    """

    values: dict[str, Tensor]
    num_draws: int

    @property
    def num_datasets(self) -> int:
        """Number of data sets."""
        return len(next(iter(self.values.values())))

    def p_values(self) -> dict[str, Tensor]:
        """p-value of the Kolmogorov-Smirnov test of uniformity, for each entry of each site."""
        return {name: uniformity_p_value(u) for name, u in self.values.items()}

    @property
    def p_value(self) -> float:
        """The least of these times their number, at most 1: small if any entry is not calibrated."""
        every = torch.cat([p.flatten() for p in self.p_values().values()])
        return min(1.0, float(every.min()) * len(every))

    def __str__(self) -> str:
        """What was found, in one sentence."""
        found = f"p = {self.p_value:.2g}, {self.num_datasets} data sets, {self.num_draws} draws each"
        if self.p_value >= 0.05:
            return f"No sign of a miscalibration ({found})."
        worst = min(((float(p.min()), name) for name, p in self.p_values().items()))[1]
        return f"Not calibrated ({found}), most of all site '{worst}': look at plot_sbc, and simulate or train more."


@dataclass(frozen=True)
class Coverage:
    """How often regions of highest posterior density hold the true latents.

    Args:
        levels: for each data set the probability of the smallest region of highest density that holds the truth,
            uniform in [0, 1] for the right posterior. Shape: (number of data sets,).

    >>> Coverage(torch.tensor([0.1, 0.3, 0.6, 0.9]))(0.5)
    0.5
    """

    levels: Tensor

    def __call__(self, level: float) -> float:
        """Share of the data sets whose region of this probability holds the truth; ``level`` where calibrated."""
        return float((self.levels <= level).double().mean())

    @property
    def p_value(self) -> float:
        """p-value of the Kolmogorov-Smirnov test that the levels are uniform."""
        return float(uniformity_p_value(self.levels))

    def __str__(self) -> str:
        """Coverage at three levels, in one sentence."""
        at = ", ".join(f"{100 * self(level):.0f} % at {100 * level:.0f} %" for level in (0.5, 0.8, 0.95))
        return f"Coverage {at} (p = {self.p_value:.2g}, {len(self.levels)} data sets)."


def sbc_ranks(
    npe: NeuralPosterior,
    num_datasets: int = 500,
    *,
    num_draws: int = 200,
    simulations: Simulations | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Ranks:
    """Simulation-based calibration: where the latents that made the data lie among posterior draws.

    For data sets from the model's prior the ranks are uniform if the posterior is right. Ranks that crowd at both ends
    tell of posteriors too narrow, in the middle of too wide, at one end of a bias. The prior itself passes too.

    Args:
        npe: trained.
        num_datasets: data sets to simulate.
        num_draws: draws of each posterior.
        simulations: some that training has not seen, in place of new ones. As in training, rows that are not finite
            are left out, with a warning.
        seed: of simulations and draws.
        progress: whether to show a bar for simulations of more than two seconds.

    Returns:
        The ranks; print them for the verdict, or give them to ``plot_sbc``.

    Raises:
        ValueError: if ``num_draws`` is below 1, or there are fewer than 10 finite data sets.

    Source: Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_affine.simulate import fit_posterior
    >>> def model():
    ...     loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     pyro.sample("y", dist.Normal(loc, 1.0).to_event(1))
    >>> npe = NeuralPosterior(model, observed=["y"], num_layers=2, hidden_dims=(8,))
    >>> fit = fit_posterior(npe, num_simulations=20_000, num_steps=1, seed=0, progress=False)
    >>> sbc_ranks(npe, 200, seed=1).p_value > 0.05
    True
    """
    with seeded(seed):
        simulations = _require(npe, num_datasets, num_draws, simulations, progress)
        pieces: dict[str, list[Tensor]] = {name: [] for name in npe.simulator.latents}
        for rows in _chunks(npe, simulations, num_draws):
            draws = npe.condition(rows.data).sample(num_draws)
            for name, truth in rows.latents.items():
                drawn = draws[name]
                ties = drawn.isclose(truth.to(drawn), rtol=_ROUNDING, atol=0.0)
                pieces[name].append(_positions((drawn < truth) & ~ties, ties))
    return Ranks({name: torch.cat(parts) for name, parts in pieces.items()}, num_draws)


def expected_coverage(
    npe: NeuralPosterior,
    num_datasets: int = 500,
    *,
    num_draws: int = 200,
    simulations: Simulations | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Coverage:
    """Coverage of the regions of highest density of all latents together, over data sets from the prior.

    For each data set the level is the share of posterior draws that are denser than the truth. It sees what ranks of
    single entries cannot, such as a wrong correlation. Arguments and errors as of ``sbc_ranks``.

    Source: A Trust Crisis In Simulation-Based Inference? Your Posterior Approximations Can Be Unfaithful (Hermans et
    al., 2022).
    """
    with seeded(seed):
        simulations = _require(npe, num_datasets, num_draws, simulations, progress)
        levels = []
        for rows in _chunks(npe, simulations, num_draws):
            posterior = npe.condition(rows.data)
            drawn, truth = posterior.log_prob(posterior.sample(num_draws)), posterior.log_prob(rows.latents)
            levels.append(_positions(drawn > truth, drawn == truth))
    return Coverage(torch.cat(levels))


def plot_sbc(ranks: Ranks, path: str | os.PathLike[str] | None = None) -> Figure:
    """Picture of the ranks: their distribution function less that of the uniform one, a curve for each entry.

    In the grey band lie 95 % of the curves of a calibrated posterior. A curve like an S (up, then down) tells of
    posteriors too narrow, its mirror image of too wide, an arch of a bias: above zero the draws are too high.

    Args:
        ranks: from ``sbc_ranks``.
        path: file to save the picture to.

    Returns:
        A matplotlib figure.

    >>> figure = plot_sbc(Ranks({"loc": torch.rand(100, 2)}, num_draws=50))
    >>> [axis.get_title() for axis in figure.axes]
    ['loc']
    """
    from matplotlib.figure import Figure

    names = list(ranks.values)
    figure = Figure(figsize=(1.0 + 3.2 * len(names), 3.2), layout="constrained")
    axes: Any = figure.subplots(1, len(names), squeeze=False, sharey=True)
    band = uniform_band(ranks.num_datasets)
    heights = torch.arange(1, ranks.num_datasets + 1, dtype=torch.float64) / ranks.num_datasets
    for axis, name in zip(axes[0], names, strict=True):
        values = ranks.values[name]
        labels = entry_labels(name, values.shape[1:])
        axis.axhspan(-band, band, color="0.9", label="95 % band")
        for label, u in zip(labels, values.reshape(len(values), -1).double().T, strict=True):
            u = u.sort().values
            axis.plot(u.numpy(), (heights - u).numpy(), label=label, linewidth=1)
        axis.set(title=name, xlabel="rank")
        if len(labels) <= 6:
            axis.legend(fontsize="small")
    axes[0, 0].set_ylabel("ECDF - uniform")
    if path is not None:
        figure.savefig(path)
    return figure


def _require(
    npe: NeuralPosterior, num_datasets: int, num_draws: int, simulations: Simulations | None, progress: bool
) -> Simulations:
    found = npe.simulate(num_datasets, progress=progress) if simulations is None else simulations
    found = npe.finite(found)
    if num_draws < 1 or len(found) < _FEWEST_DATASETS:
        raise ValueError(
            f"num_draws must be 1 or more and the finite data sets {_FEWEST_DATASETS} or more, got {num_draws} and "
            f"{len(found)}"
        )
    return found


def _chunks(npe: NeuralPosterior, simulations: Simulations, num_draws: int) -> Iterator[Simulations]:
    step = max(1, _ENTRIES_AT_ONCE // (num_draws * npe.layout.size))
    for start in range(0, len(simulations), step):
        yield simulations[start : start + step]


def _positions(below: Tensor, ties: Tensor) -> Tensor:
    """Places among the draws, of which there are len(below); among ties by chance. On the CPU, for tests and plots."""
    first, number = below.sum(0).cpu().double(), ties.sum(0).cpu()
    noise: Any = torch.rand(first.shape, dtype=torch.float64, device="cpu")
    return (first + noise * (number + 1)) / (len(below) + 1)  # type: ignore[no-any-return]
