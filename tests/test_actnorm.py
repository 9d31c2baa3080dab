"""ActNorm: standardised on the base side, started by data and by nothing else, saved with its flag."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import assert_close, density, glow_step, randomised

from pyro_affine.actnorm import ActNorm, initialize_actnorms
from pyro_affine.audit import audit
from pyro_affine.compose import ComposeFlow, ConditionalComposeFlow
from pyro_affine.conv_net import ConvNet
from pyro_affine.coupling import ConditionalAffineCoupling
from pyro_affine.fit_density import fit_density
from pyro_affine.flows import NormalizingFlow
from pyro_affine.invertible_linear import InvertibleLinear, invertible_conv1x1
from pyro_affine.linear import LowerTriangularAffine
from pyro_affine.masks import checkerboard_mask
from pyro_affine.serialize import load, save
from pyro_affine.transform import FlowTransform

F64 = torch.float64
SHAPES = [(1,), (5,), (3, 4), (1, 3, 3), (3, 4, 2), (2, 1, 5)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def values(*shape, seed=0):
    """Skewed numbers whose units differ from channel to channel of an event."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, dtype=F64, generator=generator) * 0.7).exp()


def data(shape, batch_shape=(50,), seed=0):
    units = torch.logspace(-3, 3, shape[0], dtype=F64).reshape(-1, *[1] * (len(shape) - 1))
    return values(*batch_shape, *shape, seed=seed) * units - 5 * units


def by_channel(x, rank):
    return x.movedim(-rank, 0).flatten(1)


def assert_standardised(x, rank):
    channels = by_channel(x, rank)
    assert_close(channels.mean(1), torch.zeros(len(channels), dtype=F64), 1e-10)
    assert_close(channels.std(1), torch.ones(len(channels), dtype=F64), 1e-10)


@each_shape
@pytest.mark.parametrize("batch_shape", [(50,), (5, 1, 9)], ids=str)
def test_data_are_standardised_on_the_base_side(shape, batch_shape):
    t = ActNorm(shape).double()
    y = data(shape, batch_shape)
    assert torch.equal(t(y), y) and not t.initialized
    t.initialize(y)
    assert_standardised(t.inv(y), len(shape))
    assert t.initialized
    assert t.log_scale.shape == t.shift.shape == (shape[0], *[1] * (len(shape) - 1))
    spreads = by_channel(y, len(shape)).std(1).log()
    pixels = torch.Size(shape[1:]).numel()
    assert_close(t.log_abs_det_jacobian(t.inv(y), y), (pixels * spreads.sum()).expand(batch_shape), 1e-10)


def test_one_image_has_enough_values():
    t = ActNorm((2, 3, 4)).double()
    t.initialize(data((2, 3, 4), ()))
    assert_standardised(t.inv(data((2, 3, 4), ())), 3)


def test_initialising_again_starts_anew():
    t = randomised(ActNorm((2, 3, 3)))
    t.initialize(data((2, 3, 3)) * 7)
    t.initialize(data((2, 3, 3)))
    assert_standardised(t.inv(data((2, 3, 3))), 3)


def constant(shape, channel, value=0.1, dtype=F64):
    y = data(shape).to(dtype)
    y.select(-len(shape), channel).fill_(value)
    return y


def with_entry(value):
    y = data((3, 2, 2))
    y[7, 1, 0, 1] = value
    return y


FLAT = {
    "constant channel": ((3, 2, 2), lambda: constant((3, 2, 2), 2), "deviation .* in channel 2 of 3; drop"),
    "constant channel of zeros": ((3, 2, 2), lambda: constant((3, 2, 2), 0, 0.0), "channel 0 of 3"),
    "constant entry": ((5,), lambda: constant((5,), 3), "channel 3 of 5"),
    "spread of rounding": ((2, 2, 2), lambda: 1e8 + 3e-8 * values(9, 2, 2, 2), "channel 0 of 2"),
    "not a number": ((3, 2, 2), lambda: with_entry(float("nan")), "nan in channel 1 of 3"),
    "infinite": ((3, 2, 2), lambda: with_entry(float("inf")), "nan in channel 1 of 3"),
    "one value": ((5,), lambda: data((5,), (1,)), "two values for each channel"),
    "one value, no batch": ((5,), lambda: data((5,), ()), "two values for each channel"),
    "another size": ((3, 2, 2), lambda: data((3, 2, 3)), r"\(3, 2, 2\).*reshape"),
    "another type": ((5,), lambda: data((5,)).float(), "agree in dtype"),
    "integers": ((5,), lambda: torch.ones(9, 5, dtype=torch.long), "floating point"),
}


