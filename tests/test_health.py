"""The check-up of a flow: does it measure what it says, blame the right layer, and leave everything alone?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as foreign
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor, nn
from torch.distributions import transforms as plain

from pyro_affine.compose import ComposeFlow
from pyro_affine.conditional_guide import AutoConditionalRealNVP
from pyro_affine.coupling import AffineCoupling
from pyro_affine.flows import NormalizingFlow, conditional_real_nvp, real_nvp
from pyro_affine.guides import AutoRealNVP
from pyro_affine.health import health
from pyro_affine.linear import LowerTriangularAffine, Permutation, Standardization
from pyro_affine.masks import checkerboard_mask, half_mask
from pyro_affine.scales import AdditiveScale, ExpScale, ScaleMap, TanhScale
from pyro_affine.transform import FlowTransform


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def shaken(module: Any, size: float = 0.2, seed: int = 0) -> Any:
    """The module with its parameters moved away from the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return module


def coupling(raw: list[float], scale: ScaleMap | None = None) -> AffineCoupling:
    """A coupling of six entries whose three raw log-scales are constants."""
    constants = torch.tensor(raw)
    return AffineCoupling(half_mask(6), lambda kept: (kept, constants.to(kept).expand_as(kept)), scale)


class Cliff(AffineCoupling):
    """A coupling that divides by zero where its first entry is above 1, and on the way back above ``back``."""

    def __init__(self, forward: float = 1.0, backward: float = math.inf) -> None:
        super().__init__(half_mask(2), lambda kept: (kept, 0 * kept))
        self.limits = (forward, backward)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x / (x[..., :1] <= self.limits[0]), x.new_zeros(x.shape[:-1])

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y / (y[..., :1] <= self.limits[1]), y.new_zeros(y.shape[:-1])


def test_layers_are_named_by_their_path() -> None:
    inner = ComposeFlow([coupling([0.0] * 3), Permutation(torch.arange(6))])
    flow = ComposeFlow([inner, plain.AffineTransform(0.0, 2.0), inner.inv])
    assert [layer.name for layer in health(flow).layers] == [
        "parts.0.parts.0 AffineCoupling",
        "parts.0.parts.1 Permutation",
        "parts.1 AffineTransform",
        "parts.2.transform.parts.1 Permutation inverted",
        "parts.2.transform.parts.0 AffineCoupling inverted",
    ]


def tril(loc: Tensor) -> LowerTriangularAffine:
    layer = LowerTriangularAffine(loc, torch.tensor([0.5, 2.0]))
    layer.below.data.fill_(1.0)
    return layer


def standardization() -> Standardization:
    layer = Standardization((2,))
    layer.scale.copy_(torch.tensor([3.0, 4.0]))
    return layer


def affine_of_torch() -> Any:
    return plain.AffineTransform(0.0, torch.tensor([2.0, 8.0]))


def pair(last: Any) -> ComposeFlow:
    return ComposeFlow([Permutation(torch.tensor([1, 0])), last])  # which knows its event shape


SVD = torch.linalg.svdvals(torch.tensor([[0.5, 0.0], [2.0, 2.0]])).tolist()
SCALES: dict[str, tuple[Callable[[], Any], float, float]] = {
    "coupling": (lambda: coupling([-3.0, 0.5, 1.0], ExpScale()), math.exp(-3), math.e),
    "inverted coupling": (lambda: coupling([-3.0, 0.5, 1.0], ExpScale()).inv, math.exp(-1), math.exp(3)),
    "triangular": (lambda: tril(torch.zeros(2)), SVD[1], SVD[0]),
    "standardization": (standardization, 3.0, 4.0),
    "permutation": (lambda: Permutation(torch.tensor([1, 0])), 1.0, 1.0),
    "of torch, elementwise": (lambda: pair(affine_of_torch()), 2.0, 8.0),
    "of torch, geometric mean": (lambda: pair(plain.IndependentTransform(affine_of_torch(), 1)), 4.0, 4.0),
}


@pytest.mark.parametrize(("make", "low", "high"), SCALES.values(), ids=SCALES)
def test_scale_is_the_factor_by_which_entries_stretch(make: Callable[[], Any], low: float, high: float) -> None:
    assert health(make()).layers[-1].scale == pytest.approx((low, high), rel=1e-5)


def test_scale_ranges_over_points_and_entries() -> None:
    flow = shaken(real_nvp(5, num_layers=2, seed=1))
    points = torch.randn(50, 5, generator=torch.Generator().manual_seed(1))
    first: Any = flow.parts[0]
    scales = first._affine(points[:, first.mask])[1].exp()
    assert health(flow, points).layers[0].scale == (scales.min().item(), scales.max().item())


