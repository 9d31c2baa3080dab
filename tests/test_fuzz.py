"""Tensors and arguments of all kinds: a refusal that says what came, or a right answer."""

from __future__ import annotations

import math

import pytest
import torch
from cases import affine_coupling, data_shape, event_shape, mixed, randomised, standardization
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import AffineTransform, constraints

import pyro_affine as pa
from pyro_affine.compose import ComposeFlow
from pyro_affine.pareto import pareto_smooth

LARGEST = 1e6  # up to here finite values must stay finite
DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64
]  # fmt: skip
FLOATS = [torch.float32, torch.float64]
fuzz = settings(derandomize=True, deadline=None, max_examples=40)
few = settings(fuzz, max_examples=20)


def refused(call):
    """What a call gives, or None where it is refused in words; any other error is a failure."""
    try:
        return call()
    except (ValueError, TypeError) as error:
        assert "got" in str(error), error
        return None


# ---------------------------------------------------------------- tensors

FILLS = {
    "normal": lambda shape: torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "large": lambda shape: 1e6 * (1 - 2 * (torch.arange(math.prod(shape)).reshape(shape) % 2)).double(),
    "huge": lambda shape: torch.full(shape, 1e30, dtype=torch.float64),
    "tiny": lambda shape: torch.full(shape, 1e-30, dtype=torch.float64),
    "zeros": lambda shape: torch.zeros(shape, dtype=torch.float64),
    "nan": lambda shape: torch.full(shape, math.nan, dtype=torch.float64),
    "inf": lambda shape: torch.full(shape, math.inf, dtype=torch.float64),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x,
    "expanded": lambda x: x[:1].expand(x.shape) if x.dim() > 1 and len(x) else x,
    "needs gradients": lambda x: x.requires_grad_() if x.is_floating_point() or x.is_complex() else x,
}


@st.composite
def tensors(draw, event_shape=(), dtype=None):
    """A tensor that mostly, not always, ends in the event shape and has the dtype."""
    shape = draw(st.lists(st.integers(0, 4), max_size=2))
    shape += draw(st.sampled_from([event_shape] * 5 + [(), (1,), (3, 3)]))
    fill, layout = draw(st.sampled_from(sorted(FILLS))), draw(st.sampled_from(sorted(LAYOUTS)))
    value, dtype = FILLS[fill](tuple(shape)), draw(st.sampled_from([dtype] * 16 + DTYPES if dtype else DTYPES))
    if not (dtype.is_floating_point or dtype.is_complex):
        value = value.nan_to_num(0.0).clamp(0, 100)
    return LAYOUTS[layout](value.to(dtype))


def is_moderate(x):
    return bool(x.isfinite().all() and (x.abs() <= LARGEST).all())


# ---------------------------------------------------------------- layers


def fitted(layer):
    layer.fit(torch.randn(50, 5, generator=torch.Generator().manual_seed(0)).cumsum(-1))
    return layer


LAYERS = {
    "coupling": lambda: affine_coupling(5, [6]),
    "mixed": mixed,
    "actnorm": lambda: pa.ActNorm(5),
    "invertible linear": lambda: pa.InvertibleLinear(5, seed=0),
    "low rank": lambda: pa.LowRankAffine(torch.zeros(5)),
    "lower triangular": lambda: pa.LowerTriangularAffine(torch.zeros(5)),
    "permutation": lambda: pa.Permutation(torch.tensor([4, 2, 0, 1, 3])),
    "standardization": lambda: standardization(5),
    "correlations": lambda: fitted(pa.Correlations(5)),
    "curves": lambda: fitted(pa.Curves((5,), straight_tails=True)),
    "loft": lambda: pa.LOFT((5,)),
    "elementwise": lambda: ComposeFlow([affine_coupling(5, [6]), AffineTransform(1.0, 2.0)]),
    "real_nvp": lambda: pa.real_nvp(5, num_layers=2, hidden_dim=6),
    "glow": lambda: pa.glow((1, 4, 4), num_steps=1, hidden_channels=3, alpha=None, seed=0),
    "squeeze": lambda: pa.Squeeze((1, 4, 4)),
    "logit": lambda: pa.LogitImages(0.05, (1, 4, 4)),
    "open 1x1 convolution": lambda: pa.invertible_conv1x1(1, seed=0),
}
UNBOUNDED = ("loft", "logit")  # their inverse grows beyond all numbers
_built = {}


def built(make, dtype):
    if (make, dtype) not in _built:
        torch.manual_seed(0)
        made = make()
        _built[make, dtype] = (randomised(made) if isinstance(made, pa.FlowTransform) else made).to(dtype)
    return _built[make, dtype]


