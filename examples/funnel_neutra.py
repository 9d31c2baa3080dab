"""Neal's funnel: a flow guide, the verdict of PSIS on it, NUTS in its space (NeuTra), and plain NUTS.

    python examples/funnel_neutra.py            some minutes on two cores
    python examples/funnel_neutra.py --smoke    seconds, to see that it runs

The scale of nine latents is itself a latent, exp(v / 2), so that the density is a funnel: wide at the top, with a neck
whose width shrinks by a factor e for each two units of v. No step size suits both ends. Here the truth is known:
v ~ N(0, 3).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import arviz as az
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_affine import AutoRealNVP, fit_guide, neutra, psis
from pyro_affine.inference_data import inference_data


def model() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("entries", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def plain_nuts(num_samples: int, num_warmup: int, num_chains: int) -> dict[str, Tensor]:
    """Draws of plain NUTS. Shape: (chains, draws) + shape of the site."""
    chains = []
    for seed in range(num_chains):
        pyro.set_rng_seed(seed)
        mcmc = MCMC(NUTS(model, jit_compile=True, ignore_jit_warnings=True), num_samples, num_warmup)
        mcmc.run()
        chains.append(mcmc.get_samples())
    return {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}


def report(name: str, draws: dict[str, Tensor], seconds: float) -> None:
    """R-hat and ESS over all entries, the worst of them, and the spread of v, of which 3.00 is right."""
    posterior = inference_data({"posterior": {site: value.numpy() for site, value in draws.items()}})["posterior"]
    data = getattr(posterior, "dataset", posterior)  # ArviZ 1 wraps it in a DataTree
    rhat = max(float(value.max()) for value in az.rhat(data).data_vars.values())
    ess = min(float(az.ess(data, method=kind)[site].min()) for kind in ("bulk", "tail") for site in draws)
    v = draws["v"].flatten()
    print(f"{name:12s} R-hat {rhat:.3f}, ESS {ess:6.0f}, {ess / seconds:6.1f} a second,", end=" ")
    print(f"mean of v {v.mean():5.2f}, sd {v.std():.2f}, share below -5: {(v < -5).float().mean():.3f}")


def picture(panels: dict[str, dict[str, Tensor]], path: Path) -> None:
    """v against the first x: the draws must fill the funnel down to its neck."""
    import matplotlib.pyplot as plt

    size = {"figsize": (4 * len(panels), 4.3), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(panels), sharex=True, sharey=True, **size)
    v = torch.linspace(-10, 9, 100)
    for ax, (title, draws) in zip(axes, panels.items(), strict=True):
        first, scale = draws["x"][..., 0].flatten(), draws["v"].flatten()
        chosen = torch.randperm(len(scale), generator=torch.Generator().manual_seed(0))[:1500]
        ax.fill_betweenx(v, -2 * (v / 2).exp(), 2 * (v / 2).exp(), color="0.9", label="95 % of x at each v")
        ax.plot(first[chosen], scale[chosen], ".", ms=3, alpha=0.5)
        ax.axhline(-6, color="0.5", lw=0.8, ls="--", label="2.3 % of v are below")
        ax.set(title=title, xlabel="x[0]", xlim=(-30, 30), ylim=(-10, 9))
    axes[0].set(ylabel="v")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--output", type=Path, default=Path("output/funnel_neutra"), help="folder for the files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    num_samples, num_warmup, num_chains = (10, 10, 2) if options.smoke else (400, 200, 4)

    # 1. The guide alone. PSIS says how far it can be trusted.
    start = time.perf_counter()
    guide = AutoRealNVP(model)
    print(fit_guide(model, guide, num_steps=20 if options.smoke else 3000, seed=0))
    result = psis(model, guide, num_draws=500 if options.smoke else 10_000, seed=1)
    print(result)

    # 2. NUTS in the space of the guide, which corrects its errors. Time includes the fit.
    # The neck needs short steps: at the default target_accept, 0.8, one draw of 1600 diverged, as the verdict said.
    size = {"num_samples": num_samples, "num_warmup": num_warmup, "num_chains": num_chains}
    bent = neutra(model, guide, **size, target_accept=0.95, seed=2)
    seconds = time.perf_counter() - start
    print(bent.verdict)
    print("exact:       mean of v  0.00, sd 3.00, share below -5: 0.048")
    report("NeuTra", bent.draws, seconds)

    # 3. NUTS in the space of the model.
    start = time.perf_counter()
    plain = plain_nuts(num_samples, num_warmup, num_chains)
    report("plain NUTS", plain, time.perf_counter() - start)

    panels = {"flow guide": result.draws, "NeuTra: NUTS through the guide": bent.draws, "plain NUTS": plain}
    picture(panels, options.output / "funnel.png")
    bent.data.to_netcdf(str(options.output / "neutra.nc"))
    print(f"written: {', '.join(str(path.resolve()) for path in sorted(options.output.iterdir()))}")


if __name__ == "__main__":
    main()
