"""Whole flows of images: one density, one sampler, whichever way they are built, saved, moved or conditioned."""

from __future__ import annotations

import copy
from functools import partial

import pyro
import pytest
import torch
from cases import assert_close, randomised, y_points
from torch.nn.functional import one_hot

from pyro_affine.actnorm import ActNorm
from pyro_affine.audit import audit
from pyro_affine.fit_density import fit_density
from pyro_affine.flows import NormalizingFlow, real_nvp
from pyro_affine.image_flows import conditional_glow, glow, image_real_nvp
from pyro_affine.images import bits_per_dim, dequantize
from pyro_affine.scales import AdditiveScale
from pyro_affine.serialize import load, save

CONTEXT = torch.tensor([0.5, -1.0], dtype=torch.float64)


def conditioned(event_shape, context=CONTEXT, **options):
    return (
        conditional_glow(event_shape, 2, **{"num_steps": 1, "hidden_channels": 3, **options})
        .double()
        .condition(context)
    )


small_glow = partial(glow, num_steps=1, hidden_channels=3)
small_nvp = partial(image_real_nvp, num_layers=2, hidden_channels=3, num_blocks=1)
FLOWS = {
    "glow (1, 4, 4)": lambda: small_glow((1, 4, 4)),
    "glow (1, 4, 4), two levels": lambda: small_glow((1, 4, 4), 2),
    "glow (1, 4, 8), two levels": lambda: small_glow((1, 4, 8), 2),
    "glow (3, 4, 6)": lambda: small_glow((3, 4, 6)),
    "glow (2, 2, 6), two steps": lambda: small_glow((2, 2, 6), num_steps=2),
    "glow of all reals (1, 4, 2)": lambda: small_glow((1, 4, 2), alpha=None),
    "additive glow (1, 4, 4)": lambda: small_glow((1, 4, 4), scale=AdditiveScale()),
    "glow, invertible (1, 4, 4)": lambda: small_glow((1, 4, 4), 2, memory="invertible"),
    "real_nvp (1, 4, 4)": lambda: real_nvp((1, 4, 4), num_layers=2, hidden_dim=3),
    "real_nvp (1, 3, 5), one level": lambda: small_nvp((1, 3, 5)),
    "real_nvp (3, 4, 6), two levels": lambda: small_nvp((3, 4, 6), 2),
    "real_nvp (1, 4, 8), additive": lambda: small_nvp((1, 4, 8), 3, scale=AdditiveScale()),
    "conditional glow (1, 4, 4)": lambda: conditioned((1, 4, 4)),
    "conditional glow (3, 4, 6)": lambda: conditioned((3, 4, 6)),
}
TINY = [name for name in FLOWS if "(1, " in name]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=FLOWS)
def flow(request):
    return randomised(FLOWS[request.param]())


def images(num, event_shape=(1, 4, 4)):
    return dequantize(torch.randint(0, 17, (num, *event_shape)), 17)


@pytest.mark.parametrize("batch_shape", [(), (1,), (2, 3), (0,)], ids=str)
def test_round_trip(flow, batch_shape):
    y = y_points(flow, batch_shape)
    x, log_det = flow._backward(y)
    back, log_det_forward = flow._forward(x)
    assert x.shape == (*batch_shape, *flow.event_shape)
    assert_close(back, y, 1e-8)
    assert_close(log_det_forward, log_det, 1e-8)


@pytest.mark.parametrize("name", TINY)
def test_log_det_is_that_of_the_jacobian(name):
    flow = randomised(FLOWS[name]())
    x = torch.randn(flow.event_shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow._forward(x)[0].flatten(), x)
    assert_close(flow._forward(x)[1], torch.linalg.slogdet(jacobian)[1], 1e-8)


