"""The same weights give the same density as the couplings of other packages, where one maps to the other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as pyro_transforms
from pyro.nn import DenseNN
from torch import Tensor, nn

from pyro_affine import MLP, AffineCoupling, ComposeFlow, ExpScale, NormalizingFlow, Permutation

ENTRIES, HALF, LAYERS, HIDDEN = 6, 3, 4, (8, 8)
MASK = torch.arange(ENTRIES) < HALF


def linears(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def ours(networks: list[nn.Module], order: Tensor, outputs: Tensor) -> NormalizingFlow:
    """Couplings with these weights, entries reordered after each but the last.

    Args:
        networks: of the other package, base side first.
        order: of the entries, after a coupling.
        outputs: where each output of ours, shifts and then log-scales, stands among theirs.
    """
    parts: list[Any] = []
    for network in networks:
        conditioner = MLP(HALF, ENTRIES - HALF, hidden_dims=HIDDEN)
        for own, other in zip(linears(conditioner), linears(network), strict=True):
            index = outputs if other is linears(network)[-1] else torch.arange(other.out_features)
            own.load_state_dict({"weight": other.weight[index], "bias": other.bias[index]})
        parts += [AffineCoupling(MASK, conditioner, scale=ExpScale()), Permutation(order)]
    flow = NormalizingFlow(ComposeFlow(parts[:-1]), ENTRIES, curves=0, whiten=False, tails="normal")
    return flow.double()


def test_pyro() -> None:
    flip, networks, parts = torch.arange(ENTRIES).flip(0), list[nn.Module](), list[Any]()
    for _ in range(LAYERS):
        networks.append(DenseNN(HALF, list(HIDDEN), [ENTRIES - HALF] * 2, nonlinearity=nn.SiLU()).double())
        parts += [pyro_transforms.AffineCoupling(HALF, networks[-1]), pyro_transforms.Permute(flip)]
    base = dist.Normal(torch.zeros(ENTRIES).double(), 1.0).to_event(1)
    theirs = dist.TransformedDistribution(base, parts[:-1])
    flow = ours(networks, flip, torch.arange(2 * (ENTRIES - HALF)))
    y = torch.randn(50, ENTRIES).double()
    torch.testing.assert_close(flow.log_prob(y), theirs.log_prob(y), atol=1e-10, rtol=0)


def test_normflows() -> None:
    library = pytest.importorskip("normflows", reason="needs the package normflows, of the extra peers")
    networks, parts = list[nn.Module](), list[Any]()
    for _ in range(LAYERS):
        sizes = [HALF, *HIDDEN, 2 * (ENTRIES - HALF)]
        layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
        networks.append(nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2]))
        parts += [library.flows.AffineCouplingBlock(networks[-1]), library.flows.Permute(ENTRIES, mode="swap")]
    theirs = library.NormalizingFlow(library.distributions.DiagGaussian(ENTRIES, trainable=False), parts[:-1]).double()
    swap = torch.cat([torch.arange(HALF, ENTRIES), torch.arange(HALF)])
    interleaved = torch.arange(2 * (ENTRIES - HALF)).reshape(-1, 2).T.flatten()
    flow = ours(networks, swap, interleaved)
    y = torch.randn(50, ENTRIES).double()
    torch.testing.assert_close(flow.log_prob(y), theirs.log_prob(y), atol=1e-10, rtol=0)