BOUNDS = {
    "one of three": ([9.0, 0.0, 1.0], TanhScale(2.0), 1 / 3),
    "both sides": ([9.0, 0.0, -9.0], TanhScale(2.0), 2 / 3),
    "no bound": ([9.0, 0.0, -9.0], ExpScale(), math.nan),
    "no scale": ([9.0, 0.0, -9.0], AdditiveScale(), math.nan),
}


@pytest.mark.parametrize(("raw", "scale", "share"), BOUNDS.values(), ids=BOUNDS)
def test_share_near_the_bound(raw: list[float], scale: ScaleMap, share: float) -> None:
    assert health(coupling(raw, scale)).layers[0].near_bound == pytest.approx(share, nan_ok=True)


def test_errors_are_those_of_the_round_trips() -> None:
    flow = shaken(real_nvp(6, num_layers=6), 0.1)
    points = 3 * torch.randn(100, 6, generator=torch.Generator().manual_seed(2))
    report = health(flow, points)
    with torch.no_grad():
        errors = []
        for part in (flow, flow.parts[0]):
            back = part._backward(part._forward(points)[0])[0]
            errors.append(float(((back - points).abs() / points.abs().clamp(min=1)).max()))
    assert errors[0] > 0
    # A chain is one pass, the report goes layer by layer: the same up to rounding, of which these errors are made.
    assert report.round_trip == report.layers[0].total_error == pytest.approx(errors[0], rel=0.5)
    assert report.layers[0].own_error == errors[1]


def test_largest_is_the_size_of_what_leaves_a_layer() -> None:
    flow = ComposeFlow([plain.AffineTransform(0.0, 10.0), plain.AffineTransform(0.0, 10.0)])
    report = health(flow, torch.tensor([1.0, -2.0]))
    assert (report.largest, *(layer.largest for layer in report.layers)) == (2.0, 20.0, 200.0)


