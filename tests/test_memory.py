"""Chains that keep fewer activations: the same gradients, constant memory, and errors where neither can be had."""

from __future__ import annotations

import copy
import pickle

import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
from benchmarks.memory import LiveBytes, peak_bytes, set_memory
from cases import (
    assert_close,
    conditional_coupling,
    coupling,
    glow,
    glow_step,
    image_coupling,
    mixed,
    multi_scale,
    randomised,
    with_foreign,
    x_points,
    y_points,
)
from torch import nn
from torch.distributions import AffineTransform, ExpTransform, SigmoidTransform
from torch.func import functional_call, jacrev, vmap

from pyro_affine import (
    AffineCoupling,
    ComposeFlow,
    ConditionalComposeFlow,
    LogitImages,
    NormalizingFlow,
    conditional_real_nvp,
    load,
    real_nvp,
    save,
)
from pyro_affine.conditioners import MLP
from pyro_affine.masks import checkerboard_mask, half_mask

SAVING = ("checkpoint", "invertible")
every_saving = pytest.mark.parametrize("memory", SAVING)
every_direction = pytest.mark.parametrize("direction", ["_forward", "_backward"])


def twice_the_same():
    layer = coupling(half_mask(5))
    return ComposeFlow([layer, coupling(half_mask(5, keep_first=False)), layer])


def weight_norm():
    mask = checkerboard_mask(2, 4)
    return ComposeFlow([image_coupling(m, (1, 2, 4), weight_norm=True) for m in (mask, ~mask)])


CHAINS = {
    "couplings": lambda: real_nvp(5, num_layers=6, hidden_dims=(6,)),
    "linear layers": mixed,
    "inverses": lambda: ComposeFlow([coupling(half_mask(5)), mixed().inv]),
    "one layer twice": twice_the_same,
    "chain in a chain": lambda: ComposeFlow([mixed(), coupling(half_mask(5))]),
    "elementwise on vectors": lambda: ComposeFlow([AffineTransform(0.5, -2.0), mixed(), SigmoidTransform()]),
    "elementwise alone": lambda: ComposeFlow([AffineTransform(0.5, -2.0), ExpTransform()]),
    "Pyro's layers": lambda: with_foreign(pyro_transforms.householder(5), pyro_transforms.spline(5)),
    "Glow step: ActNorm, 1x1 convolution, coupling": lambda: glow_step((3, 2, 3)),
    "weight norm": weight_norm,
    "multi-scale": lambda: ComposeFlow([multi_scale(), LogitImages(0.05, (1, 4, 6))]),
    "multi-scale Glow": lambda: ComposeFlow([glow()]),
}
each_chain = pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)


def gradients(flow, direction, points, parameters=(), memory="full"):
    """Gradients of a function of value and log-determinant, with respect to the points and to what is given."""
    set_memory(flow, memory)
    points = points.detach().clone().requires_grad_()
    value, log_det = getattr(flow, direction)(points)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    loss = (weights * value.square()).sum() + log_det.sin().sum()
    wanted = [points, *flow.parameters(), *parameters]
    return value, log_det, *torch.autograd.grad(loss, wanted, allow_unused=True)


def assert_same(actual, expected, tolerance=1e-9):
    """Relative to the size of each tensor; the required accuracy is 1e-6 in float64."""
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            one, other = one.detach(), other.detach()
            assert float((one - other).norm()) <= tolerance * (1e-3 + float(other.norm()))


def points_of(flow, direction, batch_shape=(4,)):
    return (x_points if direction == "_forward" else y_points)(flow, batch_shape)


@each_chain
@every_direction
@every_saving
def test_gradients_are_the_plain_ones(make, direction, memory):
    flow = randomised(make())
    points = points_of(flow, direction)
    assert_same(gradients(flow, direction, points, memory=memory), gradients(flow, direction, points))


