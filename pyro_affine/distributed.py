"""Several processes that train one thing: who takes part, which share each has, and what all of them agree on."""

from __future__ import annotations

import functools
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_affine.checkpoint import fingerprint
from pyro_affine.random_state import new_seed, random_state, set_random_state
from pyro_affine.trained_weights import Weights

T = TypeVar("T")

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
# Seconds. Those that are left notice within milliseconds of each other, as each hangs up on the rest.
_ROLL_CALL = 5.0
_meetings = itertools.count()  # alike in all processes, as they make the same calls


class LostProcessError(RuntimeError):
    """Another process of the fit has ended, so this one cannot go on; the message says which, and why."""


class Processes:
    """The processes that train together. Made by ``joined``; by default there is one, and methods cost nothing.

    All methods but ``share`` must be called by every process, in the same order.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        group: of ``torch.distributed``; its own, as modules that torch imports late hold on to the default group, and
            that others have hung up is only seen where nothing holds on.
        store: of ``torch.distributed``, where a process leaves word of why it ended.

    >>> Processes().share(10), Processes(1, 3).share(10)
    (slice(0, 10, None), slice(3, 6, None))
    """

    def __init__(self, rank: int = 0, size: int = 1, *, group: Any = None, store: Any = None) -> None:
        self.rank, self.size = rank, size
        self._group, self._store = group, store

    def share(self, number: int) -> slice:
        """Which of a number of rows are for this process; the shares differ by one row at most."""
        return slice(self.rank * number // self.size, (self.rank + 1) * number // self.size)

    def only_first(self, value: T) -> T | None:
        """The value in the first process, None in the others."""
        return value if self.rank == 0 else None

    def from_first(self, value: T) -> T:
        """What the first process has."""
        if self.size == 1:
            return value
        box: list[Any] = [self.only_first(value)]
        self._together(lambda: dist.broadcast_object_list(box, src=0, group=self._group))
        return box[0]  # type: ignore[no-any-return]

    def gathered(self, values: Tensor) -> Tensor:
        """The values of all processes, one after the other, on the CPU. Shape: (N,), N of all together."""
        return values if self.size == 1 else torch.cat(self._all(values.cpu()))

    def agree(self, value: object) -> bool:
        """Whether all processes have the same value."""
        return self.size == 1 or all(other == value for other in self._all(value))

    def seed(self, seed: int | None) -> int | None:
        """The seed of the first process; a new one if it has None and there are others."""
        return seed if self.size == 1 else self.from_first(new_seed() if seed is None else seed)

    def clock(self) -> float:
        """Seconds on the clock of the first process."""
        now = torch.tensor([self.only_first(time.perf_counter()) or 0.0], dtype=torch.float64)
        return self._sum(now).item()

    def require_same(self, what: str, here: Mapping[str, str]) -> None:
        """Refuse what differs from the first process.

        Args:
            what: what is compared: "architecture" or "arguments".
            here: descriptions by name.

        Raises:
            ValueError: in each process that differs.
        """
        first = self.from_first(dict(here))
        names = [name for name in {**first, **here} if first.get(name) != here.get(name)]
        if names:
            values = f"{here.get(names[0], 'nothing')}, where process 0 has {first.get(names[0], 'nothing')}"
            raise ValueError(
                f"all processes must train with the same {what}, got {names[0]}: {values} in process {self.rank}; "
                "make the same calls in each of them"
            )

    def align(self, weights: Weights) -> Weights:
        """Give every process the values of the first, and its random state.

        Raises:
            ValueError: if architectures differ.
        """
        if self.size == 1:
            return weights
        self.require_same("architecture", fingerprint(weights.tensors()))
        values = {name: value.cpu() for name, value in weights.copy().items()}
        values, state = self.from_first((values, random_state()))
        weights.restore(values)
        set_random_state(state)
        return weights

    def average(self, parameters: Iterable[Tensor], loss: Tensor, weight: float) -> Tensor:
        """Replace each gradient by its weighted mean over the processes, and return that of the loss.

        mean = sum_r weight_r * gradient_r / sum_r weight_r. A gradient that no process has stays None; a loss that is
        not finite in one process is so in all.

        Args:
            parameters: what is trained.
            loss: of this process, a scalar, without a graph.
            weight: number of rows or draws that it is a mean of; with 0, loss and gradient do not count.
        """
        parameters = list(parameters)
        counts = torch.tensor([1.0, *(p.grad is not None for p in parameters)], dtype=torch.float64) * weight
        self._sum(counts)  # on the CPU, and first: a process that has ended is missed here, and not on a GPU
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([loss.reshape(1).to(pieces[0].device), *(piece.flatten() for piece in pieces)])
        flat = flat * (weight / counts[0].item()) if weight else torch.zeros_like(flat)
        self._sum(flat)
        means = flat[1:].split([p.numel() for p in parameters])
        for parameter, mean, count in zip(parameters, means, counts[1:].tolist(), strict=True):
            parameter.grad = mean.view_as(parameter).to(parameter) if count else None
        return flat[0]

    def report(self, error: BaseException) -> None:
        """Leave word of why this process ends."""
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        with suppress(RuntimeError):  # the store may be gone too
            self._store.set("ended", f"process {self.rank} of {self.size} ended with {reason}")

    def reason(self) -> str:
        """Why the others are lost; takes a few seconds where they ended without a word."""
        self.close()  # so that those that wait for this process notice too
        advice = "With a checkpoint, the same call goes on from there, with any number of processes."
        try:
            return f"{self._store.get('ended').decode() if self._store.check(['ended']) else self._absent()}. {advice}"
        except RuntimeError:
            return f"the process that holds the meeting point, mostly process 0, has ended: see its output. {advice}"

    def _absent(self) -> str:
        present = [f"present {rank}" for rank in range(self.size)]
        self._store.set(present[self.rank], "")
        end = time.monotonic() + _ROLL_CALL
        while not self._store.check(present) and time.monotonic() < end:
            time.sleep(0.1)
        absent = [str(rank) for rank, key in enumerate(present) if not self._store.check([key])]
        if not absent:
            return "the connection between processes broke"
        return f"process {' and '.join(absent)} of {self.size} ended without a word, as if killed: see its output"

    def close(self) -> None:
        """Hang up."""
        if self._group is not None:
            group, self._group = self._group, None
            dist.destroy_process_group(group)

    def _all(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        self._together(lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            self._together(lambda: dist.all_reduce(values, group=self._group))
        return values

    def _together(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise LostProcessError("a process of the fit has ended") from error


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that run this block: those of ``torch.distributed`` or ``torchrun``, else this one alone.

    ``torch.distributed`` is set up for the block where it is not yet: gloo on CPUs, NCCL between GPUs. Only the first
    process warns. An error in one process ends the block in all.

    Raises:
        LostProcessError: if another process raises an error, or is killed.
    """
    if not _are_many():
        yield ALONE
        return
    ours = not dist.is_initialized()
    processes = _meet()
    try:
        with warnings.catch_warnings():
            if processes.rank:
                warnings.simplefilter("ignore")
            yield processes
        processes.clock()  # nobody hangs up before the others have heard all
    except LostProcessError as error:
        raise LostProcessError(processes.reason()) from error
    except BaseException as error:
        processes.report(error)
        raise
    finally:
        processes.close()
        if ours:
            dist.destroy_process_group()


def _are_many() -> bool:
    if not dist.is_available():
        return False
    if dist.is_initialized():
        return dist.get_world_size() > 1
    return all(name in os.environ for name in _LAUNCHED) and os.environ["WORLD_SIZE"] != "1"


def _meet() -> Processes:
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    name = f"pyro_affine {next(_meetings)}"  # of keys in the store, so that nothing from an earlier fit is read
    prefixed = dist.PrefixStore  # type: ignore[attr-defined]
    if not dist.is_initialized():
        base, rank, size = _meeting_point()
        dist.init_process_group(backend, store=prefixed(f"{name} all", base), rank=rank, world_size=size)
    store = prefixed(name, dist.distributed_c10d._get_default_store())
    return Processes(dist.get_rank(), dist.get_world_size(), group=dist.new_group(backend=backend), store=store)


@functools.cache
def _meeting_point() -> tuple[Any, int, int]:
    """Store, rank and size, from torchrun. Found once: a second server on the port could be taken for the first."""
    from torch.distributed.rendezvous import rendezvous  # a torch without torch.distributed lacks it

    store, rank, size = next(rendezvous("env://"))
    return store, rank, size
