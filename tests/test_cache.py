"""The cache of a transform cannot go stale, and saves what it promises."""

from __future__ import annotations

import contextlib
import copy
import weakref

import pyro.distributions as dist
import pytest
import torch
from cases import assert_close, coupling, randomised
from pyro.optim.clipped_adam import ClippedAdam
from torch import nn
from torch.func import functional_call, vmap

from pyro_affine.compose import ComposeFlow
from pyro_affine.conditioners import MLP
from pyro_affine.coupling import AffineCoupling, ConditionalAffineCoupling
from pyro_affine.linear import Permutation, Standardization
from pyro_affine.masks import half_mask
from pyro_affine.scales import AtanScale, TanhScale

NUM_LAYERS = 3
DATA = torch.linspace(-2, 2, 20, dtype=torch.float64).reshape(5, 4)


class CountedMLP(MLP):
    calls = 0

    def forward(self, *args):
        CountedMLP.calls += 1
        return super().forward(*args)


@contextlib.contextmanager
def calls(number):
    CountedMLP.calls = 0
    yield
    assert CountedMLP.calls == number


def layers():
    masks = [half_mask(4, keep_first=index % 2 == 0) for index in range(NUM_LAYERS)]
    return [coupling(mask, make=CountedMLP) for mask in masks]


def flow(seed=0):
    return randomised(ComposeFlow(layers()), seed)


def density(*transforms):
    zeros = torch.zeros(4, dtype=torch.float64)
    return dist.TransformedDistribution(dist.Normal(zeros, 1.0).to_event(1), list(transforms))


def assert_scored_anew(t, y):
    assert_close(density(t).log_prob(y), density(t.with_cache(0)).log_prob(y), 1e-12)


class Score(nn.Module):
    def __init__(self, t):
        super().__init__()
        self.t = t

    def forward(self, y):
        return density(self.t).log_prob(y)


# ---- what may happen to the parameters between two scores
def _step(make_optimiser):
    def update(t):
        (-density(t.with_cache(0)).log_prob(DATA).mean()).backward()  # leaves the pair of t alone
        make_optimiser(t.parameters()).step()

    return update


def _edit_under_no_grad(t):
    with torch.no_grad():
        list(t.parameters())[-1].mul_(1.1)


def _put_other_data(t):
    parameter = next(t.parameters())
    parameter.data = parameter.data + 0.1


def _put_another_parameter(t):
    last = t.parts[-1].conditioner.network.layers[-1]
    last.bias = nn.Parameter(last.bias.detach() + 0.1)


def _put_another_scale_map(t):
    part = t.parts[0]
    part.scale = TanhScale() if isinstance(part.scale, AtanScale) else AtanScale(0.3, 0.3)


def _put_another_network(t):
    part = t.parts[-1]
    part.conditioner = copy.deepcopy(part.conditioner)
    _put_other_data(part)


def _load(t):
    t.load_state_dict({k: 1.1 * v if v.is_floating_point() else v for k, v in t.state_dict().items()})


UPDATES = {
    "Adam": _step(lambda p: torch.optim.Adam(p, lr=0.01)),
    "fused Adam": _step(lambda p: torch.optim.Adam(p, lr=0.01, fused=True)),
    "SGD": _step(lambda p: torch.optim.SGD(p, lr=0.01)),
    "ClippedAdam": _step(lambda p: ClippedAdam(p, lr=0.01)),
    "edit of p.data": lambda t: next(t.parameters()).data.add_(0.1),
    "other p.data": _put_other_data,
    "edit under no_grad": _edit_under_no_grad,
    "another parameter": _put_another_parameter,
    "another scale map": _put_another_scale_map,
    "another network": _put_another_network,
    "load_state_dict": _load,
}
each_update = pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)


@each_update
def test_score_of_the_same_data_follows_the_parameters(update):
    t = flow()
    before = density(t).log_prob(DATA)
    update(t)
    after = density(t).log_prob(DATA)
    assert (after - before).abs().max() > 1e-4
    assert_scored_anew(t, DATA)
    after.sum().backward()  # no graph of the first score is left
    x = t.inv(DATA)  # held here, so that its pair lives on
    update(t)
    assert (t(x) - DATA).abs().max() > 1e-4


@each_update
@pytest.mark.parametrize("draw", ["sample", "rsample"])
def test_score_of_a_draw_follows_the_parameters(update, draw):
    t = flow()
    y = getattr(density(t), draw)((5,))
    before = density(t).log_prob(y)
    update(t)
    assert (density(t).log_prob(y) - before).abs().max() > 1e-4
    assert_scored_anew(t, y)


def test_score_follows_a_buffer():
    t = ComposeFlow([*layers(), Standardization((4,))]).double()
    y = density(t).rsample((5,))
    t.parts[-1].fit(3 * DATA + torch.arange(4))
    assert_scored_anew(t, y)


def test_score_follows_a_context():
    context = torch.tensor([1.0, -1.0], dtype=torch.float64)
    t = randomised(ConditionalAffineCoupling(half_mask(4), MLP(2, 2, context_dim=2))).condition(context)
    y = density(t).rsample((5,))
    context.mul_(2)
    assert_scored_anew(t, y)


def test_score_follows_tensors_that_no_module_holds():
    weight = torch.ones(2, dtype=torch.float64)
    t = ComposeFlow([AffineCoupling(half_mask(4), lambda kept: (kept * weight, kept * weight))])
    y = density(t).rsample((5,))
    weight.mul_(2)
    assert_scored_anew(t, y)


