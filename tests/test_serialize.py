"""A saved flow comes back to the last bit in a fresh process, and what cannot be saved is refused by name."""

from __future__ import annotations

import json
import os
import pickletools
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from torch import Tensor, nn

import pyro_affine
from pyro_affine import serialize
from pyro_affine.compose import ComposeFlow, ConditionalComposeFlow
from pyro_affine.conditioners import ResidualMLP
from pyro_affine.coupling import AffineCoupling, affine_coupling
from pyro_affine.flows import NormalizingFlow, conditional_real_nvp, real_nvp
from pyro_affine.guides import AutoRealNVP
from pyro_affine.known_classes import register_class
from pyro_affine.linear import LowerTriangularAffine
from pyro_affine.masks import half_mask
from pyro_affine.scales import AdditiveScale, AtanScale, SigmoidScale, SoftplusScale
from pyro_affine.serialize import load, save

CONTEXT = torch.tensor([0.3, -1.0])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def fitted(flow: Any) -> Any:
    """With parameters that no constructor would give."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return flow


def standardized() -> NormalizingFlow:
    flow = NormalizingFlow(real_nvp(3, num_layers=4), 3)
    flow.standardize(torch.randn(20, 3) * 5 + 2)
    return flow


def shared_scale() -> ComposeFlow:
    scale = AtanScale(0.5, 3.0)
    masks = (half_mask(4), half_mask(4, keep_first=False))
    return ComposeFlow([AffineCoupling(mask, ResidualMLP(2, 2, 8), scale) for mask in masks])


def plain_and_ours() -> ComposeFlow:
    between = [T.AffineTransform(torch.randn(4), torch.rand(4) + 0.5).inv, T.permute(4), T.spline(4), T.TanhTransform()]
    return ComposeFlow([real_nvp(4, num_layers=2), *between, affine_coupling(4)])


FLOWS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "real_nvp": (lambda: real_nvp(4, num_layers=4, activation=nn.Tanh), (4,)),
    "real_nvp of one entry": (lambda: real_nvp(1), (1,)),
    "real_nvp of a matrix": (lambda: real_nvp((2, 3), num_layers=4), (2, 3)),
    "float64": (lambda: real_nvp(4, num_layers=4).double(), (4,)),
    "guarded": (lambda: real_nvp(4, num_layers=2, guard=True), (4,)),
    "inverse": (lambda: real_nvp(4, num_layers=4).inv, (4,)),
    "sigmoid": (lambda: real_nvp(4, num_layers=2, scale=SigmoidScale(0.01, 5.0)), (4,)),
    "softplus": (lambda: real_nvp(4, num_layers=2, scale=SoftplusScale()), (4,)),
    "additive": (lambda: real_nvp(4, num_layers=2, scale=AdditiveScale()), (4,)),
    "shared scale": (shared_scale, (4,)),
    "Pyro's and torch's": (plain_and_ours, (4,)),
    "dense": (lambda: LowerTriangularAffine(torch.randn(4)), (4,)),
    "coupling, no cache": (lambda: affine_coupling(4).with_cache(0), (4,)),
    "conditioned": (lambda: conditional_real_nvp(3, 2, num_layers=2).condition(CONTEXT), (3,)),
    "density": (standardized, (3,)),
}
CONDITIONAL: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "conditional": (lambda: conditional_real_nvp(3, 2, num_layers=4), (3,)),
    "conditional of one entry": (lambda: conditional_real_nvp(1, 2), (1,)),
    "conditional density": (lambda: NormalizingFlow(conditional_real_nvp(3, 2, num_layers=2), 3), (3,)),
    "conditional, Pyro's": (lambda: ConditionalComposeFlow([T.conditional_spline(3, 2), T.spline(3)]), (3,)),
}


def evaluate(flow: Any, x: Tensor, context: Tensor | None) -> list[Tensor]:
    """What a flow or density says of x."""
    with torch.no_grad():
        if hasattr(flow, "log_prob"):
            return [flow.log_prob(x, context)]
        flow = flow if context is None else flow.condition(context)
        y = flow(x)
        return [y, flow.log_abs_det_jacobian(x, y), flow.inv(y)]


IN_FRESH_PROCESS = """
import sys, torch, pyro_affine
from pyro_affine.serialize import load
torch.set_num_threads(1)
cases = torch.load(sys.argv[1], weights_only=True)
results = {}
for name, (path, x, context) in cases.items():
    flow = load(path)
    with torch.no_grad():
        if hasattr(flow, "log_prob"):
            results[name] = [flow.log_prob(x, context)]
            continue
        flow = flow if context is None else flow.condition(context)
        y = flow(x)
        results[name] = [y, flow.log_abs_det_jacobian(x, y), flow.inv(y)]
