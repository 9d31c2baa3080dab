"""Chains: one pass for value and log-determinant, supports, shapes, refusals, conditional chains."""

from __future__ import annotations

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from torch import nn
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    CorrCholeskyTransform,
    ExpTransform,
    ReshapeTransform,
    SigmoidTransform,
    StickBreakingTransform,
    constraints,
)
from torch.distributions.transforms import AbsTransform

from pyro_affine import (
    AffineCoupling,
    ComposeFlow,
    ConditionalComposeFlow,
    affine_coupling,
    conditional_affine_coupling,
)
from pyro_affine.compose import as_flow
from pyro_affine.conditioners import MLP
from pyro_affine.linear import Permutation
from pyro_affine.masks import half_mask
from pyro_affine.transform import FlowTransform


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


def jitter(module):
    for parameter in module.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return module


class Counting(nn.Module):
    """A conditioner that counts its calls."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(2, 4), 0

    def forward(self, kept, context=None):
        self.calls += 1
        return self.linear(kept).chunk(2, -1)


def counting_chain():
    networks = [Counting() for _ in range(3)]
    masks = [half_mask(4, keep_first=k % 2 == 0) for k in range(3)]
    chain = ComposeFlow([AffineCoupling(m, n) for m, n in zip(masks, networks, strict=True)])
    return chain, networks


def standard_normal(event_shape=(4,)):
    return dist.Normal(torch.zeros(event_shape), 1.0).to_event(len(event_shape))


def test_draw_and_score_cost_one_call_of_each_network():
    chain, networks = counting_chain()
    q = dist.TransformedDistribution(standard_normal(), [chain])
    y = q.rsample((5,))
    q.log_prob(y).sum().backward()
    assert [n.calls for n in networks] == [1, 1, 1]
    q.log_prob(y.detach().clone()).sum().backward()
    assert [n.calls for n in networks] == [2, 2, 2]


def test_a_chain_is_its_parts_one_after_the_other():
    parts = [jitter(affine_coupling(4)), Permutation(torch.tensor([3, 1, 0, 2])), ExpTransform()]
    chain, x = ComposeFlow(parts), torch.randn(2, 3, 4)
    y = parts[2](parts[1](parts[0](x)))
    assert torch.allclose(chain(x), y, rtol=1e-14, atol=1e-14)
    expected = ComposeTransform(parts).log_abs_det_jacobian(x, y)
    assert expected.shape == (2, 3)
    assert torch.allclose(chain.log_abs_det_jacobian(x, y), expected)
    assert torch.allclose(chain.inv(y.detach().clone()), x)


def image_coupling():
    return affine_coupling([2, 4, 4], dim=-3)


VECTOR, IMAGE = constraints.real_vector, constraints.independent(constraints.real, 3)
independent, positive, unit_interval = constraints.independent, constraints.positive, constraints.unit_interval

CHAINS = {  # name: (parts, event_shape, domain, codomain, sign)
    "vector": (lambda: [affine_coupling(4)], (4,), VECTOR, VECTOR, 1),
    "elementwise": (
        lambda: [AffineTransform(0.0, -1.0), ExpTransform()], None, constraints.real, positive, -1
    ),
    "elementwise after a vector": (
        lambda: [affine_coupling(4), SigmoidTransform()],
        (4,), VECTOR, independent(unit_interval, 1), 1,
    ),
    "elementwise before an image": (
        lambda: [SigmoidTransform().inv, image_coupling()],
        (2, 4, 4), independent(unit_interval, 3), IMAGE, 1,
    ),
    "onto a simplex": (
        lambda: [affine_coupling(4), StickBreakingTransform()], (4,), VECTOR, constraints.simplex, None
    ),
    "from a simplex": (
        lambda: [StickBreakingTransform().inv, affine_coupling(4)], (5,), constraints.simplex, VECTOR, None
    ),
    "reshaped": (
        lambda: [ExpTransform(), ReshapeTransform((32,), (2, 4, 4)), image_coupling(), ExpTransform()],
        (32,), VECTOR, independent(positive, 3), None,
    ),
    "flattened": (
        lambda: [image_coupling(), ReshapeTransform((2, 4, 4), (32,)), ExpTransform()],
        (2, 4, 4), IMAGE, independent(positive, 1), None,
    ),
    "odd permutation": (
        lambda: [Permutation(torch.tensor([1, 0, 2]))], (3,), VECTOR, VECTOR, -1
    ),
    "two odd permutations": (
        lambda: [Permutation(torch.tensor([1, 0, 2]))] * 2, (3,), VECTOR, VECTOR, 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("make, event_shape, domain, codomain, sign", CHAINS.values(), ids=CHAINS)
def test_shape_domain_codomain_sign(make, event_shape, domain, codomain, sign):
    chain = ComposeFlow(make())
    assert chain.event_shape == (None if event_shape is None else torch.Size(event_shape))
    assert repr(chain.domain) == repr(domain) == repr(chain.inv.codomain)
    assert repr(chain.codomain) == repr(codomain) == repr(chain.inv.domain)
    assert sign is None or chain.sign == sign == chain.inv.sign  # some transforms of torch have none


@pytest.mark.parametrize("batch_shape", [(), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("make", [case[0] for case in CHAINS.values()], ids=CHAINS)
def test_shapes_of_values_and_log_det_are_foretold(make, batch_shape):
    chain = ComposeFlow(make())
    event_shape = chain.event_shape or torch.Size([4])
    x = torch.softmax(torch.randn(batch_shape + event_shape), -1)  # inside every domain
    y, log_det = chain._forward(x)
    assert chain.forward_shape(x.shape) == y.shape
    assert chain.inverse_shape(y.shape) == x.shape
    assert log_det.shape == y.shape[: y.dim() - chain.codomain.event_dim]


@pytest.mark.parametrize("make", [case[0] for case in CHAINS.values()], ids=CHAINS)
def test_log_det_is_that_of_torchs_compose_transform(make):
    chain = jitter(ComposeFlow(make()))
    x = torch.softmax(torch.randn((5, *(chain.event_shape or torch.Size([4])))), -1)
    y = chain(x)
    expected = ComposeTransform(list(chain.parts)).log_abs_det_jacobian(x, y)
    assert torch.allclose(chain._forward(x)[1], expected)
    assert torch.allclose(chain._backward(y)[1], expected)


def test_log_det_of_a_part_that_lowers_the_event_rank():
    parts = [CorrCholeskyTransform().inv, jitter(affine_coupling(3)), ExpTransform()]
    x = dist.LKJCholesky(3).sample((5,))
    y, log_det = ComposeFlow(parts)._forward(x)
    assert y.shape == (5, 3)
    assert torch.allclose(log_det, ComposeTransform(parts).log_abs_det_jacobian(x, y))


def test_transforms_of_torch_that_compose_become_chains_of_ours():
    chain = as_flow(T.iterated(3, affine_coupling, 4))
    assert isinstance(chain, ComposeFlow) and chain.event_shape == (4,)
    assert all(isinstance(part, AffineCoupling) for part in chain.parts)
    assert as_flow(chain) is chain
    assert as_flow(ExpTransform().inv).inv.transform == ExpTransform()


class Break(FlowTransform):
    """Divides by zero."""

    def _forward(self, x):
        return x / 0.0, x.sum(-1)

    _backward = _forward


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_guard_names_the_part(direction):
    parts = [affine_coupling(4), Break((4,)), affine_coupling(4)]
    chain = ComposeFlow(parts, guard=True)
    words = "out of part 1, Break" if direction == "forward" else "out of the inverse of part 1, Break"
    with pytest.raises(ValueError, match=words):
        (chain if direction == "forward" else chain.inv)(torch.randn(3, 4))
    ComposeFlow(parts)(torch.randn(3, 4))


def conditional_chain(*parts):
    return ConditionalComposeFlow(parts)


REFUSED = {
    "no part": (lambda: ComposeFlow([]), "at least one part, got none.*Permutation"),
    "no transform": (lambda: ComposeFlow([nn.Linear(4, 4)]), "bijective .*Transform, got Linear"),
    "not bijective": (lambda: ComposeFlow([AbsTransform()]), "bijective .*Transform, got AbsTransform"),
    "conditional": (
        lambda: ComposeFlow([conditional_affine_coupling(4, 2)]),
        "got ConditionalAffineCoupling; .*ConditionalComposeFlow.*condition",
    ),
    "parts that do not fit": (lambda: ComposeFlow([affine_coupling(4), affine_coupling(3)]), r"\(3,\).*\(4,\)"),
    "conditional that is no Module": (
        lambda: conditional_chain(PlainConditional()), "must be a torch Module.*ConditionalTransformModule"
    ),
    "conditional parts that do not fit": (
        lambda: conditional_chain(conditional_affine_coupling(4, 2), affine_coupling(3)).condition(torch.zeros(2)),
        r"\(3,\).*\(4,\)",
    ),
    "network of another size": (
        lambda: ComposeFlow([AffineCoupling(half_mask(4), MLP(2, 3))])(torch.zeros(4)), r"\(2,\), got a tuple of shapes"
    ),
    "network that reads another size": (
        lambda: ComposeFlow([AffineCoupling(half_mask(4), MLP(3, 2))])(torch.zeros(4)), "set input_dim to"
    ),
    "event of the wrong size": (lambda: ComposeFlow([affine_coupling(4)])(torch.zeros(3)), r"\(4,\).*\(3,\)"),
    "event of the wrong rank": (lambda: ComposeFlow([affine_coupling([2, 4], dim=-2)])(torch.zeros(4)), r"\(2, 4\)"),
    "integers": (lambda: ComposeFlow([affine_coupling(4)])(torch.zeros(4, dtype=torch.long)), "floating point.*int64"),
    "other dtype": (lambda: ComposeFlow([affine_coupling(4)])(torch.zeros(4, dtype=torch.float32)), "float32.*float64"),
    "context of the wrong size": (
        lambda: conditional_chain(conditional_affine_coupling(4, 2)).condition(torch.zeros(7, 3)), r"2.*\(7, 3\)"
    ),
    "context of another dtype": (
        lambda: conditional_chain(conditional_affine_coupling(4, 2)).condition(torch.zeros(2).float()), "float32"
    ),
}  # fmt: skip


class PlainConditional(dist.conditional.ConditionalTransform):
    def condition(self, context):
        return ExpTransform()


@pytest.mark.parametrize("do, message", REFUSED.values(), ids=REFUSED)
def test_refusals_say_the_rule_and_what_came(do, message):
    with pytest.raises(ValueError, match=message):
        do()


def test_a_part_that_is_guarded_stays_so_in_a_chain():
    chain = ComposeFlow([affine_coupling(4, guard=True), ExpTransform()])
    with pytest.raises(ValueError, match=r"stay finite, got .* out of part 0, AffineCoupling,"):
        chain(torch.full((4,), float("inf")))
