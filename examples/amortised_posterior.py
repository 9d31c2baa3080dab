"""Amortised inference: train once on simulated epidemics, then the posterior of any epidemic costs one pass.

    python examples/amortised_posterior.py            about a minute on two cores
    python examples/amortised_posterior.py --smoke    seconds, to see that it runs

Data: boys in bed with influenza on 14 days at an English boarding school of 763 (British Medical Journal, 1978).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_affine import NeuralPosterior, expected_coverage, fit_posterior, plot_sbc, sbc_ranks

IN_BED = torch.tensor([3.0, 8.0, 26.0, 76.0, 225.0, 298.0, 258.0, 233.0, 189.0, 128.0, 68.0, 29.0, 14.0, 4.0])
NUM_BOYS, NUM_DAYS, STEPS_A_DAY = 763.0, len(IN_BED), 10


def number_ill(infection: Tensor, recovery: Tensor) -> Tensor:
    """Expected number of ill boys each day, starting from one. Rates: batch, a day; result: batch + (days,)."""
    susceptible, ill = NUM_BOYS - torch.ones_like(infection), torch.ones_like(infection)
    days = []
    for _ in range(NUM_DAYS):
        for _ in range(STEPS_A_DAY):
            infected = susceptible * -torch.expm1(-infection * ill / NUM_BOYS / STEPS_A_DAY)
            recovered = ill * -torch.expm1(-recovery / STEPS_A_DAY)
            susceptible, ill = susceptible - infected, ill + infected - recovered
        days.append(ill)
    return torch.stack(days, -1)


def model() -> None:
    # Written so that the rates may have any batch shape: then thousands of simulations run at once.
    infection = pyro.sample("infection", dist.LogNormal(math.log(1.5), 0.5))
    recovery = pyro.sample("recovery", dist.LogNormal(math.log(0.5), 0.5))
    excess = pyro.sample("excess", dist.LogNormal(math.log(0.05), 1.0))
    # Counts with variance mean + excess * mean^2: Poisson where excess is 0.
    concentration = 1 / excess[..., None]
    mean = number_ill(infection, recovery) + 1e-3
    pyro.sample("in_bed", dist.GammaPoisson(concentration, concentration / mean).to_event(1))


def picture(draws: dict[str, Tensor], weighted: dict[str, Tensor], path: Path) -> None:
    """Posterior predictions and the data; the posterior with and without weights."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    mean = number_ill(weighted["infection"], weighted["recovery"])
    concentration = 1 / weighted["excess"][:, None]
    counts = dist.GammaPoisson(concentration, concentration / (mean + 1e-3)).sample()
    days = torch.arange(1, NUM_DAYS + 1)
    left.fill_between(days, *torch.quantile(counts, torch.tensor([0.05, 0.95]), 0), alpha=0.25, label="90 % of counts")
    left.plot(days, mean.median(0).values, color="tab:blue", label="expected (median)")
    left.plot(days, IN_BED, "ko", label="boys in bed")
    left.set(xlabel="day", ylabel="boys", title="data and prediction")
    left.legend()
    for label, colour, values in (("one pass of the flow", "tab:blue", draws), ("PSIS", "tab:orange", weighted)):
        reproduction = values["infection"] / values["recovery"]
        right.hist(reproduction, bins=60, range=(2, 6), density=True, histtype="step", lw=2, color=colour, label=label)
    right.set(xlabel="boys infected by the first one: infection / recovery", yticks=[], title="posterior")
    right.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of a minute")
    parser.add_argument("--output", type=Path, default=Path("output/amortised_posterior"), help="folder for the files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    num_simulations, num_steps, num_datasets = (500, 50, 50) if options.smoke else (20_000, 4000, 500)

    # 1. Train on simulated epidemics. The site named in `observed` is drawn, the others are learned.
    # A summary network of yours sees the data at unit scale, and is trained with the rest.
    torch.manual_seed(0)
    summary = nn.Sequential(nn.Linear(NUM_DAYS, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10))
    npe = NeuralPosterior(model, observed=["in_bed"], summary=summary)
    fit = fit_posterior(npe, num_simulations=num_simulations, num_steps=num_steps, seed=0)
    print(fit)

    # 2. Is it right on average? On new epidemics with known rates, their ranks among the draws must be uniform.
    ranks = sbc_ranks(npe, num_datasets, seed=1)
    print("ranks:   ", ranks)
    print("regions: ", expected_coverage(npe, num_datasets, seed=2))
    plot_sbc(ranks, options.output / "calibration.png")

    # 3. The real epidemic: one pass.
    start = time.perf_counter()
    posterior = npe.condition({"in_bed": IN_BED})
    draws = posterior.sample(4000, seed=3)
    print(f"4000 draws in {1000 * (time.perf_counter() - start):.0f} ms")

    # 4. Is it right here? The model has a likelihood, so the draws can be weighted, which corrects the rest.
    result = posterior.psis(4000, seed=4)
    print(result)
    for name in npe.simulator.latents:
        plain, exact = draws[name], (float(result.mean(name)), float(result.sd(name)))
        print(f"{name:10s} {plain.mean():.3f} +- {plain.std():.3f}, weighted {exact[0]:.3f} +- {exact[1]:.3f}")

    # 5. Another epidemic, or a thousand, needs no new training.
    start = time.perf_counter()
    many = npe.simulate(1000, progress=False)
    shape = tuple(npe.condition(many.data).sample(100)["infection"].shape)
    print(f"1000 more epidemics, simulated and solved in {time.perf_counter() - start:.2f} s: draws of shape {shape}")

    picture(draws, result.resample(4000, seed=5), options.output / "posterior.png")
    print(f"written: {', '.join(str(path.resolve()) for path in sorted(options.output.iterdir()))}")


if __name__ == "__main__":
    main()
