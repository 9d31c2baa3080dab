"""What Pyro's users do with a distribution or a model, done with each kind of density and of guide of ours."""

from __future__ import annotations

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, density, each, randomised, y_points
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.inspect import get_dependencies, get_model_relations, render_model
from pyro.nn import PyroModule
from torch.distributions import SigmoidTransform

import pyro_affine as pa

SMALL = {"num_layers": 2, "hidden_dims": (6,)}


def latents():
    with pyro.plate("three", 3):
        pyro.sample("z", dist.LogNormal(0.0, 1.0))


def posterior_of(guide):
    guide()
    return guide.get_posterior()


def path_gradients():
    flow = randomised(pa.real_nvp(3, **SMALL)).float()
    return pa.PathGradientDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [flow])


FLOWS = {
    "of vectors": lambda: pa.NormalizingFlow(pa.real_nvp(3, **SMALL), 3),
    "of one entry": lambda: pa.NormalizingFlow(pa.real_nvp(1), 1),
    "logarithmic tails": lambda: pa.NormalizingFlow(pa.real_nvp(3, **SMALL), 3, tails="log"),
    "plain": lambda: pa.NormalizingFlow(pa.real_nvp((2, 2), **SMALL), (2, 2), curves=0, whiten=False),
    "onto a cube": lambda: pa.NormalizingFlow(pa.ComposeFlow([pa.real_nvp(3, **SMALL), SigmoidTransform()]), 3),
    "of images": lambda: pa.NormalizingFlow(pa.glow((1, 4, 4), num_steps=1, hidden_channels=3, seed=0), (1, 4, 4)),
    "conditional": lambda: pa.NormalizingFlow(pa.conditional_real_nvp(3, 2, **SMALL), 3),
    "conditional glow": lambda: pa.NormalizingFlow(
        pa.conditional_glow((1, 2, 2), 2, num_steps=1, hidden_channels=3, seed=0), (1, 2, 2)
    ),
    "of a table": lambda: pa.TableDensity(
        {"age": "positive", "angle": ("circular", 360.0), "share": ("bounded", 0, 1)}
    ),
}


def at(flow):
    return flow(torch.tensor([0.3, -1.0])) if getattr(flow, "conditional", False) else flow()


DISTRIBUTIONS = {
    **{f"flow {name}": lambda make=make: at(make()) for name, make in FLOWS.items()},
    "path gradients": path_gradients,
    "posterior of a guide": lambda: posterior_of(pa.AutoRealNVP(latents, **SMALL)),
    "posterior of a guide, path gradients": lambda: posterior_of(pa.AutoRealNVP(latents, gradient="path", **SMALL)),
}


def through_torch(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda q: pickle.loads(pickle.dumps(q)), "torch.save": through_torch}
each_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


# ---------------------------------------------------------------- copies


@each(CASES)
def test_a_transform_comes_back_whole_from_torch_save(make):
    t = randomised(make())
    y = y_points(t, (4,))
    expected = density(t).log_prob(y)  # which fills the cache
    assert torch.equal(density(through_torch(t)).log_prob(y), expected)


@each_copy
@each(DISTRIBUTIONS, leave_out=["guide"])  # Pyro's param store hangs a weakref on each parameter of a guide
def test_a_distribution_is_copied_with_its_flow(make, copied):
    with torch.no_grad():  # torch copies no tensor with a history, here the base's degrees of freedom
        q = make()
    y = q.sample((4,))
    expected = q.log_prob(y).detach()
    twin = copied(q)
    assert type(twin) is type(q) and torch.equal(twin.log_prob(y), expected)
    pyro.set_rng_seed(1)
    first = q.sample((4,))
    pyro.set_rng_seed(1)
    assert torch.equal(twin.sample((4,)), first)


@each_copy
@each(FLOWS)
def test_a_flow_is_copied_with_its_units(make, copied):
    flow = make()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    y = at(flow).sample((4,))
    assert torch.equal(at(copied(flow)).log_prob(y), at(flow).log_prob(y))


# ---------------------------------------------------------------- words

PARTS = {
    "real_nvp(5)": (lambda: pa.NormalizingFlow(pa.real_nvp(5), 5), 8, ["ResidualMLP", "Correlations", "Curves"]),
    "real_nvp(4), plain": (lambda: pa.real_nvp(4, hidden_dims=(64, 32)), 2, ["MLP", "64 SiLU() 32 SiLU()", "2 x"]),
    "conditional_real_nvp": (lambda: pa.conditional_real_nvp(5, 3), 8, ["MLP", "context_dim=3", "Permutation(5)"]),
}