@pytest.mark.parametrize("name", LAYERS)
@given(st.data(), st.sampled_from(FLOATS), st.booleans())
@few
def test_layers(name, data, dtype, is_inverse):
    t = built(LAYERS[name], dtype)
    shape = (data_shape if is_inverse else event_shape)(t) if name != "open 1x1 convolution" else (1, 4, 4)
    t, value = t.inv if is_inverse else t, data.draw(tensors(shape, dtype), "value")
    made = refused(lambda: t(value))
    if made is None:
        return
    log_det = t.log_abs_det_jacobian(value, made)
    assert made.dtype == value.dtype and made.shape == t.forward_shape(value.shape)
    assert log_det.shape == value.shape[: value.dim() - t.domain.event_dim]
    if is_moderate(value) and dtype == value.dtype and not (is_inverse and name in UNBOUNDED):
        assert made.isfinite().all() and log_det.isfinite().all()
        if (value.abs() < 5).all():
            atol = 1e-9 if dtype == torch.float64 else 1e-3
            torch.testing.assert_close(t.with_cache(0).inv(made.detach()), value, rtol=atol, atol=atol)
    plain = t.with_cache(0)(value.detach().clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(made.detach(), plain.detach(), equal_nan=True)


# ---------------------------------------------------------------- densities

FLOWS = {
    "unconditional": lambda: pa.NormalizingFlow(pa.real_nvp(3, num_layers=2, hidden_dim=6), 3),
    "of one entry": lambda: pa.NormalizingFlow(pa.real_nvp(1), 1),
    "plain": lambda: pa.NormalizingFlow(pa.real_nvp(3, num_layers=2, hidden_dim=6), 3, curves=0, whiten=False),
    "logarithmic tails": lambda: pa.NormalizingFlow(pa.real_nvp(3, num_layers=2, hidden_dim=6), 3, tails="log"),
    "conditional": lambda: pa.NormalizingFlow(pa.conditional_real_nvp(3, 2, num_layers=2, hidden_dims=(6,)), 3),
    "of images": lambda: pa.NormalizingFlow(pa.glow((1, 2, 2), num_steps=1, hidden_channels=3, seed=0), (1, 2, 2)),
}


def given_to(flow, data, dtype):
    return (data.draw(tensors((2,), dtype), "context"),) if flow.conditional else ()


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
@given(st.data(), st.sampled_from(FLOATS))
@fuzz
def test_log_prob(make, data, dtype):
    flow = built(make, dtype)
    given = (data.draw(tensors(tuple(flow.data_shape), dtype), "value"), *given_to(flow, data, dtype))
    score = refused(lambda: flow.log_prob(*given))
    if score is None:
        return
    exact = built(make, torch.float64).log_prob(*(x.detach().double().contiguous() for x in given))
    assert score.dtype == dtype and score.shape == exact.shape
    if all(is_moderate(x) for x in given) and flow.chain.codomain.base_constraint is constraints.real:
        assert score.isfinite().all()
        atol = 1e-9 if dtype == torch.float64 else 1e-3
        torch.testing.assert_close(score.double(), exact, rtol=atol, atol=atol)


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
@given(st.lists(st.integers(-1, 3), max_size=3), st.data())
@few
def test_draws(make, sample_shape, data):
    flow = built(make, torch.float32)
    context = given_to(flow, data, torch.float32)
    drawn = refused(lambda: flow.rsample_and_log_prob(sample_shape, *context))
    if drawn is not None:
        batch = (*sample_shape, *(context[0].shape[:-1] if context else ()))
        assert drawn[0].shape == (*batch, *flow.data_shape) and drawn[1].shape == batch
        assert not all(map(is_moderate, context)) or all(x.isfinite().all() for x in drawn)


@pytest.mark.parametrize("name", ["unconditional", "conditional", "of one entry"])
@given(st.data(), st.integers(-1, 2), st.sampled_from([None, 0.0, 0.3, 1.0, math.nan]))
@few
def test_fit_density(name, data, num_steps, validation):
    flow = FLOWS[name]()
    given = (data.draw(tensors(tuple(flow.data_shape), torch.float32), "rows"), *given_to(flow, data, torch.float32))
    options = {"num_steps": num_steps, "validation": validation, "batch_size": 4, "seed": 0, "progress": False}
    fit = refused(lambda: pa.fit_density(flow, *given, **options))
    assert fit is None or all(parameter.isfinite().all() for parameter in flow.parameters())


# ---------------------------------------------------------------- arrays


@given(st.one_of(tensors((30,)), tensors((100,), torch.float64)))
@fuzz
def test_weights(log_weights):
    smoothed = refused(lambda: pareto_smooth(log_weights))
    if smoothed is not None:
        assert smoothed[0].shape == log_weights.shape and not smoothed[0].isnan().any()
        assert (smoothed[0] <= log_weights.max() + 1e-6).all()
    result = refused(lambda: pa.PSISResult({"z": log_weights}, log_weights))
    if result is not None:
        assert result.num_draws + result.num_dropped == len(log_weights)
        assert isinstance(result.good, bool) and result.verdict and str(result)


@given(tensors((2, 2), torch.uint8), st.integers(-1, 300))
@fuzz
def test_grey_levels(images, levels):
    y = refused(lambda: pa.dequantize(images, levels))
    if y is not None:
        assert y.shape == images.shape and ((y >= 0) & (y < 1)).all()
        assert torch.equal((y.double() * levels + 1e-4).floor(), images.double())  # up to rounding


@given(tensors(), st.lists(st.integers(-1, 3), max_size=3), st.integers(-1, 300))
@fuzz
def test_bits(log_prob, event_shape, levels):
    bits = refused(lambda: pa.bits_per_dim(log_prob, event_shape, levels))
    if bits is not None:
        exact = math.log2(levels) - log_prob.double() / math.prod(event_shape) / math.log(2)
        torch.testing.assert_close(bits.double(), exact, rtol=1e-2, atol=1e-2, equal_nan=True)


sizes = st.integers(-1, 5)
shapes = st.lists(sizes, max_size=4)
numbers = st.sampled_from([-1.0, 0.0, 1e-30, 0.5, 2.0, 1e30, math.nan, math.inf])
MASKS = {
    "half": lambda a, b, seed: pa.half_mask(a),
    "alternating": lambda a, b, seed: pa.alternating_mask(a),
    "random": lambda a, b, seed: pa.random_mask(a, num_kept=b, seed=seed),
    "checkerboard": lambda a, b, seed: pa.checkerboard_mask(a, b),
}


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
@given(sizes, sizes, st.integers(0, 3))
@few
def test_masks(make, a, b, seed):
    mask = refused(lambda: make(a, b, seed))
    assert mask is None or (mask.dtype == torch.bool and mask.any() and not mask.all())


SCALES = {
    "atan": lambda a, b: pa.AtanScale(a, b),
    "sigmoid": lambda a, b: pa.SigmoidScale(a, b),
    "tanh": lambda a, b: pa.TanhScale(a),
}


@pytest.mark.parametrize("make", SCALES.values(), ids=SCALES)
@given(numbers, numbers)
@fuzz
def test_scales(make, a, b):
    scale = refused(lambda: make(a, b))
    if scale is not None:
        raw = torch.tensor([-1e6, -1.0, 0.0, 1.0, 1e6], dtype=torch.float64)
        log_scale = scale(raw)
        assert log_scale.isfinite().all() and (log_scale.diff() >= 0).all() and log_scale[2].abs() < 1e-6


BUILDERS = {
    "real_nvp": lambda shape, n, width: pa.real_nvp(shape, num_layers=n, hidden_dim=width),
    "plain real_nvp": lambda shape, n, width: pa.real_nvp(shape, num_layers=n, hidden_dims=(width,)),
    "conditional_real_nvp": lambda shape, n, width: pa.conditional_real_nvp(
        shape, n, num_layers=2, hidden_dims=(width,)
    ),
    "image_real_nvp": lambda shape, n, width: pa.image_real_nvp(shape, num_layers=n, hidden_channels=width),
    "glow": lambda shape, n, width: pa.glow(shape, num_steps=n, hidden_channels=width),
    "conditional_glow": lambda shape, n, width: pa.conditional_glow(shape, n, num_steps=1, hidden_channels=width),
    "ActNorm": lambda shape, n, width: pa.ActNorm(shape),
    "InvertibleLinear": lambda shape, n, width: pa.InvertibleLinear(shape, event_dim=n),
    "invertible_conv1x1": lambda shape, n, width: pa.invertible_conv1x1(shape),
    "Squeeze": lambda shape, n, width: pa.Squeeze(shape, n),
    "LogitImages": lambda shape, n, width: pa.LogitImages(0.1 * n, shape),
    "Curves": lambda shape, n, width: pa.Curves(shape, n),
    "Standardization": lambda shape, n, width: pa.Standardization(shape),
    "Permutation": lambda shape, n, width: pa.Permutation(torch.arange(max(n, 0)), shape),
    "affine_coupling": lambda shape, n, width: pa.affine_coupling(shape, [width], n),
    "Correlations": lambda shape, n, width: pa.Correlations(n),
    "MLP": lambda shape, n, width: pa.affine_coupling(5, shape, n),
    "MLP of one number": lambda shape, n, width: pa.affine_coupling(5, width, n),
    "real_nvp of one number": lambda shape, n, width: pa.real_nvp(n, num_layers=width),
    "glow of one number": lambda shape, n, width: pa.glow(n),
    "Squeeze of one number": lambda shape, n, width: pa.Squeeze(n),
}


@pytest.mark.parametrize("make", BUILDERS.values(), ids=BUILDERS)
@given(shapes, sizes, sizes)
@few
def test_builders(make, shape, n, width):
    made = refused(lambda: make(shape, n, width))
    if made is None:
        return
    t = made if isinstance(made, pa.FlowTransform) else made.condition(torch.zeros(n))
    shape = (t.num_channels, *[2] * (t.domain.event_dim - 1)) if t.event_shape is None else t.event_shape
    x = torch.zeros(2, *shape)
    y = t(x)
    assert y.isfinite().all() and t.log_abs_det_jacobian(x, y).shape == (2,)
    torch.testing.assert_close(t.with_cache(0).inv(y), x, rtol=1e-4, atol=1e-4)
