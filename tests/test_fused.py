"""The fused pass gives what the layers give one by one: values, first and second derivatives, and nothing stale."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import assert_close, glow_step, image_coupling, randomised
from torch import nn
from torch.nn.utils import parametrizations

from pyro_affine import ComposeFlow, NormalizingFlow, network_step, real_nvp
from pyro_affine.actnorm import ActNorm, initialize_actnorms
from pyro_affine.bounded_input import BoundedInput
from pyro_affine.conditioners import MLP, ResidualMLP
from pyro_affine.conv_net import ResidualConvNet
from pyro_affine.correlations import Correlations
from pyro_affine.coupling import AffineCoupling
from pyro_affine.fused import Plan, Run
from pyro_affine.invertible_linear import InvertibleLinear
from pyro_affine.linear import LowerTriangularAffine, Permutation, Standardization
from pyro_affine.masks import alternating_mask, channel_mask, checkerboard_mask, half_mask
from pyro_affine.scales import AdditiveScale, AtanScale, ExpScale, SigmoidScale
from pyro_affine.tails import LOFT
from pyro_affine.whitening import DiagonalWhitening, Whitening


def layer(mask, scale=None, **options):
    num_kept = int(mask.sum())
    return AffineCoupling(mask, MLP(num_kept, mask.numel() - num_kept, (6,), **options), scale)


def units(size):
    whitening, standardization = Whitening(size), Standardization((size,))
    whitening.set(torch.linspace(-1, 1, size), tril(size))
    standardization.loc.fill_(0.5)
    standardization.scale.fill_(2.0)
    return [whitening, standardization]


def other_units(size):
    correlations, whitening = Correlations(size), DiagonalWhitening(size)
    correlations.loc.copy_(torch.linspace(-1, 1, size))
    correlations.scale_tril.copy_(tril(size))
    whitening.set(torch.linspace(-1, 1, size), torch.linspace(1, 2, size))
    return [correlations, whitening]


def tril(size):
    return torch.eye(size) + 0.3 * torch.ones(size, size).tril(-1)


def bounded(coupling):
    coupling.conditioner = BoundedInput(coupling.conditioner, 2.0)
    return coupling


ODD = (3, 2, 2)
CHAINS = {
    "halves, reordered": lambda: [real_nvp(5, num_layers=4, hidden_dims=(6, 4))],
    "other cuts after one another": lambda: [layer(torch.arange(5) < 2), layer(torch.arange(5) >= 1)],
    "alternating mask": lambda: [layer(alternating_mask(5)), layer(half_mask(5))],
    "no hidden layer": lambda: [AffineCoupling(half_mask(5), MLP(2, 3, ()))],
    "scale maps": lambda: [layer(half_mask(5), s) for s in (ExpScale(), AtanScale(0.5, 0.5), SigmoidScale())],
    "activations": lambda: [layer(half_mask(5), activation=a) for a in (nn.ReLU, nn.Tanh, nn.Mish)],
    "tails, triangular, units": lambda: [
        layer(half_mask(5)), LOFT((5,), 0.3), LowerTriangularAffine(torch.ones(5), 2.0), *units(5),
    ],
    "a part without a step": lambda: [
        layer(half_mask(5)), layer(half_mask(5), separate=True), *(layer(half_mask(5)) for _ in "ab"),
    ],
    "residual, bounded inputs": lambda: [real_nvp(5, num_layers=4, hidden_dim=6, input_bound=1.5)],
    "residual, two blocks": lambda: [AffineCoupling(half_mask(5), ResidualMLP(2, 3, 6, 2)), layer(half_mask(5))],
    "residual, other activations": lambda: [
        AffineCoupling(half_mask(5), ResidualMLP(2, 3, 6, 1, activation=a)) for a in (nn.Tanh, nn.ReLU)
    ],
    "bounded MLP, gathered": lambda: [AffineCoupling(alternating_mask(5), BoundedInput(MLP(3, 2, (6,)), 2.0))],
    "triangular at the base": lambda: [LowerTriangularAffine(torch.ones(5), 2.0), layer(half_mask(5))],
    "additive": lambda: [layer(half_mask(5), AdditiveScale())],
    "correlations": lambda: [layer(half_mask(5)), *other_units(5)],
    "norm and mixing of vectors": lambda: [
        ActNorm(5), layer(half_mask(5)), InvertibleLinear(5, seed=0), ActNorm(5), InvertibleLinear(5, seed=1),
    ],
    "Glow steps": lambda: [glow_step((4, 2, 3)), glow_step((4, 2, 3))],
    "norms alone, mixing twice": lambda: [
        ActNorm(ODD), image_coupling(channel_mask(3), ODD), *[InvertibleLinear(ODD, seed=i) for i in range(2)],
        ActNorm(ODD), ActNorm(ODD), image_coupling(~channel_mask(3), ODD, activation=nn.ReLU),
    ],
    "residual convolutions, bounded": lambda: [
        image_coupling(channel_mask(3), ODD, ResidualConvNet), bounded(image_coupling(~channel_mask(3), ODD)),
    ],
    "a checkerboard between": lambda: [
        glow_step(ODD), image_coupling(checkerboard_mask(2, 2), ODD), image_coupling(~channel_mask(3), ODD),
    ],
    "one network twice": lambda: [shared := layer(half_mask(5)), Permutation(torch.tensor([4, 3, 2, 1, 0])), shared],
}  # fmt: skip
BATCHES = [(), (3,), (2, 3), (0,)]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


def make_chain(name):
    return randomised(ComposeFlow(CHAINS[name]()).double())


def one_by_one(chain, value, is_forward):
    """The parts themselves, without any plan."""
    total = 0.0
    for _, part, _ in list(chain._leaves(0))[:: 1 if is_forward else -1]:
        value, log_det = part._forward(value) if is_forward else part._backward(value)
        total = total + log_det
    return value, total


def both_ways(chain, value, is_forward):
    fused = chain._forward(value) if is_forward else chain._backward(value)
    assert any(isinstance(part, Run) for _, part, _ in chain.__dict__["_plan"].entries)
    return fused, one_by_one(chain, value, is_forward)


def gradients(outputs, inputs, *, create_graph=False):
    value, log_det = outputs
    loss = (value.sin() * value).sum() + (log_det**2).sum()
    return torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True)


def assert_all_close(found, expected, tolerance=1e-10):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, tolerance)


@pytest.mark.parametrize("is_forward", [True, False], ids=["forward", "inverse"])
@pytest.mark.parametrize("batch_shape", BATCHES, ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_values_and_gradients(name, batch_shape, is_forward):
    chain = make_chain(name)
    value = torch.randn(*batch_shape, *chain.event_shape, requires_grad=True)
    fused, expected = both_ways(chain, value, is_forward)
    assert fused[0].shape == value.shape and fused[1].shape == batch_shape
    assert_all_close(fused, expected, 1e-12)
    inputs = [value, *chain.parameters()]
    assert_all_close(gradients(fused, inputs), gradients(expected, inputs))
    with torch.no_grad():
        assert_all_close(both_ways(chain, value, is_forward)[0], expected, 1e-12)


@pytest.mark.parametrize("is_forward", [True, False], ids=["forward", "inverse"])
@pytest.mark.parametrize("name", CHAINS)
def test_second_derivatives(name, is_forward):
    chain = make_chain(name)
    value = torch.randn(3, *chain.event_shape, requires_grad=True)
    inputs = [value, *chain.parameters()]
    seconds = []
    for outputs in both_ways(chain, value, is_forward):
        firsts = gradients(outputs, inputs, create_graph=True)
        loss = sum((first**2).sum() for first in firsts if first is not None)
        seconds.append(torch.autograd.grad(loss, inputs, allow_unused=True))
    assert_all_close(*seconds, 1e-8)


USES = {
    "value alone": lambda outputs: outputs[0].sum(),
    "log_det alone": lambda outputs: (outputs[1] ** 2).sum(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("trained", ["all", "input", "parameters"])
def test_gradients_of_what_is_asked_for(use, trained):
    chain, value = make_chain("halves, reordered"), torch.randn(3, 5, requires_grad=trained != "parameters")
    chain.requires_grad_(trained != "input")
    inputs = [t for t in (value, *chain.parameters()) if t.requires_grad]
    for is_forward in (True, False):
        fused, expected = both_ways(chain, value, is_forward)
        found = [torch.autograd.grad(use(outputs), inputs, allow_unused=True) for outputs in (fused, expected)]
        assert_all_close(*([torch.zeros(()) if g is None else g for g in gradients] for gradients in found))


def test_jacobian_and_hessian():
    chain, value = make_chain("halves, reordered"), torch.randn(5)
    jacobian = torch.autograd.functional.jacobian(lambda x: chain._forward(x)[0], value)
    assert_close(jacobian.det().abs().log(), chain._forward(value)[1], 1e-10)
    batched = torch.autograd.functional.jacobian(lambda x: chain._forward(x)[0], value, vectorize=True)
    assert_close(batched, jacobian, 1e-12)
    assert_close(torch.func.jacrev(lambda x: chain._forward(x)[0])(value), jacobian, 1e-12)
    assert_close(torch.func.jacfwd(lambda x: chain._forward(x)[0])(value), jacobian, 1e-12)
    hessian = torch.autograd.functional.hessian(lambda x: chain._backward(x)[1], value)
    assert_close(hessian, torch.func.hessian(lambda x: chain._backward(x)[1])(value), 1e-10)


def test_forward_mode():
    chain, value, tangent = make_chain("halves, reordered"), torch.randn(5), torch.randn(5)
    with torch.autograd.forward_ad.dual_level():
        made = chain._forward(torch.autograd.forward_ad.make_dual(value, tangent))[0]
        pushed = torch.autograd.forward_ad.unpack_dual(made).tangent
    assert_close(pushed, torch.func.jacrev(lambda x: chain._forward(x)[0])(value) @ tangent, 1e-12)


def test_a_graph_can_be_used_twice_if_it_is_retained_and_not_else():
    chain, value = make_chain("halves, reordered"), torch.randn(3, 5)
    loss = chain._forward(value)[1].sum()
    first = torch.autograd.grad(loss, list(chain.parameters()), retain_graph=True, allow_unused=True)
    assert_all_close(torch.autograd.grad(loss, list(chain.parameters()), allow_unused=True), first, 1e-14)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def exchange_network(coupling):
    coupling.conditioner = randomised(MLP(2, 3, (7,)).double())


def exchange_scale(coupling):
    coupling.scale = ExpScale()


def exchange_activation(coupling):
    coupling.conditioner.network.layers[0] = nn.Tanh()


def parametrise(coupling):
    parametrizations.weight_norm(coupling.conditioner.network.from_kept)
    coupling.conditioner.network.from_kept.parametrizations.weight.original0.data.mul_(2)


def hook(coupling):
    coupling.conditioner.register_forward_hook(lambda module, args, output: (output[0] + 1, output[1]))


def load_mask(coupling):
    state = coupling.state_dict()
    coupling.load_state_dict({**state, "partition.mask": torch.tensor([True, False, False, False, True])})


CHANGES = [exchange_network, exchange_scale, exchange_activation, parametrise, hook, load_mask, nn.Module.float]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_was_exchanged_is_seen(change):
    chain = make_chain("halves, reordered")
    before, _ = both_ways(chain, torch.ones(3, 5), True)
    dtype = torch.float32 if change is nn.Module.float else torch.float64
    change(chain if change is nn.Module.float else next(m for m in chain.modules() if isinstance(m, AffineCoupling)))
    found, value = [], torch.ones(3, 5, dtype=dtype)
    for _ in range(2):
        found.append(chain._forward(value)[0])
        assert_close(found[-1], one_by_one(chain, value, True)[0], 1e-12 if dtype == torch.float64 else 1e-5)
    assert not torch.equal(found[0].double(), before[0])


def test_guard_and_memory_can_be_set_later():
    chain = make_chain("halves, reordered")
    chain._forward(torch.ones(5))
    chain.parts[0].parts[1].guard = True
    with pytest.raises(ValueError, match="part 1, AffineCoupling"):
        chain._forward(torch.full((5,), torch.nan))
    chain.parts[0].parts[1].guard = False
    chain.parts[0].memory = "checkpoint"
    chain._forward(torch.ones(5))
    assert not any(isinstance(part, Run) for _, part, _ in chain.__dict__["_plan"].entries)


def test_norms_of_a_chain_that_was_fused_still_wait_for_data():
    chain, data = ComposeFlow(CHAINS["Glow steps"]()), 2 + 3 * torch.randn(50, 4, 2, 3)
    chain._backward(data)
    x = initialize_actnorms(chain, data)
    assert_close(x, one_by_one(chain, data, False)[0], 1e-12)
    assert_close(both_ways(chain, data, False)[0][0], x, 1e-12)
    last = chain.parts[-1].parts[-1]
    assert last.initialized
    assert_close(last.shift.flatten(), data.mean((0, 2, 3)), 1e-12)


OTHER_CONVOLUTIONS = {
    "around the border": lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
    "wider": lambda: nn.Conv2d(2, 3, 3, padding=2, dilation=2),
    "in groups": lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2),
    "without a bias": lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False),
    "not square": lambda: nn.Conv2d(2, 3, (1, 3), padding=(0, 1)),
}


@pytest.mark.parametrize("make", OTHER_CONVOLUTIONS.values(), ids=OTHER_CONVOLUTIONS)
def test_convolutions_of_another_kind_are_left_to_the_layers(make):
    assert network_step.map_of(make(), torch.Size([4, 4])) is None


def test_copies_have_plans_of_their_own():
    chain = make_chain("halves, reordered")
    chain._forward(torch.ones(5))
    twin = copy.deepcopy(chain)
    assert twin.__dict__["_plan"] is None
    randomised(twin)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert_close(twin._forward(torch.ones(5))[0], one_by_one(twin, torch.ones(5), True)[0], 1e-12)
    assert not torch.equal(twin._forward(torch.ones(5))[0], chain._forward(torch.ones(5))[0])


def test_autocast_is_left_to_the_layers():
    flow = NormalizingFlow(real_nvp(4), 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flow.log_prob(torch.zeros(2, 4, dtype=torch.float32)).shape == (2,)


def test_inference_mode_leaves_nothing_behind():
    chain, value = make_chain("residual, bounded inputs"), torch.randn(3, 5, requires_grad=True)
    network_step.number.cache_clear()
    with torch.inference_mode():
        chain._forward(value)
    firsts = gradients(chain._forward(value), [value], create_graph=True)
    assert torch.autograd.grad(firsts[0].sum(), value)[0].isfinite().all()


def test_a_frozen_chain_made_in_inference_mode_runs_outside_it():
    with torch.inference_mode():
        chain = make_chain("halves, reordered").requires_grad_(False)
    fused, expected = both_ways(chain, torch.ones(3, 5), True)
    assert_all_close(fused, expected, 1e-12)
    assert not fused[0].requires_grad


def test_the_meta_device_is_left_to_the_layers():
    flow = NormalizingFlow(real_nvp(4), 4).to("meta")
    assert flow.log_prob(torch.zeros(2, 4, device="meta")).shape == (2,)


def with_own_network():
    return AffineCoupling(half_mask(5), nn.Sequential(nn.Linear(2, 6), Halves()))


class Halves(nn.Module):
    def forward(self, both):
        return both.chunk(2, -1)


UNFUSED = {
    "tails": lambda: ComposeFlow([LOFT((5,), 0.2)]),
    "own network": lambda: ComposeFlow([with_own_network()]),
    "own network, nested": lambda: ComposeFlow([ComposeFlow([with_own_network()])]),
}


@pytest.mark.parametrize("make", UNFUSED.values(), ids=UNFUSED)
def test_a_part_exchanged_in_a_chain_without_a_run_is_seen(make):
    chain, value = make(), torch.ones(3, 5)
    before = chain._forward(value)[0]
    inner = chain.parts[0] if isinstance(chain.parts[0], ComposeFlow) else chain
    inner.parts[0] = LOFT((5,), 0.7)
    found = chain._forward(value)[0]
    assert_close(found, LOFT((5,), 0.7)(value), 1e-12)
    assert not torch.equal(found, before)


def test_memory_and_guard_of_a_nested_chain_without_a_run_can_be_set_later():
    chain, value = UNFUSED["own network, nested"](), torch.ones(3, 5)
    chain._forward(value)
    chain.parts[0].memory = "invertible"
    assert "Invertible" in chain._forward(value)[0].grad_fn.name()
    chain.parts[0].guard = True
    with pytest.raises(ValueError, match="finite"):
        chain._forward(torch.full((5,), torch.nan))


def test_hooks_of_the_chain_itself_leave_its_plan_alone():
    chain = make_chain("halves, reordered")
    chain.register_forward_hook(lambda module, args, output: None)
    chain._forward(torch.ones(5))
    plan = chain.__dict__["_plan"]
    chain._forward(torch.ones(5))
    assert chain.__dict__["_plan"] is plan and isinstance(plan.entries[0][1], Run)


def test_a_layer_is_fused_again_without_its_hook():
    chain, calls = make_chain("halves, reordered"), []
    handle = chain.parts[0].parts[0].conditioner.register_forward_hook(lambda *_: calls.append(1))
    chain._forward(torch.ones(5))
    handle.remove()
    both_ways(chain, torch.ones(5), True)
    assert calls == [1] and len(chain.__dict__["_plan"].entries) == 1


def test_hooks_of_all_modules_are_called():
    chain, calls = make_chain("halves, reordered"), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module)))
    try:
        chain._forward(torch.ones(5))
    finally:
        handle.remove()
    assert calls.count(MLP) == 4


def test_hooks_of_saved_tensors_see_each_activation():
    """So that checkpoints of torch's save what they promise."""
    chain, value, seen = make_chain("halves, reordered"), torch.randn(3, 5, requires_grad=True), []
    for run in (chain._forward, lambda value: one_by_one(chain, value, True)):
        seen.append([])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen[-1].append(t.shape) or t, lambda t: t):
            run(value)
    assert seen[0] == seen[1] and len(seen[0]) > 20


def test_a_result_changed_in_place_leaves_the_gradients_right():
    chain, value = make_chain("triangular at the base"), torch.randn(3, 5)
    found = []
    for factor in (1, 3):
        x, log_det = chain._backward(value)
        loss = x.sum() + log_det.sum()
        x.detach().mul_(factor)
        found.append(torch.autograd.grad(loss, list(chain.parameters()), allow_unused=True))
    assert_all_close(*found)


def test_second_derivatives_where_nothing_depends_on_the_input():
    chain, value = make_chain("additive"), torch.randn(3, 5, requires_grad=True)
    log_det = chain._forward(value)[1]
    (first,) = torch.autograd.grad(log_det.sum(), value, create_graph=True, materialize_grads=True)
    assert not first.any()


def test_a_chain_without_a_fused_run_has_a_plan_that_holds():
    chain = ComposeFlow([Permutation(torch.tensor([1, 0]))])
    assert isinstance(Plan(chain, list(chain._leaves(0))).entries[0][1], Permutation)
    assert Plan(chain, list(chain._leaves(0))).holds()
