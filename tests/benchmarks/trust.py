"""Is the verdict right? Three fits judged by PSIS, beside the truth: long NUTS runs, or exact draws for the funnel.

Run by ``make bench-trust``. The eight schools (centred, with plates), growth of rats (65 latents, plates, read from
beside the repository, left out where missing), and a funnel in ten dimensions. Prints a table for the docs and draws
pair plots.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from hierarchical import hierarchical
from pyro.infer import MCMC, NUTS
from synthetic import synthetic
from torch import Tensor

from pyro_affine import AutoRealNVP, fit_guide, psis
from pyro_affine.plots import plot_pairs, plot_weights

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import eight_schools  # noqa: E402

Draws = dict[str, Tensor]
Case = tuple[Callable[..., Any], tuple[Any, ...], Callable[[], Draws]]


def nuts(model: Callable[..., Any], args: tuple[Any, ...], num_samples: int) -> Draws:
    """Draws of four chains, one after the other."""
    chains = []
    for seed in range(4):
        pyro.set_rng_seed(seed)
        mcmc = MCMC(NUTS(model), num_samples=num_samples, warmup_steps=num_samples // 2, disable_progbar=True)
        mcmc.run(*args)
        chains.append(mcmc.get_samples())
    return {name: torch.cat([chain[name] for chain in chains]) for name in chains[0]}


def non_centred_schools() -> None:
    """The eight schools in the form that NUTS can follow."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample(
            "effect", dist.Normal(mu + tau * z, eight_schools.ERRORS.double()), obs=eight_schools.EFFECTS.double()
        )


def schools_reference() -> Draws:
    draws = nuts(non_centred_schools, (), 2000)
    draws["theta"] = draws["mu"][:, None] + draws["tau"][:, None] * draws.pop("z")
    return draws


def cases() -> dict[str, Case]:
    """Model, arguments and reference of each case."""
    schools = (eight_schools.EFFECTS.double(), eight_schools.ERRORS.double())
    found: dict[str, Case] = {"eight schools, centred": (eight_schools.model, schools, schools_reference)}
    for target in hierarchical():
        if target.name == "rats":
            args = target.load_args()
            found["rats, 65 latents"] = (target.model, args, lambda m=target.model, a=args: nuts(m, a, 1000))
    funnel = next(target for target in synthetic() if target.name == "funnel_10")
    assert funnel.draw_exactly is not None
    found["funnel, 10 dimensions"] = (funnel.model, (), lambda f=funnel: f.draw_exactly(100_000))
    return found


def moments(draws: Draws, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of all entries, laid side by side."""
    columns = torch.cat([value.reshape(len(value), -1).double() for value in draws.values()], 1)
    weights = torch.full((len(columns),), 1 / len(columns)).double() if weights is None else weights
    mean = weights @ columns
    return mean, (weights @ (columns - mean).square()).sqrt()


def error(draws: Draws, reference: Draws, weights: Tensor | None = None) -> str:
    """Largest error of a mean, in posterior sds, and of a log sd."""
    mean, sd = moments({name: draws[name] for name in reference}, weights)
    true_mean, true_sd = moments(reference)
    return f"{((mean - true_mean) / true_sd).abs().max():.2f}, {(sd / true_sd).log().abs().max():.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="budget of each fit")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "trust")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print("| posterior | steps | ELBO | k-hat (good below) | ESS % | error of mean, log sd: raw | after PSIS |")
    print("|---|---|---|---|---|---|---|")
    for name, (model, args, make_reference) in cases().items():
        pyro.clear_param_store()
        guide = AutoRealNVP(model)
        fit = fit_guide(model, guide, args, seconds=options.seconds, seed=0, progress=False)
        result = psis(model, guide, *args, num_draws=10_000, seed=1, progress=False)
        reference = make_reference()
        weights = result.smoothed_log_weights.exp()
        cells = [name, fit.num_steps, f"{result.elbo:.2f}", f"{result.khat:.2f} ({result.threshold:.2f})"]
        cells += [f"{100 * result.ess / result.num_draws:.0f}", error(result.draws, reference)]
        print(f"| {' | '.join(map(str, [*cells, error(result.draws, reference, weights)]))} |", flush=True)
        slug = name.split(",")[0].replace(" ", "_")
        plot_pairs(result.resample(4000, seed=2), reference, path=options.output / f"{slug}_pairs.png")
        plot_weights(result, path=options.output / f"{slug}_weights.png")
    print(f"pictures: {options.output}")


if __name__ == "__main__":
    main()
