"""Operators per coupling, counted by the profiler: what a small batch pays for, and the same on every machine."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cases import randomised
from torch.profiler import ProfilerActivity, profile

from pyro_affine import AffineCoupling, real_nvp

MOST_BEYOND_THE_NETWORK = 6  # of a coupling: leaky_relu twice, atan2, mul, exp, addcmul
OF_A_REORDERING = 3  # the halves are joined, reordered and cut again
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


def flow_of(num_layers):
    return randomised(real_nvp(6, num_layers=num_layers, hidden_dims=(8, 8))).float()


def beyond_the_networks(num_layers, run):
    flow, x, kept = flow_of(num_layers), torch.randn(4, 6), torch.randn(4, 3)
    networks = [part.conditioner for part in flow.parts if isinstance(part, AffineCoupling)]
    own = sum(operators(lambda: [network(kept) for network in networks]).values())
    return sum(operators(lambda: run(flow, x)).values()) - own


def without_gradients(flow, x):
    with torch.no_grad():
        return flow._forward(x)


RUNS = {"without gradients": without_gradients, "with gradients": lambda flow, x: flow._forward(x)}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_operators_of_a_coupling_forward(run):
    few, many = (beyond_the_networks(num_layers, run) for num_layers in (4, 10))
    of_pair = (many - few) / 3  # two couplings and the reordering before them
    assert of_pair <= 2 * MOST_BEYOND_THE_NETWORK + OF_A_REORDERING
    assert few <= 4 * MOST_BEYOND_THE_NETWORK + OF_A_REORDERING + OF_A_CHAIN


def test_a_network_is_no_more_than_its_layers():
    flow = flow_of(2)
    counts = operators(lambda: flow._forward(torch.randn(4, 6)))
    assert counts["aten::linear"] == 6 and counts["aten::silu"] == 4


def test_a_gradient_costs_at_most_three_times_its_forward_pass():
    flow, x = flow_of(10), torch.randn(4, 6)
    forward = sum(operators(lambda: flow._forward(x)).values())
    both = sum(operators(lambda: torch.autograd.backward(sum(v.sum() for v in flow._forward(x)))).values())
    assert both <= 3 * forward
