"""The log-density of a model as a function of a vector: all latents, unconstrained, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

from pyro_affine.traces import (
    BAD_DRAW,
    LOG_PROB,
    Lanes,
    draws_at_once,
    is_random_subsample,
    read_log_prob,
    sample_sites,
)

_CHUNK = 256  # draws at once, unless the sites of the model are large
_HIGHEST = 1e12  # nats; what is above comes from rounding, such as a difference of squares over a scale of 1e-20
_SMALL_CHUNK, _SMALL_ENTRIES = 1024, 1_000_000  # where they are small, of which all together fit a processor's cache


class LatentDensity:
    """log p(data, z) + log|det dz/du| for vectors u of unconstrained latents, as an ``AutoContinuous`` lays them out.

    Args:
        model: a Pyro model.
        guide: an autoguide of it that is set up; gives sites, supports and layout.
        args, kwargs: arguments of the model.
        nesting: number of batch dimensions of the model, to the left of which vectors go, from
            ``Pair.find_nesting``; None to run the model vector by vector.

    Attributes:
        num_runs: how many times the model was run.

    >>> import pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal, AutoDiagonalNormal
    >>> model = lambda: pyro.sample("z", dist.LogNormal(0.0, 1.0))
    >>> guide = AutoDiagonalNormal(model)
    >>> _ = guide()
    >>> LatentDensity(model, guide, nesting=0)(torch.zeros(2, 1))
    tensor([-0.9189, -0.9189], dtype=torch.float64)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: AutoContinuous,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        nesting: int | None,
    ) -> None:
        self._model, self._guide, self._args, self._kwargs = model, guide, args, kwargs or {}
        self.nesting, self.num_runs = nesting, 0

    def __call__(self, latents: Tensor) -> Tensor:
        """Log-density in nats of each row, in float64, with a graph; the model's errors are raised.

        Shape: (S, D) to (S,).
        """
        if self.nesting is None:
            return torch.cat([self._run(row[None], Lanes(1)) for row in latents])
        lanes = Lanes(len(latents), self.nesting)
        return self._run(lanes.place(latents, 1), lanes)

    def value_and_score(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density of each row and its gradient, without a graph; NaN where the model refuses or overflows.

        Shape: (S, D) to (S,) and (S, D), float64.
        """
        pieces = [self._halve(rows) for rows in self.pieces(latents)]
        values, scores = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return values, scores

    def at_once(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``value_and_score`` by one run of the model, whose errors are raised. Shapes and dtypes as there."""
        leaf = rows.detach().requires_grad_()
        with torch.enable_grad(), pyro.validation_enabled(False):  # so that one NaN leaves its neighbours alone
            values = self(leaf)
            (scores,) = torch.autograd.grad(values.sum(), leaf)
        values = values.detach().masked_fill(values > _HIGHEST, torch.nan)
        return values, scores.double().masked_fill(~values.isfinite()[:, None], torch.nan)

    def pieces(self, latents: Tensor) -> tuple[Tensor, ...]:
        """The rows in as many pieces as the model is run. Shape: (S, D)."""
        return torch.split(latents.detach(), self._rows_at_once)

    def is_random(self) -> bool:
        """Whether it changes from call to call: a plate subsamples at random, or a site is left to be drawn."""
        drawn = [site for site in sample_sites(self._prototype).values() if not site["is_observed"]]
        return bool(drawn) or any(map(is_random_subsample, self._prototype.nodes.values()))

    @cached_property
    def _prototype(self) -> Any:
        """Trace of the model at the initial values of the guide."""
        return self._trace(self._guide._init_loc()[None], Lanes(1))[0]

    @cached_property
    def _rows_at_once(self) -> int:
        if self.nesting is None:
            return 1
        small = draws_at_once(self._prototype, _SMALL_CHUNK, most_entries=_SMALL_ENTRIES)
        return max(small, draws_at_once(self._prototype, _CHUNK))

    def _halve(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """All rows at once; where the model refuses one, each half, down to the rows that are to blame."""
        try:
            return self.at_once(rows)
        except BAD_DRAW:
            if len(rows) == 1:
                return rows.new_full((1,), torch.nan).double(), torch.full_like(rows, torch.nan).double()
        first, second = (self._halve(part) for part in rows.tensor_split(2))
        return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])

    def _run(self, latents: Tensor, lanes: Lanes) -> Tensor:
        trace, jacobian = self._trace(latents, lanes)
        return read_log_prob(trace, lanes)[LOG_PROB] + jacobian

    def _trace(self, latents: Tensor, lanes: Lanes) -> tuple[Any, Tensor]:
        """Trace of the model at these latents, and log|det| of the constraints, in float64. Shape: (S,)."""
        self.num_runs += 1
        values, jacobian = {}, torch.zeros((), dtype=torch.float64, device=latents.device)
        for site, unconstrained in self._guide._unpack_latent(latents if lanes.nesting is not None else latents[0]):
            transform = biject_to(site["fn"].support)
            values[site["name"]] = value = transform(unconstrained)
            terms = transform.log_abs_det_jacobian(unconstrained, value)
            terms = sum_rightmost(terms, terms.dim() - value.dim() + site["fn"].event_dim)
            jacobian = jacobian + lanes.total(terms)
        program = poutine.condition(self._model, data=values)
        plate = pyro.plate("_draws", lanes.num_draws, dim=-lanes.nesting - 1) if lanes.nesting is not None else None
        with nullcontext() if plate is None else plate:
            return poutine.trace(program).get_trace(*self._args, **self._kwargs), jacobian
