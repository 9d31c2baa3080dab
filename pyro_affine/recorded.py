"""The log-density of a model and its score as one recorded list of operations, in place of a Pyro program run anew."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_affine.latent_density import LatentDensity
from pyro_affine.traces import BAD_DRAW

_MOST_SIZES = 4  # numbers of draws that are recorded: a step has one or two, and twice that once it has grown
_TRIES = 10  # recordings begun at draws that the model refuses
_FIRST, _EVERY = 3, 500  # calls of a size after which, and between which, the recording is compared to the model

Recording = Callable[[Tensor], tuple[Tensor, Tensor]]


class RecordedDensity:
    """``LatentDensity.value_and_score``, recorded once for each number of draws, then played back.

    Most of the time of a small Pyro model goes into handlers, distribution objects and autograd. A recording holds the
    operations on tensors alone, forward and backward, with all else as it was: it is right for a model that does the
    same whatever the draws, call after call. One that branches on values cannot be recorded. One that changes from
    call to call is found out by comparison: a recording is held against the model at its first three draws and at
    each 500th from then on. At the first sign of either, the model runs as it is from there on, with a warning.

    Where a recording raises an error, such as for a matrix that has no Cholesky factor, the model itself is asked.

    Args:
        density: of the model.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoDiagonalNormal
    >>> model = lambda: pyro.sample("z", dist.LogNormal(0.0, 1.0))
    >>> guide = AutoDiagonalNormal(model)
    >>> _ = guide()
    >>> RecordedDensity(LatentDensity(model, guide, nesting=0)).value_and_score(torch.ones(1, 1))
    (tensor([-1.4189], dtype=torch.float64), tensor([[-1.]], dtype=torch.float64))
    """

    def __init__(self, density: LatentDensity) -> None:
        self._density = density
        self._recordings: dict[int, Recording] = {}
        self._num_calls: dict[int, int] = {}
        self._refused, self._num_failed = False, 0

    def value_and_score(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density of each row and its gradient, as ``LatentDensity`` gives them. Shape: (S, D) to (S,), (S, D)."""
        pieces = [self._piece(rows) for rows in self._density.pieces(latents)]
        values, scores = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return values, scores

    def _piece(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        recording = None if self._refused else self._recording_for(rows)
        if recording is None:
            return self._density.value_and_score(rows)
        try:
            with torch.no_grad():
                found = recording(rows)
        except (RuntimeError, *BAD_DRAW):  # TorchScript makes a RuntimeError of all
            return self._density.value_and_score(rows)
        number = self._num_calls[len(rows)] = self._num_calls.get(len(rows), 0) + 1
        if number > _FIRST and number % _EVERY:
            return found
        expected = self._density.value_and_score(rows)
        if _are_close(rows, found, expected):
            return found
        self._refuse("it gives other values or gradients than a recording of it, so it changes from call to call")
        return expected

    def _recording_for(self, rows: Tensor) -> Recording | None:
        if len(rows) not in self._recordings and len(self._recordings) < _MOST_SIZES:
            try:
                self._recordings[len(rows)] = _record(self._density.at_once, rows)
            except Exception as error:  # whatever a tracer stumbles over
                self._num_failed += 1
                if isinstance(error, BAD_DRAW) and self._num_failed < _TRIES:
                    return None  # the next draws may do
                self._refuse(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
        return self._recordings.get(len(rows))

    def _refuse(self, reason: str) -> None:
        self._refused = True
        self._recordings.clear()
        warnings.warn(
            f"the model runs as it is, as compile_model=True cannot be done for it: {reason}. A model can be recorded "
            "if it neither branches on values nor changes from call to call.",
            RuntimeWarning,
            stacklevel=2,
        )


def _record(function: Recording, rows: Tensor) -> Recording:
    graph = make_fx(lambda rows: function(rows))(rows)  # which counts the arguments of a method wrongly
    graph.graph.eliminate_dead_code()
    graph.recompile()
    if any(node.op == "call_function" and not node.users for node in graph.graph.nodes):
        return graph  # which checks something, such as matrices that are factored; TorchScript would drop that
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of a tracer that cannot see what a graph does not have
        scripted = torch.jit.trace(graph.eval(), rows, check_trace=False)
        return torch.jit.freeze(scripted)  # type: ignore[no-any-return]


def _are_close(rows: Tensor, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Up to rounding, and NaN or infinite at the same rows."""
    tolerance = torch.finfo(rows.dtype).eps ** 0.5
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(*pair, rtol=tolerance, atol=tolerance, equal_nan=True) for pair in pairs)
