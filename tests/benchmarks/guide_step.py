"""What one training step of a guide costs: ours by each gradient, Pyro's coupling guide, and the full-rank Gaussian.

Run by ``make bench-step``. The eight schools (10 latents), 64 draws, guides of 8 couplings of 2x32, float64, one
thread. All take turns, step by step; printed are medians of its CPU time, and medians of the ratio to
AutoMultivariateNormal in the same round. A step is the loss, its gradient and Adam's update: ours as ``fit_guide``
takes it and as stock ``SVI`` does, Pyro's by ``Trace_ELBO`` with vectorised particles.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from methods import PEERS
from pyro.infer import Trace_ELBO
from pyro.nn import DenseNN
from torch import nn

from pyro_affine import AutoRealNVP
from pyro_affine.guide_task import GuideTask
from pyro_affine.particles import Pair

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import eight_schools

_ARGS = (eight_schools.EFFECTS.double(), eight_schools.ERRORS.double())
_DRAWS, _LAYERS, _HIDDEN = 64, 8, [32, 32]

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="steps of each (default 300)")
    parser.add_argument("--compile", action="store_true", help="also guides that torch.compile has compiled (minutes)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    steps = make_steps(with_compiled=arguments.compile)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(arguments.rounds + 20):
        for name, step in steps.items():
            start = time.thread_time()
            step()
            if number >= 20:
                times[name].append(time.thread_time() - start)
    bound = times["AutoMultivariateNormal, Trace_ELBO"]
    print("| step | ms | times AutoMultivariateNormal |\n|---|---|---|")
    for name, found in times.items():
        ratio = statistics.median(one / other for one, other in zip(found, bound, strict=True))
        print(f"| {name} | {1e3 * statistics.median(found):.2f} | {ratio:.2f} |")


def make_steps(*, with_compiled: bool = False) -> dict[str, Step]:
    """A step of each guide, by name."""
    found = {}
    for gradient in ("path", "total"):
        found[f"AutoRealNVP, {gradient} gradient, fit_guide"] = _ours(gradient, direct=True)
        found[f"AutoRealNVP, {gradient} gradient, fit_guide(compile_model=True)"] = _ours(gradient, compile_model=True)
        if with_compiled:
            both = _ours(gradient, compile_model=True, compile=True)
            found[f"AutoRealNVP, {gradient} gradient, fit_guide(compile_model=True, compile=True)"] = both
        found[f"AutoRealNVP, {gradient} gradient, Trace_ELBO"] = _ours(gradient, direct=False)
    found["Pyro's coupling guide (flips by hand), Trace_ELBO"] = _peer(
        PEERS["coupling-flipped"].make, _use_our_networks
    )
    found["AutoMultivariateNormal, Trace_ELBO"] = _peer(PEERS["AutoMultivariateNormal"].make)
    return found


def _ours(gradient: Any, *, direct: bool = True, compile_model: bool = False, compile: bool = False) -> Step:
    guide = AutoRealNVP(eight_schools.model, gradient=gradient, num_layers=_LAYERS, hidden_dims=_HIDDEN)
    if not direct:
        return _traced(guide)
    pair = Pair(eight_schools.model, guide, _ARGS)
    pair.prototype()
    task = GuideTask(pair, _DRAWS, nesting=1)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    task.use_direct_loss(parameters, compile_model=compile_model, compile=compile)
    return partial(_step, task.loss, torch.optim.Adam(parameters, lr=1e-4, fused=True))


def _peer(make: Callable[[Any], Any], edit: Callable[[Any], None] | None = None) -> Step:
    pyro.clear_param_store()
    guide = make(eight_schools.model)
    guide(*_ARGS)
    if edit:
        edit(guide)
    return _traced(guide)


def _use_our_networks(guide: Any) -> None:
    """Networks of the same size in Pyro's couplings, whose default is one layer of 10 units for each latent."""
    for part in guide.transform.parts:
        if isinstance(getattr(part, "nn", None), nn.Module):
            kept = part.split_dim
            part.nn = DenseNN(kept, _HIDDEN, [guide.latent_dim - kept] * 2)


def _traced(guide: Any) -> Step:
    guide(*_ARGS)
    elbo = Trace_ELBO(_DRAWS, vectorize_particles=True, max_plate_nesting=1)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    loss = partial(elbo.differentiable_loss, eight_schools.model, guide, *_ARGS)
    return partial(_step, loss, torch.optim.Adam(parameters, lr=1e-4, fused=True))


def _step(loss: Callable[[], Any], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


if __name__ == "__main__":
    main()
