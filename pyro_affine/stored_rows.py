"""Rows that stay on disk and are read in blocks: NumPy files, memory-mapped arrays, Parquet files, Arrow datasets."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor

_BLOCK_BYTES = 2**18  # of an array: long enough for a disk, short enough for a buffer to hold hundreds
_LEAST_BLOCKS = 256  # that a short array is cut into
_BUFFER_BYTES = 2**26
_NUMBERS = "fiu"  # kinds of NumPy's dtypes: floats and integers of either sign
_ARROW_NUMBERS = ("float", "halffloat", "double", "int", "uint")


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows on disk; ``stored_rows`` makes them.

    Args:
        name: for messages.
        event_shape: shape of a row.
        starts: first row of each block, and the number of all rows. A block is read at once.
        read: from the first row and the one after the last to an array with these rows.
        columns: their names, for rows of a table.
        buffer_bytes: size of the buffer that ``fit_density`` mixes rows in.
    """

    name: str
    event_shape: Size
    starts: np.ndarray[Any, Any]
    read: Callable[[int, int], Any]
    columns: tuple[str, ...] | None = None
    buffer_bytes: int = _BUFFER_BYTES

    def __len__(self) -> int:
        return int(self.starts[-1])

    def tensor(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows from ``start`` up to, not including, ``stop``, in another dtype.

        Raises:
            ValueError: if one is not finite in that dtype; it names the row.
        """
        with np.errstate(over="ignore"):
            copy = np.array(self.read(start, stop), np.float64 if dtype == torch.float64 else np.float32)
        rows = torch.from_numpy(copy).to(dtype)
        finite = torch.isfinite(rows).reshape(len(rows), -1).all(-1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise ValueError(
                f"{self.name} must be finite in {str(dtype).removeprefix('torch.')}, got NaN or inf in row "
                f"{start + row}, counted from 0: {copy[row].ravel()[:8].tolist()}; drop such rows from it first"
            )
        return rows


def stored_rows(
    source: Any, columns: Sequence[str] | Sequence[int] | None = None, *, buffer_bytes: int = _BUFFER_BYTES
) -> StoredRows:
    """Rows on disk for ``fit_density``, with a choice of columns. No row is read before it is wanted.

    Args:
        source: path of a .npy file, of a .parquet file or of a folder of these; a ``numpy.memmap`` or whatever has a
            shape, a dtype and slices, such as a dataset of h5py; or a ``pyarrow.dataset.Dataset``.
        columns: names of the columns of a table, all by default; indices of those of an array of two dimensions.
        buffer_bytes: what ``fit_density`` holds in memory at a time, in the dtype of the flow: 64 MiB. A larger one
            mixes rows better where the file is in some order.

    Raises:
        ValueError: if there is no such file, row or column, or the data are no numbers.
        ImportError: for Parquet and Arrow without pyarrow.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/data.npy"
    >>> np.save(path, np.arange(12.0).reshape(4, 3))
    >>> rows = stored_rows(path, [0, 2])
    >>> len(rows), rows.event_shape, rows.tensor(1, 3, torch.float32).tolist()
    (4, torch.Size([2]), [[3.0, 5.0], [6.0, 8.0]])
    """
    if isinstance(source, StoredRows):
        if columns is not None and tuple(columns) != source.columns:
            raise ValueError(f"columns are chosen once, got {columns} for rows of {source.name} with {source.columns}")
        return source
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else f"the {type(source).__name__}"
    if isinstance(source, str | os.PathLike):
        if not Path(source).exists():
            raise ValueError(f"data on disk must be a file or folder that is there, got {name}; check the path")
        source = _open_array(name) if Path(source).suffix == ".npy" else _open_dataset(name)
    read_in = _dataset_rows if _is_dataset(source) else _array_rows
    rows = read_in(source, columns, name, buffer_bytes)
    if not len(rows) or not math.prod(rows.event_shape):
        raise ValueError(f"{name} must hold a row and an entry at least, got shape {(len(rows), *rows.event_shape)}")
    return rows


def is_stored(data: Any) -> bool:
    """Whether ``fit_density`` reads data from disk: paths, memory-mapped arrays, Arrow's datasets, stored rows."""
    return isinstance(data, StoredRows | np.memmap | str | os.PathLike) or _is_dataset(data)


def _is_dataset(data: Any) -> bool:
    return type(data).__module__ == "pyarrow._dataset"


def _open_array(name: str) -> Any:
    try:
        return np.load(name, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{name} must be a whole .npy file of numbers; NumPy cannot map it: {error}") from error


def _array_rows(array: Any, columns: Any, name: str, buffer_bytes: int) -> StoredRows:
    array = array.numpy() if isinstance(array, Tensor) else array
    shape, dtype = tuple(getattr(array, "shape", ())), np.dtype(getattr(array, "dtype", object))
    if not shape or dtype.kind not in _NUMBERS:
        raise ValueError(
            f"{name} must be an array of floats or integers with a row for each event, got shape {shape} of {dtype}; "
            "save such an array with numpy.save"
        )
    if columns is not None:
        _check_indices(columns, shape, name)
        shape = (shape[0], len(columns))
    row_bytes = max(dtype.itemsize * math.prod(array.shape[1:]), 1)
    size = max(1, min(_BLOCK_BYTES // row_bytes, shape[0] // _LEAST_BLOCKS))
    starts = np.append(np.arange(0, shape[0], size), shape[0])

    def read(start: int, stop: int) -> Any:
        rows = np.asarray(array[start:stop])
        return rows if columns is None else rows[:, list(columns)]

    return StoredRows(name, Size(shape[1:]), starts, read, None, buffer_bytes)


def _check_indices(columns: Any, shape: tuple[int, ...], name: str) -> None:
    given = np.asarray(columns)
    if len(shape) != 2 or given.dtype.kind not in "iu" or (given < 0).any() or (given >= shape[1]).any():
        raise ValueError(
            f"columns of an array must be indices below its number of columns, got {list(columns)} for {name} of shape "
            f"{shape}; only tables in Parquet have names"
        )


def import_arrow() -> Any:
    """Pyarrow with its readers and writers.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import pyarrow.dataset
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow, which is not installed: pip install pyarrow") from error
    return pyarrow


def _open_dataset(name: str) -> Any:
    arrow = import_arrow()
    files = sorted(map(str, Path(name).rglob("*.parquet"))) if Path(name).is_dir() else [name]
    if not files:
        raise ValueError(f"a folder of data must hold .parquet files, got none in {name}; stack .npy files to one")
    try:
        return arrow.dataset.dataset(files, format="parquet")
    except (arrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"data on disk must be .npy or whole .parquet files, got {name}: {error}") from error


def _dataset_rows(dataset: Any, columns: Any, name: str, buffer_bytes: int) -> StoredRows:
    arrow = import_arrow()
    names = [str(column) for column in (dataset.schema.names if columns is None else columns)]
    _check_columns(dataset.schema, names, name)
    groups = [(group, num_rows) for group, num_rows in _row_groups(dataset) if num_rows]
    starts = np.cumsum([0, *(num_rows for _, num_rows in groups)])

    def read(start: int, stop: int) -> Any:
        first, last = np.searchsorted(starts, start, side="right") - 1, np.searchsorted(starts, stop)
        tables = [group.to_table(schema=dataset.schema, columns=names) for group, _ in groups[first:last]]
        table = arrow.concat_tables(tables).slice(start - starts[first], stop - start)
        return np.stack([column.to_numpy() for column in table.columns], -1)

    return StoredRows(name, Size([len(names)]), starts, read, tuple(names), buffer_bytes)


def _row_groups(dataset: Any) -> Iterator[tuple[Any, int]]:
    """Pieces to read at once and their numbers of rows: row groups of Parquet, whole files of other formats."""
    for file in dataset.get_fragments():
        if hasattr(file, "split_by_row_group"):
            yield from ((group, group.row_groups[0].num_rows) for group in file.split_by_row_group())
        else:
            yield file, file.count_rows()


def _check_columns(schema: Any, names: list[str], name: str) -> None:
    missing = [column for column in names if column not in schema.names]
    if missing:
        raise ValueError(f"columns must be among those of {name}, {schema.names}, got {missing}; check the names")
    kinds = {column: str(schema.field(column).type) for column in names}
    other = {column: kind for column, kind in kinds.items() if not kind.startswith(_ARROW_NUMBERS)}
    if other:
        raise ValueError(
            f"columns must be floats or integers, got {other} in {name}; choose others with "
            "stored_rows(path, columns), or write these as numbers"
        )
