from __future__ import annotations

import math

import arviz
import numpy as np
import pytest
import torch

from pyro_affine.pareto import (
    fit_generalized_pareto,
    generalized_pareto_quantile,
    importance_ess,
    khat_threshold,
    pareto_khat,
    pareto_smooth,
)

TAILS = {
    "bounded (uniform)": lambda rng, n: np.log(rng.uniform(size=n)),
    "light (normal)": lambda rng, n: rng.normal(size=n) * 0.1,
    "log-normal, sd 1": lambda rng, n: rng.normal(size=n),
    "log-normal, sd 5": lambda rng, n: rng.normal(size=n) * 5 - 3000,
    "Pareto, k = 0.4": lambda rng, n: 0.4 * rng.exponential(size=n),
    "Pareto, k = 0.9": lambda rng, n: 0.9 * rng.exponential(size=n),
    "Pareto, k = 2": lambda rng, n: 2.0 * rng.exponential(size=n) + 40,
    "Cauchy log-weights": lambda rng, n: rng.standard_cauchy(size=n) * 20,
    "a tenth of zeros": lambda rng, n: np.where(rng.uniform(size=n) < 0.1, -np.inf, rng.normal(size=n)),
    "with ties": lambda rng, n: np.round(rng.normal(size=n), 1),
}


@pytest.mark.skipif(not hasattr(arviz, "psislw"), reason="ArviZ 1 rounds the size of the tail down, the paper up")
@pytest.mark.parametrize("relative_efficiency", [1.0, 0.5])
@pytest.mark.parametrize("make", TAILS.values(), ids=TAILS)
def test_smoothing_agrees_with_arviz(make, relative_efficiency):
    for seed, size in enumerate([30, 101, 500, 1000, 4000] * 4):
        raw = make(np.random.default_rng(seed), size)
        expected, expected_khat = arviz.psislw(raw, reff=relative_efficiency)
        actual, khat = pareto_smooth(torch.from_numpy(raw), relative_efficiency=relative_efficiency)
        actual = actual - actual.logsumexp(0)
        if math.isfinite(expected_khat):
            assert khat == pytest.approx(float(expected_khat), abs=1e-6)
        else:
            assert khat == math.inf
        # equal raw weights may take each other's place in the tail: sort within them
        actual = actual[np.lexsort((actual, raw))].numpy()
        expected = expected[np.lexsort((expected, raw))]
        np.testing.assert_allclose(np.exp(actual), np.exp(expected), rtol=1e-6, atol=1e-12)
        positive = expected > -600  # below, the weight is 0 in float64
        np.testing.assert_allclose(actual[positive], expected[positive], rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [-0.5, 0.0, 0.3, 0.7, 1.5])
def test_fit_recovers_shape_and_scale(k):
    probs = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exceedances = generalized_pareto_quantile(probs, k, 3.0).sort().values
    fitted_k, fitted_scale = fit_generalized_pareto(exceedances)
    assert fitted_k == pytest.approx(k, abs=0.04)
    assert fitted_scale == pytest.approx(3.0, rel=0.04)


def test_quantile_inverts_the_distribution_function():
    probs = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    for k in (-0.4, 1e-9, 0.8):
        x = generalized_pareto_quantile(probs, k, 2.0)
        torch.testing.assert_close(1 - (1 + k * x / 2.0) ** (-1 / k), probs, rtol=0, atol=1e-6)


def test_smoothing_keeps_order_and_never_exceeds_the_largest_raw_weight():
    raw = 1.2 * torch.distributions.Exponential(torch.tensor(1.0, dtype=torch.float64)).sample((2000,))
    smoothed, _ = pareto_smooth(raw)
    order = raw.argsort()
    assert (smoothed[order].diff() >= 0).all()
    assert smoothed.max() <= raw.max()
    torch.testing.assert_close(smoothed[order[:1800]], raw[order[:1800]])  # the body stays
    assert not torch.equal(smoothed, raw)


def test_float32_weights_are_handled_in_float64_and_left_as_they_were():
    raw = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 2 + 1000
    copy = raw.clone()
    smoothed, khat = pareto_smooth(raw)
    assert smoothed.dtype == torch.float64
    assert torch.equal(raw, copy)
    expected, expected_khat = pareto_smooth(raw.double() - 1000)
    torch.testing.assert_close(smoothed - 1000, expected)
    assert khat == pytest.approx(expected_khat)


DEGENERATE = {
    "all equal": torch.zeros(200, dtype=torch.float64),
    "all zero": torch.full((200,), -math.inf, dtype=torch.float64),
    "four draws above the rest": torch.cat([torch.arange(4.0), torch.full((196,), -5.0)]).double(),
    "two draws": torch.tensor([0.0, 1.0], dtype=torch.float64),
}


@pytest.mark.parametrize("raw", DEGENERATE.values(), ids=DEGENERATE)
def test_without_a_tail_khat_is_inf_and_weights_stay(raw):
    smoothed, khat = pareto_smooth(raw)
    assert khat == pareto_khat(raw) == math.inf
    assert torch.equal(smoothed, raw)


def test_khat_alone_equals_khat_of_smoothing():
    raw = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2
    assert pareto_khat(raw) == pareto_smooth(raw)[1]
    assert pareto_khat(raw + 500) == pytest.approx(pareto_khat(raw))


@pytest.mark.parametrize(("num_draws", "expected"), [(100, 0.5), (320, 0.6), (1000, 2 / 3), (2200, 0.7), (10**6, 0.7)])
def test_threshold(num_draws, expected):
    assert khat_threshold(num_draws) == pytest.approx(expected, abs=2e-3)


def test_ess_counts_equal_weights():
    assert importance_ess(torch.full((40,), -1e4)) == pytest.approx(40.0)
    assert importance_ess(torch.tensor([0.0, -math.inf, -math.inf])) == 1.0
    assert importance_ess(torch.full((4,), -math.inf)) == 0.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pareto_smooth(torch.zeros(2, 3)), "vector"),
        (lambda: pareto_smooth(torch.zeros(0)), "vector"),
        (lambda: pareto_smooth(torch.tensor([0.0, math.nan])), "1 such values; drop"),
        (lambda: pareto_khat(torch.tensor([0.0, math.inf])), "must not be NaN"),
        (lambda: khat_threshold(10), "draw more"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
