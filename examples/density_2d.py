"""Density of two moons: fit a flow to points of the plane, sample it, and draw what it learned.

python examples/density_2d.py            about a minute on two cores
python examples/density_2d.py --smoke    seconds, to see that it runs
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pyro_affine import NormalizingFlow, fit_density, real_nvp


def two_moons(num_points: int, seed: int) -> torch.Tensor:
    """Two half circles, one upside down, with noise. Shape: (num_points, 2)."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.pi * torch.rand(num_points, generator=generator)
    moon = torch.stack([angle.cos(), angle.sin()], -1)
    upper = torch.rand(num_points, generator=generator) < 0.5
    points = torch.where(upper[:, None], moon, torch.tensor([1.0, 0.5]) - moon)
    return points + 0.06 * torch.randn(points.shape, generator=generator)


def picture(data: torch.Tensor, draws: torch.Tensor, flow: NormalizingFlow, path: Path) -> None:
    """Data, draws, and the density on a grid, on the same axes."""
    import matplotlib.pyplot as plt

    x, y = torch.meshgrid(torch.linspace(-1.6, 2.6, 250), torch.linspace(-1.1, 1.6, 180), indexing="xy")
    with torch.no_grad():
        density = flow.log_prob(torch.stack([x, y], -1)).exp()
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.4), sharex=True, sharey=True, layout="constrained")
    axes[0].plot(*data[:3000].T, ".", ms=2, color="tab:gray")
    axes[1].plot(*draws[:3000].T, ".", ms=2, color="tab:blue")
    mesh = axes[2].pcolormesh(x, y, density, cmap="Blues", vmin=0)
    figure.colorbar(mesh, ax=axes, label="density", shrink=0.8)
    for ax, title in zip(axes, ("data", "draws of the flow", "density of the flow"), strict=True):
        ax.set(title=title, aspect="equal", xlim=(-1.6, 2.6), ylim=(-1.1, 1.6))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of a minute")
    parser.add_argument("--output", type=Path, default=Path("output/density_2d"), help="folder for the files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    data, test = two_moons(20_000, seed=0), two_moons(5_000, seed=1)
    torch.manual_seed(0)
    flow = NormalizingFlow(real_nvp(2, num_layers=12), event_shape=2)
    fit = fit_density(flow, data, num_steps=50 if options.smoke else 4000, seed=0)
    print(fit)

    with torch.no_grad():
        print(f"test log-density: {flow.log_prob(test).mean():.3f} nats a point")
    picture(data, flow.sample(3000), flow, options.output / "two_moons.png")
    print(f"written: {(options.output / 'two_moons.png').resolve()}")


if __name__ == "__main__":
    main()
