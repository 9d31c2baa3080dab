"""Hand a fitted guide over to ArviZ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_affine.diagnostics import psis
from pyro_affine.draws import replay_model
from pyro_affine.inference_data import inference_data
from pyro_affine.psis_result import PSISResult
from pyro_affine.random_state import seeded
from pyro_affine.replay import Replay
from pyro_affine.traces import (
    LOG_PROB,
    Lanes,
    Rows,
    Site,
    is_data,
    is_deterministic,
    pointwise_reader,
    read_log_prob,
    sample_sites,
    value_reader,
)

__all__ = ["to_arviz"]

_TAKEN = ("chain", "draw")  # dimensions that ArviZ names
_POINTWISE = "__pointwise__"  # prefix of a log-likelihood among values named by site


def to_arviz(
    model: Callable[..., Any],
    guide_or_result: Callable[..., Any] | PSISResult,
    *args: Any,
    num_draws: int | None = None,
    resample: bool | None = None,
    log_likelihood: bool = True,
    prior: bool = False,
    predictive: bool = False,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    """ArviZ container of a fitted guide: draws, weights, log-likelihood, data and predictions.

    Groups: ``posterior`` (latent and deterministic sites, one chain), ``sample_stats`` (per draw: ``lp``,
    the log joint density; ``log_weight``, the raw importance weight; ``log_weight_smoothed``, normalised;
    ``source``, its position among the weighted draws; k-hat, ESS, ELBO, log evidence and the verdict as
    attributes), ``log_likelihood`` (per observation, without scales), ``observed_data``, and when asked for
    ``posterior_predictive``, ``prior`` and ``prior_predictive``. Log-densities are in nats.

    The draws are independent and form one chain, so R-hat and the ESS of Markov chains say nothing about
    them: use ``arviz.summary(data, kind="stats")``, and for the errors of the means ``PSISResult.table()``.

    Args:
        model: a Pyro model.
        guide_or_result: a fitted guide, or what ``psis`` gave for it.
        args, kwargs: arguments of model and guide, the data among them.
        num_draws: number of draws in each group. None for 1000 with a guide, for all of a ``PSISResult``.
        resample: whether ``posterior`` holds draws chosen by weight, or the draws of the guide as they are.
            None chooses by weight where ``PSISResult.good``. The attributes of ``posterior`` tell which it
            is.
        log_likelihood: whether to keep the log-likelihood, draws times observations in size.
        prior: whether to add draws of the prior and its predictions.
        predictive: whether to add predictions of the observed sites.
        coords: labels by dimension, as in ArviZ.
        dims: names of dimensions by site, as in ArviZ. By default a plate gives its dimension its name.
        seed: seed of all draws; None for torch's own random numbers.
        progress: whether to show a progress bar for work of more than two seconds.

    Returns:
        ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with ArviZ 1.x.

    Raises:
        ValueError: as ``psis`` does; if ``dims`` names a site that the model has not; if more draws are
            asked for than a ``PSISResult`` has, without ``resample``; or if the prior cannot be drawn from.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoMultivariateNormal
    >>> def model(data):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("school", len(data)):
    ...         pyro.sample("score", dist.Normal(loc, 1.0), obs=data)
    >>> pyro.clear_param_store()
    >>> guide = AutoMultivariateNormal(model, init_scale=0.5)
    >>> schools = {"school": ["A", "B", "C"]}
    >>> data = to_arviz(model, guide, torch.zeros(3), num_draws=200, seed=0, coords=schools)
    >>> data["log_likelihood"]["score"].dims
    ('chain', 'draw', 'school')
    """
    call: dict[str, Any] = {"args": args, "kwargs": kwargs, "progress": progress}
    with seeded(seed):
        result = guide_or_result
        if not isinstance(result, PSISResult):
            result = psis(model, result, *args, num_draws=num_draws or 1000, progress=progress, **kwargs)
        by_weight = result.good if resample is None else resample
        source = _source(result, num_draws, by_weight)
        latent = {name: value[source.to(value.device)] for name, value in result.draws.items()}
        replay = replay_model(model, latent, **call)
        _check_dims(dims, replay.prototype)
        groups = _posterior_groups(replay, latent, log_likelihood)
        groups["sample_stats"] |= _weight_stats(result, source)
        free: dict[str, Any] = {"num_draws": len(source), "at_once": replay.at_once, **call}
        if predictive:
            groups["posterior_predictive"] = _free_draws(model, latent, groups["observed_data"], **free)
        if prior:
            drawn = _free_draws(model, {}, groups["posterior"] | groups["observed_data"], **free)
            groups["prior_predictive"] = {name: drawn.pop(name) for name in groups["observed_data"]}
            groups["prior"] = drawn
    arrays = {group: _arrays(rows, group) for group, rows in groups.items()}
    named = _plate_dims(replay.prototype) | dict(dims or {})
    return inference_data(arrays, coords=coords, dims=named, attrs=_attrs(result, by_weight))


class _Unobserved(Messenger):
    """Samples what is observed."""

    def _pyro_sample(self, msg: Any) -> None:
        if is_data(msg):
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def _source(result: PSISResult, num_draws: int | None, by_weight: bool) -> Tensor:
    """Positions of the exported draws among the weighted ones."""
    if by_weight:
        return result.resampled_positions(num_draws)
    if num_draws is not None and num_draws > result.num_draws:
        raise ValueError(
            f"num_draws must not exceed the {result.num_draws} weighted draws, got {num_draws}; "
            "take more in psis, or resample=True"
        )
    return torch.arange(result.num_draws if num_draws is None else num_draws)


def _posterior_groups(replay: Replay, latent: Rows, log_likelihood: bool) -> dict[str, Rows]:
    sites = sample_sites(replay.prototype)
    observed = {name: site for name, site in sites.items() if is_data(site) and name not in latent}
    read_values = value_reader({name: site for name, site in sites.items() if is_deterministic(site)})
    read_pointwise = pointwise_reader(observed if log_likelihood else {})

    def read(trace: Any, lanes: Lanes) -> Rows:
        pointwise = {_POINTWISE + name: value for name, value in read_pointwise(trace, lanes).items()}
        return read_values(trace, lanes) | read_log_prob(trace, lanes) | pointwise

    rows, failures = replay.collect(read)
    log_joint = rows.pop(LOG_PROB)
    log_joint[list(failures)] = -torch.inf
    pointwise = {name: rows.pop(_POINTWISE + name) for name in observed if _POINTWISE + name in rows}
    return {
        "posterior": latent | rows,
        "sample_stats": {"lp": log_joint},
        "log_likelihood": pointwise,
        "observed_data": {name: site["value"] for name, site in observed.items()},
    }


def _weight_stats(result: PSISResult, source: Tensor) -> Rows:
    return {
        "log_weight": result.log_weights[source],
        "log_weight_smoothed": result.smoothed_log_weights[source],
        "source": source,
    }


def _free_draws(
    model: Callable[..., Any],
    latent: Rows,
    names: Iterable[str],
    *,
    num_draws: int,
    at_once: bool,
    **call: Any,
) -> Rows:
    """Values of some sites when nothing is observed; latent sites at given values, or from the prior."""
    label = "predictive" if latent else "prior"
    try:
        replay = Replay(_Unobserved()(model), latent, num_draws=num_draws, label=label, **call)
        sites = sample_sites(replay.prototype)
        return replay.collect(value_reader({name: sites[name] for name in names}), at_once=at_once)[0]
    except NotImplementedError as error:
        raise ValueError(f"every site must have a sampler for {label} draws; leave {label}=False") from error


def _check_dims(dims: Mapping[str, Sequence[str]] | None, prototype: Any) -> None:
    sites = sample_sites(prototype)
    unknown = sorted(set(dims or {}) - sites.keys())
    if unknown:
        raise ValueError(f"dims must name sites of the model, got {unknown}; the model has {sorted(sites)}")


def _plate_dims(prototype: Any) -> dict[str, list[str]]:
    sites = sample_sites(prototype)
    return {name: _site_dims(name, site) for name, site in sites.items()}


def _site_dims(name: str, site: Site) -> list[str]:
    """Names of the dimensions of a site: that of the plate, or the one that ArviZ would give."""
    shape = site["value"].shape
    event_dim = site["fn"].event_dim
    if is_deterministic(site) and event_dim == len(shape):
        event_dim = 0  # Pyro's default, which knows nothing of plates
    names = [f"{name}_dim_{axis}" for axis in range(len(shape))]
    for frame in site["cond_indep_stack"]:
        axis = len(shape) - event_dim + (frame.dim or 0)
        if frame.vectorized and 0 <= axis < len(shape) and shape[axis] == frame.size:
            names[axis] = f"{frame.name}_dim" if frame.name in _TAKEN else frame.name
    return names


def _arrays(rows: Rows, group: str) -> dict[str, np.ndarray]:
    arrays = {name: value.detach().cpu().numpy() for name, value in rows.items()}
    return arrays if group == "observed_data" else {name: array[None] for name, array in arrays.items()}


def _attrs(result: PSISResult, by_weight: bool) -> dict[str, dict[str, Any]]:
    chosen = "chosen by importance weight, with replacement" if by_weight else "of the guide, without weights"
    stats = {
        "khat": result.khat,
        "khat_threshold": result.threshold,
        "ess": result.ess,
        "num_weighted_draws": result.num_draws,
        "num_dropped": result.num_dropped,
        "elbo": result.elbo,
        "elbo_se": result.elbo_se,
        "log_evidence": result.log_evidence,
        "log_evidence_se": result.log_evidence_se,
        "good": int(result.good),  # netCDF has no booleans
        "verdict": result.verdict,
    }
    return {"posterior": {"draws": chosen, "verdict": result.verdict}, "sample_stats": stats}
