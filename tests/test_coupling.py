"""The affine coupling: its formula, its conditional twin, the helpers with Pyro's signatures, what it refuses."""

from __future__ import annotations

import inspect

import pyro.distributions as dist
import pytest
import torch
from cases import assert_close, coupling, randomised
from pyro.distributions import transforms as pyro_transforms
from torch import nn

from pyro_affine.conditioners import MLP
from pyro_affine.coupling import (
    AffineCoupling,
    ConditionalAffineCoupling,
    affine_coupling,
    conditional_affine_coupling,
    default_scale,
)
from pyro_affine.masks import alternating_mask, channel_mask, checkerboard_mask, half_mask
from pyro_affine.scales import AdditiveScale, AtanScale, ExpScale, TanhScale

F64 = torch.float64


def conditional(**options):
    return randomised(ConditionalAffineCoupling(half_mask(4), MLP(2, 2, (6,), context_dim=3), **options))


# ---- the layer
def test_formula():
    t = AffineCoupling(torch.tensor([True, False, True]), lambda kept: (kept[..., :1], kept[..., 1:]), ExpScale())
    x = torch.tensor([[2.0, 5.0, 0.1], [3.0, 7.0, -0.2]])
    y = torch.stack([x[:, 0], x[:, 1] * x[:, 2].exp() + x[:, 0], x[:, 2]], -1)
    assert_close(t(x), y, 1e-6)
    assert_close(t.inv(y), x, 1e-6)
    assert_close(t.log_abs_det_jacobian(x, y), x[:, 2], 1e-6)


def test_conditioner_sees_flat_kept_entries_only():
    seen = []

    def conditioner(kept):
        seen.append(kept)
        return kept, kept

    mask = checkerboard_mask(2, 2)
    x = torch.randn(5, 3, 2, 2)
    AffineCoupling(mask, conditioner, event_shape=(3, 2, 2))(x)
    assert torch.equal(seen[0], x[..., mask.expand(3, 2, 2)])


def test_mask_of_a_channel_keeps_whole_channels():
    t = randomised(coupling(channel_mask(2), (2, 4, 4)))
    x = torch.randn(3, 2, 4, 4, dtype=F64)
    assert torch.equal(t(x)[:, 0], x[:, 0]) and (t(x)[:, 1] != x[:, 1]).all()


def test_default_scale_map():
    assert repr(coupling(half_mask(4)).scale) == repr(default_scale()) == repr(affine_coupling(4).scale)


def test_scale_stays_within_the_range_of_its_map():
    t = randomised(coupling(half_mask(4), scale=TanhScale(0.5)))
    with torch.no_grad():
        for parameter in t.parameters():
            parameter.mul_(100)
    x = torch.randn(100, 4, dtype=F64)
    assert t.log_abs_det_jacobian(x, t(x)).abs().max() <= 2 * 0.5 + 1e-9


def test_additive_coupling_preserves_volume_and_needs_no_raw_scale():
    t = randomised(coupling(half_mask(4), scale=AdditiveScale(), shift_only=True))
    x = torch.randn(5, 4, dtype=F64)
    assert torch.equal(t.log_abs_det_jacobian(x, t(x)), torch.zeros(5, dtype=F64))


# ---- the conditional twin
@pytest.mark.parametrize("context_shape", [(3,), (1, 3), (7, 3), (2, 7, 3)], ids=str)
@pytest.mark.parametrize("sample_shape", [(), (5,), (4, 1)], ids=str)
def test_context_broadcasts_over_the_draws(context_shape, sample_shape):
    layer = conditional()
    context = torch.randn(context_shape, dtype=F64)
    t = layer.condition(context)
    x = torch.randn(*sample_shape, *context_shape[:-1], 4, dtype=F64)
    y = t(x)
    assert t.batch_shape == context_shape[:-1] and y.shape == x.shape == t.with_cache(0).inv(y).shape
    assert_close(t.with_cache(0).inv(y), x, 1e-9)
    one = layer.condition(context.reshape(-1, 3)[-1])
    last = x.reshape(-1, 4)[-1]
    assert_close(y.reshape(-1, 4)[-1], one(last), 1e-12)
    log_det = t.log_abs_det_jacobian(x, y)
    assert log_det.shape == x.shape[:-1]
    assert_close(log_det.reshape(-1)[-1], one.log_abs_det_jacobian(last, one(last)), 1e-12)