@pytest.mark.parametrize("batch_shape", [(), (0,), (2, 3)], ids=str)
@every_direction
def test_any_batch_shape(batch_shape, direction):
    flow = randomised(mixed())
    points = points_of(flow, direction, batch_shape)
    actual = gradients(flow, direction, points, memory="invertible")
    assert_same(actual, gradients(flow, direction, points))


@every_direction
@every_saving
@pytest.mark.parametrize("context_shape", [(2,), (7, 2)], ids=str)
def test_gradients_with_respect_to_a_context(direction, memory, context_shape):
    parts = [conditional_coupling(half_mask(5)), coupling(half_mask(5)), conditional_coupling(~half_mask(5))]
    conditional = randomised(ConditionalComposeFlow(parts))
    source = torch.randn(context_shape, dtype=torch.float64).requires_grad_()
    flow = conditional.condition(2 * source.sin())
    points = points_of(flow, direction, (3, *context_shape[:-1]))
    for given in (points, points.reshape(-1, 5)[:1]):  # the context widens the batch of the latter
        flow = conditional.condition(2 * source.sin())
        actual = gradients(flow, direction, given, [source], memory)
        flow = conditional.condition(2 * source.sin())
        assert_same(actual, gradients(flow, direction, given, [source]))
        assert actual[-1].any()


@every_saving
def test_multi_scale_with_a_context(memory):
    conditional = randomised(multi_scale(conditional=True))
    context = torch.randn(3, 2, dtype=torch.float64).requires_grad_()
    flow = ComposeFlow([conditional.condition(context)])
    points = points_of(flow, "_backward", (3,))
    actual = gradients(flow, "_backward", points, [context], memory)
    assert_same(actual, gradients(flow, "_backward", points, [context]))


def jittered(flow, size):
    for parameter in flow.parameters():
        parameter.data.add_(size * torch.randn_like(parameter))
    return flow


@every_direction
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-5), (torch.float64, 1e-12)], ids=str)
def test_gradients_of_a_deep_stack(direction, dtype, tolerance):
    """In float32 the rounding errors of 64 inversions pass on to the gradients: 3e-5 of their size at most."""
    flow = jittered(real_nvp(16, num_layers=64, hidden_dims=(32,)), 0.05).to(dtype)
    points = torch.randn(64, 16, dtype=dtype)
    assert_same(gradients(flow, direction, points, memory="invertible"), gradients(flow, direction, points), tolerance)


def trained(memory, loss):
    torch.manual_seed(0)
    flow = set_memory(randomised(ComposeFlow([glow_step((3, 2, 3)), glow_step((3, 2, 3))])), memory)
    optimiser = torch.optim.AdamW(flow.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(10):
        optimiser.zero_grad()
        loss(flow).backward()
        optimiser.step()
    return [*flow.parameters()]


def base():
    return dist.Normal(torch.zeros(3, 2, 3, dtype=torch.float64), 1.0).to_event(3)


DATA = torch.linspace(-2, 2, 8 * 18, dtype=torch.float64).sin().reshape(8, 3, 2, 3)


def density_loss(flow):
    return -dist.TransformedDistribution(base(), [flow]).log_prob(DATA).mean()


def reverse_kl(flow):
    q = dist.TransformedDistribution(base(), [flow])
    y = q.rsample((8,))
    return (q.log_prob(y) + 0.1 * (y - 1).pow(4).flatten(1).sum(-1)).mean()


@every_saving
@pytest.mark.parametrize("loss", [density_loss, reverse_kl])
def test_training_with_adamw_ends_at_the_same_place(memory, loss):
    assert_same(trained(memory, loss), trained("full", loss), 1e-6)


@every_saving
def test_frozen_and_unused_parameters_get_no_gradient(memory):
    flow = randomised(real_nvp(5, num_layers=3, hidden_dims=(6,)))
    frozen = flow.parts[1]
    frozen.requires_grad_(False)
    flow.parts[0].conditioner.unused = nn.Parameter(torch.ones(3))
    set_memory(flow, memory)._backward(y_points(flow, (4,)))[1].sum().backward()
    without = {name for name, p in flow.named_parameters() if p.grad is None}
    assert without == {n for n, _ in flow.named_parameters() if n.startswith("parts.1.") or n.endswith("unused")}


@every_saving
def test_hooks_of_parameters_see_the_whole_gradient_once(memory):
    flow = randomised(twice_the_same())
    points, seen = y_points(flow, (4,)), []
    expected = gradients(flow, "_backward", points)[3]
    first = next(flow.parameters())
    first.register_hook(lambda grad: seen.append(grad.clone()))
    first.register_post_accumulate_grad_hook(lambda _: seen.append(None))
    set_memory(flow, memory)
    x, log_det = flow._backward(points)
    weights = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape)
    ((weights * x.square()).sum() + log_det.sin().sum()).backward()
    assert len(seen) == 2 and seen[1] is None
    assert_same([seen[0], first.grad], [expected, expected])


