"""Minibatches for density fits: rows in memory or a loader, checked, in an order that can be resumed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Size, Tensor, nn

from pyro_affine.random_state import random_state, set_random_state

_NO_BATCHES = "a loader must yield batches, got none in a whole pass; check its dataset"


@dataclass(frozen=True)
class Rows:
    """Events and, for a conditional flow, their contexts, row by row."""

    value: Tensor
    context: Tensor | None = None

    def __getitem__(self, index: Any) -> Rows:
        return Rows(self.value[index], None if self.context is None else self.context[index])

    def to(self, device: torch.device) -> Rows:
        """The rows on a device; copies to a GPU from a loader that pins its memory overlap with what the GPU does."""
        move = partial(Tensor.to, device=device, non_blocking=device.type == "cuda")
        return Rows(move(self.value), None if self.context is None else move(self.context))


@dataclass(frozen=True)
class RowCheck:
    """What rows must be: shape of an event (None where unknown) and dtype."""

    event_shape: Size | None
    dtype: torch.dtype

    @classmethod
    def of(cls, flow: nn.Module) -> RowCheck:
        """The check that suits a flow.

        Raises:
            ValueError: if it has no ``log_prob``, or neither parameters nor buffers.
        """
        tensors = [t for t in (*flow.parameters(), *flow.buffers()) if t.is_floating_point()]
        if not hasattr(flow, "log_prob") or not tensors:
            raise ValueError(
                f"flow must be a Module with log_prob and parameters, got {type(flow).__name__}; wrap a transform in "
                "NormalizingFlow(transform, event_shape)"
            )
        event_shape = getattr(flow, "data_shape", None) or getattr(flow, "event_shape", None)
        return cls(event_shape, tensors[0].dtype)

    def __call__(self, value: Any, context: Any = None, *, name: str = "data") -> Rows:
        """The rows as tensors.

        Raises:
            ValueError: if they are no tensors or arrays, of another shape or dtype, of unequal number, or not finite.
        """
        value = self._tensor(value, name)
        if value.dim() == 0 or self.event_shape not in (None, value.shape[1:]):
            wanted = "" if self.event_shape is None else f" + {tuple(self.event_shape)}"
            raise ValueError(f"{name} must have shape (N,){wanted}, got {tuple(value.shape)}; one event in each row")
        if context is None:
            return Rows(value)
        context = self._tensor(context, f"context of {name}")
        if context.shape[:1] != value.shape[:1]:
            raise ValueError(f"{name} and its context must have a row each, got {len(value)} and {len(context)} rows")
        return Rows(value, context)

    def _tensor(self, value: Any, name: str) -> Tensor:
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value if value.flags.writeable else value.copy())
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor or NumPy array, got {type(value).__name__}; use torch.as_tensor")
        if value.dtype != self.dtype:
            short = str(self.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} must have the dtype of the flow, {short}, got {str(value.dtype).removeprefix('torch.')}; "
                f"convert it with torch.as_tensor(x, dtype=torch.{short}) (counts and bytes: add uniform noise first), "
                "or the flow with flow.to(dtype)"
            )
        if not value.numel():
            raise ValueError(f"{name} must have one row and one entry at least, got shape {tuple(value.shape)}")
        finite = torch.isfinite(value).reshape(len(value) if value.dim() else 1, -1).all(-1)
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise ValueError(
                f"{name} must be finite, got NaN or inf in {int((~finite).sum())} of {len(finite)} rows, first in row "
                f"{first}; drop these rows: x[torch.isfinite(x).flatten(1).all(1)]"
            )
        return value


def require_rows(num_rows: int, num_held_out: int) -> None:
    """Raise a ValueError where one row is held out, or fewer than two are left to train on."""
    if num_rows - num_held_out < 2 or num_held_out == 1:
        raise ValueError(
            f"data must have 2 rows to train on and 2 to hold out, if any, got {num_rows} in all; give more rows, "
            "a larger share such as validation=0.3, or validation=None"
        )


class Batches(Protocol):
    """Where minibatches come from: ``RowBatches``, ``LoaderBatches`` or ``StoredBatches``."""

    per_epoch: int | None

    def next(self) -> Rows:
        """The next minibatch."""

    def first(self, limit: int) -> Rows:
        """Up to ``limit`` rows."""

    def state_dict(self) -> dict[str, Any]:
        """The position."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class RowBatches:
    """Endless minibatches of rows in memory, each epoch in a new random order.

    An epoch of n rows is cut into ceil(n / batch_size) batches of nearly equal size. The order is a function of the
    seed and the number of batches taken, which is all that a checkpoint needs.

    Args:
        rows: all rows.
        index: the rows to train on.
        batch_size: rows in a batch, at most.
        seed: of the order.
    """

    def __init__(self, rows: Rows, index: Tensor, *, batch_size: int, seed: int) -> None:
        self._rows, self._index, self._seed = rows, index, seed
        self.per_epoch: int | None = math.ceil(len(index) / batch_size)
        self._taken = 0
        self._order: tuple[int, Tensor] = (-1, index)

    def next(self) -> Rows:
        """The next minibatch."""
        per_epoch = self.per_epoch or 1
        epoch, batch = divmod(self._taken, per_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self._seed + epoch) % 2**63)
            self._order = epoch, self._index[torch.randperm(len(self._index), generator=generator, device="cpu")]
        self._taken += 1
        size = len(self._index)
        return self._rows[self._order[1][batch * size // per_epoch : (batch + 1) * size // per_epoch]]

    def first(self, limit: int) -> Rows:
        """Up to ``limit`` rows, to take statistics from."""
        return self._rows[self._index[:limit]]

    def state_dict(self) -> dict[str, Any]:
        """The position and the seed of the order."""
        return {"taken": self._taken, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._taken, self._seed, self._order = state["taken"], state["seed"], (-1, self._index)


class LoaderBatches:
    """Endless minibatches of a loader that yields tensors, or pairs of values and contexts.

    To resume, the loader is started from the random state that its epoch began with, and the batches taken before
    are fetched again and dropped.

    Args:
        loader: a ``DataLoader``, or whatever can be iterated over again and again.
        check: what rows must be.
    """

    def __init__(self, loader: Iterable[Any], check: RowCheck) -> None:
        if hasattr(loader, "to_numpy"):
            raise ValueError(
                f"rows must be a tensor or an array, got {type(loader).__name__}; for frames there is TableDensity, or "
                "use torch.as_tensor(frame.to_numpy(), dtype=torch.float32)"
            )
        if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
            raise ValueError(
                f"data must be a tensor, a NumPy array or a DataLoader, got {type(loader).__name__}; "
                "what can be gone through only once does not do for several epochs"
            )
        self._loader, self._check = loader, check
        self.per_epoch = _length(loader)
        self._batches: Iterator[Any] = iter(())
        self._start: dict[str, Any] = {}
        self._taken = 0

    def next(self) -> Rows:
        """The next minibatch."""
        batch = next(self._batches, None)
        if batch is None:
            self._start_epoch()
            batch = next(self._batches, None)
        if batch is None:
            raise ValueError(_NO_BATCHES)
        self._taken += 1
        return self._checked(batch, self._taken)

    def _checked(self, batch: Any, number: int) -> Rows:
        parts = batch if isinstance(batch, list | tuple) else (batch,)
        if len(parts) > 2:
            raise ValueError(f"a loader must yield values, or values and contexts, got {len(parts)} tensors a batch")
        return self._check(*parts, name=f"batch {number} of the loader")

    def _start_epoch(self) -> None:
        generator = getattr(self._loader, "generator", None)
        own = None if generator is None else generator.get_state()
        self._start = {"random_state": random_state(), "generator": own}
        sampler: Any = getattr(self._loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):  # a DistributedSampler has the same order in each epoch unless it is told
            sampler.set_epoch(int(torch.randint(2**31, ())))
        self._batches, self._taken = iter(self._loader), 0

    def first(self, limit: int) -> Rows:
        """Up to ``limit`` rows of a pass of their own, to take statistics from."""
        pieces: list[Rows] = []
        num_rows = 0
        for number, batch in enumerate(self._loader, 1):
            pieces.append(self._checked(batch, number))
            num_rows += len(pieces[-1].value)
            if num_rows >= limit:
                break
        if not pieces:
            raise ValueError(_NO_BATCHES)
        contexts = [piece.context for piece in pieces if piece.context is not None]
        return Rows(torch.cat([piece.value for piece in pieces]), torch.cat(contexts) if contexts else None)[:limit]

    def state_dict(self) -> dict[str, Any]:
        """The random state that the epoch began with, and the number of batches taken since."""
        return {**self._start, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        if state["taken"] == 0:
            return
        if state["generator"] is not None:
            self._loader.generator.set_state(state["generator"])  # type: ignore[attr-defined]
        set_random_state(state["random_state"])
        self._start_epoch()
        for _ in range(state["taken"]):
            next(self._batches, None)
        self._taken = state["taken"]


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # of a stream, which a DataLoader shows only when asked
        return None
