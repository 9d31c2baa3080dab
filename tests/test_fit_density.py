"""``fit_density``: it reaches known densities, takes data in any form, refuses bad data, and keeps the best weights."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import SigmoidTransform
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_affine.batches import LoaderBatches, RowBatches, RowCheck, Rows
from pyro_affine.compose import ComposeFlow
from pyro_affine.density_task import initialize_layers, layers
from pyro_affine.fit_density import fit_density
from pyro_affine.fit_result import FitResult, NonFiniteError
from pyro_affine.flows import NormalizingFlow, conditional_real_nvp, real_nvp
from pyro_affine.serialize import load, save
from pyro_affine.transform import FlowTransform

SHAPE_2D = torch.Size([2])


class Gaussian(nn.Module):
    """Diagonal Gaussian, its mean moved by the context where there is one."""

    def __init__(self, *event_shape: int, rate: float = 1.0) -> None:
        super().__init__()
        self.event_shape = torch.Size(event_shape)
        self.loc, self.log_scale = nn.Parameter(torch.zeros(event_shape)), nn.Parameter(torch.zeros(event_shape))
        self.slope = nn.Parameter(torch.zeros(event_shape))
        self.modes: list[bool] = []

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        self.modes.append(self.training)
        loc = self.loc if context is None else self.loc + self.slope * context
        terms = torch.distributions.Normal(loc, self.log_scale.exp()).log_prob(value)
        return terms.flatten(value.dim() - len(self.event_shape)).sum(-1)


def rows(num: int = 400, *event_shape: int, seed: int = 0) -> Tensor:
    return torch.randn(num, *(event_shape or (2,)), generator=torch.Generator().manual_seed(seed)) * 0.5 + 1


def fit(flow: nn.Module, data: Any, context: Any = None, **options: Any) -> FitResult:
    options = {"num_steps": 150, "learning_rate": 0.05, "batch_size": 100, "seed": 0, "progress": False, **options}
    return fit_density(flow, data, context, **options)


def small_flow(size: int = 2) -> NormalizingFlow:
    torch.manual_seed(0)
    return NormalizingFlow(real_nvp(size, num_layers=2, hidden_dims=(8,)), size)


# ---- it fits


def test_a_gaussian_is_recovered() -> None:
    flow, data = Gaussian(2), rows(2000)
    result = fit(flow, data, validation=rows(2000, seed=1), num_steps=200)
    torch.testing.assert_close(flow.loc.detach(), data.mean(0), atol=0.15, rtol=0)
    torch.testing.assert_close(flow.log_scale.detach().exp(), data.std(0), atol=0.05, rtol=0)
    entropy = 2 * (math.log(0.5) + 0.5 * math.log(2 * math.pi * math.e))
    assert result.best == pytest.approx(-entropy, abs=0.06)
    assert result.best_error == pytest.approx(1 / math.sqrt(2000), rel=0.2)


def test_a_flow_learns_a_curved_density_in_the_units_of_the_data() -> None:
    x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    noise = 0.3 * torch.randn(2000, 1, generator=torch.Generator().manual_seed(1))
    data = torch.cat([x, x**2 + noise], -1) * torch.tensor([1000.0, 0.01]) + torch.tensor([5e4, 3.0])
    flow = small_flow()
    result = fit(flow, data, num_steps=400, learning_rate=0.01, batch_size=256)
    truth = -2 * 0.5 * math.log(2 * math.pi * math.e) - math.log(0.3) - math.log(1000 * 0.01)
    gaussian = torch.distributions.MultivariateNormal(data.mean(0), data.T.cov()).log_prob(data).mean().item()
    assert gaussian + 0.5 < result.best < truth + 0.15


def test_units_come_from_the_training_rows_and_can_be_left_alone() -> None:
    data = rows(100) * 7
    fit(flow := small_flow(), data, validation=None, num_steps=1)
    layer = flow.chain.parts[-1]
    torch.testing.assert_close(layer.loc, data.mean(0))
    torch.testing.assert_close(layer.scale, data.std(0))
    fit(flow := small_flow(), data, num_steps=1, standardize=False)
    assert flow.chain.parts[-1].scale.tolist() == [1.0, 1.0]


def test_a_flag_says_that_a_flow_has_units() -> None:
    class Units(Gaussian):
        stored, standardized = 0, False

        def standardize(self, rows: Tensor) -> None:
            self.stored += 1

    fit(flow := Units(2), rows(), num_steps=1)
    stored, flow.standardized = flow.stored, True
    fit(flow, rows(), num_steps=1)
    assert flow.stored == stored > 0


# ---- one fit after the other


def bent(num_rows: int, seed: int = 0) -> Tensor:
    x = torch.randn(num_rows, 2, generator=torch.Generator().manual_seed(seed))
    return torch.stack([x[:, 0].exp(), x[:, 1] + x[:, 0] ** 2], -1)


def loaded(flow: NormalizingFlow, folder: Path) -> NormalizingFlow:
    save(folder / "flow.pt", flow)
    return load(folder / "flow.pt")  # type: ignore[no-any-return]


def with_its_state(flow: NormalizingFlow, folder: Path) -> NormalizingFlow:
    other = small_flow()
    other.load_state_dict(flow.state_dict())
    return other


KEPT: dict[str, Any] = {
    "the flow itself": lambda flow, folder: flow,
    "a copy": lambda flow, folder: copy.deepcopy(flow),
    "saved and loaded": loaded,
    "a state_dict": with_its_state,
}


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
def test_a_second_fit_goes_on_from_the_weights_and_units_of_the_first(keep: Any, tmp_path: Path) -> None:
    fit(flow := small_flow(), bent(500), num_steps=60)
    before = flow.log_prob(bent(100, seed=1)).detach()
    again = keep(flow, tmp_path)
    fit(again, 3 * bent(50, seed=2) + 1, num_steps=1, learning_rate=1e-9)
    torch.testing.assert_close(again.log_prob(bent(100, seed=1)), before, atol=1e-3, rtol=0)


def test_units_of_an_earlier_standardize_are_not_those_of_a_fit() -> None:
    flow, plain = small_flow(), small_flow()
    flow.standardize(bent(50, seed=1))
    assert not flow.standardized
    for each in (flow, plain):
        fit(each, bent(200), num_steps=1)
        assert each.standardized
    assert all(torch.equal(p, q) for p, q in zip(flow.buffers(), plain.buffers(), strict=True))


class Interrupted(NormalizingFlow):
    """Once, shortly before its end, when little is left to be learnt."""

    steps = 0

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        self.steps += self.training and torch.is_grad_enabled()
        if self.steps == 27 and torch.is_grad_enabled():
            raise KeyboardInterrupt
        return super().log_prob(value, context)


@pytest.mark.parametrize(("make", "keeps_start"), [(rows, True), (bent, False)], ids=["start", "trained"])
def test_the_same_flow_goes_on_where_it_was_interrupted(make: Any, keeps_start: bool, tmp_path: Path) -> None:
    """Where the start is kept it is that of the first call, not what was trained when the second one began."""
    torch.manual_seed(0)
    flow = Interrupted(real_nvp(2, num_layers=2, hidden_dims=(8,)), 2)
    options = {"num_steps": 30, "learning_rate": 0.01, "every": 7, "checkpoint": tmp_path / "fit.ckpt"}
    assert fit(flow, make(200), **options).reason == "interrupted"
    resumed = fit(flow, make(200), **options)
    whole = fit(other := small_flow(), make(200), **(options | {"checkpoint": None}))
    assert resumed.chosen == whole.chosen and (whole.chosen == "start") == keeps_start
    assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(flow.buffers(), other.buffers(), strict=True))


def test_context_is_used_and_split_with_its_rows() -> None:
    context = torch.randn(500, 2, generator=torch.Generator().manual_seed(3))
    flow = Gaussian(2)
    fit(flow, rows(500) + 3 * context, context, num_steps=300)
    torch.testing.assert_close(flow.slope.detach(), torch.full((2,), 3.0), atol=0.15, rtol=0)


def test_a_conditional_flow() -> None:
    torch.manual_seed(0)
    flow = NormalizingFlow(conditional_real_nvp(2, 1, num_layers=2, hidden_dims=(8,)), 2)
    context = torch.randn(300, 1)
    result = fit(flow, rows(300) + context, context, num_steps=60, learning_rate=0.01)
    assert result.validation_losses[-1] < result.losses[0]


def test_flow_trains_in_training_mode_scores_in_evaluation_mode_and_comes_back_as_it_was() -> None:
    flow = Gaussian(2).eval()
    fit(flow, rows(), num_steps=5)
    assert not flow.training
    assert flow.modes.count(True) == 5 and flow.modes[-1] is False
    with pytest.raises(ValueError, match="must be finite"):
        fit(flow, rows() * math.nan)
    assert not flow.training


# ---- data in any form


def loader_of(*tensors: Tensor, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), batch_size=100, **options)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(rows())


FORMS: dict[str, Any] = {
    "tensor": lambda: rows(),
    "array": lambda: rows().numpy(),
    "read-only array": lambda: np.frombuffer(rows().numpy().tobytes(), np.float32).reshape(-1, 2),
    "loader of tuples": lambda: loader_of(rows(), shuffle=True),
    "loader of tensors": lambda: DataLoader(rows(), batch_size=64),
    "loader without a length": lambda: DataLoader(Stream(), batch_size=64),
    "list of batches": lambda: list(rows().split(100)),
}


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_data_in_any_form(make: Any) -> None:
    flow = Gaussian(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(flow, make(), validation=None)
    assert result.reason == "num_steps"
    torch.testing.assert_close(flow.loc.detach(), rows().mean(0), atol=0.06, rtol=0)


def test_a_loader_of_pairs() -> None:
    context = torch.randn(400, 2, generator=torch.Generator().manual_seed(3))
    flow = Gaussian(2)
    fit(
        flow,
        loader_of(rows() + 3 * context, context, shuffle=True),
        validation=(rows() + 3 * context, context),
        num_steps=300,
    )
    torch.testing.assert_close(flow.slope.detach(), torch.full((2,), 3.0), atol=0.2, rtol=0)


VALIDATIONS: dict[str, Any] = {
    "share": (0.25, True),
    "tensor": (rows(50, seed=1), True),
    "array": (rows(50, seed=1).numpy(), True),
    "loader": (loader_of(rows(50, seed=1)), True),
    "none": (None, False),
    "zero": (0.0, False),
}


@pytest.mark.parametrize(("validation", "scored"), VALIDATIONS.values(), ids=VALIDATIONS)
def test_validation_in_any_form(validation: Any, scored: bool) -> None:
    result = fit(Gaussian(2), rows(), validation=validation, num_steps=200)
    assert result.validation_steps == (list(range(0, 201, 20)) if scored else [])
    assert math.isfinite(result.best)


def test_a_share_of_a_loader_is_not_held_out_and_that_is_said() -> None:
    with pytest.warns(UserWarning, match="a share of a loader cannot be held out"):
        result = fit(Gaussian(2), loader_of(rows()))
    assert result.validation_losses == []


def test_every_row_is_met_once_an_epoch_in_a_new_order() -> None:
    data = Rows(torch.arange(1000.0)[:, None])
    batches = RowBatches(data, torch.arange(0, 1000, 2), batch_size=120, seed=0)
    assert batches.per_epoch == 5
    epochs = [[batches.next().value[:, 0] for _ in range(5)] for _ in range(2)]
    assert [len(batch) for batch in epochs[0]] == [100] * 5
    first, second = torch.cat(epochs[0]), torch.cat(epochs[1])
    assert torch.equal(first.sort().values, torch.arange(0.0, 1000.0, 2.0))
    assert torch.equal(first.sort().values, second.sort().values) and not torch.equal(first, second)


def test_held_out_rows_are_not_trained_on() -> None:
    data = torch.arange(100.0)[:, None]
    seen: set[float] = set()

    class Spy(Gaussian):
        def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
            if self.training and torch.is_grad_enabled():
                seen.update(value[:, 0].tolist())
            elif not self.training:
                scored.update(value[:, 0].tolist())
            return super().log_prob(value, context)

    scored: set[float] = set()
    fit(Spy(1), data, num_steps=100, batch_size=30)
    assert len(scored) == 10 and len(seen) == 90 and not scored & seen


# ---- budgets, patience, what is shown


def test_epochs_are_turned_into_steps() -> None:
    assert fit(Gaussian(2), rows(400), validation=0.25, num_steps=None, num_epochs=4, batch_size=100).num_steps == 12
    assert fit(Gaussian(2), rows(400), num_steps=7, num_epochs=400).num_steps == 7
    with pytest.raises(ValueError, match="num_epochs needs a loader with a length"):
        fit(Gaussian(2), DataLoader(Stream(), batch_size=64), validation=None, num_epochs=1)


def test_budget_in_seconds() -> None:
    result = fit(Gaussian(2), rows(), num_steps=None, seconds=0.2, patience=10**6)
    assert result.reason == "seconds" and result.times[-1] >= 0.1


def test_it_just_works_without_arguments_and_stops_by_patience() -> None:
    flow = Gaussian(2)
    data = rows() * 2 - 1.8
    result = fit_density(flow, data, patience=2)
    assert result.reason == "patience" and result.num_steps < 10_000
    torch.testing.assert_close(flow.loc.detach(), data.mean(0), atol=0.15, rtol=0)


class Memory(nn.Module):
    """A density that overfits its training rows: a mixture with a narrow kernel at each of some points."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(20, 1, generator=torch.Generator().manual_seed(5)))
        self.log_scale = nn.Parameter(torch.zeros(20))

    def log_prob(self, value: Tensor) -> Tensor:
        kernels = torch.distributions.Normal(self.points[:, 0], self.log_scale.exp())
        return kernels.log_prob(value).logsumexp(-1) - math.log(20)


