"""Draws and scores of a density in files, in chunks: millions of rows in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_affine.random_state import seeded
from pyro_affine.stored_rows import import_arrow, stored_rows

Array = np.ndarray[Any, Any]
Columns = dict[str, Array]
_SUFFIXES = (".npy", ".parquet")


def write_draws(
    density: Any,
    path: str | os.PathLike[str],
    num_draws: int,
    *,
    columns: Sequence[str] | None = None,
    chunk_size: int = 16_384,
    seed: int | None = None,
    progress: bool = True,
) -> None:
    """Draw from a density into a .npy or .parquet file, chunk by chunk.

    The file has the dtype of the density, float32 as a rule, and the shape (num_draws,) + event shape;
    ``numpy.load(path, mmap_mode="r")`` reads a .npy file in pieces. A .parquet file has a row group for each chunk. The
    file takes its name when it is whole: an interruption leaves what was there before.

    Args:
        density: a ``NormalizingFlow``, a ``TableDensity`` or a distribution of torch or Pyro; of a conditional flow,
            ``flow(context)``.
        path: of the file; one that is there is replaced.
        num_draws: number of rows.
        columns: names of the columns in .parquet; default those of a ``TableDensity``, else x0, x1, ...
        chunk_size: rows drawn at once.
        seed: makes the file reproducible for a chunk size; torch's random state is put back.
        progress: whether to show a bar for work of more than two seconds.

    Raises:
        ValueError: if a number is below 1, the suffix is another, there is no such folder, or events do not fit the
            columns.
        ImportError: for .parquet without pyarrow.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/draws.npy"
    >>> write_draws(torch.distributions.Normal(torch.zeros(2), 1.0), path, 1000, seed=0)
    >>> np.load(path, mmap_mode="r").shape
    (1000, 2)
    """
    for name, value in (("num_draws", num_draws), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    sizes = [min(chunk_size, num_draws - start) for start in range(0, num_draws, chunk_size)]
    with _whole(path, _SUFFIXES) as temporary, seeded(seed):
        chunks = (_draw(density, size) for size in _bar(sizes, "draws", progress))
        if Path(path).suffix == ".npy":
            _write_array(temporary, num_draws, map(_events, chunks))
        else:
            _write_table(temporary, (_named(chunk, columns) for chunk in chunks))


def write_log_prob(
    density: Any,
    data: Any,
    path: str | os.PathLike[str],
    *,
    chunk_size: int = 16_384,
    progress: bool = True,
) -> None:
    """Score all rows of a file by a density into a .npy file, chunk by chunk.

    Args:
        density: as in ``write_draws``. A ``TableDensity`` takes its columns by name from Parquet.
        data: rows on disk, as in ``stored_rows``.
        path: of the file, which gets one log-density for each row, in nats and in the order of the rows.
        chunk_size: rows scored at once.
        progress: whether to show a bar for work of more than two seconds.

    Raises:
        ValueError: as from ``stored_rows``, if a row is not finite, or for another suffix.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> np.save(folder + "/data.npy", np.zeros((3, 2)))
    >>> density = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    >>> write_log_prob(density, folder + "/data.npy", folder + "/scores.npy")
    >>> np.load(folder + "/scores.npy")
    array([-1.837877, -1.837877, -1.837877], dtype=float32)
    """
    names = list(density.columns) if hasattr(density, "columns") else None
    rows, like = stored_rows(data, names), _like(density)

    def score(span: tuple[int, int]) -> Array:
        pieces = rows.tensor(*span, like.dtype).to(like.device).split(chunk_size)
        return torch.cat([_score(density, piece, names) for piece in pieces]).cpu().numpy()

    edges = np.append(rows.starts[np.searchsorted(rows.starts, np.arange(0, len(rows), chunk_size))], len(rows))
    spans = list(pairwise(np.unique(edges).tolist()))  # of whole blocks, so that each is read once
    with _whole(path, (".npy",)) as temporary, torch.no_grad():
        _write_array(temporary, len(rows), map(score, _bar(spans, "scores", progress)))


def _score(density: Any, rows: Tensor, names: list[str] | None) -> Tensor:
    if names is not None:
        import pandas

        return density.log_prob(pandas.DataFrame(rows.numpy(), columns=names))  # type: ignore[no-any-return]
    scores: Tensor = density.log_prob(rows)
    return scores


def _like(density: Any) -> Tensor:
    """Dtype and device of what a density takes; a ``TableDensity`` takes frames of float64."""
    if hasattr(density, "columns"):
        return torch.empty(0, dtype=torch.float64)
    if isinstance(density, nn.Module):
        return next(t for t in (*density.parameters(), *density.buffers()) if t.is_floating_point())
    with seeded(0):
        draw: Tensor = density.sample()
    return draw


@contextmanager
def _whole(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its name if all goes well, and goes if not."""
    if Path(path).suffix not in suffixes or not Path(path).parent.is_dir():
        raise ValueError(f"path must end in {' or '.join(suffixes)} and be in a folder that is there, got {path}")
    temporary = Path(f"{os.fspath(path)}.writing")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _bar(steps: list[Any], what: str, progress: bool) -> Iterable[Any]:
    from tqdm.auto import tqdm

    bar: Iterable[Any] = tqdm(steps, desc=what, delay=2.0, leave=False, disable=not progress)
    return bar


def _draw(density: Any, size: int) -> Columns | Array:
    """Columns of a ``TableDensity``, or events."""
    if hasattr(density, "columns"):
        return {name: values.to_numpy() for name, values in density.sample(size).items()}
    return np.asarray(density.sample(torch.Size([size])).cpu())


def _events(chunk: Columns | Array) -> Array:
    return np.stack(list(chunk.values()), -1) if isinstance(chunk, dict) else chunk


def _named(chunk: Columns | Array, columns: Sequence[str] | None) -> Columns:
    if isinstance(chunk, dict):
        names, values = list(chunk), list(chunk.values())
    elif chunk.ndim > 2:
        raise ValueError(f".parquet is for vectors, got events of shape {chunk.shape[1:]}; write them to .npy")
    else:
        values = list(chunk.reshape(len(chunk), -1).T)
        names = [f"x{j}" for j in range(len(values))]
    names = names if columns is None else list(columns)
    if len(set(names)) != len(values):
        raise ValueError(f"columns must be a name for each entry, all different, got {names} for {len(values)} entries")
    return dict(zip(names, values, strict=True))


def _write_array(path: Path, num_rows: int, chunks: Iterator[Array]) -> None:
    first = next(chunks)
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": (num_rows, *first.shape[1:])}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chain([first], chunks):
            file.write(np.ascontiguousarray(chunk).data)


def _write_table(path: Path, chunks: Iterator[Columns]) -> None:
    arrow = import_arrow()
    first = arrow.table(next(chunks))
    with arrow.parquet.ParquetWriter(path, first.schema) as writer:
        for table in chain([first], map(arrow.table, chunks)):
            writer.write_table(table)
