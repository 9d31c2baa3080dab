"""Eight schools: a flow guide in one line, fitted, judged by PSIS, compared with NUTS, exported to ArviZ.

    python examples/eight_schools.py            about two minutes on two cores
    python examples/eight_schools.py --smoke    seconds, to see that it runs

Data: effects of coaching on test scores in eight schools (Rubin, 1981). The model is centred, the form whose
posterior is a funnel: a Gaussian guide cannot follow it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import arviz as az
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

from pyro_affine import AutoRealNVP, fit_guide, psis, to_arviz

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(effects: torch.Tensor, errors: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effects)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, errors), obs=effects)


def run_nuts(num_samples: int) -> dict[str, torch.Tensor]:
    """Reference draws. NUTS cannot follow the centred funnel, so it samples theta = mu + tau * z."""

    def non_centred() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(EFFECTS)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("effect", dist.Normal(mu + tau * z, ERRORS), obs=EFFECTS)

    mcmc = MCMC(NUTS(non_centred), num_samples=num_samples, warmup_steps=num_samples // 2)
    mcmc.run()
    draws = mcmc.get_samples()
    draws["theta"] = draws["mu"][:, None] + draws["tau"][:, None] * draws.pop("z")
    return draws


def picture(flow: dict[str, torch.Tensor], nuts: dict[str, torch.Tensor], path: Path) -> None:
    """The funnel, log tau against the first school's effect, and three marginal posteriors."""
    import matplotlib.pyplot as plt

    figure, (left, *others) = plt.subplots(1, 4, figsize=(14, 3.6), width_ratios=[1.5, 1, 1, 1])
    colours = {"NUTS": ("tab:gray", nuts), "AutoRealNVP + PSIS": ("tab:blue", flow)}
    for label, (colour, draws) in colours.items():
        left.plot(draws["theta"][:2000, 0], draws["tau"][:2000].log(), ".", color=colour, alpha=0.35, label=label, ms=3)
    left.set(xlabel="effect of school A (points)", ylabel="log tau", title="the funnel")
    left.legend(loc="lower right", markerscale=3)
    quantities = {
        "mu (points)": lambda d: d["mu"],
        "tau (points)": lambda d: d["tau"],
        "school A (points)": lambda d: d["theta"][:, 0],
    }
    for axes, (name, pick) in zip(others, quantities.items(), strict=True):
        low, high = torch.quantile(pick(nuts), torch.tensor([0.002, 0.99])).tolist()
        for label, (colour, draws) in colours.items():
            axes.hist(
                pick(draws), bins=40, range=(low, high), density=True, histtype="step", lw=2, color=colour, label=label
            )
        axes.set(xlabel=name, yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--output", type=Path, default=Path("output/eight_schools"), help="folder for the files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    guide = AutoRealNVP(model)
    fit = fit_guide(model, guide, (EFFECTS, ERRORS), num_steps=100 if options.smoke else 3000, seed=0)
    print(fit)

    result = psis(model, guide, EFFECTS, ERRORS, num_draws=500 if options.smoke else 4000, seed=1)
    print(result)

    posterior = to_arviz(model, result, EFFECTS, ERRORS, coords={"school": list("ABCDEFGH")})
    print(az.summary(posterior, kind="stats"))

    nuts = run_nuts(50 if options.smoke else 2000)
    print(f"{'':8s} {'flow mean':>10s} {'NUTS mean':>10s} {'flow sd':>8s} {'NUTS sd':>8s}")
    flow = result.resample(4000, seed=2)
    for name in ("mu", "tau"):
        a, b = flow[name], nuts[name]
        print(f"{name:8s} {a.mean():10.2f} {b.mean():10.2f} {a.std():8.2f} {b.std():8.2f}")

    picture(flow, nuts, options.output / "posterior.png")
    posterior.to_netcdf(str(options.output / "posterior.nc"))
    fit.plot(options.output / "fit.png")
    print(f"written: {', '.join(str(path.resolve()) for path in sorted(options.output.iterdir()))}")


if __name__ == "__main__":
    main()
