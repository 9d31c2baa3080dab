"""Flows inside a Pyro model: a likelihood learned from a simulator, a prior learned from draws; NUTS and SVI on both.

    python examples/learned_likelihood.py            about two minutes on two cores
    python examples/learned_likelihood.py --smoke    seconds, to see that it runs

A simulator has no density for `obs=`. A conditional flow trained on its output at many parameters has one. Here the
density of the simulator is known, so that the posterior can be checked.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_affine import AutoRealNVP, NormalizingFlow, conditional_real_nvp, fit_density, fit_guide, psis, real_nvp

NUM_ROWS, NOISE, TOTAL = 20, 0.5, torch.tensor(-1.0)
Grid = tuple[Tensor, Tensor, Tensor]  # two axes, and a density on them


def simulate(theta: Tensor) -> Tensor:
    """One row for each theta, around a parabola. Shape: batch + (2,) to batch + (2,)."""
    first = theta[..., 0] + torch.randn(theta.shape[:-1])
    second = theta[..., 1] + first.square() / 2 + NOISE * torch.randn(theta.shape[:-1])
    return torch.stack([first, second], -1)


def exact_posterior(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd of theta ~ N(0, 1) given rows: two Gaussian means, once the parabola is subtracted."""
    errors = torch.stack([rows[:, 0], rows[:, 1] - rows[:, 0].square() / 2], -1)
    precision = torch.tensor([1.0, NOISE]) ** -2
    total = 1 + len(rows) * precision
    return precision * errors.sum(0) / total, total**-0.5


def past_draws(num_draws: int) -> Tensor:
    """What a prior is learned from: a narrow valley."""
    first = torch.randn(num_draws)
    return torch.stack([first, first.square() - 1 + 0.3 * torch.randn(num_draws)], -1)


def exact_on_a_grid() -> Grid:
    """Posterior of z where z_1 + z_2 was -1, up to the noise."""
    first, second = torch.linspace(-3.5, 3.5, 281), torch.linspace(-2.5, 4.5, 281)
    z = torch.stack(torch.meshgrid(first, second, indexing="ij"), -1)
    valley = dist.Normal(z[..., 0].square() - 1, 0.3).log_prob(z[..., 1])
    log_p = dist.Normal(0.0, 1.0).log_prob(z[..., 0]) + valley + dist.Normal(z.sum(-1), NOISE).log_prob(TOTAL)
    return first, second, log_p.exp() / (log_p.exp().sum() * 0.025**2)


def moments(grid: Grid) -> tuple[Tensor, Tensor]:
    """Mean and sd of a density on a grid."""
    weights = (grid[2] / grid[2].sum())[..., None]
    z = torch.stack(torch.meshgrid(*grid[:2], indexing="ij"), -1)
    mean = (weights * z).sum((0, 1))
    return mean, (weights * (z - mean).square()).sum((0, 1)).sqrt()


def learned_likelihood(flow: NormalizingFlow, rows: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    # Trained on single rows, used for as many as there are: the plate multiplies their densities.
    with pyro.plate("rows", len(rows)):
        pyro.sample("y", flow(theta), obs=rows)


def learned_prior(flow: NormalizingFlow) -> None:
    z = pyro.sample("z", flow())
    pyro.sample("total", dist.Normal(z.sum(-1), NOISE), obs=TOTAL)


def both_posteriors(model: partial[None], site: str, smoke: bool) -> dict[str, Tensor]:
    """Draws by NUTS, and by SVI with a flow guide, weighted by PSIS."""
    num_draws, warmup, num_steps = (10, 10, 20) if smoke else (600, 200, 1000)
    pyro.set_rng_seed(1)
    mcmc = MCMC(NUTS(model), num_samples=num_draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run()
    guide = AutoRealNVP(model)
    fit_guide(model, guide, num_steps=num_steps, seed=0)
    result = psis(model, guide, num_draws=500 if smoke else 4000, seed=1)
    print(result)
    return {"NUTS": mcmc.get_samples()[site], "SVI": result.resample(num_draws, seed=2)[site]}


def table(exact: tuple[Tensor, Tensor], draws: dict[str, Tensor]) -> None:
    found = {"exact": exact, **{name: (x.mean(0), x.std(0)) for name, x in draws.items()}}
    for name, (mean, sd) in found.items():
        print(f"{name:6s}", ", ".join(f"{m:6.3f} +- {s:.3f}" for m, s in zip(mean.tolist(), sd.tolist(), strict=True)))


def picture(panels: dict[str, tuple[Grid, dict[str, Tensor]]], past: Tensor, path: Path) -> None:
    """For each model the exact posterior as contours, draws of both methods as points; draws of the prior in grey."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    axes[1].plot(*past.T, ".", ms=2, color="0.8", label="draws that the prior was learned from")
    for ax, (title, ((first, second, density), draws)) in zip(axes, panels.items(), strict=True):
        for (name, points), colour in zip(draws.items(), ("tab:blue", "tab:orange"), strict=True):
            ax.plot(*points[:300].T, ".", ms=4, color=colour, alpha=0.7, label=name)
        ax.contour(first, second, density.T, levels=float(density.max()) * torch.tensor([0.05, 0.3, 0.7]), colors="k")
        ax.plot([], [], color="k", label="exact posterior")
        ax.set(title=title, xlim=(first[0], first[-1]), ylim=(second[0], second[-1]))
        ax.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--output", type=Path, default=Path("output/learned_likelihood"), help="folder for the files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    num_simulations, num_steps = (500, 20) if options.smoke else (30_000, 1500)

    # 1. A likelihood: the density of a row, given theta, learned from simulated pairs.
    torch.manual_seed(0)
    theta = torch.randn(num_simulations, 2) * 1.3  # wider than the prior, so that it is learned at its ends too
    likelihood = NormalizingFlow(conditional_real_nvp(2, context_dim=2, num_layers=6), 2)
    print(fit_density(likelihood, simulate(theta), theta, num_steps=num_steps, seed=0))
    likelihood.requires_grad_(False)  # it is part of the model now; gradients are for theta

    rows = simulate(torch.tensor([0.7, -0.4]).expand(NUM_ROWS, 2))
    of_theta = both_posteriors(partial(learned_likelihood, likelihood, rows), "theta", options.smoke)
    mean, sd = exact_posterior(rows)
    table((mean, sd), of_theta)

    # 2. A prior: the density of past draws, then updated by one new observation.
    past = past_draws(5000)
    prior = NormalizingFlow(real_nvp(2), 2)
    print(fit_density(prior, past, num_steps=num_steps // 2, seed=0))
    prior.requires_grad_(False)
    of_z = both_posteriors(partial(learned_prior, prior), "z", options.smoke)
    grid = exact_on_a_grid()
    table(moments(grid), of_z)

    axes = [m + s * torch.linspace(-4, 4, 81) for m, s in zip(mean, sd, strict=True)]
    gaussian = [dist.Normal(m, s).log_prob(x).exp() for m, s, x in zip(mean, sd, axes, strict=True)]
    known = (axes[0], axes[1], gaussian[0][:, None] * gaussian[1])
    panels = {"learned likelihood: theta": (known, of_theta), "learned prior: z": (grid, of_z)}
    picture(panels, past, options.output / "posteriors.png")
    print(f"written: {(options.output / 'posteriors.png').resolve()}")


if __name__ == "__main__":
    main()