@pytest.mark.parametrize("name", FLOWS)
def test_starts_as_a_rotation_before_the_logit(name):
    flow = FLOWS[name]().double()
    x = torch.randn(5, *flow.event_shape, dtype=torch.float64)
    y, log_det = flow._forward(x)
    last = flow.parts[-1]
    if len(flow.parts) > 1 and hasattr(last, "alpha"):
        y, log_det_of_logit = last._backward(y)
        log_det = log_det - log_det_of_logit
    assert_close(log_det, torch.zeros(5, dtype=torch.float64), 1e-5)  # rotations are made in float32
    assert_close(y.flatten(1).norm(dim=1), x.norm(dim=1), 1e-5)


@pytest.mark.parametrize("name", FLOWS)
def test_every_pixel_moves_and_meets_every_other(name):
    assert audit(FLOWS[name]().double()).ok


def test_pixels_of_a_single_coupling_would_not_all_move():
    couplings = image_real_nvp((1, 4, 4), num_layers=2, alpha=None, hidden_channels=3).parts[0].levels[0].parts[:1]
    assert len(audit(couplings[0]).unmoved) == 8


def test_as_a_site_of_a_model_it_draws_images_of_its_support():
    flow = NormalizingFlow(small_glow((1, 4, 4)), (1, 4, 4))

    def model():
        with pyro.plate("images", 3):
            return pyro.sample("image", flow())

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["image"]
    assert site["value"].shape == (3, 1, 4, 4) and site["fn"].support.check(site["value"]).all()
    assert not site["fn"].support.check(torch.full((1, 4, 4), 2.0))
    assert_close(site["log_prob"], flow.log_prob(site["value"]), 1e-4)


@pytest.mark.parametrize("shape", [(1, 4, 4), (16,)], ids=["of the image", "of the latent"])
@pytest.mark.parametrize("build", [small_glow, partial(small_glow, alpha=None), partial(real_nvp, hidden_dim=3)])
def test_a_density_knows_both_shapes_from_either(build, shape):
    flow = NormalizingFlow(build((1, 4, 4)), shape)
    assert (flow.event_shape, flow.data_shape) == ((16,), (1, 4, 4))
    assert flow.log_prob(flow.sample((5,))).shape == (5,)


def test_images_of_all_reals_have_units():
    data = 100 + 10 * torch.randn(50, 1, 4, 4)
    flow = NormalizingFlow(small_glow((1, 4, 4), alpha=None), (1, 4, 4))
    before = flow.log_prob(data).mean()
    flow.standardize(data)
    assert flow.chain.parts[-1].loc.shape == (1, 4, 4)
    assert flow.log_prob(data).mean() > before + 500


def test_the_first_batch_sets_each_actnorm_and_the_fit_gains():
    flow = NormalizingFlow(glow((1, 4, 4), 2, 2, 8), (1, 4, 4))
    ramp = torch.arange(16).reshape(1, 4, 4)
    data = dequantize(ramp + torch.randint(-1, 2, (200, 1, 1, 1)).clamp(min=0).expand(-1, 1, 4, 4), 17)
    fit = fit_density(flow, data, num_steps=30, seed=0, progress=False)
    assert all(layer.initialized for layer in flow.modules() if isinstance(layer, ActNorm))
    assert fit.chosen != "start"
    independent = 4.0875  # log2(17): a uniform density
    assert bits_per_dim(flow.log_prob(data).mean(), (1, 4, 4), 17) < independent - 1.5


def test_actnorm_sees_unit_data_on_its_base_side():
    flow = NormalizingFlow(small_nvp((1, 4, 4)), (1, 4, 4))
    data = images(400)
    fit_density(flow, data, validation=None, num_steps=1, learning_rate=1e-12, seed=0, progress=False)
    x = flow.chain._backward(data)[0]
    assert_close(x.mean(), torch.tensor(0.0), 0.02)
    assert_close(x.std(), torch.tensor(1.0), 0.02)


def class_flow():
    return NormalizingFlow(conditional_glow((1, 4, 4), 3, num_steps=2, hidden_channels=8), (1, 4, 4))


