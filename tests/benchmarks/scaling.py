"""How many rows and draws a second one process trains on, and how many two do.

Run by ``make bench-scaling``; it needs as many idle cores as the largest number of processes. A density of 16 columns
(8 couplings of 2x128, 4096 rows a step in all) and a guide of a logistic regression (21 latents, 2000 rows; 256 and
4096 draws a step in all). Each process has one thread, as ``torchrun`` sets it; one process with as many threads as
there are processes stands beside them. Printed are rows or draws a second by the median time of a step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch

from pyro_affine import AutoRealNVP, FitResult, NormalizingFlow, fit_density, fit_guide, real_nvp

_COLUMNS, _BATCH = 16, 4096
_SETTLED = 5  # steps that are not timed


def density_rate(num_steps: int) -> float:
    """Rows a second of ``fit_density``."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20 * _BATCH, _COLUMNS, generator=generator)
    rows[:, 1:] += rows[:, :-1].square()
    flow = NormalizingFlow(real_nvp(_COLUMNS, num_layers=8, hidden_dims=(128, 128)), _COLUMNS, curves=0)
    fit = fit_density(
        flow, rows, validation=rows[:2], batch_size=_BATCH, num_steps=num_steps, patience=10**6, seed=0, progress=False
    )
    return _BATCH / _step_seconds(fit)


def guide_rate(num_steps: int, num_particles: int) -> float:
    """Draws a second of ``fit_guide``."""
    generator = torch.Generator().manual_seed(0)
    design = torch.randn(2000, 20, generator=generator)
    outcomes = (design.sum(1) + torch.randn(2000, generator=generator) > 0).float()

    def model() -> None:
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        logits = slopes @ design.T + bias.unsqueeze(-1)
        pyro.sample("outcome", dist.Bernoulli(logits=logits).to_event(1), obs=outcomes)

    call = {"num_steps": num_steps, "num_particles": num_particles, "tolerance": None, "seed": 0, "progress": False}
    fit = fit_guide(model, AutoRealNVP(model), **call)
    return num_particles / _step_seconds(fit)


def _step_seconds(fit: FitResult) -> float:
    return statistics.median(later - sooner for sooner, later in itertools.pairwise(fit.times[_SETTLED:]))


WORK: dict[str, Callable[[int], float]] = {
    "fit_density, rows a second": density_rate,
    "fit_guide, 256 draws a step, draws a second": lambda num_steps: guide_rate(num_steps, 256),
    "fit_guide, 4096 draws a step, draws a second": lambda num_steps: guide_rate(num_steps, 4096),
}


def measure(num_processes: int, num_threads: int, num_steps: int) -> dict[str, float]:
    """The rates with so many processes, from a run of their own."""
    launch = [sys.executable]
    if num_processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command = [*launch, __file__, "--worker", "--steps", str(num_steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rates: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="steps of each fit (default 60)")
    parser.add_argument("--processes", type=int, default=2, help="the largest number of processes (default 2)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        rates = {name: work(options.steps) for name, work in WORK.items()}
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(rates))
        return
    many = options.processes
    layouts = {
        "1 process": (1, 1),
        f"1 process, {many} threads": (1, many),
        **{f"{size} processes": (size, 1) for size in range(2, many + 1)},
    }
    found = {name: measure(*layout, options.steps) for name, layout in layouts.items()}
    print(f"| | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for name in WORK:
        one = found["1 process"][name]
        cells = [f"{rates[name]:.0f} ({rates[name] / one:.2f})" for rates in found.values()]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
