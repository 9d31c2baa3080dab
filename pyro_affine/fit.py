"""Variational fits in one call."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_affine.fit_result import FitResult
from pyro_affine.parameters import ParameterFinder
from pyro_affine.particles import Pair, first_success
from pyro_affine.random_state import new_seed, seeded
from pyro_affine.stopping import Budget, Plateau
from pyro_affine.task import LoopOptions, OptimizerFactory, make_optimizer
from pyro_affine.traces import sample_sites
from pyro_affine.trained_weights import Weights
from pyro_affine.training import TrainingLoop

_STEPS = 5000  # enough for posteriors of tens of latents at 64 draws a step; a plateau ends it earlier
_START_SHARE = 0.15  # of the steps or seconds, for the Gaussian that a guide starts from
_PARTICLES_AT_ONCE, _PARTICLES_ONE_BY_ONE = 64, 8
_BANK_AT_ONCE, _BANK_ONE_BY_ONE = 1024, 64


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
    A plateau brings that last part forward. A guide with a method ``warm_start``, such as ``AutoRealNVP``, first looks
    for a good start, in 15 % of the budget. Gradients are clipped at twice the running median of their norms, and
    steps above ten times it left out. Steps that are not finite, or whose draw the model refuses, are left out too.

    Ctrl-C ends the fit and keeps what was trained. With ``checkpoint``, a fit that was stopped in any way goes on
    when the same call is made again; on a CPU, with ``num_steps``, to the same weights bit for bit. The parameters
    are those that Pyro finds: ``pyro.param``, ``pyro.module`` and PyroModules, in the guide and the model.

    Args:
        model: a Pyro model.
        guide: a Pyro guide for it, such as ``AutoRealNVP(model)``.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        num_steps: the longest that the fit may take, in steps; 5000 if ``seconds`` is not given either.
        seconds: the longest that it may take, in seconds. A fit that the clock ends is not reproducible.
        learning_rate: the highest; default 0.1 / D for D latent entries, within [5e-4, 5e-3].
        optimizer: called with (parameters, lr=...); any class of ``torch.optim`` but LBFGS, or a partial of it.
        num_particles: draws a step; default 64 at once, or 8 one by one.
        warmup: number of steps over which the learning rate rises; at most a tenth of ``num_steps``.
        decay: share of the fit over which the learning rate falls.
        tolerance: improvement between evaluations, in nats, below which the ELBO is on a plateau; None to use the
            whole budget.
        evaluate_every: steps between evaluations of the ELBO, each on the same 1024 draws (64 if one by one).
        seed: makes the fit reproducible; torch's random state is put back after it.
        progress: whether to show a bar, in a terminal or a notebook.
        checkpoint: file that the fit is saved to, and resumed from if it is there.
        every: steps between checkpoints.

    Returns:
        Losses, times, the ELBO reached, and why it stopped.

    Raises:
        NonFiniteError: if losses or gradients stay non-finite; it names step and site, and the guide holds the last
            good weights.
        ValueError: if an argument is out of range, the guide lacks a latent site, there is nothing to train, or the
            checkpoint is damaged or of another fit.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> model = lambda: pyro.sample("z", dist.Normal(3.0, 1.0))
    >>> fit = fit_guide(model, AutoNormal(model), num_steps=200, learning_rate=0.1, seed=0, progress=False)
    >>> abs(fit.best) < 0.05
    True
    """
    options = LoopOptions(warmup, evaluate_every, checkpoint, every, progress)
    num_steps = _STEPS if num_steps is None and seconds is None else num_steps
    budget = Budget(num_steps, seconds, decay=decay)
    pair = Pair(model, guide, args, kwargs or {})
    with seeded(seed), _without_nan_warnings():
        finder = ParameterFinder({"guide": guide, "model": model})
        model_trace, _ = pair.prototype()
        task = GuideTask(pair, num_particles, seed=seed)
        _start_warm(pair, task.nesting, num_steps, seconds)
        weights = Weights(finder.find(lambda: first_success(task.loss)), finder.modules)
        rate = _default_rate(model_trace) if learning_rate is None else learning_rate
        optimizer_made = make_optimizer(optimizer, list(weights.parameters.values()), lr=rate)
        rule = Plateau(tolerance)
        return TrainingLoop(task, weights, optimizer_made, budget=budget, rule=rule, options=options).run()