def test_class_conditional_density_tells_classes_apart():
    labels = torch.arange(300) % 3
    data = dequantize((5 * labels[:, None, None, None] + torch.randint(0, 5, (300, 1, 4, 4))), 17)
    flow = class_flow()
    fit_density(flow, data, one_hot(labels, 3).float(), num_steps=40, batch_size=128, seed=0, progress=False)
    log_probs = flow.log_prob(data[:, None], torch.eye(3))
    assert log_probs.shape == (300, 3)
    assert (log_probs.argmax(1) == labels).float().mean() > 0.95
    assert_close(log_probs[:, 1], flow.log_prob(data, torch.eye(3)[1]), 1e-3)
    draws = flow.sample((200,), torch.eye(3)).mean((0, 2, 3, 4))
    assert draws.shape == (3,) and draws[0] < draws[1] < draws[2]


def shaken_density(flow):
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for layer in flow.modules():
        if isinstance(layer, ActNorm):
            layer.initialized.fill_(True)
    return flow


DENSITIES = {
    "glow": (lambda: NormalizingFlow(small_glow((1, 4, 4), 2), (1, 4, 4)), None),
    "real_nvp": (lambda: NormalizingFlow(small_nvp((1, 4, 4), 2), (1, 4, 4)), None),
    "conditional glow": (class_flow, torch.eye(3)[[0, 1, 2, 0, 1]]),
}
each_density = pytest.mark.parametrize("make, context", DENSITIES.values(), ids=DENSITIES)


@each_density
def test_state_dict_reproduces_the_density(make, context):
    flow, data = shaken_density(make()), images(5)
    torch.manual_seed(99)
    other = make()
    assert not torch.equal(other.log_prob(data, context), flow.log_prob(data, context))
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.log_prob(data, context), flow.log_prob(data, context))


@each_density
def test_a_file_reproduces_the_density(make, context, tmp_path):
    flow, data = shaken_density(make()), images(5)
    save(tmp_path / "flow.pt", flow)
    loaded = load(tmp_path / "flow.pt")
    assert torch.equal(loaded.log_prob(data, context), flow.log_prob(data, context))
    assert loaded.data_shape == (1, 4, 4)


@each_density
def test_float64_is_a_change_of_precision_only(make, context):
    flow, data = shaken_density(make()), images(5)
    wide = copy.deepcopy(flow).to(torch.float64)
    value = wide.log_prob(data.double(), None if context is None else context.double())
    assert value.dtype == torch.float64
    assert_close(value.float(), flow.log_prob(data, context), 1e-3)


@each_density
def test_autocast_networks_leave_float32_log_dets(make, context):
    flow, data, seen = shaken_density(make()), images(5), []
    for module in flow.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, __, made: seen.append(made.dtype))
    expected = flow.log_prob(data, context)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, log_det = flow._chain(context)._backward(data)
        value = flow.log_prob(data, context)
    assert set(seen) == {torch.bfloat16}
    assert x.dtype == log_det.dtype == value.dtype == torch.float32
    assert_close(value, expected, 0.05)
    value.mean().backward()
    assert all(p.grad.isfinite().all() for p in flow.parameters() if p.grad is not None)


@pytest.mark.parametrize("memory", ["checkpoint", "invertible"])
@pytest.mark.parametrize("build", [small_glow, small_nvp])
def test_memory_changes_no_gradient(build, memory):
    y, grads = images(5).double(), []
    for mode in ("full", memory):
        torch.manual_seed(0)
        flow = randomised(build((1, 4, 4), 2, memory=mode))
        x, log_det = flow._backward(y)
        grads.append(torch.autograd.grad((x.square().sum() - log_det.sum()), list(flow.parameters())))
    for plain, saved in zip(*grads, strict=True):
        assert_close(saved, plain, 1e-6)


def test_seeded_rotations_repeat():
    flows = [glow((1, 4, 4), num_steps=2, hidden_channels=3, seed=seed) for seed in (0, 0, 1)]
    first, same, other = [[p for n, p in flow.named_parameters() if "lower_upper" in n] for flow in flows]
    assert all(map(torch.equal, first, same)) and not any(map(torch.equal, first, other))
    assert not torch.equal(first[0], first[1])


