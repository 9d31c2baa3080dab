"""Draws of a guide scored by its model: whether many run at once, their log-weights, and where one goes wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_affine.random_state import seeded
from pyro_affine.replay import Replay
from pyro_affine.traces import (
    BAD_DRAW,
    LOG_PROB,
    Lanes,
    batch_depth,
    draws_at_once,
    first_line,
    is_delta,
    read_log_prob,
    sample_sites,
)

_TRIES = 10  # a guide of sensible width draws ten refused starts in a row only if the model refuses all
_NUM_PROBES = 5  # draws run one by one and at once; a prime is seldom the size of a plate
_CHUNK = 256  # draws scored at once, without gradients, unless the sites of the model are large


@dataclass(frozen=True)
class Pair:
    """A model, its guide, and their arguments.

    Args:
        model: a Pyro model.
        guide: a Pyro guide for it.
        args: positional arguments of both.
        kwargs: keyword arguments of both.

    Raises:
        ValueError: if ``args`` is no tuple or list, such as data given as they are, or ``kwargs`` no dict.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.args, (tuple, list)) or not isinstance(self.kwargs, dict):
            raise ValueError(
                "args must be a tuple of the model's arguments and kwargs a dict, got "
                f"{type(self.args).__name__} and {type(self.kwargs).__name__}; write (data,) for one argument"
            )

    def prototype(self) -> tuple[Any, Any]:
        """Traces of model and guide at one draw that the model accepts; sets an autoguide up.

        Raises:
            ValueError: if the model accepts none of ten draws of the guide and none of ten from its prior, or has
                latent sites that the guide lacks.
        """
        try:
            model_trace, guide_trace = first_success(self._traces)
        except BAD_DRAW:
            model_trace, guide_trace = self._run(self.model), self._run(self.guide)
        missing = [name for name in _latents(model_trace) if name not in guide_trace.nodes]
        if missing:
            raise ValueError(
                f"every latent site of the model must be in the guide, got none for {missing}; discrete latents "
                "have to be summed out in the model"
            )
        return model_trace, guide_trace

    def log_weights(self, num_draws: int, nesting: int | None) -> Tensor:
        """log p(data, z) - log q(z) of fresh draws z, in nats; NaN where the model refuses one.

        Args:
            num_draws: number of draws.
            nesting: from ``find_nesting``; None for draws one by one.

        Returns:
            Shape: (num_draws,), float64, on the CPU.
        """
        with torch.no_grad(), pyro.validation_enabled(False):  # a bad draw gives NaN and leaves its neighbours alone
            size = 1 if nesting is None else self._draws_at_once
            sizes = [min(size, num_draws - start) for start in range(0, num_draws, size)]
            return torch.cat([self._log_weights(Lanes(size, nesting)) for size in sizes])

    def refusals(self, num_draws: int, nesting: int | None) -> list[str]:
        """What the model says against those of some fresh draws that it refuses and ``log_weights`` counts.

        That does not validate, so a Poisson distribution of negative rate has a density at 0.
        """
        if nesting is not None and not self._refusal(Lanes(num_draws, nesting)):
            return []
        return [words for words in (self._refusal(Lanes(1)) for _ in range(num_draws)) if words]

    def find_nesting(self) -> tuple[int | None, str]:
        """Number of batch dimensions to the left of which particles go, or None and why they must run one by one.

        Some draws of the guide are scored by guide and model one by one and all at once, and must agree.
        """
        try:
            guide_traces = [self._run(self.guide) for _ in range(_NUM_PROBES)]
            model_traces = [self._run_model(trace) for trace in guide_traces]
            nesting = max(map(_depth, (*guide_traces, *model_traces)))
            self._compare("guide", self.guide, guide_traces)
            self._compare("model", self.model, model_traces)
            self._try_at_once(nesting)
        except Exception as error:  # whatever a program written for one draw does with many
            return None, first_line(error)
        return nesting, ""

    def first_bad_site(self, num_draws: int, nesting: int | None) -> str:
        """The first site whose value or log-density is not finite at the draws that the random state gives."""
        size = 1 if nesting is None else num_draws
        for _ in range(num_draws // size):
            with torch.no_grad(), pyro.validation_enabled(False), _plate(Lanes(size, nesting)):
                guide_trace, found = self._search("guide", self.guide)
                replayed = poutine.replay(self.model, trace=guide_trace)
                found = found or self._search("model", replayed)[1]
            if found:
                return found
        return ""

    def _run(self, program: Callable[..., Any]) -> Any:
        return first_success(lambda: poutine.trace(program).get_trace(*self.args, **self.kwargs))

    def _run_model(self, guide_trace: Any) -> Any:
        """At a draw of the guide; at one from the prior where that is refused, as it can be before training."""
        try:
            return poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(*self.args, **self.kwargs)
        except BAD_DRAW:
            return self._run(self.model)

    def _traces(self) -> tuple[Any, Any]:
        traces = get_importance_trace("flat", math.inf, self.model, self.guide, self.args, self.kwargs)
        return traces[0], traces[1]

    def _log_weights(self, lanes: Lanes) -> Tensor:
        try:
            with _plate(lanes):
                model_trace, guide_trace = self._traces()
            return _read(model_trace, lanes)[LOG_PROB] - _read(guide_trace, lanes)[LOG_PROB]
        except BAD_DRAW:
            return torch.full((lanes.num_draws,), math.nan, dtype=torch.float64, device="cpu")

    @cached_property
    def _draws_at_once(self) -> int:
        with seeded(0):  # so that the draws to be scored stay what they are
            return draws_at_once(self._run_model(self._run(self.guide)), _CHUNK)

    def _refusal(self, lanes: Lanes) -> str:
        with torch.no_grad(), _plate(lanes), suppress(*BAD_DRAW):
            with pyro.validation_enabled(False):
                guide_trace = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
            model = poutine.trace(poutine.replay(self.model, trace=guide_trace))
            try:
                _read(model.get_trace(*self.args, **self.kwargs), lanes)
            except BAD_DRAW as error:
                with pyro.validation_enabled(False):
                    log_prob = _read(model.get_trace(*self.args, **self.kwargs), lanes)[LOG_PROB]
                return first_line(error) if log_prob.isfinite().any() else ""
        return ""

    def _compare(self, label: str, program: Callable[..., Any], traces: list[Any]) -> None:
        fixed = poutine.replay(program, trace=_only_subsamples(traces[0]))
        values = {name: _stacked(traces, name) for name in _latents(traces[0], with_deltas=label == "model")}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            replay = Replay(
                fixed, values, num_draws=len(traces), args=self.args, kwargs=self.kwargs, label=label, progress=False
            )
            if not replay.allows(_read):
                raise RuntimeError("; ".join(str(warning.message) for warning in caught))

    def _try_at_once(self, nesting: int) -> None:
        elbo = Trace_ELBO(_NUM_PROBES, max_plate_nesting=nesting, vectorize_particles=True)
        with pyro.validation_enabled(False):  # whether the draws are good is not asked here
            first_success(lambda: elbo.differentiable_loss(self.model, self.guide, *self.args, **self.kwargs))

    def _search(self, label: str, program: Callable[..., Any]) -> tuple[Any, str]:
        tracer = poutine.trace(program)
        error = None
        try:
            tracer(*self.args, **self.kwargs)
        except Exception as raised:  # to be named, with the site that it came after
            error = raised
        sites = sample_sites(tracer.trace)
        for name, site in sites.items():
            if not torch.isfinite(site["value"]).all():
                return tracer.trace, f"the value of site '{name}' in the {label} is not finite"
            if not torch.isfinite(site["fn"].log_prob(site["value"])).all():
                return tracer.trace, f"the log-density of site '{name}' in the {label} is not finite"
        after = f"after site '{list(sites)[-1]}'" if sites else "at its start"
        return tracer.trace, f"the {label} raised {after}: {first_line(error)}" if error else ""


def first_success(call: Callable[[], Any]) -> Any:
    """What a call returns, tried up to ten times while its draws are refused.

    Raises:
        ValueError, ArithmeticError, LinAlgError: the error of the tenth.
    """
    for _ in range(_TRIES - 1):
        try:
            return call()
        except BAD_DRAW:
            continue
    return call()


def _plate(lanes: Lanes) -> AbstractContextManager[Any]:
    if lanes.nesting is None:
        return nullcontext()
    return pyro.plate("_particles", lanes.num_draws, dim=-lanes.nesting - 1)


def _read(trace: Any, lanes: Lanes) -> dict[str, Tensor]:
    """Log-density in nats, on the CPU; 0 for a guide without sites."""
    if not sample_sites(trace):
        return {LOG_PROB: torch.zeros(lanes.num_draws, device="cpu")}
    return {LOG_PROB: read_log_prob(trace, lanes)[LOG_PROB].cpu()}


def _depth(trace: Any) -> int:
    return max((batch_depth(site) for site in sample_sites(trace).values()), default=0)


def _latents(trace: Any, *, with_deltas: bool = True) -> list[str]:
    sites = sample_sites(trace).items()
    return [name for name, site in sites if not site["is_observed"] and (with_deltas or not is_delta(site["fn"]))]


def _stacked(traces: list[Any], name: str) -> Tensor:
    return torch.stack([trace.nodes[name]["value"].detach() for trace in traces])


def _only_subsamples(trace: Any) -> Any:
    kept = poutine.Trace()
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and site_is_subsample(site):
            kept.add_node(name, **site)
    return kept
