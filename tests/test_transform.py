"""What the base class derives from two methods: hooks, identity, tracing, checks."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import assert_close, coupling, density, randomised
from torch import nn

from pyro_affine.compose import ComposeFlow
from pyro_affine.conditioners import MLP
from pyro_affine.coupling import ConditionalAffineCoupling, affine_coupling
from pyro_affine.linear import LowerTriangularAffine, Standardization
from pyro_affine.masks import half_mask
from pyro_affine.transform import FlowTransform

DATA = torch.linspace(-2, 2, 20, dtype=torch.float64).reshape(5, 4)


def flow():
    return randomised(ComposeFlow([coupling(half_mask(4)), coupling(half_mask(4, keep_first=False))]))


class Cube(FlowTransform):
    def _forward(self, x):
        return x**3, (3 * x**2).log().sum(-1)

    def _backward(self, y):
        x = y.sign() * y.abs() ** (1 / 3)
        return x, self._forward(x)[1]


def test_two_methods_make_a_transform():
    t = ComposeFlow([Cube((4,)), flow(), Cube((4,)).inv])
    y = density(t).rsample((5,))
    assert_close(density(t).log_prob(y), density(t.with_cache(0)).log_prob(y), 1e-9)
    assert_close(t.with_cache(0).inv(t(DATA)), DATA, 1e-9)
    assert t.sign == 1 and t.domain.event_dim == 1 and t.bijective


def test_hooks_fire():
    t, seen = flow(), []
    t.register_forward_pre_hook(lambda module, args: seen.append("before"))
    t.register_forward_hook(lambda module, args, output: seen.append("after"))
    t(DATA)
    assert seen == ["before", "after"]
    density(t).sample()
    assert seen == ["before", "after"] * 2


def test_output_changed_by_a_hook_is_not_taken_for_the_draw():
    t = flow()
    t.register_forward_hook(lambda module, args, output: output + 1)
    y = t(DATA)
    assert_close(t.inv(y), t.with_cache(0).inv(y.clone()), 1e-12)


@pytest.mark.filterwarnings("ignore")  # torch.jit speaks of its age, and of Python values that do not change
def test_jit_trace():
    t = flow()
    traced = torch.jit.trace(t, (DATA,))
    assert_close(traced(DATA + 1), t(DATA + 1), 1e-12)
    t.requires_grad_(False)  # a trace of a function takes the parameters for constants
    score = torch.jit.trace(lambda y: density(t).log_prob(y), (DATA,))
    assert_close(score(DATA + 1), density(t).log_prob(DATA + 1), 1e-12)
    draw = torch.jit.trace(lambda x: t.log_abs_det_jacobian(x, t(x)), (DATA,))
    assert_close(draw(DATA + 1), t.log_abs_det_jacobian(DATA + 1, t(DATA + 1)), 1e-12)


def test_identity_and_words():
    t = flow()
    assert t == t and t != copy.deepcopy(t) and len({t, t.inv, t}) == 2
    assert "AffineCoupling" in repr(t) and "kept=2, moved=2" in repr(t.inv)


def test_inverse_is_a_module_with_the_parameters_and_no_part_of_its_transform():
    t = flow()
    assert t.inv is t.inv and t.inv.inv is t
    assert isinstance(t.inv, nn.Module) and not any(module is t.inv for module in t.modules())
    assert all(a is b for a, b in zip(t.inv.parameters(), t.parameters(), strict=True))
    t.inv.double().load_state_dict({name: torch.ones_like(value) for name, value in t.inv.state_dict().items()})
    assert all((p == 1).all() for p in t.parameters())


def test_inverse_of_a_conditioned_transform_knows_its_batch():
    layer = ConditionalAffineCoupling(half_mask(4), MLP(2, 2, context_dim=1)).condition(torch.ones(7, 1))
    for t in (layer, layer.inv):
        assert t.batch_shape == (7,) and t.event_shape == (4,)
        assert t(torch.zeros(4)).shape == t.forward_shape(torch.Size([4])) == (7, 4)
        assert t(torch.zeros(2, 1, 4)).shape == (2, 7, 4)


def _layer(**options):
    return affine_coupling(4, **options)


def _conditioned():
    return ConditionalAffineCoupling(half_mask(4), MLP(2, 2, context_dim=1)).condition(torch.ones(7, 1))


NAN = torch.full((2, 4), torch.nan)
BAD = {
    "event size": (lambda: _layer()(torch.zeros(3, 5)), r"shape \(4,\) .* got a tensor of shape \(3, 5\); reshape"),
    "event rank": (lambda: Standardization((2, 2))(torch.zeros(2)), r"shape \(2, 2\) .* got .* \(2,\); reshape"),
    "inverse": (lambda: _layer().inv(torch.zeros(5)), r"shape \(4,\) .* got .* \(5,\); reshape"),
    "log_det": (lambda: flow().log_abs_det_jacobian(DATA[:, :3], DATA), r"shape \(4,\) .* got .* \(5, 3\)"),
    "integers": (lambda: _layer()(torch.zeros(4, dtype=torch.long)), r"floating point .* got torch.int64; .*\.float"),
    "dtype": (lambda: _layer()(torch.zeros(4).double()), r"agree in dtype .* torch.float64 .* torch.float32 .*\.to\("),
    "dtype, linear": (
        lambda: LowerTriangularAffine(torch.zeros(2))(torch.zeros(2).double()),
        r"agree .* torch.float64",
    ),
    "dtype, inverse": (lambda: flow().inv(torch.zeros(4)), r"agree in dtype .* torch.float32 .* torch.float64"),
    "device": (lambda: _layer().to("meta")(torch.zeros(4)), r"device, got .* on cpu and .* on meta; move"),
    "cache size": (lambda: flow().with_cache(2), r"cache_size must be 0 or 1, got 2"),
    "context batch": (lambda: _conditioned()(torch.zeros(5, 4)), r"context, \(7,\), got .* \(5, 4\); put further"),
    "not finite": (lambda: _layer(guard=True)(NAN), r"finite, got nan out of AffineCoupling at index \(0, 0\); use"),
    "not finite in a chain": (
        lambda: ComposeFlow([Standardization((4,)), _layer()], guard=True).inv(NAN),
        r"finite, got nan out of the inverse of part 1, AffineCoupling, at index \(0, 0\); use",
    ),
}


@pytest.mark.parametrize("act, words", BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_rule_and_remedy(act, words):
    with pytest.raises(ValueError, match=words):
        act()


def test_autocast_is_not_refused():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _layer()(torch.zeros(2, 4)).shape == (2, 4)