@pytest.mark.parametrize("shape, make, words", FLAT.values(), ids=FLAT)
def test_refuses_data_and_stays_as_it_was(shape, make, words):
    t = randomised(ActNorm(shape))
    before = copy.deepcopy(t.state_dict())
    with pytest.raises(ValueError, match=words):
        t.initialize(make())
    assert_same_state(t, before)


@pytest.mark.parametrize("shape", [(), 0, (3, 0, 2)], ids=str)
def test_refuses_events_of_no_entry(shape):
    with pytest.raises(ValueError, match="one entry at least"):
        ActNorm(shape)


def test_channel_with_a_far_away_mean_keeps_its_spread():
    y = 1e4 + data((1, 3, 3)).float() / data((1, 3, 3)).std().float()
    t = ActNorm((1, 3, 3))
    t.initialize(y)
    assert_close(t.inv(y).mean(), torch.tensor(0.0), 1e-3)
    assert_close(t.inv(y).std(), torch.tensor(1.0), 1e-3)


def assert_same_state(module, before):
    after = module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_no_call_changes_it(train, started):
    t = ActNorm((2, 3, 3)).double().train(train)
    if started:
        t.initialize(data((2, 3, 3)))
    before = copy.deepcopy(t.state_dict())
    x = values(9, 2, 3, 3, seed=1)
    y = t(x)
    t.log_abs_det_jacobian(x, y), t.inv(x), density(t).log_prob(x), density(t).rsample((3,))
    assert_same_state(t, before)


def test_copies_files_and_states_keep_flag_and_density(tmp_path):
    t = glow_step((3, 2, 3)).double()
    initialize_actnorms(t, data((3, 2, 3)))
    save(tmp_path / "flow.pt", t)
    other = glow_step((3, 2, 3)).double()
    other.load_state_dict(t.state_dict())
    y = data((3, 2, 3), seed=1)
    for twin in (other, copy.deepcopy(t), pickle.loads(pickle.dumps(t)), load(tmp_path / "flow.pt")):
        assert twin.parts[2].initialized
        assert torch.equal(density(twin).log_prob(y), density(t).log_prob(y))
        before = copy.deepcopy(twin.state_dict())
        initialize_actnorms(twin, 3 * y)  # all are initialised: nothing is left to do
        assert_same_state(twin, before)


def stack(shape):
    """ActNorms at both ends and in the middle of nested chains."""
    last = LowerTriangularAffine(torch.ones(shape, dtype=F64)) if len(shape) == 1 else invertible_conv1x1(shape)
    inner = ComposeFlow([ActNorm(shape), randomised(last), ActNorm(shape)])
    return ComposeFlow([ActNorm(shape), randomised(InvertibleLinear(shape)), inner]).double()


@pytest.mark.parametrize("shape", [(4,), (3, 4, 2)], ids=str)
def test_each_layer_of_a_stack_sees_the_data_as_they_arrive(shape):
    flow, y = stack(shape), data(shape)
    x = initialize_actnorms(flow, y)
    assert torch.equal(x, flow._backward(y)[0]) and not x.requires_grad
    assert_standardised(x, len(shape))
    for part in reversed([flow.parts[0], flow.parts[1], *flow.parts[2].parts]):
        y = part._backward(y)[0]
        if isinstance(part, ActNorm):
            assert part.initialized
            assert_standardised(y.detach(), len(shape))


class Backwards(FlowTransform):
    """A layer that holds another one out of sight of a chain."""

    def __init__(self, inner):
        super().__init__(inner.event_shape)
        self.inner = inner

    def _forward(self, x):
        y, log_det = self.inner._forward(x.flip(-1))
        return y.flip(-1), log_det

    def _backward(self, y):
        x, log_det = self.inner._backward(y.flip(-1))
        return x.flip(-1), log_det


