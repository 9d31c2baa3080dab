"""Tables: exact densities for each kind of column, names and types kept, refusals in words."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from pyro_affine.columns import TableDensity
from pyro_affine.flows import NormalizingFlow, real_nvp

pandas = pytest.importorskip("pandas")

KINDS = {
    "real": ("real", -30.0, 30.0),
    "positive": ("positive", 1e-9, 200.0),
    "bounded": (("bounded", -1.0, 3.0), -1.0, 3.0),
    "circular": (("circular", 360.0), 0.0, 360.0),
}


def shaken(columns: dict[str, object]) -> TableDensity:
    torch.manual_seed(0)
    size = len(columns)
    density = TableDensity(columns, NormalizingFlow(real_nvp(size, num_layers=2, hidden_dims=(8,)), size))
    for parameter in density.flow.transform.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return density


@pytest.mark.parametrize("kind, low, high", KINDS.values(), ids=KINDS)
def test_the_density_of_a_row_integrates_to_one(kind: object, low: float, high: float) -> None:
    density = shaken({"y": kind, "z": "real"})
    density.cuts[0] = 100.0 if "circular" in kind else 0.0
    edges = torch.linspace(low, high, 401, dtype=torch.float64)
    if kind == "positive":
        edges = torch.logspace(-4, 4, 401, dtype=torch.float64)
    middle, width = (edges[1:] + edges[:-1]) / 2, edges.diff()
    z = torch.linspace(-12, 12, 121, dtype=torch.float64)
    grid = torch.cartesian_prod(middle, z)
    weights = torch.cartesian_prod(width, torch.full_like(z, 0.2)).prod(-1)
    frame = pandas.DataFrame({"z": grid[:, 1].numpy(), "y": grid[:, 0].numpy()})  # the order of the frame is free
    assert float((density.log_prob(frame).exp() * weights).sum()) == pytest.approx(1.0, abs=5e-3)


def test_integers_have_probabilities_that_sum_to_one() -> None:
    density = shaken({"count": "integer", "z": "real"})
    counts, z = torch.arange(-15, 15), torch.linspace(-12, 12, 121)
    grid = torch.cartesian_prod(counts.double(), z.double())
    frame = pandas.DataFrame({"count": grid[:, 0].long().numpy(), "z": grid[:, 1].numpy()})
    assert float((density.log_prob(frame, num_draws=64).exp() * 0.2).sum()) == pytest.approx(1.0, abs=0.02)


def table(num_rows: int) -> object:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, 5, generator=generator, dtype=torch.float64)
    return pandas.DataFrame(
        {
            "real": (x[:, 0] + x[:, 1]).numpy(),
            "positive": x[:, 1].exp().numpy(),
            "bounded": torch.sigmoid(x[:, 2] + x[:, 1]).mul(4).sub(1).numpy(),
            "circular": ((x[:, 3] * 40) % 360).numpy(),  # around 0, so that a cut at 0 would be the worst
            "integer": (x[:, 4] * 3).round().long().numpy(),
        }
    )


def test_a_frame_goes_in_and_one_like_it_comes_out() -> None:
    frame = table(600)
    density = TableDensity({**{name: kind for name, (kind, *_) in KINDS.items()}, "integer": "integer"})
    density.fit(frame, num_steps=20, seed=0, progress=False)
    drawn = density.sample(2000)
    assert list(drawn.columns) == list(density.columns) and drawn["integer"].dtype == "int64"
    assert (
        drawn["positive"].min() > 0
        and drawn["bounded"].between(-1, 3).all()
        and drawn["circular"].between(0, 360).all()
    )
    assert math.isclose(drawn["integer"].mean(), frame["integer"].mean(), abs_tol=0.5)
    angle = torch.tensor(drawn["circular"].to_numpy()).deg2rad()
    assert angle.cos().mean() == pytest.approx(math.exp(-(math.radians(40) ** 2) / 2), abs=0.08)
    assert 90 < float(density.cuts[3]) < 270  # cut where the rows are rarest
    assert torch.isfinite(density.log_prob(frame)).all()


def test_a_seed_makes_a_fit_with_integers_repeatable() -> None:
    first, again = (TableDensity({"y": "integer"}) for _ in range(2))
    again.load_state_dict(first.state_dict())
    frame = pandas.DataFrame({"y": [0, 1, 1, 2, 5] * 20})
    scores = [density.fit(frame, num_steps=3, seed=1, progress=False).best for density in (first, again)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("on_disk", [(), ("train",), ("valid",), ("train", "valid")], ids=str)
def test_validation_is_read_by_the_names_and_kinds_of_columns(on_disk: tuple[str, ...], tmp_path: Path) -> None:
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frame = pandas.DataFrame({"income": (10.8 + 0.3 * x[:, 0]).exp().numpy(), "age": (40 + x[:, 1]).numpy()})
    valid = frame[["age", "income"]][200:]
    given = {"train": frame[:200], "valid": valid}
    for name in on_disk:
        pytest.importorskip("pyarrow")
        given[name].to_parquet(tmp_path / f"{name}.parquet")
        given[name] = tmp_path / f"{name}.parquet"
    density = TableDensity({"income": "positive", "age": "real"})
    fit = density.fit(given["train"], validation=given["valid"], num_steps=2, seed=0, progress=False)
    score_of_u = density.log_prob(valid) + torch.as_tensor(valid["income"].to_numpy(copy=True)).log()
    assert fit.best == pytest.approx(float(score_of_u.mean()), abs=1e-3)


def seconds(num_rows: int, kind: str) -> object:
    """Times within an hour, in seconds since 1970: in float32 these are multiples of 128."""
    hour = 3600 * torch.rand(num_rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return pandas.DataFrame({"time": (1.7e9 + (hour.round() if kind == "integer" else hour)).numpy()})


@pytest.mark.parametrize("kind", ["real", "integer"])
def test_values_far_from_zero_keep_their_digits(kind: str) -> None:
    frame, density = seconds(400, kind), TableDensity({"time": kind})
    density.fit(frame, num_steps=2, seed=0, progress=False)
    drawn, scores = density.sample(1000)["time"], density.log_prob(frame[:50], num_draws=1)
    assert drawn.nunique() > 700 and abs(drawn.median() - 1.7e9 - 1800) < 600
    assert len(scores.unique()) > 45


@pytest.mark.parametrize("kind", ["real", ("circular", 1e5)])
def test_a_second_fit_leaves_the_cuts_where_they_were(kind: object) -> None:
    frame, density = seconds(400, "real"), TableDensity({"time": kind})
    density.fit(frame, num_steps=2, seed=0, progress=False)
    before, scores = density.cuts.clone(), density.log_prob(frame)
    density.fit(frame + 40_000.0, num_steps=1, learning_rate=1e-9, seed=0, progress=False)
    assert torch.equal(density.cuts, before) and before.abs() > 0
    torch.testing.assert_close(density.log_prob(frame), scores, atol=1e-3, rtol=0)


def test_it_is_a_distribution_for_pyro() -> None:
    density = shaken({"y": "positive", "z": "real"})
    rows = density().sample((7,))
    frame = pandas.DataFrame(rows.numpy(), columns=["y", "z"])
    assert density().event_shape == (2,) and (rows[:, 0] > 0).all()
    assert torch.allclose(density().log_prob(rows).double(), density.log_prob(frame).double(), atol=1e-4)


REFUSED = {
    "unknown kind": (lambda: TableDensity({"a": "count"}), "kind of column 'a' must be"),
    "bounds in the wrong order": (lambda: TableDensity({"a": ("bounded", 1, 0)}), "low < high"),
    "no column": (lambda: TableDensity({}), "one column at least"),
    "flow of another size": (lambda: TableDensity({"a": "real"}, NormalizingFlow(real_nvp(2), 2)), "1 entries"),
    "missing column": (lambda: log_prob("real", {"b": [1.0, 2.0]}), r"without \['a'\]"),
    "at the bound": (lambda: log_prob(("bounded", 0, 1), {"a": [0.5, 1.0]}), "got 1.0 and 0 more"),
    "not positive": (lambda: log_prob("positive", {"a": [0.5, -1.0]}), "got -1.0"),
    "not an integer": (lambda: log_prob("integer", {"a": [0.5, -1.0]}), "got 0.5"),
    "not finite": (lambda: log_prob("real", {"a": [math.nan, -1.0]}), "got nan"),
    "text": (lambda: log_prob("real", {"a": ["red", "blue"]}), r"must hold numbers, got \w+ in \['a'\]"),
    "validation without names": (
        lambda: TableDensity({"a": "real"}).fit(pandas.DataFrame({"a": [1.0] * 20}), validation=torch.ones(9, 1)),
        r"must be a DataFrame with the columns \['a'\], got Tensor",
    ),
}  # fmt: skip


def log_prob(kind: object, values: dict[str, list[float]]) -> object:
    return TableDensity({"a": kind}).log_prob(pandas.DataFrame(values))


@pytest.mark.parametrize("do, message", REFUSED.values(), ids=REFUSED)
def test_refusals_say_the_rule_and_what_came(do, message) -> None:
    with pytest.raises(ValueError, match=message):
        do()