DEFAULT_LEVELS = {
    "glow 8 x 8": (glow, (1, 8, 8), 2),
    "glow 28 x 28": (glow, (1, 28, 28), 2),
    "glow 32 x 32": (glow, (3, 32, 32), 3),
    "glow 128 x 128": (glow, (1, 128, 128), 3),
    "glow 2 x 6": (glow, (1, 2, 6), 1),
    "real_nvp 8 x 8": (image_real_nvp, (1, 8, 8), 2),
    "real_nvp 28 x 28": (image_real_nvp, (1, 28, 28), 3),
    "real_nvp 32 x 32": (image_real_nvp, (3, 32, 32), 4),
    "real_nvp 7 x 7": (image_real_nvp, (1, 7, 7), 1),
}


@pytest.mark.parametrize("build, shape, num_levels", DEFAULT_LEVELS.values(), ids=DEFAULT_LEVELS)
def test_default_number_of_levels(build, shape, num_levels):
    options = {"num_steps": 1} if build is glow else {"num_layers": 2, "num_blocks": 1}
    assert len(build(shape, hidden_channels=2, **options).parts[0].levels) == num_levels


REFUSED = {
    "odd height": (lambda: glow((1, 5, 4)), r"multiples of 2, got images \(1, 5, 4\); pad them to \(1, 6, 4\)"),
    "odd width, conditional": (lambda: conditional_glow((3, 4, 7), 2), r"pad them to \(3, 4, 8\)"),
    "too many levels": (lambda: glow((1, 12, 12), 3), r"multiples of 8, got.*pad them to \(1, 16, 16\).*fewer"),
    "too many levels of real_nvp": (lambda: image_real_nvp((1, 6, 6), 3), r"3 levels need.*multiples of 4"),
    "one pixel left": (lambda: image_real_nvp((1, 2, 2), 2), "two pixels for its checkerboards.*fewer levels"),
    "one pixel": (lambda: real_nvp((3, 1, 1)), "two pixels for its checkerboards.*flatten"),
    "no level": (lambda: glow((1, 4, 4), 0), "num_levels must be 1 or more, got 0"),
    "no level of real_nvp": (lambda: image_real_nvp((1, 4, 4), 0), "num_levels must be 1 or more, got 0"),
    "no step": (lambda: glow((1, 4, 4), 1, 0), "num_steps must be 1 or more, got 0"),
    "one coupling of each kind": (lambda: real_nvp((1, 4, 4), num_layers=1), "num_layers must be 2 or more, got 1"),
    "no coupling": (lambda: real_nvp((1, 4, 4), num_layers=0), "num_layers must be 2 or more, got 0"),
    "a vector": (lambda: glow((16,)), r"\(C, H, W\), got \(16,\); for grey"),
    "grey without a channel": (lambda: image_real_nvp((4, 4)), r"\(C, H, W\), got \(4, 4\); for grey"),
    "no context": (lambda: conditional_glow((1, 4, 4), 0), "context_dim must be 1 or more, got 0"),
    "other memory": (lambda: glow((1, 4, 4), memory="none"), "memory must be one of"),
    "another shape": (lambda: NormalizingFlow(small_glow((1, 4, 4)), (1, 4, 6)), r"\(16,\).*\(1, 4, 6\)"),
    "whitened images": (
        lambda: NormalizingFlow(small_glow((1, 4, 4), alpha=None), 16, whiten=True), "only vectors can be whitened"
    ),
    "flat data": (
        lambda: fit_density(NormalizingFlow(small_glow((1, 4, 4)), 16), torch.rand(9, 16)), r"\(N,\) \+ \(1, 4, 4\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("do, message", REFUSED.values(), ids=REFUSED)
def test_refusals_say_the_way_out(do, message):
    with pytest.raises(ValueError, match=message):
        do()
