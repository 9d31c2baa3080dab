"""Path gradients: equal to the explicit inverse form, of the right mean, zero at the optimum, under Pyro's ELBOs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.transforms import Spline
from pyro.infer import (
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    config_enumerate,
)
from torch import Tensor, nn
from torch.distributions import AffineTransform, ExpTransform, SigmoidTransform

from pyro_affine import gradients
from pyro_affine.bounded_input import BoundedInput
from pyro_affine.compose import ComposeFlow
from pyro_affine.conditioners import MLP, ResidualMLP
from pyro_affine.coupling import AffineCoupling
from pyro_affine.flows import real_nvp
from pyro_affine.fused import Run, step_of
from pyro_affine.gradients import PathGradientDistribution, draw_with_score, push_score
from pyro_affine.guides import AutoRealNVP
from pyro_affine.linear import LowerTriangularAffine, Permutation, Standardization
from pyro_affine.low_rank import LowRankAffine
from pyro_affine.masks import checkerboard_mask, half_mask
from pyro_affine.scales import AdditiveScale, AtanScale, ExpScale, SigmoidScale, SoftplusScale, TanhScale
from pyro_affine.tails import LOFT
from pyro_affine.whitening import Whitening


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


def jitter(module: nn.Module, sd: float = 0.3) -> Any:
    """The module with all its parameters off their start, and whitening that does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += sd * torch.randn(parameter.shape, generator=generator)
        for part in module.modules():
            if isinstance(part, Whitening):
                size = len(part.loc)
                part.set(torch.ones(size), torch.tensor(2.0).expand(size, size).tril())
    return module


def network(num_kept: int, num_moved: int, **options: Any) -> MLP:
    return MLP(num_kept, num_moved, (7, 5), **options)


def coupling(scale: Any = None, **options: Any) -> AffineCoupling:
    return AffineCoupling(half_mask(4), network(2, 2, **options), scale)


def image_coupling() -> AffineCoupling:
    mask = checkerboard_mask(2, 2)
    return AffineCoupling(mask, network(2, 2), event_shape=(2, 2))


def normal(*shape: int) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(shape), 1.5).to_event(len(shape))


def student() -> dist.TorchDistribution:
    return dist.StudentT(torch.tensor([3.0, 5.0, 8.0, 30.0], requires_grad=True), torch.zeros(4), 1.0).to_event(1)


def guide_like() -> ComposeFlow:
    flow = ComposeFlow([real_nvp(4, num_layers=4, hidden_dims=(6,)), LOFT((4,), 1.0)])
    return ComposeFlow([flow, LowerTriangularAffine(torch.zeros(4)), Whitening(4)])


CHAINS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "guide": (guide_like, lambda: normal(4)),
    "guide, Student base": (guide_like, student),
    "coupling": (coupling, lambda: normal(4)),
    **{
        f"coupling, {activation.__name__}": (lambda make=activation: coupling(activation=make), lambda: normal(4))
        for activation in (nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.Softplus)
    },
    **{
        f"coupling, {scale!r}": (lambda scale=scale: coupling(scale), lambda: normal(4))
        for scale in (ExpScale(), TanhScale(), AtanScale(0.5, 0.1), SigmoidScale(), SoftplusScale())
    },
    "coupling, additive": (lambda: coupling(AdditiveScale(), shift_only=True), lambda: normal(4)),
    "coupling, two networks": (lambda: coupling(separate=True), lambda: normal(4)),
    "coupling, residual": (lambda: AffineCoupling(half_mask(4), ResidualMLP(2, 2, 6)), lambda: normal(4)),
    "coupling, bounded inputs": (
        lambda: AffineCoupling(half_mask(4), BoundedInput(ResidualMLP(2, 2, 6), 1.0)), lambda: normal(4),
    ),
    "residual flow, bounded inputs": (
        lambda: real_nvp(4, num_layers=4, hidden_dim=6, input_bound=1.0), lambda: normal(4),
    ),
    "coupling, softmax inside": (lambda: coupling(activation=lambda: nn.Softmax(-1)), lambda: normal(4)),
    "coupling, inverted": (lambda: coupling().inv, lambda: normal(4)),
    "images": (lambda: ComposeFlow([image_coupling(), LOFT((2, 2), 1.0)]), lambda: normal(2, 2)),
    "triangular": (lambda: LowerTriangularAffine(torch.ones(4), 2.0), lambda: normal(4)),
    "low rank": (lambda: LowRankAffine(torch.ones(4), 2.0, rank=2), lambda: normal(4)),
    "units": (lambda: ComposeFlow([coupling(), Standardization((4,)), Permutation(torch.tensor([3, 1, 0, 2]))]),
              lambda: normal(4)),
    "one entry": (lambda: ComposeFlow([real_nvp(1), LOFT((1,), 1.0)]), lambda: normal(1)),
    "foreign parts": (
        lambda: ComposeFlow([coupling(), AffineTransform(1.0, -2.0), coupling(), SigmoidTransform(), ExpTransform()]),
        lambda: normal(4),
    ),
    "foreign part with parameters": (lambda: ComposeFlow([Spline(4, bound=5.0), coupling()]), lambda: normal(4)),
}  # fmt: skip