def test_layers_inside_layers_are_reached_and_initialised_ones_stay():
    inner, outer = ActNorm((2, 3, 3)), ActNorm((2, 3, 3))
    flow = ComposeFlow([Backwards(inner), outer]).double()
    outer.initialize(data((2, 3, 3), seed=5))
    before = copy.deepcopy(outer.state_dict())
    x = initialize_actnorms(flow, data((2, 3, 3)))
    assert_same_state(outer, before)
    assert inner.initialized
    assert_standardised(x, 3)


def test_layers_of_a_conditional_flow():
    mask, shape = checkerboard_mask(3, 3), (1, 3, 3)
    network = ConvNet(mask, shape, 3, context_dim=2)
    parts = [ActNorm(shape), ConditionalAffineCoupling(mask, network, event_shape=shape), ActNorm(shape)]
    chain = randomised(ConditionalComposeFlow(parts))
    x = initialize_actnorms(chain.condition(values(50, 2)), data(shape))
    assert chain.parts[0].initialized and chain.parts[2].initialized
    assert_standardised(x, 3)


def test_a_layer_that_data_do_not_reach_is_named_and_none_waits_for_more():
    flow = ComposeFlow([ActNorm(3).inv, ActNorm(3)]).double()
    with pytest.raises(ValueError, match="got 1 that they do not, such as one in an inverse"):
        initialize_actnorms(flow, data((3,)))
    before = copy.deepcopy(flow.state_dict())
    flow.inv(data((3,), seed=1)), flow(data((3,), seed=2))
    assert_same_state(flow, before)


def test_a_failure_leaves_no_layer_waiting():
    flow = ComposeFlow([ActNorm(3), ActNorm(3)]).double()
    with pytest.raises(ValueError, match="channel 1 of 3"):
        initialize_actnorms(flow, constant((3,), 1))
    flow.inv(data((3,)))
    assert not flow.parts[0].initialized and not flow.parts[1].initialized


@pytest.mark.parametrize("shape", [(4,), (3, 4, 2)], ids=str)
def test_fit_density_initialises_each_layer_once(shape):
    flow = NormalizingFlow(stack(shape), shape).double()
    y = data(shape)
    fit = {"validation": None, "progress": False, "seed": 0, "standardize": False, "num_steps": 1}
    fit_density(flow, y, learning_rate=1e-12, **fit)
    spreads = by_channel(flow.chain._backward(y)[0].detach(), len(shape)).std(1)
    assert_close(spreads, torch.ones(shape[0], dtype=F64), 1e-6)
    shift = flow.transform.parts[0].shift.detach().clone()
    fit_density(flow, 100 + 9 * y, learning_rate=1e-12, **fit)
    assert_close(flow.transform.parts[0].shift.detach(), shift, 1e-6)


def test_gradients_flow_after_initialising_and_a_warm_cache_is_not_stale():
    t = ActNorm((2, 3, 3)).double()
    y = data((2, 3, 3))
    x = t.inv(y)
    t.initialize(y)
    fresh = t.with_cache(0)
    assert_close(t.log_abs_det_jacobian(x, y), fresh.log_abs_det_jacobian(x, y), 1e-12)
    density(t).log_prob(y).sum().backward()
    # at the start x is standardised, so that the mean log-density is at its maximum over shift and scale
    for parameter in (t.shift, t.log_scale):
        assert parameter.grad is not None
    assert_close(t.shift.grad * t.log_scale.exp(), torch.zeros(2, 1, 1, dtype=F64), 1e-8)
    assert_close(t.log_scale.grad, torch.full((2, 1, 1), -1.0, dtype=F64), 1e-8)  # of std with N - 1


def test_audit_sees_every_entry_move_and_none_interact():
    report = audit(ActNorm((2, 1, 2)))
    assert report.unmoved == [] and len(report.uncoupled) == 6


@pytest.mark.parametrize("shape", [(3, 2, 2), (5,)], ids=str)
def test_wrong_sizes_are_refused_by_name(shape):
    t = ActNorm(shape)
    for call in (t, t.inv):
        with pytest.raises(ValueError, match=r"ActNorm takes events of shape .* reshape"):
            call(torch.zeros(4, *shape[:-1], shape[-1] + 1))
