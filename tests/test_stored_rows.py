"""Data on disk: read in pieces, in a random order that can be resumed; what are no numbers is refused in words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyro_affine.batches import RowCheck
from pyro_affine.columns import TableDensity
from pyro_affine.fit_density import fit_density
from pyro_affine.flows import NormalizingFlow, conditional_real_nvp, real_nvp
from pyro_affine.stored_batches import StoredBatches, sample_stored, split_stored, spread_rows
from pyro_affine.stored_rows import StoredRows, stored_rows

CHECK = RowCheck(None, torch.float32)


def table(num_rows: int = 3000, seed: int = 0) -> np.ndarray[Any, Any]:
    """Rows in order: the first column counts them, in units of a thousand rows."""
    noise = np.random.default_rng(seed).normal(size=(num_rows, 2))
    return np.column_stack([np.arange(num_rows) / 1000, noise])


def saved(folder: Path, rows: Any, name: str = "rows.npy") -> str:
    path = folder / name
    np.save(path, rows)
    return str(path)


def parquet(folder: Path, columns: dict[str, Any], name: str = "rows.parquet", row_group_size: int = 100) -> str:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = folder / name
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return str(path)


def named(rows: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {"t": rows[:, 0], "a": rows[:, 1].astype(np.float32), "b": rows[:, 2]}


def memory_map(folder: Path, rows: np.ndarray[Any, Any]) -> Any:
    return np.load(saved(folder, rows), mmap_mode="r")


def folder_of_two(folder: Path, rows: np.ndarray[Any, Any]) -> str:
    parquet(folder, named(rows[:1234]), "parts/0.parquet")
    parquet(folder, named(rows[1234:]), "parts/1.parquet")
    return str(folder / "parts")


def dataset(folder: Path, rows: np.ndarray[Any, Any]) -> Any:
    path = parquet(folder, named(rows))
    import pyarrow.dataset

    return pyarrow.dataset.dataset(path)


SOURCES: dict[str, Any] = {
    "path of .npy": lambda folder, rows: saved(folder, rows),
    "Path of .npy": lambda folder, rows: Path(saved(folder, rows)),
    "memmap": memory_map,
    "float32": lambda folder, rows: saved(folder, rows.astype(np.float32)),
    "big-endian": lambda folder, rows: saved(folder, rows.astype(">f8")),
    "part of a memmap": lambda folder, rows: memory_map(folder, np.pad(rows, ((7, 0), (0, 2))))[7:, :3],
    "chosen indices": lambda folder, rows: stored_rows(saved(folder, np.pad(rows, ((0, 0), (1, 0)))), [1, 2, 3]),
    "tensor": lambda folder, rows: stored_rows(torch.from_numpy(rows)),
    "path of .parquet": lambda folder, rows: parquet(folder, named(rows)),
    "folder of .parquet": folder_of_two,
    "dataset": dataset,
    "chosen names": lambda folder, rows: stored_rows(parquet(folder, {"x": rows[:, 0], **named(rows)}), list("tab")),
}
CUTS = [(0, 3000), (0, 1), (99, 101), (1233, 1236), (2999, 3000), (700, 1450)]


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_rows_are_those_that_were_written(make: Any, tmp_path: Path) -> None:
    written = table()
    rows = stored_rows(make(tmp_path, written))
    assert (len(rows), rows.event_shape) == (3000, (3,))
    for start, stop in CUTS:
        expected = torch.from_numpy(written[start:stop]).float()
        assert torch.equal(rows.tensor(start, stop, torch.float32), expected)


def test_events_keep_their_shape_and_scalars_are_events_too(tmp_path: Path) -> None:
    assert stored_rows(saved(tmp_path, np.zeros((5, 3, 2, 2), np.int16))).event_shape == (3, 2, 2)
    assert stored_rows(saved(tmp_path, np.arange(5))).tensor(1, 3, torch.float64).tolist() == [1.0, 2.0]


# ---- the order


def buffered(num_rows: int, num_buffers: int, held_out: Any = (), **options: Any) -> StoredBatches:
    """Batches of the numbers of rows, in as many buffers."""
    rows = stored_rows(torch.arange(float(num_rows)), buffer_bytes=4 * num_rows // num_buffers)
    options = {"dtype": torch.float32, "batch_size": 64, "seed": 5, **options}
    return StoredBatches([rows], np.asarray(held_out, np.int64), **options)


def epoch_of(batches: StoredBatches) -> Tensor:
    return torch.cat([batches.next().value for _ in range(batches.per_epoch or 0)])


@pytest.mark.parametrize("num_buffers", [1, 2, 7])
def test_each_row_that_is_not_held_out_is_met_once_an_epoch_in_a_new_order(num_buffers: int) -> None:
    held_out = [0, 1, 2, 3, 500, 2047, 4999]
    batches = buffered(5000, num_buffers, held_out)
    first, second = epoch_of(batches), epoch_of(batches)
    expected = torch.from_numpy(np.delete(np.arange(5000.0), held_out)).float()
    assert torch.equal(first.sort().values, expected) and torch.equal(second.sort().values, expected)
    assert not torch.equal(first, second)


def test_batches_of_a_file_in_order_are_like_random_ones() -> None:
    batches = buffered(100_000, 10, batch_size=100)
    means = torch.stack([batches.next().value.mean() for _ in range(batches.per_epoch or 0)])
    random = 100_000 / 12**0.5 / 10  # standard deviation of the mean of 100 random rows
    assert 0.8 < means.std() / random < 1.2
    neighbours = torch.corrcoef(torch.stack([means[:-1], means[1:]]))[0, 1]
    assert abs(neighbours) < 0.15  # a shuffle within consecutive rows would give nearly 1


def test_statistics_come_from_all_over_a_file_in_order() -> None:
    rows = buffered(100_000, 10, held_out=range(0, 100_000, 2)).first(100_000)
    assert 2000 < len(rows.value) < 4000  # half a buffer
    assert rows.value.mean() == pytest.approx(50_000, rel=0.05)
    assert rows.value.std() == pytest.approx(100_000 / 12**0.5, rel=0.05)
    assert bool((rows.value % 2 == 1).all())  # of the training rows alone


@pytest.mark.parametrize("taken", [1, 30, 79, 200])
def test_the_order_goes_on_where_it_was(taken: int) -> None:
    batches, again = buffered(5000, 3, range(10, 20)), buffered(5000, 3, range(10, 20), seed=6)
    for _ in range(taken):
        batches.next()
    again.load_state_dict(batches.state_dict())
    for _ in range(5):
        assert torch.equal(batches.next().value, again.next().value)


def test_no_more_than_the_buffer_is_read_at_a_time() -> None:
    asked: list[int] = []

    def read(start: int, stop: int) -> Any:
        asked.append(stop - start)
        return np.zeros((stop - start, 2), np.float32)

    source = stored_rows(torch.zeros(10_000, 2), buffer_bytes=8000)
    rows = StoredRows("spy", source.event_shape, source.starts, read, None, 8000)
    batches, _ = split_stored(rows, None, 0.0, batch_size=100, seed=0, order=0, check=CHECK)
    assert asked == []  # nothing to find out
    batches.next()
    assert sum(asked) <= 1100
    batches.first(100_000)
    assert sum(asked) <= 2200


def test_contexts_stay_with_their_values(tmp_path: Path) -> None:
    rows = table()
    path = parquet(tmp_path, named(rows), row_group_size=50)
    value, context = stored_rows(path, ["t"], buffer_bytes=5000), saved(tmp_path, 2 * rows[:, :1])
    batches, held_out = split_stored(value, context, 0.1, batch_size=100, seed=0, order=0, check=CHECK)
    assert held_out is not None
    for part in [held_out, *(batches.next() for _ in range(40)), sample_stored(value, context, CHECK)]:
        torch.testing.assert_close(part.context, 2 * part.value)


def test_held_out_rows_are_spread_and_bounded() -> None:
    index = spread_rows(10_000_000, 100_000, seed=0)
    assert 99_000 < len(index) <= 100_000 and (np.diff(index) > 0).all() and index[-1] < 10_000_000
    assert (np.bincount(index // 1_000_000, minlength=10) > 9000).all()
    assert len(spread_rows(1000, 100, seed=0)) == 100
    assert not np.array_equal(index, spread_rows(10_000_000, 100_000, seed=1))
    rows = stored_rows(torch.zeros(10_000, 2), buffer_bytes=8000)
    _, held_out = split_stored(rows, None, 0.5, batch_size=100, seed=0, order=0, check=CHECK)
    assert held_out is not None and len(held_out.value) == 1000  # a buffer full


def test_row_groups_too_long_to_mix_are_named(tmp_path: Path) -> None:
    rows = stored_rows(parquet(tmp_path, named(table()), row_group_size=1000), buffer_bytes=12_000)
    with pytest.warns(UserWarning, match="blocks of up to 1000 rows, and a buffer holds 1 of them"):
        split_stored(rows, None, 0.1, batch_size=100, seed=0, order=0, check=CHECK)


def test_an_empty_part_of_a_folder_is_passed_over(tmp_path: Path) -> None:
    rows = table(300)
    for name, part in {"0": rows[:100], "1": rows[:0], "2": rows[100:]}.items():
        parquet(tmp_path, named(part), f"parts/{name}.parquet")
    batches, _ = split_stored(tmp_path / "parts", None, 0.0, batch_size=50, seed=0, order=0, check=CHECK)
    assert torch.equal(epoch_of(batches)[:, 0].sort().values, torch.from_numpy(rows[:, 0]).float())


# ---- fits


def small_flow(size: int = 3) -> NormalizingFlow:
    torch.manual_seed(0)
    return NormalizingFlow(real_nvp(size, num_layers=2, hidden_dims=(8,)), size)


def fit(flow: nn.Module, data: Any, context: Any = None, **options: Any) -> Any:
    return fit_density(flow, data, context, **{"num_steps": 10, "seed": 0, "progress": False, **options})


@pytest.mark.parametrize("make", [SOURCES["memmap"], SOURCES["path of .parquet"]], ids=["memmap", "parquet"])
def test_a_fit_to_a_file_is_as_good_as_one_in_memory(make: Any, tmp_path: Path) -> None:
    rows, test = table(), torch.from_numpy(table(seed=1)).float()
    rows[:, 1] = rows[:, 2] ** 2 + 0.3 * rows[:, 1]
    test[:, 1] = test[:, 2] ** 2 + 0.3 * test[:, 1]
    scores = {}
    for name, data in {"memory": torch.from_numpy(rows).float(), "disk": make(tmp_path, rows)}.items():
        flow = small_flow()
        result = fit(flow, data, num_steps=60)
        assert result.validation_steps[-1] == 60
        scores[name] = flow.log_prob(test).mean().item()
    assert scores["disk"] == pytest.approx(scores["memory"], abs=0.1)


def test_validation_may_be_on_disk_alone_or_both(tmp_path: Path) -> None:
    path, other = saved(tmp_path, table()), saved(tmp_path, table(500, seed=1), "other.npy")
    assert fit(small_flow(), torch.from_numpy(table()).float(), validation=other).validation_losses
    assert fit(small_flow(), path, validation=other).validation_losses
    assert not fit(small_flow(), path, validation=None).validation_losses


def test_a_conditional_flow_takes_its_context_from_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow = NormalizingFlow(conditional_real_nvp(2, 1, num_layers=2, hidden_dims=(8,)), 2)
    path = parquet(tmp_path, named(table()))
    rows, context = stored_rows(path, ["a", "b"]), stored_rows(path, ["t"])
    result = fit(flow, rows, context, validation=(rows, context))
    assert np.isfinite(result.best)


def test_a_fit_to_a_file_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    class Killed(NormalizingFlow):
        calls = 0

        def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
            self.calls += self.training
            if self.training and self.calls == 34:
                raise KeyboardInterrupt
            return super().log_prob(value, context)

    def made(kind: type[NormalizingFlow]) -> NormalizingFlow:
        torch.manual_seed(0)
        return kind(real_nvp(3, num_layers=2, hidden_dims=(8,)), 3)

    rows = stored_rows(saved(tmp_path, table()), buffer_bytes=10_000)
    options = {"num_steps": 50, "batch_size": 100}
    whole = fit(flow := made(NormalizingFlow), rows, **options)
    assert fit(made(Killed), rows, checkpoint=tmp_path / "fit", **options).reason == "interrupted"
    resumed = fit(again := made(NormalizingFlow), rows, checkpoint=tmp_path / "fit", **options)
    assert resumed.losses == whole.losses
    for name, value in flow.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_table_density_is_fitted_to_parquet_by_the_names_of_its_columns(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    random = np.random.default_rng(0)
    size = np.exp(random.normal(size=3000))
    columns = {"other": ["x"] * 3000, "angle": random.normal(10, 20, 3000) % 360, "size": size}
    columns["count"] = random.poisson(3 * size)
    density = TableDensity({"size": "positive", "count": "integer", "angle": ("circular", 360.0)})
    density.fit(parquet(tmp_path, columns), num_steps=20, seed=0, progress=False)
    assert 70 < density.cuts[2] < 310  # where the rows are rare
    frame = pandas.DataFrame(columns)
    other = TableDensity(density.columns)
    other.fit(frame, num_steps=20, seed=0, progress=False)
    torch.manual_seed(0)
    assert density.log_prob(frame).mean() == pytest.approx(float(other.log_prob(frame).mean()), abs=0.1)
    with pytest.raises(ValueError, match="column 'size' is declared"):
        density.fit(parquet(tmp_path, {**columns, "size": -size}), num_steps=100, progress=False)


def test_the_noise_of_whole_numbers_is_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path, {"count": np.arange(200)})
    monkeypatch.setattr("pyro_affine.columns.fit_density", lambda flow, rows, **options: rows)
    rows: Any = TableDensity({"count": "integer"}).fit(path)
    first, again, other = rows.read(0, 100), rows.read(0, 100), rows.read(100, 200)
    assert np.array_equal(first, again) and not np.allclose(first % 1, other % 1)


# ---- refusals


def with_nan(rows: np.ndarray[Any, Any], row: int) -> np.ndarray[Any, Any]:
    rows[row, 1] = np.nan
    return rows


def text(folder: Path, content: str, name: str) -> str:
    (folder / name).write_text(content)
    return str(folder / name)


BAD: dict[str, tuple[Any, str]] = {
    "no file": (lambda f: f / "gone.npy", "file or folder that is there, got .*gone.npy"),
    "no array": (lambda f: text(f, "1,2,3\n", "rows.npy"), "whole .npy file of numbers"),
    "no table": (lambda f: text(f, "1,2,3\n", "rows.csv"), r"must be .npy or whole .parquet files, got .*rows.csv"),
    "empty folder": (lambda f: f, "must hold .parquet files, got none"),
    "cut short": (lambda f: cut(saved(f, table())), "whole .npy file"),
    "no row": (lambda f: saved(f, np.zeros((0, 3))), r"a row and an entry at least, got shape \(0, 3\)"),
    "no row in parquet": (lambda f: parquet(f, named(table(0))), r"at least, got shape \(0, 3\)"),
    "a number": (lambda f: saved(f, np.float64(3)), r"row for each event, got shape \(\)"),
    "words": (lambda f: saved(f, np.array(["a", "b"])), "floats or integers .* of <U1"),
    "objects": (lambda f: saved(f, np.array([None, 3])), "whole .npy file of numbers"),
    "complex": (lambda f: saved(f, np.ones((3, 3), complex)), "floats or integers .* of complex128"),
    "a column of words": (lambda f: parquet(f, {"a": ["x"], "b": [1.0]}), r"got \{'a': 'string'\}"),
    "too few columns": (lambda f: saved(f, table()[:, :2]), r"of the flow, \(3,\), got \(2,\)"),
    "NaN": (lambda f: saved(f, with_nan(table(), 1234)), "got NaN or inf in row 1234, counted from 0"),
    "null": (lambda f: parquet(f, {**named(table()), "b": [None, *range(2999)]}), "NaN or inf in row 0,"),
    "too large": (lambda f: saved(f, 1e300 * table()), "must be finite in float32, got NaN or inf in row"),
    "two rows": (lambda f: saved(f, table(2)), "2 rows to train on and 2 to hold out"),
    "unknown name": (lambda f: stored_rows(parquet(f, named(table())), ["q"]), r"'b'\], got \['q'\]"),
    "names in an array": (lambda f: stored_rows(saved(f, table()), ["a"]), "must be indices below"),
    "index too large": (lambda f: stored_rows(saved(f, table()), [3]), "must be indices below"),
    "columns chosen twice": (lambda f: stored_rows(stored_rows(saved(f, table())), ["a"]), "columns are chosen once"),
    "a filter": (lambda f: filtered(f), "a filtered or projected dataset is not allowed"),
}


def cut(path: str) -> str:
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:-100])
    return path


def filtered(folder: Path) -> Any:
    data = dataset(folder, table())
    import pyarrow.dataset

    return data.filter(pyarrow.dataset.field("t") > 1)


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_what_is_no_table_of_numbers_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fit(small_flow(), make(tmp_path))


def test_a_context_of_another_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a row each, got 3000 and 2 rows"):
        fit(small_flow(), saved(tmp_path, table()), saved(tmp_path, table(2), "context.npy"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path, named(table()))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        fit(small_flow(), path)


# ---- memory

MEASURE = """
import re, sys
import numpy as np, torch
from pathlib import Path
from pyro_affine import fit_density, stored_rows

class Gaussian(torch.nn.Module):
    event_shape, most = (16,), 0.0
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(16))
    def log_prob(self, value):
        self.most = max(self.most, in_use())
        return -(value - self.loc).square().sum(-1)

def in_use():  # MiB that no file backs: pages of a mapped file can go at any time
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def grown(load):
    start, flow = in_use(), Gaussian()
    fit_density(flow, load(), validation=0.01, num_steps=80, batch_size=2**14, progress=False)  # more than an epoch
    return flow.most - start

fit_density(Gaussian(), torch.randn(2000, 16), num_steps=5, progress=False)  # what any fit takes
path = sys.argv[1]
print(grown(lambda: stored_rows(path, buffer_bytes=2**22)), grown(lambda: torch.from_numpy(np.load(path))))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which is not here")
def test_a_fit_does_not_take_the_file_into_memory(tmp_path: Path) -> None:
    megabyte = np.random.default_rng(0).normal(size=(2**14, 16)).astype(np.float32)
    command = [sys.executable, "-c", MEASURE, saved(tmp_path, np.tile(megabyte, (64, 1)))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    on_disk, in_memory = map(float, done.stdout.split())
    assert in_memory > 64  # MiB, so the measure sees it
    assert on_disk < 32