@every_saving
def test_one_graph_can_be_differentiated_twice(memory):
    flow = set_memory(randomised(mixed()), memory)
    y = y_points(flow, (4,)).requires_grad_()
    x, log_det = flow._backward(y)
    first = torch.autograd.grad(log_det.sum(), [y, *flow.parameters()], retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(log_det.sum(), [y, *flow.parameters()], retain_graph=True, allow_unused=True)
    assert_same(first, second, 0)
    (alone,) = torch.autograd.grad(x.sum(), y)  # no gradient comes in for the log-determinant
    assert alone.any()


@every_saving
def test_gradients_of_swapped_parameters_when_they_are_swapped_back(memory):
    flow = set_memory(randomised(mixed()), memory)
    x = x_points(flow, (4,))
    other = {name: (p.detach() + 0.3).requires_grad_() for name, p in flow.named_parameters()}
    loss = functional_call(flow, other, (x,)).square().sum()
    actual = torch.autograd.grad(loss, list(other.values()))
    plain = set_memory(flow, "full")
    expected = torch.autograd.grad(functional_call(plain, other, (x,)).square().sum(), list(other.values()))
    assert_same(actual, expected)
    assert not any(p is q for p, q in zip(flow.parameters(), other.values(), strict=True))


@every_saving
def test_transforms_of_functions_run_as_if_all_were_kept(memory):
    flow = set_memory(randomised(mixed()), memory)
    x = x_points(flow, (3,))
    expected = vmap(jacrev(set_memory(copy.deepcopy(flow), "full")))(x)
    assert_close(vmap(jacrev(flow))(x), expected, 1e-12)


@every_direction
@every_saving
def test_autocast_of_the_forward_pass_holds_in_the_backward_pass(direction, memory):
    flow = jittered(real_nvp(6, num_layers=4, hidden_dims=(16,)), 0.1)
    points, results, seen = torch.randn(32, 6), [], []
    for module in flow.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, given, made: seen.append(made.dtype))
    for way in ("full", memory):
        flow.zero_grad()
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value, log_det = getattr(set_memory(flow, way), direction)(points)
        assert log_det.dtype == torch.float32
        (value.square().mean() + log_det.mean()).backward()
        results.append([p.grad.clone() for p in flow.parameters()])
    assert len(seen) > 8 and set(seen) == {torch.bfloat16}
    assert_same(results[1], results[0], 0.02)  # bfloat16 rounds to 0.004


def loss_of(flow, y):
    def loss():
        x, log_det = flow._backward(y)
        return x.square().sum() - log_det.sum()

    return loss


PEAKS = {
    "couplings": (lambda n: real_nvp(16, num_layers=n, hidden_dims=(32,)), (256, 16)),
    "three layers to a Glow step": (
        lambda n: ComposeFlow([part for _ in range(0, n, 3) for part in glow_step((2, 4, 4)).parts]), (32, 2, 4, 4)
    ),
    "one multi-scale level": (lambda n: multi_scale_of(n), (64, 1, 4, 6)),
}  # fmt: skip


