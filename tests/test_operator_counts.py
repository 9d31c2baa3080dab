"""Operators per coupling, counted by the profiler: what a small batch pays for, and the same on every machine."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cases import glow_step, randomised
from torch.profiler import ProfilerActivity, profile

from pyro_affine import AffineCoupling, ComposeFlow, NormalizingFlow, real_nvp

MOST_BEYOND_THE_NETWORK = 6  # of a coupling: leaky_relu twice, atan2, mul, exp, addcmul
OF_A_REORDERING = 3  # the halves are joined, reordered and cut again
OF_A_GLOW_STEP = 10  # beyond its coupling: one product, its transpose, log-determinant, halves, pixels as rows and back
BACK_OF_A_LINEAR_MAP = 7  # bias, weight (a transpose first), input, activation; both gradients handed over
OF_BASE_AND_UNITS = 14  # 7 each
OF_A_CHAIN = 7  # reshapes, the cut, the last join, all log-determinants in one cat and one sum


def operators(function):
    """Operators that Python asks for; not those that they call in turn."""
    function()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    return Counter(event.name for event in seen.events() if event.name.startswith("aten::") and not _is_inside(event))


def _is_inside(event):
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith("aten::"):
            return True
        parent = parent.cpu_parent
    return False


NETWORKS = {"MLP": {"hidden_dims": (8, 8)}, "residual, bounded inputs": {"hidden_dim": 8, "num_blocks": 2}}
of_each_network = pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS)


def flow_of(num_layers, sizes):
    return randomised(real_nvp(6, num_layers=num_layers, **sizes)).float()


def beyond_the_networks(num_layers, sizes, run):
    flow, x, kept = flow_of(num_layers, sizes), torch.randn(4, 6), torch.randn(4, 3)
    networks = [part.conditioner for part in flow.parts if isinstance(part, AffineCoupling)]
    own = sum(operators(lambda: [network(kept) for network in networks]).values())
    return sum(operators(lambda: run(flow, x)).values()) - own


def without_gradients(flow, x):
    with torch.no_grad():
        return flow._forward(x)


RUNS = {"without gradients": without_gradients, "with gradients": lambda flow, x: flow._forward(x)}


@of_each_network
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_operators_of_a_coupling_forward(run, sizes):
    few, many = (beyond_the_networks(num_layers, sizes, run) for num_layers in (4, 10))
    of_pair = (many - few) / 3  # two couplings and the reordering before them
    assert of_pair <= 2 * MOST_BEYOND_THE_NETWORK + OF_A_REORDERING
    assert few <= 4 * MOST_BEYOND_THE_NETWORK + OF_A_REORDERING + OF_A_CHAIN


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_operators_of_a_glow_step(run):
    counts = []
    for num_steps in (2, 8):
        flow = randomised(ComposeFlow([glow_step((4, 3, 2)) for _ in range(num_steps)])).float()
        found = operators(lambda flow=flow: run(flow, torch.randn(5, 4, 3, 2)))
        counts.append(sum(found.values()) - 5 * num_steps)  # a network has five layers
    assert counts[1] - counts[0] <= 6 * (MOST_BEYOND_THE_NETWORK + OF_A_GLOW_STEP)


def test_a_network_is_no_more_than_its_layers():
    plain = flow_of(2, NETWORKS["MLP"])
    counts = operators(lambda: plain._forward(torch.randn(4, 6)))
    assert counts["aten::linear"] == 6 and counts["aten::silu"] == 4
    residual = flow_of(2, NETWORKS["residual, bounded inputs"])
    counts = operators(lambda: residual._forward(torch.randn(4, 6)))
    assert counts["aten::linear"] == 12 and counts["aten::silu"] == 10
    assert counts["aten::tanh_"] == 2 and counts["aten::add"] == 4


@pytest.mark.parametrize(("kind", "beyond"), [("MLP", 7), ("residual, bounded inputs", 11)])  # each block adds one
def test_operators_of_a_gradient(kind, beyond):
    flow, x = flow_of(10, NETWORKS[kind]), torch.randn(4, 6)
    forward = operators(lambda: flow._forward(x))
    both = operators(lambda: torch.autograd.backward(sum(v.sum() for v in flow._forward(x))))
    backward = sum((both - forward).values())
    assert backward <= BACK_OF_A_LINEAR_MAP * forward["aten::linear"] + 10 * beyond


@pytest.mark.parametrize("trained_input", [True, False])
def test_an_input_without_gradient_costs_none(trained_input):
    flow = NormalizingFlow(flow_of(4, NETWORKS["MLP"]), 6, curves=0, whiten=False)
    y = torch.randn(4, 6, requires_grad=trained_input)
    loss = flow.log_prob(y).sum()
    found = operators(lambda: torch.autograd.backward(loss, retain_graph=True))
    assert found["aten::addmm"] == (4 if trained_input else 3)  # back to what each network reads


def test_what_a_density_adds_to_its_couplings():
    flow = NormalizingFlow(flow_of(4, NETWORKS["MLP"]), 6, curves=0, whiten=False)
    y = torch.randn(4, 6)
    with torch.no_grad():
        own = sum(operators(lambda: flow.transform._backward(y)).values())
        assert sum(operators(lambda: flow.log_prob(y)).values()) <= own + OF_BASE_AND_UNITS