def test_data_runs_backward_first() -> None:
    flow = NormalizingFlow(shaken(real_nvp(4, num_layers=4)), 4, curves=0, whiten=False)
    data = torch.randn(30, 4, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    flow.standardize(data)
    report, inverse = health(flow, data), health(flow.chain.inv, data)
    assert report.layers[-1].name == "parts.1 Standardization"
    assert report.largest == report.layers[-1].largest == data.abs().max().item()
    assert report.round_trip == inverse.round_trip == report.layers[-1].total_error > 0
    for layer, turned in zip(report.layers, inverse.layers[::-1], strict=True):
        assert turned.name == f"transform.{layer.name} inverted"
        assert layer.scale == pytest.approx((1 / turned.scale[1], 1 / turned.scale[0]), rel=1e-5)
        assert (layer.own_error, layer.total_error) == (turned.own_error, turned.total_error)


POINTS = torch.tensor([[0.0, 0.5], [2.0, 0.1], [0.5, 0.2], [3.0, 0.3], [0.7, 0.4]])
FAULTS: dict[str, tuple[Callable[[], Any], str | None, str | None, list[int]]] = {
    "none": (lambda: [Cliff(math.inf), Cliff(math.inf)], None, None, [0, 0]),
    "towards the data": (lambda: [Cliff(9.0), Cliff(1.0)], "parts.1 Cliff", None, [0, 2]),
    "twice": (lambda: [Cliff(2.5), Cliff(1.0)], "parts.0 Cliff", None, [1, 1]),
    "towards the base": (lambda: [Cliff(9.0, 0.6), Cliff(9.0, 2.5)], None, "parts.1 Cliff", [2, 1]),
    "both ways": (lambda: [Cliff(9.0, 0.6), Cliff(1.0)], "parts.1 Cliff", "parts.0 Cliff", [1, 2]),
    "all": (lambda: [Cliff(-1.0), Cliff()], "parts.0 Cliff", None, [5, 0]),
}


@pytest.mark.parametrize(("parts", "forward", "backward", "lost"), FAULTS.values(), ids=FAULTS)
def test_first_layer_to_go_nonfinite(
    parts: Callable[[], Any], forward: str | None, backward: str | None, lost: list[int]
) -> None:
    report = health(ComposeFlow(parts(), guard=True), POINTS)
    assert report.first_nonfinite_forward == forward
    assert report.first_nonfinite_backward == backward
    assert [layer.lost for layer in report.layers] == lost
    assert report.ok == (not sum(lost))
    blamed = forward or backward
    assert (blamed or "Healthy") in report.verdict and (blamed or "Healthy") in str(report)


class Nest(FlowTransform):
    """A layer that keeps another flow to itself."""

    def __init__(self) -> None:
        super().__init__((2,))
        self.inner = ComposeFlow([Cliff()], guard=True)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner._forward(x)

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner._backward(y)


def test_guards_inside_a_layer_do_not_raise() -> None:
    layer = Nest()
    assert health(layer, POINTS).first_nonfinite_forward == "Nest"
    assert layer.inner.guard


def test_faults_of_data_are_counted_in_their_direction() -> None:
    flow = NormalizingFlow(ComposeFlow([Cliff(9.0, 0.6), Cliff(1.0)]), 2, curves=0, whiten=False)
    report = health(flow, POINTS)
    assert report.first_nonfinite_backward == "parts.0.parts.0 Cliff"
    assert [(layer.lost_forward, layer.lost_backward) for layer in report.layers] == [(0, 3), (0, 0), (0, 0)]


def overflowing() -> Any:
    return ComposeFlow([coupling([60.0, 60.0, 60.0], ExpScale()), coupling([60.0, 0.0, 0.0], ExpScale())])


def broken() -> Any:
    flow = real_nvp(4)
    next(flow.parts[3].parameters()).data[0] = math.nan
    return flow


def singular() -> Any:
    layer = LowerTriangularAffine(torch.zeros(2))
    layer.log_scale.data.fill_(-math.inf)
    return layer


def deep() -> Any:
    return shaken(real_nvp(6, num_layers=8))


STATES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "identity": (lambda: health(real_nvp(4)), ["Healthy: every value is finite"]),
    "overflow": (lambda: health(overflowing()), ["Not finite", "parts.1 AffineCoupling", "smaller bound"]),
    "broken parameter": (lambda: health(broken()), ["Broken", "parts.3 AffineCoupling", "last good weights"]),
    "infinite parameter": (lambda: health(singular()), ["Broken: LowerTriangularAffine"]),
    "inexact": (lambda: health(deep()), ["Inexact", "float32", "float64", "smaller bound"]),
    "exact in float64": (lambda: health(deep().double()), ["Healthy"]),
    "tight": (lambda: health(coupling([9.0, 9.0, 0.0])), ["Healthy but tight", "67%", "add layers"]),
    "bad point": (lambda: health(real_nvp(2), POINTS / POINTS), ["Bad input: 1 of 5 points"]),
    "large data": (
        lambda: health(NormalizingFlow(real_nvp(2), 2), 1e5 * POINTS),
        ["Healthy for now", "as large as 3e+05", "standardize"],
    ),
    "out of a domain": (
        lambda: health(plain.ExpTransform().inv, torch.tensor([1.0, -1.0])),
        ["Not finite: 1 of 2", "ExpTransform", "domain"],
    ),
}


@pytest.mark.parametrize(("check", "words"), STATES.values(), ids=STATES)
def test_verdict_names_the_fault_and_the_remedy(check: Callable[[], Any], words: list[str]) -> None:
    report = check()
    assert [word for word in words if word not in report.verdict] == []
    assert report.ok == report.verdict.startswith("Healthy")
    assert str(report).endswith(report.verdict)


def test_table_leaves_out_layers_that_nothing_reached() -> None:
    report = health(ComposeFlow([Cliff(-1.0), Cliff(), Cliff()]), POINTS)
    assert "2 more layers that no finite event reached" in str(report)
    assert str(report).count("Cliff") == 2  # the first layer's row, and the verdict


def vector(size: int) -> list[Any]:
    return [shaken(real_nvp(size, num_layers=2), 0.05)]


OTHERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "scalar events": (lambda: plain.AffineTransform(1.0, 2.0), (5,)),
    "one entry": (lambda: real_nvp(1), (5, 1)),
    "image": (lambda: shaken(real_nvp((2, 4, 4), num_layers=2, hidden_dims=(64, 64)), 0.05), (5, 2, 4, 4)),
    "image, one mask": (
        lambda: AffineCoupling(checkerboard_mask(4, 4), lambda kept: (0 * kept, 0 * kept), event_shape=(2, 4, 4)),
        (5, 2, 4, 4),
    ),
    "batch of batches": (lambda: ComposeFlow(vector(3)), (2, 5, 3)),
    "conditioned": (lambda: shaken(conditional_real_nvp(3, 2), 0.05).condition(torch.ones(7, 2)), (4, 7, 3)),
    "conditioned, one point for all": (lambda: conditional_real_nvp(3, 2).condition(torch.ones(7, 2)), (3,)),
    "elementwise after rank 2": (lambda: ComposeFlow([*vector(4), plain.TanhTransform()]), (5, 4)),
    "rank 1 in a batch": (lambda: plain.IndependentTransform(ComposeFlow(vector(3)), 1), (5, 2, 3)),
    "grows a dimension": (lambda: ComposeFlow([*vector(3), plain.StickBreakingTransform()]), (5, 3)),
    "reshape": (lambda: ComposeFlow([*vector(4), plain.ReshapeTransform((4,), (2, 2))]), (5, 4)),
    "pyro's": (lambda: ComposeFlow([foreign.Permute(torch.tensor([1, 0])), foreign.Spline(2)]), (5, 2)),
    "pyro's, inverted": (lambda: ComposeFlow([foreign.affine_autoregressive(3, [8]).inv]), (5, 3)),
}


