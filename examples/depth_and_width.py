"""How deep, how wide: what one coupling can do, and what depth and width gain at equal numbers of weights.

    python examples/depth_and_width.py            about ten minutes on one core
    python examples/depth_and_width.py --smoke    seconds, to see that it runs

Couplings are stacked by hand, without what the package adds by default (curves, whitening, a warm start); the last rows
add it back. docs/expressiveness.md shows the results and what follows from them.

The targets are in examples/targets/small.py: a table of real data, and four whose truth is known.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from targets import small
from torch import Tensor, nn

from pyro_affine import (
    MLP,
    AdditiveScale,
    AffineCoupling,
    AtanScale,
    AutoRealNVP,
    ComposeFlow,
    LowerTriangularAffine,
    NormalizingFlow,
    PathGradientDistribution,
    Permutation,
    ScaleMap,
    fit_density,
    fit_guide,
    half_mask,
    psis,
    real_nvp,
)

NUM_WEIGHTS = {"moons": 8000, "magic": 40_000, "digits": 4000, "banana": 8000, "ring": 8000, "eight schools": 12_600}
WIDE = AtanScale(4.0, 4.0)  # scales of 0.02 to 55 a layer: no bound that a shallow stack would run into


# Stacks


def couplings(size: int, depth: int, width: int, scale: ScaleMap = WIDE) -> ComposeFlow:
    """As in ``real_nvp``: they keep first one half, then the other, and are reordered after each pair.

    With a depth of 0: an affine map, which makes a Gaussian.
    """
    if depth == 0:
        return ComposeFlow([LowerTriangularAffine(torch.zeros(size), 1.0)])
    generator = torch.Generator().manual_seed(0)
    mask, layers = half_mask(size), []
    for index in range(depth):
        num_kept = int(mask.sum())
        network = MLP(num_kept, size - num_kept, (width, width), shift_only=not scale.uses_raw)
        layers.append(AffineCoupling(mask, network, scale))
        mask = ~mask
        if index % 2 == 1 and size > 2 and index + 1 < depth:
            layers.append(Permutation(torch.randperm(size, generator=generator)))
    return ComposeFlow(layers)


def count(module: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in module.parameters())


def width_for(size: int, depth: int, num_weights: int, scale: ScaleMap = WIDE) -> int:
    """Width of both hidden layers with which a stack comes closest to a number of weights."""
    return depth and min(
        range(2, 300), key=lambda width: abs(count(couplings(size, 1, width, scale)) * depth - num_weights)
    )


class StackGuide(AutoContinuous):
    """The smallest flow guide: a stack on a standard normal, followed by a trained affine map if wanted."""

    def __init__(self, model: Callable[[], None], size: int, stack: ComposeFlow, linear: bool) -> None:
        super().__init__(model)
        self.size = size
        self.flow = ComposeFlow([stack, LowerTriangularAffine(torch.zeros(size), 1.0)]) if linear else stack

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        return PathGradientDistribution(dist.Normal(torch.zeros(self.size), 1.0).to_event(1), [self.flow])


# Targets. Each can put a stack to use, train it, and say how many nats it is off.


@dataclass
class Density:
    """Rows to train on, rows to test, and the true log-densities of the latter where they are known."""

    rows: Tensor
    test: Tensor
    truth: Tensor | None = None

    @property
    def size(self) -> int:
        return self.rows.shape[-1]

    def use(self, stack: ComposeFlow, **options: Any) -> NormalizingFlow:
        return NormalizingFlow(stack, self.size, **{"curves": 0, "whiten": False, **options})

    def train(self, flow: NormalizingFlow, num_steps: int, seed: int) -> None:
        fit_density(flow, self.rows, num_steps=num_steps, patience=1000, seed=seed, progress=False)

    @torch.no_grad()
    def nats(self, flow: NormalizingFlow) -> float:
        """How far test rows are below the truth: KL(truth, flow). Where that is unknown, their negative log-density."""
        return float(((0.0 if self.truth is None else self.truth) - flow.log_prob(self.test)).mean())


@dataclass
class Posterior:
    """A model, its number of latents, and its log evidence in nats."""

    model: Callable[[], None]
    size: int
    evidence: float

    def use(self, stack: ComposeFlow, linear: bool = True) -> StackGuide:
        return StackGuide(self.model, self.size, stack, linear)

    def train(self, guide: AutoContinuous, num_steps: int, seed: int) -> None:
        pyro.clear_param_store()
        options = {"num_particles": 64, "tolerance": None, "progress": False}
        fit_guide(self.model, guide, num_steps=num_steps, seed=seed, **options)

    def nats(self, guide: AutoContinuous) -> float:
        """How far the ELBO is below the evidence: KL(guide, posterior)."""
        return self.evidence - psis(self.model, guide, num_draws=10_000, seed=0, progress=False).elbo


# The study


@dataclass
class Row:
    """One kind of fit, how it is made, and what comes of it for each seed."""

    target: str
    kind: str
    depth: int
    width: int
    make: Callable[[], Any]
    num_weights: int = 0
    cost: float = 0.0  # milliseconds of processor time a step, with the scores of held-out rows
    nats: list[float] = field(default_factory=list)
    fitted: list[Any] = field(default_factory=list)

    @property
    def middle(self) -> float:
        return (max(self.nats) + min(self.nats)) / 2

    def run(self, target: Any, num_steps: int, num_seeds: int) -> None:
        for seed in range(num_seeds):
            torch.manual_seed(seed)
            flow = self.make()
            start = time.process_time()
            target.train(flow, num_steps, seed)
            self.cost += 1000 * (time.process_time() - start) / num_steps / num_seeds
            self.nats.append(target.nats(flow))
            self.fitted.append(flow)
        self.num_weights = count(flow)

    def __str__(self) -> str:
        """A line of the table."""
        off = f"{self.middle:.3f} ± {max(self.nats) - self.middle:.3f}"
        cells = (self.target, self.kind, self.depth, self.width, self.num_weights, off, f"{self.cost:.1f}")
        return "| " + " | ".join(map(str, cells)) + " |"


def plan(targets: dict[str, Any], depths: list[int], deep: int, real: str) -> Iterator[Row]:
    """Stacks of all depths at equal numbers of weights, then some of them with one thing changed."""
    kinds: list[tuple[str, str, int, ScaleMap, dict[str, Any]]] = []
    kinds += [(name, "plain", depth, WIDE, {}) for name in targets for depth in depths]
    kinds += [(name, "additive", deep, AdditiveScale(), {}) for name in targets]
    kinds += [(real, "whitened", deep, WIDE, {"whiten": True})]
    kinds += [(real, "whitened, curves", depth, WIDE, {"whiten": True, "curves": 24}) for depth in (2, deep)]
    kinds += [("eight schools", "no affine map", deep, WIDE, {"linear": False})]

    def make(target: Any, depth: int, width: int, scale: ScaleMap, options: dict[str, Any]) -> nn.Module:
        return target.use(couplings(target.size, depth, width, scale), **options)

    for name, kind, depth, scale, options in kinds:
        width = width_for(targets[name].size, depth, NUM_WEIGHTS[name], scale)
        yield Row(name, kind, depth, width, partial(make, targets[name], depth, width, scale, options))
    size = targets[real].size
    yield Row(real, "defaults", 8, 96, lambda: NormalizingFlow(real_nvp(size), size))
    yield Row("eight schools", "defaults", 8, 32, lambda: AutoRealNVP(small.schools))


# Pictures


@torch.no_grad()
def picture_of_layers(rows: list[Row], path: Path) -> None:
    """The moons, and what stacks of each depth make of them."""
    import matplotlib.pyplot as plt

    x, y = torch.meshgrid(torch.linspace(-1.6, 2.6, 220), torch.linspace(-1.2, 1.7, 160), indexing="xy")
    points = torch.stack([x, y], -1)
    panels = {"the truth": small.moons_log_prob(points.flatten(0, 1)).reshape(x.shape).exp()}
    for row in rows:
        couplings = "coupling" if row.depth == 1 else "couplings"
        title = f"{row.depth} {couplings} of width {row.width}: {row.nats[0]:.2f} nats off"
        panels[title] = row.fitted[0].log_prob(points).exp()
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.4), layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, (title, density) in zip(axes.flat, panels.items(), strict=False):
        ax.pcolormesh(x, y, density, cmap="Blues", vmin=0, vmax=float(panels["the truth"].max()))
        ax.set_title(title, fontsize=10)
        ax.set_aspect("equal")
    figure.savefig(path, dpi=110)


def picture_of_depth(rows: list[Row], targets: dict[str, Any], path: Path) -> None:
    """Nats by depth for each target, a dot for each seed, and in the last panel the cost of a step."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 6.2), layout="constrained")
    *panels, cost = axes.flat
    for index, (ax, (name, target)) in enumerate(zip(panels, targets.items(), strict=True)):
        own = [row for row in rows if row.target == name]
        depths, colour = [row.depth for row in own], f"C{index}"
        ax.plot(depths, [row.middle for row in own], color=colour)
        ax.plot(depths, [row.nats for row in own], "o", color=colour, ms=4)
        cost.plot(depths, [row.cost for row in own], "o-", ms=4, color=colour, label=name)
        known = isinstance(target, Posterior) or target.truth is not None
        ax.set(title=name, yscale="log" if known else "linear", ylabel="nats off" if known else "nats, lower is better")
    cost.set(title="cost", ylabel="ms a step", ylim=(0, None))
    cost.legend(fontsize=8)
    for ax in axes.flat:
        ax.set_xscale("log", base=2)
        ax.set_xticks(depths, [str(depth) for depth in depths])
        ax.set_xlabel("couplings, at equal numbers of weights")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--output", type=Path, default=Path("output/depth_and_width"), help="folder for the files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    depths, num_steps, num_seeds = ([0, 1, 2], 5, 1) if options.smoke else ([0, 1, 2, 4, 8, 16], 800, 2)

    real, rows, test_rows = small.table()
    data, test = small.moons(10_000, seed=0), small.moons(5000, seed=1)
    targets = {
        "moons": Density(data, test, small.moons_log_prob(test)),
        real: Density(rows, test_rows),
        "banana": Posterior(small.banana, 2, 0.0),
        "ring": Posterior(small.ring, 2, small.ring_evidence()),
        "eight schools": Posterior(small.schools, 10, small.schools_evidence()),
    }
    print("| target | kind | couplings | width | weights | nats off | ms a step |\n|---|---|---|---|---|---|---|")
    rows = list(plan(targets, depths, 2 if options.smoke else 8, real))
    for row in rows:
        row.run(targets[row.target], num_steps, num_seeds)
        print(row, flush=True)
    least = small.best_of_one_layer(data, targets["moons"].truth)
    print(f"the moons, one coupling: {least:.3f} nats off is the least that there is")

    stacks = [row for row in rows if row.kind == "plain" and row.depth]
    picture_of_layers([row for row in stacks if row.target == "moons"], options.output / "layers.png")
    picture_of_depth(stacks, targets, options.output / "depth.png")
    print(f"written: {', '.join(str(path.resolve()) for path in sorted(options.output.iterdir()))}")


if __name__ == "__main__":
    main()
