"""Compiled densities and draws: one graph, made once for all batch sizes, equal to the eager ones."""

from __future__ import annotations

import shutil

import pytest
import torch
from cases import assert_close, randomised
from torch import nn

from pyro_affine import NormalizingFlow, real_nvp

BATCH_SIZES = (4, 7, 32)


class Counting:
    """A backend that runs the graph as it is and counts how many there are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def flow_of(**options):
    return randomised(NormalizingFlow(real_nvp(5, **{"num_layers": 4, "hidden_dims": (6,), **options}), 5)).float()


def draw(flow):
    return lambda x: flow.chain._forward(x)


FUNCTIONS = {
    "log_prob": lambda: flow_of().log_prob,
    "log_prob, ReLU": lambda: flow_of(activation=nn.ReLU).log_prob,
    "draw and log_det": lambda: draw(flow_of()),
}


def assert_same(found, expected):
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for one, other in pairs:
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)
def test_one_graph_serves_all_batch_sizes(make):
    function, backend = make(), Counting()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for batch_size in BATCH_SIZES:
        value = torch.randn(batch_size, 5)
        assert_same(compiled(value), function(value))
    assert backend.graphs == 1


def test_without_a_word_on_shapes_there_are_two_graphs_at_most():
    """The default of torch.compile: the first batch size is taken for a constant, the second shows that it is none."""
    flow, backend = flow_of(), Counting()
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend=backend)
    for batch_size in BATCH_SIZES:
        compiled(torch.randn(batch_size, 5))
    assert backend.graphs <= 2


def test_training_and_new_parameters_make_no_new_graph():
    flow, backend = flow_of(), Counting()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    compiled = torch.compile(flow.log_prob, fullgraph=True, dynamic=True, backend=backend)
    for batch_size in BATCH_SIZES[:2]:
        data = torch.randn(batch_size, 5)
        compiled(data).mean().neg().backward()
        found = [p.grad.clone() for p in flow.parameters()]
        optimizer.zero_grad()
        flow.log_prob(data).mean().neg().backward()
        for one, parameter in zip(found, flow.parameters(), strict=True):
            assert_close(one, parameter.grad, 1e-4)
        optimizer.step()
        optimizer.zero_grad()
    assert backend.graphs == 1


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="no C++ compiler, which torch.compile needs on a CPU"
)
@torch.no_grad()
def test_compiled_machine_code_gives_the_same_density():
    flow = randomised(real_nvp(4, num_layers=2, hidden_dims=(4,))).float()
    compiled = torch.compile(flow._backward, fullgraph=True, dynamic=True)
    for batch_size in BATCH_SIZES:
        value = torch.randn(batch_size, 4)
        assert_same(compiled(value), flow._backward(value))