@pytest.mark.parametrize(("make", "shape"), OTHERS.values(), ids=OTHERS)
def test_any_transform_can_be_checked(make: Callable[[], Any], shape: tuple[int, ...]) -> None:
    flow = make()
    points = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    report = health(flow, points)
    assert report.ok, str(report)
    with torch.no_grad():
        assert report.layers[-1].largest == pytest.approx(flow(points).abs().max().item(), rel=1e-6)
    points.view(-1)[0] = math.inf  # the other events go on; seven contexts share the one point
    assert health(flow, points).num_bad_events in (1, 7)


def two_sites() -> None:
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))


@pytest.mark.parametrize("make", [AutoRealNVP, AutoMultivariateNormal])
def test_guides_can_be_checked(make: Callable[..., Any]) -> None:
    guide = make(two_sites)
    guide()
    report = health(guide)
    assert report.ok and report.num_events == 1000


def test_conditional_flow_takes_a_context() -> None:
    flow = NormalizingFlow(shaken(conditional_real_nvp(3, 2), 0.05), 3)
    context = torch.randn(7, 2, generator=torch.Generator().manual_seed(5))
    assert health(flow, context=context).num_events == 7000
    assert health(flow, torch.zeros(4, 7, 3), context=context).num_events == 28
    same = health(flow.chain.condition(context).inv, torch.zeros(4, 7, 3))
    assert same.round_trip == health(flow, torch.zeros(4, 7, 3), context=context).round_trip


def test_nothing_is_changed() -> None:
    flow = ComposeFlow([shaken(real_nvp(4, guard=True)), foreign.BatchNorm(4)], guard=True)
    x = torch.randn(3, 4)
    y = flow(x)
    before = copy.deepcopy(flow.state_dict())
    random_state = torch.get_rng_state()
    health(flow)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert flow._recall(y, is_forward=True) is not None
    assert all(module.training for module in flow.modules()) and flow.guard and flow.parts[0].guard
    after = flow.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in flow.parameters())


def test_default_points_are_the_same_each_time() -> None:
    flow = shaken(real_nvp(4))
    assert str(health(flow)) == str(health(flow))


def conditional_guide() -> AutoConditionalRealNVP:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=y)

    guide = AutoConditionalRealNVP(model, lambda y: y, num_layers=2, hidden_dims=(8,))
    guide(torch.zeros(2))
    return guide


def test_conditional_guide_is_checked_at_some_data() -> None:
    assert health(conditional_guide().get_transform(torch.ones(2))).ok


MISUSE: dict[str, tuple[Callable[[], Any], str]] = {
    "guide that reads data": (lambda: health(conditional_guide()), r"guide\.get_transform\(data\)"),
    "no transform": (lambda: health(nn.Linear(2, 2)), "bijective"),
    "not conditioned": (lambda: health(conditional_real_nvp(3, 2)), r"condition\(context\)"),
    "flow without its context": (
        lambda: health(NormalizingFlow(conditional_real_nvp(3, 2), 3)),
        "needs a context",
    ),
    "wrong shape": (lambda: health(real_nvp(3), torch.zeros(5, 4)), "events of shape"),
    "wrong dtype": (lambda: health(real_nvp(3), torch.zeros(5, 3).double()), "dtype"),
    "integers": (lambda: health(real_nvp(3), torch.zeros(5, 3, dtype=torch.long)), "floating point"),
    "no points": (lambda: health(real_nvp(3), torch.zeros(0, 3)), "a point at least"),
    "unknown event": (lambda: health(plain.ExpTransform()), "pass points"),
}


@pytest.mark.parametrize(("misuse", "words"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_told_in_words(misuse: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        misuse()
