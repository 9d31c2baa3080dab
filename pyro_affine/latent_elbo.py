"""The ELBO of a flow guide, without a Pyro trace of the guide: for loops in which the time of a step counts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_affine.gradients import PathGradientDistribution, draw_with_score
from pyro_affine.latent_density import LatentDensity
from pyro_affine.particles import BAD_DRAW, Pair
from pyro_affine.random_state import new_seed, seeded
from pyro_affine.transform import FlowTransform

_TRIES = 10  # seeds; a guide of sensible width draws ten refused starts in a row only if the model refuses all


class LatentELBO:
    """E_q[log p(data, z) - log q(z)] over draws of a guide, negative, as a loss; value and gradient of ``Trace_ELBO``.

    Draws for which the model raises a numerical error, or gives a log-density or gradient that is not finite, are
    left out and counted. A loss over less than half of the draws is NaN.

    Args:
        guide: set up; an ``AutoRealNVP``.
        density: of the model, which must have nothing to train and change in nothing from call to call.

    Attributes:
        num_dropped: number of draws left out so far.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_affine.guides import AutoRealNVP
    >>> model = lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    >>> guide = AutoRealNVP(model, init_scale=1.0)
    >>> _ = guide()
    >>> loss = LatentELBO(guide, LatentDensity(model, guide, nesting=0))
    >>> bool(loss(8) > -10)
    True
    """

    def __init__(self, guide: AutoContinuous, density: LatentDensity) -> None:
        self.guide, self.density, self.num_dropped = guide, density, 0
        self._has_path = isinstance(guide.get_posterior(), PathGradientDistribution)

    def __call__(self, num_draws: int) -> Tensor:
        """The loss over so many fresh draws, in nats, with a graph to the guide's parameters."""
        draw = self._path_draw if self._has_path else self._total_draw
        z, log_q, entropy, score_q = draw(num_draws)
        values, score_p = self.density.value_and_score(z)
        kept = values.isfinite() & score_p.isfinite().all(-1) & log_q.isfinite()
        num_kept = int(kept.sum())
        self.num_dropped += num_draws - num_kept
        if 2 * num_kept < num_draws:
            return z.sum() * math.nan
        # no graph through the model: its gradient at the draws is all that the guide needs of it
        force = (score_p.to(z) - score_q).masked_fill(~kept[:, None], 0.0)
        surrogate = ((entropy * kept).sum() - (z * force).sum()) / num_kept
        value = (log_q.detach().double() - values)[kept].mean()
        return surrogate + (value.to(surrogate) - surrogate.detach())

    def _path_draw(self, num_draws: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draws, log q, what else of log q has a gradient (nothing), and the score of q that opposes that of p."""
        z, log_q, score = draw_with_score(self.guide.get_base_dist(), self.guide.get_transform(), num_draws)
        return z, log_q, torch.zeros_like(log_q), score

    def _total_draw(self, num_draws: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        base = self.guide.get_base_dist()
        x = base.rsample((num_draws,))
        z, log_det = self.guide.get_transform()._forward(x)
        log_q = base.log_prob(x) - log_det
        return z, log_q, log_q, torch.zeros_like(z)


def latent_density(pair: Pair, nesting: int | None) -> LatentDensity | None:
    """The density of the model, if ``LatentELBO`` can train this guide on it.

    Args:
        pair: model and guide, the guide set up.
        nesting: from ``Pair.find_nesting``.
    """
    guide = pair.guide
    if not isinstance(guide, AutoContinuous) or not _is_one_flow(guide):
        return None
    density = LatentDensity(pair.model, guide, pair.args, pair.kwargs, nesting=nesting)
    return None if density.is_random() else density


def _is_one_flow(guide: AutoContinuous) -> bool:
    try:
        return isinstance(guide.get_transform(), FlowTransform)
    except (NotImplementedError, TypeError):  # a guide without a transform, or one that depends on the arguments
        return False


def agree(loss: Callable[[], Tensor], other: Callable[[], Tensor], parameters: list[Tensor]) -> bool:
    """Whether two losses have the same value and gradient at a draw that both accept.

    Args:
        loss, other: called with the same random state.
        parameters: of the gradient; one that only one of the losses trains is a difference.
    """
    for _ in range(_TRIES):
        seed = new_seed()
        try:
            found, expected = (_with_gradient(call, parameters, seed) for call in (loss, other))
        except BAD_DRAW:
            continue
        if expected.isfinite().all():
            tolerance = torch.finfo(expected.dtype).eps ** 0.5
            return bool((found - expected).norm() <= tolerance * (1 + expected.norm()))
    return False


def _with_gradient(loss: Callable[[], Tensor], parameters: list[Tensor], seed: int) -> Tensor:
    """The loss and all entries of its gradient, one after the other."""
    with seeded(seed):
        value = loss()
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([value.detach().reshape(1), *(gradient.flatten().to(value) for gradient in gradients)])
