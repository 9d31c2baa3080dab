"""Builders and ``NormalizingFlow``: densities, units, contexts, seeds, refusals, a fit that no Gaussian can match."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from torch import nn
from torch.distributions import ExpTransform, SigmoidTransform, StickBreakingTransform, constraints

from pyro_affine import (
    ComposeFlow,
    ConditionalComposeFlow,
    NormalizingFlow,
    affine_coupling,
    conditional_affine_coupling,
    conditional_real_nvp,
    real_nvp,
)
from pyro_affine.coupling import AffineCoupling
from pyro_affine.scales import AdditiveScale, TanhScale

EVENT_SHAPES = {"1": (1,), "1, 1": (1, 1), "2": (2,), "5": (5,), "3, 4": (3, 4), "2, 4, 4": (2, 4, 4)}
event_shapes = pytest.mark.parametrize("event_shape", EVENT_SHAPES.values(), ids=EVENT_SHAPES)
conditional = pytest.mark.parametrize("conditional", [False, True], ids=["", "conditional"])


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


def jitter(module):
    for parameter in module.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return module


def make_flow(event_shape=(4,), conditional=False, num_layers=4):
    options = {"num_layers": num_layers, "hidden_dims": (8,)}
    make = partial(conditional_real_nvp, context_dim=3) if conditional else real_nvp
    return NormalizingFlow(make(event_shape, **options), event_shape, tails="normal")


def make_context(conditional, batch_shape=(7,)):
    return torch.randn(*batch_shape, 3) if conditional else None


@event_shapes
@conditional
def test_starts_as_the_standard_normal_also_in_one_dimension(event_shape, conditional):
    flow, context, y = make_flow(event_shape, conditional), make_context(conditional), torch.randn(7, *event_shape)
    expected = dist.Normal(torch.zeros(event_shape), 1.0).to_event(len(event_shape)).log_prob(y)
    assert torch.allclose(flow.log_prob(y, context), expected, atol=1e-9)


@event_shapes
@conditional
@pytest.mark.parametrize("sample_shape", [(), (100,), (2, 5)], ids=str)
def test_shapes_and_log_prob_of_draws(event_shape, conditional, sample_shape):
    flow, context = jitter(make_flow(event_shape, conditional)), make_context(conditional)
    flow.standardize(3 + 2 * torch.randn(10, *event_shape))
    q, batch_shape = flow(context), (7,) if conditional else ()
    assert q.batch_shape == batch_shape and q.event_shape == event_shape
    for draw in (q.sample, q.rsample, partial(flow.sample, context=context)):
        y = draw(sample_shape)
        assert y.shape == sample_shape + batch_shape + event_shape
        score = q.log_prob(y)
        assert score.shape == sample_shape + batch_shape
        assert torch.allclose(score, flow.log_prob(y.detach().clone(), context), atol=1e-9)
    assert flow.rsample(sample_shape, context).requires_grad and not flow.sample(sample_shape, context).requires_grad


@conditional
def test_log_prob_is_the_change_of_variables(conditional):
    flow, context, y = jitter(make_flow((5,), conditional)), make_context(conditional, ()), torch.randn(5)
    inverse = flow(context).transforms[0].inv
    jacobian = torch.autograd.functional.jacobian(lambda v: inverse(v), y)
    expected = dist.Normal(0.0, 1.0).log_prob(inverse(y)).sum() + torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(flow.log_prob(y, context), expected, atol=1e-8)


def test_the_tails_are_those_that_were_asked_for():
    far = torch.tensor([40.0, 0.0, 0.0])
    scores = {
        tails: NormalizingFlow(real_nvp(3), 3, tails=tails).log_prob(far) for tails in ("normal", "log", "student")
    }
    assert torch.isclose(scores["normal"], scores["log"]) and scores["student"] > scores["normal"] + 500
    assert NormalizingFlow(real_nvp(3), 3).tails == "student"
    assert NormalizingFlow(real_nvp(3), 3, curves=0).tails == "normal"


def test_units_make_the_gaussian_copula_of_the_data():
    x = torch.randn(4000, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
    data = torch.stack([x[:, 0].exp(), x[:, 1] ** 3], -1)
    flow = NormalizingFlow(real_nvp(2), 2)
    flow.fit_units(data)
    base = flow.chain._backward(data)[0]
    assert torch.allclose(base.T.cov(), torch.eye(2), atol=0.05)
    plain = NormalizingFlow(real_nvp(2), 2, curves=0, whiten=False)
    plain.fit_units(data)
    assert flow.log_prob(data).mean() > plain.log_prob(data).mean() + 1


def test_one_dimensional_density_integrates_to_one_and_is_no_gaussian():
    flow = jitter(make_flow((1,)))
    grid = torch.linspace(-12, 12, 20_001)[:, None]
    density = flow.log_prob(grid).exp().detach()
    mean = torch.trapezoid(density * grid[:, 0], grid[:, 0])
    fourth, second = (torch.trapezoid(density * (grid[:, 0] - mean) ** k, grid[:, 0]) for k in (4, 2))
    assert torch.allclose(torch.trapezoid(density, grid[:, 0]), torch.ones(()), atol=1e-6)
    assert abs(fourth / second**2 - 3) > 0.05


def test_context_changes_the_density_of_one_entry():
    flow = jitter(make_flow((1,), conditional=True))
    scores = flow.log_prob(torch.zeros(1), torch.tensor([[-1.0, 0.0, 2.0], [1.0, 3.0, 0.0]]))
    assert scores.shape == (2,) and abs(scores[0] - scores[1]) > 1e-3


def test_context_changes_the_shape_of_one_entry():
    flow = jitter(make_flow((1,), conditional=True))
    low, middle, high = flow(torch.randn(5, 3)).transforms[0](torch.tensor([-1.0, 0.0, 1.0])[:, None, None])
    skew = (high - middle) / (middle - low)
    assert skew.max() / skew.min() > 1.05


@event_shapes
def test_scores_and_draws_at_many_contexts_are_those_at_each(event_shape):
    flow, contexts, y = jitter(make_flow(event_shape, True)), torch.randn(7, 3), torch.randn(7, *event_shape)
    alone = torch.stack([flow.log_prob(row, context) for row, context in zip(y, contexts, strict=True)])
    assert torch.allclose(flow.log_prob(y, contexts), alone, atol=1e-9)
    x = torch.randn(event_shape)
    together = flow(contexts).transforms[0](x)
    assert torch.allclose(together, torch.stack([flow(c).transforms[0](x) for c in contexts]), atol=1e-9)


@conditional
def test_standardize_gives_the_density_of_the_data_as_they_are(conditional):
    flow, context = make_flow((3,), conditional), make_context(conditional, ())
    data = torch.tensor([5.0, -100.0, 0.0]) + torch.tensor([0.01, 50.0, 1.0]) * torch.randn(500, 3)
    before = flow.log_prob(data[0], context)
    flow.standardize(data)
    expected = dist.Normal(data.mean(0), data.std(0)).to_event(1)
    assert torch.allclose(flow.log_prob(data, context), expected.log_prob(data), atol=1e-8)
    assert not torch.isclose(flow.log_prob(data[0], context), before)
    assert (flow.sample((2000,), context).mean(0) - data.mean(0)).abs().div(data.std(0)).max() < 0.15


ENDS = {
    "reals": (lambda: affine_coupling(4), constraints.real_vector, (4,)),
    "unit interval": (
        lambda: ComposeFlow([affine_coupling(4), SigmoidTransform()]),
        constraints.independent(constraints.unit_interval, 1), (4,),
    ),
    "simplex": (lambda: ComposeFlow([affine_coupling(4), StickBreakingTransform()]), constraints.simplex, (5,)),
    "unit interval, conditional": (
        lambda: ConditionalComposeFlow([conditional_affine_coupling(4, 3), SigmoidTransform()]),
        constraints.independent(constraints.unit_interval, 1), (4,),
    ),
    "reals, Pyro's conditional": (
        lambda: T.conditional_spline(4, 3, hidden_dims=[8]), constraints.real_vector, (4,)
    ),
}  # fmt: skip


@pytest.mark.parametrize("make, support, event_shape", ENDS.values(), ids=ENDS)
def test_support_is_that_of_the_last_part(make, support, event_shape):
    flow = NormalizingFlow(make(), 4)
    q = flow(make_context(flow.conditional))
    assert repr(q.support) == repr(support) and q.event_shape == event_shape
    assert q.support.check(q.sample((20,))).all()
    if support is constraints.real_vector:
        flow.standardize(torch.randn(10, 4))
    else:
        with pytest.raises(ValueError, match="whole real line, got a flow onto"):
            flow.standardize(torch.rand(10, *event_shape))


ELEMENTWISE = {
    "alone": lambda: ExpTransform(),
    "a chain": lambda: ComposeFlow([T.Spline(3, bound=4.0), ExpTransform()]),
}


@pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_a_flow_of_elementwise_parts_scores_events(make):
    flow = NormalizingFlow(make(), 3)
    y, log_prob = flow.rsample_and_log_prob((3,))
    assert y.shape == (3, 3) and torch.allclose(log_prob, flow().log_prob(y))
    assert torch.allclose(flow.log_prob(y), flow().log_prob(y)) and flow.log_prob(y[0]).shape == ()


@conditional
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
def test_copies_and_state(conditional, copied):
    flow, context, y = jitter(make_flow((4,), conditional)), make_context(conditional), torch.randn(7, 4)
    flow.standardize(3 + 2 * torch.randn(10, 4))
    score = flow.log_prob(y, context)
    flow(context).log_prob(flow(context).rsample()).sum().backward()
    fresh = make_flow((4,), conditional)
    fresh.load_state_dict(flow.state_dict())
    for other in (copied(flow), fresh):
        assert torch.equal(other.log_prob(y, context), score)


@conditional
def test_moves_as_a_whole(conditional):
    flow, context, y = make_flow((4,), conditional), make_context(conditional), torch.randn(7, 4)
    single = copy.deepcopy(flow).float()
    context = None if context is None else context.float()
    assert single.log_prob(y.float(), context).dtype == single.sample((), context).dtype == torch.float32
    assert {t.dtype for t in single.state_dict().values()} <= {torch.float32, torch.bool, torch.long}


# ---- builders
@conditional
def test_seed_fixes_the_reorderings_and_leaves_the_global_state_to_the_networks(conditional):
    make = partial(conditional_real_nvp, context_dim=3) if conditional else real_nvp

    def build(seed, global_seed):
        torch.manual_seed(global_seed)
        state = make(9, num_layers=6, seed=seed).state_dict()
        orders = [value for name, value in state.items() if name.endswith("order")]
        weights = [value for name, value in state.items() if name.endswith("weight")]
        return torch.cat(orders), torch.cat([w.flatten() for w in weights]), torch.get_rng_state()

    order, weights, state = build(seed=1, global_seed=0)
    again, other_weights, _ = build(seed=1, global_seed=7)
    other_order, same_weights, same_state = build(seed=2, global_seed=0)
    assert torch.equal(order, again) and not torch.equal(order, other_order)
    assert torch.equal(weights, same_weights) and not torch.equal(weights, other_weights)
    assert torch.equal(state, same_state)


def test_options_reach_the_layers():
    flow = real_nvp(6, num_layers=5, hidden_dims=(7, 9), scale=TanhScale(1.5), activation=nn.Tanh, guard=True)
    layers = [part for part in flow.parts if isinstance(part, AffineCoupling)]
    assert len(layers) == 5 and flow.guard
    assert all(layer.scale.bound == 1.5 for layer in layers)
    assert sum(isinstance(module, nn.Tanh) for module in flow.modules()) == 10
    assert {m.out_features for m in layers[0].modules() if isinstance(m, nn.Linear)} == {7, 9, 6}
    assert [layer.mask.tolist() for layer in layers[:2]] == [[True] * 3 + [False] * 3, [False] * 3 + [True] * 3]


@conditional
def test_additive_scale_preserves_volume_and_halves_the_last_layer(conditional):
    make = partial(conditional_real_nvp, context_dim=3) if conditional else real_nvp
    flow = jitter(make(4, num_layers=2, scale=AdditiveScale()))
    chain = flow.condition(torch.randn(3)) if conditional else flow
    assert torch.equal(chain._forward(torch.randn(5, 4))[1], torch.zeros(5))
    assert 4 not in [m.out_features for m in flow.modules() if isinstance(m, nn.Linear)]


REFUSED = {
    "one layer": (lambda: real_nvp(4, num_layers=1), r"2 of 4 that never are: \(0,\), \(1,\); use two layers"),
    "one layer, conditional": (lambda: conditional_real_nvp(4, 3, num_layers=1), r"2 of 4 that never are"),
    "no layer": (lambda: real_nvp(4, num_layers=0), "at least one part"),
    "no entry": (lambda: real_nvp(0), r"one entry at least, got \(0,\)"),
    "no dimension": (lambda: real_nvp(()), r"one dimension .*got \(\); use \(1,\)"),
    "no dimension, conditional": (lambda: conditional_real_nvp((), 3), r"one dimension .*got \(\)"),
    "no context entry": (lambda: conditional_real_nvp(4, 0), "context"),
    "unknown tails": (lambda: NormalizingFlow(real_nvp(4), 4, tails="heavy"), "tails must be"),
    "whitened images": (lambda: NormalizingFlow(real_nvp((2, 2)), (2, 2), whiten=True), "only vectors can be whitened"),
    "curves on an interval": (
        lambda: NormalizingFlow(ComposeFlow([real_nvp(4), SigmoidTransform()]), 4, curves=8), "leave them out"
    ),
    "no transform": (lambda: NormalizingFlow(nn.Linear(4, 4), 4), "bijective .*Transform, got Linear"),
    "events of another size": (lambda: NormalizingFlow(real_nvp(4), 3), r"\(4,\).*\(3,\)"),
    "events of another size, bounded": (
        lambda: NormalizingFlow(ComposeFlow([real_nvp(4), SigmoidTransform()]), 3), r"\(4,\).*\(3,\)"
    ),
    "events of another size, conditional": (
        lambda: NormalizingFlow(conditional_real_nvp(4, 3), 5)(torch.zeros(3)), r"\(5,\).*\(4,\)"
    ),
    "context not wanted": (lambda: make_flow()(torch.zeros(7, 3)), "got a context for a flow that is not conditional"),
    "context missing": (lambda: make_flow(conditional=True)(), "got no context for a flow that is conditional"),
    "context missing in log_prob": (
        lambda: make_flow(conditional=True).log_prob(torch.zeros(4)), "got no context for a flow that is conditional"
    ),
    "context of the wrong size": (lambda: make_flow(conditional=True)(torch.zeros(7, 2)), r"\(3,\), got \(7, 2\)"),
    "context of another dtype": (lambda: make_flow(conditional=True)(torch.zeros(3).float()), "float32.*float64"),
    "context of integers": (lambda: make_flow(conditional=True)(torch.zeros(3).long()), "int64"),
    "batch that does not broadcast": (
        lambda: make_flow(conditional=True).log_prob(torch.zeros(5, 4), torch.zeros(7, 3)), r"\(5, 4\)"
    ),
    "value of the wrong size": (lambda: make_flow().log_prob(torch.zeros(7, 3)), r"\(4,\).*\(7, 3\)"),
    "integers": (lambda: make_flow().log_prob(torch.zeros(4).long()), "floating point.*int64"),
    "another dtype": (lambda: make_flow().log_prob(torch.zeros(4).float()), "float32.*float64"),
    "data of the wrong size": (lambda: make_flow().standardize(torch.zeros(9, 3)), r"\(N,\) \+ \(4,\).*\(9, 3\)"),
    "data that do not vary": (lambda: make_flow().standardize(torch.zeros(9, 4)), r"deviation 0.0 at entry \(0,\)"),
    "data that are not finite": (
        lambda: make_flow().standardize(torch.full((9, 4), torch.inf)), r"deviation nan at entry \(0,\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("do, message", REFUSED.values(), ids=REFUSED)
def test_refusals_say_the_rule_and_what_came(do, message):
    with pytest.raises(ValueError, match=message):
        do()


# ---- fitting
def test_fit_of_a_banana_beats_every_gaussian_by_a_nat():
    def banana(num_draws):
        x = torch.randn(num_draws, 2)
        return torch.stack([10 * x[:, 0], 0.3 * x[:, 1] + x[:, 0] ** 2], -1)

    train, test = banana(2000), banana(4000)
    flow = NormalizingFlow(real_nvp(2, num_layers=4, hidden_dims=(24,)), 2)
    flow.standardize(train)
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        (-flow.log_prob(train[torch.randint(len(train), (128,))]).mean()).backward()
        optimiser.step()
    gaussian = dist.MultivariateNormal(test.mean(0), test.T.cov())
    # the best Gaussian loses (log 2.09 - 2 log 0.3) / 2 = 1.57 nats to the truth
    assert flow.log_prob(test).mean() > gaussian.log_prob(test).mean() + 1.0


@conditional
def test_draws_come_with_their_density(conditional):
    context = torch.randn(7, 2) if conditional else None
    transform = real_nvp(3, num_layers=2) if context is None else conditional_real_nvp(3, 2, num_layers=2)
    flow = NormalizingFlow(transform, 3)
    for parameter in flow.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    y, log_prob = flow.rsample_and_log_prob((5,), context)
    batch = (5,) if context is None else (5, 7)
    assert y.shape == (*batch, 3) and log_prob.shape == batch and y.requires_grad
    assert torch.allclose(log_prob, flow.log_prob(y, context), atol=1e-4)
    torch.manual_seed(3)
    one = flow.sample((5,), context)
    torch.manual_seed(3)
    assert torch.allclose(one, flow(context).sample((5,)), atol=1e-6) and not one.requires_grad