def test_one_point_at_many_contexts():
    t = conditional().condition(torch.randn(7, 3, dtype=F64))
    x = torch.randn(4, dtype=F64)
    assert t(x).shape == t.inv(x).shape == t.forward_shape(x.shape) == t.inverse_shape(x.shape) == (7, 4)
    assert t.log_abs_det_jacobian(x, t(x)).shape == (7,)
    assert torch.equal(t(x)[:, :2], x[:2].expand(7, 2))


def test_conditioned_layers_share_parameters_and_train_them():
    layer = conditional()
    first, second = (layer.condition(torch.randn(2, 3, dtype=F64)) for _ in range(2))
    own = list(layer.parameters())
    assert own and all(a is b is c for a, b, c in zip(own, first.parameters(), second.parameters(), strict=True))
    first(torch.randn(2, 4, dtype=F64)).sum().backward()
    assert all(p.grad is not None for p in own)
    assert layer.event_shape == (4,) and layer.domain.event_dim == layer.codomain.event_dim == 1


def test_gradients_reach_the_context():
    context = torch.randn(2, 3, dtype=F64, requires_grad=True)
    t = conditional().condition(context)
    y = t(torch.randn(2, 4, dtype=F64))
    (y.sum() + t.log_abs_det_jacobian(t.inv(y), y).sum()).backward()
    assert context.grad.all()


# ---- the helpers
@pytest.mark.parametrize("name", ["affine_coupling", "conditional_affine_coupling"])
def test_helpers_take_pyro_s_arguments(name):
    ours = {"affine_coupling": affine_coupling, "conditional_affine_coupling": conditional_affine_coupling}[name]
    theirs = getattr(pyro_transforms, name)
    expected, actual = (list(inspect.signature(f).parameters.values()) for f in (theirs, ours))
    assert [(p.name, p.kind, p.default) for p in actual] == [(p.name, p.kind, p.default) for p in expected]


FIRST = torch.tensor([True, False, False, False])
HELPED = {
    "half of 5": (lambda make: make(5), half_mask(5)),
    "split_dim": (lambda make: make(5, split_dim=4), torch.arange(5) < 4),
    "hidden_dims": (lambda make: make(5, hidden_dims=[7, 8]), half_mask(5)),
    "rows": (lambda make: make([4, 3], split_dim=1, dim=-2), FIRST[:, None].expand(4, 3)),
    "channels": (lambda make: make([4, 2, 2], split_dim=1, dim=-3), FIRST[:, None, None].expand(4, 2, 2)),
}


@pytest.mark.parametrize("build, mask", HELPED.values(), ids=HELPED)
def test_helpers_split_as_pyro_does(build, mask):
    def make_conditional(size, **options):
        return conditional_affine_coupling(size, 2, **options)

    for make in (affine_coupling, make_conditional, pyro_transforms.affine_coupling):
        t = build(make)
        if make is not pyro_transforms.affine_coupling:
            t = randomised(t).float()  # ours start at the identity
        t = t.condition(torch.ones(2)) if make is make_conditional else t
        x = torch.randn(6, *mask.shape)
        assert torch.equal((t(x) == x).all(0), mask)


def test_hidden_dims_of_the_helpers():
    def widths(layer):
        return [m.out_features for m in layer.modules() if isinstance(m, nn.Linear)]

    assert widths(affine_coupling(5)) == [50, 6]
    assert widths(affine_coupling(5, [7, 8])) == [7, 8, 6]
    assert widths(affine_coupling(5, [])) == [6]
    assert widths(conditional_affine_coupling(5, 2, [])) == [6, 6]  # kept entries and context are read apart


def test_clips_of_the_helpers_become_smooth_bounds():
    t = affine_coupling(4, log_scale_min_clip=-3.0, log_scale_max_clip=0.5)
    assert repr(t.scale) == repr(AtanScale(lower=3.0, upper=0.5))
    assert repr(affine_coupling(4, log_scale_min_clip=-1.0).scale) == repr(AtanScale(lower=1.0, upper=3.0))
    conditional_layer = conditional_affine_coupling(4, 2, log_scale_max_clip=1.0)
    assert repr(conditional_layer.coupling.scale) == repr(AtanScale(lower=5.0, upper=1.0))


def test_helpers_pass_options_on():
    t = affine_coupling(4, scale=ExpScale(), guard=True, cache_size=0, separate=True, activation=nn.Tanh)
    assert isinstance(t.scale, ExpScale) and t.guard and t._cache_size == 0
    assert t.conditioner.raw_network is not None and any(isinstance(m, nn.Tanh) for m in t.modules())