def multi_scale_of(num_layers):
    flow = multi_scale()
    mask = checkerboard_mask(4, 6).expand(1, 4, 6)
    flow.levels[0] = ComposeFlow([*flow.levels[0].parts, *(coupling(mask) for _ in range(num_layers))])
    return flow


@pytest.mark.parametrize("make, shape", PEAKS.values(), ids=PEAKS)
def test_peak_memory_of_64_layers_is_that_of_8(make, shape):
    y = torch.randn(shape)
    flows = [set_memory(make(n), "invertible") for n in (8, 64)]
    few, many = [peak_bytes(flow, loss_of(flow, y)) for flow in flows]
    assert many <= 1.3 * few


def test_peak_memory_of_the_other_ways_grows():
    y = torch.randn(256, 16)
    flow = real_nvp(16, num_layers=16, hidden_dims=(32,))
    peaks = [peak_bytes(set_memory(flow, memory), loss_of(flow, y)) for memory in ("full", *SAVING)]
    assert peaks[0] > 2 * peaks[1] and peaks[1] > 1.5 * peaks[2]


def test_live_bytes_are_those_of_tensors_that_are_alive():
    with LiveBytes() as live:
        made = torch.ones(100)
        for _ in range(5):
            made = made + 1
        kept = made.exp()
    assert live.peak() == 800 and live.peak(without=[kept]) == 800 and live.peak(without=[made]) == 800


@every_saving
def test_memory_survives_copies_files_and_conditions(memory, tmp_path):
    flow = real_nvp(4, num_layers=2)
    assert flow.memory == "full"
    flow.memory = memory
    save(tmp_path / "flow.pt", flow)
    copies = [copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), flow.with_cache(0), load(tmp_path / "flow.pt")]
    assert [twin.memory for twin in copies] == [memory] * 4
    parts = [conditional_coupling(half_mask(5)).float()]
    for twin in (chain := ConditionalComposeFlow(parts, memory=memory), copy.deepcopy(chain)):
        assert twin.condition(torch.zeros(2)).memory == memory
    outer = NormalizingFlow(flow, 4)
    assert outer.transform.memory == memory
    assert "Invertible" in str(graph_of(outer.log_prob(torch.randn(3, 4)))) or memory == "checkpoint"


def graph_of(tensor):
    left, found = [tensor.grad_fn], []
    while left:
        node = left.pop()
        if node is not None:
            found.append(node.name())
            left += [before for before, _ in node.next_functions]
    return found


def test_a_flow_from_before_the_option_keeps_all():
    flow = real_nvp(4, num_layers=2)
    del flow.__dict__["memory"]
    assert flow.memory == "full" and pickle.loads(pickle.dumps(flow))(torch.ones(4)).shape == (4,)


def test_nothing_is_computed_again_without_gradients():
    flow, calls = real_nvp(4, num_layers=2), []
    flow.memory = "invertible"
    flow.parts[0].conditioner.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        flow._backward(torch.randn(3, 4))
    assert len(calls) == 1
    assert "Invertible" in flow._backward(torch.randn(3, 4))[0].grad_fn.name()  # with gradients it would be


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 64), nn.Dropout(0.5), nn.Linear(64, 4))

    def forward(self, kept, context=None):
        return self.network(kept).chunk(2, -1)


def test_checkpoints_draw_the_same_random_numbers_again():
    flow, y = ComposeFlow([AffineCoupling(half_mask(4), Dropping())]), torch.randn(8, 4)
    results = []
    for memory in ("full", "checkpoint"):
        torch.manual_seed(3)
        results.append(gradients(flow, "_backward", y, memory=memory))
    assert_same(results[1], results[0], 1e-6)


