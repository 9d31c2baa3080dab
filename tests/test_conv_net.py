"""Networks for images: what they read, what they compute, batches, contexts, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from cases import assert_close, density, randomised
from torch import nn
from torch.nn import functional as F

from pyro_affine.audit import audit
from pyro_affine.compose import ComposeFlow
from pyro_affine.conv_net import ConvNet, ResidualConvNet
from pyro_affine.coupling import AffineCoupling, ConditionalAffineCoupling
from pyro_affine.masks import alternating_mask, channel_mask, checkerboard_mask, random_mask
from pyro_affine.scales import AdditiveScale
from pyro_affine.serialize import load, save

F64 = torch.float64
LAYOUTS = {  # name: mask, event_shape, channels read, channels computed for each result
    "checkerboard, one channel, odd": (checkerboard_mask(3, 5), (1, 3, 5), 1, 1),
    "other checkerboard, three channels": (checkerboard_mask(4, 3, keep_first=False), (3, 4, 3), 3, 3),
    "half the channels": (channel_mask(4), (4, 2, 3), 2, 2),
    "other half of the channels, odd": (channel_mask(3, keep_first=False), (3, 3, 3), 2, 1),
    "every second channel": (alternating_mask(5)[:, None, None], (5, 2, 2), 3, 2),
    "random entries": (random_mask(12, seed=0).reshape(2, 2, 3), (2, 2, 3), 2, 2),
    "one row": (channel_mask(2), (2, 1, 4), 1, 1),
}
NETWORKS = {
    "plain": ConvNet,
    "plain, weight norm": partial(ConvNet, weight_norm=True),
    "residual": ResidualConvNet,
    "residual, weight norm": partial(ResidualConvNet, weight_norm=True),
    "separate": partial(ConvNet, separate=True),
}
each_layout = pytest.mark.parametrize("mask, shape, num_read, num_written", LAYOUTS.values(), ids=LAYOUTS)
each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
CHECKERED = (checkerboard_mask(4, 3), (2, 4, 3))


def net(make=ConvNet, mask=CHECKERED[0], shape=CHECKERED[1], **options):
    return randomised(make(mask, shape, 4, **options))


def images(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@each_layout
def test_reads_kept_channels_or_the_masked_image_and_computes_nothing_else(mask, shape, num_read, num_written):
    network = net(ConvNet, mask, shape)
    first, second, last = (network.network.from_image, network.network.layers[1], network.network.layers[3])
    assert first.in_channels == num_read and last.out_channels == 2 * num_written

    full, image = mask.expand(shape), images(2, *shape)
    channel = full[:, 0, 0] if num_read < shape[0] else torch.ones(shape[0], dtype=torch.bool)
    hidden = F.silu(F.conv2d((image * full)[:, channel], first.weight, first.bias, padding=1))
    hidden = F.silu(F.conv2d(hidden, second.weight, second.bias))
    outputs = F.conv2d(hidden, last.weight, last.bias, padding=1)
    moved = ~full if num_read == shape[0] else ~full[~channel]
    expected = [half[:, moved] for half in outputs.split(num_written, 1)]
    for actual, wanted in zip(network(image[:, full]), expected, strict=True):
        assert_close(actual, wanted, 1e-12)


@each_network
@each_layout
def test_starts_at_zero_and_is_trained_from_there(make, mask, shape, num_read, num_written):
    network = make(mask, shape, 4).double()
    kept = images(3, int(mask.expand(shape).sum()))
    for result in network(kept):
        assert result.shape == (3, int((~mask.expand(shape)).sum())) and not result.any()
    for _ in range(2):  # the second step moves what lies before the last layer
        before = [p.detach().clone() for p in network.parameters()]
        shift, raw = network(kept)
        network.zero_grad()
        (shift.sin() + shift + raw.exp() * torch.arange(1, raw.shape[-1] + 1)).sum().backward()
        assert all(p.grad.isfinite().all() for p in network.parameters())
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 0.1 * parameter.grad
    assert all((p != q).any() for p, q in zip(network.parameters(), before, strict=True))


@each_network
@pytest.mark.parametrize("batch_shape", [(), (0,), (1,), (5,), (2, 3), (2, 1, 3)], ids=str)
def test_batches_of_any_rank(make, batch_shape):
    network = net(make)
    kept = images(*batch_shape, 12)
    for index, result in enumerate(network(kept)):
        assert result.shape == (*batch_shape, 12)
        for row, one in zip(kept.reshape(-1, 12), result.reshape(-1, 12), strict=True):
            assert_close(one, network(row)[index], 1e-12)


CONTEXTS = {"vector": {"context_dim": 6}, "image": {"context_shape": (2, 1, 3)}}


@pytest.mark.parametrize("options", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize(
    "batch_shape, context_batch", [((), (7,)), ((7,), ()), ((5, 7), (7,)), ((5, 1), (7,)), ((2, 3), (2, 1))], ids=str
)
def test_context_broadcasts(options, batch_shape, context_batch):
    network = net(ResidualConvNet, **options)
    kept, context = images(*batch_shape, 12), images(*context_batch, 6, seed=1)
    whole = torch.broadcast_shapes(batch_shape, context_batch)
    expected = network(kept.expand(*whole, 12), context.expand(*whole, 6))
    other = network(kept, context + 1)
    for actual, wanted, changed in zip(network(kept, context), expected, other, strict=True):
        assert actual.shape == (*whole, 12)
        assert_close(actual, wanted, 1e-12)
        assert (actual != changed).any()


def test_context_of_a_conditional_coupling_is_read_once_for_many_draws():
    mask, shape = checkerboard_mask(3, 3), (1, 3, 3)
    layer = randomised(ConditionalAffineCoupling(mask, ConvNet(mask, shape, 4, context_dim=2), event_shape=shape))
    seen = []
    layer.coupling.conditioner.network.from_context.register_forward_hook(lambda *args: seen.append(args[2].shape))
    flow = density(layer.condition(images(7, 2)))
    assert flow.batch_shape == (7,)
    draws = flow.rsample((100,))
    assert draws.shape == (100, 7, 1, 3, 3) and flow.log_prob(draws).shape == (100, 7)
    assert seen == [(7, 4, 1, 1)]


def test_context_image_is_averaged_to_the_size_of_the_event():
    mask, shape = channel_mask(2), (2, 2, 3)
    fine = net(ConvNet, mask, shape, context_shape=(1, 4, 6))
    same = net(ConvNet, mask, shape, context_shape=(1, 2, 3))
    same.load_state_dict(fine.state_dict())
    kept, context = images(6), images(1, 4, 6, seed=1)
    pooled = F.avg_pool2d(context, 2)
    for actual, wanted in zip(fine(kept, context.flatten()), same(kept, pooled.flatten()), strict=True):
        assert_close(actual, wanted, 1e-12)


@pytest.mark.parametrize("make, num_seen", [(ConvNet, 5), (partial(ResidualConvNet, num_blocks=2), 11)])
def test_how_far_it_sees(make, num_seen):
    size = 15
    network = net(make, channel_mask(2), (2, size, size))
    kept = images(size * size).requires_grad_()
    network(kept)[0].reshape(size, size)[7, 7].backward()
    rows, columns = kept.grad.reshape(size, size).nonzero().T
    assert int(rows.max() - rows.min()) + 1 == int(columns.max() - columns.min()) + 1 == num_seen


def test_weight_norm_starts_as_the_plain_convolution_and_parts_length_and_direction():
    network = ResidualConvNet(*CHECKERED, 4, weight_norm=True).double()
    plain = ResidualConvNet(*CHECKERED, 4).double()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if "gain" not in k}, strict=False)
    image = images(2, 2, 4, 3)
    before = [n.network.layers[0](n.network.from_image(image)) for n in (network, plain)]
    assert_close(before[0], before[1], 1e-6)  # lengths are taken in float32, as the layer is made
    network, kept = randomised(network), images(2, 12)
    shift, raw = network(kept)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.Conv2d):
                part.weight *= 3.0
    assert_close(network(kept)[0], shift, 1e-12)
    last = network.network.layers[-1]
    with torch.no_grad():
        last.gain *= 2.0
        last.bias *= 2.0
    assert_close(network(kept)[1], 2 * raw, 1e-12)


def test_activations_are_made_anew_for_each_layer():
    made = [m for m in ResidualConvNet(*CHECKERED, 4, activation=nn.PReLU).modules() if isinstance(m, nn.PReLU)]
    assert len(set(map(id, made))) == len(made) == 5


def test_shift_only_goes_with_an_additive_coupling():
    mask, shape = CHECKERED
    network = ConvNet(mask, shape, 4, shift_only=True)
    t = randomised(AffineCoupling(mask, network, AdditiveScale(), event_shape=shape))
    x = images(3, *shape)
    y = t(x)
    assert network(x[:, mask.expand(shape)])[1] is None and (y != x).any()
    assert not t.log_abs_det_jacobian(x, y).any()


def both_ways(t, x):
    y = t.with_cache(0)(x)
    return y, t.log_abs_det_jacobian(x, y), t.with_cache(0).inv(x)


@pytest.mark.parametrize("first", [channel_mask(2), checkerboard_mask(3, 4)], ids=["channel", "checkerboard"])
@each_network
def test_copies_files_and_states_are_the_same_to_the_last_bit(make, first, tmp_path):
    def stack(first):
        masks = (first, ~first, random_mask(24).reshape(2, 3, 4))
        return ComposeFlow([AffineCoupling(m, make(m, (2, 3, 4), 4), event_shape=(2, 3, 4)) for m in masks])

    torch.manual_seed(0)
    t = randomised(stack(first), seed=3)
    other = stack(~first).double()  # other masks too
    other.load_state_dict(t.state_dict())
    save(tmp_path / "flow.pt", t)
    x = images(5, 2, 3, 4)
    expected = both_ways(t, x)
    for twin in (other, copy.deepcopy(t), pickle.loads(pickle.dumps(t)), load(tmp_path / "flow.pt")):
        for actual, wanted in zip(both_ways(twin, x), expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("mask", [checkerboard_mask(2, 3), channel_mask(2)], ids=["checkerboard", "channel"])
def test_audit_sees_through_convolutions(mask):
    shape = (2, 2, 3)
    layers = [AffineCoupling(m, ConvNet(m, shape, 8), event_shape=shape) for m in (mask, ~mask)]
    assert audit(layers[0]).unmoved == [tuple(index) for index in mask.expand(shape).nonzero().tolist()]
    assert audit(ComposeFlow([*layers, *layers])).ok


@pytest.mark.parametrize("mask", [channel_mask(2), checkerboard_mask(4, 6)], ids=["channel", "checkerboard"])
def test_half_precision_networks_in_a_single_precision_flow(mask):
    shape = (2, 4, 6)
    t = randomised(AffineCoupling(mask, ConvNet(mask, shape, 8), event_shape=shape)).float().with_cache(0)
    x = images(3, *shape).float()
    exact = t(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = t(x)
        log_det = t.log_abs_det_jacobian(x, y)
        back = t.inv(y)
    assert y.dtype == log_det.dtype == torch.float32
    assert (y != exact).any() and log_det.shape == (3,)
    assert_close(back, x, 1e-5)


@pytest.mark.parametrize("name", ["checkerboard, one channel, odd", "half the channels"])
def test_compiles_to_one_graph(name):
    network = net(ConvNet, *LAYOUTS[name][:2])
    kept = images(2, network.input_dim)
    compiled = torch.compile(network, fullgraph=True, backend="eager")(kept)
    for actual, wanted in zip(compiled, network(kept), strict=True):
        assert_close(actual, wanted, 1e-12)
    torch.compiler.reset()


NO_MASK = torch.zeros(2, 4, 3, dtype=torch.bool)
REFUSED = {
    "vector": (lambda: ConvNet(random_mask(4)), "event_shape=.C, H, W."),
    "no event shape": (lambda: ConvNet(checkerboard_mask(4, 3)), "event_shape=.C, H, W."),
    "mask of another size": (lambda: ConvNet(checkerboard_mask(4, 4), (2, 4, 3)), "mask must broadcast"),
    "mask of numbers": (lambda: ConvNet(checkerboard_mask(4, 3).float(), (2, 4, 3)), "mask.bool"),
    "all kept": (lambda: ConvNet(~NO_MASK), "~mask"),
    "none kept": (lambda: ConvNet(NO_MASK, context_dim=2), "use MLP"),
    "no hidden channel": (lambda: ConvNet(*CHECKERED, 0), "hidden_channels must be 1 or more"),
    "no block": (lambda: ResidualConvNet(*CHECKERED, 4, 0), "num_blocks must be 1 or more"),
    "two contexts": (lambda: ConvNet(*CHECKERED, context_dim=2, context_shape=(1, 4, 3)), "one of the two"),
    "context of two dimensions": (lambda: ConvNet(*CHECKERED, context_shape=(4, 3)), "C, H, W"),
    "negative context": (lambda: ConvNet(*CHECKERED, context_dim=-1), "context_dim >= 0"),
    "activation, made": (lambda: ConvNet(*CHECKERED, activation=nn.ReLU()), "pass a class"),
    "image, not flat": (lambda: ConvNet(*CHECKERED)(torch.zeros(2, 4, 3)), r"batch \+ \(12,\)"),
    "no context": (lambda: ConvNet(*CHECKERED, context_dim=2)(torch.zeros(12)), "got none"),
    "context not wanted": (lambda: ConvNet(*CHECKERED)(torch.zeros(12), torch.zeros(2)), "reads no context"),
    "context of another size": (
        lambda: ConvNet(*CHECKERED, context_shape=(1, 4, 3))(torch.zeros(12), torch.zeros(4)), r"batch \+ \(12,\)",
    ),
    "batches that do not broadcast": (
        lambda: ConvNet(*CHECKERED, context_dim=2)(torch.zeros(3, 12), torch.zeros(4, 2)), "must broadcast",
    ),
    "a mask of another coupling": (
        lambda: AffineCoupling(channel_mask(4), ConvNet(channel_mask(2), (2, 4, 3)), event_shape=(4, 4, 3))(
            torch.zeros(4, 4, 3)
        ),
        "mask and event shape of the coupling",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call, words", REFUSED.values(), ids=REFUSED)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
