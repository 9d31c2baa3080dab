"""Draws of a fitted guide, their weights, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_affine.audit import AuditReport, audit
from pyro_affine.draws import draw_guide, replay_model
from pyro_affine.psis_result import PSISResult
from pyro_affine.random_state import seeded
from pyro_affine.traces import (
    LOG_PROB,
    Lanes,
    Reader,
    Rows,
    is_deterministic,
    read_log_prob,
    sample_sites,
    value_reader,
)

__all__ = ["AuditReport", "PSISResult", "audit", "draw_posterior", "psis"]


def draw_posterior(
    guide: Callable[..., Any],
    *args: Any,
    num_draws: int = 1000,
    seed: int | None = None,
    model: Callable[..., Any] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Constrained draws of every latent site of a guide, as they come; ``psis`` gives weighted ones.

    Args:
        guide: a fitted guide, such as an ``AutoContinuous``; run at many draws at once where it allows that.
        args, kwargs: arguments of the guide.
        num_draws: number of draws.
        seed: seed of the draws; None for torch's own random numbers.
        model: a Pyro model whose deterministic sites are wanted too; None for the latent sites alone.
        progress: whether to show a progress bar for work of more than two seconds.

    Returns:
        Draws by site, each of shape (num_draws, *shape of the site). Deterministic sites are NaN at draws
        that the model refuses.

    Raises:
        ValueError: if ``num_draws`` is below 1, if the guide is a point estimate or cannot be drawn from,
            if a latent site lies in a plate that subsamples, or if model and guide differ in their latent
            sites.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoMultivariateNormal
    >>> def model():
    ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    ...     pyro.deterministic("variance", scale**2)
    >>> pyro.clear_param_store()
    >>> guide = AutoMultivariateNormal(model)
    >>> draws = draw_posterior(guide, num_draws=5, seed=0, model=model)
    >>> {name: tuple(value.shape) for name, value in draws.items()}
    {'scale': (5,), 'variance': (5,)}
    """
    with seeded(seed):
        draws, _ = draw_guide(guide, num_draws, args=args, kwargs=kwargs, progress=progress)
        if model is None:
            return draws
        replay = replay_model(model, draws, args=args, kwargs=kwargs, progress=progress)
        deterministics, _ = replay.collect(_deterministic_reader(replay.prototype))
    return draws | deterministics


def psis(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_draws: int = 4000,
    seed: int | None = None,
    deterministics: bool = False,
    progress: bool = True,
    **kwargs: Any,
) -> PSISResult:
    """Draws of a fitted guide with Pareto-smoothed importance weights, and a verdict on the fit.

    The log-weights are log p(z, data) - log q(z) in nats, summed in float64 also for a float32 model; scales
    and masks of the model count. The model is run at many draws at once where it allows that (found out by
    comparing with single draws), else draw by draw. A draw that the model refuses by a numerical error has
    weight 0.

    Args:
        model: a Pyro model. Plates, constrained sites and plates with a fixed ``subsample=`` are fine; a
            plate that subsamples at random is not, and discrete sites must be summed out.
        guide: a fitted guide of continuous sites, such as an ``AutoContinuous``.
        args, kwargs: arguments of model and guide, the data among them.
        num_draws: number of draws, 25 or more; from 2200 on, k-hat up to 0.7 is good.
        seed: seed of the draws; None for torch's own random numbers.
        deterministics: whether to keep the values of the model's deterministic sites too.
        progress: whether to show a progress bar for work of more than two seconds.

    Returns:
        A ``PSISResult``; print it.

    Raises:
        ValueError: if model and guide differ in their latent sites, if a plate subsamples at random, if the
            guide is a point estimate, or if the model refuses every draw.

    Source: Yes, but Did It Work?: Evaluating Variational Inference (Yao et al., 2018).

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoMultivariateNormal, init_to_mean
    >>> def model(data):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(data)):
    ...         pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)
    >>> data = torch.zeros(3)
    >>> pyro.clear_param_store()
    >>> guide = AutoMultivariateNormal(model, init_to_mean, init_scale=0.5)  # the posterior is Normal(0, 0.5)
    >>> result = psis(model, guide, data, num_draws=1000, seed=0)
    >>> result.good, result.ess > 990
    (True, True)
    """
    with seeded(seed):
        draws, log_q = draw_guide(guide, num_draws, args=args, kwargs=kwargs, progress=progress)
        replay = replay_model(model, draws, args=args, kwargs=kwargs, progress=progress)
        read_sites = _deterministic_reader(replay.prototype)

        def read(trace: Any, lanes: Lanes) -> Rows:
            return read_log_prob(trace, lanes) | (read_sites(trace, lanes) if deterministics else {})

        rows, failures = replay.collect(read)
    log_p = rows.pop(LOG_PROB).cpu()
    log_p[list(failures)] = -math.inf
    return PSISResult(draws, log_p - log_q, deterministics=rows, messages=failures)


def _deterministic_reader(prototype: Any) -> Reader:
    sites = sample_sites(prototype)
    return value_reader({name: site for name, site in sites.items() if is_deterministic(site)})
