"""Out-of-distribution scores: a density of patches of a photograph, where it detects other patches, where it fails.

    python examples/out_of_distribution.py            about a minute on two cores
    python examples/out_of_distribution.py --smoke    seconds, to see that it runs

A low density should mean "out of distribution", and does for noise. It fails for data that are smoother: smooth patches
have a higher density than any others, so another photograph with soft colours looks more typical than the one that was
learned. (Of a thousand throws of a coin that shows heads nine times in ten, all heads is the likeliest outcome, and
never occurs.) The remedy: test for a typical density instead of a high one, over several patches together.

Data: two photographs that come with scikit-learn, a palace in China and a flower, in grey; its digits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits, load_sample_image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from pyro_affine import NormalizingFlow, fit_density, real_nvp

SIZE, GROUP = 8, 16  # pixels along a side of a patch; patches that are judged together

Sets = dict[str, Tensor]


def patches(name: str) -> Tensor:
    """Overlapping patches of a photograph, by tile of 32 x 32. Shape: (tiles, 49, 64), grey levels from 0 to 255."""
    grey = torch.tensor(load_sample_image(f"{name}.jpg").copy()).float().mean(-1).round()
    tiles = grey.unfold(0, 32, 32).unfold(1, 32, 32).flatten(0, 1)
    return tiles.unfold(1, SIZE, 4).unfold(2, SIZE, 4).flatten(-2).flatten(1, 2)


def palace() -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test patches, from different tiles. Shape: (N, 64)."""
    tiles = patches("china")
    tiles = tiles[torch.randperm(len(tiles), generator=torch.Generator().manual_seed(0))]
    train, held_out, test = tiles.split([180, 30, len(tiles) - 210])
    return train.flatten(0, 1), held_out.flatten(0, 1), test.flatten(0, 1)


def strange(test: Tensor) -> Sets:
    """Sets of patches that are not from the photograph, as many of each. Shape: (N, 64)."""
    generator = torch.Generator().manual_seed(1)
    digits = torch.tensor(load_digits().data).float() / 16 * 255
    flower = patches("flower").flatten(0, 1)
    return {
        "noise": torch.randint(256, test.shape, generator=generator).float(),
        # each pixel as in some patch: only their combination is wrong
        "pixels shuffled": torch.stack([pixel[torch.randperm(len(test), generator=generator)] for pixel in test.T], -1),
        "digits": digits[torch.randint(len(digits), (len(test),), generator=generator)].round(),
        "blurred palace": nn.functional.avg_pool2d(test.reshape(-1, 1, SIZE, SIZE), 3, 1, 1, False, False).flatten(1),
        "flower": flower[torch.randperm(len(flower), generator=generator)[: len(test)]],
    }


def to_unit(levels: Tensor) -> Tensor:
    """Grey levels and noise between them, so that there is a density. Values in (0, 1)."""
    return (levels.floor() + torch.rand(levels.shape, generator=torch.Generator().manual_seed(2))) / 256


def together(scores: Tensor) -> Tensor:
    """Means of groups of patches, taken at random. Shape: (N // GROUP,)."""
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(3))
    return scores[order][: len(scores) // GROUP * GROUP].reshape(-1, GROUP).mean(1)


def auroc(known: Tensor, strange: Tensor) -> float:
    """Probability that an unknown patch scores above a known one: 1 is perfect, 0.5 is chance."""
    return float(roc_auc_score([0] * len(known) + [1] * len(strange), torch.cat([known, strange])))


def picture(images: Sets, density: Sets, table: dict[str, dict[str, float]], path: Path) -> None:
    """A row for each set: some patches, its log-densities, and how well each score separates it from the test."""
    import matplotlib.pyplot as plt

    names = list(images)
    size = {"figsize": (13, 4.8), "width_ratios": [1.1, 1.1, 1.2], "layout": "constrained"}
    figure, (left, middle, right) = plt.subplots(1, 3, **size)
    tiles = [
        nn.functional.pad(images[name][:294:49].reshape(-1, SIZE, SIZE), (1, 1, 1, 1), value=128) for name in names
    ]
    left.imshow(torch.cat([torch.cat(list(row), 1) for row in tiles]), cmap="gray", vmin=0, vmax=255, aspect="auto")
    left.set(xticks=[], yticks=[10 * index + 5 for index in range(len(names))], yticklabels=names, title="patches")
    for index, name in enumerate(names):
        low, centre, high = torch.quantile(density[name], torch.tensor([0.05, 0.5, 0.95])).tolist()
        middle.plot([low, high], [index, index], color="tab:blue", lw=5, alpha=0.4, solid_capstyle="butt")
        middle.plot(centre, index, "o", color="tab:blue")
    middle.axvspan(*torch.quantile(density[names[0]], torch.tensor([0.05, 0.95])), color="0.92", zorder=0)
    middle.set(xlabel="log-density in nats: median and 90 %", yticks=[], ylim=(len(names) - 0.5, -0.5))
    grid = torch.tensor([[float("nan")] * len(table)] + [[row[name] for row in table.values()] for name in names[1:]])
    right.imshow(grid, cmap="RdYlBu", vmin=-0.3, vmax=1.3, aspect="auto")
    for row, column in torch.cartesian_prod(torch.arange(1, len(names)), torch.arange(len(table))).tolist():
        right.text(column, row, f"{grid[row, column]:.2f}", ha="center", va="center")
    right.set(
        xticks=range(len(table)),
        xticklabels=[name.replace(" ", "\n", 1).replace(", ", ",\n") for name in table],
        yticks=[],
    )
    right.set(title="AUROC against test patches")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of a minute")
    parser.add_argument("--output", type=Path, default=Path("output/out_of_distribution"), help="folder for the files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    train, held_out, test = palace()
    train, held_out = to_unit(train), to_unit(held_out)
    torch.manual_seed(0)
    flow = NormalizingFlow(real_nvp(SIZE**2, num_layers=6, hidden_dims=(96,)), SIZE**2)
    num_steps = 5 if options.smoke else 1200
    print(fit_density(flow, train, validation=held_out, num_steps=num_steps, learning_rate=2e-3, seed=0))

    images = {"test": test, **strange(test)}
    with torch.no_grad():
        density = {name: flow.log_prob(to_unit(levels)) for name, levels in images.items()}
        usual = flow.log_prob(held_out).mean()

    # Four scores; higher means more unusual.
    scores = {
        "low density, one patch": {name: -value for name, value in density.items()},
        "unusual density, one patch": {name: (value - usual).abs() for name, value in density.items()},
        f"low density, {GROUP} patches": {name: -together(value) for name, value in density.items()},
        f"unusual density, {GROUP} patches": {name: (together(v) - usual).abs() for name, v in density.items()},
    }
    table = {
        score: {name: auroc(value["test"], value[name]) for name in images if name != "test"}
        for score, value in scores.items()
    }
    print(f"AUROC against test patches\n{'':16s}{'mean log-density':>18s}" + "".join(f"{name:>30s}" for name in table))
    for name, value in density.items():
        cells = [f"{row[name]:30.2f}" for row in table.values() if name in row]
        print(f"{name:16s}{value.mean():18.1f}" + "".join(cells))

    picture(images, density, table, options.output / "out_of_distribution.png")
    print(f"written: {(options.output / 'out_of_distribution.png').resolve()}")


if __name__ == "__main__":
    main()