def test_helper_in_a_distribution_of_images():
    base = dist.Normal(torch.zeros(2, 4, 4), 1.0).to_event(3)
    for t in (
        affine_coupling([2, 4, 4], [8], dim=-3),
        conditional_affine_coupling([2, 4, 4], 3, [8], dim=-3).condition(torch.ones(3)),
    ):
        d = dist.TransformedDistribution(base, [t])
        assert d.event_shape == (2, 4, 4) and d.log_prob(d.sample((5,))).shape == (5,)


# ---- bad input
def _returns(*results):
    return lambda: AffineCoupling(half_mask(4), lambda kept: results)(torch.zeros(3, 4))


TWO, ONE = torch.zeros(3, 2), torch.zeros(3, 1)
BAD = {
    "mask of floats": (lambda: AffineCoupling(torch.ones(4), MLP(2, 2)), r"boolean with True = kept, got .*mask.bool"),
    "mask of another shape": (lambda: AffineCoupling(half_mask(4), MLP(2, 3), event_shape=(5,)), r"broadcast to the"),
    "all kept": (lambda: AffineCoupling(half_mask(2) | True, MLP(2, 2)), r"leave some entry to move, got 2 of 2 kept"),
    "none kept": (lambda: AffineCoupling(half_mask(2) & False, MLP(2, 2)), r"keep some entry .* none kept .*context"),
    "shift too wide": (_returns(torch.zeros(3, 4), TWO), r"pair \(shift, raw\).* got .* shapes \[\(3, 4\), \(3, 2\)"),
    "raw too narrow": (_returns(TWO, ONE), r"pair \(shift, raw\).* got a tuple of shapes \[\(3, 2\), \(3, 1\)\]; its"),
    "raw a number": (_returns(TWO, 0.5), r"pair \(shift, raw\).* got .* shapes \[\(3, 2\), 'float'\]; its"),
    "three results": (_returns(TWO, TWO, TWO), r"pair \(shift, raw\).* got a tuple of shapes .*; its last layer needs"),
    "no shift": (_returns(None, TWO), r"pair \(shift, raw\).* got a tuple of shapes \['NoneType', \(3, 2\)\]"),
    "one tensor": (
        lambda: AffineCoupling(half_mask(4), nn.Linear(2, 4))(torch.zeros(3, 4)),
        r"pair \(shift, raw\), each of .*\(2,\), got a tensor of shape \(3, 4\); its last layer needs 2 \* 2",
    ),
    "no raw": (_returns(TWO, None), r"AtanScale needs a raw log-scale, got None .*; build it with shift_only=False"),
    "kept size of the network": (lambda: AffineCoupling(half_mask(4), MLP(3, 2))(TWO.repeat(1, 2)), r"input_dim"),
    "split_dim 0": (lambda: affine_coupling(4, split_dim=0), r"between 1 and 3, got 0 of 4 entries along dim -1"),
    "split_dim all": (lambda: affine_coupling(4, split_dim=4), r"between 1 and 3, got 4 of 4 entries along dim -1"),
    "one entry": (lambda: affine_coupling(1), r"got 0 of 1 entries .* two entries at least, for one use"),
    "dim positive": (lambda: affine_coupling(4, dim=1), r"dim must be negative .* got dim=1 and .* \(4,\); for"),
    "dim of another rank": (lambda: affine_coupling(4, dim=-3), r"-dim dimensions, got dim=-3 .* \(4,\); for images"),
    "context size": (lambda: conditional().condition(torch.ones(7, 2)), r"batch \+ \(3,\), got \(7, 2\); add or"),
    "context scalar": (lambda: conditional().condition(torch.tensor(1.0)), r"batch \+ \(3,\), got \(\); add or"),
    "context dtype": (lambda: conditional().condition(torch.ones(7, 3)), r"agree in dtype .*float32 .*float64"),
    "context of integers": (lambda: conditional().condition(torch.ones(3).long()), r"agree in dtype .* torch.int64"),
    "context device": (lambda: conditional().condition(torch.ones(3, dtype=F64).to("meta")), r"device, got .* on meta"),
    "context wanted": (lambda: randomised(conditional().coupling)(torch.ones(4, dtype=F64)), r"got none; give"),
}  # fmt: skip


@pytest.mark.parametrize("act, words", BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_rule_and_remedy(act, words):
    with pytest.raises(ValueError, match=words):
        act()


def test_alternating_layers_move_every_entry():
    x = torch.randn(5, 4, dtype=F64)
    first, second = (randomised(coupling(alternating_mask(4, keep_first=keep))) for keep in (True, False))
    assert (second(first(x)) != x).all()
