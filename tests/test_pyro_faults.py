"""Nine faults of the coupling flows of Pyro 1.9.2, each a property that ours must have.

Where that is cheap, a second test shows the fault in Pyro 1.9 itself: were it gone, the first would prove little.
"""

from __future__ import annotations

import copy
import pickle

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
from cases import randomised
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow, init_to_value
from pyro.optim import Adam
from torch import nn

from pyro_affine.audit import audit
from pyro_affine.compose import ComposeFlow
from pyro_affine.coupling import affine_coupling, conditional_affine_coupling
from pyro_affine.flows import NormalizingFlow, conditional_real_nvp, real_nvp
from pyro_affine.guides import AutoRealNVP
from pyro_affine.linear import Permutation
from pyro_affine.scales import AtanScale, ExpScale, SigmoidScale, SoftplusScale, TanhScale

in_pyro_1_9 = pytest.mark.skipif(not pyro.__version__.startswith("1.9."), reason="tells of Pyro 1.9")
SMALL = {"num_layers": 4, "hidden_dims": (8,)}


def normal(*event_shape):
    return dist.Normal(torch.zeros(event_shape), 1.0).to_event(len(event_shape))


def redrawn(flow):
    """Torch's default initialisation in every layer, the last one too, as Pyro's networks start."""
    for module in flow.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return flow


# ---- 1. iterated(k, affine_coupling) never permutes: half of the latents never move, silently
def test_1_every_entry_moves():
    for size in (2, 3, 5, (3, 4)):
        assert audit(real_nvp(size, **SMALL)).ok
    never_moves = ComposeFlow([affine_coupling(4) for _ in range(4)])
    assert audit(never_moves).unmoved == [(0,), (1,)]  # a stack by hand can still be wrong: audit says so
    with pytest.raises(ValueError, match=r"every entry must be moved .* two layers at least"):
        real_nvp(4, num_layers=1)


@in_pyro_1_9
def test_1_pyro_has_it():
    t = pyro_transforms.iterated(4, pyro_transforms.affine_coupling, 4)
    x = torch.randn(5, 4)
    assert torch.equal(t(x)[:, :2], x[:, :2])


# ---- 2. log_prob of the same tensor is stale after a step; or "backward through the graph a second time"
def test_2_score_of_the_same_tensor_is_new_after_each_step():
    t = real_nvp(3, **SMALL)
    data = 2 + torch.randn(64, 3)
    optimiser = torch.optim.Adam(t.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        d = dist.TransformedDistribution(normal(3), [t])
        losses.append(-d.log_prob(data).mean())
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    fresh = dist.TransformedDistribution(normal(3), [copy.deepcopy(t)])
    assert torch.equal(d.log_prob(data), fresh.log_prob(data))
    assert len({loss.item() for loss in losses}) == 20 and losses[-1] < losses[0]


@in_pyro_1_9
def test_2_pyro_has_it():
    t = pyro_transforms.affine_coupling(2)
    d = dist.TransformedDistribution(normal(2), [t])
    data = torch.randn(8, 2)
    d.log_prob(data).sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        d.log_prob(data).sum().backward()


# ---- 3. deepcopy after a call fails; with_cache(0) and sign raise; .inv and conditioned transforms hide parameters
def test_3_a_used_transform_can_be_copied_twinned_and_inverted():
    conditional = conditional_affine_coupling(4, 3)
    for t in (affine_coupling(4), real_nvp(4, **SMALL), conditional.condition(torch.ones(3))):
        x = torch.randn(5, 4)
        y = t(x)
        for twin in (copy.deepcopy(t), pickle.loads(pickle.dumps(t)), t.with_cache(0), t.inv.inv):
            assert torch.equal(twin(x), y)
        assert t.sign in (-1, 1)
        assert len(list(t.inv.parameters())) == len(list(t.parameters())) > 0
    assert len(list(conditional.condition(torch.ones(3)).parameters())) == len(list(conditional.parameters()))


@in_pyro_1_9
def test_3_pyro_has_it():
    t = pyro_transforms.affine_coupling(4)
    t(torch.randn(5, 4))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(t)
    for use in (lambda: t.sign, lambda: t.with_cache(0), lambda: t.inv.parameters()):
        with pytest.raises((NotImplementedError, AttributeError)):
            use()


# ---- 4. a reloaded flow is another density: permutations are not in state_dict
def test_4_a_reloaded_flow_is_the_same_density():
    data = torch.randn(6, 5)
    saved = NormalizingFlow(randomised(real_nvp(5, **SMALL, seed=1)).float(), 5)
    other = NormalizingFlow(real_nvp(5, **SMALL, seed=2), 5)
    assert any(isinstance(part, Permutation) for part in saved.transform.parts)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other.log_prob(data), saved.log_prob(data))
    assert torch.equal(other().log_prob(data), saved().log_prob(data))


