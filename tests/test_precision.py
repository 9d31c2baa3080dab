"""Autocast rounds the networks of a flow and nothing else: maps stay inverse to each other, and fits go on."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from cases import CASES, assert_close, each, randomised, x_points

from pyro_affine import AutoRealNVP, NormalizingFlow, fit_density, fit_guide, real_nvp
from pyro_affine.correlations import Correlations
from pyro_affine.low_rank import LowRankAffine
from pyro_affine.whitening import Whitening


def stored(layer):
    layer.double().set(torch.ones(4), torch.tensor([[1.0, 0, 0, 0], [2, 3, 0, 0], [4, 5, 6, 0], [1, 1, 1, 1]]))
    return layer


def fitted():
    layer = Correlations(4)
    layer.fit(torch.randn(100, 4) @ torch.randn(4, 4))
    return layer


STORED = {
    "whitening": lambda: stored(Whitening(4)),
    "correlations": fitted,
    "low rank": lambda: LowRankAffine(torch.zeros(5)),
}


def rounded():
    return torch.autocast("cpu", torch.bfloat16)


@each({**CASES, **STORED}, leave_out=("condition", "Pyro's", "torch's"))
def test_maps_stay_inverse_to_each_other(make):
    transform = make() if make in STORED.values() else randomised(make())
    x = x_points(transform, (7,)).float()
    transform = transform.float()
    with rounded(), torch.no_grad():
        y, log_det = transform._forward(x)
        back, log_det_back = transform._backward(y)
    assert {t.dtype for t in (y, log_det, back, log_det_back)} == {torch.float32}
    assert_close(back, x, 1e-3)
    assert_close(log_det_back, log_det, 1e-3)


def test_a_density_is_fitted_as_without():
    data = torch.randn(300, 2)
    data[:, 1] += data[:, 0] ** 2
    bests = []
    for enabled in (True, False):
        torch.manual_seed(0)
        flow = NormalizingFlow(real_nvp(2, num_layers=2, hidden_dims=(16,)), 2, curves=0, whiten=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            start = flow.log_prob(data).mean()  # leaves its casts of the weights behind
            bests.append(fit_density(flow, data, num_steps=80, learning_rate=0.01, seed=0, progress=False).best)
            assert flow.log_prob(data).mean() > start + 0.2
    assert abs(bests[0] - bests[1]) < 0.04


def test_a_guide_is_fitted_as_without():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z[..., 0] + z[..., 1] ** 2, 0.3), obs=torch.tensor(1.0))

    bests = []
    for enabled in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoRealNVP(model, num_layers=2, hidden_dims=(16,))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            bests.append(fit_guide(model, guide, num_steps=60, seed=0, progress=False).best)
    assert abs(bests[0] - bests[1]) < 0.04
