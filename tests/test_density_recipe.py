"""What keeps a density from overfitting: dropout and weight decay, and where neither reaches."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyro_affine import MLP, NormalizingFlow, ResidualMLP, fit_density, glow, load, real_nvp, save
from pyro_affine.correlations import shrunk_covariance
from pyro_affine.curves import Curves
from pyro_affine.weight_decay import decay_groups, raise_decay, rising_decays

NETWORKS: dict[str, Callable[..., nn.Module]] = {"MLP": MLP, "ResidualMLP": ResidualMLP}
FLOWS = {"MLP": {"hidden_dims": (16, 16)}, "residual": {"hidden_dim": 16}}


def flow_of(dropout: float, **options: object) -> NormalizingFlow:
    """A small flow of three columns that is not the identity."""
    torch.manual_seed(0)
    flow = NormalizingFlow(real_nvp(3, num_layers=4, dropout=dropout, **options), 3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flow.transform.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return flow


def rows(num: int = 300) -> Tensor:
    return torch.randn(num, 3, generator=torch.Generator().manual_seed(0)).cumsum(-1)


# ---- dropout


@pytest.mark.parametrize("options", FLOWS.values(), ids=FLOWS)
def test_dropout_draws_in_training_mode_only(options: dict[str, object]) -> None:
    flow, data = flow_of(0.5, **options), rows(20)
    assert not torch.equal(flow.log_prob(data), flow.log_prob(data))
    flow.eval()
    assert torch.equal(flow.log_prob(data), flow.log_prob(data))
    torch.manual_seed(3)
    y, log_prob = flow.rsample_and_log_prob((20,))
    torch.testing.assert_close(flow.log_prob(y), log_prob, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", FLOWS.values(), ids=FLOWS)
def test_weights_go_between_flows_with_and_without_dropout(options: dict[str, object]) -> None:
    dropped, plain = flow_of(0.5, **options), NormalizingFlow(real_nvp(3, num_layers=4, **options), 3)
    plain.load_state_dict(dropped.state_dict())
    torch.testing.assert_close(plain.log_prob(rows()), dropped.eval().log_prob(rows()))


@pytest.mark.parametrize("options", FLOWS.values(), ids=FLOWS)
def test_dropout_is_right_on_average_in_the_first_order(options: dict[str, object]) -> None:
    """What is left is scaled up by 1 / (1 - p): a network linear in what is dropped keeps its mean."""
    torch.manual_seed(0)
    conditioner = NETWORKS["MLP"](2, 1, (64,), dropout=0.5, shift_only=True)
    nn.init.normal_(conditioner.network.layers[-1].weight, std=0.1)
    kept = torch.ones(20_000, 2)
    mean = conditioner(kept)[0].mean()
    assert abs(mean - conditioner.eval()(kept[:1])[0]) < 0.02


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_dropout_is_a_share(make: Callable[..., nn.Module], dropout: float) -> None:
    with pytest.raises(ValueError, match=r"dropout must be a share in \[0, 1\)"):
        make(2, 1, dropout=dropout)


def test_a_fit_scores_and_leaves_a_flow_with_dropout_without_it() -> None:
    flow = flow_of(0.5)
    result = fit_density(flow, rows(), num_steps=20, seed=0, progress=False)
    assert not flow.training
    again = fit_density(flow, rows(), num_steps=20, seed=0, progress=False)
    assert again.num_steps == result.num_steps == 20
    assert torch.equal(flow.log_prob(rows()), flow.log_prob(rows()))


def test_a_flow_with_dropout_is_saved(tmp_path: Path) -> None:
    flow = flow_of(0.5).eval()
    save(tmp_path / "flow.pt", flow)
    loaded = load(tmp_path / "flow.pt").eval()
    assert torch.equal(loaded.log_prob(rows()), flow.log_prob(rows()))
    loaded.train()
    assert not torch.equal(loaded.log_prob(rows()), loaded.log_prob(rows()))


# ---- weight decay


def test_only_weights_of_networks_decay() -> None:
    flow = NormalizingFlow(real_nvp(4, num_layers=2), 4)
    parameters = dict(flow.named_parameters())
    decayed, others = (group["params"] for group in decay_groups(flow, parameters, 0.3))
    names = {id(p): name for name, p in parameters.items()}
    assert all(".conditioner." in names[id(p)] and p.dim() == 2 for p in decayed)
    assert len(decayed) == 2 * 4 and len(decayed) + len(others) == len(parameters)
    assert {"raw_df", "chain.parts.2.log_heights"} <= {names[id(p)] for p in others}


def test_filters_of_convolutions_decay() -> None:
    flow = glow((1, 4, 4), 1, 1, hidden_channels=4)
    decayed, _ = (group["params"] for group in decay_groups(flow, dict(flow.named_parameters()), 0.3))
    assert {p.dim() for p in decayed} == {4}


def test_zero_is_no_decay_and_below_zero_is_refused() -> None:
    flow, data = NormalizingFlow(real_nvp(3, num_layers=2), 3), rows()
    with pytest.raises(ValueError, match="weight_decay must be 0 or more"):
        fit_density(flow, data, weight_decay=-1.0, num_steps=1, progress=False)
    with pytest.raises(ValueError, match=r"got 0\.1 for a flow with 0 of them"):
        fit_density(NormalizingFlow(real_nvp(1), 1), data[:, :1], weight_decay=0.1, num_steps=1, progress=False)
    fit_density(NormalizingFlow(real_nvp(1), 1), data[:, :1], num_steps=1, progress=False)


def test_decay_draws_weights_to_zero() -> None:
    sizes = []
    for weight_decay in (0.0, 20.0):
        flow = flow_of(0.0)
        fit_density(flow, rows(), weight_decay=weight_decay, num_steps=100, seed=0, progress=False)
        weight = flow.transform.parts[0].conditioner.conditioner.network.from_kept.weight
        sizes.append(float(weight.detach().abs().mean()))
    assert sizes[1] < 0.5 * sizes[0]


def test_decay_rises_at_each_plateau_and_comes_back_with_the_optimizer() -> None:
    weights = [nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.0}], lr=0.01)
    decays = rising_decays(optimizer, 0.01, 10)
    found = []
    while raise_decay(optimizer, decays):
        found.append(optimizer.param_groups[0]["weight_decay"])
    assert found == decays == sorted(decays) and len(decays) > 0
    again = torch.optim.AdamW([{"params": weights, "weight_decay": 0.0}], lr=0.01)
    again.load_state_dict(optimizer.state_dict())
    assert not raise_decay(again, decays)


@pytest.mark.parametrize(
    ("options", "rises"),
    [
        ({}, True),
        ({"weight_decay": 0.0}, False),
        ({"weight_decay": 0.1}, False),
        ({"optimizer": torch.optim.Adam}, False),
    ],
    ids=["default", "none", "given", "another optimizer"],
)
def test_only_the_default_decay_rises(options: dict[str, object], rises: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short table of noise is overfitted at once."""
    found: list[bool] = []

    def watched(*arguments: object) -> bool:
        found.append(raise_decay(*arguments))
        return found[-1]

    monkeypatch.setattr("pyro_affine.density_task.raise_decay", watched)
    flow = NormalizingFlow(real_nvp(3, num_layers=2), 3)
    fit_density(flow, rows(60), patience=2, num_steps=1500, seed=0, progress=False, **options)
    assert (True in found) == rises


# ---- units of wide and long tables


def test_curves_of_many_columns_are_those_of_each_alone() -> None:
    data = rows(200)[:, torch.arange(140) % 3] * torch.arange(1, 141) / 10
    together, alone = Curves((140,)), Curves((1,))
    together.fit(data)
    for column in (0, 63, 64, 139):
        alone.fit(data[:, column : column + 1])
        for one, all_of_them in zip(alone._columns(), together._columns(), strict=True):
            torch.testing.assert_close(one[0], all_of_them[column])


@pytest.mark.parametrize("num_rows", [12, 5000])
def test_covariance_of_blocks_is_that_of_all_rows(num_rows: int) -> None:
    data = rows(num_rows).double() * torch.tensor([1.0, 1e3, 1e-3]) + 1e4
    found, sample = shrunk_covariance(data), data.T.cov()
    torch.testing.assert_close(found.diagonal(), sample.diagonal())
    shares = 1 - (found / sample)[torch.ones(3, 3).tril(-1).bool()]
    assert shares.std() < 1e-6 and (shares > 0).all() and (shares < (0.5 if num_rows == 12 else 0.01)).all()
