"""``audit``: entries that never move and pairs that never interact, without a trace on the flow that is looked at."""

from __future__ import annotations

import copy
from functools import partial

import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from torch import nn
from torch.distributions import AffineTransform, SigmoidTransform, StickBreakingTransform

from pyro_affine import (
    AffineCoupling,
    ComposeFlow,
    affine_coupling,
    conditional_affine_coupling,
    conditional_real_nvp,
    real_nvp,
)
from pyro_affine.audit import AuditReport, audit, require_all_moved, unmoved_entries
from pyro_affine.linear import LowerTriangularAffine, Permutation, Standardization
from pyro_affine.masks import half_mask

ORDER = torch.tensor([2, 3, 0, 1])


class Blocks(nn.Module):
    """A conditioner whose moved entry k reads the kept entry k alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, kept, context=None):
        return kept * self.weight, kept * self.weight


class Noisy(nn.Module):
    """A conditioner with dropout and a count of its calls."""

    def __init__(self, size=2):
        super().__init__()
        self.network, self.rows = nn.Sequential(nn.Dropout(0.5), nn.Linear(size, 2 * size)), 0

    def forward(self, kept, context=None):
        self.rows += kept.shape[:-1].numel()
        return self.network(kept).chunk(2, -1)


def blocks():
    return [AffineCoupling(half_mask(4), Blocks()), AffineCoupling(~half_mask(4), Blocks())]


PAIRS = [((i,), (j,)) for i in range(4) for j in range(i + 1, 4)]
CASES = {  # name: (transform, entries that never move, pairs that never interact)
    "one coupling": (lambda: affine_coupling(4), [(0,), (1,)], [((2,), (3,))]),
    "iterated": (lambda: T.iterated(4, affine_coupling, 4), [(0,), (1,)], [((2,), (3,))]),
    "iterated, split elsewhere": (
        lambda: T.iterated(4, partial(affine_coupling, split_dim=1), 3), [(0,)], [((1,), (2,))]
    ),
    "two couplings, first half kept twice": (
        lambda: ComposeFlow([affine_coupling(4), affine_coupling(4)]), [(0,), (1,)], [((2,), (3,))]
    ),
    "permuted after": (
        lambda: ComposeFlow([affine_coupling(4), Permutation(ORDER)]), [(2,), (3,)], [((0,), (1,))]
    ),
    "permuted before": (
        lambda: ComposeFlow([Permutation(ORDER), affine_coupling(4)]), [(0,), (1,)], [((2,), (3,))]
    ),
    "permuted and back": (
        lambda: ComposeFlow([affine_coupling(4), Permutation(ORDER), Permutation(ORDER)]), [(0,), (1,)], [((2,), (3,))]
    ),
    "permuted by Pyro": (
        lambda: ComposeFlow([affine_coupling(4), T.Permute(ORDER)]), [(2,), (3,)], [((0,), (1,))]
    ),
    "permuted between": (
        lambda: ComposeFlow([affine_coupling(4), Permutation(ORDER), affine_coupling(4)]), [], []
    ),
    "blocks": (
        lambda: ComposeFlow(blocks()), [],
        [((0,), (1,)), ((0,), (3,)), ((1,), (2,)), ((2,), (3,))],
    ),
    "blocks, mixed by a dense map": (lambda: ComposeFlow([*blocks(), LowerTriangularAffine(torch.zeros(4))]), [], []),
    "elementwise and trained": (lambda: ComposeFlow([T.Spline(4), Permutation(ORDER)]), [], PAIRS),
    "nothing to train": (
        lambda: ComposeFlow([Standardization((4,)), Permutation(ORDER)]), [(0,), (1,), (2,), (3,)], PAIRS
    ),
    "one entry": (lambda: real_nvp(1), [], []),
    "image, channels": (
        lambda: affine_coupling((2, 1, 2), dim=-3), [(0, 0, 0), (0, 0, 1)], [((1, 0, 0), (1, 0, 1))]
    ),
    "conditioned": (
        lambda: conditional_affine_coupling(4, 2).condition(torch.zeros(2)), [(0,), (1,)], [((2,), (3,))]
    ),
    "conditioned on a batch": (
        lambda: conditional_affine_coupling(4, 2).condition(torch.zeros(7, 2)), [(0,), (1,)], [((2,), (3,))]
    ),
    "onto an interval": (lambda: ComposeFlow([real_nvp(4), SigmoidTransform()]), [], []),
    "onto a simplex": (lambda: ComposeFlow([real_nvp(4), StickBreakingTransform()]), [], []),
    "autoregressive": (lambda: ComposeFlow([T.affine_autoregressive(4), Permutation(ORDER)]), [], []),
}  # fmt: skip
cases = pytest.mark.parametrize("make, unmoved, uncoupled", CASES.values(), ids=CASES)


@cases
def test_finds_what_never_moves_and_what_never_interacts(make, unmoved, uncoupled):
    report = audit(make())
    assert report == AuditReport(unmoved, uncoupled)
    assert report.ok == (not unmoved and not uncoupled)


@pytest.mark.parametrize("event_shape", [(2,), (5,), (9,), (3, 4), (2, 4, 4)], ids=str)
@pytest.mark.parametrize("conditional", [False, True], ids=["", "conditional"])
@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU], ids=["SiLU", "ReLU"])
def test_what_the_builders_make_is_in_order(event_shape, conditional, activation):
    flow = conditional_real_nvp(event_shape, 3, activation=activation) if conditional else real_nvp(event_shape)
    assert audit(flow.condition(torch.zeros(3)) if conditional else flow).ok


@pytest.mark.parametrize("trained", [False, True], ids=["at the start", "trained"])
def test_leaves_parameters_buffers_cache_and_random_state_alone(trained):
    flow = ComposeFlow([AffineCoupling(half_mask(4), Noisy()), T.BatchNorm(4), AffineCoupling(~half_mask(4), Noisy())])
    if trained:
        for parameter in flow.parameters():
            nn.init.normal_(parameter)
    state, random_state = copy.deepcopy(flow.state_dict()), torch.get_rng_state()
    assert audit(flow).ok
    assert all(torch.equal(value, state[name]) for name, value in flow.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert flow.training and all(p.grad is None for p in flow.parameters())


def test_the_default_device_does_not_matter():
    flow = real_nvp(4)
    with torch.device("meta"):
        assert not unmoved_entries(flow, torch.Size([4])).any()


def test_both_float_types_are_looked_at():
    for dtype in (torch.float32, torch.float64):
        assert audit(affine_coupling(4).to(dtype)).unmoved == [(0,), (1,)]


def test_large_events_cost_little():
    size = 1024
    networks = [Noisy(size // 2) for _ in range(4)]
    flow = ComposeFlow([AffineCoupling(half_mask(size, keep_first=k % 2 == 0), n) for k, n in enumerate(networks)])
    rows = []
    flow.parts[0].conditioner.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    assert audit(flow).ok
    assert sum(rows) < 0.3 * size  # not one pass for each entry
    rows.clear()
    require_all_moved(flow, flow.event_shape)
    assert sum(rows) < 10


def test_event_shape_where_the_flow_does_not_know_it():
    flow = ComposeFlow([AffineTransform(0.0, 1.0)])
    with pytest.raises(ValueError, match="pass event_shape"):
        audit(flow)
    assert audit(flow, (3,)).unmoved == [(0,), (1,), (2,)]


def test_unmoved_entries_have_the_shape_of_the_event():
    unmoved = unmoved_entries(affine_coupling((2, 3, 3), dim=-3), torch.Size([2, 3, 3]))
    assert torch.equal(unmoved, torch.tensor([True, False])[:, None, None].expand(2, 3, 3))


def test_require_all_moved_says_which_entries_stay():
    require_all_moved(real_nvp(5), torch.Size([5]))
    with pytest.raises(ValueError, match=r"got 10 of 20 that never are: \(0,\), .*\(7,\) and 2 more; use two layers"):
        require_all_moved(affine_coupling(20), torch.Size([20]))


def test_a_conditional_flow_is_conditioned_first():
    with pytest.raises(ValueError, match=r"conditioned first: part.condition\(context\)"):
        audit(conditional_real_nvp(4, 3))


def test_report_reads_well():
    assert str(audit(real_nvp(4))) == "every entry moves and every pair interacts"
    words = str(audit(affine_coupling(4)))
    assert "never move: (0,), (1,); pairs that never interact: ((2,), (3,))" in words and "Permutation" in words


def test_a_pair_that_never_interacts_is_independent_given_the_others():
    flow = CASES["blocks"][0]()
    for parameter in flow.parameters():
        nn.init.normal_(parameter)
    flow = flow.double()
    base = dist.Normal(torch.zeros(4, dtype=torch.double), 1.0).to_event(1)
    hessian = torch.autograd.functional.hessian(
        lambda y: dist.TransformedDistribution(base, [flow]).log_prob(y), torch.randn(4, dtype=torch.double)
    )
    pairs = [((i,), (j,)) for i, j in (hessian == 0).triu(1).nonzero().tolist()]
    assert pairs == audit(flow).uncoupled
