"""Is the verdict right? Three fits judged by PSIS, beside the truth: long NUTS runs, or exact draws for the funnel.

Run by ``make bench-trust``. The eight schools (centred, with plates), growth of rats (65 latents, plates, read from
beside the repository, left out where missing), and a funnel in ten dimensions. Prints a table for the docs and draws
pair plots.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from guide_run import all_targets
from samplers import draw_chain
from scoring import errors
from synthetic import synthetic
from targets import Draws, Target, fresh_start
from torch import Tensor

from pyro_affine import AutoRealNVP, fit_guide, psis
from pyro_affine.plots import plot_pairs, plot_weights

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import eight_schools  # noqa: E402

_SCHOOLS = (eight_schools.EFFECTS.double(), eight_schools.ERRORS.double())
_CHAINS, _WARMUP, _SAMPLES = 4, 1000, 2500


def non_centred_schools() -> None:
    """The eight schools in the form that NUTS can follow."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mu + tau * z, _SCHOOLS[1]), obs=_SCHOOLS[0])


def nuts(target: Target) -> tuple[Draws, float]:
    """Draws of four chains of NUTS, one after the other, and the seconds they took."""
    start = time.perf_counter()
    chains = [
        draw_chain(target, target.load_args(), (_SAMPLES, _WARMUP), seed=seed, limit=3600.0)[0]
        for seed in range(_CHAINS)
    ]
    draws = {name: torch.cat([chain[name] for chain in chains]) for name in chains[0]}
    return target.from_chains(draws), time.perf_counter() - start


def _centred(draws: Draws) -> Draws:
    theta = draws["mu"][:, None] + draws["tau"][:, None] * draws["z"]
    return {"mu": draws["mu"], "tau": draws["tau"], "theta": theta}


def cases() -> dict[str, tuple[Target, Target | None]]:
    """The target of each case, and the one that NUTS runs on; None where there are exact draws."""
    schools = Target("schools", "posterior", eight_schools.model, "funnel", load_args=lambda: _SCHOOLS)
    followed = Target("schools, non-centred", "posterior", non_centred_schools, "", from_chains=_centred)
    found: dict[str, tuple[Target, Target | None]] = {"eight schools, centred": (schools, followed)}
    targets = all_targets()
    if "rats" in targets:
        found["rats, 65 latents"] = (targets["rats"], targets["rats"])
    else:
        print("Left out: the rats, whose data are read from beside the repository", file=sys.stderr)
    (funnel,) = (target for target in synthetic() if target.name == "funnel_10")
    return found | {"funnel, 10 dimensions": (replace(funnel, heavy=True), None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="budget of each fit")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "trust")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    print(
        "| posterior | seconds | ELBO | k-hat (good below) | ESS % | error of mean, log sd: raw | after PSIS | NUTS |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (target, followed) in cases().items():
        fresh_start(0, torch.float64)
        args, start = target.load_args(), time.perf_counter()
        guide = AutoRealNVP(target.model)
        fit_guide(target.model, guide, args, seconds=options.seconds, seed=0, progress=False)
        seconds = time.perf_counter() - start
        result = psis(target.model, guide, *args, num_draws=10_000, seed=1, progress=False)
        reference, nuts_seconds = (target.reference() or {}, 0.0) if followed is None else nuts(followed)
        weights = [torch.full((10_000,), 1e-4, dtype=torch.float64), result.smoothed_log_weights.exp()]
        found = [_error(target, args, result.draws, reference, each) for each in weights]
        cells = [name, f"{seconds:.0f}", f"{result.elbo:.2f}", f"{result.khat:.2f} ({result.threshold:.2f})"]
        cells += [f"{100 * result.ess / result.num_draws:.0f}", *found]
        print(f"| {' | '.join([*cells, f'{nuts_seconds:.0f} s' if nuts_seconds else 'exact draws'])} |", flush=True)
        print(f"  {result.verdict}", file=sys.stderr)
        slug = name.split(",")[0].replace(" ", "_")
        plot_pairs(result.resample(4000, seed=2), reference, path=options.output / f"{slug}_pairs.png")
        plot_weights(result, path=options.output / f"{slug}_weights.png")
    print(f"pictures: {options.output}")


def _error(target: Target, args: tuple[Any, ...], draws: Draws, reference: Draws, weights: Tensor) -> str:
    """Largest error of a mean and of a log sd, in posterior sds, constrained or not; quantiles for the funnel."""
    found = errors(draws, weights, reference, target.supports(args), heavy=target.heavy)
    return f"{found['mean']:.2f}, {found['sd']:.2f}"


if __name__ == "__main__":
    main()
