"""Variational fits in one call."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pyro_affine.checkpoint import read_checkpoint
from pyro_affine.compiled import Compile
from pyro_affine.distributed import joined
from pyro_affine.fit_result import FitResult
from pyro_affine.guide_task import GuideTask
from pyro_affine.parameters import ParameterFinder
from pyro_affine.particles import Pair
from pyro_affine.random_state import seeded
from pyro_affine.stopping import Budget, Plateau
from pyro_affine.task import LoopOptions, OptimizerFactory, check_optimizer, make_optimizer
from pyro_affine.traces import sample_sites
from pyro_affine.trained_weights import Weights
from pyro_affine.training import TrainingLoop

_STEPS = 5000  # enough for posteriors of tens of latents at 64 draws a step; a plateau ends it earlier
_MOST_LOST = 0.01  # share of the steps, or of draws of the fitted guide
_NUM_CHECKED = 64  # of these
_START_SHARE = 0.15  # of the steps or seconds, for the Gaussian that a guide starts from


def fit_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    num_steps: int | None = None,
    seconds: float | None = None,
    learning_rate: float | None = None,
    optimizer: OptimizerFactory = torch.optim.Adam,
    num_particles: int | None = None,
    warmup: int = 50,
    decay: float = 0.5,
    tolerance: float | None = 0.01,
    evaluate_every: int = 250,
    compile: Compile = False,
    compile_model: bool = False,
    seed: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 500,
) -> FitResult:
    """Fit a guide to a model by maximising the ELBO, E_q[log p(data, z) - log q(z)].

    The loss is that of Pyro's ``Trace_ELBO``, over ``num_particles`` draws a step: at once where the model allows
    it, which is found out by comparison with single draws, and else one by one, with a warning. The learning rate
    rises over ``warmup`` steps, stays, and falls to zero by a cosine over the last part of the fit, in which the
    weights are averaged; whichever of averaged, last and best weights has the highest ELBO on common draws is kept.
    A plateau first makes the draws of a step more, then brings that last part forward. A guide with a method
    ``warm_start``, such as ``AutoRealNVP``, first looks for a good start, in 15 % of the budget, or up to 60 %
    where it has far to go. Gradients are clipped at twice the running median of their norms, and steps above ten
    times it left out. Steps that are not finite, or whose draw the model refuses, are left out too.

    Ctrl-C ends the fit and keeps what was trained. With ``checkpoint``, a fit that was stopped in any way goes on
    when the same call is made again; on a CPU, with ``num_steps``, to the same weights bit for bit. The parameters
    are those that Pyro finds: ``pyro.param``, ``pyro.module`` and PyroModules, in the guide and the model.

    Under ``torchrun`` the draws of a step are split among its processes, rounded up; see docs/many_processes.md.

    Args:
        model: a Pyro model.
        guide: a Pyro guide for it, such as ``AutoRealNVP(model)``.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        num_steps: the longest that the fit may take, in steps; 5000 if ``seconds`` is not given either.
        seconds: the longest that it may take, in seconds. A fit that the clock ends is not reproducible.
        learning_rate: the highest; default 0.1 / D for D latent entries, within [5e-4, 5e-3], for 64 draws a step, and
            twice that where there are 256 from the start.
        optimizer: called with (parameters, lr=...); any class of ``torch.optim`` but LBFGS, or a partial of it.
        num_particles: draws a step. Default 8 one by one; at once 64, and 256 from the first plateau on, or from the
            start where ``seconds`` is given and that makes a step less than twice as long, 1024 where that costs
            next to nothing.
        warmup: number of steps over which the learning rate rises; at most a tenth of all steps.
        decay: share of the fit over which the learning rate falls.
        tolerance: improvement between evaluations, in nats, below which the ELBO is on a plateau; None to use the
            whole budget.
        evaluate_every: steps between evaluations of the ELBO, each on the same 1024 draws (64 if one by one).
        compile: True compiles the way of the draws through the guide by ``torch.compile``; also a mode, or a dict of
            its arguments. It takes a minute, see docs/compile.md.
        compile_model: whether to record the operations of the model once and play them back, which makes the model's
            part of a step up to ten times as fast, and a step of a small model a quarter shorter; for models that
            neither branch on values nor change from call to call. Where this or ``compile`` cannot be done, a warning
            says so.
        seed: makes the fit reproducible; torch's random state is put back after it.
        progress: whether to show a bar, in a terminal or a notebook.
        checkpoint: file that the fit is saved to, and resumed from if it is there.
        every: steps between checkpoints.

    Returns:
        Losses, times, the ELBO reached, and why it stopped.

    Warns:
        RuntimeWarning: if more than one step in a hundred came to nothing in float32, or if the ELBO
            counts more than one draw in a hundred that the model refuses, as distributions are not validated there.

    Raises:
        NonFiniteError: if losses or gradients stay non-finite; it names step and site, and the guide holds the last
            good weights.
        ValueError: if an argument is out of range, the guide lacks a latent site, there is nothing to train, or the
            checkpoint is damaged or of another fit.
        LostProcessError: if another process of several fails.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> model = lambda: pyro.sample("z", dist.Normal(3.0, 1.0))
    >>> fit = fit_guide(model, AutoNormal(model), num_steps=200, learning_rate=0.1, seed=0, progress=False)
    >>> abs(fit.best) < 0.05
    True
    """
    options = LoopOptions(warmup, evaluate_every, checkpoint, every, progress)
    num_steps = _STEPS if num_steps is None and seconds is None else num_steps
    pair = Pair(model, guide, args, {} if kwargs is None else kwargs)
    _check(optimizer, learning_rate, num_particles)
    with joined() as processes, seeded(processes.seed(seed)), _without_nan_warnings():
        budget = Budget(num_steps, seconds, decay=decay, clock=processes.clock if seconds else None)
        finder = ParameterFinder({"guide": guide, "model": model})
        model_trace, _ = pair.prototype()
        nesting, reason = processes.from_first(pair.find_nesting())
        _start_warm(pair, nesting, budget, finished=processes.from_first(_is_finished(checkpoint)))
        arguments = {"seed": seed, "learning_rate": learning_rate}
        task = GuideTask(pair, num_particles, nesting=nesting, reason=reason, arguments=arguments, processes=processes)
        weights = Weights(finder.find(task.touch_parameters), finder.modules)
        _prepare(task, weights, seconds, compile=compile, compile_model=compile_model)
        rate = learning_rate or _default_rate(model_trace, task.num_particles)
        made = make_optimizer(optimizer, list(weights.parameters.values()), lr=rate)
        fit = TrainingLoop(task, weights, made, budget=budget, rule=Plateau(tolerance), options=options).run()
        return _finished(fit, task, weights)


def _check(optimizer: OptimizerFactory, learning_rate: float | None, num_particles: int | None) -> None:
    """What would be found out only after the search for a start."""
    check_optimizer(optimizer, learning_rate)
    if num_particles is not None and num_particles < 1:
        raise ValueError(f"num_particles must be at least 1, got {num_particles}; 64 is the default")


def _is_finished(checkpoint: str | os.PathLike[str] | None) -> bool:
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    return state is not None and bool(state["finished"])


def _start_warm(pair: Pair, nesting: int | None, budget: Budget, *, finished: bool) -> None:
    """Let a guide that can do so find its own starting point, such as ``AutoRealNVP``, in a share of the budget.

    Where the fit is finished already, and its weights will be read from a file, hardly anything is spent.
    """
    start = getattr(pair.guide, "warm_start", None)
    if start is not None:
        num_runs = None if budget.num_steps is None else math.ceil(_START_SHARE * budget.num_steps)
        limit = None if budget.seconds is None else _START_SHARE * budget.seconds
        start(pair.model, pair.args, pair.kwargs, nesting=nesting, seconds=limit, num_runs=1 if finished else num_runs)


def _prepare(
    task: GuideTask, weights: Weights, seconds: float | None, *, compile: Compile, compile_model: bool
) -> None:
    """Weights, the loss and the number of draws are the same in all processes from here on."""
    task.processes.align(weights)
    task.use_direct_loss(list(weights.parameters.values()), compile=compile, compile_model=compile_model)
    if seconds is not None:
        task.grow_if_cheap(seconds)
    task.load_state_dict(task.processes.from_first(task.state_dict()) | {"num_dropped": 0})  # from here on


def _default_rate(model_trace: Any, num_particles: int) -> float:
    """0.1 / D within [5e-4, 5e-3] for 64 draws a step, and as the root of their number.

    The rate that won most often in Agrawal et al. (2020), kept from extremes; more draws make a gradient that is
    worth longer steps.
    """
    sites = [site for site in sample_sites(model_trace).values() if not site["is_observed"]]
    num_entries = max(sum(int(site["value"].numel()) for site in sites), 1)
    rate = min(max(0.1 / num_entries, 5e-4), 5e-3)
    return rate * math.sqrt(max(1.0, num_particles / 64))


def _finished(fit: FitResult, task: GuideTask, weights: Weights) -> FitResult:
    """The result, once all processes have the weights of the first; and warnings of what to doubt in it."""
    task.processes.align(weights)
    _warn_of_precision(fit, weights)
    _warn_of_refusals(task)
    return fit


def _warn_of_precision(fit: FitResult, weights: Weights) -> None:
    lost = fit.num_nonfinite / max(fit.num_steps, 1)
    if lost > _MOST_LOST and any(p.dtype == torch.float32 for p in weights.parameters.values()):
        warnings.warn(
            f"{fit.num_nonfinite} of {fit.num_steps} steps came to nothing in float32, as the model refused draws or "
            "gave no finite gradient. Models that factor matrices often need float64: "
            "torch.set_default_dtype(torch.float64), and data to match",
            RuntimeWarning,
            stacklevel=4,
        )


def _warn_of_refusals(task: GuideTask) -> None:
    with seeded(0):
        refusals = task.pair.refusals(_NUM_CHECKED, task.nesting)
    if len(refusals) > _MOST_LOST * _NUM_CHECKED:
        warnings.warn(
            f"the model refuses {len(refusals)} of {_NUM_CHECKED} draws of the fitted guide ({refusals[0]}). The ELBO "
            "counts them, as they have a density where nothing is validated; psis gives them no weight. Keep the "
            "parameters of distributions in their domain, such as a rate by exp or softplus",
            RuntimeWarning,
            stacklevel=4,
        )


@contextmanager
def _without_nan_warnings() -> Iterator[None]:
    """Steps that are not finite are counted and reported here, so Pyro need not warn of each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")
        warnings.filterwarnings("ignore", message="Encountered.*inf")
        yield
