"""Round-trip error of deep stacks in float32, ours and Pyro's, with randomly initialised networks.

Run by ``make bench-roundtrip``. Every conditioner has torch's default initialisation in all layers, the last one
too, which is how Pyro's networks start. Also counts the network calls of a draw plus its score.
"""

from __future__ import annotations

import pyro.distributions.transforms as pyro_transforms
import torch
from torch import nn

from pyro_affine import NormalizingFlow, real_nvp
from pyro_affine.coupling import AffineCoupling


def randomise(flow: nn.Module) -> nn.Module:
    """Give all linear layers torch's default initialisation; ours start with a last layer of zeros."""
    for module in flow.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return flow


def pyro_stack(size: int, num_layers: int) -> nn.Module:
    """Pyro's coupling with the entries reversed between layers, the repair that its users make by hand."""
    flip = torch.arange(size).flip(0)
    parts = []
    for _ in range(num_layers):
        parts += [pyro_transforms.affine_coupling(size), pyro_transforms.Permute(flip)]
    return pyro_transforms.ComposeTransformModule(parts)


def round_trip_error(flow: nn.Module, size: int) -> float:
    """Largest |x - t.inv(t(x))| over 1000 standard normal draws."""
    x = torch.randn(1000, size)
    with torch.no_grad():
        y = flow(x)
        return float((flow.inv(y.clone()) - x).abs().max())


def network_calls(num_layers: int) -> int:
    """Conditioner calls of one draw plus its score."""
    flow, calls = NormalizingFlow(real_nvp(16, num_layers=num_layers), 16), []
    for module in flow.modules():
        if isinstance(module, AffineCoupling):
            module.conditioner.register_forward_hook(lambda *_: calls.append(1))
    density = flow()
    density.log_prob(density.rsample((8,)))
    return len(calls)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"{'stack of 16 entries, float32':40s} {'median':>10s} {'largest of 10 seeds':>20s}")
    for num_layers in (8, 32, 64):
        for name, make in {
            "pyro_affine real_nvp": lambda n: randomise(real_nvp(16, num_layers=n)),
            "pyro_affine, plain networks": lambda n: randomise(real_nvp(16, num_layers=n, hidden_dims=(64, 64))),
            "Pyro affine_coupling + flips": lambda n: pyro_stack(16, n),
        }.items():
            errors = []
            for seed in range(10):
                torch.manual_seed(seed)
                errors.append(round_trip_error(make(num_layers), 16))
            errors = torch.tensor(errors).nan_to_num(float("inf"))
            print(f"{f'{name}, {num_layers} layers':40s} {errors.median():10.1e} {errors.max():20.1e}")
    for num_layers in (8, 64):
        print(f"network calls of a draw plus its score, {num_layers} layers: {network_calls(num_layers)}")


if __name__ == "__main__":
    main()
