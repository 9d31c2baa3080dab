"""Draws of a guide with their log-density, and the model at those draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro.infer.autoguide import AutoContinuous, AutoNormal
from torch import Tensor

from pyro_affine.replay import Replay
from pyro_affine.traces import (
    LOG_PROB,
    Lanes,
    Rows,
    Site,
    is_delta,
    is_deterministic,
    is_random_subsample,
    read_log_prob,
    require_whole_plates,
    sample_sites,
    value_reader,
)

__all__ = ["draw_guide", "replay_model"]

_VECTORISED = (AutoContinuous, AutoNormal)  # run inside any outer plate by Pyro's contract


def draw_guide(
    guide: Callable[..., Any],
    num_draws: int,
    *,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    progress: bool = True,
) -> tuple[Rows, Tensor]:
    """Constrained draws of all latent sites of a guide, and the log-density of each draw.

    Args:
        guide: a Pyro guide with densities. Auxiliary sites count in the density and are not returned.
        num_draws: number of draws, 1 or more.
        args, kwargs: arguments of the guide.
        progress: whether to show a progress bar for work of more than two seconds.

    Returns:
        The pair of draws by site, each of shape (num_draws, *shape of the site); and log q in nats with the
        Jacobian of the constraints, float64, shape (num_draws,).

    Raises:
        ValueError: if ``num_draws`` is below 1, if the guide is a point estimate, if it cannot be drawn
            from, or if it has a latent site in a plate that subsamples.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be 1 or more, got {num_draws}")
    call: dict[str, Any] = {"args": args, "kwargs": kwargs, "label": "guide", "progress": progress}
    try:
        replay = Replay(guide, {}, num_draws=num_draws, **call)
    except ValueError as error:
        raise ValueError(f"the guide gives no draw, its parameters may not be finite: {error}") from error
    latent, primitive = _latent_sites(replay.prototype), _primitive_sites(replay.prototype)
    _check_sites(latent, primitive)
    read_values = value_reader(latent | primitive)

    def read(trace: Any, lanes: Lanes) -> Rows:
        return read_values(trace, lanes) | read_log_prob(trace, lanes)

    rows, failures = replay.collect(read, at_once=True)
    if not isinstance(guide, _VECTORISED):
        few = {name: rows[name][:5] for name in primitive}  # put back one by one, they must give the same
        if not Replay(guide, few, num_draws=min(5, num_draws), **call).allows(read):
            rows, failures = replay.collect(read, at_once=False)
    if failures:
        message = next(iter(failures.values()))
        raise ValueError(f"the guide fails at {len(failures)} of {num_draws} draws, refit it: {message}")
    return {name: rows[name] for name in latent}, rows[LOG_PROB].cpu()


def replay_model(
    model: Callable[..., Any],
    draws: Rows,
    *,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    progress: bool = True,
) -> Replay:
    """The model at given draws of all its latent sites.

    Args:
        model: a Pyro model.
        draws: draws by site, each of shape (S, *shape of the site).
        args, kwargs: arguments of the model.
        progress: whether to show a progress bar for work of more than two seconds.

    Raises:
        ValueError: if the latent sites of the model are not those of the draws, or the model refuses all
            draws, or a plate subsamples at random.
    """
    size = len(next(iter(draws.values())))
    replay = Replay(model, draws, num_draws=size, args=args, kwargs=kwargs, progress=progress)
    _refuse_random_subsample(replay.prototype)
    sites = sample_sites(replay.prototype)
    missing = sorted(name for name, site in sites.items() if not site["is_observed"])
    foreign = sorted(draws.keys() - sites.keys())
    if missing or foreign:
        raise ValueError(
            f"model and guide must have the same latent sites, got {missing or 'none'} in the model alone "
            f"and {foreign or 'none'} in the guide alone; build the guide from this model, and sum discrete "
            "sites out"
        )
    return replay


def _latent_sites(trace: Any) -> dict[str, Site]:
    return {
        name: site
        for name, site in sample_sites(trace).items()
        if not site["is_observed"] and not site["infer"].get("is_auxiliary")
    }


def _primitive_sites(trace: Any) -> dict[str, Site]:
    """Sites that the guide samples from a density; the rest are functions of them."""
    return {
        name: site
        for name, site in sample_sites(trace).items()
        if not site["is_observed"] and not is_deterministic(site) and not is_delta(site["fn"])
    }


def _check_sites(latent: dict[str, Site], primitive: dict[str, Site]) -> None:
    if not primitive:
        raise ValueError(
            "the guide must have a density, got a point estimate (all sites are Delta); use a guide such as "
            "AutoMultivariateNormal, or laplace_approximation() of an AutoLaplaceApproximation"
        )
    require_whole_plates({name: site["cond_indep_stack"] for name, site in latent.items()})


def _refuse_random_subsample(prototype: Any) -> None:
    for name, site in prototype.nodes.items():
        if is_random_subsample(site):
            size, full_size = site["fn"].subsample_size, site["fn"].size
            raise ValueError(
                f"the density must not change between calls, got plate {name!r} which subsamples {size} of "
                f"{full_size} at random; call with the whole data, or fix the plate with subsample="
            )