def test_functional_call_with_other_parameters():
    score = Score(flow())
    y = density(score.t).rsample((5,))
    before = score(y)
    other = {name: 1.1 * p for name, p in score.named_parameters()}
    twin = Score(flow())
    twin.load_state_dict({**twin.state_dict(), **other})
    assert_close(functional_call(score, other, (y,)), twin(y), 1e-12)
    assert_close(score(y), before, 1e-12)


def test_functional_call_has_the_gradients_of_its_own_parameters_even_if_equal():
    score = Score(flow())
    own = dict(score.named_parameters())
    y = density(score.t).rsample((5,))
    expected = torch.autograd.grad(density(score.t.with_cache(0)).log_prob(y.detach()).sum(), list(own.values()))
    twins = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    actual = torch.autograd.grad(functional_call(score, twins, (y,)).sum(), list(twins.values()))
    torch.testing.assert_close(actual, expected)
    y = density(score.t).sample((5,))
    actual = torch.func.grad(lambda p: functional_call(score, p, (y,)).sum())(own)
    expected = torch.autograd.grad(score(y).sum(), list(own.values()))
    torch.testing.assert_close(tuple(actual.values()), expected)


def test_vmap_over_parameters():
    score = Score(flow())
    y = density(score.t).rsample((5,))
    stacked = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in score.named_parameters()}
    ensemble = vmap(lambda p: functional_call(score, p, (y,)))(stacked)
    for index, member in enumerate(ensemble):
        one = {name: p[index] for name, p in stacked.items()}
        assert_close(member, functional_call(score, one, (y,)), 1e-12)


def test_unfreezing_brings_gradients():
    t = flow().requires_grad_(False)
    y = density(t).rsample((5,))
    density(t.requires_grad_(True)).log_prob(y).sum().backward()
    assert all(p.grad is not None for p in t.parameters())


# ---- what the cache saves
STACKS = {
    "a flow": lambda: [flow()],
    "a stack of layers": lambda: [randomised(layer) for layer in layers()],
    "an inverse": lambda: [flow().inv],
}


@pytest.mark.parametrize("make", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_one_network_call_for_each_layer(make, mode):
    d = density(*make())
    with mode():
        for _ in range(2):
            with calls(NUM_LAYERS):
                d.log_prob(d.rsample((5,)))
            with calls(NUM_LAYERS):
                d.log_prob(DATA)


def test_without_cache_every_call_computes():
    d = density(flow().with_cache(0))
    with calls(3 * NUM_LAYERS):
        d.log_prob(d.rsample((5,)))
    with calls(2 * NUM_LAYERS):
        d.log_prob(DATA)


def test_clear_cache():
    t = flow()
    for clear in (t.clear_cache, t.inv.clear_cache):
        y = density(t).rsample((5,))
        clear()
        with calls(NUM_LAYERS):
            density(t).log_prob(y)


def test_memory_is_freed_with_the_draw():
    t = flow()
    x = torch.randn(5, 4, dtype=torch.float64)
    y = t(x)
    alive = weakref.ref(x), weakref.ref(y)
    del x
    assert alive[0]() is not None
    del y
    assert [ref() for ref in alive] == [None, None]


@pytest.mark.parametrize("network", [CountedMLP, MLP])  # the latter is fused
def test_a_flow_is_not_kept_by_its_draw(network):
    t = randomised(ComposeFlow([coupling(half_mask(4), make=network)])).requires_grad_(False)
    y = t(DATA)
    gone = weakref.ref(t)
    del t
    assert gone() is None and y.isfinite().all()


# ---- gradients and changes in place
def test_sample_scored_under_grad_has_gradients():
    t = flow()
    y = density(t).sample((5,))
    density(t).log_prob(y).sum().backward()
    actual = [p.grad for p in t.parameters()]
    expected = torch.autograd.grad(density(t.with_cache(0)).log_prob(y).sum(), list(t.parameters()))
    torch.testing.assert_close(actual, list(expected))


def test_gradients_of_a_reparameterised_draw_are_those_without_cache():
    t = flow()
    gradients = []
    for twin in (t, t.with_cache(0)):
        y = twin(DATA)
        objective = (density(twin).log_prob(y) + (y**2).sum(-1)).sum()
        gradients.append(torch.autograd.grad(objective, list(t.parameters())))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("changed", ["x", "y", "log_det"])
@pytest.mark.parametrize("forth", [True, False], ids=["forth", "back"])
def test_change_in_place_is_seen(changed, forth):
    t = flow() if forth else flow().inv
    off = t.with_cache(0)
    with torch.no_grad():
        values = {"x": DATA.clone()}
        values["y"] = t(values["x"])
        values["log_det"] = t.log_abs_det_jacobian(values["x"], values["y"])
        values[changed].mul_(2)
        assert_close(t.inv(values["y"]), off.inv(values["y"]), 1e-12)
        log_det = t.log_abs_det_jacobian(values["x"], values["y"])
        assert_close(log_det, off.log_abs_det_jacobian(values["x"], values["y"]), 1e-12)


def test_nested_and_repeated():
    inner = flow()
    outer = ComposeFlow([inner, Permutation(torch.tensor([3, 1, 0, 2])), inner.inv, inner])
    for stack in ([outer], [inner, inner], [inner, inner.inv], [outer, inner]):
        y = density(*stack).rsample((5,))
        off = density(*(t.with_cache(0) for t in stack))
        assert_close(density(*stack).log_prob(y), off.log_prob(y), 1e-9)
        assert_close(density(*stack).log_prob(DATA), off.log_prob(DATA), 1e-9)
