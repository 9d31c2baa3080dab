"""Compiled densities and draws: one graph, made once for all batch sizes, equal to the eager ones."""

from __future__ import annotations

import copy
import shutil
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import assert_close, randomised
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import nn
from torch._dynamo.utils import counters

from pyro_affine import AutoRealNVP, NormalizingFlow, fit_density, fit_guide, load, real_nvp, save
from pyro_affine.latent_density import LatentDensity
from pyro_affine.recorded import RecordedDensity

BATCH_SIZES = (4, 7, 32)


class Counting:
    """A backend that runs the graph as it is and counts how many there are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def flow_of(**options):
    return randomised(NormalizingFlow(real_nvp(5, **{"num_layers": 4, "hidden_dims": (6,), **options}), 5)).float()


def draw(flow):
    return lambda x: flow.chain._forward(x)


FUNCTIONS = {
    "log_prob": lambda: flow_of().log_prob,
    "log_prob, ReLU": lambda: flow_of(activation=nn.ReLU).log_prob,
    "draw and log_det": lambda: draw(flow_of()),
}


def assert_same(found, expected):
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for one, other in pairs:
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)
def test_one_graph_serves_all_batch_sizes(make):
    function, backend = make(), Counting()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for batch_size in BATCH_SIZES:
        value = torch.randn(batch_size, 5)
        assert_same(compiled(value), function(value))
    assert backend.graphs == 1


def test_without_a_word_on_shapes_there_are_two_graphs_at_most():
    """The default of torch.compile: the first batch size is taken for a constant, the second shows that it is none."""
    flow, backend = flow_of(), Counting()
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend=backend)
    for batch_size in BATCH_SIZES:
        compiled(torch.randn(batch_size, 5))
    assert backend.graphs <= 2


def test_training_and_new_parameters_make_no_new_graph():
    flow, backend = flow_of(), Counting()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    compiled = torch.compile(flow.log_prob, fullgraph=True, dynamic=True, backend=backend)
    for batch_size in BATCH_SIZES[:2]:
        data = torch.randn(batch_size, 5)
        compiled(data).mean().neg().backward()
        found = [p.grad.clone() for p in flow.parameters()]
        optimizer.zero_grad()
        flow.log_prob(data).mean().neg().backward()
        for one, parameter in zip(found, flow.parameters(), strict=True):
            assert_close(one, parameter.grad, 1e-4)
        optimizer.step()
        optimizer.zero_grad()
    assert backend.graphs == 1


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="no C++ compiler, which torch.compile needs on a CPU"
)
@torch.no_grad()
def test_compiled_machine_code_gives_the_same_density():
    flow = randomised(real_nvp(4, num_layers=2, hidden_dims=(4,))).float()
    compiled = torch.compile(flow._backward, fullgraph=True, dynamic=True)
    for batch_size in BATCH_SIZES:
        value = torch.randn(batch_size, 4)
        assert_same(compiled(value), flow._backward(value))


AOT = {"backend": "aot_eager"}  # the compiler but for its machine code
GRAPH = {"backend": "eager"}  # no more than its reading of the code


def small_flow():
    torch.manual_seed(0)
    return NormalizingFlow(real_nvp(4, num_layers=2, hidden_dims=(8,)), 4).double()


def fit_flow(flow, num_steps=20, **options):
    data = torch.randn(160, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 3
    call = {"num_steps": num_steps, "batch_size": 36, "seed": 0, "progress": False, **options}
    return fit_density(flow, data, **call)


def two_numbers(errors=(1.0, 2.0)):
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", 2):
        pyro.sample("y", dist.Normal(mean, scale + torch.tensor(errors)), obs=torch.tensor([1.0, 3.0]))


def fit_two_numbers(model=two_numbers, gradient="path", **options):
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = AutoRealNVP(model, num_layers=2, hidden_dims=(8,), gradient=gradient)
    call = {"num_steps": 20, "num_particles": 16, "evaluate_every": 100, "seed": 0, "progress": False, **options}
    return fit_guide(model, guide, **call), guide


def assert_same_weights(module, other):
    values, expected = module.state_dict(), other.state_dict()
    assert list(values) == list(expected)
    for name in values:
        assert_close(values[name], expected[name], 1e-8)


@pytest.fixture
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def _strict():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=RuntimeWarning)
        yield


@pytest.mark.usefixtures("_strict")
def test_compiled_fit_of_a_density_has_the_weights_of_an_eager_one(tmp_path):
    flow, other = small_flow(), small_flow()
    fit_flow(other)
    assert not counters["stats"]
    fit_flow(flow, compile=AOT)
    assert counters["stats"]["unique_graphs"] == 1
    assert_same_weights(flow, other)
    save(tmp_path / "flow.pt", flow)
    assert_same_weights(load(tmp_path / "flow.pt"), other)


@pytest.mark.usefixtures("_strict", "_float64")
@pytest.mark.parametrize("gradient", ["path", "total"])
def test_compiled_fit_of_a_guide_has_the_weights_of_an_eager_one(gradient):
    _, other = fit_two_numbers(gradient=gradient)
    _, guide = fit_two_numbers(gradient=gradient, compile=AOT if gradient == "path" else GRAPH, compile_model=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert_same_weights(guide, other)


@pytest.mark.parametrize("first, second", [(False, GRAPH), (GRAPH, False)], ids=["eager first", "compiled first"])
def test_a_fit_goes_on_from_a_checkpoint_of_the_other_kind(tmp_path, first, second):
    path, flow, other = tmp_path / "fit.ckpt", small_flow(), small_flow()
    fit_flow(other, optimizer=stops_at(100))
    with pytest.raises(_StoppedError):
        fit_flow(small_flow(), optimizer=stops_at(10), compile=first, checkpoint=path, every=5)
    fit_flow(flow, optimizer=stops_at(100), compile=second, checkpoint=path, every=5)
    assert counters["stats"]["unique_graphs"] == 1
    assert_same_weights(flow, other)


class _StoppedError(Exception):
    pass


def stops_at(num_steps):
    class AdamW(torch.optim.AdamW):
        def step(self, *args):
            if self.state and next(iter(self.state.values()))["step"] >= num_steps:
                raise _StoppedError
            return super().step(*args)

    return AdamW


def test_no_more_than_two_compilations_for_rows_of_many_numbers():
    """Loaders have a last batch that is shorter."""
    rows = torch.randn(100, 4, dtype=torch.float64)
    batches = [rows[:size] for size in (32, 32, 7, 20, 32, 11)]
    flow = small_flow()
    fit_density(flow, batches, validation=None, num_steps=12, compile=GRAPH, progress=False)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


def broken(graph, inputs):
    raise torch._inductor.exc.InductorError(RuntimeError("no C++ compiler"), None)


def wrong(graph, inputs):
    def run(*args):
        return tuple(value * 1.01 for value in graph.forward(*args))

    return run


@pytest.mark.parametrize("backend", [broken, wrong])
def test_fits_go_on_without_a_compiler_that_fails_or_is_wrong(backend):
    flow, other = small_flow(), small_flow()
    fit_flow(other)
    with pytest.warns(RuntimeWarning, match="goes on without torch.compile") as found:
        fit_flow(flow, compile={"backend": backend})
    assert len([w for w in found if w.category is RuntimeWarning]) == 1
    assert_same_weights(flow, other)


def test_a_compiled_flow_is_copied_and_saved_as_it_was(tmp_path):
    flow, rows = small_flow(), torch.randn(5, 4, dtype=torch.float64)
    expected, names = flow.log_prob(rows), list(flow.state_dict())
    flow.compile(fullgraph=True, **GRAPH)
    assert_close(flow.log_prob(rows), expected, 1e-12)
    assert counters["stats"]["unique_graphs"] == 1
    assert list(flow.state_dict()) == names
    save(tmp_path / "flow.pt", flow)
    for other in (copy.deepcopy(flow), load(tmp_path / "flow.pt")):
        other.raw_df.data.add_(1.0)
        assert not torch.equal(other.log_prob(rows), expected)
    assert_close(flow.log_prob(rows), expected, 1e-12)


def test_a_machine_without_a_compiler_gets_an_eager_fit(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/c++",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    with pytest.warns(RuntimeWarning, match="goes on without torch.compile"):
        fit_flow(small_flow(), num_steps=2, compile=True)


def density_of(model, nesting=0):
    guide = AutoDiagonalNormal(model)
    guide()
    return LatentDensity(model, guide, nesting=nesting)


def in_plain_words():
    return two_numbers()


def factored():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    matrix = torch.eye(2) + z[..., None] * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    pyro.factor("sum", torch.linalg.cholesky(matrix).sum((-2, -1)))  # finite also where the factorisation fails


MODELS = {"two numbers": (in_plain_words, 1), "one by one": (in_plain_words, None), "Cholesky": (factored, 0)}


@pytest.mark.usefixtures("_strict")
@pytest.mark.parametrize("model, nesting", MODELS.values(), ids=MODELS)
def test_a_recording_gives_what_the_model_gives(model, nesting):
    density = density_of(model, nesting)
    recorded, plain = RecordedDensity(density), density_of(model, nesting)
    for size, width in ((5, 0.1), (3, 0.1), (5, 0.1), (5, 0.1), (5, 0.1), (5, 0.1), (5, 2.0)):
        latents = width * torch.linspace(-1, 1, 2 * size).reshape(size, 2)
        for found, expected in zip(recorded.value_and_score(latents), plain.value_and_score(latents), strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_recording_spares_the_model():
    density = density_of(in_plain_words, 1)
    recorded = RecordedDensity(density)
    for _ in range(4):
        recorded.value_and_score(torch.randn(5, 2))
    before = density.num_runs
    for _ in range(10):
        recorded.value_and_score(torch.randn(5, 2))
    assert density.num_runs == before


def branches():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("far", -z.abs() if bool((z > 0.3).all()) else z * 0)


class Changes:
    def __init__(self, each_call=0.0):
        self.tilt, self.each_call = 0.0, each_call

    def __call__(self):
        self.tilt += self.each_call
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("call", z * self.tilt)


@pytest.mark.parametrize(
    "model", [branches, Changes(each_call=0.1)], ids=["branches on values", "changes from call to call"]
)
def test_a_model_that_can_not_be_recorded_runs_as_it_is(model):
    density = density_of(model)
    recorded = RecordedDensity(density)
    with pytest.warns(RuntimeWarning, match="runs as it is") as found:
        for _ in range(5):
            recorded.value_and_score(torch.randn(5, 1))
    assert len(found) == 1
    before = density.num_runs
    recorded.value_and_score(torch.randn(5, 1))
    assert density.num_runs == before + 1


def test_a_model_that_changes_later_is_found_out():
    model = Changes()
    recorded = RecordedDensity(density_of(model))
    for _ in range(10):
        recorded.value_and_score(torch.randn(5, 1))
    model.tilt = 1.0
    with pytest.warns(RuntimeWarning, match="changes from call to call"):
        for _ in range(490):
            recorded.value_and_score(torch.randn(5, 1))


def with_parameters():
    loc = pyro.param("loc", torch.tensor(0.0))
    pyro.sample("z", dist.Normal(loc, 1.0).expand([2]).to_event(1))


def test_a_loss_that_can_not_be_compiled_says_so():
    with pytest.warns(RuntimeWarning, match="nothing is compiled"):
        fit_two_numbers(with_parameters, num_steps=2, compile=AOT, compile_model=True)
