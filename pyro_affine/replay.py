"""A Pyro program run at many draws of its sites: all at once where the program allows it, else one by one.

All at once means inside one plate to the left of the program's own plates. Whether a program allows that is
found out, not guessed: some draws are run both ways and must agree. A draw at which the program raises a
numerical error (a scale that is NaN, a matrix that is not positive definite) is set aside with its message.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_affine.traces import (
    BAD_DRAW,
    LOG_PROB,
    Lanes,
    Reader,
    Rows,
    batch_depth,
    draws_at_once,
    first_line,
    has_density,
    sample_sites,
)

__all__ = ["Replay"]

_MAX_CHUNK = 250  # draws in one run; more gain little speed and can need memory that the prototype does not show
_NUM_PROBES = 5  # draws run both ways; a prime is seldom the size of a plate
_RTOL_DOUBLE, _RTOL_SINGLE = 1e-7, 1e-5  # rounding of long sums stays below, a mix-up of draws shows above


class Replay:
    """A program run at given values of its latent sites, or freely where none are given.

    Args:
        program: a model or guide.
        draws: values by site, each of shape (num_draws, *shape of the site). Sites left out are sampled anew.
        num_draws: number of draws.
        args, kwargs: arguments of the program.
        label: what to call the program in messages.
        progress: whether to show a progress bar for work of more than two seconds.

    Attributes:
        prototype: trace of the first draw that the program accepts.
        at_once: whether the last ``collect`` ran many draws at once.

    Raises:
        ValueError: if the program accepts no draw at all.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        draws: Rows,
        *,
        num_draws: int,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        label: str = "model",
        progress: bool = True,
    ) -> None:
        self._program, self._draws, self.num_draws = program, draws, num_draws
        self._args, self._kwargs = args, kwargs or {}
        self._label, self._progress = label, progress
        self._event_dims: dict[str, int] = {}
        self.at_once = False
        self.prototype, self._accepted = self._survey()
        sites = sample_sites(self.prototype)
        self._event_dims = {name: sites[name]["fn"].event_dim for name in draws if name in sites}
        self._nesting = max((batch_depth(site) for site in sites.values()), default=0)
        self._chunk = draws_at_once(self.prototype, _MAX_CHUNK)
        double = all(value.dtype == torch.float64 for value in draws.values() if value.is_floating_point())
        self._rtol = _RTOL_DOUBLE if double else _RTOL_SINGLE

    def collect(self, read: Reader, *, at_once: bool | None = None) -> tuple[Rows, dict[int, str]]:
        """What ``read`` finds in the traces of all draws.

        Args:
            read: from a trace and its lanes to tensors with the draws as leading axis.
            at_once: whether to run many draws at once; None to find out, which needs a ``read`` that gives
                the same whenever it is called.

        Returns:
            The tensors with leading axis num_draws, NaN for draws that the program does not accept; and the
            error messages of those by position.
        """
        if at_once is not None:
            return self._collect(read, at_once)
        if self.allows(read):
            rows, failures = self._collect(read, at_once=True)
            checks = {self.num_draws // 3, self.num_draws // 2, self.num_draws - 1} - failures.keys()
            if all(self._confirms(rows, row, read) for row in sorted(checks)):
                return rows, failures
            self._warn("values of a large batch differ from those of single draws")
        return self._collect(read, at_once=False)

    def allows(self, read: Reader) -> bool:
        """Whether a run of several draws at once agrees with runs of one draw; a warning tells why not."""
        try:
            together = self._many(self._accepted, read)
        except Exception as error:  # whatever a program written for one draw does with many
            self._warn(first_line(error))
            return False
        for row, index in enumerate(self._accepted):
            different = self._differences(together, row, self._one([index], read))
            if different:
                what = "the log-density" if different[0] == LOG_PROB else different[0]
                self._warn(f"{what} differs from its value for a single draw")
                return False
        return True

    @torch.no_grad()
    def _survey(self) -> tuple[Any, list[int]]:
        """Prototype trace, and the first few draws that the program accepts."""
        prototype, accepted, message = None, [], ""
        wanted = min(_NUM_PROBES, self.num_draws) if self._draws else 1
        for index in range(self.num_draws):
            try:
                trace = self._run([index], Lanes(1))
                trace.compute_log_prob(site_filter=has_density)
            except BAD_DRAW as error:
                message = message or first_line(error)
                continue
            prototype = prototype or trace
            accepted.append(index)
            if len(accepted) == wanted:
                break
        if prototype is None:
            raise ValueError(f"the {self._label} accepts none of {self.num_draws} draws; first error: {message}")
        return prototype, accepted

    def _run(self, index: Sequence[int], lanes: Lanes) -> Any:
        values = {
            name: lanes.place(value[list(index)], self._event_dims.get(name, 0)) for name, value in self._draws.items()
        }
        program = poutine.condition(self._program, data=values) if values else self._program
        if lanes.nesting is not None:
            program = pyro.plate("_draws", lanes.num_draws, dim=-lanes.nesting - 1)(program)
        return poutine.trace(program).get_trace(*self._args, **self._kwargs)

    @torch.no_grad()
    def _one(self, index: Sequence[int], read: Reader) -> Rows:
        return read(self._run(index, Lanes(1)), Lanes(1))

    @torch.no_grad()
    def _many(self, index: Sequence[int], read: Reader) -> Rows:
        lanes = Lanes(len(index), self._nesting)
        return read(self._run(index, lanes), lanes)

    def _collect(self, read: Reader, at_once: bool) -> tuple[Rows, dict[int, str]]:
        self.at_once = at_once
        failures: dict[int, str] = {}
        size = self._chunk if at_once else 1
        pieces: list[Rows | None] = []
        for start in self._bar(range(0, self.num_draws, size)):
            index = range(start, min(start + size, self.num_draws))
            pieces += self._halve(index, read, failures)
        return _join(pieces), failures

    def _halve(self, index: Sequence[int], read: Reader, failures: dict[int, str]) -> list[Rows | None]:
        """Rows of many draws at once; where that fails, of each half, down to the draws that are to blame."""
        if len(index) == 1:
            return [self._try(index, read, failures)]
        try:
            return [self._many(index, read)]
        except Exception:  # a numerical error of a draw, or lack of memory; single draws show any other error
            half = len(index) // 2
            return self._halve(index[:half], read, failures) + self._halve(index[half:], read, failures)

    def _try(self, index: Sequence[int], read: Reader, failures: dict[int, str]) -> Rows | None:
        try:
            return self._one(index, read)
        except BAD_DRAW as error:
            failures[index[0]] = first_line(error)
            return None

    def _confirms(self, rows: Rows, row: int, read: Reader) -> bool:
        """Whether a run of one draw alone gives its row."""
        single = self._try([row], read, {})
        return single is not None and not self._differences(rows, row, single)

    def _differences(self, rows: Rows, row: int, single: Rows) -> list[str]:
        """Names of the tensors that differ between one row and a run of that draw alone, beyond rounding."""
        return [name for name, value in single.items() if not _close(rows[name][row], value[0], self._rtol)]

    def _bar(self, steps: Sequence[int]) -> Iterable[int]:
        from tqdm.auto import tqdm

        what = f"{self._label} at {self.num_draws} draws"
        bar: Iterable[int] = tqdm(steps, desc=what, delay=2.0, leave=False, disable=not self._progress)
        return bar

    def _warn(self, reason: str) -> None:
        message = f"the {self._label} cannot be run at many draws at once ({reason}); running it draw by draw"
        warnings.warn(message, stacklevel=_frames_inside_package())


def _frames_inside_package() -> int:
    """The ``stacklevel`` at which a warning of the caller points to the line of the user."""
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("pyro_affine"):
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    return level


def _close(actual: Tensor, expected: Tensor, rtol: float) -> bool:
    if actual.shape != expected.shape:
        return False
    actual, expected = actual.to(torch.float64), expected.to(torch.float64)
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(actual, expected, rtol=rtol, atol=rtol * scale + 1e-12, equal_nan=True)


def _join(pieces: Sequence[Rows | None]) -> Rows:
    known = next(piece for piece in pieces if piece is not None)
    blank = {name: _blank(value) for name, value in known.items()}
    return {name: torch.cat([(blank if piece is None else piece)[name] for piece in pieces]) for name in known}


def _blank(value: Tensor) -> Tensor:
    dtype = value.dtype if value.is_floating_point() else torch.float64
    return torch.full_like(value[:1], torch.nan, dtype=dtype)