@pytest.mark.parametrize(("make", "num_couplings", "words"), PARTS.values(), ids=PARTS)
def test_repr_of_eight_layers_is_a_screen_that_names_each_part(make, num_couplings, words):
    text = repr(make())
    assert len(text.splitlines()) < 40 and "tensor" not in text.lower() and " object at " not in text
    assert text.count("kept=") >= num_couplings and text.count("AtanScale(lower=2.0, upper=1.0)") >= num_couplings
    assert [word for word in words if word not in text] == []


@each(CASES)
def test_repr_holds_no_numbers_of_tensors(make):
    assert "tensor(" not in repr(make())


# ---------------------------------------------------------------- shapes and dtypes


@each(DISTRIBUTIONS)
def test_expand_to_event_and_mask(make):
    q = make()
    wide = q.expand((2, 4)) if not q.batch_shape else q
    y = wide.sample()
    scores = wide.log_prob(y)
    assert y.shape == (2, 4, *q.event_shape) and torch.allclose(scores, q.log_prob(y))
    assert torch.allclose(wide.to_event(1).log_prob(y), scores.sum(-1), rtol=1e-4)
    kept = torch.tensor([True, False, True, False])
    assert torch.equal(wide.mask(kept).log_prob(y), torch.where(kept, scores, torch.zeros(())))


@each(FLOWS)
def test_to_float64_and_back_is_the_same_density(make):
    flow = make()
    y = at(flow).sample((4,))
    before = at(flow).log_prob(y).detach()
    flow.double()
    context = [torch.tensor([0.3, -1.0], dtype=torch.float64)] if getattr(flow, "conditional", False) else []
    exact = flow(*context).log_prob(y.double())
    assert exact.dtype == torch.float64 and torch.allclose(exact.float(), before, rtol=1e-3, atol=1e-3)
    assert torch.equal(at(flow.float()).log_prob(y), before)


# ---------------------------------------------------------------- models


def site_of(flow):
    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", 4):
            y = pyro.sample("y", at(flow))
            pyro.sample("seen", dist.Normal(y.flatten(1).sum(-1), scale), obs=torch.zeros(4))

    return model


@each(FLOWS)
def test_the_graph_of_a_model_shows_a_flow_as_one_node(make):
    relations = get_model_relations(site_of(make()))
    assert relations["sample_dist"]["y"] == "TransformedDistribution"
    assert relations["sample_sample"]["seen"] == ["scale", "y"] and relations["plate_sample"] == {"rows": ["y", "seen"]}
    assert get_dependencies(site_of(make()))["posterior_dependencies"]["scale"].keys() == {"scale", "y", "seen"}


@pytest.mark.parametrize(
    "make", [pa.AutoRealNVP, lambda model, **sizes: pa.AutoRealNVP(model, gradient="path", **sizes)]
)
def test_the_graph_of_a_guide_has_its_sites(make):
    model = site_of(FLOWS["of vectors"]())
    guide = make(model, **SMALL)
    guide()
    relations = get_model_relations(guide)
    assert {"scale", "y"} <= set(relations["sample_dist"])


def test_render_model():
    pytest.importorskip("graphviz", reason="pictures of models need the Python package graphviz")
    assert "TransformedDistribution" in render_model(site_of(FLOWS["of vectors"]()), render_distributions=True).source


@each(FLOWS)
def test_pyro_module_names_each_parameter_once(make):
    flow = make()
    pyro.module("density", flow)
    names = set(pyro.get_param_store().keys())
    assert names == {f"density$$${name}" for name, _ in flow.named_parameters()} and names


@each(FLOWS)
def test_a_pyro_module_holds_it_and_svi_trains_all_of_it(make):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.flow = make()

        def forward(self, data):
            with pyro.plate("rows", len(data)):
                pyro.sample("y", at(self.flow), obs=data)

    model = Model()
    data = at(model.flow).sample((6,))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    svi = SVI(model, lambda data: None, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
    losses = [svi.step(data) for _ in range(2)]
    assert losses[1] != losses[0]
    assert len(before) == len(list(model.flow.parameters())) == len(pyro.get_param_store())