def test_patience_brings_the_best_weights_back() -> None:
    data, others = rows(20, 1), rows(500, 1, seed=1)
    flow = Memory()
    result = fit(flow, data, validation=others, num_steps=5000, patience=3, batch_size=20)
    assert result.reason == "patience" and result.num_steps < 5000
    assert -result.best == pytest.approx(min(result.validation_losses), abs=0.02)
    assert -result.best < result.validation_losses[-1] + 1e-6
    with torch.no_grad():
        assert flow.log_prob(others).mean().item() == pytest.approx(result.best, abs=1e-5)


def test_images_are_reported_in_bits_per_dim(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_affine.progress._is_watched", lambda: True)
    result = fit(Gaussian(1, 4, 4), rows(100, 1, 4, 4), num_steps=120, progress=True)
    assert result.bits_per_dim == pytest.approx(-result.best / (16 * math.log(2)))
    assert "bits per dim" in str(result)
    shown = capsys.readouterr().err
    assert "bits/dim" in shown and "held out" in shown
    assert fit(Gaussian(2), rows(), num_steps=3).bits_per_dim is None


def test_a_seed_makes_the_fit_reproducible_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    losses = [fit(Gaussian(2), rows(), seed=seed).losses for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), state)


# ---- layers that start from data


class Start(FlowTransform):
    """y = scale * x + loc with loc and scale from the first data."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__((2,))
        self.loc, self.scale, self.factor = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2)), factor
        self.initialized, self.seen = False, torch.zeros(0)

    def initialize(self, y: Tensor) -> None:
        self.loc.copy_(y.mean(0))
        self.scale.copy_(y.std(0) * self.factor)
        self.initialized, self.seen = True, y

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.scale + self.loc, self.scale.log().sum().expand(x.shape[:-1])

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return (y - self.loc) / self.scale, self.scale.log().sum().expand(y.shape[:-1])


def test_layers_are_initialised_with_the_rows_as_they_arrive() -> None:
    first, second = Start(), Start(factor=0.5)
    flow = NormalizingFlow(ComposeFlow([first, ComposeFlow([second])]), 2, curves=0, whiten=False)
    data = rows(300) * 10
    initialize_layers(flow, Rows(data))
    assert torch.equal(second.seen, data)
    torch.testing.assert_close(first.seen.std(0), torch.full((2,), 2.0))
    torch.testing.assert_close(first.loc.detach(), torch.zeros(2), atol=1e-5, rtol=0)
    kept = first.seen
    initialize_layers(flow, Rows(data + 1))
    assert first.seen is kept


def test_fit_initialises_layers() -> None:
    flow = NormalizingFlow(ComposeFlow([layer := Start()]), 2)
    fit(flow, rows(), num_steps=2)
    assert layer.initialized


def test_layers_of_a_conditional_flow_are_found() -> None:
    flow = NormalizingFlow(conditional_real_nvp(2, 1, num_layers=2), 2)
    assert len(layers(flow, torch.zeros(1))) == 3
    assert layers(Gaussian(2)) == []


# ---- what goes wrong


def broken(make: Any) -> Any:
    data = rows()
    make(data)
    return data


BAD_DATA: dict[str, tuple[Any, str]] = {
    "NaN row": (
        lambda: broken(lambda x: x[7, 1].fill_(math.nan)),
        "must be finite, got NaN or inf in 1 of 400 rows, first in row 7",
    ),
    "infinite rows": (lambda: broken(lambda x: x[3:5].fill_(math.inf)), "in 2 of 400 rows, first in row 3"),
    "wrong width": (lambda: rows(400, 3), r"must have shape \(N,\) \+ \(2,\), got \(400, 3\)"),
    "one event": (lambda: rows()[0], r"must have shape \(N,\) \+ \(2,\), got \(2,\)"),
    "scalar": (lambda: torch.tensor(1.0), "must have shape"),
    "integers": (lambda: torch.ones(400, 2, dtype=torch.long), "must have the dtype of the flow, float32, got int64"),
    "bytes": (lambda: np.ones((400, 2), np.uint8), "got uint8; .*add uniform noise"),
    "float64": (lambda: rows().double(), "float32, got float64; convert it with torch.as_tensor"),
    "float64 array": (lambda: rows().double().numpy(), "float32, got float64"),
    "too few": (lambda: rows(2), "must have 2 rows to train on and 2 to hold out"),
    "too few to hold out two": (lambda: rows(7), "got 7 in all; give more rows, a larger share such as .*, or val"),
    "a generator": (lambda: iter(rows().split(100)), "gone through only once"),
    "a number": (lambda: 3, "must be a tensor, a NumPy array or a DataLoader, got int"),
    "an empty loader": (lambda: [], "must yield batches, got none"),
    "a loader of triples": (lambda: [(rows(), rows(), rows())], "got 3 tensors a batch"),
    "a loader with a NaN": (lambda: [rows(), rows() * math.nan], "batch 2 of the loader must be finite"),
    "a loader of lists": (lambda: [[[1.0, 2.0]]], "must be a tensor or NumPy array, got list"),
}


@pytest.mark.filterwarnings("ignore:a share of a loader")
@pytest.mark.parametrize(("make", "words"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_are_refused_in_words(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(Gaussian(2), make())


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "validation above 1": ({"validation": 1.5}, "validation must be a share"),
    "validation of another shape": ({"validation": rows(9, 3)}, r"validation must have shape \(N,\) \+ \(2,\)"),
    "validation with NaN": ({"validation": rows() * math.nan}, "validation must be finite"),
    "context too short": ({"context": rows(399)}, "must have a row each, got 400 and 399 rows"),
    "context with NaN": ({"context": rows() * math.nan}, "context of data must be finite"),
    "validation of one row": ({"validation": rows(1)}, "validation must hold 2 rows at least, got 1; give more"),
    "batch size 0": ({"batch_size": 0}, "batch_size must be at least 1"),
    "no steps": ({"num_steps": 0}, "num_steps must be positive"),
    "rate 0": ({"learning_rate": 0.0}, "learning_rate must be positive"),
}


@pytest.mark.parametrize(("options", "words"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_refused_in_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(Gaussian(2), rows(), **options)


SUPPORTS: dict[str, Any] = {
    "a unit interval": (lambda: ComposeFlow([real_nvp(2), SigmoidTransform()]), rows(50) + 20, r"Interval\(.*from 1\d"),
    "images": (lambda: real_nvp((1, 4, 4), num_layers=4), 255 * torch.rand(50, 1, 4, 4), "to 25.*bytes.*dequantize"),
}


@pytest.mark.parametrize(("make", "data", "words"), SUPPORTS.values(), ids=SUPPORTS)
def test_data_outside_the_support_are_refused(make: Any, data: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match="data must lie in the support of the flow, .*" + words):
        fit(NormalizingFlow(make(), data.shape[1:]), data)


@pytest.mark.parametrize("frame_is", ["data", "validation"])
def test_frames_are_refused_before_anything_is_said_of_loaders(frame_is: str) -> None:
    frame = pytest.importorskip("pandas").DataFrame(rows().numpy())
    given = {"data": rows(), frame_is: frame}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"rows must be a tensor or an array, got DataFrame; .* TableDensity"):
            fit(Gaussian(2), **given)


def test_what_is_no_density_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a Module with log_prob .* wrap a transform in NormalizingFlow"):
        fit(nn.Linear(2, 2), rows())
    with pytest.raises(ValueError, match="a conditional flow needs a context"):
        fit(NormalizingFlow(conditional_real_nvp(2, 1), 2), rows())
    elementwise = Gaussian()
    elementwise.event_shape = torch.Size([2])
    elementwise.log_prob = lambda value: -(value**2) * elementwise.loc  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"one value for each row, got shape \(2, 2\)"):
        fit(elementwise, rows())


class Bursting(FlowTransform):
    """The identity, until its nth call with a graph."""

    def __init__(self, call: int) -> None:
        super().__init__((2,))
        self.loc, self.calls, self.call = nn.Parameter(torch.zeros(2)), 0, call

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.loc, x.new_zeros(x.shape[:-1])

    def _backward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += torch.is_grad_enabled()
        x = y - self.loc if self.calls < self.call else y * math.nan + self.loc
        return x, y.new_zeros(y.shape[:-1])


@pytest.mark.filterwarnings("ignore:20 steps in a row:RuntimeWarning")
def test_the_layer_that_is_not_finite_is_named_and_nothing_is_lost() -> None:
    flow = NormalizingFlow(ComposeFlow([Start(), Bursting(200), Start()]), 2)
    with pytest.raises(NonFiniteError, match=r"the value of chain\.parts\[0\]\.parts\[1\] \(Bursting\)") as error:
        fit(flow, rows(), num_steps=1000)
    result = error.value.result
    assert result.num_steps == 259 and "AtanScale" in str(error.value)
    assert all(torch.isfinite(p).all() for p in flow.parameters())


# ---- resuming in one process


@pytest.mark.parametrize("shuffle", ["rows", "loader", "loader with a generator"])
def test_an_interrupted_fit_goes_on_to_the_same_weights(shuffle: str, tmp_path: Path) -> None:
    def data() -> Any:
        if shuffle == "rows":
            return rows()
        generator = torch.Generator().manual_seed(9) if "generator" in shuffle else None
        return loader_of(rows(), shuffle=True, generator=generator)

    class Interrupted(Gaussian):
        calls = 0

        def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
            self.calls += torch.is_grad_enabled() and self.training
            if self.calls == 39 and self.training:
                raise KeyboardInterrupt
            return super().log_prob(value, context)

    options = {"num_steps": 60, "every": 11, "validation": rows(40, seed=1)}
    whole = fit(expected := Gaussian(2), data(), **options)
    path = tmp_path / "fit.ckpt"
    broken = fit(Interrupted(2), data(), checkpoint=path, **options)
    assert broken.reason == "interrupted" and broken.num_steps in (37, 38)
    resumed = fit(flow := Gaussian(2), data(), checkpoint=path, **options)
    assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), expected.parameters(), strict=True))
    assert resumed.losses == whole.losses and resumed.best == whole.best


def test_without_a_seed_a_resumed_fit_holds_out_the_same_rows(tmp_path: Path) -> None:
    path = tmp_path / "fit.ckpt"
    first = fit(Gaussian(2), rows(), checkpoint=path, seed=None)
    torch.rand(5)
    assert fit(Gaussian(2), rows(), checkpoint=path, seed=None).best == first.best


def test_other_arguments_than_those_of_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.ckpt"
    fit(Gaussian(2), rows(), checkpoint=path)
    with pytest.raises(ValueError, match="batch_size: 100 in the file, 50 here"):
        fit(Gaussian(2), rows(), checkpoint=path, batch_size=50)
    with pytest.raises(ValueError, match=r"rows: \(400, 2\) in the file, \(401, 2\) here"):
        fit(Gaussian(2), rows(401), checkpoint=path)
    with pytest.raises(ValueError, match=r"learning_rate: \S+ in the file, 0\.5 here"):
        fit(Gaussian(2), rows(), checkpoint=path, learning_rate=0.5)


def test_a_loader_is_resumed_in_the_middle_of_an_epoch() -> None:
    check = RowCheck(SHAPE_2D, torch.float32)
    torch.manual_seed(0)
    batches = LoaderBatches(loader_of(rows(), shuffle=True), check)
    for _ in range(6):
        batches.next()
    state, random_state = batches.state_dict(), torch.get_rng_state()
    expected = [batches.next().value for _ in range(5)]
    torch.manual_seed(5)
    again = LoaderBatches(loader_of(rows(), shuffle=True), check)
    again.load_state_dict(state)
    torch.set_rng_state(random_state)
    assert all(torch.equal(again.next().value, batch) for batch in expected)
