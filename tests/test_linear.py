"""Permutation, LowerTriangularAffine, Standardization: their formulas, what they save, what they refuse."""

from __future__ import annotations

import pytest
import torch
from cases import assert_close, density, randomised
from torch.distributions import MultivariateNormal

from pyro_affine.linear import LowerTriangularAffine, Permutation, Standardization

F64 = torch.float64


def test_permutation_takes_entries_in_the_given_order():
    t = Permutation(torch.tensor([3, 0, 2, 1, 5, 4]), (2, 3))
    x = torch.tensor([[10.0, 11.0, 12.0], [13.0, 14.0, 15.0]])
    y = torch.tensor([[13.0, 10.0, 12.0], [11.0, 15.0, 14.0]])
    assert torch.equal(t(x), y) and torch.equal(t.inv(y), x)
    assert torch.equal(t.log_abs_det_jacobian(x.expand(4, 2, 3), y.expand(4, 2, 3)), torch.zeros(4))


@pytest.mark.parametrize("seed", range(6))
def test_sign_of_a_permutation(seed):
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    assert Permutation(order).sign == round(torch.linalg.det(torch.eye(7, dtype=F64)[order]).item())


def test_permutation_saves_its_order_and_keeps_it_from_its_maker():
    order = torch.tensor([2, 0, 1])
    saved, other = Permutation(order), Permutation(torch.tensor([0, 1, 2]))
    order.zero_()
    other.load_state_dict(saved.state_dict())
    x = torch.randn(3)
    assert torch.equal(other(x), x[[2, 0, 1]]) and torch.equal(other.inv(other(x)), x)
    assert other.with_cache(0).inv(other(x)).equal(x) and list(saved.state_dict()) == ["order"]


def test_lower_triangular_affine_of_a_standard_normal_is_any_gaussian():
    t = randomised(LowerTriangularAffine(torch.tensor([1.0, -2.0, 0.5], dtype=F64), 0.7))
    assert torch.equal(t.scale_tril, t.scale_tril.tril()) and (t.scale_tril.diagonal() > 0).all()
    y = torch.randn(2, 5, 3, dtype=F64)
    gaussian = MultivariateNormal(t.loc, scale_tril=t.scale_tril)
    assert_close(density(t).log_prob(y), gaussian.log_prob(y), 1e-12)
    x = torch.randn(5, 3, dtype=F64)
    assert_close(t(x), t.loc + x @ t.scale_tril.T, 1e-12)


def test_lower_triangular_affine_starts_at_loc_and_scale():
    scale = torch.tensor([0.5, 3.0])
    t = LowerTriangularAffine(torch.tensor([1.0, 2.0]), scale)
    assert_close(t.scale_tril, torch.diag(scale), 1e-6)
    assert torch.equal(t(torch.zeros(2)), torch.tensor([1.0, 2.0]))
    assert LowerTriangularAffine(torch.zeros(2, dtype=F64), 2.0).log_scale.dtype == F64


def test_lower_triangular_affine_is_free_of_units():
    """The gradient of a log-density with respect to N and log_scale is the same in metres and in millimetres."""
    y, gradients = torch.randn(8, 3, dtype=F64), []
    for unit in (1.0, 1000.0):
        t = LowerTriangularAffine(torch.zeros(3, dtype=F64), unit)
        density(t).log_prob(y * unit).sum().backward()
        gradients.append((t.below.grad, t.log_scale.grad))
    torch.testing.assert_close(*gradients)


def test_standardization_of_its_data_has_mean_zero_and_sd_one():
    data = torch.tensor([3.0, -100.0]) + torch.tensor([1e-3, 50.0]) * torch.randn(1000, 2)
    t = Standardization((2,))
    t.fit(data)
    x = t.inv(data)
    assert_close(x.mean(0), torch.zeros(2), 1e-3)
    assert_close(x.std(0), torch.ones(2), 1e-3)
    assert list(t.state_dict()) == ["loc", "scale"] and not list(t.parameters())


def test_standardization_shares_no_memory_with_the_data():
    data = torch.randn(10, 2)
    t = Standardization((2,))
    t.fit(data)
    before = t.loc.clone()
    data.zero_()
    assert torch.equal(t.loc, before)


def _fit(data):
    return lambda: Standardization((2,)).fit(data)


SPLIT = torch.stack([torch.arange(5.0), torch.ones(5)], 1)
BROKEN = torch.tensor([[0.0, 1.0], [torch.nan, 2.0]])
BAD = {
    "order twice": (lambda: Permutation(torch.tensor([0, 0, 2])), r"from 0 to 2 once, got .*\[0, 0, 2\]; .*randperm"),
    "order of another size": (lambda: Permutation(torch.arange(3), (4,)), r"from 0 to 3 once, got .*\[0, 1, 2\]; for"),
    "order of floats": (lambda: Permutation(torch.tensor([1.0, 0.0])), r"int64 .* got torch.float32 \[1.0, 0.0\]"),
    "order of rank 2": (lambda: Permutation(torch.eye(2).long()), r"from 0 to 3 once, got .*\[\[1, 0\]"),
    "loc a matrix": (lambda: LowerTriangularAffine(torch.zeros(2, 2)), r"vector of floats, got .*\(2, 2\); use"),
    "loc of integers": (lambda: LowerTriangularAffine(torch.arange(2)), r"vector of floats, got torch.int64 .*; use"),
    "scale zero": (lambda: LowerTriangularAffine(torch.zeros(2), 0.0), r"scale must be positive .* got 0.0"),
    "scale negative": (lambda: LowerTriangularAffine(torch.zeros(2), -1.0), r"scale must be positive .* got -1.0"),
    "scale of another size": (lambda: LowerTriangularAffine(torch.zeros(2), torch.ones(3)), r"shape \(\) or \(2,\)"),
    "one row": (_fit(torch.zeros(1, 2)), r"shape \(N,\) \+ \(2,\) with N >= 2, got \(1, 2\)"),
    "other events": (_fit(torch.zeros(5, 3)), r"shape \(N,\) \+ \(2,\) with N >= 2, got \(5, 3\)"),
    "constant entry": (_fit(SPLIT), r"finite and vary, got .* entry \(1,\); drop"),
    "not finite": (_fit(BROKEN), r"finite and vary, got .* nan at entry \(0,\); drop"),
    "two constant entries": (_fit(torch.ones(5, 2)), r"training rows must .* 0.0 at entry \(0,\), \(1,\); drop"),
    "many constant entries": (
        lambda: Standardization((30,)).fit(torch.ones(5, 30)), r"\(18,\), \(19,\) and 10 more; drop"
    ),
}  # fmt: skip


@pytest.mark.parametrize("act, words", BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_rule_and_remedy(act, words):
    with pytest.raises(ValueError, match=words):
        act()