# ---- 5. the scale clamp passes gradient 1 where the value is flat
@pytest.mark.parametrize(
    "scale", [ExpScale(), TanhScale(), AtanScale(2.0, 0.1), SigmoidScale(), SoftplusScale()], ids=str
)
def test_5_gradients_of_the_scale_are_true(scale):
    raw = torch.tensor([-50.0, -8.0, -0.1, 0.0, 0.1, 8.0, 50.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(scale(raw).sum(), raw)
    step = 1e-4
    slope = (scale(raw + step) - scale(raw - step)) / (2 * step)
    torch.testing.assert_close(gradient, slope.detach(), rtol=1e-4, atol=1e-7)


@in_pyro_1_9
def test_5_pyro_has_it():
    raw = torch.tensor([-50.0, 50.0], requires_grad=True)
    pyro_transforms.utils.clamp_preserve_gradients(raw, -5.0, 3.0).sum().backward()
    assert raw.grad.tolist() == [1.0, 1.0]


# ---- 6. conditional_affine_coupling(dim=-3) declares event_dim 1
def test_6_the_domain_has_the_rank_of_the_event():
    layer = conditional_affine_coupling([2, 4, 4], 3, dim=-3)
    t = layer.condition(torch.ones(7, 3))
    for part in (layer, t, t.inv):
        assert part.domain.event_dim == part.codomain.event_dim == 3
    d = dist.TransformedDistribution(normal(2, 4, 4), [t])
    assert (d.batch_shape, d.event_shape) == ((7,), (2, 4, 4))
    assert d.log_prob(d.sample()).shape == (7,)


@in_pyro_1_9
def test_6_pyro_has_it():
    assert pyro_transforms.conditional_affine_coupling([2, 4, 4], 3, dim=-3).domain.event_dim == 1


# ---- 7. conditional flows with context (7, 3): sample() and sample((100,)) fail, batch_shape is ()
@pytest.mark.parametrize("sample_shape", [(), (100,), (2, 100)], ids=str)
def test_7_the_batch_shape_is_that_of_the_context(sample_shape):
    transform = conditional_real_nvp(4, 3, **SMALL)
    flow = NormalizingFlow(randomised(transform).float(), 4)
    context = torch.randn(7, 3)
    by_hand = dist.ConditionalTransformedDistribution(normal(4), [transform]).condition(context)
    for d in (flow(context), by_hand):
        assert d.batch_shape == (7,) and d.event_shape == (4,)
        y = d.sample(sample_shape)
        assert y.shape == (*sample_shape, 7, 4) and d.log_prob(y).shape == (*sample_shape, 7)
        one = flow(context[3]).log_prob(y[..., 3, :])
        torch.testing.assert_close(d.log_prob(y)[..., 3], one, rtol=1e-4, atol=1e-4)


@in_pyro_1_9
def test_7_pyro_has_it():
    transform = pyro_transforms.conditional_affine_coupling(4, 3)
    d = dist.ConditionalTransformedDistribution(normal(4), [transform]).condition(torch.randn(7, 3))
    assert d.batch_shape == ()
    with pytest.raises(RuntimeError):
        d.sample((100,))


# ---- 8. 32 couplings of default networks: float32 round-trip error 2e16; networks do not start at the identity
@pytest.mark.parametrize("seed", range(4))
def test_8_deep_stacks_come_back(seed):
    torch.manual_seed(seed)
    t = redrawn(real_nvp(16, num_layers=64))
    x = torch.randn(1000, 16)
    with torch.no_grad():
        assert (t.inv(t(x).clone()) - x).abs().max() < 1e-3


def test_8_deep_stacks_start_at_the_identity():
    t = real_nvp(16, num_layers=64)
    x = torch.randn(10, 16)
    y = t(x)
    assert torch.equal(y.sort().values, x.sort().values) and not t.log_abs_det_jacobian(x, y).any()


@in_pyro_1_9
def test_8_pyro_has_it():
    flip = pyro_transforms.Permute(torch.arange(16).flip(0))
    parts = [part for _ in range(32) for part in (pyro_transforms.affine_coupling(16), flip)]
    x = torch.randn(1000, 16)
    y = x
    with torch.no_grad():
        for part in parts:
            y = part(y)
        for part in reversed(parts):
            y = part._inverse(y)
    assert not (y - x).abs().max() < 1e3


# ---- 9. AutoNormalizingFlow ignores init_loc, has no parameters before the first call, and median() raises
def model():
    z = pyro.sample("z", dist.Normal(torch.tensor([3.0, -1.0]), 0.5).to_event(1))
    pyro.sample("s", dist.LogNormal(z.sum() - 2, 0.1))


START = {"z": torch.tensor([10.0, -10.0]), "s": torch.tensor(0.25)}


def test_9_the_guide_starts_where_it_is_told_and_has_its_parameters():
    guide = AutoRealNVP(model, init_loc_fn=init_to_value(values=START), init_scale=0.01, **SMALL)
    guide()
    assert len(list(guide.parameters())) > 4
    median = guide.median()
    torch.testing.assert_close(median["z"], START["z"], rtol=0, atol=1e-3)
    torch.testing.assert_close(median["s"], START["s"], rtol=0, atol=1e-3)
    trained = [p for name, p in guide.named_parameters() if not name.endswith("_stored")]
    before = [p.detach().clone() for p in trained]
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO(num_particles=4))
    for _ in range(2):
        svi.step()
    assert all((p != old).any() for p, old in zip(trained, before, strict=True))


@in_pyro_1_9
def test_9_pyro_has_it():
    guide = AutoNormalizingFlow(model, lambda size: pyro_transforms.iterated(2, pyro_transforms.affine_coupling, size))
    assert not list(guide.parameters())
    guide()
    with pytest.raises(NotImplementedError):
        guide.median()
