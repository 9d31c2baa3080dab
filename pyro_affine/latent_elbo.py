"""The ELBO of a flow guide, without a Pyro trace of the guide: for loops in which the time of a step counts."""

from __future__ import annotations

import math

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_affine.gradients import PathGradientDistribution, draw_with_score
from pyro_affine.latent_density import LatentDensity


class LatentELBO:
    """E_q[log p(data, z) - log q(z)] over draws of a guide, negative, as a loss; value and gradient of ``Trace_ELBO``.

    Draws for which the model raises a numerical error, or gives a log-density or gradient that is not finite, are
    left out and counted. A loss over less than half of the draws is NaN.

    Args:
        guide: set up; an ``AutoRealNVP``.
        density: of the model, which must have nothing to train and change in nothing from call to call.
        num_draws: draws a step.

    Attributes:
        num_dropped: number of draws left out so far.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_affine.guides import AutoRealNVP
    >>> model = lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    >>> guide = AutoRealNVP(model, init_scale=1.0)
    >>> _ = guide()
    >>> loss = LatentELBO(guide, LatentDensity(model, guide, nesting=0), num_draws=8)
    >>> bool(loss() > -10)
    True
    """

    def __init__(self, guide: AutoContinuous, density: LatentDensity, num_draws: int) -> None:
        self.guide, self.density, self.num_draws = guide, density, num_draws
        self.num_dropped = 0
        self._has_path = isinstance(guide.get_posterior(), PathGradientDistribution)

    def __call__(self) -> Tensor:
        """The loss of fresh draws, in nats, with a graph to the guide's parameters."""
        draw = self._path_draw if self._has_path else self._total_draw
        z, log_q, entropy, score_q = draw()
        values, score_p = self.density.value_and_score(z)
        kept = values.isfinite() & score_p.isfinite().all(-1) & log_q.isfinite()
        num_kept = int(kept.sum())
        self.num_dropped += self.num_draws - num_kept
        if 2 * num_kept < self.num_draws:
            return z.sum() * math.nan
        # no graph through the model: its gradient at the draws is all that the guide needs of it
        force = (score_p.to(z) - score_q).masked_fill(~kept[:, None], 0.0)
        surrogate = ((entropy * kept).sum() - (z * force).sum()) / num_kept
        value = (log_q.detach().double() - values)[kept].mean()
        return surrogate + (value.to(surrogate) - surrogate.detach())

    def _path_draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draws, log q, what else of log q has a gradient (nothing), and the score of q that opposes that of p."""
        z, log_q, score = draw_with_score(self.guide.get_base_dist(), self.guide.get_transform(), self.num_draws)
        return z, log_q, torch.zeros_like(log_q), score

    def _total_draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        base = self.guide.get_base_dist()
        x = base.rsample((self.num_draws,))
        z, log_det = self.guide.get_transform()._forward(x)
        log_q = base.log_prob(x) - log_det
        return z, log_q, log_q, torch.zeros_like(z)