torch.save(results, sys.argv[2])
"""


def test_a_fresh_process_computes_the_same_bits(tmp_path: Path) -> None:
    cases, expected = {}, {}
    for index, (name, (make, shape)) in enumerate((FLOWS | CONDITIONAL).items()):
        flow = fitted(make())
        dtype = next(flow.parameters()).dtype
        x = torch.rand(5, *shape, dtype=dtype) - 0.5
        context = CONTEXT if name in CONDITIONAL else None
        expected[name] = evaluate(flow, x, context)  # before saving: what a call leaves behind must not be saved
        save(tmp_path / f"{index}.pt", flow)
        cases[name] = (str(tmp_path / f"{index}.pt"), x, context)
    torch.save(cases, tmp_path / "cases.pt")
    results = run_python(IN_FRESH_PROCESS, tmp_path / "cases.pt", tmp_path / "results.pt")
    for name, values in expected.items():
        same = [torch.equal(a, b) for a, b in zip(values, results[name], strict=True)]
        assert all(same) and values[0].isfinite().all(), (name, same)


def run_python(code: str, *paths: Path) -> Any:
    """What a fresh process that runs the code writes to the last of the paths."""
    folder = Path(pyro_affine.__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return torch.load(paths[-1], weights_only=True)


def again(flow: Any, folder: Path, **options: Any) -> Any:
    save(folder / "flow.pt", flow)
    return load(folder / "flow.pt", **options)


@pytest.mark.parametrize(("make", "shape"), (FLOWS | CONDITIONAL).values(), ids=FLOWS | CONDITIONAL)
def test_state_comes_back_whole(make: Callable[[], Any], shape: tuple[int, ...], tmp_path: Path) -> None:
    flow = fitted(make()).eval()
    parameters = list(flow.parameters())
    parameters[0].requires_grad_(False)
    loaded = again(flow, tmp_path)
    assert repr(loaded) == repr(flow) and type(loaded) is type(flow)
    assert not any(module.training for module in loaded.modules())
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in parameters]
    state, loaded_state = flow.state_dict(), loaded.state_dict()
    assert list(state) == list(loaded_state)
    assert all(torch.equal(a, loaded_state[name]) and a.dtype == loaded_state[name].dtype for name, a in state.items())
    assert [name for name, _ in loaded.named_buffers()] == [name for name, _ in flow.named_buffers()]
    for name in ("domain", "codomain", "event_shape", "batch_shape"):
        assert repr(getattr(loaded, name, None)) == repr(getattr(flow, name, None))


def test_what_is_shared_stays_shared(tmp_path: Path) -> None:
    first, second = again(shared_scale(), tmp_path).parts
    assert first.scale is second.scale and first.conditioner is not second.conditioner
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    loaded = again(tied, tmp_path)
    assert loaded[0].weight is loaded[1].weight and loaded[0].bias is not loaded[1].bias


def test_a_loaded_flow_is_a_whole_one(tmp_path: Path) -> None:
    flow = again(plain_and_ours(), tmp_path)
    x = torch.rand(5, 4) - 0.5
    assert flow.inv.inv is flow
    flow(x).sum().backward()
    assert all(p.grad is not None for p in flow.parameters() if p.requires_grad and p.dim() > 2)
    twice = again(flow, tmp_path).double()  # constants of plain transforms move with it
    assert twice(x.double()).dtype == torch.float64
    assert torch.allclose(twice(x.double()).float(), flow(x), atol=1e-5)


PYRO: dict[str, Callable[[], Any]] = {
    "affine autoregressive": lambda: T.affine_autoregressive(4, [8]),
    "stable affine autoregressive": lambda: T.affine_autoregressive(4, [8], stable=True),
    "batchnorm": lambda: T.batchnorm(4),
    "block autoregressive": lambda: T.block_autoregressive(4),
    "Cat": lambda: T.CatTransform([T.ExpTransform(), T.AffineTransform(1.0, 2.0)], -1, [2, 2]),
    "Compose": lambda: T.ComposeTransform([T.ExpTransform(), T.AffineTransform(torch.randn(4), 2.0)]),
    "ComposeTransformModule": lambda: T.ComposeTransformModule([T.planar(4), T.affine_autoregressive(4, [8])]),
    "cosine": T.DiscreteCosineTransform,
    "coupling": lambda: T.affine_coupling(4),
    "Haar": T.HaarTransform,
    "householder": lambda: T.householder(4, 2),
    "Independent": lambda: T.IndependentTransform(T.AffineTransform(torch.randn(4), torch.rand(4)), 1),
    "LowerCholeskyAffine": lambda: T.LowerCholeskyAffine(torch.randn(4), 2 * torch.eye(4)),
    "matrix exponential": lambda: T.matrix_exponential(4),
    "neural autoregressive": lambda: T.neural_autoregressive(4, [8]),
    "Ordered": T.OrderedTransform,
    "planar": lambda: T.planar(4),
    "polynomial": lambda: T.polynomial(4, [8]),
    "Power": lambda: T.PowerTransform(torch.tensor(3.0)),
    "radial": lambda: T.radial(4),
    "Reshape": lambda: T.ReshapeTransform((4,), (2, 2)),
    "Sigmoid, inverse": lambda: T.SigmoidTransform().inv,
    "spline coupling": lambda: T.spline_coupling(4),
    "spline, inverse": lambda: T.spline(4, order="quadratic").inv,
    "spline autoregressive": lambda: T.spline_autoregressive(4, [8]),
    "StickBreaking": T.StickBreakingTransform,
    "sylvester": lambda: T.sylvester(4),
}
PYRO_CONDITIONAL: dict[str, Callable[[], Any]] = {
    "affine autoregressive": lambda: T.conditional_affine_autoregressive(4, 2, [8]),
    "chain": lambda: dist.conditional.ConditionalComposeTransformModule([T.conditional_planar(4, 2), T.planar(4)]),
    "coupling": lambda: T.conditional_affine_coupling(4, 2),
    "householder": lambda: T.conditional_householder(4, 2),
    "inverse": lambda: T.conditional_spline(4, 2).inv,
    "matrix exponential": lambda: T.conditional_matrix_exponential(4, 2),
    "neural autoregressive": lambda: T.conditional_neural_autoregressive(4, 2, [8]),
    "radial": lambda: T.conditional_radial(4, 2),
    "spline autoregressive": lambda: T.conditional_spline_autoregressive(4, 2, [8]),
}


@pytest.mark.parametrize("make", PYRO.values(), ids=PYRO)
def test_transforms_of_pyro_and_torch(make: Callable[[], Any], tmp_path: Path) -> None:
    flow = ComposeFlow([make()])
    x = 0.1 + 0.8 * torch.rand(5, 4)
    with torch.no_grad():
        y, log_det = flow._forward(x)
        loaded_y, loaded_log_det = again(flow, tmp_path)._forward(x)
    assert torch.equal(y, loaded_y) and torch.equal(log_det, loaded_log_det)


@pytest.mark.parametrize("make", PYRO_CONDITIONAL.values(), ids=PYRO_CONDITIONAL)
def test_conditional_transforms_of_pyro(make: Callable[[], Any], tmp_path: Path) -> None:
    flow = ConditionalComposeFlow([make()])
    x = torch.rand(5, 4)
    with torch.no_grad():
        y = flow.condition(CONTEXT)(x)
        assert torch.equal(y, again(flow, tmp_path).condition(CONTEXT)(x))


PAST: dict[str, Callable[[], Any]] = {
    "flow": lambda: ComposeFlow([T.spline(4), T.affine_autoregressive(4, [8]), real_nvp(4, num_layers=2)]),
    "Pyro's": lambda: T.ComposeTransformModule([T.spline(4), T.planar(4), T.affine_autoregressive(4, [8])]),
}


@pytest.mark.parametrize("make", PAST.values(), ids=PAST)
@pytest.mark.parametrize("grad", [False, True])
def test_a_file_holds_no_past_values(make: Callable[[], Any], grad: bool, tmp_path: Path) -> None:
    flow = make()
    save(tmp_path / "before.pt", flow)
    with torch.set_grad_enabled(grad):
        x = torch.rand(1000, 4)
        flow.log_abs_det_jacobian(x, flow(x))
    save(tmp_path / "after.pt", flow)
    assert (tmp_path / "after.pt").stat().st_size < (tmp_path / "before.pt").stat().st_size + 1000


def test_a_file_holds_no_data_that_a_buffer_is_a_view_of(tmp_path: Path) -> None:
    flow = real_nvp(4, num_layers=2)
    flow.register_buffer("row", torch.rand(100_000, 4)[0])
    save(tmp_path / "flow.pt", flow)
    assert (tmp_path / "flow.pt").stat().st_size < 300_000
    assert torch.equal(load(tmp_path / "flow.pt").row, flow.row)


TENSORS: dict[str, Callable[[], Tensor]] = {
    "number": lambda: torch.tensor(3.0),
    "none": lambda: torch.zeros(0, 2),
    "boolean": lambda: torch.tensor([True, False]),
    "bfloat16": lambda: torch.rand(3).bfloat16(),
    "complex": lambda: torch.tensor([1 + 2j]),
    "one entry of stride 0": lambda: torch.rand(()).expand(1).clone(),
    "expanded": lambda: torch.rand(2).expand(3, 2),
    "transposed": lambda: torch.rand(3, 2).T,
    "not a number": lambda: torch.tensor([float("nan"), float("-inf"), -0.0]),
}


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_tensors_of_any_kind(make: Callable[[], Tensor], tmp_path: Path) -> None:
    flow = real_nvp(4, num_layers=2)
    flow.register_buffer("extra", make())
    loaded = again(flow, tmp_path).extra
    torch.testing.assert_close(loaded, flow.extra, rtol=0, atol=0, equal_nan=True)


PLAIN: dict[str, Any] = {
    "numbers": [1, -2.5, 1e-320, float("inf"), 10**30, True, None],
    "text": "\u00e4 \U0001f600",
    "containers": ({"a": (1, [2])}, {1: "x", (1, 2): 3}, frozenset({1, 2}), {"b"}),
    "ordered": OrderedDict(b=1, a=2),
    "torch's": [torch.Size([1, 2]), torch.float64, slice(1, None), nn.Tanh, torch.distributions.constraints.real],
}


@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN)
def test_plain_attributes(value: Any, tmp_path: Path) -> None:
    flow = real_nvp(4, num_layers=2)
    flow.extra = value
    loaded = again(flow, tmp_path).extra
    assert loaded == value and repr(loaded) == repr(value)


def test_a_compiled_flow_is_saved_without_its_machine_code(tmp_path: Path) -> None:
    flow = real_nvp(4, num_layers=2)
    flow._compiled_call_impl = flow._call_impl  # as Module.compile() does
    assert again(flow, tmp_path)._compiled_call_impl is None


def test_a_file_holds_no_code(tmp_path: Path) -> None:
    save(tmp_path / "flow.pt", NormalizingFlow(plain_and_ours(), 4))
    with zipfile.ZipFile(tmp_path / "flow.pt") as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    named = {argument for opcode, argument, _ in pickletools.genops(data) if opcode.name == "GLOBAL"}
    storages = {"torch FloatStorage", "torch LongStorage", "torch BoolStorage"}
    assert named <= {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"} | storages


def test_a_tool_can_read_a_file_without_this_package(tmp_path: Path) -> None:
    save(tmp_path / "flow.pt", real_nvp(4, num_layers=2, hidden_dims=(8,)))
    content = torch.load(tmp_path / "flow.pt", weights_only=True)
    assert content["written_by"]["pyro_affine"] == pyro_affine.__version__
    assert "flow.parts.0.conditioner.network.from_kept.weight" in content["tensors"]
    assert json.loads(content["tree"])["objects"][0]["class"] == "pyro_affine.compose.ComposeFlow"


def test_map_location(tmp_path: Path) -> None:
    flow = again(real_nvp(4, num_layers=2), tmp_path, map_location="meta")
    assert {t.device.type for t in (*flow.parameters(), *flow.buffers())} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_flow_on_a_gpu_comes_back_on_the_cpu(tmp_path: Path) -> None:
    flow = fitted(plain_and_ours())
    y = flow(torch.zeros(4))
    assert torch.equal(again(flow.cuda(), tmp_path)(torch.zeros(4)), y)


# ---- writing


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "flow.pt"
    save(path, real_nvp(2, num_layers=2))
    old = path.read_bytes()

    def refuse(*_: Any) -> None:
        Path(f"{path}.writing").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serialize, "_write_through", refuse)
    with pytest.raises(OSError, match="No space"):
        save(path, real_nvp(4))
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_no_folder_and_no_file_are_errors_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "nowhere" / "flow.pt", real_nvp(2, num_layers=2))
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.pt")


def with_hook() -> Any:
    flow = real_nvp(2, num_layers=2)
    flow.parts[0].register_forward_hook(lambda *_: None)
    return flow


class Unknown(nn.Module):
    """A network that nobody has registered."""

    def forward(self, kept: Tensor, context: Tensor | None = None) -> tuple[Tensor, None]:
        return kept, None


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "function": (
        lambda: AffineCoupling(half_mask(4), lambda kept: (kept, kept)),
        r"builtins.function at flow.conditioner; in place of a function use a Module",
    ),
    "function in Pyro's network": (
        lambda: T.AffineCoupling(2, pyro.nn.DenseNN(2, [8], [2, 2], nonlinearity=torch.tanh)),
        r"at flow.nn.f; in place of a function use a Module",
    ),
    "unknown class": (
        lambda: ComposeFlow([AffineCoupling(half_mask(4), Unknown(), AdditiveScale())]),
        r"test_serialize.Unknown at flow.parts.0.conditioner; .*register_class\(Unknown\)",
    ),
    "hook": (with_hook, r"hooks, got _forward_hooks at flow.parts.0; remove"),
    "lazy layer": (lambda: nn.Sequential(nn.LazyLinear(3)), r"LazyLinear at flow.0"),
    "sparse buffer": (lambda: sparse_buffer(), r"dense tensors and Parameters, got a Tensor at flow.table"),
    "conditioned flow of Pyro": (
        lambda: ComposeFlow([T.conditional_spline(3, 2).condition(CONTEXT)]),
        r"ConditionedSpline at flow.parts.0.transform; .*save the flow itself",
    ),
    "plain transform": (lambda: T.ExpTransform(), r"got a ExpTransform; put a plain transform into ComposeFlow"),
    "arguments in torch's order": (lambda: "flow.pt", r"save takes a path, then a flow"),
    "new guide": (lambda: AutoRealNVP(lambda: None), r"set up, got a new one; call guide\(\*args\) once"),
}


def sparse_buffer() -> Any:
    flow = real_nvp(2, num_layers=2)
    flow.register_buffer("table", torch.eye(3).to_sparse())
    return flow


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_saved_is_refused_by_name(make: Callable[[], Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        save(tmp_path / "flow.pt", make())
    assert list(tmp_path.iterdir()) == []


# ---- classes of the user


class Shift(nn.Module):
    """A conditioner of a user, with an activation kept as a class."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.activation = nn.Linear(2, 2), nn.Tanh

    def forward(self, kept: Tensor, context: Tensor | None = None) -> tuple[Tensor, None]:
        return self.activation()(self.layer(kept)), None


