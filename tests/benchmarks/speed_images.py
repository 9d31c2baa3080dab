"""The flows of images in the speed benchmark: our Glow, that of normflows, and the networks alone.

Alike are levels, steps, 1x1 convolutions, activation norms and networks (3x3, 1x1 and 3x3 convolutions with ReLU);
there is no logit. Different: the scale map, a sigmoid there, and how a 1x1 convolution is factored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from speed_models import BOUND, Model, run_networks
from torch import Tensor, nn

from pyro_affine import NormalizingFlow, glow


class ImageSize(NamedTuple):
    """Shape of an image, levels, steps of each, channels of the hidden layers, images in a batch."""

    shape: tuple[int, int, int]
    levels: int
    steps: int
    channels: int
    batch: int

    def __str__(self) -> str:
        return f"{self.shape}, {self.levels} x {self.steps} steps ({self.channels} channels), batch {self.batch}"

    def data(self) -> Tensor:
        return torch.randn(self.batch, *self.shape)

    def levels_from_the_data(self) -> list[tuple[int, int, int]]:
        """Shape of an image in the couplings of each level: squeezed, then half of the channels leave."""
        (num_channels, height, width), shapes = self.shape, []
        for _ in range(self.levels):
            shapes.append((4 * num_channels, height // 2, width // 2))
            num_channels, height, width = 2 * num_channels, height // 2, width // 2
        return shapes


def ours(size: ImageSize) -> Model:
    couplings = glow(size.shape, size.levels, size.steps, size.channels, alpha=None, activation=nn.ReLU, seed=0)
    flow = NormalizingFlow(couplings, size.shape, curves=0, whiten=False)
    parameters = list(flow.parameters())
    return Model(parameters, flow.log_prob, lambda n: flow.rsample((n,)), lambda n: flow.rsample_and_log_prob((n,)))


def normflows(size: ImageSize) -> Model:
    import normflows as library

    shapes, base = size.levels_from_the_data()[::-1], library.distributions.DiagGaussian
    latents = [(shape[0] // 2, *shape[1:]) for shape in shapes]
    latents[0] = shapes[0]  # all channels of the last level
    flows: list[list[Any]] = []
    for num_channels, _, _ in shapes:
        blocks = [library.flows.GlowBlock(num_channels, size.channels) for _ in range(size.steps)]
        flows.append([*blocks, library.flows.Squeeze()])
    flow = library.MultiscaleFlow(
        [base(latent, trainable=False) for latent in latents],
        flows,
        [library.flows.Merge() for _ in shapes[1:]],
        class_cond=False,
    )
    parameters = [p for p in flow.parameters() if p.requires_grad]
    return Model(parameters, lambda x: flow.log_prob(x, None), lambda n: flow.sample(n)[0], flow.sample)


def networks_only(size: ImageSize) -> Model:
    """The bound: each network is run, and differentiated for its weights and (but for the first) its input."""
    networks, inputs = list[nn.Module](), list[Tensor]()
    for num_channels, height, width in size.levels_from_the_data():
        for _ in range(size.steps):
            networks.append(network(num_channels // 2, num_channels, size.channels))
            inputs.append(torch.randn(size.batch, num_channels // 2, height, width))
    return run_networks(networks, inputs)


def network(num_inputs: int, num_outputs: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_inputs, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1),
        nn.ReLU(),
        nn.Conv2d(channels, num_outputs, 3, padding=1),
    )


IMAGE_MODELS: dict[str, Callable[[ImageSize], Model]] = {
    BOUND: networks_only,
    "pyro_affine": ours,
    "normflows": normflows,
}
