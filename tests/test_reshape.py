"""Space to channels and multi-scale flows: where each entry goes, exact densities, refusals."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CONTEXT, assert_close, coupling, data_shape, glow, multi_scale, randomised, x_points, y_points
from torch import nn

from pyro_affine import (
    ComposeFlow,
    ConditionalMultiScale,
    LogitImages,
    MultiScale,
    NormalizingFlow,
    Squeeze,
    audit,
    load,
    save,
)
from pyro_affine.linear import Permutation
from pyro_affine.masks import channel_mask, checkerboard_mask, half_mask
from pyro_affine.transform import FlowTransform

SQUEEZES = {
    "(1, 2, 2)": ((1, 2, 2), 2),
    "(3, 4, 6)": ((3, 4, 6), 2),
    "(1, 3, 9) by 3": ((1, 3, 9), 3),
    "(2, 3, 6) by 3": ((2, 3, 6), 3),
    "(1, 9, 3) by 3": ((1, 9, 3), 3),
    "(3, 9, 6) by 3": ((3, 9, 6), 3),
    "(2, 5, 10) by 5": ((2, 5, 10), 5),
    "(2, 3, 5) by 1": ((2, 3, 5), 1),
}
every_squeeze = pytest.mark.parametrize("image_shape, factor", SQUEEZES.values(), ids=SQUEEZES)


@every_squeeze
@pytest.mark.parametrize("batch_shape", [(), (4,), (0,), (2, 3)], ids=str)
def test_squeeze_puts_each_pixel_where_the_formula_says(image_shape, factor, batch_shape):
    squeeze = Squeeze(image_shape, factor)
    channels, height, width = image_shape
    y = torch.randn(*batch_shape, *image_shape)
    x = squeeze.inv(y)
    assert x.shape == (*batch_shape, channels * factor**2, height // factor, width // factor)
    for c, row, column in torch.cartesian_prod(*map(torch.arange, image_shape)).tolist():
        (i, a), (j, b) = divmod(row, factor), divmod(column, factor)
        assert torch.equal(x[..., factor**2 * c + factor * a + b, i, j], y[..., c, row, column])
    assert torch.equal(squeeze(x), y)
    log_det = squeeze.log_abs_det_jacobian(x, y)
    assert log_det.shape == batch_shape and not log_det.any()


@every_squeeze
def test_sign_of_a_squeeze_is_that_of_its_permutation(image_shape, factor):
    squeeze = Squeeze(image_shape, factor)
    numbers = torch.arange(float(torch.Size(image_shape).numel()))
    order = squeeze(numbers.reshape(squeeze.event_shape)).flatten().long()
    assert squeeze.sign == squeeze.inv.sign == Permutation(order).sign


@pytest.mark.parametrize("image_shape", [(1, 9, 9), (1, 3, 9), (3, 9, 9)], ids=str)
def test_sign_of_a_multi_scale_flow_is_that_of_its_permutation(image_shape):
    levels = [Squeeze(image_shape, 3)]
    channels, height, width = levels[0].event_shape
    if height > 1:
        levels.append(Squeeze((channels - channels // 2, height, width), 3))
    flow = MultiScale(levels)
    order = flow(torch.arange(float(flow.event_shape.numel()))).flatten().long()
    assert flow.sign == flow.inv.sign == Permutation(order).sign


def test_some_squeezes_are_odd():
    assert {Squeeze(*case).sign for case in SQUEEZES.values()} == {1, -1}


def test_squeeze_knows_both_shapes_and_domains():
    squeeze = Squeeze((3, 4, 6))
    assert squeeze.forward_shape(torch.Size([7, 12, 2, 3])) == (7, 3, 4, 6)
    assert squeeze.inverse_shape(torch.Size([7, 3, 4, 6])) == (7, 12, 2, 3)
    assert squeeze.event_shape == (12, 2, 3) and squeeze.inv.event_shape == (3, 4, 6)
    assert squeeze.domain.event_dim == squeeze.codomain.event_dim == 3
    chain = ComposeFlow([squeeze, squeeze.inv])
    assert chain.event_shape == data_shape(chain) == (12, 2, 3)


class Add(FlowTransform):
    """Adds a number, so that it is seen which level an entry has passed."""

    def __init__(self, event_shape, number):
        super().__init__(event_shape)
        self.number = number

    def _forward(self, x):
        return x + self.number, x.new_zeros(x.shape[:-3])

    def _backward(self, y):
        return y - self.number, y.new_zeros(y.shape[:-3])


def marked_levels():
    """Images (1, 4, 4) by way of (4, 2, 2) and (2, 2, 2), then (8, 1, 1) and (4, 1, 1)."""
    first = ComposeFlow([Add((4, 2, 2), 100), Squeeze((1, 4, 4))])
    second = ComposeFlow([Add((8, 1, 1), 10000), Squeeze((2, 2, 2))])
    return [first, second, Add((4, 1, 1), 1000000)]


def test_the_latent_holds_the_coarsest_piece_first_and_each_passes_its_levels():
    flow = MultiScale(marked_levels())
    assert [tuple(shape) for shape in flow.piece_shapes] == [(4, 1, 1), (4, 1, 1), (2, 2, 2)]
    y = torch.arange(16.0).reshape(1, 4, 4)
    image = Squeeze((1, 4, 4)).inv(y) - 100  # by hand, level by level
    finest = image[2:]
    image = Squeeze((2, 2, 2)).inv(image[:2]) - 10000
    middle, coarsest = image[4:], image[:4] - 1000000
    expected = torch.cat([coarsest.flatten(), middle.flatten(), finest.flatten()])
    x = flow.inv(y)
    assert torch.equal(x, expected)
    assert torch.equal(flow(x), y)
    assert all(torch.equal(a, b) for a, b in zip(flow.split(x), (coarsest, middle, finest), strict=True))
    assert torch.equal(flow.merge([coarsest, middle, finest]), x)


def test_an_odd_number_of_channels_leaves_the_smaller_part():
    flow = MultiScale([Add((3, 1, 2), 0), Add((2, 1, 2), 0)])
    assert [tuple(shape) for shape in flow.piece_shapes] == [(2, 1, 2), (1, 1, 2)]
    assert torch.equal(flow(torch.arange(6.0)), torch.arange(6.0).reshape(3, 1, 2))


def test_one_level_keeps_all():
    flow = MultiScale([Squeeze((1, 2, 2))])
    assert flow.event_shape == (4,) and flow(torch.zeros(5, 4)).shape == (5, 1, 2, 2)


MULTI_SCALES = {"real_nvp": multi_scale, "glow": glow}


@pytest.mark.parametrize("make", MULTI_SCALES.values(), ids=MULTI_SCALES)
def test_shapes_and_domains_of_a_multi_scale_flow(make):
    flow = make()
    size = flow.event_shape.numel()
    assert len(flow.event_shape) == 1 and flow.domain.event_dim == 1 and flow.codomain.event_dim == 3
    assert flow.forward_shape(torch.Size([2, 7, size])) == (2, 7, *data_shape(flow))
    assert flow.inverse_shape(torch.Size([2, 7, *data_shape(flow)])) == (2, 7, size)
    assert audit(flow).unmoved == []


def test_empty_batch():
    flow = multi_scale()
    assert flow(torch.zeros(0, 24)).shape == (0, 1, 4, 6) and flow.inv(torch.zeros(0, 1, 4, 6)).shape == (0, 24)


@pytest.mark.parametrize("sample_shape", [(), (4, 5)], ids=str)
def test_conditioned_flow_has_the_batch_of_the_context(sample_shape):
    conditional = randomised(multi_scale(conditional=True))
    context = torch.randn(7, 2, dtype=torch.float64)
    flow = conditional.condition(context)
    base = dist.Normal(torch.zeros(24, dtype=torch.float64), 1.0).to_event(1)
    density = dist.ConditionalTransformedDistribution(base, [conditional]).condition(context)
    y = density.rsample(sample_shape)
    assert flow.batch_shape == (7,) and y.shape == (*sample_shape, 7, 1, 4, 6)
    scores = density.log_prob(y.detach())
    for index in range(7):
        alone = conditional.condition(context[index])
        x, log_det = alone._backward(y[..., index, :, :, :])
        assert_close(scores[..., index], base.log_prob(x) - log_det, 1e-10)
    scores.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in conditional.parameters())
    assert {id(p) for p in flow.parameters()} == {id(p) for p in conditional.parameters()}


def test_a_wide_context_widens_levels_that_do_not_read_it():
    conditional = ConditionalMultiScale([Squeeze((1, 2, 2))])
    flow = conditional.condition(torch.zeros(7, 2))
    assert flow(torch.zeros(4)).shape == flow.forward_shape(torch.Size([4])) == (7, 1, 2, 2)
    assert flow.inv(torch.zeros(1, 2, 2)).shape == (7, 4)


def image_density():
    return ComposeFlow([randomised(multi_scale()).float(), LogitImages(0.05, (1, 4, 6))])


def test_one_transform_in_a_pyro_model():
    flow = NormalizingFlow(image_density(), 24)

    def model():
        with pyro.plate("images", 5):
            return pyro.sample("image", flow())

    trace = pyro.poutine.trace(model).get_trace()
    images = trace.nodes["image"]["value"]
    assert images.shape == (5, 1, 4, 6) and flow().support.check(images).all()
    assert_close(trace.log_prob_sum(), flow.log_prob(images).sum(), 1e-4)


def test_saved_and_loaded_flow_is_the_same_density(tmp_path):
    flows = {
        "multi-scale": (NormalizingFlow(image_density(), 24), (1, 4, 6), None),
        "glow": (NormalizingFlow(ComposeFlow([glow(), LogitImages(0.05, (1, 4, 4))]), 16), (1, 4, 4), None),
        "conditional": (multi_scale(conditional=True), (1, 4, 6), CONTEXT.float()),
    }
    for flow, shape, context in flows.values():
        save(tmp_path / "flow.pt", flow)
        twin, y = load(tmp_path / "flow.pt"), torch.rand(3, *shape)
        if context is None:
            assert torch.equal(twin.log_prob(y), flow.log_prob(y))
        else:
            assert torch.equal(twin.condition(context)._backward(y)[1], flow.condition(context)._backward(y)[1])


def test_float32_and_autocast_keep_float32_log_dets():
    flow = randomised(multi_scale()).float()
    x = torch.randn(4, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, log_det = flow._forward(x)
        back, _ = flow._backward(y)
    assert y.dtype == back.dtype == log_det.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(flow._forward(back)[0], y, 1e-1)


def test_gradients_flow_through_all_levels():
    flow = randomised(multi_scale())
    y = y_points(flow, (3,)).requires_grad_()
    x, log_det = flow._backward(y)
    grads = torch.autograd.grad(x.square().sum() + log_det.sum(), [y, *flow.parameters()])
    assert all(grad.any() for grad in grads)
    assert x_points(flow, (3,)).shape == x.shape


def checkerboard_level():
    return coupling(checkerboard_mask(2, 2).expand(1, 2, 2))


REFUSED = {
    "odd height": (lambda: Squeeze((1, 3, 4)), r"multiples of the factor, got images \(1, 3, 4\).*factor 2.*pad"),
    "odd width": (lambda: Squeeze((1, 4, 3)), r"multiples of the factor, got images \(1, 4, 3\)"),
    "factor that does not divide, with one that does": (lambda: Squeeze((1, 9, 15)), "take factor 3$"),
    "factor 0": (lambda: Squeeze((1, 4, 4), 0), "factor 0.*take factor 2 or 4"),
    "no image": (lambda: Squeeze((4, 4)), r"shape \(C, H, W\).*got \(4, 4\).*grey"),
    "squeezed events of the wrong shape": (lambda: Squeeze((1, 4, 4))(torch.zeros(1, 4, 4)), r"\(4, 2, 2\)"),
    "images of the wrong shape": (lambda: Squeeze((1, 4, 4)).inv(torch.zeros(1, 4, 6)), r"\(1, 4, 4\).*\(1, 4, 6\)"),
    "integers": (lambda: Squeeze((1, 4, 4)).inv(torch.zeros(1, 4, 4, dtype=torch.uint8)), "floating point.*uint8"),
    "no level": (lambda: MultiScale([]), "at least one level, got none"),
    "no transform": (lambda: MultiScale([nn.Linear(4, 4)]), "must be a FlowTransform.*got Linear as level 0"),
    "vectors": (lambda: MultiScale([coupling(half_mask(4))]), r"got AffineCoupling as level 0.*\(4,\).*ComposeFlow"),
    "a conditional level": (
        lambda: MultiScale([multi_scale(conditional=True)]), "must be a FlowTransform.*ConditionalMultiScale"
    ),
    "levels that do not fit": (
        lambda: MultiScale([Squeeze((1, 4, 4)), Squeeze((4, 2, 2))]), r"level 1 must.*\(2, 2, 2\).*got.*\(4, 2, 2\)"
    ),
    "one channel to halve": (
        lambda: MultiScale([checkerboard_level(), checkerboard_level()]), r"two channels.*got \(1, 2, 2\).*Squeeze"
    ),
    "one channel under a channel mask": (lambda: coupling(channel_mask(1), (1, 2, 2)), "checkerboard_mask"),
    "latents of the wrong size": (lambda: multi_scale()(torch.zeros(5, 23)), r"\(24,\).*\(5, 23\)"),
    "images of the wrong size": (lambda: multi_scale().inv(torch.zeros(5, 1, 4, 5)), r"\(1, 4, 6\).*\(5, 1, 4, 5\)"),
    "context of the wrong size": (lambda: multi_scale(conditional=True).condition(torch.zeros(3)), "2"),
}  # fmt: skip


@pytest.mark.parametrize("do, message", REFUSED.values(), ids=REFUSED)
def test_refusals_say_the_rule_and_what_came(do, message):
    with pytest.raises(ValueError, match=message):
        do()