def _start_warm(pair: Pair, nesting: int | None, num_steps: int | None, seconds: float | None) -> None:
    """Let a guide that can do so find its own starting point, such as ``AutoRealNVP``, in a share of the budget."""
    start = getattr(pair.guide, "warm_start", None)
    if start is not None:
        num_runs = None if num_steps is None else math.ceil(_START_SHARE * num_steps)
        limit = None if seconds is None else _START_SHARE * seconds
        start(pair.model, pair.args, pair.kwargs, nesting=nesting, seconds=limit, num_runs=num_runs)


class GuideTask:
    """The ELBO of a guide, as a task for the training loop.

    Args:
        pair: model and guide; the guide is set up.
        num_particles: draws a step; None for a default that suits how they run.
        seed: seed of the fit, for checkpoints.

    Raises:
        ValueError: if ``num_particles`` is not positive.
    """

    kind = "guide"
    loss_name, score_name = "ELBO", "fixed draws"
    remedy = (
        "Look at what the model does there for a far-out draw (a scale that overflows, the log of 0), start from a "
        "smaller init_scale, lower learning_rate, or use float64."
    )

    def __init__(self, pair: Pair, num_particles: int | None = None, *, seed: int | None = None) -> None:
        if num_particles is not None and num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {num_particles}; 64 is the default")
        self.pair = pair
        self.nesting, reason = pair.find_nesting()
        at_once = self.nesting is not None
        self.num_particles = num_particles or (_PARTICLES_AT_ONCE if at_once else _PARTICLES_ONE_BY_ONE)
        self.num_scored = _BANK_AT_ONCE if at_once else _BANK_ONE_BY_ONE
        self.arguments = {"num_particles": self.num_particles, "seed": seed}
        self._elbo = Trace_ELBO(
            self.num_particles,
            max_plate_nesting=math.inf if self.nesting is None else self.nesting,
            vectorize_particles=at_once,
        )
        self._bank_seed = new_seed()
        if reason and self.num_particles > 1:
            _warn_of_single_draws(self.num_particles, reason)

    def prepare(self) -> None:
        """Nothing to fetch."""

    def loss(self) -> Tensor:
        """Negative ELBO over the particles of a step, in nats."""
        pair = self.pair
        loss: Tensor = self._elbo.differentiable_loss(pair.model, pair.guide, *pair.args, **pair.kwargs)
        return loss

    def scores(self) -> Tensor:
        """log p - log q of the same draws each time. Shape: (num_scored,)."""
        return self._scores(self._bank_seed)

    def final_scores(self) -> Tensor:
        """log p - log q of draws that training has not seen. Shape: (num_scored,)."""
        return self._scores(self._bank_seed + 1)

    def _scores(self, seed: int) -> Tensor:
        with seeded(seed):
            return self.pair.log_weights(self.num_scored, self.nesting)

    def locate(self) -> str:
        """The first site that is not finite."""
        return self.pair.first_bad_site(self.num_particles, self.nesting)

    def describe(self, loss: float) -> str:
        """The ELBO."""
        return f"{-loss:.5g}"

    def state_dict(self) -> dict[str, Any]:
        """The seed of the bank of draws."""
        return {"bank_seed": self._bank_seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Use the bank of the run that is resumed."""
        self._bank_seed = state["bank_seed"]


def _default_rate(model_trace: Any) -> float:
    """0.1 / D within [5e-4, 5e-3]: the rate that won most often in Agrawal et al. (2020), kept from extremes."""
    sites = [site for site in sample_sites(model_trace).values() if not site["is_observed"]]
    num_entries = max(sum(int(site["value"].numel()) for site in sites), 1)
    return min(max(0.1 / num_entries, 5e-4), 5e-3)


def _warn_of_single_draws(num_particles: int, reason: str) -> None:
    warnings.warn(
        f"the {num_particles} particles of a step run one by one: {reason}. To run them at once, which is faster, "
        "declare batch dimensions with pyro.plate, index from the right (x[..., i]) and do not branch on values.",
        stacklevel=3,
    )


@contextmanager
def _without_nan_warnings() -> Iterator[None]:
    """Steps that are not finite are counted and reported here, so Pyro need not warn of each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN")
        warnings.filterwarnings("ignore", message="Encountered.*inf")
        yield
