"""Minibatches of rows on disk, mixed in a buffer of bounded size, in an order that can be resumed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_affine.batches import RowCheck, Rows, require_rows
from pyro_affine.stored_rows import StoredRows, stored_rows

_PLACES = 512  # all over the file, where rows are held out
_LEAST_MIXED = 8  # blocks in a buffer
_MOST_HELD_OUT = 50_000  # rows: a mean to half a percent of a standard deviation

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Buffer:
    number: int
    rows: Rows
    order: Tensor


class StoredBatches:
    """Endless minibatches of rows on disk, each epoch in a new random order.

    The file is cut into stretches of as many blocks as there are buffers in an epoch. Each buffer gets one block of
    each stretch, at random, so that it holds rows from all over the file. Its rows are taken in random order.
    Batches are as in ``RowBatches``. The order is a function of the seed and the number of batches taken.

    Args:
        sources: the values and, for a conditional flow, their contexts.
        held_out: sorted indices of the rows to leave out.
        dtype: of the batches.
        batch_size: rows in a batch, at most.
        seed: of the order.
    """

    def __init__(
        self, sources: Sequence[StoredRows], held_out: Array, *, dtype: torch.dtype, batch_size: int, seed: int
    ) -> None:
        self._sources, self._held_out, self._dtype, self._seed = sources, held_out, dtype, seed
        starts = sources[0].starts
        self._counts = np.diff(starts) - np.diff(np.searchsorted(held_out, starts))
        self._size = int(self._counts.sum())
        entries = sum(math.prod(source.event_shape) for source in sources)
        wanted = math.ceil(len(sources[0]) * entries * dtype.itemsize / sources[0].buffer_bytes)
        self._num_buffers = min(wanted, len(self._counts))
        if self._num_buffers > 1 and len(self._counts) < _LEAST_MIXED * self._num_buffers:
            warnings.warn(
                f"{sources[0].name} comes in blocks of up to {np.diff(starts).max()} rows, and a buffer holds "
                f"{len(self._counts) // self._num_buffers} of them at a time: where rows are in some order, batches "
                "are not random. Write it with a smaller row_group_size, or raise stored_rows(buffer_bytes=...)",
                stacklevel=5,  # the call of the fit
            )
        self.per_epoch: int | None = math.ceil(self._size / batch_size)
        self._taken = 0
        self._epoch: tuple[int, int] | None = None
        self._buffer: _Buffer | None = None

    def next(self) -> Rows:
        """The next minibatch."""
        per_epoch = self.per_epoch or 1
        epoch, batch = divmod(self._taken, per_epoch)
        start, stop = (number * self._size // per_epoch for number in (batch, batch + 1))
        rows = self._rows((self._seed, epoch), start, stop)
        self._taken += 1
        return rows

    def first(self, limit: int) -> Rows:
        """Up to ``limit`` rows from all over the file, to take statistics from; half a buffer of a longer file."""
        most = self._size if self._num_buffers == 1 else self._size // self._num_buffers // 2
        return self._rows((0, 0), 0, min(limit, most))

    def state_dict(self) -> dict[str, Any]:
        """The position and the seed of the order."""
        return {"taken": self._taken, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._taken, self._seed = state["taken"], state["seed"]

    def _rows(self, epoch: tuple[int, int], start: int, stop: int) -> Rows:
        """Rows of an epoch from one position up to another, which may be in the next buffer."""
        if self._epoch != epoch:
            self._hands = _deal(len(self._counts), self._num_buffers, np.random.default_rng(epoch))
            self._ends = np.cumsum([0, *(self._counts[hand].sum() for hand in self._hands)])
            self._epoch, self._buffer = epoch, None
        pieces: list[Rows] = []
        while start < stop:
            number = int(np.searchsorted(self._ends, start, side="right")) - 1
            if self._buffer is None or self._buffer.number != number:
                self._buffer = None  # the old one goes before the new one comes
                self._buffer = self._load(epoch, number)
            begin = self._ends[number]
            pieces.append(self._buffer.rows[self._buffer.order[start - begin : stop - begin]])
            start += len(pieces[-1].value)
        return _joined(pieces)

    def _load(self, epoch: tuple[int, int], number: int) -> _Buffer:
        blocks, done = self._hands[number], 0
        size = int(self._counts[blocks].sum())
        loaded = [torch.empty(size, *source.event_shape, dtype=self._dtype) for source in self._sources]
        for block in blocks:
            start, stop = self._sources[0].starts[block : block + 2].tolist()
            low, high = np.searchsorted(self._held_out, (start, stop))
            kept = torch.from_numpy(np.delete(np.arange(stop - start), self._held_out[low:high] - start))
            for rows, source in zip(loaded, self._sources, strict=True):
                rows[done : done + len(kept)] = source.tensor(start, stop, self._dtype)[kept]
            done += len(kept)
        order = np.random.default_rng((*epoch, number)).permutation(size)
        return _Buffer(number, Rows(*loaded), torch.from_numpy(order))


def split_stored(
    data: Any, context: Any, share: float, *, batch_size: int, seed: int, order: int, check: RowCheck
) -> tuple[StoredBatches, Rows | None]:
    """Batches of data on disk, and the rows held out: a share of them, but 50,000 or a buffer full at most.

    Args:
        data: see ``stored_rows``.
        context: the same, or None.
        share: of the rows to hold out.
        batch_size: rows in a batch.
        seed: of the choice of the rows held out.
        order: seed of the order.
        check: what rows must be.

    Raises:
        ValueError: if rows are too few, of another shape, or not finite.
    """
    sources = _sources(data, context, check, "data")
    wanted = min(math.ceil(share * len(sources[0])), _most(sources, check.dtype))
    held_out = spread_rows(len(sources[0]), wanted, seed)
    require_rows(len(sources[0]), len(held_out))
    batches = StoredBatches(sources, held_out, dtype=check.dtype, batch_size=batch_size, seed=order)
    return batches, _rows_at(sources, held_out, check.dtype) if len(held_out) else None


def sample_stored(data: Any, context: Any, check: RowCheck, *, seed: int = 0) -> Rows:
    """Rows on disk to score on: all of them, or those from 512 places of the file where they are more than 50,000."""
    sources = _sources(data, context, check, "validation")
    size = len(sources[0])
    return _rows_at(sources, spread_rows(size, min(size, _most(sources, check.dtype)), seed), check.dtype)


def spread_rows(num_rows: int, num_wanted: int, seed: int) -> Array:
    """Sorted indices of rows: a short run at a random place of each of up to 512 stretches of a file.

    >>> spread_rows(100, 4, seed=0)
    array([15, 31, 51, 75])
    """
    if num_wanted in (0, num_rows):
        return np.arange(num_wanted)
    run = math.ceil(num_wanted / _PLACES)
    places = num_wanted // run
    edges = np.arange(places + 1) * num_rows // places
    room = np.diff(edges) - run + 1
    first = edges[:-1] + np.floor(np.random.default_rng(seed).random(places) * room).astype(np.int64)
    return np.asarray(np.add.outer(first, np.arange(run)).ravel())


def _most(sources: Sequence[StoredRows], dtype: torch.dtype) -> int:
    row_bytes = sum(math.prod(source.event_shape) for source in sources) * dtype.itemsize
    return min(_MOST_HELD_OUT, max(2, sources[0].buffer_bytes // row_bytes))


def _sources(data: Any, context: Any, check: RowCheck, name: str) -> list[StoredRows]:
    value = stored_rows(data)
    if check.event_shape not in (None, value.event_shape):
        wanted, found = tuple(check.event_shape or ()), tuple(value.event_shape)
        raise ValueError(
            f"{name} must have rows of the event shape of the flow, {wanted}, got {found} in {value.name}; choose "
            "columns with stored_rows(path, columns), or build the flow for these"
        )
    if context is None:
        return [value]
    given = stored_rows(context)
    if len(given) != len(value):
        raise ValueError(f"{name} and its context must have a row each, got {len(value)} and {len(given)} rows")
    return [value, given]


def _rows_at(sources: Sequence[StoredRows], index: Array, dtype: torch.dtype) -> Rows:
    """Rows at sorted indices, read block by block."""
    starts = sources[0].starts
    cuts = np.flatnonzero(np.diff(np.searchsorted(starts, index, side="right"))) + 1
    found = [
        [source.tensor(int(run[0]), int(run[-1]) + 1, dtype)[run - run[0]] for run in np.split(index, cuts)]
        for source in sources
    ]
    return Rows(*map(torch.cat, found))


def _deal(num_blocks: int, num_hands: int, random: np.random.Generator) -> list[Array]:
    """Blocks dealt to hands: of each stretch of up to ``num_hands`` blocks in a row, no hand gets more than one."""
    num_stretches = math.ceil(num_blocks / num_hands)
    stretch = np.arange(num_blocks) * num_stretches // num_blocks
    place = np.arange(num_blocks) - np.searchsorted(stretch, stretch)
    hand = random.permuted(np.tile(np.arange(num_hands), (num_stretches, 1)), axis=1)[stretch, place]
    return np.split(np.argsort(hand, kind="stable"), np.cumsum(np.bincount(hand, minlength=num_hands))[:-1])


def _joined(pieces: list[Rows]) -> Rows:
    if len(pieces) == 1:
        return pieces[0]
    contexts = [piece.context for piece in pieces if piece.context is not None]
    return Rows(torch.cat([piece.value for piece in pieces]), torch.cat(contexts) if contexts else None)
