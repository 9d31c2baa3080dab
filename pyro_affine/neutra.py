"""NUTS in the space of a fitted guide (NeuTra): exact draws where the guide alone is not enough."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoContinuous
from pyro.ops.integrator import potential_grad
from torch import Tensor

from pyro_affine.draws import replay_model
from pyro_affine.export import _plate_dims, _posterior_groups
from pyro_affine.inference_data import inference_data
from pyro_affine.neutra_result import NeutraResult
from pyro_affine.progress import _is_watched
from pyro_affine.random_state import new_seed, seeded
from pyro_affine.warped_model import Potential, WarpedModel

__all__ = ["NeutraResult", "neutra"]

_NUM_STARTS = 100
_NUM_CHECKS = 100  # draws at which a compiled density must be that of the model

_Run = Callable[[Potential], tuple[Tensor, Tensor]]


def neutra(
    model: Callable[..., Any],
    guide: AutoContinuous,
    *args: Any,
    num_samples: int = 1000,
    num_warmup: int = 500,
    num_chains: int = 4,
    seed: int | None = None,
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    jit: bool = True,
    log_likelihood: bool = True,
    progress: bool = True,
    **kwargs: Any,
) -> NeutraResult:
    """Draws of the exact posterior by NUTS in the space of the base of a fitted guide.

    With z = t(x) the transform of the guide, NUTS samples x from p(t(x), data) |det dz/dx|, which is close to the
    base, a standard normal, where the guide is close to the posterior, and maps the draws to the sites. The guide
    need not be exact, for it only sets the geometry. Its weights do not change.

    The chains run one after the other in this process, each from its own seed and its own starting point, so that
    any model can be used, also one that cannot be pickled, and the draws depend on the seed alone.

    Args:
        model: a Pyro model of continuous latent sites, without subsampling.
        guide: a fitted ``AutoContinuous`` guide of it, such as ``AutoRealNVP``.
        args, kwargs: arguments of the model, the data among them.
        num_samples: number of draws of each chain that are kept.
        num_warmup: number of draws of each chain before, which set step size and mass matrix.
        num_chains: number of chains; R-hat needs two.
        seed: seed of all chains; None for torch's own random numbers.
        target_accept: acceptance probability aimed at; higher takes smaller steps and diverges less.
        max_tree_depth: a trajectory has at most 2^max_tree_depth - 1 steps.
        log_likelihood: whether to keep the log-likelihood of each observation, draws times observations in size.
        jit: whether to compile the density, which takes a fraction of the time. It is compiled only where values
            and gradients stay the same; where they turn out to differ at the draws, all is run again without.
        progress: whether to show a progress bar.

    Returns:
        A ``NeutraResult``; print it.

    Raises:
        ValueError: if the guide is no ``AutoContinuous`` with a transform, has not been called, or has weights
            that are not finite; if it lacks a latent site of the model; if a number is below 1; if NUTS finds no
            starting point of finite density.

    Source: NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport (Hoffman et al., 2019).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoMultivariateNormal
    >>> def model(data):
    ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    ...     with pyro.plate("data", len(data)):
    ...         pyro.sample("obs", dist.Normal(0.0, scale), obs=data)
    >>> guide, data = AutoMultivariateNormal(model, init_scale=0.5), torch.tensor([1.0, -2.0])
    >>> guide(data)["scale"].shape
    torch.Size([])
    >>> result = neutra(model, guide, data, num_samples=20, num_warmup=20, num_chains=2, seed=0)
    >>> result.draws["scale"].shape
    torch.Size([2, 20])
    """
    _check(guide, num_samples=num_samples, num_warmup=num_warmup, num_chains=num_chains)
    options = {"target_accept_prob": target_accept, "max_tree_depth": max_tree_depth}
    num_steps = num_chains * (num_samples + num_warmup)
    # as in MCMC itself: a place that the model refuses is one without a density, and not an error
    with seeded(seed), pyro.validation_enabled(False), _frozen(guide), _bar(num_steps, progress) as bar:
        warped = WarpedModel(model, guide, args, kwargs)

        def run(potential: Potential) -> tuple[Tensor, Tensor]:
            bar.reset()
            chains = []
            for index in range(num_chains):
                bar.set_description(f"NeuTra, chain {index + 1} of {num_chains}")
                with seeded(new_seed()):
                    start = _start(potential, warped)
                    kernel = NUTS(potential_fn=potential, **options)
                    chains.append(_chain(kernel, start, num_samples, num_warmup, bar))
            latents, diverging = zip(*chains, strict=True)
            return torch.stack(latents), torch.stack(diverging)

        latents, diverging = _run_compiled(run, warped) if jit else run(warped.potential())
        flat = warped.sites(latents.flatten(0, 1))
    draws = {name: value.unflatten(0, diverging.shape) for name, value in flat.items()}
    data = _to_arviz(model, flat, diverging, log_likelihood, args=args, kwargs=kwargs, progress=progress)
    return NeutraResult(draws, diverging, data)


def _run_compiled(run: _Run, warped: WarpedModel) -> tuple[Tensor, Tensor]:
    """Run with the compiled density where it is the same as the plain one, also at what was drawn."""
    compiled = warped.compiled()
    if compiled is None:
        return run(warped.potential())
    latents, diverging = run(compiled)
    drawn = latents.flatten(0, 1)
    if warped.agrees(compiled, drawn[:: max(1, len(drawn) // _NUM_CHECKS)]):
        return latents, diverging
    warnings.warn(
        "the density changes when it is compiled, as branches on the values of sites do; running again without, "
        "jit=False saves the first run",
        stacklevel=3,
    )
    return run(warped.potential())


def _start(potential: Potential, warped: WarpedModel) -> dict[str, Tensor]:
    """A random point of finite density and gradient, wider spread than the base so that R-hat sees a failure."""
    for _ in range(_NUM_STARTS):
        start = {warped.name: 4 * torch.rand_like(warped.latent) - 2}
        grads, value = potential_grad(potential, dict(start))
        if value.isfinite() and grads[warped.name].isfinite().all():
            return start
    raise ValueError(
        f"NUTS needs a starting point of finite density and gradient, got none in {_NUM_STARTS} draws; look at "
        "psis(model, guide) and at health(guide), or fit the guide again"
    )


def _chain(
    kernel: NUTS, start: dict[str, Tensor], num_samples: int, num_warmup: int, bar: Any
) -> tuple[Tensor, Tensor]:
    """Draws of the shared latent, and which of them diverged."""

    def show(kernel: NUTS, _: Any, stage: str, __: int) -> None:
        bar.set_postfix({"stage": stage.lower(), **kernel.logging()}, refresh=False)
        bar.update()

    mcmc = MCMC(kernel, num_samples, num_warmup, initial_params=start, hook_fn=show, disable_progbar=True)
    mcmc.run()
    diverging = torch.zeros(num_samples, dtype=torch.bool)
    diverging[mcmc.diagnostics()["divergences"]["chain 0"]] = True
    (latents,) = mcmc.get_samples().values()
    return latents, diverging


def _to_arviz(
    model: Callable[..., Any],
    draws: dict[str, Tensor],
    diverging: Tensor,
    log_likelihood: bool,
    *,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    progress: bool,
) -> Any:
    replay = replay_model(model, draws, args=args, kwargs=kwargs, progress=progress)
    groups = _posterior_groups(replay, draws, log_likelihood)
    groups["sample_stats"]["diverging"] = diverging.flatten()
    arrays = {}
    for group, rows in groups.items():
        values = {name: value.detach().cpu() for name, value in rows.items()}
        if group != "observed_data":
            values = {name: value.unflatten(0, diverging.shape) for name, value in values.items()}
        arrays[group] = {name: value.numpy() for name, value in values.items()}
    return inference_data(arrays, dims=_plate_dims(replay.prototype))


def _check(guide: AutoContinuous, **numbers: int) -> None:
    if not isinstance(guide, AutoContinuous):
        raise ValueError(
            f"guide must be an AutoContinuous with a transform, got {type(guide).__name__}; use AutoRealNVP"
        )
    if guide.prototype_trace is None:
        raise ValueError("guide must be fitted, got one that was never called; use fit_guide(model, guide)")
    for name, parameter in guide.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"weights of the guide must be finite, got others in {name}; fit the guide again")
    for name, number in numbers.items():
        least = 4 if name == "num_samples" else 1  # R-hat splits each chain
        if number < least:
            raise ValueError(f"{name} must be {least} or more, got {number}")


@contextmanager
def _frozen(guide: AutoContinuous) -> Iterator[None]:
    """Weights constant and evaluation mode inside; both as they were afterwards."""
    trained = [parameter for parameter in guide.parameters() if parameter.requires_grad]
    training = [module for module in guide.modules() if module.training]
    try:
        guide.requires_grad_(False).eval()
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _bar(total: int, show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="NeuTra", leave=False, dynamic_ncols=True, disable=not (show and _is_watched()))
