"""Properties of the conditioners: shapes, zero start, context that is read once, cost, copies, refusals."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pyro_affine.conditioners import MLP, ResidualMLP

# name: a function of input_dim, output_dim and keywords
NETWORKS = {
    "MLP": partial(MLP, hidden_dims=(8, 6)),
    "MLP, linear": partial(MLP, hidden_dims=()),
    "MLP, two networks": partial(MLP, hidden_dims=(8,), separate=True),
    "MLP, tanh": partial(MLP, hidden_dims=(8,), activation=nn.Tanh),
    "ResidualMLP": partial(ResidualMLP, hidden_dim=8),
    "ResidualMLP, two networks": partial(ResidualMLP, hidden_dim=8, num_blocks=1, separate=True),
}
# name: input_dim, context_dim
READS = {"kept": (3, 0), "kept and context": (3, 2), "context": (0, 2)}

all_networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
all_reads = pytest.mark.parametrize("input_dim, context_dim", READS.values(), ids=READS)
OUTPUT_DIM = 4


def _build(make, input_dim, context_dim, **options):
    """A network in float64 whose parameters are all random, also those of the last layer."""
    torch.manual_seed(0)
    network = make(input_dim, OUTPUT_DIM, context_dim=context_dim, **options).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.7)
    return network


def _inputs(input_dim, context_dim, batch_shape=(5,), context_shape=None):
    """Arguments of the call, with a context only where one is read."""
    torch.manual_seed(1)
    kept = torch.randn(*batch_shape, input_dim, dtype=torch.float64)
    if context_dim == 0:
        return (kept,)
    context_shape = batch_shape if context_shape is None else context_shape
    return kept, torch.randn(*context_shape, context_dim, dtype=torch.float64)


@all_networks
@all_reads
@pytest.mark.parametrize("batch_shape", [(), (0,), (1,), (4,), (2, 3), (2, 1, 3)], ids=str)
def test_shapes_and_one_row_at_a_time(make, input_dim, context_dim, batch_shape):
    network = _build(make, input_dim, context_dim)
    inputs = _inputs(input_dim, context_dim, batch_shape)
    for i, result in enumerate(network(*inputs)):
        assert result.shape == (*batch_shape, OUTPUT_DIM)
        *rows, expected = (tensor[None].flatten(0, -2) for tensor in (*inputs, result))
        for *row, expected_row in zip(*rows, expected, strict=True):
            torch.testing.assert_close(network(*row)[i], expected_row, rtol=1e-12, atol=1e-12)


BROADCASTS = {
    "one context, many draws": ((100,), (), (100,)),
    "context per column": ((10, 7), (7,), (10, 7)),
    "context per column, one kept": ((10, 1), (7,), (10, 7)),
    "context has more dimensions": ((3,), (2, 3), (2, 3)),
    "one kept, many contexts": ((), (4,), (4,)),
    "sizes of 1 on both sides": ((5, 1), (1, 6), (5, 6)),
}


@all_networks
@pytest.mark.parametrize("input_dim", [3, 0])
@pytest.mark.parametrize("batch, context_batch, result_batch", BROADCASTS.values(), ids=BROADCASTS)
def test_context_broadcasts(make, input_dim, batch, context_batch, result_batch):
    network = _build(make, input_dim, 2)
    kept, context = _inputs(input_dim, 2, batch, context_batch)
    expanded = network(kept.expand(*result_batch, -1).contiguous(), context.expand(*result_batch, -1).contiguous())
    for result, expected in zip(network(kept, context), expanded, strict=True):
        assert result.shape == (*result_batch, OUTPUT_DIM)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def _pairs(parameters):
    return list(zip(parameters[::2], parameters[1::2], strict=True))


def test_formula_of_the_mlp():
    network = _build(partial(MLP, hidden_dims=(8, 6), activation=nn.Tanh), 3, 2)
    kept, context = _inputs(3, 2)
    weight, bias, context_weight, *rest = network.parameters()
    hidden = kept @ weight.T + context @ context_weight.T + bias
    for weight, bias in _pairs(rest):
        hidden = hidden.tanh() @ weight.T + bias
    torch.testing.assert_close(torch.cat(network(kept, context), -1), hidden, rtol=1e-12, atol=1e-12)


def test_formula_of_the_residual_mlp():
    network = _build(partial(ResidualMLP, hidden_dim=8, num_blocks=2, activation=nn.Tanh), 3, 2)
    kept, context = _inputs(3, 2)
    weight, bias, context_weight, *rest = network.parameters()
    hidden = kept @ weight.T + context @ context_weight.T + bias
    *blocks, last = _pairs(rest)
    for first, second in zip(blocks[::2], blocks[1::2], strict=True):
        hidden = hidden + F.linear(F.linear(hidden.tanh(), *first).tanh(), *second)
    expected = F.linear(hidden.tanh(), *last)
    torch.testing.assert_close(torch.cat(network(kept, context), -1), expected, rtol=1e-12, atol=1e-12)


@all_networks
@all_reads
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shift_only", [False, True])
def test_starts_at_zero_and_the_last_layer_learns(make, input_dim, context_dim, dtype, shift_only):
    network = make(input_dim, OUTPUT_DIM, context_dim=context_dim, shift_only=shift_only).to(dtype)
    results = network(*(tensor.to(dtype) for tensor in _inputs(input_dim, context_dim)))
    results = [result for result in results if result is not None]
    assert len(results) == 2 - shift_only
    for result in results:
        assert result.dtype == dtype and not result.any()
    sum((result - 1).square().sum() for result in results).backward()
    moved = [p for p in network.parameters() if p.grad is not None and p.grad.any()]
    assert sum(p.numel() for p in moved if p.ndim == 1) >= len(results) * OUTPUT_DIM


@all_networks
def test_hidden_layers_do_not_start_at_zero(make):
    linears = [m for m in make(3, OUTPUT_DIM, context_dim=2).modules() if isinstance(m, nn.Linear)]
    zeros = sum(not linear.weight.any() for linear in linears)
    networks = 2 if "two networks" in _name(make) else 1
    assert zeros == networks * (2 if "linear" in _name(make) else 1)


def _name(make):
    return next(name for name, value in NETWORKS.items() if value is make)


@all_networks
@all_reads
def test_every_parameter_and_every_input_has_a_gradient(make, input_dim, context_dim):
    network = _build(make, input_dim, context_dim)
    inputs = [tensor.requires_grad_() for tensor in _inputs(input_dim, context_dim)]
    shift, raw = network(*inputs)
    weights = torch.linspace(1, 2, shift.numel(), dtype=torch.float64).reshape(shift.shape)
    ((shift + raw.square()) * weights).sum().backward()
    for parameter in [*network.parameters(), *(tensor for tensor in inputs if tensor.numel())]:
        assert parameter.grad.isfinite().all() and (parameter.grad != 0).all()


@all_networks
@all_reads
def test_gradients_are_true(make, input_dim, context_dim):
    network = _build(make, input_dim, context_dim)
    inputs = [t.requires_grad_(t.numel() > 0) for t in _inputs(input_dim, context_dim, (3,), ())]
    assert gradcheck(network, inputs)


@pytest.mark.parametrize("make", [partial(MLP, hidden_dims=(8,)), partial(ResidualMLP, hidden_dim=8)])
def test_separate_shares_no_parameter_between_shift_and_raw(make):
    def used_by(network, index):
        result = network(*_inputs(3, 2))[index].sum()
        gradients = torch.autograd.grad(result, tuple(network.parameters()), allow_unused=True)
        return {i for i, gradient in enumerate(gradients) if gradient is not None}

    together, apart = (_build(make, 3, 2, separate=separate) for separate in (False, True))
    assert used_by(together, 0) == used_by(together, 1) == set(range(len(list(together.parameters()))))
    assert not used_by(apart, 0) & used_by(apart, 1)
    assert used_by(apart, 0) | used_by(apart, 1) == set(range(len(list(apart.parameters()))))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("make", [MLP, ResidualMLP])
def test_shift_only_has_no_raw_and_no_parameters_for_it(make, separate):
    network = make(3, OUTPUT_DIM, shift_only=True, separate=separate)
    shift, raw = network(torch.randn(5, 3))
    assert shift.shape == (5, OUTPUT_DIM) and raw is None
    both = make(3, OUTPUT_DIM)
    spare = sum(p.numel() for p in both.parameters()) - sum(p.numel() for p in network.parameters())
    assert spare == OUTPUT_DIM * (64 + 1)


# Cost


@all_networks
@pytest.mark.parametrize("input_dim", [3, 0])
def test_has_as_many_parameters_as_if_kept_and_context_were_concatenated(make, input_dim):
    def count(network):
        return sum(parameter.numel() for parameter in network.parameters())

    assert count(make(input_dim, OUTPUT_DIM, context_dim=2)) == count(make(input_dim + 2, OUTPUT_DIM))


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch_shape, views", [((5,), {"t"}), ((2, 5), {"t", "view"})], ids=["one batch dim", "two"])
def test_costs_its_linear_layers_and_activations_and_nothing_else(batch_shape, views):
    network, kept = MLP(3, OUTPUT_DIM, (8, 8)), torch.randn(*batch_shape, 3)
    with _Operations() as seen:
        network(kept)
    work = [name for name in seen.names if name not in views]
    assert work == ["addmm", "silu", "addmm", "silu", "addmm", "split_with_sizes"]


@pytest.mark.parametrize("make", [MLP, ResidualMLP])
def test_results_are_views_of_one_tensor(make):
    shift, raw = make(3, OUTPUT_DIM)(torch.randn(5, 3))
    assert shift.untyped_storage().data_ptr() == raw.untyped_storage().data_ptr()


FLOPS = {
    # kept (100, 7) of 3 entries, context (7,) of 5 entries, hidden (8, 6), outputs 2 x 4; 2 flops per weight
    "no context": (3, 0, 2 * 700 * (3 * 8 + 8 * 6 + 6 * 8)),
    "context once for each column": (3, 5, 2 * 700 * (3 * 8 + 8 * 6 + 6 * 8) + 2 * 7 * 5 * 8),
    "context only: the whole network once": (0, 5, 2 * 7 * (5 * 8 + 8 * 6 + 6 * 8)),
}


@pytest.mark.parametrize("input_dim, context_dim, flops", FLOPS.values(), ids=FLOPS)
def test_context_is_projected_before_it_is_broadcast(input_dim, context_dim, flops):
    network = _build(partial(MLP, hidden_dims=(8, 6)), input_dim, context_dim)
    with FlopCounterMode(display=False) as counter:
        network(*_inputs(input_dim, context_dim, (100, 7), (7,)))
    assert counter.get_total_flops() == flops


# Transformations and copies


@all_networks
@all_reads
def test_vmap_over_the_batch(make, input_dim, context_dim):
    network = _build(make, input_dim, context_dim)
    inputs = _inputs(input_dim, context_dim, (4, 6), (6,))
    in_dims = (0,) if context_dim == 0 else (0, None)
    results = torch.func.vmap(network, in_dims=in_dims)(*inputs)
    for result, expected in zip(results, network(*inputs), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@all_networks
def test_vmap_over_an_ensemble_of_parameters(make):
    networks = [_build(make, 3, 2) for _ in range(3)]
    for i, network in enumerate(networks):
        nn.init.constant_(next(network.parameters()), float(i))
    parameters, buffers = torch.func.stack_module_state(networks)
    inputs = _inputs(3, 2)
    results = torch.func.vmap(lambda p, b: torch.func.functional_call(networks[0], (p, b), inputs))(parameters, buffers)
    for i, network in enumerate(networks):
        for result, expected in zip(results, network(*inputs), strict=True):
            torch.testing.assert_close(result[i], expected, rtol=1e-12, atol=1e-12)


@all_networks
@all_reads
def test_compiles_to_one_graph(make, input_dim, context_dim):
    torch._dynamo.reset()
    network = _build(make, input_dim, context_dim)
    inputs = _inputs(input_dim, context_dim, (2, 5), (5,))
    compiled = torch.compile(network, fullgraph=True, backend="eager")(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, network(*inputs), strict=True))


@all_networks
@all_reads
def test_trace_serves_other_batch_shapes_without_a_warning(make, input_dim, context_dim):
    network = _build(make, input_dim, context_dim)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(network, _inputs(input_dim, context_dim, (10, 7), (7,)))
    inputs = _inputs(input_dim, context_dim, (4, 3), (3,))
    assert all(torch.equal(a, b) for a, b in zip(traced(*inputs), network(*inputs), strict=True))


def _through_state_dict(network):
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(network.state_dict(), strict=True)
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
    "state_dict": _through_state_dict,
}


@all_networks
@all_reads
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_agree_and_share_nothing(make, input_dim, context_dim, duplicate):
    network, inputs = _build(make, input_dim, context_dim), _inputs(input_dim, context_dim)
    before = network(*inputs)
    other = duplicate(network)
    assert all(torch.equal(a, b) for a, b in zip(other(*inputs), before, strict=True))
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert all(torch.equal(a, b) for a, b in zip(network(*inputs), before, strict=True))


@all_networks
def test_repr_shows_the_sizes(make):
    assert "input_dim=3, output_dim=4, context_dim=2" in repr(make(3, OUTPUT_DIM, context_dim=2))


@all_networks
def test_reads_vectors(make):
    assert make.func.event_dim == make(3, OUTPUT_DIM).event_dim == 1


def test_building_without_kept_entries_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MLP(0, 1, context_dim=2)
        ResidualMLP(0, 1, context_dim=2)


# Activations

ACTIVATIONS = {
    "class": nn.ELU,
    "lambda": lambda: nn.LeakyReLU(0.1),
    "partial": partial(nn.Softplus, beta=2.0),
}


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize(
    "make, count",
    [(partial(MLP, hidden_dims=(5, 5, 5)), 3), (partial(ResidualMLP, num_blocks=2), 5)],
    ids=["MLP", "ResidualMLP"],
)
def test_any_activation_made_anew_for_each_layer(make, count, activation):
    network = make(3, OUTPUT_DIM, activation=activation)
    kind = type(activation())
    assert len({m for m in network.modules() if isinstance(m, kind)}) == count


@pytest.mark.parametrize("make", [MLP, ResidualMLP])
@pytest.mark.parametrize("activation", [torch.relu, F.silu, nn.SiLU(), lambda: torch.tanh, None, "relu"])
def test_refuses_what_makes_no_activation(make, activation):
    with pytest.raises(ValueError, match=r"activation must make a new module.*got .*; pass a class such as nn.SiLU"):
        make(3, OUTPUT_DIM, activation=activation)


# Refusals

BUILD_REFUSED = {
    "negative input": (lambda: MLP(-1, 4), "input_dim >= 0.*input_dim=-1"),
    "nothing to read": (lambda: MLP(0, 4), "read something.*input_dim=0, context_dim=0.*or a context"),
    "nothing to emit": (lambda: ResidualMLP(3, 0), "emit something.*output_dim=0"),
    "negative context": (lambda: ResidualMLP(3, 4, context_dim=-2), "context_dim=-2"),
    "hidden size 0": (lambda: MLP(3, 4, (8, 0)), r"hidden size must be 1 or more, got hidden_dims=\(8, 0\);"),
    "width 0": (lambda: ResidualMLP(3, 4, 0), "hidden_dim=0, num_blocks=2; .*use MLP"),
    "no blocks": (lambda: ResidualMLP(3, 4, num_blocks=0), "num_blocks=0; .*use MLP"),
}


@pytest.mark.parametrize("build, message", BUILD_REFUSED.values(), ids=BUILD_REFUSED)
def test_refuses_sizes_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


CALL_REFUSED = {
    "kept of the wrong size": (0, (5, 2), None, r"batch \+ \(3,\), got \(5, 2\); set input_dim"),
    "kept without an event": (0, (), None, r"batch \+ \(3,\), got \(\)"),
    "context not wanted": (0, (5, 3), (5, 2), r"reads no context, got one of shape \(5, 2\); .*context_dim"),
    "context missing": (2, (5, 3), None, r"contexts of shape batch \+ \(2,\), got none; give the flow"),
    "context of the wrong size": (2, (5, 3), (5, 4), r"batch \+ \(2,\), got one of shape \(5, 4\); give"),
    "context without an event": (2, (5, 3), (), r"batch \+ \(2,\), got one of shape \(\)"),
    "batches that clash": (2, (5, 3), (7, 2), r"must broadcast.*\(5, 3\) and \(7, 2\);.*size 1"),
    "batches that clash further left": (2, (5, 4, 3), (7, 1, 2), r"must broadcast"),
}


@pytest.mark.parametrize("make", [MLP, ResidualMLP])
@pytest.mark.parametrize("context_dim, kept, context, message", CALL_REFUSED.values(), ids=CALL_REFUSED)
def test_refuses_inputs_of_the_wrong_shape(make, context_dim, kept, context, message):
    network = make(3, OUTPUT_DIM, context_dim=context_dim)
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(kept), None if context is None else torch.zeros(context))
