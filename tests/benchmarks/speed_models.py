"""The flows of the speed benchmark: ours, five peers at the same architecture, and the networks alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
from pyro.nn import DenseNN
from torch import Tensor, nn

from pyro_affine import NormalizingFlow, real_nvp


class Size(NamedTuple):
    """Entries of an event, couplings, hidden widths, events in a batch."""

    entries: int
    layers: int
    hidden: tuple[int, ...]
    batch: int

    def __str__(self) -> str:
        return f"D={self.entries}, {self.layers} x ({len(self.hidden)}x{self.hidden[0]}), batch {self.batch}"

    def data(self) -> Tensor:
        return torch.randn(self.batch, self.entries)


class Model(NamedTuple):
    """What is timed. ``parameters`` are those of the networks; no model trains anything else."""

    parameters: list[Tensor]
    log_prob: Callable[[Tensor], Tensor]
    draw: Callable[[int], Tensor]
    draw_and_score: Callable[[int], tuple[Tensor, Tensor]]


def network(num_inputs: int, num_outputs: int, hidden: Sequence[int]) -> nn.Sequential:
    """A conditioner for peers that take any Module, the same as ours: SiLU, first weights of the last layer zero."""
    sizes = [num_inputs, *hidden, num_outputs]
    layers: list[nn.Module] = []
    for size, next_size in pairwise(sizes):
        layers += [nn.Linear(size, next_size), nn.SiLU()]
    for parameter in layers[-2].parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(*layers[:-1])


def normal(size: int) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(size), torch.ones(size)).to_event(1)


def ours(size: Size) -> Model:
    couplings = real_nvp(size.entries, num_layers=size.layers, hidden_dims=size.hidden)
    flow = NormalizingFlow(couplings, size.entries, curves=0, whiten=False)  # as the peers: couplings on a normal base
    parameters = list(flow.parameters())
    return Model(parameters, flow.log_prob, lambda n: flow.rsample((n,)), lambda n: flow.rsample_and_log_prob((n,)))


def pyro(size: Size) -> Model:
    half, flip = size.entries // 2, torch.arange(size.entries).flip(0)
    parts: list[Any] = []
    for _ in range(size.layers):
        conditioner = DenseNN(half, list(size.hidden), [size.entries - half] * 2, nonlinearity=nn.SiLU())
        parts += [pyro_transforms.AffineCoupling(half, conditioner), pyro_transforms.Permute(flip)]
    density = dist.TransformedDistribution(normal(size.entries), parts[:-1])

    def log_prob(data: Tensor) -> Tensor:
        density.clear_cache()  # else it returns the densities of the last call
        return density.log_prob(data)

    def draw_and_score(num_draws: int) -> tuple[Tensor, Tensor]:
        draws = density.rsample((num_draws,))
        return draws, density.log_prob(draws)

    parameters = [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]
    return Model(parameters, log_prob, lambda n: density.rsample((n,)), draw_and_score)


def zuko(size: Size) -> Model:
    from zuko.flows import NICE

    flow = NICE(size.entries, transforms=size.layers, hidden_features=size.hidden, activation=nn.SiLU)
    draw_and_score = lambda n: flow().rsample_and_log_prob((n,))  # noqa: E731
    return Model(list(flow.parameters()), lambda x: flow().log_prob(x), lambda n: flow().rsample((n,)), draw_and_score)


def nflows(size: Size) -> Model:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import AffineCouplingTransform, CompositeTransform, ReversePermutation

    class WithContext(nn.Module):
        def __init__(self, num_inputs: int, num_outputs: int) -> None:
            super().__init__()
            self.network = network(num_inputs, num_outputs, size.hidden)

        def forward(self, kept: Tensor, context: Tensor | None = None) -> Any:
            return self.network(kept)

    mask, parts = (torch.arange(size.entries) >= size.entries // 2).long(), []
    for _ in range(size.layers):
        parts += [AffineCouplingTransform(mask, WithContext), ReversePermutation(size.entries)]
    flow = Flow(CompositeTransform(parts[:-1]), StandardNormal([size.entries]))
    return Model(list(flow.parameters()), flow.log_prob, flow.sample, flow.sample_and_log_prob)


def normflows(size: Size) -> Model:
    import normflows as library

    half, parts = size.entries // 2, []
    for _ in range(size.layers):
        conditioner = network(half, 2 * (size.entries - half), size.hidden)
        parts += [library.flows.AffineCouplingBlock(conditioner), library.flows.Permute(size.entries, mode="swap")]
    flow = library.NormalizingFlow(library.distributions.DiagGaussian(size.entries, trainable=False), parts[:-1])
    parameters = [p for p in flow.parameters() if p.requires_grad]
    return Model(parameters, flow.log_prob, lambda n: flow.sample(n)[0], flow.sample)


def freia(size: Size) -> Model:
    import FrEIA.framework
    import FrEIA.modules

    def subnet(num_inputs: int, num_outputs: int) -> nn.Module:
        return network(num_inputs, num_outputs, size.hidden)

    flow, base = FrEIA.framework.SequenceINN(size.entries), normal(size.entries)
    for index in range(size.layers):
        flow.append(FrEIA.modules.AffineCouplingOneSided, subnet_constructor=subnet)
        if index + 1 < size.layers:
            flow.append(FrEIA.modules.PermuteRandom, seed=index)

    def log_prob(data: Tensor) -> Tensor:
        latent, log_det = flow(data)
        return base.log_prob(latent) + log_det

    def draw_and_score(num_draws: int) -> tuple[Tensor, Tensor]:
        latent = torch.randn(num_draws, size.entries)
        draws, log_det = flow(latent, rev=True)
        return draws, base.log_prob(latent) - log_det

    return Model(
        [p for p in flow.parameters() if p.requires_grad], log_prob, lambda n: draw_and_score(n)[0], draw_and_score
    )


def networks_only(size: Size) -> Model:
    """The bound: each conditioner is run, and differentiated for its weights and (but for the first) its input."""
    half = size.entries // 2
    networks = [network(half, 2 * (size.entries - half), size.hidden) for _ in range(size.layers)]
    return run_networks(networks, [torch.randn(size.batch, half) for _ in networks])


def run_networks(networks: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Model:
    for kept in inputs[1:]:
        kept.requires_grad_()

    def run(_: Any) -> Tensor:
        return _Weighted.apply(*[module(kept) for module, kept in zip(networks, inputs, strict=True)])

    parameters = [p for module in networks for p in module.parameters()]
    return Model(parameters, run, run, lambda n: (run(n), torch.zeros(())))


class _Weighted(torch.autograd.Function):
    """Joins the networks into one root without any arithmetic; each is handed a gradient made beforehand."""

    weights: dict[tuple[int, ...], Tensor] = {}

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.shapes = [output.shape for output in outputs]
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        weights = _Weighted.weights
        return tuple(weights.setdefault(tuple(shape), torch.randn(shape)) for shape in ctx.shapes)


BOUND = "networks only"
MODELS: dict[str, Callable[[Size], Model]] = {
    BOUND: networks_only,
    "pyro_affine": ours,
    "Pyro": pyro,
    "zuko": zuko,
    "nflows": nflows,
    "normflows": normflows,
    "FrEIA": freia,
}