def test_a_registered_class_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_affine.known_classes._registered", {})
    flow = AffineCoupling(half_mask(4), Shift(), AdditiveScale())
    x = torch.rand(4)
    with pytest.raises(ValueError, match=r"register_class\(Shift\)"):
        save(tmp_path / "flow.pt", flow)
    assert register_class(Shift, "my.Shift") is Shift
    assert torch.equal(again(flow, tmp_path)(x), flow(x))
    monkeypatch.setattr("pyro_affine.known_classes._registered", {})
    with pytest.raises(ValueError, match=r"it names 'my.Shift'.*register_class\(the_class, 'my.Shift'\)"):
        load(tmp_path / "flow.pt")


def test_a_class_defined_again_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_affine.known_classes._registered", {})
    register_class(Shift, "my.Shift")
    save(tmp_path / "flow.pt", Shift())
    new = type("Shift", (Shift,), {})
    register_class(new, "my.Shift")
    assert type(load(tmp_path / "flow.pt")) is new


def test_only_classes_and_free_names_are_registered() -> None:
    with pytest.raises(ValueError, match="takes a class"):
        register_class(nn.Linear(2, 2))  # type: ignore[type-var]
    for taken in ("torch.nn.Linear", "pyro_affine.conditioners.MLP"):
        with pytest.raises(ValueError, match="name must be free"):
            register_class(Shift, taken)
