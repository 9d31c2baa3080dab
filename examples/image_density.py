"""Density of images: fit Glow to handwritten digits, score it in bits, sample it, and classify with it.

python examples/image_density.py            some minutes on two cores
python examples/image_density.py --smoke    seconds, to see that it runs
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_affine import NormalizingFlow, bits_per_dim, conditional_glow, dequantize, fit_density, glow

LEVELS = 17  # pixels are whole numbers from 0 to 16
SHAPE = (1, 8, 8)
TEMPERATURES = (0.5, 0.7, 1.0)


class Minibatches:
    """Images with new noise in each pass, and their classes if wanted: any iterable is a loader."""

    def __init__(self, images: Tensor, classes: Tensor | None = None, batch_size: int = 128) -> None:
        self.images, self.classes, self.batch_size = images, classes, batch_size

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for index in torch.randperm(len(self.images)).split(self.batch_size):
            values = dequantize(self.images[index], LEVELS)
            yield (values,) if self.classes is None else (values, self.classes[index])


def digits() -> list[tuple[Tensor, Tensor]]:
    """Images, (N, 1, 8, 8), and labels, (N,): for training, for choosing the weights, and for the test."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images, labels = torch.as_tensor(data.images).long()[:, None], torch.as_tensor(data.target).long()
    return [(images[index], labels[index]) for index in order.split([1297, 200, 300])]


@torch.no_grad()
def mean_log_prob(flow: NormalizingFlow, images: Tensor, context: Tensor | None = None, num_draws: int = 8) -> Tensor:
    """Log-density averaged over the noise: a lower bound of the log-probability of the grey levels."""
    generator = torch.Generator().manual_seed(1)
    draws = [dequantize(images, LEVELS, generator=generator) for _ in range(num_draws)]
    values = [flow.log_prob(draw if context is None else draw[:, None], context) for draw in draws]
    return torch.stack(values).mean(0)


def show(path: Path, panels: dict[str, Tensor], num_columns: int) -> None:
    """Panels side by side, each a grid of images, with a title. Shape of a panel: (N, 1, 8, 8)."""
    import matplotlib.pyplot as plt

    num_rows = [-(-len(images) // num_columns) for images in panels.values()]
    size = 0.42 * num_columns * len(panels), 0.42 * max(num_rows) + 0.5
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for ax, (title, images) in zip(axes[0], panels.items(), strict=True):
        padded = torch.nn.functional.pad(images[:, 0].clamp(0, 1), (1, 1, 1, 1), value=0.5)
        rows = [torch.cat(list(row), 1) for row in padded.split(num_columns)]
        ax.imshow(torch.cat(rows), cmap="gray", vmin=0, vmax=1)
        ax.set_title(title, fontsize=10)
        ax.axis("off")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


@torch.no_grad()
def pictures(flow: NormalizingFlow, train: Tensor, test: Tensor, folder: Path) -> list[Path]:
    """Samples, their nearest training images, and interpolations between test images."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(60, 64, generator=generator)
    samples = {f"temperature {t}": flow.transform(t * base) for t in TEMPERATURES}
    show(folder / "samples.png", samples, num_columns=10)

    drawn, known = samples["temperature 0.7"][:10], (train + 0.5) / LEVELS
    nearest = torch.cdist(drawn.flatten(1), known.flatten(1)).topk(3, largest=False).indices.T
    rows = torch.cat([drawn, known[nearest.flatten()]])
    show(folder / "nearest.png", {"draws (top row) and the nearest training images": rows}, num_columns=10)

    first, last = flow.transform.inv((test[:12] + 0.5) / LEVELS).split(6)
    share = torch.linspace(0, 1, 11)[:, None]
    ways = [flow.transform((1 - share) * a + share * b) for a, b in zip(first, last, strict=True)]
    show(folder / "interpolations.png", {"from one test image to another": torch.cat(ways)}, num_columns=11)
    return [folder / name for name in ("samples.png", "nearest.png", "interpolations.png")]


def fit(flow: NormalizingFlow, data: Minibatches, held_out: object, num_steps: int) -> None:
    result = fit_density(
        flow, data, validation=held_out, num_steps=num_steps, learning_rate=3e-3, weight_decay=0.1, seed=0
    )
    print(f"  {result.num_steps} steps, {result.seconds:.0f} s, ended by {result.reason}, weights: {result.chosen}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--output", type=Path, default=Path("output/image_density"), help="folder for the files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    sizes = {"num_levels": 2, "num_steps": 1 if options.smoke else 8, "hidden_channels": 8 if options.smoke else 32}
    num_steps = 10 if options.smoke else 1500
    (train, train_labels), (held_out, held_out_labels), (test, test_labels) = digits()

    print("Glow of all digits")
    torch.manual_seed(0)
    flow = NormalizingFlow(glow(SHAPE, **sizes), SHAPE)
    noisy = dequantize(held_out, LEVELS)
    fit(flow, Minibatches(train), noisy, num_steps)
    bits = bits_per_dim(mean_log_prob(flow, test), SHAPE, LEVELS)
    print(f"  test images: {bits.mean():.3f} +- {bits.std() / len(bits) ** 0.5:.3f} bits per dim (uniform: 4.087)")
    written = pictures(flow, train, test, options.output)

    print("Glow that knows the class")
    classes = torch.eye(10)
    flow = NormalizingFlow(conditional_glow(SHAPE, 10, **sizes), SHAPE)
    context = one_hot(held_out_labels, 10).float()
    fit(flow, Minibatches(train, one_hot(train_labels, 10).float()), (noisy, context), num_steps)
    log_probs = mean_log_prob(flow, test, classes)  # one column for each class
    bits = bits_per_dim(log_probs[torch.arange(len(test)), test_labels], SHAPE, LEVELS)
    print(f"  test images, class given: {bits.mean():.3f} bits per dim")
    log_prior = torch.bincount(train_labels, minlength=10).float().log()
    guessed = (log_probs + log_prior).argmax(1)  # Bayes' rule: p(class | image) ~ p(image | class) p(class)
    right = (guessed == test_labels).float().mean()
    print(f"  classified by Bayes' rule: {right:.1%} of {len(test)} test images right")
    with torch.no_grad():
        base = torch.randn(6, 10, 64, generator=torch.Generator().manual_seed(3))
        drawn = flow.transform.condition(classes)(0.7 * base)
    show(options.output / "classes.png", {"draws of each class, temperature 0.7": drawn.flatten(0, 1)}, num_columns=10)

    print("written:", ", ".join(str(path.resolve()) for path in [*written, options.output / "classes.png"]))


if __name__ == "__main__":
    main()