def parameters_of(q: dist.TransformedDistribution) -> list[Tensor]:
    base = q.base_dist.base_dist
    return [*q.transforms[0].parameters(), *([base.df] if isinstance(base, dist.StudentT) else [])]


def path_gradient(q: PathGradientDistribution, z: Tensor, weights: Tensor) -> list[Tensor]:
    """By the definition: the gradient of log q(z) through z alone."""
    frozen = copy.deepcopy(q.transforms[0]).requires_grad_(False)
    log_q = dist.TransformedDistribution(gradients._frozen(q.base_dist), [frozen]).log_prob(z)
    return gradient((log_q * weights).sum(), parameters_of(q))


def anew(q: dist.TransformedDistribution) -> dist.TransformedDistribution:
    """The same density without a memory of draws."""
    return dist.TransformedDistribution(q.base_dist, [copy.deepcopy(q.transforms[0])])


def gradient(value: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True, retain_graph=True))


def assert_same(actual: list[Tensor], expected: list[Tensor], relative: float = 1e-10) -> None:
    scale = max(float(value.abs().max()) for value in expected)
    assert scale > 1e-3, "nothing to compare"
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= relative * scale


@pytest.mark.parametrize(("make", "base"), CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("batch_shape", [(), (6,), (3, 1, 2)], ids=str)
def test_equals_the_explicit_inverse_form(make: Any, base: Any, batch_shape: tuple[int, ...]) -> None:
    q = PathGradientDistribution(base(), [jitter(make())])
    z = q.rsample(batch_shape)
    parts = q.score_parts(z)
    weights = torch.randn(batch_shape)
    assert torch.allclose(parts.entropy_term, parts.log_prob, rtol=0, atol=1e-12) and parts.score_function == 0
    assert torch.allclose(parts.log_prob, anew(q).log_prob(z), rtol=1e-10, atol=1e-10)
    assert_same(gradient((parts.entropy_term * weights).sum(), parameters_of(q)), path_gradient(q, z, weights))


@pytest.mark.parametrize(("make", "base"), CHAINS.values(), ids=CHAINS)
def test_the_reported_log_prob_has_the_total_gradient(make: Any, base: Any) -> None:
    q = PathGradientDistribution(base(), [jitter(make())])
    z = q.rsample((5,))
    x = q._draw.x
    value, log_det = q.transforms[0]._forward(x)
    weights = torch.randn(5)
    assert_same(
        gradient((q.score_parts(z).log_prob * weights).sum() + z.sum(), parameters_of(q)),
        gradient(((q.base_dist.log_prob(x) - log_det) * weights).sum() + value.sum(), parameters_of(q)),
    )


FUSED = [name for name in CHAINS if step_of(CHAINS[name][0]()) is not None]


def test_the_fast_pass_takes_what_it_should() -> None:
    activations = {"Tanh", "ReLU", "ELU", "GELU", "Softplus"}
    scales = {"ExpScale()", "TanhScale(bound=2.0)", "AtanScale(lower=0.5, upper=0.1)", "SoftplusScale()"}
    scales.add("SigmoidScale(min_scale=0.001, max_scale=10.0)")
    residual = {"coupling, residual", "coupling, bounded inputs"}
    assert set(FUSED) == {"coupling", "triangular", *residual, *(f"coupling, {name}" for name in activations | scales)}
    for layer in (Permutation(torch.arange(4)), LOFT((4,)), Whitening(4)):
        assert step_of(layer) is not None


@pytest.mark.parametrize("name", FUSED)
def test_the_fast_pass_equals_the_layer(name: str) -> None:
    layer = jitter(CHAINS[name][0]())
    x, score = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    y, log_det, _ = Run([step_of(layer)], layer.event_shape).push(x, score)
    y_layer, log_det_layer = layer._forward(x)
    assert torch.allclose(y, y_layer, atol=1e-14) and torch.allclose(log_det, log_det_layer, atol=1e-14)
    for pair in ((y.sin().sum(), y_layer.sin().sum()), ((log_det**3).sum(), (log_det_layer**3).sum())):
        assert_same(*(gradient(value, [x, *layer.parameters()]) for value in pair), relative=1e-12)


def test_a_hooked_or_guarded_layer_runs_as_it_is() -> None:
    layer = coupling()
    calls = []
    layer.conditioner.network.layers[1].register_forward_hook(lambda *_: calls.append(1))
    push_score(ComposeFlow([layer]), torch.randn(3, 4), torch.randn(3, 4))
    assert calls == [1] and step_of(layer) is None
    guarded = AffineCoupling(half_mask(4), network(2, 2), guard=True)
    assert step_of(guarded) is None


def test_autocast_is_left_to_the_layer() -> None:
    layer, x = coupling().float(), torch.randn(3, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, log_det, score = push_score(layer, x, -x)
    (y.sum() + log_det.sum()).backward()
    assert torch.allclose(score, -x)  # a coupling that is not trained yet
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_parameters_changed_between_draw_and_backward_are_refused() -> None:
    layer = coupling()
    y, _, _ = Run([step_of(layer)], layer.event_shape).push(torch.randn(3, 4), torch.randn(3, 4))
    with torch.no_grad():
        layer.conditioner.network.from_kept.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_graph_outlives_a_draw() -> None:
    """A pass that kept its own result would hold the memory of every step until the garbage collector runs."""
    q = PathGradientDistribution(normal(4), [guide_like()])
    gc.collect()
    gc.disable()
    try:
        z = q.rsample((3,))
        assert num_steps_alive() > 0
        q._draw = None
        del z
        assert num_steps_alive() == 0
    finally:
        gc.enable()


def num_steps_alive() -> int:
    functions = (thing for thing in gc.get_objects() if isinstance(thing, FunctionType))
    return sum(function.__name__ == "pull_network" for function in functions)


def test_the_mean_over_draws_is_that_of_the_total_gradient() -> None:
    q = PathGradientDistribution(student(), [jitter(guide_like(), 0.2)])
    differences = []
    for _ in range(200):
        z = q.rsample((64,))
        target = (-0.5 * (z - 1).square() - 0.1 * z**4 / (1 + z**2)).sum()
        parts = q.score_parts(z)
        pair = [gradient((target - term.sum()) / 64, parameters_of(q)) for term in (parts.entropy_term, parts.log_prob)]
        differences.append(torch.cat([(one - other).flatten() for one, other in zip(*pair, strict=True)]))
    values = torch.stack(differences)
    varying = values.std(0) > 1e-12
    z_scores = values.mean(0)[varying] / (values.std(0)[varying] / len(values) ** 0.5)
    assert varying.sum() > 100 and 0.8 < z_scores.square().mean().sqrt() < 1.2 and z_scores.abs().max() < 4.5


def fitted_gaussian() -> tuple[Any, Callable[[Tensor], Tensor]]:
    flow = guide_like()
    jitter(flow.parts[1])
    flow.parts[2].set(torch.ones(4), torch.tensor(2.0).expand(4, 4).tril())
    base = dist.Normal(torch.zeros(4), 1.0).to_event(1)
    flow.parts[0].parts[1] = LOFT((4,), 100.0)
    affine = ComposeFlow([flow.parts[1], flow.parts[2]])
    loc, scale_tril = affine(torch.zeros(4)), torch.stack([affine(e) - affine(0 * e) for e in torch.eye(4)], -1)
    target = dist.MultivariateNormal(loc.detach(), scale_tril=scale_tril.detach())
    return PathGradientDistribution(base, [flow]), target.log_prob


def fitted_flow() -> tuple[Any, Callable[[Tensor], Tensor]]:
    q = PathGradientDistribution(normal(4), [jitter(guide_like())])
    target = dist.TransformedDistribution(normal(4), [copy.deepcopy(q.transforms[0]).requires_grad_(False)])
    return q, target.log_prob


@pytest.mark.parametrize("make", [fitted_gaussian, fitted_flow])
def test_zero_for_every_draw_where_the_guide_is_the_posterior(make: Any) -> None:
    q, log_p = make()
    for _ in range(5):
        z = q.rsample(())  # one draw at a time: no mean hides anything
        parts = q.score_parts(z)
        path = gradient(log_p(z) - parts.entropy_term, parameters_of(q))
        total = gradient(log_p(z) - parts.log_prob, parameters_of(q))
        assert max(value.abs().max() for value in path) < 1e-11
        assert max(value.abs().max() for value in total) > 1e-2


def test_draw_with_score_is_the_same_draw() -> None:
    q = PathGradientDistribution(student(), [jitter(guide_like())])
    torch.manual_seed(3)
    z, log_q, score = draw_with_score(q.base_dist, q.transforms[0], 5)
    torch.manual_seed(3)
    other = q.rsample((5,))
    leaf = z.detach().requires_grad_()
    assert torch.equal(z, other) and torch.allclose(log_q, q.score_parts(other).log_prob, atol=1e-12)
    assert torch.allclose(score, torch.autograd.grad(q.log_prob(leaf).sum(), leaf)[0], atol=1e-9)


def test_a_stale_or_foreign_draw_is_scored_anew() -> None:
    q = PathGradientDistribution(normal(4), [jitter(guide_like())])
    stale, foreign = q.rsample((3,)), torch.randn(3, 4, requires_grad=True)
    old = q.score_parts(stale).log_prob.detach()
    with torch.no_grad():
        q.transforms[0].parts[1].loc.add_(1.0)
    for value in (stale, foreign):
        parts = q.score_parts(value)
        now = anew(q).log_prob(value)
        assert torch.allclose(parts.log_prob, now, atol=1e-12) and torch.allclose(parts.entropy_term, now, atol=1e-12)
    assert not torch.allclose(q.score_parts(stale.detach()).log_prob, old, atol=1e-3)
    leaf_gradient = torch.autograd.grad(q.score_parts(foreign).entropy_term.sum(), foreign)[0]
    assert torch.allclose(leaf_gradient, torch.autograd.grad(q.log_prob(foreign).sum(), foreign)[0], atol=1e-10)
    assert not any(value.any() for value in gradient(q.score_parts(foreign).entropy_term.sum(), parameters_of(q)))


def test_only_flows_of_ours_are_taken() -> None:
    q = PathGradientDistribution(normal(4), [AffineTransform(0.0, 2.0)])
    with pytest.raises(
        ValueError, match=r"path gradients need one FlowTransform, got .*; put the parts into a Compose"
    ):
        q.rsample()


# ---- under Pyro's ELBOs


class ByInverse(dist.TransformedDistribution):
    """The path gradient by its definition."""

    def score_parts(self, value: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        frozen = copy.deepcopy(self.transforms[0].with_cache(0)).requires_grad_(False)
        entropy = dist.TransformedDistribution(gradients._frozen(self.base_dist), [frozen]).log_prob(value)
        return ScoreParts(self.log_prob(value), 0, entropy)


DATA = torch.tensor([2.0, -0.5, 1.0])


def schools(data: Tensor = DATA) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("schools", 3):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta + share[..., 0], 1.0), obs=data)


def make_guide(model: Any = schools, family: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    pyro.clear_param_store()
    guide = AutoRealNVP(model, num_layers=2, hidden_dims=(5,), **{"gradient": "path", **options})
    guide()
    jitter(guide, 0.1)
    if family is not None:
        guide.get_posterior = lambda *args, **kwargs: family(guide.get_base_dist(), [guide.get_transform()])
    return guide


def loss_and_gradient(elbo: Any, model: Any, guide: Any, *args: Any) -> tuple[float, list[Tensor]]:
    for parameter in guide.parameters():
        parameter.grad = None
    torch.manual_seed(5)
    loss = elbo.loss_and_grads(model, guide, *args)
    return float(loss), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in guide.parameters()]


AT_ONCE = {"num_particles": 7, "vectorize_particles": True, "max_plate_nesting": 1}
ELBOS: dict[str, Callable[[], Any]] = {
    "Trace_ELBO": lambda: Trace_ELBO(num_particles=2),
    "Trace_ELBO at once": lambda: Trace_ELBO(**AT_ONCE),
    "TraceGraph_ELBO": lambda: TraceGraph_ELBO(num_particles=2),
    "TraceGraph_ELBO at once": lambda: TraceGraph_ELBO(**AT_ONCE),
    "JitTrace_ELBO": lambda: JitTrace_ELBO(num_particles=2, ignore_jit_warnings=True),
    "JitTrace_ELBO at once": lambda: JitTrace_ELBO(**AT_ONCE, ignore_jit_warnings=True),
}


@pytest.mark.parametrize("make", ELBOS.values(), ids=ELBOS)
@pytest.mark.parametrize("base", ["normal", "student"])
def test_elbos_have_the_path_gradient_and_the_same_loss(make: Any, base: Any) -> None:
    guide = make_guide(base=base)
    elbo = make()
    loss_and_gradient(elbo, schools, guide, DATA)  # compiling takes random numbers
    loss, actual = loss_and_gradient(elbo, schools, guide, DATA)
    plain = make_guide(base=base, family=ByInverse)
    loss_plain, expected = loss_and_gradient(unjitted(make()), schools, plain, DATA)
    _, total = loss_and_gradient(unjitted(make()), schools, make_guide(base=base, gradient="total"), DATA)
    assert abs(loss - loss_plain) < 1e-9 * abs(loss)
    assert_same(actual, expected)
    assert max((one - other).abs().max() for one, other in zip(actual, total, strict=True)) > 1e-3


def unjitted(elbo: Any) -> Any:
    if not isinstance(elbo, JitTrace_ELBO):
        return elbo
    options = ("num_particles", "vectorize_particles", "max_plate_nesting")
    return Trace_ELBO(**{name: getattr(elbo, name) for name in options})


@pytest.mark.parametrize("make", [lambda: TraceEnum_ELBO(**AT_ONCE), lambda: RenyiELBO(0.0, **AT_ONCE)])
def test_enumeration_and_renyi_keep_the_total_gradient(make: Any) -> None:
    loss, actual = loss_and_gradient(make(), schools, make_guide(), DATA)
    loss_total, expected = loss_and_gradient(make(), schools, make_guide(gradient="total"), DATA)
    assert abs(loss - loss_total) < 1e-9 * abs(loss)
    assert_same(actual, expected)


def test_discrete_sites_of_the_model_are_summed_out() -> None:
    @config_enumerate
    def mixture() -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 3):
            which = pyro.sample("which", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(loc[..., 0, None] + which * loc[..., 1, None], 1.0), obs=DATA)

    def summed() -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        both = torch.stack(
            [loc[..., 0, None].expand((*loc.shape[:-1], 3)), loc.sum(-1, True).expand((*loc.shape[:-1], 3))]
        )
        weights = torch.tensor([0.7, 0.3]).log().reshape((2,) + (1,) * loc.dim())
        pyro.factor("y", (dist.Normal(both, 1.0).log_prob(DATA) + weights).logsumexp(0).sum(-1))

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    guide = make_guide(poutine.block(mixture, hide=["which"]))
    loss, actual = loss_and_gradient(elbo, mixture, guide)
    plain = make_guide(summed, gradient="total")
    plain.load_state_dict(guide.state_dict())
    loss_plain, expected = loss_and_gradient(Trace_ELBO(), summed, plain)
    assert abs(loss - loss_plain) < 1e-9
    assert_same(actual, expected)


