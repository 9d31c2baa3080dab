"""Draws and scores in files: those of the density, in chunks, and a whole file or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Size, Tensor, nn

from pyro_affine.columns import TableDensity
from pyro_affine.draws_on_disk import write_draws, write_log_prob
from pyro_affine.flows import NormalizingFlow, conditional_real_nvp, real_nvp


def flow_of(size: int = 3, **options: Any) -> NormalizingFlow:
    torch.manual_seed(0)
    flow = NormalizingFlow(real_nvp(size, num_layers=2, hidden_dims=(8,)), size, **options)
    for parameter in flow.transform.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return flow


def table_density(first: str = "integer") -> TableDensity:
    pytest.importorskip("pandas")
    return TableDensity({"count": first, "size": "positive", "angle": ("circular", 360.0)}, flow_of())


def conditioned() -> Any:
    torch.manual_seed(0)
    flow = NormalizingFlow(conditional_real_nvp(3, 2, num_layers=2, hidden_dims=(8,)), 3)
    return flow(torch.ones(2))


DENSITIES: dict[str, Any] = {
    "flow": flow_of,
    "float64": lambda: flow_of().double(),
    "transformed distribution": lambda: flow_of()(),
    "flow given a context": conditioned,
    "distribution": lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1),
    "table": table_density,
}


def contents(path: Path) -> np.ndarray[Any, Any]:
    if path.suffix == ".npy":
        return np.asarray(np.load(path, mmap_mode="r"))
    import pyarrow.parquet

    return np.column_stack([column.to_numpy() for column in pyarrow.parquet.read_table(path).columns])


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("make", DENSITIES.values(), ids=DENSITIES)
def test_a_file_holds_the_draws_in_chunks(make: Any, suffix: str, tmp_path: Path) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    density, path = make(), tmp_path / f"draws{suffix}"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        parts = [density.sample(size if isinstance(density, TableDensity) else Size([size])) for size in (100, 100, 50)]
    expected = np.concatenate([np.asarray(part) for part in parts])
    before = torch.get_rng_state()
    write_draws(density, path, 250, chunk_size=100, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert contents(path).dtype == expected.dtype
    np.testing.assert_array_equal(contents(path), expected)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_columns_have_names_and_types(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "draws.parquet"
    write_draws(table_density(), path, 25, chunk_size=10)
    schema = parquet.read_schema(path)
    assert schema.names == ["count", "size", "angle"]
    assert [str(kind) for kind in schema.types] == ["int64", "double", "double"]
    assert parquet.ParquetFile(path).metadata.num_row_groups == 3
    for columns, names in ((None, ["x0", "x1", "x2"]), (["a", "b", "c"], ["a", "b", "c"])):
        write_draws(flow_of(), path, 25, columns=columns)
        assert parquet.read_schema(path).names == names
        assert {str(kind) for kind in parquet.read_schema(path).types} == {"float"}


@pytest.mark.parametrize("shape", [(), (2, 2)], ids=str)
def test_events_of_other_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    density = dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))
    write_draws(density, tmp_path / "draws.npy", 25, chunk_size=10)
    assert contents(tmp_path / "draws.npy").shape == (25, *shape)


class Failing(nn.Module):
    def sample(self, shape: Size) -> Tensor:
        if shape[0] < 10:  # the last chunk
            raise KeyboardInterrupt
        return torch.zeros(*shape, 2)


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_an_interruption_leaves_what_was_there(suffix: str, tmp_path: Path) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"draws{suffix}"
    for entries in ([], [path.name]):
        with pytest.raises(KeyboardInterrupt):
            write_draws(Failing(), path, 25, chunk_size=10)
        assert [entry.name for entry in tmp_path.iterdir()] == entries
        write_draws(flow_of(), path, 3, seed=0)
    assert len(contents(path)) == 3


SCORED = {**DENSITIES, "table": lambda: table_density("real")}  # without noise


@pytest.mark.parametrize("make", SCORED.values(), ids=SCORED)
def test_scores_are_those_of_the_rows(make: Any, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    density, path, scores = make(), tmp_path / "draws.parquet", tmp_path / "scores.npy"
    write_draws(density, path, 250, chunk_size=40, seed=0)
    rows = contents(path)
    write_log_prob(density, path, scores, chunk_size=60)
    values: Any = torch.from_numpy(rows)
    if isinstance(density, TableDensity):
        import pandas

        values = pandas.DataFrame(rows, columns=list(density.columns))
    torch.testing.assert_close(torch.from_numpy(contents(scores).copy()), density.log_prob(values).detach())


REFUSED: dict[str, tuple[Any, str]] = {
    "no draw": (lambda f: write_draws(flow_of(), f / "x.npy", 0), "num_draws must be at least 1, got 0"),
    "no chunk": (lambda f: write_draws(flow_of(), f / "x.npy", 5, chunk_size=0), "chunk_size must be at least 1"),
    "suffix": (lambda f: write_draws(flow_of(), f / "x.csv", 5), "end in .npy or .parquet .* got .*x.csv"),
    "folder": (lambda f: write_draws(flow_of(), f / "gone" / "x.npy", 5), "in a folder that is there"),
    "names": (lambda f: write_draws(flow_of(), f / "x.parquet", 5, columns=["a"]), r"\['a'\] for 3 entries"),
    "matrices": (
        lambda f: write_draws(dist.Normal(torch.zeros(2, 2), 1.0), f / "x.parquet", 5),
        r"events of shape \(2, 2\)",
    ),
    "no scores": (lambda f: write_log_prob(flow_of(), f / "gone.npy", f / "x.npy"), "that is there, got .*gone.npy"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_rule(call: Any, message: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
    assert list(tmp_path.iterdir()) == []
