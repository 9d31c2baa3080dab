"""A hierarchical regression with 63 latents on real data: fitted by a flow guide, judged, exported to ArviZ.

    python examples/hierarchical_regression.py            about two minutes on two cores
    python examples/hierarchical_regression.py --smoke    seconds, to see that it runs

Data: progression of diabetes within a year in 442 patients (a score from 25 to 346), their body mass index, and the
logarithm of their triglycerides (Efron et al., 2004; it comes with scikit-learn). Patients are grouped by the last, in
bands of 0.1. Each band has its own line, score against body mass, and the lines come from a common population:
bands with few patients borrow strength from the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import arviz as az
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor

from pyro_affine import AutoRealNVP, fit_guide, psis, to_arviz


def patients() -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Band of each patient, body mass in standard deviations, score in hundreds; names of the bands."""
    table, target = load_diabetes(return_X_y=True, as_frame=True, scaled=False)
    tenths = torch.tensor(table["s5"].to_numpy() * 10).floor().long()
    bands, band = tenths.unique(return_inverse=True)
    mass = torch.tensor(table["bmi"].to_numpy()).float()
    score = torch.tensor(target.to_numpy()).float() / 100
    return band, (mass - mass.mean()) / mass.std(), score, [f"{number / 10:.1f}" for number in bands.tolist()]


def model(band: Tensor, mass: Tensor, score: Tensor) -> None:
    # The centred form: the lines scatter around their population, whose spread is unknown.
    level_mean = pyro.sample("level_mean", dist.Normal(1.5, 0.5))
    slope_mean = pyro.sample("slope_mean", dist.Normal(0.0, 0.5))
    level_sd = pyro.sample("level_sd", dist.HalfNormal(0.5))
    slope_sd = pyro.sample("slope_sd", dist.HalfNormal(0.25))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("band", int(band.max()) + 1):
        level = pyro.sample("level", dist.Normal(level_mean, level_sd))
        slope = pyro.sample("slope", dist.Normal(slope_mean, slope_sd))
    with pyro.plate("patient", len(score)):
        # `[..., band]` rather than `[band]`: then many draws of the guide can be scored at once.
        mean = level[..., band] + slope[..., band] * mass
        pyro.sample("score", dist.Normal(mean, noise), obs=score)


def alone(band: Tensor, mass: Tensor, score: Tensor) -> Tensor:
    """Least squares in each band alone: level and slope. Shape: (bands, 2); NaN for fewer than three patients."""
    lines = []
    for index in range(int(band.max()) + 1):
        x, y = mass[band == index], score[band == index]
        design = torch.stack([torch.ones_like(x), x], -1)
        lines.append(torch.linalg.lstsq(design, y).solution if len(x) > 2 else torch.full((2,), torch.nan))
    return torch.stack(lines)


def picture(draws: dict[str, Tensor], separate: Tensor, sizes: Tensor, names: list[str], path: Path) -> None:
    """Shrinkage of bands towards the population: least squares of each alone, and the posterior."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(11, 6.5), sharex=True, layout="constrained")
    x = torch.arange(len(names))
    units = {"level": "score at mean body mass", "slope": "score for one sd of body mass"}
    for ax, (site, unit), own in zip(axes, units.items(), 100 * separate.T, strict=True):
        low, middle, high = torch.quantile(100 * draws[site], torch.tensor([0.05, 0.5, 0.95]), 0)
        ax.axhline(100 * draws[f"{site}_mean"].mean(), color="0.6", lw=1, label="population")
        ax.scatter(x, own, s=4 * sizes, facecolors="none", edgecolors="tab:orange", label="band alone (area: patients)")
        ax.errorbar(x, middle, torch.stack([middle - low, high - middle]), fmt="o", ms=4, label="posterior, 90 %")
        span = float((high - low).max())
        ax.set(ylabel=unit, ylim=(float(low.min()) - span, float(high.max()) + span))
    axes[0].legend(loc="upper left")
    axes[1].set_xlabel("log triglycerides, lower end of the band; patients")
    axes[1].set_xticks(x, [f"{name}\n{size}" for name, size in zip(names, sizes.tolist(), strict=True)], fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--output", type=Path, default=Path("output/hierarchical_regression"), help="folder")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    band, mass, score, names = patients()
    data = (band, mass, score)
    guide = AutoRealNVP(model)
    fit = fit_guide(model, guide, data, num_steps=20 if options.smoke else 2000, seed=0)
    print(f"{guide.latent_dim} latents, {len(names)} bands, {len(score)} patients")
    print(fit)

    # The verdict comes before the numbers: a fit can end well and still be a bad posterior.
    result = psis(model, guide, *data, num_draws=500 if options.smoke else 10_000, seed=1)
    print(result)

    # One file with draws, log-likelihoods and names, for ArviZ; here a table of the population.
    posterior = to_arviz(model, result, *data, coords={"band": names})
    posterior.to_netcdf(str(options.output / "posterior.nc"))
    population = ["level_mean", "slope_mean", "level_sd", "slope_sd", "noise"]
    print(az.summary(posterior, var_names=population, kind="stats", round_to=3))

    separate, sizes = alone(*data), torch.bincount(band)
    draws = result.resample(4000, seed=2)
    small = torch.isfinite(separate[:, 1]) & (sizes <= 8)
    for site, own in zip(("level", "slope"), 100 * separate.T, strict=True):
        pooled = 100 * draws[site].mean(0)
        print(f"sd of the {site}s of {int(small.sum())} small bands: alone {own[small].std():.1f}", end=", ")
        print(f"together {pooled[small].std():.1f} points")
    picture(draws, separate, sizes, names, options.output / "shrinkage.png")
    print(f"written: {', '.join(str(path.resolve()) for path in sorted(options.output.iterdir()))}")


if __name__ == "__main__":
    main()