def test_scale_scales_both_sides() -> None:
    loss, plain = loss_and_gradient(Trace_ELBO(**AT_ONCE), schools, make_guide(), DATA)
    guide = make_guide()
    scaled_loss, scaled = loss_and_gradient(
        Trace_ELBO(**AT_ONCE), poutine.scale(schools, 0.25), ScaledGuide(guide), DATA
    )
    assert abs(scaled_loss - 0.25 * loss) < 1e-10 * abs(loss)
    assert_same(scaled, [0.25 * value for value in plain])


class ScaledGuide:
    def __init__(self, guide: Any) -> None:
        self._guide, self.parameters = guide, guide.parameters

    def __call__(self, *args: Any) -> Any:
        with poutine.scale(scale=0.25):
            return self._guide(*args)


def test_subsampled_data_give_the_gradient_of_all_data_in_the_mean() -> None:
    def model(size: int | None = None) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", 3, subsample_size=size) as index:
            pyro.sample("y", dist.Normal(loc[..., 0, None] + loc[..., 1, None] ** 2, 1.0), obs=DATA[index])

    guide = make_guide(model)
    full, batches = [], []
    for seed in range(100):
        for size, found in ((None, full), (1, batches)):
            for parameter in guide.parameters():
                parameter.grad = None
            torch.manual_seed(seed)
            Trace_ELBO(**AT_ONCE).loss_and_grads(model, guide, size)
            found.append(torch.cat([p.grad.flatten() for p in guide.parameters() if p.grad is not None]))
    difference = torch.stack(batches) - torch.stack(full)
    varying = difference.std(0) > 1e-12
    z_scores = difference.mean(0)[varying] / (difference.std(0)[varying] / 100**0.5)
    assert varying.sum() > 20 and z_scores.abs().max() < 4.5
