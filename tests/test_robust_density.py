"""Densities that outliers do not spoil, at points far beyond the data, and in tables too short to learn from."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_affine.correlations import shrunk_covariance
from pyro_affine.curves import Curves
from pyro_affine.fit_density import fit_density
from pyro_affine.flows import NormalizingFlow, real_nvp

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "density" / "load.py"


def bent(num_rows: int, seed: int = 0) -> Tensor:
    x = torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(seed))
    return torch.stack([x[:, 0].exp(), x[:, 1] + x[:, 0] ** 2, 100 * (x[:, 2] + x[:, 1])], -1)


def fitted(rows: Tensor, **options: Any) -> NormalizingFlow:
    torch.manual_seed(0)
    size = rows.shape[-1]
    flow = NormalizingFlow(real_nvp(size, num_layers=4, hidden_dim=24), size)
    fit_density(flow, rows, **{"num_steps": 120, "seed": 0, "progress": False, **options})
    return flow


@pytest.fixture(scope="module")
def flow() -> NormalizingFlow:
    return fitted(bent(3000))


def rays(rows: Tensor, exponents: Tensor) -> Tensor:
    """Points at 10^exponent standard deviations in some directions. Shape: (directions, exponents, D)."""
    directions = torch.randn(50, rows.shape[-1], generator=torch.Generator().manual_seed(5))
    directions = torch.cat([directions / directions.norm(dim=-1, keepdim=True), torch.eye(3), -torch.eye(3)])
    return rows.mean(0) + directions[:, None] * 10.0 ** exponents[:, None] * rows.std(0)


def test_farther_is_less_likely_up_to_a_million_standard_deviations(flow: NormalizingFlow) -> None:
    points = rays(bent(3000), torch.arange(1.0, 7.0))
    scores = flow.log_prob(points)
    assert scores.isfinite().all() and (scores.diff(dim=-1) < 0).all()
    assert (scores[:, 0] < flow.log_prob(bent(500, seed=1)).quantile(0.02)).all()


def test_gradients_at_far_points_are_finite(flow: NormalizingFlow) -> None:
    points = rays(bent(3000), torch.linspace(1, 6, 6)).requires_grad_()
    flow.log_prob(points).mean().backward()
    gradients = [p.grad for p in (*flow.parameters(), points) if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_draws_come_back(flow: NormalizingFlow) -> None:
    with torch.no_grad():
        density = flow()
        y = density.sample((2000,))
        x = flow.chain._backward(y)[0]
        again = flow.chain._forward(x)[0]
    assert ((again - y).abs() / bent(3000).std(0)).max() < 1e-3


def test_one_gross_outlier_in_a_thousand_costs_next_to_nothing(flow: NormalizingFlow) -> None:
    rows, test = bent(3000), bent(4000, seed=2)
    spoilt = rows.clone()
    spoilt[::1000] = rows.mean(0) + 1e4 * rows.std(0) * torch.tensor([1.0, -1.0, 1.0])
    clean = flow.log_prob(test).mean()
    assert fitted(spoilt).log_prob(test).mean() > clean - 0.05


def gaussian_score(rows: Tensor, test: Tensor) -> float:
    rows, test = rows.double(), test.double()
    return float(torch.distributions.MultivariateNormal(rows.mean(0), rows.T.cov()).log_prob(test).mean())


def test_a_short_wide_table_is_no_worse_than_its_gaussian() -> None:
    mix = torch.randn(80, 80, generator=torch.Generator().manual_seed(3)) / 9 + torch.eye(80)
    rows, test = (torch.randn(n, 80, generator=torch.Generator().manual_seed(n)) @ mix for n in (2000, 5000))
    torch.manual_seed(0)
    flow = NormalizingFlow(real_nvp(80, num_layers=2), 80)
    result = fit_density(flow, rows, num_steps=60, seed=0, progress=False)
    assert result.chosen == "start" and "before the first step" in str(result)
    assert flow.log_prob(test).mean() > gaussian_score(rows, test) - 0.02


def test_a_short_real_table_is_better_than_its_gaussian() -> None:
    if not DATA.exists():
        pytest.skip("needs ../shared/data/density")
    tables = runpy.run_path(str(DATA))["load"]("optdigits")
    rows, test = torch.as_tensor(tables["train"][:2000]), torch.as_tensor(tables["test"])
    torch.manual_seed(0)
    flow = NormalizingFlow(real_nvp(64, num_layers=2), 64)
    fit_density(flow, rows, num_steps=40, seed=0, progress=False)
    assert flow.log_prob(test).mean() > gaussian_score(rows, test) + 1.0


COLUMNS = {
    "skewed": lambda x: x.exp(),
    "heavy tails": lambda x: torch.sinh(2 * x),
    "two values, dequantised": lambda x: (x > 1).double() + 0.01 * torch.sigmoid(x),
    "many ties": lambda x: x.clamp(min=0.0) + 1e-9 * x,
}


@pytest.mark.parametrize("make", COLUMNS.values(), ids=COLUMNS)
def test_a_curve_makes_a_column_about_normal_and_is_monotone(make: Any) -> None:
    rows = make(torch.randn(4000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    layer = Curves((1,)).double()
    layer.fit(rows)
    x, log_det = layer._backward(rows)
    assert abs(float(x.median())) < 0.25 and float(x.abs().max()) < 6
    back, same = layer._forward(x)
    assert torch.allclose(back, rows, atol=1e-9) and torch.allclose(log_det, same, atol=1e-6)
    low, high = rows.aminmax()
    grid = torch.linspace(float(low - 3), float(high + 3), 999, dtype=torch.float64)[:, None].requires_grad_()
    x, log_det = layer._backward(grid)
    slope = torch.autograd.grad(x.sum(), grid)[0].squeeze(-1)
    assert (slope > 0).all() and torch.allclose(-log_det, slope.log(), atol=1e-6)


def test_normal_columns_of_a_short_table_stay_straight() -> None:
    rows = torch.randn(500, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = Curves((20,), straight_tails=True).double()
    layer.fit(rows)
    x = layer._backward(rows)[0]
    straight = ((x - (rows - rows.mean(0)) / rows.std(0)).abs().amax(0) < 1e-2).sum()
    assert straight >= 18


def test_shrinkage_helps_with_few_rows_and_fades_with_many() -> None:
    truth = 0.5 ** (torch.arange(30)[:, None] - torch.arange(30)).abs().double()
    factor = torch.linalg.cholesky(truth)
    draw = lambda n: torch.randn(n, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) @ factor.T  # noqa: E731

    def distance(covariance: Tensor) -> float:
        return float(
            torch.linalg.solve(covariance, truth).trace() - 30 + torch.logdet(covariance) - torch.logdet(truth)
        )

    few, many = draw(60), draw(20_000)
    assert distance(shrunk_covariance(few)) < 0.7 * distance(few.T.cov())
    assert torch.allclose(shrunk_covariance(many), many.T.cov(), atol=0.01)


def test_a_column_that_one_half_of_the_rows_does_not_know_leaves_the_shrinkage_of_the_others_alone() -> None:
    rows = torch.randn(60, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    rare = torch.zeros(60, 1, dtype=torch.float64)
    rare[7] = 1.0
    found, others = shrunk_covariance(torch.cat([rows, rare], -1)), shrunk_covariance(rows)
    torch.testing.assert_close(found[:-1, :-1], others)
    assert found.diagonal().min() > 0 and (others / rows.T.cov())[0, 1] < 0.999  # there is something to shrink


@pytest.mark.parametrize("code", [99_999_999.0, 999_999_999.0])
@torch.no_grad()
def test_counts_with_a_code_for_missing_ones_have_a_density(code: float) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.poisson(torch.full((2000,), 3.0), generator=generator)
    counts[::100] = code
    rows = torch.stack([counts, torch.randn(2000, generator=generator)], -1)
    flow = NormalizingFlow(real_nvp(2, num_layers=2, hidden_dims=(8,)), 2)
    flow.fit_units(rows)
    for points in (rows, rows - torch.tensor([20.0, 0.0]), flow.sample((2000,))):
        assert flow.log_prob(points).isfinite().all()