def differentiate(*parts, **options):
    flow = ComposeFlow(parts, memory="invertible").double()
    y = torch.linspace(0.1, 2, 32, dtype=torch.float64).sin().reshape(8, 4).requires_grad_()
    x, log_det = flow._backward(y)
    torch.autograd.grad((x.square().sum() + log_det.sum()), y, **options)


def hidden_weight():
    weight = torch.eye(2, dtype=torch.float64).requires_grad_()
    return AffineCoupling(half_mask(4), lambda kept, context=None: (kept @ weight, kept))


def autoregressive_at_a_context():
    conditional = pyro_transforms.conditional_affine_autoregressive(4, 2, [8]).double()
    context = (2 * torch.ones(2, dtype=torch.float64).requires_grad_()).exp()
    return ConditionalComposeFlow([conditional]).condition(context)


def batch_norm():
    return pyro_transforms.BatchNorm(4).train()


def far_away():
    return AffineTransform(1e15, 1.0, event_dim=1)


REFUSED = {
    "word": (
        lambda: ComposeFlow([coupling(half_mask(4))], memory="less"), "'full', 'checkpoint', 'invertible', got 'less'"
    ),
    "word of a conditional chain": (
        lambda: ConditionalComposeFlow([conditional_coupling(half_mask(4))], memory="less"), "got 'less'"
    ),
    "second derivatives": (
        lambda: differentiate(coupling(half_mask(4)), create_graph=True), "first derivatives only.*memory='full'"
    ),
    "random numbers": (
        lambda: differentiate(AffineCoupling(half_mask(4), Dropping())), "inverses undo.*AffineCoupling.*'checkpoint'"
    ),
    "running statistics": (lambda: differentiate(batch_norm()), "inverses undo.*batch norm"),
    "numbers too large for their digits": (
        lambda: differentiate(coupling(half_mask(4)), far_away()), "relative error of .*after 2 parts"
    ),
    "a tensor that no Module holds": (
        lambda: differentiate(hidden_weight()), r"of shape \(2, 2\) that AffineCoupling uses"
    ),
    "a context that no attribute holds": (
        lambda: differentiate(*autoregressive_at_a_context().parts), r"of shape \(2,\) that Foreign uses"
    ),
}  # fmt: skip


@pytest.mark.parametrize("do, message", REFUSED.values(), ids=REFUSED)
def test_refusals_say_the_rule_and_what_came(do, message):
    with pytest.raises(ValueError, match=message):
        do()


@every_direction
def test_guard_names_the_part(direction):
    chain = ComposeFlow([coupling(half_mask(4)), coupling(half_mask(4))], guard=True, memory="invertible")
    number, where = (0, "out of part 0") if direction == "_forward" else (1, "out of the inverse of part 1")
    jittered(chain.parts[number], float("inf"))
    with pytest.raises(ValueError, match=f"{where}, AffineCoupling"):
        getattr(chain, direction)(torch.randn(3, 4))


def test_a_network_that_was_exchanged_gets_the_gradients():
    flow = set_memory(randomised(real_nvp(4, num_layers=2, hidden_dims=(6,))), "invertible")
    y = y_points(flow, (3,))
    flow._backward(y)[1].sum().backward()
    flow.parts[0].conditioner = randomised(MLP(2, 2, (5,)))
    assert_same(gradients(flow, "_backward", y, memory="invertible"), gradients(flow, "_backward", y))


def test_a_conditional_builder_can_be_told_later():
    conditional = randomised(conditional_real_nvp(5, 2, num_layers=3, hidden_dims=(6,)))
    context = torch.randn(4, 2, dtype=torch.float64)
    flow = conditional.condition(context)
    flow.memory = "invertible"
    points = points_of(flow, "_backward", (4,))
    assert_same(gradients(flow, "_backward", points, memory="invertible"), gradients(flow, "_backward", points))
    assert isinstance(conditional.parts[0].coupling.conditioner, MLP)
